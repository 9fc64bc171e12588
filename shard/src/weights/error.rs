use std::io;
use std::path::PathBuf;

use thiserror::Error;

use super::pytorch::TorchError;

/// Why a checkpoint's weights cannot be used. Each names the file, and the tensor where there is one.
#[derive(Debug, Error)]
pub enum WeightError {
    /// A file or directory cannot be read.
    #[error("{}: {source}", file.display())]
    Read {
        /// What was to be read.
        file: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// There is nothing to load.
    #[error("{}: no .safetensors file in this directory, and no .bin or .pt file", directory.display())]
    NoFiles {
        /// Where one was expected.
        directory: PathBuf,
    },
    /// The file ends before its header does.
    #[error("{}: the header claims {header} bytes, the file has {bytes} in all; is the download complete?", file.display())]
    HeaderLength {
        /// The file.
        file: PathBuf,
        /// What its first eight bytes say.
        header: u64,
        /// What there is.
        bytes: usize,
    },
    /// The header is larger than any real one.
    #[error("{}: the header claims {header} bytes, the limit is {limit}", file.display())]
    HeaderTooLarge {
        /// The file.
        file: PathBuf,
        /// What its first eight bytes say.
        header: u64,
        /// Largest accepted.
        limit: usize,
    },
    /// The file has no room for the length of a header.
    #[error("{}: not a safetensors file, it has only {bytes} bytes", file.display())]
    NoHeader {
        /// The file.
        file: PathBuf,
        /// What there is.
        bytes: usize,
    },
    /// A header or an index is not the JSON it should be.
    #[error("{}: {}", file.display(), shown(&source.to_string()))]
    Json {
        /// The file.
        file: PathBuf,
        /// What is wrong, and where.
        source: serde_json::Error,
    },
    /// A file that `torch.save` should have written is not as it should be.
    #[error("{}: {source}", file.display())]
    Torch {
        /// The file.
        file: PathBuf,
        /// What is wrong, and with which tensor.
        source: Box<TorchError>,
    },
    /// A tensor's offsets do not hold what its shape and type need.
    #[error("{}: tensor `{tensor}` is {dtype} {shape:?}, which does not fill bytes {start}..{end}", file.display())]
    TensorSize {
        /// The file.
        file: PathBuf,
        /// The tensor.
        tensor: String,
        /// Its element type.
        dtype: String,
        /// Its shape.
        shape: Vec<usize>,
        /// Where the header says it starts.
        start: usize,
        /// Where the header says it ends.
        end: usize,
    },
    /// A tensor reaches beyond the end of the file.
    #[error(
        "{}: tensor `{tensor}` ends at data byte {end}, the file holds {data}; is the download complete?",
        file.display()
    )]
    TensorRange {
        /// The file.
        file: PathBuf,
        /// The tensor.
        tensor: String,
        /// Where it ends.
        end: usize,
        /// Bytes after the header.
        data: usize,
    },
    /// Tensors overlap, or bytes lie between them.
    #[error("{}: tensor `{tensor}` starts at data byte {start}, {expected} expected", file.display())]
    TensorOffset {
        /// The file.
        file: PathBuf,
        /// The tensor.
        tensor: String,
        /// Where it starts.
        start: usize,
        /// Where the one before it ends.
        expected: usize,
    },
    /// Bytes after the last tensor.
    #[error("{}: {extra} bytes after the last tensor", file.display())]
    Trailing {
        /// The file.
        file: PathBuf,
        /// How many.
        extra: usize,
    },
    /// Two files hold a tensor of the same name.
    #[error("tensor `{tensor}` is in both {} and {}", first.display(), second.display())]
    Duplicate {
        /// The tensor.
        tensor: String,
        /// One file.
        first: PathBuf,
        /// The other.
        second: PathBuf,
    },
    /// The index names something other than a file beside it.
    #[error("{}: `{name}` is not the name of a file in the same directory", file.display())]
    IndexName {
        /// The index.
        file: PathBuf,
        /// What it names.
        name: String,
    },
    /// The index says nothing.
    #[error("{}: names no tensor", file.display())]
    IndexEmpty {
        /// The index.
        file: PathBuf,
    },
    /// The index promises a tensor that the file does not hold.
    #[error("{}: tensor `{tensor}` is not in `{name}`", file.display())]
    IndexTensor {
        /// The index.
        file: PathBuf,
        /// The tensor.
        tensor: String,
        /// The file that should hold it.
        name: String,
    },
    /// The model needs a tensor that no file holds.
    #[error("{}: tensor `{tensor}` is missing", directory.display())]
    Missing {
        /// The checkpoint.
        directory: PathBuf,
        /// The tensor.
        tensor: String,
    },
    /// The tensor does not fit the configuration.
    #[error("{}: tensor `{tensor}` has shape {found:?}, {expected:?} expected", file.display())]
    Shape {
        /// The file.
        file: PathBuf,
        /// The tensor.
        tensor: String,
        /// What follows from the configuration.
        expected: Vec<usize>,
        /// What is stored.
        found: Vec<usize>,
    },
    /// The tensor's element type is none that a layer can use.
    #[error("{}: tensor `{tensor}` is stored as {found}; F32, F16 and BF16 are served", file.display())]
    DType {
        /// The file.
        file: PathBuf,
        /// The tensor.
        tensor: String,
        /// What is stored.
        found: String,
    },
}

/// A text from a file, fit for one line of a log.
pub(crate) fn shown(name: &str) -> String {
    const CHARS_MAX: usize = 200;
    let mut line: String = name.chars().take(CHARS_MAX).flat_map(char::escape_debug).collect();
    if name.chars().nth(CHARS_MAX).is_some() {
        line.push('…');
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_shown_on_one_line_of_bounded_length() {
        assert_eq!(shown("a\nb"), "a\\nb");
        assert_eq!(shown(&"x".repeat(1000)).chars().count(), 201);
    }
}
