use half::{bf16, f16};

use crate::DType;

/// Element type of a buffer on the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Element {
    /// 32-bit float.
    F32,
    /// 16-bit float, 5 bits of exponent.
    F16,
    /// 16-bit float, 8 bits of exponent.
    BF16,
    /// 8-bit float, 4 bits of exponent, no infinity (OCP E4M3).
    E4M3,
    /// 8-bit float, 5 bits of exponent (OCP E5M2).
    E5M2,
    /// 32-bit unsigned integer.
    U32,
    /// Anything else.
    U8,
}

impl Element {
    /// Bytes per element.
    pub const fn size(self) -> usize {
        match self {
            Self::F32 | Self::U32 => 4,
            Self::F16 | Self::BF16 => 2,
            Self::E4M3 | Self::E5M2 | Self::U8 => 1,
        }
    }

    /// Vectors of 16 bytes that so many elements fill, the last one in part perhaps.
    pub(super) const fn vectors(self, elements: usize) -> usize {
        elements.div_ceil(16 / self.size())
    }

    /// The kernel of a family that computes with this type, of those for f32, f16 and bf16.
    pub(super) fn pick<K: Copy>(self, [f32, f16, bf16]: [K; 3]) -> Option<K> {
        match self {
            Self::F32 => Some(f32),
            Self::F16 => Some(f16),
            Self::BF16 => Some(bf16),
            Self::E4M3 | Self::E5M2 | Self::U32 | Self::U8 => None,
        }
    }
}

impl From<DType> for Element {
    fn from(dtype: DType) -> Self {
        match dtype {
            DType::F32 => Self::F32,
            DType::F16 => Self::F16,
            DType::BF16 => Self::BF16,
        }
    }
}

/// A type of this process that lies in memory as an [`Element`] does.
pub trait HostElement: Copy + Default + private::Sealed + 'static {
    /// Which one.
    const ELEMENT: Element;
}

macro_rules! host_element {
    ($($host:ty => $element:ident),*) => {$(
        impl private::Sealed for $host {}
        impl HostElement for $host {
            const ELEMENT: Element = Element::$element;
        }
    )*};
}
host_element!(f32 => F32, f16 => F16, bf16 => BF16, E4M3 => E4M3, E5M2 => E5M2, u32 => U32, u8 => U8);

/// A number of type [`Element::E4M3`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(transparent)]
pub struct E4M3(pub u8);

/// A number of type [`Element::E5M2`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(transparent)]
pub struct E5M2(pub u8);

impl E4M3 {
    const FORMAT: Eight = Eight { mantissa: 3, bias: 7, largest: 0x7e };

    /// The nearest, of two the even one; the largest for what is larger.
    pub fn from_f32(value: f32) -> Self {
        Self(Self::FORMAT.encode(value))
    }

    /// What it stands for.
    pub fn to_f32(self) -> f32 {
        Self::FORMAT.decode(self.0)
    }
}

impl E5M2 {
    const FORMAT: Eight = Eight { mantissa: 2, bias: 15, largest: 0x7b };

    /// The nearest, of two the even one; the largest finite one for what is larger.
    pub fn from_f32(value: f32) -> Self {
        Self(Self::FORMAT.encode(value))
    }

    /// What it stands for. Infinity is not told from NaN: nothing here writes it.
    pub fn to_f32(self) -> f32 {
        Self::FORMAT.decode(self.0)
    }
}

/// Floating point in eight bits.
struct Eight {
    /// Bits of the mantissa.
    mantissa: i32,
    /// Of the exponent.
    bias: i32,
    /// The largest finite number; what is above it is not finite.
    largest: u8,
}

impl Eight {
    fn decode(&self, bits: u8) -> f32 {
        let (sign, magnitude) = (if bits & 0x80 == 0 { 1.0 } else { -1.0 }, bits & 0x7f);
        if magnitude > self.largest {
            return f32::NAN;
        }
        let (exponent, steps) = (i32::from(magnitude >> self.mantissa), i32::from(magnitude) & self.mask());
        // Below the smallest exponent there is no leading one.
        let steps = if exponent == 0 { steps } else { steps + self.mask() + 1 };
        sign * steps as f32 * self.step(exponent)
    }

    fn encode(&self, value: f32) -> u8 {
        if value.is_nan() {
            return 0x7f;
        }
        let sign = if value.is_sign_negative() { 0x80 } else { 0 };
        let exponent = ((value.to_bits() >> 23 & 0xff) as i32 - 127 + self.bias).clamp(1, 32);
        let steps = (value.abs() / self.step(exponent)).round_ties_even();
        // What has grown to the next power of two carries into the exponent.
        let magnitude = ((exponent - 1) << self.mantissa) as f32 + steps;
        sign | magnitude.min(f32::from(self.largest)) as u8
    }

    fn mask(&self) -> i32 {
        (1 << self.mantissa) - 1
    }

    /// From a number with this exponent to the next.
    fn step(&self, exponent: i32) -> f32 {
        f32::from_bits((exponent.max(1) - self.bias - self.mantissa + 127).cast_unsigned() << 23)
    }
}

mod private {
    /// Bytes of such a type may be anything: no pattern is invalid, and there is no padding.
    pub trait Sealed {}
}

#[cfg(test)]
mod tests {
    use super::{E4M3, E5M2};

    #[test]
    fn eight_bits_have_the_values_of_the_standard() {
        for (bits, value) in [(0, 0.0), (1, 2f32.powi(-9)), (8, 2f32.powi(-6)), (0x38, 1.0), (0x7e, 448.0)] {
            assert_eq!(E4M3(bits).to_f32(), value);
            assert_eq!(E4M3(bits | 0x80).to_f32(), -value);
        }
        for (bits, value) in [(1, 2f32.powi(-16)), (4, 2f32.powi(-14)), (0x3c, 1.0), (0x7b, 57344.0)] {
            assert_eq!(E5M2(bits).to_f32(), value);
        }
        assert!(E4M3(0x7f).to_f32().is_nan() && E5M2(0x7e).to_f32().is_nan());
    }

    #[test]
    fn numbers_become_the_nearest_and_of_two_the_even_one() {
        for bits in 0..0x7e {
            let (low, high) = (E4M3(bits).to_f32(), E4M3(bits + 1).to_f32());
            let even = if bits % 2 == 0 { bits } else { bits + 1 };
            for (value, expected) in
                [(low, bits), ((low + high) / 2.0, even), (low * 0.49 + high * 0.51, bits + 1)]
            {
                assert_eq!(E4M3::from_f32(value), E4M3(expected), "{value}");
                assert_eq!(E4M3::from_f32(-value), E4M3(expected | 0x80), "{value}");
            }
        }
        for bits in 0..=0x7b {
            assert_eq!(E5M2::from_f32(E5M2(bits).to_f32()), E5M2(bits));
        }
        for large in [465.0, 1e9, f32::INFINITY] {
            assert_eq!((E4M3::from_f32(large), E5M2::from_f32(large * 200.0)), (E4M3(0x7e), E5M2(0x7b)));
        }
        assert!(E4M3::from_f32(f32::NAN).to_f32().is_nan());
    }
}
