//! The fixtures on a GPU: on the one of this machine, if the tests were built with `cuda` and it has one, and on one that
//! is emulated, if they were built with `emulation`.

use std::collections::BTreeMap;
use std::sync::Arc;

use kernels::DType;
use kernels::cuda::Gpu;
use shard::backend::{Cuda, Device};
use shard::collective::Ranks;

use crate::fixture::{Bounds, Prompt, adapters, compare, directories, name_of, prompts, report};
use crate::steps::Runner;

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

/// On an emulated GPU all prompts of the Llamas, and the first of the others: time is short.
fn prompts_for(gpu: &str, fixture: &str, mut prompts: Vec<Prompt>) -> Vec<Prompt> {
    if gpu == "emulated" && !fixture.starts_with("llama") {
        prompts.truncate(1);
    }
    prompts
}

/// By how much the reference library's own log-probabilities in float16 and in bfloat16 (transformers 5.24, eager attention,
/// CPU) are off from those in float32, where that is more than the bounds say. Random weights as large as those of these
/// checkpoints make that of rounding.
const ROUGH: &[(&str, [f64; 2])] = &[
    ("llama_linear", [0.0924, 0.5083]),
    ("llama_yarn", [0.0618, 0.7907]),
    ("llama_yarn_tuned", [0.0912, 1.3894]),
    ("phi4_mini", [0.0867, 0.5405]),
    ("qwen2_split", [0.0682, 0.6137]),
];

/// Two computations that each round differently from float32 are further from each other than from that.
const APART: f64 = 2.0;

/// The bounds of a fixture, of which the library itself keeps no better ones.
fn bounds_of(fixture: &str, dtype: DType, bounds: Bounds) -> Bounds {
    let rough = ROUGH.iter().find(|(name, _)| *name == fixture).map(|(_, off)| match dtype {
        DType::F32 => 0.0,
        DType::F16 => off[0] * APART,
        DType::BF16 => off[1] * APART,
    });
    let widest = |bound: f64| rough.map_or(bound, |rough| rough.max(bound));
    Bounds { logprob: widest(bounds.logprob), margin: widest(bounds.margin) }
}

/// Every fixture in this type, which rounds as much as the bounds say.
fn check(dtype: DType, bounds: Bounds) {
    let mut found = BTreeMap::new();
    for (name, gpu) in gpus() {
        let device = Device::Cuda(Arc::new(Cuda::new(gpu, dtype, dtype.into()).expect("the GPU works")));
        for directory in directories() {
            let fixture = name_of(&directory);
            let prompts = prompts_for(name, &fixture, prompts(&directory));
            let bounds = bounds_of(&fixture, dtype, bounds);
            let worst = Runner::open_on(&directory, device.clone(), Ranks::alone())
                .and_then(|mut runner| compare(&mut runner, &prompts, None, bounds));
            found.insert(format!("{name} {dtype:?} {fixture}"), (worst, bounds));
        }
    }
    report(found);
}

#[test]
fn every_family_answers_in_float32_as_the_reference_library_does() {
    check(DType::F32, Bounds { logprob: 0.02, margin: 0.0 });
}

#[test]
fn every_family_answers_in_float16_as_far_as_rounding_allows() {
    check(DType::F16, Bounds { logprob: 0.06, margin: 0.06 });
}

#[test]
fn every_family_answers_in_bfloat16_as_far_as_rounding_allows() {
    check(DType::BF16, Bounds { logprob: 0.5, margin: 0.5 });
}

#[test]
fn adapters_answer_in_float32_as_the_reference_library_does() {
    let bounds = Bounds { logprob: 0.02, margin: 0.0 };
    let mut found = BTreeMap::new();
    for (name, gpu) in gpus() {
        let device = Cuda::new(gpu, DType::F32, DType::F32.into()).expect("the GPU works");
        let device = Device::Cuda(Arc::new(device));
        for (directory, adapter) in adapters() {
            let case = format!("{name} {} + {}", name_of(&directory), name_of(&adapter));
            let prompts = prompts_for(name, "", prompts(&adapter));
            let worst = Runner::open_on(&directory, device.clone(), Ranks::alone()).and_then(|mut runner| {
                let adapter = runner.adapter(&adapter)?;
                compare(&mut runner, &prompts, Some(&adapter), bounds)
            });
            found.insert(case, (worst, bounds));
        }
    }
    report(found);
}
