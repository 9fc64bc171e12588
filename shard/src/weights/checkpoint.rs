//! The files of a checkpoint directory, and tensors by name over all of them.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ffi::OsStr;
use std::fs;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use safetensors::tensor::{Dtype, TensorInfo};
use serde::Deserialize;

use super::safetensors::{SafetensorsFile, shown};
use super::{MappedFile, WeightError};
use crate::small_file;

/// The whole checkpoint in one file.
const SINGLE_FILE: &str = "model.safetensors";

/// Which file holds which tensor, when there are several.
const INDEX_FILE: &str = "model.safetensors.index.json";

/// Largest index accepted. Those of the largest published models stay below 20 MB.
const INDEX_BYTES_MAX: u64 = 100_000_000;

/// Every tensor of a directory, by name. Opening maps files and reads headers; the weights stay on disk until used.
#[derive(Debug)]
pub struct Checkpoint {
    directory: PathBuf,
    files: Vec<SafetensorsFile>,
    /// Name to position in `files`.
    holder: HashMap<String, usize>,
}

/// A tensor as it is stored: bytes of a mapped file.
pub(super) struct StoredTensor<'a> {
    /// The file.
    pub(super) file: &'a Arc<MappedFile>,
    /// Where its bytes start in the file.
    pub(super) start: usize,
    /// Where they end.
    pub(super) end: usize,
    /// Element type.
    pub(super) dtype: Dtype,
    /// Shape.
    pub(super) shape: &'a [usize],
}

impl Checkpoint {
    /// Opens `model.safetensors`, or else the files that `model.safetensors.index.json` names, or else every
    /// `*.safetensors` in the directory.
    ///
    /// Errors when a file is missing or broken, when the index is wrong, or when a name occurs in two files.
    pub fn open(directory: &Path) -> Result<Self, WeightError> {
        let index = directory.join(INDEX_FILE);
        if directory.join(SINGLE_FILE).exists() {
            Self::open_files(directory, [SINGLE_FILE])
        } else if index.exists() {
            let index = Index::read(index)?;
            let checkpoint = Self::open_files(directory, &index.file_names()?)?;
            index.check(&checkpoint)?;
            Ok(checkpoint)
        } else {
            Self::open_files(directory, &safetensors_names(directory)?)
        }
    }

    /// Where it was found.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Whether there is a tensor of this name.
    pub fn contains(&self, name: &str) -> bool {
        self.holder.contains_key(name)
    }

    /// The tensor of this name.
    pub(super) fn tensor(&self, name: &str) -> Result<StoredTensor<'_>, WeightError> {
        let missing = || WeightError::Missing { directory: self.directory.clone(), tensor: name.to_owned() };
        let file = &self.files[*self.holder.get(name).ok_or_else(missing)?];
        let TensorInfo { dtype, shape, data_offsets: (start, end) } = &file.tensors[name];
        Ok(StoredTensor {
            file: &file.file,
            start: file.data_start + start,
            end: file.data_start + end,
            dtype: *dtype,
            shape,
        })
    }

    fn open_files(
        directory: &Path,
        names: impl IntoIterator<Item = impl AsRef<OsStr>>,
    ) -> Result<Self, WeightError> {
        let mut checkpoint =
            Self { directory: directory.to_owned(), files: Vec::new(), holder: HashMap::new() };
        for name in names {
            checkpoint.add(SafetensorsFile::open(&directory.join(name.as_ref()))?)?;
        }
        if checkpoint.files.is_empty() {
            return Err(WeightError::NoFiles { directory: directory.to_owned() });
        }
        Ok(checkpoint)
    }

    fn add(&mut self, file: SafetensorsFile) -> Result<(), WeightError> {
        for name in file.tensors.keys() {
            if let Some(first) = self.holder.insert(name.clone(), self.files.len()) {
                return Err(WeightError::Duplicate {
                    tensor: shown(name),
                    first: self.files[first].file.path().to_owned(),
                    second: file.file.path().to_owned(),
                });
            }
        }
        self.files.push(file);
        Ok(())
    }
}

/// The names of all safetensors files, in a fixed order.
fn safetensors_names(directory: &Path) -> Result<Vec<PathBuf>, WeightError> {
    let failed = |source| WeightError::Read { file: directory.to_owned(), source };
    let mut names = Vec::new();
    for entry in fs::read_dir(directory).map_err(failed)? {
        let name = PathBuf::from(entry.map_err(failed)?.file_name());
        if name.extension() == Some(OsStr::new("safetensors")) {
            names.push(name);
        }
    }
    names.sort();
    Ok(names)
}

/// `model.safetensors.index.json`.
struct Index {
    path: PathBuf,
    weight_map: BTreeMap<String, String>,
}

impl Index {
    fn read(path: PathBuf) -> Result<Self, WeightError> {
        #[derive(Deserialize)]
        struct Contents {
            weight_map: BTreeMap<String, String>,
        }
        match small_file::read(&path, INDEX_BYTES_MAX) {
            Err(source) => Err(WeightError::Read { file: path, source }),
            Ok(bytes) => match serde_json::from_slice::<Contents>(&bytes) {
                Err(source) => Err(WeightError::Json { file: path, source }),
                Ok(Contents { weight_map }) => Ok(Self { path, weight_map }),
            },
        }
    }

    /// The files it names, each once. A name that is a path is refused: an index must not make us read elsewhere.
    fn file_names(&self) -> Result<BTreeSet<&str>, WeightError> {
        let names: BTreeSet<&str> = self.weight_map.values().map(String::as_str).collect();
        for name in &names {
            let mut components = Path::new(name).components();
            let plain = match (components.next(), components.next()) {
                (Some(Component::Normal(only)), None) => only == OsStr::new(name),
                _ => false,
            };
            if !plain {
                return Err(WeightError::IndexName { file: self.path.clone(), name: shown(name) });
            }
        }
        Ok(names)
    }

    /// Every tensor is in the file that the index names.
    fn check(&self, checkpoint: &Checkpoint) -> Result<(), WeightError> {
        for (tensor, name) in &self.weight_map {
            let holder = checkpoint.holder.get(tensor).map(|&file| checkpoint.files[file].file.path());
            if holder.and_then(Path::file_name) != Some(OsStr::new(name)) {
                return Err(WeightError::IndexTensor {
                    file: self.path.clone(),
                    tensor: shown(tensor),
                    name: shown(name),
                });
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A directory in which each listed file holds one-element tensors of the listed names.
    fn directory(files: &[(&str, &[&str])]) -> tempfile::TempDir {
        let directory = tempfile::tempdir().unwrap();
        for (name, tensors) in files {
            let entries: Vec<String> = tensors
                .iter()
                .enumerate()
                .map(|(at, tensor)| {
                    format!(
                        r#""{tensor}":{{"dtype":"F32","shape":[1],"data_offsets":[{},{}]}}"#,
                        4 * at,
                        4 * at + 4
                    )
                })
                .collect();
            let header = format!("{{{}}}", entries.join(","));
            let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
            bytes.extend_from_slice(header.as_bytes());
            bytes.resize(bytes.len() + 4 * tensors.len(), 0);
            fs::write(directory.path().join(name), bytes).unwrap();
        }
        directory
    }

    fn check_index(index: &str, expected: &str) {
        let directory = directory(&[("one.safetensors", &["a"]), ("two.safetensors", &["b"])]);
        fs::write(directory.path().join(INDEX_FILE), index).unwrap();
        let message = Checkpoint::open(directory.path()).unwrap_err().to_string();
        assert!(message.contains(expected), "expected `{expected}` in: {message}");
    }

    #[test]
    fn tensors_are_found_over_all_files_of_the_index() {
        let directory = directory(&[("one.safetensors", &["a"]), ("two.safetensors", &["b", "c"])]);
        let index = r#"{"metadata":{},"weight_map":{"a":"one.safetensors","b":"two.safetensors"}}"#;
        fs::write(directory.path().join(INDEX_FILE), index).unwrap();
        let checkpoint = Checkpoint::open(directory.path()).unwrap();
        assert!(checkpoint.contains("a") && checkpoint.contains("b") && !checkpoint.contains("d"));
        assert_eq!(checkpoint.tensor("c").unwrap().shape, [1]);
    }

    #[test]
    fn without_an_index_every_safetensors_file_is_read() {
        let directory = directory(&[("x.safetensors", &["a"]), ("y.safetensors", &["b"])]);
        fs::write(directory.path().join("notes.txt"), "not weights").unwrap();
        let checkpoint = Checkpoint::open(directory.path()).unwrap();
        assert!(checkpoint.contains("a") && checkpoint.contains("b"));
    }

    #[test]
    fn the_single_file_goes_before_copies_in_other_files() {
        let directory = directory(&[(SINGLE_FILE, &["a"]), ("model.fp16.safetensors", &["a"])]);
        assert!(Checkpoint::open(directory.path()).unwrap().contains("a"));
    }

    #[test]
    fn a_name_in_two_files_is_an_error_that_names_both() {
        let directory = directory(&[("x.safetensors", &["a"]), ("y.safetensors", &["a"])]);
        let message = Checkpoint::open(directory.path()).unwrap_err().to_string();
        assert!(message.contains("x.safetensors") && message.contains("y.safetensors"), "{message}");
    }

    #[test]
    fn an_index_cannot_leave_its_directory() {
        for name in
            ["../one.safetensors", "/etc/passwd", "sub/one.safetensors", "..", ".", "", "one.safetensors/"]
        {
            check_index(&format!(r#"{{"weight_map":{{"a":"{name}"}}}}"#), "not the name of a file");
        }
    }

    #[test]
    fn a_wrong_index_is_an_error_that_names_what_is_wrong() {
        check_index("{", "model.safetensors.index.json: EOF");
        check_index("{}", "missing field `weight_map`");
        check_index(r#"{"weight_map":{"a":"none.safetensors"}}"#, "none.safetensors: No such file");
        check_index(r#"{"weight_map":{"a":"two.safetensors"}}"#, "tensor `a` is not in `two.safetensors`");
        check_index(r#"{"weight_map":{}}"#, "no .safetensors file");
    }

    #[test]
    fn a_directory_without_weights_or_no_directory_at_all_is_an_error() {
        let directory = directory(&[]);
        let message = Checkpoint::open(directory.path()).unwrap_err().to_string();
        assert!(message.contains("no .safetensors file"), "{message}");
        let message = Checkpoint::open(&directory.path().join("none")).unwrap_err().to_string();
        assert!(message.contains("none: No such file"), "{message}");
    }
}
