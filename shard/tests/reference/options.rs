use kernels::DType;
use shard::backend::Device;
use shard::collective::Ranks;
use shard::doctor::runner::Runner;
use shard::model::{self, LoadOptions};

use crate::checkpoint::{self, Shape};
use crate::fixture::{cpu, step};
use crate::plain;

const PLAIN: Shape = Shape {
    heads: 4,
    kv_heads: 2,
    head_dim: 8,
    hidden: 24,
    biases: false,
    tied: false,
    dtype: DType::F32,
    files: 1,
    rope_factor: None,
};

/// The model and the plain loops agree about a sequence of which the second half comes token by token.
fn check(shape: Shape) {
    let directory = tempfile::tempdir().expect("a temporary directory can be made");
    let weights = checkpoint::write(directory.path(), &shape);
    let ids: Vec<u32> = (0..40).map(|at| at * 31 % 101).collect();
    let expected = plain::logits(&weights, &shape, &ids);

    let runner = Runner::open(directory.path(), &cpu(2), Ranks::alone());
    let mut runner = runner.expect("the checkpoint is good");
    let mut request = runner.request(&ids[..20], 20).expect("there is room");
    let mut found = step(&mut runner, &mut [&mut request], usize::MAX).remove(0);
    for &id in &ids[20..] {
        request.ids.push(id);
        found.append(&mut step(&mut runner, &mut [&mut request], usize::MAX)[0]);
    }

    assert_eq!(found.len(), expected.len());
    for (token, (found, expected)) in found.iter().zip(&expected).enumerate() {
        for (id, (&found, expected)) in found.iter().zip(expected).enumerate() {
            let difference = (f64::from(found) - expected).abs();
            assert!(difference < 1e-4, "{shape:?}, token {token}, logit {id}: {found}, expected {expected}");
        }
    }
}

#[test]
fn grouped_heads_with_an_own_output_head() {
    check(PLAIN);
}

#[test]
fn biases_on_every_projection() {
    check(Shape { biases: true, ..PLAIN });
}

#[test]
fn an_output_head_tied_to_the_embedding() {
    check(Shape { tied: true, ..PLAIN });
}

#[test]
fn heads_of_an_unusual_size_that_do_not_fill_the_hidden_state() {
    check(Shape { heads: 3, kv_heads: 3, head_dim: 20, hidden: 26, ..PLAIN });
    check(Shape { heads: 5, kv_heads: 1, head_dim: 2, hidden: 33, ..PLAIN });
}

#[test]
fn half_precision_weights() {
    check(Shape { dtype: DType::F16, biases: true, ..PLAIN });
    check(Shape { dtype: DType::BF16, biases: true, ..PLAIN });
}

#[test]
fn weights_in_several_files_with_an_index() {
    check(Shape { files: 2, ..PLAIN });
    check(Shape { files: 5, biases: true, tied: true, dtype: DType::BF16, ..PLAIN });
}

#[test]
fn positions_stretched_linearly() {
    check(Shape { rope_factor: Some(3.0), ..PLAIN });
}

#[test]
fn a_checkpoint_that_contradicts_its_configuration_names_the_tensor() {
    let directory = tempfile::tempdir().expect("a temporary directory can be made");
    checkpoint::write(directory.path(), &PLAIN);
    let config = directory.path().join("config.json");
    let original = std::fs::read_to_string(&config).unwrap();
    let check = |from: &str, to: &str, expected: &str| {
        assert!(original.contains(from), "{original}");
        std::fs::write(&config, original.replace(from, to)).unwrap();
        let device = Device::cpu(std::num::NonZeroUsize::MIN).unwrap();
        let message = match model::load(directory.path(), &LoadOptions::default(), device, Ranks::alone()) {
            Ok(_) => panic!("{to} was loaded"),
            Err(error) => error.to_string(),
        };
        assert!(message.contains(expected), "expected `{expected}` in: {message}");
    };
    check(
        r#""vocab_size":101"#,
        r#""vocab_size":102"#,
        "model.safetensors: tensor `model.embed_tokens.weight` has shape [101, 24], [102, 24] expected",
    );
    check(
        r#""num_hidden_layers":2"#,
        r#""num_hidden_layers":3"#,
        "tensor `model.layers.2.input_layernorm.weight` is missing",
    );
    check(
        r#""attention_bias":false"#,
        r#""attention_bias":true"#,
        "tensor `model.layers.0.self_attn.q_proj.bias` is missing",
    );
    check(
        r#""head_dim":8"#,
        r#""head_dim":16"#,
        "`model.layers.0.self_attn.q_proj.weight` has shape [32, 24]",
    );
}
