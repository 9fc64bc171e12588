//! What is checked of a step before anything is computed or written. That the sequences cover the rows, and where their
//! slots point, is checked where they are read, in attention.

use kernels::OpError;

use super::{ModelShape, StepInput};
use crate::cache::PagedKv;

const OP: &str = "forward";

/// Errors when the lengths differ, when an index points nowhere, or when the cache is another model's.
pub(super) fn check(input: &StepInput<'_>, model: &ModelShape, cache: &PagedKv) -> Result<(), OpError> {
    let tokens = input.ids.len();
    check_cache(model, cache)?;
    check_length("positions", input.positions, tokens)?;
    check_length("lengths", input.lengths, tokens)?;
    check_length("slots", input.slots, tokens)?;
    check_below("token id", input.ids, model.vocabulary)?;
    check_below("position", input.positions, model.positions_max)?;
    check_below("slot", input.slots, cache.slots())?;
    check_below("logits row", input.logits_at, tokens)?;
    Ok(())
}

fn check_cache(model: &ModelShape, cache: &PagedKv) -> Result<(), OpError> {
    let (expected, found) = (model.kv, cache.shape());
    if expected == found {
        return Ok(());
    }
    Err(OpError::Unsupported {
        op: OP,
        reason: format!("the cache is for {found:?}, the model needs {expected:?}"),
    })
}

fn check_length(what: &'static str, values: &[u32], expected: usize) -> Result<(), OpError> {
    if values.len() == expected {
        return Ok(());
    }
    Err(OpError::Length { op: OP, what, expected, found: values.len() })
}

fn check_below(what: &'static str, values: &[u32], limit: usize) -> Result<(), OpError> {
    // Contexts are long: the maximum of a slice is vector code, a search with an early end is not.
    match values.iter().max() {
        Some(&largest) if largest as usize >= limit => {
            Err(OpError::Index { op: OP, what, index: largest as usize, limit })
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroUsize;

    use kernels::{DType, Sequence};
    use proto::units::{BlockCount, BlockSize};

    use super::*;
    use crate::backend::Device;
    use crate::cache::KvShape;

    const MODEL: ModelShape = ModelShape {
        vocabulary: 10,
        kv: KvShape { layers: 1, key_width: 2, value_width: 2, element_bytes: 4 },
        positions_max: 4,
        shared_prompt_max: None,
        dtype: DType::F32,
    };

    fn cache(shape: KvShape) -> PagedKv {
        let device = Device::cpu(NonZeroUsize::MIN).unwrap();
        PagedKv::new(&device, shape, BlockCount(2), BlockSize::new(4).unwrap()).unwrap()
    }

    fn expect(input: StepInput<'_>, expected: &str) {
        let error = check(&input, &MODEL, &cache(MODEL.kv)).unwrap_err();
        assert!(error.to_string().contains(expected), "expected `{expected}` in: {error}");
    }

    #[test]
    fn a_step_that_points_nowhere_is_refused_with_what_and_where() {
        let sequence = |slots| [Sequence { rows: 0..2, start: 0, slots }];
        let sequences = &sequence(&[6, 7]);
        let good = StepInput {
            ids: &[0, 9],
            positions: &[0, 3],
            lengths: &[1, 4],
            slots: &[6, 7],
            sequences,
            block_size: 4,
            logits_at: &[1],
            adapters: &[],
        };
        assert_eq!(check(&good, &MODEL, &cache(MODEL.kv)), Ok(()));
        expect(StepInput { ids: &[0, 10], ..good }, "token id 10 is out of range, the limit is 10");
        expect(StepInput { positions: &[0, 4], ..good }, "position 4 is out of range, the limit is 4");
        expect(StepInput { slots: &[6, 8], ..good }, "slot 8 is out of range, the limit is 8");
        expect(StepInput { logits_at: &[2], ..good }, "logits row 2 is out of range, the limit is 2");
        expect(StepInput { positions: &[0], ..good }, "positions has 1 elements, 2 expected");
        expect(StepInput { slots: &[6], ..good }, "slots has 1 elements, 2 expected");
    }

    #[test]
    fn another_models_cache_is_refused() {
        let other = cache(KvShape { layers: 2, ..MODEL.kv });
        let step = StepInput {
            ids: &[],
            positions: &[],
            lengths: &[],
            slots: &[],
            sequences: &[],
            block_size: 4,
            logits_at: &[],
            adapters: &[],
        };
        let message = check(&step, &MODEL, &other).unwrap_err().to_string();
        assert!(message.contains("layers: 2") && message.contains("layers: 1"), "{message}");
    }
}
