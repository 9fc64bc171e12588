//! What the scheduler is for, measured through HTTP with the demo model: the next turn of a long chat, many requests in
//! little memory, and a long prompt beside running streams.
//!
//! `cargo bench -p integration-tests --bench scheduling`, or with `-- chat`, `-- concurrency`, `-- recovery` or
//! `-- long_prompt` only that figure. With `BASELINE_LAUNCHER` set to another launcher, such as one of
//! an earlier version, the second figure is measured with that one too.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use futures::future::try_join_all;
use integration_tests::stack::{Stack, endless};
use nix::sys::signal::{Signal, kill};
use serde_json::{Value, json};
use tokio::time::sleep;

/// Counted runs of each figure.
const RUNS: usize = 5;

/// The positions that the demo model claims to have here. Beyond its own it talks nonsense, at the same speed.
const POSITIONS: u32 = 32_768;

/// Sizes of a model with a step of usual length.
const LARGER: [(&str, u32); 4] = [
    ("hidden_size", 768),
    ("intermediate_size", 2048),
    ("num_hidden_layers", 6),
    ("num_attention_heads", 12),
];

#[tokio::main]
async fn main() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let model = directory.path().to_str().context("a path that is text")?;
    far_sighted(directory.path(), &[])?;
    let figures: Vec<String> = std::env::args().skip(1).filter(|word| !word.starts_with('-')).collect();
    let wanted = |name: &str| figures.is_empty() || figures.iter().any(|figure| figure == name);
    if wanted("chat") {
        chat().await?;
    }
    if wanted("concurrency") {
        concurrency(model).await?;
    }
    if wanted("recovery") {
        recovery(model).await?;
    }
    if wanted("long_prompt") {
        // With 40 million parameters. The demo model's own step is shorter than it takes to read 16,000 keys.
        far_sighted(directory.path(), &LARGER)?;
        long_prompt(model).await?;
    }
    Ok(())
}

/// The demo model, with more positions, and other sizes if its weights are to be made up.
fn far_sighted(directory: &Path, sizes: &[(&str, u32)]) -> Result<()> {
    let demo = Path::new(env!("CARGO_MANIFEST_DIR")).join("../launcher/demo/model");
    for entry in std::fs::read_dir(&demo)? {
        let entry = entry?;
        std::fs::copy(entry.path(), directory.join(entry.file_name()))?;
    }
    let path = directory.join("config.json");
    let mut config: Value = serde_json::from_slice(&std::fs::read(&path)?)?;
    config["max_position_embeddings"] = json!(POSITIONS);
    sizes.iter().for_each(|(name, size)| config[*name] = json!(size));
    Ok(std::fs::write(path, config.to_string())?)
}

/// Time to the first token of the twentieth turn of a chat.
async fn chat() -> Result<()> {
    for (name, arguments) in
        [("prefix cache on", &[][..]), ("prefix cache off", &["--prefix-caching", "false"][..])]
    {
        let stack = Stack::start(arguments).await?;
        let mut times = Vec::new();
        let mut usage = Value::Null;
        for run in 0..RUNS {
            let mut messages = Vec::new();
            for turn in 0..20 {
                let text = format!(
                    "Run {run}. What is {turn} plus {}? {}",
                    run + 3,
                    "Tell me more about it. ".repeat(4)
                );
                messages.push(json!({"role": "user", "content": text}));
                let body = json!({
                    "messages": messages, "max_tokens": 30, "temperature": 0, "stream": true,
                    "stream_options": {"include_usage": true},
                });
                let (first, answer, counts) = turn_of_a_chat(&stack, &body).await?;
                messages.push(json!({"role": "assistant", "content": answer}));
                if turn == 19 {
                    times.push(first.as_secs_f64() * 1000.0);
                    usage = counts;
                }
            }
        }
        print(&format!("first token of turn 20, {name}"), "ms", &mut times);
        println!("    usage of the last one: {usage}");
    }
    Ok(())
}

/// Time to the first token, the text, and the usage.
async fn turn_of_a_chat(stack: &Stack, body: &Value) -> Result<(Duration, String, Value)> {
    let begin = Instant::now();
    let mut stream = stack.client().stream("/v1/chat/completions", body).await?;
    let (mut first, mut text, mut usage) = (None, String::new(), Value::Null);
    while let Some(event) = stream.next().await?.filter(|event| event != "[DONE]") {
        first.get_or_insert_with(|| begin.elapsed());
        let event: Value = serde_json::from_str(&event)?;
        text += event["choices"][0]["delta"]["content"].as_str().unwrap_or_default();
        if !event["usage"].is_null() {
            usage = event["usage"].clone();
        }
    }
    Ok((first.context("a token")?, text, usage))
}

/// Requests that are answered at once, when they may take 4096 tokens and stop after a few dozen.
async fn concurrency(model: &str) -> Result<()> {
    let baseline = std::env::var("BASELINE_LAUNCHER").ok();
    for (name, launcher) in [("blocks on demand", None), ("the other launcher", baseline.as_deref())] {
        if name != "blocks on demand" && launcher.is_none() {
            continue;
        }
        let arguments =
            ["--model-id", model, "--max-batch-total-tokens", "16384", "--max-total-tokens", "8192"];
        let stack = Stack::start_as(launcher, &arguments).await?;
        let client = |client: usize| {
            let inputs = format!("Once upon a time there was a child who had {client} toys.");
            let body = json!({"inputs": inputs, "parameters": {"max_new_tokens": 4096, "details": true}});
            let stack = &stack;
            async move {
                let mut tokens = 0;
                for _ in 0..4 {
                    let answer = stack.client().generate("/generate", &body).await?;
                    tokens += answer["details"]["generated_tokens"].as_u64().context("a count")?;
                }
                anyhow::Ok(tokens)
            }
        };
        let begin = Instant::now();
        let mut sizes = Vec::new();
        let tokens: u64 = tokio::select! {
            tokens = try_join_all((0..96).map(client)) => tokens?.into_iter().sum(),
            error = watch(&stack, &mut sizes) => return error,
        };
        print(&format!("running at once, {name}"), "requests", &mut sizes);
        let seconds = begin.elapsed().as_secs_f64();
        println!("    384 requests, {tokens} tokens in {seconds:.2} s");
    }
    Ok(())
}

/// Notes how many requests run, again and again.
async fn watch(stack: &Stack, sizes: &mut Vec<f64>) -> Result<()> {
    loop {
        sizes.push(stack.metric("tgi_batch_current_size").await?);
        sleep(Duration::from_millis(5)).await;
    }
}

/// From the end of the shard by `kill -9` to the next token of each of sixteen streams.
async fn recovery(model: &str) -> Result<()> {
    let stack = Stack::start(&["--model-id", model]).await?;
    let mut times = Vec::new();
    for _ in 0..RUNS {
        let mut streams = Vec::new();
        for _ in 0..16 {
            let mut stream = stack.client().stream("/v1/chat/completions", &endless(2000)).await?;
            stream.next().await?.context("a first token")?;
            streams.push(stream);
        }
        let shard = stack.shards()?[0];
        let (report, mut gaps) = tokio::sync::mpsc::unbounded_channel();
        let read = |mut stream: integration_tests::client::EventStream| {
            let report = report.clone();
            tokio::spawn(async move {
                let mut last = Instant::now();
                let mut longest = Duration::ZERO;
                while let Ok(Some(event)) = stream.next().await {
                    if event.starts_with("{\"error\"") {
                        return;
                    }
                    longest = longest.max(last.elapsed());
                    last = Instant::now();
                }
                // Nobody listens any more only if another stream has failed.
                let _ = report.send(longest);
            })
        };
        let readers: Vec<_> = streams.into_iter().map(read).collect();
        sleep(Duration::from_millis(200)).await;
        kill(shard, Signal::SIGKILL)?;
        for reader in readers {
            reader.await?;
        }
        drop(report);
        let mut longest = Vec::new();
        while let Some(gap) = gaps.recv().await {
            longest.push(gap.as_secs_f64() * 1000.0);
        }
        ensure!(longest.len() == 16, "{} of 16 streams came to their end", longest.len());
        times.extend(longest);
    }
    print("longest gap of a stream whose shard is killed", "ms", &mut times);
    Ok(())
}

/// The longest gap between two tokens of sixteen streams while a prompt of 16,000 tokens is computed.
async fn long_prompt(model: &str) -> Result<()> {
    for (name, stretch) in [("paced", "2"), ("not paced", "0")] {
        let limits = ["--max-input-tokens", "20000", "--max-total-tokens", "24000"];
        let arguments = [
            &["--model-id", model, "--load-format", "dummy", "--max-step-stretch", stretch][..],
            &limits[..],
        ];
        let stack = Stack::start(&arguments.concat()).await?;
        let (mut usual, mut longest, mut first) = (Vec::new(), Vec::new(), Vec::new());
        for run in 0..3 {
            let mut streams = Vec::new();
            for _ in 0..16 {
                let mut stream = stack.client().stream("/v1/chat/completions", &endless(20_000)).await?;
                stream.next().await?.context("a first token")?;
                streams.push(stream);
            }
            let (report, mut gaps) = tokio::sync::mpsc::unbounded_channel();
            let readers: Vec<_> = streams
                .into_iter()
                .map(|mut stream| {
                    let report = report.clone();
                    tokio::spawn(async move {
                        let mut last = Instant::now();
                        while let Ok(Some(_)) = stream.next().await {
                            let now = Instant::now();
                            if report.send((now, now - last)).is_err() {
                                return;
                            }
                            last = now;
                        }
                    })
                })
                .collect();
            sleep(Duration::from_millis(500)).await;
            let begin = Instant::now();
            // Nothing of it has been seen before.
            let words = format!("one two three {name} {run} ").repeat(3000);
            let body = json!({"inputs": words, "parameters": {"max_new_tokens": 1, "truncate": 16_000, "details": true}});
            let answer = stack.client().generate("/generate", &body).await?;
            ensure!(!answer["details"].is_null(), "{answer}");
            let end = Instant::now();
            first.push((end - begin).as_secs_f64() * 1000.0);
            readers.iter().for_each(tokio::task::JoinHandle::abort);
            let (mut before, mut during) = (Vec::new(), Vec::new());
            while let Ok((at, gap)) = gaps.try_recv() {
                let gap = gap.as_secs_f64() * 1000.0;
                match at {
                    at if at < begin => before.push(gap),
                    at if at < end => during.push(gap),
                    _ => {}
                }
            }
            before.sort_by(f64::total_cmp);
            during.sort_by(f64::total_cmp);
            usual.push(before[before.len() / 2]);
            longest.push(during[during.len() - 1]);
            println!(
                "    gaps: {:.2} before ({:.2} at most), {:.2} during ({:.2} p99)",
                before[before.len() / 2],
                before[before.len() - 1],
                during[during.len() / 2],
                during[during.len() * 99 / 100]
            );
            stack.idle().await?;
        }
        print(&format!("usual step, {name}"), "ms", &mut usual);
        print(&format!("longest gap beside 16,000 tokens, {name}"), "ms", &mut longest);
        print(&format!("answer to the long prompt, {name}"), "ms", &mut first);
    }
    Ok(())
}

fn print(what: &str, unit: &str, values: &mut [f64]) {
    values.sort_by(f64::total_cmp);
    let (low, middle, high) = (values[0], values[values.len() / 2], values[values.len() - 1]);
    println!("{what:<44} {low:>9.1} {middle:>9.1} {high:>9.1} {unit} (min, median, max of {})", values.len());
}
