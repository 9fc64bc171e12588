use super::Cpu;
use super::simd::{BF16, F16, F32, Kernel, Simd, Stored, widen};
use crate::error::{check_indices, check_length};
use crate::{DType, Matrix, OpError};

const OP: &str = "embedding";

/// `out[t] = table[ids[t]]` as f32; `table`: `[vocabulary, width]`, `out`: `[T, width]`.
///
/// Errors when an id is not in the vocabulary.
pub fn embedding(cpu: &Cpu, table: &Matrix<'_>, ids: &[u32], out: &mut [f32]) -> Result<(), OpError> {
    check_length(OP, "out", ids.len().saturating_mul(table.cols()), out.len())?;
    check_indices(OP, "id", ids, table.rows())?;
    if table.cols() > 0 {
        cpu.isa().run(Lookup { table, ids, out });
    }
    Ok(())
}

struct Lookup<'a> {
    table: &'a Matrix<'a>,
    ids: &'a [u32],
    out: &'a mut [f32],
}

impl Kernel for Lookup<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        for (out, &id) in self.out.chunks_exact_mut(self.table.cols()).zip(self.ids) {
            let row = self.table.row(id as usize);
            match self.table.dtype() {
                DType::F32 => widen(simd, Stored::<F32>::new(row), out),
                DType::F16 => widen(simd, Stored::<F16>::new(row), out),
                DType::BF16 => widen(simd, Stored::<BF16>::new(row), out),
            }
        }
    }
}
