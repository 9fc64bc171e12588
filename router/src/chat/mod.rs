//! Chats: messages to a prompt, and the generated text to a message.
//!
//! - `message.rs`: a message as clients send it, and as templates want it.
//! - `template.rs`: the model's own template, rendered as transformers does.
//! - `source.rs`: which of the model's files holds the template.
//! - `reply.rs`: generated text to the text of the answer, whole or piece by piece.
//!
//! What is absent: HTTP and the JSON of its answers.

pub(crate) mod message;
pub(crate) mod reply;
pub(crate) mod source;
pub(crate) mod template;
