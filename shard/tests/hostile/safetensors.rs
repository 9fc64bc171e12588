//! Safetensors files with wrong headers.

use crate::{Reader, Row};

const NAME: &str = "model.safetensors";

pub(crate) const VALID: &str = r#"{"weight":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#;

/// A file with this header and `data` zero bytes after it.
pub(crate) fn file(header: &str, data: usize) -> Vec<u8> {
    with_length(header.len() as u64, header.as_bytes(), data)
}

fn with_length(length: u64, header: &[u8], data: usize) -> Vec<u8> {
    [&length.to_le_bytes(), header, &vec![0; data]].concat()
}

/// A header of one tensor, `weight`.
fn one(dtype: &str, shape: &str, offsets: &str) -> String {
    format!(r#"{{"weight":{{"dtype":{dtype},"shape":{shape},"data_offsets":{offsets}}}}}"#)
}

fn row(name: &'static str, bytes: Vec<u8>, expected: &'static [&'static str]) -> Row {
    Row::new(name, Reader::Weights, vec![(NAME, bytes)], expected)
}

pub(crate) fn rows() -> Vec<Row> {
    [lengths(), entries(), offsets(), bombs()].into_iter().flatten().collect()
}

fn lengths() -> Vec<Row> {
    vec![
        row("empty file", Vec::new(), &[NAME, "has only 0 bytes"]),
        row("no room for a length", b"1234567".to_vec(), &[NAME, "has only 7 bytes"]),
        row("header length zero", with_length(0, b"", 8), &[NAME, "EOF"]),
        row(
            "header longer than the file",
            with_length(60, VALID.as_bytes(), 0),
            &[NAME, "claims 60 bytes, the file has 67"],
        ),
        row(
            "header length of all ones",
            with_length(u64::MAX, VALID.as_bytes(), 8),
            &[NAME, "18446744073709551615"],
        ),
        row("header length of minus eight", with_length(u64::MAX - 7, b"{}", 0), &[NAME, "claims"]),
        row(
            "a file of git-lfs instead of weights",
            b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 134\n".to_vec(),
            &[NAME, "is the download complete?"],
        ),
        row("data cut off", file(VALID, 7), &[NAME, "`weight` ends at data byte 8, the file holds 7"]),
        row("data too long", file(VALID, 9), &[NAME, "1 bytes after the last tensor"]),
    ]
}

fn entries() -> Vec<Row> {
    vec![
        row("header that is no JSON", file("weights", 8), &[NAME, "expected value"]),
        row("header that is not UTF-8", with_length(4, b"{\"\xff\"", 0), &[NAME, "line 1"]),
        row("header that is a list", file("[]", 0), &[NAME, "an object of tensors"]),
        row("header that is null", file("null", 0), &[NAME, "an object of tensors"]),
        row("header with text behind it", file("{} {}", 0), &[NAME, "trailing characters"]),
        row(
            "unknown type",
            file(&one("\"F99\"", "[2]", "[0,8]"), 8),
            &[NAME, "`weight`", "unknown variant `F99`"],
        ),
        row("type that is a number", file(&one("32", "[2]", "[0,8]"), 8), &[NAME, "`weight`"]),
        row("negative size", file(&one("\"F32\"", "[-2]", "[0,8]"), 8), &[NAME, "`weight`", "invalid value"]),
        row(
            "fractional size",
            file(&one("\"F32\"", "[2.0]", "[0,8]"), 8),
            &[NAME, "`weight`", "invalid type"],
        ),
        row(
            "shape that is too small",
            file(&one("\"F32\"", "[1]", "[0,8]"), 8),
            &[NAME, "`weight` is F32 [1], which does not fill bytes 0..8"],
        ),
        row("wrong element type", file(&one("\"F16\"", "[2]", "[0,8]"), 8), &[NAME, "`weight` is F16 [2]"]),
        row(
            "product of sizes overflows",
            file(&one("\"F32\"", "[4294967296,4294967296]", "[0,0]"), 0),
            &[NAME, "`weight`", "does not fill bytes 0..0"],
        ),
        row(
            "product of sizes overflows in bits",
            file(&one("\"F64\"", "[2305843009213693952]", "[0,0]"), 0),
            &[NAME, "`weight`", "does not fill"],
        ),
        row(
            "no shape",
            file(r#"{"weight":{"dtype":"F32","data_offsets":[0,8]}}"#, 8),
            &[NAME, "missing field `shape`"],
        ),
        row(
            "no offsets",
            file(r#"{"weight":{"dtype":"F32","shape":[2]}}"#, 8),
            &[NAME, "`weight`", "missing field `data_offsets`"],
        ),
        row(
            "a name twice",
            file(&format!("{},{}", &VALID[..VALID.len() - 1], &VALID[1..]), 8),
            &[NAME, "tensor `weight` is there twice"],
        ),
        row(
            "a field twice",
            file(r#"{"weight":{"dtype":"F32","dtype":"F16","shape":[2],"data_offsets":[0,8]}}"#, 8),
            &[NAME, "`weight`", "duplicate field `dtype`"],
        ),
    ]
}

fn offsets() -> Vec<Row> {
    let two = |a: &str, b: &str| {
        format!(
            r#"{{"a":{{"dtype":"U8","shape":[4],"data_offsets":{a}}},"weight":{{"dtype":"U8","shape":[4],"data_offsets":{b}}}}}"#
        )
    };
    vec![
        row("backward offsets", file(&one("\"F32\"", "[2]", "[8,0]"), 8), &[NAME, "`weight`", "bytes 8..0"]),
        row(
            "offsets behind the file",
            file(&one("\"U8\"", "[8]", "[18446744073709551607,18446744073709551615]"), 8),
            &[NAME, "`weight` ends at data byte 18446744073709551615"],
        ),
        row("offset beyond 64 bits", file(&one("\"U8\"", "[8]", "[0,1e99]"), 8), &[NAME, "`weight`"]),
        row(
            "overlapping tensors",
            file(&two("[0,4]", "[2,6]"), 6),
            &[NAME, "`weight` starts at data byte 2, 4 expected"],
        ),
        row(
            "a hole",
            file(&two("[0,4]", "[6,10]"), 10),
            &[NAME, "`weight` starts at data byte 6, 4 expected"],
        ),
        row("one offset", file(&one("\"U8\"", "[8]", "[0]"), 8), &[NAME, "`weight`", "invalid length 1"]),
    ]
}

fn bombs() -> Vec<Row> {
    const MANY: usize = 300_000;
    vec![
        row("deep nesting", file(&"{\"a\":".repeat(MANY), 0), &[NAME, "`a`"]),
        row("deep nesting of lists", file(&format!(r#"{{"a":{}"#, "[".repeat(MANY)), 0), &[NAME, "`a`"]),
        row(
            "deep nesting of metadata",
            file(&format!(r#"{{"__metadata__":{}"#, "[".repeat(MANY)), 0),
            &[NAME, "EOF while parsing"],
        ),
        row(
            "much metadata and no tensor behind it",
            file(&format!(r#"{{"__metadata__":{{"a":"{}"}},}}"#, "x".repeat(MANY)), 0),
            &[NAME, "trailing comma"],
        ),
        row(
            "many dimensions",
            file(&one("\"U8\"", &format!("[1{}]", ",1".repeat(MANY)), "[0,1]"), 1),
            &[NAME, "`weight`", "at most 8 sizes"],
        ),
        row(
            "a number of many digits",
            file(&one("\"U8\"", &format!("[{}]", "9".repeat(MANY)), "[0,1]"), 1),
            &[NAME, "`weight`"],
        ),
        row(
            "a type of many letters",
            file(&one(&format!("\"{}\"", "F".repeat(MANY)), "[1]", "[0,1]"), 1),
            &[NAME, "unknown variant", "…"],
        ),
        row(
            "a name of many letters",
            file(
                &format!(
                    r#"{{"{}":{{"dtype":"U8","shape":[2],"data_offsets":[0,1]}}}}"#,
                    "a\\n".repeat(MANY)
                ),
                1,
            ),
            &[NAME, "a\\na\\n", "…` is U8 [2]"],
        ),
        row(
            "many tensors of no bytes, and one that is wrong",
            {
                let entries: String = (0..20_000)
                    .map(|at| format!(r#""{at}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}},"#))
                    .collect();
                file(
                    &format!(r#"{{{entries}"weight":{{"dtype":"U8","shape":[2],"data_offsets":[0,1]}}}}"#),
                    1,
                )
            },
            &[NAME, "`weight` is U8 [2]"],
        ),
    ]
}
