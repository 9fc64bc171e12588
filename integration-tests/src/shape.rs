//! The shape of a JSON value: keys and types, not values. Recorded answers are compared by shape, since texts, ids and
//! times differ from server to server.

use serde_json::{Map, Value, json};

/// Strings under these keys are part of the shape.
const KEPT: [&str; 5] = ["object", "error_type", "finish_reason", "role", "type"];

/// The shape of a value: objects by key, lists by their first element, strings under [`KEPT`] keys as `=text`.
pub fn of(value: &Value) -> Value {
    under("", value)
}

fn under(key: &str, value: &Value) -> Value {
    match value {
        Value::Object(fields) => Value::Object(
            fields.iter().map(|(key, value)| (key.clone(), under(key, value))).collect::<Map<_, _>>(),
        ),
        Value::Array(items) => Value::Array(items.first().map(|item| under("", item)).into_iter().collect()),
        Value::String(text) if KEPT.contains(&key) => json!(format!("={text}")),
        Value::String(_) => json!("str"),
        Value::Number(number) if number.is_f64() => json!("float"),
        Value::Number(_) => json!("int"),
        Value::Bool(_) => json!("bool"),
        Value::Null => json!("null"),
    }
}

/// Where two shapes differ, one line each; an integer where a float stood is fine.
pub fn differences(expected: &Value, found: &Value) -> Vec<String> {
    let mut lines = Vec::new();
    compare("", expected, found, &mut lines);
    lines
}

fn compare(path: &str, expected: &Value, found: &Value, lines: &mut Vec<String>) {
    match (expected, found) {
        (Value::Object(a), Value::Object(b)) => {
            for key in a.keys().filter(|key| !b.contains_key(*key)) {
                lines.push(format!("{path}.{key} is missing"));
            }
            for (key, found) in b {
                match a.get(key) {
                    Some(expected) => compare(&format!("{path}.{key}"), expected, found, lines),
                    None => lines.push(format!("{path}.{key} is extra")),
                }
            }
        }
        (Value::Array(a), Value::Array(b)) if a.len() == b.len() => {
            for (index, (expected, found)) in a.iter().zip(b).enumerate() {
                compare(&format!("{path}[{index}]"), expected, found, lines);
            }
        }
        _ if expected == found => {}
        _ if [expected, found].iter().all(|shape| matches!(shape.as_str(), Some("int" | "float"))) => {}
        _ => lines.push(format!("{path}: {expected} expected, {found} found")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shape_keeps_keys_and_types() {
        let shape = of(&json!({"a": 1, "b": [0.5, 2], "role": "user", "c": null, "d": "x"}));
        assert_eq!(shape, json!({"a": "int", "b": ["float"], "role": "=user", "c": "null", "d": "str"}));
    }

    #[test]
    fn a_missing_key_an_extra_key_and_another_type_each_make_a_line() {
        let lines = differences(&json!({"a": "int", "b": "str"}), &json!({"b": "null", "c": "int"}));
        assert_eq!(lines, [".a is missing", ".b: \"str\" expected, \"null\" found", ".c is extra"]);
        assert!(differences(&json!("float"), &json!("int")).is_empty());
    }
}
