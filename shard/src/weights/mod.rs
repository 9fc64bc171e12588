//! Checkpoint files to layers' weights.
//!
//! - `mapped.rs`: a file as memory; `prefetch.rs`: the parts that will be needed, before they are
//! - `checkpoint.rs`: the files of a directory, and tensors by name over all of them; `index.rs`: which file holds which
//! - `tensors.rs`: the tensors of one file, whatever its format
//! - `safetensors.rs`, `pytorch/`: one format each, from bytes; checked against the file before anything is believed
//! - `partition.rs`: which rank has which part; `region.rs`: which part of a stored tensor that is
//! - `weight.rs`: a matrix, where the file is mapped if it lies there as it is needed
//! - `load.rs`: what layers ask: this path, this region
//! - `random.rs`: weights without a checkpoint
//!
//! Invariant: whatever a file says about itself is checked against the file when it is opened. Offsets are in range
//! from then on.

mod checkpoint;
mod error;
mod index;
mod load;
mod mapped;
mod partition;
mod prefetch;
mod pytorch;
mod random;
mod region;
mod safetensors;
mod tensors;
mod unique_map;
mod weight;

pub use checkpoint::Checkpoint;
pub use error::WeightError;
pub(crate) use error::shown;
pub use index::Index;
pub use load::{Elements, LinearOrigin, Loader, WeightPath, WeightSource};
pub use mapped::MappedFile;
pub use partition::Partition;
pub use prefetch::{Progress, prefetch};
pub use pytorch::{PickleError, TorchError, ZipError};
pub use random::RandomWeights;
pub use region::{Region, Rows, Stack};
pub use tensors::{Format, Tensors};
pub use weight::{FileRange, Weight};
