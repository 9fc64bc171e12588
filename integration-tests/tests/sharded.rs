//! One model over several shards: they answer as one, and end as one.

use anyhow::{Context, Result};
use futures::future::try_join_all;
use integration_tests::stack::{Stack, endless, gone, run};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

async fn two_shards() -> Result<Stack> {
    Stack::start(&["--num-shard", "2"]).await
}

/// The processes of the shards, in the order of their ranks.
fn shards(stack: &Stack) -> Result<[Pid; 2]> {
    let processes = stack.processes()?;
    assert_eq!(processes.len(), 4, "launcher, two shards, router");
    Ok([processes[1], processes[2]])
}

fn text(answer: &Value) -> Result<&str> {
    answer["generated_text"].as_str().with_context(|| answer.to_string())
}

#[tokio::test(flavor = "multi_thread")]
async fn two_shards_say_what_one_says() -> Result<()> {
    let (one, two) = (Stack::demo().await?, two_shards().await?);
    let questions =
        ["What is the capital of France?", "What is the capital of Japan?", "Explain gradient descent."];
    // Requests are answered by the ranks in turn: each question by both of them.
    for question in questions.iter().chain(&questions[..2]) {
        let (expected, found) = (one.greedy(question, 40).await?, two.greedy(question, 40).await?);
        assert_eq!(text(&expected)?, text(&found)?);
        let [expected, found] = [&expected, &found].map(|answer| &answer["details"]["tokens"]);
        let count = expected.as_array().context("tokens")?.len();
        for index in 0..count {
            let [expected, found] = [expected, found].map(|tokens| &tokens[index]);
            assert_eq!((&expected["id"], &expected["text"]), (&found["id"], &found["text"]));
            // The same sums in another order.
            let [expected, found] = [expected, found].map(|token| token["logprob"].as_f64().unwrap_or(1.0));
            assert!((expected - found).abs() < 1e-3, "{question} token {index}: {expected} and {found}");
        }
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn many_requests_at_once_equal_each_alone_over_two_shards() -> Result<()> {
    let stack = two_shards().await?;
    let bodies: Vec<Value> = (0..24)
        .map(|seed| {
            let parameters = json!({
                "max_new_tokens": 20 + seed % 7, "seed": seed, "temperature": 1.2, "details": true,
                "top_n_tokens": seed % 3, "decoder_input_details": seed % 5 == 0, "stop": [" the"],
            });
            json!({"inputs": format!("{}Once upon a time", "Hello. ".repeat(seed)), "parameters": parameters})
        })
        .collect();
    let client = stack.client();
    let together = try_join_all(bodies.iter().map(|body| client.generate("/generate", body))).await?;
    for (body, together) in bodies.iter().zip(together) {
        assert_eq!(client.generate("/generate", body).await?, together, "{body}");
    }
    stack.idle().await
}

#[tokio::test]
async fn every_line_of_a_shard_names_its_rank() -> Result<()> {
    let stack = two_shards().await?;
    let log = stack.log()?;
    for rank in 0..2 {
        let ready = log
            .lines()
            .find(|line| line.contains("shard is ready") && line.contains(&format!("rank={rank}")));
        assert!(ready.is_some(), "no line of shard {rank} in:\n{log}");
    }
    assert!(log.contains("Sharding model on 2 processes"), "{log}");
    Ok(())
}

#[tokio::test]
async fn several_shards_end_cleanly_and_leave_nothing() -> Result<()> {
    let mut stack = two_shards().await?;
    let processes = stack.processes()?;
    stack.signal(Signal::SIGTERM)?;
    assert!(stack.ended().await?.success(), "{}", stack.log()?);
    gone(&processes).await?;
    let left: Vec<_> = std::fs::read_dir(stack.temporary_directory())?.collect::<Result<_, _>>()?;
    assert_eq!(left.len(), 1, "only the log is left, not {left:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn where_that_is_wanted_the_end_of_a_shard_is_told_to_its_requests_and_ends_all() -> Result<()> {
    for rank in 0..2 {
        let mut stack = Stack::start(&["--num-shard", "2", "--on-shard-failure", "exit"]).await?;
        let processes = stack.processes()?;
        let mut stream = stack.client().stream("/v1/chat/completions", &endless(1500)).await?;
        stream.next().await?.context("a first token")?;
        kill(shards(&stack)?[rank], Signal::SIGKILL)?;
        let mut last = String::new();
        while let Ok(Some(event)) = stream.next().await {
            last = event;
        }
        assert!(last.contains("error") || last.contains("[DONE]"), "the stream ended with {last}");
        assert_eq!(stack.ended().await?.code(), Some(1), "{}", stack.log()?);
        let log = stack.log()?;
        assert!(log.contains(&format!("ShardFailed: shard {rank} ended with signal 9")), "{log}");
        gone(&processes).await?;
    }
    Ok(())
}

#[tokio::test]
async fn a_number_of_shards_that_the_model_cannot_be_split_over_is_named() -> Result<()> {
    let (status, text) = run(&["--num-shard", "3"]).await?;
    assert_eq!(status.code(), Some(1), "{text}");
    assert!(text.contains("cannot be split over 3 shards; --num-shard can be"), "{text}");
    let (status, text) = run(&["--sharded", "true"]).await?;
    assert_eq!(status.code(), Some(1), "{text}");
    assert!(text.contains("NotEnoughCUDADevices"), "{text}");
    Ok(())
}
