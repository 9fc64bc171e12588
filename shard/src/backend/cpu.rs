//! The operations on CPUs: tensors become slices, and the kernels do the work.

use kernels::cpu::{self, Cpu};
use kernels::{OpError, RopeTable};

use super::{Attention, Product, RmsNorm, RopeAngles, RopeCacheWrite, Tensor};
use crate::weights::Weight;

pub(super) fn embedding(cpu: &Cpu, table: &Weight, ids: &[u32], out: &mut Tensor) -> Result<(), OpError> {
    cpu::embedding(cpu, &table.matrix(), ids, out.host_mut())
}

pub(super) fn linear<const N: usize>(
    cpu: &Cpu,
    input: &Tensor,
    products: [Product<'_>; N],
) -> Result<(), OpError> {
    let mut products = products.map(|Product { weight, bias, out }| cpu::Product {
        weight: weight.matrix(),
        bias: bias.map(Tensor::host),
        out: out.host_mut(),
    });
    cpu::linear(cpu, input.host(), &mut products)
}

pub(super) fn rms_norm(
    cpu: &Cpu,
    x: &Tensor,
    RmsNorm { weight, eps }: RmsNorm<'_>,
    out: &mut Tensor,
) -> Result<(), OpError> {
    cpu::rms_norm(cpu, x.host(), weight.host(), eps, out.host_mut())
}

pub(super) fn add_rms_norm(
    cpu: &Cpu,
    residual: &mut Tensor,
    delta: &Tensor,
    RmsNorm { weight, eps }: RmsNorm<'_>,
    out: &mut Tensor,
) -> Result<(), OpError> {
    cpu::add_rms_norm(cpu, residual.host_mut(), delta.host(), weight.host(), eps, out.host_mut())
}

pub(super) fn rope_cache_write(cpu: &Cpu, args: RopeCacheWrite<'_>) -> Result<(), OpError> {
    let RopeAngles { cos, sin, rotary_dim, layout } = args.angles;
    cpu::rope_cache_write(
        cpu,
        cpu::RopeCacheWrite {
            table: RopeTable { cos: cos.host(), sin: sin.host(), rotary_dim, layout },
            shape: args.heads,
            positions: args.positions,
            slots: args.slots,
            query: args.query.host_mut(),
            key: args.key.host_mut(),
            value: args.value.host(),
            keys: args.keys.host_mut(),
            values: args.values.host_mut(),
        },
    )
}

pub(super) fn attention(cpu: &Cpu, args: Attention<'_>) -> Result<(), OpError> {
    cpu::attention(
        cpu,
        cpu::Attention {
            shape: args.heads,
            scale: args.scale,
            query: args.query.host(),
            keys: args.keys.host(),
            values: args.values.host(),
            sequences: args.sequences,
            out: args.out.host_mut(),
        },
    )
}

pub(super) fn gated_silu(cpu: &Cpu, gate: &mut Tensor, up: &Tensor) -> Result<(), OpError> {
    cpu::gated_silu(cpu, gate.host_mut(), up.host())
}

/// A few rows, so plain copies on the calling thread.
pub(super) fn select_rows(x: &Tensor, rows: &[u32], out: &mut Tensor) -> Result<(), OpError> {
    let width = x.width();
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
    use super::*;

    #[test]
    fn rows_are_selected_in_the_order_asked_for() {
        let x = Tensor::from_host(vec![0.0, 1.0, 2.0, 3.0, 4.0, 5.0], 2).unwrap();
        let mut out = Tensor::host_zeros(2, 2).unwrap();
        select_rows(&x, &[2, 0], &mut out).unwrap();
        assert_eq!(out.host(), [4.0, 5.0, 0.0, 1.0]);
    }

    #[test]
    fn a_row_that_is_not_there_is_an_error() {
        let x = Tensor::from_host(vec![0.0, 1.0], 2).unwrap();
        let mut out = Tensor::host_zeros(1, 2).unwrap();
        let error = select_rows(&x, &[1], &mut out).unwrap_err();
        assert_eq!(error, OpError::Index { op: "select_rows", what: "row", index: 1, limit: 1 });
        assert!(select_rows(&x, &[0, 0], &mut out).is_err());
    }
}
