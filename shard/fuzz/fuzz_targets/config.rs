#![no_main]

use shard::model::{ConfigFile, DecoderSpec};

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    if let Ok(file) = ConfigFile::parse("config.json".into(), bytes) {
        drop(DecoderSpec::of(&file));
    }
});
