//! Blocks and leases on them.
//!
//! A block is free, or in the tree of prefixes, or belongs to one lease. A lease cannot be copied, and only
//! [`BlockCache::release`] and [`BlockCache::finish`] consume it, so blocks return exactly once, however a request ends. What
//! a row has computed is published block by block, and nothing else is: blocks that were never computed, of requests that
//! failed or left, cannot get into the tree.

use proto::units::{BlockCount, BlockId, BlockSize, TokenCount, TokenId};
use thiserror::Error;

use super::prefix::{NodeId, PrefixTree};

/// All blocks of the cache but block 0: health probes and padding rows write there.
#[derive(Debug)]
pub struct BlockCache {
    /// The last one is handed out next.
    free: Vec<BlockId>,
    tree: PrefixTree,
    /// Blocks that belong to one lease alone.
    leased: BlockCount,
    total: BlockCount,
    block_size: BlockSize,
    /// Whether blocks are published at all.
    shares: bool,
}

/// Blocks held by one request, in position order. Must go back through [`BlockCache::release`]; dropping it instead
/// panics in debug builds.
#[must_use = "leased blocks come back only through BlockCache::release"]
#[derive(Debug)]
pub struct BlockLease {
    blocks: Vec<BlockId>,
    /// Which of them nobody else has.
    own: Vec<bool>,
    /// The path in the tree that this lease holds, and its length in blocks; `None` once it is released.
    tip: Option<NodeId>,
    published: usize,
}

/// The books do not balance: a block was lost or given back twice.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[error("{free} free, {cached} cached and {leased} leased blocks do not make {total}")]
pub struct IntegrityError {
    /// Blocks on the free list.
    pub free: BlockCount,
    /// Blocks in the tree of prefixes.
    pub cached: BlockCount,
    /// Blocks that belong to one lease.
    pub leased: BlockCount,
    /// Blocks there are, the reserved one left out.
    pub total: BlockCount,
}

impl BlockCache {
    /// A cache of `blocks` blocks, the reserved one included. Whether prefixes are shared, `shares` says.
    pub fn new(blocks: BlockCount, block_size: BlockSize, shares: bool) -> Self {
        // Lowest on top, so that the first leases are contiguous and ascending.
        let free: Vec<BlockId> = (1..blocks.0).rev().map(BlockId).collect();
        let total = BlockCount(blocks.0.saturating_sub(1));
        Self { free, tree: PrefixTree::new(block_size), leased: BlockCount(0), total, block_size, shares }
    }

    /// What [`lease`](Self::lease) would find of `tokens`, and how many blocks could be had besides.
    pub fn probe(&self, namespace: Option<&str>, tokens: &[TokenId]) -> (TokenCount, BlockCount) {
        let (found, idle) = match self.shares {
            true => self.tree.probe(namespace, self.reusable(tokens)),
            false => Default::default(),
        };
        (found.tokens(self.block_size), BlockCount(self.available().0 - idle.0))
    }

    /// A lease on the blocks that hold the longest known beginning of `tokens`, and how many tokens that is. The last token
    /// is never among them: there would be nothing to compute.
    pub fn lease(&mut self, namespace: Option<&str>, tokens: &[TokenId]) -> (BlockLease, TokenCount) {
        let known = if self.shares { self.reusable(tokens) } else { &[] };
        let (tip, blocks) = self.tree.hold(namespace, known);
        let cached = BlockCount(blocks.len() as u32).tokens(self.block_size);
        let published = blocks.len();
        (BlockLease { own: vec![false; published], blocks, tip: Some(tip), published }, cached)
    }

    /// Lets a lease reach `tokens` tokens; blocks that nobody uses are evicted for it. False, and nothing is changed, if
    /// there are too few.
    pub fn extend(&mut self, lease: &mut BlockLease, tokens: TokenCount) -> bool {
        let wanted = tokens.blocks(self.block_size).0 as usize;
        let missing = wanted.saturating_sub(lease.blocks.len());
        if missing > self.available().0 as usize {
            return false;
        }
        for _ in 0..missing {
            let block = self.free.pop().or_else(|| self.tree.evict());
            lease.blocks.push(block.expect("as many are available"));
            lease.own.push(true);
        }
        self.leased.0 += missing as u32;
        true
    }

    /// Blocks that [`extend`](Self::extend) would have to take for this lease to reach `tokens` tokens.
    pub fn missing(&self, lease: &BlockLease, tokens: TokenCount) -> BlockCount {
        BlockCount(tokens.blocks(self.block_size).0.saturating_sub(lease.count().0))
    }

    /// Lets others use the whole blocks of a lease whose keys and values are computed: those of the first `computed`
    /// tokens of `tokens`. It ends at the first that the tree has from somebody else: a lease holds no second copy of what
    /// it has, so that one that is alone always finds room.
    pub fn publish(&mut self, lease: &mut BlockLease, tokens: &[TokenId], computed: TokenCount) {
        while let Some((tip, run)) = self.unpublished(lease, tokens, computed) {
            if self.tree.has(tip, run) {
                return;
            }
            self.publish_next(lease, tip, run);
        }
    }

    /// Gives the blocks of a lease back, of which the first `computed` tokens of `tokens` are computed. Those that nobody
    /// had yet stay in the tree until they are needed.
    pub fn finish(&mut self, mut lease: BlockLease, tokens: &[TokenId], computed: TokenCount) {
        while let Some((tip, run)) = self.unpublished(&lease, tokens, computed) {
            self.publish_next(&mut lease, tip, run);
        }
        self.release(lease);
    }

    /// Gives the blocks of a lease back. Those that are published stay in the tree until they are needed.
    pub fn release(&mut self, mut lease: BlockLease) {
        let blocks = std::mem::take(&mut lease.blocks);
        let own = std::mem::take(&mut lease.own);
        if let Some(tip) = lease.tip.take() {
            self.tree.release(tip);
        }
        let before = self.free.len();
        self.free.extend(blocks.into_iter().zip(own).rev().filter(|(_, own)| *own).map(|(block, _)| block));
        self.leased.0 -= (self.free.len() - before) as u32;
    }

    /// Where the next block of a lease would be published, and the tokens in it, if it is computed.
    fn unpublished<'a>(
        &self,
        lease: &BlockLease,
        tokens: &'a [TokenId],
        computed: TokenCount,
    ) -> Option<(NodeId, &'a [TokenId])> {
        let size = self.block_size.get() as usize;
        let whole = (computed.0 as usize).min(tokens.len()) / size;
        if !self.shares || lease.published >= whole {
            return None;
        }
        Some((lease.tip?, &tokens[lease.published * size..][..size]))
    }

    fn publish_next(&mut self, lease: &mut BlockLease, tip: NodeId, run: &[TokenId]) {
        let index = lease.published;
        let (tip, taken) = self.tree.grow(tip, run, lease.blocks[index]);
        if taken {
            lease.own[index] = false;
            self.leased.0 -= 1;
        }
        (lease.tip, lease.published) = (Some(tip), index + 1);
    }

    /// Blocks that can be leased now: free ones, and those that can be evicted.
    pub fn available(&self) -> BlockCount {
        BlockCount(self.free.len() as u32 + self.tree.idle().0)
    }

    /// Blocks that rows hold, each counted once.
    pub fn held(&self) -> BlockCount {
        BlockCount(self.total.0 - self.available().0)
    }

    /// Blocks that belong to one lease alone.
    pub fn leased(&self) -> BlockCount {
        self.leased
    }

    /// Blocks in the tree of prefixes, whether a row holds them or not.
    pub fn cached(&self) -> BlockCount {
        self.tree.blocks()
    }

    /// Those of them that no row holds.
    pub fn idle(&self) -> BlockCount {
        self.tree.idle()
    }

    /// Blocks there are.
    pub fn total(&self) -> BlockCount {
        self.total
    }

    /// Checks that free, cached and leased blocks make all blocks.
    pub fn integrity(&self) -> Result<(), IntegrityError> {
        let free = BlockCount(self.free.len() as u32);
        let (cached, leased, total) = (self.cached(), self.leased, self.total);
        if free.0 + cached.0 + leased.0 == total.0 {
            return Ok(());
        }
        Err(IntegrityError { free, cached, leased, total })
    }

    /// Checks the tree node by node: for tests, since it takes as long as the tree is large.
    #[cfg(test)]
    pub(crate) fn check_tree(&self) {
        self.tree.check();
    }

    /// The tokens whose keys and values may come from others: all but the last.
    fn reusable<'a>(&self, tokens: &'a [TokenId]) -> &'a [TokenId] {
        &tokens[..tokens.len().saturating_sub(1)]
    }
}

impl BlockLease {
    /// The blocks, in position order.
    pub fn blocks(&self) -> &[BlockId] {
        &self.blocks
    }

    /// How many they are.
    pub fn count(&self) -> BlockCount {
        BlockCount(self.blocks.len() as u32)
    }

    /// How many of them nobody else has.
    pub fn own(&self) -> BlockCount {
        BlockCount(self.own.iter().filter(|own| **own).count() as u32)
    }
}

impl Drop for BlockLease {
    fn drop(&mut self) {
        // While unwinding there is a first panic to be read; a second would abort the process.
        debug_assert!(
            self.tip.is_none() || std::thread::panicking(),
            "a lease of {} blocks was dropped instead of released",
            self.blocks.len()
        );
    }
}
