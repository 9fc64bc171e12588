//! Names of what a shard may understand beyond `generate.v3`, announced in `InfoResponse.extensions`.
//!
//! To a peer that does not announce a name, its fields are not sent.

/// `Request.input_ids`: the router's token ids travel with the request, and the shard does not tokenize again.
pub const INPUT_IDS: &str = "input_ids";

/// `NextTokenChooserParameters` fields from 1000: presence and count penalty, `min_p`, `logit_bias`.
pub const SAMPLING_MORE: &str = "sampling_more";

/// Adapters are loaded and unloaded while the shard runs (`LoadAdapter`, `UnloadAdapter`), and `InfoResponse.adapters` says
/// which there are.
pub const ADAPTERS: &str = "adapters";

/// `Request.generated`: a request that was under way goes on, here or on a shard that has never seen it.
pub const RESUME: &str = "resume";

/// `Grant`, `drops`: blocks are granted from step to step, the router says how much of which prompt a step computes, and
/// requests leave without a call of their own.
pub const BLOCK_GRANTS: &str = "block_grants";
