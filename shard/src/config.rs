//! The command line and the environment: [`Args`] is what was typed, [`Config`] is what it means. The only reader of the
//! environment.

use std::fmt::Display;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};
use kernels::collective::GroupSpec;
use telemetry::LogFormat;

use crate::backend::{CacheDType, DeviceChoice};
use crate::engine::warmup::MemoryShare;
use crate::model::{LoadOptions, RopeOverride, WeightOrigin};
use crate::sampling::penalties::Watermark;
use crate::weights::Elements;

/// Most shards of a model.
pub const SHARDS_MAX: usize = GroupSpec::WORLD_MAX;

/// One shard of a model: batches in, tokens out, over gRPC on a unix socket.
#[derive(Debug, Parser)]
#[command(name = "text-generation-shard", version)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What a shard can do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Loads a model and serves it
    Serve(Box<ServeArgs>),
    /// Prints how much of a GPU's memory a model takes, as JSON
    Plan(PlanArgs),
}

/// What was typed after `plan`.
#[derive(Debug, Args)]
pub struct PlanArgs {
    /// Directory of the checkpoint
    pub model_id: PathBuf,
    /// Number of shards
    #[arg(long, default_value_t = 1)]
    pub world_size: usize,
    /// float16, bfloat16 or float32; what config.json says, if absent
    #[arg(long)]
    pub dtype: Option<String>,
    /// fp8_e4m3fn or fp8_e5m2; the model's type, if absent
    #[arg(long)]
    pub kv_cache_dtype: Option<String>,
    /// auto, or dummy: weights in the shapes that config.json describes
    #[arg(long, default_value = "auto")]
    pub load_format: String,
    /// Tokens of the largest prefill
    #[arg(long, default_value_t = 4096)]
    pub max_batch_prefill_tokens: usize,
    /// Requests that are answered at once
    #[arg(long, default_value_t = 128)]
    pub max_concurrent_requests: usize,
}

impl PlanArgs {
    /// Element type of the cache, if not the model's.
    pub fn cache(&self) -> Result<Option<CacheDType>, ConfigError> {
        self.kv_cache_dtype.as_deref().map(cache_dtype).transpose()
    }

    /// What of the weights there is to plan with.
    pub fn load(&self) -> Result<LoadOptions, ConfigError> {
        let dtype = self.dtype.as_deref().map(dtype).transpose()?;
        let weights = match self.load_format.as_str() {
            "dummy" => WeightOrigin::Random(DUMMY_SEED),
            _ => WeightOrigin::Directory,
        };
        Ok(LoadOptions { dtype, weights, elements: Elements::Absent })
    }
}

/// What was typed after `serve`, and the variables that go with it.
#[derive(Debug, Args)]
pub struct ServeArgs {
    /// Directory of the checkpoint
    pub model_id: PathBuf,
    /// Accepted for compatibility: the directory is one revision
    #[arg(long)]
    pub revision: Option<String>,
    /// Socket path; the rank is appended
    #[arg(long, default_value = "/tmp/text-generation-server")]
    pub uds_path: PathBuf,
    /// trace, debug, info, warn, error, or a filter expression
    #[arg(long, default_value = "INFO")]
    pub logger_level: String,
    /// One JSON object per log line
    #[arg(long, overrides_with = "no_json_output")]
    pub json_output: bool,
    /// Lines for people
    #[arg(long, hide = true)]
    pub no_json_output: bool,
    /// Accepted for compatibility: there is no remote code
    #[arg(long, overrides_with = "no_trust_remote_code")]
    pub trust_remote_code: bool,
    /// The default
    #[arg(long, hide = true)]
    pub no_trust_remote_code: bool,
    /// One of several shards: RANK and WORLD_SIZE say which
    #[arg(long, overrides_with = "no_sharded")]
    pub sharded: bool,
    /// The default
    #[arg(long, hide = true)]
    pub no_sharded: bool,
    /// Not in this version
    #[arg(long)]
    pub quantize: Option<String>,
    /// Not in this version, except 0
    #[arg(long)]
    pub speculate: Option<u32>,
    /// float16, bfloat16 or float32; as the weights are stored, if absent
    #[arg(long)]
    pub dtype: Option<String>,
    /// fp8_e4m3fn or fp8_e5m2, on GPUs; the model's type, if absent
    #[arg(long)]
    pub kv_cache_dtype: Option<String>,
    /// auto, cpu or cuda
    #[arg(long, default_value = "auto")]
    pub device: String,
    /// Accepted for compatibility: the router enforces it
    #[arg(long)]
    pub max_input_tokens: Option<u32>,
    /// Accepted for compatibility: traces are not exported
    #[arg(long)]
    pub otlp_endpoint: Option<String>,
    /// Accepted for compatibility: traces are not exported
    #[arg(long, default_value = "text-generation-inference.server")]
    pub otlp_service_name: String,
    /// On GPUs, compute a token the same to the last bit whatever it is batched with
    #[arg(long)]
    pub batch_invariant: bool,
    /// Seconds that a step may always take; a longer one is healthy up to eight times the longest that is known to be usual
    #[arg(long, default_value_t = 60.0)]
    pub step_timeout: f64,
    /// Threads for the model; as many as the machine has, if absent
    #[arg(long, env = "OMP_NUM_THREADS")]
    pub threads: Option<NonZeroUsize>,
    /// This process among the shards; 0 if absent
    #[arg(long, env = "RANK", hide = true)]
    pub rank: Option<usize>,
    /// Number of shards; 1 if absent
    #[arg(long, env = "WORLD_SIZE", hide = true)]
    pub world_size: Option<usize>,
    /// Share of the memory that this shard may use
    #[arg(long, env = "CUDA_MEMORY_FRACTION", default_value_t = 1.0, hide = true)]
    pub memory_fraction: f64,
    /// Share of that which the cache may use, strictly between 0 and 1
    #[arg(long, env = "TGI_WIGGLE_ROOM", default_value_t = 0.9, hide = true)]
    pub wiggle_room: f64,
    /// Share of green tokens, strictly between 0 and 1
    #[arg(long, env = "WATERMARK_GAMMA", default_value_t = 0.5, hide = true)]
    pub watermark_gamma: f32,
    /// Added to the logits of green tokens
    #[arg(long, env = "WATERMARK_DELTA", default_value_t = 2.0, hide = true)]
    pub watermark_delta: f32,
    /// Directory of the weight files, if it is another than the model's
    #[arg(long, env = "WEIGHTS_CACHE_OVERRIDE")]
    pub weights_cache_override: Option<PathBuf>,
    /// auto, or dummy: random weights in the shapes that config.json describes, to measure without a checkpoint
    #[arg(long, default_value = "auto")]
    pub load_format: String,
    /// Another rotary scaling than the model's own: linear or dynamic
    #[arg(long, env = "ROPE_SCALING", hide = true)]
    pub rope_scaling: Option<String>,
    /// Its factor; alone it means linear
    #[arg(long, env = "ROPE_FACTOR", hide = true)]
    pub rope_factor: Option<f64>,
    /// LoRA adapters: `name=/directory`, separated by commas
    #[arg(long, env = "LORA_ADAPTERS", default_value = "", hide = true)]
    pub lora_adapters: String,
    /// Log lines without colour, whatever the terminal can do
    #[arg(long, env = "NO_COLOR", default_value = "", hide = true)]
    pub no_color: String,
}

/// What the process does, checked.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// Directory of the checkpoint.
    pub model: PathBuf,
    /// Where to listen: all shards, in the order of their ranks.
    pub sockets: Vec<PathBuf>,
    /// Which of several shards this one is, and where it meets the others.
    pub group: Option<GroupSpec>,
    /// Where the model runs.
    pub device: DeviceChoice,
    /// Element type of keys and values, if not the model's.
    pub cache: Option<CacheDType>,
    /// Whether a token is the same to the last bit whatever it is batched with, on GPUs too.
    pub batch_invariant: bool,
    /// How long a step may always take.
    pub step_patience: Duration,
    /// Threads for the model.
    pub threads: NonZeroUsize,
    /// The memory the cache may take.
    pub memory: MemoryShare,
    /// What requests that ask for a watermark get.
    pub watermark: Watermark,
    /// How weights are loaded.
    pub load: LoadOptions,
    /// Another rotary scaling than the model's own.
    pub rope: Option<RopeOverride>,
    /// Adapters to load at the start.
    pub adapters: Vec<AdapterSource>,
    /// Whether traces were asked for, which are not exported.
    pub traces_wanted: bool,
    /// How to log.
    pub logs: Logs,
}

impl Config {
    /// This process among the shards, from 0.
    pub fn rank(&self) -> usize {
        self.group.as_ref().map_or(0, |group| group.rank)
    }

    /// Where this shard listens.
    pub fn socket(&self) -> &Path {
        &self.sockets[self.rank()]
    }
}

/// A LoRA adapter's files, and what requests call it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AdapterSource {
    /// What requests call it.
    pub id: String,
    /// Where its files are.
    pub directory: PathBuf,
}

/// How to log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Logs {
    /// Lines or objects.
    pub format: LogFormat,
    /// A level or a filter.
    pub level: String,
    /// Never colours.
    pub no_color: bool,
}

/// What was typed makes no sense, or not to this version.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum ConfigError {
    /// The model is not a directory.
    #[error("model directory `{}` does not exist", .0.display())]
    NoModel(PathBuf),
    /// This version cannot do that.
    #[error("{0} is not supported by this version")]
    Unsupported(String),
    /// An adapter without its directory.
    #[error("LORA_ADAPTERS: `{0}` is not of the form name=/directory")]
    Adapter(String),
    /// `--sharded` without what says how.
    #[error("--sharded needs the variables RANK and WORLD_SIZE; {0} is not set")]
    NoPlace(&'static str),
    /// One of several shards that was not told to be one.
    #[error("WORLD_SIZE is {0}, which needs --sharded")]
    NotSharded(usize),
    /// There is no such shard.
    #[error(
        "RANK is {rank} and WORLD_SIZE {world}; there can be 1 to {SHARDS_MAX} shards, and ranks count from 0"
    )]
    Place {
        /// This process.
        rank: usize,
        /// How many there would be.
        world: usize,
    },
    /// A number outside of its domain.
    #[error("{name} is {value}, but must be {expected}")]
    Range {
        /// The variable.
        name: &'static str,
        /// What it is.
        value: f64,
        /// What it may be.
        expected: &'static str,
    },
}

impl TryFrom<ServeArgs> for Config {
    type Error = ConfigError;

    fn try_from(args: ServeArgs) -> Result<Self, ConfigError> {
        refuse_unsupported(&args)?;
        let share = |name, value: f64, top: bool| {
            let inside = value > 0.0 && (value < 1.0 || (top && value == 1.0));
            let expected = if top { "above 0 and at most 1" } else { "strictly between 0 and 1" };
            if inside { Ok(value) } else { Err(ConfigError::Range { name, value, expected }) }
        };
        let fraction = share("CUDA_MEMORY_FRACTION", args.memory_fraction, true)?;
        let wiggle_room = share("TGI_WIGGLE_ROOM", args.wiggle_room, false)?;
        share("WATERMARK_GAMMA", f64::from(args.watermark_gamma), false)?;
        let delta = args.watermark_delta;
        if !delta.is_finite() {
            let value = f64::from(delta);
            return Err(ConfigError::Range { name: "WATERMARK_DELTA", value, expected: "a number" });
        }
        if !args.model_id.is_dir() {
            return Err(ConfigError::NoModel(args.model_id));
        }
        let (load, rope) = (load_options(&args)?, rope_override(&args)?);
        let (rank, world) = place(&args)?;
        Ok(Self {
            model: args.model_id,
            sockets: (0..world).map(|rank| with_ending(&args.uds_path, rank)).collect(),
            group: (world > 1).then(|| GroupSpec { path: with_ending(&args.uds_path, "group"), rank, world }),
            device: device(&args.device)?,
            cache: args.kv_cache_dtype.as_deref().map(cache_dtype).transpose()?,
            batch_invariant: args.batch_invariant,
            step_patience: step_patience(args.step_timeout)?,
            threads: args.threads.unwrap_or_else(|| threads_of_one(world)),
            memory: MemoryShare(fraction * wiggle_room),
            watermark: Watermark { gamma: args.watermark_gamma, delta },
            load,
            rope,
            adapters: adapters(&args.lora_adapters)?,
            traces_wanted: args.otlp_endpoint.is_some(),
            logs: Logs {
                format: if args.json_output { LogFormat::Json } else { LogFormat::Text },
                level: args.logger_level,
                no_color: !args.no_color.is_empty(),
            },
        })
    }
}

/// How weights are loaded.
fn load_options(args: &ServeArgs) -> Result<LoadOptions, ConfigError> {
    let elsewhere = args.weights_cache_override.clone().filter(|path| !path.as_os_str().is_empty());
    let weights = match (args.load_format.as_str(), elsewhere) {
        ("auto", None) => WeightOrigin::Directory,
        ("auto", Some(directory)) => WeightOrigin::Other(directory),
        ("dummy", _) => WeightOrigin::Random(DUMMY_SEED),
        (other, _) => {
            return Err(ConfigError::Unsupported(format!("--load-format {other} (served: auto, dummy)")));
        }
    };
    let dtype = args.dtype.as_deref().map(dtype).transpose()?;
    Ok(LoadOptions { dtype, weights, elements: Elements::Loaded })
}

/// The seed of made-up weights: the same ones at every start.
const DUMMY_SEED: u64 = 0;

/// A factor alone means `linear`, a kind alone a factor of 1.
fn rope_override(args: &ServeArgs) -> Result<Option<RopeOverride>, ConfigError> {
    let name = args.rope_scaling.as_deref().filter(|name| !name.is_empty());
    let kind = match name {
        None if args.rope_factor.is_none() => return Ok(None),
        None | Some("linear") => "linear",
        Some("dynamic") => "dynamic",
        Some(other) => {
            let reason = format!("--rope-scaling {other} (served: linear, dynamic)");
            return Err(ConfigError::Unsupported(reason));
        }
    };
    let factor = args.rope_factor.unwrap_or(1.0);
    if factor.is_nan() || factor < 1.0 {
        return Err(ConfigError::Range { name: "ROPE_FACTOR", value: factor, expected: "at least 1" });
    }
    Ok(Some(RopeOverride { kind, factor }))
}

/// The adapters of a list; an empty one has none.
fn adapters(list: &str) -> Result<Vec<AdapterSource>, ConfigError> {
    let items = list.split(',').map(str::trim).filter(|item| !item.is_empty());
    let source = |item: &str| match item.split_once('=') {
        Some((id, directory)) if !id.is_empty() && !directory.is_empty() => {
            Ok(AdapterSource { id: id.to_owned(), directory: directory.into() })
        }
        _ => Err(ConfigError::Adapter(item.to_owned())),
    };
    items.map(source).collect()
}

fn refuse_unsupported(args: &ServeArgs) -> Result<(), ConfigError> {
    let quantize = args.quantize.as_ref().map(|quantize| format!("--quantize {quantize}"));
    let speculate = args.speculate.filter(|speculate| *speculate > 0);
    let refused = quantize.or(speculate.map(|speculate| format!("--speculate {speculate}")));
    refused.map_or(Ok(()), |what| Err(ConfigError::Unsupported(what)))
}

/// This shard's rank, and the number of shards.
fn place(args: &ServeArgs) -> Result<(usize, usize), ConfigError> {
    if args.sharded && args.world_size.is_none() {
        return Err(ConfigError::NoPlace("WORLD_SIZE"));
    }
    if args.sharded && args.rank.is_none() {
        return Err(ConfigError::NoPlace("RANK"));
    }
    let (rank, world) = (args.rank.unwrap_or(0), args.world_size.unwrap_or(1));
    if rank >= world || world > SHARDS_MAX {
        return Err(ConfigError::Place { rank, world });
    }
    if world > 1 && !args.sharded { Err(ConfigError::NotSharded(world)) } else { Ok((rank, world)) }
}

/// The socket of a rank, or another file of the same shards.
fn with_ending(prefix: &Path, ending: impl Display) -> PathBuf {
    let mut path = prefix.as_os_str().to_owned();
    path.push(format!("-{ending}"));
    path.into()
}

/// Zero is for ever.
fn step_patience(seconds: f64) -> Result<Duration, ConfigError> {
    let range = || ConfigError::Range { name: "--step-timeout", value: seconds, expected: "seconds from 0" };
    let patience = Duration::try_from_secs_f64(seconds).map_err(|_| range())?;
    Ok(if patience.is_zero() { Duration::MAX } else { patience })
}

/// Threads of a shard that shares the machine with others.
fn threads_of_one(world: usize) -> NonZeroUsize {
    let cores = thread::available_parallelism().map_or(1, NonZeroUsize::get);
    NonZeroUsize::new(cores / world).unwrap_or(NonZeroUsize::MIN)
}

fn device(name: &str) -> Result<DeviceChoice, ConfigError> {
    match name {
        "auto" => Ok(DeviceChoice::Auto),
        "cpu" => Ok(DeviceChoice::Cpu),
        "cuda" => Ok(DeviceChoice::Cuda),
        #[cfg(feature = "emulation")]
        "emulated" => Ok(DeviceChoice::Emulated),
        other => Err(ConfigError::Unsupported(format!("--device {other} (served: auto, cpu, cuda)"))),
    }
}

fn cache_dtype(name: &str) -> Result<CacheDType, ConfigError> {
    match name {
        "fp8_e4m3fn" => Ok(CacheDType::E4M3),
        "fp8_e5m2" => Ok(CacheDType::E5M2),
        other => Err(ConfigError::Unsupported(format!("--kv-cache-dtype {other}"))),
    }
}

fn dtype(name: &str) -> Result<kernels::DType, ConfigError> {
    match name {
        "float16" => Ok(kernels::DType::F16),
        "bfloat16" => Ok(kernels::DType::BF16),
        "float32" => Ok(kernels::DType::F32),
        other => Err(ConfigError::Unsupported(format!("--dtype {other}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(flags: &[&str]) -> Result<Config, ConfigError> {
        let arguments = ["text-generation-shard", "serve", "/"].iter().chain(flags);
        let Command::Serve(args) = Cli::try_parse_from(arguments).unwrap().command else { panic!("serve") };
        (*args).try_into()
    }

    #[test]
    fn the_rank_is_part_of_the_socket() {
        let config = config(&["--uds-path", "/tmp/x", "--threads", "3"]).unwrap();
        assert_eq!(config.sockets, [PathBuf::from("/tmp/x-0")]);
        assert_eq!((config.rank(), config.group.as_ref()), (0, None));
        assert_eq!(config.threads.get(), 3);
        assert_eq!(config.memory, MemoryShare(0.9));
        assert_eq!(config.watermark, Watermark { gamma: 0.5, delta: 2.0 });
    }

    #[test]
    fn everything_a_launcher_passes_is_accepted() {
        let flags = "--logger-level INFO --json-output --trust-remote-code --dtype bfloat16 --revision main \
                     --otlp-service-name x --max-input-tokens 100 --speculate 0 --no-sharded";
        let config = config(&flags.split_whitespace().collect::<Vec<_>>()).unwrap();
        assert_eq!(config.logs.format, LogFormat::Json);
        assert_eq!(config.load.dtype, Some(kernels::DType::BF16));
    }

    #[test]
    fn what_this_version_cannot_do_is_refused_by_name() {
        for (flags, text) in [
            (&["--quantize", "awq"][..], "--quantize awq is not supported"),
            (&["--speculate", "2"], "--speculate 2 is not supported"),
            (&["--kv-cache-dtype", "fp4"], "--kv-cache-dtype fp4 is not supported"),
            (&["--device", "tpu"], "--device tpu (served: auto, cpu, cuda) is not supported"),
            (&["--dtype", "int3"], "--dtype int3 is not supported"),
            (&["--wiggle-room", "1"], "TGI_WIGGLE_ROOM is 1, but must be strictly between 0 and 1"),
            (&["--memory-fraction", "1.5"], "CUDA_MEMORY_FRACTION is 1.5"),
            (&["--watermark-gamma", "0"], "WATERMARK_GAMMA is 0"),
        ] {
            let error = config(flags).unwrap_err().to_string();
            assert!(error.contains(text), "{error}");
        }
    }

    #[test]
    fn one_of_several_shards_knows_all_sockets_and_where_to_meet() {
        let flags = ["--sharded", "--rank", "1", "--world-size", "3", "--uds-path", "/tmp/x"];
        let config = config(&flags).unwrap();
        assert_eq!(config.sockets, ["/tmp/x-0", "/tmp/x-1", "/tmp/x-2"].map(PathBuf::from));
        assert_eq!((config.rank(), config.socket()), (1, Path::new("/tmp/x-1")));
        assert_eq!(config.group, Some(GroupSpec { path: "/tmp/x-group".into(), rank: 1, world: 3 }));
        assert!(config.threads.get() <= threads_of_one(1).get());
    }

    #[test]
    fn a_place_that_does_not_exist_is_refused() {
        for (flags, text) in [
            (&["--sharded"][..], "--sharded needs the variables RANK and WORLD_SIZE; WORLD_SIZE is not set"),
            (&["--sharded", "--world-size", "2"], "RANK is not set"),
            (&["--sharded", "--world-size", "2", "--rank", "2"], "RANK is 2 and WORLD_SIZE 2"),
            (&["--world-size", "0"], "RANK is 0 and WORLD_SIZE 0"),
            (&["--sharded", "--world-size", "65", "--rank", "0"], "1 to 64 shards"),
            (&["--rank", "1"], "RANK is 1 and WORLD_SIZE 1"),
            (&["--world-size", "2"], "WORLD_SIZE is 2, which needs --sharded"),
        ] {
            let error = config(flags).unwrap_err().to_string();
            assert!(error.contains(text), "{error}");
        }
    }

    #[test]
    fn a_model_that_is_not_there_is_named() {
        let arguments = ["text-generation-shard", "serve", "/no/model"];
        let Command::Serve(args) = Cli::try_parse_from(arguments).unwrap().command else { panic!("serve") };
        let error = Config::try_from(*args).unwrap_err();
        assert_eq!(error.to_string(), "model directory `/no/model` does not exist");
    }
}
