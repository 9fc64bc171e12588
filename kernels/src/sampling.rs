/// How a token is chosen from a row of logits. The stages run in the order of the fields, each on what the one before has
/// left; a token that one of them removes has probability zero for all that follow.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampling<'a> {
    /// Raises the logits of some tokens.
    pub watermark: Option<Watermark>,
    /// Added to the logits of single tokens, one after the other. Those that do not exist are left out.
    pub bias: &'a [(u32, f32)],
    /// Push tokens down that were there before.
    pub penalties: Penalties,
    /// Which tokens are allowed: bit `id % 32` of word `id / 32`. All if absent.
    pub mask: Option<&'a [u32]>,
    /// Divides the logits, after they were shifted to a best of 0; above 0, neutral 1.
    pub temperature: f32,
    /// Keeps the `k` best and ties with the last of them; neutral 0.
    pub top_k: u32,
    /// Keeps the smallest set of the best that has this mass, the lower id first among equals; neutral 1.
    pub top_p: f32,
    /// Keeps the tokens whose information is closest to the entropy, until they have this mass, and ties with the last of
    /// them; neutral 1.
    pub typical_p: f32,
    /// Keeps tokens at least this likely, relative to the likeliest; neutral 0.
    pub min_p: f32,
    /// Whether a random draw decides. Otherwise the likeliest is taken, the lowest id among equals.
    pub draws: bool,
    /// Key of the random numbers.
    pub seed: u64,
    /// Their counter: how many tokens of the request were chosen before.
    pub index: u64,
}

/// Strengths of the penalties.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Penalties {
    /// Divides positive logits of tokens in the history and multiplies negative ones; neutral 1.
    pub repetition: f32,
    /// Subtracted times a token's share of the history; neutral 0.
    pub frequency: f32,
    /// Subtracted from tokens that were generated; neutral 0.
    pub presence: f32,
    /// Subtracted times the number of times a token was generated; neutral 0.
    pub count: f32,
}

/// The soft green list of Kirchenbauer et al. 2023 ("A watermark for large language models"), section 3.
///
/// A token is green when the 64-bit Philox hash of its id under the key `15485863 * previous` is below `gamma * 2^64`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Watermark {
    /// Share of green tokens, in (0, 1).
    pub gamma: f32,
    /// Added to the logits of green tokens.
    pub delta: f32,
    /// The token before.
    pub previous: u32,
}

impl Sampling<'_> {
    /// Every field at its neutral value: the likeliest token is taken.
    pub const GREEDY: Self = Self {
        watermark: None,
        bias: &[],
        penalties: Penalties::NEUTRAL,
        mask: None,
        temperature: 1.0,
        top_k: 0,
        top_p: 1.0,
        typical_p: 1.0,
        min_p: 0.0,
        draws: false,
        seed: 0,
        index: 0,
    };
}

impl Penalties {
    /// Leave every row alone.
    pub const NEUTRAL: Self = Self { repetition: 1.0, frequency: 0.0, presence: 0.0, count: 0.0 };

    /// Whether they leave every row alone.
    pub fn are_neutral(&self) -> bool {
        *self == Self::NEUTRAL
    }
}

impl Watermark {
    const KEY: u64 = 15_485_863;

    /// The key of the hash.
    pub fn key(&self) -> u64 {
        Self::KEY.wrapping_mul(u64::from(self.previous))
    }

    /// What the hash of a green token is below.
    pub fn bound(&self) -> u64 {
        (f64::from(self.gamma) * 2_f64.powi(64)) as u64
    }
}
