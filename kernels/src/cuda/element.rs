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
host_element!(f32 => F32, f16 => F16, bf16 => BF16, u32 => U32, u8 => U8);

mod private {
    /// Bytes of such a type may be anything: no pattern is invalid, and there is no padding.
    pub trait Sealed {}
}
