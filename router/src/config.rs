//! What the user typed ([`Args`]: flags and environment) and what it means ([`Config`]: checked, defaults filled). The
//! only reader of the environment.

use std::ffi::OsString;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::time::Duration;

use ::http::HeaderValue;
use clap::builder::BoolishValueParser;
use clap::{ArgAction, Parser, ValueEnum};
use proto::units::TokenCount;
use telemetry::LogFormat;
use thiserror::Error;

use crate::http::{Access, ApiKey};

/// What the header `x-compute-type` says when nobody tells.
const COMPUTE_TYPE: &str = "gpu+optimized";

/// Serves a model's shards over HTTP.
#[derive(Clone, Debug, Parser)]
#[command(name = "text-generation-router", version)]
pub(crate) struct Args {
    /// Requests admitted at once, queued and running; more are answered with 429
    #[arg(long, env, default_value_t = 128)]
    max_concurrent_requests: usize,
    /// Upper bound of `best_of`
    #[arg(long, env, default_value_t = 2)]
    max_best_of: u32,
    /// Upper bound on the number of stop strings
    #[arg(long, env, default_value_t = 4)]
    max_stop_sequences: u32,
    /// Upper bound of `top_n_tokens`
    #[arg(long, env, default_value_t = 5)]
    max_top_n_tokens: u32,
    /// Longest prompt in tokens [default: decided by the shards]
    #[arg(long, env, alias = "max-input-length")]
    max_input_tokens: Option<u32>,
    /// Longest prompt and output together, in tokens [default: decided by the shards]
    #[arg(long, env)]
    max_total_tokens: Option<u32>,
    /// Running rows wait for a prefill when at least this many requests per row wait; for shards without chunked prefill
    #[arg(long, env, default_value_t = 1.2)]
    waiting_served_ratio: f32,
    /// Prompt tokens in one pass
    #[arg(long, env, default_value_t = 4096)]
    max_batch_prefill_tokens: u32,
    /// Tokens of the cache that requests can use [default: as many as fit]
    #[arg(long, env)]
    max_batch_total_tokens: Option<u32>,
    /// Steps after which running rows wait for any prefill; for shards without chunked prefill
    #[arg(long, env, default_value_t = 20)]
    max_waiting_tokens: u32,
    /// Requests in one batch [default: no limit]
    #[arg(long, env)]
    max_batch_size: Option<usize>,
    /// Keep what was computed of a prompt for later prompts that begin alike
    #[arg(long, env, action = ArgAction::Set, default_value = "true", value_parser = BoolishValueParser::new())]
    prefix_caching: bool,
    /// How many times as long as a step without prompts a step may take that computes prompts beside running rows; 0 is any
    #[arg(long, env, default_value_t = 2.0)]
    max_step_stretch: f32,
    /// Choices and prompts of one request
    #[arg(long, env, default_value_t = 4)]
    max_client_batch_size: u32,
    /// Longest body in bytes
    #[arg(long, env, default_value_t = 2_000_000)]
    payload_limit: usize,
    /// Longest image in bytes that is fetched for a request
    #[arg(long, env, default_value_t = 1 << 30)]
    max_image_fetch_size: usize,
    /// Refuse grammars
    #[arg(long, env)]
    disable_grammar_support: bool,

    /// Address to listen on
    #[arg(long, env, default_value = "0.0.0.0")]
    hostname: String,
    /// Port to listen on; 0 is any that is free
    #[arg(long, short, env, default_value_t = 3000)]
    port: u16,
    /// Port of a second listener for `/metrics` and `/health`; 0 is none
    #[arg(long, env, default_value_t = 9000)]
    prometheus_port: u16,
    /// Key that clients must show
    #[arg(long, env, hide_env_values = true)]
    api_key: Option<Secret>,
    /// Origin of web pages that may call; `*` is any; repeatable [default: any]
    #[arg(long, env)]
    cors_allow_origin: Vec<String>,
    /// Seconds that requests in flight get when the server is stopped
    #[arg(long, short, env, default_value_t = 90)]
    graceful_termination_timeout: u64,

    /// Socket of the first shard
    #[arg(long, env, default_value = "/tmp/text-generation-server-0")]
    master_shard_uds_path: PathBuf,
    /// Seconds after which a shard counts as hung that gives no sign of life, or whose step takes longer than it should; 0
    /// is never
    #[arg(long, env, default_value_t = 60.0)]
    step_timeout: f64,
    /// Where the launcher listens that supervises this router
    #[arg(long, hide = true)]
    control_socket: Option<PathBuf>,
    /// Directory with the model's tokenizer and configuration files
    #[arg(long, env)]
    tokenizer_name: PathBuf,
    /// Let clients load and unload LoRA adapters from this machine's directories
    #[arg(long, env)]
    allow_runtime_adapters: bool,
    /// What clients see as the model's name [default: as --tokenizer-name]
    #[arg(long, env)]
    model_name: Option<String>,
    /// File that takes the place of the model's `tokenizer_config.json`
    #[arg(long, env)]
    tokenizer_config_path: Option<PathBuf>,
    /// Threads that tokenize
    #[arg(long, env, default_value_t = 2)]
    validation_workers: usize,
    /// Accepted; the launcher has resolved it
    #[arg(long, env, hide = true)]
    revision: Option<String>,
    /// Accepted; the router runs no code of a model
    #[arg(long, env, hide = true)]
    trust_remote_code: bool,

    /// Log in JSON
    #[arg(long, env)]
    json_output: bool,
    /// `trace`, `debug`, `info`, `warn`, `error`, `off`, or a filter such as `router=debug,h2=warn`
    #[arg(long, env, default_value = "info")]
    log_level: String,
    /// No colours, whatever the value
    #[arg(long, env, hide = true)]
    no_color: Option<OsString>,
    /// Collector of traces
    #[arg(long, env)]
    otlp_endpoint: Option<String>,
    /// Name of this service in traces
    #[arg(long, env, default_value = "text-generation-inference.router")]
    otlp_service_name: String,
    /// Accepted; nothing is ever sent
    #[arg(long, env, hide = true, value_enum, default_value_t = UsageStats::On)]
    usage_stats: UsageStats,
    /// What the header `x-compute-type` says
    #[arg(long, env, hide = true, default_value = COMPUTE_TYPE)]
    compute_type: String,
    /// Not available
    #[arg(long, env, hide = true, action = ArgAction::SetTrue)]
    ngrok: bool,
    /// Not available
    #[arg(long, env, hide = true)]
    ngrok_authtoken: Option<Secret>,
    /// Not available
    #[arg(long, env, hide = true)]
    ngrok_edge: Option<String>,
}

/// Never printed.
#[derive(Clone)]
struct Secret(String);

#[derive(Clone, Copy, Debug, ValueEnum)]
enum UsageStats {
    On,
    Off,
    NoStack,
}

/// Arguments that do not fit together, or cannot be met.
#[derive(Clone, Debug, Error, PartialEq)]
pub(crate) enum ConfigError {
    #[error("`{flag}` must be at least 1")]
    Zero { flag: &'static str },
    #[error("`{small}` ({small_value}) must be {relation} `{large}` ({large_value})")]
    Order {
        small: &'static str,
        small_value: u32,
        relation: &'static str,
        large: &'static str,
        large_value: u32,
    },
    #[error("`--tokenizer-name` {} is not a directory: the router reads a model's files and downloads none", .0.display())]
    NoModel(PathBuf),
    #[error("`--api-key` is empty")]
    EmptyKey,
    #[error("`{flag}` {value} cannot be part of an HTTP header")]
    Header { flag: &'static str, value: String },
    #[error("`--waiting-served-ratio` is {0}, but must be a number from 0")]
    Ratio(f32),
    #[error("`--max-step-stretch` is {0}, but must be 0 or a number from 1")]
    Stretch(f32),
    #[error("`--step-timeout` is {0}, but must be a number of seconds from 0")]
    Seconds(f64),
    #[error("`--ngrok` is not available in this build")]
    Ngrok,
}

/// What the arguments mean.
#[derive(Clone, Debug)]
pub(crate) struct Config {
    pub(crate) logs: LogConfig,
    pub(crate) model: ModelConfig,
    pub(crate) socket: PathBuf,
    /// Whether clients may load and unload adapters.
    pub(crate) allow_runtime_adapters: bool,
    pub(crate) http: HttpConfig,
    pub(crate) limits: LimitsConfig,
    pub(crate) recovery: RecoveryConfig,
    pub(crate) validation_workers: NonZeroUsize,
    /// What was understood, but not as it was said; to be logged.
    pub(crate) warnings: Vec<String>,
}

#[derive(Clone, Debug)]
pub(crate) struct LogConfig {
    pub(crate) format: LogFormat,
    pub(crate) level: String,
    pub(crate) no_color: bool,
}

#[derive(Clone, Debug)]
pub(crate) struct ModelConfig {
    pub(crate) directory: PathBuf,
    /// What clients see.
    pub(crate) name: String,
    pub(crate) tokenizer_config: Option<PathBuf>,
}

#[derive(Clone, Debug)]
pub(crate) struct HttpConfig {
    pub(crate) address: SocketAddr,
    /// Of the listener for metrics.
    pub(crate) metrics_address: Option<SocketAddr>,
    pub(crate) access: Access,
    pub(crate) compute_type: HeaderValue,
    pub(crate) body_bytes_max: usize,
    /// For requests in flight when the server is stopped.
    pub(crate) patience: Duration,
}

/// Limits as the user gave them; what is absent is decided by the shards.
#[derive(Clone, Debug)]
pub(crate) struct LimitsConfig {
    pub(crate) concurrent_requests: usize,
    pub(crate) best_of: u32,
    pub(crate) stop_sequences: u32,
    pub(crate) top_n_tokens: u32,
    pub(crate) client_batch: u32,
    pub(crate) input_tokens: Option<TokenCount>,
    pub(crate) total_tokens: Option<TokenCount>,
    pub(crate) batch_prefill_tokens: TokenCount,
    pub(crate) batch_total_tokens: Option<TokenCount>,
    pub(crate) batch_size: Option<NonZeroUsize>,
    pub(crate) waiting_served_ratio: f32,
    pub(crate) waiting_tokens: u32,
    /// Whether what was computed of a prompt is kept for later prompts that begin alike.
    pub(crate) prefix_caching: bool,
    /// How many times as long as a step without prompts a step may take that computes prompts beside running rows, at least
    /// 1; any number of times, if none.
    pub(crate) max_step_stretch: Option<f32>,
}

/// Who starts shards again, and when they have to be.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct RecoveryConfig {
    /// Of the launcher that supervises this router, if one does.
    pub(crate) control_socket: Option<PathBuf>,
    /// Shards that give no sign of life for longer count as hung. How long a step may take, they judge themselves: they know
    /// how long it usually takes. None: no step counts as hung.
    pub(crate) step_timeout: Option<Duration>,
}

impl Config {
    /// Errors when arguments contradict each other or cannot be met.
    pub(crate) fn new(args: Args) -> Result<Self, ConfigError> {
        if args.ngrok {
            return Err(ConfigError::Ngrok);
        }
        if !args.tokenizer_name.is_dir() {
            return Err(ConfigError::NoModel(args.tokenizer_name));
        }
        let mut warnings = Vec::new();
        if args.otlp_endpoint.is_some() {
            warnings.push("`--otlp-endpoint`: this build exports no traces".to_owned());
        }
        let limits = limits(&args)?;
        let validation_workers = positive("--validation-workers", args.validation_workers)?;
        let name = args.model_name.clone().unwrap_or_else(|| args.tokenizer_name.display().to_string());
        Ok(Self {
            logs: LogConfig {
                format: if args.json_output { LogFormat::Json } else { LogFormat::Text },
                level: args.log_level.clone(),
                no_color: args.no_color.as_ref().is_some_and(|value| !value.is_empty()),
            },
            socket: args.master_shard_uds_path.clone(),
            allow_runtime_adapters: args.allow_runtime_adapters,
            http: http(&args, &mut warnings)?,
            limits,
            recovery: RecoveryConfig {
                step_timeout: step_timeout(args.step_timeout)?,
                control_socket: args.control_socket,
            },
            validation_workers,
            warnings,
            model: ModelConfig {
                directory: args.tokenizer_name,
                name,
                tokenizer_config: args.tokenizer_config_path,
            },
        })
    }
}

fn http(args: &Args, warnings: &mut Vec<String>) -> Result<HttpConfig, ConfigError> {
    let ip: IpAddr = args.hostname.parse().unwrap_or_else(|_| {
        let name = &args.hostname;
        warnings.push(format!("`--hostname` {name} is not an IP address; listening on 0.0.0.0"));
        Ipv4Addr::UNSPECIFIED.into()
    });
    let api_key = match &args.api_key {
        Some(Secret(key)) if key.is_empty() => return Err(ConfigError::EmptyKey),
        key => key.as_ref().map(|Secret(key)| ApiKey::new(key)),
    };
    let origins = args.cors_allow_origin.iter().map(|origin| header("--cors-allow-origin", origin));
    Ok(HttpConfig {
        address: SocketAddr::new(ip, args.port),
        metrics_address: (args.prometheus_port > 0).then(|| SocketAddr::new(ip, args.prometheus_port)),
        access: Access { api_key, origins: origins.collect::<Result<_, _>>()? },
        compute_type: header("COMPUTE_TYPE", &args.compute_type)?,
        body_bytes_max: args.payload_limit,
        patience: Duration::from_secs(args.graceful_termination_timeout),
    })
}

fn limits(args: &Args) -> Result<LimitsConfig, ConfigError> {
    positive("--max-concurrent-requests", args.max_concurrent_requests)?;
    positive("--max-client-batch-size", args.max_client_batch_size as usize)?;
    positive("--max-batch-prefill-tokens", args.max_batch_prefill_tokens as usize)?;
    if !(args.waiting_served_ratio >= 0.0 && args.waiting_served_ratio.is_finite()) {
        return Err(ConfigError::Ratio(args.waiting_served_ratio));
    }
    let input = ("--max-input-tokens", args.max_input_tokens);
    let total = ("--max-total-tokens", args.max_total_tokens);
    let prefill = ("--max-batch-prefill-tokens", Some(args.max_batch_prefill_tokens));
    let cache = ("--max-batch-total-tokens", args.max_batch_total_tokens);
    if let (name, Some(0)) = input {
        return Err(ConfigError::Zero { flag: name });
    }
    below(input, total)?;
    at_most(prefill, cache)?;
    at_most(total, cache)?;
    Ok(LimitsConfig {
        concurrent_requests: args.max_concurrent_requests,
        best_of: args.max_best_of,
        stop_sequences: args.max_stop_sequences,
        top_n_tokens: args.max_top_n_tokens,
        client_batch: args.max_client_batch_size,
        input_tokens: args.max_input_tokens.map(TokenCount),
        total_tokens: args.max_total_tokens.map(TokenCount),
        batch_prefill_tokens: TokenCount(args.max_batch_prefill_tokens),
        batch_total_tokens: args.max_batch_total_tokens.map(TokenCount),
        batch_size: args.max_batch_size.map(|size| positive("--max-batch-size", size)).transpose()?,
        waiting_served_ratio: args.waiting_served_ratio,
        waiting_tokens: args.max_waiting_tokens,
        prefix_caching: args.prefix_caching,
        max_step_stretch: stretch(args.max_step_stretch)?,
    })
}

fn stretch(stretch: f32) -> Result<Option<f32>, ConfigError> {
    match stretch {
        0.0 => Ok(None),
        1.0..f32::INFINITY => Ok(Some(stretch)),
        _ => Err(ConfigError::Stretch(stretch)),
    }
}

fn step_timeout(seconds: f64) -> Result<Option<Duration>, ConfigError> {
    let timeout = Duration::try_from_secs_f64(seconds).map_err(|_| ConfigError::Seconds(seconds))?;
    Ok(Some(timeout).filter(|timeout| !timeout.is_zero()))
}

fn positive(flag: &'static str, value: usize) -> Result<NonZeroUsize, ConfigError> {
    NonZeroUsize::new(value).ok_or(ConfigError::Zero { flag })
}

fn below(small: (&'static str, Option<u32>), large: (&'static str, Option<u32>)) -> Result<(), ConfigError> {
    order(small, "below", large, |small, large| small < large)
}

/// Also used once the shards have decided what was absent.
pub(crate) fn at_most(
    small: (&'static str, Option<u32>),
    large: (&'static str, Option<u32>),
) -> Result<(), ConfigError> {
    order(small, "at most", large, |small, large| small <= large)
}

fn order(
    (small, small_value): (&'static str, Option<u32>),
    relation: &'static str,
    (large, large_value): (&'static str, Option<u32>),
    holds: impl Fn(u32, u32) -> bool,
) -> Result<(), ConfigError> {
    match (small_value, large_value) {
        (Some(small_value), Some(large_value)) if !holds(small_value, large_value) => {
            Err(ConfigError::Order { small, small_value, relation, large, large_value })
        }
        _ => Ok(()),
    }
}

fn header(flag: &'static str, value: &str) -> Result<HeaderValue, ConfigError> {
    HeaderValue::from_str(value).map_err(|_| ConfigError::Header { flag, value: value.to_owned() })
}

impl From<String> for Secret {
    fn from(value: String) -> Self {
        Self(value)
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("***")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(words: &str) -> Args {
        let words = words.split_whitespace();
        let fixed = ["router", "--tokenizer-name", env!("CARGO_MANIFEST_DIR")];
        Args::try_parse_from(fixed.into_iter().chain(words)).unwrap()
    }

    fn config(words: &str) -> Result<Config, ConfigError> {
        Config::new(args(words))
    }

    #[track_caller]
    fn check(words: &str, expected: &str) {
        assert_eq!(config(words).unwrap_err().to_string(), expected);
    }

    #[test]
    fn limits_must_fit_together() {
        check(
            "--max-input-tokens 10 --max-total-tokens 10",
            "`--max-input-tokens` (10) must be below `--max-total-tokens` (10)",
        );
        check(
            "--max-batch-prefill-tokens 20 --max-batch-total-tokens 10",
            "`--max-batch-prefill-tokens` (20) must be at most `--max-batch-total-tokens` (10)",
        );
        check(
            "--max-batch-prefill-tokens 5 --max-total-tokens 20 --max-batch-total-tokens 10",
            "`--max-total-tokens` (20) must be at most `--max-batch-total-tokens` (10)",
        );
        check("--validation-workers 0", "`--validation-workers` must be at least 1");
        check("--max-batch-size 0", "`--max-batch-size` must be at least 1");
        check("--max-concurrent-requests 0", "`--max-concurrent-requests` must be at least 1");
        check("--max-step-stretch 0.5", "`--max-step-stretch` is 0.5, but must be 0 or a number from 1");
        check("--max-step-stretch inf", "`--max-step-stretch` is inf, but must be 0 or a number from 1");
        check("--step-timeout NaN", "`--step-timeout` is NaN, but must be a number of seconds from 0");
        check("--waiting-served-ratio NaN", "`--waiting-served-ratio` is NaN, but must be a number from 0");
        assert!(config("--max-input-length 9 --max-total-tokens 10").is_ok());
    }

    #[test]
    fn zero_means_that_a_step_may_take_any_time() {
        let times = |words: &str| {
            let config = config(words).unwrap();
            (config.recovery.step_timeout, config.limits.max_step_stretch)
        };
        assert_eq!(times(""), (Some(Duration::from_secs(60)), Some(2.0)));
        assert_eq!(
            times("--step-timeout 0.25 --max-step-stretch 1"),
            (Some(Duration::from_millis(250)), Some(1.0))
        );
        assert_eq!(times("--step-timeout 0 --max-step-stretch 0"), (None, None));
    }

    #[test]
    fn prefixes_are_cached_unless_that_is_turned_off() {
        let cached = |words: &str| config(words).unwrap().limits.prefix_caching;
        assert!(cached("") && cached("--prefix-caching 1") && cached("--prefix-caching true"));
        assert!(!cached("--prefix-caching 0") && !cached("--prefix-caching false"));
        assert!(Args::try_parse_from(["router", "--tokenizer-name", "x", "--prefix-caching", "2"]).is_err());
    }

    #[test]
    fn what_cannot_be_met_is_refused() {
        check("--ngrok", "`--ngrok` is not available in this build");
        check("--api-key=", "`--api-key` is empty");
        let args = Args::try_parse_from(["router", "--tokenizer-name", "org/model"]).unwrap();
        assert_eq!(Config::new(args).unwrap_err(), ConfigError::NoModel("org/model".into()));
    }

    #[test]
    fn a_host_name_that_is_no_address_means_all_addresses() {
        let config = config("--hostname pod-1 --port 80 --prometheus-port 0").unwrap();
        assert_eq!(config.http.address.to_string(), "0.0.0.0:80");
        assert_eq!(config.http.metrics_address, None);
        assert_eq!(config.warnings, ["`--hostname` pod-1 is not an IP address; listening on 0.0.0.0"]);
    }

    #[test]
    fn secrets_are_not_printed() {
        let args = args("--api-key hush --ngrok-authtoken hush");
        assert!(!format!("{args:?}").contains("hush"));
        assert!(!format!("{:?}", Config::new(args).unwrap()).contains("hush"));
    }

    #[test]
    fn the_name_of_the_model_is_its_own() {
        assert_eq!(config("--model-name acme/tiny").unwrap().model.name, "acme/tiny");
        assert_eq!(config("").unwrap().model.name, env!("CARGO_MANIFEST_DIR"));
    }
}
