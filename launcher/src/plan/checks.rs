//! Arguments that contradict each other or the system, before anything is derived from them.

use std::path::PathBuf;

use shard::config::SHARDS_MAX;

use super::{PlanInput, unserved};
use crate::args::Args;
use crate::secret::Secret;

/// Why there is no plan.
#[derive(Debug, PartialEq, thiserror::Error)]
pub enum PlanError {
    /// Both names of one flag.
    #[error("--max-input-tokens and --max-input-length are the same; set one of them")]
    InputTwice,
    /// The first of two quantities has to be smaller than the second.
    #[error("{small} {small_value} must be less than {large} {large_value}")]
    NotLess {
        /// The flag that has to be smaller.
        small: &'static str,
        /// Its value.
        small_value: u32,
        /// The flag that has to be larger.
        large: &'static str,
        /// Its value.
        large_value: u32,
    },
    /// The first of two quantities must not be larger than the second.
    #[error("{small} {small_value} must not be more than {large} {large_value}")]
    More {
        /// The flag that must not be larger.
        small: &'static str,
        /// Its value.
        small_value: u32,
        /// The flag that bounds it.
        large: &'static str,
        /// Its value.
        large_value: u32,
    },
    /// A quantity beyond all sense, which would only make trouble later.
    #[error("{flag} {value} is more than this version takes, {max}")]
    TooMany {
        /// The flag.
        flag: &'static str,
        /// Its value.
        value: u64,
        /// The largest possible.
        max: u64,
    },
    /// A quantity that cannot be nothing.
    #[error("{0} must be at least 1")]
    Zero(&'static str),
    /// A split into one part.
    #[error("--sharded true needs more than one shard, but --num-shard is 1")]
    OneShard,
    /// A split over all devices, of which there are not two.
    #[error("--sharded true needs more than one device: {reason}")]
    TooFewDevices {
        /// What the environment says of devices.
        reason: String,
    },
    /// A key that anybody could guess.
    #[error("--api-key (API_KEY) is empty; leave it out to serve without a key")]
    EmptyApiKey,
    /// A part of the list of adapters that is no adapter.
    #[error(
        "--lora-adapters: `{item}`: {problem}; an adapter is `id`, `id@revision`, `name=/directory` or \
        `name=/directory@revision`"
    )]
    Adapter {
        /// The part.
        item: String,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// A name that would mean two adapters.
    #[error("--lora-adapters: `{0}` is there twice")]
    AdapterTwice(String),
    /// A name that would mean the adapter and the model without it.
    #[error(
        "--lora-adapters: `{0}` is the name of the model; give the adapter another one, as in name=/directory"
    )]
    AdapterIsModel(String),
    /// A tunnel without what it needs.
    #[error("--ngrok needs --ngrok-authtoken and --ngrok-edge")]
    NgrokIncomplete,
    /// What would change answers or security, and does not exist in this version.
    #[error("{flag}: this version does not serve {what}")]
    NotServed {
        /// The flag, with its value where it has one.
        flag: String,
        /// What the flag asks for.
        what: &'static str,
    },
    /// The system has a limit for the names of sockets.
    #[error("the socket path {} has {bytes} bytes, the system takes {max}; set a shorter {flag}", path.display())]
    SocketPathTooLong {
        /// The path.
        path: PathBuf,
        /// Its length.
        bytes: usize,
        /// The longest possible.
        max: usize,
        /// What sets it.
        flag: &'static str,
    },
}

impl PlanError {
    /// The name that TGI's launcher has for it.
    pub fn name(&self) -> &'static str {
        match self {
            Self::TooFewDevices { .. } => "NotEnoughCUDADevices",
            _ => "ArgumentValidation",
        }
    }
}

/// Checks what can be wrong whatever is derived.
pub(super) fn check(input: PlanInput<'_>) -> Result<(), PlanError> {
    let args = input.args;
    if args.max_input_tokens.is_some() && args.max_input_length.is_some() {
        return Err(PlanError::InputTwice);
    }
    if args.api_key.as_ref().map(Secret::reveal) == Some("") {
        return Err(PlanError::EmptyApiKey);
    }
    if args.ngrok && (args.ngrok_authtoken.is_none() || args.ngrok_edge.is_none()) {
        return Err(PlanError::NgrokIncomplete);
    }
    check_zeros(args)?;
    check_sizes(args)?;
    check_order(args)?;
    let name = &input.model.id;
    if input.adapters.iter().any(|adapter| adapter.name == *name) {
        return Err(PlanError::AdapterIsModel(name.clone()));
    }
    unserved::refuse(args)
}

fn check_zeros(args: &Args) -> Result<(), PlanError> {
    let quantities = [
        ("--num-shard", args.num_shard),
        ("--cpu-threads", args.cpu_threads),
        ("--validation-workers", Some(args.validation_workers)),
        ("--max-batch-size", args.max_batch_size),
        ("--max-concurrent-requests", Some(args.max_concurrent_requests)),
        ("--max-client-batch-size", Some(args.max_client_batch_size)),
    ];
    let tokens = [
        ("--max-input-tokens", args.max_input_tokens.or(args.max_input_length)),
        ("--max-total-tokens", args.max_total_tokens),
        ("--max-batch-prefill-tokens", args.max_batch_prefill_tokens),
        ("--max-batch-total-tokens", args.max_batch_total_tokens),
    ];
    let zero = quantities.iter().find(|(_, value)| *value == Some(0)).map(|(flag, _)| *flag);
    match zero.or_else(|| tokens.iter().find(|(_, value)| *value == Some(0)).map(|(flag, _)| *flag)) {
        Some(flag) => Err(PlanError::Zero(flag)),
        None => Ok(()),
    }
}

/// Most threads of one kind.
const THREADS_MAX: u64 = 1024;

/// Most prompt tokens of one pass: beyond any model's context, and the warm-up makes prompts of this size.
const PREFILL_TOKENS_MAX: u64 = 1 << 20;

/// What the router counts in 32 bits.
const COUNT_MAX: u64 = u32::MAX as u64;

fn check_sizes(args: &Args) -> Result<(), PlanError> {
    let quantities = [
        ("--num-shard", args.num_shard.map(|count| count as u64), SHARDS_MAX as u64),
        ("--cpu-threads", args.cpu_threads.map(|count| count as u64), THREADS_MAX),
        ("--validation-workers", Some(args.validation_workers as u64), THREADS_MAX),
        ("--max-batch-prefill-tokens", args.max_batch_prefill_tokens.map(u64::from), PREFILL_TOKENS_MAX),
        ("--max-best-of", Some(args.max_best_of as u64), COUNT_MAX),
        ("--max-stop-sequences", Some(args.max_stop_sequences as u64), COUNT_MAX),
        ("--max-client-batch-size", Some(args.max_client_batch_size as u64), COUNT_MAX),
        ("--max-waiting-tokens", Some(args.max_waiting_tokens as u64), COUNT_MAX),
    ];
    for (flag, value, max) in quantities {
        if let Some(value) = value.filter(|value| *value > max) {
            return Err(PlanError::TooMany { flag, value, max });
        }
    }
    Ok(())
}

fn check_order(args: &Args) -> Result<(), PlanError> {
    let input = ("--max-input-tokens", args.max_input_tokens.or(args.max_input_length));
    let total = ("--max-total-tokens", args.max_total_tokens);
    let prefill = ("--max-batch-prefill-tokens", args.max_batch_prefill_tokens);
    let batch_total = ("--max-batch-total-tokens", args.max_batch_total_tokens);

    if let ((small, Some(small_value)), (large, Some(large_value))) = (input, total)
        && small_value >= large_value
    {
        return Err(PlanError::NotLess { small, small_value, large, large_value });
    }
    for bounded in [total, prefill] {
        if let ((small, Some(small_value)), (large, Some(large_value))) = (bounded, batch_total)
            && small_value > large_value
        {
            return Err(PlanError::More { small, small_value, large, large_value });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use crate::plan::testing::{plan, refusal};

    #[test]
    fn both_names_of_the_longest_prompt_are_one_too_many() {
        let line = refusal(&["--max-input-tokens=5", "--max-input-length=5"]);
        assert!(line.contains("--max-input-tokens and --max-input-length"), "{line}");
    }

    #[test]
    fn limits_that_contradict_each_other_are_named_with_their_values() {
        let cases: [(&[&str], &str); 4] = [
            (
                &["--max-input-tokens=10", "--max-total-tokens=10"],
                "--max-input-tokens 10 must be less than --max-total-tokens 10",
            ),
            (
                &["--max-input-length=11", "--max-total-tokens=10"],
                "--max-input-tokens 11 must be less than --max-total-tokens 10",
            ),
            (
                &["--max-total-tokens=20", "--max-batch-total-tokens=10"],
                "--max-total-tokens 20 must not be more than --max-batch-total-tokens 10",
            ),
            (
                &["--max-batch-prefill-tokens=20", "--max-batch-total-tokens=10"],
                "--max-batch-prefill-tokens 20 must not be more than --max-batch-total-tokens 10",
            ),
        ];
        for (words, expected) in cases {
            assert_eq!(refusal(words), expected);
        }
        plan(&["--max-input-tokens=9", "--max-total-tokens=10", "--max-batch-total-tokens=10"]);
    }

    #[test]
    fn nothing_is_no_quantity() {
        for flag in
            ["--validation-workers", "--num-shard", "--cpu-threads", "--max-batch-size", "--max-total-tokens"]
        {
            assert_eq!(refusal(&[&format!("{flag}=0")]), format!("{flag} must be at least 1"));
        }
    }

    #[test]
    fn there_is_a_largest_number_of_shards() {
        plan(&["--num-shard=64"]);
        assert_eq!(refusal(&["--num-shard=65"]), "--num-shard 65 is more than this version takes, 64");
    }

    #[test]
    fn an_empty_key_protects_nothing() {
        assert!(refusal(&["--api-key="]).contains("--api-key (API_KEY) is empty"));
    }

    #[test]
    fn a_tunnel_needs_its_token_and_its_edge() {
        assert!(refusal(&["--ngrok", "--ngrok-edge=e"]).contains("--ngrok-authtoken"));
    }
}
