//! Builds the parts, from the shards to the listener, serves, and drains.
//!
//! The HTTP port is bound first, so that a probe can tell a server that starts from none. It closes last.

use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use axum::ServiceExt as _;
use axum::serve::ListenerExt as _;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use thiserror::Error;
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::signal::unix::{SignalKind, signal};
use tokio::task::{JoinError, JoinHandle};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use crate::adapters::{Adapters, Changes};
use crate::availability::Availability;
use crate::batching::Batcher;
use crate::chat::source::TemplateSource;
use crate::chat::template::ChatTemplate;
use crate::config::{Config, HttpConfig, ModelConfig};
use crate::http::{Access, App, Gate, Info, operators_router, router};
use crate::infer::Infer;
use crate::limits::{Limits, LimitsError};
use crate::metrics::Metrics;
use crate::request::validate::Validator;
use crate::shards::{self, GrpcShards, Recovery, ShardError, ShardHealth};
use crate::supervisor::Supervisor;
use crate::text::Tokenizer;
use crate::text::tokenizer::LoadError;

/// How long the shards may take to open their sockets.
const CONNECT_TIME_MAX: Duration = Duration::from_secs(60);
/// Connections that may wait to be accepted; the system may lower it.
const BACKLOG: u32 = 8192;
/// For what is left to be written when the server ends: once for the last events of requests that had to end, and once for
/// all connections. Whoever started the server gives it a second.
const LAST_WORDS: Duration = Duration::from_millis(300);

/// The server could not start, or not go on.
#[derive(Debug, Error)]
pub(crate) enum AppError {
    #[error("shards: {0}")]
    Shards(#[from] ShardError),
    #[error("warm-up: {0}")]
    Warmup(ShardError),
    #[error(transparent)]
    Limits(#[from] LimitsError),
    #[error(transparent)]
    Tokenizer(#[from] LoadError),
    #[error("cannot listen on {address}: {error}")]
    Bind { address: SocketAddr, error: io::Error },
    #[error("cannot reach the launcher: {0}")]
    Supervisor(io::Error),
    #[error("cannot handle signals: {0}")]
    Signals(io::Error),
    #[error("the listener has failed: {0}")]
    Serve(io::Error),
    #[error("the batcher has ended unexpectedly")]
    BatcherEnded,
}

/// Serves until a signal stops it.
pub(crate) async fn run(config: Config) -> Result<(), AppError> {
    config.warnings.iter().for_each(|warning| tracing::warn!("{warning}"));
    raise_descriptor_limit();
    let stopping = stop_signals().map_err(AppError::Signals)?;
    let availability = Availability::starting();
    let supervisor =
        Supervisor::connect(config.recovery.control_socket.clone()).await.map_err(AppError::Supervisor)?;
    let mut front = Front::open(&config.http, &availability)?;
    let app = tokio::select! {
        app = build(&config, &availability, &supervisor) => Arc::new(app?),
        () = stopping.cancelled() => return Ok(()),
    };
    front.serve(app.clone(), &config.http.access);
    supervisor.ready();
    availability.started();
    tracing::info!(url = %format_args!("http://{}", front.address), "Connected");
    tokio::select! {
        served = &mut front.server => ended(served),
        () = drain(&app, stopping, config.http.patience) => {
            front.close().await;
            Ok(())
        }
        // Nothing can be served any more: whoever started this process should see it end.
        () = app.infer.ended() => Err(AppError::BatcherEnded),
    }
}

/// Builds the parts.
async fn build(
    config: &Config,
    availability: &Availability,
    supervisor: &Supervisor,
) -> Result<App, AppError> {
    availability.starting_with("the model is loading");
    let mut shards = shards::connect(&config.socket, CONNECT_TIME_MAX).await?;
    tracing::info!("Warming up model");
    availability.starting_with("the model is warming up");
    let warm = shards.warmup(config.limits.warmup()).await.map_err(AppError::Warmup)?;
    let tokenizer = config.model.directory.join("tokenizer.json");
    let tokenizer = Tokenizer::load(&tokenizer, config.validation_workers)?;
    let vocabulary = vocabulary(&config.model.directory).unwrap_or(tokenizer.vocabulary());
    let limits = Limits::settle(&config.limits, shards.info(), &warm, vocabulary)?;
    let shards = shards.recovered_by(Recovery::new(
        &config.socket,
        limits.warmup(&config.limits),
        config.limits.batch_total_tokens,
        config.recovery.step_timeout,
        supervisor.clone(),
    ));
    tracing::info!("Setting max batch total tokens to {}", limits.batching.capacity.usable());
    let metrics = Metrics::new(limits.buckets());
    follow(availability.clone(), shards.health());
    let adapters = adapters(config, &shards);
    let batcher = Batcher::start(shards, limits.batching.clone(), metrics.clone(), availability.clone());
    let validator = Validator::new(tokenizer.clone(), limits.request.clone(), adapters.clone());
    tracing::info!("Using backend V3");
    Ok(App {
        infer: Infer::new(batcher, validator, metrics.clone(), config.limits.concurrent_requests),
        tokenizer,
        template: template(&config.model),
        adapters,
        metrics,
        availability: availability.clone(),
        info: info(config, &limits),
        compute_type: config.http.compute_type.clone(),
        body_bytes_max: config.http.body_bytes_max,
    })
}

fn adapters(config: &Config, shards: &GrpcShards) -> Adapters {
    let ids = &shards.info().adapters;
    if !ids.is_empty() {
        tracing::info!("Adapters: {}", ids.join(", "));
    }
    let changes = match (config.allow_runtime_adapters, shards.adapters()) {
        (false, _) => Changes::Forbidden,
        (true, None) => Changes::Unsupported,
        (true, Some(shards)) => Changes::Possible(shards),
    };
    Adapters::new(ids, &config.model.name, changes)
}

/// The number of tokens that the model has embeddings for, as its `config.json` tells. The shards have read the same file,
/// so that one which cannot be read is none that they serve.
fn vocabulary(model: &Path) -> Option<u32> {
    let config: serde_json::Value =
        serde_json::from_slice(&std::fs::read(model.join("config.json")).ok()?).ok()?;
    u32::try_from(config.get("vocab_size")?.as_u64()?).ok()
}

fn template(model: &ModelConfig) -> ChatTemplate {
    let source = TemplateSource::find(&model.directory, model.tokenizer_config.as_deref());
    let template = ChatTemplate::compile(source);
    if let Some(error) = template.error() {
        tracing::warn!("chats will be refused: {error}");
    }
    template
}

fn info(config: &Config, limits: &Limits) -> Info {
    Info {
        model_id: config.model.name.clone(),
        model_sha: None,
        model_pipeline_tag: None,
        max_concurrent_requests: config.limits.concurrent_requests,
        max_best_of: config.limits.best_of,
        max_stop_sequences: config.limits.stop_sequences,
        max_input_tokens: limits.request.input_tokens_max.0,
        max_total_tokens: limits.request.total_tokens_max.0,
        validation_workers: config.validation_workers.get(),
        max_client_batch_size: config.limits.client_batch,
        router: "text-generation-router",
        version: env!("CARGO_PKG_VERSION"),
        // Image builds name their commit and label; a build by hand has none.
        sha: option_env!("GIT_SHA").unwrap_or("unknown"),
        docker_label: option_env!("DOCKER_LABEL"),
    }
}

/// Asks the shards how they are, for as long as the process lives.
fn follow(availability: Availability, health: ShardHealth) {
    tokio::spawn(async move { availability.follow(|| health.check()).await });
}

/// The listeners, which answer from the start: first that the server is starting.
struct Front {
    address: SocketAddr,
    gate: Gate,
    /// Of the listener for operators' tools.
    operators: Gate,
    server: JoinHandle<io::Result<()>>,
    closing: CancellationToken,
}

impl Front {
    /// Errors when the HTTP port is taken. The other one may be: what it serves is on the HTTP port as well.
    fn open(config: &HttpConfig, availability: &Availability) -> Result<Self, AppError> {
        let failed = |error| AppError::Bind { address: config.address, error };
        let listener = listen(config.address).map_err(failed)?;
        let address = listener.local_addr().map_err(failed)?;
        let [gate, operators] = [(); 2].map(|()| Gate::new(availability.clone(), &config.access));
        let closing = CancellationToken::new();
        let server = axum::serve(without_delay(listener), gate.clone().into_make_service())
            .with_graceful_shutdown(closing.clone().cancelled_owned());
        if let Some(address) = config.metrics_address {
            match listen(address) {
                // For as long as the process lives.
                Ok(listener) => drop(tokio::spawn(
                    axum::serve(listener, operators.clone().into_make_service()).into_future(),
                )),
                Err(error) => {
                    tracing::warn!("no metrics on `--prometheus-port`: cannot listen on {address}: {error}")
                }
            }
        }
        Ok(Self { address, gate, operators, server: tokio::spawn(server.into_future()), closing })
    }

    fn serve(&self, app: Arc<App>, access: &Access) {
        self.operators.open(operators_router(app.clone()));
        self.gate.open(router(app, access));
    }

    /// Takes no more connections, and lets what is written reach its readers.
    async fn close(self) {
        self.closing.cancel();
        // Who has not read by then has left, or never will.
        let _ = timeout(LAST_WORDS, self.server).await;
    }
}

/// The listener does not end unless it is told to.
fn ended(served: Result<io::Result<()>, JoinError>) -> Result<(), AppError> {
    served.map_err(io::Error::other).flatten().map_err(AppError::Serve)
}

/// Resolves after `stopping`, once the requests under way have ended, or had to: new ones are refused, on a listener that
/// stays open, so that clients hear of it.
async fn drain(app: &App, stopping: CancellationToken, patience: Duration) {
    stopping.cancelled().await;
    app.availability.draining();
    if timeout(patience, app.availability.drained()).await.is_err() {
        tracing::warn!("requests that did not finish within {} s are ended", patience.as_secs());
        app.infer.end_all();
        // Whoever does not read that either is left alone.
        let _ = timeout(LAST_WORDS, app.availability.drained()).await;
    }
}

fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

/// Tokens are small writes that must not wait for each other.
fn without_delay(listener: TcpListener) -> impl axum::serve::Listener<Io = TcpStream, Addr = SocketAddr> {
    listener.tap_io(|stream| {
        if let Err(error) = stream.set_nodelay(true) {
            tracing::debug!("cannot set TCP_NODELAY: {error}");
        }
    })
}

/// Cancelled by SIGINT or SIGTERM.
fn stop_signals() -> io::Result<CancellationToken> {
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let stopping = CancellationToken::new();
    let cancel = stopping.clone();
    tokio::spawn(async move {
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
        }
        tracing::info!("stopping: no new requests; those in flight may finish");
        cancel.cancel();
    });
    Ok(stopping)
}

/// Every connection is a descriptor, and the usual soft limit is far below what the system allows.
fn raise_descriptor_limit() {
    let raised = getrlimit(Resource::RLIMIT_NOFILE)
        .and_then(|(_, most)| setrlimit(Resource::RLIMIT_NOFILE, most, most));
    if let Err(error) = raised {
        tracing::warn!("cannot raise the limit on open files: {error}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_vocabulary_is_the_models_if_its_files_tell() {
        let model = tempfile::tempdir().unwrap();
        assert_eq!(vocabulary(model.path()), None);
        for (config, expected) in [(r#"{"vocab_size": 32000}"#, Some(32000)), ("{}", None), ("{", None)] {
            std::fs::write(model.path().join("config.json"), config).unwrap();
            assert_eq!(vocabulary(model.path()), expected, "{config}");
        }
    }
}
