//! What one step does: who leaves, who joins, who goes on.

use std::sync::Arc;

use proto::units::{BatchId, BlockId, BlockSize, RequestId, SlotIndex, TokenCount};

use crate::request::ValidRequest;

/// One step. Rows leave first; then one pass computes the joining rows, the rows that run already, or both.
#[derive(Clone, Debug, Default)]
pub struct StepPlan {
    /// Rows that leave before the pass. Shards forget a batch by themselves when all its rows stop at once, so some of
    /// these may be gone already.
    pub drops: Vec<RequestId>,
    /// Rows that join.
    pub batch: Option<NewBatch>,
    /// Whether the rows that run already take part: each feeds its newest token, or the next piece of its prompt.
    pub continues: bool,
}

/// Rows that join the running ones. Never empty.
#[derive(Clone, Debug)]
pub struct NewBatch {
    /// Counts from 0.
    pub id: BatchId,
    /// In order of arrival.
    pub admissions: Vec<Admission>,
    /// What let them in while others run; `None` if nothing runs.
    pub joins: Option<JoinReason>,
}

/// A request that enters its first pass.
#[derive(Clone, Debug)]
pub struct Admission {
    /// Names the request until its end.
    pub id: RequestId,
    /// What to generate.
    pub request: Arc<ValidRequest>,
    /// Cache blocks for `reach` tokens, in position order.
    pub blocks: Vec<BlockId>,
    /// Tokens whose keys and values the request may store.
    pub reach: TokenCount,
    /// Leading prompt tokens whose keys and values are in the blocks already.
    pub cached: TokenCount,
    /// Prompt tokens to compute in this pass, at least one; the shards continue an unfinished prompt by themselves.
    pub chunk: TokenCount,
}

/// Why new rows may join those that run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum JoinReason {
    /// The pass has room for their prompts, or for pieces of them.
    Chunking,
    /// As many wait as make it worth to stop the others for a pass.
    Backpressure,
    /// They waited long enough.
    WaitExceeded,
}

/// What a pass is called on the wire and in the metrics.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StepKind {
    /// With new rows.
    Prefill,
    /// Without.
    Decode,
}

impl StepPlan {
    /// What kind of pass this is; `None` if rows only leave.
    pub fn kind(&self) -> Option<StepKind> {
        match (&self.batch, self.continues) {
            (Some(_), _) => Some(StepKind::Prefill),
            (None, true) => Some(StepKind::Decode),
            (None, false) => None,
        }
    }

    /// Whether the rows that run already are lost if this step fails: it advances them, or takes rows out of their
    /// batch.
    pub fn touches_running(&self) -> bool {
        self.continues || !self.drops.is_empty()
    }
}

impl Admission {
    /// The cache slot of each position the request may reach.
    pub fn slots(&self, block_size: BlockSize) -> impl Iterator<Item = SlotIndex> {
        self.blocks.iter().flat_map(move |block| block.slots(block_size)).take(self.reach.0 as usize)
    }

    /// Whether prompt tokens are left after the first chunk.
    pub fn is_cut(&self) -> bool {
        self.cached.0 + self.chunk.0 < self.request.prompt.length().0
    }
}
