use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::collective::LocalGroup;

/// How often to look whether all ranks are there.
const ROUND: Duration = Duration::from_millis(100);

/// A thread that looks after a group while a device waits for the other ranks, which it would do for ever.
#[derive(Debug)]
pub(super) struct Patrol {
    over: Arc<(Mutex<bool>, Condvar)>,
    thread: Option<JoinHandle<()>>,
}

impl Patrol {
    /// Calls `give_up` when the group has failed, unless this is dropped before.
    pub(super) fn start(group: &Arc<LocalGroup>, give_up: impl FnOnce() + Send + 'static) -> Self {
        let over = Arc::new((Mutex::new(false), Condvar::new()));
        let (group, theirs) = (group.clone(), over.clone());
        let patrol = move || {
            while group.check().is_ok() {
                let is_over = theirs.0.lock().unwrap_or_else(PoisonError::into_inner);
                let waited = theirs.1.wait_timeout_while(is_over, ROUND, |is_over| !*is_over);
                if *waited.unwrap_or_else(PoisonError::into_inner).0 {
                    return;
                }
            }
            give_up();
        };
        let thread = std::thread::Builder::new().name("patrol".to_owned()).spawn(patrol);
        // Without threads, a rank that is gone is found by who asks next.
        Self { over, thread: thread.ok() }
    }
}

impl Drop for Patrol {
    fn drop(&mut self) {
        *self.over.0.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.over.1.notify_all();
        if let Some(thread) = self.thread.take() {
            // It ends within a round; a panic in it was reported when it happened.
            let _ = thread.join();
        }
    }
}
