//! The gRPC face of the engine: message to command, answer to message; `wire.rs` translates. No mathematics here.
//!
//! The socket appears once the weights are loaded, because its existence is what the launcher waits for, and it goes when
//! the server ends.
//!
//! Errors are INTERNAL, as the contract has it, with one exception: INVALID_ARGUMENT answers a Prefill or Decode whose new
//! requests or whose plan (grants, drops) cannot be carried out. It was refused as a whole before anything was changed, so all
//! batches are as they were. INTERNAL says that the batches of the step are lost, or that the shard does not hold what its
//! router thinks it does, as after a restart.

mod socket;
mod wire;

#[cfg(test)]
mod tests;

use std::future::Future;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use proto::units::{BatchId, RequestId};
use proto::v3::text_generation_service_server::{TextGenerationService, TextGenerationServiceServer};
use proto::{extensions, v3};
use tokio_stream::wrappers::UnixListenerStream;
use tonic::{Request, Response, Status};

use crate::adapters::AdapterLayout;
use crate::backend::Device;
use crate::engine::Engine;
use crate::engine::adapters::AdapterId;
use crate::engine::commands::BLOCK_SIZE;
use crate::engine::error::EngineError;
use crate::model::ModelShape;
use crate::sampling::penalties::Watermark;

pub use socket::{Socket, SocketError};

/// Calls under way at shutdown may take this long.
const GRACE: Duration = Duration::from_secs(5);

/// What a shard is, as it tells its router.
#[derive(Clone, Debug)]
pub struct Identity {
    /// Type of the weights.
    pub dtype: kernels::DType,
    /// Where it runs, in the contract's words.
    pub device_type: &'static str,
    /// The longest prompt whose cache blocks may be shared, if there is a limit.
    pub shared_prompt_max: Option<u32>,
    /// Where the ranks listen, in their order.
    pub sockets: Vec<PathBuf>,
    /// What requests that ask for a watermark get.
    pub watermark: Watermark,
}

impl Identity {
    /// Of a model on a device, one rank of those that listen on these sockets.
    pub fn new(model: &ModelShape, device: &Device, sockets: Vec<PathBuf>, watermark: Watermark) -> Self {
        let shared_prompt_max =
            model.shared_prompt_max.map(|tokens| u32::try_from(tokens).unwrap_or(u32::MAX));
        Self { dtype: model.dtype, device_type: device.type_name(), shared_prompt_max, sockets, watermark }
    }
}

/// Serves until `stop` is ready, then lets calls under way finish for a moment.
pub async fn serve(
    engine: Engine,
    adapters: Arc<AdapterLayout>,
    identity: Identity,
    socket: Socket,
    stop: impl Future<Output = ()>,
) -> Result<(), tonic::transport::Error> {
    let service = TextGenerationServiceServer::new(Service { engine, adapters, identity })
        .max_decoding_message_size(proto::MESSAGE_BYTES_MAX)
        .max_encoding_message_size(proto::MESSAGE_BYTES_MAX);
    let (listener, _file) = socket.into_parts();
    let (closing, closed) = tokio::sync::oneshot::channel::<()>();
    let server = tonic::transport::Server::builder().add_service(service).serve_with_incoming_shutdown(
        UnixListenerStream::new(listener),
        async {
            // The sender is dropped or sends: both mean stop.
            drop(closed.await);
        },
    );
    let deadline = async {
        stop.await;
        closing.send(()).ok();
        tokio::time::sleep(GRACE).await;
    };
    tokio::select! {
        served = server => served,
        () = deadline => {
            tracing::warn!("calls were still under way at shutdown");
            Ok(())
        }
    }
}

struct Service {
    engine: Engine,
    /// What adapters are matched with.
    adapters: Arc<AdapterLayout>,
    identity: Identity,
}

/// A failure is INTERNAL with its text, as the contract has it.
fn internal(error: impl std::fmt::Display) -> Status {
    Status::internal(error.to_string())
}

/// The failure of a step. Where a new request or a plan was refused before anything was changed, that is INVALID_ARGUMENT.
fn refused_or_lost(error: EngineError) -> Status {
    if error.is_refusal() { Status::invalid_argument(error.to_string()) } else { internal(error) }
}

#[tonic::async_trait]
impl TextGenerationService for Service {
    async fn info(&self, _: Request<v3::InfoRequest>) -> Result<Response<v3::InfoResponse>, Status> {
        let adapters = self.engine.adapters().await.map_err(internal)?;
        Ok(Response::new(v3::InfoResponse {
            requires_padding: false,
            dtype: torch_name(self.identity.dtype).to_owned(),
            device_type: self.identity.device_type.to_owned(),
            window_size: None,
            speculate: 0,
            support_chunking: true,
            use_prefix_caching: true,
            attention_impl: "paged".to_owned(),
            block_size: BLOCK_SIZE.get(),
            extensions: EXTENSIONS.map(str::to_owned).to_vec(),
            adapters: adapters.into_iter().map(|AdapterId(id)| id).collect(),
            shared_prompt_max: self.identity.shared_prompt_max,
        }))
    }

    async fn service_discovery(
        &self,
        _: Request<v3::ServiceDiscoveryRequest>,
    ) -> Result<Response<v3::ServiceDiscoveryResponse>, Status> {
        let urls =
            self.identity.sockets.iter().map(|socket| format!("unix://{}", socket.display())).collect();
        Ok(Response::new(v3::ServiceDiscoveryResponse { urls }))
    }

    async fn health(&self, _: Request<v3::HealthRequest>) -> Result<Response<v3::HealthResponse>, Status> {
        self.engine.health().map_err(internal)?;
        Ok(Response::new(v3::HealthResponse {}))
    }

    async fn clear_cache(
        &self,
        request: Request<v3::ClearCacheRequest>,
    ) -> Result<Response<v3::ClearCacheResponse>, Status> {
        self.engine.clear(request.into_inner().id.map(BatchId)).await.map_err(internal)?;
        Ok(Response::new(v3::ClearCacheResponse {}))
    }

    async fn filter_batch(
        &self,
        request: Request<v3::FilterBatchRequest>,
    ) -> Result<Response<v3::FilterBatchResponse>, Status> {
        let request = request.into_inner();
        let keep = request.request_ids.into_iter().map(RequestId).collect();
        let batch = self.engine.filter(BatchId(request.batch_id), keep).await.map_err(internal)?;
        Ok(Response::new(v3::FilterBatchResponse { batch: Some(wire::cached_batch(batch)) }))
    }

    async fn warmup(
        &self,
        request: Request<v3::WarmupRequest>,
    ) -> Result<Response<v3::WarmupResponse>, Status> {
        let warmup = wire::warmup(request.into_inner(), self.identity.watermark).map_err(internal)?;
        let capacity = self.engine.warm_up(warmup).await.map_err(internal)?;
        Ok(Response::new(v3::WarmupResponse {
            max_supported_total_tokens: Some(capacity.supported.0),
            max_input_tokens: capacity.input_max.0,
            max_total_tokens: capacity.total_max.0,
        }))
    }

    async fn prefill(
        &self,
        request: Request<v3::PrefillRequest>,
    ) -> Result<Response<v3::PrefillResponse>, Status> {
        let (batch, onto, plan) =
            wire::prefill(request.into_inner(), self.identity.watermark).map_err(refused_or_lost)?;
        let step = self.engine.prefill(batch, onto, plan).await.map_err(refused_or_lost)?;
        let wire::Step { generations, batch, forward_ns, decode_ns, total_ns, concat_ns } = step.into();
        Ok(Response::new(v3::PrefillResponse {
            generations,
            batch,
            forward_ns,
            decode_ns,
            total_ns,
            concat_ns,
        }))
    }

    async fn decode(
        &self,
        request: Request<v3::DecodeRequest>,
    ) -> Result<Response<v3::DecodeResponse>, Status> {
        let v3::DecodeRequest { batches, grants, drops } = request.into_inner();
        let batches = batches.into_iter().map(|batch| BatchId(batch.id)).collect();
        let plan = wire::step_plan(grants, drops);
        let step = self.engine.decode(batches, plan).await.map_err(refused_or_lost)?;
        let wire::Step { generations, batch, forward_ns, decode_ns, total_ns, concat_ns } = step.into();
        Ok(Response::new(v3::DecodeResponse {
            generations,
            batch,
            forward_ns,
            decode_ns,
            total_ns,
            concat_ns,
        }))
    }

    async fn load_adapter(
        &self,
        request: Request<v3::LoadAdapterRequest>,
    ) -> Result<Response<v3::LoadAdapterResponse>, Status> {
        let v3::LoadAdapterRequest { id, path } = request.into_inner();
        let adapters = self.adapters.clone();
        // Steps go on while the files are read.
        let loaded = tokio::task::spawn_blocking(move || adapters.load(Path::new(&path)));
        let adapter = loaded.await.map_err(internal)?.map_err(internal)?;
        tracing::info!(adapter = id, "adapter is loaded");
        self.engine.add_adapter(AdapterId(id), adapter).await.map_err(internal)?;
        Ok(Response::new(v3::LoadAdapterResponse {}))
    }

    async fn unload_adapter(
        &self,
        request: Request<v3::UnloadAdapterRequest>,
    ) -> Result<Response<v3::UnloadAdapterResponse>, Status> {
        let id = request.into_inner().id;
        tracing::info!(adapter = id, "adapter is unloaded");
        self.engine.remove_adapter(AdapterId(id)).await.map_err(internal)?;
        Ok(Response::new(v3::UnloadAdapterResponse {}))
    }
}

/// What we understand beyond `generate.v3`.
const EXTENSIONS: [&str; 5] = [
    extensions::INPUT_IDS,
    extensions::SAMPLING_MORE,
    extensions::ADAPTERS,
    extensions::RESUME,
    extensions::BLOCK_GRANTS,
];

/// The name that routers show to users.
fn torch_name(dtype: kernels::DType) -> &'static str {
    match dtype {
        kernels::DType::F32 => "torch.float32",
        kernels::DType::F16 => "torch.float16",
        kernels::DType::BF16 => "torch.bfloat16",
    }
}
