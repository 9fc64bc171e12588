//! Why a model could not be found or fetched. Each message names the repository, file or directory, and what can be done.

use std::io;
use std::path::PathBuf;

/// Why a model could not be found or fetched.
#[derive(Debug, thiserror::Error)]
pub enum HubError {
    /// A name that no repository has.
    #[error("`{id}` is not a model of the Hub: {problem}; ids look like `organization/name`")]
    BadId {
        /// The name.
        id: String,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// A name that no revision has.
    #[error("`{0}` is not a revision: give a branch, a tag, a commit or `refs/pr/N`")]
    BadRevision(String),
    /// The repository's owner decides who may read it.
    #[error(
        "model `{id}` is gated: ask for access at {endpoint}/{id}, then use a token of the account that has it \
        (HF_TOKEN); {token}"
    )]
    Gated {
        /// The repository.
        id: String,
        /// The Hub.
        endpoint: String,
        /// Which token was used, in words.
        token: String,
    },
    /// No such repository, or none for this user: the Hub does not tell these apart.
    #[error(
        "there is no model `{id}` on {endpoint}: check the spelling (a local directory would have to exist here), \
        or use a token that may read it if it is private (HF_TOKEN); {token}"
    )]
    NoRepository {
        /// The repository.
        id: String,
        /// The Hub.
        endpoint: String,
        /// Which token was used, in words.
        token: String,
    },
    /// The repository has no such branch, tag or commit.
    #[error(
        "model `{id}` has no revision `{revision}`: see {endpoint}/{id}/tree/main for its branches and tags"
    )]
    NoRevision {
        /// The repository.
        id: String,
        /// The revision.
        revision: String,
        /// The Hub.
        endpoint: String,
    },
    /// The revision has no such file.
    #[error("model {source_name} has no file `{file}`")]
    NoFile {
        /// The repository and the revision.
        source_name: String,
        /// The file.
        file: String,
    },
    /// The Hub does not accept the token.
    #[error("{endpoint} refused access to model `{id}` with status {status}{message}; {token}")]
    Refused {
        /// The repository.
        id: String,
        /// The Hub.
        endpoint: String,
        /// Status code of the answer.
        status: u16,
        /// What the server says, with a colon in front.
        message: String,
        /// Which token was used, in words.
        token: String,
    },
    /// A status that says nothing more.
    #[error("{url} answered with status {status}{message}")]
    Status {
        /// What was asked for, without its query.
        url: String,
        /// Status code of the answer.
        status: u16,
        /// What the server says, with a colon in front.
        message: String,
    },
    /// No answer, or answers that break off, again and again.
    #[error("cannot fetch {url}: {reason} (attempts in a row: {attempts})")]
    Unreachable {
        /// What was asked for, without its query.
        url: String,
        /// What happened last.
        reason: String,
        /// How often it was tried without any progress.
        attempts: u32,
    },
    /// An answer that makes no sense.
    #[error("{url} gave an answer that makes no sense: {problem}")]
    BadAnswer {
        /// What was asked for, without its query.
        url: String,
        /// What is wrong with it.
        problem: String,
    },
    /// The network may not be used, and the cache does not have everything.
    #[error(
        "HF_HUB_OFFLINE is set, and the cache {} does not hold all of model {source_name}; missing: {missing}",
        cache.display()
    )]
    Offline {
        /// The repository and the revision.
        source_name: String,
        /// The cache.
        cache: PathBuf,
        /// What is missing.
        missing: String,
    },
    /// The repository holds nothing that can be loaded.
    #[error("model {source_name} has no weights to load: no file in its top directory ends with {extension}")]
    NoWeights {
        /// The repository and the revision.
        source_name: String,
        /// The endings that were looked for.
        extension: String,
    },
    /// A repository of an adapter, given as a model.
    #[error(
        "{source_name} is a LoRA adapter{base}, not a model: serve its base model with --model-id, and name the \
        adapter with --lora-adapters"
    )]
    IsAdapter {
        /// The repository and the revision.
        source_name: String,
        /// The model that it belongs to, with `of` in front.
        base: String,
    },
    /// A repository without the file that makes it an adapter.
    #[error("{source_name} is not a LoRA adapter: it has no adapter_config.json")]
    NoAdapter {
        /// The repository and the revision.
        source_name: String,
    },
    /// Weights that should be in a directory of the user's, and are not.
    #[error("the weights of model {source_name} are not all in {} (--weights-cache-override); missing: {missing}", directory.display())]
    NotInOverride {
        /// The repository and the revision.
        source_name: String,
        /// The directory.
        directory: PathBuf,
        /// What is missing.
        missing: String,
    },
    /// What came is not what the Hub promised.
    #[error(
        "{file}: the {algorithm} of what was downloaded is {found}, not {expected}; it was fetched twice"
    )]
    Checksum {
        /// The file.
        file: String,
        /// `sha256`, or git's variety of `sha1`.
        algorithm: &'static str,
        /// What the Hub says.
        expected: String,
        /// What came.
        found: String,
    },
    /// Something came, but not as much as the Hub promised.
    #[error("{file}: {found} bytes were downloaded, not {expected}; it was fetched twice")]
    Size {
        /// The file.
        file: String,
        /// What the Hub says.
        expected: u64,
        /// What came.
        found: u64,
    },
    /// The disk is full, or would be.
    #[error(
        "not enough space in {}: {what} needs {needed} bytes more, and {available} are available; what is already \
        downloaded stays and counts next time",
        directory.display()
    )]
    Space {
        /// Where there is no space.
        directory: PathBuf,
        /// What does not fit.
        what: String,
        /// Bytes that are still to come.
        needed: u64,
        /// Bytes that can be written there.
        available: u64,
    },
    /// The file system refused something.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What it refused.
        action: &'static str,
        /// Where.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Certificates that cannot be used.
    #[error("no certificates to trust in {}: {problem}", path.display())]
    Certificates {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
}

impl HubError {
    /// Whether the Hub could not be asked, as opposed to an answer that says no.
    pub fn is_unreachable(&self) -> bool {
        matches!(self, Self::Unreachable { .. })
    }

    pub(crate) fn io(action: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { action, path, source }
    }
}
