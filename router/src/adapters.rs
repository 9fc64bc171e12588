//! The LoRA adapters that requests can name: those that the shards loaded at their start, and those that come and go while
//! the server runs.
//!
//! - A request holds its [`Adapter`] from its validation to its end. Unloading takes the name away at once; the shards are
//!   told when the last request that holds the adapter is gone.
//! - On the wire, an adapter of the start has its name as its id. Later ones are `name#N`, each `N` used once, so that what
//!   was computed under an id (a cached prefix, say) never meets other weights of the same name.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::fs;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use thiserror::Error;
use tokio::sync::{Mutex, oneshot};

use crate::shards::{ShardAdapters, ShardError};

/// Separates the name from the number in ids of adapters that were loaded while the server ran.
const NUMBER_MARK: char = '#';

/// Longest name, in bytes; ids of the Hub are shorter.
const NAME_BYTES_MAX: usize = 200;

/// Names under which OpenAI's clients ask for whatever is served.
pub(crate) const ANY_MODEL: &str = "tgi";

/// An adapter that is loaded, for as long as it is held.
#[derive(Debug)]
pub struct Adapter {
    name: String,
    wire_id: String,
    /// Nothing is ever sent: the other end hears when the last holder is gone.
    _held: oneshot::Sender<Infallible>,
}

impl Adapter {
    /// The adapter, and what resolves when nobody holds it any more.
    pub(crate) fn new(name: &str, wire_id: &str) -> (Arc<Self>, oneshot::Receiver<Infallible>) {
        let (held, released) = oneshot::channel();
        (Arc::new(Self { name: name.to_owned(), wire_id: wire_id.to_owned(), _held: held }), released)
    }

    /// What clients call it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What the shards call it. No other adapter ever has this id.
    pub fn wire_id(&self) -> &str {
        &self.wire_id
    }
}

/// Which adapters there are. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Adapters(Arc<Registry>);

#[derive(Debug)]
struct Registry {
    /// By name. Never locked across a wait.
    loaded: RwLock<BTreeMap<String, Entry>>,
    /// The name of the base model, which is no adapter's.
    model: String,
    changes: Changes,
    /// The last number that was given to an adapter. Locked while one is loaded.
    number: Mutex<u64>,
}

#[derive(Debug)]
struct Entry {
    adapter: Arc<Adapter>,
    released: oneshot::Receiver<Infallible>,
}

/// Whether adapters come and go while the server runs.
#[derive(Clone, Debug)]
pub(crate) enum Changes {
    /// The server was not started with `--allow-runtime-adapters`.
    Forbidden,
    /// The shards cannot do it.
    Unsupported,
    /// These do it.
    Possible(ShardAdapters),
}

/// A name that is no adapter's. The text lists those that are.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("`{field}` is `{name}`, but no adapter of this name is loaded{}", listed(.loaded))]
pub(crate) struct UnknownAdapter {
    field: &'static str,
    name: String,
    loaded: Vec<String>,
}

/// An adapter that was not loaded or unloaded.
#[derive(Debug, Error)]
pub(crate) enum AdapterError {
    #[error(
        "adapters cannot be loaded or unloaded while this server runs: it was started without `--allow-runtime-adapters`"
    )]
    Forbidden,
    #[error("adapters cannot be loaded or unloaded while the model server runs: it does not know how")]
    Unsupported,
    #[error("`lora_name` is empty")]
    EmptyName,
    #[error("`lora_name` has {0} bytes, but may have at most {NAME_BYTES_MAX}")]
    LongName(usize),
    #[error("`lora_name` is {0:?}, but may consist of letters, digits and `-`, `_`, `.`, `/`, `:` only")]
    Name(String),
    #[error("`lora_name` is `{0}`, which means the base model")]
    BaseModel(String),
    #[error("`lora_name` is `{0}`, but an adapter of this name is loaded; unload it first")]
    Taken(String),
    #[error(
        "`lora_path` is {0:?}, but must be a directory of the machine that serves; adapters of the Hub are given at the \
         start, with `--lora-adapters`"
    )]
    Path(String),
    #[error(transparent)]
    Unknown(#[from] UnknownAdapter),
    #[error("adapter `{name}` was refused by the model server: {reason}")]
    Refused { name: String, reason: String },
    #[error("adapter `{name}` was not loaded: {error}")]
    Shard { name: String, error: ShardError },
}

impl Adapters {
    /// `ids` are those of the adapters that the shards have loaded, `model` is the name of the base model.
    pub(crate) fn new(ids: &[String], model: &str, changes: Changes) -> Self {
        let entry = |id: &String| {
            let (adapter, released) = Adapter::new(id, id);
            (id.clone(), Entry { adapter, released })
        };
        // Shards that outlive their router may hold numbered ones, whose ids are not to be given again.
        let numbers = ids.iter().filter_map(|id| id.rsplit_once(NUMBER_MARK)?.1.parse().ok());
        Self(Arc::new(Registry {
            loaded: RwLock::new(ids.iter().map(entry).collect()),
            model: model.to_owned(),
            number: Mutex::new(numbers.max().unwrap_or(0)),
            changes,
        }))
    }

    /// The adapter of this name, to be held as long as it is needed.
    pub(crate) fn find(&self, name: &str) -> Option<Arc<Adapter>> {
        self.0.read().get(name).map(|entry| Arc::clone(&entry.adapter))
    }

    /// The error for a name that was not found, in the field of a request.
    pub(crate) fn unknown(&self, field: &'static str, name: &str) -> UnknownAdapter {
        UnknownAdapter { field, name: name.to_owned(), loaded: self.0.read().keys().cloned().collect() }
    }

    /// Loads the adapter in the directory `path` on all shards; requests can name it from then on.
    ///
    /// Errors when the name cannot be or is another one's, when there is no such directory, and when a shard refuses; then
    /// no shard has it.
    pub(crate) async fn load(&self, name: &str, path: &str) -> Result<(), AdapterError> {
        let shards = self.0.changes.shards()?.clone();
        check_name(name, &self.0.model)?;
        let (registry, name, path) = (Arc::clone(&self.0), name.to_owned(), path.to_owned());
        // A client that leaves must not leave a load half done, so it does not run in the client's task.
        let load = tokio::spawn(async move { registry.load(&shards, name, path).await });
        load.await.expect("a load does not panic, and whoever waits for it ends before the runtime does")
    }

    /// Takes the name away at once. The shards forget the adapter when no request holds it any more.
    ///
    /// Errors when there is no adapter of this name. Must be called inside a tokio runtime.
    pub(crate) fn unload(&self, name: &str) -> Result<(), AdapterError> {
        let shards = self.0.changes.shards()?.clone();
        let removed = self.0.write().remove(name);
        let Some(Entry { adapter, released }) = removed else {
            return Err(self.unknown("lora_name", name).into());
        };
        let id = adapter.wire_id.clone();
        tracing::info!(adapter = name, id, "Adapter is unloaded");
        drop(adapter);
        tokio::spawn(async move {
            // It ends with an error, because nothing is sent.
            let _ = released.await;
            forget(&shards, &id).await;
        });
        Ok(())
    }
}

impl Changes {
    fn shards(&self) -> Result<&ShardAdapters, AdapterError> {
        match self {
            Self::Forbidden => Err(AdapterError::Forbidden),
            Self::Unsupported => Err(AdapterError::Unsupported),
            Self::Possible(shards) => Ok(shards),
        }
    }
}

impl Registry {
    fn read(&self) -> RwLockReadGuard<'_, BTreeMap<String, Entry>> {
        self.loaded.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, BTreeMap<String, Entry>> {
        self.loaded.write().unwrap_or_else(PoisonError::into_inner)
    }

    async fn load(&self, shards: &ShardAdapters, name: String, path: String) -> Result<(), AdapterError> {
        let directory = tokio::task::spawn_blocking(move || directory(path));
        let directory = directory.await.expect("looking at a directory does not panic")?;
        // One after the other, so that nobody takes the name while the shards load.
        let mut number = self.number.lock().await;
        if self.read().contains_key(&name) {
            return Err(AdapterError::Taken(name));
        }
        *number += 1;
        let id = format!("{name}{NUMBER_MARK}{number}");
        if let Err(error) = shards.load(&id, &directory).await {
            // Ranks that did not refuse have it.
            forget(shards, &id).await;
            return Err(AdapterError::of_shards(name, error));
        }
        tracing::info!(adapter = name, id, path = directory, "Adapter is loaded");
        let (adapter, released) = Adapter::new(&name, &id);
        self.write().insert(name, Entry { adapter, released });
        Ok(())
    }
}

impl AdapterError {
    fn of_shards(name: String, error: ShardError) -> Self {
        match error {
            ShardError::Server(reason) | ShardError::Refused(reason) => Self::Refused { name, reason },
            error => Self::Shard { name, error },
        }
    }
}

/// There is nobody to tell when it fails: a shard that does not answer is noticed by every step.
async fn forget(shards: &ShardAdapters, id: &str) {
    if let Err(error) = shards.unload(id).await {
        tracing::warn!(id, %error, "an adapter that nobody uses could not be unloaded from the shards");
    }
}

fn check_name(name: &str, model: &str) -> Result<(), AdapterError> {
    let sane = |character: char| character.is_ascii_alphanumeric() || "-_./:".contains(character);
    if name.is_empty() {
        Err(AdapterError::EmptyName)
    } else if name.len() > NAME_BYTES_MAX {
        Err(AdapterError::LongName(name.len()))
    } else if !name.chars().all(sane) {
        Err(AdapterError::Name(name.to_owned()))
    } else if name == model || name == ANY_MODEL {
        Err(AdapterError::BaseModel(name.to_owned()))
    } else {
        Ok(())
    }
}

/// The directory without links and dots, as the shards are told of it.
fn directory(path: String) -> Result<String, AdapterError> {
    let found = fs::canonicalize(&path).ok().filter(|directory| directory.is_dir());
    let named = found.and_then(|directory| directory.into_os_string().into_string().ok());
    named.ok_or(AdapterError::Path(path))
}

/// The end of a sentence that says what there is.
fn listed(names: &[String]) -> String {
    match names {
        [] => String::new(),
        names => format!("; there are: `{}`", names.join("`, `")),
    }
}

#[cfg(test)]
impl Adapters {
    /// Adapters that stay as they are.
    pub(crate) fn fixed(names: &[&str]) -> Self {
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        Self::new(&names, "acme/tiny", Changes::Forbidden)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::sync::Notify;

    use super::*;
    use crate::shards::connect;
    use crate::shards::scripted_server::ScriptedStack;

    /// Two ranks that know how to load adapters and hold these already, and the router's side of it.
    async fn start(loaded: &[&str]) -> (ScriptedStack, Adapters) {
        let stack = ScriptedStack::start(2);
        for rank in 0..2 {
            let mut rank = stack.rank(rank);
            rank.adapters = loaded.iter().map(|id| (*id).to_owned()).collect();
            rank.info.adapters = rank.adapters.clone();
            rank.info.extensions = vec![proto::extensions::ADAPTERS.to_owned()];
        }
        let shards = connect(&stack.master(), Duration::from_secs(10)).await.unwrap();
        let changes = Changes::Possible(shards.adapters().expect("they announce it"));
        let adapters = Adapters::new(&shards.info().adapters, "acme/tiny", changes);
        stack.calls();
        (stack, adapters)
    }

    fn wire_id(adapters: &Adapters, name: &str) -> Option<String> {
        adapters.find(name).map(|adapter| adapter.wire_id().to_owned())
    }

    /// A directory to load from, as an argument and as the shards hear of it.
    fn directory() -> (tempfile::TempDir, String) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().canonicalize().unwrap().to_str().unwrap().to_owned();
        (directory, path)
    }

    async fn refusal(adapters: &Adapters, name: &str, path: &str) -> String {
        adapters.load(name, path).await.unwrap_err().to_string()
    }

    #[tokio::test]
    async fn adapters_of_the_start_have_their_name_on_the_wire() {
        let (_stack, adapters) = start(&["poet", "org/judge"]).await;
        assert_eq!(wire_id(&adapters, "poet").as_deref(), Some("poet"));
        assert_eq!(wire_id(&adapters, "org/judge").as_deref(), Some("org/judge"));
        let unknown = adapters.unknown("adapter_id", "x").to_string();
        let expected =
            "`adapter_id` is `x`, but no adapter of this name is loaded; there are: `org/judge`, `poet`";
        assert_eq!(unknown, expected);
    }

    #[tokio::test]
    async fn loading_asks_every_rank_and_gives_an_id_of_its_own() {
        let (stack, adapters) = start(&[]).await;
        let (_directory, path) = directory();
        adapters.load("poet", &format!("{path}/.")).await.unwrap();
        for rank in 0..2 {
            assert_eq!(stack.rank(rank).calls.last().unwrap(), &format!("load poet#1 from {path}"));
        }
        assert_eq!(wire_id(&adapters, "poet").as_deref(), Some("poet#1"));
    }

    #[tokio::test]
    async fn an_unloaded_adapter_leaves_the_shards_with_its_last_request() {
        let (stack, adapters) = start(&["poet"]).await;
        let held = adapters.find("poet").unwrap();
        let held_too = Arc::clone(&held);
        adapters.unload("poet").unwrap();
        assert!(adapters.find("poet").is_none(), "the name is gone at once");
        assert!(matches!(adapters.unload("poet"), Err(AdapterError::Unknown(_))));

        // The name can be had again, while the old adapter is still in use.
        let (_directory, path) = directory();
        adapters.load("poet", &path).await.unwrap();
        assert_eq!(wire_id(&adapters, "poet").as_deref(), Some("poet#1"));
        drop(held);
        assert_eq!(stack.rank(0).adapters, ["poet", "poet#1"], "one request still holds the old one");
        drop(held_too);
        for rank in 0..2 {
            stack.called(rank, "unload poet").await;
            assert_eq!(stack.rank(rank).adapters, ["poet#1"]);
        }
    }

    #[tokio::test]
    async fn an_id_is_never_given_twice() {
        let (stack, adapters) = start(&["left#7", "plain#x"]).await;
        let (_directory, path) = directory();
        adapters.load("left", &path).await.unwrap();
        assert_eq!(wire_id(&adapters, "left").as_deref(), Some("left#8"));
        adapters.unload("left").unwrap();
        stack.called(0, "unload left#8").await;
        adapters.load("left", &path).await.unwrap();
        assert_eq!(wire_id(&adapters, "left").as_deref(), Some("left#9"));
    }

    #[tokio::test]
    async fn what_one_rank_refuses_no_rank_keeps() {
        let (stack, adapters) = start(&[]).await;
        let (_directory, path) = directory();
        stack.rank(1).refuses = Some("rank 8 is too odd".to_owned());
        let expected = "adapter `poet` was refused by the model server: rank 8 is too odd";
        assert_eq!(refusal(&adapters, "poet", &path).await, expected);
        assert_eq!(stack.rank(0).calls.last().unwrap(), "unload poet#1");
        assert_eq!(stack.rank(0).adapters, Vec::<String>::new());
        assert!(adapters.find("poet").is_none());

        stack.rank(1).refuses = None;
        adapters.load("poet", &path).await.unwrap();
        assert_eq!(wire_id(&adapters, "poet").as_deref(), Some("poet#2"));
    }

    #[tokio::test]
    async fn shards_that_do_not_answer_have_not_loaded() {
        let (mut stack, adapters) = start(&[]).await;
        let (_directory, path) = directory();
        stack.stop().await;
        let error = refusal(&adapters, "poet", &path).await;
        assert!(error.starts_with("adapter `poet` was not loaded: Could not connect"), "{error}");
        assert!(adapters.find("poet").is_none());
    }

    #[tokio::test]
    async fn a_client_that_leaves_does_not_end_the_load() {
        let (stack, adapters) = start(&[]).await;
        let (_directory, path) = directory();
        let gate = Arc::new(Notify::new());
        stack.rank(1).gate = Some(Arc::clone(&gate));
        let call = format!("load poet#1 from {path}");
        tokio::select! {
            _ = adapters.load("poet", &path) => panic!("rank 1 waits"),
            () = stack.called(1, &call) => {}
        }
        stack.rank(1).gate = None;
        gate.notify_one();
        // Loads wait for each other, so this one comes to see the first one's end.
        assert!(matches!(adapters.load("poet", &path).await, Err(AdapterError::Taken(_))));
        assert_eq!(wire_id(&adapters, "poet").as_deref(), Some("poet#1"));
    }

    #[tokio::test]
    async fn names_and_directories_are_checked_before_the_shards_are_asked() {
        let (stack, adapters) = start(&["taken"]).await;
        let (_directory, path) = directory();
        let long = "x".repeat(201);
        for (name, path, expected) in [
            ("", path.as_str(), "`lora_name` is empty"),
            (&long, &path, "`lora_name` has 201 bytes, but may have at most 200"),
            ("a\nb", &path, "`lora_name` is \"a\\nb\", but may consist of letters, digits and"),
            ("a#1", &path, "`lora_name` is \"a#1\", but may consist of letters, digits and"),
            ("acme/tiny", &path, "`lora_name` is `acme/tiny`, which means the base model"),
            ("tgi", &path, "`lora_name` is `tgi`, which means the base model"),
            (
                "taken",
                &path,
                "`lora_name` is `taken`, but an adapter of this name is loaded; unload it first",
            ),
            (
                "poet",
                "org/poet",
                "`lora_path` is \"org/poet\", but must be a directory of the machine that serves;",
            ),
            ("poet", concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml"), "`lora_path` is \""),
        ] {
            let error = refusal(&adapters, name, path).await;
            assert!(error.starts_with(expected), "{error}");
        }
        assert_eq!(stack.calls(), Vec::<String>::new());
    }

    #[tokio::test]
    async fn what_is_forbidden_or_impossible_says_so() {
        let (_directory, path) = directory();
        let fixed = Adapters::fixed(&["poet"]);
        assert!(refusal(&fixed, "judge", &path).await.contains("without `--allow-runtime-adapters`"));
        assert!(matches!(fixed.unload("poet"), Err(AdapterError::Forbidden)));
        let old = Adapters::new(&[], "acme/tiny", Changes::Unsupported);
        assert!(refusal(&old, "judge", &path).await.ends_with("it does not know how"));
    }

    #[tokio::test]
    async fn the_end_of_the_server_leaves_the_adapters_loaded() {
        let (stack, adapters) = start(&["poet"]).await;
        drop(adapters);
        // The next call shows that nothing was sent before it.
        let shards = connect(&stack.master(), Duration::from_secs(10)).await.unwrap();
        assert_eq!(stack.calls(), ["discover", "clear all", "info"]);
        assert_eq!(shards.info().adapters, ["poet"]);
    }
}
