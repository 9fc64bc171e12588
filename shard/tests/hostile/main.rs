//! Files that lie, one row each: every one gives an error that names the file, and the tensor where there is one; none
//! is answered by a panic, by memory out of proportion to the file, or by hanging.

// Clippy's exception for tests covers `#[test]` functions, but not what they call.
#![allow(clippy::unwrap_used)]

mod archive;
mod configuration;
mod directory;
mod pickle;
mod pytorch;
mod safetensors;

use std::fs;
use std::num::NonZeroUsize;
use std::path::Path;
use std::time::{Duration, Instant};

use peak_alloc::PeakAlloc;
use shard::adapters::AdapterLayout;
use shard::backend::Device;
use shard::model::{ConfigFile, DecoderSpec};
use shard::text::tokenizer::Tokenizer;
use shard::weights::{Checkpoint, Partition};

/// Counts what each row makes the readers allocate.
#[global_allocator]
static MEMORY: PeakAlloc = PeakAlloc;

/// Reading must not take more than this, and so many times the files' bytes ([`Reader::bytes_per_byte_max`]).
const BYTES_MAX: usize = 8 << 20;

/// No row needs a second; a machine under load may be slow.
const TIME_MAX: Duration = Duration::from_secs(60);

/// What reads a directory's files.
#[derive(Clone, Copy, Debug)]
enum Reader {
    Weights,
    Configuration,
    Tokenizer,
    Adapter,
}

/// A directory that must not be accepted.
struct Row {
    name: &'static str,
    reader: Reader,
    /// What is in the directory.
    files: Vec<(&'static str, Vec<u8>)>,
    /// Makes what is not a plain file.
    prepare: fn(&Path),
    /// What the message has to say, the name of the file included.
    expected: &'static [&'static str],
}

impl Row {
    fn new(
        name: &'static str,
        reader: Reader,
        files: Vec<(&'static str, Vec<u8>)>,
        expected: &'static [&'static str],
    ) -> Self {
        Self { name, reader, files, prepare: |_| (), expected }
    }
}

impl Reader {
    fn bytes_per_byte_max(self) -> usize {
        match self {
            Self::Weights => 24,
            // Two bytes of JSON can be a number, which becomes a value of 72 bytes in a list that grows by doubling.
            // The limits on these files' sizes bound the rest.
            Self::Configuration | Self::Tokenizer | Self::Adapter => 128,
        }
    }

    fn message(self, directory: &Path) -> Option<String> {
        match self {
            Self::Weights => Checkpoint::open(directory).err().map(|error| error.to_string()),
            Self::Configuration => match ConfigFile::read(directory) {
                Err(error) => Some(error.to_string()),
                Ok(file) => DecoderSpec::of(&file).err().map(|error| error.to_string()),
            },
            Self::Tokenizer => Tokenizer::load(directory).err().map(|error| error.to_string()),
            Self::Adapter => no_layers().load(directory).err().map(|error| error.to_string()),
        }
    }
}

/// A model without linear layers: every tensor of an adapter is one too many for it.
fn no_layers() -> AdapterLayout {
    AdapterLayout {
        device: Device::cpu(NonZeroUsize::MIN).unwrap(),
        partition: Partition::WHOLE,
        linears: Vec::new(),
        body: String::new(),
        bodies: &[],
    }
}

/// Says what is wrong with how the row is answered.
fn check(row: &Row) -> Result<(), String> {
    let directory = tempfile::tempdir().unwrap();
    for (name, bytes) in &row.files {
        fs::write(directory.path().join(name), bytes).unwrap();
    }
    (row.prepare)(directory.path());
    let bytes: usize = row.files.iter().map(|(_, bytes)| bytes.len()).sum();

    MEMORY.reset_peak_usage();
    let (before, start) = (MEMORY.current_usage(), Instant::now());
    let message = row.reader.message(directory.path());
    let (taken, time) = (MEMORY.peak_usage().saturating_sub(before), start.elapsed());

    let message = message.ok_or("accepted")?;
    for expected in row.expected {
        if !message.contains(expected) {
            return Err(format!("expected `{expected}` in: {message}"));
        }
    }
    if message.chars().count() > 1000 || message.contains('\n') {
        return Err(format!("the message is no line: {message}"));
    }
    if taken > BYTES_MAX + row.reader.bytes_per_byte_max() * bytes {
        return Err(format!("{taken} bytes allocated for files of {bytes}: {message}"));
    }
    if time > TIME_MAX { Err(format!("took {time:?}: {message}")) } else { Ok(()) }
}

/// One test for all, so that nothing else allocates meanwhile.
#[test]
fn every_hostile_file_is_an_error_that_names_it() {
    let tables = [
        safetensors::rows(),
        pytorch::archives(),
        pytorch::pickles(),
        pytorch::legacy_files(),
        directory::indexes(),
        directory::not_files(),
        configuration::configs(),
        configuration::tokenizers(),
        configuration::adapters(),
    ];
    let rows: Vec<Row> = tables.into_iter().flatten().collect();
    assert!(rows.len() >= 40, "only {} rows", rows.len());
    let wrong: Vec<String> = rows
        .iter()
        .filter_map(|row| check(row).err().map(|wrong| format!("{} ({:?}): {wrong}", row.name, row.reader)))
        .collect();
    assert!(wrong.is_empty(), "{} of {} rows:\n{}", wrong.len(), rows.len(), wrong.join("\n"));
    println!("{} hostile directories, each answered by an error that names the file", rows.len());
}

/// The builders are right: what they build is accepted when nothing in it is wrong.
#[test]
fn what_the_rows_are_made_from_is_accepted() {
    let directory = tempfile::tempdir().unwrap();
    for (name, bytes) in
        pytorch::valid().into_iter().chain([("model.safetensors", safetensors::file(safetensors::VALID, 8))])
    {
        let path = directory.path().join(name);
        fs::write(&path, bytes).unwrap();
        let checkpoint = Checkpoint::open(directory.path()).map_err(|error| error.to_string());
        assert_eq!(checkpoint.map(|checkpoint| checkpoint.contains("weight")), Ok(true), "{name}");
        fs::remove_file(path).unwrap();
    }
}
