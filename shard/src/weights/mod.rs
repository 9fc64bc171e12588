//! Checkpoint files to layers' weights.
//!
//! - `mapped.rs`: a file as memory
//! - `safetensors.rs`: one file's header, checked against the file before anything is believed
//! - `checkpoint.rs`: the files of a directory, and tensors by name over all of them
//! - `weight.rs`: a matrix that stays where the file is mapped
//! - `load.rs`: what layers ask: this path, this shape
//!
//! Invariant: whatever a file says about itself is checked against the file when it is opened. Offsets are in range
//! from then on.

mod checkpoint;
mod error;
mod load;
mod mapped;
mod safetensors;
mod weight;

pub use checkpoint::Checkpoint;
pub use error::WeightError;
pub use load::WeightPath;
pub use mapped::MappedFile;
pub use weight::Weight;
