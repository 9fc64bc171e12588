//! Products with weight matrices. See [`dot`](super::dot) for the order of summation, which all paths share.
//!
//! Weights are read where they lie and converted in registers, a few rows against a few tokens at a time. For one token
//! that keeps up with the memory. For many, the tokens are taken in blocks whose inputs stay in a near cache, so that
//! weights come from memory once per block and multiplying is all that is left.

use std::ops::Range;

use super::Cpu;
use super::dot::dots;
use super::simd::{BF16, Element, F16, F32, Kernel, Simd, Stored};
use super::tile::Tile;
use crate::error::{check_length, check_rows};
use crate::{DType, Matrix, OpError};

const OP: &str = "linear";

/// One product of a [`linear`] call: `out[t, o] = sum over i of input[t, i] * weight[o, i] + bias[o]`, or `+=`.
#[derive(Debug)]
pub struct Product<'a> {
    /// `[outputs, inputs]`
    pub weight: Matrix<'a>,
    /// `[outputs]`
    pub bias: Option<&'a [f32]>,
    /// `[tokens, outputs]`
    pub out: &'a mut [f32],
    /// Whether the product is added to what is in `out`, or takes its place.
    pub add: bool,
}

/// Products of one input with several weights, in one pass over the threads. `input`: `[T, inputs]`.
///
/// Errors when the weights differ in their number of inputs, or have none.
pub fn linear(cpu: &Cpu, input: &[f32], products: &mut [Product<'_>]) -> Result<(), OpError> {
    let tokens = check(input, products)?;
    let products = products.iter_mut().map(|product| {
        let Product { weight, bias, out, add } = product;
        let inputs = Inputs { all: input, width: weight.cols(), first: 0, tokens };
        let rows = 0..weight.rows();
        Outputs { inputs, weight: *weight, out: Tile::new(out, rows.len()), rows, bias: *bias, add: *add }
    });
    run_all(cpu, products.collect());
    Ok(())
}

/// One product per group, of its own inputs and its own rows of the weight:
/// `out[t, g, o] = sum over i of input[t, g, i] * weight[g, o, i]`.
///
/// - `input`: `[T, groups, inputs]`
/// - `weight`: `[groups * outputs, inputs]`
/// - `out`: `[T, groups, outputs]`
///
/// Errors when the weight's rows cannot be shared out among the groups, or it has no inputs.
pub fn linear_per_head(
    cpu: &Cpu,
    input: &[f32],
    weight: Matrix<'_>,
    groups: usize,
    out: &mut [f32],
) -> Result<(), OpError> {
    let tokens = check_per_head(input, &weight, groups, out)?;
    let (width, outputs) = (groups * weight.cols(), weight.rows() / groups);
    let mut products = Vec::with_capacity(groups);
    let mut right = Tile::new(out, weight.rows());
    for group in 0..groups {
        let inputs = Inputs { all: input, width, first: group * weight.cols(), tokens };
        let rows = group * outputs..(group + 1) * outputs;
        let out;
        (out, right) = right.split_cols(outputs);
        products.push(Outputs { inputs, weight, rows, bias: None, out, add: false });
    }
    run_all(cpu, products);
    Ok(())
}

/// Answers the number of tokens.
fn check(input: &[f32], products: &[Product<'_>]) -> Result<usize, OpError> {
    let Some(inputs) = products.first().map(|product| product.weight.cols()) else {
        return Ok(0);
    };
    if inputs == 0 {
        return Err(OpError::unsupported(OP, "a weight without inputs"));
    }
    let tokens = check_rows(OP, "input", inputs, input.len())?;
    for Product { weight, bias, out, .. } in products {
        check_length(OP, "a row of the weight", inputs, weight.cols())?;
        check_length(OP, "bias", weight.rows(), bias.map_or(weight.rows(), <[f32]>::len))?;
        check_length(OP, "out", tokens.saturating_mul(weight.rows()), out.len())?;
    }
    Ok(tokens)
}

/// Answers the number of tokens.
fn check_per_head(input: &[f32], weight: &Matrix<'_>, groups: usize, out: &[f32]) -> Result<usize, OpError> {
    const OP: &str = "linear_per_head";
    if weight.cols() == 0 {
        return Err(OpError::unsupported(OP, "a weight without inputs"));
    }
    if groups == 0 || !weight.rows().is_multiple_of(groups) {
        let reason =
            format!("{} rows of the weight cannot be shared out among {groups} groups", weight.rows());
        return Err(OpError::unsupported(OP, reason));
    }
    let tokens = check_rows(OP, "input", groups.saturating_mul(weight.cols()), input.len())?;
    check_length(OP, "out", tokens.saturating_mul(weight.rows()), out.len())?;
    Ok(tokens)
}

/// The inputs of a product: some columns of all tokens.
#[derive(Clone, Copy)]
pub(super) struct Inputs<'a> {
    /// `[tokens, width]`
    pub(super) all: &'a [f32],
    pub(super) width: usize,
    /// The first column; there are as many as the weight has.
    pub(super) first: usize,
    pub(super) tokens: usize,
}

/// Some outputs of all tokens.
pub(super) struct Outputs<'a> {
    pub(super) inputs: Inputs<'a>,
    /// Has at least one column.
    pub(super) weight: Matrix<'a>,
    /// Rows of the weight.
    pub(super) rows: Range<usize>,
    /// `[outputs]`, of all rows of the weight.
    pub(super) bias: Option<&'a [f32]>,
    /// `[tokens, rows]`
    pub(super) out: Tile<'a>,
    pub(super) add: bool,
}

/// Computes products that may differ in everything, in one pass over the threads, in pieces of about the same work.
pub(super) fn run_all(cpu: &Cpu, products: Vec<Outputs<'_>>) {
    let work = products.iter().map(|product| product.rows.len() * product.work_per_row());
    let work = work.fold(0, usize::saturating_add);
    let work_per_piece = work.div_ceil(cpu.pieces(work)).max(1);

    let mut pieces = Vec::new();
    for product in products.into_iter().filter(|product| product.inputs.tokens > 0) {
        let rows_per_piece = work_per_piece.div_ceil(product.work_per_row()).next_multiple_of(ROWS_ALONE);
        let Outputs { inputs, weight, rows, bias, out: mut right, add } = product;
        for first in rows.clone().step_by(rows_per_piece) {
            let rows = first..rows.end.min(first + rows_per_piece);
            let out;
            (out, right) = right.split_cols(rows.len());
            pieces.push(Outputs { inputs, weight, rows, bias, out, add });
        }
    }
    cpu.for_each(work, pieces, |piece| cpu.isa().run(piece));
}

impl Kernel for Outputs<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        match self.weight.dtype() {
            DType::F32 => self.compute::<S, F32>(simd),
            DType::F16 => self.compute::<S, F16>(simd),
            DType::BF16 => self.compute::<S, BF16>(simd),
        }
    }
}

/// Inputs of a block of tokens: they stay in the second-level cache while the weights pass by.
const BLOCK_BYTES: usize = 512 * 1024;

/// Weight rows of a tile for one token: as many sums as hide the latency of an addition.
const ROWS_ALONE: usize = 8;
/// Weight rows of a tile.
const ROWS: usize = 4;
/// Tokens of a tile: 12 sums, 3 inputs and a weight fill the 16 registers of AVX2.
const TOKENS: usize = 3;

impl<'a> Outputs<'a> {
    /// In multiply-adds.
    fn work_per_row(&self) -> usize {
        self.weight.cols() * self.inputs.tokens
    }

    #[inline(always)]
    fn compute<S: Simd, E: Element>(mut self, simd: S) {
        if self.inputs.tokens == 1 {
            for row in (0..self.rows.len()).step_by(ROWS_ALONE) {
                let weights = self.weight_rows::<E, ROWS_ALONE>(row);
                self.tile::<S, E, ROWS_ALONE, 1>(simd, row, weights, 0);
            }
            return;
        }
        let fitting = BLOCK_BYTES / (self.weight.cols() * size_of::<f32>());
        let block = fitting.max(4 * TOKENS).next_multiple_of(TOKENS);
        for first in (0..self.inputs.tokens).step_by(block) {
            let tokens = first..self.inputs.tokens.min(first + block);
            for row in (0..self.rows.len()).step_by(ROWS) {
                self.tiles::<S, E>(simd, row, tokens.clone());
            }
        }
    }

    /// [`ROWS`] outputs of a block of tokens.
    #[inline(always)]
    fn tiles<S: Simd, E: Element>(&mut self, simd: S, row: usize, mut tokens: Range<usize>) {
        let weights = self.weight_rows::<E, ROWS>(row);
        while tokens.len() >= TOKENS {
            self.tile::<S, E, ROWS, TOKENS>(simd, row, weights, tokens.start);
            tokens.start += TOKENS;
        }
        match tokens.len() {
            0 => {}
            1 => self.tile::<S, E, ROWS, 1>(simd, row, weights, tokens.start),
            _ => self.tile::<S, E, ROWS, 2>(simd, row, weights, tokens.start),
        }
    }

    /// `R` outputs of `C` tokens.
    #[inline(always)]
    fn tile<S: Simd, E: Element, const R: usize, const C: usize>(
        &mut self,
        simd: S,
        row: usize,
        weights: [Stored<'_, E>; R],
        token: usize,
    ) {
        let inputs: [&[f32]; C] = std::array::from_fn(|c| self.input_row(token + c));
        let sums = dots(simd, weights, inputs);
        if self.add {
            return self.add(row, token, &sums);
        }
        for (row, sums) in (row..self.rows.len()).zip(sums) {
            let bias = self.bias.map_or(0.0, |bias| bias[self.rows.start + row]);
            for (token, sum) in (token..).zip(sums) {
                self.out.row_mut(token)[row] = sum + bias;
            }
        }
    }

    /// `R` of this piece's weight rows. Where there are fewer left, the last one is repeated; its results are left.
    #[inline(always)]
    fn weight_rows<E: Element, const R: usize>(&self, row: usize) -> [Stored<'a, E>; R] {
        let row = self.rows.start + row;
        std::array::from_fn(|r| Stored::new(self.weight.row((row + r).min(self.rows.end - 1))))
    }

    /// Adds a tile's sums to its outputs. Apart, because it slows [`Self::tile`] down where nothing is added: 16 tokens and
    /// a weight `[256, 256]` took 26.6 us instead of 25.2 (one thread of a Zen 4 server, AVX-512).
    #[inline(never)]
    fn add<const R: usize, const C: usize>(&mut self, row: usize, token: usize, sums: &[[f32; C]; R]) {
        for (row, sums) in (row..self.rows.len()).zip(sums) {
            let bias = self.bias.map_or(0.0, |bias| bias[self.rows.start + row]);
            for (token, sum) in (token..).zip(sums) {
                self.out.row_mut(token)[row] += sum + bias;
            }
        }
    }

    #[inline(always)]
    fn input_row(&self, token: usize) -> &'a [f32] {
        &self.inputs.all[token * self.inputs.width + self.inputs.first..][..self.weight.cols()]
    }
}
