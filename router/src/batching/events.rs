//! What a request hears from the batcher.

use std::time::Instant;

use proto::units::{TokenCount, TokenId};

/// A generated token.
#[derive(Clone, Debug, PartialEq)]
pub struct Token {
    /// Entry of the vocabulary.
    pub id: TokenId,
    /// What it adds to the text; empty while a character is incomplete.
    pub text: String,
    /// Log-probability after all sampling steps; not finite for a token they ruled out.
    pub logprob: f32,
    /// Whether it is a special token.
    pub special: bool,
}

/// A token of the prompt.
#[derive(Clone, Debug, PartialEq)]
pub struct PromptToken {
    /// Entry of the vocabulary.
    pub id: TokenId,
    /// Its text, decoded alone.
    pub text: String,
    /// Log-probability given the tokens before it; `None` for the first.
    pub logprob: Option<f32>,
}

/// A generated token and the best alternatives to it.
#[derive(Clone, Debug, PartialEq)]
pub struct Step {
    /// The token that was chosen.
    pub token: Token,
    /// Most likely first; empty unless asked for.
    pub alternatives: Vec<Token>,
}

/// Why a request stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// It reached its number of tokens, or the model's limit.
    Length,
    /// The model ended it.
    EndOfSequence,
    /// A stop string appeared.
    StopSequence,
}

/// The end of a request.
#[derive(Clone, Debug, PartialEq)]
pub struct Finished {
    /// The whole generated text, special tokens left out.
    pub text: String,
    /// Generated tokens, the end-of-sequence token included.
    pub tokens: TokenCount,
    /// Why it stopped.
    pub reason: FinishReason,
    /// The seed, if the request really sampled.
    pub seed: Option<u64>,
    /// When it entered the queue.
    pub queued: Instant,
    /// When it entered a batch.
    pub started: Instant,
    /// Prompt tokens whose keys and values were found in the cache when it entered a batch first.
    pub cached: TokenCount,
}

/// One event of a request's stream. A stream is: at most one `Prompt`, then `Token`s, then one `Last`; or it ends early
/// with an error.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// Log-probabilities of the prompt, if asked for.
    Prompt(Vec<PromptToken>),
    /// A token, with more to come.
    Token(Step),
    /// The last token and the end.
    Last(Step, Finished),
}
