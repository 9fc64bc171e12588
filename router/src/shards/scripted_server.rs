//! A shard's gRPC side for tests: real sockets, real messages, no model. It writes down every call it gets.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};

use proto::v3;
use proto::v3::text_generation_service_server::{TextGenerationService, TextGenerationServiceServer};
use tempfile::TempDir;
use tokio::net::UnixListener;
use tokio::sync::Notify;
use tokio::task::JoinHandle;
use tokio_stream::wrappers::UnixListenerStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::Server;
use tonic::{Request, Response, Status};

/// All ranks of a model, each on its own socket in a directory that is removed at the end.
pub(crate) struct ScriptedStack {
    folder: TempDir,
    ranks: Vec<Arc<Mutex<Rank>>>,
    servers: Vec<JoinHandle<()>>,
    end: CancellationToken,
}

/// What one rank holds, was asked, and is told to do.
#[derive(Debug, Default)]
pub(crate) struct Rank {
    index: u64,
    world: u64,
    batches: HashMap<u64, Vec<Row>>,
    /// In short words, in order.
    pub(crate) calls: Vec<String>,
    /// Whole requests of the last prefill.
    pub(crate) prefilled: Vec<v3::Request>,
    /// The last warm-up.
    pub(crate) warmed: Option<v3::WarmupRequest>,
    /// Answered to `Info`.
    pub(crate) info: v3::InfoResponse,
    /// Answered to `ServiceDiscovery`.
    pub(crate) urls: Vec<String>,
    /// Answered to `Warmup`.
    pub(crate) warm: v3::WarmupResponse,
    /// The next prefill or decode fails with this text, after its batches were taken out.
    pub(crate) failure: Option<String>,
    /// The next prefill or decode is refused with this text.
    pub(crate) refusal: Option<String>,
    /// `Health` never answers.
    pub(crate) hangs: bool,
    /// Ids of the adapters that are loaded.
    pub(crate) adapters: Vec<String>,
    /// `LoadAdapter` fails with this text.
    pub(crate) refuses: Option<String>,
    /// `LoadAdapter` waits for this, if there is one.
    pub(crate) gate: Option<Arc<Notify>>,
    /// Told of every `LoadAdapter` that begins and of every `UnloadAdapter` that ends.
    pub(crate) adapter_news: Arc<Notify>,
}

#[derive(Clone, Debug)]
struct Row {
    id: u64,
    generated: u32,
    max_new_tokens: u32,
}

/// What a rank answers to a pass.
struct Pass {
    generations: Vec<v3::Generation>,
    batch: Option<v3::CachedBatch>,
}

impl ScriptedStack {
    /// `world` ranks, listening.
    pub(crate) fn start(world: usize) -> Self {
        let mut stack = Self::prepare(world);
        stack.listen();
        stack
    }

    /// `world` ranks that do not listen yet.
    pub(crate) fn prepare(world: usize) -> Self {
        let folder = TempDir::new().unwrap();
        let urls: Vec<String> =
            (0..world).map(|rank| format!("unix://{}", socket(folder.path(), rank).display())).collect();
        let rank = |index| Rank {
            index: index as u64,
            world: world as u64,
            urls: urls.clone(),
            info: v3::InfoResponse { block_size: 4, support_chunking: true, ..Default::default() },
            ..Rank::default()
        };
        let ranks = (0..world).map(|index| Arc::new(Mutex::new(rank(index)))).collect();
        Self { folder, ranks, servers: Vec::new(), end: CancellationToken::new() }
    }

    pub(crate) fn listen(&mut self) {
        for (index, rank) in self.ranks.iter().enumerate() {
            let listener = UnixListener::bind(socket(self.folder.path(), index)).unwrap();
            let service = TextGenerationServiceServer::new(Service(Arc::clone(rank)));
            let incoming = UnixListenerStream::new(listener);
            let end = self.end.clone().cancelled_owned();
            let server = Server::builder().add_service(service).serve_with_incoming_shutdown(incoming, end);
            self.servers.push(tokio::spawn(async move { server.await.unwrap() }));
        }
    }

    /// The socket of rank 0.
    pub(crate) fn master(&self) -> PathBuf {
        socket(self.folder.path(), 0)
    }

    pub(crate) fn rank(&self, index: usize) -> MutexGuard<'_, Rank> {
        self.ranks[index].lock().unwrap()
    }

    /// Calls that rank 0 got since this was last asked.
    pub(crate) fn calls(&self) -> Vec<String> {
        std::mem::take(&mut self.rank(0).calls)
    }

    /// Waits until a rank has got a call, as its list has it.
    pub(crate) async fn called(&self, rank: usize, call: &str) {
        let news = Arc::clone(&self.rank(rank).adapter_news);
        while !self.rank(rank).calls.iter().any(|known| known == call) {
            news.notified().await;
        }
    }

    /// All ranks end: their connections close, and no new ones are taken.
    pub(crate) async fn stop(&mut self) {
        self.end.cancel();
        for server in self.servers.drain(..) {
            server.await.unwrap();
        }
    }
}

fn socket(folder: &Path, rank: usize) -> PathBuf {
    folder.join(format!("shard-{rank}"))
}

struct Service(Arc<Mutex<Rank>>);

impl Service {
    fn rank(&self) -> MutexGuard<'_, Rank> {
        self.0.lock().unwrap()
    }
}

impl Rank {
    fn take(&mut self, id: u64) -> Result<Vec<Row>, Status> {
        self.batches.remove(&id).ok_or_else(|| Status::internal(format!("Batch ID {id} not found in cache.")))
    }

    /// Errors if this step is to be refused.
    fn consider(&mut self) -> Result<(), Status> {
        self.refusal.take().map_or(Ok(()), |reason| Err(Status::invalid_argument(reason)))
    }

    fn pass(&mut self, id: u64, mut rows: Vec<Row>) -> Result<Pass, Status> {
        if let Some(message) = self.failure.take() {
            return Err(Status::internal(message));
        }
        let mut generations = Vec::new();
        for row in &mut rows {
            row.generated += 1;
            if row.id % self.world == self.index {
                generations.push(row.generation());
            }
        }
        let ended = rows.iter().all(|row| row.generated >= row.max_new_tokens);
        let batch = (!ended).then(|| cached(id, &rows));
        if !ended {
            self.batches.insert(id, rows);
        }
        Ok(Pass { generations, batch })
    }

    /// Rank 1 is slower than rank 0, and so on.
    fn total_ns(&self) -> u64 {
        1000 * (self.index + 1)
    }
}

impl Row {
    fn generation(&self) -> v3::Generation {
        let tokens = v3::Tokens {
            ids: vec![self.id as u32 * 100 + self.generated],
            logprobs: vec![-0.5],
            texts: vec!["t".to_owned()],
            is_special: vec![false],
        };
        let generated_text = (self.generated >= self.max_new_tokens).then(|| v3::GeneratedText {
            text: "t".repeat(self.generated as usize),
            generated_tokens: self.generated,
            finish_reason: v3::FinishReason::Length.into(),
            seed: None,
        });
        v3::Generation { request_id: self.id, tokens: Some(tokens), generated_text, ..Default::default() }
    }
}

fn cached(id: u64, rows: &[Row]) -> v3::CachedBatch {
    let request_ids: Vec<u64> = rows.iter().map(|row| row.id).collect();
    v3::CachedBatch { id, size: request_ids.len() as u32, request_ids, max_tokens: 0, current_tokens: 0 }
}

/// What the extension adds to a step.
fn more(grants: &[v3::Grant], drops: &[u64]) -> String {
    let grant = |v3::Grant { request_id, blocks, tokens }: &v3::Grant| {
        let tokens = tokens.map(|tokens| format!(" and {tokens} tokens")).unwrap_or_default();
        format!(", {request_id} gets {blocks:?}{tokens}")
    };
    let dropped =
        if drops.is_empty() { String::new() } else { format!(", without {}", ids(drops.iter().copied())) };
    grants.iter().map(grant).collect::<String>() + &dropped
}

fn ids(ids: impl IntoIterator<Item = u64>) -> String {
    ids.into_iter().map(|id| id.to_string()).collect::<Vec<_>>().join(",")
}

#[tonic::async_trait]
impl TextGenerationService for Service {
    async fn info(&self, _: Request<v3::InfoRequest>) -> Result<Response<v3::InfoResponse>, Status> {
        self.rank().calls.push("info".to_owned());
        Ok(Response::new(self.rank().info.clone()))
    }

    async fn service_discovery(
        &self,
        _: Request<v3::ServiceDiscoveryRequest>,
    ) -> Result<Response<v3::ServiceDiscoveryResponse>, Status> {
        self.rank().calls.push("discover".to_owned());
        Ok(Response::new(v3::ServiceDiscoveryResponse { urls: self.rank().urls.clone() }))
    }

    async fn clear_cache(
        &self,
        request: Request<v3::ClearCacheRequest>,
    ) -> Result<Response<v3::ClearCacheResponse>, Status> {
        let mut rank = self.rank();
        match request.into_inner().id {
            Some(id) => {
                rank.calls.push(format!("clear {id}"));
                rank.batches.remove(&id);
            }
            None => {
                rank.calls.push("clear all".to_owned());
                rank.batches.clear();
            }
        }
        Ok(Response::new(v3::ClearCacheResponse {}))
    }

    async fn filter_batch(
        &self,
        request: Request<v3::FilterBatchRequest>,
    ) -> Result<Response<v3::FilterBatchResponse>, Status> {
        let v3::FilterBatchRequest { batch_id, request_ids } = request.into_inner();
        let mut rank = self.rank();
        rank.calls.push(format!("filter {batch_id} to {}", ids(request_ids.iter().copied())));
        let rows = rank.take(batch_id)?;
        let kept: Vec<Row> =
            request_ids.iter().filter_map(|id| rows.iter().find(|row| row.id == *id).cloned()).collect();
        let batch = Some(cached(batch_id, &kept));
        rank.batches.insert(batch_id, kept);
        Ok(Response::new(v3::FilterBatchResponse { batch }))
    }

    async fn warmup(
        &self,
        request: Request<v3::WarmupRequest>,
    ) -> Result<Response<v3::WarmupResponse>, Status> {
        let mut rank = self.rank();
        rank.warmed = Some(request.into_inner());
        Ok(Response::new(rank.warm))
    }

    async fn prefill(
        &self,
        request: Request<v3::PrefillRequest>,
    ) -> Result<Response<v3::PrefillResponse>, Status> {
        let v3::PrefillRequest { batch, cached_batch, grants, drops } = request.into_inner();
        let batch = batch.ok_or_else(|| Status::internal("no batch"))?;
        let mut rank = self.rank();
        rank.consider()?;
        let requests = ids(batch.requests.iter().map(|request| request.id));
        let joins = cached_batch.as_ref().map(|cached| format!(" onto {}", cached.id)).unwrap_or_default();
        rank.calls.push(format!("prefill {} with {requests}{joins}{}", batch.id, more(&grants, &drops)));
        let mut rows = Vec::new();
        if let Some(cached) = &cached_batch {
            rows = rank.take(cached.id)?;
        }
        rows.retain(|row| !drops.contains(&row.id));
        rows.extend(batch.requests.iter().map(|request| Row {
            id: request.id,
            generated: request.generated,
            max_new_tokens:
                request.stopping_parameters.as_ref().map_or(0, |stopping| stopping.max_new_tokens),
        }));
        rank.prefilled = batch.requests;
        let Pass { generations, batch } =
            rank.pass(cached_batch.map_or(batch.id, |cached| cached.id), rows)?;
        let total_ns = rank.total_ns();
        Ok(Response::new(v3::PrefillResponse { generations, batch, total_ns, ..Default::default() }))
    }

    async fn decode(
        &self,
        request: Request<v3::DecodeRequest>,
    ) -> Result<Response<v3::DecodeResponse>, Status> {
        let v3::DecodeRequest { batches, grants, drops } = request.into_inner();
        let mut rank = self.rank();
        rank.consider()?;
        let named = ids(batches.iter().map(|batch| batch.id));
        rank.calls.push(format!("decode {named}{}", more(&grants, &drops)));
        let mut rows = Vec::new();
        for batch in &batches {
            rows.extend(rank.take(batch.id)?);
        }
        rows.retain(|row| !drops.contains(&row.id));
        let first = batches.first().ok_or_else(|| Status::internal("no batch"))?.id;
        let Pass { generations, batch } = rank.pass(first, rows)?;
        let total_ns = rank.total_ns();
        Ok(Response::new(v3::DecodeResponse { generations, batch, total_ns, ..Default::default() }))
    }

    async fn load_adapter(
        &self,
        request: Request<v3::LoadAdapterRequest>,
    ) -> Result<Response<v3::LoadAdapterResponse>, Status> {
        let v3::LoadAdapterRequest { id, path } = request.into_inner();
        let gate = {
            let mut rank = self.rank();
            rank.calls.push(format!("load {id} from {path}"));
            rank.adapter_news.notify_one();
            rank.gate.clone()
        };
        if let Some(gate) = gate {
            gate.notified().await;
        }
        let mut rank = self.rank();
        if let Some(reason) = rank.refuses.clone() {
            return Err(Status::invalid_argument(reason));
        }
        if rank.adapters.contains(&id) {
            return Err(Status::already_exists(format!("adapter {id} is loaded")));
        }
        rank.adapters.push(id);
        Ok(Response::new(v3::LoadAdapterResponse {}))
    }

    async fn unload_adapter(
        &self,
        request: Request<v3::UnloadAdapterRequest>,
    ) -> Result<Response<v3::UnloadAdapterResponse>, Status> {
        let id = request.into_inner().id;
        let mut rank = self.rank();
        rank.adapters.retain(|loaded| *loaded != id);
        rank.calls.push(format!("unload {id}"));
        rank.adapter_news.notify_one();
        Ok(Response::new(v3::UnloadAdapterResponse {}))
    }

    async fn health(&self, _: Request<v3::HealthRequest>) -> Result<Response<v3::HealthResponse>, Status> {
        let hangs = self.rank().hangs;
        if hangs {
            std::future::pending::<()>().await;
        }
        Ok(Response::new(v3::HealthResponse {}))
    }
}
