//! HTTP in, batches out.

pub mod batching;
pub mod cache;
pub mod request;
pub mod shards;
