//! HTTP/1.1 by hand, so that it can be done wrong: connections that are cut, lengths that are not told.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream};
use std::ops::Range;
use std::sync::Arc;
use std::thread;

use anyhow::{Context, Result, bail};
use http::{HeaderMap, HeaderName, HeaderValue};
use serde_json::json;

use super::{Access, COMMIT, Content, Fault, Repository, Seen, State, locked};

/// Bytes that are sent at once.
const PIECE: usize = 64 << 10;

pub(super) fn listen() -> Result<TcpListener> {
    Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?)
}

/// Serves in the background for as long as the process lives.
pub(super) fn serve(listener: TcpListener, state: Arc<State>, elsewhere: bool) {
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let state = Arc::clone(&state);
            // A client that goes away is no trouble of the server's.
            thread::spawn(move || Connection { stream: &stream, state: &state, elsewhere }.serve());
        }
    });
}

struct Connection<'a> {
    stream: &'a TcpStream,
    state: &'a State,
    elsewhere: bool,
}

/// What to answer.
struct Answer {
    status: u16,
    headers: Vec<(String, String)>,
    content: Content,
}

impl Answer {
    fn new(status: u16, headers: &[(&str, &str)], body: impl AsRef<[u8]>) -> Self {
        let headers = headers.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        Self { status, headers, content: Content::of(body) }
    }

    fn refusal(status: u16, code: &str) -> Self {
        Self::new(status, &[("x-error-code", code), ("x-error-message", "what the Hub says")], "")
    }
}

impl Connection<'_> {
    fn serve(self) -> Result<()> {
        let mut reader = BufReader::new(self.stream);
        while let Some(request) = read_request(&mut reader, self.elsewhere)? {
            locked(&self.state.seen).push(request.clone());
            let fault = self.take_fault(&request.path);
            let answer = match &fault {
                Some(Fault::Status(status, headers)) => {
                    Answer { status: *status, headers: headers.clone(), content: Content::of("") }
                }
                Some(Fault::Body(body)) => Answer::new(200, &[], body),
                _ => self.answer(&request),
            };
            self.send(&request, &answer, fault.as_ref())?;
        }
        Ok(())
    }

    /// The first fault that this path meets and that is left to happen. Cuts and stalls happen where a transfer reaches
    /// their place.
    fn take_fault(&self, path: &str) -> Option<Fault> {
        let mut faults = locked(&self.state.faults);
        let (_, fault, times) = faults.iter_mut().find(|(part, fault, times)| {
            let later = matches!(fault, Fault::CutAt(_) | Fault::StallAt(_));
            *times > 0 && !later && path.contains(part.as_str())
        })?;
        *times -= 1;
        Some(fault.clone())
    }

    /// What happens in the middle of a transfer of these bytes.
    fn take_break(&self, path: &str, bytes: &Range<u64>) -> Option<Fault> {
        let mut faults = locked(&self.state.faults);
        let (_, fault, times) = faults.iter_mut().find(|(part, fault, times)| {
            let place =
                if let Fault::CutAt(place) | Fault::StallAt(place) = fault { *place } else { u64::MAX };
            *times > 0 && path.contains(part.as_str()) && bytes.contains(&place)
        })?;
        *times -= 1;
        Some(fault.clone())
    }

    fn answer(&self, request: &Seen) -> Answer {
        let path = request.path.split('?').next().unwrap_or_default();
        let repositories = locked(&self.state.repositories).clone();
        if self.elsewhere {
            let mut files = repositories.values().flat_map(|repository| repository.files.values());
            let found =
                files.find(|content| content.is_large() && path == format!("/large/{}", content.etag()));
            return match found {
                Some(content) => Answer { status: 200, headers: Vec::new(), content: content.clone() },
                None => Answer::new(404, &[], "no such object"),
            };
        }
        for (id, repository) in &repositories {
            if let Some(revision) = path.strip_prefix(&format!("/api/models/{id}/revision/")) {
                return self.describe(request, repository, revision);
            }
            if let Some(rest) = path.strip_prefix(&format!("/{id}/resolve/")) {
                return self.resolve(request, repository, rest);
            }
            if let Some(file) = path.strip_prefix(&format!("/cached/{id}/")) {
                let content = repository.files[file].clone();
                return Answer { status: 200, headers: file_headers(&content), content };
            }
        }
        Answer::refusal(401, "RepoNotFound")
    }

    fn describe(&self, request: &Seen, repository: &Repository, revision: &str) -> Answer {
        if matches!(&repository.access, Access::Private(token) if !has_token(request, token)) {
            return Answer::refusal(401, "RepoNotFound");
        }
        if !is_known(revision) {
            return Answer::refusal(404, "RevisionNotFound");
        }
        let siblings: Vec<_> = repository
            .files
            .iter()
            .map(|(name, content)| json!({"rfilename": name, "size": content.length()}))
            .collect();
        let body = json!({"id": "x", "sha": COMMIT, "siblings": siblings}).to_string();
        Answer::new(200, &[("content-type", "application/json")], body)
    }

    fn resolve(&self, request: &Seen, repository: &Repository, rest: &str) -> Answer {
        match &repository.access {
            Access::Private(token) if !has_token(request, token) => {
                return Answer::refusal(401, "RepoNotFound");
            }
            Access::Gated(token) if !has_token(request, token) => {
                let status = if request.header("authorization").is_some() { 403 } else { 401 };
                return Answer::refusal(status, "GatedRepo");
            }
            _ => {}
        }
        let Some((_, file)) = rest.split_once('/').filter(|(revision, _)| is_known(revision)) else {
            return Answer::refusal(404, "RevisionNotFound");
        };
        let Some(content) = repository.files.get(file) else { return Answer::refusal(404, "EntryNotFound") };
        let mut headers = file_headers(content);
        let location = if content.is_large() {
            headers.retain(|(name, _)| name != "etag");
            headers.push(("x-linked-etag".into(), format!("\"{}\"", content.etag())));
            headers.push(("x-linked-size".into(), content.length().to_string()));
            headers.push(("etag".into(), "\"of-the-redirect\"".into()));
            format!("http://{}/large/{}?signature=secret", self.state.elsewhere, content.etag())
        } else {
            let id = request.path.trim_start_matches('/').split("/resolve/").next().unwrap_or_default();
            format!("/cached/{id}/{file}")
        };
        headers.push(("location".into(), location));
        Answer {
            status: if content.is_large() { 302 } else { 307 },
            headers,
            content: Content::of("Redirecting"),
        }
    }

    fn send(&self, request: &Seen, answer: &Answer, fault: Option<&Fault>) -> Result<()> {
        let length = answer.content.length();
        let range = request.header("range").filter(|_| !matches!(fault, Some(Fault::NoRanges)));
        let range = range.filter(|_| answer.status == 200).and_then(|range| parse_range(range, length));
        let (start, end) = range.unwrap_or((0, length));
        let status = if range.is_some() { 206 } else { answer.status };
        let mut head = format!("HTTP/1.1 {status} -\r\n");
        for (name, value) in &answer.headers {
            head.push_str(&format!("{name}: {value}\r\n"));
        }
        if range.is_some() {
            head.push_str(&format!("content-range: bytes {start}-{}/{length}\r\n", end - 1));
        }
        let is_endless = matches!(fault, Some(Fault::NoLength));
        let length_line = format!("content-length: {}\r\n", end - start);
        head.push_str(if is_endless { "connection: close\r\n" } else { &length_line });
        head.push_str("\r\n");
        let mut stream = self.stream;
        stream.write_all(head.as_bytes())?;
        if request.method != "HEAD" {
            self.send_bytes(request, &answer.content, start..end, fault)?;
        }
        if is_endless {
            stream.shutdown(Shutdown::Both)?;
        }
        Ok(())
    }

    fn send_bytes(
        &self,
        request: &Seen,
        content: &Content,
        bytes: Range<u64>,
        fault: Option<&Fault>,
    ) -> Result<()> {
        match self.take_break(&request.path, &bytes) {
            Some(Fault::CutAt(place)) => {
                self.send_piece(content, bytes.start..place, fault)?;
                bail!("cut at byte {place}, as told");
            }
            Some(Fault::StallAt(place)) => {
                self.send_piece(content, bytes.start..place, fault)?;
                let (released, changed) = &self.state.released;
                drop(changed.wait_while(locked(released), |released| !*released));
                self.send_piece(content, place..bytes.end, fault)
            }
            _ => self.send_piece(content, bytes, fault),
        }
    }

    fn send_piece(&self, content: &Content, bytes: Range<u64>, fault: Option<&Fault>) -> Result<()> {
        let mut buffer = vec![0; PIECE];
        let mut place = bytes.start;
        let mut stream = self.stream;
        while place < bytes.end {
            let rest = usize::try_from(bytes.end - place).unwrap_or(PIECE);
            let count = content.fill(place, &mut buffer).min(rest);
            if let Some(Fault::WrongByte(wrong)) = fault
                && (place..place + count as u64).contains(wrong)
            {
                buffer[usize::try_from(wrong - place)?] ^= 1;
            }
            stream.write_all(&buffer[..count])?;
            place += count as u64;
        }
        Ok(())
    }
}

impl Drop for Connection<'_> {
    fn drop(&mut self) {
        // Whoever waits for more sees the end at once. The client may have gone before.
        let _ = self.stream.shutdown(Shutdown::Both);
    }
}

fn is_known(revision: &str) -> bool {
    ["main", COMMIT, "v1.0", "refs%2Fpr%2F1"].contains(&revision)
}

fn has_token(request: &Seen, token: &str) -> bool {
    request.header("authorization") == Some(&format!("Bearer {token}"))
}

fn file_headers(content: &Content) -> Vec<(String, String)> {
    vec![("etag".into(), format!("\"{}\"", content.etag())), ("x-repo-commit".into(), COMMIT.into())]
}

/// `bytes=from-to`, `bytes=from-`; the end is excluded in what comes out.
fn parse_range(range: &str, length: u64) -> Option<(u64, u64)> {
    let (from, to) = range.strip_prefix("bytes=")?.split_once('-')?;
    let from = from.parse().ok()?;
    let to = if to.is_empty() { length } else { to.parse::<u64>().ok()? + 1 };
    (from < to.min(length)).then_some((from, to.min(length)))
}

fn read_request(reader: &mut BufReader<&TcpStream>, elsewhere: bool) -> Result<Option<Seen>> {
    let mut line = String::new();
    if reader.read_line(&mut line)? == 0 {
        return Ok(None);
    }
    let mut words = line.split_whitespace();
    let (method, path) =
        (words.next().context("a method")?.to_owned(), words.next().context("a path")?.to_owned());
    let mut headers = HeaderMap::new();
    loop {
        let mut line = String::new();
        reader.by_ref().take(64 << 10).read_line(&mut line)?;
        let line = line.trim_end();
        if line.is_empty() {
            return Ok(Some(Seen { method, path, headers, elsewhere }));
        }
        let (name, value) = line.split_once(": ").context("a header")?;
        headers.insert(HeaderName::try_from(name)?, HeaderValue::try_from(value)?);
    }
}
