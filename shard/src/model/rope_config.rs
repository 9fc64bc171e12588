//! What `config.json` says about rotary embeddings. Newer files hold all of it in `rope_parameters`, perhaps one set per
//! kind of layer; older ones have `rope_theta` and `rope_scaling`.

use super::config_file::{ConfigError, Fields};
use crate::layers::RopeScaling;

/// Defaults of the reference library (transformers) for what older files leave out.
mod default {
    pub(super) const THETA: f64 = 10_000.0;
    pub(super) const BETA_FAST: f64 = 32.0;
    pub(super) const BETA_SLOW: f64 = 1.0;
}

/// One set of rotary parameters.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct RopeConfig {
    /// Base of the frequencies.
    pub theta: f64,
    /// How the frequencies are stretched.
    pub scaling: RopeScaling,
    /// The share of each head that is rotated, where the file says so.
    pub partial: Option<f64>,
}

impl RopeConfig {
    /// Reads the parameters of one kind of layer (`full_attention`, `sliding_attention`), or those of all layers.
    ///
    /// Errors when they are wrong, of a kind that is not served, or different for kinds of layers where one set is expected.
    pub(super) fn parse(
        fields: &Fields<'_>,
        positions_max: usize,
        layer_type: Option<&str>,
    ) -> Result<Self, ConfigError> {
        let outer_theta = fields.number_from("rope_theta", 1.0)?;
        let outer_partial = fields.number_from("partial_rotary_factor", 0.0)?;
        let newer = fields.object("rope_parameters")?;
        let parameters = match (&newer, layer_type) {
            (Some(parameters), Some(kind)) if parameters.has(kind) => parameters.object(kind)?,
            (Some(_), _) => newer,
            (None, _) => fields.object("rope_scaling")?,
        };
        let Some(parameters) = parameters else {
            let theta = outer_theta.unwrap_or(default::THETA);
            return Ok(Self { theta, scaling: RopeScaling::None, partial: outer_partial });
        };
        if let Some(layers) = parameters.object_names().next() {
            return Err(parameters.wrong(layers, "one set of rotary parameters for all layers"));
        }
        let context = Context { outer: fields, parameters: &parameters, positions_max };
        Ok(Self {
            theta: parameters.number_from("rope_theta", 1.0)?.or(outer_theta).unwrap_or(default::THETA),
            scaling: context.scaling()?,
            partial: parameters.number_from("partial_rotary_factor", 0.0)?.or(outer_partial),
        })
    }
}

impl RopeScaling {
    /// Positions that may occur in a model whose file says `stated`: where the base grows with the sequence, that is what the
    /// model was trained on, and it goes on as far as it is stretched.
    pub(super) fn positions_max(&self, stated: usize) -> usize {
        match self {
            Self::Dynamic { factor, positions_original } => {
                stated.max((factor * positions_original) as usize)
            }
            _ => stated,
        }
    }

    /// Errors when a list of factors is not as long as there are pairs.
    pub(super) fn check(&self, fields: &Fields<'_>, pairs: usize) -> Result<(), ConfigError> {
        let Self::Long { short, long, .. } = self else {
            return Ok(());
        };
        for (name, factors) in [("short_factor", short), ("long_factor", long)] {
            if factors.len() != pairs {
                let place = if fields.has("rope_parameters") { "rope_parameters" } else { "rope_scaling" };
                let expected = format!("{pairs} numbers in `{name}`, not {}", factors.len());
                return Err(fields.wrong(place, expected));
            }
        }
        Ok(())
    }
}

/// One set of parameters, and what surrounds it.
struct Context<'a> {
    outer: &'a Fields<'a>,
    parameters: &'a Fields<'a>,
    positions_max: usize,
}

impl Context<'_> {
    fn scaling(&self) -> Result<RopeScaling, ConfigError> {
        let fields = self.parameters;
        let name = if fields.has("rope_type") { "rope_type" } else { "type" };
        match fields.text(name)?.unwrap_or("default") {
            "default" | "mrope" => Ok(RopeScaling::None),
            "linear" => Ok(RopeScaling::Linear { factor: self.number("factor")? }),
            "dynamic" => Ok(RopeScaling::Dynamic {
                factor: self.number("factor")?,
                positions_original: self.positions_original()?,
            }),
            "llama3" => self.llama3(),
            "yarn" => self.yarn(),
            "longrope" | "su" => self.long(),
            other => {
                let served = ["default", "linear", "dynamic", "llama3", "yarn", "longrope", "su"];
                Err(fields.unserved(name, other, &served))
            }
        }
    }

    fn llama3(&self) -> Result<RopeScaling, ConfigError> {
        let fields = self.parameters;
        let low_freq_factor =
            fields.required("low_freq_factor", |fields, name| fields.number_from(name, 0.0))?;
        let high_freq_factor = self.number("high_freq_factor")?;
        if high_freq_factor <= low_freq_factor {
            let expected = format!("more than `low_freq_factor`, which is {low_freq_factor}");
            return Err(fields.wrong("high_freq_factor", expected));
        }
        Ok(RopeScaling::Llama3 {
            factor: self.number("factor")?,
            low_freq_factor,
            high_freq_factor,
            positions_original: self.number("original_max_position_embeddings")?,
        })
    }

    /// Source of the amplitude: Peng et al. 2023, section 3.4, and DeepSeek-V2's two factors.
    fn yarn(&self) -> Result<RopeScaling, ConfigError> {
        let fields = self.parameters;
        let positive = |name| fields.number_from(name, f64::MIN_POSITIVE);
        let factor = self.number("factor")?;
        let stretch = |mscale: f64| if factor > 1.0 { 0.1 * mscale * factor.ln() + 1.0 } else { 1.0 };
        let mscales = (fields.number_from("mscale", 0.0)?, fields.number_from("mscale_all_dim", 0.0)?);
        let amplitude = match (positive("attention_factor")?, mscales) {
            (Some(amplitude), _) => amplitude,
            (None, (Some(mscale), Some(all))) if mscale != 0.0 && all != 0.0 => {
                stretch(mscale) / stretch(all)
            }
            (None, _) => stretch(1.0),
        };
        Ok(RopeScaling::Yarn {
            factor,
            beta_fast: positive("beta_fast")?.unwrap_or(default::BETA_FAST),
            beta_slow: positive("beta_slow")?.unwrap_or(default::BETA_SLOW),
            positions_original: self.positions_original()?,
            truncate: fields.flag("truncate")?.unwrap_or(true),
            amplitude,
        })
    }

    fn long(&self) -> Result<RopeScaling, ConfigError> {
        let fields = self.parameters;
        let factors = |name| fields.required(name, Fields::positive_numbers);
        let positions_original = self.positions_original()?;
        let factor = match fields.number_from("factor", 1.0)? {
            Some(factor) => factor,
            None => self.positions_max as f64 / positions_original,
        };
        let amplitude = match fields.number_from("attention_factor", f64::MIN_POSITIVE)? {
            Some(amplitude) => amplitude,
            None if factor <= 1.0 => 1.0,
            None => (1.0 + factor.ln() / positions_original.ln()).sqrt(),
        };
        let own = |name| Ok(fields.number_from(name, f64::MIN_POSITIVE)?.unwrap_or(amplitude));
        Ok(RopeScaling::Long {
            short: factors("short_factor")?,
            long: factors("long_factor")?,
            positions_original,
            short_amplitude: own("short_mscale")?,
            long_amplitude: own("long_mscale")?,
        })
    }

    fn positions_original(&self) -> Result<f64, ConfigError> {
        const NAME: &str = "original_max_position_embeddings";
        let inner = self.parameters.number_from(NAME, 2.0)?;
        Ok(inner.or(self.outer.number_from(NAME, 2.0)?).unwrap_or(self.positions_max as f64))
    }

    fn number(&self, name: &str) -> Result<f64, ConfigError> {
        self.parameters.required(name, |fields, name| fields.number_from(name, 1.0))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::model::config_file::ConfigFile;

    fn parse(config: Value, layer_type: Option<&str>) -> Result<RopeConfig, ConfigError> {
        RopeConfig::parse(&ConfigFile::from_json(config).fields(), 64, layer_type)
    }

    fn scaling(fields: Value) -> RopeScaling {
        parse(json!({"rope_scaling": fields}), None).unwrap().scaling
    }

    fn check(config: Value, expected: &str) {
        let message = parse(config, None).unwrap_err().to_string();
        assert!(message.contains(expected), "expected `{expected}` in: {message}");
    }

    #[test]
    fn older_and_newer_forms_say_the_same() {
        let llama3 = json!({
            "rope_type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4,
            "original_max_position_embeddings": 8192
        });
        let expected = RopeScaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            positions_original: 8192.0,
        };
        assert_eq!(scaling(llama3.clone()), expected);
        let mut newer = llama3;
        newer["rope_theta"] = json!(5e5);
        newer["partial_rotary_factor"] = json!(0.5);
        let found = parse(json!({"rope_parameters": newer}), None).unwrap();
        assert_eq!(found, RopeConfig { theta: 5e5, scaling: expected, partial: Some(0.5) });
        assert_eq!(scaling(json!({"type": "linear", "factor": 2.0})), RopeScaling::Linear { factor: 2.0 });
        let none = RopeConfig { theta: 1e6, scaling: RopeScaling::None, partial: None };
        assert_eq!(
            parse(json!({"rope_scaling": {"rope_type": "default"}, "rope_theta": 1e6}), None).unwrap(),
            none
        );
        assert_eq!(parse(json!({"rope_scaling": null, "rope_theta": 1e6}), None).unwrap(), none);
    }

    #[test]
    fn layers_of_a_kind_have_their_own_parameters() {
        let config = json!({"rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}
        }});
        let theta = |kind| parse(config.clone(), Some(kind)).unwrap().theta;
        assert_eq!((theta("full_attention"), theta("sliding_attention")), (1e6, 1e4));
        check(config, "`rope_parameters.full_attention` is");
    }

    #[test]
    fn yarn_has_an_amplitude_of_its_own_or_derives_it() {
        let amplitude = |extra: Value| {
            let mut fields = json!({"type": "yarn", "factor": 4});
            fields.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
            match scaling(fields) {
                RopeScaling::Yarn { amplitude, .. } => amplitude,
                other => panic!("{other:?}"),
            }
        };
        let stretch = |mscale: f64| 0.1 * mscale * 4f64.ln() + 1.0;
        assert_eq!(amplitude(json!({})), stretch(1.0));
        assert_eq!(amplitude(json!({"attention_factor": 1.5})), 1.5);
        assert_eq!(amplitude(json!({"mscale": 1, "mscale_all_dim": 0.5})), stretch(1.0) / stretch(0.5));
    }

    #[test]
    fn long_factors_come_with_the_square_root_of_the_stretch() {
        let fields = json!({"type": "su", "short_factor": [1.0], "long_factor": [2.0]});
        let config = json!({"rope_scaling": fields, "original_max_position_embeddings": 16});
        let expected = (1.0 + 4f64.ln() / 16f64.ln()).sqrt();
        match parse(config, None).unwrap().scaling {
            RopeScaling::Long { short_amplitude, long_amplitude, positions_original, .. } => {
                assert_eq!((short_amplitude, long_amplitude, positions_original), (expected, expected, 16.0));
            }
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn wrong_parameters_are_named_with_their_place() {
        let scaling = |fields: Value| json!({"rope_scaling": fields});
        check(
            scaling(json!({"rope_type": "cubic", "factor": 4})),
            "rope_scaling.rope_type `cubic` is not served; served: default, linear, dynamic, llama3, yarn",
        );
        check(scaling(json!({"type": "linear"})), "`rope_scaling.factor` is missing");
        check(scaling(json!({"type": "linear", "factor": 0})), "`rope_scaling.factor` is 0, expected");
        check(scaling(json!("linear")), "`rope_scaling` is \"linear\", expected an object");
        check(
            scaling(json!({"rope_type": "llama3", "low_freq_factor": 4, "high_freq_factor": 4})),
            "`rope_scaling.high_freq_factor` is 4, expected more than",
        );
        check(
            scaling(json!({"type": "su", "short_factor": [1, 0], "long_factor": []})),
            "`rope_scaling.short_factor` is [1,0], expected a list of numbers above 0",
        );
        check(json!({"rope_theta": "big"}), "`rope_theta` is \"big\"");
    }
}
