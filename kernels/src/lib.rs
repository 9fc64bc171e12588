//! The operations of a decoder: their definition, and their fast versions.
//!
//! | operation | meaning | definition | CPU | GPU |
//! |---|---|---|---|---|
//! | `embedding`, `add_embedding` | rows of a table, or of a rank's part of it; learned positions | `reference/embedding.rs` | `cpu/embedding.rs` | `cuda/embedding.rs` |
//! | `linear`, `linear_per_head` | products with weight matrices, biases added; one weight per head | `reference/linear.rs` | `cpu/linear.rs` | `cuda/linear.rs` |
//! | `add_low_rank` | what an adapter adds to a product | `reference/linear.rs` | two products | `cuda/lora.rs` |
//! | `norm`, `norm_in_place`, `add_norm` | root-mean-square or layer norm, also after adding to the residual stream | `reference/norm.rs` | `cpu/norm.rs` | `cuda/norm.rs` |
//! | `rope_cache_write` | rotates queries and keys, stores keys and values | `reference/rope.rs` | `cpu/rope.rs` | `cuda/rope.rs` |
//! | `attention` | causal attention over the paged cache, by its [`AttentionRules`] | `reference/attention.rs` | `cpu/attention/` | `cuda/attention.rs` |
//! | `activate`, `gated` | the functions of an MLP, alone or as the gate of its other half | `reference/activation.rs` | `cpu/activation.rs` | `cuda/pointwise.rs` |
//! | `scale`, `add`, `clamp`, `soft_cap` | element by element | `reference/activation.rs` | `cpu/activation.rs` | `cuda/pointwise.rs` |
//! | `route` | which experts a token goes to | `reference/routing.rs` | `cpu/routing.rs` | `cuda/routing.rs` |
//! | `experts` | a mixture of experts | `reference/experts.rs` | `cpu/experts.rs` | `cuda/experts.rs` |
//! | `sample`, `row_logprobs` | logits to tokens, and their log-probabilities | `reference/sampling.rs` | in the shard | `cuda/sampling.rs` |
//!
//! Read `reference/` for what an operation is, [`cpu`] for how it is made fast, and `cuda` (features `cuda` and
//! `emulation`) for GPUs, whose kernels are in `kernels/cuda/`. The weights are [`Matrix`] views of a
//! mapped checkpoint, never copied or converted ahead; everything else is f32 in the caller's buffers. A step of a model
//! runs inside [`cpu::Cpu::install`], so that its operations need not be handed to the threads one by one.
//!
//! When a model is split over several processes, they exchange numbers through [`collective`].
//!
//! Invariants:
//!
//! - The reference is plain loops in f64, written to be read. It is what the other versions are compared with
//!   (`tests/parity/`).
//! - An output element is summed in one fixed order, whatever the number of rows, threads or neighbours: a request's
//!   tokens depend on the request alone (`tests/determinism.rs`, bit for bit). Only the instruction set changes it.
//! - Every operation checks its shapes before it touches memory, and answers a mismatch with [`OpError`].
//! - `unsafe` is in five places: vector instructions (`cpu/simd/`), loads at offsets that a loop bounds, the rectangles of a
//!   matrix that threads write at the same time (`cpu/tile.rs`), memory that processes share (`collective/`), and the driver
//!   of GPUs with its launches (`cuda/`).
//!
//! What is absent: models, layers, requests. Nothing here knows what it computes for.

#[cfg(target_endian = "big")]
compile_error!("weights are little-endian and used where they lie");

pub mod collective;
pub mod cpu;
#[cfg(any(feature = "cuda", feature = "emulation"))]
pub mod cuda;
pub mod reference;

mod activation;
mod attention;
mod error;
mod experts;
mod matrix;
mod norm;
mod paged;
mod routing;
mod sampling;

pub use activation::{Activation, Gating};
pub use attention::{AttentionRules, Values};
pub use error::OpError;
pub use experts::{Expert, Projection};
pub use matrix::{DType, Matrix, RowLayout};
pub use norm::{Norm, NormKind};
pub use paged::{HeadShape, RopeLayout, RopeTable, Sequence};
pub use routing::{GroupScore, Groups, Normalize, Routes, Routing, Score};
pub use sampling::{Penalties, Sampling, Watermark};
