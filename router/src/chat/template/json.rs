//! `tojson` as templates of transformers know it: Python's `json.dumps`, keys in their order, nothing escaped for HTML.

use std::fmt::Write as _;

use minijinja::value::{Kwargs, ValueKind};
use minijinja::{Error, ErrorKind, Value};
use serde_json::Value as Json;

/// The filter. Takes `json.dumps`' `indent`, `ensure_ascii`, `sort_keys` and `separators`.
pub(super) fn tojson(value: &Value, indent: Option<usize>, options: Kwargs) -> Result<Value, Error> {
    if value.kind() == ValueKind::Undefined {
        return Err(Error::new(ErrorKind::InvalidOperation, "an undefined value has no JSON"));
    }
    let indent = match indent {
        Some(indent) => Some(indent),
        None => options.get("indent")?,
    };
    let separators: Option<Vec<String>> = options.get("separators")?;
    let (item, key) = match separators.as_deref() {
        Some([item, key]) => (item.clone(), key.clone()),
        Some(_) => return Err(Error::new(ErrorKind::InvalidOperation, "`separators` are two strings")),
        None => ((if indent.is_some() { "," } else { ", " }).to_owned(), ": ".to_owned()),
    };
    let writer = Writer {
        indent,
        item,
        key,
        ensure_ascii: options.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false),
        sort_keys: options.get::<Option<bool>>("sort_keys")?.unwrap_or(false),
    };
    options.assert_all_used()?;
    let json = serde_json::to_value(value)
        .map_err(|error| Error::new(ErrorKind::BadSerialization, error.to_string()))?;
    let mut text = String::new();
    writer.value(&mut text, &json, 0);
    // Nothing is escaped in prompts, so nothing needs to be marked as safe.
    Ok(text.into())
}

struct Writer {
    indent: Option<usize>,
    item: String,
    key: String,
    ensure_ascii: bool,
    sort_keys: bool,
}

impl Writer {
    fn value(&self, text: &mut String, value: &Json, depth: usize) {
        match value {
            Json::String(string) => self.string(text, string),
            Json::Array(items) => self.list(text, '[', ']', depth, items, |text, item| {
                self.value(text, item, depth + 1);
            }),
            Json::Object(fields) => {
                let mut fields: Vec<_> = fields.iter().collect();
                if self.sort_keys {
                    fields.sort_by_key(|(name, _)| *name);
                }
                self.list(text, '{', '}', depth, &fields, |text, (name, value)| {
                    self.string(text, name);
                    text.push_str(&self.key);
                    self.value(text, value, depth + 1);
                });
            }
            // Python writes null, booleans and numbers alike.
            scalar => text.push_str(&scalar.to_string()),
        }
    }

    fn list<T>(
        &self,
        text: &mut String,
        open: char,
        close: char,
        depth: usize,
        items: &[T],
        write: impl Fn(&mut String, &T),
    ) {
        text.push(open);
        for (position, item) in items.iter().enumerate() {
            if position > 0 {
                text.push_str(&self.item);
            }
            self.line(text, depth + 1);
            write(text, item);
        }
        if !items.is_empty() {
            self.line(text, depth);
        }
        text.push(close);
    }

    fn line(&self, text: &mut String, depth: usize) {
        if let Some(indent) = self.indent {
            text.push('\n');
            text.extend(std::iter::repeat_n(' ', indent * depth));
        }
    }

    fn string(&self, text: &mut String, string: &str) {
        let quoted = Json::from(string).to_string();
        if !self.ensure_ascii {
            text.push_str(&quoted);
            return;
        }
        for character in quoted.chars() {
            if character.is_ascii() {
                text.push(character);
                continue;
            }
            for unit in character.encode_utf16(&mut [0; 2]) {
                write!(text, "\\u{unit:04x}").expect("writing to a string cannot fail");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use minijinja::{Environment, context};

    #[track_caller]
    fn check(expression: &str, expected: &str) {
        let mut environment = Environment::new();
        environment.add_filter("tojson", super::tojson);
        let value = minijinja::Value::from(minijinja::value::Serde(
            serde_json::json!({"b": [1, 2.5, null], "a": "<é'&>", "none": {}}),
        ));
        let text = environment.render_str(&format!("{{{{ {expression} }}}}"), context! { value });
        assert_eq!(text.unwrap(), expected);
    }

    #[test]
    fn it_writes_what_python_writes() {
        check("value|tojson", r#"{"b": [1, 2.5, null], "a": "<é'&>", "none": {}}"#);
        check("value|tojson(sort_keys=true)", r#"{"a": "<é'&>", "b": [1, 2.5, null], "none": {}}"#);
        check("'é😀'|tojson(ensure_ascii=true)", r#""\u00e9\ud83d\ude00""#);
        check("value.b|tojson(separators=(',', ':'))", "[1,2.5,null]");
        check("value.b|tojson(indent=2)", "[\n  1,\n  2.5,\n  null\n]");
        check("{'x': [1]}|tojson(4)", "{\n    \"x\": [\n        1\n    ]\n}");
    }

    #[test]
    fn an_undefined_value_is_an_error() {
        let mut environment = Environment::new();
        environment.add_filter("tojson", super::tojson);
        assert!(environment.render_str("{{ nothing|tojson }}", ()).is_err());
    }
}
