//! Batches in, tokens out: one process per device.
//!
//! Where a forward pass goes, from the outside in:
//!
//! - [`model`]: families, their configuration, and the decoder they share. The engine sees only the `Model` trait.
//! - [`layers`]: attention, MLP, norms, rope. Each knows how to load itself; none knows which family it serves.
//! - [`weights`]: checkpoint files, mapped and never copied; names become layers here.
//! - [`cache`]: keys and values of all requests, by slot.
//! - [`backend`]: the device, its tensors, and the list of operations that layers call.
//!
//! Invariants:
//!
//! - Only `backend` asks which device it runs on.
//! - Only `weights/mapped.rs` is unsafe.
//! - Whatever a file or a step contains, the answer is an error that names it, never a panic.

pub mod backend;
pub mod cache;
pub mod layers;
pub mod model;
pub mod weights;
