//! The operations on CPUs: tensors become slices, and the kernels do the work.

use std::ops::Range;
use std::sync::Arc;

use kernels::collective::LocalGroup;
use kernels::cpu::{self, Cpu};
use kernels::{Activation, DType, Gating, OpError, RopeTable, Values};

use super::{
    Attention, AttentionRules, AttentionScratch, CopyParts, DeviceMemory, Expert, ExpertScratch, ExpertSet,
    Experts, Indices, Link, LowRank, Matrix, MatrixStorage, Norm, Product, Projection, RopeAngles,
    RopeCacheWrite, Routes, Routing, SamplingState, SequenceBuffer, Tensor,
};
use crate::sampling::logprobs::Normalizer;
use crate::sampling::{Choice, Pick, Scratch};
use crate::weights::Weight;

pub(super) fn link(_: &Cpu, group: &Arc<LocalGroup>) -> Result<Link, OpError> {
    Ok(Link::Host(group.clone()))
}

pub(super) fn zeros(_: &Cpu, rows: usize, width: usize) -> Result<Tensor, OpError> {
    Tensor::host_zeros(rows, width)
}

pub(super) fn zeros_f32(_: &Cpu, rows: usize, width: usize) -> Result<Tensor, OpError> {
    Tensor::host_zeros(rows, width)
}

pub(super) fn zeros_cache(_: &Cpu, rows: usize, width: usize) -> Result<Tensor, OpError> {
    Tensor::host_zeros(rows, width)
}

pub(super) fn upload(_: &Cpu, elements: Vec<f32>, width: usize) -> Result<Tensor, OpError> {
    Tensor::from_host(elements, width)
}

pub(super) fn place(_: &Cpu, weight: Weight) -> Result<Matrix, OpError> {
    Ok(Matrix(MatrixStorage::Host(weight)))
}

pub(super) fn expert_set(_: &Cpu, experts: Vec<Expert>) -> Result<ExpertSet, OpError> {
    Ok(ExpertSet::Host(experts))
}

pub(super) fn indices(_: &Cpu) -> Indices {
    Indices::default()
}

pub(super) fn sequences(_: &Cpu) -> Result<SequenceBuffer, OpError> {
    Ok(SequenceBuffer::default())
}

pub(super) fn attention_scratch(_: &Cpu) -> Result<AttentionScratch, OpError> {
    Ok(AttentionScratch::Host)
}

pub(super) fn routes(_: &Cpu) -> Result<Routes, OpError> {
    Ok(Routes::Host(kernels::Routes::default()))
}

pub(super) fn expert_scratch(_: &Cpu) -> Result<ExpertScratch, OpError> {
    Ok(ExpertScratch::Host(cpu::ExpertScratch::default()))
}

pub(super) fn sampling_state(_: &Cpu) -> SamplingState {
    SamplingState::Host(Scratch::default())
}

pub(super) fn row_logprobs(
    _: &Cpu,
    _: &mut SamplingState,
    logits: &Tensor,
    at: &[u32],
    ids: &[u32],
) -> Result<Vec<f32>, OpError> {
    let rows = at.iter().zip(ids).map(|(&row, &id)| {
        let row = logits.host_row(row as usize);
        Normalizer::of_row(row).logprob(row[id as usize]) as f32
    });
    Ok(rows.collect())
}

pub(super) fn choose(
    _: &Cpu,
    state: &mut SamplingState,
    logits: &Tensor,
    picks: &mut [Pick<'_>],
) -> Result<Vec<Option<Choice>>, OpError> {
    let scratch = state.host_mut();
    let choices = picks
        .iter_mut()
        .map(|Pick { row, sampler, top }| sampler.choose(logits.host_row(*row), *top, scratch).ok());
    Ok(choices.collect())
}

/// Keys and values are f32.
pub(super) fn cache_element_bytes(_: &Cpu) -> usize {
    size_of::<f32>()
}

/// A CPU has no memory of its own.
pub(super) fn memory(_: &Cpu) -> Result<Option<DeviceMemory>, OpError> {
    Ok(None)
}

/// On a CPU the largest step takes minutes with a large model. So few tokens cost no more than one, whose time is that of
/// reading the weights, and even that is much of a start from files that are in memory.
pub(super) fn rehearsal_tokens(_: &Cpu) -> usize {
    3
}

/// Weights are used as they are stored.
pub(super) fn weight_dtype(_: &Cpu, stored: DType) -> DType {
    stored
}

pub(super) fn embedding(
    cpu: &Cpu,
    table: &Matrix,
    first: u32,
    ids: &Indices,
    out: &mut Tensor,
) -> Result<(), OpError> {
    cpu::embedding(cpu, &table.host(), ids.values(), first, out.host_mut())
}

pub(super) fn add_embedding(
    cpu: &Cpu,
    table: &Matrix,
    ids: &Indices,
    out: &mut Tensor,
) -> Result<(), OpError> {
    cpu::add_embedding(cpu, &table.host(), ids.values(), out.host_mut())
}

pub(super) fn linear<const N: usize>(
    cpu: &Cpu,
    input: &Tensor,
    products: [Product<'_>; N],
) -> Result<(), OpError> {
    let mut products = products.map(|Product { weight, bias, out }| cpu::Product {
        weight: weight.host(),
        bias: bias.map(Tensor::host),
        out: out.host_mut(),
        add: false,
    });
    cpu::linear(cpu, input.host(), &mut products)
}

pub(super) fn linear_per_head(
    cpu: &Cpu,
    heads: usize,
    input: &Tensor,
    weight: &Matrix,
    out: &mut Tensor,
) -> Result<(), OpError> {
    cpu::linear_per_head(cpu, input.host(), weight.host(), heads, out.host_mut())
}

pub(super) fn add_low_rank(cpu: &Cpu, args: LowRank<'_>) -> Result<(), OpError> {
    let LowRank { rows, a, b, scale, input, out } = args;
    check_rows("add_low_rank", &rows, input.rows().min(out.rows()))?;
    let inputs = &input.host()[rows.start * input.width()..rows.end * input.width()];
    let width = out.width();
    let out = &mut out.host_mut()[rows.start * width..rows.end * width];
    let mut inner = vec![0.0; rows.len() * a.shape()[0]];
    let into = cpu::Product { weight: a.host(), bias: None, out: &mut inner, add: false };
    cpu::linear(cpu, inputs, &mut [into])?;
    cpu::scale(cpu, &mut inner, scale)?;
    let out = cpu::Product { weight: b.host(), bias: None, out, add: true };
    cpu::linear(cpu, &inner, &mut [out])
}

pub(super) fn add_bias(
    cpu: &Cpu,
    rows: Range<usize>,
    bias: &Tensor,
    out: &mut Tensor,
) -> Result<(), OpError> {
    const OP: &str = "add_bias";
    check_rows(OP, &rows, out.rows())?;
    let width = out.width();
    if bias.host().len() != width {
        return Err(OpError::Length { op: OP, what: "bias", expected: width, found: bias.host().len() });
    }
    let rows = &mut out.host_mut()[rows.start * width..rows.end * width];
    rows.chunks_exact_mut(width.max(1)).try_for_each(|row| cpu::add(cpu, row, bias.host()))
}

fn check_rows(op: &'static str, rows: &Range<usize>, limit: usize) -> Result<(), OpError> {
    if rows.start > rows.end || rows.end > limit {
        return Err(OpError::Index { op, what: "row", index: rows.end, limit });
    }
    Ok(())
}

pub(super) fn norm(cpu: &Cpu, x: &Tensor, norm: Norm<'_>, out: &mut Tensor) -> Result<(), OpError> {
    cpu::norm(cpu, x.host(), &norm.kernel(), out.host_mut())
}

pub(super) fn norm_in_place(cpu: &Cpu, x: &mut Tensor, norm: Norm<'_>) -> Result<(), OpError> {
    cpu::norm_in_place(cpu, x.host_mut(), &norm.kernel())
}

pub(super) fn add_norm(
    cpu: &Cpu,
    residual: &mut Tensor,
    delta: &Tensor,
    norm: Norm<'_>,
    out: &mut Tensor,
) -> Result<(), OpError> {
    cpu::add_norm(cpu, residual.host_mut(), delta.host(), &norm.kernel(), out.host_mut())
}

impl<'a> Norm<'a> {
    fn kernel(self) -> kernels::Norm<'a> {
        kernels::Norm {
            kind: self.kind,
            width: self.width,
            weight: self.weight.map(Tensor::host),
            bias: self.bias.map(Tensor::host),
            eps: self.eps,
        }
    }
}

pub(super) fn rope_cache_write(cpu: &Cpu, args: RopeCacheWrite<'_>) -> Result<(), OpError> {
    let table = args.angles.map(|RopeAngles { cos, sin, rotary_dim, start, layout, .. }| RopeTable {
        cos: cos.host(),
        sin: sin.host(),
        rotary_dim,
        start,
        layout,
    });
    cpu::rope_cache_write(
        cpu,
        cpu::RopeCacheWrite {
            table,
            shape: args.heads,
            angles: args.angles.map_or(&[], |angles| angles.rows.values()),
            slots: args.slots.values(),
            query: args.query.host_mut(),
            key: args.key.host_mut(),
            value: args.value.map_or(&[], Tensor::host),
            value_width: args.value.map_or(0, Tensor::width),
            keys: args.cache.keys.host_mut(),
            values: args.cache.values.host_mut(),
        },
    )
}

pub(super) fn attention(cpu: &Cpu, args: Attention<'_>) -> Result<(), OpError> {
    let AttentionRules { window, soft_cap, slopes, sinks } = args.rules;
    let values = match args.cache.values.width() {
        0 => Values::InKeys,
        _ => Values::Own(args.cache.values.host()),
    };
    cpu::attention(
        cpu,
        cpu::Attention {
            shape: args.heads,
            value_dim: args.value_dim,
            scale: args.scale,
            rules: kernels::AttentionRules {
                window,
                soft_cap,
                slopes: slopes.map(Tensor::host),
                sinks: sinks.map(Tensor::host),
            },
            query: args.query.host(),
            keys: args.cache.keys.host(),
            values,
            sequences: args.sequences.host,
            out: args.out.host_mut(),
        },
    )
}

pub(super) fn activate(cpu: &Cpu, activation: Activation, x: &mut Tensor) -> Result<(), OpError> {
    cpu::activate(cpu, activation, x.host_mut())
}

pub(super) fn gated(cpu: &Cpu, gating: Gating, gate: &mut Tensor, up: &Tensor) -> Result<(), OpError> {
    cpu::gated(cpu, gating, gate.host_mut(), up.host())
}

pub(super) fn scale(cpu: &Cpu, x: &mut Tensor, factor: f32) -> Result<(), OpError> {
    cpu::scale(cpu, x.host_mut(), factor)
}

pub(super) fn add(cpu: &Cpu, x: &mut Tensor, delta: &Tensor) -> Result<(), OpError> {
    cpu::add(cpu, x.host_mut(), delta.host())
}

/// Both are f32.
pub(super) fn enter_stream(_: &Cpu, x: &mut Tensor, stream: &mut Tensor) -> Result<(), OpError> {
    std::mem::swap(x, stream);
    Ok(())
}

/// Both are f32.
pub(super) fn from_stream<'a>(_: &Cpu, stream: &'a Tensor, _: &'a mut Tensor) -> Result<&'a Tensor, OpError> {
    Ok(stream)
}

pub(super) fn clamp(cpu: &Cpu, x: &mut Tensor, limit: f32) -> Result<(), OpError> {
    cpu::clamp(cpu, x.host_mut(), limit)
}

pub(super) fn soft_cap(cpu: &Cpu, x: &mut Tensor, cap: f32) -> Result<(), OpError> {
    cpu::soft_cap(cpu, x.host_mut(), cap)
}

/// One factor per row: not worth a kernel of its own.
pub(super) fn scale_rows(cpu: &Cpu, x: &mut Tensor, gate: &Tensor) -> Result<(), OpError> {
    if gate.width() != 1 || gate.rows() != x.rows() {
        let (expected, found) = (x.rows(), gate.host().len());
        return Err(OpError::Length { op: "scale_rows", what: "gate", expected, found });
    }
    let width = x.width().max(1);
    for (row, gate) in x.host_mut().chunks_exact_mut(width).zip(gate.host()) {
        cpu::scale(cpu, row, 1.0 / (1.0 + (-gate).exp()))?;
    }
    Ok(())
}

pub(super) fn route(
    cpu: &Cpu,
    scores: &Tensor,
    routing: &Routing<'_>,
    routes: &mut Routes,
) -> Result<(), OpError> {
    let Routing { experts, chosen, score, groups, correction, normalize, scale } = *routing;
    let correction = correction.map(Tensor::host);
    let routing = kernels::Routing { experts, chosen, score, groups, correction, normalize, scale };
    cpu::route(cpu, scores.host(), &routing, routes.host_mut())
}

pub(super) fn experts(cpu: &Cpu, args: Experts<'_>) -> Result<(), OpError> {
    let Experts { input, routes, experts, gating, scratch, out } = args;
    let experts: Vec<_> = experts
        .host()
        .iter()
        .map(|expert| kernels::Expert {
            gate: expert.gate.host(),
            up: expert.up.host(),
            down: expert.down.host(),
        })
        .collect();
    cpu::experts(
        cpu,
        cpu::Experts {
            input: input.host(),
            routes: routes.host(),
            experts: &experts,
            gating,
            scratch: scratch.host_mut(),
            out: out.host_mut(),
        },
    )
}

impl Projection {
    fn host(&self) -> kernels::Projection<'_> {
        kernels::Projection { weight: self.weight.host(), bias: self.bias.as_ref().map(Tensor::host) }
    }
}

/// Plain copies on the calling thread.
pub(super) fn copy_parts(_: &Cpu, args: CopyParts<'_>) -> Result<(), OpError> {
    const OP: &str = "copy_parts";
    let CopyParts { parts, from, out_of, to, into, width } = args;
    let parts = parts.max(1);
    if from.rows() != to.rows() {
        return Err(OpError::Length { op: OP, what: "rows", expected: from.rows(), found: to.rows() });
    }
    let (from_width, to_width) = (from.width() / parts, to.width() / parts);
    for (what, end, limit) in [("source", out_of + width, from_width), ("target", into + width, to_width)] {
        if end > limit {
            return Err(OpError::Index { op: OP, what, index: end, limit });
        }
    }
    let all =
        from.host().chunks_exact(from_width.max(1)).zip(to.host_mut().chunks_exact_mut(to_width.max(1)));
    for (from, to) in all {
        to[into..into + width].copy_from_slice(&from[out_of..out_of + width]);
    }
    Ok(())
}

/// A few rows, so plain copies on the calling thread.
pub(super) fn select_rows(_: &Cpu, x: &Tensor, rows: &Indices, out: &mut Tensor) -> Result<(), OpError> {
    let (width, rows) = (x.width(), rows.values());
    if out.rows() != rows.len() || out.width() != width {
        return Err(OpError::Length {
            op: "select_rows",
            what: "out",
            expected: rows.len() * width,
            found: out.host().len(),
        });
    }
    if let Some(&row) = rows.iter().find(|&&row| row as usize >= x.rows()) {
        let (index, limit) = (row as usize, x.rows());
        return Err(OpError::Index { op: "select_rows", what: "row", index, limit });
    }
    for (to, &row) in out.host_mut().chunks_exact_mut(width).zip(rows) {
        let start = row as usize * width;
        to.copy_from_slice(&x.host()[start..start + width]);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroUsize;

    use super::*;

    fn select(x: &Tensor, rows: &[u32], out: &mut Tensor) -> Result<(), OpError> {
        let mut indices = Indices::default();
        indices.set(rows)?;
        select_rows(&Cpu::new(NonZeroUsize::MIN)?, x, &indices, out)
    }

    #[test]
    fn rows_are_selected_in_the_order_asked_for() {
        let x = Tensor::from_host(vec![0.0, 1.0, 2.0, 3.0, 4.0, 5.0], 2).unwrap();
        let mut out = Tensor::host_zeros(2, 2).unwrap();
        select(&x, &[2, 0], &mut out).unwrap();
        assert_eq!(out.host(), [4.0, 5.0, 0.0, 1.0]);
    }

    #[test]
    fn a_row_that_is_not_there_is_an_error() {
        let x = Tensor::from_host(vec![0.0, 1.0], 2).unwrap();
        let mut out = Tensor::host_zeros(1, 2).unwrap();
        let error = select(&x, &[1], &mut out).unwrap_err();
        assert_eq!(error, OpError::Index { op: "select_rows", what: "row", index: 1, limit: 1 });
        assert!(select(&x, &[0, 0], &mut out).is_err());
    }
}
