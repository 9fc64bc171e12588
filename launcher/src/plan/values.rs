//! Every value that the launcher derives, each with its reason.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::PlanInput;
use super::adapters;
use super::checks::PlanError;
use super::limits::Limits;
use super::recovery::Recovery;
use super::shards;
use crate::adapters::AdapterSource;
use crate::args::Args;
use crate::model::{HubOrigin, ModelSource};

/// Tokens of one cache block with `paged` attention.
const PAGED_BLOCK_TOKENS: u32 = 16;

/// Longest path of a unix socket: the system's 108 bytes, the last of which is a zero.
const SOCKET_PATH_BYTES_MAX: usize = 107;

/// A value and why it is that one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Derived<T> {
    /// The value.
    pub value: T,
    /// Why.
    pub reason: String,
}

impl<T> Derived<T> {
    /// A value with its reason.
    pub fn new(value: T, reason: impl Into<String>) -> Self {
        Self { value, reason: reason.into() }
    }
}

/// An amount of memory, shown to people in the unit that fits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(transparent)]
pub struct Bytes(pub u64);

impl fmt::Display for Bytes {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bytes = self.0 as f64;
        match self.0 {
            0..0x10_0000 => write!(formatter, "{:.1} KiB", bytes / f64::from(1 << 10)),
            0x10_0000..0x4000_0000 => write!(formatter, "{:.1} MiB", bytes / f64::from(1 << 20)),
            _ => write!(formatter, "{:.1} GiB", bytes / f64::from(1 << 30)),
        }
    }
}

/// All derived values.
#[derive(Clone, Debug)]
pub struct Values {
    /// The model's id for clients.
    pub model: Derived<String>,
    /// The directory that router and shards read.
    pub model_directory: Derived<PathBuf>,
    /// The adapters to load at the start, each with its directory.
    pub adapters: Derived<String>,
    /// The kind of device that computes.
    pub device: Derived<&'static str>,
    /// Element type of the weights.
    pub dtype: Derived<String>,
    /// How the weights are quantized.
    pub quantization: Derived<String>,
    /// Size of the weight files.
    pub weights: Derived<Bytes>,
    /// Memory this process may use; zero when unknown.
    pub memory: Derived<Bytes>,
    /// Number of shards.
    pub shard_count: Derived<usize>,
    /// The attention implementation.
    pub attention: Derived<&'static str>,
    /// Tokens of one block of the key/value cache.
    pub block_tokens: Derived<u32>,
    /// Whether what was computed of prompts is kept for later ones.
    pub prefix_caching: Derived<bool>,
    /// Token limits.
    pub limits: Limits,
    /// How many times as long as a step without prompts one with prompts may take; 0 when it does not matter.
    pub max_step_stretch: Derived<f32>,
    /// What happens when a child dies or hangs.
    pub recovery: Recovery,
    /// Threads that compute, of all shards together.
    pub cpu_threads: Derived<usize>,
    /// Threads of each shard.
    pub shard_threads: Derived<usize>,
    /// What the answers' header `x-compute-type` says.
    pub compute_type: Derived<String>,
    /// Where the HTTP API listens.
    pub address: Derived<SocketAddr>,
    /// What the user should know about the address.
    pub address_warning: Option<String>,
    /// Where the metrics are served as well.
    pub prometheus_port: Derived<u16>,
    /// The launcher's private directory.
    pub run_directory: Derived<PathBuf>,
    /// The shards' sockets are this, a dash and the rank.
    pub socket_prefix: Derived<PathBuf>,
    /// Level of the shards' logs.
    pub log_level: Derived<String>,
}

impl Values {
    pub(super) fn derive(input: PlanInput<'_>) -> Result<Self, PlanError> {
        let PlanInput { args, model, machine, variables, .. } = input;
        let (address, address_warning) = address(args);
        let shard_count = shards::shard_count(input)?;
        let count = shard_count.value;
        let cpu_threads = shards::cpu_threads(input);
        Ok(Self {
            model: model_id(input),
            model_directory: model_directory(input),
            adapters: adapters(input),
            device: shards::device(input),
            dtype: dtype(input),
            quantization: quantization(input),
            weights: Derived::new(
                Bytes(model.weights.bytes),
                format!("weight files: {}", model.weights.count),
            ),
            memory: match machine.memory_bytes {
                Some(bytes) => Derived::new(Bytes(bytes), "memory this process may use"),
                None => Derived::new(Bytes(0), "unknown: the system does not tell"),
            },
            shard_count,
            attention: Derived::new("paged", "the only implementation: it runs on every device"),
            block_tokens: Derived::new(PAGED_BLOCK_TOKENS, "the block size of `paged` attention"),
            prefix_caching: prefix_caching(args),
            limits: Limits::derive(input),
            max_step_stretch: Derived::new(args.max_step_stretch, "--max-step-stretch"),
            recovery: Recovery::derive(input),
            shard_threads: shards::shard_threads(cpu_threads.value, count),
            cpu_threads,
            compute_type: match &variables.compute_type {
                Some(text) => Derived::new(text.clone(), "COMPUTE_TYPE"),
                None => Derived::new(
                    format!("{count}-{}", shards::device(input).value),
                    "number of shards and kind of device",
                ),
            },
            address,
            address_warning,
            prometheus_port: Derived::new(args.prometheus_port, "--prometheus-port"),
            run_directory: Derived::new(
                input.run_dir.to_owned(),
                "private to this launcher, removed when it ends",
            ),
            socket_prefix: socket_prefix(input, count)?,
            log_level: Derived::new(input.log_level.to_owned(), "the most talkative level of LOG_LEVEL"),
        })
    }
}

fn model_id(input: PlanInput<'_>) -> Derived<String> {
    let reason = match &input.model.source {
        ModelSource::Embedded => "no --model-id: the demo model that is part of this program",
        ModelSource::Directory | ModelSource::Hub(_) => "--model-id",
    };
    Derived::new(input.model.id.clone(), reason)
}

fn model_directory(input: PlanInput<'_>) -> Derived<PathBuf> {
    let reason = match &input.model.source {
        ModelSource::Embedded => "the demo model is written there at the start".to_owned(),
        ModelSource::Directory => "--model-id is a local directory".to_owned(),
        ModelSource::Hub(origin) => on_the_hub(origin),
    };
    Derived::new(input.model.directory.clone(), reason)
}

fn on_the_hub(origin: &HubOrigin) -> String {
    match origin.is_cached {
        true => format!("revision {}, as the cache of the Hub has it", origin.revision),
        false => format!("revision {} of the Hub is commit {}", origin.revision, origin.commit),
    }
}

fn adapters(input: PlanInput<'_>) -> Derived<String> {
    if input.adapters.is_empty() {
        return Derived::new("none".to_owned(), "no --lora-adapters");
    }
    let mut reason = "--lora-adapters".to_owned();
    for adapter in input.adapters {
        if let AdapterSource::Hub(origin) = &adapter.source {
            reason.push_str(&format!("; {}: {}", adapter.name, on_the_hub(origin)));
        }
    }
    Derived::new(adapters::list(input.adapters), reason)
}

fn dtype(input: PlanInput<'_>) -> Derived<String> {
    if let Some(dtype) = &input.args.dtype {
        return Derived::new(dtype.clone(), "--dtype");
    }
    match &input.model.config.dtype {
        // Where all weights have one type, it is half of this.
        Some(dtype) if dtype == "float32" && shards::device(input).value != "cpu" => {
            Derived::new("float16".to_owned(), "half of float32, which config.json says")
        }
        Some(dtype) => Derived::new(dtype.clone(), "kept as stored, says config.json"),
        None => Derived::new("as stored".to_owned(), "config.json does not say; the weight files do"),
    }
}

fn quantization(input: PlanInput<'_>) -> Derived<String> {
    match &input.model.config.quantization {
        Some(method) => Derived::new(method.clone(), "quant_method in config.json"),
        None => Derived::new("none".to_owned(), "config.json names none"),
    }
}

/// TGI turns it off for models that see, for adapters and where its attention is `paged`. Here whole blocks are kept,
/// known by their tokens and the adapter that computed them, so none of these is a reason.
fn prefix_caching(args: &Args) -> Derived<bool> {
    match args.prefix_caching {
        Some(wanted) => Derived::new(wanted, "--prefix-caching"),
        None => Derived::new(true, "blocks are known by their tokens and adapter, and used again"),
    }
}

/// Where the API listens. In containers the variable HOSTNAME holds a name, so a name means all addresses; but who says
/// `localhost` means to stay private.
fn address(args: &Args) -> (Derived<SocketAddr>, Option<String>) {
    let hostname = args.hostname.as_str();
    let (ip, reason, warning) = match (hostname.parse::<IpAddr>(), hostname) {
        (Ok(ip), _) => (ip, "--hostname, --port".to_owned(), None),
        (Err(_), "localhost") => {
            (Ipv4Addr::LOCALHOST.into(), "--hostname localhost, --port".to_owned(), None)
        }
        (Err(_), name) => {
            let warning = format!("--hostname {name} is no IP address: listening on all addresses, 0.0.0.0");
            (
                Ipv4Addr::UNSPECIFIED.into(),
                format!("--hostname {name} is no IP address; --port"),
                Some(warning),
            )
        }
    };
    (Derived::new(SocketAddr::new(ip, args.port), reason), warning)
}

/// Where the router reports to the launcher.
pub(super) fn control_socket(input: PlanInput<'_>) -> Result<PathBuf, PlanError> {
    let path = input.run_dir.join("control");
    fits(&path, "TMPDIR")?;
    Ok(path)
}

fn socket_prefix(input: PlanInput<'_>, shard_count: usize) -> Result<Derived<PathBuf>, PlanError> {
    let (prefix, flag) = match &input.args.shard_uds_path {
        Some(prefix) => (Derived::new(prefix.clone(), "--shard-uds-path"), "--shard-uds-path"),
        None => {
            (Derived::new(input.run_dir.join("shard"), "in the run directory"), "TMPDIR or --shard-uds-path")
        }
    };
    // The last one has the longest number.
    fits(&shards::socket_path(&prefix.value, shard_count - 1), flag)?;
    Ok(prefix)
}

/// Errors when the system cannot take a socket's path, which `flag` decides.
fn fits(path: &Path, flag: &'static str) -> Result<(), PlanError> {
    let bytes = path.as_os_str().as_bytes().len();
    if bytes > SOCKET_PATH_BYTES_MAX {
        let path = path.to_owned();
        return Err(PlanError::SocketPathTooLong { path, bytes, max: SOCKET_PATH_BYTES_MAX, flag });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Case, plan, refusal};
    use super::*;

    #[test]
    fn without_a_model_the_demo_model_is_served_on_the_cpu() {
        let values = plan(&[]).values;
        assert_eq!(values.model.value, "demo");
        assert!(values.model.reason.starts_with("no --model-id"), "{}", values.model.reason);
        assert_eq!(
            (values.device.value, values.shard_count.value, values.compute_type.value.as_str()),
            ("cpu", 1, "1-cpu")
        );
        assert_eq!(values.dtype, Derived::new("bfloat16".to_owned(), "kept as stored, says config.json"));
    }

    #[test]
    fn attention_is_paged() {
        let values = plan(&[]).values;
        assert_eq!((values.attention.value, values.block_tokens.value), ("paged", 16));
    }

    #[test]
    fn prefixes_are_cached_unless_that_is_turned_off() {
        let caching = |words| plan(words).values.prefix_caching;
        assert!(caching(&[]).value && caching(&["--prefix-caching=1"]).value);
        assert_eq!(caching(&["--prefix-caching=false"]), Derived::new(false, "--prefix-caching"));
    }

    #[test]
    fn a_name_for_an_address_means_all_addresses_but_localhost_stays_private() {
        let address = |hostname: &str| {
            let plan = plan(&["--hostname", hostname, "--port=80"]);
            (plan.values.address.value.to_string(), plan.warnings.len())
        };
        assert_eq!(address("127.0.0.1"), ("127.0.0.1:80".to_owned(), 0));
        assert_eq!(address("::1"), ("[::1]:80".to_owned(), 0));
        assert_eq!(address("localhost"), ("127.0.0.1:80".to_owned(), 0));
        assert_eq!(address("3f0b1c2d"), ("0.0.0.0:80".to_owned(), 1));
    }

    #[test]
    fn sockets_are_in_the_run_directory_unless_a_prefix_is_given() {
        assert_eq!(plan(&[]).shards[0].socket, Path::new("/run/tgi/shard-0"));
        let shards = plan(&["--shard-uds-path=/tmp/tgi", "--num-shard=2"]).shards;
        assert_eq!(shards[0].socket, Path::new("/tmp/tgi-0"));
        assert_eq!(shards[1].socket, Path::new("/tmp/tgi-1"));
    }

    #[test]
    fn a_socket_path_that_the_system_cannot_take_is_refused_with_the_limit() {
        let prefix = format!("/tmp/{}", "x".repeat(100));
        plan(&["--shard-uds-path", &prefix]);
        plan(&["--shard-uds-path", &prefix, "--num-shard=10"]);
        refusal(&["--shard-uds-path", &prefix, "--num-shard=11"]);
        let line = refusal(&["--shard-uds-path", &format!("{prefix}y")]);
        assert!(
            line.contains("has 108 bytes, the system takes 107") && line.contains("--shard-uds-path"),
            "{line}"
        );
    }

    #[test]
    fn a_temporary_directory_that_is_too_deep_for_sockets_is_refused_with_its_variable() {
        let mut case = Case::new(&["--shard-uds-path=/tmp/tgi"]);
        case.run_dir = PathBuf::from(format!("/{}", "x".repeat(98)));
        assert_eq!(case.plan().unwrap().control.as_os_str().len(), 107);
        case.run_dir.set_file_name("x".repeat(99));
        let line = case.plan().unwrap_err().to_string();
        assert!(line.contains("has 108 bytes, the system takes 107") && line.contains("TMPDIR"), "{line}");
    }

    #[test]
    fn a_compute_type_counts_the_shards_and_one_from_the_environment_is_kept() {
        assert_eq!(plan(&["--num-shard=2"]).values.compute_type.value, "2-cpu");
        let mut case = Case::new(&[]);
        case.variables.compute_type = Some("1-tpu".into());
        assert_eq!(
            case.plan().unwrap().values.compute_type,
            Derived::new("1-tpu".to_owned(), "COMPUTE_TYPE")
        );
    }

    #[test]
    fn memory_is_shown_in_the_unit_that_fits() {
        let shown = [512, 6_957_512, 16 << 30].map(|bytes| Bytes(bytes).to_string());
        assert_eq!(shown, ["0.5 KiB", "6.6 MiB", "16.0 GiB"]);
    }
}
