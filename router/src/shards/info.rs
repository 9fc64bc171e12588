//! What the shards serve, and what they understand beyond the plain contract.

use proto::extensions::{ADAPTERS, BLOCK_GRANTS, INPUT_IDS, RESUME, SAMPLING_MORE};
use proto::units::{BlockSize, TokenCount};
use proto::v3;

use super::ShardError;
use crate::request::Sampling;

/// What the shards say of themselves. Constant while they live.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShardInfo {
    /// True for models whose batches are padded instead of paged.
    pub requires_padding: bool,
    /// Type of the weights, such as `torch.bfloat16`.
    pub dtype: String,
    /// `cpu`, `cuda`, ...
    pub device_type: String,
    /// Tokens guessed per step; 0 is off.
    pub speculate: TokenCount,
    /// Whether a prompt may be computed over several steps.
    pub support_chunking: bool,
    /// Whether cached prefixes are understood.
    pub use_prefix_caching: bool,
    /// `paged`, `flashdecoding` or `flashinfer`.
    pub attention_impl: String,
    /// Tokens per cache block.
    pub block_size: BlockSize,
    /// What is understood beyond the plain contract.
    pub extensions: Extensions,
    /// Ids of the LoRA adapters that are loaded.
    pub adapters: Vec<String>,
    /// Longest prompt whose keys and values others may use, if there is such a limit.
    pub shared_prompt_max: Option<TokenCount>,
}

/// The extensions that were announced. To shards that do not know one, its fields are not sent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Extensions {
    /// Token ids travel with the request.
    pub input_ids: bool,
    /// Presence and count penalty, `min_p`, `logit_bias`.
    pub sampling_more: bool,
    /// Adapters can be loaded and unloaded at any time.
    pub adapters: bool,
    /// Requests go on where they were.
    pub resume: bool,
    /// Blocks, and how much of a prompt is computed, are granted from step to step.
    pub block_grants: bool,
}

impl ShardInfo {
    /// Errors when the blocks are of no tokens.
    pub(super) fn from_wire(info: v3::InfoResponse) -> Result<Self, ShardError> {
        let block_size = BlockSize::new(info.block_size)
            .ok_or_else(|| ShardError::Answer("cache blocks of 0 tokens".to_owned()))?;
        Ok(Self {
            requires_padding: info.requires_padding,
            dtype: info.dtype,
            device_type: info.device_type,
            speculate: TokenCount(info.speculate),
            support_chunking: info.support_chunking,
            use_prefix_caching: info.use_prefix_caching,
            attention_impl: info.attention_impl,
            block_size,
            extensions: Extensions::named(&info.extensions),
            adapters: info.adapters,
            shared_prompt_max: info.shared_prompt_max.map(TokenCount),
        })
    }
}

impl Extensions {
    /// Those we know among the announced names.
    fn named(names: &[String]) -> Self {
        let knows = |name: &str| names.iter().any(|announced| announced == name);
        Self {
            input_ids: knows(INPUT_IDS),
            sampling_more: knows(SAMPLING_MORE),
            adapters: knows(ADAPTERS),
            resume: knows(RESUME),
            block_grants: knows(BLOCK_GRANTS),
        }
    }

    /// Errors when the shards would not understand how the next token is to be chosen; the error names the parameter.
    pub fn check(&self, sampling: &Sampling) -> Result<(), ShardError> {
        if self.sampling_more {
            return Ok(());
        }
        let wanted = [
            ("presence_penalty", sampling.presence_penalty != 0.0),
            ("frequency_penalty", sampling.count_penalty != 0.0),
            ("min_p", sampling.min_p != 0.0),
            ("logit_bias", !sampling.logit_bias.is_empty()),
        ];
        match wanted.into_iter().find(|(_, wanted)| *wanted) {
            Some((name, _)) => Err(ShardError::Unsupported(name)),
            None => Ok(()),
        }
    }
}
