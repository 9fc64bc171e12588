//! One file from the network to the disk: in several ranges at once when it is large, carried on wherever it broke off,
//! and checked at the end.

use std::io::Read;
use std::ops::Range;
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::thread;

use http::Uri;
use http::header::CONTENT_RANGE;
use telemetry::progress::Progress;
use tracing::warn;

use crate::client::{Answer, Client, Failure};
use crate::error::HubError;
use crate::listing::{self, Metadata};
use crate::partial::Partial;
use crate::repo::Source;
use crate::retry::Retry;
use crate::url::shown;
use crate::window::{Ended, Window};

/// Connections that fetch one large file.
const CONNECTIONS: u64 = 8;

/// Bytes that are read at once.
const BUFFER_BYTES: usize = 256 << 10;

/// One file that is being fetched.
pub(crate) struct Transfer<'a> {
    client: &'a Client,
    source: &'a Source,
    file: &'a str,
    metadata: &'a Metadata,
    progress: &'a Progress,
    /// Where the Hub has the file.
    home: Uri,
    /// Where the bytes were last found: the Hub sends one to other servers, with a link that holds for a while.
    location: Mutex<Uri>,
}

impl<'a> Transfer<'a> {
    /// A file of a commit.
    pub(crate) fn new(
        client: &'a Client,
        (source, commit): (&'a Source, &str),
        file: &'a str,
        metadata: &'a Metadata,
        progress: &'a Progress,
    ) -> Self {
        let home = client.file_url(source, commit, file);
        Self { client, source, file, metadata, progress, location: Mutex::new(home.clone()), home }
    }

    /// Completes the file at `path`. Contents that are not what the Hub promised are fetched once more.
    ///
    /// Errors when they are wrong again, when the servers do not answer, or when the disk is full.
    pub(crate) fn complete(&self, path: &Path) -> Result<(), HubError> {
        match self.attempt(path) {
            Err(error @ (HubError::Checksum { .. } | HubError::Size { .. })) => {
                warn!("{error}; fetching it again");
                self.attempt(path)
            }
            done => done,
        }
    }

    fn attempt(&self, path: &Path) -> Result<(), HubError> {
        let mut partial = Partial::open(path, self.metadata)?;
        let worthwhile = partial.rest().is_some_and(Window::is_worthwhile);
        if !worthwhile || !self.by_ranges(&mut partial)? {
            self.in_one_stream(&mut partial)?;
        }
        let length = partial.length();
        partial.verify(self.file, &self.metadata.etag).inspect_err(|_| self.progress.take_back(length))
    }

    /// Fetches the rest in ranges; false when the server has none.
    fn by_ranges(&self, partial: &mut Partial) -> Result<bool, HubError> {
        let Some(rest) = partial.rest() else { return Ok(false) };
        let window = Window::new(partial.length(), partial.length() + rest);
        let ended = thread::scope(|scope| {
            for _ in 0..window.chunk_count().min(CONNECTIONS) {
                scope.spawn(|| self.work(&window));
            }
            let ended = self.write(&window, partial);
            // Whatever ended it, nobody shall go on fetching.
            window.end(Ended::Closed);
            ended
        });
        match ended {
            Ok(()) => Ok(true),
            Err(Ended::NoRanges) => Ok(false),
            Err(Ended::Failed(error)) => Err(error),
            Err(Ended::Closed) => unreachable!("who closes a window says why"),
        }
    }

    fn write(&self, window: &Window, partial: &mut Partial) -> Result<(), Ended> {
        while let Some(bytes) = window.next()? {
            partial.append(&bytes, self.file).map_err(Ended::Failed)?;
        }
        Ok(())
    }

    fn work(&self, window: &Window) {
        while let Some(range) = window.claim() {
            match self.chunk(range.clone(), window) {
                Ok(bytes) => window.deliver(range.start, bytes),
                Err(reason) => return window.end(reason),
            }
        }
    }

    /// The bytes of one range, in as many attempts as it takes.
    fn chunk(&self, range: Range<u64>, window: &Window) -> Result<Vec<u8>, Ended> {
        let length = usize::try_from(range.end - range.start).expect("a chunk fits into memory");
        let mut bytes = Vec::with_capacity(length);
        let mut retry = Retry::new(self.client.patience());
        loop {
            let before = bytes.len();
            let failure = match self.more_of(&range, &mut bytes, window)? {
                Ok(()) => return Ok(bytes),
                Err(failure) => failure,
            };
            if bytes.len() > before {
                retry.progressed();
            }
            window.pause(retry.after(failure).map_err(Ended::Failed)?);
        }
    }

    /// One attempt to get what is missing of a range.
    fn more_of(
        &self,
        range: &Range<u64>,
        bytes: &mut Vec<u8>,
        window: &Window,
    ) -> Result<Result<(), Failure>, Ended> {
        let wanted = range.start + bytes.len() as u64..range.end;
        let answer = match self.ask(Some(wanted.clone())) {
            Ok(answer) => answer,
            Err(failure) => return Ok(Err(failure)),
        };
        if answer.status != 206 {
            return Err(Ended::NoRanges);
        }
        let url = shown(&answer.url);
        let mut body = answer.into_reader().take(wanted.end - wanted.start);
        let mut buffer = vec![0; BUFFER_BYTES];
        loop {
            if window.is_closed() {
                return Err(Ended::Closed);
            }
            match body.read(&mut buffer) {
                Ok(0) if bytes.len() as u64 == range.end - range.start => return Ok(Ok(())),
                Ok(0) => return Ok(Err(broken_off(url, "the connection ended early"))),
                Ok(count) => {
                    bytes.extend_from_slice(&buffer[..count]);
                    self.progress.add(count as u64);
                }
                Err(error) => return Ok(Err(broken_off(url, &error.to_string()))),
            }
        }
    }

    /// Fetches the rest over one connection at a time.
    fn in_one_stream(&self, partial: &mut Partial) -> Result<(), HubError> {
        let mut retry = Retry::new(self.client.patience());
        let mut farthest = partial.length();
        while partial.rest() != Some(0) {
            let Err(failure) = self.stream(partial) else { return Ok(()) };
            if partial.length() > farthest {
                farthest = partial.length();
                retry.progressed();
            }
            thread::sleep(retry.after(failure)?);
        }
        Ok(())
    }

    fn stream(&self, partial: &mut Partial) -> Result<(), Failure> {
        let size = self.metadata.size.filter(|_| partial.length() > 0);
        let answer = self.ask(size.map(|size| partial.length()..size))?;
        if answer.status != 206 && partial.length() > 0 {
            self.progress.take_back(partial.length());
            partial.restart().map_err(Failure::Final)?;
        }
        let url = shown(&answer.url);
        let mut body = answer.into_reader();
        let mut buffer = vec![0; BUFFER_BYTES];
        loop {
            match body.read(&mut buffer) {
                Ok(0) if partial.rest().unwrap_or(0) == 0 => return Ok(()),
                Ok(0) => return Err(broken_off(url, "the connection ended early")),
                Ok(count) => {
                    partial.append(&buffer[..count], self.file).map_err(Failure::Final)?;
                    self.progress.add(count as u64);
                }
                Err(error) => return Err(broken_off(url, &error.to_string())),
            }
            // A server that does not stop is stopped; the check at the end says what is wrong.
            if self.metadata.size.is_some_and(|size| partial.length() > size) {
                return Ok(());
            }
        }
    }

    /// Asks for bytes where they were last found, or else where the Hub has them.
    fn ask(&self, range: Option<Range<u64>>) -> Result<Answer, Failure> {
        let url = self.location().clone();
        match listing::fetch(self.client, self.source, self.file, &url, range.clone()) {
            Ok(answer) => {
                self.check_range(&answer, range)?;
                *self.location() = answer.url.clone();
                Ok(answer)
            }
            // Links to other servers hold for a while, and these come and go. The Hub gives a new one.
            Err(failure) => {
                *self.location() = self.home.clone();
                Err(failure)
            }
        }
    }

    fn location(&self) -> std::sync::MutexGuard<'_, Uri> {
        self.location.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the bytes are those that were asked for.
    fn check_range(&self, answer: &Answer, range: Option<Range<u64>>) -> Result<(), Failure> {
        let (Some(range), 206, Some(said)) = (range, answer.status, answer.text_of(CONTENT_RANGE.as_str()))
        else {
            return Ok(());
        };
        let first = said.trim().strip_prefix("bytes ").and_then(|rest| rest.split('-').next()?.parse().ok());
        if first == Some(range.start) {
            return Ok(());
        }
        let problem = format!("bytes from {} were asked for, and `{said}` came", range.start);
        Err(Failure::Final(HubError::BadAnswer { url: shown(&answer.url), problem }))
    }
}

fn broken_off(url: String, reason: &str) -> Failure {
    Failure::Passing { url, reason: reason.to_owned(), wait: None }
}
