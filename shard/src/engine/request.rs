//! A request as it enters the engine, and its way into a batch: every check that needs the model, the tokenizer or the
//! cache is here.

use std::collections::HashSet;

use proto::units::{BatchId, BlockCount, BlockId, BlockSize, RequestId, TokenCount};

use super::adapters::{AdapterId, Adapters};
use super::batch::Batch;
use super::error::{EngineError, RequestError};
use super::row::{Progress, Row};
use super::slots::SlotTable;
use crate::model::ModelShape;
use crate::sampling::SamplingParams;
use crate::text::tokenizer::{SpecialTokens, Tokenizer};

/// A batch that arrives.
#[derive(Clone, Debug)]
pub struct NewBatch {
    /// Its id, which no held batch has.
    pub id: BatchId,
    /// At least one.
    pub requests: Vec<NewRequest>,
}

/// A request that arrives.
#[derive(Clone, Debug)]
pub struct NewRequest {
    /// Unique in its batch.
    pub id: RequestId,
    /// What to continue.
    pub prompt: Prompt,
    /// How many of the prompt's ids, at their end, the request has generated before.
    pub generated: TokenCount,
    /// How tokens are chosen.
    pub sampling: SamplingParams,
    /// When to stop.
    pub stopping: Stopping,
    /// Whether log-probabilities of the prompt are wanted.
    pub prompt_logprobs: bool,
    /// Alternatives to report per token.
    pub top: usize,
    /// Where its keys and values go.
    pub placement: Placement,
    /// Leading tokens that are in the cache already.
    pub cached: TokenCount,
    /// Tokens of the first step; all that are left if absent.
    pub chunk: Option<TokenCount>,
    /// The adapter that changes its tokens.
    pub adapter: Option<AdapterId>,
}

/// A prompt.
#[derive(Clone, Debug)]
pub enum Prompt {
    /// As the router's tokenizer cut it.
    Ids(Vec<u32>),
    /// For a peer that leaves tokenizing to the shard.
    Text {
        /// The text.
        text: String,
        /// Whether it is framed.
        special: SpecialTokens,
        /// Longest prompt; the left side is dropped.
        truncate: TokenCount,
    },
}

/// When a request stops.
#[derive(Clone, Debug)]
pub struct Stopping {
    /// Tokens to generate at most.
    pub tokens_max: TokenCount,
    /// Texts that end it.
    pub strings: Vec<String>,
    /// Goes on after an end-of-sequence token.
    pub ignore_end_of_sequence: bool,
}

/// Where keys and values go.
#[derive(Clone, Debug)]
pub enum Placement {
    /// The router has leased blocks.
    Given {
        /// Number of blocks.
        blocks: BlockCount,
        /// Slot of each position.
        slots: SlotTable,
    },
    /// The router has leased the first blocks, and grants others as they are needed.
    Granted {
        /// Of the first step, at least.
        blocks: Vec<BlockId>,
    },
    /// The shard numbers the blocks of the batch from 0.
    Numbered,
}

/// What new requests are checked against.
#[derive(Clone, Copy)]
pub struct Admission<'a> {
    /// The model's tokenizer.
    pub tokenizer: &'a Tokenizer,
    /// Sizes of the model.
    pub shape: &'a ModelShape,
    /// Slots of the cache.
    pub slots: usize,
    /// Tokens per block.
    pub block_size: BlockSize,
    /// The adapters that are loaded.
    pub adapters: &'a Adapters,
}

impl Admission<'_> {
    /// Rows for the requests of a batch. If one of them cannot be served, the batch cannot.
    pub fn batch(&self, new: NewBatch) -> Result<Batch, EngineError> {
        let mut seen = HashSet::new();
        if let Some(request) = new.requests.iter().map(|request| request.id).find(|id| !seen.insert(*id)) {
            return Err(EngineError::RepeatedRequest { batch: new.id, request });
        }
        let mut next_block = BlockId(0);
        let rows = new
            .requests
            .into_iter()
            .map(|request| {
                let id = request.id;
                self.row(request, &mut next_block)
                    .map_err(|source| EngineError::Request { request: id, source })
            })
            .collect::<Result<Vec<_>, _>>()?;
        if rows.is_empty() {
            return Err(EngineError::EmptyBatch(new.id));
        }
        Ok(Batch::new(new.id, rows))
    }

    /// Ids of a prompt, each of them known to the model.
    pub fn prompt_ids(&self, prompt: Prompt) -> Result<Vec<u32>, RequestError> {
        let ids = match prompt {
            Prompt::Ids(ids) => ids,
            Prompt::Text { text, special, truncate } => self.tokenizer.encode(&text, special, truncate)?,
        };
        if ids.is_empty() {
            return Err(RequestError::EmptyPrompt);
        }
        self.known(ids.iter().copied())?;
        Ok(ids)
    }

    fn row(&self, request: NewRequest, next_block: &mut BlockId) -> Result<Row, RequestError> {
        check_resumption(&request)?;
        let mut ids = self.prompt_ids(request.prompt)?;
        let new = request.stopping.tokens_max;
        if new.0 == 0 {
            return Err(RequestError::NoNewTokens);
        }
        let progress = Progress::new(ids.len(), request.cached, request.chunk)?;
        let generated = ids.split_off(ids.len() - request.generated.0 as usize);
        // The last token is never fed back.
        let reach = ids.len() + new.0 as usize - 1;
        if reach > self.shape.positions_max {
            let limit = self.shape.positions_max;
            return Err(RequestError::Positions { prompt: ids.len(), new, limit });
        }
        let adapter = request.adapter.map(|id| self.adapters.find(&id)).transpose()?;
        let granted = matches!(request.placement, Placement::Granted { .. });
        // Later positions of such a request are looked at when their step comes.
        let needed = if granted { progress.cached + progress.next } else { reach };
        let (blocks, slots) = self.place(request.placement, needed, next_block)?;
        let mut row = Row::new(super::row::Parts {
            id: request.id,
            ids,
            progress,
            blocks,
            slots,
            granted,
            sampling: request.sampling,
            stopping: request.stopping,
            prompt_logprobs: request.prompt_logprobs,
            top: request.top,
            adapter,
        });
        row.resume(&generated, self.tokenizer)?;
        Ok(row)
    }

    fn known(&self, mut ids: impl Iterator<Item = u32>) -> Result<(), RequestError> {
        let vocabulary = self.shape.vocabulary;
        match ids.find(|id| *id as usize >= vocabulary) {
            Some(id) => Err(RequestError::Vocabulary { id, vocabulary }),
            None => Ok(()),
        }
    }

    /// Blocks and slots, of which `needed` positions must have one.
    fn place(
        &self,
        placement: Placement,
        needed: usize,
        next_block: &mut BlockId,
    ) -> Result<(BlockCount, SlotTable), RequestError> {
        match placement {
            Placement::Given { blocks, slots } => {
                enough(slots.len(), needed)?;
                if !slots.make_up_blocks(self.block_size) {
                    return Err(RequestError::SlotBlocks { block_size: self.block_size });
                }
                match slots.last_used().filter(|slot| slot.index() >= self.slots) {
                    Some(slot) => Err(RequestError::SlotRange { slot, limit: self.slots }),
                    None => Ok((blocks, slots)),
                }
            }
            Placement::Granted { blocks } => {
                let mut slots = SlotTable::default();
                slots.check_blocks(&blocks, self.block_size, self.slots)?;
                slots.extend(&blocks, self.block_size);
                enough(slots.len(), needed)?;
                Ok((BlockCount(blocks.len() as u32), slots))
            }
            Placement::Numbered => {
                let blocks = TokenCount(needed as u32).blocks(self.block_size);
                let end = u64::from(next_block.0) + u64::from(blocks.0);
                let needed = end * u64::from(self.block_size.get());
                if needed > self.slots as u64 {
                    return Err(RequestError::CacheFull { needed, limit: self.slots });
                }
                let numbers = next_block.0..next_block.0 + blocks.0;
                next_block.0 = numbers.end;
                Ok((blocks, SlotTable::of_blocks(numbers.map(BlockId), self.block_size)))
            }
        }
    }
}

fn enough(slots: usize, needed: usize) -> Result<(), RequestError> {
    if slots < needed { Err(RequestError::Slots { slots, needed }) } else { Ok(()) }
}

/// Whether a request may go on behind what it says it has generated before.
fn check_resumption(request: &NewRequest) -> Result<(), RequestError> {
    let generated = request.generated;
    if generated.0 == 0 {
        return Ok(());
    }
    let ids = match &request.prompt {
        Prompt::Ids(ids) => ids.len(),
        Prompt::Text { .. } => 0,
    };
    if generated.0 as usize >= ids {
        return Err(RequestError::Generated { generated, ids });
    }
    let new = request.stopping.tokens_max;
    if generated >= new {
        return Err(RequestError::Exhausted { generated, new });
    }
    if request.prompt_logprobs {
        return Err(RequestError::LatePromptLogprobs);
    }
    Ok(())
}
