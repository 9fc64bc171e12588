use std::ptr::null_mut;

use cudarc::driver::sys::{self, CUgraph, CUgraphExec, CUstream, CUstreamCaptureMode};

use super::check;
use crate::OpError;
use crate::cuda::driver::Recorded;

/// Lets this thread do for a while what the driver forbids while a graph is recorded, because it may wait or allocate: load
/// code. What is loaded is not part of the graph.
#[derive(Debug)]
pub(super) struct Unrestricted(CUstreamCaptureMode);

impl Unrestricted {
    pub(super) fn enter(op: &'static str) -> Result<Self, OpError> {
        let mut mode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
        // SAFETY: it exchanges the mode of this thread.
        check(op, unsafe { sys::cuThreadExchangeStreamCaptureMode(&mut mode) })?;
        Ok(Self(mode))
    }
}

impl Drop for Unrestricted {
    fn drop(&mut self) {
        // SAFETY: it exchanges the mode of this thread, for what it was. It fails for modes only that do not exist.
        let _ = unsafe { sys::cuThreadExchangeStreamCaptureMode(&mut self.0) };
    }
}

/// From here on, the stream records. What other threads do is no concern of it.
pub(super) fn begin(op: &'static str, stream: CUstream) -> Result<(), OpError> {
    let mode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
    // SAFETY: a stream of the current context.
    check(op, unsafe { sys::cuStreamBeginCapture_v2(stream, mode) })
}

/// Ends the recording, and makes of it what can be launched.
pub(super) fn end(op: &'static str, stream: CUstream) -> Result<Recorded, OpError> {
    let mut graph = null_mut();
    // SAFETY: a stream of the current context.
    check(op, unsafe { sys::cuStreamEndCapture(stream, &mut graph) })?;
    let graph = Recording(graph);
    let mut operations = 0;
    // SAFETY: a graph; without room for its nodes it only says how many there are.
    check(op, unsafe { sys::cuGraphGetNodes(graph.0, null_mut(), &mut operations) })?;
    let mut launchable = null_mut();
    // SAFETY: a graph, and no flags.
    check(op, unsafe { sys::cuGraphInstantiateWithFlags(&mut launchable, graph.0, 0) })?;
    let recorded = Recorded { handle: launchable.expose_provenance() as u64, operations };
    // Not when it is launched first.
    // SAFETY: a graph that can be launched.
    let uploaded = check(op, unsafe { sys::cuGraphUpload(launchable, stream) });
    if uploaded.is_err() {
        // SAFETY: nobody else knows of it.
        unsafe { destroy(recorded) }
    }
    uploaded.map(|()| recorded)
}

/// Ends the recording, for nothing.
pub(super) fn abandon(stream: CUstream) {
    let mut graph = null_mut();
    // SAFETY: a stream of the current context. It is an error when the recording has failed, or has ended, and then there
    // is no graph.
    let _ = unsafe { sys::cuStreamEndCapture(stream, &mut graph) };
    drop(Recording(graph));
}

/// # Safety
/// It has not been destroyed.
pub(super) unsafe fn launch(op: &'static str, recorded: Recorded, stream: CUstream) -> Result<(), OpError> {
    // SAFETY: as the caller vouches.
    check(op, unsafe { sys::cuGraphLaunch(launchable(recorded), stream) })
}

/// What is under way ends undisturbed.
///
/// # Safety
/// It has not been destroyed before.
pub(super) unsafe fn destroy(recorded: Recorded) {
    // SAFETY: as the caller vouches. Where the device has failed, it does not matter.
    let _ = unsafe { sys::cuGraphExecDestroy(launchable(recorded)) };
}

fn launchable(recorded: Recorded) -> CUgraphExec {
    std::ptr::with_exposed_provenance_mut(recorded.handle as usize)
}

/// What was recorded, as the driver describes it.
struct Recording(CUgraph);

impl Drop for Recording {
    fn drop(&mut self) {
        if !self.0.is_null() {
            // SAFETY: a graph that nobody else knows of; what was made of it is on its own.
            let _ = unsafe { sys::cuGraphDestroy(self.0) };
        }
    }
}
