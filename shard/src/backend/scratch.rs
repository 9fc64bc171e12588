//! What operations keep from step to step.

#[cfg(feature = "gpu")]
use kernels::cuda;

use crate::sampling::Scratch;

/// Which experts the tokens of a step go to, and with what weights. Memory is kept from step to step.
#[derive(Debug)]
pub enum Routes {
    /// In this process's memory.
    Host(kernels::Routes),
    /// In a GPU's memory.
    #[cfg(feature = "gpu")]
    Device(cuda::Routes),
}

/// What a mixture of experts keeps from step to step.
#[derive(Debug)]
pub enum ExpertScratch {
    /// In this process's memory.
    Host(kernels::cpu::ExpertScratch),
    /// In a GPU's memory.
    #[cfg(feature = "gpu")]
    Device(cuda::ExpertScratch),
}

/// What attention keeps from step to step.
#[derive(Debug)]
pub enum AttentionScratch {
    /// Nothing.
    Host,
    /// Parts of long contexts, on a GPU.
    #[cfg(feature = "gpu")]
    Device(cuda::AttentionScratch),
}

/// What choosing tokens keeps from step to step.
#[derive(Debug)]
pub enum SamplingState {
    /// Buffers of the CPU.
    Host(Scratch),
    /// Parameters, histories and results in a GPU's memory.
    #[cfg(feature = "gpu")]
    Device(Box<super::cuda::DeviceSampling>),
}

impl SamplingState {
    /// As the CPU takes it.
    pub(super) fn host_mut(&mut self) -> &mut Scratch {
        match self {
            Self::Host(scratch) => scratch,
            #[cfg(feature = "gpu")]
            Self::Device(_) => unreachable!("sampling of a GPU reached the CPU"),
        }
    }
}

impl Routes {
    /// As operations of the CPU take them.
    pub(super) fn host(&self) -> &kernels::Routes {
        match self {
            Self::Host(routes) => routes,
            #[cfg(feature = "gpu")]
            Self::Device(_) => unreachable!("routes on a GPU reached an operation of the CPU"),
        }
    }

    /// As operations of the CPU take them, to be written.
    pub(super) fn host_mut(&mut self) -> &mut kernels::Routes {
        match self {
            Self::Host(routes) => routes,
            #[cfg(feature = "gpu")]
            Self::Device(_) => unreachable!("routes on a GPU reached an operation of the CPU"),
        }
    }
}

impl ExpertScratch {
    /// As operations of the CPU take it.
    pub(super) fn host_mut(&mut self) -> &mut kernels::cpu::ExpertScratch {
        match self {
            Self::Host(scratch) => scratch,
            #[cfg(feature = "gpu")]
            Self::Device(_) => unreachable!("scratch of a GPU reached an operation of the CPU"),
        }
    }
}
