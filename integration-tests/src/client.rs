//! One HTTP/1.1 client. Every request has a connection of its own, so that dropping an answer cuts it off.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use http_body_util::{BodyExt, Full};
use hyper::body::{Bytes, Incoming};
use hyper::header::{CONTENT_TYPE, HeaderMap};
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::net::TcpStream;

/// Longest time any single answer may take. A server that hangs fails its test instead of hanging it.
const PATIENCE: Duration = Duration::from_secs(120);

/// Speaks to one server.
#[derive(Clone, Copy, Debug)]
pub struct Client {
    address: SocketAddr,
}

/// A whole answer.
#[derive(Debug)]
pub struct Answer {
    /// Status code.
    pub status: StatusCode,
    /// Headers.
    pub headers: HeaderMap,
    /// Body as text.
    pub body: String,
}

impl Answer {
    /// The body as JSON.
    pub fn json(&self) -> Result<Value> {
        serde_json::from_str(&self.body).with_context(|| format!("not JSON: {:?}", self.body))
    }

    /// The `data:` payloads of an event stream, in order.
    pub fn events(&self) -> Vec<&str> {
        self.body.split("\n\n").filter_map(|frame| frame.strip_prefix("data: ")).collect()
    }
}

impl Client {
    /// A client for the server at `address`.
    pub fn new(address: SocketAddr) -> Self {
        Self { address }
    }

    /// `GET path`.
    pub async fn get(&self, path: &str) -> Result<Answer> {
        self.ask(Request::builder().method(Method::GET).uri(path).body(Full::default())?).await
    }

    /// `POST path` with a JSON body.
    pub async fn post(&self, path: &str, body: &Value) -> Result<Answer> {
        self.post_raw(path, body.to_string(), &[("content-type", "application/json")]).await
    }

    /// `POST path` with any body and headers.
    pub async fn post_raw(&self, path: &str, body: String, headers: &[(&str, &str)]) -> Result<Answer> {
        let mut request = Request::builder().method(Method::POST).uri(path);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        self.ask(request.body(Full::from(body))?).await
    }

    /// `POST path` that must answer 200, as JSON.
    pub async fn generate(&self, path: &str, body: &Value) -> Result<Value> {
        let answer = self.post(path, body).await?;
        ensure!(answer.status == StatusCode::OK, "{path} answered {}: {}", answer.status, answer.body);
        answer.json()
    }

    /// `POST path`, the answer's body still on its way: read it event by event, or drop it to leave.
    pub async fn stream(&self, path: &str, body: &Value) -> Result<EventStream> {
        let request = Request::builder()
            .method(Method::POST)
            .uri(path)
            .header(CONTENT_TYPE, "application/json")
            .body(Full::from(body.to_string()))?;
        let response = tokio::time::timeout(PATIENCE, self.send(request)).await??;
        Ok(EventStream { status: response.status(), body: response.into_body(), text: String::new() })
    }

    /// Any request, whole answer.
    pub async fn ask(&self, request: Request<Full<Bytes>>) -> Result<Answer> {
        let what = format!("{} {}", request.method(), request.uri());
        let answer = async {
            let (parts, body) = self.send(request).await?.into_parts();
            let body = String::from_utf8(body.collect().await?.to_bytes().to_vec())?;
            anyhow::Ok(Answer { status: parts.status, headers: parts.headers, body })
        };
        tokio::time::timeout(PATIENCE, answer).await.with_context(|| format!("{what}: no answer in time"))?
    }

    async fn send(&self, mut request: Request<Full<Bytes>>) -> Result<Response<Incoming>> {
        let host = self.address.to_string().parse()?;
        request.headers_mut().insert(hyper::header::HOST, host);
        let stream = TokioIo::new(TcpStream::connect(self.address).await?);
        let (mut sender, connection) = hyper::client::conn::http1::handshake(stream).await?;
        tokio::spawn(connection);
        Ok(sender.send_request(request).await?)
    }
}

/// An event stream that is being read. Dropping it closes the connection.
#[derive(Debug)]
pub struct EventStream {
    /// Status code.
    pub status: StatusCode,
    body: Incoming,
    text: String,
}

impl EventStream {
    /// The next `data:` payload; `None` at the end of the stream.
    pub async fn next(&mut self) -> Result<Option<String>> {
        loop {
            if let Some((frame, rest)) = self.text.split_once("\n\n") {
                let event = frame.strip_prefix("data: ").map(str::to_owned);
                self.text = rest.to_owned();
                match event {
                    Some(event) => return Ok(Some(event)),
                    None => continue,
                }
            }
            let Some(frame) = tokio::time::timeout(PATIENCE, self.body.frame()).await? else {
                return Ok(None);
            };
            if let Ok(data) = frame?.into_data() {
                self.text.push_str(std::str::from_utf8(&data)?);
            }
        }
    }
}
