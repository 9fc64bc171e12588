//! Kernels that show what the hardware does: see `kernels/cuda/probe.cu`.

use super::driver::{DevicePtr, Grid, Kernel};
use super::params::params;
use super::{Buffer, Gpu};
use crate::OpError;

params! {
    struct ProbeParams {
        out: DevicePtr,
        a: DevicePtr,
        b: DevicePtr,
        count: u32,
    }
}

/// A probe, and what it reads.
#[derive(Clone, Copy, Debug)]
pub(super) struct Probe<'a> {
    pub(super) kernel: Kernel,
    pub(super) grid: Grid,
    pub(super) a: Option<&'a Buffer>,
    pub(super) b: Option<&'a Buffer>,
    pub(super) count: u32,
}

impl Probe<'_> {
    /// Runs it.
    ///
    /// # Safety
    /// `out`, `a` and `b` have what the kernel writes and reads, which runs with this many threads.
    pub(super) unsafe fn run(&self, gpu: &Gpu, out: &mut Buffer) -> Result<(), OpError> {
        let ptr = |buffer: Option<&Buffer>| buffer.map_or(DevicePtr::NULL, |buffer| buffer.all().ptr);
        let params =
            ProbeParams { out: out.all_mut().ptr, a: ptr(self.a), b: ptr(self.b), count: self.count };
        // SAFETY: the caller vouches for it.
        unsafe { gpu.launch("probe", self.kernel, self.grid, &params) }
    }
}
