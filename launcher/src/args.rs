//! What the user typed: every flag of the launcher and its environment variable. What it means is `plan`'s.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

#[cfg(test)]
use clap::FromArgMatches;
use clap::builder::{BoolishValueParser, PossibleValuesParser};
use clap::{CommandFactory, Parser, ValueEnum};

use crate::secret::Secret;

const SUBCOMMANDS: &str = "\
Subcommands, each a program of its own with its own --help:
  router            the HTTP server; the launcher starts it after the shards
  shard             the model server; the launcher starts one per device
  download-weights  fetches a model from the Hub into the cache, and ends
  doctor            checks what a GPU computes: kernels, models, memory, and ranks of a model

Every flag but --env and --plan has a variable of the same name (--max-input-tokens: MAX_INPUT_TOKENS); the command line wins.
LOG_LEVEL (info) is a level or a filter such as `router=debug,h2=warn`; NO_COLOR turns colours off.
For the Hub: HF_TOKEN, HF_HOME, HF_HUB_CACHE, HF_ENDPOINT, HF_HUB_OFFLINE, HTTPS_PROXY, NO_PROXY, SSL_CERT_FILE.";

/// What `--device` takes.
const DEVICE_KINDS: &[&str] =
    if cfg!(feature = "emulation") { &["auto", "cpu", "cuda", "emulated"] } else { &["auto", "cpu", "cuda"] };

const MODEL: &str = "Model and weights";
const DEVICES: &str = "Devices and processes";
const LIMITS: &str = "Limits and scheduling";
const RECOVERY: &str = "Recovery";
const SERVICE: &str = "Service, logging, security";

/// Serves a language model over HTTP: starts a shard that computes and a router that listens, and watches over both.
#[derive(Clone, Debug, Parser)]
#[command(name = "text-generation-launcher", version, after_help = SUBCOMMANDS)]
pub struct Args {
    /// Model to serve: a directory, or an id of the Hub; without it, a tiny demo model that is part of this program.
    #[arg(long, env, help_heading = MODEL)]
    pub model_id: Option<String>,
    /// Branch, tag, commit or `refs/pr/N` of a model on the Hub [default: main].
    #[arg(long, env, help_heading = MODEL)]
    pub revision: Option<String>,
    /// Format of quantized weights, or the method to quantize with.
    #[arg(long, env, help_heading = MODEL, value_parser = [
        "awq", "compressed-tensors", "eetq", "exl2", "gptq", "marlin", "bitsandbytes", "bitsandbytes-nf4",
        "bitsandbytes-fp4", "fp8",
    ])]
    pub quantize: Option<String>,
    /// Element type to compute in [default: on CPUs, each weight's own; on GPUs, what config.json says].
    #[arg(long, env, help_heading = MODEL, value_parser = ["float16", "bfloat16", "float32"])]
    pub dtype: Option<String>,
    /// `dummy` makes weights up, in the shapes that `config.json` describes, to measure without a checkpoint.
    #[arg(long, env, help_heading = MODEL, value_parser = ["auto", "dummy"], default_value = "auto")]
    pub load_format: String,
    /// Element type of the key/value cache, on GPUs [default: that of the model].
    #[arg(long, env, help_heading = MODEL, value_parser = ["fp8_e4m3fn", "fp8_e5m2"])]
    pub kv_cache_dtype: Option<String>,
    /// Allow code from the model's repository; there is none here that could run.
    #[arg(long, env, help_heading = MODEL)]
    pub trust_remote_code: bool,
    /// Tokens to speculate per step.
    #[arg(long, env, help_heading = MODEL)]
    pub speculate: Option<usize>,
    /// LoRA adapters to load at the start, separated by commas: each `id` or `id@revision` of the Hub, or `name=/directory`.
    #[arg(long, env, help_heading = MODEL)]
    pub lora_adapters: Option<String>,
    /// Let clients load and unload LoRA adapters from directories of this machine while the server runs.
    #[arg(long, env, help_heading = MODEL)]
    pub allow_runtime_adapters: bool,
    /// Scaling of the rotary embedding, instead of the model's own.
    #[arg(long, env, help_heading = MODEL, value_parser = ["linear", "dynamic"])]
    pub rope_scaling: Option<String>,
    /// Factor of the rotary scaling; alone it means `linear`.
    #[arg(long, env, help_heading = MODEL)]
    pub rope_factor: Option<f32>,
    /// A `tokenizer_config.json` (chat template) to use instead of the model's own.
    #[arg(long, env, help_heading = MODEL)]
    pub tokenizer_config_path: Option<PathBuf>,
    /// Cache directory of the Hub [default: HF_HUB_CACHE, or else below HF_HOME].
    #[arg(long, env, help_heading = MODEL)]
    pub huggingface_hub_cache: Option<PathBuf>,
    /// Flat directory that holds the weight files, which then are not downloaded.
    #[arg(long, env, help_heading = MODEL)]
    pub weights_cache_override: Option<PathBuf>,

    /// Where the model runs: `auto` takes a GPU if there is one, and the CPU otherwise.
    #[arg(long, env, help_heading = DEVICES, value_parser = PossibleValuesParser::new(DEVICE_KINDS), default_value = "auto")]
    pub device: String,
    /// On GPUs, compute a token the same to the last bit whatever it is batched with, as CPUs always do; slower.
    #[arg(long, env, help_heading = DEVICES)]
    pub batch_invariant: bool,
    /// Whether to split the model over several shards: all devices that CUDA_VISIBLE_DEVICES names, unless --num-shard is set.
    #[arg(long, env, help_heading = DEVICES)]
    pub sharded: Option<bool>,
    /// Number of shards that the model is split over [default: 1 on the CPU, else all devices that CUDA_VISIBLE_DEVICES names].
    #[arg(long, env, help_heading = DEVICES)]
    pub num_shard: Option<usize>,
    /// Threads that compute on the CPU, divided between the shards [default: one per core this process may use].
    #[arg(long, env, help_heading = DEVICES)]
    pub cpu_threads: Option<usize>,
    /// Share of each device's memory that may be used, more than 0 and at most 1 [default: 1].
    #[arg(long, env, help_heading = DEVICES, value_parser = share)]
    pub cuda_memory_fraction: Option<f32>,
    /// Batch sizes to capture as CUDA graphs, separated by commas; 0 turns them off.
    #[arg(long, env, help_heading = DEVICES, value_delimiter = ',')]
    pub cuda_graphs: Option<Vec<usize>>,
    /// Turn off the special kernels of some old model families.
    #[arg(long, env, help_heading = DEVICES)]
    pub disable_custom_kernels: bool,
    /// Where the shards' sockets go: this prefix, a dash and the rank [default: in a private temporary directory].
    #[arg(long, env, help_heading = DEVICES)]
    pub shard_uds_path: Option<PathBuf>,
    /// Host where the shards meet.
    #[arg(long, env, help_heading = DEVICES, default_value = "localhost")]
    pub master_addr: String,
    /// Port where the shards meet.
    #[arg(long, env, help_heading = DEVICES, default_value_t = 29500)]
    pub master_port: u16,

    /// Requests admitted at once, waiting and running; beyond it the answer is 429.
    #[arg(long, env, help_heading = LIMITS, default_value_t = 128)]
    pub max_concurrent_requests: usize,
    /// Largest `best_of` of a request.
    #[arg(long, env, help_heading = LIMITS, default_value_t = 2)]
    pub max_best_of: usize,
    /// Most stop strings of a request.
    #[arg(long, env, help_heading = LIMITS, default_value_t = 4)]
    pub max_stop_sequences: usize,
    /// Largest `top_n_tokens` of a request.
    #[arg(long, env, help_heading = LIMITS, default_value_t = 5)]
    pub max_top_n_tokens: u32,
    /// Longest prompt, in tokens [default: decided when the model is loaded].
    #[arg(long, env, help_heading = LIMITS)]
    pub max_input_tokens: Option<u32>,
    /// Old name of --max-input-tokens.
    #[arg(long, env, help_heading = LIMITS)]
    pub max_input_length: Option<u32>,
    /// Most tokens of a request, prompt and answer together [default: decided when the model is loaded].
    #[arg(long, env, help_heading = LIMITS)]
    pub max_total_tokens: Option<u32>,
    /// Prompt tokens of one pass [default: 4096, or what the model can take].
    #[arg(long, env, help_heading = LIMITS)]
    pub max_batch_prefill_tokens: Option<u32>,
    /// Tokens of all running requests together [default: what fits into memory].
    #[arg(long, env, help_heading = LIMITS)]
    pub max_batch_total_tokens: Option<u32>,
    /// Most requests of one batch.
    #[arg(long, env, help_heading = LIMITS)]
    pub max_batch_size: Option<usize>,
    /// Steps after which waiting requests are admitted whatever --waiting-served-ratio says.
    #[arg(long, env, help_heading = LIMITS, default_value_t = 20)]
    pub max_waiting_tokens: usize,
    /// Waiting to running requests, from which on the running ones pause for the waiting ones.
    #[arg(long, env, help_heading = LIMITS, default_value_t = 0.3, value_parser = ratio)]
    pub waiting_served_ratio: f32,
    /// Whether what was computed of a prompt is kept for later prompts that begin alike [default: true].
    #[arg(long, env, help_heading = LIMITS, value_parser = BoolishValueParser::new())]
    pub prefix_caching: Option<bool>,
    /// How many times as long as a step without prompts a step may take that computes prompts beside running requests; 0: any.
    #[arg(long, env, help_heading = LIMITS, default_value_t = 2.0, value_parser = stretch)]
    pub max_step_stretch: f32,
    /// Most prompts of one completions request.
    #[arg(long, env, help_heading = LIMITS, default_value_t = 4)]
    pub max_client_batch_size: usize,
    /// Threads that tokenize.
    #[arg(long, env, help_heading = LIMITS, default_value_t = 2)]
    pub validation_workers: usize,
    /// Largest body of a request, in bytes.
    #[arg(long, env, help_heading = LIMITS, default_value_t = 2_000_000)]
    pub payload_limit: usize,
    /// Allow log-probabilities of the prompt; they are always allowed here.
    #[arg(long, env, help_heading = LIMITS)]
    pub enable_prefill_logprobs: bool,
    /// Refuse grammars.
    #[arg(long, env, help_heading = LIMITS)]
    pub disable_grammar_support: bool,

    /// What happens when a shard dies or hangs: start all shards again and go on, or end.
    #[arg(long, env, help_heading = RECOVERY, value_enum, default_value_t = OnShardFailure::Restart)]
    pub on_shard_failure: OnShardFailure,
    /// Restarts in a row, without a step of the model in between, after which the launcher ends; 0: as --on-shard-failure exit.
    #[arg(long, env, help_heading = RECOVERY, default_value_t = 10)]
    pub max_shard_restarts: u32,
    /// Seconds after which a step may count as hung; never before eight times the longest step so far. 0: no step does.
    #[arg(long, env, help_heading = RECOVERY, default_value_t = 60.0, value_parser = seconds)]
    pub step_timeout: f64,

    /// IP address to listen on; a name other than `localhost` means all addresses.
    #[arg(long, env, help_heading = SERVICE, default_value = "0.0.0.0")]
    pub hostname: String,
    /// Port of the HTTP API.
    #[arg(short, long, env, help_heading = SERVICE, default_value_t = 3000)]
    pub port: u16,
    /// Port of the metrics, which the HTTP API serves as well.
    #[arg(long, env, help_heading = SERVICE, default_value_t = 9000)]
    pub prometheus_port: u16,
    /// Key that requests have to bring as `Authorization: Bearer <key>`; the variable keeps it out of process lists.
    #[arg(long, env, help_heading = SERVICE, hide_env_values = true)]
    pub api_key: Option<Secret>,
    /// Origin that browsers may call from; may be repeated [default: any].
    #[arg(long, env, help_heading = SERVICE)]
    pub cors_allow_origin: Vec<String>,
    /// Log one JSON object per line.
    #[arg(long, env, help_heading = SERVICE)]
    pub json_output: bool,
    /// Collector of traces.
    #[arg(long, env, help_heading = SERVICE)]
    pub otlp_endpoint: Option<String>,
    /// Name of this service in traces.
    #[arg(long, env, help_heading = SERVICE)]
    pub otlp_service_name: Option<String>,
    /// Share of the vocabulary that a watermark prefers.
    #[arg(long, env, help_heading = SERVICE)]
    pub watermark_gamma: Option<f32>,
    /// Bonus of a watermark's preferred tokens.
    #[arg(long, env, help_heading = SERVICE)]
    pub watermark_delta: Option<f32>,
    /// Publish the service through an ngrok tunnel.
    #[arg(long, env, help_heading = SERVICE)]
    pub ngrok: bool,
    /// Token for the tunnel.
    #[arg(long, env, help_heading = SERVICE, hide_env_values = true)]
    pub ngrok_authtoken: Option<Secret>,
    /// Name of the tunnel's edge.
    #[arg(long, env, help_heading = SERVICE)]
    pub ngrok_edge: Option<String>,
    /// Usage statistics; none are ever sent.
    #[arg(long, env, help_heading = SERVICE, value_parser = ["on", "off", "no-stack"])]
    pub usage_stats: Option<String>,
    /// Seconds that running requests get to finish after SIGTERM.
    #[arg(short, long, env, help_heading = SERVICE, default_value_t = 90)]
    pub graceful_termination_timeout: u64,
    /// Log what this program was built from and what this machine has.
    #[arg(short, long, help_heading = SERVICE)]
    pub env: bool,
    /// Print what would be started, every derived value with its reason, and start nothing.
    #[arg(long, help_heading = SERVICE)]
    pub plan: bool,
}

/// What happens when a shard dies or hangs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum OnShardFailure {
    /// All shards are started again, and running requests go on.
    Restart,
    /// Everything ends.
    Exit,
}

/// The variables of all flags. The children do not get them, so that only their command lines speak to them.
pub fn variables() -> Vec<OsString> {
    Args::command().get_arguments().filter_map(|argument| argument.get_env()).map(OsString::from).collect()
}

#[cfg(test)]
impl Args {
    /// The arguments alone: what the environment of the tests says does not count.
    pub(crate) fn parse_without_environment(words: &[&str]) -> Result<Self, clap::Error> {
        let command = Self::command().mut_args(|argument| argument.env(None));
        let matches = command.try_get_matches_from(["launcher"].iter().chain(words))?;
        Self::from_arg_matches(&matches)
    }
}

fn share(text: &str) -> Result<f32, String> {
    let share: f32 = text.parse().map_err(|_| "not a number".to_owned())?;
    if share > 0.0 && share <= 1.0 { Ok(share) } else { Err("must be more than 0 and at most 1".to_owned()) }
}

fn ratio(text: &str) -> Result<f32, String> {
    let ratio: f32 = text.parse().map_err(|_| "not a number".to_owned())?;
    if ratio >= 0.0 && ratio.is_finite() { Ok(ratio) } else { Err("must be 0 or more".to_owned()) }
}

fn stretch(text: &str) -> Result<f32, String> {
    let stretch: f32 = text.parse().map_err(|_| "not a number".to_owned())?;
    let possible = stretch == 0.0 || (stretch >= 1.0 && stretch.is_finite());
    if possible { Ok(stretch) } else { Err("must be 0 or at least 1".to_owned()) }
}

fn seconds(text: &str) -> Result<f64, String> {
    let seconds: f64 = text.parse().map_err(|_| "not a number".to_owned())?;
    match Duration::try_from_secs_f64(seconds) {
        Ok(_) => Ok(seconds),
        Err(_) => Err("must be a number of seconds, 0 or more".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use clap::error::ErrorKind;

    use super::*;

    /// Every flag of TGI's launcher that takes a value, with a value it takes.
    const WITH_VALUE: [(&str, &str); 44] = [
        ("model-id", "bigscience/bloom-560m"),
        ("revision", "refs/pr/1"),
        ("quantize", "bitsandbytes-nf4"),
        ("dtype", "bfloat16"),
        ("kv-cache-dtype", "fp8_e4m3fn"),
        ("speculate", "2"),
        ("lora-adapters", "a,b=/c"),
        ("rope-scaling", "dynamic"),
        ("rope-factor", "2.0"),
        ("tokenizer-config-path", "/c.json"),
        ("huggingface-hub-cache", "/data"),
        ("weights-cache-override", "/weights"),
        ("sharded", "false"),
        ("num-shard", "2"),
        ("cuda-memory-fraction", "0.9"),
        ("cuda-graphs", "1,2,4"),
        ("shard-uds-path", "/tmp/tgi"),
        ("master-addr", "host"),
        ("master-port", "29501"),
        ("max-concurrent-requests", "1"),
        ("max-best-of", "1"),
        ("max-stop-sequences", "1"),
        ("max-top-n-tokens", "1"),
        ("max-input-tokens", "1"),
        ("max-input-length", "1"),
        ("max-total-tokens", "2"),
        ("max-batch-prefill-tokens", "1"),
        ("max-batch-total-tokens", "1"),
        ("max-batch-size", "1"),
        ("max-waiting-tokens", "1"),
        ("waiting-served-ratio", "1.2"),
        ("max-client-batch-size", "1"),
        ("validation-workers", "1"),
        ("payload-limit", "1"),
        ("hostname", "::1"),
        ("port", "8080"),
        ("prometheus-port", "9001"),
        ("api-key", "k"),
        ("cors-allow-origin", "http://a"),
        ("otlp-endpoint", "http://b"),
        ("otlp-service-name", "tgi"),
        ("usage-stats", "no-stack"),
        ("graceful-termination-timeout", "1"),
        ("ngrok-edge", "e"),
    ];

    /// Every switch of TGI's launcher that has a variable.
    const SWITCHES: [&str; 6] = [
        "trust-remote-code",
        "disable-custom-kernels",
        "enable-prefill-logprobs",
        "disable-grammar-support",
        "json-output",
        "ngrok",
    ];

    fn parse(words: &[&str]) -> Result<Args, clap::Error> {
        Args::parse_without_environment(words)
    }

    fn variable(flag: &str) -> Option<String> {
        let command = Args::command();
        let argument = command.get_arguments().find(|argument| argument.get_long() == Some(flag)).unwrap();
        argument.get_env().map(|name| name.to_str().unwrap().to_owned())
    }

    #[test]
    fn clap_finds_no_contradiction_in_the_definition() {
        Args::command().debug_assert();
    }

    #[test]
    fn every_flag_with_a_value_parses_and_has_the_variable_of_its_name() {
        let more = [("ngrok-authtoken", "t"), ("watermark-gamma", "0.5"), ("watermark-delta", "2.0")];
        let ours = [
            ("prefix-caching", "0"),
            ("max-step-stretch", "1.5"),
            ("on-shard-failure", "exit"),
            ("max-shard-restarts", "3"),
            ("step-timeout", "0.5"),
        ];
        for (flag, value) in WITH_VALUE.into_iter().chain(more).chain(ours) {
            parse(&[&format!("--{flag}"), value]).unwrap_or_else(|error| panic!("--{flag}: {error}"));
            assert_eq!(variable(flag), Some(flag.to_uppercase().replace('-', "_")), "--{flag}");
        }
    }

    #[test]
    fn every_switch_parses_and_has_the_variable_of_its_name() {
        for flag in SWITCHES.into_iter().chain(["allow-runtime-adapters"]) {
            parse(&[&format!("--{flag}")]).unwrap_or_else(|error| panic!("--{flag}: {error}"));
            assert_eq!(variable(flag), Some(flag.to_uppercase().replace('-', "_")), "--{flag}");
        }
        assert_eq!(variable("env"), None);
    }

    #[test]
    fn the_children_are_rid_of_every_flag_variable() {
        let variables = variables();
        for name in ["PORT", "HOSTNAME", "API_KEY", "MODEL_ID", "MAX_INPUT_LENGTH", "CPU_THREADS"] {
            assert!(variables.contains(&name.into()), "{name}");
        }
    }

    #[test]
    fn the_short_p_is_the_port_and_only_the_port() {
        let args = parse(&["-p", "81", "-g", "3", "-e"]).unwrap();
        assert_eq!(
            (args.port, args.prometheus_port, args.graceful_termination_timeout, args.env),
            (81, 9000, 3, true)
        );
    }

    #[test]
    fn lists_split_only_where_the_interface_says_so() {
        let args = parse(&["--cuda-graphs", "1,2", "--cors-allow-origin", "a,b", "--cors-allow-origin", "c"])
            .unwrap();
        assert_eq!(args.cuda_graphs, Some(vec![1, 2]));
        assert_eq!(args.cors_allow_origin, ["a,b", "c"]);
    }

    #[test]
    fn prefix_caching_is_said_as_the_variable_of_tgi_says_it() {
        let said = |word| parse(&["--prefix-caching", word]).unwrap().prefix_caching;
        assert_eq!(["1", "true", "True"].map(said), [Some(true); 3]);
        assert_eq!(["0", "false", "False"].map(said), [Some(false); 3]);
        assert_eq!(parse(&[]).unwrap().prefix_caching, None);
    }

    #[test]
    fn a_wrong_value_or_an_unknown_flag_is_refused() {
        let wrong: [&[&str]; 17] = [
            &["--port", "70000"],
            &["--quantize", "int3"],
            &["--dtype", "float64"],
            &["--load-format", "pickle"],
            &["--sharded"],
            &["--num_shard", "1"],
            &["--max-input-tokens", ""],
            &["--cuda-memory-fraction", "1.5"],
            &["--waiting-served-ratio", "nan"],
            &["--prefix-caching", "maybe"],
            &["--prefix-caching", ""],
            &["--max-step-stretch", "0.5"],
            &["--step-timeout", "-1"],
            &["--step-timeout", "inf"],
            &["--on-shard-failure", "retry"],
            &["--max-shard-restarts", "-1"],
            &["serve"],
        ];
        for words in wrong {
            let error = parse(words).unwrap_err();
            assert_eq!(error.exit_code(), 2, "{words:?}");
        }
    }

    #[test]
    fn the_help_mentions_the_subcommands_and_hides_the_keys() {
        let error = parse(&["--help"]).unwrap_err();
        assert_eq!((error.kind(), error.exit_code()), (ErrorKind::DisplayHelp, 0));
        let help = error.to_string();
        assert!(
            help.contains("router") && help.contains("shard") && help.contains("download-weights"),
            "{help}"
        );

        let command = Args::command();
        for flag in ["api-key", "ngrok-authtoken"] {
            let argument =
                command.get_arguments().find(|argument| argument.get_long() == Some(flag)).unwrap();
            assert!(argument.is_hide_env_values_set(), "--{flag}");
        }
    }

    #[test]
    fn the_logged_arguments_never_hold_a_key() {
        let args = parse(&["--api-key", "hush", "--ngrok-authtoken", "hush"]).unwrap();
        let logged = format!("{args:#?}");
        assert!(logged.starts_with("Args {") && !logged.contains("hush"), "{logged}");
    }
}
