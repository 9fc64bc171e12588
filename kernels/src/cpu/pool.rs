use std::num::NonZeroUsize;

use rayon::prelude::*;
use rayon::{ThreadPool, ThreadPoolBuilder};

use super::isa::Isa;
use crate::OpError;

/// The threads and the instruction set that operations run on.
#[derive(Debug)]
pub struct Cpu {
    /// Absent when there is one thread: the caller's.
    pool: Option<ThreadPool>,
    threads: NonZeroUsize,
    isa: Isa,
}

/// An operation of less work than this, in multiply-adds, runs on the calling thread.
///
/// It is about 40 microseconds of one thread. Handing over and coming back took 4 to 10 from outside the pool and 1 to 5
/// from within (two busy cores of a Sapphire Rapids server); a sleeping core takes longer to wake.
const WORTH_SHARING: usize = 1_000_000;

impl Cpu {
    /// Starts `threads` threads and picks the best instruction set this machine has.
    pub fn new(threads: NonZeroUsize) -> Result<Self, OpError> {
        Self::with_isa(threads, Isa::best())
    }

    /// Starts `threads` threads. Errors when this machine does not have the instruction set.
    pub fn with_isa(threads: NonZeroUsize, isa: Isa) -> Result<Self, OpError> {
        const OP: &str = "cpu";
        if !isa.is_supported() {
            return Err(OpError::unsupported(OP, format!("this machine does not have {isa:?}")));
        }
        let pool = (threads.get() > 1)
            .then(|| {
                ThreadPoolBuilder::new()
                    .num_threads(threads.get())
                    .thread_name(|index| format!("kernels-{index}"))
                    .build()
            })
            .transpose()
            .map_err(|error| OpError::unsupported(OP, format!("{threads} threads did not start: {error}")))?;
        Ok(Self { pool, threads, isa })
    }

    /// Number of threads.
    pub fn threads(&self) -> NonZeroUsize {
        self.threads
    }

    /// The instruction set.
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// Runs `pass` on one of the threads. Operations called from there are shared with the other threads without
    /// handing each of them over, which saves a wake-up and a sleep per operation.
    pub fn install<R: Send>(&self, pass: impl FnOnce() -> R + Send) -> R {
        match &self.pool {
            Some(pool) => pool.install(pass),
            None => pass(),
        }
    }

    /// Calls `run` with every piece; on all threads if `work`, in multiply-adds, is worth it.
    pub(super) fn for_each<T: Send>(&self, work: usize, pieces: Vec<T>, run: impl Fn(T) + Send + Sync) {
        match self.shared(work) {
            Some(pool) if pieces.len() > 1 => {
                pool.install(|| pieces.into_par_iter().with_max_len(1).for_each(run));
            }
            _ => pieces.into_iter().for_each(run),
        }
    }

    /// The pool, if `work` multiply-adds are worth the threads.
    fn shared(&self, work: usize) -> Option<&ThreadPool> {
        self.pool.as_ref().filter(|_| work >= WORTH_SHARING)
    }

    /// Into how many pieces to cut an operation of `work` multiply-adds: a few for each thread, so that a thread that
    /// the system holds up does not hold up the others.
    pub(super) fn pieces(&self, work: usize) -> usize {
        const PIECES_PER_THREAD: usize = 8;
        match self.shared(work) {
            Some(_) => self.threads.get() * PIECES_PER_THREAD,
            None => 1,
        }
    }
}
