use std::sync::Arc;

use super::linear::Weight;
use super::{Checker, FLOATS, bits, computed};
use crate::cuda::{self, Element, ExpertScratch, ExpertSet, ExpertWeights};
use crate::{Activation, Expert, Gating, OpError, Projection, Routes, reference};

const SILU: Gating = Gating::Activation(Activation::Silu);

pub(super) fn check(c: &mut Checker) -> Result<(), OpError> {
    for element in FLOATS {
        for (count, width, inner, biased) in
            [(1, 1, 1, true), (4, 17, 3, false), (5, 64, 72, true), (3, 136, 66, false)]
        {
            let layer = Mixture::random(c, element, count, width, inner, biased)?;
            for tokens in [0, 1, 3, 40] {
                for per_token in [1, count] {
                    layer.check(c, SILU, tokens, per_token)?;
                }
            }
        }
        // Most experts get nothing, or less than fills a tile; then all get more than the smaller tiles hold.
        let layer = Mixture::random(c, element, 33, 40, 24, false)?;
        for (tokens, per_token) in [(2, 8), (3, 8), (21, 6)] {
            layer.check(c, SILU, tokens, per_token)?;
        }
        let layer = Mixture::random(c, element, 2, 72, 80, true)?;
        for (tokens, per_token) in [(70, 2), (260, 1)] {
            layer.check(c, SILU, tokens, per_token)?;
        }
        for gating in
            [Gating::Activation(Activation::Gelu), Gating::ClampedSwiglu { limit: 1.5, alpha: 1.702 }]
        {
            layer.check(c, gating, 2, 1)?;
            layer.check(c, gating, 11, 1)?;
        }
        twice(c, &layer)?;
    }
    refused(c)
}

/// The experts of a layer: gate, up and down of each, with biases.
struct Mixture {
    element: Element,
    projections: Vec<[(Weight, Vec<f32>); 3]>,
    weights: Vec<ExpertWeights>,
    on_device: ExpertSet,
    width: usize,
    inner: usize,
    biased: bool,
}

impl Mixture {
    fn random(
        c: &mut Checker,
        element: Element,
        count: usize,
        width: usize,
        inner: usize,
        biased: bool,
    ) -> Result<Self, OpError> {
        let mut projections = Vec::new();
        let mut weights = Vec::new();
        for index in 0..count {
            let mut projection = |rows, cols| -> Result<_, OpError> {
                // Strides that differ.
                let weight = Weight::random(c, element, rows, cols, index % 3 * 8)?;
                let memory = Arc::new(c.given(element, &weight.floats.host)?.buffer.into());
                let matrix = cuda::OwnedMatrix { memory, rows, cols, stride: weight.stride };
                let bias = c.floats(Element::F32, rows)?;
                Ok(((weight, bias.host), (matrix, biased.then(|| Arc::new(bias.buffer)))))
            };
            let (gate, up, down) =
                (projection(inner, width)?, projection(inner, width)?, projection(width, inner)?);
            projections.push([gate.0, up.0, down.0]);
            weights.push(ExpertWeights { gate: gate.1, up: up.1, down: down.1 });
        }
        let on_device = ExpertSet::new(&c.gpu(), weights.clone())?;
        Ok(Self { element, projections, weights, on_device, width, inner, biased })
    }

    fn experts(&self) -> Vec<Expert<'_>> {
        let projections = self.projections.iter().map(|projections| {
            projections.each_ref().map(|(weight, bias)| Projection {
                weight: weight.matrix(),
                bias: self.biased.then_some(&bias[..]),
            })
        });
        projections.map(|[gate, up, down]| Expert { gate, up, down }).collect()
    }

    /// Different experts for each token, with random weights.
    fn check(&self, c: &mut Checker, gating: Gating, tokens: usize, per_token: usize) -> Result<(), OpError> {
        let mut routes = Routes::default();
        for _ in 0..tokens {
            routes.experts.extend(&c.random().permutation(self.projections.len())[..per_token]);
            routes.weights.extend(c.random().numbers(per_token));
        }
        self.compare(c, gating, tokens, per_token, &routes)
    }

    /// The result of the last token does not change when it is alone.
    fn compare(
        &self,
        c: &mut Checker,
        gating: Gating,
        tokens: usize,
        per_token: usize,
        routes: &Routes,
    ) -> Result<(), OpError> {
        let Self { element, width, inner, .. } = *self;
        let case = format!(
            "{tokens} tokens through {per_token} of {} experts, {element:?}, {inner} x {width}, {gating:?}",
            self.projections.len()
        );
        let gpu = c.gpu();
        let input = c.floats(element, tokens * width)?;
        let mut scratch = ExpertScratch::new(&gpu)?;
        let mut run = |first: usize| -> Result<_, OpError> {
            let chosen = first * per_token..tokens * per_token;
            let routes = Routes {
                experts: routes.experts[chosen.clone()].to_vec(),
                weights: routes.weights[chosen].to_vec(),
            };
            let routes = cuda::Routes::given(&gpu, self.projections.len(), per_token, &routes)?;
            let mut out = c.unwritten(element, (tokens - first) * width)?;
            let input = input.buffer.slice(first * width..tokens * width);
            let (experts, scratch, to) = (&self.on_device, &mut scratch, out.all_mut());
            cuda::experts(&gpu, cuda::Experts { input, routes: &routes, experts, gating, scratch, out: to })?;
            Ok(out)
        };
        let all = run(0)?;
        let last = run(tokens.saturating_sub(1))?;
        let expected = reference::experts(&input.host, routes, &self.experts(), gating);
        // Rounded between the layers, behind them and in the end.
        c.close(&case, &all, &expected, 6.0 + computed(element, 8.0 + (width + inner) as f64 / 4.0))?;
        let (all, last) = (c.read(&all)?, c.read(&last)?);
        c.equal(
            format!("{case}, the last alone"),
            &bits(&last),
            &bits(&all[tokens.saturating_sub(1) * width..]),
        );
        Ok(())
    }
}

/// An expert that is named twice counts twice.
fn twice(c: &mut Checker, layer: &Mixture) -> Result<(), OpError> {
    let weights = c.random().numbers(12);
    let routes = Routes { experts: [1, 1, 0, 1, 0, 0].repeat(2), weights };
    layer.compare(c, SILU, 6, 2, &routes)
}

fn refused(c: &mut Checker) -> Result<(), OpError> {
    const OP: &str = "experts";
    let gpu = c.gpu();
    let layer = Mixture::random(c, Element::F16, 2, 8, 4, true)?;
    let other = Mixture::random(c, Element::F16, 2, 8, 5, true)?;
    let (input, wide) = (c.floats(Element::F16, 17)?, c.floats(Element::F32, 16)?);
    let mut scratch = ExpertScratch::new(&gpu)?;
    let mut out = c.unwritten(Element::F16, 16)?;
    let mut call = |input, routes: &cuda::Routes| {
        let (experts, scratch, out) = (&layer.on_device, &mut scratch, out.all_mut());
        cuda::experts(&gpu, cuda::Experts { input, routes, experts, gating: SILU, scratch, out })
    };
    let given = |of, experts: &[u32]| {
        let routes = Routes { experts: experts.into(), weights: vec![1.0; experts.len()] };
        cuda::Routes::given(&gpu, of, 1, &routes)
    };
    let length = |what, expected, found| Err(OpError::Length { op: OP, what, expected, found });
    let fitting = input.buffer.slice(0..16);
    let results = [
        call(fitting, &given(2, &[0, 1])?),
        call(fitting, &given(2, &[0, 1, 1])?),
        call(fitting, &given(3, &[0, 1])?),
        call(input.buffer.all(), &given(2, &[0, 1])?),
        call(wide.buffer.all(), &given(2, &[0, 1])?),
    ];
    let expected = [
        Ok(()),
        length("tokens of the routes", 2, 3),
        length("experts of the routes", 3, 2),
        length("out", 17, 16),
        Err(OpError::unsupported(OP, "input is of F32, F16 expected")),
    ];
    c.equal("experts, what does not fit", &results, &expected);

    let mixed = [layer.weights, other.weights].map(|mut weights| weights.remove(0));
    let result = ExpertSet::new(&gpu, mixed.into()).map(|_| ());
    c.equal("experts that differ", &[result], &[length("rows of a weight", 4, 5)]);
    Ok(())
}
