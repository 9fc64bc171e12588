//! What the ranks of a model do together. Each of them makes the same calls in the same order; sums are taken in the order
//! of the ranks, so that all of them hold the same bits.
//!
//! What is absent: who has which part. Layers know that; here tensors are just rows and columns.

use kernels::OpError;
use kernels::collective::LocalGroup;

use crate::backend::Tensor;
use crate::weights::Partition;

/// The ranks of a model, as one of them sees them.
#[derive(Debug)]
pub enum Ranks {
    /// There is only this one.
    Alone,
    /// Processes on this machine, over shared memory.
    Local(LocalGroup),
}

impl Ranks {
    /// Which rank this is, of how many.
    pub fn partition(&self) -> Partition {
        match self {
            Self::Alone => Partition::WHOLE,
            Self::Local(group) => Partition { rank: group.rank(), world: group.world() },
        }
    }

    /// Every element becomes the sum over all ranks.
    pub fn all_reduce(&self, tensor: &mut Tensor) -> Result<(), OpError> {
        match self {
            Self::Alone => Ok(()),
            Self::Local(group) => group.all_reduce(tensor.host_mut()).map_err(|error| failed("all_reduce", error)),
        }
    }

    /// The columns of all ranks side by side: rank `r` has `cols[r]` of them. `out`: `[rows, sum of cols]`.
    pub fn gather_cols(&self, own: &Tensor, cols: &[usize], out: &mut Tensor) -> Result<(), OpError> {
        match self {
            Self::Alone => {
                out.host_mut().copy_from_slice(own.host());
                Ok(())
            }
            Self::Local(group) => group
                .all_gather_columns(own.host(), own.rows(), cols, out.host_mut())
                .map_err(|error| failed("gather_cols", error)),
        }
    }

    /// Lets every other rank's calls fail, now and later: this one cannot go on.
    pub fn abort(&self) {
        match self {
            Self::Alone => {}
            Self::Local(group) => group.abort(),
        }
    }
}

fn failed(op: &'static str, error: impl std::fmt::Display) -> OpError {
    OpError::Unsupported { op, reason: error.to_string() }
}
