//! Writes files as `torch.save` does, and wrong ones.

/// A zip archive of stored entries, all in the folder `model`, about which anything may be a lie.
#[derive(Clone)]
pub(crate) struct Archive {
    pub(crate) entries: Vec<Entry>,
    /// What the end of the directory says, if not the truth.
    pub(crate) count: Option<u64>,
    pub(crate) directory_start: Option<u64>,
    /// Whether to write the directory's end with 64 bits.
    pub(crate) wide: bool,
    pub(crate) comment: Vec<u8>,
}

#[derive(Clone)]
pub(crate) struct Entry {
    pub(crate) name: String,
    pub(crate) bytes: Vec<u8>,
    pub(crate) method: u16,
    pub(crate) flags: u16,
    /// What the directory says, if not the truth.
    pub(crate) size: Option<u32>,
    pub(crate) packed: Option<u32>,
    pub(crate) header: Option<u32>,
    pub(crate) extra: Vec<u8>,
    /// What stands before the entry, if not the same name.
    pub(crate) local_name: Option<String>,
}

impl Archive {
    pub(crate) fn new(entries: &[(&str, &[u8])]) -> Self {
        let mut archive = Self {
            entries: Vec::new(),
            count: None,
            directory_start: None,
            wide: false,
            comment: Vec::new(),
        };
        for (name, bytes) in entries {
            archive.add(name, bytes);
        }
        archive
    }

    /// `data.pkl` and one storage, `data/0`.
    pub(crate) fn of(pickle: &[u8], storage: &[u8]) -> Self {
        Self::new(&[("data.pkl", pickle), ("byteorder", b"little"), ("data/0", storage)])
    }

    pub(crate) fn add(&mut self, name: &str, bytes: &[u8]) -> &mut Entry {
        self.entries.push(Entry {
            name: format!("model/{name}"),
            bytes: bytes.to_vec(),
            method: 0,
            flags: 0,
            size: None,
            packed: None,
            header: None,
            extra: Vec::new(),
            local_name: None,
        });
        self.entries.last_mut().expect("just added")
    }

    /// The same with one entry changed.
    pub(crate) fn with(mut self, name: &str, change: impl FnOnce(&mut Entry)) -> Self {
        let full = format!("model/{name}");
        change(self.entries.iter_mut().find(|entry| entry.name == full).expect("it was added"));
        self
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        let mut file = Vec::new();
        let mut directory = Vec::new();
        for entry in &self.entries {
            let header = entry.header.unwrap_or(file.len() as u32);
            let [packed, size] =
                [entry.packed, entry.size].map(|size| size.unwrap_or(entry.bytes.len() as u32));
            let local_name = entry.local_name.as_ref().unwrap_or(&entry.name);
            put(&mut file, &[0x0403_4b50], &[20, entry.flags, entry.method, 0, 0]);
            put(&mut file, &[0, 0, 0], &[local_name.len() as u16, 0]);
            file.extend_from_slice(local_name.as_bytes());
            file.extend_from_slice(&entry.bytes);
            put(&mut directory, &[0x0201_4b50], &[20, 20, entry.flags, entry.method, 0, 0]);
            put(&mut directory, &[0, packed, size], &[entry.name.len() as u16, entry.extra.len() as u16]);
            put(&mut directory, &[], &[0, 0, 0, 0, 0]);
            put(&mut directory, &[header], &[]);
            directory.extend_from_slice(entry.name.as_bytes());
            directory.extend_from_slice(&entry.extra);
        }
        let start = self.directory_start.unwrap_or(file.len() as u64);
        let count = self.count.unwrap_or(self.entries.len() as u64);
        let size = directory.len() as u64;
        file.extend(directory);
        if self.wide {
            let end = file.len() as u64;
            put(&mut file, &[0x0606_4b50], &[]);
            put_wide(&mut file, &[44]);
            put(&mut file, &[0x1e_001e, 0, 0], &[]);
            put_wide(&mut file, &[count, count, size, start]);
            put(&mut file, &[0x0706_4b50, 0], &[]);
            put_wide(&mut file, &[end]);
            put(&mut file, &[1], &[]);
        }
        put(&mut file, &[0x0605_4b50], &[0, 0, count as u16, count as u16]);
        put(&mut file, &[size as u32, start as u32], &[self.comment.len() as u16]);
        file.extend_from_slice(&self.comment);
        file
    }
}

fn put(file: &mut Vec<u8>, words: &[u32], halves: &[u16]) {
    words.iter().for_each(|word| file.extend_from_slice(&word.to_le_bytes()));
    halves.iter().for_each(|half| file.extend_from_slice(&half.to_le_bytes()));
}

fn put_wide(file: &mut Vec<u8>, numbers: &[u64]) {
    numbers.iter().for_each(|number| file.extend_from_slice(&number.to_le_bytes()));
}

/// A file in the format before PyTorch 1.6, of these pickles and these storages.
pub(crate) fn legacy(pickles: &[&[u8]], storages: &[(u64, &[u8])]) -> Vec<u8> {
    let mut file: Vec<u8> = pickles.concat();
    for (elements, bytes) in storages {
        file.extend_from_slice(&elements.to_le_bytes());
        file.extend_from_slice(bytes);
    }
    file
}
