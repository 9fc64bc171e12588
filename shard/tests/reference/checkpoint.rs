use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use half::{bf16, f16};
use kernels::DType;
use serde_json::{Value, json};

/// What a random Llama checkpoint looks like.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    pub(crate) heads: usize,
    pub(crate) kv_heads: usize,
    pub(crate) head_dim: usize,
    pub(crate) hidden: usize,
    pub(crate) biases: bool,
    pub(crate) tied: bool,
    pub(crate) dtype: DType,
    /// Safetensors files; an index comes with more than one.
    pub(crate) files: usize,
    /// `rope_scaling` of type `linear`, if any.
    pub(crate) rope_factor: Option<f64>,
}

pub(crate) const LAYERS: usize = 2;
pub(crate) const INTERMEDIATE: usize = 37;
pub(crate) const VOCABULARY: usize = 101;
pub(crate) const NORM_EPS: f64 = 1e-5;
pub(crate) const ROPE_THETA: f64 = 500.0;

/// What the stored weights are, by name, as f64.
pub(crate) type Weights = BTreeMap<String, Vec<f64>>;

/// Writes the checkpoint into `directory` and returns its weights, rounded as they are stored.
pub(crate) fn write(directory: &Path, shape: &Shape) -> Weights {
    fs::write(directory.join("config.json"), config(shape).to_string()).expect("the directory is writable");
    let tensors = tensors(shape);
    let mut random = Random(41);
    let mut weights = Weights::new();
    let mut files: Vec<File> = (0..shape.files).map(|_| File::default()).collect();
    let mut index = serde_json::Map::new();
    for (at, (name, sizes)) in tensors.into_iter().enumerate() {
        let number = at % shape.files;
        let values: Vec<f64> = (0..sizes.iter().product()).map(|_| random.weight(&name)).collect();
        let stored = files[number].add(&name, &sizes, shape.dtype, &values);
        index.insert(name.clone(), file_name(number, shape.files).into());
        weights.insert(name, stored);
    }
    for (number, file) in files.into_iter().enumerate() {
        file.write(&directory.join(file_name(number, shape.files)));
    }
    if shape.files > 1 {
        let index = json!({"metadata": {}, "weight_map": index}).to_string();
        fs::write(directory.join("model.safetensors.index.json"), index).expect("the directory is writable");
    }
    weights
}

fn file_name(number: usize, files: usize) -> String {
    match files {
        1 => "model.safetensors".to_owned(),
        _ => format!("model-{:05}-of-{files:05}.safetensors", number + 1),
    }
}

fn config(shape: &Shape) -> Value {
    json!({
        "model_type": "llama", "vocab_size": VOCABULARY, "hidden_size": shape.hidden,
        "intermediate_size": INTERMEDIATE, "num_hidden_layers": LAYERS, "hidden_act": "silu",
        "num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads, "head_dim": shape.head_dim,
        "max_position_embeddings": 256, "rms_norm_eps": NORM_EPS, "rope_theta": ROPE_THETA,
        "attention_bias": shape.biases, "mlp_bias": shape.biases, "tie_word_embeddings": shape.tied,
        "rope_scaling": shape.rope_factor.map(|factor| json!({"type": "linear", "factor": factor}))
    })
}

/// Names and sizes.
fn tensors(shape: &Shape) -> Vec<(String, Vec<usize>)> {
    let Shape { heads, kv_heads, head_dim, hidden, .. } = *shape;
    let mut tensors = vec![
        ("model.embed_tokens.weight".to_owned(), vec![VOCABULARY, hidden]),
        ("model.norm.weight".to_owned(), vec![hidden]),
    ];
    if !shape.tied {
        tensors.push(("lm_head.weight".to_owned(), vec![VOCABULARY, hidden]));
    }
    for layer in 0..LAYERS {
        let name = |part: &str| format!("model.layers.{layer}.{part}");
        for norm in ["input_layernorm", "post_attention_layernorm"] {
            tensors.push((name(&format!("{norm}.weight")), vec![hidden]));
        }
        let linears = [
            ("self_attn.q_proj", heads * head_dim, hidden),
            ("self_attn.k_proj", kv_heads * head_dim, hidden),
            ("self_attn.v_proj", kv_heads * head_dim, hidden),
            ("self_attn.o_proj", hidden, heads * head_dim),
            ("mlp.gate_proj", INTERMEDIATE, hidden),
            ("mlp.up_proj", INTERMEDIATE, hidden),
            ("mlp.down_proj", hidden, INTERMEDIATE),
        ];
        for (linear, outputs, inputs) in linears {
            tensors.push((name(&format!("{linear}.weight")), vec![outputs, inputs]));
            if shape.biases {
                tensors.push((name(&format!("{linear}.bias")), vec![outputs]));
            }
        }
    }
    tensors
}

/// A safetensors file in the making.
#[derive(Default)]
struct File {
    header: serde_json::Map<String, Value>,
    data: Vec<u8>,
}

impl File {
    /// Appends a tensor and returns its values as stored.
    fn add(&mut self, name: &str, sizes: &[usize], dtype: DType, values: &[f64]) -> Vec<f64> {
        let start = self.data.len();
        let stored = values.iter().map(|&value| self.push(dtype, value)).collect();
        let entry = json!({
            "dtype": format!("{dtype:?}"), "shape": sizes, "data_offsets": [start, self.data.len()]
        });
        self.header.insert(name.to_owned(), entry);
        stored
    }

    fn push(&mut self, dtype: DType, value: f64) -> f64 {
        match dtype {
            DType::F32 => {
                self.data.extend((value as f32).to_le_bytes());
                f64::from(value as f32)
            }
            DType::F16 => {
                self.data.extend(f16::from_f64(value).to_le_bytes());
                f16::from_f64(value).to_f64()
            }
            DType::BF16 => {
                self.data.extend(bf16::from_f64(value).to_le_bytes());
                bf16::from_f64(value).to_f64()
            }
        }
    }

    fn write(self, path: &Path) {
        let header = Value::Object(self.header).to_string();
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header.as_bytes());
        bytes.extend(self.data);
        fs::write(path, bytes).expect("the directory is writable");
    }
}

/// SplitMix64 (Steele, Lea, Flood 2014).
struct Random(u64);

impl Random {
    /// Norms around one, all else around zero.
    fn weight(&mut self, name: &str) -> f64 {
        let centred = self.unit() * 2.0 - 1.0;
        if name.contains("norm") { 1.0 + 0.3 * centred } else { 0.4 * centred }
    }

    /// From 0 to 1.
    fn unit(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((mixed ^ (mixed >> 31)) >> 11) as f64 / (1u64 << 53) as f64
    }
}
