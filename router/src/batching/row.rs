//! A running request: what it is, what it holds, how far it got.

use proto::units::TokenCount;

use super::entry::Entry;
use super::plan::{Admission, Grant};
use crate::cache::BlockLease;

/// A request that has a place in the batch.
#[derive(Debug)]
pub(super) struct Row {
    pub(super) entry: Entry,
    pub(super) lease: BlockLease,
    /// Blocks of the lease that the shards know of.
    pub(super) told: usize,
    /// Whether others may use what it computes.
    pub(super) shares: bool,
    pub(super) progress: Progress,
}

/// How far a row got, in tokens. The shards keep the same account.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Progress {
    /// Tokens whose keys and values are stored.
    pub(super) computed: TokenCount,
    /// Tokens that it came with; once they are computed, every pass yields at least one more.
    pub(super) input: TokenCount,
    /// Tokens it feeds into its next pass; 0 if it sits that out.
    pub(super) next: TokenCount,
}

impl Progress {
    /// Whether tokens that it came with are still to be computed.
    pub(super) fn is_input(self) -> bool {
        self.computed < self.input
    }

    /// How many.
    pub(super) fn remaining(self) -> TokenCount {
        TokenCount(self.input.0.saturating_sub(self.computed.0))
    }

    /// The row took part in a pass.
    pub(super) fn advance(&mut self) {
        self.computed.0 += self.next.0;
    }
}

impl Row {
    /// The request as its first pass needs it; `reach` as in [`Admission`].
    pub(super) fn admission(&self, reach: Option<TokenCount>) -> Admission {
        let prompt = self.entry.request.prompt.ids.len();
        Admission {
            id: self.entry.id,
            request: self.entry.request.clone(),
            generated: self.entry.tokens[prompt..].to_vec(),
            blocks: self.lease.blocks().to_vec(),
            reach,
            cached: self.progress.computed,
            chunk: self.progress.next,
        }
    }

    /// What it gets for its next pass, if that has to be said.
    pub(super) fn grant(&self) -> Option<Grant> {
        let tokens = (self.progress.is_input() || self.progress.next.0 == 0).then_some(self.progress.next);
        let blocks = &self.lease.blocks()[self.told..];
        if tokens.is_none() && blocks.is_empty() {
            return None;
        }
        Some(Grant { id: self.entry.id, blocks: blocks.to_vec(), tokens })
    }

    /// Whether everything that it has is computed, so that a pass should have given it a token.
    pub(super) fn is_owed_a_token(&self) -> bool {
        self.progress.next.0 > 0 && self.progress.computed >= self.entry.length()
    }

    /// Tokens the lease has to reach for the next pass of a row that generates.
    pub(super) fn reach_next(&self) -> TokenCount {
        self.entry.length()
    }
}
