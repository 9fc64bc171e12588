use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use anyhow::Context;
use kernels::collective::{GroupSpec, LocalGroup};
use kernels::cuda::Gpu;
use kernels::cuda::checks::{Finding, run_rank};
use kernels::cuda::comm::Way;
use serde::{Deserialize, Serialize};

use super::super::device;
use super::super::families::worse;
use super::{Gpus, WORLD};

/// What both ranks do.
#[derive(Clone, Copy, Serialize, Deserialize)]
pub(super) struct Exercise {
    #[serde(with = "WayName")]
    pub(super) way: Way,
    /// Elements of the longest sum.
    pub(super) length_max: usize,
    pub(super) seed: u64,
    /// How long one waits for the other.
    pub(super) limit: Duration,
}

/// What one of them does.
#[derive(Clone, Serialize, Deserialize)]
pub(super) struct Task {
    pub(super) rank: usize,
    /// Where they meet.
    pub(super) path: PathBuf,
    /// Its GPU; none where it is emulated.
    pub(super) gpu: Option<u32>,
    pub(super) exercise: Exercise,
}

/// [`Way`] in a task.
#[derive(Serialize, Deserialize)]
#[serde(remote = "Way")]
enum WayName {
    Best,
    Peer,
    Nccl,
    Staged,
}

/// What came of it.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Found {
    /// What connects the ranks; none where they do not have that way.
    pub(super) by: Option<String>,
    pub(super) checks: usize,
    /// The largest error as a share of its bound; none where it is not finite.
    pub(super) worst: Option<f64>,
    /// What is not as it should be.
    pub(super) wrong: Vec<String>,
}

impl Task {
    /// Of both ranks, who meet in this directory.
    pub(super) fn of_all(exercise: Exercise, gpus: Gpus, directory: &Path) -> [Self; WORLD] {
        let path = directory.join("ranks");
        [0, 1].map(|rank| Self { rank, path: path.clone(), gpu: gpus[rank], exercise })
    }

    /// Does it. `met` is told of the group before the ranks exchange numbers.
    ///
    /// Errors when this rank cannot go on; then the other cannot either.
    pub(super) fn run(&self, gpu: &Arc<Gpu>, met: impl FnOnce(Arc<LocalGroup>)) -> anyhow::Result<Found> {
        let spec = GroupSpec { path: self.path.clone(), rank: self.rank, world: WORLD };
        let group = Arc::new(LocalGroup::join(&spec, self.exercise.limit)?);
        met(group.clone());
        let found = self.exercise.run(gpu, &group);
        if found.is_err() {
            group.abort();
        }
        found
    }
}

impl Exercise {
    fn run(&self, gpu: &Arc<Gpu>, group: &Arc<LocalGroup>) -> anyhow::Result<Found> {
        let Some(comm) = self.way.connect(gpu, group)? else {
            return Ok(Found { by: None, checks: 0, worst: Some(0.0), wrong: Vec::new() });
        };
        let by = Some(comm.description());
        let findings = run_rank(gpu, group, (self.way, comm), self.length_max, self.seed)?;
        let worst = findings.iter().map(|finding| finding.error).fold(0.0, worse);
        let wrong = findings.iter().filter(|finding| !finding.passes()).map(Finding::to_string).collect();
        Ok(Found { by, checks: findings.len(), worst: Some(worst).filter(|worst| worst.is_finite()), wrong })
    }
}

/// This process is a rank: does its task, and writes what came of it to standard output. Who has started it holds its
/// standard input, and ends it by letting go.
pub(in super::super) fn run_as_rank(task: &str) -> ExitCode {
    thread::spawn(|| {
        // Whatever it is, there is nobody any more who would read the answer.
        let _ = io::stdin().read_to_end(&mut Vec::new());
        std::process::exit(1);
    });
    let run = || -> anyhow::Result<()> {
        let task: Task = serde_json::from_str(task).context("a task of this program")?;
        let found = task.run(&device::numbered(task.gpu)?, |_| ())?;
        Ok(writeln!(io::stdout(), "{}", serde_json::to_string(&found)?)?)
    };
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            drop(writeln!(io::stderr(), "{error:#}"));
            ExitCode::FAILURE
        }
    }
}
