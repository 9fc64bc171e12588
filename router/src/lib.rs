//! HTTP in, batches out.

pub mod batching;
pub mod request;
pub mod shards;
