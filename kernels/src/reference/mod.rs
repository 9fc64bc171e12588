//! The definition of every operation, in plain loops and f64.
//!
//! Inputs are what the fast versions take; results are f64 and not rounded, so that a test sees the error of the fast
//! version alone. Shapes are taken on trust: a wrong one panics here, where only tests call.

mod activation;
mod attention;
mod embedding;
mod linear;
mod norm;
mod rope;

pub use activation::{add, gated_silu};
pub use attention::attention;
pub use embedding::{add_embedding, embedding};
pub use linear::{linear, linear_per_head};
pub use norm::{add_rms_norm, rms_norm};
pub use rope::{rope, write_cache};
