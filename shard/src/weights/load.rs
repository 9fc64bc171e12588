//! What layers ask of a checkpoint: the weight at this path, of this shape.

use kernels::DType;
use safetensors::tensor::Dtype;

use super::checkpoint::StoredTensor;
use super::weight::widen;
use super::{Checkpoint, Weight, WeightError};

/// A place in the tree of a checkpoint's names, such as `model.layers.3.mlp`.
#[derive(Clone, Debug)]
pub struct WeightPath<'a> {
    checkpoint: &'a Checkpoint,
    prefix: String,
}

impl<'a> WeightPath<'a> {
    /// The root of all names.
    pub fn root(checkpoint: &'a Checkpoint) -> Self {
        Self { checkpoint, prefix: String::new() }
    }

    /// One step down: `model` becomes `model.norm`.
    pub fn at(&self, name: impl std::fmt::Display) -> Self {
        let prefix =
            if self.prefix.is_empty() { name.to_string() } else { format!("{}.{name}", self.prefix) };
        Self { checkpoint: self.checkpoint, prefix }
    }

    /// The matrix here, `[rows, cols]`, left in its file.
    ///
    /// Errors when it is missing, has another shape, or is not of floats.
    pub fn matrix(&self, rows: usize, cols: usize) -> Result<Weight, WeightError> {
        let (tensor, dtype) = self.tensor(&[rows, cols])?;
        Ok(Weight::new(tensor.file.clone(), tensor.start..tensor.end, dtype, [rows, cols]))
    }

    /// The vector here, of `length` elements, as f32. Norms and biases are small: they are copied.
    ///
    /// Errors when it is missing, has another shape, or is not of floats.
    pub fn vector(&self, length: usize) -> Result<Vec<f32>, WeightError> {
        let (tensor, dtype) = self.tensor(&[length])?;
        Ok(widen(&tensor.file.bytes()[tensor.start..tensor.end], dtype))
    }

    fn tensor(&self, shape: &[usize]) -> Result<(StoredTensor<'a>, DType), WeightError> {
        let tensor = self.checkpoint.tensor(&self.prefix)?;
        if tensor.shape != shape {
            return Err(WeightError::Shape {
                file: tensor.file.path().to_owned(),
                tensor: self.prefix.clone(),
                expected: shape.to_vec(),
                found: tensor.shape.to_vec(),
            });
        }
        match tensor.dtype {
            Dtype::F32 => Ok((tensor, DType::F32)),
            Dtype::F16 => Ok((tensor, DType::F16)),
            Dtype::BF16 => Ok((tensor, DType::BF16)),
            other => Err(WeightError::DType {
                file: tensor.file.path().to_owned(),
                tensor: self.prefix.clone(),
                found: other.to_string(),
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `layer.weight` F32 [2, 1] = 1, 2; `layer.bias` F16 [2] = 0, 0; `layer.index` I32 [2].
    fn checkpoint() -> (tempfile::TempDir, Checkpoint) {
        let header = serde_json::json!({
            "layer.weight": {"dtype": "F32", "shape": [2, 1], "data_offsets": [0, 8]},
            "layer.bias": {"dtype": "F16", "shape": [2], "data_offsets": [8, 12]},
            "layer.index": {"dtype": "I32", "shape": [2], "data_offsets": [12, 20]}
        })
        .to_string();
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend_from_slice(header.as_bytes());
        bytes.extend([1f32, 2.].iter().flat_map(|value| value.to_le_bytes()));
        bytes.extend([0; 12]);
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("model.safetensors"), bytes).unwrap();
        let checkpoint = Checkpoint::open(directory.path()).unwrap();
        (directory, checkpoint)
    }

    #[test]
    fn a_path_leads_to_its_weights() {
        let (_directory, checkpoint) = checkpoint();
        let layer = WeightPath::root(&checkpoint).at("layer");
        let weight = layer.at("weight").matrix(2, 1).unwrap();
        assert_eq!(weight.matrix().row(1), 2f32.to_le_bytes());
        assert_eq!(layer.at("bias").vector(2).unwrap(), [0.0, 0.0]);
    }

    #[test]
    fn a_weight_outlives_the_checkpoint_it_came_from() {
        let (_directory, checkpoint) = checkpoint();
        let weight = WeightPath::root(&checkpoint).at("layer").at("weight").matrix(2, 1).unwrap();
        drop(checkpoint);
        assert_eq!(weight.matrix().row(0), 1f32.to_le_bytes());
    }

    #[test]
    fn a_weight_that_does_not_fit_is_an_error_that_names_file_and_tensor() {
        let (_directory, checkpoint) = checkpoint();
        let layer = WeightPath::root(&checkpoint).at("layer");
        let check = |error: WeightError, expected: &str| {
            let message = error.to_string();
            assert!(message.contains(expected), "expected `{expected}` in: {message}");
        };
        check(
            layer.at("weight").matrix(1, 2).unwrap_err(),
            "model.safetensors: tensor `layer.weight` has shape [2, 1], [1, 2] expected",
        );
        check(layer.at("bias").vector(3).unwrap_err(), "`layer.bias` has shape [2], [3] expected");
        check(layer.at("index").vector(2).unwrap_err(), "`layer.index` is stored as I32");
        check(layer.at("none").vector(2).unwrap_err(), "tensor `layer.none` is missing");
    }
}
