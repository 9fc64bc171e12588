use kernels::{DType, Matrix, OpError, cpu, reference};

use crate::data::{DTYPES, Random, Weight, cpus, unwritten};
use crate::{EPSILON, SIZES, assert_close};

#[test]
fn every_half_is_widened_exactly() {
    let stored: Vec<u8> = (0..=u16::MAX).flat_map(u16::to_le_bytes).collect();
    for dtype in [DType::F16, DType::BF16] {
        // 1027 columns leave a tail for every register.
        let table = Weight::new(&stored[..63 * 1027 * 2], dtype, 63, 1027);
        let last = Weight::new(&stored[63 * 1027 * 2..], dtype, 1, 65536 - 63 * 1027);
        for cpu in cpus(1) {
            for table in [&table, &last] {
                let table = table.matrix();
                let ids: Vec<u32> = (0..table.rows() as u32).rev().collect();
                let mut out = unwritten(table.rows() * table.cols());
                cpu::embedding(&cpu, &table, &ids, 0, &mut out).expect("ids of the table");
                for (found, expected) in out.iter().zip(reference::embedding(&table, &ids, 0)) {
                    let same = found.to_bits() == (expected as f32).to_bits();
                    assert!(same || (found.is_nan() && expected.is_nan()), "{found} is not {expected}");
                }
            }
        }
    }
}

#[test]
fn embedding_is_its_definition() {
    let mut random = Random::new(11);
    for dtype in DTYPES {
        for width in SIZES {
            let table = Weight::random(&mut random, dtype, 29, width);
            let ids: Vec<u32> = (0..40).map(|_| random.below(29) as u32).collect();
            let before = random.numbers(ids.len() * width);
            for cpu in cpus(1) {
                let mut out = unwritten(before.len());
                cpu::embedding(&cpu, &table.matrix(), &ids, 0, &mut out).expect("shapes that fit");
                assert_close("embedding", &out, &reference::embedding(&table.matrix(), &ids, 0), 0.0, 0.0);

                let mut out = before.clone();
                cpu::add_embedding(&cpu, &table.matrix(), &ids, &mut out).expect("ids of the table");
                let expected = reference::add_embedding(&table.matrix(), &ids, &before);
                assert_close("add_embedding", &out, &expected, 0.0, EPSILON);
            }
        }
    }
}

#[test]
fn the_parts_of_a_split_vocabulary_add_up_to_the_whole() {
    let mut random = Random::new(12);
    let whole = Weight::random(&mut random, DType::BF16, 29, 19);
    let ids = [0, 28, 14, 9, 10, 11, 28];
    let row = 19 * DType::BF16.size();
    let bytes: Vec<u8> = (0..29).flat_map(|row| whole.matrix().row(row).to_vec()).collect();
    for cpu in cpus(1) {
        let mut sum = vec![0.0; ids.len() * 19];
        for (first, end) in [(0, 10), (10, 11), (11, 29)] {
            let part =
                Matrix::new(&bytes[first * row..end * row], DType::BF16, end - first, 19).expect("rows");
            let mut out = unwritten(sum.len());
            cpu::embedding(&cpu, &part, &ids, first as u32, &mut out).expect("shapes that fit");
            let expected = reference::embedding(&part, &ids, first as u32);
            assert_close("part", &out, &expected, 0.0, 0.0);
            sum.iter_mut().zip(&out).for_each(|(sum, out)| *sum += out);
        }
        assert_close("sum", &sum, &reference::embedding(&whole.matrix(), &ids, 0), 0.0, 0.0);
    }
}

#[test]
fn embedding_refuses_what_does_not_fit() {
    let cpu = &cpus(1)[0];
    let table = Matrix::new(&[0; 24], DType::F32, 3, 2).expect("fits");
    let length = |op| Err(OpError::Length { op, what: "out", expected: 4, found: 3 });
    assert_eq!(cpu::embedding(cpu, &table, &[0, 9], 0, &mut [0.0; 3]), length("embedding"));
    assert_eq!(cpu::add_embedding(cpu, &table, &[0, 2], &mut [0.0; 3]), length("add_embedding"));
    let index = OpError::Index { op: "add_embedding", what: "id", index: 3, limit: 3 };
    assert_eq!(cpu::add_embedding(cpu, &table, &[0, 3], &mut [0.0; 4]), Err(index));
}
