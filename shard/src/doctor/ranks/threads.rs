use std::sync::mpsc::{self, Receiver};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Context;
use kernels::collective::LocalGroup;
use kernels::cuda::Gpu;

use super::super::device;
use super::super::patient::{Patient, contained};
use super::Gpus;
use super::rank::{Exercise, Found, Task};

/// How long ranks may take to notice that all is over.
const GRACE: Duration = Duration::from_secs(10);

/// The groups that the ranks have met in, to be given up when they do not come to an end.
type Met = Arc<Mutex<Vec<Arc<LocalGroup>>>>;

/// What each of two threads has found. When they do not even end after all has been given up, the GPU is lost in `what`.
pub(super) fn run(
    what: &str,
    exercise: Exercise,
    gpus: Gpus,
    patient: &mut Patient,
) -> anyhow::Result<Vec<Result<Found, String>>> {
    let directory = tempfile::tempdir().context("a directory where ranks meet")?;
    let ours = gpus[0];
    let open = |gpu: Option<u32>| -> anyhow::Result<Arc<Gpu>> {
        if gpu == ours { Ok(patient.gpu().sibling()?) } else { device::numbered(gpu) }
    };
    // Before the first of them waits for the other on the device.
    let opened = gpus.into_iter().map(open).collect::<anyhow::Result<Vec<_>>>()?;
    let works = Task::of_all(exercise, gpus, directory.path()).into_iter().zip(opened).map(|(task, gpu)| {
        move |met: &Met| {
            task.run(&gpu, |group| met.lock().unwrap_or_else(PoisonError::into_inner).push(group))
        }
    });
    let watched = watch(works.collect(), exercise.limit, GRACE);
    if watched.still_running || patient.gpu().memory().is_err() {
        patient.lose(what);
    }
    Ok(watched.results)
}

struct Watched<T> {
    results: Vec<Result<T, String>>,
    /// Some thread has stayed behind.
    still_running: bool,
}

/// Runs each on a thread of its own, for so long, and then, when all has been given up, for a moment more.
fn watch<T: Send + 'static>(
    works: Vec<impl FnOnce(&Met) -> anyhow::Result<T> + Send + 'static>,
    limit: Duration,
    grace: Duration,
) -> Watched<T> {
    let (met, (ended, ends)) = (Met::default(), mpsc::channel());
    let mut results: Vec<Option<Result<T, String>>> = works.iter().map(|_| None).collect();
    for (rank, work) in works.into_iter().enumerate() {
        let (met, ended) = (met.clone(), ended.clone());
        let run = move || {
            let result = contained(|| work(&met)).map_err(|failure| failure.to_string());
            // Nobody is left to be told when it is late.
            drop(ended.send((rank, result)));
        };
        if let Err(error) = thread::Builder::new().name(format!("rank {rank}")).spawn(run) {
            results[rank] = Some(Err(format!("no thread: {error}")));
        }
    }
    collect(&ends, &mut results, Instant::now() + limit);
    let late: Vec<bool> = results.iter().map(Option::is_none).collect();
    if late.contains(&true) {
        met.lock().unwrap_or_else(PoisonError::into_inner).iter().for_each(|group| group.abort());
        collect(&ends, &mut results, Instant::now() + grace);
    }
    let still_running = results.iter().any(Option::is_none);
    let told = results.into_iter().zip(late).map(|(result, late)| match result {
        Some(result) if !late => result,
        Some(Err(error)) => Err(format!("{}; then: {error}", not_done(limit))),
        Some(Ok(_)) => Err(not_done(limit)),
        None => Err(format!("{}, and still running", not_done(limit))),
    });
    Watched { results: told.collect(), still_running }
}

/// Waits for those that have no result yet.
fn collect<T>(
    ends: &Receiver<(usize, Result<T, String>)>,
    results: &mut [Option<Result<T, String>>],
    deadline: Instant,
) {
    while results.iter().any(Option::is_none) {
        let Ok((rank, result)) = ends.recv_timeout(deadline.saturating_duration_since(Instant::now())) else {
            return;
        };
        results[rank] = Some(result);
    }
}

pub(super) fn not_done(limit: Duration) -> String {
    format!("not done within {} seconds", limit.as_secs_f64())
}

#[cfg(all(test, feature = "emulation"))]
mod tests {
    use kernels::collective::GroupSpec;
    use kernels::cuda::Schedule;
    use kernels::cuda::comm::{Comm, Staged};

    use super::super::WORLD;
    use super::*;

    type Work = Box<dyn FnOnce(&Met) -> anyhow::Result<()> + Send>;

    /// Meets the other, and then waits for it.
    fn waiting(spec: GroupSpec) -> Work {
        Box::new(move |met| {
            let group = Arc::new(LocalGroup::join(&spec, Duration::from_secs(60))?);
            met.lock().expect("no panic before").push(group.clone());
            let gpu = Gpu::emulated(Schedule::Forward);
            Ok(Staged::new(&gpu, &group).barrier()?)
        })
    }

    fn specs(directory: &tempfile::TempDir) -> [GroupSpec; WORLD] {
        [0, 1].map(|rank| GroupSpec { path: directory.path().join("ranks"), rank, world: WORLD })
    }

    #[test]
    fn a_rank_that_waits_in_vain_is_ended_and_one_that_hangs_stays_behind() {
        let directory = tempfile::tempdir().unwrap();
        let [first, second] = specs(&directory);
        let (_open, nothing) = mpsc::channel::<()>();
        let hanging: Work = Box::new(move |met| {
            let group = Arc::new(LocalGroup::join(&second, Duration::from_secs(60))?);
            met.lock().expect("no panic before").push(group.clone());
            Ok(nothing.recv()?)
        });
        let limits = [500, 2000].map(Duration::from_millis);
        let Watched { results, still_running } = watch(vec![waiting(first), hanging], limits[0], limits[1]);
        assert!(still_running);
        let [first, second] = [0, 1].map(|rank| results[rank].clone().unwrap_err());
        assert!(
            first.starts_with("not done within 0.5 seconds; then: ") && first.contains("given up"),
            "{first}"
        );
        assert_eq!(second, "not done within 0.5 seconds, and still running");
    }

    #[test]
    fn the_end_of_one_rank_is_the_end_of_the_other() {
        let directory = tempfile::tempdir().unwrap();
        let [first, second] = specs(&directory);
        let panicking: Work = Box::new(move |_| {
            let _group = LocalGroup::join(&second, Duration::from_secs(60))?;
            panic!("no more")
        });
        let limit = Duration::from_secs(600);
        let Watched { results, still_running } = watch(vec![waiting(first), panicking], limit, limit);
        assert!(!still_running);
        assert!(results[0].as_ref().unwrap_err().contains("rank 1"), "{results:?}");
        assert_eq!(results[1].as_ref().unwrap_err(), "panic: no more");
    }
}
