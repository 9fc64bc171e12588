//! From a pickle's values to tensors: the names, and for each tensor where its elements lie.

use std::ops::Range;

use safetensors::tensor::Dtype;

use super::error::TorchError;
use super::pickle::{Global, Object, Pickle, Value};
use crate::weights::error::shown;
use crate::weights::tensors::{DIMENSIONS_MAX, StridedView, Tensors};

/// Trainers that save more than the weights put them under this name.
const NESTED: &str = "state_dict";

/// A storage as the pickle describes it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Storage<'a> {
    /// Its name among the storages of the file.
    pub(super) key: &'a str,
    /// How many elements it holds: bytes, when it has no type.
    pub(super) elements: u64,
    dtype: Option<Dtype>,
}

impl<'a> Storage<'a> {
    /// From `('storage', type, key, device, elements)`, to which legacy files add a view, which has to be absent.
    pub(super) fn read(pickle: &Pickle<'a>, tuple: usize) -> Option<Self> {
        let (&[kind, class, key, device, elements], view) =
            pickle.tuple(Value::Object(tuple))?.split_first_chunk()?;
        let dtype = match class {
            Value::Global(Global::Storage(dtype)) => Some(dtype),
            Value::Global(Global::UntypedStorage) => None,
            _ => return None,
        };
        match (kind, key, device, elements) {
            (Value::Text("storage"), Value::Text(key), Value::Text(_), Value::Int(elements))
                if matches!(view, [] | [Value::None]) =>
            {
                Some(Self { key, elements: elements.try_into().ok()?, dtype })
            }
            _ => None,
        }
    }

    /// Bytes of an element.
    pub(super) fn size(&self) -> usize {
        self.dtype.map_or(1, |dtype| dtype.bitsize() / 8)
    }
}

/// The tensors of the pickled dictionary, or of the `state_dict` inside it. Other values in it are passed over.
///
/// `find` knows where in the file a storage lies, if it is there.
pub(super) fn tensors(
    pickle: &Pickle<'_>,
    find: impl Fn(&str) -> Result<Option<Range<usize>>, TorchError>,
) -> Result<Tensors, TorchError> {
    let mut members = pickle.dict(pickle.root).ok_or(TorchError::NoTensors)?;
    let nested = members.iter().find(|(name, _)| *name == Value::Text(NESTED));
    if let Some(inner) = nested.and_then(|&(_, value)| pickle.dict(value)) {
        members = inner;
    }
    let mut tensors = Tensors::default();
    for &(name, value) in members {
        let (Value::Text(name), Some(call)) = (name, Call::read(pickle, value)) else { continue };
        let record =
            Record::read(pickle, &call).map_err(|part| TorchError::Tensor { tensor: shown(name), part })?;
        let storage = find(record.storage.key)?;
        let view = record.view(name, storage)?;
        if !tensors.insert(name, view.into()) {
            return Err(TorchError::Duplicate { tensor: shown(name) });
        }
    }
    if tensors.is_empty() { Err(TorchError::NoTensors) } else { Ok(tensors) }
}

/// What was called to make a tensor.
struct Call<'p, 'a> {
    global: Global,
    arguments: &'p [Value<'a>],
}

impl<'p, 'a> Call<'p, 'a> {
    /// The call that makes the tensor, also when a parameter is wrapped around it; `None` when this is no tensor.
    fn read(pickle: &'p Pickle<'a>, value: Value<'a>) -> Option<Self> {
        let read = |value| match pickle.object(value)? {
            Object::Call(global, tuple) => {
                Some(Self { global: *global, arguments: pickle.tuple(Value::Object(*tuple))? })
            }
            _ => None,
        };
        let outer = read(value)?;
        match (outer.global, outer.arguments) {
            (Global::Parameter, [tensor, ..]) => read(*tensor).or(Some(outer)),
            _ => Some(outer),
        }
    }
}

/// A tensor as the pickle describes it.
struct Record<'a> {
    storage: Storage<'a>,
    dtype: Dtype,
    /// In elements of the tensor's type, as are the strides.
    offset: usize,
    shape: Vec<usize>,
    strides: Vec<usize>,
}

impl<'a> Record<'a> {
    /// From `(storage, offset, size, stride, requires_grad, hooks, ...)`. An error says which of them is wrong.
    fn read(pickle: &Pickle<'a>, call: &Call<'_, 'a>) -> Result<Self, &'static str> {
        let Some((&[storage, offset, size, stride, _grad, _hooks], rest)) =
            call.arguments.split_first_chunk()
        else {
            return Err("list of arguments");
        };
        let storage = match pickle.object(storage) {
            Some(Object::Storage(tuple)) => Storage::read(pickle, *tuple).ok_or("storage")?,
            _ => return Err("storage"),
        };
        let dtype = match (call.global, storage.dtype, rest.first()) {
            (Global::Tensor, Some(dtype), _) => dtype,
            (Global::TypedTensor, _, Some(Value::Global(Global::Dtype(dtype)))) => *dtype,
            _ => return Err("element type"),
        };
        let shape = sizes(pickle, size).ok_or("size")?;
        let strides = sizes(pickle, stride).filter(|strides| strides.len() == shape.len()).ok_or("stride")?;
        let offset = match offset {
            Value::Int(offset) => usize::try_from(offset).map_err(|_| "offset")?,
            _ => return Err("offset"),
        };
        Ok(Self { storage, dtype, offset, shape, strides })
    }

    /// Holds the description against the storage's bytes in the file.
    fn view(self, name: &str, bytes: Option<Range<usize>>) -> Result<StridedView, TorchError> {
        let Self { storage, dtype, offset, shape, strides } = self;
        let (tensor, key) = (|| shown(name), || shown(storage.key));
        let bytes = bytes.ok_or_else(|| TorchError::StorageMissing { tensor: tensor(), key: key() })?;
        let needed =
            usize::try_from(storage.elements).ok().and_then(|count| count.checked_mul(storage.size()));
        if needed != Some(bytes.len()) {
            let dtype = storage.dtype.unwrap_or(Dtype::U8).to_string();
            let (bytes, elements) = (bytes.len(), storage.elements);
            return Err(TorchError::StorageSize { tensor: tensor(), key: key(), bytes, elements, dtype });
        }
        let view = StridedView { dtype, offset, shape, strides, bytes };
        let elements = view.stored();
        if !view.fits() {
            let StridedView { shape, strides, .. } = view;
            return Err(TorchError::TensorRange {
                tensor: tensor(),
                shape,
                strides,
                offset,
                key: key(),
                elements,
            });
        }
        if view.repeats() {
            let shape = view.shape;
            return Err(TorchError::TensorRepeats { tensor: tensor(), shape, key: key(), elements });
        }
        Ok(view)
    }
}

/// A tuple of sizes, none of them negative.
fn sizes(pickle: &Pickle<'_>, value: Value<'_>) -> Option<Vec<usize>> {
    let members = pickle.tuple(value)?;
    if members.len() > DIMENSIONS_MAX {
        return None;
    }
    let size = |member: &Value<'_>| match *member {
        Value::Int(size) => usize::try_from(size).ok(),
        _ => None,
    };
    members.iter().map(size).collect()
}
