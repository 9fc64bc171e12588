//! The file that says which file of a checkpoint holds which tensor.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::path::{Component, Path, PathBuf};

use serde::Deserialize;

use super::WeightError;
use super::error::shown;
use super::unique_map::UniqueMap;
use crate::small_file;

/// Largest index accepted. Those of the largest published models stay below 20 MB.
const BYTES_MAX: u64 = 64_000_000;

/// `model.safetensors.index.json` or `pytorch_model.bin.index.json`.
#[derive(Debug)]
pub struct Index {
    path: PathBuf,
    weight_map: UniqueMap<String>,
}

impl Index {
    pub(super) fn read(path: PathBuf) -> Result<Self, WeightError> {
        match small_file::read(&path, BYTES_MAX) {
            Err(source) => Err(WeightError::Read { file: path, source }),
            Ok(bytes) => Self::parse(path, &bytes),
        }
    }

    /// The index with these contents. `path` is for errors: nothing is opened.
    ///
    /// Errors when it is no index, when it names no tensor or one twice, or when it names something else than files in its own
    /// directory: a checkpoint must not make us read elsewhere. (Such a file may be a symbolic link, and those of the
    /// hub's cache all are. Downloads make no links out of what a repository says, so whoever made one may read there.)
    pub fn parse(path: PathBuf, bytes: &[u8]) -> Result<Self, WeightError> {
        #[derive(Deserialize)]
        struct Contents {
            weight_map: UniqueMap<String>,
        }
        let Contents { weight_map } = match serde_json::from_slice(bytes) {
            Err(source) => return Err(WeightError::Json { file: path, source }),
            Ok(contents) => contents,
        };
        if weight_map.0.is_empty() {
            return Err(WeightError::IndexEmpty { file: path });
        }
        match weight_map.0.values().find(|name| !is_plain(name)) {
            Some(name) => Err(WeightError::IndexName { name: shown(name), file: path }),
            None => Ok(Self { path, weight_map }),
        }
    }

    /// Where it was found.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Names of tensors, each with the name of the file that holds it.
    pub(super) fn tensors(&self) -> impl Iterator<Item = (&str, &str)> {
        self.weight_map.0.iter().map(|(tensor, file)| (tensor.as_str(), file.as_str()))
    }

    /// The files it names, each once.
    pub fn file_names(&self) -> BTreeSet<&str> {
        self.weight_map.0.values().map(String::as_str).collect()
    }
}

/// Longest name of a file, on every file system in use.
const NAME_BYTES_MAX: usize = 255;

/// Whether this is a file's name, not a path.
fn is_plain(name: &str) -> bool {
    let mut components = Path::new(name).components();
    match (components.next(), components.next()) {
        (Some(Component::Normal(only)), None) => {
            only == OsStr::new(name) && name.len() <= NAME_BYTES_MAX && !name.contains('\0')
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(json: &str) -> Result<Index, WeightError> {
        Index::parse(PathBuf::from("an.index.json"), json.as_bytes())
    }

    fn check(json: &str, expected: &str) {
        let message = parse(json).unwrap_err().to_string();
        assert!(message.contains("an.index.json: ") && message.contains(expected), "{message}");
    }

    #[test]
    fn the_files_are_named_once_each() {
        let json = r#"{"metadata": {}, "weight_map": {"a": "x.bin", "b": "y.bin", "c": "x.bin"}}"#;
        assert_eq!(parse(json).unwrap().file_names(), BTreeSet::from(["x.bin", "y.bin"]));
    }

    #[test]
    fn a_path_is_not_the_name_of_a_file() {
        for name in
            ["../one.bin", "/etc/passwd", "sub/one.bin", "..", ".", "", "one.bin/", "./x", "a\\u0000b"]
        {
            check(&format!(r#"{{"weight_map":{{"a":"{name}"}}}}"#), "not the name of a file");
        }
    }

    #[test]
    fn what_is_no_index_is_an_error() {
        check("{", "EOF");
        check("{}", "missing field `weight_map`");
        check("[]", "invalid length");
        check(r#"{"weight_map": {"a": 1}}"#, "expected a string");
        check(r#"{"weight_map": {"a": "x", "a": "y"}}"#, "`a` is there twice");
        check(r#"{"weight_map": {}, "weight_map": {}}"#, "duplicate field");
        check(&format!(r#"{{"weight_map": {}"#, "{\"a\":".repeat(100_000)), "expected a string");
    }
}
