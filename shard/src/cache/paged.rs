use kernels::OpError;
use proto::units::{BlockCount, BlockSize};
use thiserror::Error;

use crate::backend::{Device, Tensor};

/// What one token occupies: a key and a value per layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvShape {
    /// Decoder layers.
    pub layers: usize,
    /// Elements of a key: all heads of this device.
    pub key_width: usize,
    /// Elements of a value; 0 where values are found in the keys (latent attention).
    pub value_width: usize,
    /// Bytes of an element, which the device decides.
    pub element_bytes: usize,
}

/// The paged key/value cache: per layer, keys and values `[slots, width]` in a type that the device decides.
///
/// Slot `block * block_size + offset` belongs to one token. Memory is zeroed, and taken from the system when a slot is
/// first written.
#[derive(Debug)]
pub struct PagedKv {
    layers: Vec<LayerKv>,
    shape: KvShape,
    slots: usize,
}

/// One layer's part of the cache.
#[derive(Debug)]
pub struct LayerKv {
    /// `[slots, key width]`
    pub keys: Tensor,
    /// `[slots, value width]`
    pub values: Tensor,
}

/// Why a cache cannot be made.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum CacheError {
    /// The sizes multiply to more than this machine can count, or slots to more than an index holds.
    #[error("a cache of {blocks} blocks of {block_size} tokens is too large to address")]
    Overflow {
        /// Blocks asked for.
        blocks: BlockCount,
        /// Tokens per block.
        block_size: BlockSize,
    },
    /// The device refuses that much memory.
    #[error("no memory for a cache of {blocks} blocks of {block_size} tokens: {bytes} bytes: {source}")]
    Memory {
        /// Blocks asked for.
        blocks: BlockCount,
        /// Tokens per block.
        block_size: BlockSize,
        /// Bytes they need in all.
        bytes: usize,
        /// What the device says.
        source: OpError,
    },
}

impl KvShape {
    /// Bytes of one block over all layers, keys and values; `None` when that overflows.
    pub fn bytes_per_block(self, block_size: BlockSize) -> Option<usize> {
        let width = self.key_width.checked_add(self.value_width)?;
        [self.layers, width, self.element_bytes, block_size.get() as usize]
            .into_iter()
            .try_fold(1usize, usize::checked_mul)
    }
}

impl PagedKv {
    /// A cache of `blocks` blocks, all zero.
    ///
    /// Errors when the sizes overflow, and when the device clearly cannot hold them.
    pub fn new(
        device: &Device,
        shape: KvShape,
        blocks: BlockCount,
        block_size: BlockSize,
    ) -> Result<Self, CacheError> {
        let overflow = CacheError::Overflow { blocks, block_size };
        // Slots are u32 on the wire and in the kernels.
        let slots = blocks.0.checked_mul(block_size.get()).ok_or(overflow.clone())? as usize;
        let bytes = shape
            .bytes_per_block(block_size)
            .and_then(|bytes| bytes.checked_mul(blocks.0 as usize))
            .filter(|&bytes| isize::try_from(bytes).is_ok())
            .ok_or(overflow)?;
        let memory = |source| CacheError::Memory { blocks, block_size, bytes, source };
        // Layer by layer a lazily committing system would grant what it cannot hold in all: ask for the whole once.
        device.zeros_cache(shape.layers * slots, shape.key_width + shape.value_width).map_err(memory)?;
        let layer = || -> Result<LayerKv, OpError> {
            Ok(LayerKv {
                keys: device.zeros_cache(slots, shape.key_width)?,
                values: device.zeros_cache(slots, shape.value_width)?,
            })
        };
        let layers = (0..shape.layers).map(|_| layer()).collect::<Result<_, _>>().map_err(memory)?;
        Ok(Self { layers, shape, slots })
    }

    /// Sizes it was made for.
    pub fn shape(&self) -> KvShape {
        self.shape
    }

    /// Tokens it holds; slots are below this.
    pub fn slots(&self) -> usize {
        self.slots
    }

    /// One layer's keys and values. Errors when there is no such layer.
    pub fn layer_mut(&mut self, layer: usize) -> Result<&mut LayerKv, OpError> {
        let limit = self.layers.len();
        self.layers.get_mut(layer).ok_or(OpError::Index { op: "cache", what: "layer", index: layer, limit })
    }
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroUsize;

    use super::*;

    const SHAPE: KvShape = KvShape { layers: 2, key_width: 12, value_width: 8, element_bytes: 4 };
    const SIXTEEN: BlockSize = BlockSize::new(16).unwrap();

    fn cache(shape: KvShape, blocks: u32) -> Result<PagedKv, CacheError> {
        let device = Device::cpu(NonZeroUsize::MIN).unwrap();
        PagedKv::new(&device, shape, BlockCount(blocks), SIXTEEN)
    }

    #[test]
    fn a_block_holds_keys_and_values_of_every_layer() {
        assert_eq!(SHAPE.bytes_per_block(SIXTEEN), Some(2 * (12 + 8) * 4 * 16));
        assert_eq!(KvShape { layers: usize::MAX, ..SHAPE }.bytes_per_block(SIXTEEN), None);
    }

    #[test]
    fn every_layer_has_a_zeroed_slot_for_every_token() {
        let mut cache = cache(SHAPE, 5).unwrap();
        assert_eq!(cache.slots(), 80);
        for layer in 0..2 {
            let LayerKv { keys, values } = cache.layer_mut(layer).unwrap();
            assert_eq!((keys.rows(), keys.width(), values.rows(), values.width()), (80, 12, 80, 8));
            assert!(keys.host().iter().chain(values.host()).all(|&element| element == 0.0));
        }
        let error = cache.layer_mut(2).unwrap_err();
        assert_eq!(error, OpError::Index { op: "cache", what: "layer", index: 2, limit: 2 });
    }

    #[test]
    fn a_cache_beyond_all_bounds_is_refused() {
        let check = |shape, blocks| {
            let error = cache(shape, blocks).unwrap_err();
            assert!(matches!(error, CacheError::Overflow { .. }), "{error}");
        };
        check(SHAPE, u32::MAX);
        check(KvShape { layers: usize::MAX / 2, ..SHAPE }, 1);
        check(KvShape { key_width: usize::MAX / 64, ..SHAPE }, 1);
    }

    #[test]
    fn a_cache_larger_than_the_address_space_is_refused_with_its_size() {
        // 2^62 bytes: countable, but no system maps as much.
        let error =
            cache(KvShape { layers: 1 << 20, key_width: 1 << 35, value_width: 1 << 35, element_bytes: 4 }, 1)
                .unwrap_err();
        assert!(matches!(error, CacheError::Memory { bytes: 0x4000_0000_0000_0000, .. }), "{error}");
    }
}
