//! Which device a model runs on.

use std::num::NonZeroUsize;

use kernels::{DType, OpError};

use super::Device;
use crate::collective::Ranks;

/// The device that was asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DeviceChoice {
    /// A GPU if every rank has one, and the CPU otherwise.
    #[default]
    Auto,
    /// The CPU.
    Cpu,
    /// A GPU.
    Cuda,
    /// A GPU that is emulated on the CPU, for tests.
    #[cfg(feature = "emulation")]
    Emulated,
}

/// Element type of the key/value cache, where it is not the model's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CacheDType {
    /// 8-bit float, 4 bits of exponent.
    E4M3,
    /// 8-bit float, 5 bits of exponent.
    E5M2,
}

#[cfg(feature = "gpu")]
impl CacheDType {
    /// As a GPU has it.
    pub fn element(self) -> kernels::cuda::Element {
        match self {
            Self::E4M3 => kernels::cuda::Element::E4M3,
            Self::E5M2 => kernels::cuda::Element::E5M2,
        }
    }
}

/// What a device is opened for.
#[derive(Clone, Copy, Debug)]
pub struct DeviceOptions {
    /// Which.
    pub choice: DeviceChoice,
    /// Threads of a CPU.
    pub threads: NonZeroUsize,
    /// What weights and activations are on a GPU.
    pub dtype: DType,
    /// What keys and values are, if not the same.
    pub cache: Option<CacheDType>,
    /// Whether a token is the same to the last bit whatever it is batched with. On a CPU it always is.
    pub batch_invariant: bool,
}

impl Device {
    /// The device for this rank. One line of the log says which it is, and why.
    ///
    /// Errors when a GPU was asked for and cannot be had, and when the device does not have what the options ask for.
    pub fn open(options: DeviceOptions, ranks: &Ranks) -> Result<Self, OpError> {
        let device = match options.choice {
            DeviceChoice::Cpu => Self::cpu(options.threads)?,
            DeviceChoice::Cuda => Self::gpu(options, ranks)?,
            DeviceChoice::Auto => Self::gpu_or_cpu(options, ranks)?,
            #[cfg(feature = "emulation")]
            DeviceChoice::Emulated => Self::emulated(options)?,
        };
        if let (Self::Cpu(_), Some(cache)) = (&device, options.cache) {
            let reason = format!("a key/value cache of {cache:?} needs a GPU; leave --kv-cache-dtype out");
            return Err(OpError::Unsupported { op: "device", reason });
        }
        Ok(device)
    }

    /// Ranks that run on different devices would wait for each other for ever, so one that has no GPU decides for all.
    fn gpu_or_cpu(options: DeviceOptions, ranks: &Ranks) -> Result<Self, OpError> {
        let gpu = Self::gpu(options, ranks);
        let all = ranks.least(u32::from(gpu.is_ok())).map_err(|error| OpError::Unsupported {
            op: "device",
            reason: format!("the other shards of this model: {error}"),
        })?;
        match gpu {
            Ok(gpu) if all > 0 => Ok(gpu),
            Ok(_) => {
                tracing::warn!("another shard of this model has no GPU: the model runs on the CPU");
                Self::cpu(options.threads)
            }
            Err(error) => {
                #[cfg(feature = "cuda")]
                tracing::warn!("no GPU is used: {error}; the model runs on the CPU");
                #[cfg(not(feature = "cuda"))]
                tracing::debug!("{error}");
                Self::cpu(options.threads)
            }
        }
    }

    #[cfg(feature = "cuda")]
    fn gpu(options: DeviceOptions, ranks: &Ranks) -> Result<Self, OpError> {
        let gpu = kernels::cuda::Gpu::open(ranks.partition().rank as u32)?;
        let kernels::cuda::Properties { name, capability: (major, minor), .. } = gpu.properties();
        tracing::info!(gpu = name, capability = format!("{major}.{minor}"), dtype = ?options.dtype, "GPU is used");
        Self::on(gpu, options)
    }

    #[cfg(not(feature = "cuda"))]
    fn gpu(_: DeviceOptions, _: &Ranks) -> Result<Self, OpError> {
        let reason = "this program was built without CUDA (feature `cuda`)".to_owned();
        Err(OpError::Unsupported { op: "device", reason })
    }

    #[cfg(feature = "emulation")]
    fn emulated(options: DeviceOptions) -> Result<Self, OpError> {
        Self::on(kernels::cuda::Gpu::emulated(kernels::cuda::Schedule::Forward), options)
    }

    #[cfg(feature = "gpu")]
    fn on(gpu: std::sync::Arc<kernels::cuda::Gpu>, options: DeviceOptions) -> Result<Self, OpError> {
        if options.batch_invariant {
            gpu.set_products(kernels::cuda::Products::Own);
        }
        let cache = options.cache.map_or(options.dtype.into(), CacheDType::element);
        Ok(Self::Cuda(std::sync::Arc::new(super::Cuda::new(gpu, options.dtype, cache)?)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(choice: DeviceChoice, cache: Option<CacheDType>) -> Result<Device, OpError> {
        let threads = NonZeroUsize::MIN;
        let options = DeviceOptions { choice, threads, dtype: DType::F32, cache, batch_invariant: false };
        Device::open(options, &Ranks::alone())
    }

    #[test]
    #[cfg(not(feature = "cuda"))]
    fn without_cuda_the_cpu_is_used_unless_a_gpu_was_asked_for() {
        assert!(matches!(open(DeviceChoice::Auto, None), Ok(Device::Cpu(_))));
        let error = open(DeviceChoice::Cuda, None).err().map(|error| error.to_string());
        assert!(error.is_some_and(|error| error.contains("built without CUDA")));
    }

    #[test]
    fn an_8_bit_cache_on_a_cpu_is_refused_by_the_name_of_its_flag() {
        let error = open(DeviceChoice::Cpu, Some(CacheDType::E5M2)).err().map(|error| error.to_string());
        assert!(error.is_some_and(|error| error.contains("--kv-cache-dtype")));
    }
}
