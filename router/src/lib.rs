//! HTTP in, batches out.

pub mod batching;
pub mod cache;
mod chat;
mod http;
mod infer;
pub mod metrics;
pub mod request;
pub mod shards;
mod text;
