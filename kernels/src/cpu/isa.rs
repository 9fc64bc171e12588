/// An instruction set with its own version of every operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Isa {
    /// Portable code, vectorized by the compiler for the smallest machine of the target.
    Plain,
    /// AVX2, FMA and F16C.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// AVX-512, its foundation alone.
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

impl Isa {
    /// From the simplest to the fastest.
    const ALL: &[Self] = &[
        Self::Plain,
        #[cfg(target_arch = "x86_64")]
        Self::Avx2,
        #[cfg(target_arch = "x86_64")]
        Self::Avx512,
    ];

    /// What this machine has, from the simplest to the fastest; never empty.
    pub fn available() -> impl DoubleEndedIterator<Item = Self> {
        Self::ALL.iter().copied().filter(|isa| isa.is_supported())
    }

    /// The fastest one this machine has.
    pub fn best() -> Self {
        Self::available().next_back().unwrap_or(Self::Plain)
    }
}
