//! What `torch.save` writes, read without running it: a pickle that describes tensors, and their raw storages.
//!
//! - `zip.rs`: the archive of PyTorch 1.6 and later, entries as they lie in the file
//! - `legacy.rs`: the format before it, five pickles and then the storages
//! - `pickle.rs`: the pickle machine: plain values and a short list of names, nothing that could be called
//! - `state_dict.rs`: what the pickle says, checked against the storages
//!
//! Invariant: nothing in a file is run. A name outside of `pickle.rs`'s list ends the reading.
//!
//! Source: `torch/serialization.py` and `torch/_utils.py` for the formats, PEP 307 for the pickle protocol.

mod error;
mod legacy;
mod pickle;
mod state_dict;
mod zip;

use super::tensors::Tensors;

pub use error::{PickleError, TorchError, ZipError};

/// Every archive starts with its first entry.
const ZIP_START: &[u8] = b"PK\x03\x04";

/// A pickle of protocol 2 starts like this, and the legacy format starts with a pickle.
const PICKLE_START: &[u8] = &[0x80, 0x02];

/// The tensors of a file that `torch.save` wrote.
pub(super) fn parse(bytes: &[u8]) -> Result<Tensors, TorchError> {
    if bytes.starts_with(ZIP_START) {
        archive(bytes)
    } else if bytes.starts_with(PICKLE_START) {
        legacy::parse(bytes)
    } else {
        let start = bytes[..bytes.len().min(8)].escape_ascii().to_string();
        Err(TorchError::Format { start, bytes: bytes.len() })
    }
}

/// `data.pkl` describes the tensors, `data/<key>` are their storages, `byteorder` is absent in older files.
fn archive(bytes: &[u8]) -> Result<Tensors, TorchError> {
    let archive = zip::Archive::open(bytes)?;
    if let Some(range) = archive.find("byteorder")?
        && &bytes[range.clone()] != b"little"
    {
        return Err(TorchError::ByteOrder);
    }
    let pickle = pickle::Pickle::read(&bytes[archive.range("data.pkl")?])?;
    state_dict::tensors(&pickle, |key| Ok(archive.find(&format!("data/{key}"))?))
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::sync::Arc;

    use safetensors::tensor::Dtype;

    use super::*;
    use crate::weights::{Format, MappedFile};

    /// What `tests/pytorch/make.py` saves, in both formats.
    const STATE: [&str; 2] = ["zip.bin", "legacy.bin"];

    fn open(name: &str) -> (Arc<MappedFile>, Tensors) {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/pytorch").join(name);
        let file = Arc::new(MappedFile::open(&path).unwrap());
        let tensors = Tensors::parse(Format::PyTorch, &path, file.bytes()).unwrap();
        (file, tensors)
    }

    fn check(name: &str, tensor: &str, dtype: Dtype, shape: &[usize], elements: &[u8]) {
        let (file, tensors) = open(name);
        let stored = tensors.get(tensor).unwrap();
        assert_eq!((stored.dtype, stored.shape.as_slice()), (dtype, shape), "{tensor} in {name}");
        let (file, bytes) = stored.contiguous(&file);
        assert_eq!(&file.bytes()[bytes], elements, "{tensor} in {name}");
    }

    fn check_f32(tensor: &str, shape: &[usize], elements: &[f32]) {
        let bytes: Vec<u8> = elements.iter().flat_map(|element| element.to_le_bytes()).collect();
        for name in STATE {
            check(name, tensor, Dtype::F32, shape, &bytes);
        }
    }

    #[test]
    fn every_element_type_is_read_as_it_is_stored() {
        for name in STATE {
            let bf16 = [0x80, 0x3f, 0x00, 0xc0, 0x00, 0x3f, 0x40, 0x40, 0x80, 0x3e, 0x00, 0xbe];
            check(name, "linear.weight", Dtype::BF16, &[2, 3], &bf16);
            check(name, "linear.bias", Dtype::F16, &[2], &[0x00, 0x38, 0xff, 0xfb]);
            let ids: Vec<u8> = [1i64, -2, 1 << 40].iter().flat_map(|id| id.to_le_bytes()).collect();
            check(name, "ids", Dtype::I64, &[3], &ids);
            check(name, "mask", Dtype::BOOL, &[2], &[1, 0]);
            check(name, "scalar", Dtype::F64, &[], &1.5f64.to_le_bytes());
            check(name, "empty", Dtype::F32, &[0, 4], &[]);
        }
    }

    #[test]
    fn tensors_that_share_a_storage_are_found_in_it() {
        let table: Vec<f32> = (0..15).map(|at| at as f32 - 4.5).collect();
        check_f32("embedding", &[3, 5], &table);
        check_f32("head", &[3, 5], &table);
        check_f32("row", &[5], &table[5..10]);
        for name in STATE {
            let (_, tensors) = open(name);
            assert_eq!(tensors.bytes("embedding"), tensors.bytes("head"));
        }
    }

    #[test]
    fn scattered_elements_come_in_the_order_of_their_indexes() {
        let transposed = [-4.5, 0.5, 5.5, -3.5, 1.5, 6.5, -2.5, 2.5, 7.5, -1.5, 3.5, 8.5, -0.5, 4.5, 9.5];
        check_f32("transposed", &[5, 3], &transposed);
        check_f32("columns", &[3, 2], &[-3.5, -1.5, 1.5, 3.5, 6.5, 8.5]);
        check_f32("cube", &[2, 2, 2], &[-4.5, -2.5, 0.5, 2.5, -3.5, -1.5, 1.5, 3.5]);
    }

    #[test]
    fn contiguous_elements_are_not_copied() {
        let (file, tensors) = open("zip.bin");
        let (found, _) = tensors.get("embedding").unwrap().contiguous(&file);
        assert!(Arc::ptr_eq(found, &file));
        let scattered = tensors.get("transposed").unwrap();
        let (once, _) = scattered.contiguous(&file);
        let (again, _) = scattered.contiguous(&file);
        assert!(!Arc::ptr_eq(once, &file) && Arc::ptr_eq(once, again));
        assert_eq!(once.path(), file.path());
    }

    #[test]
    fn weights_among_what_a_trainer_saves_are_found() {
        check("nested.pt", "e4m3", Dtype::F8_E4M3, &[2], &[0x38, 0xfe]);
        check("nested.pt", "u16", Dtype::U16, &[1], &[0xff, 0xff]);
    }

    #[test]
    fn a_file_cut_anywhere_is_an_error() {
        for name in STATE {
            let (file, _) = open(name);
            for length in 0..file.bytes().len() {
                assert!(parse(&file.bytes()[..length]).is_err(), "{name} cut to {length}");
            }
        }
    }

    #[test]
    fn a_file_with_any_byte_changed_is_read_or_refused() {
        for name in STATE {
            let (file, _) = open(name);
            let mut changed = file.bytes().to_vec();
            for at in 0..changed.len() {
                for byte in [0, b'.', b'(', b'R', 0x7f, 0xff] {
                    let kept = std::mem::replace(&mut changed[at], byte);
                    if let Ok(tensors) = parse(&changed) {
                        let file = Arc::new(MappedFile::copied(file.path(), changed.clone()));
                        for tensor in tensors.names().map(|name| tensors.get(name).unwrap()) {
                            let (file, bytes) = tensor.contiguous(&file);
                            let elements: usize = tensor.shape.iter().product();
                            assert_eq!(
                                file.bytes()[bytes].len(),
                                elements * tensor.dtype.bitsize() / 8,
                                "{name}, byte {at} set to {byte}"
                            );
                        }
                    }
                    changed[at] = kept;
                }
            }
        }
    }
}
