use std::sync::Arc;

use kernels::cuda::{Gpu, Memory, Properties};

use super::{Args, Report};

/// The GPU to check.
pub(super) fn open(args: &Args) -> anyhow::Result<Arc<Gpu>> {
    #[cfg(feature = "emulation")]
    if args.emulated {
        return numbered(None);
    }
    numbered(Some(args.number))
}

/// The GPU with this number, or else the emulated one.
pub(super) fn numbered(number: Option<u32>) -> anyhow::Result<Arc<Gpu>> {
    match number {
        #[cfg(feature = "cuda")]
        Some(number) => Ok(Gpu::open(number)?),
        #[cfg(not(feature = "cuda"))]
        Some(_) => anyhow::bail!("this program was built without CUDA (feature `cuda`)"),
        #[cfg(feature = "emulation")]
        None => Ok(Gpu::emulated(kernels::cuda::Schedule::Forward)),
        #[cfg(not(feature = "emulation"))]
        None => anyhow::bail!("this program was built without emulation (feature `emulation`)"),
    }
}

/// How many GPUs the process may see, without the emulated one.
pub(super) fn count() -> u32 {
    #[cfg(feature = "cuda")]
    return Gpu::count().unwrap_or(0);
    #[cfg(not(feature = "cuda"))]
    0
}

/// What it is, and what it comes with.
pub(super) fn describe(gpu: &Gpu, report: &mut Report<'_>) -> anyhow::Result<()> {
    let Properties { name, capability: (major, minor), multiprocessors, shared_bytes_max, driver_version } =
        gpu.properties();
    let Memory { free, total } = gpu.memory()?;
    report.table(&["", ""]);
    report.row(&["GPU", name]);
    report.row(&["GPUs that are visible", &count().to_string()]);
    report.row(&["compute capability", &format!("{major}.{minor}")]);
    report.row(&["multiprocessors", &multiprocessors.to_string()]);
    report.row(&["shared memory of a block", &format!("{} KiB", shared_bytes_max >> 10)]);
    report.row(&["memory", &format!("{} MiB, {} MiB of it free", total >> 20, free >> 20)]);
    report.row(&[
        "CUDA version of the driver",
        &format!("{}.{}", driver_version / 1000, driver_version % 1000 / 10),
    ]);
    Ok(())
}
