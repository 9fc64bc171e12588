//! Log-probabilities of given tokens.

use super::driver::DevicePtr;
use super::params::params;
use super::sampling::threads_of_row;
use super::{Element, Gpu, Grid, Kernel, Slice, SliceMut};
use crate::OpError;
use crate::error::check_rows;

const ROW_LOGPROBS: Kernel = Kernel { module: "logprobs", name: "row_logprobs" };

params! {
    struct LogprobsParams {
        logits: DevicePtr,
        which: DevicePtr,
        targets: DevicePtr,
        out: DevicePtr,
        rows: u32,
        vocabulary: u32,
    }
}

/// `out[i]` is the natural logarithm of the probability of token `targets[i]` in row `which[i]` of the raw logits
/// `[rows, vocabulary]`, f32; the others are `[n]`. NaN where the row has no finite best or a NaN, and for rows and tokens
/// that do not exist.
pub fn row_logprobs(
    gpu: &Gpu,
    vocabulary: usize,
    logits: Slice<'_>,
    which: Slice<'_>,
    targets: Slice<'_>,
    out: SliceMut<'_>,
) -> Result<(), OpError> {
    const OP: &str = "row_logprobs";
    let rows = check_rows(OP, "logits", vocabulary, logits.len())?;
    logits.check(OP, "logits", Element::F32, logits.len())?;
    super::sampling::check_vocabulary(OP, vocabulary)?;
    which.check(OP, "which", Element::U32, out.len())?;
    targets.check(OP, "targets", Element::U32, out.len())?;
    out.check(OP, "out", Element::F32, out.len())?;
    if out.is_empty() {
        return Ok(());
    }
    let params = LogprobsParams {
        logits: logits.ptr,
        which: which.ptr,
        targets: targets.ptr,
        out: out.ptr,
        rows: rows as u32,
        vocabulary: vocabulary as u32,
    };
    let grid = Grid::linear(out.len() as u32, threads_of_row(vocabulary));
    // SAFETY: `which`, `targets` and `out` have an element per block, and the kernel checks what they point to.
    unsafe { gpu.launch(OP, ROW_LOGPROBS, grid, &params) }
}
