//! Where a request's tokens lie in the cache.

use std::collections::HashSet;

use proto::units::{BlockId, BlockSize, SlotIndex};

use super::error::BlockError;

/// The cache slot of each token position of a request, in position order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SlotTable(Vec<u32>);

impl SlotTable {
    /// Slots as they come over the wire.
    pub fn from_wire(slots: Vec<u32>) -> Self {
        Self(slots)
    }

    /// The slots of these blocks.
    pub fn of_blocks(blocks: impl IntoIterator<Item = BlockId>, size: BlockSize) -> Self {
        Self(blocks.into_iter().flat_map(|block| block.slots(size)).map(|slot| slot.0).collect())
    }

    /// Appends the slots of more blocks. Those that are there make up whole ones.
    pub fn extend(&mut self, blocks: &[BlockId], size: BlockSize) {
        self.0.extend(Self::of_blocks(blocks.iter().copied(), size).0);
    }

    /// Whether these blocks can be appended, in a cache of `slots` slots. To whom else they belong is the router's account:
    /// prefixes are shared.
    pub fn check_blocks(&self, blocks: &[BlockId], size: BlockSize, slots: usize) -> Result<(), BlockError> {
        let limit = slots / size.get() as usize;
        let mut seen = HashSet::new();
        for &block in blocks {
            if block.0 == 0 {
                return Err(BlockError::Reserved);
            }
            if block.0 as usize >= limit {
                return Err(BlockError::Range { block, limit });
            }
            if !seen.insert(block) || self.has_block(block, size) {
                return Err(BlockError::Repeated(block));
            }
        }
        Ok(())
    }

    fn has_block(&self, block: BlockId, size: BlockSize) -> bool {
        self.0.iter().step_by(size.get() as usize).any(|slot| slot / size.get() == block.0)
    }

    /// Positions that have a slot.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether no position has one.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The slot farthest into the cache.
    pub fn last_used(&self) -> Option<SlotIndex> {
        self.0.iter().max().copied().map(SlotIndex)
    }

    /// Whether they make up whole blocks in position order, of which the last may be cut short.
    pub fn make_up_blocks(&self, size: BlockSize) -> bool {
        let size = size.get();
        self.0.chunks(size as usize).all(|block| {
            block[0].is_multiple_of(size)
                && block.iter().zip(block[0]..).all(|(slot, expected)| *slot == expected)
        })
    }

    /// As the kernels read it.
    pub fn raw(&self) -> &[u32] {
        &self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TWO: BlockSize = BlockSize::new(2).unwrap();

    #[test]
    fn slots_that_are_not_whole_blocks_in_order_are_noticed() {
        let check = |slots: &[u32]| SlotTable::from_wire(slots.to_vec()).make_up_blocks(TWO);
        assert!(check(&[]) && check(&[4, 5, 0, 1]) && check(&[4, 5, 0]));
        assert!(!check(&[5, 4]) && !check(&[1]) && !check(&[1, 2]) && !check(&[0, 1, 3]));
    }

    #[test]
    fn blocks_become_slots_in_position_order() {
        let mut table = SlotTable::of_blocks([BlockId(3), BlockId(4)], TWO);
        assert_eq!(table.raw(), [6, 7, 8, 9]);
        assert_eq!(table.last_used(), Some(SlotIndex(9)));
        table.extend(&[BlockId(1)], TWO);
        assert_eq!(table.raw(), [6, 7, 8, 9, 2, 3]);
        assert!(table.make_up_blocks(TWO));
        assert_eq!(SlotTable::from_wire(vec![9, 2]).last_used(), Some(SlotIndex(9)));
    }

    #[test]
    fn blocks_that_cannot_be_appended_are_named() {
        let table = SlotTable::of_blocks([3, 4].map(BlockId), TWO);
        let check = |blocks: &[u32]| {
            let blocks: Vec<BlockId> = blocks.iter().copied().map(BlockId).collect();
            table.check_blocks(&blocks, TWO, 13).map_err(|error| error.to_string())
        };
        assert_eq!(check(&[]), Ok(()));
        assert_eq!(check(&[5, 1, 2]), Ok(()));
        assert_eq!(check(&[5, 0]).unwrap_err(), "block 0 is reserved");
        assert_eq!(check(&[6]).unwrap_err(), "block 6 is outside of the cache of 6 blocks");
        assert_eq!(check(&[u32::MAX]).unwrap_err(), "block 4294967295 is outside of the cache of 6 blocks");
        assert_eq!(check(&[5, 5]).unwrap_err(), "block 5 is there twice");
        assert_eq!(check(&[4]).unwrap_err(), "block 4 is there twice");
    }
}
