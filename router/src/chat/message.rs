//! A message as clients send it, and as templates want it.

use std::fmt;

use serde::de::value::MapAccessDeserializer;
use serde::de::{Error as _, MapAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::{Map, Value};

/// A message of a chat. Its fields reach the template as they are, whatever their names.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Message(Map<String, Value>);

/// How a template wants contents that consist of text parts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Contents {
    /// As one string.
    Joined,
    /// As the client sent them.
    Parts,
}

impl Message {
    /// Who speaks.
    pub(crate) fn role(&self) -> &str {
        self.0.get("role").and_then(Value::as_str).unwrap_or_default()
    }

    /// The text, if it has any: parts are joined without separators.
    pub(crate) fn text(&self) -> Option<String> {
        match self.0.get("content") {
            Some(Value::String(text)) => Some(text.clone()),
            Some(Value::Array(parts)) => Some(joined(parts)),
            _ => None,
        }
    }

    /// The first part that is not text, such as `image_url`.
    pub(crate) fn part_besides_text(&self) -> Option<&str> {
        let parts = self.0.get("content").and_then(Value::as_array)?;
        parts.iter().filter_map(|part| part.get("type").and_then(Value::as_str)).find(|kind| *kind != "text")
    }

    /// What the template sees.
    pub(crate) fn for_template(&self, contents: Contents) -> Value {
        let mut message = self.0.clone();
        if contents == Contents::Joined
            && let Some(Value::Array(parts)) = self.0.get("content")
        {
            message.insert("content".to_owned(), Value::String(joined(parts)));
        }
        let calls = message.get_mut("tool_calls").and_then(Value::as_array_mut);
        calls.into_iter().flatten().for_each(parse_arguments);
        Value::Object(message)
    }
}

fn joined(parts: &[Value]) -> String {
    parts.iter().filter_map(|part| part.get("text").and_then(Value::as_str)).collect()
}

/// Clients send the arguments of a call as text; models were trained on the object.
fn parse_arguments(call: &mut Value) {
    let Some(arguments) = call.get_mut("function").and_then(|function| function.get_mut("arguments")) else {
        return;
    };
    if let Some(parsed @ Value::Object(_)) =
        arguments.as_str().and_then(|text| serde_json::from_str(text).ok())
    {
        *arguments = parsed;
    }
}

impl<'de> Deserialize<'de> for Message {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(MessageVisitor)
    }
}

/// Checks a message where it ends, so that an error has its place.
struct MessageVisitor;

impl<'de> Visitor<'de> for MessageVisitor {
    type Value = Message;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("a message")
    }

    fn visit_map<A: MapAccess<'de>>(self, entries: A) -> Result<Message, A::Error> {
        let mut fields = Map::deserialize(MapAccessDeserializer::new(entries))?;
        // Clients send nulls for what they do not set, and templates ask whether a field is there.
        fields.retain(|name, value| name == "content" || !value.is_null());
        match fields.get("role") {
            Some(Value::String(_)) => {}
            Some(_) => return Err(A::Error::custom("`role` must be a string")),
            None => return Err(A::Error::missing_field("role")),
        }
        check_calls(fields.get("tool_calls")).map_err(A::Error::custom)?;
        match fields.get("content") {
            Some(Value::String(_)) => {}
            Some(Value::Array(parts)) => parts.iter().try_for_each(check_part).map_err(A::Error::custom)?,
            None | Some(Value::Null) if fields.contains_key("tool_calls") => {}
            None => return Err(A::Error::missing_field("content")),
            Some(_) => return Err(A::Error::custom("`content` must be a string or a list of parts")),
        }
        Ok(Message(fields))
    }
}

fn check_part(part: &Value) -> Result<(), String> {
    let field = |name| part.get(name).and_then(Value::as_str);
    match field("type") {
        Some("text") if field("text").is_some() => Ok(()),
        Some("text") => Err("a part of type `text` needs the string `text`".to_owned()),
        Some("image_url") if part.pointer("/image_url/url").is_some_and(Value::is_string) => Ok(()),
        Some("image_url") => Err("a part of type `image_url` needs the string `image_url.url`".to_owned()),
        Some(other) => Err(format!("unknown type of part `{other}`, expected `text` or `image_url`")),
        None => Err("a part of `content` needs the string `type`".to_owned()),
    }
}

fn check_calls(calls: Option<&Value>) -> Result<(), &'static str> {
    let Some(calls) = calls else { return Ok(()) };
    let calls = calls.as_array().ok_or("`tool_calls` must be a list")?;
    let named = |call: &Value| call.pointer("/function/name").is_some_and(Value::is_string);
    if calls.iter().all(named) { Ok(()) } else { Err("a tool call needs the string `function.name`") }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn message(value: Value) -> Result<Message, String> {
        serde_json::from_value(value).map_err(|error| error.to_string())
    }

    #[test]
    fn nulls_are_absent_but_fields_of_any_name_stay() {
        let sent =
            json!({"role": "user", "content": "a", "name": null, "tool_calls": null, "reasoning": "r"});
        let seen = message(sent).unwrap().for_template(Contents::Parts);
        assert_eq!(seen, json!({"role": "user", "content": "a", "reasoning": "r"}));
    }

    #[test]
    fn content_and_tool_calls_stay_together_and_arguments_become_objects() {
        let call = |arguments: Value| json!([{"id": "0", "type": "function", "function": {"name": "f", "arguments": arguments}}]);
        let sent =
            json!({"role": "assistant", "content": "", "tool_calls": call(json!("{\"b\": 1, \"a\": 2}"))});
        let seen = message(sent).unwrap().for_template(Contents::Joined);
        assert_eq!(seen["content"], "");
        assert_eq!(seen["tool_calls"], call(json!({"b": 1, "a": 2})));
        let sent = json!({"role": "assistant", "content": null, "tool_calls": call(json!("not json"))});
        let seen = message(sent).unwrap().for_template(Contents::Joined);
        assert_eq!(seen["tool_calls"], call(json!("not json")));
    }

    #[test]
    fn text_parts_are_joined_for_templates_that_want_a_string() {
        let sent = json!({"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]});
        let message = message(sent.clone()).unwrap();
        assert_eq!(message.for_template(Contents::Joined)["content"], "ab");
        assert_eq!(message.for_template(Contents::Parts), sent);
        assert_eq!(message.text().unwrap(), "ab");
        assert_eq!(message.part_besides_text(), None);
    }

    #[test]
    fn a_message_that_is_none_is_refused_with_the_reason() {
        let check = |value: Value, reason: &str| assert_eq!(message(value).unwrap_err(), reason);
        check(json!({"content": "a"}), "missing field `role`");
        check(json!({"role": "user"}), "missing field `content`");
        check(json!({"role": "user", "content": null}), "`content` must be a string or a list of parts");
        check(
            json!({"role": "user", "content": [{"type": "audio"}]}),
            "unknown type of part `audio`, expected `text` or `image_url`",
        );
        check(
            json!({"role": "user", "content": [{"type": "image_url", "image_url": "http://a"}]}),
            "a part of type `image_url` needs the string `image_url.url`",
        );
        check(
            json!({"role": "assistant", "tool_calls": [1]}),
            "a tool call needs the string `function.name`",
        );
    }
}
