//! What can go wrong at the engine, in its own words. The text is what a caller reads.

use kernels::OpError;
use kernels::collective::GroupError;
use proto::units::{BatchId, BlockId, BlockSize, RequestId, SlotIndex, TokenCount};

use crate::cache::CacheError;
use crate::sampling::NotNumbers;
use crate::text::tokenizer::TokenizerError;

/// Why a command was not carried out. Batches that it did not name are as they were.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// No such batch is held. The text is the contract's.
    #[error("Batch ID {0} not found in cache.")]
    UnknownBatch(BatchId),
    /// A new batch has the id of one that is held.
    #[error("batch {0} exists already")]
    BatchExists(BatchId),
    /// One batch is named twice.
    #[error("batch {0} is named twice")]
    RepeatedBatch(BatchId),
    /// A call without the batch it is about.
    #[error("batch is missing")]
    MissingBatch,
    /// Nothing to decode.
    #[error("no batch is named")]
    NoBatch,
    /// A batch without requests.
    #[error("batch {0} has no requests")]
    EmptyBatch(BatchId),
    /// Two requests of a batch have one id.
    #[error("request {request} is in batch {batch} twice")]
    RepeatedRequest {
        /// The batch.
        batch: BatchId,
        /// The request.
        request: RequestId,
    },
    /// A request to keep is not in the batch.
    #[error("request {request} is not in batch {batch}")]
    UnknownRequest {
        /// The batch.
        batch: BatchId,
        /// The request.
        request: RequestId,
    },
    /// A filter that keeps nothing.
    #[error("no request of batch {0} is kept; clear the batch instead")]
    KeepsNothing(BatchId),
    /// One request of the batch cannot be served; the batch was not added.
    #[error("request {request}: {source}")]
    Request {
        /// The request.
        request: RequestId,
        /// What is wrong with it.
        source: RequestError,
    },
    /// The router's plan for a step cannot be carried out; nothing was changed.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// Steps need a cache, and only a warm-up makes one.
    #[error("the shard has no cache yet: Warmup must come first")]
    NotWarm,
    /// An adapter of this id is loaded already.
    #[error("adapter `{0}` is loaded already")]
    AdapterExists(String),
    /// The warm-up failed.
    #[error(transparent)]
    Warmup(#[from] WarmupError),
    /// The forward pass refused its input.
    #[error("forward pass: {0}")]
    Forward(#[from] OpError),
    /// The device has failed: nothing can run on it any more.
    #[error("the device failed in a step of {}: {source}", named(.requests))]
    Device {
        /// The requests of the step.
        requests: Vec<RequestId>,
        /// What was running, and what the device says.
        source: OpError,
    },
    /// The forward pass produced a row that is not a distribution.
    #[error("request {request}: {source}")]
    Logits {
        /// The request.
        request: RequestId,
        /// What they are.
        source: NotNumbers,
    },
    /// The ranks could not agree.
    #[error("the other shards of this model: {0}")]
    Ranks(#[from] GroupError),
    /// A defect in the engine; the batches of the step are lost, the engine goes on.
    #[error("the engine failed in this step: {0}")]
    Panicked(String),
    /// The engine thread has ended.
    #[error("the engine has stopped")]
    Gone,
}

impl EngineError {
    /// Whether it can come up on one rank alone, in the middle of what all do together. All other errors come of what
    /// all ranks have been sent and of numbers that they share: before a step, or on all of them after it.
    pub(super) fn parts_ranks(&self) -> bool {
        match self {
            Self::Warmup(_) | Self::Forward(_) | Self::Ranks(_) | Self::Panicked(_) => true,
            Self::UnknownBatch(_)
            | Self::BatchExists(_)
            | Self::RepeatedBatch(_)
            | Self::MissingBatch
            | Self::NoBatch
            | Self::EmptyBatch(_)
            | Self::RepeatedRequest { .. }
            | Self::UnknownRequest { .. }
            | Self::KeepsNothing(_)
            | Self::Request { .. }
            | Self::Plan(_)
            | Self::NotWarm
            | Self::AdapterExists(_)
            | Self::Logits { .. }
            | Self::Gone => false,
            Self::Device { .. } => true,
        }
    }

    /// Whether a step was refused before anything was changed, and the router knows that what it holds is as it was. Other
    /// errors say that batches are lost, or that router and shard do not agree on which there are.
    pub fn is_refusal(&self) -> bool {
        matches!(self, Self::Request { .. } | Self::Plan(_))
    }

    /// Whether this process can make no more steps.
    pub(super) fn is_final(&self) -> bool {
        let of_device = |error: &OpError| matches!(error, OpError::Device { .. });
        match self {
            Self::Device { .. } => true,
            Self::Forward(source) => of_device(source),
            Self::Warmup(WarmupError::Step(source)) => source.is_final(),
            Self::Warmup(WarmupError::Prefill { source, .. }) => of_device(source),
            _ => false,
        }
    }

    /// Of a step of these requests.
    pub(super) fn in_step(self, requests: impl Iterator<Item = RequestId>) -> Self {
        match self {
            Self::Forward(source) if matches!(source, OpError::Device { .. }) => {
                Self::Device { requests: requests.collect(), source }
            }
            other => other,
        }
    }
}

/// Requests by their numbers, of which a line holds a few.
fn named(requests: &[RequestId]) -> String {
    const SHOWN: usize = 16;
    let shown: Vec<String> = requests.iter().take(SHOWN).map(RequestId::to_string).collect();
    let more = requests.len().saturating_sub(SHOWN);
    let rest = if more > 0 { format!(" and {more} more") } else { String::new() };
    format!("requests {}{rest}", shown.join(", "))
}

/// Why a router's plan for a step cannot be carried out.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    /// A grant for a request that is not there, or leaves.
    #[error("a grant names request {0}, which is in no batch of this step")]
    UnknownRequest(RequestId),
    /// Two grants for one request.
    #[error("two grants name request {0}")]
    RepeatedGrant(RequestId),
    /// One block for two requests, or for one twice.
    #[error("block {0} is granted twice")]
    RepeatedBlock(BlockId),
    /// A block that cannot be granted.
    #[error("request {request}: {source}")]
    Block {
        /// The request.
        request: RequestId,
        /// What is wrong with it.
        source: BlockError,
    },
    /// Where slots came with the request, its blocks are all there.
    #[error("request {0} came with its slots and takes no further blocks")]
    Complete(RequestId),
    /// More than there is to feed.
    #[error("request {request}: {tokens} tokens are granted, {left} are left")]
    Tokens {
        /// The request.
        request: RequestId,
        /// Tokens of the grant.
        tokens: TokenCount,
        /// Tokens to feed.
        left: usize,
    },
    /// A token without a place.
    #[error("request {request}: {slots} slots for {needed} token positions")]
    Slots {
        /// The request.
        request: RequestId,
        /// Slots that it has, with those of the grant.
        slots: usize,
        /// Positions it would have reached with this step.
        needed: usize,
    },
    /// Somebody must stay for a step to be made.
    #[error("all requests of the batches leave; clear the batches instead")]
    NobodyStays,
}

/// What is wrong with a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BlockError {
    /// Health probes and padding write there.
    #[error("block 0 is reserved")]
    Reserved,
    /// A block beyond the cache.
    #[error("block {block} is outside of the cache of {limit} blocks")]
    Range {
        /// The block.
        block: BlockId,
        /// Blocks of the cache.
        limit: usize,
    },
    /// Two positions would share a slot.
    #[error("block {0} is there twice")]
    Repeated(BlockId),
}

/// What is wrong with one request.
#[derive(Debug, thiserror::Error)]
pub enum RequestError {
    /// A message field that must be set is not.
    #[error("{0} is missing")]
    Missing(&'static str),
    /// A number outside of its domain.
    #[error("{name} is {value}, but must be {expected}")]
    Parameter {
        /// The field.
        name: &'static str,
        /// What it is.
        value: f32,
        /// What it may be.
        expected: &'static str,
    },
    /// Something this version does not serve.
    #[error("{0} is not supported by this shard")]
    Unsupported(&'static str),
    /// An adapter that is not loaded.
    #[error("adapter `{0}` is not loaded")]
    Adapter(String),
    /// A text model takes one text.
    #[error("exactly one text chunk is required, not {0}")]
    TextChunks(usize),
    /// The prompt is not a text of this model.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// Nothing to start from.
    #[error("the prompt has no tokens")]
    EmptyPrompt,
    /// A prompt token, or a token with a bias, that the model does not have.
    #[error("token {id} is outside of the vocabulary of {vocabulary}")]
    Vocabulary {
        /// The token.
        id: u32,
        /// Width of the logits.
        vocabulary: usize,
    },
    /// Nothing to generate.
    #[error("max_new_tokens must be at least 1")]
    NoNewTokens,
    /// More positions than the model was made for.
    #[error("a prompt of {prompt} tokens and {new} new ones exceed the model's {limit} positions")]
    Positions {
        /// Tokens of the prompt.
        prompt: usize,
        /// Most tokens to generate.
        new: TokenCount,
        /// Positions of the model.
        limit: usize,
    },
    /// A request that goes on needs a prompt to go on from.
    #[error("generated is {generated}, but must be below the number of input_ids, which is {ids}")]
    Generated {
        /// Tokens that were generated before.
        generated: TokenCount,
        /// Those and the prompt.
        ids: usize,
    },
    /// Nothing left to generate.
    #[error("generated is {generated}, but must be below max_new_tokens, which is {new}")]
    Exhausted {
        /// Tokens that were generated before.
        generated: TokenCount,
        /// Most tokens to generate.
        new: TokenCount,
    },
    /// A request that has come to its end does not go on.
    #[error("token {index} of the {generated} that were generated before ends the request")]
    Ended {
        /// Which of them, counted from 1.
        index: usize,
        /// How many they are.
        generated: usize,
    },
    /// They came with the first token, which has been delivered.
    #[error("prefill_logprobs cannot be had of a request that has generated tokens before")]
    LatePromptLogprobs,
    /// A cached prefix leaves nothing to compute.
    #[error("cache_len {cached} must be below the request's {given} tokens")]
    CacheLength {
        /// Cached tokens.
        cached: TokenCount,
        /// Tokens that came with the request.
        given: usize,
    },
    /// A first chunk that is not there.
    #[error("chunk_len {chunk} must be between 1 and the {remaining} tokens that are not cached")]
    Chunk {
        /// Tokens of the chunk.
        chunk: TokenCount,
        /// Tokens to compute.
        remaining: usize,
    },
    /// Not every position has a place in the cache.
    #[error("{slots} slots for {needed} token positions")]
    Slots {
        /// Slots that came with the request.
        slots: usize,
        /// Positions it may reach.
        needed: usize,
    },
    /// A block that it cannot have.
    #[error(transparent)]
    Block(#[from] BlockError),
    /// A place beyond the cache.
    #[error("slot {slot} is outside of the cache of {limit} slots")]
    SlotRange {
        /// The slot.
        slot: SlotIndex,
        /// Slots of the cache.
        limit: usize,
    },
    /// Keys and values are stored block by block.
    #[error("the slots of the request do not make up blocks of {block_size} tokens")]
    SlotBlocks {
        /// Tokens per block.
        block_size: BlockSize,
    },
    /// The shard numbers the blocks, and there are not enough of them.
    #[error("the batch needs {needed} cache slots, there are {limit}")]
    CacheFull {
        /// Slots up to and including this request.
        needed: u64,
        /// Slots of the cache.
        limit: usize,
    },
}

/// Why a shard cannot be warmed up. The remedies are named by the flag that brings them.
#[derive(Debug, thiserror::Error)]
pub enum WarmupError {
    /// The buffers of the largest prefill cannot be had.
    #[error(
        "not enough memory for a prefill of {tokens} tokens; decrease --max-batch-prefill-tokens ({source})"
    )]
    Prefill {
        /// Tokens of the largest prefill.
        tokens: usize,
        /// What the model says.
        source: OpError,
    },
    /// The warm-up's own step failed.
    #[error("the warm-up step failed: {0}")]
    Step(Box<EngineError>),
    /// The memory of this machine cannot be read.
    #[error("the memory of this machine cannot be read: {0}")]
    Probe(String),
    /// Not one request fits.
    #[error(
        "{budget} bytes of memory hold a cache of {supported} tokens, but one request may have {total} (max_total_tokens); \
         decrease --max-total-tokens or free memory"
    )]
    Capacity {
        /// Bytes the cache may take.
        budget: u64,
        /// Tokens that fit.
        supported: TokenCount,
        /// Tokens of the longest request.
        total: TokenCount,
    },
    /// The user asks for longer sequences than the model has positions.
    #[error("max_total_tokens is {total}, but the model has {limit} positions; decrease --max-total-tokens")]
    Positions {
        /// What was asked for.
        total: TokenCount,
        /// Positions of the model.
        limit: usize,
    },
    /// The cache cannot be made.
    #[error(transparent)]
    Cache(#[from] CacheError),
    /// The device does not say how much memory there is.
    #[error(transparent)]
    Device(#[from] OpError),
}

/// Why the shard is not healthy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unhealthy {
    /// The engine thread has ended.
    #[error("the engine has stopped")]
    Stopped,
    /// There is no cache: no warm-up has succeeded.
    #[error("the engine is not warmed up")]
    Cold,
    /// A step does not come back.
    #[error("the current step has been running for {seconds} s")]
    Stuck {
        /// How long.
        seconds: u64,
    },
}
