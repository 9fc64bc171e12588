//! Which of a model's files holds the chat template, and the special tokens it uses.

use std::path::Path;

use serde_json::Value;

/// Tokens that templates may name, as `tokenizer_config.json` spells them.
const SPECIAL_TOKENS: [&str; 7] =
    ["bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token"];

/// What was found. All of it may be absent.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct TemplateSource {
    pub(crate) default: Option<String>,
    /// For chats with tools, if the model has a template of its own for them.
    pub(crate) tool_use: Option<String>,
    /// Names and texts.
    pub(crate) special_tokens: Vec<(String, String)>,
}

impl TemplateSource {
    /// Looks into the files of a model; `tokenizer_config` takes the place of the model's own file.
    ///
    /// The first place with a template wins: `chat_template.json`, a given `tokenizer_config`, `chat_template.jinja`,
    /// the model's `tokenizer_config.json`, `processor_config.json`. A file that cannot be read counts as absent.
    pub(crate) fn find(model: &Path, tokenizer_config: Option<&Path>) -> Self {
        let own = model.join("tokenizer_config.json");
        let config = json(tokenizer_config.unwrap_or(&own)).unwrap_or_default();
        let places: [&dyn Fn() -> Option<Self>; 5] = [
            &|| Self::in_field(&json(&model.join("chat_template.json"))?),
            &|| tokenizer_config.and_then(|_| Self::in_field(&config)),
            &|| Some(Self::single(text(&model.join("chat_template.jinja"))?)),
            &|| Self::in_field(&config),
            &|| {
                let processor = json(&model.join("processor_config.json"))?;
                processor.get("image_seq_len")?.as_u64()?;
                Self::in_field(&processor)
            },
        ];
        let mut source = places.iter().find_map(|place| place()).unwrap_or_default();
        let additional = model.join("additional_chat_templates").join("tool_use.jinja");
        source.tool_use = source.tool_use.or_else(|| text(&additional));
        source.special_tokens = special_tokens(&config);
        source
    }

    fn single(template: String) -> Self {
        Self { default: Some(template), ..Self::default() }
    }

    /// The field `chat_template`: a template, or a list of named ones.
    fn in_field(config: &Value) -> Option<Self> {
        let field = config.get("chat_template")?;
        if let Some(template) = field.as_str() {
            return Some(Self::single(template.to_owned()));
        }
        let templates = field.as_array()?;
        let named = |name: &str| {
            let entry =
                templates.iter().find(|entry| entry.get("name").and_then(Value::as_str) == Some(name))?;
            Some(entry.get("template")?.as_str()?.to_owned())
        };
        Some(Self { default: named("default"), tool_use: named("tool_use"), ..Self::default() })
    }
}

/// A special token is a string, or an object with its text as `content`.
fn special_tokens(config: &Value) -> Vec<(String, String)> {
    let text = |name: &str| {
        let token = config.get(name)?;
        token.as_str().or_else(|| token.get("content")?.as_str()).map(str::to_owned)
    };
    SPECIAL_TOKENS.iter().filter_map(|name| Some(((*name).to_owned(), text(name)?))).collect()
}

fn json(path: &Path) -> Option<Value> {
    let parsed = serde_json::from_str(&text(path)?);
    parsed.inspect_err(|error| tracing::warn!("{} is left out: {error}", path.display())).ok()
}

fn text(path: &Path) -> Option<String> {
    match std::fs::read_to_string(path) {
        Ok(text) => Some(text),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => None,
        Err(error) => {
            tracing::warn!("{} is left out: {error}", path.display());
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(files: &[(&str, &str)]) -> TemplateSource {
        let model = tempfile::tempdir().unwrap();
        std::fs::create_dir(model.path().join("additional_chat_templates")).unwrap();
        for (name, content) in files {
            std::fs::write(model.path().join(name), content).unwrap();
        }
        TemplateSource::find(model.path(), None)
    }

    #[test]
    fn the_first_place_with_a_template_wins() {
        let mut files = vec![
            ("chat_template.json", r#"{"chat_template": "1"}"#),
            ("chat_template.jinja", "2"),
            ("tokenizer_config.json", r#"{"chat_template": "3"}"#),
            ("processor_config.json", r#"{"chat_template": "4", "image_seq_len": 2}"#),
        ];
        for expected in ["1", "2", "3", "4"] {
            assert_eq!(found(&files).default.as_deref(), Some(expected));
            files.remove(0);
        }
        assert_eq!(found(&files), TemplateSource::default());
        assert_eq!(found(&[("processor_config.json", r#"{"chat_template": "4"}"#)]).default, None);
    }

    #[test]
    fn a_given_file_replaces_the_models_own() {
        let model = tempfile::tempdir().unwrap();
        std::fs::write(model.path().join("chat_template.jinja"), "own").unwrap();
        let given = model.path().join("given.json");
        std::fs::write(&given, r#"{"chat_template": "given", "bos_token": "<s>"}"#).unwrap();
        let source = TemplateSource::find(model.path(), Some(&given));
        assert_eq!(source.default.as_deref(), Some("given"));
        assert_eq!(source.special_tokens, [("bos_token".to_owned(), "<s>".to_owned())]);
    }

    #[test]
    fn named_templates_are_told_apart() {
        let list = r#"{"chat_template": [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]}"#;
        let source = found(&[("tokenizer_config.json", list)]);
        assert_eq!((source.default.as_deref(), source.tool_use.as_deref()), (Some("d"), Some("t")));
        let source =
            found(&[("chat_template.jinja", "d"), ("additional_chat_templates/tool_use.jinja", "t")]);
        assert_eq!((source.default.as_deref(), source.tool_use.as_deref()), (Some("d"), Some("t")));
    }

    #[test]
    fn special_tokens_are_strings_or_objects_and_null_is_none() {
        let config = r#"{"bos_token": null, "eos_token": {"content": "</s>"}, "pad_token": "<p>"}"#;
        let source = found(&[("tokenizer_config.json", config)]);
        let expected = [("eos_token", "</s>"), ("pad_token", "<p>")];
        assert_eq!(source.special_tokens, expected.map(|(name, text)| (name.to_owned(), text.to_owned())));
    }

    #[test]
    fn a_file_that_does_not_parse_counts_as_absent() {
        let files = [("tokenizer_config.json", "{"), ("chat_template.jinja", "2")];
        assert_eq!(found(&files).default.as_deref(), Some("2"));
    }
}
