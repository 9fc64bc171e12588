//! The fixtures on a GPU: on the one of this machine, if the tests were built with `cuda` and it has one, and on one that
//! is emulated, if they were built with `emulation`.

use std::collections::BTreeMap;
use std::sync::Arc;

use kernels::DType;
use kernels::cuda::Gpu;
use shard::backend::{Cuda, Device};
use shard::collective::Ranks;
use shard::doctor::fixtures::{Bounds, Fixture, Rounding};

use crate::fixture::{adapters, check, checkpoints, report, root};
#[cfg(feature = "emulation")]
use crate::ranks;

/// Every GPU there is, by name.
fn gpus() -> Vec<(&'static str, Arc<Gpu>)> {
    #[cfg(feature = "cuda")]
    let real = Gpu::open(0).inspect_err(|error| println!("no GPU: {error}")).ok();
    #[cfg(not(feature = "cuda"))]
    let real = None;
    #[cfg(feature = "emulation")]
    let emulated = Some(Gpu::emulated(kernels::cuda::Schedule::Forward));
    #[cfg(not(feature = "emulation"))]
    let emulated = None;
    [("GPU", real), ("emulated", emulated)].into_iter().filter_map(|(name, gpu)| Some((name, gpu?))).collect()
}

fn device(gpu: Arc<Gpu>, dtype: DType) -> Device {
    Device::Cuda(Arc::new(Cuda::new(gpu, dtype, dtype.into()).expect("the GPU works")))
}

/// On an emulated GPU all prompts of the Llamas, and the first of the others: time is short.
fn shorten(gpu: &str, fixture: &mut Fixture) {
    if gpu == "emulated" && (fixture.adapter.is_some() || !fixture.checkpoint_name().starts_with("llama")) {
        fixture.prompts.truncate(1);
    }
}

/// These fixtures in this type, as close as the bounds say.
fn check_all(fixtures: Vec<Fixture>, dtype: DType) {
    let rounding = Rounding::read(&root()).expect("the table is part of the repository");
    let mut found = BTreeMap::new();
    for (name, gpu) in gpus() {
        let device = device(gpu, dtype);
        for fixture in &fixtures {
            let mut fixture = fixture.clone();
            shorten(name, &mut fixture);
            let bounds = rounding.bounds(&fixture, dtype);
            let worst = check(&fixture, &device, Ranks::alone(), bounds);
            found.insert(format!("{name} {dtype:?} {}", fixture.name()), (worst, bounds));
        }
    }
    report(found);
}

#[test]
fn every_family_answers_in_float32_as_the_reference_library_does() {
    check_all(checkpoints(), DType::F32);
}

#[test]
fn every_family_answers_in_float16_as_far_as_rounding_allows() {
    check_all(checkpoints(), DType::F16);
}

#[test]
fn every_family_answers_in_bfloat16_as_far_as_rounding_allows() {
    check_all(checkpoints(), DType::BF16);
}

#[test]
fn adapters_answer_as_the_reference_library_does_in_every_type() {
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        check_all(adapters(), dtype);
    }
}

/// Each rank is a thread with an emulated GPU of its own; what they exchange goes through this process's memory.
#[cfg(feature = "emulation")]
#[test]
fn two_gpus_answer_in_float32_as_the_reference_library_does() {
    const SPLIT: [&str; 5] = ["qwen2_split", "mixtral_split", "deepseek_v3", "olmo2", "gpt_neox"];
    let bounds = Bounds::of(DType::F32);
    let mut found = BTreeMap::new();
    let split = |fixture: &Fixture| SPLIT.contains(&fixture.checkpoint_name().as_str());
    for mut fixture in checkpoints().into_iter().filter(split) {
        shorten("emulated", &mut fixture);
        let results = ranks::run(2, |ranks| {
            let gpu = Gpu::emulated(kernels::cuda::Schedule::Forward);
            check(&fixture, &device(gpu, DType::F32), ranks, bounds)
        });
        for (rank, result) in results.into_iter().enumerate() {
            found.insert(format!("emulated {} {rank}/2", fixture.name()), (result, bounds));
        }
    }
    report(found);
}
