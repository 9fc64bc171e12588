//! The pool of cache blocks, and leases on them.
//!
//! A block has one holder at a time: the free list, or one lease. A lease cannot be copied, and only
//! [`BlockPool::release`] consumes it, so blocks return exactly once, however a request ends.

use proto::units::{BlockCount, BlockId, BlockSize, TokenCount};
use thiserror::Error;

/// Blocks that nobody holds, and the number of those that somebody does.
#[derive(Debug)]
pub struct BlockPool {
    /// The last one is handed out next.
    free: Vec<BlockId>,
    leased: BlockCount,
    total: BlockCount,
    block_size: BlockSize,
}

/// Blocks held by one request, in position order. Must go back through [`BlockPool::release`]; dropping it instead
/// panics in debug builds.
#[must_use = "leased blocks come back only through BlockPool::release"]
#[derive(Debug)]
pub struct BlockLease {
    blocks: Vec<BlockId>,
}

/// The books of the pool do not balance: a block was lost or given back twice.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[error("{free} free and {leased} leased blocks do not make {total}")]
pub struct IntegrityError {
    /// Blocks on the free list.
    pub free: BlockCount,
    /// Blocks that are leased.
    pub leased: BlockCount,
    /// Blocks there are, the reserved one left out.
    pub total: BlockCount,
}

impl BlockPool {
    /// All blocks of a cache of `blocks` blocks, except block 0: health probes and padding rows write there.
    pub fn new(blocks: BlockCount, block_size: BlockSize) -> Self {
        // Lowest on top, so that the first leases are contiguous and ascending.
        let free: Vec<BlockId> = (1..blocks.0).rev().map(BlockId).collect();
        let total = BlockCount(blocks.0.saturating_sub(1));
        Self { free, leased: BlockCount(0), total, block_size }
    }

    /// Takes enough blocks for this many tokens, or nothing if too few are free.
    pub fn lease(&mut self, tokens: TokenCount) -> Option<BlockLease> {
        let wanted = tokens.blocks(self.block_size);
        let kept = self.free.len().checked_sub(wanted.0 as usize)?;
        let mut blocks = self.free.split_off(kept);
        blocks.reverse();
        self.leased.0 += wanted.0;
        Some(BlockLease { blocks })
    }

    /// Gives the blocks of a lease back.
    pub fn release(&mut self, mut lease: BlockLease) {
        let blocks = std::mem::take(&mut lease.blocks);
        self.leased.0 -= blocks.len() as u32;
        self.free.extend(blocks.into_iter().rev());
    }

    /// Blocks that are leased.
    pub fn leased(&self) -> BlockCount {
        self.leased
    }

    /// Blocks that can be leased at all.
    pub fn total(&self) -> BlockCount {
        self.total
    }

    /// Checks that free and leased blocks make all blocks.
    pub fn integrity(&self) -> Result<(), IntegrityError> {
        let free = BlockCount(self.free.len() as u32);
        if free.0 + self.leased.0 == self.total.0 {
            return Ok(());
        }
        Err(IntegrityError { free, leased: self.leased, total: self.total })
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
}

impl Drop for BlockLease {
    fn drop(&mut self) {
        // While unwinding there is a first panic to be read; a second would abort the process.
        debug_assert!(
            self.blocks.is_empty() || std::thread::panicking(),
            "a lease of {} blocks was dropped instead of released",
            self.blocks.len()
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pool(blocks: u32) -> BlockPool {
        BlockPool::new(BlockCount(blocks), BlockSize::new(4).unwrap())
    }

    #[test]
    fn block_zero_is_never_leased() {
        let mut pool = pool(3);
        let lease = pool.lease(TokenCount(8)).unwrap();
        assert_eq!(lease.blocks(), [BlockId(1), BlockId(2)]);
        assert!(pool.lease(TokenCount(1)).is_none());
        pool.release(lease);
    }

    #[test]
    fn a_lease_is_whole_or_nothing() {
        let mut pool = pool(4);
        assert!(pool.lease(TokenCount(13)).is_none());
        let lease = pool.lease(TokenCount(12)).unwrap();
        assert_eq!(lease.count(), BlockCount(3));
        pool.release(lease);
    }

    #[test]
    fn released_blocks_are_leased_again() {
        let mut pool = pool(3);
        for _ in 0..5 {
            let lease = pool.lease(TokenCount(8)).unwrap();
            assert_eq!(pool.leased(), BlockCount(2));
            pool.release(lease);
            assert_eq!((pool.leased(), pool.integrity()), (BlockCount(0), Ok(())));
        }
    }

    #[test]
    fn a_pool_of_no_blocks_leases_nothing() {
        assert!(pool(0).lease(TokenCount(1)).is_none());
        assert!(pool(1).lease(TokenCount(1)).is_none());
    }

    #[test]
    #[cfg(debug_assertions)]
    #[should_panic(expected = "dropped instead of released")]
    fn a_dropped_lease_is_caught() {
        drop(pool(3).lease(TokenCount(8)));
    }
}
