//! The children's command lines and variables.

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::path::{Path, PathBuf};

use hub::config::TOKEN_VARIABLES;

use super::shards::socket_path;
use super::values::Values;
use super::{DownloadPlan, PlanInput, ShardPlan, adapters};
use crate::adapters::AdapterSource;
use crate::args;
use crate::model::{HubOrigin, ModelSource};
use crate::secret::Secret;
use crate::tether::CHILD_OF;

/// How one child is started.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChildCommand {
    /// The program; this one.
    pub program: PathBuf,
    /// Its arguments.
    pub arguments: Vec<OsString>,
    /// Variables it gets besides the launcher's own; one of the same name replaces the launcher's.
    pub variables: Vec<(&'static str, EnvValue)>,
    /// Variables of the launcher that it does not get, unless they are among `variables`.
    pub removed: Vec<OsString>,
}

/// The value of a child's variable.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EnvValue {
    /// Anybody may see it.
    Plain(String),
    /// Nobody may.
    Secret(Secret),
}

impl EnvValue {
    /// What the child gets.
    pub fn reveal(&self) -> &str {
        match self {
            Self::Plain(text) => text,
            Self::Secret(secret) => secret.reveal(),
        }
    }
}

impl fmt::Display for EnvValue {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Plain(text) => formatter.write_str(text),
            Self::Secret(secret) => secret.fmt(formatter),
        }
    }
}

impl ChildCommand {
    /// This program again, as one of its subcommands. It dies with the launcher, and only its command line speaks for
    /// the flags: their variables are taken away.
    fn new(input: PlanInput<'_>, subcommand: &str) -> Self {
        let tether = [CHILD_OF.to_owned(), input.machine.pid.to_string(), subcommand.to_owned()];
        Self {
            program: input.machine.executable.clone(),
            arguments: tether.map(OsString::from).to_vec(),
            variables: Vec::new(),
            removed: args::variables(),
        }
    }

    fn word(&mut self, word: impl AsRef<OsStr>) {
        self.arguments.push(word.as_ref().to_owned());
    }

    fn path(&mut self, flag: &str, path: impl AsRef<OsStr>) {
        self.word(flag);
        self.word(path);
    }

    /// An empty path, as container files like to set it, says nothing.
    fn path_if(&mut self, flag: &str, path: Option<impl AsRef<OsStr>>) {
        if let Some(path) = path.filter(|path| !path.as_ref().is_empty()) {
            self.path(flag, path);
        }
    }

    fn option(&mut self, flag: &str, value: impl ToString) {
        self.path(flag, value.to_string());
    }

    fn option_if(&mut self, flag: &str, value: Option<impl ToString>) {
        if let Some(value) = value {
            self.option(flag, value);
        }
    }

    fn switch_if(&mut self, flag: &str, on: bool) {
        if on {
            self.word(flag);
        }
    }

    fn variable(&mut self, name: &'static str, value: impl ToString) {
        self.variables.push((name, EnvValue::Plain(value.to_string())));
    }

    fn variable_if(&mut self, name: &'static str, value: Option<impl ToString>) {
        if let Some(value) = value {
            self.variable(name, value);
        }
    }

    /// Takes away what only the download needs.
    fn without_tokens(&mut self) {
        self.removed.extend(TOKEN_VARIABLES.map(OsString::from));
    }

    /// What both kinds of children hear of the attention.
    fn attention_variables(&mut self, values: &Values) {
        self.variable("ATTENTION", values.attention.value);
        self.variable("PREFIX_CACHING", if values.prefix_caching.value { "true" } else { "0" });
    }
}

/// What fetches the model, then the adapters. Nothing for what is on this machine anyway.
pub(super) fn downloads(input: PlanInput<'_>) -> Vec<DownloadPlan> {
    let mut downloads = Vec::new();
    if let ModelSource::Hub(origin) = &input.model.source
        && !origin.is_cached
    {
        let mut command = download(input, &input.model.id, origin);
        match input.args.load_format.as_str() {
            "dummy" => command.word("--without-weights"),
            _ => command.path_if("--weights-cache-override", input.args.weights_cache_override.as_ref()),
        }
        downloads.push(DownloadPlan { id: input.model.id.clone(), command });
    }
    for adapter in input.adapters {
        if let AdapterSource::Hub(origin) = &adapter.source
            && !origin.is_cached
        {
            let mut command = download(input, &adapter.name, origin);
            command.word("--adapter");
            downloads.push(DownloadPlan { id: adapter.name.clone(), command });
        }
    }
    downloads
}

fn download(input: PlanInput<'_>, id: &str, origin: &HubOrigin) -> ChildCommand {
    let args = input.args;
    let mut command = ChildCommand::new(input, "download-weights");
    command.word(id);
    command.option("--revision", &origin.revision);
    command.option("--commit", &origin.commit);
    command.option("--logger-level", input.log_level);
    command.switch_if("--json-output", args.json_output);
    command.path_if("--huggingface-hub-cache", args.huggingface_hub_cache.as_ref());
    // Its level is on its command line.
    command.removed.push("LOG_LEVEL".into());
    command
}

pub(super) fn shard(input: PlanInput<'_>, values: &Values, rank: usize) -> ShardPlan {
    let args = input.args;
    let mut command = ChildCommand::new(input, "shard");
    command.word("serve");
    command.word(&values.model_directory.value);
    command.path("--uds-path", &values.socket_prefix.value);
    command.option("--logger-level", &values.log_level.value);
    command.switch_if("--json-output", args.json_output);
    command.option_if("--max-input-tokens", values.limits.max_input_tokens.value.given());
    command.option("--threads", values.shard_threads.value);
    command.switch_if("--sharded", values.shard_count.value > 1);
    command.option_if("--dtype", args.dtype.as_ref());
    command.option_if("--kv-cache-dtype", args.kv_cache_dtype.as_ref().filter(|dtype| !dtype.is_empty()));
    command.option("--step-timeout", values.recovery.step_timeout.value);
    command.switch_if("--batch-invariant", args.batch_invariant);
    command.option_if("--device", Some(&args.device).filter(|device| *device != "auto"));
    command.option_if("--load-format", Some(&args.load_format).filter(|format| *format != "auto"));
    command.option_if("--rope-scaling", args.rope_scaling.as_ref());
    command.option_if("--rope-factor", args.rope_factor);
    if input.model.source != ModelSource::Embedded {
        command.path_if("--weights-cache-override", args.weights_cache_override.as_ref());
    }

    command.variable("RANK", rank);
    command.variable("WORLD_SIZE", values.shard_count.value);
    command.variable("MASTER_ADDR", &args.master_addr);
    command.variable("MASTER_PORT", args.master_port);
    command.variable("CUDA_MEMORY_FRACTION", args.cuda_memory_fraction.unwrap_or(1.0));
    command.attention_variables(values);
    command.variable_if("WATERMARK_GAMMA", args.watermark_gamma);
    command.variable_if("WATERMARK_DELTA", args.watermark_delta);
    if args.enable_prefill_logprobs {
        command.variable("REQUEST_LOGPROBS", 1);
    }
    if !input.adapters.is_empty() {
        command.variable("LORA_ADAPTERS", adapters::list(input.adapters));
    }
    command.without_tokens();
    // A shard's level is on its command line.
    command.removed.push("LOG_LEVEL".into());
    ShardPlan { rank, socket: socket_path(&values.socket_prefix.value, rank), command }
}

pub(super) fn router(input: PlanInput<'_>, values: &Values, control: &Path) -> ChildCommand {
    let args = input.args;
    let limits = &values.limits;
    let mut command = ChildCommand::new(input, "router");
    command.option("--max-client-batch-size", args.max_client_batch_size);
    command.option("--max-concurrent-requests", args.max_concurrent_requests);
    command.option("--max-best-of", args.max_best_of);
    command.option("--max-stop-sequences", args.max_stop_sequences);
    command.option("--max-top-n-tokens", args.max_top_n_tokens);
    command.option("--max-batch-prefill-tokens", limits.max_batch_prefill_tokens.value);
    command.option("--waiting-served-ratio", args.waiting_served_ratio);
    command.option("--max-waiting-tokens", args.max_waiting_tokens);
    command.option("--validation-workers", args.validation_workers);
    command.option("--hostname", values.address.value.ip());
    command.option("--port", values.address.value.port());
    command.option("--prometheus-port", values.prometheus_port.value);
    command.path("--master-shard-uds-path", socket_path(&values.socket_prefix.value, 0));
    command.path("--tokenizer-name", &values.model_directory.value);
    command.option("--model-name", &values.model.value);
    command.option("--payload-limit", args.payload_limit);
    command.option("--graceful-termination-timeout", args.graceful_termination_timeout);
    command.path("--control-socket", control);
    command.option("--step-timeout", values.recovery.step_timeout.value);
    command.option("--max-step-stretch", values.max_step_stretch.value);

    command.option_if("--max-input-tokens", limits.max_input_tokens.value.given());
    command.option_if("--max-total-tokens", limits.max_total_tokens.value.given());
    command.option_if("--max-batch-total-tokens", limits.max_batch_total_tokens.value.given());
    command.option_if("--max-batch-size", args.max_batch_size);
    if let Some(path) = &args.tokenizer_config_path {
        command.path("--tokenizer-config-path", path);
    }
    for origin in &args.cors_allow_origin {
        command.option("--cors-allow-origin", origin);
    }
    command.switch_if("--disable-grammar-support", args.disable_grammar_support);
    command.switch_if("--allow-runtime-adapters", args.allow_runtime_adapters);
    command.switch_if("--json-output", args.json_output);

    command.without_tokens();
    command.attention_variables(values);
    command.variable("COMPUTE_TYPE", &values.compute_type.value);
    command.variable_if("LOG_LEVEL", input.variables.log_level.as_ref());
    // Argument lists can be read by every user of the machine, so the key goes another way.
    if let Some(key) = &args.api_key {
        command.variables.push(("API_KEY", EnvValue::Secret(key.clone())));
    }
    command
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Case, plan};
    use super::*;
    use crate::adapters::Adapter;

    fn line(command: &ChildCommand) -> String {
        command.arguments.iter().map(|word| word.to_str().unwrap()).collect::<Vec<_>>().join(" ")
    }

    fn variable<'a>(command: &'a ChildCommand, name: &str) -> Option<&'a str> {
        command.variables.iter().find(|(known, _)| *known == name).map(|(_, value)| value.reveal())
    }

    #[test]
    fn a_shard_gets_the_directory_the_socket_and_its_place() {
        let shard = &plan(&[]).shards[0];
        let expected = "--child-of 4711 shard serve /run/tgi/demo --uds-path /run/tgi/shard --logger-level INFO --threads 6 --step-timeout 60";
        assert_eq!(line(&shard.command), expected);
        assert_eq!(shard.command.program, PathBuf::from("/bin/launcher"));
        let place = ["RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "CUDA_MEMORY_FRACTION", "ATTENTION"];
        let values = place.map(|name| variable(&shard.command, name).unwrap());
        assert_eq!(values, ["0", "1", "localhost", "29500", "1", "paged"]);
        assert_eq!(variable(&shard.command, "REQUEST_LOGPROBS"), None);
        assert!(shard.command.removed.contains(&"LOG_LEVEL".into()));
    }

    #[test]
    fn a_shard_gets_what_was_asked_for() {
        let words = ["--max-input-tokens=7", "--cpu-threads=2", "--json-output", "--enable-prefill-logprobs"];
        let shard = &plan(&words).shards[0];
        assert!(line(&shard.command).ends_with(
            "--logger-level INFO --json-output --max-input-tokens 7 --threads 2 --step-timeout 60"
        ));
        assert_eq!(variable(&shard.command, "REQUEST_LOGPROBS"), Some("1"));

        let shard = &plan(&["--watermark-gamma=0.25", "--watermark-delta=1.5"]).shards[0];
        assert_eq!(variable(&shard.command, "WATERMARK_GAMMA"), Some("0.25"));
        assert_eq!(variable(&shard.command, "WATERMARK_DELTA"), Some("1.5"));
    }

    #[test]
    fn several_shards_differ_in_their_rank_and_share_the_threads() {
        let plan = plan(&["--num-shard=2", "--master-addr=host", "--master-port=1234"]);
        assert_eq!(plan.shards.len(), 2);
        for (rank, shard) in plan.shards.iter().enumerate() {
            assert_eq!(shard.rank, rank);
            assert!(
                line(&shard.command).ends_with("--threads 3 --sharded --step-timeout 60"),
                "{}",
                line(&shard.command)
            );
            let place = ["RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"];
            let values = place.map(|name| variable(&shard.command, name).unwrap());
            assert_eq!(values, [rank.to_string().as_str(), "2", "host", "1234"]);
            assert_eq!(shard.command.arguments, plan.shards[0].command.arguments);
        }
        assert_eq!(plan.group, PathBuf::from("/run/tgi/shard-group"));
    }

    #[test]
    fn the_router_gets_every_limit_and_both_names_of_the_model() {
        let expected = "--child-of 4711 router --max-client-batch-size 4 --max-concurrent-requests 128 --max-best-of 2 \
            --max-stop-sequences 4 --max-top-n-tokens 5 --max-batch-prefill-tokens 2048 --waiting-served-ratio 0.3 \
            --max-waiting-tokens 20 --validation-workers 2 --hostname 0.0.0.0 --port 3000 --prometheus-port 9000 \
            --master-shard-uds-path /run/tgi/shard-0 --tokenizer-name /run/tgi/demo --model-name demo \
            --payload-limit 2000000 --graceful-termination-timeout 90 --control-socket /run/tgi/control \
            --step-timeout 60 --max-step-stretch 2";
        let router = plan(&[]).router;
        assert_eq!(line(&router), expected);
        assert_eq!(variable(&router, "COMPUTE_TYPE"), Some("1-cpu"));
    }

    #[test]
    fn the_router_gets_optional_limits_only_when_they_are_set() {
        let words = [
            "--max-input-length=7",
            "--max-total-tokens=9",
            "--max-batch-total-tokens=99",
            "--max-batch-size=3",
            "--tokenizer-config-path=/t.json",
            "--cors-allow-origin=http://a",
            "--cors-allow-origin=http://b",
            "--disable-grammar-support",
            "--allow-runtime-adapters",
            "--json-output",
        ];
        let expected = "--max-input-tokens 7 --max-total-tokens 9 --max-batch-total-tokens 99 --max-batch-size 3 \
            --tokenizer-config-path /t.json --cors-allow-origin http://a --cors-allow-origin http://b \
            --disable-grammar-support --allow-runtime-adapters --json-output";
        let line = line(&plan(&words).router);
        assert!(line.ends_with(expected), "{line}");
    }

    #[test]
    fn the_router_hears_what_a_step_may_take() {
        let line = line(&plan(&["--step-timeout=0.5", "--max-step-stretch=0"]).router);
        assert!(line.ends_with("--step-timeout 0.5 --max-step-stretch 0"), "{line}");
    }

    #[test]
    fn both_kinds_of_children_hear_whether_prefixes_are_cached() {
        for (words, expected) in [(&[][..], "true"), (&["--prefix-caching=0"], "0")] {
            let plan = plan(words);
            for command in [&plan.router, &plan.shards[0].command] {
                assert_eq!(variable(command, "PREFIX_CACHING"), Some(expected));
            }
        }
    }

    #[test]
    fn adapters_of_the_hub_are_fetched_and_the_shards_get_all_directories() {
        let origin = |is_cached| {
            AdapterSource::Hub(HubOrigin {
                revision: "v1".to_owned(),
                commit: "c0ffee".to_owned(),
                is_cached,
            })
        };
        let adapter = |name: &str, directory: &str, source| Adapter {
            name: name.to_owned(),
            directory: directory.to_owned(),
            source,
        };
        let mut case = Case::new(&["--huggingface-hub-cache=/data"]);
        case.adapters = vec![
            adapter("poet", "/poet", AdapterSource::Directory { revision: None }),
            adapter("org/new", "/data/new", origin(false)),
            adapter("org/old", "/data/old", origin(true)),
        ];
        let plan = case.plan().unwrap();
        let list = "poet=/poet,org/new=/data/new,org/old=/data/old";
        assert_eq!(variable(&plan.shards[0].command, "LORA_ADAPTERS"), Some(list));
        assert_eq!(plan.values.adapters.value, list);
        let fetched: Vec<_> = plan.downloads.iter().map(|download| line(&download.command)).collect();
        let expected = "--child-of 4711 download-weights org/new --revision v1 --commit c0ffee --logger-level INFO \
            --huggingface-hub-cache /data --adapter";
        assert_eq!(fetched, [expected]);

        assert_eq!(variable(&self::plan(&[]).shards[0].command, "LORA_ADAPTERS"), None);
        case.adapters = vec![adapter("demo", "/poet", AdapterSource::Directory { revision: None })];
        let error = case.plan().unwrap_err().to_string();
        assert!(error.starts_with("--lora-adapters: `demo` is the name of the model"), "{error}");
    }

    #[test]
    fn the_key_reaches_the_router_and_nobody_else_and_no_argument_list() {
        let plan = plan(&["--api-key=hush"]);
        assert_eq!(variable(&plan.router, "API_KEY"), Some("hush"));
        assert_eq!(variable(&plan.shards[0].command, "API_KEY"), None);
        assert!(plan.shards[0].command.removed.contains(&"API_KEY".into()));
        assert!(!line(&plan.router).contains("hush") && !format!("{plan:?}").contains("hush"));
    }

    #[test]
    fn the_router_hears_the_whole_log_filter_and_the_shards_its_level() {
        let mut case = Case::new(&[]);
        case.variables.log_level = Some("router=debug,h2=warn".into());
        let plan = case.plan().unwrap();
        assert_eq!(variable(&plan.router, "LOG_LEVEL"), Some("router=debug,h2=warn"));
        assert!(line(&plan.shards[0].command).contains("--logger-level INFO"));
    }
}
