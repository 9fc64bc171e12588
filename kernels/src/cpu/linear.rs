//! Products with weight matrices. See [`dot`](super::dot) for the order of summation, which all paths share.
//!
//! For a few tokens the time goes into reading the weights, so they are converted in registers, once per tile. From
//! [`PANEL_TOKENS_MIN`] tokens on it goes into multiplying: a panel of weights is converted once, stays in the nearest
//! cache, and meets many tokens before the next panel.

use std::ops::Range;

use super::Cpu;
use super::dot::{accumulate, dots};
use super::simd::{BF16, Element, F16, F32, Kernel, Row, Simd, Stored, widen};
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
    let rows_per_piece = outputs.div_ceil(cpu.pieces(work)).max(1).next_multiple_of(PANEL_ROWS);

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

/// From this number of tokens on, converting weights ahead pays.
const PANEL_TOKENS_MIN: usize = 7;
/// Weight rows of a panel.
const PANEL_ROWS: usize = 16;
/// Weight columns of a panel: with the rows, 32 KiB of f32.
const PANEL_COLS: usize = 512;
/// Tokens that meet a panel before it is given up.
const PANEL_TOKENS: usize = 48;

/// Rows and tokens of a tile: with 12 sums, 3 inputs and a weight it fills the 16 registers of AVX2.
const TILE_ROWS: usize = 4;
const TILE_TOKENS: usize = 3;

/// Converted weights. Aligned so that no register is loaded from two cache lines.
#[repr(align(64))]
struct Panel([[f32; PANEL_COLS]; PANEL_ROWS]);

impl<'a> Outputs<'a> {
    #[inline(always)]
    fn compute<S: Simd, E: Element>(mut self, simd: S) {
        match self.tokens {
            0 => {}
            1 => self.tiles::<S, E, 8, 1>(simd),
            2 => self.tiles::<S, E, TILE_ROWS, 2>(simd),
            3..PANEL_TOKENS_MIN => self.tiles::<S, E, TILE_ROWS, TILE_TOKENS>(simd),
            _ => self.panels::<S, E>(simd),
        }
    }

    /// Weights from where they are, `R` rows and `C` tokens at a time.
    ///
    /// A tile that reaches beyond the last row or token repeats it instead, and leaves the results.
    #[inline(always)]
    fn tiles<S: Simd, E: Element, const R: usize, const C: usize>(&mut self, simd: S) {
        for row in (0..self.rows.len()).step_by(R) {
            let weights: [Stored<'_, E>; R] = std::array::from_fn(|r| self.weight_row(row + r));
            for token in (0..self.tokens).step_by(C) {
                let inputs: [&[f32]; C] = std::array::from_fn(|c| self.input_row(token + c));
                let sums = dots(simd, weights, inputs);
                for (r, sums) in sums.iter().enumerate().take(self.rows.len() - row) {
                    for (c, &sum) in sums.iter().enumerate().take(self.tokens - token) {
                        self.write(token + c, row + r, sum);
                    }
                }
            }
        }
    }

    /// Weights panel by panel.
    #[inline(always)]
    fn panels<S: Simd, E: Element>(&mut self, simd: S) {
        let mut panel = Panel([[0.0; PANEL_COLS]; PANEL_ROWS]);
        for row in (0..self.rows.len()).step_by(PANEL_ROWS) {
            for token in (0..self.tokens).step_by(PANEL_TOKENS) {
                let mut sums = [[simd.zero(); PANEL_ROWS]; PANEL_TOKENS];
                for col in (0..self.weight.cols()).step_by(PANEL_COLS) {
                    let cols = col..self.weight.cols().min(col + PANEL_COLS);
                    for (r, converted) in panel.0.iter_mut().enumerate() {
                        let stored = self.weight_row::<E>(row + r).part(cols.clone());
                        widen(simd, stored, &mut converted[..cols.len()]);
                    }
                    self.multiply(simd, &panel, cols, token, &mut sums);
                }
                for (token, sums) in (token..self.tokens).zip(sums) {
                    for (row, sum) in (row..self.rows.len()).zip(sums) {
                        self.write(token, row, simd.sum(sum));
                    }
                }
            }
        }
    }

    /// Adds a panel's products with up to [`PANEL_TOKENS`] tokens from `first_token` on.
    #[inline(always)]
    fn multiply<S: Simd>(
        &self,
        simd: S,
        panel: &Panel,
        cols: Range<usize>,
        first_token: usize,
        sums: &mut [[S::Register; PANEL_ROWS]; PANEL_TOKENS],
    ) {
        for (token, sums) in
            (first_token..self.tokens).step_by(TILE_TOKENS).zip(sums.chunks_exact_mut(TILE_TOKENS))
        {
            let inputs: [&[f32]; TILE_TOKENS] =
                std::array::from_fn(|c| &self.input_row(token + c)[cols.clone()]);
            for row in (0..PANEL_ROWS).step_by(TILE_ROWS) {
                let weights: [&[f32]; TILE_ROWS] = std::array::from_fn(|r| &panel.0[row + r][..cols.len()]);
                let mut tile = [[simd.zero(); TILE_TOKENS]; TILE_ROWS];
                for (r, tile) in tile.iter_mut().enumerate() {
                    for (c, tile) in tile.iter_mut().enumerate() {
                        *tile = sums[c][row + r];
                    }
                }
                accumulate(simd, weights, inputs, &mut tile);
                for (r, tile) in tile.iter().enumerate() {
                    for (c, tile) in tile.iter().enumerate() {
                        sums[c][row + r] = *tile;
                    }
                }
            }
        }
    }

    /// One of this piece's weight rows; the last one where there are no more.
    #[inline(always)]
    fn weight_row<E: Element>(&self, row: usize) -> Stored<'a, E> {
        Stored::new(self.weight.row((self.rows.start + row).min(self.rows.end - 1)))
    }

    /// A token's input; the last one's where there are no more.
    #[inline(always)]
    fn input_row(&self, token: usize) -> &'a [f32] {
        let inputs = self.weight.cols();
        &self.input[token.min(self.tokens - 1) * inputs..][..inputs]
    }

    #[inline(always)]
    fn write(&mut self, token: usize, row: usize, sum: f32) {
        let bias = self.bias.map_or(0.0, |bias| bias[self.rows.start + row]);
        self.out.row_mut(token)[row] = sum + bias;
    }
}
