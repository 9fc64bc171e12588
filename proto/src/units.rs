//! Tokens, blocks, slots and ids are all small integers, and mixing them is the classic paging bug. Here each is a
//! type of its own, with the conversions between them.

use std::fmt;
use std::num::NonZeroU32;

macro_rules! unit {
    ($(#[$doc:meta])* $name:ident($inner:ty)) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub $inner);

        impl fmt::Display for $name {
            fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(formatter)
            }
        }
    };
}

unit! {
    /// One request, unique among those alive.
    RequestId(u64)
}
unit! {
    /// One batch that lives on the shards.
    BatchId(u64)
}
unit! {
    /// An entry of the vocabulary.
    TokenId(u32)
}
unit! {
    /// A number of tokens.
    TokenCount(u32)
}
unit! {
    /// One block of the key/value cache. Block 0 is reserved: health probes and padding write there.
    BlockId(u32)
}
unit! {
    /// A number of cache blocks.
    BlockCount(u32)
}
unit! {
    /// Place of one token in the key/value cache: block times block size plus offset.
    SlotIndex(u32)
}

impl TokenCount {
    /// Blocks needed to hold this many tokens; the last one may be part empty.
    pub fn blocks(self, size: BlockSize) -> BlockCount {
        BlockCount(self.0.div_ceil(size.get()))
    }
}

impl BlockCount {
    /// Tokens that fit into this many blocks, at most `u32::MAX`.
    pub fn tokens(self, size: BlockSize) -> TokenCount {
        TokenCount(self.0.saturating_mul(size.get()))
    }
}

impl BlockId {
    /// The slots of this block, in position order.
    pub fn slots(self, size: BlockSize) -> impl Iterator<Item = SlotIndex> {
        let first = self.0 * size.get();
        (first..first + size.get()).map(SlotIndex)
    }
}

impl SlotIndex {
    /// As an index into the cache tensors.
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

impl TokenId {
    /// As an index into the vocabulary.
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

/// Tokens per cache block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockSize(NonZeroU32);

impl BlockSize {
    /// `None` for zero.
    pub const fn new(tokens: u32) -> Option<Self> {
        match NonZeroU32::new(tokens) {
            Some(tokens) => Some(Self(tokens)),
            None => None,
        }
    }

    /// Tokens per block.
    pub const fn get(self) -> u32 {
        self.0.get()
    }
}

impl fmt::Display for BlockSize {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(formatter)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIXTEEN: BlockSize = BlockSize::new(16).unwrap();

    #[test]
    fn the_last_block_may_be_part_empty() {
        assert_eq!(TokenCount(0).blocks(SIXTEEN), BlockCount(0));
        assert_eq!(TokenCount(1).blocks(SIXTEEN), BlockCount(1));
        assert_eq!(TokenCount(16).blocks(SIXTEEN), BlockCount(1));
        assert_eq!(TokenCount(17).blocks(SIXTEEN), BlockCount(2));
    }

    #[test]
    fn a_block_owns_consecutive_slots() {
        let slots: Vec<_> = BlockId(2).slots(BlockSize::new(4).unwrap()).collect();
        assert_eq!(slots, [8, 9, 10, 11].map(SlotIndex));
    }

    #[test]
    fn a_block_of_no_tokens_does_not_exist() {
        assert_eq!(BlockSize::new(0), None);
    }
}
