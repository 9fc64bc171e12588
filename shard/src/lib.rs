//! Batches in, tokens out: one process per device.
//!
//! A batch on its way through, from the outside in:
//!
//! - [`config`]: command line and environment, checked; [`run_from`] is the whole process.
//! - [`server`]: gRPC on a unix socket; message to command and back.
//! - [`engine`]: one thread that owns model, cache and batches; rows join, step, stop and leave here.
//! - [`sampling`]: logits to a token. [`text`]: ids to text, and stop strings.
//!
//! Where a forward pass goes:
//!
//! - [`model`]: families, their configuration, and the decoder they share. The engine sees only the `Model` trait.
//! - [`layers`]: attention, MLP, norms, rope. Each knows how to load itself; none knows which family it serves.
//! - [`adapters`]: LoRA files to what they add to linear layers.
//! - [`weights`]: checkpoint files; matrices stay mapped, norms and biases become f32. Names become layers here.
//! - [`cache`]: keys and values of all requests, by slot.
//! - [`collective`]: what the ranks of a model do together.
//! - [`backend`]: the device, its tensors, and the list of operations that layers call.
//! - `plan`: how much of a GPU's memory a model takes, before any of it is taken (feature `cuda`).
//! - [`doctor`]: a process of its own that checks what this machine computes.
//!
//! Invariants:
//!
//! - The shard knows nothing of HTTP, chats, queues or clients: a router decides who runs.
//! - A request's tokens depend on the request alone: not on its neighbours, its chunks, its blocks or a cached prefix.
//! - What a message contains can fail only the call that brought it; a panic in a step costs that step's batches.
//! - Only `config` reads the environment, only `backend` asks which device it runs on, only `weights/mapped.rs` is unsafe.
//! - Whatever a file or a step contains, the answer is an error that names it, never a panic.

pub mod adapters;
pub mod backend;
pub mod cache;
pub mod collective;
pub mod config;
pub mod doctor;
pub mod engine;
pub mod layers;
pub mod model;
#[cfg(feature = "gpu")]
pub mod plan;
pub mod sampling;
pub mod server;
mod small_file;
pub mod text;
pub mod weights;

use std::ffi::OsString;
use std::io::{self, Write};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::anyhow;
use clap::Parser;
use kernels::collective::LocalGroup;
use telemetry::progress::ProgressStyle;
use tokio::signal::unix::{SignalKind, signal};

use adapters::AdapterLayout;
#[cfg(feature = "gpu")]
use backend::CacheDType;
use backend::{Device, DeviceOptions};
use collective::Ranks;
use config::{AdapterSource, Cli, Command, Config, PlanArgs};
use engine::Engine;
use engine::adapters::AdapterId;
use layers::Adapter;
use model::{Blueprint, Model};
use server::{Identity, Socket};
use text::tokenizer::Tokenizer;
use weights::Progress;

/// Threads of the gRPC edge. It does little, and the model wants the cores.
const EDGE_THREADS: usize = 2;

/// How long the shards of one model wait for each other at the start.
const MEETING: Duration = Duration::from_secs(120);

/// The shard process, from its arguments, of which the first is the program's name, to its exit code. What goes wrong is
/// one line on standard error.
pub fn run_from(arguments: impl IntoIterator<Item = OsString>) -> ExitCode {
    let command = match Cli::try_parse_from(arguments) {
        Ok(cli) => cli.command,
        Err(help_or_mistake) => {
            // Nobody is left to be told when standard output is closed.
            drop(help_or_mistake.print());
            return ExitCode::from(help_or_mistake.exit_code() as u8);
        }
    };
    let args = match command {
        Command::Serve(args) => args,
        Command::Plan(args) => return report(print_plan(&args), "Error"),
    };
    let rank = args.rank.unwrap_or(0);
    let served = Config::try_from(*args).map_err(anyhow::Error::from).and_then(serve);
    report(served, &format!("Error: shard {rank}"))
}

fn report(result: anyhow::Result<()>, what: &str) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // In one piece: several shards may have the same to say at the same time.
            drop(io::stderr().write_all(format!("{what}: {error}\n").as_bytes()));
            ExitCode::FAILURE
        }
    }
}

#[cfg(not(feature = "gpu"))]
fn print_plan(_: &PlanArgs) -> anyhow::Result<()> {
    anyhow::bail!("this program was built without CUDA (feature `cuda`): there is no GPU to plan for")
}

/// What a GPU needs for the model, in bytes, and what there is, if there is one.
#[cfg(feature = "gpu")]
fn print_plan(args: &PlanArgs) -> anyhow::Result<()> {
    let blueprint = Blueprint::read(&args.model_id, args.world_size, None)?;
    let options = args.load()?;
    let dtype = blueprint.dtype(&options);
    let assumptions = plan::Assumptions {
        partition: weights::Partition { rank: 0, world: args.world_size },
        dtype,
        cache: args.cache()?.map_or(dtype.into(), CacheDType::element),
        tokens: args.max_batch_prefill_tokens,
        requests: args.max_concurrent_requests,
    };
    let plan = plan::MemoryPlan::make(&blueprint, &options, assumptions)?;
    #[cfg(feature = "cuda")]
    let total = kernels::cuda::Gpu::open(0).and_then(|gpu| gpu.memory()).ok().map(|memory| memory.total);
    #[cfg(not(feature = "cuda"))]
    let total: Option<usize> = None;
    let text = serde_json::json!({
        "weights": plan.weights,
        "workspace": plan.workspace,
        "cache_block": plan.block,
        "block_tokens": engine::commands::BLOCK_SIZE.get(),
        "total": total,
    });
    Ok(writeln!(io::stdout(), "{text}")?)
}

/// Loads, then listens: a socket that exists is a shard that is ready.
fn serve(config: Config) -> anyhow::Result<()> {
    telemetry::init(config.logs.format, &config.logs.level, config.logs.no_color)
        .map_err(anyhow::Error::msg)?;
    // Whatever is logged, it says by whom. Of the highest level, so that no filter takes it away from a line it lets pass.
    let _rank = tracing::error_span!("shard", rank = config.rank()).entered();
    if config.traces_wanted {
        tracing::warn!("traces are not exported by this version; --otlp-endpoint has no effect");
    }
    // What cannot be served, or not by so many, is said before shards wait for each other.
    let blueprint = Blueprint::read(&config.model, config.sockets.len(), config.rope)?;
    let ranks = match &config.group {
        Some(spec) => Ranks::of(LocalGroup::join(spec, MEETING)?),
        None => Ranks::alone(),
    };
    let device = Device::open(
        DeviceOptions {
            choice: config.device,
            threads: config.threads,
            dtype: blueprint.dtype(&config.load),
            cache: config.cache,
            batch_invariant: config.batch_invariant,
        },
        &ranks,
    )?;
    let ranks = ranks.on(&device)?;
    #[cfg(feature = "gpu")]
    check_memory(&blueprint, &config, &device, &ranks)?;
    let tokenizer = Tokenizer::load(&config.model)?;
    let model = load_model(&blueprint, &config, device.clone(), ranks.clone())?;
    let layout = model.adapters();
    let adapters = load_adapters(&layout, &config.adapters)?;
    let memory = config.memory;
    let identity = Identity::new(model.shape(), &device, config.sockets.clone(), config.watermark);
    let step_patience = config.step_patience;
    let engine =
        Engine::start(engine::commands::Parts { model, device, tokenizer, memory, step_patience, ranks })?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(EDGE_THREADS)
        .enable_all()
        .build()
        .map_err(|error| anyhow!("no threads for the server: {error}"))?;
    let served = runtime.block_on(async {
        let stop = stop_signal()?;
        for (id, adapter) in adapters {
            engine.add_adapter(id, adapter).await?;
        }
        let path = config.socket();
        let socket = Socket::bind(path)?;
        tracing::info!(socket = %path.display(), threads = config.threads, "shard is ready");
        let ended = Arc::new(AtomicBool::new(false));
        let stop = {
            let (engine, ended) = (engine.clone(), Arc::clone(&ended));
            async move {
                tokio::select! {
                    () = stop => {}
                    () = engine.ended() => ended.store(true, Ordering::Relaxed),
                }
            }
        };
        // Only the long form of a transport error says what happened.
        server::serve(engine, layout, identity, socket, stop)
            .await
            .map_err(|error| anyhow!("the server failed: {error:?}"))?;
        // It answers its last command before it ends; a supervisor has to start this process again.
        anyhow::ensure!(!ended.load(Ordering::Relaxed), "the engine has stopped");
        Ok(())
    });
    // A step that is still running must not hold the process back.
    runtime.shutdown_background();
    served
}

/// Says what the model takes of a GPU, before it takes any of it; errors when that is more than there is.
#[cfg(feature = "gpu")]
fn check_memory(
    blueprint: &Blueprint,
    config: &Config,
    device: &Device,
    ranks: &Ranks,
) -> anyhow::Result<()> {
    let Some(memory) = device.memory()? else { return Ok(()) };
    let dtype = blueprint.dtype(&config.load);
    let assumptions = plan::Assumptions {
        partition: ranks.partition(),
        dtype,
        cache: config.cache.map_or(dtype.into(), CacheDType::element),
        // The least of a step: how large it gets is said by the warm-up.
        tokens: 1,
        requests: 1,
    };
    let plan = plan::MemoryPlan::make(blueprint, &config.load, assumptions)?;
    tracing::info!(weights = plan.weights, free = memory.free, total = memory.total, "memory of the GPU");
    let needed = plan.weights + plan.workspace + plan.block;
    anyhow::ensure!(
        needed <= memory.free,
        "this shard of the model needs {} MiB of the GPU, of which {} MiB are free: use more shards, or a smaller --dtype",
        needed >> 20,
        memory.free >> 20
    );
    Ok(())
}

/// Loads the model, and shows how far that is.
fn load_model(
    blueprint: &Blueprint,
    config: &Config,
    device: Device,
    ranks: Ranks,
) -> anyhow::Result<Box<dyn Model>> {
    let style = ProgressStyle::fitting(config.logs.format);
    let mut shown: Option<(telemetry::progress::Progress, u64)> = None;
    let report = |Progress { done, total }: Progress| {
        let (progress, before) = shown
            .get_or_insert_with(|| (telemetry::progress::Progress::new(style, "weights", Some(total), 0), 0));
        progress.add(done - *before);
        *before = done;
    };
    let model = blueprint.load(&config.load, device, ranks, report)?;
    if let Some((progress, _)) = shown {
        progress.finish();
    }
    Ok(model)
}

/// The adapters that are there from the start.
fn load_adapters(
    layout: &AdapterLayout,
    adapters: &[AdapterSource],
) -> anyhow::Result<Vec<(AdapterId, Adapter)>> {
    let load = |source: &AdapterSource| {
        let adapter = layout.load(&source.directory)?;
        tracing::info!(adapter = source.id, "adapter is loaded");
        Ok((AdapterId(source.id.clone()), adapter))
    };
    adapters.iter().map(load).collect()
}

/// Ready on SIGTERM or SIGINT, from the moment this returns.
fn stop_signal() -> anyhow::Result<impl Future<Output = ()>> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    Ok(async move {
        let name = tokio::select! {
            _ = terminate.recv() => "SIGTERM",
            _ = interrupt.recv() => "SIGINT",
        };
        tracing::info!(signal = name, "stopping");
    })
}
