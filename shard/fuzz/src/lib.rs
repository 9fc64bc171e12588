//! Hostile bytes for every parser of the shard.
//!
//! Each target feeds one parser. A finding is a panic, an overflow, a read outside of the file (AddressSanitizer), more
//! than 2 GB of memory or 10 seconds for one input, or a result that breaks [`check`]. What was found once becomes a row
//! in `shard/tests/hostile`, which plain `cargo test` runs.
//!
//! With `cargo install cargo-fuzz`, in `shard/`, for five minutes (a stable toolchain will do with the variable; without
//! it, cargo-fuzz asks for a nightly one):
//!
//! ```sh
//! mkdir -p fuzz/corpus/pickle
//! RUSTC_BOOTSTRAP=1 cargo fuzz run pickle fuzz/corpus/pickle fuzz/seeds/pickle -- \
//!     -max_total_time=300 -timeout=10 -rss_limit_mb=2048
//! ```
//!
//! | target | parser | what the bytes are |
//! |---|---|---|
//! | `safetensors` | `weights/safetensors.rs` | a whole file |
//! | `index` | `weights/index.rs` | `model.safetensors.index.json` |
//! | `archive` | `weights/pytorch/zip.rs` | a whole `.bin` file |
//! | `pickle` | `weights/pytorch/pickle.rs`, `state_dict.rs` | `data.pkl` in an archive with one storage |
//! | `legacy` | `weights/pytorch/legacy.rs` | what follows the first three pickles of an old `.bin` file |
//! | `config` | `model/config_file.rs`, every family | `config.json` |
//!
//! The seeds are small and real; a corpus that grows while fuzzing stays on the machine.

use std::path::Path;

use shard::weights::{Format, Tensors};

#[allow(dead_code)]
#[path = "../../tests/hostile/archive.rs"]
mod archive;
#[allow(dead_code)]
#[path = "../../tests/hostile/pickle.rs"]
mod builder;

/// Whatever the bytes are, they are refused, or every tensor lies inside of them.
pub fn check(format: Format, bytes: &[u8]) {
    let path = Path::new("fuzzed");
    let tensors = match Tensors::parse(format, path, bytes) {
        Ok(tensors) => tensors,
        Err(error) => {
            let message = error.to_string();
            assert!(message.starts_with("fuzzed: "), "{message}");
            assert!(message.len() < 10_000 && !message.contains('\n'), "{message}");
            return;
        }
    };
    for name in tensors.names() {
        let range = tensors.bytes(name).expect("names lead to tensors");
        assert!(range.start <= range.end && range.end <= bytes.len(), "{name} at {range:?}");
    }
}

/// An archive with this pickle, in which nothing else is wrong. Its storages `0` and `1` have 24 and 8 bytes.
pub fn archive_of(pickle: &[u8]) -> Vec<u8> {
    let entries = [("data.pkl", pickle), ("byteorder", b"little"), ("data/0", &[0; 24]), ("data/1", &[0; 8])];
    archive::Archive::new(&entries).bytes()
}

/// A file in the format before PyTorch 1.6 of which this is what the tensors are.
pub fn legacy_of(rest: &[u8]) -> Vec<u8> {
    [&builder::legacy_start(), rest].concat()
}
