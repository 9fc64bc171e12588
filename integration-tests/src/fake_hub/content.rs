//! What the files of a fake Hub are made of: bytes, or a rule that makes gigabytes without holding them.

use std::path::Path;
use std::sync::{Arc, OnceLock};

use anyhow::Result;
use ring::digest::{Context, SHA1_FOR_LEGACY_USE_ONLY, SHA256};

use super::LARGE;

/// Bytes of one block of a generated file. Each begins with its number, so that no two are the same.
const BLOCK: usize = 64 << 10;

/// The contents of a file.
#[derive(Clone, Debug)]
pub struct Content {
    bytes: Bytes,
    etag: Arc<OnceLock<String>>,
}

#[derive(Clone, Debug)]
enum Bytes {
    Given(Arc<[u8]>),
    Generated(u64),
}

impl Content {
    /// These bytes.
    pub fn of(bytes: impl AsRef<[u8]>) -> Self {
        Self { bytes: Bytes::Given(bytes.as_ref().into()), etag: Arc::default() }
    }

    /// The bytes of a file.
    pub fn read(path: &Path) -> Result<Self> {
        Ok(Self::of(std::fs::read(path)?))
    }

    /// So many bytes, made when they are asked for.
    pub fn generated(length: u64) -> Self {
        Self { bytes: Bytes::Generated(length), etag: Arc::default() }
    }

    /// How many bytes.
    pub fn length(&self) -> u64 {
        match &self.bytes {
            Bytes::Given(bytes) => bytes.len() as u64,
            Bytes::Generated(length) => *length,
        }
    }

    /// Whether the Hub would keep it as a large file.
    pub fn is_large(&self) -> bool {
        self.length() >= LARGE
    }

    /// The bytes from `start` on, at most so many as `buffer` holds; says how many.
    pub fn fill(&self, start: u64, buffer: &mut [u8]) -> usize {
        let count =
            buffer.len().min(usize::try_from(self.length().saturating_sub(start)).unwrap_or(usize::MAX));
        let buffer = &mut buffer[..count];
        match &self.bytes {
            Bytes::Given(bytes) => {
                let start = usize::try_from(start).unwrap_or(usize::MAX);
                buffer.copy_from_slice(&bytes[start..start + count]);
            }
            Bytes::Generated(_) => generate(start, buffer),
        }
        count
    }

    /// Its name on the Hub: sha256 of large files, git's sha1 of the others.
    pub fn etag(&self) -> String {
        let sum = || {
            let mut sum = if self.is_large() {
                Context::new(&SHA256)
            } else {
                let mut sum = Context::new(&SHA1_FOR_LEGACY_USE_ONLY);
                sum.update(format!("blob {}\0", self.length()).as_bytes());
                sum
            };
            let mut buffer = vec![0; 1 << 20];
            let mut start = 0;
            while start < self.length() {
                let count = self.fill(start, &mut buffer);
                sum.update(&buffer[..count]);
                start += count as u64;
            }
            sum.finish().as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
        };
        self.etag.get_or_init(sum).clone()
    }
}

fn generate(start: u64, buffer: &mut [u8]) {
    static NOISE: OnceLock<Vec<u8>> = OnceLock::new();
    let noise = NOISE.get_or_init(|| {
        let mut state = 1_u64;
        let byte = |_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 56) as u8
        };
        (0..BLOCK).map(byte).collect()
    });
    let mut filled = 0;
    while filled < buffer.len() {
        let place = start + filled as u64;
        let (block, inside) = (place / BLOCK as u64, (place % BLOCK as u64) as usize);
        let count = (BLOCK - inside).min(buffer.len() - filled);
        let part = &mut buffer[filled..filled + count];
        part.copy_from_slice(&noise[inside..inside + count]);
        for (offset, byte) in block.to_le_bytes().iter().enumerate() {
            if let Some(place) = offset.checked_sub(inside).and_then(|place| part.get_mut(place)) {
                *place = *byte;
            }
        }
        filled += count;
    }
}
