//! HTTP in, batches out.

pub mod batching;
pub mod cache;
mod chat;
pub mod metrics;
pub mod request;
pub mod shards;
mod text;
