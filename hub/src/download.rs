//! Fetches what a survey says is needed: small files first, several at once; then the weights, one after another, each
//! over several connections. Whoever finds the weights finds the rest, too.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;

use telemetry::progress::{Progress, ProgressStyle};
use tracing::{debug, info, warn};

use crate::cache::RepoCache;
use crate::cached;
use crate::client::Client;
use crate::config::HubConfig;
use crate::error::HubError;
use crate::listing::{self, Metadata};
use crate::lock::Lock;
use crate::repo::Source;
use crate::select::{self, Kind, Weights};
use crate::space;
use crate::survey::Survey;
use crate::transfer::Transfer;

/// Files that are looked at or fetched at once.
const FILES_AT_ONCE: usize = 8;

/// Files smaller than this are not worth a line of their own.
const LINE_BYTES_MIN: u64 = 1_000_000;

/// What to fetch of a repository, and how.
#[derive(Clone, Debug)]
pub struct Order {
    /// What the repository shall be; none is what its files say it is.
    pub kind: Option<Kind>,
    /// The commit that the revision is known to be; none is to be found out.
    pub commit: Option<String>,
    /// Ending of the weights.
    pub extension: String,
    /// Where the weights are.
    pub weights: WeightPlace,
    /// How progress is shown.
    pub progress: ProgressStyle,
}

impl Default for Order {
    fn default() -> Self {
        Self {
            kind: None,
            commit: None,
            extension: select::SAFETENSORS.to_owned(),
            weights: WeightPlace::Repository,
            progress: ProgressStyle::Lines,
        }
    }
}

/// Where the weights of a model are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum WeightPlace {
    /// In its repository, to be fetched.
    Repository,
    /// In this directory, all of them.
    Directory(PathBuf),
    /// Nowhere: they are not needed.
    Nowhere,
}

impl WeightPlace {
    pub(crate) fn is_in_repository(&self) -> bool {
        *self == Self::Repository
    }
}

/// A download in the making.
pub(crate) struct Download<'a> {
    pub(crate) client: &'a Client,
    pub(crate) config: &'a HubConfig,
    pub(crate) survey: &'a Survey,
}

/// A file that is needed, and what is known of it.
struct Wanted {
    name: String,
    metadata: Metadata,
}

impl Download<'_> {
    /// Fetches what the order needs and the cache lacks.
    pub(crate) fn all(&self, order: &Order) -> Result<(), HubError> {
        let survey = self.survey;
        let kind = order.kind.unwrap_or_else(|| survey.kind());
        if kind == Kind::Adapter && !survey.has(select::ADAPTER_CONFIG) {
            return Err(HubError::NoAdapter { source_name: survey.source().to_string() });
        }
        let names: Vec<&str> = survey.files().iter().map(|entry| entry.name.as_str()).collect();
        let mut small: Vec<String> = names
            .iter()
            .filter(|name| select::is_small_file(kind, name))
            .map(|name| (*name).to_owned())
            .collect();
        let mut weights = Vec::new();
        if order.weights != WeightPlace::Nowhere {
            let chosen = select::weights(kind, &names, &order.extension);
            match chosen.ok_or_else(|| self.no_weights(order))? {
                Weights::Files(files) => weights = files,
                Weights::Indexed(index) => {
                    weights = self.indexed(&index)?;
                    small.retain(|name| *name != index);
                }
            }
        }
        if let WeightPlace::Directory(directory) = &order.weights {
            self.require_elsewhere(directory, &weights)?;
            weights.clear();
        }
        self.fetch(small, weights, order.progress)
    }

    /// The files that an index names, which is fetched for that.
    fn indexed(&self, index: &str) -> Result<Vec<String>, HubError> {
        let nonsense = |problem| HubError::BadAnswer {
            url: format!("{index} of model {}", self.survey.source()),
            problem,
        };
        cached::read_index(&self.one(index)?).map_err(nonsense)
    }

    /// Fetches one file, unless it is there, and says where.
    pub(crate) fn one(&self, name: &str) -> Result<PathBuf, HubError> {
        if let Some(path) = self.present(name) {
            return Ok(path);
        }
        let wanted = self.look(name)?;
        let progress = Progress::new(ProgressStyle::Lines, name, wanted.metadata.size, 0);
        self.fetch_file(&wanted, &progress)?;
        Ok(self.survey.directory().join(name))
    }

    fn no_weights(&self, order: &Order) -> HubError {
        let extension = if order.extension == select::SAFETENSORS {
            ".safetensors, .bin or .pt"
        } else {
            &order.extension
        };
        HubError::NoWeights { source_name: self.survey.source().to_string(), extension: extension.to_owned() }
    }

    fn require_elsewhere(&self, directory: &Path, weights: &[String]) -> Result<(), HubError> {
        let missing: Vec<&str> =
            weights.iter().filter(|name| !directory.join(name).is_file()).map(String::as_str).collect();
        if missing.is_empty() {
            return Ok(());
        }
        Err(HubError::NotInOverride {
            source_name: self.survey.source().to_string(),
            directory: directory.to_owned(),
            missing: missing.join(", "),
        })
    }

    fn fetch(&self, small: Vec<String>, weights: Vec<String>, style: ProgressStyle) -> Result<(), HubError> {
        let absent = |names: Vec<String>| -> Vec<String> {
            names.into_iter().filter(|name| self.present(name).is_none()).collect()
        };
        let (small, weights) = (absent(small), absent(weights));
        if small.is_empty() && weights.is_empty() {
            info!("All files of {} are in {}", self.survey.source(), self.survey.directory().display());
            return Ok(());
        }
        let small = at_once(&small, |name| self.look(name))?;
        let weights = at_once(&weights, |name| self.look(name))?;
        let repository = self.repository();
        let (mut total, mut done) = (0, 0);
        for Wanted { metadata, .. } in small.iter().chain(&weights) {
            let size = metadata.size.unwrap_or(0);
            total += size;
            done += already(&repository, metadata).min(size);
        }
        let source = self.survey.source();
        space::require(&repository.blobs(), &format!("model {source}"), total - done)?;
        let count = small.len() + weights.len();
        info!(
            "Downloading {count} files of {source}, {total} bytes of which {done} are there, to {}",
            self.survey.directory().display()
        );
        let bar = Progress::new(style, source.id(), Some(total), done);
        at_once(&small, |wanted| self.fetch_shown(wanted, &bar, style))?;
        for wanted in &weights {
            self.fetch_shown(wanted, &bar, style)?;
        }
        bar.finish();
        Ok(())
    }

    /// On a terminal all files share one bar; a log has lines for each large one.
    fn fetch_shown(&self, wanted: &Wanted, bar: &Progress, style: ProgressStyle) -> Result<(), HubError> {
        let large = wanted.metadata.size.is_none_or(|size| size >= LINE_BYTES_MIN);
        if style == ProgressStyle::Bar || !large {
            return self.fetch_file(wanted, bar);
        }
        let already = already(&self.repository(), &wanted.metadata);
        let progress = Progress::new(style, &wanted.name, wanted.metadata.size, already);
        self.fetch_file(wanted, &progress)?;
        progress.finish();
        Ok(())
    }

    fn fetch_file(&self, wanted: &Wanted, progress: &Progress) -> Result<(), HubError> {
        let Wanted { name, metadata } = wanted;
        let (repository, commit) = (self.repository(), self.survey.commit());
        let (blob, partial) = (repository.blob(&metadata.etag), repository.partial(&metadata.etag));
        let _lock = Lock::acquire(&repository.lock(&metadata.etag), name, &partial)?;
        // Another process may have fetched it while this one waited, and linked it where there are no links.
        if self.present(name).is_some() {
            return Ok(());
        }
        if !blob.is_file() {
            debug!("Fetching {name} to {}", blob.display());
            let (source, client) = (self.survey.source(), self.client);
            Transfer::new(client, (source, commit), name, metadata, progress).complete(&partial)?;
            fs::rename(&partial, &blob).map_err(HubError::io("rename", partial.as_path()))?;
        }
        repository.link(commit, name, &metadata.etag)
    }

    fn look(&self, name: &str) -> Result<Wanted, HubError> {
        let survey = self.survey;
        let mut metadata = listing::look(self.client, survey.source(), survey.commit(), name)?;
        let listed = || survey.files().iter().find(|entry| entry.name == name)?.size;
        metadata.size = metadata.size.or_else(listed);
        Ok(Wanted { name: name.to_owned(), metadata })
    }

    /// Where a file of the commit is, if it is there; what a commit holds never changes.
    fn present(&self, name: &str) -> Option<PathBuf> {
        let path = self.survey.directory().join(name);
        path.is_file().then_some(path)
    }

    /// Notes which commit a revision is, now that its files are there. Not worth failing for.
    pub(crate) fn remember(&self, source: &Source) {
        if let Err(error) = self.repository().set_commit_of(source, self.survey.commit()) {
            warn!("{error}");
        }
    }

    fn repository(&self) -> RepoCache {
        RepoCache::new(&self.config.cache, self.survey.source())
    }
}

/// Bytes of some contents that are on the disk.
fn already(repository: &RepoCache, metadata: &Metadata) -> u64 {
    let length = |path: PathBuf| fs::metadata(path).ok().map(|metadata| metadata.len());
    length(repository.blob(&metadata.etag))
        .or_else(|| length(repository.partial(&metadata.etag)))
        .unwrap_or(0)
}

/// Does something with each item, on several threads. The results are in the order of the items.
///
/// Errors with the first error; what has not begun by then is left.
fn at_once<T: Sync, R: Send>(
    items: &[T],
    work: impl Fn(&T) -> Result<R, HubError> + Sync,
) -> Result<Vec<R>, HubError> {
    let next = AtomicUsize::new(0);
    let results = Mutex::new(Vec::new());
    thread::scope(|scope| {
        for _ in 0..items.len().min(FILES_AT_ONCE) {
            scope.spawn(|| {
                loop {
                    let index = next.fetch_add(1, Ordering::Relaxed);
                    let Some(item) = items.get(index) else { return };
                    let result = work(item);
                    if result.is_err() {
                        next.store(items.len(), Ordering::Relaxed);
                    }
                    results.lock().unwrap_or_else(PoisonError::into_inner).push((index, result));
                }
            });
        }
    });
    let mut results = results.into_inner().unwrap_or_else(PoisonError::into_inner);
    results.sort_by_key(|(index, _)| *index);
    results.into_iter().map(|(_, result)| result).collect()
}
