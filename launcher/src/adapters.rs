//! The LoRA adapters to load at the start: finds their files, and says at once what is missing.

use std::path::{Path, PathBuf};

use hub::{Hub, Source};

use crate::error::LaunchError;
use crate::model::HubOrigin;
use crate::plan::AdapterArgument;

/// What makes a directory an adapter.
const CONFIG: &str = "adapter_config.json";

/// Separates the items of the list that the shards are given.
const LIST_MARK: char = ',';

/// An adapter whose files are or will be there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Adapter {
    /// What requests call it; of the Hub, its id.
    pub name: String,
    /// The directory that the shards read; absolute.
    pub directory: String,
    /// Where it is from.
    pub source: AdapterSource,
}

/// Where an adapter is from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AdapterSource {
    /// A directory of the user's.
    Directory {
        /// The revision that was given besides, which a directory has none of.
        revision: Option<String>,
    },
    /// The Hub; its files are or will be in the cache.
    Hub(HubOrigin),
}

/// Why an adapter cannot be loaded.
#[derive(Debug, thiserror::Error)]
pub enum AdapterError {
    /// No directory of this name, and nothing that the Hub could have.
    #[error(
        "adapter `{0}`: no such directory, and no id of the Hub, which would look like `organization/name`"
    )]
    Nowhere(String),
    /// The directory is not there.
    #[error("adapter `{name}`: {} is not a directory", directory.display())]
    NoDirectory {
        /// The adapter.
        name: String,
        /// Where it should be.
        directory: PathBuf,
    },
    /// A directory of something else.
    #[error("adapter `{name}`: {} has no {CONFIG}", directory.display())]
    NoConfig {
        /// The adapter.
        name: String,
        /// Its directory.
        directory: PathBuf,
    },
    /// A directory that cannot be part of a list.
    #[error("adapter `{name}`: the path {} is not UTF-8 or has a comma, which cannot be handed on", directory.display())]
    Path {
        /// The adapter.
        name: String,
        /// Its directory.
        directory: PathBuf,
    },
}

/// Finds an adapter: in its directory or in the one of its name, else on the Hub, which is asked and nothing is fetched
/// from.
///
/// Errors when it is nowhere, or may not be read.
pub fn resolve(
    argument: AdapterArgument,
    hub: impl FnOnce() -> Result<Hub, LaunchError>,
) -> Result<Adapter, LaunchError> {
    let AdapterArgument { name, directory, revision } = argument;
    let here = directory.or_else(|| Some(PathBuf::from(&name)).filter(|path| path.exists()));
    if let Some(directory) = here {
        let directory = in_directory(&name, directory)?;
        return Ok(Adapter { name, directory, source: AdapterSource::Directory { revision } });
    }
    if !Source::is_id(&name) {
        return Err(AdapterError::Nowhere(name).into());
    }
    let source = Source::new(&name, revision.as_deref())?;
    let survey = hub()?.survey_adapter(&source)?;
    let directory = listable(&name, survey.directory())?;
    let origin = HubOrigin {
        revision: source.revision().to_owned(),
        commit: survey.commit().to_owned(),
        is_cached: survey.is_cached(),
    };
    Ok(Adapter { name, directory, source: AdapterSource::Hub(origin) })
}

fn in_directory(name: &str, directory: PathBuf) -> Result<String, AdapterError> {
    let name = || name.to_owned();
    let directory = std::path::absolute(&directory).unwrap_or(directory);
    if !directory.is_dir() {
        return Err(AdapterError::NoDirectory { name: name(), directory });
    }
    if !directory.join(CONFIG).is_file() {
        return Err(AdapterError::NoConfig { name: name(), directory });
    }
    listable(&name(), &directory)
}

fn listable(name: &str, directory: &Path) -> Result<String, AdapterError> {
    let text = directory.to_str().filter(|text| !text.contains(LIST_MARK));
    let error = || AdapterError::Path { name: name.to_owned(), directory: directory.to_owned() };
    Ok(text.ok_or_else(error)?.to_owned())
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::plan::parse_adapters;

    /// Finds the one adapter of a text, on this machine.
    fn find(text: &str) -> Result<Adapter, String> {
        let argument = parse_adapters(text).unwrap().remove(0);
        resolve(argument, || panic!("the Hub is not asked for `{text}`")).map_err(|error| error.to_string())
    }

    #[test]
    fn a_directory_is_taken_by_its_path_or_by_its_name() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().to_str().unwrap();
        fs::write(folder.path().join(CONFIG), "{}").unwrap();
        let adapter = |name: &str, revision: Option<&str>| Adapter {
            name: name.to_owned(),
            directory: path.to_owned(),
            source: AdapterSource::Directory { revision: revision.map(str::to_owned) },
        };
        assert_eq!(find(&format!("poet={path}")), Ok(adapter("poet", None)));
        assert_eq!(find(&format!("poet={path}@v1")), Ok(adapter("poet", Some("v1"))));
        assert_eq!(find(path), Ok(adapter(path, None)));
    }

    #[test]
    fn what_is_not_there_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().to_str().unwrap();
        let comma = folder.path().join("a,b");
        fs::create_dir(&comma).unwrap();
        fs::write(comma.join(CONFIG), "{}").unwrap();
        let refused = |text: &str, message: &str| assert_eq!(find(text).unwrap_err(), message, "{text}");
        refused("poet=/no/such", "adapter `poet`: /no/such is not a directory");
        refused(&format!("poet={path}"), &format!("adapter `poet`: {path} has no {CONFIG}"));
        refused(
            "/no/such",
            "adapter `/no/such`: no such directory, and no id of the Hub, which would look like `organization/name`",
        );
        let error = in_directory("poet", comma).unwrap_err().to_string();
        assert!(error.contains("a,b is not UTF-8 or has a comma"), "{error}");
    }
}
