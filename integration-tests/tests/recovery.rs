//! Streams outlive their shards: whatever happens to these, every client gets what it would have got.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use futures::future::try_join_all;
use integration_tests::stack::Stack;
use nix::sys::signal::{Signal, kill};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde_json::{Value, json};
use tokio::time::sleep;

/// Streams at once.
const CLIENTS: usize = 64;

/// Requests of each client, one after the other.
const ROUNDS: usize = 4;

/// What a client saw of a request: ids, log-probabilities and texts of its tokens, and the end with all its counts.
type Seen = Vec<String>;

/// Greedy and sampled requests, with penalties and stop strings, of different lengths.
fn body(client: usize, round: usize) -> Value {
    let animal = ["fox", "dog", "cat", "bear"][client % 4];
    let inputs =
        format!("Tell me a story about a {animal} and number {client}{round}. ").repeat(1 + client % 3);
    let mut parameters =
        json!({"max_new_tokens": 60 + client, "details": true, "decoder_input_details": client % 8 == 7});
    if client % 2 == 1 {
        let seed = 100 * round + client;
        let sampled = json!({"seed": seed, "do_sample": true, "temperature": 0.9, "repetition_penalty": 1.1, "top_p": 0.9});
        parameters
            .as_object_mut()
            .expect("it is one")
            .extend(sampled.as_object().expect("it is one").clone());
    }
    if client.is_multiple_of(5) {
        parameters["stop"] = json!(["the end", "said the"]);
    }
    // Only whole answers have the log-probabilities of their prompts.
    parameters["decoder_input_details"] = json!(false);
    json!({"inputs": inputs, "parameters": parameters})
}

/// Streams a request to its end.
async fn stream(stack: &Stack, body: &Value) -> Result<Seen> {
    let mut stream = stack.client().stream("/generate_stream", body).await?;
    let mut seen = Seen::new();
    while let Some(event) = stream.next().await? {
        let event: Value = serde_json::from_str(&event)?;
        ensure!(event["error"].is_null(), "{event}");
        let Value::Object(mut fields) = event else { anyhow::bail!("no object: {event}") };
        fields.remove("index");
        seen.push(Value::Object(fields).to_string());
    }
    Ok(seen)
}

/// All clients at once, each with one request after the other.
async fn crowd(stack: &Stack) -> Result<Vec<Vec<Seen>>> {
    let client = |client| async move {
        let mut all = Vec::new();
        for round in 0..ROUNDS {
            all.push(stream(stack, &body(client, round)).await?);
        }
        anyhow::Ok(all)
    };
    try_join_all((0..CLIENTS).map(client)).await
}

/// Disturbs shards at random moments, so many times, while the crowd is served; nobody may notice.
async fn undisturbed_by(arguments: &[&str], signal: Signal, times: usize, seed: u64) -> Result<()> {
    let stack = Stack::start(arguments).await?;
    let expected = crowd(&stack).await?;
    let restarts = stack.metric("tgi_shard_restarts").await?;
    let mut random = StdRng::seed_from_u64(seed);
    let disturbance = async {
        for time in 1..=times {
            sleep(Duration::from_millis(random.random_range(50..400))).await;
            let shards = stack.shards()?;
            kill(shards[random.random_range(0..shards.len())], signal)?;
            restarted(&stack, restarts + time as f64).await?;
        }
        anyhow::Ok(())
    };
    let mut found = Vec::new();
    let keep_asking = async {
        while stack.metric("tgi_shard_restarts").await? < restarts + times as f64 {
            found.push(crowd(&stack).await?);
        }
        anyhow::Ok(())
    };
    tokio::try_join!(disturbance, keep_asking)?;
    for found in found {
        for (client, (found, expected)) in found.iter().zip(&expected).enumerate() {
            for (round, (found, expected)) in found.iter().zip(expected).enumerate() {
                assert_eq!(found, expected, "client {client}, round {round}, seed {seed}");
            }
        }
    }
    stack.idle().await
}

/// Waits until the shards have been started again so many times.
async fn restarted(stack: &Stack, times: f64) -> Result<()> {
    let begin = Instant::now();
    while stack.metric("tgi_shard_restarts").await? < times {
        ensure!(begin.elapsed() < Duration::from_secs(60), "no new shards:\n{}", stack.log()?);
        sleep(Duration::from_millis(5)).await;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_notices_that_shards_are_killed() -> Result<()> {
    undisturbed_by(&[], Signal::SIGKILL, 10, 1).await
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_notices_that_one_of_two_ranks_is_killed() -> Result<()> {
    undisturbed_by(&["--num-shard", "2"], Signal::SIGKILL, 3, 2).await
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_notices_that_a_shard_hangs() -> Result<()> {
    undisturbed_by(&["--step-timeout", "0.5"], Signal::SIGSTOP, 2, 3).await
}

#[tokio::test(flavor = "multi_thread")]
async fn shards_that_always_fail_end_the_launcher_and_clients_hear_why() -> Result<()> {
    let mut stack = Stack::start(&["--max-shard-restarts", "1"]).await?;
    let mut stream = stack.client().stream("/generate_stream", &endless()).await?;
    stream.next().await?.context("a first token")?;
    let mut last = String::new();
    let killing = async {
        loop {
            for shard in stack.shards().unwrap_or_default() {
                // It may be gone by now.
                let _ = kill(shard, Signal::SIGKILL);
            }
            sleep(Duration::from_millis(1)).await;
        }
    };
    let reading = async {
        while let Some(event) = stream.next().await? {
            last = event;
        }
        anyhow::Ok(())
    };
    tokio::select! {
        () = killing => {}
        read = reading => read?,
    }
    let event: Value = serde_json::from_str(&last)?;
    assert_eq!(event["error_type"], "unavailable", "{event}");
    let status = stack.ended().await?;
    assert!(!status.success(), "{status}");
    Ok(())
}

/// A request that is still being served when all is over.
fn endless() -> Value {
    json!({"inputs": "Tell me a story.", "parameters": {"max_new_tokens": 1500, "do_sample": true, "seed": 3, "temperature": 3.0}})
}

#[tokio::test(flavor = "multi_thread")]
async fn a_router_that_dies_is_started_again() -> Result<()> {
    let stack = Stack::demo().await?;
    let expected = stream(&stack, &body(0, 0)).await?;
    let router =
        stack.processes()?.into_iter().skip(1).find(|pid| !stack.shards().unwrap_or_default().contains(pid));
    kill(router.context("a router")?, Signal::SIGKILL)?;
    let begin = Instant::now();
    while !stack.client().get("/health").await.is_ok_and(|answer| answer.status.is_success()) {
        ensure!(begin.elapsed() < Duration::from_secs(60), "not healthy again:\n{}", stack.log()?);
        sleep(Duration::from_millis(5)).await;
    }
    assert_eq!(stream(&stack, &body(0, 0)).await?, expected);
    stack.idle().await
}
