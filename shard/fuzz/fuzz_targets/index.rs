#![no_main]

use std::path::{Component, Path};

use shard::weights::Index;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    if let Ok(index) = Index::parse("fuzzed".into(), bytes) {
        for name in index.file_names() {
            let components: Vec<_> = Path::new(name).components().collect();
            assert!(matches!(components.as_slice(), [Component::Normal(_)]), "{name}");
        }
    }
});
