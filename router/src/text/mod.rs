//! Text to tokens. (Tokens to text is the shards' work.)

pub(crate) mod tokenizer;

pub(crate) use tokenizer::{Encoded, Tokenizer, TokenizerError};
