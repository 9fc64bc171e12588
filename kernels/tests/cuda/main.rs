//! The CUDA kernels, run by the emulator in several orders of threads, each time against the definition of what they
//! compute.
#![cfg(feature = "emulation")]

mod captures;
mod comm;
mod conformity;
mod faults;
mod transfers;

use std::collections::BTreeSet;

use kernels::cuda::checks::{self, Finding};
use kernels::cuda::{Gpu, Schedule, kernel_layouts, layouts};

/// A wrong kernel may well be right in one order.
fn check(family: &str, schedule: Schedule) {
    let gpu = Gpu::emulated(schedule);
    let (_, run) = checks::FAMILIES.iter().find(|(name, _)| *name == family).expect("a family of this name");
    let findings = checks::run(&gpu, *run, 20_251_125).unwrap_or_else(|error| panic!("{error}"));
    assert!(!findings.is_empty());
    let wrong: Vec<String> =
        findings.iter().filter(|finding| !finding.passes()).map(Finding::to_string).collect();
    assert!(wrong.is_empty(), "{} of {} checks: {wrong:#?}", wrong.len(), findings.len());
}

macro_rules! families {
    ($($family:ident),* $(,)?) => {
        const NAMES: &[&str] = &[$(stringify!($family)),*];

        $(mod $family {
            use super::{Schedule, check};

            #[test]
            fn in_order() {
                check(stringify!($family), Schedule::Forward);
            }

            #[test]
            fn in_a_random_order() {
                check(stringify!($family), Schedule::Random(1));
            }

            #[test]
            fn in_another_random_order() {
                check(stringify!($family), Schedule::Random(2));
            }

            #[test]
            fn in_a_third_random_order() {
                check(stringify!($family), Schedule::Random(3));
            }
        })*
    };
}

families!(
    probe,
    probe_hopper,
    norm,
    embedding,
    pointwise,
    rope,
    multiply,
    linear,
    gemm,
    graph,
    transfer,
    lora,
    sampling,
    logprobs,
    attention,
    route,
    experts,
    all_reduce
);

#[test]
fn every_family_is_tested() {
    let all: BTreeSet<&str> = checks::FAMILIES.iter().map(|(name, _)| *name).collect();
    assert_eq!(NAMES.iter().copied().collect::<BTreeSet<_>>(), all);
}

#[test]
fn parameters_lie_in_memory_as_the_kernels_declare_them() {
    let mut ours: Vec<String> = layouts()
        .iter()
        .map(|layout| {
            let fields = layout.fields.iter();
            let fields: String = fields.map(|f| format!(" {}:{}:{}", f.name, f.offset, f.size)).collect();
            format!("{} {}{fields}", layout.name, layout.size)
        })
        .collect();
    let mut theirs = kernel_layouts();
    ours.sort();
    theirs.sort();
    assert_eq!(ours, theirs);
}
