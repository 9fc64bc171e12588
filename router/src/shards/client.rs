//! Connections to the shards, and one call to all of them.

use std::collections::BTreeMap;
use std::error::Error;
use std::future::Future;
use std::iter::repeat_n;
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::future::join_all;
use hyper_util::rt::TokioIo;
use proto::MESSAGE_BYTES_MAX;
use proto::v3;
use proto::v3::text_generation_service_client::TextGenerationServiceClient;
use tokio::net::UnixStream;
use tokio::time::{Instant, sleep, timeout};
use tonic::transport::{Channel, Endpoint, Uri};
use tonic::{Code, Response, Status};
use tower::service_fn;

use super::ShardError;

/// Pause between attempts to connect: shards bind their sockets once their weights are loaded.
const RETRY: Duration = Duration::from_millis(50);

/// A healthy shard answers at once, but shards of other makes answer between two steps, and a long prompt is a long step.
const HEALTH_LIMIT: Duration = Duration::from_secs(10);

/// The connection to one shard.
pub(super) type Rank = TextGenerationServiceClient<Channel>;

/// The connections to all shards, in rank order. At least one.
#[derive(Clone, Debug)]
pub(super) struct Ranks {
    ranks: Vec<Rank>,
    processes: Vec<ProcessId>,
}

/// The process at the other end of a connection, as it was when that was made last; 0 is unknown.
type ProcessId = Arc<AtomicU32>;

/// Asks all shards whether steps can be made. Cheap to clone, and independent of the batcher: it answers while a step
/// is under way.
#[derive(Clone, Debug)]
pub struct ShardHealth {
    ranks: Ranks,
}

/// Loads adapters on all shards, and unloads them. Cheap to clone, and independent of the batcher.
#[derive(Clone, Debug)]
pub struct ShardAdapters {
    ranks: Ranks,
    /// Paths of those that are loaded, by id: shards that are started again do not know them.
    loaded: Arc<Mutex<BTreeMap<String, String>>>,
}

impl Ranks {
    /// Connects to the shard at `master`, and through it to all of them; waits until `until` for sockets to appear.
    pub(super) async fn discover(master: &Path, until: Instant) -> Result<Self, ShardError> {
        let (mut first, _) = connect(master, until).await?;
        let response = first.service_discovery(v3::ServiceDiscoveryRequest {}).await;
        let urls = response.map_err(|status| ShardError::Connection(detail(&status)))?.into_inner().urls;
        let (mut ranks, mut processes) = (Vec::with_capacity(urls.len()), Vec::with_capacity(urls.len()));
        for url in urls {
            let path = url
                .strip_prefix("unix://")
                .ok_or_else(|| ShardError::Answer(format!("shard address {url} is not a unix socket")))?;
            let (rank, process) = connect(Path::new(path), until).await?;
            ranks.push(rank);
            processes.push(process);
        }
        if ranks.is_empty() { Err(ShardError::Empty) } else { Ok(Self { ranks, processes }) }
    }

    /// The processes of the shards, as far as they are known.
    pub(super) fn processes(&self) -> Vec<u32> {
        let ids = self.processes.iter().map(|id| id.load(Ordering::Relaxed));
        ids.filter(|id| *id > 0).collect()
    }

    /// Sends the same request to every rank and waits for all of them, so that the ranks stay in step. The answers are
    /// in rank order; the first error in that order wins.
    pub(super) async fn call<Q, A, F>(
        &self,
        request: Q,
        call: impl Fn(Rank, Q) -> F,
    ) -> Result<Vec<A>, ShardError>
    where
        Q: Clone,
        F: Future<Output = Result<Response<A>, Status>>,
    {
        let requests = repeat_n(request, self.ranks.len());
        let calls = self.ranks.iter().zip(requests).map(|(rank, request)| call(rank.clone(), request));
        let answers = join_all(calls).await;
        let answer = |(rank, answer): (usize, Result<Response<A>, Status>)| {
            let answer = answer.map(Response::into_inner).map_err(|status| error(&status));
            answer.inspect_err(|error| tracing::warn!(rank, %error, "a call to a shard failed"))
        };
        let answers: Vec<Result<A, ShardError>> = answers.into_iter().enumerate().map(answer).collect();
        let refuses = |answer: &Result<A, ShardError>| answer.as_ref().is_err_and(ShardError::is_refusal);
        let differ = answers.iter().any(refuses) && !answers.iter().all(refuses);
        let all: Result<Vec<A>, ShardError> = answers.into_iter().collect();
        match all {
            // Those that did not refuse have changed.
            Err(ShardError::Refused(reason)) if differ => Err(ShardError::Server(reason)),
            all => all,
        }
    }

    /// Forgets one batch on all ranks, or every batch.
    pub(super) async fn clear_cache(&self, id: Option<u64>) -> Result<(), ShardError> {
        let request = v3::ClearCacheRequest { id };
        self.call(request, |mut rank, request| async move { rank.clear_cache(request).await }).await?;
        Ok(())
    }

    pub(super) fn health(&self) -> ShardHealth {
        ShardHealth { ranks: self.clone() }
    }

    pub(super) fn adapters(&self) -> ShardAdapters {
        ShardAdapters { ranks: self.clone(), loaded: Arc::default() }
    }
}

impl ShardHealth {
    /// Errors when a shard cannot make steps, or does not answer in time.
    pub async fn check(&self) -> Result<(), ShardError> {
        let calls = self
            .ranks
            .call(v3::HealthRequest {}, |mut rank, request| async move { rank.health(request).await });
        match timeout(HEALTH_LIMIT, calls).await {
            Ok(answers) => answers.map(drop),
            Err(_) => Err(ShardError::Connection(format!("no answer within {} s", HEALTH_LIMIT.as_secs()))),
        }
    }
}

impl ShardAdapters {
    /// Loads the adapter in the directory `path` under an id that no other one has.
    ///
    /// Errors when a rank refuses it; the others may have it then.
    pub async fn load(&self, id: &str, path: &str) -> Result<(), ShardError> {
        let request = v3::LoadAdapterRequest { id: id.to_owned(), path: path.to_owned() };
        let call = |mut rank: Rank, request| async move { rank.load_adapter(request).await };
        self.ranks.call(request, call).await?;
        self.loaded().insert(id.to_owned(), path.to_owned());
        Ok(())
    }

    /// Loads all of them again, on shards that are new.
    pub(super) async fn load_again(&self) -> Result<(), ShardError> {
        let loaded: Vec<(String, String)> = self.loaded().clone().into_iter().collect();
        for (id, path) in loaded {
            self.load(&id, &path).await?;
        }
        Ok(())
    }

    fn loaded(&self) -> MutexGuard<'_, BTreeMap<String, String>> {
        self.loaded.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Forgets an adapter on every rank that has it.
    pub async fn unload(&self, id: &str) -> Result<(), ShardError> {
        self.loaded().remove(id);
        let request = v3::UnloadAdapterRequest { id: id.to_owned() };
        let call = |mut rank: Rank, request| async move { rank.unload_adapter(request).await };
        self.ranks.call(request, call).await.map(drop)
    }
}

/// Connects to one socket, and tries again until `until`.
async fn connect(path: &Path, until: Instant) -> Result<(Rank, ProcessId), ShardError> {
    loop {
        let process = ProcessId::default();
        let refused = match open(path, process.clone()).await {
            Ok(channel) => {
                let rank = TextGenerationServiceClient::new(channel)
                    .max_decoding_message_size(MESSAGE_BYTES_MAX)
                    .max_encoding_message_size(MESSAGE_BYTES_MAX);
                return Ok((rank, process));
            }
            Err(refused) => refused,
        };
        if Instant::now() + RETRY > until {
            return Err(ShardError::Connection(format!("{}: {}", path.display(), detail(&refused))));
        }
        sleep(RETRY).await;
    }
}

async fn open(path: &Path, process: ProcessId) -> Result<Channel, tonic::transport::Error> {
    let path = path.to_owned();
    let connector = service_fn(move |_: Uri| {
        let (path, process) = (path.clone(), process.clone());
        async move {
            let stream = UnixStream::connect(path).await?;
            let id = stream.peer_cred().ok().and_then(|peer| u32::try_from(peer.pid()?).ok());
            process.store(id.unwrap_or(0), Ordering::Relaxed);
            Ok::<_, std::io::Error>(TokioIo::new(stream))
        }
    });
    // Only a placeholder that makes a valid authority, the one the reference uses; the connector decides.
    Endpoint::from_static("http://[::]:50051").connect_with_connector(connector).await
}

/// Statuses that the connection made, rather than the shard, have a source.
fn error(status: &Status) -> ShardError {
    if status.source().is_some() || status.code() == Code::Unavailable {
        return ShardError::Connection(detail(status));
    }
    let reason = status.message().to_owned();
    match status.code() {
        Code::InvalidArgument => ShardError::Refused(reason),
        _ => ShardError::Server(reason),
    }
}

/// The innermost cause, which names the socket's trouble; the outer ones say "transport error".
fn detail(error: &(dyn Error + 'static)) -> String {
    let mut cause = error;
    while let Some(source) = cause.source() {
        cause = source;
    }
    match cause.downcast_ref::<Status>() {
        Some(status) => status.message().to_owned(),
        None => cause.to_string(),
    }
}
