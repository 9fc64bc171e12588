//! Weights into memory before the first request: at the speed of the disk, or at once when they are there already.
//!
//! The system is asked for a window ahead of the part that is waited for, so that the disk never idles: a checkpoint of
//! 2 GB comes in about the time that `cat` takes (README.md, "Figures"), and at once when it is in memory already.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use super::{MappedFile, WeightError};

/// Bytes that are waited for at once.
const CHUNK_BYTES: usize = 4 << 20;

/// Chunks that are asked for ahead of that.
const CHUNKS_AHEAD: usize = 16;

/// Reading such a gap costs less than leaving it out. Disks read ahead about as far.
const GAP_BYTES_MAX: usize = 128 << 10;

/// How far loading has come. The total stays the same from the first report on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Bytes in memory.
    pub done: u64,
    /// Bytes in all.
    pub total: u64,
}

/// Reads these ranges of files into memory, each byte once, and maps them into this process. Overlaps are welcome, order
/// does not matter. `report` is called before the first read and after each few megabytes, the last time with all done.
///
/// Errors when a file cannot be read, or has become shorter.
pub fn prefetch(
    ranges: &[(Arc<MappedFile>, Range<usize>)],
    mut report: impl FnMut(Progress),
) -> Result<(), WeightError> {
    let chunks: Vec<(&MappedFile, Range<usize>)> = merged(ranges).into_iter().flat_map(chunks).collect();
    let total = chunks.iter().map(|(_, range)| range.len() as u64).sum();
    let mut done = 0;
    report(Progress { done, total });
    let read_ahead = |at: usize| {
        if let Some((file, range)) = chunks.get(at) {
            file.read_ahead(range.clone());
        }
    };
    (0..CHUNKS_AHEAD).for_each(read_ahead);
    for (at, (file, range)) in chunks.iter().enumerate() {
        read_ahead(at + CHUNKS_AHEAD);
        file.populate(range.clone())
            .map_err(|source| WeightError::Read { file: file.path().to_owned(), source })?;
        done += range.len() as u64;
        report(Progress { done, total });
    }
    Ok(())
}

/// The ranges in the order of their files and offsets, those that touch or nearly touch as one.
fn merged(ranges: &[(Arc<MappedFile>, Range<usize>)]) -> Vec<(&MappedFile, Range<usize>)> {
    let mut order = HashMap::new();
    let mut sorted = Vec::new();
    for (file, range) in ranges {
        let next = order.len();
        let number = *order.entry(Arc::as_ptr(file)).or_insert(next);
        if !range.is_empty() {
            sorted.push((number, range.start, range.end, file));
        }
    }
    sorted.sort_unstable_by_key(|&(number, start, end, _)| (number, start, end));
    let mut merged: Vec<(&MappedFile, Range<usize>)> = Vec::new();
    for (_, start, end, file) in sorted {
        match merged.last_mut() {
            Some((last, range)) if std::ptr::eq(*last, &**file) && start <= range.end + GAP_BYTES_MAX => {
                range.end = range.end.max(end);
            }
            _ => merged.push((file, start..end)),
        }
    }
    merged
}

fn chunks((file, range): (&MappedFile, Range<usize>)) -> impl Iterator<Item = (&MappedFile, Range<usize>)> {
    let end = range.end;
    range.step_by(CHUNK_BYTES).map(move |start| (file, start..end.min(start + CHUNK_BYTES)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(directory: &tempfile::TempDir, name: &str, bytes: usize) -> Arc<MappedFile> {
        let path = directory.path().join(name);
        std::fs::write(&path, vec![1; bytes]).unwrap();
        Arc::new(MappedFile::open(&path).unwrap())
    }

    #[test]
    fn each_byte_is_counted_once_and_the_last_report_says_all() {
        let directory = tempfile::tempdir().unwrap();
        let (a, b) = (file(&directory, "a", 9 << 20), file(&directory, "b", 5000));
        let ranges = [
            (a.clone(), 0..5 << 20),
            (b.clone(), 100..5000),
            (a.clone(), 4 << 20..9 << 20),
            (b, 0..200),
            (a, 7..7),
        ];
        let mut reports = Vec::new();
        prefetch(&ranges, |progress| reports.push(progress)).unwrap();
        let total = (9 << 20) + 5000;
        assert!(reports.iter().all(|report| report.total == total));
        assert!(reports.is_sorted_by(|one, next| one.done < next.done), "{reports:?}");
        assert_eq!((reports[0].done, reports.last().unwrap().done), (0, total));
        assert_eq!(reports.len(), 5, "before, three chunks of one file and one of the other");
    }

    #[test]
    fn small_gaps_are_read_and_large_ones_are_not() {
        let directory = tempfile::tempdir().unwrap();
        let file = file(&directory, "a", 1 << 20);
        let ranges = [(file.clone(), 600_000..700_000), (file.clone(), 0..10), (file, 100_000..100_001)];
        let merged: Vec<_> = merged(&ranges).into_iter().map(|(_, range)| range).collect();
        assert_eq!(merged, [0..100_001, 600_000..700_000]);
    }

    #[test]
    fn a_file_that_became_shorter_is_an_error_that_names_it() {
        let directory = tempfile::tempdir().unwrap();
        let file = file(&directory, "cut.safetensors", 1 << 20);
        std::fs::File::options().write(true).open(file.path()).unwrap().set_len(1000).unwrap();
        let message = prefetch(&[(file, 0..1 << 20)], |_| ()).unwrap_err().to_string();
        assert!(message.contains("cut.safetensors: "), "{message}");
    }

    #[test]
    fn nothing_to_read_is_one_report() {
        let mut reports = Vec::new();
        prefetch(&[], |progress| reports.push(progress)).unwrap();
        assert_eq!(reports, [Progress { done: 0, total: 0 }]);
    }
}
