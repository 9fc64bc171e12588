//! What a router has decided about the requests of the batches that a step runs: who leaves, who gets blocks, and how much
//! of whom is computed. It is checked as a whole before anything is changed.

use std::collections::{HashMap, HashSet};

use proto::units::{BlockId, BlockSize, RequestId, TokenCount};

use super::batch::Batch;
use super::error::PlanError;
use super::row::Row;

/// One step's decisions. The default decides nothing: the shard goes on as it has planned.
#[derive(Clone, Debug, Default)]
pub struct StepPlan {
    /// What requests get.
    pub grants: Vec<Grant>,
    /// Requests that leave before the step. Those that are not there are ignored.
    pub drops: HashSet<RequestId>,
}

/// What one request gets for a step.
#[derive(Clone, Debug)]
pub struct Grant {
    /// The request.
    pub request: RequestId,
    /// Blocks behind those that it has.
    pub blocks: Vec<BlockId>,
    /// Tokens to feed; what the shard has planned, if absent. With 0 it sits the step out.
    pub tokens: Option<TokenCount>,
}

impl StepPlan {
    /// Whether these batches can be stepped so, in a cache of `slots` slots.
    ///
    /// Errors when a request is not there or named twice, when a block is not one that can be granted, when more tokens are
    /// asked for than are left, and when a token would have no slot.
    pub fn check<'a>(
        &self,
        batches: impl Iterator<Item = &'a Batch>,
        block_size: BlockSize,
        slots: usize,
    ) -> Result<(), PlanError> {
        let mut grants = HashMap::new();
        let mut blocks = HashSet::new();
        for grant in &self.grants {
            if grants.insert(grant.request, grant).is_some() {
                return Err(PlanError::RepeatedGrant(grant.request));
            }
            if let Some(block) = grant.blocks.iter().find(|block| !blocks.insert(**block)) {
                return Err(PlanError::RepeatedBlock(*block));
            }
        }
        let staying = batches.flat_map(Batch::rows).filter(|row| !self.drops.contains(&row.id()));
        for row in staying {
            let grant = grants.remove(&row.id());
            check_row(row, grant, block_size, slots)?;
        }
        // The first of them as they were sent, so that all ranks say the same.
        match self.grants.iter().find(|grant| grants.contains_key(&grant.request)) {
            Some(grant) => Err(PlanError::UnknownRequest(grant.request)),
            None => Ok(()),
        }
    }

    /// Does to the joined batches what has been checked.
    pub fn apply(&self, batch: &mut Batch, block_size: BlockSize) {
        if !self.drops.is_empty() {
            batch.drop_requests(&self.drops);
        }
        let grants: HashMap<_, _> = self.grants.iter().map(|grant| (grant.request, grant)).collect();
        for row in batch.rows_mut() {
            let Some(grant) = grants.get(&row.id()) else { continue };
            row.grant(&grant.blocks, block_size);
            if let Some(TokenCount(tokens)) = grant.tokens {
                row.set_next(tokens as usize);
            }
        }
    }
}

fn check_row(row: &Row, grant: Option<&Grant>, block_size: BlockSize, slots: usize) -> Result<(), PlanError> {
    let request = row.id();
    let mut room = row.slots().len();
    let mut next = row.progress().next;
    if let Some(grant) = grant {
        if !grant.blocks.is_empty() {
            if !row.is_granted() {
                return Err(PlanError::Complete(request));
            }
            let checked = row.slots().check_blocks(&grant.blocks, block_size, slots);
            checked.map_err(|source| PlanError::Block { request, source })?;
            room += grant.blocks.len() * block_size.get() as usize;
        }
        if let Some(tokens) = grant.tokens {
            let left = row.left();
            if tokens.0 as usize > left {
                return Err(PlanError::Tokens { request, tokens, left });
            }
            next = tokens.0 as usize;
        }
    }
    let needed = row.progress().cached + next;
    if !row.is_stopped() && needed > room {
        return Err(PlanError::Slots { request, slots: room, needed });
    }
    Ok(())
}
