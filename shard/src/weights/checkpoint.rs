//! The files of a checkpoint directory, and tensors by name over all of them.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use safetensors::tensor::Dtype;

use super::error::shown;
use super::{Format, Index, MappedFile, Tensors, WeightError};

/// Words in the names of files that `transformers` keeps beside the weights, such as `training_args.bin`.
const NOT_WEIGHTS: [&str; 3] = ["arguments", "args", "training"];

/// One way to store a checkpoint.
struct Layout {
    format: Format,
    extension: &'static str,
    /// The whole checkpoint in one file.
    single: Option<&'static str>,
    /// Which file holds which tensor, when there are several.
    index: Option<&'static str>,
}

/// In the order of preference: the first that is there is read.
const LAYOUTS: [Layout; 3] = [
    Layout {
        format: Format::Safetensors,
        extension: "safetensors",
        single: Some("model.safetensors"),
        index: Some("model.safetensors.index.json"),
    },
    Layout {
        format: Format::PyTorch,
        extension: "bin",
        single: Some("pytorch_model.bin"),
        index: Some("pytorch_model.bin.index.json"),
    },
    Layout { format: Format::PyTorch, extension: "pt", single: None, index: None },
];

/// Every tensor of a directory, by name. Opening maps files and reads headers; the weights stay on disk until used.
#[derive(Debug)]
pub struct Checkpoint {
    directory: PathBuf,
    files: Vec<TensorFile>,
    /// Name to position in `files`.
    holder: HashMap<String, usize>,
}

#[derive(Debug)]
struct TensorFile {
    file: Arc<MappedFile>,
    tensors: Tensors,
}

/// A tensor as it is stored: bytes of a mapped file, in the order of the indexes.
#[derive(Debug)]
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
    /// Opens the weights in this directory: its safetensors files if there are any, or else its `.bin` files, or else its
    /// `.pt` files. Of each kind, that is the file with the usual name, or else those that an index names, or else all.
    ///
    /// Errors when a file is missing or broken, when the index is wrong, or when a name occurs in two files.
    pub fn open(directory: &Path) -> Result<Self, WeightError> {
        for Layout { format, extension, single, index } in LAYOUTS {
            if let Some(single) = single.filter(|name| is_there(&directory.join(name))) {
                return Self::open_files(directory, format, [single]);
            }
            if let Some(index) = index.map(|name| directory.join(name)).filter(|path| is_there(path)) {
                let index = Index::read(index)?;
                let checkpoint = Self::open_files(directory, format, index.file_names())?;
                checkpoint.check(&index)?;
                return Ok(checkpoint);
            }
            let names = names(directory, extension)?;
            if !names.is_empty() {
                return Self::open_files(directory, format, names);
            }
        }
        Err(WeightError::NoFiles { directory: directory.to_owned() })
    }

    /// Where it was found.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Whether there is a tensor of this name.
    pub fn contains(&self, name: &str) -> bool {
        self.holder.contains_key(name)
    }

    /// The names of all tensors, in no order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.holder.keys().map(String::as_str)
    }

    /// The tensor of this name. If its elements are scattered in the file, this copies them the first time.
    pub(super) fn tensor(&self, name: &str) -> Result<StoredTensor<'_>, WeightError> {
        let missing = || WeightError::Missing { directory: self.directory.clone(), tensor: name.to_owned() };
        let TensorFile { file, tensors } = &self.files[*self.holder.get(name).ok_or_else(missing)?];
        let tensor = tensors.get(name).ok_or_else(missing)?;
        let (file, bytes) = tensor.contiguous(file);
        Ok(StoredTensor {
            file,
            start: bytes.start,
            end: bytes.end,
            dtype: tensor.dtype,
            shape: &tensor.shape,
        })
    }

    fn open_files(
        directory: &Path,
        format: Format,
        names: impl IntoIterator<Item = impl AsRef<OsStr>>,
    ) -> Result<Self, WeightError> {
        let mut checkpoint =
            Self { directory: directory.to_owned(), files: Vec::new(), holder: HashMap::new() };
        for name in names {
            checkpoint.add(TensorFile::open(format, &directory.join(name.as_ref()))?)?;
        }
        Ok(checkpoint)
    }

    fn add(&mut self, file: TensorFile) -> Result<(), WeightError> {
        for name in file.tensors.names() {
            if let Some(first) = self.holder.insert(name.to_owned(), self.files.len()) {
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

    /// Every tensor is in the file that the index names.
    fn check(&self, index: &Index) -> Result<(), WeightError> {
        for (tensor, name) in index.tensors() {
            let holder = self.holder.get(tensor).map(|&file| self.files[file].file.path());
            if holder.and_then(Path::file_name) != Some(OsStr::new(name)) {
                return Err(WeightError::IndexTensor {
                    file: index.path().to_owned(),
                    tensor: shown(tensor),
                    name: shown(name),
                });
            }
        }
        Ok(())
    }
}

impl TensorFile {
    /// Maps the file, and holds what it says about itself against its contents.
    fn open(format: Format, path: &Path) -> Result<Self, WeightError> {
        let file =
            MappedFile::open(path).map_err(|source| WeightError::Read { file: path.to_owned(), source })?;
        let tensors = Tensors::parse(format, path, file.bytes())?;
        Ok(Self { file: Arc::new(file), tensors })
    }
}

/// Also when it is a link to nothing: what the name leads to is then missing, and opening it says so.
fn is_there(path: &Path) -> bool {
    path.symlink_metadata().is_ok()
}

/// The names of all files with this extension that may hold weights, in a fixed order.
fn names(directory: &Path, extension: &str) -> Result<Vec<PathBuf>, WeightError> {
    let failed = |source| WeightError::Read { file: directory.to_owned(), source };
    let mut names = Vec::new();
    for entry in fs::read_dir(directory).map_err(failed)? {
        let name = PathBuf::from(entry.map_err(failed)?.file_name());
        let stem = name.to_string_lossy();
        if name.extension() == Some(OsStr::new(extension))
            && !NOT_WEIGHTS.iter().any(|word| stem.contains(word))
        {
            names.push(name);
        }
    }
    names.sort();
    Ok(names)
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
        fs::write(directory.path().join("model.safetensors.index.json"), index).unwrap();
        let message = Checkpoint::open(directory.path()).unwrap_err().to_string();
        assert!(message.contains(expected), "expected `{expected}` in: {message}");
    }

    #[test]
    fn tensors_are_found_over_all_files_of_the_index() {
        let directory = directory(&[("one.safetensors", &["a"]), ("two.safetensors", &["b", "c"])]);
        let index = r#"{"metadata":{},"weight_map":{"a":"one.safetensors","b":"two.safetensors"}}"#;
        fs::write(directory.path().join("model.safetensors.index.json"), index).unwrap();
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
        let directory = directory(&[("model.safetensors", &["a"]), ("model.fp16.safetensors", &["a"])]);
        assert!(Checkpoint::open(directory.path()).unwrap().contains("a"));
    }

    #[test]
    fn a_name_in_two_files_is_an_error_that_names_both() {
        let directory = directory(&[("x.safetensors", &["a"]), ("y.safetensors", &["a"])]);
        let message = Checkpoint::open(directory.path()).unwrap_err().to_string();
        assert!(message.contains("x.safetensors") && message.contains("y.safetensors"), "{message}");
    }

    #[test]
    fn a_wrong_index_is_an_error_that_names_what_is_wrong() {
        check_index("{", "model.safetensors.index.json: EOF");
        check_index("{}", "missing field `weight_map`");
        check_index(r#"{"weight_map":{"a":"none.safetensors"}}"#, "none.safetensors: No such file");
        check_index(r#"{"weight_map":{"a":"two.safetensors"}}"#, "tensor `a` is not in `two.safetensors`");
        check_index(r#"{"weight_map":{}}"#, "names no tensor");
    }

    #[test]
    fn a_directory_without_weights_or_no_directory_at_all_is_an_error() {
        let directory = directory(&[]);
        let message = Checkpoint::open(directory.path()).unwrap_err().to_string();
        assert!(message.contains("no .safetensors file"), "{message}");
        let message = Checkpoint::open(&directory.path().join("none")).unwrap_err().to_string();
        assert!(message.contains("none: No such file"), "{message}");
    }

    /// What `tests/pytorch/make.py` saves; both hold tensors of the same names.
    const TORCH: [&[u8]; 2] =
        [include_bytes!("../../tests/pytorch/zip.bin"), include_bytes!("../../tests/pytorch/legacy.bin")];

    #[test]
    fn torch_files_are_read_only_when_there_is_nothing_else() {
        let directory = directory(&[("some.safetensors", &["a"])]);
        let path = directory.path();
        let has = |name| Checkpoint::open(path).unwrap().contains(name);
        fs::write(path.join("weights.pt"), TORCH[0]).unwrap();
        fs::write(path.join("pytorch_model.bin"), "never looked at").unwrap();
        assert!(has("a") && !has("embedding"));
        fs::remove_file(path.join("some.safetensors")).unwrap();
        assert!(Checkpoint::open(path).unwrap_err().to_string().contains("pytorch_model.bin: "));
        fs::remove_file(path.join("pytorch_model.bin")).unwrap();
        assert!(has("embedding"));
    }

    #[test]
    fn what_a_trainer_keeps_beside_its_weights_is_no_checkpoint() {
        let directory = directory(&[]);
        for name in ["training_args.bin", "my_arguments.bin", "args.pt", "training.safetensors"] {
            fs::write(directory.path().join(name), "something else").unwrap();
        }
        assert!(matches!(Checkpoint::open(directory.path()), Err(WeightError::NoFiles { .. })));
        fs::write(directory.path().join("model.bin"), TORCH[1]).unwrap();
        assert!(Checkpoint::open(directory.path()).unwrap().contains("linear.weight"));
    }

    #[test]
    fn torch_files_have_an_index_of_their_own() {
        let directory = directory(&[]);
        let path = directory.path();
        fs::write(path.join("a.bin"), TORCH[0]).unwrap();
        fs::write(path.join("b.bin"), TORCH[1]).unwrap();
        let message = Checkpoint::open(path).unwrap_err().to_string();
        assert!(message.contains("a.bin") && message.contains("b.bin"), "{message}");
        let index = path.join("pytorch_model.bin.index.json");
        fs::write(&index, r#"{"weight_map": {"row": "b.bin"}}"#).unwrap();
        let checkpoint = Checkpoint::open(path).unwrap();
        assert_eq!(checkpoint.tensor("row").unwrap().file.path(), path.join("b.bin"));
        assert_eq!(checkpoint.names().count(), 12);
    }

    #[test]
    fn scattered_elements_of_a_torch_file_look_like_any_other_tensor() {
        let directory = directory(&[]);
        fs::write(directory.path().join("pytorch_model.bin"), TORCH[0]).unwrap();
        let checkpoint = Checkpoint::open(directory.path()).unwrap();
        let StoredTensor { file, start, end, dtype, shape } = checkpoint.tensor("columns").unwrap();
        let elements: Vec<u8> =
            [-3.5f32, -1.5, 1.5, 3.5, 6.5, 8.5].iter().flat_map(|value| value.to_le_bytes()).collect();
        assert_eq!((dtype, shape, &file.bytes()[start..end]), (Dtype::F32, &[3, 2][..], &elements[..]));
    }
}
