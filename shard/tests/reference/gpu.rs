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
    #[cfg_attr(not(feature = "cuda"), expect(unused_mut, reason = "only a driver adds to it"))]
    let mut gpus = Vec::new();
    #[cfg(feature = "cuda")]
    match Gpu::open(0) {
        Ok(gpu) => gpus.push(("GPU", gpu)),
        Err(error) => println!("no GPU: {error}"),
    }
    #[cfg(feature = "emulation")]
    gpus.push(("emulated", Gpu::emulated(kernels::cuda::Schedule::Forward)));
    gpus
}

/// On an emulated GPU all prompts of the Llamas, and the first of the others: time is short.
fn prompts_for(gpu: &str, fixture: &str, mut prompts: Vec<Prompt>) -> Vec<Prompt> {
    if gpu == "emulated" && !fixture.starts_with("llama") {
        prompts.truncate(1);
    }
    prompts
}

/// Every fixture in this type, which rounds as much as the bounds say.
fn check(dtype: DType, bounds: Bounds) {
    let mut found = BTreeMap::new();
    for (name, gpu) in gpus() {
        let device = Device::Cuda(Arc::new(Cuda::new(gpu, dtype, dtype.into()).expect("the GPU works")));
        for directory in directories() {
            let fixture = name_of(&directory);
            let prompts = prompts_for(name, &fixture, prompts(&directory));
            let worst = Runner::open_on(&directory, device.clone(), Ranks::alone())
                .and_then(|mut runner| compare(&mut runner, &prompts, None, bounds));
            found.insert(format!("{name} {dtype:?} {fixture}"), worst);
        }
    }
    report(&found, bounds);
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
            found.insert(case, worst);
        }
    }
    report(&found, bounds);
}
