//! The key/value cache, as the router accounts for it: which blocks are free, which are held by rows, and which are kept
//! because their keys and values may be needed again. The blocks themselves are on the shards.
//!
//! - `blocks.rs`: [`BlockCache`] and the leases on its blocks.
//! - `prefix.rs`: the tree of blocks by the tokens in them.

mod blocks;
mod prefix;

#[cfg(test)]
mod tests;

pub use blocks::{BlockCache, BlockLease, IntegrityError};
