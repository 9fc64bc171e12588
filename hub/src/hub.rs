//! The front door: surveys, single files, whole models and adapters.

use std::fs;
use std::path::PathBuf;
use std::sync::Arc;

use serde_json::Value;

use crate::client::Client;
use crate::config::HubConfig;
use crate::download::{Download, Order, WeightPlace};
use crate::error::HubError;
use crate::repo::Source;
use crate::select::{ADAPTER_CONFIG, Kind, SAFETENSORS};
use crate::survey::{self, Survey};

/// The Hub and the cache. Everything blocks until it is done.
#[derive(Clone, Debug)]
pub struct Hub {
    config: Arc<HubConfig>,
    client: Client,
}

impl Hub {
    /// Opens no connection yet.
    ///
    /// Errors when the certificates to trust cannot be read.
    pub fn new(config: HubConfig) -> Result<Self, HubError> {
        let config = Arc::new(config);
        Ok(Self { client: Client::new(Arc::clone(&config))?, config })
    }

    /// What there is of a model: on the Hub, or in the cache if the Hub may not or cannot be asked.
    ///
    /// Errors when there is no such model or revision, or when it may not be read.
    pub fn survey_model(&self, source: &Source, weights: &WeightPlace) -> Result<Survey, HubError> {
        let extension = weights.is_in_repository().then_some(SAFETENSORS);
        let survey = survey::look(&self.client, &self.config, source, None, extension)?;
        match survey.kind() {
            Kind::Model => Ok(survey),
            Kind::Adapter => {
                Err(HubError::IsAdapter { source_name: source.to_string(), base: self.base_of(&survey) })
            }
        }
    }

    /// What there is of a LoRA adapter: on the Hub, or in the cache if the Hub may not or cannot be asked.
    ///
    /// Errors when there is no such repository or revision, when it may not be read, or when it is no adapter.
    pub fn survey_adapter(&self, source: &Source) -> Result<Survey, HubError> {
        let survey =
            survey::look(&self.client, &self.config, source, Some(Kind::Adapter), Some(SAFETENSORS))?;
        match survey.has(ADAPTER_CONFIG) {
            true => Ok(survey),
            false => Err(HubError::NoAdapter { source_name: source.to_string() }),
        }
    }

    /// Where one file of a revision is, fetched if it has to be.
    ///
    /// Errors when there is no such file, or when it cannot be fetched.
    pub fn file(&self, survey: &Survey, name: &str) -> Result<PathBuf, HubError> {
        if !survey.has(name) {
            let source_name = survey.source().to_string();
            return Err(HubError::NoFile { source_name, file: name.to_owned() });
        }
        self.download(survey).one(name)
    }

    /// Fetches what an order needs of a repository, and says in which directory it is.
    ///
    /// Errors when anything of it cannot be found or fetched; what has come by then stays for the next time.
    pub fn fetch(&self, source: &Source, order: &Order) -> Result<PathBuf, HubError> {
        let exact =
            order.commit.as_deref().map(|commit| Source::new(source.id(), Some(commit))).transpose()?;
        let exact = exact.as_ref().unwrap_or(source);
        let extension = order.weights.is_in_repository().then_some(order.extension.as_str());
        let survey = survey::look(&self.client, &self.config, exact, order.kind, extension)?;
        if !survey.is_cached() {
            let download = self.download(&survey);
            download.all(order)?;
            download.remember(source);
        }
        Ok(survey.directory().to_owned())
    }

    /// Fetches a LoRA adapter, given as `id` or `id@revision`, and says in which directory it is.
    ///
    /// Errors as [`Hub::fetch`] does, and when the repository is no adapter.
    pub fn fetch_adapter(&self, text: &str, order: &Order) -> Result<PathBuf, HubError> {
        self.fetch(&Source::parse(text)?, &Order { kind: Some(Kind::Adapter), ..order.clone() })
    }

    /// The model that an adapter belongs to, in words.
    fn base_of(&self, survey: &Survey) -> String {
        let base = || {
            let text = fs::read(self.file(survey, ADAPTER_CONFIG).ok()?).ok()?;
            let config: Value = serde_json::from_slice(&text).ok()?;
            Some(format!(" of `{}`", config.get("base_model_name_or_path")?.as_str()?))
        };
        base().unwrap_or_default()
    }

    fn download<'a>(&'a self, survey: &'a Survey) -> Download<'a> {
        Download { client: &self.client, config: &self.config, survey }
    }
}
