//! Dense products in plain loops.

use half::{bf16, f16};

use super::host;
use crate::cuda::Element;
use crate::cuda::driver::{DevicePtr, Multiply};

/// Sums in f32, one after the other: what a library does on a GPU is not what is tested here.
///
/// # Safety
/// The matrices lie in memory as `product` says.
pub(super) unsafe fn multiply(product: &Multiply, input: DevicePtr, weight: DevicePtr, out: DevicePtr) {
    let read = |ptr, count| {
        // SAFETY: the caller vouches for the sizes.
        unsafe { read(ptr, product.element, count) }
    };
    for index in 0..product.batch {
        let at = |ptr: DevicePtr, which: usize, element: Element| {
            DevicePtr(ptr.0 + (index * product.batch_strides[which] * element.size()) as u64)
        };
        let input =
            read(at(input, 0, product.element), (product.rows - 1) * product.input_stride + product.inputs);
        let weight = read(
            at(weight, 1, product.element),
            (product.outputs - 1) * product.weight_stride + product.inputs,
        );
        let out = at(out, 2, product.out_element);
        for row in 0..product.rows {
            let x = &input[row * product.input_stride..][..product.inputs];
            for output in 0..product.outputs {
                let w = &weight[output * product.weight_stride..][..product.inputs];
                let sum: f32 = x.iter().zip(w).map(|(x, w)| x * w).sum();
                let offset = (row * product.out_stride + output) * product.out_element.size();
                // SAFETY: the caller vouches for the sizes.
                unsafe { write(DevicePtr(out.0 + offset as u64), product.out_element, sum, product.add) }
            }
        }
    }
}

/// # Safety
/// There are as many elements.
unsafe fn read(ptr: DevicePtr, element: Element, count: usize) -> Vec<f32> {
    let at = host(ptr);
    match element {
        // SAFETY: the caller vouches for the size; device memory is aligned.
        Element::F32 => unsafe { std::slice::from_raw_parts(at.cast::<f32>(), count) }.to_vec(),
        // SAFETY: the same.
        Element::F16 => unsafe { std::slice::from_raw_parts(at.cast::<f16>(), count) }
            .iter()
            .map(|element| element.to_f32())
            .collect(),
        // SAFETY: the same.
        Element::BF16 => unsafe { std::slice::from_raw_parts(at.cast::<bf16>(), count) }
            .iter()
            .map(|element| element.to_f32())
            .collect(),
        Element::E4M3 | Element::E5M2 | Element::U32 | Element::U8 => {
            unreachable!("products are of floats of 16 or 32 bits")
        }
    }
}

/// # Safety
/// There is such an element.
unsafe fn write(ptr: DevicePtr, element: Element, value: f32, add: bool) {
    let at = host(ptr);
    macro_rules! write_as {
        ($type:ty, $read:expr, $write:expr) => {{
            let at = at.cast::<$type>();
            // SAFETY: the caller vouches for the element; device memory is aligned.
            let before: f32 = if add { $read(unsafe { at.read() }) } else { 0.0 };
            // SAFETY: the same.
            unsafe { at.write($write(before + value)) }
        }};
    }
    match element {
        Element::F32 => write_as!(f32, |value| value, |value| value),
        Element::F16 => write_as!(f16, f16::to_f32, f16::from_f32),
        Element::BF16 => write_as!(bf16, bf16::to_f32, bf16::from_f32),
        Element::E4M3 | Element::E5M2 | Element::U32 | Element::U8 => {
            unreachable!("products are of floats of 16 or 32 bits")
        }
    }
}
