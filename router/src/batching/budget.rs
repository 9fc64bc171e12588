//! Token arithmetic: what fits into the cache, what fits into a pass, and how a long prompt is cut.

use std::num::NonZeroUsize;

use proto::units::{BlockCount, BlockSize, TokenCount};

use super::row::Progress;
use crate::request::ValidRequest;
use crate::shards::{Extensions, ShardError, ShardInfo};

/// What the scheduler keeps to. Fixed at start.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Size of the cache.
    pub capacity: Capacity,
    /// Most tokens of one pass that has prompts in it. At least 1.
    pub max_batch_prefill_tokens: TokenCount,
    /// Most rows that run at once; `None` is no limit but the cache.
    pub max_batch_size: Option<NonZeroUsize>,
    /// Most requests that are queued or running.
    pub max_concurrent_requests: usize,
    /// How prompts share passes with running rows.
    pub prompts: PromptPolicy,
    /// What the shards understand beyond the plain contract.
    pub extensions: Extensions,
    /// Keys and values of a prompt are kept for others that begin alike, if the prompt is no longer than this.
    pub shared_prompt_max: TokenCount,
    /// How many times as long as a pass without prompts one may take in which rows generate and prompts are computed;
    /// `None` is no limit.
    pub stretch: Option<f64>,
}

/// How prompts share passes with rows that run already.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum PromptPolicy {
    /// Prompts are cut to what a pass has left, and running rows take part in every pass.
    Chunked,
    /// For shards that compute only whole prompts, in a pass of their own: running rows wait meanwhile.
    Whole {
        /// Running rows wait for at least this many prompts per running row, ...
        waiting_served_ratio: f32,
        /// ... or after this many steps for any.
        max_waiting_tokens: u32,
    },
}

/// Size of the key/value cache, and what a request takes of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capacity {
    /// All blocks, the reserved one included.
    pub blocks: BlockCount,
    /// Tokens per block.
    pub block_size: BlockSize,
    /// Guessed tokens that a row may store besides its own.
    pub speculate: TokenCount,
}

impl Capacity {
    /// A cache of `blocks` blocks, the reserved one included.
    pub fn new(blocks: BlockCount, info: &ShardInfo) -> Self {
        Self { blocks, block_size: info.block_size, speculate: info.speculate }
    }

    /// Tokens that requests can hold together.
    pub fn usable(&self) -> TokenCount {
        BlockCount(self.blocks.0.saturating_sub(1)).tokens(self.block_size)
    }

    /// Tokens whose keys and values a request may store. The last generated token is never fed back, so it takes none.
    pub fn need(&self, prompt: TokenCount, max_new_tokens: TokenCount) -> TokenCount {
        let tokens = u64::from(prompt.0) + u64::from(max_new_tokens.0) + u64::from(self.speculate.0);
        TokenCount(u32::try_from(tokens.saturating_sub(1)).unwrap_or(u32::MAX))
    }

    /// Most tokens, prompt and output together, that a single request can have.
    pub fn longest(&self) -> TokenCount {
        TokenCount((self.usable().0.saturating_add(1)).saturating_sub(self.speculate.0))
    }

    /// Errors when a request does not fit even into an empty cache.
    pub fn check(&self, prompt: TokenCount, max_new_tokens: TokenCount) -> Result<(), ShardError> {
        let (need, usable) = (self.need(prompt, max_new_tokens), self.usable());
        if need <= usable { Ok(()) } else { Err(ShardError::Capacity { need, usable }) }
    }
}

impl Limits {
    /// Errors when a request could never run: it would wait for ever, and all behind it.
    pub fn check(&self, request: &ValidRequest) -> Result<(), ShardError> {
        let prompt = request.prompt.length();
        self.capacity.check(prompt, request.stopping.max_new_tokens)?;
        let piece = match self.prompts {
            PromptPolicy::Chunked => TokenCount(1),
            PromptPolicy::Whole { .. } => prompt,
        };
        if piece > self.max_batch_prefill_tokens {
            return Err(ShardError::Prompt { tokens: prompt, limit: self.max_batch_prefill_tokens });
        }
        self.extensions.check(&request.sampling)
    }

    /// Whether rows get their blocks step by step, and may have to leave when none are left. Then passes are told to the
    /// shards row by row. Otherwise rows get all blocks that they may need when they are admitted.
    pub fn on_demand(&self) -> bool {
        let Extensions { input_ids, resume, block_grants, .. } = self.extensions;
        self.prompts == PromptPolicy::Chunked && input_ids && resume && block_grants
    }

    /// Whether anything is kept for others.
    pub fn shares(&self) -> bool {
        self.shared_prompt_max > TokenCount(0)
    }

    /// Most rows that run at once.
    pub(crate) fn rows_max(&self) -> usize {
        self.max_batch_size.map_or(usize::MAX, NonZeroUsize::get)
    }
}

/// Prompt tokens that still fit into the pass being planned.
///
/// The reference rounds the user's limit up to whole blocks; here it is kept to the token, because it is what warm-up
/// has measured.
#[derive(Debug)]
pub(super) struct PrefillBudget {
    left: TokenCount,
    cuts: bool,
}

impl PrefillBudget {
    /// For a pass in which the running rows feed `running` tokens, and which takes `prompts_max` tokens of prompts.
    pub(super) fn new(limits: &Limits, running: TokenCount, prompts_max: TokenCount) -> Self {
        let total = limits.max_batch_prefill_tokens.0;
        match limits.prompts {
            PromptPolicy::Chunked => {
                Self { left: TokenCount(total.saturating_sub(running.0)).min(prompts_max), cuts: true }
            }
            PromptPolicy::Whole { .. } => Self { left: TokenCount(total), cuts: false },
        }
    }

    /// How much of a prompt's uncached tokens the pass can take: all, if need be a first piece, or `None`.
    pub(super) fn first_chunk(&self, tokens: TokenCount) -> Option<TokenCount> {
        if tokens <= self.left {
            return Some(tokens);
        }
        (self.cuts && self.left > TokenCount(0)).then_some(self.left)
    }

    pub(super) fn spend(&mut self, chunk: TokenCount) {
        self.left.0 -= chunk.0;
    }
}

/// Sets the next piece of each unfinished prompt of a pass, exactly as the shards do it after that pass: the newest
/// prompt first, out of the tokens that a pass has when every other row feeds one.
///
/// `rows` are all rows of the pass in order, also those that have just stopped.
pub(super) fn continue_prompts<'a>(
    rows: impl DoubleEndedIterator<Item = &'a mut Progress> + ExactSizeIterator,
    pass_tokens: TokenCount,
) {
    let mut left = (pass_tokens.0 as usize).saturating_sub(rows.len().saturating_sub(1)) as u32;
    for row in rows.rev().filter(|row| row.is_input()) {
        row.next.0 = row.remaining().0.min(left).max(1);
        left = left.saturating_sub(row.next.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn capacity(blocks: u32, speculate: u32) -> Capacity {
        let block_size = BlockSize::new(16).unwrap();
        Capacity { blocks: BlockCount(blocks), block_size, speculate: TokenCount(speculate) }
    }

    fn chunks(remaining: &[u32], pass_tokens: u32) -> Vec<u32> {
        let row = |&remaining: &u32| Progress {
            computed: TokenCount(7),
            input: TokenCount(7 + remaining),
            next: TokenCount(1),
        };
        let mut rows: Vec<Progress> = remaining.iter().map(row).collect();
        continue_prompts(rows.iter_mut(), TokenCount(pass_tokens));
        rows.iter().map(|row| row.next.0).collect()
    }

    #[test]
    fn the_last_token_is_never_stored() {
        assert_eq!(capacity(5, 0).need(TokenCount(10), TokenCount(1)), TokenCount(10));
        assert_eq!(capacity(5, 3).need(TokenCount(10), TokenCount(5)), TokenCount(17));
    }

    #[test]
    fn the_longest_request_fits_exactly() {
        for speculate in [0, 3] {
            let capacity = capacity(5, speculate);
            let longest = capacity.longest().0;
            assert_eq!(capacity.check(TokenCount(longest - 4), TokenCount(4)), Ok(()));
            let error = capacity.check(TokenCount(longest - 4), TokenCount(5)).unwrap_err();
            assert_eq!(error, ShardError::Capacity { need: TokenCount(65), usable: TokenCount(64) });
        }
    }

    #[test]
    fn absurd_lengths_do_not_wrap_around() {
        let need = capacity(5, 0).need(TokenCount(u32::MAX), TokenCount(u32::MAX));
        assert_eq!(need, TokenCount(u32::MAX));
        assert!(capacity(0, 0).check(TokenCount(1), TokenCount(1)).is_err());
    }

    #[test]
    fn an_unfinished_prompt_gets_what_the_other_rows_leave() {
        assert_eq!(chunks(&[0, 0, 100], 16), [1, 1, 14]);
        assert_eq!(chunks(&[0, 0, 5], 16), [1, 1, 5]);
    }

    #[test]
    fn the_newest_unfinished_prompt_is_served_first_and_none_stands_still() {
        assert_eq!(chunks(&[100, 9], 16), [6, 9]);
        assert_eq!(chunks(&[100, 100], 16), [1, 15]);
        assert_eq!(chunks(&[0, 0, 0, 0, 100], 3), [1, 1, 1, 1, 1]);
    }
}
