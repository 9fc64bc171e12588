use super::{Checker, FLOATS, bits, computed};
use crate::OpError;
use crate::cuda::{self, Element, Matrix};

/// One element, odd widths, whole vectors, and more than a block holds.
const WIDTHS: [usize; 7] = [1, 3, 6, 24, 96, 257, 4104];
const ROWS: usize = 11;
const FIRST: u32 = 40;

pub(super) fn check(c: &mut Checker) -> Result<(), OpError> {
    for element in FLOATS {
        for width in WIDTHS {
            // Rows that follow each other, that begin at multiples of 16 bytes, and that do not.
            for stride in [width, cuda::OwnedMatrix::stride_of(element, width), width + 1] {
                lookup(c, element, width, stride)?;
                addition(c, element, width, stride)?;
            }
        }
    }
    Ok(())
}

/// Ids of a table's first row, its last row, some row twice, and of none on either side.
fn lookup(c: &mut Checker, element: Element, width: usize, stride: usize) -> Result<(), OpError> {
    let gpu = c.gpu();
    let last = FIRST + ROWS as u32 - 1;
    let ids = [FIRST + 3, last, FIRST, last + 1, FIRST - 1, FIRST + 3, 0, u32::MAX];
    let table = c.floats(element, (ROWS - 1) * stride + width)?;
    let ids_there = gpu.upload(&ids)?;
    let mut out = c.unwritten(element, ids.len() * width)?;
    let matrix = Matrix { elements: table.buffer.all(), rows: ROWS, cols: width, stride };
    cuda::embedding(&gpu, matrix, FIRST, ids_there.all(), out.all_mut())?;
    let expected: Vec<f32> = ids
        .iter()
        .flat_map(|&id| match id.wrapping_sub(FIRST) as usize {
            row if row < ROWS => table.host[row * stride..][..width].to_vec(),
            _ => vec![0.0; width],
        })
        .collect();
    let found = c.read(&out)?;
    c.equal(format!("embedding, {element:?}, {width} of {stride}"), &bits(&found), &bits(&expected));
    Ok(())
}

fn addition(c: &mut Checker, element: Element, width: usize, stride: usize) -> Result<(), OpError> {
    let (gpu, ids) = (c.gpu(), [2, ROWS as u32 - 1, 0, ROWS as u32, u32::MAX]);
    let table = c.floats(element, (ROWS - 1) * stride + width)?;
    let mut x = c.floats(element, ids.len() * width)?;
    let ids_there = gpu.upload(&ids)?;
    let matrix = Matrix { elements: table.buffer.all(), rows: ROWS, cols: width, stride };
    cuda::add_embedding(&gpu, matrix, ids_there.all(), x.buffer.all_mut())?;
    let mut expected: Vec<f64> = x.host.iter().copied().map(f64::from).collect();
    for (x, &id) in expected.chunks_exact_mut(width).zip(&ids).filter(|(_, id)| (**id as usize) < ROWS) {
        for (x, &row) in x.iter_mut().zip(&table.host[id as usize * stride..]) {
            *x += f64::from(row);
        }
    }
    let case = format!("add_embedding, {element:?}, {width} of {stride}");
    c.close(case, &x.buffer, &expected, computed(element, 1.0))
}
