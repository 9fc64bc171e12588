//! A mixture of experts. The tokens of each chosen expert are multiplied together, and the products of all experts are
//! cut into one list of pieces: one token's few experts keep all threads busy, and so do many experts of a few tokens.

use std::ops::Range;

use super::Cpu;
use super::activation::gated;
use super::linear::{Inputs, Outputs, run_all};
use super::simd::{Kernel, Row, Simd};
use super::tile::Tile;
use crate::error::{check_indices, check_length, check_rows};
use crate::{Expert, Gating, OpError, Projection, Routes};

const OP: &str = "experts";

/// Inputs of [`experts`].
#[derive(Debug)]
pub struct Experts<'a> {
    /// `[T, H]`
    pub input: &'a [f32],
    /// Experts and weights of each token, as [`route`](super::route) chooses them.
    pub routes: &'a Routes,
    /// All experts of the layer, of equal shapes.
    pub experts: &'a [Expert<'a>],
    /// What the gate does.
    pub gating: Gating,
    /// Memory that is kept from call to call.
    pub scratch: &'a mut ExpertScratch,
    /// `[T, H]`
    pub out: &'a mut [f32],
}

/// Memory for what is between the input and the output of [`experts`]; it grows to what the largest call needs.
#[derive(Debug, Default)]
pub struct ExpertScratch {
    sorted: Sorted,
    /// Inputs, and later outputs, of the experts: `[rows, H]`.
    outer: Vec<f32>,
    /// `[rows, I]`
    gate: Vec<f32>,
    /// `[rows, I]`
    up: Vec<f32>,
}

/// `out[t] = sum over j, in this order, of weights[t, j] * expert(input[t])` with the expert `experts[t, j]` of the
/// routes. Experts that no token goes to are not touched.
///
/// Errors when a route leads to no expert, or the experts differ in their shapes.
pub fn experts(cpu: &Cpu, args: Experts<'_>) -> Result<(), OpError> {
    let Some(shape) = check(&args)? else { return Ok(()) };
    let Experts { input, routes, experts, gating, scratch, out } = args;
    let (width, per_token) = (shape.width, shape.per_token);
    let tokens = shape.tokens_together();
    for ((input, out), (chosen, weights)) in input
        .chunks(tokens * width)
        .zip(out.chunks_mut(tokens * width))
        .zip(routes.experts.chunks(tokens * per_token).zip(routes.weights.chunks(tokens * per_token)))
    {
        scratch.sorted.sort(chosen, per_token, experts.len());
        scratch.run(cpu, &shape, input, experts, gating)?;
        combine(cpu, &shape, scratch, weights, out);
    }
    Ok(())
}

struct Shape {
    /// `H`
    width: usize,
    /// `I`
    inner: usize,
    /// `k`
    per_token: usize,
}

impl Shape {
    /// Tokens that go through the experts together: what is between input and output of a long prompt is limited.
    fn tokens_together(&self) -> usize {
        const SCRATCH_BYTES: usize = 128 * 1024 * 1024;
        let token = self.per_token * (self.width + 2 * self.inner) * size_of::<f32>();
        (SCRATCH_BYTES / token).max(1)
    }
}

/// Nothing when there are no tokens.
fn check(args: &Experts<'_>) -> Result<Option<Shape>, OpError> {
    let Experts { input, routes, experts, gating: _, scratch: _, out } = args;
    check_length(OP, "out", input.len(), out.len())?;
    check_length(OP, "weights of the routes", routes.experts.len(), routes.weights.len())?;
    check_indices(OP, "expert", &routes.experts, experts.len())?;
    let Some(first) = experts.first() else {
        check_length(OP, "input", 0, input.len())?;
        return Ok(None);
    };
    let (inner, width) = (first.gate.weight.rows(), first.gate.weight.cols());
    if inner == 0 || width == 0 {
        return Err(OpError::unsupported(OP, "experts without inputs or without an inner width"));
    }
    for Expert { gate, up, down } in *experts {
        check_projection(gate, inner, width)?;
        check_projection(up, inner, width)?;
        check_projection(down, width, inner)?;
    }
    let tokens = check_rows(OP, "input", width, input.len())?;
    let per_token = routes.experts.len().checked_div(tokens).unwrap_or(0);
    check_length(OP, "routes", tokens * per_token, routes.experts.len())?;
    if tokens > 0 && per_token == 0 {
        return Err(OpError::unsupported(OP, format!("{tokens} tokens without routes")));
    }
    Ok((tokens > 0).then_some(Shape { width, inner, per_token }))
}

fn check_projection(projection: &Projection<'_>, outputs: usize, inputs: usize) -> Result<(), OpError> {
    let Projection { weight, bias } = projection;
    check_length(OP, "rows of a weight", outputs, weight.rows())?;
    check_length(OP, "columns of a weight", inputs, weight.cols())?;
    check_length(OP, "bias", outputs, bias.map_or(outputs, <[f32]>::len))
}

/// The routes of some tokens in the order of their experts: a row for each.
#[derive(Debug, Default)]
struct Sorted {
    /// `[experts + 1]`: where the rows of each expert begin.
    starts: Vec<usize>,
    /// `[rows]`: the token of each row.
    tokens: Vec<u32>,
    /// `[T, k]`: the row of each route.
    rows: Vec<u32>,
}

impl Sorted {
    /// A counting sort: the tokens of an expert keep their order.
    fn sort(&mut self, chosen: &[u32], per_token: usize, experts: usize) {
        let Self { starts, tokens, rows } = self;
        starts.clear();
        starts.resize(experts + 1, 0);
        for &expert in chosen {
            starts[expert as usize + 1] += 1;
        }
        for expert in 0..experts {
            starts[expert + 1] += starts[expert];
        }
        tokens.resize(chosen.len(), 0);
        rows.resize(chosen.len(), 0);
        for (route, &expert) in chosen.iter().enumerate() {
            // Each start walks on to the next expert's, which is moved back below.
            let row = starts[expert as usize];
            starts[expert as usize] += 1;
            tokens[row] = (route / per_token) as u32;
            rows[route] = row as u32;
        }
        starts.copy_within(..experts, 1);
        starts[0] = 0;
    }

    /// Each expert that has rows, with them.
    fn groups(&self) -> impl Iterator<Item = (usize, Range<usize>)> {
        let ranges = self.starts.windows(2).map(|ends| ends[0]..ends[1]);
        ranges.enumerate().filter(|(_, rows)| !rows.is_empty())
    }
}

impl ExpertScratch {
    /// The outputs of all rows' experts, to `outer`.
    fn run(
        &mut self,
        cpu: &Cpu,
        shape: &Shape,
        input: &[f32],
        experts: &[Expert<'_>],
        gating: Gating,
    ) -> Result<(), OpError> {
        let Self { sorted, outer, gate, up } = self;
        let &Shape { width, inner, .. } = shape;
        let rows = sorted.tokens.len();
        let outer = first(outer, rows * width);
        let (gate, up) = (first(gate, rows * inner), first(up, rows * inner));

        gather(cpu, input, width, &sorted.tokens, outer);
        let mut products = Vec::new();
        let (mut gates, mut ups) = (Tile::new(gate, inner), Tile::new(up, inner));
        for (expert, rows) in sorted.groups() {
            let Expert { gate, up, .. } = &experts[expert];
            let input = &outer[rows.start * width..rows.end * width];
            products.push(product(input, rows.len(), gate, &mut gates));
            products.push(product(input, rows.len(), up, &mut ups));
        }
        run_all(cpu, products);
        gated(cpu, gating, gate, up)?;

        let mut products = Vec::new();
        let mut outs = Tile::new(outer, width);
        for (expert, rows) in sorted.groups() {
            let input = &gate[rows.start * inner..rows.end * inner];
            products.push(product(input, rows.len(), &experts[expert].down, &mut outs));
        }
        run_all(cpu, products);
        Ok(())
    }
}

/// The first `len` elements, whatever they are; the buffer grows where it must.
fn first(buffer: &mut Vec<f32>, len: usize) -> &mut [f32] {
    if buffer.len() < len {
        buffer.resize(len, 0.0);
    }
    &mut buffer[..len]
}

/// The product of an expert's rows with one of its weights, to the first ones of `outs`; the others stay there.
fn product<'a>(
    input: &'a [f32],
    tokens: usize,
    projection: &Projection<'a>,
    outs: &mut Tile<'a>,
) -> Outputs<'a> {
    let &Projection { weight, bias } = projection;
    let out;
    (out, *outs) = std::mem::replace(outs, Tile::new(&mut [], 0)).split_rows(tokens);
    let inputs = Inputs { all: input, width: weight.cols(), first: 0, tokens };
    Outputs { inputs, weight, rows: 0..weight.rows(), bias, out, add: false }
}

/// `out[row] = input[tokens[row]]`
fn gather(cpu: &Cpu, input: &[f32], width: usize, tokens: &[u32], out: &mut [f32]) {
    /// Per element, in multiply-adds: it is read and written.
    const WORK: usize = 3;
    let work = out.len() * WORK;
    let rows = tokens.len().div_ceil(cpu.pieces(work)).max(1);
    let pieces: Vec<_> = tokens.chunks(rows).zip(out.chunks_mut(rows * width)).collect();
    cpu.for_each(work, pieces, |(tokens, out)| {
        for (&token, out) in tokens.iter().zip(out.chunks_exact_mut(width)) {
            out.copy_from_slice(&input[token as usize * width..][..width]);
        }
    });
}

/// Each token's weighted sum of its experts' outputs.
fn combine(cpu: &Cpu, shape: &Shape, scratch: &ExpertScratch, weights: &[f32], out: &mut [f32]) {
    let &Shape { width, per_token, .. } = shape;
    let work = weights.len() * width * 2;
    let tokens = (weights.len() / per_token).div_ceil(cpu.pieces(work)).max(1);
    let pieces: Vec<_> = scratch
        .sorted
        .rows
        .chunks(tokens * per_token)
        .zip(weights.chunks(tokens * per_token))
        .zip(out.chunks_mut(tokens * width))
        .map(|((rows, weights), out)| Sums { outputs: &scratch.outer, width, per_token, rows, weights, out })
        .collect();
    cpu.for_each(work, pieces, |piece| cpu.isa().run(piece));
}

/// The sums of some tokens.
struct Sums<'a> {
    /// `[rows, width]`
    outputs: &'a [f32],
    width: usize,
    per_token: usize,
    /// `[tokens, per_token]`
    rows: &'a [u32],
    /// `[tokens, per_token]`
    weights: &'a [f32],
    /// `[tokens, width]`
    out: &'a mut [f32],
}

impl Kernel for Sums<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self { outputs, width, per_token, rows, weights, out } = self;
        for ((rows, weights), out) in
            rows.chunks_exact(per_token).zip(weights.chunks_exact(per_token)).zip(out.chunks_exact_mut(width))
        {
            for at in (0..width).step_by(S::LANES) {
                let mut sum = simd.zero();
                for (&row, &weight) in rows.iter().zip(weights) {
                    let output = &outputs[row as usize * width..][..width];
                    sum = simd.mul_add(simd.splat(weight), output.register(simd, at), sum);
                }
                simd.write(sum, &mut out[at..]);
            }
        }
    }
}
