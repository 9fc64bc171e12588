//! Warm-up: how large a step the router will ask for, and how many cache blocks fit beside it.

use proto::units::{BlockCount, BlockSize, RequestId, TokenCount};
use sysinfo::System;

use super::answer::Capacity;
use super::error::{EngineError, WarmupError};
use super::request::{Admission, NewBatch, NewRequest, Placement, Prompt, Stopping};
use crate::backend::Device;
use crate::cache::KvShape;

/// The caches of all ranks take no more than this of a machine's memory, which they share with everything else.
const CACHE_BYTES_MAX: u64 = 4 << 30;

/// The largest prefill, and the limits that the user has set.
#[derive(Clone, Debug)]
pub struct Warmup {
    /// As large as a prefill will ever be.
    pub batch: NewBatch,
    /// Most tokens of a prefill.
    pub prefill_max: TokenCount,
    /// Longest prompt, if set.
    pub input_max: Option<TokenCount>,
    /// Longest prompt and output, if set.
    pub total_max: Option<TokenCount>,
}

/// The share of the available memory that the cache may take.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MemoryShare(pub f64);

/// What bounds the length of a request, in tokens.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    /// Longest prompt, if the user has set one.
    pub(super) input: Option<TokenCount>,
    /// Longest prompt and output, if the user has set one.
    pub(super) total: Option<TokenCount>,
    /// What the tokenizer says.
    pub(super) sequence: Option<TokenCount>,
    /// Positions of the model.
    pub(super) positions: usize,
}

impl MemoryShare {
    /// Bytes for the cache of this rank, one of `ranks` on this machine, of what is available now.
    ///
    /// A GPU is a rank's own, and the share is that of all its memory. The memory of a machine is everybody's: a
    /// container's limit counts, and all ranks together take no more than a few gigabytes.
    pub(super) fn budget(self, device: &Device, ranks: usize) -> Result<u64, WarmupError> {
        if let Some(memory) = device.memory()? {
            let taken = memory.total - memory.free.min(memory.total);
            return Ok(((memory.total as f64 * self.0) as u64).saturating_sub(taken));
        }
        let mut system = System::new().map_err(|error| WarmupError::Probe(error.to_string()))?;
        system.refresh_memory();
        // What a container has read from files counts as its memory, but is given up when it is needed.
        let container =
            system.cgroup_limits().map_or(u64::MAX, |limits| limits.total_memory.saturating_sub(limits.rss));
        Ok(self.of(system.available_memory().min(container)) / ranks as u64)
    }

    fn of(self, available: u64) -> u64 {
        ((available as f64 * self.0) as u64).min(CACHE_BYTES_MAX)
    }
}

/// The size of the largest step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct StepSize {
    /// Tokens of all prompts together.
    pub(super) tokens: usize,
    /// Requests, each of which wants logits at its end.
    pub(super) requests: usize,
}

/// The warm-up batch as this engine runs it, and the size of the step that was asked for: the beginning of each prompt,
/// as many tokens as the device rehearses, and one new token each.
pub(super) fn rehearsal(
    batch: &NewBatch,
    admission: &Admission<'_>,
    tokens: usize,
) -> Result<(NewBatch, StepSize), EngineError> {
    let mut size = StepSize { tokens: 0, requests: batch.requests.len() };
    let mut room = tokens;
    let mut requests = Vec::new();
    for request in &batch.requests {
        let mut ids = admission
            .prompt_ids(request.prompt.clone())
            .map_err(|source| EngineError::Request { request: request.id, source })?;
        size.tokens += ids.len();
        ids.truncate(room.min(admission.shape.positions_max));
        room -= ids.len();
        if ids.is_empty() {
            continue;
        }
        requests.push(NewRequest {
            id: RequestId(requests.len() as u64),
            prompt: Prompt::Ids(ids),
            generated: TokenCount(0),
            stopping: Stopping { tokens_max: TokenCount(1), ..request.stopping.clone() },
            placement: Placement::Numbered,
            cached: TokenCount(0),
            chunk: None,
            adapter: None,
            ..request.clone()
        });
    }
    Ok((NewBatch { id: batch.id, requests }, size))
}

/// How many blocks a cache of `budget` bytes has.
pub(super) fn blocks(shape: KvShape, block_size: BlockSize, budget: u64) -> BlockCount {
    let block_bytes = shape.bytes_per_block(block_size).map_or(u64::MAX, |bytes| bytes as u64).max(1);
    // Slots are counted in 32 bits.
    BlockCount((budget / block_bytes).min(u64::from(u32::MAX / block_size.get())) as u32)
}

/// What a cache of these blocks, made of `budget` bytes, can serve. Block 0 serves nobody.
pub(super) fn capacity(
    blocks: BlockCount,
    block_size: BlockSize,
    budget: u64,
    limits: Limits,
) -> Result<Capacity, WarmupError> {
    if let Some(total) = limits.total.filter(|total| total.0 as usize > limits.positions) {
        return Err(WarmupError::Positions { total, limit: limits.positions });
    }
    let served = BlockCount(blocks.0.saturating_sub(1)).tokens(block_size);
    let positions = u32::try_from(limits.positions).unwrap_or(u32::MAX);
    let total_max = limits
        .total
        .unwrap_or_else(|| served.min(TokenCount(positions)).min(limits.sequence.unwrap_or(served)));
    // One token of prompt and one of output are the least that makes sense.
    let least = total_max.max(TokenCount(2));
    if served < least {
        return Err(WarmupError::Capacity { budget, supported: served, total: least });
    }
    let input_max = limits.input.unwrap_or(TokenCount(total_max.0.saturating_sub(1)));
    Ok(Capacity { supported: blocks.tokens(block_size), input_max, total_max })
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIXTEEN: BlockSize = BlockSize::new(16).unwrap();
    /// 1024 bytes per block.
    const SHAPE: KvShape = KvShape { layers: 1, key_width: 8, value_width: 8, element_bytes: 4 };
    const FREE: Limits = Limits { input: None, total: None, sequence: None, positions: 4096 };

    fn capacity(budget: u64, limits: Limits) -> Result<(u32, u32, u32, u32), WarmupError> {
        let blocks = blocks(SHAPE, SIXTEEN, budget);
        let capacity = super::capacity(blocks, SIXTEEN, budget, limits)?;
        Ok((blocks.0, capacity.supported.0, capacity.input_max.0, capacity.total_max.0))
    }

    #[test]
    fn defaults_are_the_smallest_of_cache_tokenizer_and_positions() {
        assert_eq!(capacity(10 * 1024 + 5, FREE).unwrap(), (10, 160, 143, 144));
        assert_eq!(capacity(1 << 20, FREE).unwrap(), (1024, 16_384, 4095, 4096));
        let limits = Limits { sequence: Some(TokenCount(100)), ..FREE };
        assert_eq!(capacity(1 << 20, limits).unwrap(), (1024, 16_384, 99, 100));
    }

    #[test]
    fn limits_of_the_user_are_echoed() {
        let limits = Limits { input: Some(TokenCount(50)), total: Some(TokenCount(70)), ..FREE };
        assert_eq!(capacity(10 * 1024, limits).unwrap(), (10, 160, 50, 70));
    }

    #[test]
    fn a_cache_that_cannot_hold_one_request_is_an_error_that_names_the_flag() {
        let limits = Limits { total: Some(TokenCount(145)), ..FREE };
        let text = capacity(10 * 1024, limits).unwrap_err().to_string();
        assert!(text.contains("144 tokens") && text.contains("--max-total-tokens"), "{text}");
        assert!(capacity(1024, FREE).is_err());
    }

    #[test]
    fn more_tokens_than_positions_is_an_error() {
        let limits = Limits { total: Some(TokenCount(5000)), ..FREE };
        assert!(capacity(1 << 30, limits).unwrap_err().to_string().contains("4096 positions"));
    }

    #[test]
    fn the_budget_is_a_share_and_capped() {
        assert_eq!(MemoryShare(0.9).of(1000), 900);
        assert_eq!(MemoryShare(0.9).of(1 << 40), CACHE_BYTES_MAX);
        let device = Device::cpu(std::num::NonZeroUsize::MIN).unwrap();
        let [whole, half] = [1, 2].map(|ranks| MemoryShare(1.0).budget(&device, ranks).unwrap());
        assert!(half > 0 && half <= CACHE_BYTES_MAX / 2 && half < whole, "{half} of {whole}");
    }
}
