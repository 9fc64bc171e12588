use thiserror::Error;

/// Why a file that `torch.save` should have written cannot be used. The file is named by what carries this.
#[derive(Debug, Error)]
pub enum TorchError {
    /// Neither of the two formats.
    #[error("torch.save did not write this: {bytes} bytes that start with `{start}`")]
    Format {
        /// The first bytes, escaped.
        start: String,
        /// How long the file is.
        bytes: usize,
    },
    /// The archive around the tensors.
    #[error(transparent)]
    Zip(#[from] ZipError),
    /// The description of the tensors.
    #[error(transparent)]
    Pickle(#[from] PickleError),
    /// Written on another kind of machine.
    #[error("its numbers are not stored in little-endian order")]
    ByteOrder,
    /// One of the parts that precede a legacy file's storages.
    #[error("its {part} is not what torch.save writes")]
    Part {
        /// Which one.
        part: &'static str,
    },
    /// There is nothing to load.
    #[error("holds no dictionary with tensors by name")]
    NoTensors,
    /// Which of two is meant?
    #[error("tensor `{tensor}` is there twice")]
    Duplicate {
        /// The tensor.
        tensor: String,
    },
    /// A part of a tensor's description is not what it should be.
    #[error("tensor `{tensor}`: its {part} is not what torch.save writes")]
    Tensor {
        /// The tensor.
        tensor: String,
        /// Which part of it.
        part: &'static str,
    },
    /// The storage is not in the file.
    #[error("tensor `{tensor}`: its storage `{key}` is missing; is the download complete?")]
    StorageMissing {
        /// The tensor.
        tensor: String,
        /// The name of the storage.
        key: String,
    },
    /// The storage does not have the length it should have.
    #[error(
        "tensor `{tensor}`: its storage `{key}` has {bytes} bytes, {elements} elements of {dtype} expected"
    )]
    StorageSize {
        /// The tensor.
        tensor: String,
        /// The name of the storage.
        key: String,
        /// How long it is.
        bytes: usize,
        /// How many elements it should hold.
        elements: u64,
        /// Of which type.
        dtype: String,
    },
    /// The tensor reaches beyond the end of its storage.
    #[error(
        "tensor `{tensor}` of shape {shape:?} and strides {strides:?} from element {offset} on does not fit into its \
         storage `{key}` of {elements} elements"
    )]
    TensorRange {
        /// The tensor.
        tensor: String,
        /// Its sizes.
        shape: Vec<usize>,
        /// Elements between neighbours.
        strides: Vec<usize>,
        /// Its first element in the storage.
        offset: usize,
        /// The name of the storage.
        key: String,
        /// What the storage holds.
        elements: usize,
    },
    /// The tensor repeats elements, and would be larger in memory than in the file.
    #[error("tensor `{tensor}` of shape {shape:?} repeats the {elements} elements of its storage `{key}`")]
    TensorRepeats {
        /// The tensor.
        tensor: String,
        /// Its sizes.
        shape: Vec<usize>,
        /// The name of the storage.
        key: String,
        /// What the storage holds.
        elements: usize,
    },
    /// The storages of a legacy file stop early.
    #[error("storage `{key}` is cut off; is the download complete?")]
    StorageCut {
        /// The name of the storage.
        key: String,
    },
    /// A storage of a legacy file belongs to no tensor, so that nothing says how long its elements are.
    #[error("storage `{key}` is described twice, or not at all")]
    StorageUnknown {
        /// The name of the storage.
        key: String,
    },
    /// A storage of a legacy file says another length than the pickle.
    #[error("storage `{key}` holds {stored} elements, {described} are described")]
    StorageLength {
        /// The name of the storage.
        key: String,
        /// What stands before its bytes.
        stored: u64,
        /// What the pickle says.
        described: u64,
    },
}

/// Why a pickle is not read to its end. Positions count from the start of the pickle.
#[derive(Debug, Error)]
pub enum PickleError {
    /// It stops in the middle.
    #[error("its pickle ends too early; is the download complete?")]
    End,
    /// Only protocol 2 is read, which is what `torch.save` writes unless told otherwise.
    #[error("its pickle has protocol {version}; only protocol 2, torch.save's default, is read")]
    Protocol {
        /// What it says.
        version: u8,
    },
    /// An instruction that no dictionary of tensors needs.
    #[error("its pickle has opcode {opcode:#04x} at byte {at}, which tensors do not need; it is refused")]
    Opcode {
        /// The instruction.
        opcode: u8,
        /// Where.
        at: usize,
    },
    /// A name that is none of those that tensors are made of.
    #[error(
        "its pickle refers to `{name}`, which is refused: weight files may hold tensors, and run nothing"
    )]
    Global {
        /// Module and name.
        name: String,
    },
    /// A name that may not be used in this way.
    #[error("its pickle uses `{name}` at byte {at} in a way that tensors do not need; it is refused")]
    Call {
        /// What is used.
        name: String,
        /// Where.
        at: usize,
    },
    /// A string that is no text.
    #[error("its pickle has a string at byte {at} that is not UTF-8")]
    Text {
        /// Where.
        at: usize,
    },
    /// An instruction finds something else than it works on.
    #[error("its pickle is broken at byte {at}: opcode {opcode:#04x} does not find what it needs")]
    Stack {
        /// The instruction.
        opcode: u8,
        /// Where.
        at: usize,
    },
    /// It needs more memory than descriptions of tensors do.
    #[error("its pickle has more than {limit} {what}")]
    Large {
        /// Of which there are too many.
        what: &'static str,
        /// How many are read.
        limit: usize,
    },
}

/// Why an archive is not read. Entries are named without the folder that all of them lie in.
#[derive(Debug, Error)]
pub enum ZipError {
    /// The end of the file is not that of an archive.
    #[error("the archive has no directory at its end; is the download complete?")]
    NoDirectory,
    /// The directory contradicts itself or the file.
    #[error("the archive's directory is broken: {what}")]
    Directory {
        /// What is wrong.
        what: &'static str,
    },
    /// More entries than any checkpoint has.
    #[error("the archive has {entries} entries, the limit is {limit}")]
    TooMany {
        /// What it says.
        entries: u64,
        /// Most accepted.
        limit: u64,
    },
    /// Two entries have one name.
    #[error("the archive has two entries `{entry}`")]
    Duplicate {
        /// The name.
        entry: String,
    },
    /// An entry that has to be there.
    #[error("the archive has no entry `{entry}`")]
    Missing {
        /// The name.
        entry: String,
    },
    /// An entry whose bytes are not simply there.
    #[error("the archive's entry `{entry}` is {how}; torch.save stores entries as they are")]
    Packed {
        /// The name.
        entry: String,
        /// Compressed or encrypted.
        how: &'static str,
    },
    /// What the directory says about an entry is not what stands before the entry.
    #[error("the archive's entry `{entry}` is not where, or not what, its directory says")]
    Entry {
        /// The name.
        entry: String,
    },
}
