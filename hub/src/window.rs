//! Chunks of one file that several connections fetch at once, put back in order. What is written is always the
//! beginning of the file without a gap, so that a download can be carried on from the length of what there is.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::error::HubError;

/// Chunks that may be fetched ahead of the one that is written next.
const CHUNKS_AHEAD: u64 = 12;

/// Smallest and largest chunk, in bytes: a chunk costs one round trip, and those that are under way are lost when the
/// process is killed.
const CHUNK_BYTES: Range<u64> = 4 << 20..16 << 20;

/// Why there are no more chunks.
#[derive(Debug)]
pub(crate) enum Ended {
    /// A chunk cannot be fetched.
    Failed(HubError),
    /// The server sends whole files only.
    NoRanges,
    /// Another thread has already said why.
    Closed,
}

/// The chunks of a file that are under way.
#[derive(Debug)]
pub(crate) struct Window {
    size: u64,
    chunk: u64,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    /// Where the next chunk to be fetched begins.
    next: u64,
    /// Where the next chunk to be written begins.
    written: u64,
    /// Chunks that came before their turn, by their beginning.
    ready: BTreeMap<u64, Vec<u8>>,
    closed: bool,
    ended: Option<Ended>,
}

impl Window {
    /// The chunks from `start` to the end of a file of `size` bytes.
    pub(crate) fn new(start: u64, size: u64) -> Self {
        let chunk = (size / 256).clamp(CHUNK_BYTES.start, CHUNK_BYTES.end);
        let state = State { next: start, written: start, ready: BTreeMap::new(), closed: false, ended: None };
        Self { size, chunk, state: Mutex::new(state), changed: Condvar::new() }
    }

    /// Whether so many bytes are worth several connections.
    pub(crate) fn is_worthwhile(bytes: u64) -> bool {
        bytes > 2 * CHUNK_BYTES.start
    }

    /// How many chunks there are.
    pub(crate) fn chunk_count(&self) -> u64 {
        let state = self.lock();
        (self.size - state.written).div_ceil(self.chunk)
    }

    /// The bytes to fetch next; waits until there is room for them. None when all are taken, or it is over.
    pub(crate) fn claim(&self) -> Option<Range<u64>> {
        let mut state = self.lock();
        while !state.closed
            && state.next < self.size
            && state.next >= state.written + CHUNKS_AHEAD * self.chunk
        {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        if state.closed || state.next >= self.size {
            return None;
        }
        let start = state.next;
        state.next = (start + self.chunk).min(self.size);
        Some(start..state.next)
    }

    /// Hands in the bytes of a claim.
    pub(crate) fn deliver(&self, start: u64, bytes: Vec<u8>) {
        self.lock().ready.insert(start, bytes);
        self.changed.notify_all();
    }

    /// Says that a claim cannot be fulfilled. Only the first reason counts.
    pub(crate) fn end(&self, reason: Ended) {
        let mut state = self.lock();
        state.closed = true;
        state.ended.get_or_insert(reason);
        self.changed.notify_all();
    }

    /// The bytes to write next; waits until they are there. None after the last ones.
    pub(crate) fn next(&self) -> Result<Option<Vec<u8>>, Ended> {
        let mut state = self.lock();
        loop {
            let written = state.written;
            if written >= self.size {
                return Ok(None);
            }
            if let Some(bytes) = state.ready.remove(&written) {
                state.written += bytes.len() as u64;
                self.changed.notify_all();
                return Ok(Some(bytes));
            }
            if state.closed {
                return Err(state.ended.take().unwrap_or(Ended::Closed));
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Whether what is being fetched is still wanted.
    pub(crate) fn is_closed(&self) -> bool {
        self.lock().closed
    }

    /// Waits, but not longer than what is being fetched is wanted.
    pub(crate) fn pause(&self, pause: Duration) {
        let end = Instant::now() + pause;
        let mut state = self.lock();
        while !state.closed && Instant::now() < end {
            let rest = end.saturating_duration_since(Instant::now());
            state = self.changed.wait_timeout(state, rest).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CHUNK: u64 = CHUNK_BYTES.start;

    fn length(range: &Range<u64>) -> usize {
        usize::try_from(range.end - range.start).unwrap()
    }

    #[test]
    fn chunks_come_out_in_order_whatever_order_they_come_in() {
        let window = Window::new(5, 3 * CHUNK);
        let claims: Vec<_> = (0..3).map(|_| window.claim().unwrap()).collect();
        assert_eq!(claims, [5..5 + CHUNK, 5 + CHUNK..5 + 2 * CHUNK, 5 + 2 * CHUNK..3 * CHUNK]);
        assert_eq!(window.claim(), None);
        for (number, claim) in claims.iter().enumerate().rev() {
            window.deliver(claim.start, vec![number as u8; length(claim)]);
        }
        for (number, claim) in claims.iter().enumerate() {
            let bytes = window.next().unwrap().unwrap();
            assert_eq!((bytes[0], bytes.len()), (number as u8, length(claim)));
        }
        assert!(window.next().unwrap().is_none());
    }

    #[test]
    fn nobody_runs_too_far_ahead_of_what_is_written() {
        let window = Window::new(0, 100 * CHUNK);
        let claims: Vec<_> = (0..CHUNKS_AHEAD).map(|_| window.claim().unwrap()).collect();
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| window.claim());
            for claim in &claims[..1] {
                window.deliver(claim.start, vec![0; length(claim)]);
                window.next().unwrap();
            }
            assert_eq!(waiting.join().unwrap().unwrap().start, CHUNKS_AHEAD * CHUNK);
        });
    }

    #[test]
    fn an_end_wakes_everybody_and_tells_why() {
        let window = Window::new(0, 100 * CHUNK);
        while window.lock().next < CHUNKS_AHEAD * CHUNK {
            window.claim();
        }
        std::thread::scope(|scope| {
            let claiming = scope.spawn(|| window.claim());
            let writing = scope.spawn(|| window.next());
            window.end(Ended::NoRanges);
            assert_eq!(claiming.join().unwrap(), None);
            assert!(matches!(writing.join().unwrap(), Err(Ended::NoRanges)));
        });
        window.pause(Duration::from_secs(3600));
        assert!(window.is_closed());
    }
}
