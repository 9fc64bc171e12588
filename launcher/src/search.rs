//! Finds what was asked for: the model, which is part of this program, in a directory or on the Hub; and its adapters.

use std::path::{Path, PathBuf};
use std::thread;

use hub::{Hub, HubConfig, Source};
use tokio::sync::oneshot;

use crate::adapters::{self, Adapter};
use crate::args::Args;
use crate::demo;
use crate::error::LaunchError;
use crate::model::{HubOrigin, Model, ModelError, ModelSource, WeightPlace};
use crate::plan;

/// What to look for. On the Hub, that fetches `config.json` and nothing else.
#[derive(Clone, Debug)]
pub struct Search {
    id: Option<String>,
    revision: Option<String>,
    hub_cache: Option<PathBuf>,
    weights_directory: Option<PathBuf>,
    /// Whether the shards make them up.
    weights_made_up: bool,
    lora_adapters: String,
    demo_directory: PathBuf,
}

/// What was found.
#[derive(Clone, Debug)]
pub struct Found {
    /// The model to serve.
    pub model: Model,
    /// The adapters to load at the start.
    pub adapters: Vec<Adapter>,
}

impl Search {
    /// What these arguments ask for. The demo model would be written into the run directory.
    pub fn new(args: &Args, run_dir: &Path) -> Self {
        let path = |path: &Option<PathBuf>| path.clone().filter(|path| !path.as_os_str().is_empty());
        Self {
            id: args.model_id.clone(),
            revision: args.revision.clone(),
            hub_cache: path(&args.huggingface_hub_cache),
            weights_directory: path(&args.weights_cache_override),
            weights_made_up: args.load_format == "dummy",
            lora_adapters: args.lora_adapters.clone().unwrap_or_default(),
            demo_directory: run_dir.join(demo::ID),
        }
    }

    /// Finds everything. May take as long as the Hub takes to answer.
    ///
    /// Errors when something is nowhere, when it may not be read, when the list of adapters is none, or when the
    /// environment says something about the Hub that makes no sense.
    pub fn run(self) -> Result<Found, LaunchError> {
        // What can be wrong at once is not to wait for the Hub.
        let adapters = plan::parse_adapters(&self.lora_adapters)?;
        let model = match &self.id {
            None => Model::demo(self.demo_directory.clone()),
            Some(id) if is_on_the_hub(id) => self.on_the_hub(id)?,
            Some(id) if self.weights_made_up => Model::open(id, WeightPlace::MadeUp)?,
            Some(id) => Model::open(id, self.weights_directory.as_deref().into())?,
        };
        let adapters = adapters.into_iter().map(|argument| adapters::resolve(argument, || self.hub()));
        Ok(Found { model, adapters: adapters.collect::<Result<_, _>>()? })
    }

    /// Finds everything on a thread of its own, so that a signal can end the waiting. The thread ends with the process.
    pub async fn run_in_background(self) -> Result<Found, LaunchError> {
        let (sender, receiver) = oneshot::channel();
        // Nobody listens any more when a signal came first.
        thread::spawn(move || drop(sender.send(self.run())));
        receiver.await.expect("the search sends its result, or the process has panicked")
    }

    fn on_the_hub(&self, id: &str) -> Result<Model, LaunchError> {
        let source = Source::new(id, self.revision.as_deref())?;
        let hub = self.hub()?;
        let place = match &self.weights_directory {
            _ if self.weights_made_up => hub::WeightPlace::Nowhere,
            Some(directory) => hub::WeightPlace::Directory(directory.clone()),
            None => hub::WeightPlace::Repository,
        };
        let survey = hub.survey_model(&source, &place)?;
        for file in ["config.json", "tokenizer.json"] {
            if !survey.has(file) {
                return Err(ModelError::MissingFile { id: id.to_owned(), file: file.to_owned() }.into());
            }
        }
        hub.file(&survey, "config.json")?;
        let origin = HubOrigin {
            revision: source.revision().to_owned(),
            commit: survey.commit().to_owned(),
            is_cached: survey.is_cached(),
        };
        let listed: Vec<u64> = survey.likely_weights().iter().map(|entry| entry.size.unwrap_or(0)).collect();
        let weights = match &place {
            hub::WeightPlace::Repository => WeightPlace::Beside,
            hub::WeightPlace::Directory(directory) => WeightPlace::Elsewhere(directory),
            hub::WeightPlace::Nowhere => WeightPlace::MadeUp,
        };
        Ok(Model::at(id, survey.directory(), ModelSource::Hub(origin), weights, &listed)?)
    }

    fn hub(&self) -> Result<Hub, LaunchError> {
        let config = HubConfig::from_env(self.hub_cache.as_deref());
        let config = config.map_err(|error| LaunchError::Variable(error.to_string()))?;
        Ok(Hub::new(config)?)
    }
}

/// A path that exists is one, whatever the Hub may have of that name.
fn is_on_the_hub(id: &str) -> bool {
    !Path::new(id).exists() && Source::is_id(id)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_exists_here_is_a_directory_and_what_looks_like_an_id_is_on_the_hub() {
        assert!(is_on_the_hub("no-such-organization/model") && is_on_the_hub("gpt2"));
        for id in ["src", "/no/such/directory", "./model", "a/b/c", ""] {
            assert!(!is_on_the_hub(id), "{id}");
        }
    }

    #[test]
    fn without_an_id_the_demo_model_is_found() {
        let args = Args::parse_without_environment(&[]).unwrap();
        let Found { model, adapters } = Search::new(&args, Path::new("/run/tgi")).run().unwrap();
        assert_eq!(adapters, []);
        assert_eq!((model.id.as_str(), model.directory.as_path()), ("demo", Path::new("/run/tgi/demo")));
    }
}
