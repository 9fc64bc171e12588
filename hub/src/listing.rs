//! What the Hub says of a repository: its files at a revision, and where each of them is.

use http::header::{CONTENT_LENGTH, ETAG};
use http::{Method, Uri};
use serde::Deserialize;

use crate::client::{Answer, Client, Failure, Follow, Question};
use crate::error::HubError;
use crate::repo::{Source, is_plain_name, is_relative_path};
use crate::retry::Retry;
use crate::url::shown;

/// A revision: its commit and its files.
#[derive(Debug)]
pub(crate) struct Listing {
    pub(crate) commit: String,
    pub(crate) files: Vec<Entry>,
}

/// A file of a repository.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Its name, with its folders.
    pub name: String,
    /// Its size in bytes, where the Hub tells.
    pub size: Option<u64>,
}

/// What is known of a file before it is fetched.
#[derive(Clone, Debug)]
pub(crate) struct Metadata {
    /// The name of its contents.
    pub(crate) etag: String,
    /// Its size in bytes, where the Hub tells.
    pub(crate) size: Option<u64>,
}

#[derive(Deserialize)]
struct Description {
    sha: String,
    siblings: Vec<Sibling>,
}

#[derive(Deserialize)]
struct Sibling {
    rfilename: String,
    #[serde(default)]
    size: Option<u64>,
}

/// Asks for the files of a revision.
///
/// Errors when there is no such repository or revision, when the Hub does not answer, or when it names files that would
/// lie outside of the snapshot.
pub(crate) fn list(client: &Client, source: &Source) -> Result<Listing, HubError> {
    let url = client.description_url(source);
    let question =
        Question { method: Method::GET, url: &url, range: None, follow: Follow::All, source, file: None };
    let body = Retry::until_done(client.patience(), || client.ask(&question)?.read())?;
    let nonsense = |problem: String| HubError::BadAnswer { url: shown(&url), problem };
    let description: Description = serde_json::from_slice(&body)
        .map_err(|error| nonsense(format!("it is no description of a model: {error}")))?;
    if !is_plain_name(&description.sha) {
        return Err(nonsense(format!("`{}` is no commit", description.sha)));
    }
    let mut files = Vec::with_capacity(description.siblings.len());
    for Sibling { rfilename: name, size } in description.siblings {
        if !is_relative_path(&name) {
            return Err(nonsense(format!("`{name}` is no name of a file in a repository")));
        }
        files.push(Entry { name, size });
    }
    Ok(Listing { commit: description.sha, files })
}

/// Asks what is known of one file of a commit.
///
/// Errors when there is no such file, when it may not be read, or when the Hub does not answer.
pub(crate) fn look(client: &Client, source: &Source, commit: &str, file: &str) -> Result<Metadata, HubError> {
    let url = client.file_url(source, commit, file);
    let question = Question {
        method: Method::HEAD,
        url: &url,
        range: None,
        follow: Follow::SameServer,
        source,
        file: Some(file),
    };
    let answer = Retry::until_done(client.patience(), || client.ask(&question))?;
    metadata(&url, &answer)
}

fn metadata(url: &Uri, answer: &Answer) -> Result<Metadata, HubError> {
    // Of large files, `etag` is that of the redirect, and `x-linked-etag` that of the file.
    let etag = answer.text_of("x-linked-etag").or_else(|| answer.text_of(ETAG.as_str())).unwrap_or_default();
    let etag = etag.trim_start_matches("W/").trim_matches('"').to_owned();
    if !is_plain_name(&etag) {
        let problem = format!("`{etag}` as the etag of a file; if HF_ENDPOINT is set, it may not be a Hub");
        return Err(HubError::BadAnswer { url: shown(url), problem });
    }
    let number = |name: &str| answer.text_of(name)?.trim().parse().ok();
    let size = number("x-linked-size").or_else(|| {
        let own = (200..300).contains(&answer.status);
        number(CONTENT_LENGTH.as_str()).filter(|_| own)
    });
    Ok(Metadata { etag, size })
}

/// Asks for bytes of a file, wherever the Hub says they are.
pub(crate) fn fetch(
    client: &Client,
    source: &Source,
    file: &str,
    url: &Uri,
    range: Option<std::ops::Range<u64>>,
) -> Result<Answer, Failure> {
    client.ask(&Question { method: Method::GET, url, range, follow: Follow::All, source, file: Some(file) })
}
