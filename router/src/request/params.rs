//! Parameters of a generation in the core's own terms: what every route translates its body into, not yet checked.

use proto::units::TokenId;
use serde_json::Value;

/// The API a request came through. Names and a few meanings differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Dialect {
    /// `/generate` and its relatives.
    Native,
    /// `/v1/…`.
    OpenAi,
}

impl Dialect {
    /// What this API calls the number of tokens to generate.
    pub(crate) fn max_new_tokens(self) -> &'static str {
        match self {
            Self::Native => "max_new_tokens",
            Self::OpenAi => "max_tokens",
        }
    }

    /// What this API calls the number of alternatives.
    pub(crate) fn top_n_tokens(self) -> &'static str {
        match self {
            Self::Native => "top_n_tokens",
            Self::OpenAi => "top_logprobs",
        }
    }
}

/// What a client asked for. `None` is not given.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Params {
    pub(crate) dialect: Dialect,
    /// Sequences of which the best is returned.
    pub(crate) best_of: Option<u32>,
    /// Sequences of which all are returned.
    pub(crate) choices: Option<u32>,
    pub(crate) do_sample: bool,
    /// Zero means greedy on the OpenAI routes, and is an error on the native ones.
    pub(crate) temperature: Option<f32>,
    pub(crate) top_k: Option<i32>,
    pub(crate) top_p: Option<f32>,
    pub(crate) typical_p: Option<f32>,
    pub(crate) min_p: Option<f32>,
    pub(crate) repetition_penalty: Option<f32>,
    /// Of the native routes (share of the sequence) or of OpenAI (per occurrence in the output), by dialect.
    pub(crate) frequency_penalty: Option<f32>,
    pub(crate) presence_penalty: Option<f32>,
    pub(crate) logit_bias: Vec<(TokenId, f32)>,
    pub(crate) watermark: bool,
    pub(crate) seed: Option<u64>,
    pub(crate) max_new_tokens: Option<u32>,
    pub(crate) stop: Vec<String>,
    pub(crate) truncate: Option<u32>,
    /// Whether the tokenizer adds its special tokens; a chat template has written them already.
    pub(crate) add_special_tokens: bool,
    pub(crate) prompt_logprobs: bool,
    pub(crate) top_n_tokens: Option<u32>,
    pub(crate) grammar: Option<Value>,
    pub(crate) adapter: Option<String>,
    pub(crate) priority: Option<i64>,
}

impl Params {
    /// Nothing asked for.
    pub(crate) fn new(dialect: Dialect) -> Self {
        Self {
            dialect,
            best_of: None,
            choices: None,
            do_sample: false,
            temperature: None,
            top_k: None,
            top_p: None,
            typical_p: None,
            min_p: None,
            repetition_penalty: None,
            frequency_penalty: None,
            presence_penalty: None,
            logit_bias: Vec::new(),
            watermark: false,
            seed: None,
            max_new_tokens: None,
            stop: Vec::new(),
            truncate: None,
            add_special_tokens: true,
            prompt_logprobs: false,
            top_n_tokens: None,
            grammar: None,
            adapter: None,
            priority: None,
        }
    }

    /// How many sequences are generated for this request. At least 1; `best_of: 0` counts as 1.
    pub(crate) fn sequences(&self) -> u32 {
        self.best_of.or(self.choices).unwrap_or(1).max(1)
    }

    /// Whether the client asked for the likeliest token in OpenAI's way.
    pub(crate) fn is_greedy(&self) -> bool {
        self.dialect == Dialect::OpenAi && self.temperature == Some(0.0)
    }
}
