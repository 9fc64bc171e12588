//! Names: of repositories, of revisions, of files in them. Checked once, because they become parts of paths and URLs.

use std::fmt;

use crate::error::HubError;

/// Longest name of a repository that the Hub takes.
const ID_BYTES_MAX: usize = 96;

/// Longest revision and longest file name, with room to spare.
const NAME_BYTES_MAX: usize = 1024;

/// What to fetch: a repository at a revision.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Source {
    id: String,
    revision: String,
}

impl Source {
    /// A repository `name` or `organization/name`, at a branch, tag, commit or `refs/pr/N`; `main` when there is none.
    ///
    /// Errors when either is nothing that the Hub could have.
    pub fn new(id: &str, revision: Option<&str>) -> Result<Self, HubError> {
        if let Some(problem) = problem_of_id(id) {
            return Err(HubError::BadId { id: id.to_owned(), problem });
        }
        let revision = revision.filter(|revision| !revision.is_empty()).unwrap_or("main");
        if !is_relative_path(revision) {
            return Err(HubError::BadRevision(revision.to_owned()));
        }
        Ok(Self { id: id.to_owned(), revision: revision.to_owned() })
    }

    /// The repository and the revision of `id` or `id@revision`.
    ///
    /// Errors as [`Source::new`] does.
    pub fn parse(text: &str) -> Result<Self, HubError> {
        match text.split_once('@') {
            Some((id, revision)) => Self::new(id, Some(revision)),
            None => Self::new(text, None),
        }
    }

    /// Whether a name could be a repository of the Hub.
    pub fn is_id(id: &str) -> bool {
        problem_of_id(id).is_none()
    }

    /// The repository.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The revision.
    pub fn revision(&self) -> &str {
        &self.revision
    }

    /// The revision, if it is a commit: what it holds never changes.
    pub fn commit(&self) -> Option<&str> {
        let hex = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
        Some(self.revision.as_str()).filter(|text| text.len() == 40 && text.bytes().all(hex))
    }

    /// The name of its directory in the cache.
    pub(crate) fn folder(&self) -> String {
        format!("models--{}", self.id.replace('/', "--"))
    }
}

impl fmt::Display for Source {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.revision.as_str() {
            "main" => write!(formatter, "`{}`", self.id),
            revision => write!(formatter, "`{}` at revision `{revision}`", self.id),
        }
    }
}

fn problem_of_id(id: &str) -> Option<&'static str> {
    let known = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    if id.is_empty() {
        Some("it is empty")
    } else if id.len() > ID_BYTES_MAX {
        Some("it has more than 96 characters")
    } else if id.split('/').count() > 2 {
        Some("it has more than one `/`")
    } else if !id.split('/').all(|part| part.bytes().all(known)) {
        Some("it has characters other than letters, digits, `-`, `_` and `.`")
    } else if id
        .split('/')
        .any(|part| part.is_empty() || part.starts_with(['.', '-']) || part.ends_with(['.', '-']))
    {
        Some("a part of it is empty, or begins or ends with `.` or `-`")
    } else if id.contains("--") || id.contains("..") {
        Some("it has `--` or `..`")
    } else {
        None
    }
}

/// Whether a name of the Hub stays inside of the directory that it is put into.
pub(crate) fn is_relative_path(name: &str) -> bool {
    name.len() <= NAME_BYTES_MAX
        && name.split('/').all(|part| !part.is_empty() && part != "." && part != "..")
        && !name.contains(['\\', '\0'])
}

/// Whether a word that a server sent can be a file name: a commit, an etag.
pub(crate) fn is_plain_name(word: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    !word.is_empty() && word.len() <= 128 && !word.starts_with('.') && word.bytes().all(plain)
}

/// A name as it stands in a URL's path; `/` is kept in file names and not in revisions.
pub(crate) fn escaped(name: &str, keep_slash: bool) -> String {
    let mut escaped = String::with_capacity(name.len());
    for byte in name.bytes() {
        if byte.is_ascii_alphanumeric() || b"-_.~".contains(&byte) || (keep_slash && byte == b'/') {
            escaped.push(char::from(byte));
        } else {
            escaped.push_str(&format!("%{byte:02X}"));
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_could_be_a_repository_is_told_from_what_could_not() {
        for id in ["gpt2", "org/name", "bigscience/bloom-560m", "a_b/c.d"] {
            assert!(Source::is_id(id), "{id}");
        }
        for id in
            ["", "/etc", "a/b/c", "../x", "a b/c", "org/", ".a/b", "a--b/c", "org/name@rev", &"x".repeat(97)]
        {
            let error = Source::new(id, None).unwrap_err().to_string();
            assert!(error.contains(&format!("`{id}`")), "{error}");
        }
    }

    #[test]
    fn a_revision_cannot_lead_out_of_its_directory() {
        for revision in ["main", "v1.0", "refs/pr/7", "feature/x"] {
            assert_eq!(Source::new("a/b", Some(revision)).unwrap().revision(), revision);
        }
        for revision in ["..", "a/../b", "/a", "a//b", "./a", "a\\b"] {
            assert!(
                Source::new("a/b", Some(revision)).unwrap_err().to_string().contains(revision),
                "{revision}"
            );
        }
    }

    #[test]
    fn a_revision_can_follow_the_id() {
        let source = Source::parse("a/b@refs/pr/1").unwrap();
        assert_eq!((source.id(), source.revision()), ("a/b", "refs/pr/1"));
        assert_eq!(Source::parse("a/b@").unwrap().revision(), "main");
        assert_eq!(Source::parse("a/b").unwrap().folder(), "models--a--b");
    }

    #[test]
    fn only_forty_hexadecimal_digits_are_a_commit() {
        let commit = "0123456789abcdef0123456789abcdef01234567";
        assert_eq!(Source::new("a", Some(commit)).unwrap().commit(), Some(commit));
        assert_eq!(Source::new("a", Some("main")).unwrap().commit(), None);
    }

    #[test]
    fn names_are_escaped_for_urls() {
        assert_eq!(escaped("refs/pr/1", false), "refs%2Fpr%2F1");
        assert_eq!(escaped("a b/ü", true), "a%20b/%C3%BC");
    }
}
