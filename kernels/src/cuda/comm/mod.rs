//! What the ranks of a model do together in the middle of a step, with numbers on their devices.
//!
//! The ranks are processes of one machine, each with a device, that have met in a [`LocalGroup`]. There are three ways, and
//! [`connect`] takes the best that all ranks have:
//!
//! | | how | where |
//! |---|---|---|
//! | `peer.rs` | kernels of ours that read the other devices' memory; for what is short, where NCCL takes longest | devices that reach each other's memory |
//! | `nccl.rs` | NVIDIA's library | several GPUs, and the library is there |
//! | `staged.rs` | through the host and the group's shared memory; waits for the device | everywhere |
//!
//! The first two can be recorded in a [`Graph`](super::Graph).
//!
//! Invariants:
//!
//! - All ranks make the same calls in the same order, of the same sizes. A rank that does not is not noticed but by a wait
//!   without end.
//! - Sums of `peer.rs` and `staged.rs` are taken in the order of the ranks, in f32, and rounded once: every rank holds the
//!   same bits, and those of either.
//! - Nobody waits for the dead: while a device waits, a thread looks after the group (`patrol.rs`).

#[cfg(feature = "cuda")]
mod nccl;
mod patrol;
mod peer;
mod staged;

use std::fmt::{self, Debug};
use std::sync::Arc;

use super::buffer::wrong_element;
use super::params::Params;
use super::{Element, Gpu, Layout, Slice, SliceMut};
use crate::OpError;
use crate::collective::{GroupError, LocalGroup};
use crate::error::check_length;

#[cfg(feature = "cuda")]
pub use nccl::Nccl;
pub use peer::{Peer, PeerLimits};
pub use staged::Staged;

/// This process among those of its model, as its device sees them.
///
/// What has gone wrong for one is an error for all, now or at the next call, and stays so.
pub trait Comm: Debug + Send + Sync {
    /// Who this is.
    fn rank(&self) -> usize;

    /// How many there are.
    fn world(&self) -> usize;

    /// Every element becomes the sum over all ranks. Floats of 16 or 32 bits, as many on every rank.
    fn all_reduce(&self, data: SliceMut<'_>) -> Result<(), OpError>;

    /// The columns of all ranks side by side, those of rank 0 first. Floats of 16 or 32 bits.
    ///
    /// - `own`: `[rows, cols[rank]]`, this rank's columns
    /// - `cols`: how many columns each rank has, some perhaps none
    /// - `out`: `[rows, sum of cols]`
    fn all_gather_columns(
        &self,
        own: Slice<'_>,
        rows: usize,
        cols: &[usize],
        out: SliceMut<'_>,
    ) -> Result<(), OpError>;

    /// Waits until all ranks have called it and their devices have done all work before.
    fn barrier(&self) -> Result<(), OpError>;

    /// Errors when a rank is gone or has given up. To be asked when the results of a step are there: a device that has
    /// waited in vain holds numbers that mean nothing.
    fn check(&self) -> Result<(), OpError>;

    /// Ends the waits of all ranks, now and for good. From any thread.
    fn abort(&self);

    /// How it works, for people.
    fn description(&self) -> String;
}

/// How ranks exchange numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// What [`connect`] takes.
    Best,
    /// Kernels of ours that read the other devices' memory.
    Peer,
    /// NVIDIA's library.
    Nccl,
    /// Through the host.
    Staged,
}

/// In which order a sum over ranks is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SumOrder {
    /// In that of the ranks, in f32, and rounded once.
    OfRanks,
    /// In any, that is the same for all ranks; the device may round in between.
    Any,
}

impl Way {
    /// Connects the ranks in this way, and in no other. Each of them calls it. None when some of them do not have it.
    ///
    /// Errors when the group or the device fails.
    pub fn connect(self, gpu: &Arc<Gpu>, group: &Arc<LocalGroup>) -> Result<Option<Arc<dyn Comm>>, OpError> {
        match self {
            Self::Best => connect(gpu, group).map(Some),
            Self::Peer => {
                let peer = Peer::new(gpu, group, PeerLimits::of(group.world()), None)?;
                Ok(peer.map(|peer| Arc::new(peer) as Arc<dyn Comm>))
            }
            Self::Nccl => library(gpu, group),
            Self::Staged => Ok(Some(Arc::new(Staged::new(gpu, group)))),
        }
    }

    /// How it adds up.
    pub fn order(self) -> SumOrder {
        match self {
            Self::Peer | Self::Staged => SumOrder::OfRanks,
            Self::Best | Self::Nccl => SumOrder::Any,
        }
    }

    /// Whether a graph can hold it, always.
    pub fn can_be_recorded(self) -> bool {
        matches!(self, Self::Peer | Self::Nccl)
    }
}

impl fmt::Display for Way {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Best => "the best way",
            Self::Peer => "peer memory",
            Self::Nccl => "NCCL",
            Self::Staged => "through the host's memory",
        })
    }
}

/// The best way that all ranks have. Each of them calls it, before any work that a graph records.
///
/// Errors when the group or the device fails; what is merely missing is not missed.
pub fn connect(gpu: &Arc<Gpu>, group: &Arc<LocalGroup>) -> Result<Arc<dyn Comm>, OpError> {
    let staged = Arc::new(Staged::new(gpu, group));
    if group.world() == 1 {
        return Ok(staged);
    }
    let library = library(gpu, group)?;
    match Peer::new(gpu, group, PeerLimits::of(group.world()), library.clone())? {
        Some(peer) => Ok(Arc::new(peer)),
        None => Ok(library.unwrap_or(staged)),
    }
}

#[cfg(feature = "cuda")]
fn library(gpu: &Arc<Gpu>, group: &Arc<LocalGroup>) -> Result<Option<Arc<dyn Comm>>, OpError> {
    Ok(Nccl::new(gpu, group)?.map(|nccl| Arc::new(nccl) as Arc<dyn Comm>))
}

#[cfg(not(feature = "cuda"))]
fn library(_: &Arc<Gpu>, _: &Arc<LocalGroup>) -> Result<Option<Arc<dyn Comm>>, OpError> {
    Ok(None)
}

/// Of the kernels' parameters.
pub(super) fn layouts() -> [Layout; 3] {
    [peer::GroupParams::LAYOUT, peer::AllReduceParams::LAYOUT, peer::AllGatherParams::LAYOUT]
}

/// Whether all ranks are well; each of them asks.
fn agree(op: &'static str, group: &LocalGroup, well: bool) -> Result<bool, OpError> {
    group.least(u64::from(well)).map(|least| least == 1).map_err(|error| failed(op, &error))
}

fn failed(op: &'static str, error: &GroupError) -> OpError {
    OpError::driver(op, error.to_string())
}

/// Where the columns of each rank begin, and the end of all. Errors when the lengths do not follow from each other.
fn columns(
    op: &'static str,
    rank: usize,
    own: Slice<'_>,
    rows: usize,
    cols: &[usize],
    out: &SliceMut<'_>,
    world: usize,
) -> Result<Vec<usize>, OpError> {
    check_float(op, own.element())?;
    check_length(op, "cols", world, cols.len())?;
    let mut begins = vec![0usize];
    for cols in cols {
        let end = begins[begins.len() - 1].saturating_add(*cols);
        begins.push(end);
    }
    own.check(op, "own", own.element(), rows.saturating_mul(cols[rank]))?;
    out.check(op, "out", own.element(), rows.saturating_mul(begins[world]))?;
    Ok(begins)
}

fn check_float(op: &'static str, element: Element) -> Result<(), OpError> {
    match element {
        Element::F32 | Element::F16 | Element::BF16 => Ok(()),
        Element::E4M3 | Element::E5M2 | Element::U32 | Element::U8 => Err(wrong_element(op, element)),
    }
}
