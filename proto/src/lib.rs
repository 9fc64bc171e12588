//! The contract between router and shards, and the few words between router and launcher.
//!
//! - [`v3`]: messages, client and server generated from `generate.proto`, package `generate.v3`.
//! - [`units`]: the small integers of the domain as types of their own. Both sides convert at the wire and nowhere else.
//! - [`extensions`]: the names under which a shard announces what it understands beyond plain v3.
//! - [`supervision`]: what a router and the launcher that supervises it tell each other, in lines of text.
//!
//! What is absent: behaviour. Nothing here schedules, samples or opens a connection.

pub mod extensions;
pub mod supervision;
pub mod units;

/// `generate.v3` as generated: messages, `text_generation_service_client`, `text_generation_service_server`.
#[allow(missing_docs, clippy::all, unreachable_pub)]
pub mod v3 {
    tonic::include_proto!("generate.v3");
}

/// Largest message either side accepts, in bytes. Prompts, images and prompt log-probabilities travel inline, so the
/// default of 4 MiB is too small; the reference's shards accept this much.
pub const MESSAGE_BYTES_MAX: usize = i32::MAX as usize;

/// Batch and request id of the liveness probe, which no real request has.
pub const LIVENESS_ID: u64 = u64::MAX;
