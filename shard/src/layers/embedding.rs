use kernels::{DType, OpError};

use super::{LayerError, Linear, Norm, NormSpec, Pass};
use crate::backend::{Device, Indices, Matrix, Tensor};
use crate::weights::{Region, Rows, WeightPath};

/// From token ids to the first hidden states.
#[derive(Clone, Debug)]
pub struct EmbeddingSpec {
    /// Name of the table.
    pub name: &'static str,
    /// Elements of its rows.
    pub width: usize,
    /// Multiplies them.
    pub scale: Option<f32>,
    /// A table of positions whose rows are added.
    pub positions: Option<LearnedPositions>,
    /// A projection to the width of the hidden states, if that is another.
    pub project: Option<&'static str>,
    /// A norm of the sum.
    pub norm: Option<(&'static str, NormSpec)>,
}

/// A vector per position.
#[derive(Clone, Copy, Debug)]
pub struct LearnedPositions {
    /// Name of the table.
    pub name: &'static str,
    /// Rows before that of position 0.
    pub offset: usize,
    /// Positions there are.
    pub count: usize,
}

/// A vector per token id, and what is done to it before the first layer. Each rank has a block of the vocabulary.
#[derive(Debug)]
pub struct Embedding {
    dtype: DType,
    table: Matrix,
    /// The id of the table's first row.
    first: u32,
    split: bool,
    scale: Option<f32>,
    positions: Option<Matrix>,
    project: Option<Linear>,
    norm: Option<Norm>,
}

impl Embedding {
    /// Takes `weight`, `[vocabulary, width]`, from the table's path, and what else the spec names beside it.
    pub fn load(
        path: &WeightPath<'_>,
        device: &Device,
        vocabulary: usize,
        hidden: usize,
        spec: &EmbeddingSpec,
    ) -> Result<Self, LayerError> {
        let width = spec.width;
        let rows = path.partition().vocabulary(vocabulary);
        let table = Region::all(vocabulary, width).with_rows(Rows::range(rows.clone()));
        let positions = spec.positions.map(|LearnedPositions { name, offset, count }| {
            let rows = Rows::range(offset..offset + count);
            let region = Region::all(offset + count, hidden).with_rows(rows);
            Ok::<_, LayerError>(device.place(path.at(name).at("weight").matrix(&region)?)?)
        });
        let project =
            spec.project.map(|name| Linear::load(&path.at(name), device, &Region::all(hidden, width), false));
        let norm = spec.norm.map(|(name, spec)| Norm::load(&path.at(name), device, hidden, spec));
        let table = path.at(spec.name).at("weight").matrix(&table)?;
        Ok(Self {
            dtype: device.weight_dtype(table.dtype()),
            table: device.place(table)?,
            first: rows.start as u32,
            split: path.partition().is_split(),
            scale: spec.scale,
            positions: positions.transpose()?,
            project: project.transpose()?,
            norm: norm.transpose()?,
        })
    }

    /// `out[t]` is the hidden state of `ids[t]` at `positions[t]`; `rows` has as many rows, of the table's width.
    pub fn forward(
        &self,
        pass: &Pass<'_>,
        ids: &Indices,
        positions: &Indices,
        rows: &mut Tensor,
        out: &mut Tensor,
    ) -> Result<(), OpError> {
        let found = if self.project.is_some() { &mut *rows } else { &mut *out };
        pass.device.embedding(&self.table, self.first, ids, found)?;
        if self.split {
            pass.ranks.all_reduce(found)?;
        }
        if let Some(scale) = self.scale {
            pass.device.scale(found, scale)?;
        }
        if let Some(project) = &self.project {
            project.forward(pass, rows, out)?;
        }
        if let Some(table) = &self.positions {
            pass.device.add_embedding(table, positions, out)?;
        }
        if let Some(norm) = &self.norm {
            norm.forward_in_place(pass, out)?;
        }
        Ok(())
    }

    /// The output head of a model that ties it to the embedding: the same weight, shared.
    pub fn tied_head(&self) -> Linear {
        Linear::from_parts(self.table.clone(), None)
    }

    /// Element type of the table.
    pub fn dtype(&self) -> DType {
        self.dtype
    }
}
