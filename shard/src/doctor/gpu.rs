use std::sync::Arc;
use std::time::Instant;

use kernels::cuda::checks::{self, FAMILIES, Finding};
use kernels::cuda::{Gpu, Memory, Properties};

use super::{Args, Report};

/// The GPU to check.
pub(super) fn open(args: &Args) -> anyhow::Result<Arc<Gpu>> {
    #[cfg(feature = "emulation")]
    if args.emulated {
        return Ok(Gpu::emulated(kernels::cuda::Schedule::Forward));
    }
    #[cfg(feature = "cuda")]
    return Ok(Gpu::open(args.number)?);
    #[cfg(not(feature = "cuda"))]
    anyhow::bail!("this program was built without CUDA (feature `cuda`)")
}

/// What it is, and what it comes with.
pub(super) fn describe(gpu: &Gpu, report: &mut Report) -> anyhow::Result<()> {
    let Properties { name, capability: (major, minor), multiprocessors, shared_bytes_max, driver_version } =
        gpu.properties();
    let Memory { free, total } = gpu.memory()?;
    report.table(&["", ""]);
    report.row(&["GPU", name]);
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

/// Every family of kernels, or those that were asked for, against their definitions.
///
/// Errors when the GPU fails: then no later answer would mean anything.
pub(super) fn check_kernels(gpu: &Arc<Gpu>, args: &Args, report: &mut Report) -> anyhow::Result<()> {
    let all: Vec<&str> = FAMILIES.iter().map(|(name, _)| *name).collect();
    if let Some(unknown) = args.family.iter().find(|family| !all.contains(&family.as_str())) {
        anyhow::bail!("there is no family `{unknown}` of kernels; there are {}", all.join(", "));
    }
    report.table(&["kernels", "checks", "wrong", "largest error, as a share of its bound", "ms"]);
    for (name, family) in FAMILIES {
        if !args.family.is_empty() && !args.family.iter().any(|asked| asked == name) {
            continue;
        }
        let begin = Instant::now();
        let findings = checks::run(gpu, *family, args.seed)?;
        let wrong: Vec<&Finding> = findings.iter().filter(|finding| !finding.passes()).collect();
        let worst = findings.iter().map(|finding| finding.error).fold(0.0, f64::max);
        let milliseconds = begin.elapsed().as_millis();
        report.row(&[
            (*name).to_owned(),
            findings.len().to_string(),
            wrong.len().to_string(),
            format!("{worst:.3}"),
            milliseconds.to_string(),
        ]);
        wrong.iter().for_each(|finding| report.wrong(format!("{name}: {finding}")));
    }
    Ok(())
}
