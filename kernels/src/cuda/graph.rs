use std::collections::BTreeSet;
use std::sync::{Arc, MutexGuard};

use super::Gpu;
use super::driver::{DevicePtr, Recorded};
use crate::OpError;

/// Work that was recorded once and starts again as a whole, for the price of one launch.
///
/// It reads and writes the memory that it was recorded with, whatever that holds by then. That memory stays until the
/// graph is dropped, though its buffers may go earlier.
#[derive(Debug)]
pub struct Graph {
    gpu: Arc<Gpu>,
    recorded: Recorded,
    number: u64,
}

impl Gpu {
    /// Records what `run` starts, of this thread, and does nothing of it.
    ///
    /// Kernels, products, and what buffers do within the device can be recorded. To allocate, to wait, and to copy from or
    /// to the host are errors meanwhile, and no graph comes of it, whatever `run` makes of them. Nor does one when `run`
    /// errors or panics; in each case the device goes on as before.
    pub fn capture<E: From<OpError>>(
        self: &Arc<Self>,
        run: impl FnOnce() -> Result<(), E>,
    ) -> Result<Graph, E> {
        const OP: &str = "capture";
        self.outside_capture(OP)?;
        self.driver().begin_capture()?;
        let number = self.captures().begin();
        let recording = Recording { gpu: self, number };
        run()?;
        let refused = self.captures().refused.take();
        refused.map_or(Ok(()), Err)?;
        let recorded = self.driver().end_capture()?;
        std::mem::forget(recording);
        self.captures().recording = false;
        Ok(Graph { gpu: self.clone(), recorded, number })
    }

    /// Errors while a graph is recorded, and then the graph is not to be.
    pub(super) fn outside_capture(&self, op: &'static str) -> Result<(), OpError> {
        let mut captures = self.captures();
        if !captures.recording {
            return Ok(());
        }
        let error = OpError::unsupported(op, "not while a graph is captured");
        captures.refused.get_or_insert(error.clone());
        Err(error)
    }

    pub(super) fn is_capturing(&self) -> bool {
        self.captures().recording
    }

    /// Memory that is allocated now is used by no graph with a number up to this.
    pub(super) fn birth(&self) -> u64 {
        self.captures().count
    }

    /// Gives memory back, now or when the last graph is gone that may use it.
    pub(super) fn give_back(&self, ptr: DevicePtr, birth: u64) {
        let mut captures = self.captures();
        if captures.may_use(birth) {
            captures.retired.push((ptr, birth));
            return;
        }
        drop(captures);
        // SAFETY: no buffer has it any more, and no graph uses it.
        unsafe { self.driver().free(ptr) }
    }

    fn end_graph(&self, number: u64) {
        for ptr in self.captures().end(number) {
            // SAFETY: its buffer is gone, and so is the last graph that may have used it.
            unsafe { self.driver().free(ptr) }
        }
    }

    fn captures(&self) -> MutexGuard<'_, Captures> {
        self.captures.lock().expect("no thread panics while it holds the lock")
    }
}

/// Ends a capture that came to nothing.
struct Recording<'a> {
    gpu: &'a Gpu,
    number: u64,
}

impl Drop for Recording<'_> {
    fn drop(&mut self) {
        self.gpu.driver().abandon_capture();
        let mut captures = self.gpu.captures();
        captures.recording = false;
        captures.refused = None;
        drop(captures);
        self.gpu.end_graph(self.number);
    }
}

impl Graph {
    /// Does what was recorded, behind all work before.
    pub fn replay(&self) -> Result<(), OpError> {
        self.gpu.outside_capture("replay")?;
        // SAFETY: the memory it uses is kept (`Gpu::give_back`).
        unsafe { self.gpu.driver().replay(self.recorded) }
    }

    /// How many kernels, products and copies it consists of.
    pub fn operations(&self) -> usize {
        self.recorded.operations
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        // SAFETY: it is dropped once. What is under way ends undisturbed.
        unsafe { self.gpu.driver().forget(self.recorded) }
        self.gpu.end_graph(self.number);
    }
}

/// Which graphs there are, and memory that only they keep.
///
/// Nobody can say which buffers a kernel was given. But those that were allocated after a capture are not among them.
#[derive(Debug, Default)]
pub(super) struct Captures {
    /// How many have begun.
    count: u64,
    /// The numbers of those whose graph exists, or is being recorded.
    live: BTreeSet<u64>,
    recording: bool,
    /// The first thing that could not be recorded.
    refused: Option<OpError>,
    /// Without a buffer, and when they were allocated.
    retired: Vec<(DevicePtr, u64)>,
}

impl Captures {
    fn begin(&mut self) -> u64 {
        self.recording = true;
        self.count += 1;
        self.live.insert(self.count);
        self.count
    }

    /// Whether a graph may use what was allocated when `birth` captures had begun.
    fn may_use(&self, birth: u64) -> bool {
        self.live.last().is_some_and(|newest| *newest > birth)
    }

    /// The graph of this number is gone: what nobody needs any more.
    fn end(&mut self, number: u64) -> Vec<DevicePtr> {
        self.live.remove(&number);
        let retired = std::mem::take(&mut self.retired);
        let (kept, free): (Vec<_>, Vec<_>) = retired.into_iter().partition(|(_, birth)| self.may_use(*birth));
        self.retired = kept;
        free.into_iter().map(|(ptr, _)| ptr).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_stays_until_the_last_graph_that_may_use_it_is_gone() {
        let mut captures = Captures::default();
        assert!(!captures.may_use(captures.count));
        let old = captures.count;
        let first = captures.begin();
        assert!(captures.may_use(old), "while it is recorded, too");
        let between = captures.count;
        assert!(!captures.may_use(between), "what is allocated later is not recorded");
        let second = captures.begin();
        assert!(captures.may_use(between));
        captures.retired = vec![(DevicePtr(1), old), (DevicePtr(2), between)];
        assert_eq!(captures.end(first), [], "the second may use both");
        assert_eq!(captures.end(second), [DevicePtr(1), DevicePtr(2)]);
        let [first, second] = [captures.begin(), captures.begin()];
        captures.retired = vec![(DevicePtr(1), old), (DevicePtr(2), first)];
        assert_eq!(captures.end(second), [DevicePtr(2)]);
        assert_eq!(captures.end(first), [DevicePtr(1)]);
    }
}
