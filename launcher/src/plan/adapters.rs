//! What `--lora-adapters` says, as a list.

use std::collections::HashSet;
use std::path::PathBuf;

use super::checks::PlanError;
use crate::adapters::Adapter;

/// An adapter as the user gave it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AdapterArgument {
    /// What requests call it; without a directory, also what says where it is.
    pub name: String,
    /// Its directory.
    pub directory: Option<PathBuf>,
    /// Branch, tag or commit.
    pub revision: Option<String>,
}

/// Reads `--lora-adapters`: items with commas between them, each `id`, `id@revision`, `name=/directory` or
/// `name=/directory@revision`. Blanks around a part do not count; an empty text has no items.
///
/// Errors when an item is none of these, and when two have the same name.
pub fn parse(text: &str) -> Result<Vec<AdapterArgument>, PlanError> {
    if text.trim().is_empty() {
        return Ok(Vec::new());
    }
    let mut names = HashSet::new();
    text.split(',')
        .map(|item| {
            let argument = argument(item)
                .map_err(|problem| PlanError::Adapter { item: item.trim().to_owned(), problem })?;
            match names.insert(argument.name.clone()) {
                true => Ok(argument),
                false => Err(PlanError::AdapterTwice(argument.name)),
            }
        })
        .collect()
}

fn argument(item: &str) -> Result<AdapterArgument, &'static str> {
    let (place, revision) = split(item, '@', "it has more than one `@`", "there is nothing behind its `@`")?;
    if revision.is_some_and(|revision| revision.contains('=')) {
        return Err("its revision stands before its directory");
    }
    let (name, directory) =
        split(place, '=', "it has more than one `=`", "there is no directory behind its `=`")?;
    if name.is_empty() {
        return Err("it has no name");
    }
    Ok(AdapterArgument {
        name: name.to_owned(),
        directory: directory.map(PathBuf::from),
        revision: revision.map(str::to_owned),
    })
}

/// The part before a mark, and the part behind it if the mark is there.
fn split<'a>(
    text: &'a str,
    mark: char,
    twice: &'static str,
    nothing: &'static str,
) -> Result<(&'a str, Option<&'a str>), &'static str> {
    let Some((before, behind)) = text.split_once(mark) else { return Ok((text.trim(), None)) };
    match behind.trim() {
        _ if behind.contains(mark) => Err(twice),
        "" => Err(nothing),
        behind => Ok((before.trim(), Some(behind))),
    }
}

/// Adapters as the shards are told of them: `name=/directory`, with commas between them.
pub(super) fn list(adapters: &[Adapter]) -> String {
    let items = adapters.iter().map(|adapter| format!("{}={}", adapter.name, adapter.directory));
    items.collect::<Vec<_>>().join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Name, directory and revision of each item.
    #[track_caller]
    fn check(text: &str, expected: &[(&str, Option<&str>, Option<&str>)]) {
        let found = parse(text).unwrap_or_else(|error| panic!("{text}: {error}"));
        let expected: Vec<_> = expected
            .iter()
            .map(|(name, directory, revision)| AdapterArgument {
                name: (*name).to_owned(),
                directory: directory.map(PathBuf::from),
                revision: revision.map(str::to_owned),
            })
            .collect();
        assert_eq!(found, expected, "{text}");
    }

    #[test]
    fn every_form_of_an_item_is_understood() {
        check("", &[]);
        check("  ", &[]);
        check("org/poet", &[("org/poet", None, None)]);
        check("org/poet@v1", &[("org/poet", None, Some("v1"))]);
        check("org/poet@refs/pr/1", &[("org/poet", None, Some("refs/pr/1"))]);
        check("poet=/data/poet", &[("poet", Some("/data/poet"), None)]);
        check("poet=/data/poet@v1", &[("poet", Some("/data/poet"), Some("v1"))]);
        check(
            "a, b =/x , c = y @ z",
            &[("a", None, None), ("b", Some("/x"), None), ("c", Some("y"), Some("z"))],
        );
    }

    #[test]
    fn what_is_no_item_is_named_with_its_fault() {
        let cases = [
            ("a=b=c", "a=b=c", "it has more than one `=`"),
            ("a@b@c", "a@b@c", "it has more than one `@`"),
            ("a=/b@c@d", "a=/b@c@d", "it has more than one `@`"),
            ("a@b=/c", "a@b=/c", "its revision stands before its directory"),
            ("x, =/b", "=/b", "it has no name"),
            ("@b", "@b", "it has no name"),
            ("a,,b", "", "it has no name"),
            ("a,", "", "it has no name"),
            ("a=", "a=", "there is no directory behind its `=`"),
            ("a= @v1", "a= @v1", "there is no directory behind its `=`"),
            ("a@ ", "a@", "there is nothing behind its `@`"),
        ];
        for (text, item, problem) in cases {
            let expected = PlanError::Adapter { item: item.to_owned(), problem };
            assert_eq!(parse(text), Err(expected), "{text}");
        }
    }

    #[test]
    fn a_name_is_given_once() {
        for text in ["a,a", "a@v1,a@v2", "a=/x,b,a"] {
            assert_eq!(parse(text), Err(PlanError::AdapterTwice("a".to_owned())), "{text}");
        }
        check("a=/x,b=/x", &[("a", Some("/x"), None), ("b", Some("/x"), None)]);
    }
}
