//! The definition of every operation, in plain loops and f64.
//!
//! Inputs are what the fast versions take; results are f64 and not rounded, so that a test sees the error of the fast
//! version alone. Shapes are taken on trust: a wrong one panics here, where only tests call.

mod activation;
mod attention;
mod embedding;
mod experts;
mod linear;
mod norm;
mod philox;
mod rope;
mod routing;
mod sampling;

#[cfg(any(feature = "cuda", feature = "emulation"))]
pub(crate) use activation::erf;
pub use activation::{activate, add, clamp, gated, scale, soft_cap};
pub use attention::attention;
pub use embedding::{add_embedding, embedding};
pub use experts::experts;
pub use linear::{linear, linear_per_head};
pub use norm::{add_norm, norm};
pub use philox::{keyed_hash, uniform};
pub use rope::{rope, write_cache};
pub use routing::route;
pub use sampling::{Past, alternatives, choose, logprobs, process, race};
