//! One safetensors file: eight bytes of header length, a JSON header, then the tensors' bytes.
//!
//! The entries are the `safetensors` crate's; the checks are ours, because each error must name file and tensor.
//! Source: the format's description in the safetensors repository, which allows neither overlaps nor holes.

use std::collections::btree_map::{self, BTreeMap};
use std::fmt;
use std::path::Path;

use safetensors::tensor::Dtype;
use serde::Deserialize;
use serde::de::{Deserializer, Error, IgnoredAny, MapAccess, SeqAccess, Visitor};

use super::WeightError;
use super::error::shown;
use super::tensors::{DIMENSIONS_MAX, FileTensor, Tensors};

/// Largest header accepted, as in the reference implementation of the format. Real ones stay below 10 MB.
const HEADER_BYTES_MAX: usize = 100_000_000;

/// Bytes of the header's length.
const LENGTH_BYTES: usize = size_of::<u64>();

/// The one name in a header that is not a tensor's. What is under it is skipped: nothing here needs it.
const METADATA: &str = "__metadata__";

/// The tensors of the file with these contents: its header is held against its length, and every entry against the file.
pub(super) fn parse(path: &Path, bytes: &[u8]) -> Result<Tensors, WeightError> {
    let json = header_bytes(path, bytes)?;
    let data_start = LENGTH_BYTES + json.len();
    let header: Header =
        serde_json::from_slice(json).map_err(|source| WeightError::Json { file: path.to_owned(), source })?;
    check_entries(path, &header.0, bytes.len() - data_start)?;
    let mut tensors = Tensors::default();
    for (name, Entry { dtype, shape: Shape(shape), data_offsets: (start, end) }) in header.0 {
        tensors.insert(&name, FileTensor::new(dtype, shape, data_start + start..data_start + end));
    }
    Ok(tensors)
}

/// Tensors by name.
struct Header(BTreeMap<String, Entry>);

/// What the header says about a tensor. Offsets count from the end of the header.
#[derive(Deserialize)]
struct Entry {
    dtype: Dtype,
    shape: Shape,
    data_offsets: (usize, usize),
}

struct Shape(Vec<usize>);

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = Header;

            fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter.write_str("an object of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut object: A) -> Result<Header, A::Error> {
                let mut entries = BTreeMap::new();
                while let Some(name) = object.next_key::<String>()? {
                    if name == METADATA {
                        object.next_value::<IgnoredAny>()?;
                        continue;
                    }
                    match entries.entry(name) {
                        btree_map::Entry::Occupied(first) => {
                            let name = shown(first.key());
                            return Err(A::Error::custom(format_args!("tensor `{name}` is there twice")));
                        }
                        btree_map::Entry::Vacant(place) => {
                            let entry = object.next_value().map_err(|error| {
                                A::Error::custom(format_args!("tensor `{}`: {error}", shown(place.key())))
                            })?;
                            place.insert(entry);
                        }
                    }
                }
                Ok(Header(entries))
            }
        }
        deserializer.deserialize_map(Entries)
    }
}

impl<'de> Deserialize<'de> for Shape {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Sizes;
        impl<'de> Visitor<'de> for Sizes {
            type Value = Shape;

            fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(formatter, "a shape of at most {DIMENSIONS_MAX} sizes")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut sequence: A) -> Result<Shape, A::Error> {
                let mut sizes = Vec::new();
                while let Some(size) = sequence.next_element()? {
                    if sizes.len() == DIMENSIONS_MAX {
                        return Err(A::Error::invalid_length(DIMENSIONS_MAX + 1, &self));
                    }
                    sizes.push(size);
                }
                Ok(Shape(sizes))
            }
        }
        deserializer.deserialize_seq(Sizes)
    }
}

/// The JSON between the length and the data.
fn header_bytes<'a>(path: &Path, bytes: &'a [u8]) -> Result<&'a [u8], WeightError> {
    let file = || path.to_owned();
    let Some((length, rest)) = bytes.split_first_chunk::<LENGTH_BYTES>() else {
        return Err(WeightError::NoHeader { file: file(), bytes: bytes.len() });
    };
    let header = u64::from_le_bytes(*length);
    let within = usize::try_from(header).ok().and_then(|length| rest.get(..length));
    let Some(json) = within else {
        return Err(WeightError::HeaderLength { file: file(), header, bytes: bytes.len() });
    };
    if json.len() > HEADER_BYTES_MAX {
        return Err(WeightError::HeaderTooLarge { file: file(), header, limit: HEADER_BYTES_MAX });
    }
    Ok(json)
}

/// Every tensor fills its range, and the ranges fill `data` bytes without overlap or hole.
fn check_entries(path: &Path, tensors: &BTreeMap<String, Entry>, data: usize) -> Result<(), WeightError> {
    let file = || path.to_owned();
    let mut by_offset: Vec<_> = tensors.iter().collect();
    by_offset.sort_unstable_by_key(|&(name, info)| (info.data_offsets, name));
    let mut expected = 0;
    for (name, info) in by_offset {
        let (start, end) = info.data_offsets;
        let tensor = || shown(name);
        if start > end || bytes_needed(info) != Some(end - start) {
            return Err(WeightError::TensorSize {
                file: file(),
                tensor: tensor(),
                dtype: info.dtype.to_string(),
                shape: info.shape.0.clone(),
                start,
                end,
            });
        }
        if end > data {
            return Err(WeightError::TensorRange { file: file(), tensor: tensor(), end, data });
        }
        if start != expected {
            return Err(WeightError::TensorOffset { file: file(), tensor: tensor(), start, expected });
        }
        expected = end;
    }
    match data - expected {
        0 => Ok(()),
        extra => Err(WeightError::Trailing { file: file(), extra }),
    }
}

/// Bytes that the shape and the element type ask for; `None` when that is no whole number of bytes, or overflows.
fn bytes_needed(info: &Entry) -> Option<usize> {
    let elements = info.shape.0.iter().try_fold(1usize, |count, &size| count.checked_mul(size))?;
    let bits = elements.checked_mul(info.dtype.bitsize())?;
    bits.is_multiple_of(8).then_some(bits / 8)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// A file with this header and `data` zero bytes after it.
    fn bytes(header: &str, data: usize) -> Vec<u8> {
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend_from_slice(header.as_bytes());
        bytes.resize(bytes.len() + data, 0);
        bytes
    }

    fn open(bytes: &[u8]) -> Result<Tensors, WeightError> {
        parse(Path::new("hostile.safetensors"), bytes)
    }

    /// A header of `U8` vectors that say they lie in these ranges.
    fn ranges(tensors: &[(&str, usize, usize)]) -> String {
        let entry = |&(name, start, end): &(&str, usize, usize)| {
            let info = json!({"dtype": "U8", "shape": [end - start], "data_offsets": [start, end]});
            format!("\"{name}\":{info}")
        };
        let entries: Vec<String> = tensors.iter().map(entry).collect();
        format!("{{{}}}", entries.join(","))
    }

    #[test]
    fn tensors_are_found_where_the_header_says() {
        let header = json!({
            "__metadata__": {"format": "pt"},
            "b": {"dtype": "F32", "shape": [2], "data_offsets": [6, 14]},
            "a": {"dtype": "BF16", "shape": [1, 3], "data_offsets": [0, 6]}
        })
        .to_string();
        let file = open(&bytes(&header, 14)).unwrap();
        let data_start = 8 + header.len();
        assert_eq!(file.bytes("b"), Some(data_start + 6..data_start + 14));
        assert_eq!(file.get("a").unwrap().shape, [1, 3]);
    }

    #[test]
    fn a_file_that_lies_about_itself_is_refused_with_its_name() {
        let huge = u64::MAX.to_le_bytes();
        let cases: &[(&[u8], &str)] = &[
            (b"", "has only 0 bytes"),
            (b"abc", "has only 3 bytes"),
            (&huge, "claims 18446744073709551615 bytes, the file has 8"),
            (&bytes("{}", 0)[..9], "claims 2 bytes, the file has 9"),
            (&bytes("{", 0), "EOF while parsing"),
            (&bytes("\u{0}\u{1}", 0), "expected value"),
            (&bytes("[]", 0), "invalid"),
            (&bytes(&"[".repeat(100_000), 0), "line 1"),
            (&bytes(r#"{"a":{"dtype":"F99","shape":[1],"data_offsets":[0,4]}}"#, 4), "unknown variant `F99`"),
            (&bytes(r#"{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}"#, 4), "invalid value"),
            (&bytes(r#"{"a":{"dtype":"F32","shape":[1]}}"#, 4), "missing field `data_offsets`"),
            (&bytes(r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}"#, 4), "`a` is F32 [2]"),
            (&bytes(r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,0]}}"#, 4), "bytes 4..0"),
            (
                &bytes(r#"{"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,0]}}"#, 0),
                "does not fill bytes 0..0",
            ),
            (&bytes(r#"{"a":{"dtype":"F4","shape":[3],"data_offsets":[0,1]}}"#, 1), "does not fill"),
            (
                &bytes(r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#, 7),
                "`a` ends at data byte 8, the file holds 7",
            ),
            (
                &bytes(&ranges(&[("a", usize::MAX - 8, usize::MAX)]), 8),
                "ends at data byte 18446744073709551615, the file holds 8",
            ),
            (&bytes(&ranges(&[("a", 4, 8)]), 8), "`a` starts at data byte 4, 0 expected"),
            (&bytes(&ranges(&[("a", 0, 8), ("b", 4, 12)]), 12), "`b` starts at data byte 4, 8 expected"),
            (&bytes(&ranges(&[("a", 0, 4), ("b", 6, 8)]), 8), "`b` starts at data byte 6, 4 expected"),
            (&bytes(&ranges(&[("a", 0, 4), ("a", 4, 8)]), 8), "tensor `a` is there twice"),
            (&bytes(&ranges(&[("a", 0, 4)]), 7), "3 bytes after the last tensor"),
        ];
        for (bytes, expected) in cases {
            let message = open(bytes).unwrap_err().to_string();
            assert!(message.contains("hostile.safetensors: "), "{message}");
            assert!(message.contains(expected), "expected `{expected}` in: {message}");
        }
    }

    #[test]
    fn a_file_cut_anywhere_is_an_error() {
        let whole = bytes(r#"{"a":{"dtype":"F16","shape":[2,2],"data_offsets":[0,8]}}"#, 8);
        assert!(open(&whole).is_ok());
        for length in 0..whole.len() {
            assert!(open(&whole[..length]).is_err(), "cut to {length}");
        }
    }

    #[test]
    fn a_header_with_any_byte_changed_is_read_or_refused() {
        let whole = bytes(r#"{"a":{"dtype":"F16","shape":[2,2],"data_offsets":[0,8]}}"#, 8);
        for at in 0..whole.len() - 8 {
            for byte in [0, b'"', b'{', b'9', 0xff] {
                let mut changed = whole.clone();
                changed[at] = byte;
                if let Ok(file) = open(&changed) {
                    let inside = |name| file.bytes(name).unwrap().end <= whole.len();
                    assert!(file.names().all(inside), "byte {at} set to {byte}");
                }
            }
        }
    }
}
