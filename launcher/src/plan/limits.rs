//! Token limits: what was given, what follows from the model, and what only warm-up can decide.

use std::fmt;

use serde::Serialize;

use super::PlanInput;
use super::values::Derived;

/// Prompt tokens of one pass where nothing else bounds them.
const PREFILL_TOKENS: u32 = 4096;

/// A limit that the shard decides at warm-up unless the user gave it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub enum TokenLimit {
    /// Given by the user, in tokens.
    Given(u32),
    /// Decided when the shard knows how much fits into memory.
    AtWarmUp {
        /// What the model or another limit bounds it with, in tokens.
        at_most: Option<u32>,
    },
}

impl TokenLimit {
    fn new(given: Option<u32>, at_most: Option<u32>) -> Self {
        given.map_or(Self::AtWarmUp { at_most }, Self::Given)
    }

    /// The value, or what bounds it.
    fn bound(self) -> Option<u32> {
        match self {
            Self::Given(tokens) => Some(tokens),
            Self::AtWarmUp { at_most } => at_most,
        }
    }

    /// The value that the user gave.
    pub fn given(self) -> Option<u32> {
        match self {
            Self::Given(tokens) => Some(tokens),
            Self::AtWarmUp { .. } => None,
        }
    }
}

impl fmt::Display for TokenLimit {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Given(tokens) => write!(formatter, "{tokens}"),
            Self::AtWarmUp { at_most: Some(tokens) } => write!(formatter, "at warm-up, at most {tokens}"),
            Self::AtWarmUp { at_most: None } => formatter.write_str("at warm-up"),
        }
    }
}

/// The token limits of requests and batches.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Longest prompt.
    pub max_input_tokens: Derived<TokenLimit>,
    /// Prompt and answer of one request together.
    pub max_total_tokens: Derived<TokenLimit>,
    /// Prompt tokens of one pass.
    pub max_batch_prefill_tokens: Derived<u32>,
    /// Tokens of all running requests together.
    pub max_batch_total_tokens: Derived<TokenLimit>,
}

impl Limits {
    pub(super) fn derive(input: PlanInput<'_>) -> Self {
        let batch_total = input.args.max_batch_total_tokens;
        let max_total_tokens = max_total_tokens(input);
        Self {
            max_input_tokens: max_input_tokens(input, max_total_tokens.value),
            max_total_tokens,
            max_batch_prefill_tokens: max_batch_prefill_tokens(input),
            max_batch_total_tokens: Derived::new(
                TokenLimit::new(batch_total, None),
                batch_total.map_or(
                    "the blocks that fit into --cuda-memory-fraction of the free memory, at most 4 GiB",
                    |_| "--max-batch-total-tokens",
                ),
            ),
        }
    }
}

fn max_total_tokens(input: PlanInput<'_>) -> Derived<TokenLimit> {
    let given = input.args.max_total_tokens;
    let positions = input.model.config.position_count;
    let batch_total = input.args.max_batch_total_tokens;
    let at_most = positions.map(|(count, _)| count).into_iter().chain(batch_total).min();
    let reason = match (given, at_most, positions) {
        (Some(_), ..) => "--max-total-tokens".to_owned(),
        (None, None, _) => "what fits into memory".to_owned(),
        (None, Some(_), Some((count, key))) if at_most == Some(count) => {
            format!("{key}, and what fits into memory")
        }
        (None, Some(_), _) => "--max-batch-total-tokens".to_owned(),
    };
    Derived::new(TokenLimit::new(given, at_most), reason)
}

fn max_input_tokens(input: PlanInput<'_>, total: TokenLimit) -> Derived<TokenLimit> {
    let args = input.args;
    let reason = match (args.max_input_tokens, args.max_input_length) {
        (Some(_), _) => "--max-input-tokens",
        (None, Some(_)) => "--max-input-length",
        (None, None) => "max-total-tokens - 1: a request generates at least one token",
    };
    let given = args.max_input_tokens.or(args.max_input_length);
    Derived::new(TokenLimit::new(given, total.bound().map(|total| total.saturating_sub(1))), reason)
}

fn max_batch_prefill_tokens(input: PlanInput<'_>) -> Derived<u32> {
    if let Some(given) = input.args.max_batch_prefill_tokens {
        return Derived::new(given, "--max-batch-prefill-tokens");
    }
    let config = &input.model.config;
    // Families whose images alone take thousands of tokens get more.
    let (tokens, reason) = match config.model_type.as_deref() {
        Some(family @ ("qwen2_vl" | "qwen2_5_vl")) => (10_000, format!("the default of the family {family}")),
        Some(family @ "gemma3") => (8_000, format!("the default of the family {family}")),
        _ => (PREFILL_TOKENS, "the default without a GPU".to_owned()),
    };
    let positions = config.position_count.map(|(count, key)| (count, format!("{key} of the model")));
    let batch_total =
        input.args.max_batch_total_tokens.map(|count| (count, "--max-batch-total-tokens".to_owned()));
    let caps = positions.into_iter().chain(batch_total).filter(|(count, _)| *count < tokens);
    match caps.min_by_key(|(count, _)| *count) {
        Some((cap, why)) => Derived::new(cap, format!("{reason}, {tokens}, capped by {why}")),
        None => Derived::new(tokens, reason),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::testing::{Case, plan};

    fn limits(case: &Case) -> Limits {
        case.plan().unwrap().values.limits
    }

    #[test]
    fn the_model_bounds_what_warm_up_decides() {
        let limits = plan(&[]).values.limits;
        assert_eq!(limits.max_total_tokens.value, TokenLimit::AtWarmUp { at_most: Some(2048) });
        assert_eq!(limits.max_total_tokens.reason, "max_position_embeddings, and what fits into memory");
        assert_eq!(limits.max_input_tokens.value, TokenLimit::AtWarmUp { at_most: Some(2047) });
        assert_eq!(limits.max_batch_total_tokens.value, TokenLimit::AtWarmUp { at_most: None });
    }

    #[test]
    fn given_limits_stay_as_given() {
        let words = [
            "--max-input-length=10",
            "--max-total-tokens=20",
            "--max-batch-prefill-tokens=30",
            "--max-batch-total-tokens=40",
        ];
        let limits = plan(&words).values.limits;
        assert_eq!(limits.max_input_tokens, Derived::new(TokenLimit::Given(10), "--max-input-length"));
        assert_eq!(limits.max_total_tokens, Derived::new(TokenLimit::Given(20), "--max-total-tokens"));
        assert_eq!(limits.max_batch_prefill_tokens, Derived::new(30, "--max-batch-prefill-tokens"));
        assert_eq!(
            limits.max_batch_total_tokens,
            Derived::new(TokenLimit::Given(40), "--max-batch-total-tokens")
        );
    }

    #[test]
    fn a_given_total_bounds_the_prompt() {
        let limits = plan(&["--max-total-tokens=20"]).values.limits;
        assert_eq!(limits.max_input_tokens.value, TokenLimit::AtWarmUp { at_most: Some(19) });
    }

    #[test]
    fn the_prefill_budget_has_a_default_per_family_and_the_models_positions_cap_it() {
        let mut case = Case::new(&[]);
        let cases = [
            (None, None, 4096),
            (None, Some(2048), 2048),
            (Some("qwen2_vl"), Some(32_768), 10_000),
            (Some("gemma3"), None, 8_000),
            (Some("gemma3"), Some(512), 512),
        ];
        for (family, positions, expected) in cases {
            case.model.config.model_type = family.map(str::to_owned);
            case.model.config.position_count = positions.map(|count| (count, "n_positions"));
            let budget = limits(&case).max_batch_prefill_tokens;
            assert_eq!(budget.value, expected, "{family:?} {positions:?}: {}", budget.reason);
        }
    }

    #[test]
    fn a_derived_prefill_budget_stays_within_the_given_total_of_a_batch() {
        let limits = plan(&["--max-batch-total-tokens=100"]).values.limits;
        let expected =
            Derived::new(100, "the default without a GPU, 4096, capped by --max-batch-total-tokens");
        assert_eq!(limits.max_batch_prefill_tokens, expected);
        assert_eq!(limits.max_total_tokens.value, TokenLimit::AtWarmUp { at_most: Some(100) });
    }

    #[test]
    fn an_unknown_bound_is_not_invented() {
        let mut case = Case::new(&[]);
        case.model.config.position_count = None;
        let limits = limits(&case);
        assert_eq!(limits.max_total_tokens.value, TokenLimit::AtWarmUp { at_most: None });
        assert_eq!(limits.max_input_tokens.value.to_string(), "at warm-up");
    }
}
