//! The processes that serve one model together, as one of them sees them.
//!
//! Each rank holds every batch, computes its part of every step, and chooses every token. They make the same calls in the
//! same order, and sums are taken in the order of the ranks, so that all of them hold the same bits and choose the same
//! tokens. One of them, a request's owner, makes the text and answers. What fails on one rank has to fail on all: who has
//! left the step gives up on the group, and the others' waits end with an error.
//!
//! What is absent: who has which part. Layers know that; here tensors are just rows and columns.

use std::sync::Arc;

use kernels::OpError;
use kernels::collective::{GroupError, LocalGroup};
use proto::units::RequestId;

use crate::backend::{Device, Link, Tensor};
use crate::weights::Partition;

/// This process among those of its model. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Ranks {
    /// The processes, and what connects their devices.
    group: Option<(Arc<LocalGroup>, Link)>,
    /// The place of this process where there is no group.
    alone: Partition,
}

impl Ranks {
    /// One process serves the whole model.
    pub fn alone() -> Self {
        Self::imagined(Partition::WHOLE)
    }

    /// One of several, on CPUs of this machine.
    pub fn of(group: impl Into<Arc<LocalGroup>>) -> Self {
        let group = group.into();
        Self { group: Some((group.clone(), Link::Host(group))), alone: Partition::WHOLE }
    }

    /// One of several, without the others, for plans: what they would exchange stays as it is.
    pub fn imagined(partition: Partition) -> Self {
        Self { group: None, alone: partition }
    }

    /// The same ranks, on these devices. All of them call it.
    ///
    /// Errors when one does not come, or the devices cannot be connected.
    pub fn on(&self, device: &Device) -> Result<Self, OpError> {
        let connect = |(group, _): &(Arc<LocalGroup>, Link)| Ok((group.clone(), device.link(group)?));
        Ok(Self { group: self.group.as_ref().map(connect).transpose()?, ..*self })
    }

    /// Which rank this is, of how many.
    pub fn partition(&self) -> Partition {
        match &self.group {
            None => self.alone,
            Some((group, _)) => Partition { rank: group.rank(), world: group.world() },
        }
    }

    /// Whether this process owns the request: the rank that its id names, modulo the number of ranks, as the contract
    /// has it.
    pub fn owns(&self, request: RequestId) -> bool {
        let Partition { rank, world } = self.partition();
        request.0 % world as u64 == rank as u64
    }

    /// Every element becomes the sum over all ranks.
    pub fn all_reduce(&self, tensor: &mut Tensor) -> Result<(), OpError> {
        self.group.as_ref().map_or(Ok(()), |(_, link)| link.all_reduce(tensor))
    }

    /// The columns of all ranks side by side: rank `r` has `cols[r]` of them. `out`: `[rows, sum of cols]`.
    pub fn gather_cols(&self, own: &Tensor, cols: &[usize], out: &mut Tensor) -> Result<(), OpError> {
        self.group.as_ref().map_or(Ok(()), |(_, link)| link.gather_cols(own, cols, out))
    }

    /// Errors when a rank has been lost in the step whose results are there.
    pub fn check(&self) -> Result<(), OpError> {
        self.group.as_ref().map_or(Ok(()), |(_, link)| link.check())
    }

    /// Says which step comes next: all ranks have to be at the same one when they exchange numbers.
    pub(crate) fn begin_step(&self, fingerprint: u64) {
        if let Some((group, _)) = &self.group {
            group.set_work(fingerprint);
        }
    }

    /// The least of what all ranks bring. Waits for them.
    pub(crate) fn least(&self, value: u32) -> Result<u32, GroupError> {
        match &self.group {
            Some((group, _)) => group.least(u64::from(value)).map(|least| least.min(u64::from(value)) as u32),
            None => Ok(value),
        }
    }

    /// Ends the steps of all ranks with an error, now and for good. Answers whether there was anything to end.
    pub(crate) fn give_up(&self) -> bool {
        if let Some((group, link)) = &self.group {
            link.abort();
            group.abort();
        }
        self.group.is_some()
    }
}
