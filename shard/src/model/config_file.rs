//! `config.json` as typed fields. An error names the file, the field, what it holds and what was expected.

use std::io;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};
use thiserror::Error;

use crate::small_file;

const NAME: &str = "config.json";

/// Largest file accepted. Real ones are a few kilobytes, and a list of digits takes fifty times as much memory as its bytes.
const BYTES_MAX: u64 = 1 << 20;

/// Largest size (hidden, vocabulary, heads …) accepted: products of two of them stay far from overflow.
const SIZE_MAX: usize = 1 << 27;

/// Why a configuration cannot be used.
#[derive(Debug, Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("{}: {source}", file.display())]
    Read {
        /// The file.
        file: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The file is not a JSON object.
    #[error("{}: {}", file.display(), shortened(&source.to_string()))]
    Json {
        /// The file.
        file: PathBuf,
        /// What is wrong, and where.
        source: serde_json::Error,
    },
    /// A field that has no default is absent.
    #[error("{}: `{field}` is missing", file.display())]
    Missing {
        /// The file.
        file: PathBuf,
        /// The field.
        field: String,
    },
    /// A field holds something else than it must.
    #[error("{}: `{field}` is {found}, expected {expected}", file.display())]
    Value {
        /// The file.
        file: PathBuf,
        /// The field.
        field: String,
        /// What it holds.
        found: String,
        /// What it must hold.
        expected: String,
    },
    /// A field names something that exists, perhaps, but not here.
    #[error("{}: {field} `{found}` is not served; served: {served}", file.display())]
    Unserved {
        /// The file.
        file: PathBuf,
        /// The field.
        field: String,
        /// What it names.
        found: String,
        /// What it may name.
        served: String,
    },
}

/// The object in a `config.json`.
#[derive(Clone, Debug)]
pub struct ConfigFile {
    path: PathBuf,
    /// Where the object is in the file, with a dot at the end; empty for the outermost.
    prefix: String,
    object: Map<String, Value>,
}

/// An object of the file: the outermost, or one inside. A field that is null counts as absent.
#[derive(Clone, Debug)]
pub struct Fields<'a> {
    file: &'a Path,
    /// Where the object is, with a dot at the end; empty for the outermost.
    prefix: String,
    object: &'a Map<String, Value>,
}

impl ConfigFile {
    /// Reads `config.json` in `directory`.
    pub fn read(directory: &Path) -> Result<Self, ConfigError> {
        Self::read_file(&directory.join(NAME))
    }

    /// Reads a file of another name.
    pub fn read_file(path: &Path) -> Result<Self, ConfigError> {
        match small_file::read(path, BYTES_MAX) {
            Err(source) => Err(ConfigError::Read { file: path.to_owned(), source }),
            Ok(bytes) => Self::parse(path.to_owned(), &bytes),
        }
    }

    /// The object in a file's bytes; `path` is for errors.
    pub fn parse(path: PathBuf, bytes: &[u8]) -> Result<Self, ConfigError> {
        match serde_json::from_slice(bytes) {
            Err(source) => Err(ConfigError::Json { file: path, source }),
            Ok(object) => Ok(Self { path, prefix: String::new(), object }),
        }
    }

    /// The file as if it held this object, which it must be.
    #[cfg(test)]
    pub(crate) fn from_json(object: Value) -> Self {
        let Value::Object(object) = object else { panic!("{object} is no object") };
        Self { path: PathBuf::from(NAME), prefix: String::new(), object }
    }

    /// Its fields.
    pub fn fields(&self) -> Fields<'_> {
        Fields { file: &self.path, prefix: self.prefix.clone(), object: &self.object }
    }

    /// Scales rotary frequencies in another way than the file says, for all kinds of layers.
    pub fn set_rope_scaling(&mut self, kind: &str, factor: f64) {
        let scale = |parameters: &mut Map<String, Value>| {
            parameters.remove("type");
            parameters.insert("rope_type".to_owned(), kind.into());
            parameters.insert("factor".to_owned(), factor.into());
        };
        let mut parameters = match self.object.remove("rope_parameters") {
            Some(Value::Object(parameters)) => parameters,
            _ => Map::new(),
        };
        if let Some(Value::Object(text)) = self.object.get_mut("text_config") {
            // A model that also sees: its text model is what is scaled.
            let mut inner =
                Self { path: self.path.clone(), prefix: String::new(), object: std::mem::take(text) };
            inner.set_rope_scaling(kind, factor);
            *text = inner.object;
        } else if parameters.values().any(Value::is_object) {
            parameters.values_mut().filter_map(Value::as_object_mut).for_each(scale);
            self.object.insert("rope_parameters".to_owned(), parameters.into());
        } else {
            scale(&mut parameters);
            if let Some(theta) = parameters.remove("rope_theta") {
                self.object.insert("rope_theta".to_owned(), theta);
            }
            if let Some(share) = parameters.remove("partial_rotary_factor") {
                self.object.insert("partial_rotary_factor".to_owned(), share);
            }
            self.object.insert("rope_scaling".to_owned(), parameters.into());
        }
    }

    /// The object in one of the fields, as if it were a file of its own.
    ///
    /// Errors when the field is missing or something else.
    pub fn inside(&self, name: &str) -> Result<Self, ConfigError> {
        let inner = self.fields().required(name, Fields::object)?;
        Ok(Self { path: self.path.clone(), prefix: inner.prefix, object: inner.object.clone() })
    }

    /// The same with these values for fields that the file leaves out altogether; null counts as left in.
    pub fn or(mut self, defaults: impl IntoIterator<Item = (&'static str, Value)>) -> Self {
        for (name, value) in defaults {
            if !self.object.contains_key(name) {
                self.object.insert(name.to_owned(), value);
            }
        }
        self
    }
}

impl<'a> Fields<'a> {
    /// Whether the field is there and not null.
    pub fn has(&self, name: &str) -> bool {
        self.value(name).is_some()
    }

    /// A size: a whole number from 1 to 2^27.
    pub fn size(&self, name: &str) -> Result<Option<usize>, ConfigError> {
        self.parse(name, "a whole number from 1 to 134217728", |value| {
            let size = usize::try_from(value.as_u64()?).ok()?;
            (1..=SIZE_MAX).contains(&size).then_some(size)
        })
    }

    /// A whole number.
    pub fn index(&self, name: &str) -> Result<Option<usize>, ConfigError> {
        self.parse(name, "a whole number", |value| usize::try_from(value.as_u64()?).ok())
    }

    /// A number of at least `min`.
    pub fn number_from(&self, name: &str, min: f64) -> Result<Option<f64>, ConfigError> {
        self.parse(name, &format!("a number of at least {min}"), |value| {
            value.as_f64().filter(|number| number.is_finite() && *number >= min)
        })
    }

    /// True or false.
    pub fn flag(&self, name: &str) -> Result<Option<bool>, ConfigError> {
        self.parse(name, "true or false", Value::as_bool)
    }

    /// A string.
    pub fn text(&self, name: &str) -> Result<Option<&'a str>, ConfigError> {
        self.parse(name, "a string", Value::as_str)
    }

    /// A number, or else a string.
    pub fn text_or_number(&self, name: &str) -> Result<Option<Result<f64, &'a str>>, ConfigError> {
        self.parse(name, "a number or a string", |value| match value {
            Value::String(text) => Some(Err(text.as_str())),
            other => other.as_f64().filter(|number| number.is_finite()).map(Ok),
        })
    }

    /// An object inside this one.
    pub fn object(&self, name: &str) -> Result<Option<Fields<'a>>, ConfigError> {
        let object = self.parse(name, "an object", Value::as_object)?;
        Ok(object.map(|object| Fields { file: self.file, prefix: format!("{}{name}.", self.prefix), object }))
    }

    /// A list of strings.
    pub fn texts(&self, name: &str) -> Result<Option<Vec<&'a str>>, ConfigError> {
        self.parse(name, "a list of strings", |value| value.as_array()?.iter().map(Value::as_str).collect())
    }

    /// A list of whole numbers.
    pub fn indices(&self, name: &str) -> Result<Option<Vec<usize>>, ConfigError> {
        let index = |value: &Value| usize::try_from(value.as_u64()?).ok();
        self.parse(name, "a list of whole numbers", |value| value.as_array()?.iter().map(index).collect())
    }

    /// A list of numbers above 0.
    pub fn positive_numbers(&self, name: &str) -> Result<Option<Vec<f64>>, ConfigError> {
        let positive = |value: &Value| value.as_f64().filter(|number| number.is_finite() && *number > 0.0);
        let expected = "a list of numbers above 0";
        self.parse(name, expected, |value| value.as_array()?.iter().map(positive).collect())
    }

    /// The names of all fields.
    pub fn names(&self) -> impl Iterator<Item = &'a str> {
        self.object.keys().map(String::as_str)
    }

    /// The names of the fields that are objects themselves.
    pub fn object_names(&self) -> impl Iterator<Item = &'a str> {
        let objects = self.object.iter().filter(|(_, value)| value.is_object());
        objects.map(|(name, _)| name.as_str())
    }

    /// A field that has no default, read by one of the functions above.
    pub fn required<T>(
        &self,
        name: &str,
        read: impl FnOnce(&Self, &str) -> Result<Option<T>, ConfigError>,
    ) -> Result<T, ConfigError> {
        let missing =
            || ConfigError::Missing { file: self.file.to_owned(), field: format!("{}{name}", self.prefix) };
        read(self, name)?.ok_or_else(missing)
    }

    /// An error about this field, whether it is there or not.
    pub fn wrong(&self, name: &str, expected: impl Into<String>) -> ConfigError {
        ConfigError::Value {
            file: self.file.to_owned(),
            field: format!("{}{name}", self.prefix),
            found: self.object.get(name).map_or_else(|| "absent".to_owned(), shown),
            expected: expected.into(),
        }
    }

    /// An error about a name that is none of those served.
    pub fn unserved(&self, name: &str, found: &str, served: &[&str]) -> ConfigError {
        ConfigError::Unserved {
            file: self.file.to_owned(),
            field: format!("{}{name}", self.prefix),
            found: shortened(&found.escape_debug().to_string()),
            served: served.join(", "),
        }
    }

    fn value(&self, name: &str) -> Option<&'a Value> {
        self.object.get(name).filter(|value| !value.is_null())
    }

    fn parse<T>(
        &self,
        name: &str,
        expected: &str,
        convert: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, ConfigError> {
        match self.value(name) {
            None => Ok(None),
            Some(value) => match convert(value) {
                None => Err(self.wrong(name, expected)),
                found => Ok(found),
            },
        }
    }
}

/// A value on one line of bounded length.
fn shown(value: &Value) -> String {
    shortened(&value.to_string())
}

fn shortened(text: &str) -> String {
    const CHARS_MAX: usize = 80;
    match text.char_indices().nth(CHARS_MAX) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(contents: &[u8]) -> Result<ConfigFile, ConfigError> {
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join(NAME), contents).unwrap();
        ConfigFile::read(directory.path())
    }

    fn check<T: std::fmt::Debug>(found: Result<T, ConfigError>, expected: &str) {
        let message = found.unwrap_err().to_string();
        assert!(message.contains(NAME) && message.contains(expected), "expected `{expected}` in: {message}");
    }

    #[test]
    fn a_file_that_is_no_json_object_is_an_error() {
        check(read(b""), "EOF");
        check(read(b"[]"), "expected a map");
        check(read(b"\xff"), "line 1");
        check(read("[".repeat(10_000).as_bytes()), "line 1");
        let directory = tempfile::tempdir().unwrap();
        check(ConfigFile::read(directory.path()), "No such file");
        std::fs::create_dir(directory.path().join(NAME)).unwrap();
        check(ConfigFile::read(directory.path()), "not a regular file");
    }

    #[test]
    fn null_counts_as_absent() {
        let file = read(br#"{"a": null}"#).unwrap();
        assert_eq!(file.fields().size("a").unwrap(), None);
        check(file.fields().required("a", Fields::size), "`a` is missing");
    }

    #[test]
    fn a_field_of_the_wrong_kind_is_an_error_that_shows_it() {
        let file =
            read(br#"{"a": {"b": -1, "c": "x", "d": 0, "e": 1e99, "f": [1, -2], "g": 4294967296}}"#).unwrap();
        let inner = file.fields().object("a").unwrap().unwrap();
        check(inner.size("b"), "`a.b` is -1, expected a whole number");
        check(inner.size("d"), "`a.d` is 0, expected a whole number");
        check(inner.size("e"), "`a.e` is 1e+99, expected a whole number");
        check(inner.size("g"), "`a.g` is 4294967296");
        check(inner.number_from("b", 0.0), "`a.b` is -1, expected a number of at least 0");
        check(inner.flag("c"), "`a.c` is \"x\", expected true or false");
        check(inner.text("d"), "`a.d` is 0, expected a string");
        check(inner.object("c"), "`a.c` is \"x\", expected an object");
        check(inner.indices("f"), "`a.f` is [1,-2], expected a list of whole numbers");
        check(inner.texts("f"), "`a.f` is [1,-2], expected a list of strings");
        check(inner.positive_numbers("f"), "`a.f` is [1,-2], expected a list of numbers above 0");
    }

    #[test]
    fn another_rotary_scaling_replaces_the_files_own_in_both_forms() {
        let scaled = |contents: &str| {
            let mut file = read(contents.as_bytes()).unwrap();
            file.set_rope_scaling("linear", 2.0);
            Value::Object(file.object).to_string()
        };
        let expected = r#"{"rope_scaling":{"rope_type":"linear","factor":2.0}}"#;
        assert_eq!(scaled("{}"), expected);
        assert_eq!(scaled(r#"{"rope_scaling": {"type": "yarn", "factor": 8}}"#), expected);
        assert_eq!(
            scaled(r#"{"rope_parameters": {"rope_type": "default", "rope_theta": 5}}"#),
            r#"{"rope_theta":5,"rope_scaling":{"rope_type":"linear","factor":2.0}}"#
        );
    }

    #[test]
    fn a_long_value_is_shortened() {
        let file = read(format!(r#"{{"a": "{}"}}"#, "é".repeat(1000)).as_bytes()).unwrap();
        assert!(file.fields().size("a").unwrap_err().to_string().chars().count() < 300);
    }
}
