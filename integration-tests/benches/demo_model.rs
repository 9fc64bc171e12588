//! The demo model as its user meets it: time to ready, tokens per second alone and with 16 clients, through HTTP.
//!
//! `cargo bench -p integration-tests` prints minimum, median and maximum of several runs.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use futures::future::try_join_all;
use integration_tests::stack::{Stack, endless};

/// Counted runs of each figure.
const RUNS: usize = 9;

/// Tokens of one stream.
const TOKENS: u32 = 1000;

#[tokio::main]
async fn main() -> Result<()> {
    let mut ready = Vec::new();
    for _ in 0..RUNS {
        ready.push(Stack::demo().await?.ready_in.as_secs_f64() * 1000.0);
    }
    print("time to ready", "ms", &mut ready);

    let stack = Stack::demo().await?;
    measure(&stack, 1).await?; // warms up
    let mut first = Vec::new();
    for clients in [1, 16] {
        let mut rates = Vec::new();
        for _ in 0..RUNS {
            let run = measure(&stack, clients).await?;
            rates.push(run.tokens_per_second);
            first.push(run.first_token.as_secs_f64() * 1000.0);
        }
        print(&format!("decoding, {clients} client(s)"), "tokens/s", &mut rates);
        print(&format!("first token, {clients} client(s)"), "ms", &mut std::mem::take(&mut first));
    }
    Ok(())
}

/// One run of several clients at once.
struct Run {
    /// Of all clients together, from the first request to the last token.
    tokens_per_second: f64,
    /// The longest wait for a first token.
    first_token: Duration,
}

async fn measure(stack: &Stack, clients: u64) -> Result<Run> {
    let begin = Instant::now();
    let firsts = try_join_all((0..clients).map(|_| stream(stack))).await?;
    let tokens = clients as f64 * f64::from(TOKENS);
    let first_token = firsts.into_iter().max().context("at least one client")?;
    Ok(Run { tokens_per_second: tokens / begin.elapsed().as_secs_f64(), first_token })
}

/// Reads one stream to its end; the time to its first token.
async fn stream(stack: &Stack) -> Result<Duration> {
    let begin = Instant::now();
    let mut stream = stack.client().stream("/v1/chat/completions", &endless(TOKENS)).await?;
    let mut tokens = 0;
    let mut first = Duration::ZERO;
    while let Some(event) = stream.next().await?.filter(|event| event != "[DONE]") {
        if tokens == 0 {
            first = begin.elapsed();
        }
        tokens += 1;
        anyhow::ensure!(event.contains("\"choices\""), "{event}");
    }
    anyhow::ensure!(tokens == TOKENS, "a stream ended after {tokens} tokens");
    Ok(first)
}

fn print(what: &str, unit: &str, values: &mut [f64]) {
    values.sort_by(f64::total_cmp);
    let (low, middle, high) = (values[0], values[values.len() / 2], values[values.len() - 1]);
    println!("{what:<24} {low:>9.1} {middle:>9.1} {high:>9.1} {unit} (min, median, max of {})", values.len());
}
