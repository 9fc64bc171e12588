//! Whole models against what other code computes for them.
//!
//! - `fixture.rs`: checkpoints of every family with the numbers of the reference library, as the doctor reads them
//! - `ranks.rs`: several ranks of a model, as threads
//! - `options.rs`: random checkpoints of every shape, against `plain.rs`
//! - `plain.rs`: the Llama decoder in plain f64 loops, from the equations, sharing no code with the crate
//! - `checkpoint.rs`: writes those random checkpoints
//! - `gpu.rs`: the fixtures on a GPU, or on one that is emulated

mod checkpoint;
mod fixture;
#[cfg(any(feature = "cuda", feature = "emulation"))]
mod gpu;
mod options;
mod plain;
mod ranks;
