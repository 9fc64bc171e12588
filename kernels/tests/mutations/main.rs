//! Whether the checks notice a fault: kernels are broken on purpose, one fault at a time, and each time the checks of the
//! family run until one of them fails. The test fails when a fault goes unnoticed, or when the checks fail without one.
//!
//! - one file per family: its faults
//! - [`library`]: a family's kernels with a fault, compiled
//! - [`child`]: a process of its own runs the checks with them, since a fault may be of any kind
//!
//! An argument chooses the families whose names contain it.

mod all_reduce;
mod attention;
mod child;
mod embedding;
mod experts;
mod library;
mod linear;
mod logprobs;
mod lora;
mod norm;
mod pointwise;
mod probe;
mod rope;
mod route;
mod sampling;

use std::process::ExitCode;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use child::Verdict;
use library::Workshop;

/// A fault: `text` in `file` becomes `replacement`.
pub(crate) struct Mutation {
    /// Whose checks have to notice.
    pub(crate) family: &'static str,
    /// Below `kernels/cuda/`: a `.cu` file, or a header.
    pub(crate) file: &'static str,
    /// The fault, in words.
    pub(crate) what: &'static str,
    /// What is replaced; where it occurs several times, the first of them.
    pub(crate) text: &'static str,
    /// What it becomes.
    pub(crate) replacement: &'static str,
}

const TABLES: &[&[Mutation]] = &[
    probe::MUTATIONS,
    norm::MUTATIONS,
    embedding::MUTATIONS,
    pointwise::MUTATIONS,
    rope::MUTATIONS,
    attention::MUTATIONS,
    linear::MUTATIONS,
    lora::MUTATIONS,
    route::MUTATIONS,
    experts::MUTATIONS,
    sampling::MUTATIONS,
    logprobs::MUTATIONS,
    all_reduce::MUTATIONS,
];

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if let [flag, family, library] = &arguments[..]
        && flag == child::FLAG
    {
        return child::main(family, library);
    }
    // What cargo passes on to other tests means nothing here.
    let chosen: Vec<&String> = arguments.iter().filter(|argument| !argument.starts_with('-')).collect();
    let mutations: Vec<&Mutation> = TABLES
        .iter()
        .copied()
        .flatten()
        .filter(|mutation| chosen.is_empty() || chosen.iter().any(|name| mutation.family.contains(*name)))
        .collect();
    for mutation in &mutations {
        library::changed(mutation);
    }
    let mut families: Vec<&str> = mutations.iter().map(|mutation| mutation.family).collect();
    families.dedup();

    let workshop = Workshop::new(TABLES);
    let whole = side_by_side(&families, |family| {
        let verdict = child::judge(family, &workshop.without_fault(family));
        println!("{family:<12} without a fault: {verdict}");
        verdict == Verdict::Passed
    });
    if whole.contains(&false) {
        println!("The checks fail without a fault.");
        return ExitCode::FAILURE;
    }
    let noticed = side_by_side(&mutations, |mutation| {
        let verdict = child::judge(mutation.family, &workshop.with_fault(mutation));
        let noticed = verdict != Verdict::Passed;
        let end = if noticed { "" } else { ": NOT NOTICED" };
        println!("{:<12} {:<48} {verdict}{end}", mutation.family, mutation.what);
        noticed
    });
    let count = noticed.iter().filter(|noticed| **noticed).count();
    println!("{count} of {} faults were noticed", mutations.len());
    if count == mutations.len() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// `work` for every item, as many at once as the machine can run.
fn side_by_side<T: Sync, R: Send>(items: &[T], work: impl Fn(&T) -> R + Sync) -> Vec<R> {
    let workers = thread::available_parallelism().map_or(1, usize::from).min(items.len());
    let next = AtomicUsize::new(0);
    let turn = || {
        let mut done = Vec::new();
        while let Some(item) = items.get(next.fetch_add(1, Ordering::Relaxed)) {
            done.push(work(item));
        }
        done
    };
    thread::scope(|scope| {
        let workers: Vec<_> = (0..workers).map(|_| scope.spawn(turn)).collect();
        workers.into_iter().flat_map(|worker| worker.join().expect("a worker that ends")).collect()
    })
}
