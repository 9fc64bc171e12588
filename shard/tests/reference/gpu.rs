//! The fixtures on a GPU: on the one of this machine, if the tests were built with `cuda` and it has one, and on one that
//! is emulated, if they were built with `emulation`.

use std::collections::BTreeMap;
use std::sync::Arc;

use kernels::DType;
use kernels::cuda::Gpu;
use shard::backend::{Cuda, Device};
use shard::collective::Ranks;

use crate::fixture::{Bounds, Prompt, adapters, compare, directories, name_of, prompts, report, root};
#[cfg(feature = "emulation")]
use crate::ranks;
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

/// By how much the reference library's own log-probabilities in an element type are off from those in float32, by fixture
/// (`integration-tests/fixtures/rounding.json`). Weights as large as those of some checkpoints make that of rounding.
type Rounding = BTreeMap<String, BTreeMap<String, f64>>;

/// Two computations that each round differently from float32 are further from each other than from that.
const APART: f64 = 2.0;

/// The library is off by as much where rounding has made a router choose another expert, or something like it: what comes
/// of that says nothing, and most log-probabilities have to be right all the same.
const ASTRAY: f64 = 1.0;
const STRAYS: f64 = 0.3;

fn rounding() -> Rounding {
    let contents = std::fs::read(root().join("rounding.json")).expect("the table is part of the repository");
    serde_json::from_slice(&contents).expect("rounding.json has the documented form")
}

/// The bounds of a fixture: wider where the library itself keeps no better ones.
fn bounds_of(fixture: &str, dtype: DType, bounds: Bounds, rounding: &Rounding) -> Bounds {
    let name = match dtype {
        DType::F32 => return bounds,
        DType::F16 => "float16",
        DType::BF16 => "bfloat16",
    };
    let off = rounding.get(fixture).map_or(0.0, |row| row[name]);
    if off > ASTRAY {
        return Bounds { logprob: bounds.logprob, margin: f64::INFINITY, strays: STRAYS };
    }
    Bounds::all(bounds.logprob.max(off * APART), bounds.margin.max(off * APART))
}

/// Every fixture in this type, which rounds as much as the bounds say.
fn check(dtype: DType, bounds: Bounds) {
    let (mut found, rounding) = (BTreeMap::new(), rounding());
    for (name, gpu) in gpus() {
        let device = Device::Cuda(Arc::new(Cuda::new(gpu, dtype, dtype.into()).expect("the GPU works")));
        for directory in directories() {
            let fixture = name_of(&directory);
            let prompts = prompts_for(name, &fixture, prompts(&directory));
            let bounds = bounds_of(&fixture, dtype, bounds, &rounding);
            let worst = Runner::open_on(&directory, device.clone(), Ranks::alone())
                .and_then(|mut runner| compare(&mut runner, &prompts, None, bounds));
            found.insert(format!("{name} {dtype:?} {fixture}"), (worst, bounds));
        }
    }
    report(found);
}

#[test]
fn every_family_answers_in_float32_as_the_reference_library_does() {
    check(DType::F32, Bounds::all(0.02, 0.0));
}

#[test]
fn every_family_answers_in_float16_as_far_as_rounding_allows() {
    check(DType::F16, Bounds::all(0.06, 0.06));
}

#[test]
fn every_family_answers_in_bfloat16_as_far_as_rounding_allows() {
    check(DType::BF16, Bounds::all(0.5, 0.5));
}

#[test]
fn adapters_answer_in_float32_as_the_reference_library_does() {
    let bounds = Bounds::all(0.02, 0.0);
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

/// Each rank is a thread with an emulated GPU of its own; what they exchange goes through this process's memory.
#[cfg(feature = "emulation")]
#[test]
fn two_gpus_answer_in_float32_as_the_reference_library_does() {
    const SPLIT: [&str; 5] = ["qwen2_split", "mixtral_split", "deepseek_v3", "olmo2", "gpt_neox"];
    let bounds = Bounds::all(0.02, 0.0);
    let mut found = BTreeMap::new();
    for directory in directories().into_iter().filter(|path| SPLIT.contains(&name_of(path).as_str())) {
        let prompts = prompts_for("emulated", "", prompts(&directory));
        let results = ranks::run(2, |ranks| {
            let gpu = Gpu::emulated(kernels::cuda::Schedule::Forward);
            let device = Cuda::new(gpu, DType::F32, DType::F32.into()).expect("the GPU works");
            let mut runner = Runner::open_on(&directory, Device::Cuda(Arc::new(device)), ranks)?;
            compare(&mut runner, &prompts, None, bounds)
        });
        for (rank, result) in results.into_iter().enumerate() {
            found.insert(format!("emulated {} {rank}/2", name_of(&directory)), (result, bounds));
        }
    }
    report(found);
}
