use std::sync::Arc;

use super::driver::DevicePtr;
use super::linear::numbers;
use super::params::params;
use super::{Buffer, Element, Gpu, Grid, Kernel, Slice};
use crate::error::{check_indices, check_length, check_rows};
use crate::{GroupScore, Groups, Normalize, OpError, Score};

const OP: &str = "route";

params! {
    struct RouteParams {
        logits: DevicePtr,
        correction: DevicePtr,
        experts: DevicePtr,
        weights: DevicePtr,
        tokens: u32,
        count: u32,
        chosen: u32,
        score: u32,
        jitter: f32,
        groups: u32,
        groups_chosen: u32,
        two_best: u32,
        normalize: u32,
        normalize_by: f32,
        scale: f32,
    }
}

/// How a router chooses among experts.
#[derive(Clone, Copy, Debug)]
pub struct Routing<'a> {
    /// Number of experts, `E`.
    pub experts: usize,
    /// Experts per token, `k`.
    pub chosen: usize,
    /// From logits to scores.
    pub score: Score,
    /// Groups of experts, if the choice is limited to some.
    pub groups: Option<Groups>,
    /// `[E]`, f32, added to the scores to choose, not to weight.
    pub correction: Option<Slice<'a>>,
    /// Normalization of the weights of the chosen.
    pub normalize: Normalize,
    /// Multiplies the weights at last.
    pub scale: f32,
}

/// Which experts each token goes to, and with what weight. Its memory grows to what the largest call needs.
#[derive(Debug)]
pub struct Routes {
    gpu: Arc<Gpu>,
    /// `[T, k]` at least.
    experts: Buffer,
    weights: Buffer,
    tokens: usize,
    chosen: usize,
    /// Experts there are: all numbers of experts are below.
    of: usize,
}

impl Routes {
    /// No routes, and no memory yet.
    pub fn new(gpu: &Arc<Gpu>) -> Result<Self, OpError> {
        let (experts, weights) = (gpu.buffer(Element::U32, 0)?, gpu.buffer(Element::F32, 0)?);
        Ok(Self { gpu: gpu.clone(), experts, weights, tokens: 0, chosen: 0, of: 0 })
    }

    /// Makes room for this many tokens with as many experts each. What the routes were is lost.
    pub fn reserve(&mut self, tokens: usize, chosen: usize) -> Result<(), OpError> {
        let len = tokens.saturating_mul(chosen);
        (self.tokens, self.chosen, self.of) = (0, chosen, 0);
        if self.experts.len() < len {
            self.experts = self.gpu.buffer(Element::U32, len)?;
            self.weights = self.gpu.buffer(Element::F32, len)?;
        }
        Ok(())
    }

    /// Number of tokens, `T`.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Experts per token, `k`.
    pub fn chosen(&self) -> usize {
        self.chosen
    }

    /// Experts there are to choose from.
    pub fn of(&self) -> usize {
        self.of
    }

    /// `[T, k]`, best first, u32.
    pub fn experts(&self) -> Slice<'_> {
        self.experts.slice(0..self.tokens * self.chosen)
    }

    /// `[T, k]`, f32.
    pub fn weights(&self) -> Slice<'_> {
        self.weights.slice(0..self.tokens * self.chosen)
    }

    /// What they are, when all work before is done.
    pub fn read(&self) -> Result<crate::Routes, OpError> {
        let len = self.tokens * self.chosen;
        let mut routes = crate::Routes { experts: vec![0; len], weights: vec![0.0; len] };
        self.experts.read_into(0, &mut routes.experts)?;
        self.weights.read_into(0, &mut routes.weights)?;
        Ok(routes)
    }

    /// Routes that somebody else has chosen.
    pub(super) fn given(
        gpu: &Arc<Gpu>,
        of: usize,
        chosen: usize,
        routes: &crate::Routes,
    ) -> Result<Self, OpError> {
        check_indices(OP, "expert", &routes.experts, of)?;
        check_length(OP, "weights", routes.experts.len(), routes.weights.len())?;
        let tokens = check_rows(OP, "experts", chosen, routes.experts.len())?;
        let (experts, weights) = (gpu.upload(&routes.experts)?, gpu.upload(&routes.weights)?);
        Ok(Self { gpu: gpu.clone(), experts, weights, tokens, chosen, of })
    }
}

/// Chooses experts for every token; `scores`: `[T, E]`, f32, as the router's layer computes them. What was in `routes` is
/// replaced.
///
/// Of equally good experts, or groups, the first is taken. Errors when there are not as many experts as are to be chosen,
/// or groups do not divide them.
pub fn route(
    gpu: &Gpu,
    scores: Slice<'_>,
    routing: &Routing<'_>,
    routes: &mut Routes,
) -> Result<(), OpError> {
    /// Warps of a block.
    const WARPS_MAX: usize = 4;
    let Routing { experts: count, chosen, score, groups, correction, normalize, scale } = *routing;
    let of_host =
        crate::Routing { experts: count, chosen, score, groups, correction: None, normalize, scale };
    let tokens = of_host.check(OP, scores.len())?;
    scores.check(OP, "scores", Element::F32, scores.len())?;
    if let Some(correction) = correction {
        correction.check(OP, "correction", Element::F32, count)?;
    }
    let (groups, groups_chosen, two_best) = match groups {
        Some(Groups { count, chosen, score }) => (count, chosen, score == GroupScore::TwoBest),
        None => (0, 0, false),
    };
    let bytes = (2 * (count + chosen) + groups) * size_of::<f32>();
    let bytes_max = gpu.properties().shared_bytes_max as usize;
    if bytes > bytes_max {
        return Err(OpError::unsupported(OP, format!("{count} experts")));
    }
    routes.reserve(tokens, chosen)?;
    let [tokens_u32, count_u32, chosen_u32] =
        numbers(OP, [("tokens", tokens), ("experts", count), ("chosen", chosen)])?;
    let (score, jitter) = match score {
        Score::Softmax => (0, 0.0),
        Score::Sigmoid => (1, 0.0),
        Score::SoftmaxOfChosen => (2, 0.0),
        Score::SparseMixer { jitter } => (3, jitter),
    };
    let (normalize, normalize_by) = match normalize {
        Normalize::No => (0, 0.0),
        Normalize::Sum { eps } => (1, eps),
        Normalize::Norm { p } => (2, p),
    };
    let params = RouteParams {
        logits: scores.ptr,
        correction: Slice::ptr_or_null(correction),
        experts: routes.experts.all_mut().ptr,
        weights: routes.weights.all_mut().ptr,
        tokens: tokens_u32,
        count: count_u32,
        chosen: chosen_u32,
        score,
        jitter,
        groups: groups as u32,
        groups_chosen: groups_chosen as u32,
        two_best: u32::from(two_best),
        normalize,
        normalize_by,
        scale,
    };
    (routes.tokens, routes.of) = (tokens, count);
    if tokens == 0 {
        return Ok(());
    }
    let warps = (bytes_max / bytes).clamp(1, WARPS_MAX);
    let grid = Grid {
        blocks: [tokens.div_ceil(warps) as u32, 1, 1],
        threads: 32 * warps as u32,
        shared_bytes: (warps * bytes) as u32,
    };
    // SAFETY: there are `tokens` rows of scores, and room for as many rows of routes.
    unsafe { gpu.launch(OP, Kernel { module: "route", name: "route" }, grid, &params) }
}
