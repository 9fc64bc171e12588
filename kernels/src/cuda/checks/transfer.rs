use half::{bf16, f16};

use super::{Checker, FLOATS};
use crate::cuda::{Buffer, Download, Element, Uploader};
use crate::{DType, Matrix, OpError, RowLayout};

const DTYPES: [DType; 3] = [DType::F32, DType::F16, DType::BF16];

/// Small, so that a few matrices go round all chunks several times, and long rows do not fit into one.
const CHUNK_BYTES: usize = 4096;

pub(super) fn check(c: &mut Checker) -> Result<(), OpError> {
    for element in FLOATS {
        let mut uploader = Uploader::new(&c.gpu(), CHUNK_BYTES, 3)?;
        for dtype in DTYPES {
            let mut shapes = vec![[1, 1], [3, 5], [200, 33], [40, 256], [2, 5000], [1, 3000]];
            shapes.extend((0..6).map(|_| [1 + c.random().below(90), 1 + c.random().below(300)]));
            uploads(c, &mut uploader, dtype, element, shapes)?;
        }
    }
    // Several threads fill such chunks.
    let mut uploader = Uploader::new(&c.gpu(), 1 << 20, 2)?;
    uploads(c, &mut uploader, DType::F32, Element::BF16, vec![[300, 1000], [200, 900], [250, 1000]])?;
    downloads(c)
}

/// Some matrices at once, rows apart on both sides, one behind the other in one buffer.
fn uploads(
    c: &mut Checker,
    uploader: &mut Uploader,
    dtype: DType,
    element: Element,
    shapes: Vec<[usize; 2]>,
) -> Result<(), OpError> {
    let gaps: Vec<usize> = shapes.iter().map(|_| c.random().below(4)).collect();
    let len = shapes.iter().zip(&gaps).map(|([rows, cols], gap)| rows * (cols + gap)).sum();
    let before = c.floats(element, len)?;
    let (mut buffer, mut expected, mut offset) = (before.buffer, before.host, 0);
    for ([rows, cols], gap) in shapes.into_iter().zip(gaps) {
        let (values, bytes, stride) = stored(c, dtype, rows, cols + gap);
        let layout = RowLayout::strided(stride);
        let matrix = Matrix::with_layout(&bytes, dtype, rows, cols, layout)?;
        uploader.rows(buffer.all_mut(), offset, cols + gap, matrix)?;
        for row in 0..rows {
            for col in 0..cols {
                expected[offset + row * (cols + gap) + col] =
                    rounded(element, values[row * (cols + gap) + col]);
            }
        }
        offset += rows * (cols + gap);
    }
    uploader.finish()?;
    let found = c.read(&buffer)?;
    c.equal(format!("matrices of {dtype:?} in a buffer of {element:?}"), &found, &expected);
    Ok(())
}

/// Rows of numbers, as they lie in a file: an odd byte apart. The numbers, the bytes, and how far apart.
fn stored(c: &mut Checker, dtype: DType, rows: usize, cols: usize) -> (Vec<f32>, Vec<u8>, usize) {
    let (mut values, mut bytes) = (Vec::new(), Vec::new());
    for _ in 0..rows {
        for number in c.random().numbers(cols) {
            let (value, word) = match dtype {
                DType::F32 => (number, number.to_le_bytes().to_vec()),
                DType::F16 => {
                    let half = f16::from_f32(number);
                    (half.to_f32(), half.to_le_bytes().to_vec())
                }
                DType::BF16 => {
                    let half = bf16::from_f32(number);
                    (half.to_f32(), half.to_le_bytes().to_vec())
                }
            };
            values.push(value);
            bytes.extend(word);
        }
        bytes.push(0x5a);
    }
    (values, bytes, cols * dtype.size() + 1)
}

fn rounded(element: Element, value: f32) -> f32 {
    match element {
        Element::F16 => f16::from_f32(value).to_f32(),
        Element::BF16 => bf16::from_f32(value).to_f32(),
        _ => value,
    }
}

/// What is sent for is what was there then, whatever becomes of it.
fn downloads(c: &mut Checker) -> Result<(), OpError> {
    let gpu = c.gpu();
    let mut download = Download::<u32>::new(&gpu, 1000)?;
    c.equal("a download before the first", download.finish()?, &[]);
    for len in [1000, 1, 0, 257] {
        let words = c.random().permutation(1000);
        let mut buffer: Buffer = gpu.upload(&words)?;
        download.start(buffer.slice(1000 - len..1000))?;
        buffer.fill(0)?;
        drop(buffer);
        c.equal(format!("a download of {len} words"), download.finish()?, &words[1000 - len..]);
        c.equal("the same once more", download.finish()?, &words[1000 - len..]);
    }
    Ok(())
}
