//! Text at the shard: prompts to ids, ids to text as they come, and stop strings.
//!
//! - [`tokenizer`]: the model's tokenizer, its special tokens and its end-of-sequence set.
//! - [`detokenizer`]: ids to text, one token at a time, never half a character.
//! - [`stop`]: stop strings, found anywhere in the generated text.
//!
//! What is absent: chat templates and validation; the router's prompts arrive as plain text or as ids.

pub mod detokenizer;
pub mod stop;
pub mod tokenizer;
