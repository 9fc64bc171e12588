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

/// One product of a [`linear`] call: `out[t, o] = sum over i of input[t, i] * weight[o, i] + bias[o]`.
#[derive(Debug)]
pub struct Product<'a> {
    /// `[outputs, inputs]`
    pub weight: Matrix<'a>,
    /// `[outputs]`
    pub bias: Option<&'a [f32]>,
    /// `[tokens, outputs]`
    pub out: &'a mut [f32],
}

/// Products of one input with several weights, in one pass over the threads. `input`: `[T, inputs]`.
///
/// Errors when the weights differ in their number of inputs, or have none.
pub fn linear(cpu: &Cpu, input: &[f32], products: &mut [Product<'_>]) -> Result<(), OpError> {
    let tokens = check(input, products)?;
    let outputs: usize = products.iter().map(|product| product.weight.rows()).sum();
    let work = outputs * input.len();
    let rows_per_piece = outputs.div_ceil(cpu.pieces(work)).max(1).next_multiple_of(ROWS_ALONE);

    let mut pieces = Vec::new();
    for product in products {
        let Product { weight, bias, out } = product;
        let mut right = Tile::new(out, weight.rows());
        for first in (0..weight.rows()).step_by(rows_per_piece) {
            let rows = first..weight.rows().min(first + rows_per_piece);
            let out;
            (out, right) = right.split_cols(rows.len());
            pieces.push(Outputs { input, tokens, weight: *weight, rows, bias: *bias, out });
        }
    }
    cpu.for_each(work, pieces, |piece| cpu.isa().run(piece));
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
    for Product { weight, bias, out } in products {
        check_length(OP, "a row of the weight", inputs, weight.cols())?;
        check_length(OP, "bias", weight.rows(), bias.map_or(weight.rows(), <[f32]>::len))?;
        check_length(OP, "out", tokens.saturating_mul(weight.rows()), out.len())?;
    }
    Ok(tokens)
}

/// Some outputs of all tokens.
struct Outputs<'a> {
    input: &'a [f32],
    tokens: usize,
    weight: Matrix<'a>,
    rows: Range<usize>,
    bias: Option<&'a [f32]>,
    /// `[tokens, rows]`
    out: Tile<'a>,
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
    #[inline(always)]
    fn compute<S: Simd, E: Element>(mut self, simd: S) {
        if self.tokens == 1 {
            for row in (0..self.rows.len()).step_by(ROWS_ALONE) {
                self.tile::<S, E, ROWS_ALONE, 1>(simd, row, 0);
            }
            return;
        }
        let fitting = BLOCK_BYTES / (self.weight.cols() * size_of::<f32>());
        let block = fitting.max(4 * TOKENS).next_multiple_of(TOKENS);
        for first in (0..self.tokens).step_by(block) {
            let tokens = first..self.tokens.min(first + block);
            for row in (0..self.rows.len()).step_by(ROWS) {
                self.tiles::<S, E>(simd, row, tokens.clone());
            }
        }
    }

    /// [`ROWS`] outputs of a block of tokens.
    #[inline(always)]
    fn tiles<S: Simd, E: Element>(&mut self, simd: S, row: usize, mut tokens: Range<usize>) {
        while tokens.len() >= TOKENS {
            self.tile::<S, E, ROWS, TOKENS>(simd, row, tokens.start);
            tokens.start += TOKENS;
        }
        match tokens.len() {
            0 => {}
            1 => self.tile::<S, E, ROWS, 1>(simd, row, tokens.start),
            _ => self.tile::<S, E, ROWS, 2>(simd, row, tokens.start),
        }
    }

    /// `R` outputs of `C` tokens. Where there are fewer rows left, the last one is repeated and the results are left.
    #[inline(always)]
    fn tile<S: Simd, E: Element, const R: usize, const C: usize>(
        &mut self,
        simd: S,
        row: usize,
        token: usize,
    ) {
        let weights: [Stored<'_, E>; R] = std::array::from_fn(|r| self.weight_row(row + r));
        let inputs: [&[f32]; C] = std::array::from_fn(|c| self.input_row(token + c));
        let sums = dots(simd, weights, inputs);
        for (row, sums) in (row..self.rows.len()).zip(sums) {
            let bias = self.bias.map_or(0.0, |bias| bias[self.rows.start + row]);
            for (token, sum) in (token..).zip(sums) {
                self.out.row_mut(token)[row] = sum + bias;
            }
        }
    }

    /// One of this piece's weight rows; the last one where there are no more.
    #[inline(always)]
    fn weight_row<E: Element>(&self, row: usize) -> Stored<'a, E> {
        Stored::new(self.weight.row((self.rows.start + row).min(self.rows.end - 1)))
    }

    #[inline(always)]
    fn input_row(&self, token: usize) -> &'a [f32] {
        let inputs = self.weight.cols();
        &self.input[token * inputs..][..inputs]
    }
}
