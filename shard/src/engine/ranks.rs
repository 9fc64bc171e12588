//! The processes that serve one model together, as the engine of one of them sees it.
//!
//! Each rank holds every batch, computes its part of every step, and chooses every token; the choices are the same, bit
//! for bit. One of them, a request's owner, makes the text and answers. What fails on one rank has to fail on all: who
//! has left the step gives up on the group, and the others' waits end with an error.

use std::sync::Arc;

use kernels::collective::{GroupError, LocalGroup};
use proto::units::RequestId;

/// This process among those of its model. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Ranks {
    group: Option<Arc<LocalGroup>>,
}

impl Ranks {
    /// One process serves the whole model.
    pub fn alone() -> Self {
        Self::default()
    }

    /// One of several.
    pub fn of(group: Arc<LocalGroup>) -> Self {
        Self { group: Some(group) }
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.group.as_ref().map_or(1, |group| group.world())
    }

    /// Whether this process owns the request: the rank that its id names, modulo the number of ranks, as the contract
    /// has it.
    pub fn owns(&self, request: RequestId) -> bool {
        self.group.as_ref().is_none_or(|group| request.0 % group.world() as u64 == group.rank() as u64)
    }

    /// Says which step comes next: all ranks have to be at the same one when they exchange numbers.
    pub(super) fn begin_step(&self, fingerprint: u64) {
        if let Some(group) = &self.group {
            group.set_work(fingerprint);
        }
    }

    /// The least of what all ranks bring. Waits for them.
    pub(super) fn least(&self, value: u32) -> Result<u32, GroupError> {
        match &self.group {
            Some(group) => group.least(u64::from(value)).map(|least| least.min(u64::from(value)) as u32),
            None => Ok(value),
        }
    }

    /// Ends the steps of all ranks with an error, now and for good. Answers whether there was anything to end.
    pub(super) fn give_up(&self) -> bool {
        if let Some(group) = &self.group {
            group.abort();
        }
        self.group.is_some()
    }
}
