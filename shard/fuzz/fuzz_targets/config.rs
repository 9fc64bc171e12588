#![no_main]

use std::path::PathBuf;

use shard::model::{ConfigFile, DecoderSpec};

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    if let Ok(file) = ConfigFile::parse(PathBuf::from("config.json"), bytes) {
        drop(DecoderSpec::of(&file));
    }
});
