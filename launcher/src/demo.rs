//! The demo model, which is part of this program: an ordinary checkpoint, served when no other model is named.

use std::fs;
use std::io;
use std::path::Path;

/// What clients see as the model's id.
pub const ID: &str = "demo";

/// The files of the checkpoint, by name.
pub const FILES: [(&str, &[u8]); 6] = [
    ("config.json", CONFIG),
    ("generation_config.json", include_bytes!("../demo/model/generation_config.json")),
    ("model.safetensors", WEIGHTS),
    ("special_tokens_map.json", include_bytes!("../demo/model/special_tokens_map.json")),
    ("tokenizer.json", include_bytes!("../demo/model/tokenizer.json")),
    ("tokenizer_config.json", include_bytes!("../demo/model/tokenizer_config.json")),
];

/// Its `config.json`.
pub const CONFIG: &[u8] = include_bytes!("../demo/model/config.json");

/// Its weights.
pub const WEIGHTS: &[u8] = include_bytes!("../demo/model/model.safetensors");

/// Writes the checkpoint into `directory`, which is created.
///
/// Errors when the directory exists or a file cannot be written.
pub fn write_into(directory: &Path) -> io::Result<()> {
    fs::create_dir(directory)?;
    FILES.into_iter().try_for_each(|(name, content)| fs::write(directory.join(name), content))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Model, WeightPlace};

    #[test]
    fn the_written_files_are_a_model_directory_like_any_other() {
        let parent = tempfile::tempdir().unwrap();
        let directory = parent.path().join("demo");
        write_into(&directory).unwrap();

        let opened = Model::open(directory.to_str().unwrap(), WeightPlace::Beside).unwrap();
        let embedded = Model::demo(directory);
        assert_eq!(opened.config, embedded.config);
        assert_eq!(opened.weights, embedded.weights);
    }
}
