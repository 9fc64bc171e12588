//! The operations on NVIDIA GPUs.
//!
//! - [`Gpu`]: a device and the one stream that everything runs on, in order
//! - [`Buffer`], [`Slice`], [`SliceMut`]: its memory
//! - [`Uploader`], [`Download`]: copies that are under way while the process goes on
//! - [`Graph`]: work that is recorded once and replayed
//! - `driver/`: what a device has to be able to do; the CUDA driver does it, and for tests the emulator on a CPU
//! - [`comm`]: what the ranks of a model do together
//! - `checks/`: what a device has to get right
//! - one file per family of operations, named as its kernels in `kernels/cuda/`: shapes are checked, then launched
//!
//! Invariants:
//!
//! - An operation checks its arguments before anything is launched; what it returns is an error of theirs. The device's own
//!   errors show later, as [`OpError::Device`](crate::OpError::Device), and are final.
//! - Everything runs on one stream, so an operation finds what the ones before it wrote, and memory that is freed is free
//!   behind all that used it.
//! - No kernel looks at its neighbours' requests: sums run in an order that follows from the request alone.

pub mod checks;
pub mod comm;

mod activation;
mod attention;
mod buffer;
mod driver;
mod element;
mod embedding;
mod experts;
mod gemm;
mod gemv;
mod gpu;
mod graph;
mod linear;
mod logprobs;
mod lora;
mod matrix;
mod norm;
mod params;
mod pointwise;
mod probe;
mod rope;
mod routing;
mod sampling;
mod sequences;
mod slab;
mod transfer;
mod units;

pub use attention::{Attention, AttentionRules, AttentionScratch, Values, attention};
pub use buffer::{Buffer, Slice, SliceMut};
#[cfg(feature = "emulation")]
pub use driver::emulated::{Schedule, counter, layouts as kernel_layouts};
pub use driver::{Grid, Kernel, Memory, Multiply, Properties};
pub use element::{E4M3, E5M2, Element, HostElement};
pub use embedding::{add_embedding, embedding};
pub use experts::{ExpertScratch, ExpertSet, ExpertWeights, Experts, Projection, experts};
pub use gpu::{Gpu, Products};
pub use graph::Graph;
pub use linear::{Product, linear, linear_per_head};
pub use logprobs::row_logprobs;
pub use lora::{LowRank, add_low_rank};
pub use matrix::{Matrix, OwnedMatrix};
pub use norm::{Norm, add_norm, norm, norm_in_place};
pub use params::{Field, Layout, layouts};
pub use pointwise::{
    CopyParts, activate, add, add_bias, clamp, convert, copy_parts, gated, scale, scale_rows, select_rows,
    soft_cap,
};
pub use rope::{RopeCacheWrite, RopeTable, rope_cache_write};
pub use routing::{Routes, Routing, route};
pub use sampling::{ALTERNATIVES_MAX, LISTED_MAX, Sampled, SamplerState, SamplingRow};
pub use sequences::Sequences;
pub use slab::{Piece, Slab};
pub use transfer::{Download, Uploader};
