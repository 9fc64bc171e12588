//! Where a request's tokens lie in the cache.

use proto::units::{BlockCount, BlockId, BlockSize, SlotIndex};

/// The cache slot of each token position a request may reach, in position order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SlotTable(Vec<u32>);

impl SlotTable {
    /// Slots as they come over the wire.
    pub fn from_wire(slots: Vec<u32>) -> Self {
        Self(slots)
    }

    /// The slots of consecutive blocks.
    pub fn of_blocks(first: BlockId, count: BlockCount, size: BlockSize) -> Self {
        Self((first.0..first.0 + count.0).flat_map(|id| BlockId(id).slots(size)).map(|slot| slot.0).collect())
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

    #[test]
    fn slots_that_are_not_whole_blocks_in_order_are_noticed() {
        let size = BlockSize::new(2).unwrap();
        let check = |slots: &[u32]| SlotTable::from_wire(slots.to_vec()).make_up_blocks(size);
        assert!(check(&[]) && check(&[4, 5, 0, 1]) && check(&[4, 5, 0]));
        assert!(!check(&[5, 4]) && !check(&[1]) && !check(&[1, 2]) && !check(&[0, 1, 3]));
    }

    #[test]
    fn blocks_become_slots_in_position_order() {
        let size = BlockSize::new(2).unwrap();
        let table = SlotTable::of_blocks(BlockId(3), BlockCount(2), size);
        assert_eq!(table.raw(), [6, 7, 8, 9]);
        assert_eq!(table.last_used(), Some(SlotIndex(9)));
        assert!(table.make_up_blocks(size));
        assert_eq!(SlotTable::from_wire(vec![9, 2]).last_used(), Some(SlotIndex(9)));
    }
}
