/// Where attention finds the values.
#[derive(Clone, Copy, Debug)]
pub enum Values<'a> {
    /// In a cache of their own: `[slots, kv_heads, value_dim]`.
    Own(&'a [f32]),
    /// They are the first `value_dim` elements of each key vector, as in multi-head latent attention (DeepSeek-AI 2024,
    /// section 2.1): the key is the compressed vector, followed by the rotated part.
    InKeys,
}

/// What changes the scores of attention, or the softmax over them. Without any rule, it is causal attention.
///
/// A score is the scaled product of query and key. First it is capped, then its position's slope is added, then what the
/// token does not see is left out; the sink takes part in the softmax as it is.
#[derive(Clone, Copy, Debug, Default)]
pub struct AttentionRules<'a> {
    /// A token sees itself and the `window - 1` tokens before it; not zero.
    pub window: Option<usize>,
    /// Scores become `cap * tanh(score / cap)`; more than zero. Source: Gemma 2 (Gemma team 2024), section 2.
    pub soft_cap: Option<f32>,
    /// `[heads]`; `slope * (key position - query position)` is added. Source: Press et al. 2021 (ALiBi).
    pub slopes: Option<&'a [f32]>,
    /// `[heads]`, one more score in each softmax, whose value is zero. Source: gpt-oss (OpenAI 2025), section 2.2.
    pub sinks: Option<&'a [f32]>,
}

impl AttentionRules<'_> {
    /// The first position that the token at `position` sees.
    pub(crate) fn first_visible(&self, position: usize) -> usize {
        self.window.map_or(0, |window| (position + 1).saturating_sub(window))
    }
}
