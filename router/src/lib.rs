//! HTTP in, batches out.

pub mod batching;
pub mod cache;
pub mod metrics;
pub mod request;
pub mod shards;
mod text;
