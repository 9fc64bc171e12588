//! Flags whose subject does not exist in this version: refused when leaving it out would change answers or security,
//! otherwise accepted with a warning.

use std::ffi::OsStr;

use super::checks::PlanError;
use super::values::Values;
use super::{PlanInput, TokenLimit};
use crate::adapters::AdapterSource;
use crate::args::Args;
use crate::model::ModelSource;

/// Errors when a flag asks for something that changes answers or security and is not there.
pub(super) fn refuse(args: &Args) -> Result<(), PlanError> {
    let asked = [
        ("--quantize", args.quantize.clone(), "quantized weights"),
        ("--ngrok", args.ngrok.then(|| "true".to_owned()), "through a tunnel"),
    ];
    for (flag, value, what) in asked {
        // An empty variable, as container files like to set them, asks for nothing.
        if let Some(value) = value.filter(|value| !value.is_empty()) {
            return Err(PlanError::NotServed { flag: format!("{flag} {value}"), what });
        }
    }
    Ok(())
}

/// What the user should know, one line each: flags without effect first, then doubtful values.
pub(super) fn warnings(input: PlanInput<'_>, values: &Values) -> Vec<String> {
    let mut warnings = without_effect(input);
    let args = input.args;
    if let Some(warning) = &values.address_warning {
        warnings.push(warning.clone());
    }
    if args.port == args.prometheus_port && args.port != 0 {
        warnings.push(format!(
            "--port and --prometheus-port are both {}: the metrics are at /metrics of the HTTP API only",
            args.port
        ));
    }
    if let (TokenLimit::Given(total), Some((positions, key))) =
        (values.limits.max_total_tokens.value, input.model.config.position_count)
        && total > positions
    {
        warnings.push(format!(
            "--max-total-tokens {total} is more than the {positions} positions of the model ({key})"
        ));
    }
    if args.allow_runtime_adapters && args.api_key.is_none() {
        warnings.push(
            "--allow-runtime-adapters without --api-key: whoever reaches the port can load what is in this \
            machine's directories"
                .to_owned(),
        );
    }
    for adapter in input.adapters {
        if let AdapterSource::Directory { revision: Some(revision) } = &adapter.source {
            warnings.push(format!(
                "--lora-adapters: the revision `{revision}` of `{}` has no effect: it is in a directory",
                adapter.name
            ));
        }
    }
    if values.shard_count.value > values.cpu_threads.value {
        warnings.push(format!(
            "{} shards are more than the {} threads that compute: they will wait for each other",
            values.shard_count.value, values.cpu_threads.value
        ));
    }
    if let Some(memory) = input.machine.memory_bytes
        && values.weights.value.0 > memory
    {
        warnings.push(format!(
            "the weights have {}, more than the {} of memory this process may use",
            values.weights.value, values.memory.value
        ));
    }
    warnings
}

fn without_effect(input: PlanInput<'_>) -> Vec<String> {
    let args = input.args;
    let source = &input.model.source;
    let local = !matches!(source, ModelSource::Hub(_));
    let adapters_local =
        !input.adapters.iter().any(|adapter| matches!(adapter.source, AdapterSource::Hub(_)));
    let flags = [
        ("--trust-remote-code", args.trust_remote_code, "no code from a model's repository is ever run"),
        ("--speculate", args.speculate.is_some_and(|count| count > 0), "this version does not speculate"),
        ("--revision", local && given(args.revision.as_ref()), "the model is not of the Hub"),
        (
            "--huggingface-hub-cache",
            local && adapters_local && given(args.huggingface_hub_cache.as_ref()),
            "nothing is of the Hub",
        ),
        (
            "--weights-cache-override",
            source == &ModelSource::Embedded && given(args.weights_cache_override.as_ref()),
            "the demo model has its own weights",
        ),
        ("--cuda-graphs", args.cuda_graphs.is_some(), "this version captures no graphs"),
        ("--disable-custom-kernels", args.disable_custom_kernels, "there are no such kernels"),
        (
            "--enable-prefill-logprobs",
            args.enable_prefill_logprobs,
            "log-probabilities of the prompt are always allowed",
        ),
        ("--otlp-endpoint", args.otlp_endpoint.is_some(), "this version sends no traces"),
        ("--otlp-service-name", args.otlp_service_name.is_some(), "this version sends no traces"),
        ("--ngrok-authtoken", args.ngrok_authtoken.is_some(), "it needs --ngrok"),
        ("--ngrok-edge", args.ngrok_edge.is_some(), "it needs --ngrok"),
        (
            "--usage-stats",
            args.usage_stats.as_deref().is_some_and(|mode| mode != "off"),
            "nothing is ever sent",
        ),
    ];
    let mut warnings: Vec<String> = flags
        .into_iter()
        .filter(|(_, set, _)| *set)
        .map(|(flag, _, why)| format!("{flag} has no effect: {why}"))
        .collect();

    let variables = input.variables;
    if let (None, Some(threads)) = (variables.thread_count(), &variables.omp_num_threads) {
        warnings.push(format!("OMP_NUM_THREADS={threads} has no effect: it is not a positive number"));
    }
    if let Some(attention) = variables.attention.as_deref().filter(|attention| *attention != "paged") {
        warnings.push(format!("ATTENTION={attention} has no effect: there is `paged` only"));
    }
    warnings
}

/// An empty variable asks for nothing.
fn given(value: Option<impl AsRef<OsStr>>) -> bool {
    value.is_some_and(|value| !value.as_ref().is_empty())
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Case, plan, refusal};
    use crate::adapters::{Adapter, AdapterSource};

    #[test]
    fn what_would_change_answers_or_security_is_refused_by_name() {
        let line = refusal(&["--quantize", "gptq"]);
        assert!(line.starts_with("--quantize gptq: this version does not serve "), "{line}");
        assert!(refusal(&["--ngrok", "--ngrok-authtoken=t", "--ngrok-edge=e"]).starts_with("--ngrok true: "));
    }

    #[test]
    fn what_asks_for_nothing_special_is_fine() {
        let words = ["--num-shard=1", "--sharded=false", "--speculate=0", "--revision=", "--usage-stats=off"];
        assert_eq!(plan(&words).warnings, Vec::<String>::new());
    }

    #[test]
    fn every_flag_without_effect_is_one_warning() {
        let words = [
            "--trust-remote-code",
            "--speculate=2",
            "--revision=main",
            "--huggingface-hub-cache=/data",
            "--weights-cache-override=/w",
            "--cuda-graphs=0",
            "--disable-custom-kernels",
            "--enable-prefill-logprobs",
            "--otlp-endpoint=http://a",
            "--otlp-service-name=tgi",
            "--ngrok-authtoken=t",
            "--ngrok-edge=e",
            "--usage-stats=no-stack",
        ];
        let warnings = plan(&words).warnings;
        assert_eq!(warnings.len(), words.len());
        for (word, warning) in words.iter().zip(&warnings) {
            let flag = word.split('=').next().unwrap();
            assert!(warning.starts_with(&format!("{flag} has no effect: ")), "{warning}");
        }
    }

    #[test]
    fn an_attention_that_is_not_there_is_a_warning() {
        let mut case = Case::new(&[]);
        case.variables.attention = Some("flashinfer".into());
        let warning = "ATTENTION=flashinfer has no effect: there is `paged` only";
        assert_eq!(case.plan().unwrap().warnings, [warning]);
    }

    #[test]
    fn a_thread_variable_that_is_no_number_is_a_warning() {
        let mut case = Case::new(&[]);
        case.variables.omp_num_threads = Some("all".into());
        let plan = case.plan().unwrap();
        assert_eq!(plan.values.cpu_threads.value, 6);
        assert_eq!(plan.warnings, ["OMP_NUM_THREADS=all has no effect: it is not a positive number"]);
    }

    #[test]
    fn adapters_that_anybody_may_load_are_a_warning() {
        let warnings = plan(&["--allow-runtime-adapters"]).warnings;
        assert!(warnings[0].starts_with("--allow-runtime-adapters without --api-key"), "{warnings:?}");
        assert_eq!(plan(&["--allow-runtime-adapters", "--api-key=k"]).warnings, Vec::<String>::new());
    }

    #[test]
    fn a_revision_of_a_directory_is_a_warning() {
        let mut case = Case::new(&[]);
        case.adapters = vec![Adapter {
            name: "poet".to_owned(),
            directory: "/poet".to_owned(),
            source: AdapterSource::Directory { revision: Some("v1".to_owned()) },
        }];
        let warning = "--lora-adapters: the revision `v1` of `poet` has no effect: it is in a directory";
        assert_eq!(case.plan().unwrap().warnings, [warning]);
    }

    #[test]
    fn doubtful_values_are_warnings() {
        let warnings = plan(&["--max-total-tokens=4096", "--port=9000"]).warnings;
        assert!(warnings[0].contains("both 9000"), "{warnings:?}");
        assert!(warnings[1].contains("4096 is more than the 2048 positions"), "{warnings:?}");

        let warnings = plan(&["--num-shard=4", "--cpu-threads=3"]).warnings;
        assert!(warnings[0].contains("4 shards are more than the 3 threads"), "{warnings:?}");

        let mut case = Case::new(&[]);
        case.machine.memory_bytes = Some(1 << 20);
        let warnings = case.plan().unwrap().warnings;
        assert!(warnings[0].contains("more than the 1.0 MiB of memory"), "{warnings:?}");
    }
}
