//! The key/value cache as the router sees it: numbers of blocks, and who holds them. The tensors are the shard's.
//!
//! - [`blocks`]: the free list, and leases that must be given back.

pub mod blocks;

pub use blocks::{BlockLease, BlockPool};
