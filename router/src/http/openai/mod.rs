//! OpenAI's API.

pub(super) mod chat;
pub(crate) mod types;
