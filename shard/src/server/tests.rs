//! The shard as a router meets it: a real socket, the generated client, and a real checkpoint with reference answers.

use std::future::pending;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::time::Duration;

use proto::v3::text_generation_service_client::TextGenerationServiceClient;
use proto::{LIVENESS_ID, v3};
use serde_json::Value;
use tonic::transport::{Channel, Endpoint};

use super::wire::tests::request;
use super::{Identity, Socket, serve};
use crate::backend::Device;
#[cfg(feature = "emulation")]
use crate::backend::{DeviceChoice, DeviceOptions};
use crate::collective::Ranks;
use crate::engine::Engine;
use crate::engine::commands::Parts;
use crate::engine::warmup::MemoryShare;
use crate::model::LoadOptions;
use crate::sampling::penalties::Watermark;
use crate::text::tokenizer::Tokenizer;
use crate::{model, text};

fn checkpoint() -> PathBuf {
    fixture("llama")
}

fn fixture(name: &str) -> PathBuf {
    [env!("CARGO_MANIFEST_DIR"), "..", "integration-tests", "fixtures", name].iter().collect()
}

/// A served checkpoint, warmed up.
struct Shard {
    client: TextGenerationServiceClient<Channel>,
    warmup: v3::WarmupResponse,
    socket: PathBuf,
    /// Holds the socket.
    _dir: tempfile::TempDir,
}

impl Shard {
    async fn start() -> Self {
        Self::of(&checkpoint()).await
    }

    async fn of(checkpoint: &Path) -> Self {
        Self::on(checkpoint, Device::cpu(NonZeroUsize::MIN).unwrap(), MemoryShare(1e-3)).await
    }

    async fn on(checkpoint: &Path, device: Device, memory: MemoryShare) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("shard-0");
        let model = model::load(checkpoint, &LoadOptions::default(), device.clone(), Ranks::alone()).unwrap();
        let sockets = vec![socket.clone(), dir.path().join("shard-1")];
        let watermark = Watermark { gamma: 0.5, delta: 2.0 };
        let identity = Identity::new(model.shape(), &device, sockets, watermark);
        let tokenizer = Tokenizer::load(checkpoint).unwrap();
        let adapters = model.adapters();
        let engine = Engine::start(Parts {
            model,
            device,
            tokenizer,
            memory,
            step_patience: Duration::from_secs(60),
            ranks: Ranks::alone(),
        })
        .unwrap();
        let bound = Socket::bind(&socket).unwrap();
        tokio::spawn(serve(engine, adapters, identity, bound, pending()));
        let endpoint = Endpoint::from_shared(format!("unix://{}", socket.display())).unwrap();
        let mut client = TextGenerationServiceClient::new(endpoint.connect().await.unwrap());
        let warmup = client.warmup(contracts_warmup()).await.unwrap().into_inner();
        Self { client, warmup, socket, _dir: dir }
    }

    /// Runs a request alone to its end, and grants it a block for every step.
    async fn generate_granting(&mut self, request: v3::Request) -> Vec<v3::Generation> {
        let id = request.id;
        let grows = request.slots.is_empty();
        let batch = v3::Batch { id: 3, size: 1, requests: vec![request], ..Default::default() };
        let prefill = v3::PrefillRequest { batch: Some(batch), ..Default::default() };
        let first = self.client.prefill(prefill).await.unwrap().into_inner();
        let (mut generations, mut batch) = (first.generations, first.batch);
        for block in 32.. {
            let Some(held) = batch else { break };
            // One block holds more than what a step feeds here.
            let tokens = Some(held.current_tokens.min(13));
            let grant = v3::Grant { request_id: id, blocks: vec![block], tokens };
            let grants = if grows { vec![grant] } else { Vec::new() };
            let step = v3::DecodeRequest { batches: vec![held], grants, drops: Vec::new() };
            let step = self.client.decode(step).await.unwrap().into_inner();
            generations.extend(step.generations);
            batch = step.batch;
        }
        generations
    }

    /// Runs a request alone to its end.
    async fn generate(&mut self, request: v3::Request) -> Vec<v3::Generation> {
        let batch = v3::Batch { id: 3, size: 1, requests: vec![request], ..Default::default() };
        let prefill = v3::PrefillRequest { batch: Some(batch), cached_batch: None, ..Default::default() };
        let first = self.client.prefill(prefill).await.unwrap().into_inner();
        let (mut generations, mut batch) = (first.generations, first.batch);
        while let Some(held) = batch {
            let step = self
                .client
                .decode(v3::DecodeRequest { batches: vec![held], ..Default::default() })
                .await
                .unwrap()
                .into_inner();
            generations.extend(step.generations);
            batch = step.batch;
        }
        generations
    }

    async fn decode_error(&mut self, id: u64) -> tonic::Status {
        let batches = vec![v3::CachedBatch { id, ..Default::default() }];
        self.client.decode(v3::DecodeRequest { batches, ..Default::default() }).await.unwrap_err()
    }
}

/// As the contract's client builds it: several requests of id 0, every sampler on, one image. Longer than the model's
/// positions, as it is when the user has set no limits.
fn contracts_warmup() -> v3::WarmupRequest {
    let image = v3::Image { data: vec![0; 8], mimetype: "image/jpeg;base64".to_owned() };
    let mut first = warmup_request(1500);
    let chunks = &mut first.input_chunks.as_mut().unwrap().chunks;
    chunks.push(v3::InputChunk { chunk: Some(v3::input_chunk::Chunk::Image(image)) });
    let requests = vec![first, warmup_request(100)];
    v3::WarmupRequest {
        batch: Some(v3::Batch { id: 0, size: 2, requests, ..Default::default() }),
        max_input_tokens: None,
        max_prefill_tokens: 1600,
        max_total_tokens: None,
    }
}

fn warmup_request(truncate: u32) -> v3::Request {
    v3::Request {
        truncate,
        add_special_tokens: true,
        prefill_logprobs: true,
        top_n_tokens: 20,
        parameters: Some(v3::NextTokenChooserParameters {
            temperature: 0.9,
            top_k: 10,
            top_p: 0.9,
            typical_p: 0.9,
            repetition_penalty: 1.2,
            frequency_penalty: 0.1,
            watermark: true,
            ..Default::default()
        }),
        stopping_parameters: Some(v3::StoppingCriteriaParameters {
            max_new_tokens: 1,
            stop_sequences: Vec::new(),
            ignore_eos_token: true,
        }),
        ..request(0, &"_test ".repeat(truncate as usize))
    }
}

fn greedy(text: &str, max_new_tokens: u32) -> v3::Request {
    let stopping = v3::StoppingCriteriaParameters { max_new_tokens, ..Default::default() };
    v3::Request {
        truncate: 1000,
        add_special_tokens: true,
        stopping_parameters: Some(stopping),
        blocks: (5..25).rev().collect(),
        slots: (5..25).rev().flat_map(|block| block * 16..block * 16 + 16).collect(),
        ..request(1, text)
    }
}

fn numbers(value: &Value) -> Vec<f32> {
    value.as_array().unwrap().iter().map(|number| number.as_f64().map_or(f32::NAN, |n| n as f32)).collect()
}

fn assert_close(found: &[f32], expected: &[f32]) {
    assert_eq!(found.len(), expected.len());
    for (index, (found, expected)) in found.iter().zip(expected).enumerate() {
        let close = (found - expected).abs() < 1e-3 || (found.is_nan() && expected.is_nan());
        assert!(close, "{index}: {found} and {expected}");
    }
}

#[tokio::test]
async fn the_reference_answers_are_reproduced_over_the_wire() {
    let mut shard = Shard::start().await;
    let file = std::fs::read(checkpoint().join("expected.json")).unwrap();
    let expected: Value = serde_json::from_slice(&file).unwrap();
    for prompt in expected["prompts"].as_array().unwrap() {
        let request = v3::Request {
            prefill_logprobs: true,
            top_n_tokens: 2,
            ..greedy(prompt["text"].as_str().unwrap(), 24)
        };
        let generations = shard.generate(request).await;
        let tokens = generations.iter().map(|generation| generation.tokens.clone().unwrap());
        let ids: Vec<u32> = tokens.clone().flat_map(|tokens| tokens.ids).collect();
        let texts: Vec<String> = tokens.clone().flat_map(|tokens| tokens.texts).collect();
        let logprobs: Vec<f32> = tokens.flat_map(|tokens| tokens.logprobs).collect();
        assert_eq!(serde_json::json!(ids), prompt["generated_ids"], "{}", prompt["name"]);
        assert_eq!(serde_json::json!(texts), prompt["stream_texts"], "{}", prompt["name"]);
        assert_close(&logprobs, &numbers(&prompt["logprobs"]));
        let prefill = generations[0].prefill_tokens.as_ref().unwrap();
        assert_eq!(serde_json::json!(prefill.ids), prompt["input_ids"]);
        assert_close(&prefill.logprobs, &numbers(&prompt["prefill_logprobs"]));
        let end = generations.last().unwrap().generated_text.as_ref().unwrap();
        // The reference has no text at all where the last character is cut; here it is the text before.
        let reference = prompt["stream_text"].as_str().unwrap();
        assert_eq!(end.text, if reference.is_empty() { texts.concat() } else { reference.to_owned() });
        assert_eq!((end.generated_tokens, end.finish_reason()), (24, v3::FinishReason::Length));
        let best: Vec<u32> = generations.iter().map(|generation| generation.top_tokens[0].ids[0]).collect();
        assert_eq!(best, ids);
    }
}

#[tokio::test]
async fn router_ids_and_the_shards_own_tokenizer_agree() {
    let mut shard = Shard::start().await;
    let text = "Once upon a time";
    let mut with_ids = greedy(text, 5);
    let tokenizer = Tokenizer::load(&checkpoint()).unwrap();
    let special = text::tokenizer::SpecialTokens::Add;
    with_ids.input_ids = tokenizer.encode(text, special, proto::units::TokenCount(1000)).unwrap();
    with_ids.input_chunks = None;
    let expected = shard.generate(greedy(text, 5)).await;
    assert_eq!(shard.generate(with_ids).await, expected);
}

#[tokio::test]
async fn the_shard_says_what_it_is_and_that_it_is_well() {
    let mut shard = Shard::start().await;
    let info = shard.client.info(v3::InfoRequest {}).await.unwrap().into_inner();
    assert_eq!((info.dtype.as_str(), info.device_type.as_str()), ("torch.bfloat16", "cpu"));
    assert_eq!((info.attention_impl.as_str(), info.block_size), ("paged", 16));
    assert_eq!(info.shared_prompt_max, None);
    assert!(info.support_chunking && info.use_prefix_caching && !info.requires_padding);
    assert_eq!(info.extensions, ["input_ids", "sampling_more", "adapters", "resume", "block_grants"]);
    assert!(info.adapters.is_empty());
    let urls =
        shard.client.service_discovery(v3::ServiceDiscoveryRequest {}).await.unwrap().into_inner().urls;
    let other = shard.socket.with_file_name("shard-1");
    assert_eq!(urls, [&shard.socket, &other].map(|path| format!("unix://{}", path.display())));
    shard.client.health(v3::HealthRequest {}).await.unwrap();
    assert_eq!((shard.warmup.max_input_tokens, shard.warmup.max_total_tokens), (1023, 1024));
    assert!(shard.warmup.max_supported_total_tokens.unwrap() > 1024);
}

#[tokio::test]
async fn a_shard_says_up_to_which_length_prompts_may_share_blocks() {
    for (name, limit) in [("llama_dynamic", 60), ("phi3_longrope", 48)] {
        let mut shard = Shard::of(&fixture(name)).await;
        let info = shard.client.info(v3::InfoRequest {}).await.unwrap().into_inner();
        assert_eq!(info.shared_prompt_max, Some(limit), "{name}");
    }
}

#[tokio::test]
async fn a_request_goes_on_bit_for_bit_also_where_angles_depend_on_the_length_of_its_prompt() {
    for (name, prompt) in [("llama", 20), ("llama_dynamic", 50), ("llama_dynamic", 70), ("phi3_longrope", 40)]
    {
        let mut shard = Shard::of(&fixture(name)).await;
        let mut whole = greedy("", 24);
        whole.input_ids = (0..prompt).map(|index| 100 + 37 * index % 800).collect();
        whole.parameters.as_mut().unwrap().temperature = 0.8;
        whole.stopping_parameters.as_mut().unwrap().ignore_eos_token = true;
        let expected = shard.generate(whole.clone()).await;
        let ids: Vec<u32> = expected.iter().flat_map(|one| one.tokens.clone().unwrap().ids).collect();
        assert_eq!(ids.len(), 24, "{name}");
        for (known, cached) in [(1, 0), (9, 0), (12, 16), (15, 32 + 1), (23, 16)] {
            // In chunks, and over blocks that are granted as they are needed; or over those of the first run, which hold
            // what it computed.
            let mut again = whole.clone();
            again.input_ids.extend(&ids[..known]);
            again.generated = known as u32;
            (again.cache_len, again.chunk_len) = (cached, (cached == 0).then_some(7));
            if cached == 0 {
                (again.blocks, again.slots) = (vec![31], Vec::new());
            }
            assert_eq!(
                shard.generate_granting(again).await,
                expected[known..],
                "{name}: after {known} tokens, {cached} cached"
            );
        }
    }
}

/// What the penalties have seen, random numbers and pages of an emulated GPU.
#[cfg(feature = "emulation")]
#[tokio::test]
async fn a_request_goes_on_over_granted_blocks_on_a_gpu() {
    let options = DeviceOptions {
        choice: DeviceChoice::Emulated,
        threads: NonZeroUsize::MIN,
        dtype: kernels::DType::F32,
        cache: None,
        batch_invariant: true,
    };
    let device = Device::open(options, &Ranks::alone()).unwrap();
    let mut shard = Shard::on(&checkpoint(), device, MemoryShare(1.0)).await;
    let info = shard.client.info(v3::InfoRequest {}).await.unwrap().into_inner();
    assert_eq!(info.device_type, "cuda");
    let mut whole = greedy("", 8);
    whole.input_ids = (0..20).map(|index| 100 + 37 * index % 800).collect();
    let parameters = whole.parameters.as_mut().unwrap();
    (parameters.temperature, parameters.seed, parameters.repetition_penalty) = (1.2, 11, 1.5);
    (parameters.frequency_penalty, parameters.count_penalty, parameters.watermark) = (3.0, 2.0, true);
    whole.stopping_parameters.as_mut().unwrap().ignore_eos_token = true;
    let ids = |generations: &[v3::Generation]| -> Vec<u32> {
        generations.iter().flat_map(|one| one.tokens.clone().unwrap().ids).collect()
    };
    let expected = ids(&shard.generate(whole.clone()).await);
    for known in [1, 6] {
        let mut again = whole.clone();
        again.input_ids.extend(&expected[..known]);
        again.generated = known as u32;
        again.chunk_len = Some(14);
        (again.blocks, again.slots) = (vec![31], Vec::new());
        assert_eq!(ids(&shard.generate_granting(again).await), expected[known..], "after {known} tokens");
    }
}

#[tokio::test]
async fn a_step_that_is_refused_is_an_invalid_argument_and_leaves_all_as_it_was() {
    let mut shard = Shard::start().await;
    let batch = |id, requests| Some(v3::Batch { id, requests, ..Default::default() });
    let onto = |id| Some(v3::CachedBatch { id, ..Default::default() });
    let granted = v3::Request { blocks: vec![7], slots: Vec::new(), ..greedy("Once", 30) };
    let prefill = v3::PrefillRequest { batch: batch(1, vec![granted]), ..Default::default() };
    let held = shard.client.prefill(prefill).await.unwrap().into_inner().batch.unwrap();
    let grants = |blocks: &[u32]| vec![v3::Grant { request_id: 1, blocks: blocks.to_vec(), tokens: None }];
    let decode = |grants, drops| v3::DecodeRequest { batches: vec![held.clone()], grants, drops };
    let mut refused = Vec::new();
    refused.push(shard.client.decode(decode(grants(&[0]), vec![])).await.unwrap_err());
    refused.push(shard.client.decode(decode(vec![], vec![1])).await.unwrap_err());
    let bad = v3::Request { id: 5, generated: 3, ..greedy("Once", 30) };
    let prefill = v3::PrefillRequest {
        batch: batch(2, vec![bad]),
        cached_batch: onto(1),
        grants: grants(&[8]),
        drops: vec![],
    };
    refused.push(shard.client.prefill(prefill).await.unwrap_err());
    let found: Vec<_> = refused.iter().map(|status| (status.code(), status.message())).collect();
    let invalid = tonic::Code::InvalidArgument;
    assert_eq!(
        found,
        [
            (invalid, "request 1: block 0 is reserved"),
            (invalid, "all requests of the batches leave; clear the batches instead"),
            (invalid, "request 5: generated is 3, but must be below the number of input_ids, which is 0"),
        ]
    );
    let step = shard.client.decode(decode(grants(&[8]), vec![])).await.unwrap().into_inner();
    assert_eq!((step.generations.len(), step.batch.unwrap().max_tokens), (1, 32));
    // What the shard does not hold is lost, whatever is said about it.
    let batches = vec![v3::CachedBatch { id: 9, ..Default::default() }];
    let lost = v3::DecodeRequest { batches, grants: grants(&[8]), drops: vec![] };
    assert_eq!(shard.client.decode(lost).await.unwrap_err().code(), tonic::Code::Internal);
}

#[tokio::test]
async fn limits_of_the_user_come_back_from_the_warm_up() {
    let mut shard = Shard::start().await;
    let limits = |input, total| v3::WarmupRequest {
        max_input_tokens: Some(input),
        max_total_tokens: Some(total),
        ..contracts_warmup()
    };
    let answer = shard.client.warmup(limits(300, 400)).await.unwrap().into_inner();
    assert_eq!((answer.max_input_tokens, answer.max_total_tokens), (300, 400));
    let status = shard.client.warmup(limits(300, 2000)).await.unwrap_err();
    assert!(status.message().contains("--max-total-tokens"), "{status}");
}

#[tokio::test]
async fn errors_are_internal_with_the_contracts_text() {
    let mut shard = Shard::start().await;
    let status = shard.decode_error(42).await;
    assert_eq!((status.code(), status.message()), (tonic::Code::Internal, "Batch ID 42 not found in cache."));
    let status = shard.client.prefill(v3::PrefillRequest::default()).await.unwrap_err();
    assert_eq!((status.code(), status.message()), (tonic::Code::Internal, "batch is missing"));
}

#[tokio::test]
async fn batches_are_joined_filtered_and_cleared_over_the_wire() {
    let mut shard = Shard::start().await;
    let batch = |id: u64, requests: &[u64]| {
        let place = |request: &u64| {
            let first = 10 * *request as u32;
            v3::Request {
                id: *request,
                blocks: (first..first + 3).collect(),
                slots: (first * 16..first * 16 + 48).collect(),
                ..greedy("Once", 30)
            }
        };
        Some(v3::Batch { id, requests: requests.iter().map(place).collect(), ..Default::default() })
    };
    let held = |id| v3::CachedBatch { id, ..Default::default() };
    shard
        .client
        .prefill(v3::PrefillRequest { batch: batch(1, &[4, 5]), cached_batch: None, ..Default::default() })
        .await
        .unwrap();
    let joined =
        v3::PrefillRequest { batch: batch(2, &[6]), cached_batch: Some(held(1)), ..Default::default() };
    let joined = shard.client.prefill(joined).await.unwrap().into_inner();
    assert_eq!(joined.batch.unwrap().request_ids, [4, 5, 6]);
    assert!(joined.concat_ns.is_some());
    let filter = v3::FilterBatchRequest { batch_id: 1, request_ids: vec![6, 4] };
    let kept = shard.client.filter_batch(filter).await.unwrap().into_inner().batch.unwrap();
    assert_eq!((kept.request_ids.as_slice(), kept.size, kept.max_tokens), (&[6, 4][..], 2, 96));
    assert_eq!(kept.current_tokens, 2);
    shard.client.clear_cache(v3::ClearCacheRequest { id: Some(1) }).await.unwrap();
    assert!(shard.decode_error(1).await.message().contains("not found"));
}

#[tokio::test]
async fn the_liveness_probe_of_either_router_is_answered() {
    let mut shard = Shard::start().await;
    for (truncate, add_special_tokens, slots) in [(1, false, 1), (10, true, 16)] {
        let mut probe = greedy("liveness", 1);
        probe.id = LIVENESS_ID;
        probe.truncate = truncate;
        probe.add_special_tokens = add_special_tokens;
        probe.blocks = vec![0];
        probe.slots = (0..slots).collect();
        assert_eq!(shard.generate(probe).await.len(), 1);
    }
}

#[tokio::test]
async fn the_socket_goes_when_the_server_stops() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("shard-0");
    let device = Device::cpu(NonZeroUsize::MIN).unwrap();
    let model = model::load(&checkpoint(), &LoadOptions::default(), device.clone(), Ranks::alone()).unwrap();
    let watermark = Watermark { gamma: 0.5, delta: 2.0 };
    let identity = Identity::new(model.shape(), &device, vec![path.clone()], watermark);
    let tokenizer = Tokenizer::load(&checkpoint()).unwrap();
    let adapters = model.adapters();
    let parts = Parts {
        model,
        device,
        tokenizer,
        memory: MemoryShare(1e-3),
        step_patience: Duration::from_secs(60),
        ranks: Ranks::alone(),
    };
    let engine = Engine::start(parts).unwrap();
    let socket = Socket::bind(&path).unwrap();
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let server = tokio::spawn(serve(engine, adapters, identity, socket, async { stopped.await.unwrap() }));
    assert!(path.exists());
    stop.send(()).unwrap();
    server.await.unwrap().unwrap();
    assert!(!path.exists());
}

#[tokio::test]
async fn an_adapter_that_is_not_loaded_is_refused_by_name_and_one_that_is_none_is_not_loaded() {
    let mut shard = Shard::start().await;
    let batch = v3::Batch {
        id: 1,
        requests: vec![v3::Request { adapter_id: Some("poet".to_owned()), ..request(5, "hello") }],
        ..Default::default()
    };
    let prefill = v3::PrefillRequest { batch: Some(batch), cached_batch: None, ..Default::default() };
    let refused = shard.client.prefill(prefill).await.unwrap_err();
    assert_eq!(refused.message(), "request 5: adapter `poet` is not loaded");
    let load = v3::LoadAdapterRequest { id: "poet".to_owned(), path: "/no/adapter".to_owned() };
    let refused = shard.client.load_adapter(load).await.unwrap_err();
    assert!(refused.message().contains("/no/adapter/adapter_config.json"), "{refused}");
    let unload = v3::UnloadAdapterRequest { id: "poet".to_owned() };
    shard.client.unload_adapter(unload).await.unwrap();
}
