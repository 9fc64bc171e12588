//! The limits in force: what the user gave, and what the shards decided in their warm-up. Pure.

use proto::units::TokenCount;
use thiserror::Error;

use crate::batching::{self, Capacity, PromptPolicy};
use crate::config::{ConfigError, LimitsConfig, at_most};
use crate::metrics::BucketLimits;
use crate::request::validate::RequestLimits;
use crate::shards::{ShardInfo, Warm, WarmupLimits};

/// Limits that cannot be kept with these shards.
#[derive(Clone, Debug, Error, PartialEq)]
pub(crate) enum LimitsError {
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(
        "`--max-total-tokens` is {wanted}, but the cache has room for requests of at most {longest} tokens"
    )]
    NotEnoughMemory { wanted: TokenCount, longest: TokenCount },
    #[error("the cache has room for requests of at most {0} tokens, but a request needs at least 2")]
    NoMemory(TokenCount),
}

/// What every part keeps to.
#[derive(Clone, Debug)]
pub(crate) struct Limits {
    pub(crate) request: RequestLimits,
    pub(crate) batching: batching::Limits,
}

impl LimitsConfig {
    /// What the shards are told.
    pub(crate) fn warmup(&self) -> WarmupLimits {
        WarmupLimits {
            max_input_tokens: self.input_tokens,
            max_total_tokens: self.total_tokens,
            max_batch_prefill_tokens: self.batch_prefill_tokens,
            max_batch_size: self.batch_size.map(Into::into),
        }
    }
}

impl Limits {
    /// Settles the limits. A limit of the user's that does not hold is an error; one that the shards chose is lowered.
    /// `vocabulary` is the number of tokens of the model.
    pub(crate) fn settle(
        config: &LimitsConfig,
        info: &ShardInfo,
        warm: &Warm,
        vocabulary: u32,
    ) -> Result<Self, LimitsError> {
        let capacity = warm.capacity(info, config.batch_total_tokens, config.batch_prefill_tokens);
        let longest = capacity.longest();
        if let Some(wanted) = config.total_tokens.filter(|total| *total > longest) {
            return Err(LimitsError::NotEnoughMemory { wanted, longest });
        }
        let total = warm.max_total_tokens.min(longest);
        if total < TokenCount(2) {
            return Err(LimitsError::NoMemory(longest));
        }
        let below_total = TokenCount(total.0 - 1);
        if let Some(TokenCount(input)) = config.input_tokens {
            let total = ("the number of tokens of a request", Some(below_total.0));
            at_most(("--max-input-tokens", Some(input)), total)?;
        }
        let mut input = warm.max_input_tokens.min(below_total);
        if !info.support_chunking {
            let prefill = config.batch_prefill_tokens;
            let wanted = config.input_tokens.map(|tokens| tokens.0);
            at_most(("--max-input-tokens", wanted), ("--max-batch-prefill-tokens", Some(prefill.0)))?;
            input = input.min(prefill);
        }
        Ok(Self {
            request: RequestLimits {
                best_of_max: config.best_of,
                choices_max: config.client_batch,
                stop_sequences_max: config.stop_sequences,
                top_n_tokens_max: config.top_n_tokens,
                input_tokens_max: input,
                total_tokens_max: total,
                vocabulary,
                sampling_more: info.extensions.sampling_more,
            },
            batching: batching_limits(config, info, capacity),
        })
    }

    /// What shards are told that take the place of others: the limits that hold by now.
    pub(crate) fn warmup(&self, config: &LimitsConfig) -> WarmupLimits {
        WarmupLimits {
            max_input_tokens: Some(self.request.input_tokens_max),
            max_total_tokens: Some(self.request.total_tokens_max),
            ..config.warmup()
        }
    }

    /// For the layout of the histograms.
    pub(crate) fn buckets(&self) -> BucketLimits {
        BucketLimits {
            max_input_tokens: self.request.input_tokens_max,
            max_total_tokens: self.request.total_tokens_max,
        }
    }
}

fn batching_limits(config: &LimitsConfig, info: &ShardInfo, capacity: Capacity) -> batching::Limits {
    let prompts = match info.support_chunking {
        true => PromptPolicy::Chunked,
        false => PromptPolicy::Whole {
            waiting_served_ratio: config.waiting_served_ratio,
            max_waiting_tokens: config.waiting_tokens,
        },
    };
    batching::Limits {
        capacity,
        max_batch_prefill_tokens: config.batch_prefill_tokens,
        max_batch_size: config.batch_size,
        max_concurrent_requests: config.concurrent_requests,
        prompts,
        extensions: info.extensions,
        shared_prompt_max: match config.prefix_caching && info.use_prefix_caching {
            true => info.shared_prompt_max.unwrap_or(TokenCount(u32::MAX)),
            false => TokenCount(0),
        },
        stretch: config.max_step_stretch.map(f64::from),
    }
}

#[cfg(test)]
mod tests {
    use proto::units::BlockSize;

    use super::*;
    use crate::shards::Extensions;

    fn config() -> LimitsConfig {
        LimitsConfig {
            concurrent_requests: 8,
            best_of: 2,
            stop_sequences: 4,
            top_n_tokens: 5,
            client_batch: 4,
            input_tokens: None,
            total_tokens: None,
            batch_prefill_tokens: TokenCount(50),
            batch_total_tokens: None,
            batch_size: None,
            waiting_served_ratio: 1.2,
            waiting_tokens: 20,
            prefix_caching: true,
            max_step_stretch: None,
        }
    }

    fn info(support_chunking: bool) -> ShardInfo {
        ShardInfo {
            requires_padding: false,
            dtype: "torch.float32".to_owned(),
            device_type: "cpu".to_owned(),
            speculate: TokenCount(0),
            support_chunking,
            use_prefix_caching: false,
            attention_impl: "paged".to_owned(),
            block_size: BlockSize::new(10).unwrap(),
            extensions: Extensions::default(),
            adapters: Vec::new(),
            shared_prompt_max: None,
        }
    }

    const WARM: Warm = Warm {
        capacity: Some(TokenCount(1000)),
        max_input_tokens: TokenCount(199),
        max_total_tokens: TokenCount(200),
    };

    /// Longest prompt, longest request and tokens of the cache, the reserved block included.
    fn settle(config: &LimitsConfig, support_chunking: bool, warm: &Warm) -> Result<[u32; 3], LimitsError> {
        let limits = Limits::settle(config, &info(support_chunking), warm, 64)?;
        let request = &limits.request;
        Ok([request.input_tokens_max.0, request.total_tokens_max.0, limits.batching.capacity.blocks.0 * 10])
    }

    #[test]
    fn the_shards_decide_what_is_not_given() {
        assert_eq!(settle(&config(), true, &WARM), Ok([199, 200, 1000]));
        let silent = Warm { capacity: None, ..WARM };
        assert_eq!(settle(&config(), true, &silent), Ok([199, 200, 16_010]));
    }

    #[test]
    fn the_cache_is_the_smaller_of_what_fits_and_what_is_wanted() {
        let wanted = |tokens| LimitsConfig { batch_total_tokens: Some(TokenCount(tokens)), ..config() };
        // One block is reserved beside what the user wants.
        assert_eq!(settle(&wanted(500), true, &WARM), Ok([199, 200, 510]));
        assert_eq!(settle(&wanted(495), true, &WARM), Ok([199, 200, 510]));
        assert_eq!(settle(&wanted(5000), true, &WARM), Ok([199, 200, 1000]));
        // The last token of a request is never stored.
        assert_eq!(settle(&wanted(100), true, &WARM), Ok([100, 101, 110]));
    }

    #[test]
    fn a_cache_may_be_just_as_large_as_a_request() {
        let tokens = Some(TokenCount(100));
        let config = LimitsConfig { total_tokens: tokens, batch_total_tokens: tokens, ..config() };
        let warm = Warm { max_total_tokens: TokenCount(100), max_input_tokens: TokenCount(99), ..WARM };
        assert_eq!(settle(&config, true, &warm), Ok([99, 100, 110]));
    }

    #[test]
    fn what_the_user_wants_and_does_not_fit_is_an_error() {
        let total = LimitsConfig { total_tokens: Some(TokenCount(2000)), ..config() };
        let warm = Warm { max_total_tokens: TokenCount(2000), ..WARM };
        let error = LimitsError::NotEnoughMemory { wanted: TokenCount(2000), longest: TokenCount(991) };
        assert_eq!(settle(&total, true, &warm), Err(error));
        let input = LimitsConfig { input_tokens: Some(TokenCount(300)), ..config() };
        let error = settle(&input, true, &WARM).unwrap_err().to_string();
        assert_eq!(
            error,
            "`--max-input-tokens` (300) must be at most `the number of tokens of a request` (199)"
        );
        let none = Warm { capacity: Some(TokenCount(10)), ..WARM };
        assert_eq!(settle(&config(), true, &none), Err(LimitsError::NoMemory(TokenCount(1))));
    }

    #[test]
    fn without_chunking_a_prompt_fits_into_one_pass() {
        assert_eq!(settle(&config(), false, &WARM), Ok([50, 200, 1000]));
        let input = LimitsConfig { input_tokens: Some(TokenCount(60)), ..config() };
        let error = settle(&input, false, &WARM).unwrap_err().to_string();
        assert_eq!(error, "`--max-input-tokens` (60) must be at most `--max-batch-prefill-tokens` (50)");
    }
}
