//! Connections to the shards, and one call to all of them.

use std::error::Error;
use std::future::Future;
use std::iter::repeat_n;
use std::path::Path;
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
pub(super) struct Ranks(Vec<Rank>);

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
}

impl Ranks {
    /// Connects to the shard at `master`, and through it to all of them; waits until `until` for sockets to appear.
    pub(super) async fn discover(master: &Path, until: Instant) -> Result<Self, ShardError> {
        let mut first = connect(master, until).await?;
        let response = first.service_discovery(v3::ServiceDiscoveryRequest {}).await;
        let urls = response.map_err(|status| ShardError::Connection(detail(&status)))?.into_inner().urls;
        let mut ranks = Vec::with_capacity(urls.len());
        for url in urls {
            let path = url
                .strip_prefix("unix://")
                .ok_or_else(|| ShardError::Answer(format!("shard address {url} is not a unix socket")))?;
            ranks.push(connect(Path::new(path), until).await?);
        }
        if ranks.is_empty() { Err(ShardError::Empty) } else { Ok(Self(ranks)) }
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
        let requests = repeat_n(request, self.0.len());
        let calls = self.0.iter().zip(requests).map(|(rank, request)| call(rank.clone(), request));
        let answers = join_all(calls).await;
        let answer = |(rank, answer): (usize, Result<Response<A>, Status>)| {
            let answer = answer.map(Response::into_inner).map_err(|status| error(&status));
            answer.inspect_err(|error| tracing::warn!(rank, %error, "a call to a shard failed"))
        };
        answers.into_iter().enumerate().map(answer).collect()
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
        ShardAdapters { ranks: self.clone() }
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
        self.ranks.call(request, call).await.map(drop)
    }

    /// Forgets an adapter on every rank that has it.
    pub async fn unload(&self, id: &str) -> Result<(), ShardError> {
        let request = v3::UnloadAdapterRequest { id: id.to_owned() };
        let call = |mut rank: Rank, request| async move { rank.unload_adapter(request).await };
        self.ranks.call(request, call).await.map(drop)
    }
}

/// Connects to one socket, and tries again until `until`.
async fn connect(path: &Path, until: Instant) -> Result<Rank, ShardError> {
    loop {
        let refused = match open(path).await {
            Ok(channel) => {
                let rank = TextGenerationServiceClient::new(channel);
                return Ok(rank
                    .max_decoding_message_size(MESSAGE_BYTES_MAX)
                    .max_encoding_message_size(MESSAGE_BYTES_MAX));
            }
            Err(refused) => refused,
        };
        if Instant::now() + RETRY > until {
            return Err(ShardError::Connection(format!("{}: {}", path.display(), detail(&refused))));
        }
        sleep(RETRY).await;
    }
}

async fn open(path: &Path) -> Result<Channel, tonic::transport::Error> {
    let path = path.to_owned();
    let connector = service_fn(move |_: Uri| {
        let path = path.clone();
        async move { Ok::<_, std::io::Error>(TokioIo::new(UnixStream::connect(path).await?)) }
    });
    // Only a placeholder that makes a valid authority, the one the reference uses; the connector decides.
    Endpoint::from_static("http://[::]:50051").connect_with_connector(connector).await
}

/// Statuses that the connection made, rather than the shard, have a source.
fn error(status: &Status) -> ShardError {
    if status.source().is_some() || status.code() == Code::Unavailable {
        ShardError::Connection(detail(status))
    } else {
        ShardError::Server(status.message().to_owned())
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
