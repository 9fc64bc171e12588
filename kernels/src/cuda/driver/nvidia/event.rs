use std::mem::ManuallyDrop;
use std::ptr::null_mut;

use cudarc::driver::sys::{self, CUevent, CUevent_flags, CUstream};

use super::check;
use crate::OpError;
use crate::cuda::driver::Mark;

/// A mark between the work of a stream. The context it was made in has to be current in every call.
#[derive(Debug)]
pub(super) struct Event(CUevent);

// SAFETY: events may be used from any thread.
unsafe impl Send for Event {}

impl Event {
    /// To wait for.
    pub(super) fn new(op: &'static str) -> Result<Self, OpError> {
        Self::of(op, CUevent_flags::CU_EVENT_DISABLE_TIMING)
    }

    /// To measure with.
    fn timed(op: &'static str) -> Result<Self, OpError> {
        Self::of(op, CUevent_flags::CU_EVENT_DEFAULT)
    }

    fn of(op: &'static str, flags: CUevent_flags) -> Result<Self, OpError> {
        let mut event = null_mut();
        // SAFETY: the context is current.
        check(op, unsafe { sys::cuEventCreate(&mut event, flags as u32) })?;
        Ok(Self(event))
    }

    /// Puts the mark behind all work of the stream so far.
    pub(super) fn record(&self, op: &'static str, stream: CUstream) -> Result<(), OpError> {
        // SAFETY: both are of the current context.
        check(op, unsafe { sys::cuEventRecord(self.0, stream) })
    }

    /// Has what `stream` is asked to do from now on wait until the mark has been passed.
    pub(super) fn hold_back(&self, op: &'static str, stream: CUstream) -> Result<(), OpError> {
        // SAFETY: both are of the current context.
        check(op, unsafe { sys::cuStreamWaitEvent(stream, self.0, 0) })
    }

    /// Waits until the work before the mark is done; at once where it has not been put.
    pub(super) fn wait(&self, op: &'static str) -> Result<(), OpError> {
        // SAFETY: an event of the current context.
        check(op, unsafe { sys::cuEventSynchronize(self.0) })
    }
}

impl Event {
    /// As a number, to be taken back later.
    pub(super) fn into_mark(self) -> Mark {
        Mark(ManuallyDrop::new(self).0.expose_provenance() as u64)
    }

    /// # Safety
    /// The mark comes from [`into_mark`](Self::into_mark), and has not been dropped.
    pub(super) unsafe fn of_mark(mark: Mark) -> ManuallyDrop<Self> {
        ManuallyDrop::new(Self(std::ptr::with_exposed_provenance_mut(mark.0 as usize)))
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: nobody uses it any more; the driver keeps what is under way. Where the device has failed it does not
        // matter.
        let _ = unsafe { sys::cuEventDestroy_v2(self.0) };
    }
}

/// Measures how long work takes on a stream.
#[derive(Debug)]
pub(super) struct Stopwatch {
    start: Event,
    end: Event,
    stream: CUstream,
}

impl Stopwatch {
    /// Few enough to be done soon, enough for a median that another process's burst does not move.
    const ROUNDS: usize = 7;

    pub(super) fn new(op: &'static str, stream: CUstream) -> Result<Self, OpError> {
        Ok(Self { start: Event::timed(op)?, end: Event::timed(op)?, stream })
    }

    /// Milliseconds that `run` takes each time, the median of a few, with `before` before each.
    pub(super) fn time(
        &self,
        op: &'static str,
        before: impl Fn() -> Result<(), OpError>,
        run: &dyn Fn() -> Result<(), OpError>,
    ) -> Result<f32, OpError> {
        let mut durations = [0f32; Self::ROUNDS];
        for duration in &mut durations {
            before()?;
            self.start.record(op, self.stream)?;
            run()?;
            self.end.record(op, self.stream)?;
            self.end.wait(op)?;
            // SAFETY: both marks have been passed.
            check(op, unsafe { sys::cuEventElapsedTime_v2(duration, self.start.0, self.end.0) })?;
        }
        durations.sort_by(f32::total_cmp);
        Ok(durations[Self::ROUNDS / 2])
    }
}
