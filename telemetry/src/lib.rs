//! Logs of every process, in one format: lines for people, or one JSON object per line.
//!
//! What is absent: metrics (they are the router's, `router/src/metrics.rs`) and any reading of the environment (each
//! process passes what its configuration says).

use std::io::IsTerminal;

pub mod progress;

use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::format::FmtSpan;

/// How log lines look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    /// Timestamp, level, spans, message, fields; coloured on a terminal.
    Text,
    /// One object per line, fields at top level.
    Json,
}

/// The crates whose lines `warn`, `info` and `debug` mean; other crates speak only when a full filter names them.
const OURS: [&str; 6] = ["text_generation_launcher", "launcher", "router", "shard", "hub", "telemetry"];

/// Starts logging to standard output. To be called once, by `main`.
///
/// `level` is `trace`, `debug`, `info`, `warn`, `error` or `off` for our own crates, or a full filter expression such as
/// `router=debug,h2=warn`. `no_color` is what the `NO_COLOR` convention says.
///
/// Errors when `level` is neither.
pub fn init(format: LogFormat, level: &str, no_color: bool) -> Result<(), String> {
    let filter = filter(level)?;
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_span_events(FmtSpan::NONE);
    let done = match format {
        LogFormat::Text => builder.with_ansi(!no_color && std::io::stdout().is_terminal()).try_init(),
        LogFormat::Json => builder.json().flatten_event(true).try_init(),
    };
    done.map_err(|error| error.to_string())
}

fn filter(level: &str) -> Result<EnvFilter, String> {
    let word = match level.to_ascii_lowercase().as_str() {
        "" => "info".to_owned(),
        "warning" => "warn".to_owned(),
        word => word.to_owned(),
    };
    let expression = match word.as_str() {
        "trace" | "debug" | "info" | "warn" | "error" | "off" => {
            OURS.map(|name| format!("{name}={word}")).join(",")
        }
        word if !word.contains(['=', ',']) => {
            return Err(format!("log level `{level}`: neither a level nor a filter such as `router=debug`"));
        }
        // The router's name in the filters of those who come from TGI.
        _ => level.replace("text_generation_router", "router"),
    };
    EnvFilter::try_new(&expression).map_err(|error| format!("log level `{level}`: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_level_word_means_our_own_crates() {
        let filter = filter("WARNING").unwrap().to_string();
        for name in OURS {
            assert!(filter.contains(&format!("{name}=warn")), "{filter}");
        }
    }

    #[test]
    fn anything_else_is_a_filter_expression() {
        assert!(filter("router=debug,h2=warn").unwrap().to_string().contains("h2=warn"));
        assert!(filter("text_generation_router=debug").unwrap().to_string().contains("router=debug"));
        assert!(filter("router=loud").is_err());
        assert!(filter("bogus").is_err());
    }
}
