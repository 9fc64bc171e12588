//! `/v1/load_lora_adapter` and `/v1/unload_lora_adapter`: the routes and fields of vLLM.

use std::sync::Arc;

use axum::extract::State;
use serde::Deserialize;

use super::App;
use super::body::Json;
use super::error::ApiError;

#[derive(Debug, Deserialize)]
pub(super) struct LoadRequest {
    lora_name: String,
    lora_path: String,
}

#[derive(Debug, Deserialize)]
pub(super) struct UnloadRequest {
    lora_name: String,
}

pub(super) async fn load(
    State(app): State<Arc<App>>,
    Json(request): Json<LoadRequest>,
) -> Result<String, ApiError> {
    let LoadRequest { lora_name, lora_path } = request;
    app.adapters.load(&lora_name, &lora_path).await?;
    Ok(format!("Success: adapter `{lora_name}` is loaded"))
}

pub(super) async fn unload(
    State(app): State<Arc<App>>,
    Json(request): Json<UnloadRequest>,
) -> Result<String, ApiError> {
    let UnloadRequest { lora_name } = request;
    app.adapters.unload(&lora_name)?;
    Ok(format!("Success: adapter `{lora_name}` is unloaded"))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use http::StatusCode;
    use serde_json::{Value, json};

    use crate::adapters::{Adapters, Changes};
    use crate::http::testing::{Answer, Client, Mail, Setup, answer};
    use crate::http::{Access, ApiKey};
    use crate::shards::connect;
    use crate::shards::scripted_server::ScriptedStack;

    const LOAD: &str = "/v1/load_lora_adapter";
    const UNLOAD: &str = "/v1/unload_lora_adapter";
    const CHAT: &str = "/v1/chat/completions";
    const PARIS: &[&str] = &["Par", "is", "</s>"];

    /// One shard with the adapter `poet`, and the routes.
    async fn start() -> (ScriptedStack, Client, Mail) {
        let stack = ScriptedStack::start(1);
        {
            let mut rank = stack.rank(0);
            rank.adapters = vec!["poet".to_owned()];
            rank.info.adapters = vec!["poet".to_owned()];
            rank.info.extensions = vec![proto::extensions::ADAPTERS.to_owned()];
        }
        let shards = connect(&stack.master(), Duration::from_secs(10)).await.unwrap();
        let changes = Changes::Possible(shards.adapters().unwrap());
        let adapters = Adapters::new(&shards.info().adapters, "acme/tiny", changes);
        let (client, mail) = Setup { adapters, ..Setup::default() }.start();
        (stack, client, mail)
    }

    fn generate(adapter: &str) -> Value {
        json!({"inputs": "a b", "parameters": {"adapter_id": adapter}})
    }

    fn chat(model: &str) -> Value {
        json!({"model": model, "messages": [{"role": "user", "content": "a b"}]})
    }

    /// The adapter under which a request reaches the batcher, and its answer.
    async fn served(client: &Client, mail: &mut Mail, path: &str, body: &Value) -> (Option<String>, Answer) {
        let reply = async {
            let waiting = mail.recv().await.unwrap();
            answer(&waiting, PARIS).await;
            waiting.request.adapter_key().map(str::to_owned)
        };
        let (answer, adapter) = tokio::join!(client.post(path, body), reply);
        assert_eq!(answer.status, StatusCode::OK, "{}", answer.text);
        (adapter, answer)
    }

    #[tokio::test]
    async fn native_requests_name_an_adapter_that_is_loaded() {
        let (_stack, client, mut mail) = start().await;
        let (adapter, _) = served(&client, &mut mail, "/generate", &generate("poet")).await;
        assert_eq!(adapter.as_deref(), Some("poet"));
        let best = json!({"inputs": "a", "parameters": {"adapter_id": "poet", "seed": 1, "details": true}});
        assert_eq!(served(&client, &mut mail, "/generate", &best).await.0.as_deref(), Some("poet"));
        let message = "`adapter_id` is `x`, but no adapter of this name is loaded; there are: `poet`";
        for path in ["/generate", "/generate_stream", "/"] {
            client.post(path, &generate("x")).await.assert_error(404, "adapter_not_found", message);
        }
    }

    #[tokio::test]
    async fn the_model_of_a_chat_may_be_an_adapter_and_is_echoed() {
        let (_stack, client, mut mail) = start().await;
        for (model, adapter, echoed) in [
            ("poet", Some("poet"), "poet"),
            ("gpt-4", None, "gpt-4"),
            ("acme/tiny", None, "acme/tiny"),
            ("tgi", None, "acme/tiny"),
        ] {
            let (found, answer) = served(&client, &mut mail, CHAT, &chat(model)).await;
            assert_eq!((found.as_deref(), &answer.json()["model"]), (adapter, &json!(echoed)), "{model}");
        }
    }

    #[tokio::test]
    async fn adapters_come_and_go_while_requests_keep_theirs() {
        let (stack, client, mut mail) = start().await;
        let folder = tempfile::tempdir().unwrap();
        let load = json!({"lora_name": "poet", "lora_path": folder.path(), "load_inplace": false});
        let taken = "`lora_name` is `poet`, but an adapter of this name is loaded; unload it first";
        client.post(LOAD, &load).await.assert_error(400, "validation", taken);

        let running = tokio::spawn({
            let client = client.clone();
            async move { client.post("/generate", &generate("poet")).await }
        });
        let waiting = mail.recv().await.unwrap();
        let unloaded = client.post(UNLOAD, &json!({"lora_name": "poet"})).await;
        assert_eq!(
            (unloaded.status.as_u16(), unloaded.text.as_str()),
            (200, "Success: adapter `poet` is unloaded")
        );
        let gone = "`adapter_id` is `poet`, but no adapter of this name is loaded";
        client.post("/generate", &generate("poet")).await.assert_error(404, "adapter_not_found", gone);
        let gone = "`lora_name` is `poet`, but no adapter of this name is loaded";
        client.post(UNLOAD, &json!({"lora_name": "poet"})).await.assert_error(404, "adapter_not_found", gone);

        let loaded = client.post(LOAD, &load).await;
        assert_eq!(
            (loaded.status.as_u16(), loaded.text.as_str()),
            (200, "Success: adapter `poet` is loaded")
        );
        let (adapter, _) = served(&client, &mut mail, "/generate", &generate("poet")).await;
        assert_eq!(adapter.as_deref(), Some("poet#1"));
        assert_eq!(stack.rank(0).adapters, ["poet", "poet#1"], "the first request still runs");
        answer(&waiting, PARIS).await;
        assert_eq!(running.await.unwrap().status, StatusCode::OK);
        drop(waiting);
        stack.called(0, "unload poet").await;
        assert_eq!(stack.rank(0).adapters, ["poet#1"]);
    }

    #[tokio::test]
    async fn a_refusal_of_the_shards_is_the_answer() {
        let (stack, client, _mail) = start().await;
        stack.rank(0).refuses = Some("/x/adapter_config.json: `r` is missing".to_owned());
        let folder = tempfile::tempdir().unwrap();
        let message =
            "adapter `judge` was refused by the model server: /x/adapter_config.json: `r` is missing";
        let load = json!({"lora_name": "judge", "lora_path": folder.path()});
        client.post(LOAD, &load).await.assert_error(422, "adapter_refused", message);
        let field = client.post(LOAD, &json!({"lora_name": "judge"})).await;
        assert_eq!(field.status.as_u16(), 422);
        assert!(field.text.contains("lora_path"), "{}", field.text);
    }

    #[tokio::test]
    async fn the_routes_need_the_flag_and_the_key() {
        let access = Access { api_key: Some(ApiKey::new("secret")), origins: Vec::new() };
        let (client, _mail) = Setup { access, ..Setup::default() }.start();
        let json = ("content-type", "application/json");
        for (path, body) in
            [(LOAD, r#"{"lora_name": "a", "lora_path": "/"}"#), (UNLOAD, r#"{"lora_name": "a"}"#)]
        {
            let stranger = client.ask("POST", path, &[json], body).await;
            assert_eq!((stranger.status.as_u16(), stranger.text.as_str()), (401, ""), "{path}");
            let key = ("authorization", "Bearer secret");
            let refused = client.ask("POST", path, &[json, key], body).await;
            let message = "adapters cannot be loaded or unloaded while this server runs: it was started without \
                `--allow-runtime-adapters`";
            refused.assert_error(403, "adapters_forbidden", message);
        }
    }
}
