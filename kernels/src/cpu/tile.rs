use std::marker::PhantomData;

/// A rectangle of a row-major matrix to write to: `split_at_mut` in both directions.
pub(super) struct Tile<'a> {
    first: *mut f32,
    stride: usize,
    rows: usize,
    cols: usize,
    matrix: PhantomData<&'a mut [f32]>,
}

// SAFETY: a tile is the only way to its elements, like the `&mut [f32]` it came from.
unsafe impl Send for Tile<'_> {}

impl<'a> Tile<'a> {
    /// All of a matrix with `cols` columns. Panics when the last row is incomplete.
    pub(super) fn new(matrix: &'a mut [f32], cols: usize) -> Self {
        let rows = matrix.len().checked_div(cols).unwrap_or(0);
        assert_eq!(rows * cols, matrix.len(), "a matrix has whole rows");
        Self { first: matrix.as_mut_ptr(), stride: cols, rows, cols, matrix: PhantomData }
    }

    /// The first `at` rows, and the others. Panics when there are fewer.
    pub(super) fn split_rows(self, at: usize) -> (Self, Self) {
        assert!(at <= self.rows, "split at row {at} of {}", self.rows);
        // Not `add`: below the last row, the first column may be beyond the matrix.
        let below = self.first.wrapping_add(at * self.stride);
        (Self { rows: at, ..self }, Self { first: below, rows: self.rows - at, ..self })
    }

    /// The first `at` columns, and the others. Panics when there are fewer.
    pub(super) fn split_cols(self, at: usize) -> (Self, Self) {
        assert!(at <= self.cols, "split at column {at} of {}", self.cols);
        let right = self.first.wrapping_add(at);
        (Self { cols: at, ..self }, Self { first: right, cols: self.cols - at, ..self })
    }

    /// This tile's part of one row. Panics when there is no such row.
    #[inline(always)]
    pub(super) fn row_mut(&mut self, row: usize) -> &mut [f32] {
        assert!(row < self.rows, "row {row} of {}", self.rows);
        // SAFETY: the row and its columns lie within the matrix, which is borrowed for 'a; splitting gave each element
        // to one tile, and this one is borrowed for as long as the slice lives.
        unsafe { std::slice::from_raw_parts_mut(self.first.add(row * self.stride), self.cols) }
    }
}

#[cfg(test)]
mod tests {
    use super::Tile;

    #[test]
    fn the_tiles_of_a_matrix_cover_it_once() {
        let mut matrix = [0.0; 5 * 7];
        let (above, below) = Tile::new(&mut matrix, 7).split_rows(2);
        let (above_left, above_right) = above.split_cols(3);
        for (value, mut tile) in [above_left, above_right, below].into_iter().enumerate() {
            for row in 0..tile.rows {
                tile.row_mut(row).iter_mut().for_each(|element| *element += 1.0 + value as f32);
            }
        }
        let mut expected = [3.0; 5 * 7];
        for row in 0..2 {
            expected[row * 7..][..7].copy_from_slice(&[1.0, 1.0, 1.0, 2.0, 2.0, 2.0, 2.0]);
        }
        assert_eq!(matrix, expected);
    }

    #[test]
    fn an_empty_matrix_has_no_rows() {
        let (above, below) = Tile::new(&mut [], 0).split_rows(0);
        assert_eq!((above.rows, above.cols, below.rows), (0, 0, 0));
    }
}
