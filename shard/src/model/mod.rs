//! A model: a function of its input and the key/value cache.
//!
//! - `config_file.rs`: `config.json` as typed fields, each error naming the field
//! - `config.rs`, `rope_config.rs`: what the fields mean that families share
//! - `spec.rs`: what a decoder is made of; `split.rs`: over how many ranks it can be split
//! - `decoder.rs`, `layer.rs`: the decoder that families share, as a spec describes it
//! - `input.rs`: what is checked of a step before anything is computed
//! - one file per family: what of the spec is different there
//!
//! To add a family: its file, and its row in [`FAMILIES`].

mod baichuan;
mod bloom;
mod cohere;
mod config;
mod config_file;
mod dbrx;
mod decoder;
mod deepseek;
mod falcon;
mod gemma;
mod glm;
mod gpt2;
mod gpt_neox;
mod gpt_oss;
mod gptj;
mod granite;
mod input;
mod layer;
mod llama;
mod mistral;
mod mpt;
mod olmo2;
mod opt;
mod phi;
mod qwen;
mod rope_config;
mod smollm3;
mod spec;
mod split;
mod stablelm;
mod starcoder2;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use kernels::{DType, OpError, Sequence};
use thiserror::Error;

use crate::adapters::AdapterLayout;
use crate::backend::{Device, Tensor};
use crate::cache::{KvShape, PagedKv};
use crate::collective::Ranks;
use crate::layers::{AdapterRows, LayerError};
use crate::weights::{Checkpoint, Elements, Loader, Progress, RandomWeights, WeightError, WeightSource};

pub use config_file::{ConfigError, ConfigFile, Fields};
pub use decoder::Decoder;
pub use spec::DecoderSpec;
pub use split::SplitError;

/// What the engine needs to know of a model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModelShape {
    /// Width of a row of logits.
    pub vocabulary: usize,
    /// What a token occupies in the cache of this rank.
    pub kv: KvShape,
    /// Positions the model was made for.
    pub positions_max: usize,
    /// The longest prompt whose keys and values depend on nothing but each token and those before it, if there is such a
    /// limit.
    pub shared_prompt_max: Option<usize>,
    /// Type of the stored weights.
    pub dtype: kernels::DType,
}

/// One step's flattened batch of `T` tokens.
#[derive(Clone, Copy, Debug)]
pub struct StepInput<'a> {
    /// `[T]`, token ids, each below the vocabulary size.
    pub ids: &'a [u32],
    /// `[T]`, position of each token in its own sequence.
    pub positions: &'a [u32],
    /// `[T]`, length of the sequence as it was when the token came: that of the prompt, or one more than the position of a
    /// token that was generated. Rotary embeddings of some models depend on it.
    pub lengths: &'a [u32],
    /// `[T]`, cache slot that receives each token's key and value.
    pub slots: &'a [u32],
    /// The requests; their rows cover `0 .. T` without overlap.
    pub sequences: &'a [Sequence<'a>],
    /// Tokens per cache block. The slots of a request make up whole blocks, of which the last may be cut short.
    pub block_size: usize,
    /// `[R]`, the tokens whose logits are wanted, in ascending order.
    pub logits_at: &'a [u32],
    /// Rows that are changed by adapters; none overlaps another.
    pub adapters: &'a [AdapterRows<'a>],
}

/// A causal language model.
pub trait Model: Send {
    /// Sizes the engine plans with.
    fn shape(&self) -> &ModelShape;

    /// What adapters are matched with.
    fn adapters(&self) -> Arc<AdapterLayout>;

    /// Makes the buffers of a pass over `tokens` tokens of which `logits` are wanted, so that later passes up to this size
    /// find their activations allocated. Errors when that much cannot be had.
    fn reserve(&mut self, tokens: usize, logits: usize) -> Result<(), OpError>;

    /// One pass over a flattened batch; keys and values go into `cache`. Returns logits of the `R` positions that
    /// `input` selects: `[R, vocabulary]`, f32. The result lives until the next pass, whose buffers it shares, and may be changed.
    fn forward(&mut self, input: &StepInput<'_>, cache: &mut PagedKv) -> Result<&mut Tensor, OpError>;
}

/// Why a model cannot be loaded. Each names the file, and the field or the tensor.
#[derive(Debug, Error)]
pub enum LoadError {
    /// The configuration is missing, wrong, or of a model that is not served.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The weights are missing, or do not fit the configuration.
    #[error(transparent)]
    Weight(#[from] WeightError),
    /// The model cannot be split over so many ranks.
    #[error(transparent)]
    Split(#[from] SplitError),
    /// The device refuses.
    #[error(transparent)]
    Device(#[from] OpError),
}

impl From<LayerError> for LoadError {
    fn from(error: LayerError) -> Self {
        match error {
            LayerError::Weight(error) => Self::Weight(error),
            LayerError::Device(error) => Self::Device(error),
        }
    }
}

/// Makes the spec of one family's model from its configuration.
type Family = fn(&ConfigFile) -> Result<DecoderSpec, ConfigError>;

/// `model_type` in `config.json` to family.
const FAMILIES: &[(&str, Family)] = &[
    ("baichuan", baichuan::baichuan),
    ("bloom", bloom::bloom),
    ("cohere", cohere::cohere),
    ("cohere2", cohere::cohere2),
    ("dbrx", dbrx::dbrx),
    ("deepseek_v2", deepseek::deepseek_v2),
    ("deepseek_v3", deepseek::deepseek_v3),
    ("falcon", falcon::falcon),
    ("gemma", gemma::gemma),
    ("gemma2", gemma::gemma2),
    ("gemma3", gemma::gemma3),
    ("gemma3_text", gemma::gemma3_text),
    ("glm", glm::glm),
    ("glm4", glm::glm4),
    ("gpt2", gpt2::gpt2),
    ("gpt_bigcode", gpt2::gpt_bigcode),
    ("gpt_neox", gpt_neox::gpt_neox),
    ("gpt_oss", gpt_oss::gpt_oss),
    ("gptj", gptj::gptj),
    ("granite", granite::granite),
    ("granitemoe", granite::granitemoe),
    ("granitemoeshared", granite::granitemoeshared),
    ("llama", llama::llama),
    ("mistral", mistral::mistral),
    ("mixtral", mistral::mixtral),
    ("mpt", mpt::mpt),
    ("olmo2", olmo2::olmo2),
    ("opt", opt::opt),
    ("phi", phi::phi),
    ("phi3", phi::phi3),
    ("phimoe", phi::phimoe),
    ("qwen2", qwen::qwen2),
    ("qwen2_moe", qwen::qwen2_moe),
    ("qwen3", qwen::qwen3),
    ("qwen3_moe", qwen::qwen3_moe),
    ("RefinedWeb", falcon::falcon),
    ("RefinedWebModel", falcon::falcon),
    ("smollm3", smollm3::smollm3),
    ("stablelm", stablelm::stablelm),
    ("starcoder2", starcoder2::starcoder2),
];

/// How a model is loaded.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LoadOptions {
    /// Element type of matrices; as they are stored, if absent.
    pub dtype: Option<DType>,
    /// Where the weights come from.
    pub weights: WeightOrigin,
    /// Whether they are loaded, or only their sizes are wanted.
    pub elements: Elements,
}

/// Another rotary scaling than the model's own.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RopeOverride {
    /// `linear` or `dynamic`.
    pub kind: &'static str,
    /// By how much; at least 1.
    pub factor: f64,
}

/// Where a model's weights come from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum WeightOrigin {
    /// Files beside the configuration.
    #[default]
    Directory,
    /// Files elsewhere.
    Other(PathBuf),
    /// No files: random numbers from this seed.
    Random(u64),
}

/// Element type of random matrices where the configuration names none.
const RANDOM_DTYPE: DType = DType::BF16;

/// A model as its configuration describes it, known to be served, and to divide over the ranks there are.
#[derive(Debug)]
pub struct Blueprint {
    directory: PathBuf,
    spec: DecoderSpec,
    dtype: Option<DType>,
}

impl Blueprint {
    /// Reads `config.json` in `directory`, for a model over `world` ranks.
    ///
    /// Errors when the family is not served, when a field is missing or wrong, and when the model cannot be split over so
    /// many ranks.
    pub fn read(directory: &Path, world: usize, rope: Option<RopeOverride>) -> Result<Self, LoadError> {
        let mut file = ConfigFile::read(directory)?;
        if let Some(RopeOverride { kind, factor }) = rope {
            file.set_rope_scaling(kind, factor);
        }
        let spec = DecoderSpec::of(&file)?;
        split::check(&spec, world)?;
        Ok(Self { directory: directory.to_owned(), spec, dtype: dtype(&file.fields())? })
    }

    /// What weights and activations are on a device where all of them have one type: what was asked for, else what the
    /// configuration says. Checkpoints in float32 were as a rule trained to run in half of that.
    pub fn dtype(&self, options: &LoadOptions) -> DType {
        let stored = self.dtype.filter(|dtype| *dtype != DType::F32);
        options.dtype.or(stored).unwrap_or(DType::F16)
    }

    /// Loads this rank's part of the weights. They stay in the mapped files where they lie there as they are needed, and are
    /// in memory when this returns; `report` is told how far that has come.
    ///
    /// Errors when a tensor is missing or wrong.
    pub fn load(
        &self,
        options: &LoadOptions,
        device: Device,
        ranks: Ranks,
        report: impl FnMut(Progress),
    ) -> Result<Box<dyn Model>, LoadError> {
        let source = match &options.weights {
            WeightOrigin::Directory => WeightSource::Files(Checkpoint::open(&self.directory)?),
            WeightOrigin::Other(directory) => WeightSource::Files(Checkpoint::open(directory)?),
            WeightOrigin::Random(seed) => {
                let dtype = options.dtype.or(self.dtype).unwrap_or(RANDOM_DTYPE);
                WeightSource::Random(RandomWeights { seed: *seed, dtype })
            }
        };
        let loader = Loader::new(source, ranks.partition(), options.dtype.filter(|_| !device.converts()))
            .with_elements(options.elements);
        let decoder = Decoder::load(&self.spec, &loader, device.clone(), ranks)?;
        device.settle(&loader.mapped(), report)?;
        Ok(Box::new(decoder))
    }
}

/// Reads the configuration in `directory` and loads this rank's part of the weights.
pub fn load(
    directory: &Path,
    options: &LoadOptions,
    device: Device,
    ranks: Ranks,
) -> Result<Box<dyn Model>, LoadError> {
    Blueprint::read(directory, ranks.partition().world, None)?.load(options, device, ranks, |_| ())
}

impl DecoderSpec {
    /// What a configuration describes.
    ///
    /// Errors when the family is not served, and when a field is missing or wrong.
    pub fn of(file: &ConfigFile) -> Result<Self, ConfigError> {
        let fields = file.fields();
        let model_type = fields.required("model_type", Fields::text)?;
        match FAMILIES.iter().find(|(name, _)| *name == model_type) {
            Some((_, family)) => family(file),
            None => {
                let names: Vec<&str> = FAMILIES.iter().map(|&(name, _)| name).collect();
                Err(fields.unserved("model_type", model_type, &names))
            }
        }
    }
}

/// The element type that the configuration names, if it is one that is served.
fn dtype(fields: &Fields<'_>) -> Result<Option<DType>, ConfigError> {
    let name = match fields.text("dtype")? {
        Some(name) => Some(name),
        None => fields.text("torch_dtype")?,
    };
    Ok(match name {
        Some("float16") => Some(DType::F16),
        Some("bfloat16") => Some(DType::BF16),
        Some("float32") => Some(DType::F32),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(config: &str, expected: &str) {
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("config.json"), config).unwrap();
        let device = Device::cpu(std::num::NonZeroUsize::MIN).unwrap();
        let message = match load(directory.path(), &LoadOptions::default(), device, Ranks::alone()) {
            Ok(_) => panic!("a model was loaded from {config}"),
            Err(error) => error.to_string(),
        };
        assert!(message.contains(expected), "expected `{expected}` in: {message}");
    }

    #[test]
    fn an_unknown_model_type_is_one_line_that_lists_what_is_served() {
        check(
            r#"{"model_type":"bert","hidden_size":"nonsense"}"#,
            "config.json: model_type `bert` is not served; served: baichuan, bloom, cohere,",
        );
    }

    #[test]
    fn a_configuration_without_model_type_is_an_error() {
        check("{}", "config.json: `model_type` is missing");
    }

    #[test]
    fn a_configuration_without_weights_is_an_error() {
        let sizes = r#""vocab_size":8,"hidden_size":4,"intermediate_size":4,"num_hidden_layers":1,"num_attention_heads":2"#;
        check(&format!(r#"{{"model_type":"llama",{sizes}}}"#), "no .safetensors file");
    }
}
