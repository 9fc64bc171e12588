//! Checkpoint files to layers' weights.
//!
//! - `mapped.rs`: a file as memory
//! - `safetensors.rs`: one file's header, checked against the file before anything is believed
//! - `checkpoint.rs`: the files of a directory, and tensors by name over all of them
//! - `partition.rs`: which rank has which part; `region.rs`: which part of a stored tensor that is
//! - `weight.rs`: a matrix, where the file is mapped if it lies there as it is needed
//! - `load.rs`: what layers ask: this path, this region
//! - `random.rs`: weights without a checkpoint
//!
//! Invariant: whatever a file says about itself is checked against the file when it is opened. Offsets are in range
//! from then on.

mod checkpoint;
mod error;
mod load;
mod mapped;
mod partition;
mod random;
mod region;
mod safetensors;
mod weight;

pub use checkpoint::Checkpoint;
pub use error::WeightError;
pub use load::{LinearOrigin, Loader, WeightPath, WeightSource};
pub use mapped::MappedFile;
pub use partition::Partition;
pub use random::RandomWeights;
pub use region::{Region, Rows, Stack};
pub use weight::{FileRange, Weight};
