#[cfg(feature = "gpu")]
use kernels::cuda;

use super::Projection;

/// The experts of a layer where the operations find them.
#[derive(Debug)]
pub enum ExpertSet {
    /// In this process's memory.
    Host(Vec<Expert>),
    /// In a GPU's memory, with tables of where each is.
    #[cfg(feature = "gpu")]
    Device(cuda::ExpertSet),
}

/// An expert's weights.
#[derive(Debug)]
pub struct Expert {
    /// Into the gate.
    pub gate: Projection,
    /// Into what is gated.
    pub up: Projection,
    /// Out.
    pub down: Projection,
}

impl ExpertSet {
    /// How many there are.
    pub fn len(&self) -> usize {
        match self {
            Self::Host(experts) => experts.len(),
            #[cfg(feature = "gpu")]
            Self::Device(experts) => experts.len(),
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// As operations of the CPU take them.
    pub(super) fn host(&self) -> &[Expert] {
        match self {
            Self::Host(experts) => experts,
            #[cfg(feature = "gpu")]
            Self::Device(_) => unreachable!("experts on a GPU reached an operation of the CPU"),
        }
    }
}
