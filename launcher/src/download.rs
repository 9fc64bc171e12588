//! `download-weights`: fetches a model or an adapter from the Hub into the cache, and ends. The launcher starts it before
//! the shards; people start it to fill a cache ahead of time. SIGTERM and SIGINT end it at once: what has come stays,
//! and the next download goes on from there.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Parser;
use hub::{Hub, HubConfig, Kind, Order, Source, WeightPlace};
use telemetry::LogFormat;
use telemetry::progress::ProgressStyle;
use tracing::info;

use crate::error::LaunchError;
use crate::model::Model;

/// Fetches what it takes to serve a model of the Hub: configuration, tokenizer, templates and weights.
#[derive(Debug, Parser)]
#[command(version)]
struct Args {
    /// The model's id on the Hub. A directory is checked for being complete.
    model_id: String,
    /// Branch, tag, commit or `refs/pr/N` [default: main].
    #[arg(long)]
    revision: Option<String>,
    /// Ending of the weight files; with the default, `.bin` files are taken where there are no others.
    #[arg(long, default_value = hub::SAFETENSORS, value_parser = extension)]
    extension: String,
    /// The repository is a LoRA adapter, also where it holds a whole model as well.
    #[arg(long)]
    adapter: bool,
    /// Cache directory [default: HF_HUB_CACHE, or else below HF_HOME].
    #[arg(long, env)]
    huggingface_hub_cache: Option<PathBuf>,
    /// Flat directory that holds the weight files already; everything else is fetched.
    #[arg(long, env)]
    weights_cache_override: Option<PathBuf>,
    /// Leave the weights out: they are not needed.
    #[arg(long, conflicts_with = "weights_cache_override")]
    without_weights: bool,
    /// Level of the log, or a filter such as `hub=debug`.
    #[arg(long, default_value = "INFO")]
    logger_level: String,
    /// Log one JSON object per line.
    #[arg(long)]
    json_output: bool,
    /// Accepted, without effect: no code from a repository is ever run.
    #[arg(long)]
    trust_remote_code: bool,
    /// The commit that the revision is known to be.
    #[arg(long, hide = true)]
    commit: Option<String>,
}

fn extension(text: &str) -> Result<String, String> {
    let rest = text.strip_prefix('.').unwrap_or(text);
    if rest.is_empty() || !rest.bytes().all(|byte| byte.is_ascii_alphanumeric()) {
        return Err("must be a dot and letters, such as .safetensors".to_owned());
    }
    Ok(format!(".{rest}"))
}

/// Runs the download as if started with these arguments, the program's name first. Ends the process for `--help`,
/// `--version` and arguments that do not parse.
pub fn run_from(arguments: impl IntoIterator<Item = OsString>) -> ExitCode {
    match download(&Args::parse_from(arguments)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("Error: {error}");
            ExitCode::from(error.exit_code())
        }
    }
}

fn download(args: &Args) -> Result<(), LaunchError> {
    let format = if args.json_output { LogFormat::Json } else { LogFormat::Text };
    telemetry::init(format, &args.logger_level, crate::env::no_color()).map_err(LaunchError::LogLevel)?;
    let weights = args.weights_cache_override.clone().filter(|path| !path.as_os_str().is_empty());
    if Path::new(&args.model_id).exists() {
        let model = Model::open(&args.model_id, weights.as_deref().into())?;
        info!("All files of `{}` are in {}", model.id, model.directory.display());
        return Ok(());
    }
    let config = HubConfig::from_env(args.huggingface_hub_cache.as_deref());
    let config = config.map_err(|error| LaunchError::Variable(error.to_string()))?;
    let order = Order {
        kind: args.adapter.then_some(Kind::Adapter),
        commit: args.commit.clone(),
        extension: args.extension.clone(),
        weights: match weights {
            _ if args.without_weights => WeightPlace::Nowhere,
            Some(directory) => WeightPlace::Directory(directory),
            None => WeightPlace::Repository,
        },
        progress: ProgressStyle::fitting(format),
    };
    let source = Source::new(&args.model_id, args.revision.as_deref())?;
    let directory = Hub::new(config)?.fetch(&source, &order)?;
    info!("{source} is complete in {}", directory.display());
    Ok(())
}
