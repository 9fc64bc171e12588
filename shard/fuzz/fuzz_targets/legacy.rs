#![no_main]

use shard::weights::Format;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    shard_fuzz::check(Format::PyTorch, &shard_fuzz::legacy_of(bytes));
});
