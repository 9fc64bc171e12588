//! How tensors of several ranks meet.

use std::sync::Arc;

use kernels::OpError;
use kernels::collective::{GroupError, LocalGroup};
#[cfg(feature = "gpu")]
use kernels::cuda::comm::Comm;

use super::Tensor;

/// What connects the devices of a model's ranks. Cheap to clone.
#[derive(Clone, Debug)]
pub enum Link {
    /// Memory that the processes share.
    Host(Arc<LocalGroup>),
    /// Whatever connects the GPUs.
    #[cfg(feature = "gpu")]
    Device(Arc<dyn Comm>),
}

impl Link {
    /// Every element becomes the sum over all ranks, the same to the last bit on all of them.
    pub fn all_reduce(&self, tensor: &mut Tensor) -> Result<(), OpError> {
        match self {
            Self::Host(group) => {
                group.all_reduce(tensor.host_mut()).map_err(|error| failed("all_reduce", &error))
            }
            #[cfg(feature = "gpu")]
            Self::Device(comm) => comm.all_reduce(tensor.device_mut()),
        }
    }

    /// The columns of all ranks side by side: rank `r` has `cols[r]` of them. `out`: `[rows, sum of cols]`.
    pub fn gather_cols(&self, own: &Tensor, cols: &[usize], out: &mut Tensor) -> Result<(), OpError> {
        match self {
            Self::Host(group) => group
                .all_gather_columns(own.host(), own.rows(), cols, out.host_mut())
                .map_err(|error| failed("gather_cols", &error)),
            #[cfg(feature = "gpu")]
            Self::Device(comm) => comm.all_gather_columns(own.device(), own.rows(), cols, out.device_mut()),
        }
    }

    /// Errors when a rank is gone, so that what the devices have computed since means nothing.
    pub fn check(&self) -> Result<(), OpError> {
        match self {
            // Waits in vain were errors already.
            Self::Host(_) => Ok(()),
            #[cfg(feature = "gpu")]
            Self::Device(comm) => comm.check(),
        }
    }

    /// Ends the waits of all ranks, now and for good.
    pub fn abort(&self) {
        match self {
            Self::Host(group) => group.abort(),
            #[cfg(feature = "gpu")]
            Self::Device(comm) => comm.abort(),
        }
    }
}

fn failed(op: &'static str, error: &GroupError) -> OpError {
    OpError::Unsupported { op, reason: error.to_string() }
}
