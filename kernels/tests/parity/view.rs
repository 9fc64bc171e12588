//! A view of rows that lie apart is the matrix of the same rows, bit for bit.

use kernels::cpu::{self, Product};
use kernels::{DType, Matrix, RowLayout};

use crate::data::{DTYPES, Random, Weight, cpus, unwritten};

/// A matrix whose rows do not follow each other.
struct Scattered {
    bytes: Vec<u8>,
    dtype: DType,
    rows: usize,
    cols: usize,
    layout: RowLayout,
}

impl Scattered {
    /// The rows of `matrix` where `layout` puts them, and NaN in between and behind.
    fn new(matrix: Matrix<'_>, layout: RowLayout) -> Self {
        let (dtype, rows, cols) = (matrix.dtype(), matrix.rows(), matrix.cols());
        let size = cols * dtype.size();
        let start = |row| (row / layout.group) * layout.group_stride + (row % layout.group) * layout.stride;
        let end = (0..rows).map(start).max().map_or(0, |last| last + size);
        // In every type, an element with all bits set is NaN.
        let mut bytes = vec![0xff; end + 5];
        for row in 0..rows {
            bytes[start(row)..][..size].copy_from_slice(matrix.row(row));
        }
        Self { bytes, dtype, rows, cols, layout }
    }

    fn matrix(&self) -> Matrix<'_> {
        let Self { bytes, dtype, rows, cols, layout } = self;
        Matrix::with_layout(bytes, *dtype, *rows, *cols, *layout).expect("rows within the bytes")
    }
}

/// For rows of `size` bytes: columns of a wider matrix, every second row, heads of a fused weight.
fn layouts(size: usize) -> [RowLayout; 3] {
    [
        RowLayout::strided(size + 7),
        RowLayout { stride: size, group: 1, group_stride: 2 * size },
        RowLayout { stride: size + 2, group: 5, group_stride: 17 * size + 1 },
    ]
}

/// Calls `check` with a matrix and each view of the same rows.
fn for_each_view(rows: usize, cols: usize, mut check: impl FnMut(Matrix<'_>, Matrix<'_>)) {
    let mut random = Random::new((rows + cols) as u64);
    for dtype in DTYPES {
        let weight = Weight::random(&mut random, dtype, rows, cols);
        for layout in layouts(cols * dtype.size()) {
            check(weight.matrix(), Scattered::new(weight.matrix(), layout).matrix());
        }
    }
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

#[test]
fn linear_takes_a_view() {
    for (rows, cols) in [(109, 517), (3, 1), (16, 64)] {
        let input = Random::new(1).numbers(7 * cols);
        for_each_view(rows, cols, |whole, view| {
            for (cpu, tokens) in cpus(2).iter().flat_map(|cpu| [1, 2, 7].map(|tokens| (cpu, tokens))) {
                let [expected, found] = [whole, view].map(|weight| {
                    let mut out = unwritten(tokens * rows);
                    let products = &mut [Product { weight, bias: None, out: &mut out, add: false }];
                    cpu::linear(cpu, &input[..tokens * cols], products).expect("shapes that fit");
                    bits(&out)
                });
                assert!(found == expected, "{:?} {view:?}", cpu.isa());
            }
        });
    }
}

#[test]
fn linear_per_head_takes_a_view() {
    let (tokens, groups, rows, cols) = (3, 6, 60, 129);
    let input = Random::new(2).numbers(tokens * groups * cols);
    for_each_view(rows, cols, |whole, view| {
        for cpu in cpus(2) {
            let [expected, found] = [whole, view].map(|weight| {
                let mut out = unwritten(tokens * rows);
                cpu::linear_per_head(&cpu, &input, weight, groups, &mut out).expect("shapes that fit");
                bits(&out)
            });
            assert!(found == expected, "{:?} {view:?}", cpu.isa());
        }
    });
}

#[test]
fn embeddings_take_a_view() {
    let ids = [3, 0, 28, 5, 4, 10];
    for_each_view(29, 77, |whole, view| {
        for cpu in cpus(1) {
            let [expected, found] = [whole, view].map(|table| {
                let mut out = unwritten(ids.len() * 77);
                cpu::embedding(&cpu, &table, &ids, 0, &mut out).expect("shapes that fit");
                cpu::add_embedding(&cpu, &table, &ids, &mut out).expect("ids of the table");
                bits(&out)
            });
            assert!(found == expected, "{:?} {view:?}", cpu.isa());
        }
    });
}
