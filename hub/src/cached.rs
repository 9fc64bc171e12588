//! What the cache holds of a revision, and what is missing there.

use std::fs;
use std::path::Path;

use crate::listing::Entry;
use crate::select::{self, ADAPTER_CONFIG, CONFIG, Kind, Weights};

/// Largest index of weights that is read.
pub(crate) const INDEX_BYTES_MAX: u64 = 100_000_000;

/// The files of a snapshot: those of its top directory, and those one folder below.
pub(crate) fn entries(snapshot: &Path) -> Vec<Entry> {
    let mut entries = Vec::new();
    for (name, path) in listed(snapshot) {
        if path.is_dir() {
            entries.extend(
                listed(&path).into_iter().filter_map(|(inner, path)| entry(format!("{name}/{inner}"), &path)),
            );
        } else {
            entries.extend(entry(name, &path));
        }
    }
    entries.sort_by(|one, other| one.name.cmp(&other.name));
    entries
}

fn listed(directory: &Path) -> Vec<(String, std::path::PathBuf)> {
    // A directory that cannot be read holds nothing that could be used.
    let Ok(entries) = fs::read_dir(directory) else { return Vec::new() };
    let named = |entry: fs::DirEntry| Some((entry.file_name().into_string().ok()?, entry.path()));
    entries.filter_map(|entry| named(entry.ok()?)).collect()
}

/// A link whose blob is gone is no file.
fn entry(name: String, path: &Path) -> Option<Entry> {
    let metadata = fs::metadata(path).ok().filter(fs::Metadata::is_file)?;
    Some(Entry { name, size: Some(metadata.len()) })
}

/// What a snapshot lacks, by name; nothing when it is complete. `extension` is that of its weights, if it needs any.
pub(crate) fn missing(
    snapshot: &Path,
    entries: &[Entry],
    kind: Kind,
    extension: Option<&str>,
) -> Vec<String> {
    let names: Vec<&str> = entries.iter().map(|entry| entry.name.as_str()).collect();
    let config = if kind == Kind::Adapter { ADAPTER_CONFIG } else { CONFIG };
    let mut missing: Vec<String> =
        [config].iter().filter(|name| !names.contains(name)).map(|name| (*name).to_owned()).collect();
    let Some(extension) = extension else { return missing };
    match select::weights(kind, &names, extension) {
        None => missing.push(format!("weights (*{extension})")),
        Some(Weights::Files(files)) => missing.extend(select::missing_parts(&files)),
        Some(Weights::Indexed(index)) => match read_index(&snapshot.join(&index)) {
            Ok(files) => missing.extend(files.into_iter().filter(|file| !names.contains(&file.as_str()))),
            Err(problem) => missing.push(format!("a usable {index} ({problem})")),
        },
    }
    missing
}

/// The files that an index on the disk names.
pub(crate) fn read_index(path: &Path) -> Result<Vec<String>, String> {
    let length = fs::metadata(path).map_err(|error| error.to_string())?.len();
    if length > INDEX_BYTES_MAX {
        return Err(format!("has {length} bytes; at most {INDEX_BYTES_MAX} are read"));
    }
    select::indexed(&fs::read(path).map_err(|error| error.to_string())?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::select::SAFETENSORS;

    fn lack(files: &[(&str, &str)]) -> Vec<String> {
        let snapshot = tempfile::tempdir().unwrap();
        for (name, content) in files {
            fs::write(snapshot.path().join(name), content).unwrap();
        }
        missing(snapshot.path(), &entries(snapshot.path()), Kind::Model, Some(SAFETENSORS))
    }

    #[test]
    fn a_snapshot_is_complete_with_configuration_and_all_weights() {
        let index = r#"{"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}"#;
        let indexed = ("model.safetensors.index.json", index);
        let complete: [&[(&str, &str)]; 3] = [
            &[("config.json", "{}"), ("model.safetensors", "")],
            &[("config.json", "{}"), indexed, ("1.safetensors", ""), ("2.safetensors", "")],
            &[("config.json", "{}"), ("pytorch_model.bin", "")],
        ];
        for files in complete {
            assert_eq!(lack(files), Vec::<String>::new(), "{files:?}");
        }
        assert_eq!(lack(&[]), ["config.json", "weights (*.safetensors)"]);
        assert_eq!(missing(Path::new("/"), &[], Kind::Model, None), ["config.json"]);
        assert_eq!(lack(&[("config.json", "{}"), indexed, ("2.safetensors", "")]), ["1.safetensors"]);
        let parts = [("config.json", "{}"), ("model-00001-of-00002.safetensors", "")];
        assert_eq!(lack(&parts), ["model-00002-of-00002.safetensors"]);
    }

    #[test]
    fn a_link_to_nothing_is_no_file_and_folders_are_looked_into() {
        let snapshot = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink("../../blobs/gone", snapshot.path().join("config.json")).unwrap();
        fs::create_dir(snapshot.path().join("additional_chat_templates")).unwrap();
        fs::write(snapshot.path().join("additional_chat_templates/a.jinja"), "abc").unwrap();
        let expected = Entry { name: "additional_chat_templates/a.jinja".into(), size: Some(3) };
        assert_eq!(entries(snapshot.path()), [expected]);
    }
}
