use std::collections::{HashMap, HashSet};
use std::path::Path;

use super::AdapterError;
use super::config::AdapterConfig;
use crate::backend::Device;
use crate::layers::{Adapter, Addition, LowRankPair};
use crate::weights::{Checkpoint, LinearOrigin, Loader, Partition, Region, WeightPath, WeightSource, shown};

/// What PEFT puts before the name that a module has in the model.
const PREFIX: &str = "base_model.model.";

/// Where the linear layers of a loaded model come from: what an adapter's files are matched with.
pub struct AdapterLayout {
    /// The device that the model is on.
    pub device: Device,
    /// The rank that was loaded.
    pub partition: Partition,
    /// The layers, in the order of their numbers.
    pub linears: Vec<LinearOrigin>,
    /// Where the model's body was found in its checkpoint.
    pub body: String,
    /// Where else families keep it: the library that trained the adapter may have used another of its names.
    pub bodies: &'static [&'static str],
}

impl AdapterLayout {
    /// Loads this rank's part of the adapter in `directory`, as PEFT writes it.
    ///
    /// Errors when a file is missing or wrong, when a tensor does not fit the model, and when one changes something that
    /// adapters cannot change here.
    pub fn load(&self, directory: &Path) -> Result<Adapter, AdapterError> {
        let config = AdapterConfig::read(directory)?;
        let checkpoint = Checkpoint::open(directory)?;
        let names: HashSet<String> = checkpoint.names().map(str::to_owned).collect();
        let loader = Loader::new(WeightSource::Files(checkpoint), self.partition, None);
        let mut files = Files { config, names, loader, used: HashSet::new(), ranks: HashMap::new() };
        let additions: Vec<Option<Addition>> =
            self.linears.iter().map(|linear| self.addition(&mut files, linear)).collect::<Result<_, _>>()?;
        if let Some(tensor) = files.names.iter().filter(|name| !files.used.contains(*name)).min() {
            return Err(AdapterError::Unused { directory: directory.to_owned(), tensor: shown(tensor) });
        }
        if additions.iter().all(Option::is_none) {
            return Err(AdapterError::Empty { directory: directory.to_owned() });
        }
        self.device.settle(&[], |_| ())?;
        Ok(Adapter { additions })
    }

    /// What the adapter adds to one layer.
    fn addition(&self, files: &mut Files, linear: &LinearOrigin) -> Result<Option<Addition>, AdapterError> {
        let Some(module) = self.module(files, &linear.name) else {
            return Ok(None);
        };
        let region = &linear.region;
        let pair = files.pair(&self.device, &module, region)?;
        // Where outputs are summed over ranks, only the first of them has what is added once.
        let once = region.cols.len() == region.whole[1] || self.partition.rank == 0;
        let mut bias = files.bias(&module, region, linear)?;
        if let Some(inner) = files.inner_bias(&module, region, pair.as_ref())? {
            let mut sum = bias.unwrap_or_else(|| vec![0.0; inner.len()]);
            sum.iter_mut().zip(inner).for_each(|(sum, inner)| *sum += inner);
            bias = Some(sum);
        }
        let bias = match bias.filter(|_| once) {
            Some(bias) => {
                let width = bias.len();
                Some(self.device.upload(bias, width)?)
            }
            None => None,
        };
        Ok(Some(Addition { pair, bias }))
    }

    /// The layer's name as this adapter has it.
    fn module(&self, files: &Files, name: &str) -> Option<String> {
        let inside = match self.body.as_str() {
            "" => name,
            body => name.strip_prefix(body).and_then(|rest| rest.strip_prefix('.')).unwrap_or(name),
        };
        let bodies = self.bodies.iter().map(|body| match *body {
            "" => inside.to_owned(),
            body => format!("{body}.{inside}"),
        });
        std::iter::once(name.to_owned()).chain(bodies).find(|module| {
            let has = |end: &str| files.names.contains(&format!("{PREFIX}{module}.{end}"));
            has("lora_A.weight") || has("lora_B.weight") || BIASES.iter().any(|end| has(end))
        })
    }
}

/// Under what names a layer's own bias may be found.
const BIASES: [&str; 2] = ["bias", "base_layer.bias"];

/// An adapter's files while they are read.
struct Files {
    config: AdapterConfig,
    names: HashSet<String>,
    loader: Loader,
    /// Names of tensors that some layer has asked for.
    used: HashSet<String>,
    /// Ranks of modules, by name.
    ranks: HashMap<String, usize>,
}

impl Files {
    /// The two matrices: the first cut like the layer's inputs, the second like its outputs.
    fn pair(
        &mut self,
        device: &Device,
        module: &str,
        region: &Region,
    ) -> Result<Option<LowRankPair>, AdapterError> {
        let [outputs, inputs] = region.whole;
        let (a, b) = (format!("{PREFIX}{module}.lora_A.weight"), format!("{PREFIX}{module}.lora_B.weight"));
        if !self.names.contains(&a) && !self.names.contains(&b) {
            return Ok(None);
        }
        let rank = self.rank(module, &b)?;
        let down = Region::all(rank, inputs).with_cols(region.cols.clone());
        let up = Region::all(outputs, rank).with_rows(region.rows.clone());
        let pair = LowRankPair {
            a: device.place(self.at(&a).matrix(&down)?)?,
            b: device.place(self.at(&b).matrix(&up)?)?,
            scale: self.config.scale(module, rank),
        };
        self.used.extend([a, b]);
        Ok(Some(pair))
    }

    /// The rank is the second dimension of the second matrix.
    fn rank(&mut self, module: &str, b: &str) -> Result<usize, AdapterError> {
        if let Some(rank) = self.ranks.get(module) {
            return Ok(*rank);
        }
        let shape = self.at(b).shape()?;
        let rank = shape.get(1).copied().unwrap_or(0);
        self.ranks.insert(module.to_owned(), rank);
        Ok(rank)
    }

    /// By how much the adapter changes the layer's own bias.
    fn bias(
        &mut self,
        module: &str,
        region: &Region,
        linear: &LinearOrigin,
    ) -> Result<Option<Vec<f32>>, AdapterError> {
        let names = BIASES.map(|end| format!("{PREFIX}{module}.{end}"));
        let Some(name) = names.into_iter().find(|name| self.names.contains(name)) else {
            return Ok(None);
        };
        let mut bias = self.at(&name).vector_part(&[region.whole[0]], &region.rows)?;
        if let Some(base) = &linear.bias {
            bias.iter_mut().zip(base).for_each(|(bias, base)| *bias -= base);
        }
        self.used.insert(name);
        Ok(Some(bias))
    }

    /// The bias of the second matrix, scaled as its product is.
    fn inner_bias(
        &mut self,
        module: &str,
        region: &Region,
        pair: Option<&LowRankPair>,
    ) -> Result<Option<Vec<f32>>, AdapterError> {
        let name = format!("{PREFIX}{module}.lora_B.bias");
        let (Some(pair), true) = (pair, self.names.contains(&name)) else {
            return Ok(None);
        };
        let bias = self.at(&name).vector_part(&[region.whole[0]], &region.rows)?;
        self.used.insert(name);
        Ok(Some(bias.into_iter().map(|bias| bias * pair.scale).collect()))
    }

    fn at(&self, name: &str) -> WeightPath<'_> {
        self.loader.root().at(name)
    }
}
