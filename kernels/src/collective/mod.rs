//! What the processes of one model say to each other in the middle of a step: sums, and parts put together.
//!
//! [`LocalGroup`] is for processes on one machine. They meet at a file, map it, and from then on exchange numbers
//! through memory. `join.rs` is how they meet, `shared.rs` is what lies in the memory, `group.rs` is what they do there.
//!
//! The parts of a call:
//!
//! 1. A **stage**: each rank writes its numbers, and what call they belong to, into a buffer of its own, counts its
//!    stage up, and waits until all others have counted up as well. Then it reads what it needs from everybody.
//! 2. Each rank has two buffers and uses them in turn. Who has seen all ranks at a stage knows that all are done with
//!    the stage before it, so the buffer of that one is free again, and a stage needs no second wait.
//! 3. Whoever waits sleeps in the kernel, after a few microseconds of hope.
//!
//! Invariants:
//!
//! - Sums are taken in the order of the ranks, so every rank holds the same bits, on every run.
//! - Nobody waits for the dead: each rank holds a lock that its end releases, whatever ended it, and who waits looks.
//! - Ranks that do not do the same are told so, both sides, before a number is used.
//! - A group that has failed stays failed. There is no second try on the same file.

mod error;
#[cfg(target_os = "linux")]
mod group;
#[cfg(target_os = "linux")]
mod join;
#[cfg(target_os = "linux")]
mod shared;
#[cfg(not(target_os = "linux"))]
mod unsupported;

use std::path::PathBuf;

pub use error::{Call, GroupError, Operation};
#[cfg(target_os = "linux")]
pub use group::LocalGroup;
#[cfg(not(target_os = "linux"))]
pub use unsupported::LocalGroup;

/// Which group to join, and as whom.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GroupSpec {
    /// The file at which the ranks meet. Rank 0 makes it and takes it away when all have come; its directory has to
    /// exist. Memory (tmpfs) is the best place, but any directory will do.
    pub path: PathBuf,
    /// Who this process is, from 0.
    pub rank: usize,
    /// How many there are, 1 to [`GroupSpec::WORLD_MAX`].
    pub world: usize,
}

impl GroupSpec {
    /// Most ranks of a group.
    pub const WORLD_MAX: usize = 64;

    /// Errors when there is no such rank in such a world.
    pub fn check(&self) -> Result<(), GroupError> {
        let &Self { rank, world, .. } = self;
        if world == 0 || world > Self::WORLD_MAX || rank >= world {
            return Err(GroupError::Spec { rank, world });
        }
        Ok(())
    }
}
