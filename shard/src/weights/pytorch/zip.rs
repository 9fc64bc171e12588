//! A zip archive whose entries are stored as they are: its directory, and where an entry's bytes lie.
//!
//! Every read is checked against the file, the directory at the end against the header before each entry, and nothing
//! is unpacked: an archive is never larger than its file.
//!
//! Source: PKWARE's APPNOTE.TXT, sections 4.3.7 (local header), 4.3.12 (directory), 4.3.14 to 4.3.16 (its end), 4.5.3
//! (64-bit sizes).

use std::collections::HashMap;
use std::ops::Range;

use super::error::ZipError;
use crate::weights::error::shown;

/// Most entries accepted: one per storage, and the largest models have a hundred thousand tensors.
const ENTRIES_MAX: u64 = 1 << 20;

const LOCAL_HEADER: (u32, usize) = (0x0403_4b50, 30);
const DIRECTORY_ENTRY: (u32, usize) = (0x0201_4b50, 46);
const DIRECTORY_END: (u32, usize) = (0x0605_4b50, 22);
const DIRECTORY_END_64: (u32, usize) = (0x0606_4b50, 56);
const LOCATOR_64: (u32, usize) = (0x0706_4b50, 20);

/// A comment may follow the end of the directory; its length has 16 bits.
const COMMENT_MAX: usize = u16::MAX as usize;

/// Tag of the extra field with 64-bit sizes.
const EXTRA_64: u16 = 1;

/// In a field of 32 bits: the value is in the extra field.
const IN_EXTRA: u64 = u32::MAX as u64;

const ENCRYPTED: u16 = 1;
const STORED: u16 = 0;

/// An archive in memory. All entries lie in one folder, which is not part of their names here.
#[derive(Debug)]
pub(super) struct Archive<'a> {
    bytes: &'a [u8],
    /// Where entries end, and the directory starts.
    data_end: usize,
    folder: &'a [u8],
    entries: HashMap<&'a [u8], Entry>,
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    flags: u16,
    method: u16,
    /// In the file.
    packed: u64,
    /// Unpacked.
    size: u64,
    /// Where its local header starts.
    header: u64,
}

/// The part of the file that lists the entries.
struct Directory {
    entries: u64,
    range: Range<usize>,
}

impl<'a> Archive<'a> {
    /// Reads the directory.
    ///
    /// Errors when it is not there, is broken, names an entry twice, or lists no `data.pkl`.
    pub(super) fn open(bytes: &'a [u8]) -> Result<Self, ZipError> {
        let directory = Directory::find(bytes)?;
        let data_end = directory.range.start;
        let entries = directory.read(bytes)?;
        let mut pickles = entries.keys().filter_map(|name| name.strip_suffix(b"data.pkl"));
        let folder = pickles.find(|folder| folder.last() == Some(&b'/'));
        let Some(folder) = folder else {
            return Err(ZipError::Missing { entry: "data.pkl".to_owned() });
        };
        if pickles.any(|other| other.last() == Some(&b'/')) {
            return Err(ZipError::Duplicate { entry: "data.pkl".to_owned() });
        }
        Ok(Self { bytes, data_end, folder, entries })
    }

    /// Where the bytes of an entry lie; `None` when there is no such entry.
    ///
    /// Errors when it is compressed or encrypted, or not where the directory says.
    pub(super) fn find(&self, name: &str) -> Result<Option<Range<usize>>, ZipError> {
        let full = [self.folder, name.as_bytes()].concat();
        let Some(entry) = self.entries.get(full.as_slice()) else { return Ok(None) };
        let packed = |how| Err(ZipError::Packed { entry: shown(name), how });
        if entry.flags & ENCRYPTED != 0 {
            return packed("encrypted");
        }
        if entry.method != STORED || entry.packed != entry.size {
            return packed("compressed");
        }
        match self.locate(&full, entry) {
            None => Err(ZipError::Entry { entry: shown(name) }),
            found => Ok(found),
        }
    }

    /// As [`Self::find`], of an entry that has to be there.
    pub(super) fn range(&self, name: &str) -> Result<Range<usize>, ZipError> {
        self.find(name)?.ok_or_else(|| ZipError::Missing { entry: shown(name) })
    }

    /// The bytes behind the entry's local header, which has to agree with the directory.
    fn locate(&self, name: &[u8], entry: &Entry) -> Option<Range<usize>> {
        let header = Record::at(&self.bytes[..self.data_end], entry.header, LOCAL_HEADER)?;
        let [name_length, extra_length] = [header.u16(26), header.u16(28)].map(usize::from);
        let name_start = header.end;
        let agrees = header.u16(8) == STORED
            && self.bytes.get(name_start..name_start + name_length) == Some(name)
            && header.u16(6) & ENCRYPTED == 0;
        let start = name_start + name_length + extra_length;
        let end = usize::try_from(entry.size).ok().and_then(|size| start.checked_add(size))?;
        (agrees && end <= self.data_end).then_some(start..end)
    }
}

impl Directory {
    fn find(bytes: &[u8]) -> Result<Self, ZipError> {
        let last = bytes.len().checked_sub(DIRECTORY_END.1).ok_or(ZipError::NoDirectory)?;
        let ends = (last.saturating_sub(COMMENT_MAX)..=last).rev();
        let mut ends = ends.filter_map(|at| Record::at(bytes, at as u64, DIRECTORY_END));
        let end = ends
            .find(|end| end.end + usize::from(end.u16(20)) == bytes.len())
            .ok_or(ZipError::NoDirectory)?;
        let locator = (end.start as u64).checked_sub(LOCATOR_64.1 as u64);
        let (entries, size, start, limit) = match locator.and_then(|at| Record::at(bytes, at, LOCATOR_64)) {
            Some(locator) => {
                let end = Record::at(&bytes[..locator.start], locator.u64(8), DIRECTORY_END_64)
                    .ok_or(ZipError::Directory { what: "its 64-bit end is not where it should be" })?;
                (end.u64(32), end.u64(40), end.u64(48), end.start)
            }
            None => (u64::from(end.u16(10)), u64::from(end.u32(12)), u64::from(end.u32(16)), end.start),
        };
        let range = start.checked_add(size).filter(|&end| end <= limit as u64);
        let Some(end) = range else {
            return Err(ZipError::Directory { what: "it lies outside of the file" });
        };
        // Both are at most the file's length now.
        Ok(Self { entries, range: start as usize..end as usize })
    }

    fn read<'a>(&self, bytes: &'a [u8]) -> Result<HashMap<&'a [u8], Entry>, ZipError> {
        if self.entries > ENTRIES_MAX {
            return Err(ZipError::TooMany { entries: self.entries, limit: ENTRIES_MAX });
        }
        let broken = |what| ZipError::Directory { what };
        let directory = &bytes[self.range.clone()];
        let mut entries = HashMap::new();
        let mut at = 0;
        for _ in 0..self.entries {
            let record = Record::at(directory, at as u64, DIRECTORY_ENTRY)
                .ok_or(broken("it has fewer entries than it says"))?;
            let [name, extra, comment] = [28, 30, 32].map(|field| usize::from(record.u16(field)));
            at = record.end + name + extra + comment;
            let rest = directory.get(record.end..at).ok_or(broken("an entry reaches beyond its end"))?;
            let (name, rest) = rest.split_at(name);
            let entry = Entry::read(&record, &rest[..extra]).ok_or(broken("a 64-bit size is missing"))?;
            if entries.insert(name, entry).is_some() {
                return Err(ZipError::Duplicate { entry: shown(&String::from_utf8_lossy(name)) });
            }
        }
        if at == directory.len() { Ok(entries) } else { Err(broken("it has more entries than it says")) }
    }
}

impl Entry {
    /// From its record in the directory; `None` when a 64-bit size is announced and not there.
    fn read(record: &Record<'_>, extra: &[u8]) -> Option<Self> {
        let [mut packed, mut size, mut header] = [20, 24, 42].map(|field| u64::from(record.u32(field)));
        let mut large = extra_64(extra).as_chunks::<8>().0.iter().map(|bytes| u64::from_le_bytes(*bytes));
        // In this order, and only those that did not fit.
        for value in [&mut size, &mut packed, &mut header] {
            if *value == IN_EXTRA {
                *value = large.next()?;
            }
        }
        Some(Self { flags: record.u16(8), method: record.u16(10), packed, size, header })
    }
}

/// The 64-bit sizes among the extra fields of an entry, each of which has a tag and a length.
fn extra_64(mut extra: &[u8]) -> &[u8] {
    while let Some(([t0, t1, l0, l1], rest)) = extra.split_first_chunk::<4>() {
        let length = usize::from(u16::from_le_bytes([*l0, *l1])).min(rest.len());
        let (field, next) = rest.split_at(length);
        if u16::from_le_bytes([*t0, *t1]) == EXTRA_64 {
            return field;
        }
        extra = next;
    }
    &[]
}

/// A signature and the fixed fields behind it.
struct Record<'a> {
    start: usize,
    end: usize,
    fields: &'a [u8],
}

impl<'a> Record<'a> {
    /// The record at this place, if it is one of this kind and all of it is there.
    fn at(bytes: &'a [u8], start: u64, (signature, length): (u32, usize)) -> Option<Self> {
        let start = usize::try_from(start).ok()?;
        let end = start.checked_add(length)?;
        let fields = bytes.get(start..end)?;
        fields.starts_with(&signature.to_le_bytes()).then_some(Self { start, end, fields })
    }

    fn u16(&self, at: usize) -> u16 {
        u16::from_le_bytes(self.field(at))
    }

    fn u32(&self, at: usize) -> u32 {
        u32::from_le_bytes(self.field(at))
    }

    fn u64(&self, at: usize) -> u64 {
        u64::from_le_bytes(self.field(at))
    }

    fn field<const SIZE: usize>(&self, at: usize) -> [u8; SIZE] {
        *self.fields[at..].first_chunk().expect("fields lie inside of their record")
    }
}
