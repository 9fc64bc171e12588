//! Keys and values of all requests.
//!
//! What is absent: which request owns which slot. The router leases blocks; here a slot is an index.

mod paged;

pub use paged::{CacheError, KvShape, LayerKv, PagedKv};
