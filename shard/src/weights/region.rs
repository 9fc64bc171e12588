//! Which part of a stored tensor a layer takes. Checkpoints fuse, interleave, stack and transpose matrices, and ranks take
//! slices of them; a [`Region`] says it all in one form.

use std::ops::Range;

/// Rows of a stored matrix, in order: groups of neighbouring rows.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rows {
    /// Rows of a group.
    group: usize,
    /// The first row of each group.
    starts: Vec<usize>,
}

impl Rows {
    /// Neighbouring rows.
    pub fn range(range: Range<usize>) -> Self {
        Self { group: range.len(), starts: vec![range.start] }
    }

    /// Groups of `group` neighbouring rows, which begin `stride` rows apart.
    pub fn strided(first: usize, group: usize, groups: usize, stride: usize) -> Self {
        Self { group, starts: (0..groups).map(|index| first + index * stride).collect() }
    }

    /// Number of rows.
    pub fn len(&self) -> usize {
        self.group * self.starts.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The stored row of row `index`.
    pub fn stored(&self, index: usize) -> usize {
        self.starts[index / self.group] + index % self.group
    }

    /// Some of these rows, counted among themselves: whole groups, or a part of one.
    pub fn slice(&self, range: Range<usize>) -> Self {
        debug_assert!(range.end <= self.len(), "rows {range:?} of {}", self.len());
        if range.is_empty() || range.start / self.group == (range.end - 1) / self.group {
            let start = if range.is_empty() { 0 } else { self.stored(range.start) };
            return Self::range(start..start + range.len());
        }
        debug_assert!(range.start.is_multiple_of(self.group) && range.end.is_multiple_of(self.group));
        let groups = range.start / self.group..range.end / self.group;
        Self { group: self.group, starts: self.starts[groups].to_vec() }
    }

    /// Parts of `part` rows each, by their index, in any order and as often as asked for.
    pub fn pick(&self, part: usize, indices: &[usize]) -> Self {
        let starts = indices.iter().map(|index| self.stored(index * part)).collect();
        let picked = Self { group: part, starts };
        // Neighbours are one group.
        match picked.stride() {
            Some(stride) if stride == part && !indices.is_empty() => {
                Self::range(picked.starts[0]..picked.starts[0] + picked.len())
            }
            _ => picked,
        }
    }

    /// Rows of a group, and from each group's beginning to that of the next; `None` where that differs from group to group.
    pub(super) fn layout(&self) -> Option<(usize, usize)> {
        Some((self.group, self.stride()?))
    }

    fn stride(&self) -> Option<usize> {
        let Some([first, second]) = self.starts.first_chunk() else {
            return Some(self.group);
        };
        let stride = second.checked_sub(*first)?;
        let even = self.starts.windows(2).all(|pair| pair[0] + stride == pair[1]);
        (even && stride >= self.group).then_some(stride)
    }
}

/// A part of a tensor that holds one matrix, or several.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Region {
    /// `[rows, cols]` of the whole matrix as a layer sees it: outputs and inputs.
    pub whole: [usize; 2],
    /// Whether it is stored the other way around, `[cols, rows]`.
    pub transposed: bool,
    /// Which one of the matrices that the tensor holds, and how many it holds.
    pub stack: Option<Stack>,
    /// The rows that are taken.
    pub rows: Rows,
    /// The columns that are taken.
    pub cols: Range<usize>,
}

/// One of several equal matrices in one tensor, such as the experts' of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stack {
    /// This one, from 0.
    pub index: usize,
    /// How many there are.
    pub count: usize,
}

impl Region {
    /// The whole of a matrix that has a tensor of its own.
    pub fn all(rows: usize, cols: usize) -> Self {
        Self {
            whole: [rows, cols],
            transposed: false,
            stack: None,
            rows: Rows::range(0..rows),
            cols: 0..cols,
        }
    }

    /// The same, stored the other way around if `transposed`.
    pub fn transposed(self, transposed: bool) -> Self {
        Self { transposed, ..self }
    }

    /// Other rows.
    pub fn with_rows(self, rows: Rows) -> Self {
        Self { rows, ..self }
    }

    /// Other columns.
    pub fn with_cols(self, cols: Range<usize>) -> Self {
        Self { cols, ..self }
    }

    /// `[rows, cols]` of what is taken.
    pub fn shape(&self) -> [usize; 2] {
        [self.rows.len(), self.cols.len()]
    }

    /// The shapes in which the tensor may be stored: stacked matrices may have a dimension of their own.
    pub(super) fn stored_shapes(&self) -> Vec<Vec<usize>> {
        let [rows, cols] = if self.transposed { [self.whole[1], self.whole[0]] } else { self.whole };
        match self.stack {
            None => vec![vec![rows, cols]],
            Some(Stack { count, .. }) => vec![vec![count, rows, cols], vec![count * rows, cols]],
        }
    }

    /// The shapes in which the bias that belongs to the matrix may be stored.
    pub(super) fn stored_bias_shapes(&self) -> Vec<Vec<usize>> {
        let [rows, _] = self.whole;
        match self.stack {
            None => vec![vec![rows]],
            Some(Stack { count, .. }) => vec![vec![count, rows], vec![count * rows]],
        }
    }

    /// Elements of the tensor before this matrix.
    pub(super) fn offset(&self) -> usize {
        self.stack.map_or(0, |stack| stack.index * self.whole[0] * self.whole[1])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stored(rows: &Rows) -> Vec<usize> {
        (0..rows.len()).map(|row| rows.stored(row)).collect()
    }

    #[test]
    fn grouped_rows_are_found_where_they_are_stored() {
        let keys = Rows::strided(2, 2, 3, 6);
        assert_eq!(stored(&keys), [2, 3, 8, 9, 14, 15]);
        assert_eq!(keys.layout(), Some((2, 6)));
        assert_eq!(stored(&keys.slice(2..6)), [8, 9, 14, 15]);
        assert_eq!(stored(&keys.slice(3..4)), [9]);
        assert_eq!(stored(&keys.slice(4..4)), [0; 0]);
        assert_eq!(stored(&Rows::range(4..7).slice(1..3)), [5, 6]);
    }

    #[test]
    fn parts_are_picked_in_any_order() {
        let rows = Rows::range(10..16);
        assert_eq!(rows.pick(2, &[1, 2]), Rows::range(12..16));
        let twice = rows.pick(2, &[0, 0, 1]);
        assert_eq!(stored(&twice), [10, 11, 10, 11, 12, 13]);
        assert_eq!(twice.layout(), None);
        assert_eq!(rows.pick(2, &[0, 2]).layout(), Some((2, 4)));
    }

    #[test]
    fn stacked_matrices_are_stored_with_or_without_a_dimension_of_their_own() {
        let region = Region { stack: Some(Stack { index: 2, count: 3 }), ..Region::all(4, 5) };
        assert_eq!(region.stored_shapes(), [vec![3, 4, 5], vec![12, 5]]);
        assert_eq!(region.clone().transposed(true).stored_shapes(), [vec![3, 5, 4], vec![15, 4]]);
        assert_eq!(region.stored_bias_shapes(), [vec![3, 4], vec![12]]);
        assert_eq!(region.offset(), 40);
    }
}
