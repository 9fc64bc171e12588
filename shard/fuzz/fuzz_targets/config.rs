#![no_main]

use std::path::PathBuf;
use std::sync::LazyLock;

use shard::model::{ConfigFile, ModelConfig};

/// In memory where the system has such a place.
static DIRECTORY: LazyLock<PathBuf> = LazyLock::new(|| {
    let memory = PathBuf::from("/dev/shm");
    let parent = if memory.is_dir() { memory } else { std::env::temp_dir() };
    let directory = parent.join(format!("fuzzed-config-{}", std::process::id()));
    std::fs::create_dir_all(&directory).expect("a directory for one file");
    directory
});

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    std::fs::write(DIRECTORY.join("config.json"), bytes).expect("room for one small file");
    if let Ok(file) = ConfigFile::read(&DIRECTORY) {
        drop(ModelConfig::parse(&file));
    }
});
