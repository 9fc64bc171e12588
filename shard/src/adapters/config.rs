use std::path::Path;

use crate::model::{ConfigError, ConfigFile, Fields};

const NAME: &str = "adapter_config.json";

/// What `adapter_config.json` says. Source: PEFT, `LoraConfig`.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct AdapterConfig {
    /// The scale's numerator, for all modules but those of the pattern.
    alpha: f64,
    /// Numerators of modules by the end of their names.
    alpha_pattern: Vec<(String, f64)>,
    /// Whether the scale's denominator is the square root of the rank. Source: Kalajdzievski 2023 (rsLoRA).
    rank_stabilized: bool,
}

impl AdapterConfig {
    /// Reads the file in `directory`. Errors when it is no LoRA adapter, or one of a kind that is not served.
    pub(super) fn read(directory: &Path) -> Result<Self, ConfigError> {
        let file = ConfigFile::read_file(&directory.join(NAME))?;
        let fields = file.fields();
        if let Some(kind) = fields.text("peft_type")?.filter(|kind| *kind != "LORA") {
            return Err(fields.unserved("peft_type", kind, &["LORA"]));
        }
        if fields.flag("use_dora")?.unwrap_or(false) {
            return Err(fields.unserved("use_dora", "true", &["false"]));
        }
        if let Some(modules) = fields.texts("modules_to_save")?.filter(|modules| !modules.is_empty()) {
            return Err(fields.unserved("modules_to_save", &modules.join(", "), &["none"]));
        }
        Ok(Self {
            alpha: fields.number_from("lora_alpha", 0.0)?.unwrap_or(8.0),
            alpha_pattern: pattern(&fields, "alpha_pattern")?,
            rank_stabilized: fields.flag("use_rslora")?.unwrap_or(false),
        })
    }

    /// What multiplies the product of a module's two matrices.
    pub(super) fn scale(&self, module: &str, rank: usize) -> f32 {
        let ends_with = |end: &str| {
            module.strip_suffix(end).is_some_and(|before| before.is_empty() || before.ends_with('.'))
        };
        let own = self.alpha_pattern.iter().find(|(end, _)| ends_with(end));
        let alpha = own.map_or(self.alpha, |(_, alpha)| *alpha);
        let rank = rank as f64;
        (alpha / if self.rank_stabilized { rank.sqrt() } else { rank }) as f32
    }
}

/// Numbers by module. PEFT takes the keys for regular expressions; here they are the ends of names.
fn pattern(fields: &Fields<'_>, name: &str) -> Result<Vec<(String, f64)>, ConfigError> {
    let Some(pattern) = fields.object(name)? else {
        return Ok(Vec::new());
    };
    let entry = |key: &str| {
        if key.chars().any(|character| !(character.is_alphanumeric() || "_.-".contains(character))) {
            return Err(pattern.unserved(key, "a regular expression", &["names of modules"]));
        }
        let alpha = pattern.required(key, |fields, key| fields.number_from(key, 0.0))?;
        Ok((key.to_owned(), alpha))
    };
    pattern.names().map(entry).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(contents: &str) -> Result<AdapterConfig, ConfigError> {
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join(NAME), contents).unwrap();
        AdapterConfig::read(directory.path())
    }

    fn check(contents: &str, expected: &str) {
        let message = read(contents).unwrap_err().to_string();
        assert!(message.contains(NAME) && message.contains(expected), "expected `{expected}` in: {message}");
    }

    #[test]
    fn the_scale_is_alpha_over_the_rank_or_its_root() {
        assert_eq!(read(r#"{"lora_alpha": 16}"#).unwrap().scale("a.q_proj", 4), 4.0);
        assert_eq!(read(r#"{"lora_alpha": 16, "use_rslora": true}"#).unwrap().scale("a.q_proj", 4), 8.0);
        let patterned = read(r#"{"lora_alpha": 16, "alpha_pattern": {"q_proj": 8}}"#).unwrap();
        assert_eq!(patterned.scale("a.q_proj", 4), 2.0);
        assert_eq!(patterned.scale("a.xq_proj", 4), 4.0);
    }

    #[test]
    fn what_is_not_served_is_refused_by_name() {
        check(r#"{"peft_type": "LOHA"}"#, "peft_type `LOHA` is not served; served: LORA");
        check(r#"{"use_dora": true}"#, "use_dora `true` is not served");
        check(r#"{"modules_to_save": ["lm_head"]}"#, "modules_to_save `lm_head` is not served");
        check(r#"{"alpha_pattern": {".*q": 8}}"#, "alpha_pattern..*q `a regular expression` is not served");
        check(r#"{"lora_alpha": "x"}"#, "`lora_alpha` is \"x\"");
        check("[]", "expected a map");
    }
}
