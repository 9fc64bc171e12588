//! What layers ask of a checkpoint: the part of the tensor at this path that belongs to this rank.

use std::cell::RefCell;
use std::path::PathBuf;

use kernels::DType;
use safetensors::tensor::Dtype;

use super::region::{Region, Rows};
use super::weight::{FileRange, read};
use super::{Checkpoint, Partition, RandomWeights, Weight, WeightError};

/// Where weights come from.
#[derive(Debug)]
pub enum WeightSource {
    /// The files of a checkpoint.
    Files(Checkpoint),
    /// None: they are made up.
    Random(RandomWeights),
}

/// What loads a model on one rank.
#[derive(Debug)]
pub struct Loader {
    source: WeightSource,
    partition: Partition,
    dtype: Option<DType>,
    elements: Elements,
    /// What was left in the files so far.
    mapped: RefCell<Vec<FileRange>>,
    /// Linear layers so far.
    linears: RefCell<Vec<LinearOrigin>>,
}

/// Whether matrices have their elements.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Elements {
    /// They do.
    #[default]
    Loaded,
    /// They have their sizes alone, for plans; whether the files have them is checked all the same.
    Absent,
}

/// Where a linear layer comes from, so that an adapter's weights for it can be found and cut alike.
#[derive(Clone, Debug, PartialEq)]
pub struct LinearOrigin {
    /// Path in the checkpoint, without `.weight`.
    pub name: String,
    /// The part of the stored matrix that this rank has.
    pub region: Region,
    /// This rank's part of the bias, if it has one.
    pub bias: Option<Vec<f32>>,
}

/// A place in the tree of a checkpoint's names, such as `model.layers.3.mlp`.
#[derive(Clone, Debug)]
pub struct WeightPath<'a> {
    loader: &'a Loader,
    prefix: String,
}

impl Loader {
    /// Matrices keep the type they are stored in, unless `dtype` names another.
    pub fn new(source: WeightSource, partition: Partition, dtype: Option<DType>) -> Self {
        let (mapped, linears) = (RefCell::default(), RefCell::default());
        Self { source, partition, dtype, elements: Elements::Loaded, mapped, linears }
    }

    /// The same, with or without elements.
    pub fn with_elements(self, elements: Elements) -> Self {
        Self { elements, ..self }
    }

    /// The root of all names.
    pub fn root(&self) -> WeightPath<'_> {
        WeightPath { loader: self, prefix: String::new() }
    }

    /// The rank that is loaded.
    pub fn partition(&self) -> Partition {
        self.partition
    }

    /// The bytes that stayed in their files so far.
    pub fn mapped(&self) -> Vec<FileRange> {
        self.mapped.borrow().clone()
    }

    /// The linear layers so far, in the order of their numbers.
    pub fn linears(&self) -> Vec<LinearOrigin> {
        self.linears.borrow().clone()
    }
}

impl<'a> WeightPath<'a> {
    /// One step down: `model` becomes `model.norm`. An empty name stays here.
    pub fn at(&self, name: impl std::fmt::Display) -> Self {
        let name = name.to_string();
        let prefix = match (self.prefix.as_str(), name.as_str()) {
            ("", _) => name,
            (_, "") => self.prefix.clone(),
            (prefix, name) => format!("{prefix}.{name}"),
        };
        Self { loader: self.loader, prefix }
    }

    /// The rank that is loaded.
    pub fn partition(&self) -> Partition {
        self.loader.partition
    }

    /// Whether there is a tensor of this name. Made-up checkpoints have every tensor.
    pub fn exists(&self) -> bool {
        match &self.loader.source {
            WeightSource::Files(checkpoint) => checkpoint.contains(&self.prefix),
            WeightSource::Random(_) => true,
        }
    }

    /// Gives the linear layer here its number.
    pub fn register(&self, region: &Region, bias: Option<Vec<f32>>) -> usize {
        let mut linears = self.loader.linears.borrow_mut();
        linears.push(LinearOrigin { name: self.prefix.clone(), region: region.clone(), bias });
        linears.len() - 1
    }

    /// The name of this place.
    pub fn name(&self) -> &str {
        &self.prefix
    }

    /// The shape of the tensor here.
    ///
    /// Errors when it is missing.
    pub fn shape(&self) -> Result<Vec<usize>, WeightError> {
        match &self.loader.source {
            WeightSource::Files(checkpoint) => Ok(checkpoint.tensor(&self.prefix)?.shape.to_vec()),
            WeightSource::Random(_) => Ok(Vec::new()),
        }
    }

    /// A part of the matrix here. It is left in its file where it lies row by row in a type that is served.
    ///
    /// Errors when it is missing, has another shape, or is not of floats.
    pub fn matrix(&self, region: &Region) -> Result<Weight, WeightError> {
        let checkpoint = match &self.loader.source {
            WeightSource::Files(checkpoint) => checkpoint,
            WeightSource::Random(random) if self.loader.elements == Elements::Absent => {
                return Ok(Weight::absent(random.dtype, region.shape()));
            }
            WeightSource::Random(random) => return Ok(random.matrix(&self.prefix, region)),
        };
        let (tensor, stored) = self.tensor(checkpoint, &region.stored_shapes())?;
        let dtype = self.loader.dtype.unwrap_or(stored);
        if self.loader.elements == Elements::Absent {
            return Ok(Weight::absent(dtype, region.shape()));
        }
        if dtype == stored
            && let Some(weight) = Weight::mapped(&tensor, dtype, region)
        {
            self.loader.mapped.borrow_mut().extend(weight.file_range());
            return Ok(weight);
        }
        Ok(copy(tensor.bytes(), stored, dtype, region))
    }

    /// The whole vector here, of `length` elements, as f32. Norms and biases are small: they are copied.
    ///
    /// Errors when it is missing, has another shape, or is not of floats.
    pub fn vector(&self, length: usize) -> Result<Vec<f32>, WeightError> {
        self.floats(vec![vec![length]], &Rows::range(0..length), 0)
    }

    /// Some elements of the tensor here, as f32; it has `shape` in all.
    ///
    /// Errors when it is missing, has another shape, or is not of floats.
    pub fn vector_part(&self, shape: &[usize], rows: &Rows) -> Result<Vec<f32>, WeightError> {
        self.floats(vec![shape.to_vec()], rows, 0)
    }

    /// The bias of a matrix of which `region` is taken.
    ///
    /// Errors when it is missing, has another shape, or is not of floats.
    pub fn bias(&self, region: &Region) -> Result<Vec<f32>, WeightError> {
        let first = region.stack.map_or(0, |stack| stack.index * region.whole[0]);
        self.floats(region.stored_bias_shapes(), &region.rows, first)
    }

    fn floats(&self, shapes: Vec<Vec<usize>>, rows: &Rows, first: usize) -> Result<Vec<f32>, WeightError> {
        let places = (0..rows.len()).map(|row| first + rows.stored(row));
        match &self.loader.source {
            WeightSource::Random(random) => {
                let all = random.vector(&self.prefix, shapes[0].iter().product());
                Ok(places.map(|place| all[place]).collect())
            }
            WeightSource::Files(checkpoint) => {
                let (tensor, dtype) = self.tensor(checkpoint, &shapes)?;
                Ok(places.map(|place| read(tensor.bytes(), dtype, place)).collect())
            }
        }
    }

    /// The tensor here, which must have one of `shapes`.
    fn tensor(
        &self,
        checkpoint: &Checkpoint,
        shapes: &[Vec<usize>],
    ) -> Result<(FileRange, DType), WeightError> {
        let tensor = checkpoint.tensor(&self.prefix)?;
        let file = || -> PathBuf { tensor.file.path().to_owned() };
        if !shapes.iter().any(|shape| shape == tensor.shape) {
            return Err(WeightError::Shape {
                file: file(),
                tensor: self.prefix.clone(),
                expected: shapes[0].clone(),
                found: tensor.shape.to_vec(),
            });
        }
        let dtype = match tensor.dtype {
            Dtype::F32 => DType::F32,
            Dtype::F16 => DType::F16,
            Dtype::BF16 => DType::BF16,
            other => {
                let (tensor, found) = (self.prefix.clone(), other.to_string());
                return Err(WeightError::DType { file: file(), tensor, found });
            }
        };
        Ok((FileRange { file: tensor.file.clone(), range: tensor.start..tensor.end }, dtype))
    }
}

/// The elements of a region, row by row, in another type.
fn copy(bytes: &[u8], stored: DType, wanted: DType, region: &Region) -> Weight {
    let [rows, cols] = region.whole;
    let (offset, start) = (region.offset(), region.cols.start);
    Weight::from_rows(wanted, region.shape(), |row| {
        let row = region.rows.stored(row);
        move |col| {
            let col = start + col;
            let place = if region.transposed { col * rows + row } else { row * cols + col };
            read(bytes, stored, offset + place)
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `layer.weight` F32 [3, 2] = 1 to 6; `layer.bias` F16 [2] = 0, 0; `layer.index` I32 [2].
    fn loader(dtype: Option<DType>) -> (tempfile::TempDir, Loader) {
        let header = serde_json::json!({
            "layer.weight": {"dtype": "F32", "shape": [3, 2], "data_offsets": [0, 24]},
            "layer.bias": {"dtype": "F16", "shape": [2], "data_offsets": [24, 28]},
            "layer.index": {"dtype": "I32", "shape": [2], "data_offsets": [28, 36]}
        })
        .to_string();
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend_from_slice(header.as_bytes());
        bytes.extend([1f32, 2., 3., 4., 5., 6.].iter().flat_map(|value| value.to_le_bytes()));
        bytes.extend([0; 12]);
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("model.safetensors"), bytes).unwrap();
        let source = WeightSource::Files(Checkpoint::open(directory.path()).unwrap());
        (directory, Loader::new(source, Partition::WHOLE, dtype))
    }

    fn elements(weight: &Weight) -> Vec<f32> {
        let [rows, cols] = weight.shape();
        (0..rows * cols).map(|at| weight.matrix().element(at / cols, at % cols)).collect()
    }

    #[test]
    fn a_region_is_found_where_it_is_stored() {
        let (_directory, loader) = loader(None);
        let weight = |region: Region| loader.root().at("layer").at("weight").matrix(&region).unwrap();
        assert_eq!(elements(&weight(Region::all(3, 2))), [1., 2., 3., 4., 5., 6.]);
        assert_eq!(elements(&weight(Region::all(3, 2).with_cols(1..2))), [2., 4., 6.]);
        let outer = Rows::strided(0, 1, 2, 2);
        assert_eq!(elements(&weight(Region::all(3, 2).with_rows(outer))), [1., 2., 5., 6.]);
        assert_eq!(loader.mapped().len(), 3);
    }

    #[test]
    fn a_transposed_matrix_is_turned() {
        let (_directory, loader) = loader(None);
        let region = Region::all(2, 3).transposed(true).with_rows(Rows::range(1..2));
        let weight = loader.root().at("layer.weight").matrix(&region).unwrap();
        assert_eq!(elements(&weight), [2., 4., 6.]);
        assert_eq!(weight.private_bytes(), 12);
    }

    #[test]
    fn stacked_matrices_are_told_apart() {
        let (_directory, loader) = loader(None);
        let region = |index| Region {
            stack: Some(super::super::region::Stack { index, count: 3 }),
            ..Region::all(1, 2)
        };
        let weight = loader.root().at("layer.weight").matrix(&region(2)).unwrap();
        assert_eq!(elements(&weight), [5., 6.]);
    }

    #[test]
    fn another_type_is_converted_to() {
        let (_directory, loader) = loader(Some(DType::BF16));
        let weight = loader.root().at("layer.weight").matrix(&Region::all(3, 2)).unwrap();
        assert_eq!((weight.dtype(), weight.private_bytes()), (DType::BF16, 12));
        assert_eq!(elements(&weight), [1., 2., 3., 4., 5., 6.]);
    }

    #[test]
    fn a_weight_outlives_the_checkpoint_it_came_from() {
        let (_directory, loader) = loader(None);
        let weight = loader.root().at("layer.weight").matrix(&Region::all(3, 2)).unwrap();
        drop(loader);
        assert_eq!(weight.matrix().row(0), [1f32.to_le_bytes(), 2f32.to_le_bytes()].concat());
    }

    #[test]
    fn a_weight_that_does_not_fit_is_an_error_that_names_file_and_tensor() {
        let (_directory, loader) = loader(None);
        let layer = loader.root().at("layer");
        let check = |error: WeightError, expected: &str| {
            let message = error.to_string();
            assert!(message.contains(expected), "expected `{expected}` in: {message}");
        };
        check(
            layer.at("weight").matrix(&Region::all(1, 2)).unwrap_err(),
            "model.safetensors: tensor `layer.weight` has shape [3, 2], [1, 2] expected",
        );
        check(layer.at("bias").vector(3).unwrap_err(), "`layer.bias` has shape [2], [3] expected");
        check(layer.at("index").vector(2).unwrap_err(), "`layer.index` is stored as I32");
        check(layer.at("none").vector(2).unwrap_err(), "tensor `layer.none` is missing");
    }
}
