//! Who may ask, and from where.

use anyhow::Result;
use hyper::StatusCode;
use integration_tests::stack::Stack;
use serde_json::json;

#[tokio::test]
async fn a_key_protects_what_generates_and_leaves_probes_open() -> Result<()> {
    let stack = Stack::start(&["--api-key", "secret key"]).await?;
    let body =
        json!({"inputs": "What is the capital of France?", "parameters": {"max_new_tokens": 5}}).to_string();
    let typed = ("content-type", "application/json");
    for (value, status) in [
        (None, StatusCode::UNAUTHORIZED),
        (Some("Bearer wrong"), StatusCode::UNAUTHORIZED),
        (Some("Bearer SECRET KEY"), StatusCode::UNAUTHORIZED),
        (Some("bearer secret key"), StatusCode::OK),
    ] {
        let mut headers = vec![typed];
        headers.extend(value.map(|value| ("authorization", value)));
        for route in ["/generate", "/generate_stream", "/tokenize", "/chat_tokenize", "/v1/chat/completions"]
        {
            let answer = stack.client().post_raw(route, body.clone(), &headers).await?;
            let refused = answer.status == StatusCode::UNAUTHORIZED;
            assert_eq!(refused, status == StatusCode::UNAUTHORIZED, "{route} {value:?}: {}", answer.status);
            assert!(!refused || answer.body.is_empty(), "{}", answer.body);
        }
    }
    for route in ["/health", "/ping", "/info", "/metrics"] {
        let answer = stack.client().get(route).await?;
        assert_eq!(answer.status, StatusCode::OK, "{route}");
        assert!(answer.headers.contains_key("vary"), "{route}");
    }
    assert!(!stack.log()?.contains("secret key"), "the key is in the log");
    for process in stack.processes()? {
        let arguments = std::fs::read(format!("/proc/{process}/cmdline"))?;
        let launcher = process == stack.processes()?[0];
        assert!(
            launcher || !String::from_utf8_lossy(&arguments).contains("secret key"),
            "the key is on a command line"
        );
    }
    Ok(())
}
