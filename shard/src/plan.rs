//! How much of a GPU's memory a model takes, before any of it is taken.
//!
//! The model is loaded onto a device that only counts, without the elements of its matrices, and runs its largest step
//! there: what is counted is what the real device will be asked for.

use kernels::cuda::{Element, Gpu};
use kernels::{DType, OpError, Sequence};
use proto::units::{BlockCount, BlockSize};
use thiserror::Error;

use crate::backend::{Cuda, Device};
use crate::cache::{CacheError, PagedKv};
use crate::collective::Ranks;
use crate::engine::commands::BLOCK_SIZE;
use crate::model::{Blueprint, LoadError, LoadOptions, Model, StepInput};
use crate::weights::{Elements, Partition};

/// What a rank of a model needs, in bytes. The driver, its libraries and the context come on top.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryPlan {
    /// Its part of the weights.
    pub weights: u64,
    /// Everything that the largest step needs besides.
    pub workspace: u64,
    /// A block of the key/value cache, over all layers.
    pub block: u64,
}

/// What is planned for.
#[derive(Clone, Copy, Debug)]
pub struct Assumptions {
    /// The rank.
    pub partition: Partition,
    /// Type of weights and activations.
    pub dtype: DType,
    /// Type of keys and values.
    pub cache: Element,
    /// Tokens of the largest prefill.
    pub tokens: usize,
    /// Requests that are answered at once.
    pub requests: usize,
}

/// Why there is no plan.
#[derive(Debug, Error)]
pub enum PlanError {
    /// The model cannot be loaded.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// The step cannot run, on any device.
    #[error(transparent)]
    Step(#[from] OpError),
    /// The cache of the step cannot be.
    #[error(transparent)]
    Cache(#[from] CacheError),
}

impl MemoryPlan {
    /// Of a model with these options.
    ///
    /// Errors as loading it would, but for what is wrong with the elements of its weights.
    pub fn make(
        blueprint: &Blueprint,
        options: &LoadOptions,
        assumptions: Assumptions,
    ) -> Result<Self, PlanError> {
        let Assumptions { partition, dtype, cache, tokens, requests } = assumptions;
        let gpu = Gpu::ledger(isize::MAX as usize);
        let taken = || -> Result<u64, OpError> {
            let memory = gpu.memory()?;
            Ok((memory.total - memory.free) as u64)
        };
        let device = Device::Cuda(std::sync::Arc::new(Cuda::new(gpu.clone(), dtype, cache)?));
        let options = LoadOptions { elements: Elements::Absent, ..options.clone() };
        let mut model = blueprint.load(&options, device.clone(), Ranks::imagined(partition), |_| ())?;
        let weights = taken()?;
        let shape = model.shape().clone();
        let tokens = tokens.max(1);
        let length = shape.positions_max.min(tokens);
        let blocks = BlockCount(length.div_ceil(BLOCK_SIZE.get() as usize) as u32);
        let mut paged = PagedKv::new(&device, shape.kv, blocks, BLOCK_SIZE)?;
        let without_step = taken()?;
        run_largest_step(&mut *model, &mut paged, tokens, requests)?;
        let block = shape.kv.bytes_per_block(BLOCK_SIZE).map_or(u64::MAX, |bytes| bytes as u64);
        Ok(Self { weights, workspace: taken()? - without_step, block })
    }

    /// Blocks of the cache that fit into `bytes` of memory beside everything else.
    pub fn blocks_in(&self, bytes: u64) -> BlockCount {
        let free = bytes.saturating_sub(self.weights).saturating_sub(self.workspace);
        let most = u64::from(u32::MAX / BlockSize::get(BLOCK_SIZE));
        BlockCount((free / self.block.max(1)).min(most) as u32)
    }
}

/// Prompts of the longest kind, one behind the other, `tokens` tokens in all, with the logits of `requests` of them. Where the
/// cache does not have blocks for all, some share theirs.
///
/// Errors when the cache does not hold one of the prompts, and when the device fails or has no room.
pub(crate) fn run_largest_step(
    model: &mut dyn Model,
    cache: &mut PagedKv,
    tokens: usize,
    requests: usize,
) -> Result<(), OpError> {
    model.reserve(tokens, requests)?;
    let length = model.shape().positions_max.min(tokens);
    let room = length.next_multiple_of(BLOCK_SIZE.get() as usize);
    let prompts_apart = (cache.slots() / room).max(1);
    let slots_of = |prompt: usize| {
        let first = (prompt % prompts_apart * room) as u32;
        (first..first + length as u32).collect::<Vec<_>>()
    };
    let slots: Vec<Vec<u32>> = (0..tokens.div_ceil(length)).map(slots_of).collect();
    let positions: Vec<u32> = (0..tokens).map(|token| (token % length) as u32).collect();
    let sequences: Vec<Sequence<'_>> = slots
        .iter()
        .zip((0..tokens).step_by(length))
        .map(|(slots, first)| {
            let rows = first..tokens.min(first + length);
            Sequence { start: 0, slots: &slots[..rows.len()], rows }
        })
        .collect();
    let logits_at: Vec<u32> = (0..requests.min(tokens) as u32).collect();
    let input = StepInput {
        ids: &vec![0; tokens],
        positions: &positions,
        lengths: &positions.iter().map(|position| position + 1).collect::<Vec<_>>(),
        slots: &slots.concat()[..tokens],
        sequences: &sequences,
        block_size: BLOCK_SIZE.get() as usize,
        logits_at: &logits_at,
        adapters: &[],
    };
    model.forward(&input, cache).map(drop)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn plan(fixture: &str, partition: Partition, tokens: usize) -> MemoryPlan {
        let directory =
            Path::new(env!("CARGO_MANIFEST_DIR")).join("../integration-tests/fixtures").join(fixture);
        let blueprint = Blueprint::read(&directory, partition.world, None).unwrap();
        let assumptions =
            Assumptions { partition, dtype: DType::BF16, cache: Element::BF16, tokens, requests: 2 };
        MemoryPlan::make(&blueprint, &LoadOptions::default(), assumptions).unwrap()
    }

    #[test]
    fn weights_are_as_large_as_their_file_and_split_over_ranks() {
        let path = "../integration-tests/fixtures/llama/model.safetensors";
        let file = std::fs::metadata(Path::new(env!("CARGO_MANIFEST_DIR")).join(path)).unwrap().len();
        let whole = plan("llama", Partition::WHOLE, 64).weights;
        // Rotary tables come on top, norms become f32, and matrices lie in slabs of a MiB and more.
        assert!((file * 9 / 10..file + (2 << 20)).contains(&whole), "{whole} planned, {file} in the file");
        let half = plan("qwen2_split", Partition { rank: 1, world: 2 }, 64).weights;
        assert!(half <= plan("qwen2_split", Partition::WHOLE, 64).weights, "{half}");
    }

    #[test]
    fn the_workspace_grows_with_the_tokens_of_a_step_and_the_rest_does_not() {
        for fixture in ["llama", "mixtral_split", "deepseek_v3", "gpt2", "dbrx"] {
            let (small, large) = (plan(fixture, Partition::WHOLE, 16), plan(fixture, Partition::WHOLE, 900));
            assert!(large.workspace > 4 * small.workspace, "{fixture}: {large:?} and {small:?}");
            assert_eq!((small.weights, small.block), (large.weights, large.block), "{fixture}");
        }
    }

    #[test]
    fn blocks_fill_what_is_left() {
        let plan = MemoryPlan { weights: 100, workspace: 20, block: 30 };
        assert_eq!(
            [plan.blocks_in(119), plan.blocks_in(149), plan.blocks_in(211)],
            [0, 0, 3].map(BlockCount)
        );
    }
}
