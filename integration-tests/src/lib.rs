//! The kit of the integration tests: it starts the real launcher binary on a free port and speaks HTTP to it.
//!
//! - [`stack`]: start a server, wait until it is ready, read its logs, stop it.
//! - [`client`]: one HTTP client: plain answers, event streams, and streams that are cut off.
//! - [`fixtures`]: checkpoints with answers computed by the reference library.
//! - [`fake_hub`]: a Hub on loopback, with faults on demand.
//! - [`shape`]: the shape of a JSON answer, for comparing with recorded answers.
//!
//! Tests act as a user would. They wait for events, not for time, and need neither network nor GPU.

pub mod binary;
pub mod client;
pub mod fake_hub;
pub mod fixtures;
pub mod shape;
pub mod stack;
