//! Finds models of the Hub in the local cache, and downloads what is missing: the one resolver of all programs here.
//!
//! The way of a download: `config` (what the environment says), `survey` (what there is, on the Hub or in the cache),
//! `select` (which files are needed), `download` (the order of fetching), `lock` (one process per file), `transfer` (one
//! file, through `window` in several ranges at once, into a `partial` file), `cache` (where it ends up).
//!
//! Invariants:
//! - The cache is laid out as that of Python's `huggingface_hub`: each finds what the other has fetched.
//! - What is in the cache under its final name is complete and has been checked. What is incomplete is the beginning of
//!   the file without a gap, so its length says where to go on, whoever wrote it.
//! - Killing a process at any time costs nothing but the chunks that were under way.
//! - The token goes to the Hub and to no other server, and is in no log and no error.
//! - With `HF_HUB_OFFLINE` no socket is opened.
//! - Nothing but `config` reads the environment.

pub mod config;
pub mod error;

mod cache;
mod cached;
mod checksum;
mod client;
mod download;
mod hub;
mod listing;
mod lock;
mod partial;
mod proxy;
mod repo;
mod retry;
mod select;
mod space;
mod survey;
mod token;
mod transfer;
mod url;
mod window;

pub use config::{ConfigError, HubConfig, Patience};
pub use download::{Order, WeightPlace};
pub use error::HubError;
pub use hub::Hub;
pub use listing::Entry;
pub use proxy::Proxies;
pub use repo::Source;
pub use select::{Kind, SAFETENSORS, Weights, indexed, weights};
pub use survey::Survey;
pub use token::Token;
