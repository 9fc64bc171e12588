//! What one step does: who leaves, who joins, who goes on.

use std::sync::Arc;

use proto::units::{BatchId, BlockId, BlockSize, RequestId, SlotIndex, TokenCount, TokenId};

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
    /// What rows that run already get for this pass; those that are not named feed what is left, which is the next token of
    /// a row that generates.
    pub grants: Vec<Grant>,
}

/// What a running row gets for a pass.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Grant {
    /// The row.
    pub id: RequestId,
    /// Blocks behind those it has, in position order.
    pub blocks: Vec<BlockId>,
    /// Tokens it feeds, 0 to sit the pass out; `None` is the next token of a row that generates.
    pub tokens: Option<TokenCount>,
}

/// Rows that join the running ones. Never empty.
#[derive(Clone, Debug)]
pub struct NewBatch {
    /// Counts from 0.
    pub id: BatchId,
    /// In the order in which they are served.
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
    /// What it has generated before it had to leave; the pass feeds this behind the prompt.
    pub generated: Vec<TokenId>,
    /// Cache blocks, in position order.
    pub blocks: Vec<BlockId>,
    /// Tokens that the blocks are for, if that is all it will ever get; `None` if more is granted when it is needed.
    pub reach: Option<TokenCount>,
    /// Leading tokens whose keys and values are in the blocks already.
    pub cached: TokenCount,
    /// Tokens to compute in this pass, at least one.
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
    /// The cache slot of each position that the blocks are for.
    pub fn slots(&self, block_size: BlockSize) -> impl Iterator<Item = SlotIndex> {
        let reach = self.reach.map_or(usize::MAX, |tokens| tokens.0 as usize);
        self.blocks.iter().flat_map(move |block| block.slots(block_size)).take(reach)
    }

    /// Tokens it comes with: those of the prompt, and those generated before.
    pub fn length(&self) -> TokenCount {
        TokenCount(self.request.prompt.length().0 + self.generated.len() as u32)
    }

    /// Whether tokens are left after the first chunk.
    pub fn is_cut(&self) -> bool {
        self.cached.0 + self.chunk.0 < self.length().0
    }
}
