//! Whether contents are what the Hub says they are: its etags are checksums.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use ring::digest::{Context, SHA1_FOR_LEGACY_USE_ONLY, SHA256};

/// What an etag promises of the contents.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Checksum {
    /// Large files: sha256 of the contents.
    Sha256,
    /// Small files: sha1 of `blob `, the length, a zero byte and the contents, which is git's name for them.
    GitSha1,
    /// Something else, as other servers than the Hub have it: nothing that could be checked.
    Unknown,
}

impl Checksum {
    /// The kind of checksum that an etag is.
    pub(crate) fn of_etag(etag: &str) -> Self {
        let hex = etag.bytes().all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte));
        match etag.len() {
            64 if hex => Self::Sha256,
            40 if hex => Self::GitSha1,
            _ => Self::Unknown,
        }
    }

    /// Its name for people.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Sha256 => "sha256",
            Self::GitSha1 => "git sha1",
            Self::Unknown => "checksum",
        }
    }

    /// A sum of no contents yet, which will have `size` bytes; none where there is nothing to sum up.
    pub(crate) fn begin(self, size: u64) -> Option<Context> {
        match self {
            Self::Sha256 => Some(Context::new(&SHA256)),
            Self::GitSha1 => {
                let mut sum = Context::new(&SHA1_FOR_LEGACY_USE_ONLY);
                sum.update(format!("blob {size}\0").as_bytes());
                Some(sum)
            }
            Self::Unknown => None,
        }
    }
}

/// The sum of all of a file's contents, or of its beginning, to be carried on.
pub(crate) fn read_into(sum: &mut Context, path: &Path) -> io::Result<()> {
    let mut file = File::open(path)?;
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(()),
            count => sum.update(&buffer[..count]),
        }
    }
}

/// A finished sum, as etags are written.
pub(crate) fn hex(sum: Context) -> String {
    sum.finish().as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_etag_tells_its_kind() {
        assert_eq!(Checksum::of_etag(&"a0".repeat(32)), Checksum::Sha256);
        assert_eq!(Checksum::of_etag(&"a0".repeat(20)), Checksum::GitSha1);
        assert_eq!(Checksum::of_etag(&"A0".repeat(20)), Checksum::Unknown);
        assert_eq!(Checksum::of_etag("a0-12"), Checksum::Unknown);
    }

    #[test]
    fn sums_are_those_of_git_and_sha256sum() {
        // `printf 'hello\n' | git hash-object --stdin` and `printf 'hello\n' | sha256sum`.
        let cases = [
            (Checksum::GitSha1, "ce013625030ba8dba906f756967f9e9ca394464a"),
            (Checksum::Sha256, "5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03"),
        ];
        for (kind, expected) in cases {
            let mut sum = kind.begin(6).unwrap();
            sum.update(b"hel");
            sum.update(b"lo\n");
            assert_eq!(hex(sum), expected);
        }
    }
}
