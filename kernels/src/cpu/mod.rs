//! The CPU versions: vector code for the instruction set that is found at run time, on the threads of a [`Cpu`].
//!
//! Every operation is one function with the same three steps: check all shapes, cut the output into pieces that no two
//! threads share, compute each piece with code that does not know how many pieces there are. What a piece computes
//! depends on its inputs alone, so neither the batch nor the threads show in the result; `tests/determinism.rs` holds
//! this bit for bit. Another instruction set rounds differently.

mod activation;
mod attention;
mod dot;
mod embedding;
mod experts;
mod isa;
mod linear;
mod norm;
mod pool;
mod rope;
mod routing;
mod simd;
mod tile;

pub use activation::{activate, add, clamp, gated, scale, soft_cap};
pub use attention::{Attention, attention};
pub use embedding::{add_embedding, embedding};
pub use experts::{ExpertScratch, Experts, experts};
pub use isa::Isa;
pub use linear::{Product, linear, linear_per_head};
pub use norm::{add_norm, norm, norm_in_place};
pub use pool::Cpu;
pub use rope::{RopeCacheWrite, rope_cache_write};
pub use routing::route;
