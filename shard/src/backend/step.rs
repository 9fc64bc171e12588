//! What a step says about its tokens, where the operations find it. It is brought there once and read by every layer.

#[cfg(feature = "gpu")]
use kernels::cuda;
use kernels::{OpError, Sequence};

/// Ids, positions, slots or rows of a step's tokens. Memory is kept from step to step.
#[derive(Debug, Default)]
pub struct Indices {
    pub(super) host: Vec<u32>,
    /// The same on a GPU, where there is one.
    #[cfg(feature = "gpu")]
    pub(super) device: Option<super::cuda::DeviceIndices>,
}

impl Indices {
    /// Takes the numbers of the next step.
    ///
    /// Errors when the device has no memory for them, or has failed.
    pub fn set(&mut self, values: &[u32]) -> Result<(), OpError> {
        self.host.clear();
        self.host.extend_from_slice(values);
        #[cfg(feature = "gpu")]
        if let Some(device) = &mut self.device {
            device.set(values)?;
        }
        Ok(())
    }

    /// The numbers.
    pub fn values(&self) -> &[u32] {
        &self.host
    }
}

/// Where a step's requests lie in the batch and in the cache. Memory is kept from step to step.
#[derive(Debug, Default)]
pub struct SequenceBuffer {
    #[cfg(feature = "gpu")]
    pub(super) device: Option<cuda::Sequences>,
}

/// The requests of a step; their rows cover all of its tokens without overlap.
#[derive(Clone, Copy)]
pub struct Sequences<'a> {
    pub(super) host: &'a [Sequence<'a>],
    #[cfg(feature = "gpu")]
    pub(super) buffer: &'a SequenceBuffer,
}

impl SequenceBuffer {
    /// Takes the requests of the next step.
    ///
    /// Errors when their slots do not make up whole blocks of `block_size`, when the device has no memory for them, or has
    /// failed.
    #[cfg_attr(not(feature = "gpu"), expect(unused_variables, reason = "a CPU reads them where they are"))]
    pub fn set<'a>(
        &'a mut self,
        sequences: &'a [Sequence<'a>],
        block_size: usize,
    ) -> Result<Sequences<'a>, OpError> {
        #[cfg(feature = "gpu")]
        if let Some(device) = &mut self.device {
            device.set(sequences, block_size)?;
        }
        Ok(Sequences {
            host: sequences,
            #[cfg(feature = "gpu")]
            buffer: self,
        })
    }
}
