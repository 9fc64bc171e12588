//! The command line and the environment: [`Args`] is what was typed, [`Config`] is what it means. The only reader of the
//! environment.

use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::thread;

use clap::{Args, Parser, Subcommand};
use telemetry::LogFormat;

use crate::engine::warmup::MemoryShare;
use crate::model::{LoadOptions, RopeOverride, WeightOrigin};
use crate::sampling::penalties::Watermark;

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
    Serve(ServeArgs),
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
    /// Not in this version: one shard serves the whole model
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
    /// Not in this version
    #[arg(long)]
    pub kv_cache_dtype: Option<String>,
    /// Accepted for compatibility: the router enforces it
    #[arg(long)]
    pub max_input_tokens: Option<u32>,
    /// Accepted for compatibility: traces are not exported
    #[arg(long)]
    pub otlp_endpoint: Option<String>,
    /// Accepted for compatibility: traces are not exported
    #[arg(long, default_value = "text-generation-inference.server")]
    pub otlp_service_name: String,
    /// Threads for the model; as many as the machine has, if absent
    #[arg(long, env = "OMP_NUM_THREADS")]
    pub threads: Option<NonZeroUsize>,
    /// This process among the shards
    #[arg(long, env = "RANK", default_value_t = 0, hide = true)]
    pub rank: u32,
    /// Number of shards
    #[arg(long, env = "WORLD_SIZE", default_value_t = 1, hide = true)]
    pub world_size: u32,
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
    /// Where to listen.
    pub socket: PathBuf,
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
        let mut socket = args.uds_path.into_os_string();
        socket.push(format!("-{}", args.rank));
        Ok(Self {
            model: args.model_id,
            socket: socket.into(),
            threads: args
                .threads
                .unwrap_or_else(|| thread::available_parallelism().unwrap_or(NonZeroUsize::MIN)),
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
    Ok(LoadOptions { dtype: args.dtype.as_deref().map(dtype).transpose()?, weights })
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
    let refused = if args.sharded || args.world_size > 1 || args.rank > 0 {
        Some(format!("sharding (world size {}, rank {})", args.world_size, args.rank))
    } else if let Some(quantize) = &args.quantize {
        Some(format!("--quantize {quantize}"))
    } else if let Some(speculate) = args.speculate.filter(|speculate| *speculate > 0) {
        Some(format!("--speculate {speculate}"))
    } else {
        args.kv_cache_dtype.as_ref().map(|dtype| format!("--kv-cache-dtype {dtype}"))
    };
    refused.map_or(Ok(()), |what| Err(ConfigError::Unsupported(what)))
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
        let Command::Serve(args) = Cli::try_parse_from(arguments).unwrap().command;
        args.try_into()
    }

    #[test]
    fn the_rank_is_part_of_the_socket() {
        let config = config(&["--uds-path", "/tmp/x", "--threads", "3"]).unwrap();
        assert_eq!(config.socket, PathBuf::from("/tmp/x-0"));
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
            (&["--sharded"][..], "sharding (world size 1, rank 0) is not supported"),
            (&["--world-size", "2"], "sharding (world size 2, rank 0)"),
            (&["--quantize", "awq"], "--quantize awq is not supported"),
            (&["--speculate", "2"], "--speculate 2 is not supported"),
            (&["--kv-cache-dtype", "fp8_e5m2"], "--kv-cache-dtype fp8_e5m2 is not supported"),
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
    fn a_model_that_is_not_there_is_named() {
        let arguments = ["text-generation-shard", "serve", "/no/model"];
        let Command::Serve(args) = Cli::try_parse_from(arguments).unwrap().command;
        let error = Config::try_from(args).unwrap_err();
        assert_eq!(error.to_string(), "model directory `/no/model` does not exist");
    }
}
