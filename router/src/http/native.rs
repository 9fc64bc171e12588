//! Answers of the native routes: wire structs only.

use serde::Serialize;

use crate::batching;
use crate::batching::{FinishReason, PromptToken, Step};
use crate::infer::{self, Generation};

/// A generated token. A log-probability that is no number is written as null.
#[derive(Debug, Serialize)]
pub(super) struct Token {
    id: u32,
    text: String,
    logprob: f32,
    special: bool,
}

#[derive(Debug, Serialize)]
pub(super) struct PrefillToken {
    id: u32,
    text: String,
    logprob: Option<f32>,
}

/// Answer of `/generate`.
#[derive(Debug, Serialize)]
pub(super) struct GenerateResponse {
    pub(super) generated_text: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) details: Option<Details>,
}

#[derive(Debug, Serialize)]
pub(super) struct Details {
    finish_reason: &'static str,
    generated_tokens: u32,
    seed: Option<u64>,
    prefill: Vec<PrefillToken>,
    tokens: Vec<Token>,
    #[serde(skip_serializing_if = "Option::is_none")]
    best_of_sequences: Option<Vec<BestOfSequence>>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    top_tokens: Vec<Vec<Token>>,
}

/// A sequence that was not the best.
#[derive(Debug, Serialize)]
pub(super) struct BestOfSequence {
    pub(super) generated_text: String,
    #[serde(flatten)]
    pub(super) details: Details,
}

/// An event of a stream.
#[derive(Debug, Serialize)]
pub(super) struct StreamResponse {
    /// From 1.
    pub(super) index: u32,
    token: Token,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    top_tokens: Vec<Token>,
    /// The whole text, with the last token.
    pub(super) generated_text: Option<String>,
    pub(super) details: Option<StreamDetails>,
}

#[derive(Debug, Serialize)]
pub(super) struct StreamDetails {
    finish_reason: &'static str,
    generated_tokens: u32,
    seed: Option<u64>,
    input_length: u32,
}

impl From<batching::Token> for Token {
    fn from(token: batching::Token) -> Self {
        Self { id: token.id.0, text: token.text, logprob: token.logprob, special: token.special }
    }
}

impl From<PromptToken> for PrefillToken {
    fn from(token: PromptToken) -> Self {
        Self { id: token.id.0, text: token.text, logprob: token.logprob }
    }
}

impl Details {
    /// Everything but the other sequences.
    pub(super) fn new(generation: Generation) -> Self {
        let (mut tokens, mut top_tokens) = (Vec::new(), Vec::new());
        for step in generation.steps {
            tokens.push(step.token.into());
            top_tokens.push(wire(step.alternatives));
        }
        if top_tokens.iter().all(Vec::is_empty) {
            top_tokens.clear();
        }
        Self {
            finish_reason: infer::name(generation.finished.reason),
            generated_tokens: generation.finished.tokens.0,
            seed: generation.finished.seed,
            prefill: generation.prompt.into_iter().map(PrefillToken::from).collect(),
            tokens,
            best_of_sequences: None,
            top_tokens,
        }
    }

    /// The same with the sequences that were not the best, if there are any.
    pub(super) fn beside(self, others: Vec<BestOfSequence>) -> Self {
        Self { best_of_sequences: (!others.is_empty()).then_some(others), ..self }
    }
}

impl StreamResponse {
    pub(super) fn new(index: u32, step: Step) -> Self {
        Self {
            index,
            token: step.token.into(),
            top_tokens: wire(step.alternatives),
            generated_text: None,
            details: None,
        }
    }
}

impl StreamDetails {
    pub(super) fn new(
        reason: FinishReason,
        generated_tokens: u32,
        seed: Option<u64>,
        input_length: u32,
    ) -> Self {
        Self { finish_reason: infer::name(reason), generated_tokens, seed, input_length }
    }
}

fn wire(tokens: Vec<batching::Token>) -> Vec<Token> {
    tokens.into_iter().map(Token::from).collect()
}
