//! HTTP in, batches out.
//!
//! A request meets, in this order:
//!
//! 1. `http/`: the layers and the route table; bodies become typed requests, without decisions.
//! 2. `chat/`: messages become a prompt, by the model's own template.
//! 3. `infer.rs`: a permit, or 429 at once; the permit lives as long as the stream.
//! 4. `request/` with `text/`: raw parameters and text become a [`request::ValidRequest`].
//! 5. [`batching`] with [`cache`]: the task that owns queue, blocks and the running batch decides every step.
//! 6. [`shards`]: one plan becomes the calls of the contract, to every rank.
//! 7. `http/sse.rs`, or one body: events go to the client; [`metrics`] and one log line tell of it.
//!
//! Around them: `config.rs` (flags and environment, read nowhere else), `limits.rs` (what user and shards agree on),
//! [`adapters`] (which LoRA adapters requests can name), [`availability`] (whether requests can be served, and why not),
//! [`supervisor`] (the launcher, which starts shards again) and `app.rs` (builds the parts, serves, drains).
//!
//! What is absent:
//!
//! - Nothing behind `request/` holds a request against the user's limits again; the scheduler only refuses what the
//!   shards could never run. Nothing before `request/` knows blocks or batches.
//! - The scheduler does no I/O; handlers make no decisions; templates and tokenizers know nothing of HTTP.
//! - Status codes are in `http/error.rs` alone, and names of metrics in `metrics.rs` alone.
//! - No client is waited for: a request's channel is as deep as its answer, and a closed one frees its row.
//! - Tokens become text in the shards. The router has the tokenizer for prompts only.

use std::ffi::OsString;
use std::process::ExitCode;

use clap::Parser as _;

use self::config::{Args, Config};

pub mod adapters;
mod app;
pub mod availability;
pub mod batching;
pub mod cache;
mod chat;
mod config;
mod http;
mod infer;
mod limits;
pub mod metrics;
pub mod request;
pub mod shards;
pub mod supervisor;
mod text;

/// Runs the router as its command line says, the name of the program first, until a signal stops it.
///
/// The code is 0 after a signal and after `--help`, 2 for arguments that cannot be parsed, 1 for every other error, which
/// is one line on standard error.
pub fn run_from(arguments: impl IntoIterator<Item = OsString>) -> ExitCode {
    let args = match Args::try_parse_from(arguments) {
        Ok(args) => args,
        Err(error) => {
            // With standard error closed there is nobody to tell.
            let _ = error.print();
            return ExitCode::from(error.exit_code() as u8);
        }
    };
    match serve(args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("Error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn serve(args: Args) -> anyhow::Result<()> {
    let config = Config::new(args)?;
    telemetry::init(config.logs.format, &config.logs.level, config.logs.no_color)
        .map_err(anyhow::Error::msg)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    Ok(runtime.block_on(app::run(config))?)
}
