use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::Duration;

use anyhow::anyhow;
use kernels::OpError;
use kernels::cuda::Gpu;

/// The GPU that is examined, for as long as it answers.
pub(super) struct Patient {
    gpu: Arc<Gpu>,
    limit: Duration,
    /// In what it was lost.
    lost: Option<String>,
}

/// What came of some work.
#[derive(Debug, PartialEq)]
pub(super) enum Outcome<T> {
    /// It came to its end.
    Done(T),
    /// It did not, and why.
    Failed(String),
    /// It has not been tried, and why.
    NotRun(String),
}

impl Patient {
    /// A GPU of which no single piece of work takes longer than `limit`.
    pub(super) fn new(gpu: Arc<Gpu>, limit: Duration) -> Self {
        Self { gpu, limit, lost: None }
    }

    pub(super) fn gpu(&self) -> &Arc<Gpu> {
        &self.gpu
    }

    pub(super) fn limit(&self) -> Duration {
        self.limit
    }

    /// Why it is no use to ask anything of the GPU, if that is so.
    pub(super) fn lost(&self) -> Option<String> {
        let lost = self.lost.as_ref()?;
        Some(format!("the GPU was lost in {lost}; a new process can use it again"))
    }

    /// Nothing more can be asked of the GPU since this work.
    pub(super) fn lose(&mut self, what: &str) {
        self.lost.get_or_insert(what.to_owned());
    }

    /// Runs some work on the GPU, unless it is lost. It is, when the work does not come to its end in time, and when it
    /// ends with a failure of the device.
    pub(super) fn run<T: Send + 'static>(
        &mut self,
        what: &str,
        work: impl FnOnce(&Arc<Gpu>) -> anyhow::Result<T> + Send + 'static,
    ) -> Outcome<T> {
        if let Some(reason) = self.lost() {
            return Outcome::NotRun(reason);
        }
        let gpu = self.gpu.clone();
        let failure = match within(self.limit, move || work(&gpu)) {
            Ok(done) => return Outcome::Done(done),
            Err(failure) => failure,
        };
        let is_fatal = match &failure {
            Failure::Late(_) => true,
            Failure::Error(error) => error
                .chain()
                .any(|cause| matches!(cause.downcast_ref::<OpError>(), Some(OpError::Device { .. }))),
            Failure::Panic(_) => false,
        };
        if is_fatal || self.gpu.memory().is_err() {
            self.lose(what);
        }
        Outcome::Failed(failure.to_string())
    }
}

/// Why work did not come to its end.
#[derive(Debug, thiserror::Error)]
pub(super) enum Failure {
    #[error("{0:#}")]
    Error(anyhow::Error),
    #[error("panic: {0}")]
    Panic(String),
    #[error("not done within {} seconds", .0.as_secs_f64())]
    Late(Duration),
}

/// Runs some work on a thread of its own, which stays behind when it is late.
pub(super) fn within<T: Send + 'static>(
    limit: Duration,
    work: impl FnOnce() -> anyhow::Result<T> + Send + 'static,
) -> Result<T, Failure> {
    let (done, result) = mpsc::channel();
    let run = move || {
        // Nobody is left to be told when it is late.
        drop(done.send(contained(work)));
    };
    let started = thread::Builder::new().name("examination".to_owned()).spawn(run);
    started.map_err(|error| Failure::Error(anyhow!("no thread: {error}")))?;
    match result.recv_timeout(limit) {
        Ok(result) => result,
        Err(RecvTimeoutError::Timeout) => Err(Failure::Late(limit)),
        Err(RecvTimeoutError::Disconnected) => Err(Failure::Panic("the thread is gone".to_owned())),
    }
}

/// A panic becomes an error.
pub(super) fn contained<T>(work: impl FnOnce() -> anyhow::Result<T>) -> Result<T, Failure> {
    match catch_unwind(AssertUnwindSafe(work)) {
        Ok(result) => result.map_err(Failure::Error),
        Err(panic) => Err(Failure::Panic(text_of(&*panic))),
    }
}

fn text_of(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "of no words".to_owned())
}

#[cfg(all(test, feature = "emulation"))]
mod tests {
    use kernels::cuda::Schedule;

    use super::*;

    const LONG: Duration = Duration::from_secs(600);

    fn patient(limit: Duration) -> Patient {
        Patient::new(Gpu::emulated(Schedule::Forward), limit)
    }

    fn failure(outcome: Outcome<()>) -> String {
        match outcome {
            Outcome::Failed(reason) => reason,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn an_error_and_a_panic_are_told_and_the_next_work_runs() {
        let mut patient = patient(LONG);
        assert_eq!(failure(patient.run("a", |_| Err(anyhow!("no").context("it says")))), "it says: no");
        assert_eq!(failure(patient.run("b", |_| panic!("of {}", "fear"))), "panic: of fear");
        assert_eq!(patient.run("c", |gpu| Ok(gpu.memory()?.free)), Outcome::Done(64 << 20));
    }

    #[test]
    fn after_a_failure_of_the_device_nothing_runs() {
        let mut patient = patient(LONG);
        let broken = || OpError::Device { op: "norm", reason: "an illegal address".to_owned() };
        let told = failure(patient.run("family norm", move |_| Err(anyhow!(broken()).context("at last"))));
        assert_eq!(told, "at last: norm: an illegal address");
        let next = patient.run("family rope", |_| Ok(()));
        let reason = "the GPU was lost in family norm; a new process can use it again".to_owned();
        assert_eq!(next, Outcome::NotRun(reason));
    }

    #[test]
    fn what_never_ends_is_given_up_and_the_gpu_with_it() {
        let mut patient = patient(Duration::from_millis(20));
        let (_open, nothing) = mpsc::channel::<()>();
        let told = failure(patient.run("family norm", move |_| Ok(nothing.recv()?)));
        assert_eq!(told, "not done within 0.02 seconds");
        assert!(matches!(patient.run("family rope", |_| Ok(())), Outcome::NotRun(_)));
    }
}
