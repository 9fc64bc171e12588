//! The model to serve: finds its files and says at once what is missing.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use hub::{Kind, Weights};

use crate::demo;
use crate::model_config::ModelConfig;

/// What the name of an index of weights ends with.
const INDEX_END: &str = ".index.json";

/// Largest JSON file that is read: the index of the largest known checkpoints has under 10 MB.
const JSON_BYTES_MAX: u64 = 64 << 20;

/// A model whose files are all there.
#[derive(Clone, Debug)]
pub struct Model {
    /// What the user typed, or `demo`; what clients see.
    pub id: String,
    /// Where it is from.
    pub source: ModelSource,
    /// The directory that router and shard read; absolute.
    pub directory: PathBuf,
    /// Facts of its `config.json`.
    pub config: ModelConfig,
    /// Its weight files.
    pub weights: WeightFiles,
}

/// Where a model is from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ModelSource {
    /// Part of this program, written into the run directory.
    Embedded,
    /// A directory of the user's.
    Directory,
    /// The Hub; its files are or will be in the cache.
    Hub(HubOrigin),
}

/// Which version of a model of the Hub it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HubOrigin {
    /// The branch, tag or commit that was asked for.
    pub revision: String,
    /// The commit that it is.
    pub commit: String,
    /// Whether the cache is all there is: the Hub may not or could not be asked.
    pub is_cached: bool,
}

/// How many weight files there are and how large they are together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WeightFiles {
    /// Number of files.
    pub count: usize,
    /// Their sizes together, in bytes.
    pub bytes: u64,
}

/// Why a model cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// The id is empty.
    #[error("the model id (--model-id, MODEL_ID) is empty; leave it out for the demo model")]
    EmptyId,
    /// No directory of this name, and nothing that the Hub could have.
    #[error(
        "model `{0}`: no such directory, and no id of the Hub, which would look like `organization/name`"
    )]
    NoDirectory(String),
    /// A file, where a directory is needed.
    #[error("model `{0}` is not a directory")]
    NotADirectory(String),
    /// A file that every model needs.
    #[error("model `{id}` has no {file}")]
    MissingFile {
        /// The model.
        id: String,
        /// The file's name or kind.
        file: String,
    },
    /// The index of the weights names a file that is not there.
    #[error("model `{id}`: {index} names `{file}`, which is not in {}", directory.display())]
    MissingWeights {
        /// The model.
        id: String,
        /// The index's name.
        index: String,
        /// Where the weights should be.
        directory: PathBuf,
        /// The file's name, as the index has it.
        file: String,
    },
    /// A file that says something wrong.
    #[error("model `{id}`: {file} {problem}")]
    BadFile {
        /// The model.
        id: String,
        /// The file's name.
        file: String,
        /// What is wrong.
        problem: String,
    },
    /// Weights that should be in a directory of the user's.
    #[error("model `{id}`: --weights-cache-override {} holds no weights", directory.display())]
    NothingInOverride {
        /// The model.
        id: String,
        /// The directory.
        directory: PathBuf,
    },
    /// A file or directory that cannot be read.
    #[error("model `{id}`: cannot read {}: {source}", path.display())]
    Unreadable {
        /// The model.
        id: String,
        /// The file or directory.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// Where the weights of a local model are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WeightPlace<'a> {
    /// In its directory.
    Beside,
    /// In another one.
    Elsewhere(&'a Path),
    /// Nowhere: the shards make them up.
    MadeUp,
}

impl<'a> WeightPlace<'a> {
    /// The directory of weights that are not in the model's own.
    fn elsewhere(self) -> Option<&'a Path> {
        match self {
            Self::Elsewhere(directory) => Some(directory),
            Self::Beside | Self::MadeUp => None,
        }
    }
}

impl<'a> From<Option<&'a Path>> for WeightPlace<'a> {
    fn from(elsewhere: Option<&'a Path>) -> Self {
        elsewhere.map_or(Self::Beside, Self::Elsewhere)
    }
}

impl Model {
    /// The embedded demo model, to be found in `directory` once it is written there.
    pub fn demo(directory: PathBuf) -> Self {
        Self {
            id: demo::ID.to_owned(),
            source: ModelSource::Embedded,
            directory,
            config: ModelConfig::parse(demo::CONFIG).expect("the embedded config.json is valid: tested"),
            weights: WeightFiles { count: 1, bytes: demo::WEIGHTS.len() as u64 },
        }
    }

    /// The model in the local directory `id`.
    ///
    /// Errors when it is no directory or has no valid `config.json`, no `tokenizer.json` or not all of its weights.
    pub fn open(id: &str, weights: WeightPlace<'_>) -> Result<Self, ModelError> {
        let directory = Path::new(id);
        let place = Place { id, directory, weights: weights.elsewhere() };
        place.require_directory()?;
        let config = place.config()?;
        place.size_of("tokenizer.json")?.ok_or_else(|| place.missing("tokenizer.json"))?;
        Ok(Self {
            id: id.to_owned(),
            source: ModelSource::Directory,
            directory: std::path::absolute(directory).map_err(|source| place.unreadable("", source))?,
            config,
            weights: match weights {
                WeightPlace::MadeUp => WeightFiles { count: 0, bytes: 0 },
                WeightPlace::Beside | WeightPlace::Elsewhere(_) => place.weights()?,
            },
        })
    }

    /// The model of the Hub whose files are or will be in `directory`, `config.json` among those that are. `listed` are
    /// the sizes of its weight files, as far as the Hub tells them; those of another directory count instead.
    ///
    /// Errors when `config.json` is not valid, or when the other directory has no weights.
    pub fn at(
        id: &str,
        directory: &Path,
        source: ModelSource,
        weights: WeightPlace<'_>,
        listed: &[u64],
    ) -> Result<Self, ModelError> {
        let place = Place { id, directory, weights: weights.elsewhere() };
        let found = match weights {
            WeightPlace::Elsewhere(_) => place.weights()?,
            WeightPlace::MadeUp => WeightFiles { count: 0, bytes: 0 },
            WeightPlace::Beside if listed.is_empty() => {
                return Err(place.missing("weights: no *.safetensors, *.bin or *.pt file"));
            }
            WeightPlace::Beside => WeightFiles { count: listed.len(), bytes: listed.iter().sum() },
        };
        let (id, directory, config) = (id.to_owned(), directory.to_owned(), place.config()?);
        Ok(Self { id, source, directory, config, weights: found })
    }
}

/// A directory on the way to being a model, and the name for its errors.
struct Place<'a> {
    id: &'a str,
    directory: &'a Path,
    /// Where its weights are, if not there.
    weights: Option<&'a Path>,
}

impl Place<'_> {
    fn require_directory(&self) -> Result<(), ModelError> {
        if self.id.is_empty() {
            return Err(ModelError::EmptyId);
        }
        match fs::metadata(self.directory) {
            Ok(metadata) if metadata.is_dir() => Ok(()),
            Ok(_) => Err(ModelError::NotADirectory(self.id.to_owned())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                Err(ModelError::NoDirectory(self.id.to_owned()))
            }
            Err(error) => Err(self.unreadable("", error)),
        }
    }

    fn config(&self) -> Result<ModelConfig, ModelError> {
        ModelConfig::parse(&self.read("config.json")?).map_err(|problem| self.bad("config.json", problem))
    }

    /// One file of the usual name, or else those that an index names, or else all there are: what the shard reads.
    fn weights(&self) -> Result<WeightFiles, ModelError> {
        let directory = self.weights.unwrap_or(self.directory);
        let mut names = self.listed_names(directory)?;
        if self.weights.is_some() {
            // Weights may lie elsewhere without the index that says what belongs to them.
            names.extend(
                self.listed_names(self.directory)?.into_iter().filter(|name| name.ends_with(INDEX_END)),
            );
        }
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        let mut weights = WeightFiles { count: 0, bytes: 0 };
        match hub::weights(Kind::Model, &names, hub::SAFETENSORS) {
            None => match self.weights {
                None => return Err(self.missing("weights: no *.safetensors, *.bin or *.pt file")),
                Some(directory) => {
                    let (id, directory) = (self.id.to_owned(), directory.to_owned());
                    return Err(ModelError::NothingInOverride { id, directory });
                }
            },
            Some(Weights::Files(files)) => {
                for file in files {
                    weights.bytes += self.size_in(directory, &file)?.unwrap_or(0);
                    weights.count += 1;
                }
            }
            Some(Weights::Indexed(index)) => {
                for file in self.indexed_names(&index)? {
                    let missing = || ModelError::MissingWeights {
                        id: self.id.to_owned(),
                        index: index.clone(),
                        directory: directory.to_owned(),
                        file: file.clone(),
                    };
                    weights.bytes += self.size_in(directory, &file)?.ok_or_else(missing)?;
                    weights.count += 1;
                }
            }
        }
        Ok(weights)
    }

    /// The names in an index, each once. A name that leads out of the directory is an error.
    fn indexed_names(&self, index: &str) -> Result<Vec<String>, ModelError> {
        let own = self.size_of(index)?.is_some();
        let directory = self.weights.filter(|_| !own).unwrap_or(self.directory);
        hub::indexed(&self.read_in(directory, index)?).map_err(|problem| self.bad(index, problem))
    }

    /// The files of a directory.
    fn listed_names(&self, directory: &Path) -> Result<Vec<String>, ModelError> {
        let failed =
            |source| ModelError::Unreadable { id: self.id.to_owned(), path: directory.to_owned(), source };
        let mut names = Vec::new();
        for entry in fs::read_dir(directory).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            // A name that is not UTF-8 is none that weights have.
            if let (Some(name), true) = (entry.file_name().to_str(), entry.path().is_file()) {
                names.push(name.to_owned());
            }
        }
        Ok(names)
    }

    /// The size of a file in bytes; none when there is no such file.
    fn size_of(&self, name: &str) -> Result<Option<u64>, ModelError> {
        self.size_in(self.directory, name)
    }

    fn size_in(&self, directory: &Path, name: &str) -> Result<Option<u64>, ModelError> {
        let path = directory.join(name);
        match fs::metadata(&path) {
            Ok(metadata) => Ok(metadata.is_file().then_some(metadata.len())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(ModelError::Unreadable { id: self.id.to_owned(), path, source }),
        }
    }

    fn read(&self, name: &str) -> Result<Vec<u8>, ModelError> {
        self.read_in(self.directory, name)
    }

    fn read_in(&self, directory: &Path, name: &str) -> Result<Vec<u8>, ModelError> {
        let bytes = self.size_in(directory, name)?.ok_or_else(|| self.missing(name))?;
        if bytes > JSON_BYTES_MAX {
            return Err(self.bad(name, format!("has {bytes} bytes; at most {JSON_BYTES_MAX} are read")));
        }
        let mut content = Vec::new();
        File::open(directory.join(name))
            .and_then(|file| file.take(JSON_BYTES_MAX).read_to_end(&mut content))
            .map_err(|error| self.unreadable(name, error))?;
        Ok(content)
    }

    fn missing(&self, file: &str) -> ModelError {
        ModelError::MissingFile { id: self.id.to_owned(), file: file.to_owned() }
    }

    fn bad(&self, file: &str, problem: String) -> ModelError {
        ModelError::BadFile { id: self.id.to_owned(), file: file.to_owned(), problem }
    }

    fn unreadable(&self, name: &str, source: io::Error) -> ModelError {
        ModelError::Unreadable { id: self.id.to_owned(), path: self.directory.join(name), source }
    }
}

#[cfg(test)]
mod tests {
    use tempfile::TempDir;

    use super::*;

    fn directory(files: &[(&str, &str)]) -> TempDir {
        let directory = tempfile::tempdir().unwrap();
        for (name, content) in files {
            fs::write(directory.path().join(name), content).unwrap();
        }
        directory
    }

    fn open(files: &[(&str, &str)]) -> Result<Model, ModelError> {
        Model::open(directory(files).path().to_str().unwrap(), WeightPlace::Beside)
    }

    const INDEX: &str = "model.safetensors.index.json";

    const CONFIG: (&str, &str) = ("config.json", r#"{"model_type": "llama"}"#);
    const TOKENIZER: (&str, &str) = ("tokenizer.json", "{}");

    #[test]
    fn weights_without_an_index_are_all_safetensors_files() {
        let model =
            open(&[CONFIG, TOKENIZER, ("a.safetensors", "12345"), ("b.safetensors", "123"), ("c.bin", "1")]);
        assert_eq!(model.unwrap().weights, WeightFiles { count: 2, bytes: 8 });
    }

    #[test]
    fn weights_with_an_index_are_the_files_it_names() {
        let index = r#"{"metadata": {}, "weight_map": {"a": "1.safetensors", "b": "2.safetensors", "c": "1.safetensors"}}"#;
        let files = [CONFIG, TOKENIZER, (INDEX, index), ("1.safetensors", "12"), ("2.safetensors", "345")];
        assert_eq!(open(&files).unwrap().weights, WeightFiles { count: 2, bytes: 5 });

        let error = open(&files[..4]).unwrap_err();
        assert!(error.to_string().contains("names `2.safetensors`, which is not in "), "{error}");
    }

    #[test]
    fn an_index_cannot_lead_out_of_the_directory() {
        for name in ["\"../x.safetensors\"", "\"/etc/passwd\"", "\"..\"", "\"\"", "3"] {
            let index = format!(r#"{{"weight_map": {{"lm_head": {name}}}}}"#);
            let error = open(&[CONFIG, TOKENIZER, (INDEX, &index)]).unwrap_err();
            assert!(error.to_string().contains("no file of its directory for `lm_head`"), "{name}: {error}");
        }
    }

    #[test]
    fn what_a_directory_lacks_is_named() {
        let cases: [(&[(&str, &str)], &str); 4] = [
            (&[], "has no config.json"),
            (&[CONFIG], "has no tokenizer.json"),
            (&[CONFIG, TOKENIZER], "has no weights: no *.safetensors, *.bin or *.pt file"),
            (&[("config.json", "{"), TOKENIZER], "config.json is not a JSON object"),
        ];
        for (files, expected) in cases {
            let error = open(files).unwrap_err().to_string();
            assert!(error.contains(expected) && error.lines().count() == 1, "{error}");
        }
    }

    #[test]
    fn what_is_neither_a_directory_nor_an_id_is_named() {
        let error = Model::open("/no/such/directory", WeightPlace::Beside).unwrap_err().to_string();
        assert!(error.contains("`/no/such/directory`") && error.contains("`organization/name`"), "{error}");
        assert!(matches!(Model::open("", WeightPlace::Beside), Err(ModelError::EmptyId)));
    }

    #[test]
    fn weights_may_be_in_another_directory() {
        let index = r#"{"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}"#;
        let model = directory(&[CONFIG, TOKENIZER, (INDEX, index)]);
        let weights = directory(&[("1.safetensors", "12"), ("2.safetensors", "345"), ("3.safetensors", "6")]);
        let open = |weights: &TempDir| {
            Model::open(model.path().to_str().unwrap(), WeightPlace::Elsewhere(weights.path()))
        };
        assert_eq!(open(&weights).unwrap().weights, WeightFiles { count: 2, bytes: 5 });

        fs::remove_file(weights.path().join("2.safetensors")).unwrap();
        assert!(open(&weights).unwrap_err().to_string().contains("`2.safetensors`"));
        fs::remove_file(model.path().join(INDEX)).unwrap();
        let error = open(&directory(&[])).unwrap_err().to_string();
        assert!(error.contains("--weights-cache-override") && error.lines().count() == 1, "{error}");
    }

    #[test]
    fn files_of_pytorch_are_weights_when_there_are_no_others() {
        let files = [CONFIG, TOKENIZER, ("pytorch_model.bin", "1234"), ("training_args.bin", "12")];
        assert_eq!(open(&files).unwrap().weights, WeightFiles { count: 1, bytes: 4 });
    }

    #[test]
    fn one_file_of_the_usual_name_is_all_the_weights() {
        let files = [CONFIG, TOKENIZER, ("model.safetensors", "123"), ("consolidated.safetensors", "12")];
        assert_eq!(open(&files).unwrap().weights, WeightFiles { count: 1, bytes: 3 });
    }

    #[test]
    fn a_file_is_no_model_directory() {
        let parent = directory(&[CONFIG]);
        let file = parent.path().join("config.json");
        assert!(matches!(
            Model::open(file.to_str().unwrap(), WeightPlace::Beside),
            Err(ModelError::NotADirectory(_))
        ));
    }

    #[test]
    fn the_embedded_demo_model_is_complete() {
        let model = Model::demo(PathBuf::from("/run/demo"));
        assert_eq!(model.id, "demo");
        assert!(model.config.position_count.is_some() && model.weights.bytes > 1 << 20);
    }
}
