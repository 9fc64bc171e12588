//! What there is of a revision before anything is fetched: on the Hub, or in the cache when the Hub cannot be asked.

use std::path::{Path, PathBuf};

use tracing::{debug, warn};

use crate::cache::RepoCache;
use crate::cached;
use crate::client::Client;
use crate::config::HubConfig;
use crate::error::HubError;
use crate::listing::{self, Entry};
use crate::repo::Source;
use crate::select::{self, Kind, Weights};

/// A revision of a repository: what it consists of, and where it is or will be on this machine.
#[derive(Clone, Debug)]
pub struct Survey {
    source: Source,
    commit: String,
    directory: PathBuf,
    files: Vec<Entry>,
    is_cached: bool,
}

impl Survey {
    /// The repository and the revision that were asked for.
    pub fn source(&self) -> &Source {
        &self.source
    }

    /// The commit that the revision was found to be.
    pub fn commit(&self) -> &str {
        &self.commit
    }

    /// The directory of its files in the cache; they may be still to come.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// All its files, those that are not needed too.
    pub fn files(&self) -> &[Entry] {
        &self.files
    }

    /// Whether this is what the cache holds, because the Hub was not asked or did not answer.
    pub fn is_cached(&self) -> bool {
        self.is_cached
    }

    /// What the repository is, judging by its files.
    pub fn kind(&self) -> Kind {
        Kind::of(self.names())
    }

    /// Whether there is a file of this name.
    pub fn has(&self, name: &str) -> bool {
        self.names().any(|known| known == name)
    }

    /// The weight files as far as their names tell: with an index that is not read yet, every file that may be one.
    pub fn likely_weights(&self) -> Vec<&Entry> {
        let names: Vec<&str> = self.names().collect();
        let chosen = match select::weights(Kind::Model, &names, select::SAFETENSORS) {
            None => return Vec::new(),
            Some(Weights::Files(files)) => files,
            Some(Weights::Indexed(index)) => {
                let without: Vec<&str> = names.into_iter().filter(|name| *name != index).collect();
                match select::weights(Kind::Model, &without, select::SAFETENSORS) {
                    Some(Weights::Files(files)) => files,
                    _ => return Vec::new(),
                }
            }
        };
        self.files.iter().filter(|entry| chosen.contains(&entry.name)).collect()
    }

    fn names(&self) -> impl Iterator<Item = &str> {
        self.files.iter().map(|entry| entry.name.as_str())
    }
}

/// Looks at a revision, whose weights have this extension if they are needed. The Hub is asked, unless the configuration forbids it; if it cannot be reached and the cache is
/// complete, the cache will do, with a warning.
///
/// Errors when the revision is nowhere, or not completely in the cache where that is the only place.
pub(crate) fn look(
    client: &Client,
    config: &HubConfig,
    source: &Source,
    kind: Option<Kind>,
    extension: Option<&str>,
) -> Result<Survey, HubError> {
    let (cached, missing) = in_cache(config, source, kind, extension);
    if config.offline {
        return cached.filter(|_| missing.is_empty()).ok_or_else(|| HubError::Offline {
            source_name: source.to_string(),
            cache: config.cache.clone(),
            missing: missing.join(", "),
        });
    }
    let spare = cached.filter(|_| missing.is_empty());
    // Who has something to fall back on need not wait long.
    let asked = if spare.is_some() {
        listing::list(&client.hurried(), source)
    } else {
        listing::list(client, source)
    };
    match (asked, spare) {
        (Ok(listing), _) => {
            debug!("{source} is commit {} with {} files", listing.commit, listing.files.len());
            let directory = RepoCache::new(&config.cache, source).snapshot(&listing.commit);
            let (commit, files) = (listing.commit, listing.files);
            Ok(Survey { source: source.clone(), commit, directory, files, is_cached: false })
        }
        (Err(error), Some(survey)) if error.is_unreachable() => {
            warn!("{error}; using commit {} of {source} from the cache", survey.commit);
            Ok(survey)
        }
        (Err(error), _) => Err(error),
    }
}

/// What the cache holds of a revision, and what it lacks.
fn in_cache(
    config: &HubConfig,
    source: &Source,
    kind: Option<Kind>,
    extension: Option<&str>,
) -> (Option<Survey>, Vec<String>) {
    let repository = RepoCache::new(&config.cache, source);
    let Some(commit) = repository.commit_of(source) else {
        return (None, vec![format!("revision `{}` itself", source.revision())]);
    };
    let directory = repository.snapshot(&commit);
    let files = cached::entries(&directory);
    let kind = kind.unwrap_or_else(|| Kind::of(files.iter().map(|entry| entry.name.as_str())));
    let missing = cached::missing(&directory, &files, kind, extension);
    (Some(Survey { source: source.clone(), commit, directory, files, is_cached: true }), missing)
}
