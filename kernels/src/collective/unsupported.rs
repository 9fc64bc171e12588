use std::convert::Infallible;
use std::time::Duration;

use super::{GroupError, GroupSpec};

/// The place of one process in a group of processes on this machine: not on this system.
#[derive(Debug)]
pub struct LocalGroup(Infallible);

impl LocalGroup {
    /// Always an error here, which says that groups work on Linux only.
    pub fn join(_spec: &GroupSpec, _timeout: Duration) -> Result<Self, GroupError> {
        Err(GroupError::Unsupported)
    }

    /// Who this process is.
    pub fn rank(&self) -> usize {
        match self.0 {}
    }

    /// How many there are.
    pub fn world(&self) -> usize {
        match self.0 {}
    }

    /// Sums vectors.
    pub fn all_reduce(&self, _data: &mut [f32]) -> Result<(), GroupError> {
        match self.0 {}
    }

    /// Puts columns side by side.
    pub fn all_gather_columns(
        &self,
        _own: &[f32],
        _rows: usize,
        _cols: &[usize],
        _out: &mut [f32],
    ) -> Result<(), GroupError> {
        match self.0 {}
    }

    /// Waits for all others.
    pub fn barrier(&self) -> Result<(), GroupError> {
        match self.0 {}
    }

    /// The least of what all ranks bring.
    pub fn least(&self, _value: u64) -> Result<u64, GroupError> {
        match self.0 {}
    }

    /// Tells the others bytes.
    pub fn broadcast_bytes(&self, _root: usize, _bytes: &mut [u8]) -> Result<(), GroupError> {
        match self.0 {}
    }

    /// Whether all ranks are there.
    pub fn check(&self) -> Result<(), GroupError> {
        match self.0 {}
    }

    /// Says what the following calls are for.
    pub fn set_work(&self, _work: u64) {
        match self.0 {}
    }

    /// Gives up on the group.
    pub fn abort(&self) {
        match self.0 {}
    }
}
