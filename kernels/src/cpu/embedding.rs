use super::Cpu;
use super::simd::{BF16, F16, F32, Kernel, Simd, Stored, widen};
use crate::error::{check_indices, check_length};
use crate::{DType, Matrix, OpError};

/// `out[t] = table[ids[t] - first_id]` as f32; `table`: `[rows, width]`, `out`: `[T, width]`.
///
/// The vocabulary may be split over ranks: `table` holds the ids from `first_id` on, and an id that it does not hold gives
/// zeros, so that the sum over the ranks is the embedding. That an id exists at all is for the caller to check.
pub fn embedding(
    cpu: &Cpu,
    table: &Matrix<'_>,
    ids: &[u32],
    first_id: u32,
    out: &mut [f32],
) -> Result<(), OpError> {
    check_length("embedding", "out", ids.len().saturating_mul(table.cols()), out.len())?;
    if table.cols() > 0 {
        cpu.isa().run(Lookup::<false> { table, ids, first_id, out });
    }
    Ok(())
}

/// `out[t] += table[ids[t]]`: learned positions; `table`: `[positions, width]`, `out`: `[T, width]`.
///
/// Errors when the table has no row for an id.
pub fn add_embedding(cpu: &Cpu, table: &Matrix<'_>, ids: &[u32], out: &mut [f32]) -> Result<(), OpError> {
    const OP: &str = "add_embedding";
    check_length(OP, "out", ids.len().saturating_mul(table.cols()), out.len())?;
    check_indices(OP, "id", ids, table.rows())?;
    if table.cols() > 0 {
        cpu.isa().run(Lookup::<true> { table, ids, first_id: 0, out });
    }
    Ok(())
}

/// Writes the rows to `out`, or adds them.
struct Lookup<'a, const ADD: bool> {
    table: &'a Matrix<'a>,
    ids: &'a [u32],
    first_id: u32,
    out: &'a mut [f32],
}

impl<const ADD: bool> Kernel for Lookup<'_, ADD> {
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        for (out, &id) in self.out.chunks_exact_mut(self.table.cols()).zip(self.ids) {
            match id.checked_sub(self.first_id) {
                Some(row) if (row as usize) < self.table.rows() => {
                    let row = self.table.row(row as usize);
                    match self.table.dtype() {
                        DType::F32 => widen::<S, ADD>(simd, Stored::<F32>::new(row), out),
                        DType::F16 => widen::<S, ADD>(simd, Stored::<F16>::new(row), out),
                        DType::BF16 => widen::<S, ADD>(simd, Stored::<BF16>::new(row), out),
                    }
                }
                _ if ADD => {}
                _ => out.fill(0.0),
            }
        }
    }
}
