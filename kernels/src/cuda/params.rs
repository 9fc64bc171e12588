//! The parameters of kernels. Each is one struct, declared here and, by the same name, beside its kernels. A test compares
//! the two field by field.

use super::{
    attention, comm, embedding, experts, gemm, gemv, logprobs, lora, norm, pointwise, probe, rope, routing,
    sampling,
};
use crate::OpError;

/// A size as kernels take it, which fits into their signed numbers too. Errors when it does not.
pub(super) fn fit(op: &'static str, what: &'static str, size: usize) -> Result<u32, OpError> {
    const LIMIT: usize = i32::MAX as usize + 1;
    if size < LIMIT { Ok(size as u32) } else { Err(OpError::Index { op, what, index: size, limit: LIMIT }) }
}

/// A struct that a kernel takes by value.
///
/// # Safety
/// It is `repr(C)`, and the struct of the same name in the kernel's source has the same fields.
pub(super) unsafe trait Params: Copy {
    /// Name and fields.
    const LAYOUT: Layout;
}

/// How a struct of parameters lies in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Its name.
    pub name: &'static str,
    /// Its size in bytes.
    pub size: usize,
    /// Its fields, in order.
    pub fields: &'static [Field],
}

/// A field of a struct of parameters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Field {
    /// Its name.
    pub name: &'static str,
    /// Bytes before it.
    pub offset: usize,
    /// Its size in bytes.
    pub size: usize,
}

/// Declares a struct of parameters.
macro_rules! params {
    ($(#[$meta:meta])* struct $name:ident { $($field:ident: $type:ty),* $(,)? }) => {
        $(#[$meta])*
        #[repr(C)]
        #[derive(Clone, Copy, Debug)]
        pub(super) struct $name {
            $(pub(super) $field: $type,)*
        }

        // SAFETY: `repr(C)`, and a test compares the fields with the kernel's.
        unsafe impl $crate::cuda::params::Params for $name {
            const LAYOUT: $crate::cuda::Layout = $crate::cuda::Layout {
                name: stringify!($name),
                size: size_of::<$name>(),
                fields: &[$($crate::cuda::Field {
                    name: stringify!($field),
                    offset: std::mem::offset_of!($name, $field),
                    size: size_of::<$type>(),
                }),*],
            };
        }
    };
}
pub(super) use params;

/// The kernels of a family, for f32, f16 and bf16: `"norm"` in module `norm` is `norm_f32` and so on.
macro_rules! kernels {
    ($module:literal, $name:literal) => {
        [
            $crate::cuda::Kernel { module: $module, name: concat!($name, "_f32") },
            $crate::cuda::Kernel { module: $module, name: concat!($name, "_f16") },
            $crate::cuda::Kernel { module: $module, name: concat!($name, "_bf16") },
        ]
    };
}
pub(super) use kernels;

/// Every struct of parameters, by module.
pub fn layouts() -> Vec<Layout> {
    let mut layouts = vec![
        attention::AttentionParams::LAYOUT,
        embedding::AddEmbeddingParams::LAYOUT,
        embedding::GatherParams::LAYOUT,
        experts::ExpertEntry::LAYOUT,
        experts::ExpertsParams::LAYOUT,
        gemm::GemmParams::LAYOUT,
        gemv::GemvParams::LAYOUT,
        lora::LowRankParams::LAYOUT,
        logprobs::LogprobsParams::LAYOUT,
        norm::NormParams::LAYOUT,
        pointwise::ConvertParams::LAYOUT,
        pointwise::CopyPartsParams::LAYOUT,
        pointwise::JoinParams::LAYOUT,
        pointwise::MapParams::LAYOUT,
        pointwise::RowsParams::LAYOUT,
        probe::ProbeParams::LAYOUT,
        rope::RopeParams::LAYOUT,
        sampling::AdmitParams::LAYOUT,
        sampling::LogitsParams::LAYOUT,
        sampling::RowParams::LAYOUT,
        sampling::SampleParams::LAYOUT,
        routing::RouteParams::LAYOUT,
    ];
    layouts.extend(comm::layouts());
    layouts
}
