//! The largest step the router will ever ask for, run once at start: the shards measure the memory it takes and decide
//! how many cache blocks fit besides.

use proto::units::{BlockCount, TokenCount};
use proto::v3;

use super::ShardError;
use super::client::Ranks;
use super::info::ShardInfo;
use crate::batching::Capacity;

/// What the user has asked for; the shards choose what is absent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WarmupLimits {
    /// Longest prompt.
    pub max_input_tokens: Option<TokenCount>,
    /// Longest prompt and output together.
    pub max_total_tokens: Option<TokenCount>,
    /// Most prompt tokens of one pass.
    pub max_batch_prefill_tokens: TokenCount,
    /// Most requests of one batch.
    pub max_batch_size: Option<usize>,
}

/// What the shards can do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Warm {
    /// Tokens the cache holds, the reserved block included; `None` if the shards cannot tell.
    pub capacity: Option<TokenCount>,
    /// Longest prompt: the user's, if given.
    pub max_input_tokens: TokenCount,
    /// Longest prompt and output together: the user's, if given.
    pub max_total_tokens: TokenCount,
}

/// Tokens of the cache when neither shards nor user say: enough to work, as in the reference.
const CAPACITY_DEFAULT: TokenCount = TokenCount(16_000);

impl Warm {
    /// The cache: as large as the shards can hold, or as the user wants it. The user speaks of tokens that requests can
    /// use, the shards of all that they have room for, the reserved block included.
    pub fn capacity(&self, info: &ShardInfo, wanted: Option<TokenCount>, prefill: TokenCount) -> Capacity {
        let fits = self.capacity.map(|tokens| BlockCount(tokens.0 / info.block_size.get()));
        let usable = |tokens: TokenCount| BlockCount(tokens.blocks(info.block_size).0.saturating_add(1));
        let blocks = match (fits, wanted) {
            (Some(fits), Some(wanted)) => fits.min(usable(wanted)),
            (Some(fits), None) => fits,
            (None, Some(wanted)) => usable(wanted),
            (None, None) => usable(CAPACITY_DEFAULT.max(self.max_total_tokens).max(prefill)),
        };
        Capacity::new(blocks, info)
    }
}

/// Runs the largest step on all ranks. Errors as [`result`], and when it does not fit into memory.
pub(super) async fn run(ranks: &Ranks, limits: &WarmupLimits) -> Result<Warm, ShardError> {
    let request = request(limits);
    let answers = ranks.call(request, |mut rank, request| async move { rank.warmup(request).await }).await?;
    result(answers, limits)
}

/// The largest prefill within `limits`, every kind of sampling switched on.
fn request(limits: &WarmupLimits) -> v3::WarmupRequest {
    let max_input_tokens = limits.max_input_tokens.map(|tokens| tokens.0);
    let max_total_tokens = limits.max_total_tokens.map(|tokens| tokens.0);
    let mut left = limits.max_batch_prefill_tokens.0;
    let mut requests = Vec::new();
    while left > 0 && limits.max_batch_size.is_none_or(|most| requests.len() < most) {
        // One token is generated, so the prompt stays below the total.
        let longest = max_total_tokens.map_or(u32::MAX, |total| total.saturating_sub(1).max(1));
        let prompt = left.min(max_input_tokens.unwrap_or(u32::MAX)).min(longest).max(1);
        let max_new_tokens = max_total_tokens.map_or(1, |total| total.saturating_sub(prompt).max(1));
        requests.push(filler(prompt, max_new_tokens, requests.is_empty()));
        left = left.saturating_sub(prompt);
    }
    v3::WarmupRequest {
        batch: Some(v3::Batch {
            id: 0,
            size: requests.len() as u32,
            requests,
            max_tokens: max_input_tokens.unwrap_or(0),
            max_blocks: 0,
        }),
        max_input_tokens,
        max_prefill_tokens: limits.max_batch_prefill_tokens.0,
        max_total_tokens,
    }
}

/// The least of what the ranks can do. Errors when they do not keep to what the user gave.
fn result(answers: Vec<v3::WarmupResponse>, limits: &WarmupLimits) -> Result<Warm, ShardError> {
    let key = |answer: &v3::WarmupResponse| {
        (answer.max_supported_total_tokens, answer.max_input_tokens, answer.max_total_tokens)
    };
    let least = answers.into_iter().min_by_key(key).ok_or(ShardError::Empty)?;
    let warm = Warm {
        capacity: least.max_supported_total_tokens.map(TokenCount),
        max_input_tokens: TokenCount(least.max_input_tokens),
        max_total_tokens: TokenCount(least.max_total_tokens),
    };
    let pairs = [
        ("max_input_tokens", limits.max_input_tokens, warm.max_input_tokens),
        ("max_total_tokens", limits.max_total_tokens, warm.max_total_tokens),
    ];
    for (name, wanted, found) in pairs {
        if let Some(wanted) = wanted.filter(|wanted| *wanted != found) {
            return Err(ShardError::Answer(format!("{name} is {wanted}, but warm-up made it {found}")));
        }
    }
    Ok(warm)
}

/// A request that asks for everything. Its text has at least `prompt` tokens in any vocabulary.
fn filler(prompt: u32, max_new_tokens: u32, with_image: bool) -> v3::Request {
    let text = "_test ".repeat(prompt as usize);
    let mut inputs = text.clone();
    let mut chunks = vec![v3::InputChunk { chunk: Some(v3::input_chunk::Chunk::Text(text)) }];
    if with_image {
        let image = v3::Image { data: image::png(), mimetype: "image/jpeg;base64".to_owned() };
        inputs += &format!("![](data:{};base64,{})", image.mimetype, image::base64(&image.data));
        chunks.push(v3::InputChunk { chunk: Some(v3::input_chunk::Chunk::Image(image)) });
    }
    v3::Request {
        id: 0,
        inputs,
        truncate: prompt,
        parameters: Some(v3::NextTokenChooserParameters {
            temperature: 0.9,
            top_k: 10,
            top_p: 0.9,
            typical_p: 0.9,
            do_sample: false,
            seed: 0,
            repetition_penalty: 1.2,
            watermark: true,
            frequency_penalty: 0.1,
            ..Default::default()
        }),
        stopping_parameters: Some(v3::StoppingCriteriaParameters {
            max_new_tokens,
            stop_sequences: Vec::new(),
            ignore_eos_token: true,
        }),
        prefill_logprobs: true,
        top_n_tokens: 20,
        input_chunks: Some(v3::Input { chunks }),
        add_special_tokens: true,
        ..Default::default()
    }
}

/// The smallest image that a vision model takes, so that warm-up runs its encoder: 20 by 20 black pixels.
mod image {
    const SIDE: u32 = 20;

    /// Source: PNG specification (W3C, third edition), sections 5.3 and 10; RFC 1950 and 1951 for the data.
    pub(super) fn png() -> Vec<u8> {
        let mut header = [SIDE.to_be_bytes(), SIDE.to_be_bytes()].concat();
        // 8 bits per channel, red green blue; deflate, adaptive filters, not interlaced.
        header.extend([8, 2, 0, 0, 0]);
        // Each line: filter "none", then its pixels.
        let pixels = vec![0; (SIDE * (1 + 3 * SIDE)) as usize];
        let mut file = b"\x89PNG\r\n\x1a\n".to_vec();
        chunk(&mut file, b"IHDR", &header);
        chunk(&mut file, b"IDAT", &zlib_stored(&pixels));
        chunk(&mut file, b"IEND", &[]);
        file
    }

    fn chunk(file: &mut Vec<u8>, name: &[u8; 4], data: &[u8]) {
        file.extend((data.len() as u32).to_be_bytes());
        let checked = file.len();
        file.extend(name);
        file.extend(data);
        let checksum = crc32(&file[checked..]);
        file.extend(checksum.to_be_bytes());
    }

    /// A zlib stream of one stored block.
    fn zlib_stored(data: &[u8]) -> Vec<u8> {
        let length = u16::try_from(data.len()).expect("the image is far below 64 KiB");
        let mut stream = vec![0x78, 0x01, 0x01];
        stream.extend(length.to_le_bytes());
        stream.extend((!length).to_le_bytes());
        stream.extend(data);
        stream.extend(adler32(data).to_be_bytes());
        stream
    }

    fn crc32(data: &[u8]) -> u32 {
        let mut crc = u32::MAX;
        for byte in data {
            crc ^= u32::from(*byte);
            for _ in 0..8 {
                crc = if crc & 1 == 1 { (crc >> 1) ^ 0xedb8_8320 } else { crc >> 1 };
            }
        }
        !crc
    }

    fn adler32(data: &[u8]) -> u32 {
        const MODULUS: u32 = 65521;
        let (mut low, mut high) = (1, 0);
        for byte in data {
            low = (low + u32::from(*byte)) % MODULUS;
            high = (high + low) % MODULUS;
        }
        high << 16 | low
    }

    /// Source: RFC 4648, section 4.
    pub(super) fn base64(data: &[u8]) -> String {
        const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
        let mut text = String::with_capacity(data.len().div_ceil(3) * 4);
        for bytes in data.chunks(3) {
            let group =
                bytes.iter().fold(0, |group, byte| group << 8 | u32::from(*byte)) << (8 * (3 - bytes.len()));
            for digit in 0..4 {
                let value = (group >> (18 - 6 * digit)) & 63;
                text.push(if digit <= bytes.len() { DIGITS[value as usize] as char } else { '=' });
            }
        }
        text
    }

    #[cfg(test)]
    mod tests {
        use super::*;

        #[test]
        fn checksums_are_the_standard_ones() {
            assert_eq!(crc32(b"123456789"), 0xcbf4_3926);
            assert_eq!(adler32(b"Wikipedia"), 0x11e6_0398);
        }

        #[test]
        fn base64_pads_to_groups_of_four() {
            assert_eq!(
                ["", "f", "fo", "foo", "foob"].map(|text| base64(text.as_bytes())),
                ["", "Zg==", "Zm8=", "Zm9v", "Zm9vYg=="]
            );
        }

        #[test]
        fn the_image_is_a_png_of_three_chunks() {
            let png = png();
            assert!(png.starts_with(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\0\x14\0\0\0\x14"));
            // The end chunk is the same in every file.
            assert!(png.ends_with(b"\0\0\0\0IEND\xaeB`\x82"));
            assert_eq!(png.len(), 8 + 12 + 13 + 12 + 11 + 1220 + 12);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OPEN: WarmupLimits = WarmupLimits {
        max_input_tokens: None,
        max_total_tokens: None,
        max_batch_prefill_tokens: TokenCount(100),
        max_batch_size: None,
    };

    /// Prompt and output tokens of each request.
    fn lengths(limits: WarmupLimits) -> Vec<(u32, u32)> {
        let requests = request(&limits).batch.unwrap().requests;
        let output = |request: &v3::Request| request.stopping_parameters.as_ref().unwrap().max_new_tokens;
        requests.iter().map(|request| (request.truncate, output(request))).collect()
    }

    fn response(capacity: Option<u32>, input: u32, total: u32) -> v3::WarmupResponse {
        v3::WarmupResponse {
            max_supported_total_tokens: capacity,
            max_input_tokens: input,
            max_total_tokens: total,
        }
    }

    #[test]
    fn prompts_fill_the_prefill_budget() {
        assert_eq!(lengths(OPEN), [(100, 1)]);
        let short = WarmupLimits { max_input_tokens: Some(TokenCount(40)), ..OPEN };
        assert_eq!(lengths(short), [(40, 1), (40, 1), (20, 1)]);
        assert_eq!(lengths(WarmupLimits { max_batch_size: Some(2), ..short }), [(40, 1), (40, 1)]);
    }

    #[test]
    fn a_prompt_leaves_room_for_one_token() {
        let total = WarmupLimits { max_total_tokens: Some(TokenCount(64)), ..OPEN };
        assert_eq!(lengths(total), [(63, 1), (37, 27)]);
    }

    #[test]
    fn only_the_first_request_has_an_image() {
        let limits = WarmupLimits { max_input_tokens: Some(TokenCount(50)), ..OPEN };
        let requests = request(&limits).batch.unwrap().requests;
        let chunks = |index: usize| requests[index].input_chunks.as_ref().unwrap().chunks.len();
        assert_eq!((requests.len(), chunks(0), chunks(1)), (2, 2, 1));
        assert_eq!(requests[1].inputs, "_test ".repeat(50));
        assert!(requests[0].inputs.contains("![](data:image/jpeg;base64;base64,iVBORw0KGgo"));
    }

    #[test]
    fn the_least_of_all_ranks_counts() {
        let answers = vec![response(Some(500), 90, 100), response(Some(400), 90, 100)];
        assert_eq!(result(answers, &OPEN).unwrap().capacity, Some(TokenCount(400)));
        let answers = vec![response(Some(500), 90, 100), response(None, 90, 100)];
        assert_eq!(result(answers, &OPEN).unwrap().capacity, None);
        assert_eq!(result(Vec::new(), &OPEN), Err(ShardError::Empty));
    }

    #[test]
    fn shards_that_change_a_given_limit_are_refused() {
        let limits = WarmupLimits { max_total_tokens: Some(TokenCount(64)), ..OPEN };
        let error = result(vec![response(None, 90, 100)], &limits).unwrap_err();
        assert_eq!(error, ShardError::Answer("max_total_tokens is 64, but warm-up made it 100".to_owned()));
    }
}
