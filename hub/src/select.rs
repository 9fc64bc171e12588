//! Which files of a repository are needed: not all of them.

use std::path::Path;

use serde::Deserialize;
use serde_json::{Map, Value};

use crate::repo::is_relative_path;

/// The ending of the weights that are preferred.
pub const SAFETENSORS: &str = ".safetensors";

/// The usual ending of PyTorch's own files.
const PICKLED: &str = ".bin";

/// The endings of the weights that are taken when there are no others, in this order.
const PYTORCH: [&str; 2] = [PICKLED, ".pt"];

/// What makes a repository a model.
pub(crate) const CONFIG: &str = "config.json";

/// What makes a repository an adapter.
pub(crate) const ADAPTER_CONFIG: &str = "adapter_config.json";

/// Small files of a model that some program here reads, or that a tokenizer may consist of.
const MODEL_FILES: [&str; 18] = [
    CONFIG,
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "chat_template.json",
    "chat_template.jinja",
    "preprocessor_config.json",
    "processor_config.json",
    "quantize_config.json",
    "quant_config.json",
    "tekken.json",
];

/// Where further chat templates are.
const TEMPLATE_FOLDER: &str = "additional_chat_templates/";

/// Parts of names that no weights have.
const NO_WEIGHTS: [&str; 3] = ["arguments", "args", "training"];

/// What of a repository is wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A model: configuration, tokenizer, templates, weights.
    Model,
    /// A LoRA adapter: its configuration and its weights.
    Adapter,
}

impl Kind {
    /// What a repository with these files is.
    pub fn of<'a>(names: impl IntoIterator<Item = &'a str>) -> Self {
        let (mut model, mut adapter) = (false, false);
        for name in names {
            model |= name == CONFIG;
            adapter |= name == ADAPTER_CONFIG;
        }
        if adapter && !model { Self::Adapter } else { Self::Model }
    }
}

/// Whether a file is a small one that is needed.
pub(crate) fn is_small_file(kind: Kind, name: &str) -> bool {
    match kind {
        Kind::Adapter => name == ADAPTER_CONFIG,
        Kind::Model => {
            let template = |rest: &str| rest.ends_with(".jinja") && !rest.contains('/');
            MODEL_FILES.contains(&name)
                || (name.ends_with(".tiktoken") && !name.contains('/'))
                || name.strip_prefix(TEMPLATE_FOLDER).is_some_and(template)
        }
    }
}

/// The weights of a repository.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Weights {
    /// These files.
    Files(Vec<String>),
    /// The files that this index names.
    Indexed(String),
}

/// The weights among the files of a repository: one file of the usual name, or an index of several, or every file of the
/// ending in the top directory. None when there are none.
///
/// With [`SAFETENSORS`], files of PyTorch count when there are no others.
pub fn weights(kind: Kind, names: &[&str], extension: &str) -> Option<Weights> {
    let others = if extension == SAFETENSORS { &PYTORCH[..] } else { &[] };
    [extension].iter().chain(others).find_map(|extension| weights_of(kind, names, extension))
}

fn weights_of(kind: Kind, names: &[&str], extension: &str) -> Option<Weights> {
    let single = match (kind, extension) {
        (Kind::Adapter, extension) => format!("adapter_model{extension}"),
        (Kind::Model, PICKLED) => format!("pytorch_model{PICKLED}"),
        (Kind::Model, extension) => format!("model{extension}"),
    };
    if names.contains(&single.as_str()) {
        return Some(Weights::Files(vec![single]));
    }
    let index = format!("{single}.index.json");
    if names.contains(&index.as_str()) {
        return Some(Weights::Indexed(index));
    }
    let mut files: Vec<String> =
        names.iter().filter(|name| is_candidate(name, extension)).map(|name| (*name).to_owned()).collect();
    // The same weights once more, in the layout of their makers, or those of an adapter.
    for other in ["consolidated", "adapter_model"] {
        if kind == Kind::Model && files.iter().any(|name| !name.starts_with(other)) {
            files.retain(|name| !name.starts_with(other));
        }
    }
    files.sort_unstable();
    if files.is_empty() { None } else { Some(Weights::Files(files)) }
}

/// Whether a file may hold weights, by its name.
pub(crate) fn is_candidate(name: &str, extension: &str) -> bool {
    name.ends_with(extension) && !name.contains('/') && !NO_WEIGHTS.iter().any(|word| name.contains(word))
}

/// The files that an index names, each once.
///
/// Errors with what is wrong, to be put after the index's name.
pub fn indexed(index: &[u8]) -> Result<Vec<String>, String> {
    #[derive(Deserialize)]
    struct Index {
        weight_map: Map<String, Value>,
    }
    let index: Index =
        serde_json::from_slice(index).map_err(|error| format!("is not an index of weights: {error}"))?;
    let mut names = Vec::new();
    for (tensor, name) in &index.weight_map {
        let name = name.as_str().filter(|name| is_relative_path(name) && !name.contains('/'));
        names.push(name.ok_or_else(|| format!("names no file of its directory for `{tensor}`"))?.to_owned());
    }
    names.sort_unstable();
    names.dedup();
    Ok(names)
}

/// The files that should be there, judging by names such as `model-00001-of-00003.safetensors`, and are not.
pub(crate) fn missing_parts(names: &[String]) -> Vec<String> {
    let mut missing = Vec::new();
    for name in names {
        let stem = Path::new(name).file_stem().and_then(|stem| stem.to_str()).unwrap_or_default();
        let Some((head, count)) = stem.rsplit_once("-of-") else { continue };
        let Some((head, number)) = head.rsplit_once('-') else { continue };
        let (Ok(count_of), Ok(_)) = (count.parse::<u32>(), number.parse::<u32>()) else { continue };
        let ending = &name[stem.len()..];
        let width = number.len();
        // No checkpoint has more parts than this; what claims so is not a number of parts.
        for part in 1..=count_of.min(10_000) {
            let part = format!("{head}-{part:0width$}-of-{count}{ending}");
            if !names.contains(&part) && !missing.contains(&part) {
                missing.push(part);
            }
        }
    }
    missing
}

#[cfg(test)]
mod tests {
    use super::*;

    fn files(names: &[&str]) -> Option<Weights> {
        Some(Weights::Files(names.iter().map(|name| (*name).to_owned()).collect()))
    }

    #[test]
    fn one_file_of_the_usual_name_is_all_the_weights() {
        let names = ["model.safetensors", "model.safetensors.index.json", "model.fp16.safetensors"];
        assert_eq!(weights(Kind::Model, &names, SAFETENSORS), files(&["model.safetensors"]));
    }

    #[test]
    fn an_index_says_which_files() {
        let names =
            ["model.safetensors.index.json", "model-00001-of-00002.safetensors", "consolidated.safetensors"];
        let index = Weights::Indexed("model.safetensors.index.json".into());
        assert_eq!(weights(Kind::Model, &names, SAFETENSORS), Some(index));
        let text = br#"{"metadata": {}, "weight_map": {"a": "1.safetensors", "b": "2.safetensors", "c": "1.safetensors"}}"#;
        assert_eq!(indexed(text).unwrap(), ["1.safetensors", "2.safetensors"]);
    }

    #[test]
    fn an_index_cannot_lead_out_of_its_directory() {
        for name in ["\"../x\"", "\"/etc/passwd\"", "\"a/b\"", "\"\"", "7"] {
            let error =
                indexed(format!(r#"{{"weight_map": {{"lm_head": {name}}}}}"#).as_bytes()).unwrap_err();
            assert!(error.contains("`lm_head`"), "{name}: {error}");
        }
        assert!(indexed(b"[]").unwrap_err().contains("not an index"));
    }

    #[test]
    fn otherwise_every_file_of_the_ending_in_the_top_directory_counts() {
        let names = [
            "b.safetensors",
            "a.safetensors",
            "onnx/c.safetensors",
            "training_state.safetensors",
            "consolidated.safetensors",
            "adapter_model.safetensors",
            "d.bin",
        ];
        assert_eq!(weights(Kind::Model, &names, SAFETENSORS), files(&["a.safetensors", "b.safetensors"]));
        assert_eq!(weights(Kind::Model, &names[4..5], SAFETENSORS), files(&["consolidated.safetensors"]));
    }

    #[test]
    fn files_of_pytorch_count_when_there_is_nothing_else() {
        let names = ["pytorch_model.bin", "training_args.bin"];
        assert_eq!(weights(Kind::Model, &names, SAFETENSORS), files(&["pytorch_model.bin"]));
        assert_eq!(weights(Kind::Model, &["training_args.bin"], SAFETENSORS), None);
        assert_eq!(weights(Kind::Model, &["a.pt", "b.safetensors"], ".pt"), files(&["a.pt"]));
        assert_eq!(weights(Kind::Model, &["a.pt"], SAFETENSORS), files(&["a.pt"]));
    }

    #[test]
    fn an_adapter_is_told_by_its_configuration() {
        let names = ["adapter_config.json", "adapter_model.safetensors", "optimizer.bin"];
        assert_eq!(Kind::of(names), Kind::Adapter);
        assert_eq!(Kind::of(["adapter_config.json", "config.json"]), Kind::Model);
        assert_eq!(weights(Kind::Adapter, &names, SAFETENSORS), files(&["adapter_model.safetensors"]));
        assert!(
            is_small_file(Kind::Adapter, "adapter_config.json")
                && !is_small_file(Kind::Adapter, "config.json")
        );
    }

    #[test]
    fn small_files_are_those_that_are_read() {
        for name in [
            "config.json",
            "chat_template.jinja",
            "additional_chat_templates/tool_use.jinja",
            "qwen.tiktoken",
        ] {
            assert!(is_small_file(Kind::Model, name), "{name}");
        }
        for name in
            ["README.md", "onnx/config.json", "trainer_state.json", "additional_chat_templates/a/b.jinja"]
        {
            assert!(!is_small_file(Kind::Model, name), "{name}");
        }
    }

    #[test]
    fn numbered_files_tell_which_of_them_are_missing() {
        let names = [
            "model-00001-of-00003.safetensors",
            "model-00003-of-00003.safetensors",
            "other-a-of-b.safetensors",
        ];
        let names = names.map(str::to_owned);
        assert_eq!(missing_parts(&names), ["model-00002-of-00003.safetensors"]);
    }
}
