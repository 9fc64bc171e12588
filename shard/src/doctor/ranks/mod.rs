//! Two ranks that exchange numbers, in every way that there is: as threads of this process and as two processes, on one GPU
//! and on two.
//!
//! - this file: which, and what came of them
//! - `rank.rs`: what each of the two does
//! - `threads.rs`, `processes.rs`: how they are started, watched and ended

mod processes;
mod rank;
mod threads;

use std::fmt;
use std::time::Instant;

use kernels::cuda::checks::EMULATED_LENGTH_MAX;
use kernels::cuda::comm::Way;

use super::families::worse;
use super::patient::Patient;
use super::{Args, Report, device};

pub(super) use rank::run_as_rank;
use rank::{Exercise, Found};

/// How many.
const WORLD: usize = 2;

/// What two ranks are.
#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Threads,
    Processes,
}

impl fmt::Display for Kind {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Threads => "two threads",
            Self::Processes => "two processes",
        })
    }
}

/// The GPU of each rank; none where they are emulated.
type Gpus = [Option<u32>; WORLD];

/// Two ranks of each kind, connected in each way.
pub(super) fn check(patient: &mut Patient, args: &Args, report: &mut Report<'_>) {
    report.table(&["ranks", "GPUs", "by", "checks", "wrong", "largest error, as a share of its bound", "ms"]);
    let (one, two) = gpus(args, device::count());
    for kind in [Kind::Threads, Kind::Processes] {
        for way in [Way::Peer, Way::Staged] {
            check_one(kind, one, way, patient, args, report);
        }
    }
    match two {
        None => report.not_checked("ranks by NCCL", "it takes two GPUs, one is visible"),
        Some(two) => {
            // Threads do not reach the memory of another device.
            check_one(Kind::Threads, two, Way::Nccl, patient, args, report);
            for way in [Way::Best, Way::Nccl, Way::Peer, Way::Staged] {
                check_one(Kind::Processes, two, way, patient, args, report);
            }
        }
    }
}

/// Both on the GPU that is examined; and on two, if there are two.
fn gpus(args: &Args, visible: u32) -> (Gpus, Option<Gpus>) {
    if args.is_emulated() {
        return ([None; WORLD], None);
    }
    let other = if args.number + 1 < visible { args.number + 1 } else { 0 };
    let two = (other != args.number && other < visible).then_some([Some(args.number), Some(other)]);
    ([Some(args.number); WORLD], two)
}

fn check_one(kind: Kind, gpus: Gpus, way: Way, patient: &mut Patient, args: &Args, report: &mut Report<'_>) {
    let begin = Instant::now();
    let on = gpus.map(|gpu| gpu.map_or("emulated".to_owned(), |number| number.to_string())).join(", ");
    let what = format!("{kind} on {on}, {way}");
    let length_max = if args.is_emulated() { EMULATED_LENGTH_MAX } else { usize::MAX };
    let exercise = Exercise { way, length_max, seed: args.seed, limit: patient.limit() };
    let found = match (kind, patient.lost()) {
        (Kind::Threads, Some(reason)) => return report.not_checked(&what, &reason),
        (Kind::Threads, None) => threads::run(&what, exercise, gpus, patient),
        // These have the GPU to themselves, whatever has become of it here.
        (Kind::Processes, _) => processes::run(exercise, gpus),
    };
    let found = match found {
        Ok(found) => found,
        Err(error) => return report.wrong(format!("{what}: {error:#}")),
    };
    let mut all = Vec::new();
    for (rank, found) in found.into_iter().enumerate() {
        match found {
            Ok(found) => all.push(found),
            Err(reason) => report.wrong(format!("{what}: rank {rank}: {reason}")),
        }
    }
    if all.len() == WORLD {
        let milliseconds = begin.elapsed().as_millis();
        summarize(&what, [kind.to_string(), on, way.to_string()], &all, milliseconds, report);
    }
}

/// A row for what both have found.
fn summarize(
    what: &str,
    [kind, on, way]: [String; 3],
    found: &[Found],
    milliseconds: u128,
    report: &mut Report<'_>,
) {
    let Some(by) = &found[0].by else {
        return report.row(&[kind, on, format!("{way}: they do not have it")]);
    };
    let checks: usize = found.iter().map(|found| found.checks).sum();
    let wrong: Vec<&String> = found.iter().flat_map(|found| &found.wrong).collect();
    let worst = found.iter().map(|found| found.worst.unwrap_or(f64::INFINITY)).fold(0.0, worse);
    report.checked(checks);
    let figures =
        [checks.to_string(), wrong.len().to_string(), format!("{worst:.3}"), milliseconds.to_string()];
    report.row(&[&[kind, on, by.clone()], &figures[..]].concat());
    wrong.into_iter().for_each(|wrong| report.wrong(format!("{what}: {wrong}")));
}
