//! The model's own chat template, rendered as transformers does, because that is the text models were trained on.
//!
//! Beyond minijinja's own: blocks take the whitespace around them (`trim_blocks`, `lstrip_blocks`), `tojson` writes what
//! Python's `json.dumps` writes, strings are iterable, Python's string, list and dict methods exist, and so do
//! `raise_exception` and `strftime_now`. Source: `apply_chat_template` and `_compile_jinja_template` of transformers 4.

use std::collections::BTreeMap;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Serde, ValueKind};
use minijinja::{Environment, ErrorKind, Value};
use serde_json::Map;
use thiserror::Error;

use super::message::{Contents, Message};
use super::source::TemplateSource;

mod json;

/// Names under which the two templates of a model are kept.
const DEFAULT: &str = "default";
const TOOL_USE: &str = "tool_use";

/// Instructions of the template engine for one prompt. A chat of thousands of messages takes a few hundred thousand; a
/// template whose work grows with the square of what a client sends must not hold a thread for long.
const FUEL: u64 = 10_000_000;

/// A chat that could not be made into a prompt.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub(crate) enum TemplateError {
    #[error("template not found: the model's files have no chat template")]
    Missing,
    #[error("the model's chat template is broken: {0}")]
    Broken(String),
    #[error("`messages` is empty")]
    NoMessages,
    #[error("the chat takes the model's template more than {FUEL} instructions")]
    Exhausted,
    #[error("{0}")]
    Render(String),
}

/// What a prompt is made of.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Conversation<'a> {
    pub(crate) messages: &'a [Message],
    /// What the model may call, in OpenAI's shape.
    pub(crate) tools: &'a [serde_json::Value],
    /// Variables of the client's own for the template.
    pub(crate) variables: Option<&'a Map<String, serde_json::Value>>,
    /// Whether the prompt ends with the beginning of an answer.
    pub(crate) add_generation_prompt: bool,
    /// Whether the model goes on in the last message.
    pub(crate) continue_final_message: bool,
}

/// A compiled template, or why there is none. Without one, chats are refused and everything else works.
#[derive(Debug)]
pub(crate) struct ChatTemplate(Result<Compiled, TemplateError>);

#[derive(Debug)]
struct Compiled {
    environment: Environment<'static>,
    /// `bos_token` and the like.
    special_tokens: Vec<(String, String)>,
    contents: Contents,
}

impl ChatTemplate {
    pub(crate) fn compile(source: TemplateSource) -> Self {
        Self(Compiled::new(source))
    }

    /// Why chats are refused, if they are.
    pub(crate) fn error(&self) -> Option<&TemplateError> {
        self.0.as_ref().err()
    }

    /// The prompt of a conversation.
    pub(crate) fn render(&self, conversation: &Conversation<'_>) -> Result<String, TemplateError> {
        let compiled = self.0.as_ref().map_err(Clone::clone)?;
        let last = conversation.messages.last().ok_or(TemplateError::NoMessages)?;
        let mut prompt = compiled.render(conversation).map_err(|error| match exhausted(&error) {
            true => TemplateError::Exhausted,
            false => TemplateError::Render(reason(&error)),
        })?;
        if conversation.continue_final_message
            && let Some(text) = last.text()
        {
            cut_after(&mut prompt, &text);
        }
        Ok(prompt)
    }
}

impl Compiled {
    fn new(source: TemplateSource) -> Result<Self, TemplateError> {
        let default = source.default.ok_or(TemplateError::Missing)?;
        let contents = if looks_at_parts(&default) { Contents::Parts } else { Contents::Joined };
        let mut environment = environment();
        let mut add = |name, template: &str| {
            let compiled = environment.add_template_owned(name, without_generation_tags(template));
            compiled.map_err(|error| reason(&error))
        };
        add(DEFAULT, &default).map_err(TemplateError::Broken)?;
        if let Some(Err(error)) = source.tool_use.map(|template| add(TOOL_USE, &template)) {
            tracing::warn!("the chat template for tools is left out: {error}");
        }
        Ok(Self { environment, special_tokens: source.special_tokens, contents })
    }

    fn render(&self, conversation: &Conversation<'_>) -> Result<String, minijinja::Error> {
        let serde = |value: &serde_json::Value| Value::from(Serde(value));
        let messages =
            conversation.messages.iter().map(|message| serde(&message.for_template(self.contents)));
        let variables = conversation.variables.into_iter().flatten();
        let (name, tools) = match conversation.tools {
            [] => (DEFAULT, Value::from(())),
            tools => (TOOL_USE, tools.iter().map(serde).collect::<Vec<_>>().into()),
        };
        // Later ones win: a client's variables cannot take the place of the messages.
        let context: BTreeMap<&str, Value> = std::iter::once(("documents", Value::from(())))
            .chain(self.special_tokens.iter().map(|(name, text)| (name.as_str(), Value::from(text.as_str()))))
            .chain(variables.map(|(name, value)| (name.as_str(), serde(value))))
            .chain([
                ("messages", messages.collect::<Vec<_>>().into()),
                ("tools", tools),
                ("add_generation_prompt", conversation.add_generation_prompt.into()),
            ])
            .collect();
        let template =
            self.environment.get_template(name).or_else(|_| self.environment.get_template(DEFAULT));
        template?.render(Value::from(context))
    }
}

/// Everything templates may use.
fn environment() -> Environment<'static> {
    let mut environment = Environment::new();
    environment.set_fuel(Some(FUEL));
    let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
    environment.set_syntax(syntax.expect("the delimiters are the default ones"));
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.add_filter("tojson", json::tojson);
    environment.add_test("iterable", |value: &Value| {
        value.kind() == ValueKind::String || value.try_iter().is_ok() && !value.is_undefined()
    });
    environment.add_function("raise_exception", |message: String| -> Result<Value, minijinja::Error> {
        Err(minijinja::Error::new(ErrorKind::InvalidOperation, message).with_source(Raised))
    });
    environment.add_function("strftime_now", |format: String| {
        jiff::fmt::strtime::format(&format, &jiff::Zoned::now())
            .map_err(|error| minijinja::Error::new(ErrorKind::InvalidOperation, error.to_string()))
    });
    environment
}

/// Marks errors that the template raised itself.
#[derive(Debug, Error)]
#[error("raised by the template")]
struct Raised;

/// Whether a template took too many instructions, be it in a macro.
fn exhausted(error: &minijinja::Error) -> bool {
    causes(error).any(|error| error.kind() == ErrorKind::OutOfFuel)
}

/// An error and those behind it, as far as they are the template engine's.
fn causes(error: &minijinja::Error) -> impl Iterator<Item = &minijinja::Error> {
    let first = Some(error as &(dyn std::error::Error + 'static));
    std::iter::successors(first, |error| error.source()).filter_map(|error| error.downcast_ref())
}

/// What the client reads: the template's own words if it raised the error, else what failed and where.
fn reason(error: &minijinja::Error) -> String {
    let raised = causes(error)
        .find(|error| std::error::Error::source(error).is_some_and(|source| source.is::<Raised>()));
    match raised {
        Some(raised) => raised.detail().unwrap_or_default().to_owned(),
        None => error.to_string(),
    }
}

/// Cuts a prompt behind the last occurrence of a text, and the whitespace at its end. Without an occurrence it stays.
fn cut_after(prompt: &mut String, text: &str) {
    // Many templates trim what they are given.
    let found = [text, text.trim()].into_iter().find_map(|text| Some(prompt.rfind(text)? + text.len()));
    if let Some(end) = found.filter(|_| !text.trim().is_empty()) {
        prompt.truncate(prompt[..end].trim_end().len());
    }
}

/// Whether a template handles contents that are lists of parts. Others are given one string.
fn looks_at_parts(template: &str) -> bool {
    ["['type']", "[\"type\"]", ".type", "['text']", "[\"text\"]", ".text"]
        .iter()
        .any(|access| template.contains(access))
}

/// Replaces the `generation` tags, which mark what a model is trained on, by a condition that always holds.
fn without_generation_tags(template: &str) -> String {
    let mut rewritten = String::with_capacity(template.len());
    let mut rest = template;
    while let Some(start) = rest.find("{%") {
        let (before, tag) = rest.split_at(start);
        rewritten.push_str(before);
        let end = tag.find("%}").map_or(tag.len(), |end| end + 2);
        let (tag, after) = tag.split_at(end);
        let inside = tag.trim_start_matches("{%").trim_end_matches("%}");
        let replacement = match inside.trim_matches(['-', '+']).trim() {
            "generation" => inside.replacen("generation", "if true", 1),
            "endgeneration" => inside.replacen("endgeneration", "endif", 1),
            _ => inside.to_owned(),
        };
        match inside == replacement {
            true => rewritten.push_str(tag),
            false => rewritten.extend(["{%", &replacement, "%}"]),
        }
        rest = after;
    }
    rewritten + rest
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use serde_json::json;

    use super::*;

    fn source(template: &str) -> TemplateSource {
        TemplateSource {
            default: Some(template.to_owned()),
            special_tokens: vec![("eos_token".to_owned(), "</s>".to_owned())],
            ..TemplateSource::default()
        }
    }

    fn messages(messages: serde_json::Value) -> Vec<Message> {
        serde_json::from_value(messages).unwrap()
    }

    fn conversation(messages: &[Message]) -> Conversation<'_> {
        Conversation {
            messages,
            tools: &[],
            variables: None,
            add_generation_prompt: true,
            continue_final_message: false,
        }
    }

    fn render(template: &str, said: serde_json::Value) -> Result<String, TemplateError> {
        ChatTemplate::compile(source(template)).render(&conversation(&messages(said)))
    }

    /// Renders a template with one message, `hi` by `user`.
    #[track_caller]
    fn check(template: &str, expected: &str) {
        assert_eq!(render(template, json!([{"role": "user", "content": "hi"}])).unwrap(), expected);
    }

    #[test]
    fn lines_of_blocks_leave_no_whitespace() {
        check(
            "{% for m in messages %}\n  {% if true %}\n{{ m.content }}\n  {% endif %}\n{% endfor %}\nend\n",
            "hi\nend",
        );
    }

    #[test]
    fn templates_may_use_what_python_offers() {
        check("{{ messages[0].content.upper() + '|' + ' a '.strip() }}", "HI|a");
        check("{{ [none, true, 'a'] }}{{ none }}", "[None, True, 'a']None");
        check("{{ 'text' is iterable }}{{ 1 is iterable }}", "TrueFalse");
        check("{{ messages[::-1][0]['content'] }}{{ bos_token }}{{ eos_token }}", "hi</s>");
        check("{% for m in [1, 2, 3] %}{% if m == 2 %}{% break %}{% endif %}{{ m }}{% endfor %}", "1");
        check(
            "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
            "1",
        );
        check("{{ {'b': 1, 'a': '<'} | tojson }}", r#"{"b": 1, "a": "<"}"#);
        check("{{ tools is none }}{{ tools is defined }}{{ nothing is defined }}", "TrueTrueFalse");
        check("{{ strftime_now('%Y')|length }}", "4");
    }

    #[test]
    fn generation_tags_are_looked_through() {
        check("{%- generation -%} a {%- endgeneration -%} b{% generation %}c{%+ endgeneration %}", "abc");
    }

    #[test]
    fn an_error_the_template_raises_is_told_in_its_own_words() {
        let raise = "{% macro f() %}{{ raise_exception('roles must alternate') }}{% endmacro %}{{ f() }}";
        let error = render(raise, json!([{"role": "user", "content": "hi"}])).unwrap_err();
        assert_eq!(error, TemplateError::Render("roles must alternate".to_owned()));
    }

    #[test]
    fn a_template_that_takes_too_long_is_stopped() {
        let nested = "{% for a in range(5000) %}{% for b in range(5000) %}{% endfor %}{% endfor %}";
        let hidden = format!("{{% macro f() %}}{nested}{{% endmacro %}}{{{{ f() }}}}");
        for template in [nested, &hidden] {
            let error = render(template, json!([{"role": "user", "content": "hi"}]));
            assert_eq!(error, Err(TemplateError::Exhausted), "{template}");
        }
    }

    #[test]
    fn a_chat_of_thousands_of_messages_is_rendered() {
        let model = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../launcher/demo/model"));
        let template = ChatTemplate::compile(TemplateSource::find(model, None));
        let message = |index| {
            let role = if index % 2 == 0 { "user" } else { "assistant" };
            json!({"role": role, "content": [{"type": "text", "text": "Some words"}]})
        };
        let said = messages((0..2000).map(message).collect());
        let prompt = template.render(&conversation(&said)).unwrap();
        assert_eq!(prompt.matches("Some words").count(), 2000);
    }

    #[test]
    fn a_bad_date_format_is_an_error() {
        let error = render("{{ strftime_now('%Y %') }}", json!([{"role": "user", "content": "hi"}]));
        assert!(matches!(error, Err(TemplateError::Render(_))));
    }

    #[test]
    fn without_a_usable_template_every_chat_is_refused() {
        let said = messages(json!([{"role": "user", "content": "hi"}]));
        let missing = ChatTemplate::compile(TemplateSource::default());
        let error = missing.render(&conversation(&said)).unwrap_err();
        assert!(error.to_string().contains("template not found"), "{error}");
        let broken = ChatTemplate::compile(source("{% if %}"));
        assert!(matches!(broken.error(), Some(TemplateError::Broken(_))));
        assert!(matches!(broken.render(&conversation(&said)), Err(TemplateError::Broken(_))));
    }

    #[test]
    fn a_chat_without_messages_is_refused() {
        assert_eq!(render("fixed", json!([])), Err(TemplateError::NoMessages));
    }

    #[test]
    fn parts_reach_templates_that_look_at_them() {
        let said = json!([{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]);
        let parts = "{% for part in messages[0].content %}{{ part['text'] }};{% endfor %}";
        assert_eq!(render(parts, said.clone()).unwrap(), "a;b;");
        assert_eq!(render("{{ messages[0].content }}", said).unwrap(), "ab");
    }

    #[test]
    fn tools_choose_their_own_template_if_there_is_one() {
        let said = messages(json!([{"role": "user", "content": "hi"}]));
        let tools = [json!({"type": "function", "function": {"name": "f"}})];
        let with_tools = Conversation { tools: &tools, ..conversation(&said) };
        let one = source("{{ tools[0].function.name if tools else 'no tools' }}");
        assert_eq!(ChatTemplate::compile(one.clone()).render(&with_tools).unwrap(), "f");
        let two = ChatTemplate::compile(TemplateSource { tool_use: Some("tools".to_owned()), ..one });
        assert_eq!(two.render(&with_tools).unwrap(), "tools");
        assert_eq!(two.render(&conversation(&said)).unwrap(), "no tools");
    }

    #[test]
    fn a_broken_template_for_tools_is_left_out() {
        let source = TemplateSource { tool_use: Some("{% if %}".to_owned()), ..source("plain") };
        let template = ChatTemplate::compile(source);
        let said = messages(json!([{"role": "user", "content": "hi"}]));
        assert_eq!(template.render(&conversation(&said)).unwrap(), "plain");
    }

    #[test]
    fn a_client_may_set_variables_but_not_the_messages() {
        let said = messages(json!([{"role": "user", "content": "hi"}]));
        let variables = json!({"enable_thinking": false, "messages": []});
        let chat = Conversation { variables: variables.as_object(), ..conversation(&said) };
        let template = ChatTemplate::compile(source("{{ enable_thinking }}{{ messages|length }}"));
        assert_eq!(template.render(&chat).unwrap(), "False1");
    }

    #[test]
    fn a_final_message_is_continued_behind_its_text() {
        let template =
            ChatTemplate::compile(source("{% for m in messages %}[{{ m.content | trim }} ]{% endfor %}>"));
        let continued = |text: &str| {
            let said =
                messages(json!([{"role": "user", "content": "a"}, {"role": "assistant", "content": text}]));
            template.render(&Conversation { continue_final_message: true, ..conversation(&said) }).unwrap()
        };
        assert_eq!(continued("b"), "[a ][b");
        assert_eq!(continued("b c "), "[a ][b c", "the template trims, and so does the cut");
        assert_eq!(continued(""), "[a ][ ]>");
    }

    #[test]
    fn the_embedded_models_template_renders() {
        let model = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../launcher/demo/model"));
        let template = ChatTemplate::compile(TemplateSource::find(model, None));
        let said = messages(json!([
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
            {"role": "assistant", "content": "", "tool_calls": [
                {"id": "0", "type": "function", "function": {"name": "f", "arguments": "{\"x\": 1}"}}]},
        ]));
        let expected = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n\
                        <|im_start|>assistant\n<tool_call>{\"name\": \"f\", \"arguments\": {\"x\": 1}}</tool_call>\
                        <|im_end|>\n<|im_start|>assistant\n";
        assert_eq!(template.render(&conversation(&said)).unwrap(), expected);
    }
}
