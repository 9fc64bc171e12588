//! Indexes that lie, and names behind which there is no plain file.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::process::Command;

use crate::safetensors::{VALID, file};
use crate::{Reader, Row};

const INDEX: &str = "model.safetensors.index.json";
const SHARD: &str = "model-00001-of-00001.safetensors";

pub(crate) fn indexes() -> Vec<Row> {
    let row = |name, index: &str, expected| {
        let files = vec![(SHARD, file(VALID, 8)), (INDEX, index.as_bytes().to_vec())];
        Row::new(name, Reader::Weights, files, expected)
    };
    let to = |name: &str| format!(r#"{{"weight_map":{{"weight":"{name}"}}}}"#);
    let long = "x".repeat(1_000_000);
    let mut rows = vec![
        row("empty index", "", &[INDEX, "EOF"]),
        row("index cut in the middle", &to(SHARD)[..30], &[INDEX, "EOF"]),
        row("index without a map", "{}", &[INDEX, "missing field `weight_map`"]),
        row("index of nothing", r#"{"weight_map":{}}"#, &[INDEX, "names no tensor"]),
        row("index of numbers", r#"{"weight_map":{"weight":1}}"#, &[INDEX, "expected a string"]),
        row(
            "index that names a tensor twice",
            r#"{"weight_map":{"weight":"a","weight":"b"}}"#,
            &[INDEX, "`weight` is there twice"],
        ),
        row(
            "index that leaves the directory",
            &to("../../etc/passwd"),
            &[INDEX, "`../../etc/passwd` is not the name of a file"],
        ),
        row("index with an absolute path", &to("/etc/passwd"), &[INDEX, "`/etc/passwd` is not the name"]),
        row("index with a path into a folder", &to("sub/model.safetensors"), &[INDEX, "is not the name"]),
        row("index with the directory itself", &to("."), &[INDEX, "`.` is not the name"]),
        row("index with no name", &to(""), &[INDEX, "`` is not the name"]),
        row("index with a zero in a name", &to("a\\u0000"), &[INDEX, "is not the name"]),
        row("index with a name of many letters", &to(&long), &[INDEX, "xxx…` is not the name"]),
        row("index with a missing file", &to("model-2.safetensors"), &["model-2.safetensors: No such file"]),
        row(
            "index with a missing tensor",
            &format!(r#"{{"weight_map":{{"bias":"{SHARD}"}}}}"#),
            &[INDEX, "tensor `bias` is not in `model-00001-of-00001.safetensors`"],
        ),
        row("index of deep nesting", &format!(r#"{{"metadata":{}"#, "[".repeat(300_000)), &[INDEX, "EOF"]),
        row(
            "index of deep nesting in the map",
            &format!(r#"{{"weight_map":{}"#, "{\"a\":".repeat(300_000)),
            &[INDEX, "expected a string"],
        ),
    ];
    rows.push(Row::new(
        "index that is not UTF-8",
        Reader::Weights,
        vec![(SHARD, file(VALID, 8)), (INDEX, b"{\"weight_map\":{\"\xff\":\"a\"}}".to_vec())],
        &[INDEX, "line 1"],
    ));
    rows.push(Row::new(
        "index of .bin files with a .safetensors file in it",
        Reader::Weights,
        vec![("x.st", file(VALID, 8)), ("pytorch_model.bin.index.json", to("x.st").into_bytes())],
        &["x.st: torch.save did not write this"],
    ));
    rows
}

pub(crate) fn not_files() -> Vec<Row> {
    let row = |name, prepare: fn(&Path), expected| Row {
        prepare,
        ..Row::new(name, Reader::Weights, vec![("config.json", b"{}".to_vec())], expected)
    };
    let mut rows = vec![
        row("no weights", |_| (), &["no .safetensors file"]),
        row(
            "a folder",
            |path| fs::create_dir(path.join("model.safetensors")).unwrap(),
            &["model.safetensors: not a regular file"],
        ),
        row("a pipe", pipe, &["model.safetensors: not a regular file"]),
        row(
            "a device that never ends",
            |path| symlink("/dev/zero", path.join("pytorch_model.bin")).unwrap(),
            &["pytorch_model.bin: not a regular file"],
        ),
        row(
            "an index that never ends",
            |path| symlink("/dev/zero", path.join(INDEX)).unwrap(),
            &[INDEX, "not a regular file"],
        ),
        row(
            "a link to nothing",
            |path| symlink("blobs/none", path.join("model.safetensors")).unwrap(),
            &["model.safetensors: No such file"],
        ),
        row(
            "a link to itself",
            |path| symlink("model.safetensors", path.join("model.safetensors")).unwrap(),
            &["model.safetensors: "],
        ),
        row("an index without an end to it", huge_index, &[INDEX, "more than 64000000 bytes"]),
        row(
            "the same tensor in two files",
            two_files,
            &["`weight` is in both", "a.safetensors", "b.safetensors"],
        ),
    ];
    // The superuser may read everything, so for it there is nothing to refuse.
    let probe = tempfile::tempdir().unwrap();
    unreadable(probe.path());
    if fs::read(probe.path().join("model.safetensors")).is_err() {
        rows.push(row("a file that may not be read", unreadable, &["model.safetensors: Permission denied"]));
    }
    rows
}

fn pipe(directory: &Path) {
    let made = Command::new("mkfifo").arg(directory.join("model.safetensors")).status().unwrap();
    assert!(made.success());
}

/// Takes no room on the disk.
fn huge_index(directory: &Path) {
    fs::File::create(directory.join(INDEX)).unwrap().set_len(1 << 40).unwrap();
}

fn two_files(directory: &Path) {
    for name in ["a.safetensors", "b.safetensors"] {
        fs::write(directory.join(name), file(VALID, 8)).unwrap();
    }
}

fn unreadable(directory: &Path) {
    let path = directory.join("model.safetensors");
    fs::write(&path, file(VALID, 8)).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(0o000)).unwrap();
}
