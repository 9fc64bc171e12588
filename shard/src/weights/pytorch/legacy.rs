//! The format before PyTorch 1.6: a magic number, a version, the writer's properties, the tensors and the storages'
//! names, each a pickle; then the storages in that order, each an element count of eight bytes and its elements.

use std::collections::HashMap;
use std::ops::Range;

use super::error::TorchError;
use super::pickle::{Object, Pickle, Value};
use super::state_dict::{self, Storage};
use crate::weights::error::shown;
use crate::weights::tensors::Tensors;

/// 0x1950a86a20f9469cfc6c, as a pickle stores it.
const MAGIC: &[u8] = &[0x6c, 0xfc, 0x9c, 0x46, 0xf9, 0x20, 0x6a, 0xa8, 0x50, 0x19];

const VERSION: i64 = 1001;

/// The tensors of a file in this format.
pub(super) fn parse(bytes: &[u8]) -> Result<Tensors, TorchError> {
    let mut at = 0;
    let mut next = || {
        let pickle = Pickle::read(&bytes[at..])?;
        at += pickle.length;
        Ok::<_, TorchError>(pickle)
    };
    if next()?.root != Value::Long(MAGIC) {
        return Err(TorchError::Part { part: "magic number" });
    }
    if next()?.root != Value::Int(VERSION) {
        return Err(TorchError::Part { part: "version" });
    }
    let writer = next()?;
    let little = (Value::Text("little_endian"), Value::Bool(true));
    if !writer.dict(writer.root).is_some_and(|properties| properties.contains(&little)) {
        return Err(TorchError::ByteOrder);
    }
    let state = next()?;
    let keys = next()?;
    let storages = storages(&bytes[at..], at, &state, &keys)?;
    state_dict::tensors(&state, |key| Ok(storages.get(key).cloned()))
}

/// Where the elements of each storage lie in the file, whose part from `start` on is `bytes`.
fn storages<'a>(
    bytes: &[u8],
    start: usize,
    state: &Pickle<'a>,
    keys: &Pickle<'a>,
) -> Result<HashMap<&'a str, Range<usize>>, TorchError> {
    let mut described: HashMap<&str, Storage<'_>> = HashMap::new();
    for object in state.objects() {
        let Object::Storage(tuple) = *object else { continue };
        let storage =
            Storage::read(state, tuple).ok_or(TorchError::Part { part: "reference to a storage" })?;
        let first = *described.entry(storage.key).or_insert(storage);
        if (first.elements, first.size()) != (storage.elements, storage.size()) {
            return Err(TorchError::StorageUnknown { key: shown(storage.key) });
        }
    }
    let Some(Object::List(keys)) = keys.object(keys.root) else {
        return Err(TorchError::Part { part: "list of storages" });
    };
    let mut ranges = HashMap::new();
    let mut at = 0;
    for key in keys {
        let Value::Text(key) = *key else { return Err(TorchError::Part { part: "list of storages" }) };
        let unknown = || TorchError::StorageUnknown { key: shown(key) };
        let cut = || TorchError::StorageCut { key: shown(key) };
        let storage = described.get(key).ok_or_else(unknown)?;
        let stored = u64::from_le_bytes(*bytes[at..].first_chunk().ok_or_else(cut)?);
        if stored != storage.elements {
            return Err(TorchError::StorageLength { key: shown(key), stored, described: storage.elements });
        }
        let data = at + size_of::<u64>();
        let length = usize::try_from(stored).ok().and_then(|count| count.checked_mul(storage.size()));
        let end = length.and_then(|length| data.checked_add(length)).filter(|&end| end <= bytes.len());
        at = end.ok_or_else(cut)?;
        if ranges.insert(key, start + data..start + at).is_some() {
            return Err(unknown());
        }
    }
    Ok(ranges)
}
