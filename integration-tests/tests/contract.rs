//! Answers have the shapes that a real TGI router's answers have.
//!
//! `contract/cases.json` lists requests, `contract/golden.json` what was recorded for them, with the decisions on
//! where we differ applied: status, headers, and the shape of the body or of the events.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result};
use http_body_util::Full;
use hyper::{Method, Request};
use integration_tests::client::{Answer, Client};
use integration_tests::stack::Stack;
use integration_tests::{fixtures, shape};
use serde::Deserialize;
use serde_json::{Value, json};

/// Routes that do not exist yet. A case for one of them must answer 404, so that this list cannot grow stale.
const LATER: [&str; 4] = ["/v1/models", "/v1/completions", "/invocations", "/api-doc/openapi.json"];

/// Headers whose presence is part of the contract.
const HEADERS: [&str; 14] = [
    "content-type",
    "x-compute-type",
    "x-compute-time",
    "x-compute-characters",
    "x-total-time",
    "x-validation-time",
    "x-queue-time",
    "x-inference-time",
    "x-time-per-token",
    "x-prompt-tokens",
    "x-generated-tokens",
    "x-accel-buffering",
    "access-control-allow-origin",
    "cache-control",
];

/// A recorded request.
#[derive(Deserialize)]
struct Case {
    name: String,
    path: String,
    method: Option<String>,
    body: Option<Value>,
    raw: Option<String>,
    #[serde(default)]
    text: bool,
    #[serde(default)]
    ignore: Vec<String>,
}

#[tokio::test]
async fn every_case_for_a_route_that_exists_has_the_recorded_shape() -> Result<()> {
    let directory = fixtures::directory("llama");
    let stack = Stack::start(&["--model-id", directory.to_str().context("a path in UTF-8")?]).await?;
    let cases: Vec<Case> = read("cases.json")?;
    let golden: BTreeMap<String, Value> = read("golden.json")?;
    let mut misses = Vec::new();
    for case in &cases {
        let answer = ask(stack.client(), case).await?;
        if LATER.contains(&case.path.as_str()) {
            assert_eq!(answer.status, 404, "{} is served: take it off the list", case.path);
            continue;
        }
        let expected = without(&golden[&case.name], &case.ignore);
        let found = without(&record(case, &answer)?, &case.ignore);
        for line in shape::differences(&expected, &found) {
            misses.push(format!("{}{line}", case.name));
        }
    }
    assert!(misses.is_empty(), "{}", misses.join("\n"));
    Ok(())
}

fn read<T: serde::de::DeserializeOwned>(name: &str) -> Result<T> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("contract").join(name);
    Ok(serde_json::from_slice(&std::fs::read(path)?)?)
}

async fn ask(client: Client, case: &Case) -> Result<Answer> {
    let body = case.raw.clone().or_else(|| case.body.as_ref().map(Value::to_string));
    let method = match &case.method {
        Some(method) => method.parse()?,
        None if body.is_some() => Method::POST,
        None => Method::GET,
    };
    let mut request = Request::builder().method(method).uri(&case.path);
    if body.is_some() {
        request = request.header("content-type", "application/json");
    }
    client.ask(request.body(Full::from(body.unwrap_or_default()))?).await
}

fn record(case: &Case, answer: &Answer) -> Result<Value> {
    let header = |name: &str| answer.headers.get(name).and_then(|value| value.to_str().ok());
    let kind = header("content-type").unwrap_or_default().split(';').next().unwrap_or_default();
    let headers: BTreeMap<_, _> =
        HEADERS.iter().filter(|name| header(name).is_some()).map(|name| (*name, true)).collect();
    let mut found = json!({"status": answer.status.as_u16(), "headers": headers, "content_type": kind});
    if kind == "text/event-stream" {
        let mut events: Vec<Value> = Vec::new();
        for event in answer.events() {
            let event = match serde_json::from_str(event) {
                Ok(event) => shape::of(&event),
                Err(_) => json!(format!("raw:{event}")),
            };
            // A run of equal shapes counts once: how many tokens there are is not the contract's.
            if events.last() != Some(&event) {
                events.push(event);
            }
        }
        found["events"] = Value::Array(events);
    } else if kind.contains("json") {
        found["body"] = shape::of(&answer.json()?);
    } else if case.text {
        found["text"] = json!(true);
    }
    Ok(found)
}

fn without(record: &Value, ignored: &[String]) -> Value {
    let mut record = record.clone();
    if let Some(fields) = record.as_object_mut() {
        fields.retain(|key, _| !ignored.contains(key));
    }
    record
}
