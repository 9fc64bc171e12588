//! LoRA adapters through the whole server: named by requests, loaded and unloaded while it runs.

use anyhow::{Context, Result, ensure};
use futures::future::try_join_all;
use integration_tests::fake_hub::{Content, FakeHub};
use integration_tests::fixtures::{self, Expected};
use integration_tests::stack::Stack;
use serde_json::{Value, json};

const LOAD: &str = "/v1/load_lora_adapter";
const UNLOAD: &str = "/v1/unload_lora_adapter";

/// The Llama fixture, which has two adapters, and these flags besides.
async fn start(flags: &[&str]) -> Result<Stack> {
    let model = fixtures::directory("llama");
    let model = model.to_str().context("a path in UTF-8")?;
    Stack::start(&[&["--model-id", model], flags].concat()).await
}

/// A list for `--lora-adapters`, and a body for [`LOAD`].
fn adapter(name: &str) -> (String, Value) {
    let path = fixtures::directory("llama/adapters").join(name);
    (format!("{name}={}", path.display()), json!({"lora_name": name, "lora_path": path}))
}

/// A greedy request for every prompt; without an adapter it is the base model's.
fn bodies(expected: &Expected, adapter: Option<&str>) -> Vec<Value> {
    let body = |text: &str| {
        let parameters =
            json!({"max_new_tokens": expected.max_new_tokens, "details": true, "adapter_id": adapter});
        json!({"inputs": text, "parameters": parameters})
    };
    expected.prompts.iter().map(|prompt| body(&prompt.text)).collect()
}

/// Asks all at once, and compares the tokens with the reference's.
async fn check(stack: &Stack, asked: &[(Option<&str>, &Expected)]) -> Result<()> {
    let client = stack.client();
    let bodies = asked.iter().flat_map(|(adapter, expected)| bodies(expected, *adapter));
    let bodies: Vec<Value> = bodies.collect();
    let answers = try_join_all(bodies.iter().map(|body| client.generate("/generate", body))).await?;
    let prompts =
        asked.iter().flat_map(|(adapter, expected)| expected.prompts.iter().map(move |p| (adapter, p)));
    for ((adapter, prompt), answer) in prompts.zip(&answers) {
        let tokens = answer["details"]["tokens"].as_array().context("tokens")?;
        let ids: Vec<_> = tokens.iter().map(|token| token["id"].as_u64()).collect();
        let expected: Vec<_> = prompt.generated_ids.iter().map(|id| Some(u64::from(*id))).collect();
        ensure!(ids == expected, "{adapter:?}, prompt {}: {ids:?} instead of {expected:?}", prompt.name);
    }
    Ok(())
}

#[tokio::test]
async fn requests_of_one_batch_have_the_adapters_they_name() -> Result<()> {
    let (base, qv) = (fixtures::expected("llama")?, fixtures::expected("llama/adapters/qv")?);
    let all = fixtures::expected("llama/adapters/all")?;
    let list = format!("{}, {}", adapter("qv").0, adapter("all").0);
    for shards in ["1", "2"] {
        let stack = start(&["--lora-adapters", &list, "--num-shard", shards]).await?;
        check(&stack, &[(Some("qv"), &qv), (None, &base), (Some("all"), &all)]).await?;
        let unknown = stack.client().post("/generate", &bodies(&qv, Some("x"))[0]).await?;
        assert_eq!(unknown.status.as_u16(), 404, "{}", unknown.body);
        assert!(unknown.body.contains("there are: `all`, `qv`"), "{}", unknown.body);
        let forbidden = stack.client().post(LOAD, &adapter("qv").1).await?;
        assert_eq!(forbidden.status.as_u16(), 403, "{}", forbidden.body);
    }
    Ok(())
}

#[tokio::test]
async fn adapters_come_and_go_and_a_stream_keeps_its_own() -> Result<()> {
    let (base, qv) = (fixtures::expected("llama")?, fixtures::expected("llama/adapters/qv")?);
    let all = fixtures::expected("llama/adapters/all")?;
    let stack = start(&["--allow-runtime-adapters", "--num-shard", "2"]).await?;
    let client = stack.client();
    let post = async |path: &str, body: &Value| {
        let answer = client.post(path, body).await?;
        ensure!(answer.status.is_success(), "{path}: {} {}", answer.status, answer.body);
        anyhow::Ok(())
    };
    post(LOAD, &adapter("qv").1).await?;
    check(&stack, &[(Some("qv"), &qv), (None, &base)]).await?;

    // The name changes its meaning while a stream runs under it.
    let prompt = &qv.prompts[0];
    let mut stream = client.stream("/generate_stream", &bodies(&qv, Some("qv"))[0]).await?;
    let mut ids = vec![token_id(&stream.next().await?.context("a first token")?)?];
    post(UNLOAD, &json!({"lora_name": "qv"})).await?;
    let gone = client.post("/generate", &bodies(&qv, Some("qv"))[0]).await?;
    assert_eq!(gone.status.as_u16(), 404, "{}", gone.body);
    let mut other = adapter("all").1;
    other["lora_name"] = json!("qv");
    post(LOAD, &other).await?;
    check(&stack, &[(Some("qv"), &all)]).await?;
    while let Some(event) = stream.next().await? {
        ids.push(token_id(&event)?);
    }
    assert_eq!(ids, prompt.generated_ids.iter().map(|id| u64::from(*id)).collect::<Vec<_>>());

    let broken =
        client.post(LOAD, &json!({"lora_name": "none", "lora_path": fixtures::directory("llama")})).await?;
    assert_eq!(broken.status.as_u16(), 422, "{}", broken.body);
    assert!(broken.body.contains("adapter_config.json"), "{}", broken.body);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_adapter_of_the_hub_is_fetched_and_has_its_id_for_a_name() -> Result<()> {
    let (fake, home) = (FakeHub::start()?, tempfile::tempdir()?);
    let directory = fixtures::directory("llama/adapters/qv");
    let mut files = vec![("README.md", Content::of("not needed"))];
    for name in ["adapter_config.json", "adapter_model.safetensors"] {
        files.push((name, Content::read(&directory.join(name))?));
    }
    fake.add("org/qv", files);
    let (endpoint, home) = (fake.endpoint(), home.path().to_str().context("a path in UTF-8")?);
    let model = fixtures::directory("llama");
    let flags = ["--model-id", model.to_str().context("a path in UTF-8")?, "--lora-adapters", "org/qv@v1.0"];
    let (base, qv) = (fixtures::expected("llama")?, fixtures::expected("llama/adapters/qv")?);
    for more in [&[][..], &[("HF_HUB_OFFLINE", "1")]] {
        let variables = [&[("HF_ENDPOINT", endpoint.as_str()), ("HF_HOME", home)], more].concat();
        let stack = Stack::start_with(&flags, &variables).await?;
        check(&stack, &[(Some("org/qv"), &qv), (None, &base)]).await?;
    }
    assert!(!fake.seen().iter().any(|request| request.path.contains("README")), "only what is needed");
    Ok(())
}

fn token_id(event: &str) -> Result<u64> {
    let event: Value = serde_json::from_str(event)?;
    event["token"]["id"].as_u64().with_context(|| event.to_string())
}
