//! Routes, layers and handlers together, over a scripted batcher.

use http::{HeaderValue, StatusCode};
use serde_json::{Value, json};

use super::testing::{Answer, Setup, answer, answer_cached, send, step};
use super::{Access, ApiKey};
use crate::batching::{Event, Finished, Waiting};

mod end;
mod failures;
mod start;
mod terms;

const PARIS: &[&str] = &["Par", "is", "</s>"];

fn generate(parameters: Value) -> Value {
    json!({ "inputs": "a b", "parameters": parameters })
}

fn chat(more: Value) -> Value {
    let mut body = json!({ "messages": [{ "role": "user", "content": "a b" }] });
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    body
}

fn has_header(answer: &Answer, name: &str) -> bool {
    answer.headers.contains_key(name)
}

mod native {
    use super::*;

    #[tokio::test]
    async fn generate_answers_with_the_text_and_its_headers() {
        let answer = Setup::default().answering(PARIS).post("/generate", &generate(json!({}))).await;
        assert_eq!((answer.status, answer.json()), (StatusCode::OK, json!({"generated_text": "Paris"})));
        assert_eq!(answer.headers["x-compute-type"], "1-test");
        assert_eq!(answer.headers["x-compute-characters"], "3");
        assert_eq!(answer.headers["x-prompt-tokens"], "3");
        assert_eq!(answer.headers["x-cached-tokens"], "0");
        assert_eq!(answer.headers["x-generated-tokens"], "3");
        for name in ["compute", "total", "validation", "queue", "inference"] {
            assert!(has_header(&answer, &format!("x-{name}-time")), "{name}");
        }
        assert!(has_header(&answer, "x-time-per-token") && !has_header(&answer, "x-accel-buffering"));
    }

    #[tokio::test]
    async fn details_hold_every_token() {
        let parameters = json!({"decoder_input_details": true, "top_n_tokens": 1, "max_new_tokens": 2});
        let answer = Setup::default().answering(PARIS).post("/generate", &generate(parameters)).await;
        let token = |id: u32, text: &str| json!({"id": id, "text": text, "logprob": -0.5, "special": false});
        let expected = json!({
            "generated_text": "Paris",
            "details": {
                "finish_reason": "length", "generated_tokens": 2, "seed": null,
                "prefill": [{"id": 0, "text": "0", "logprob": null}, {"id": 1, "text": "1", "logprob": -1.0},
                            {"id": 2, "text": "2", "logprob": -1.0}],
                "tokens": [token(0, "Par"), token(1, "is")],
                "top_tokens": [[token(0, "other")], [token(1, "other")]],
            }
        });
        assert_eq!(answer.json(), expected);
    }

    #[tokio::test]
    async fn absent_parameters_sample_and_empty_ones_do_not() {
        let (client, mut mail) = Setup::default().start();
        let mut sampled = async |body: Value| {
            let ask = client.post("/generate", &body);
            let reply = async {
                let waiting = mail.recv().await.unwrap();
                answer(&waiting, PARIS).await;
                waiting.request.sampling.do_sample
            };
            tokio::join!(ask, reply).1
        };
        assert!(sampled(json!({"inputs": "a"})).await);
        assert!(!sampled(json!({"inputs": "a", "parameters": {}})).await);
    }

    #[tokio::test]
    async fn the_root_route_returns_a_list_with_the_prompt_in_front() {
        let client = Setup::default().answering(PARIS);
        let root = client.post("/", &generate(json!({}))).await;
        assert_eq!(root.json(), json!([{"generated_text": "a bParis"}]));
        let root = client.post("/", &generate(json!({"return_full_text": false}))).await;
        assert_eq!(root.json(), json!([{"generated_text": "Paris"}]));
        let plain =
            client.post("/generate", &generate(json!({"return_full_text": true, "truncate": 2}))).await;
        assert_eq!(plain.json()["generated_text"], "a bParis", "the prompt as it was sent");
        assert_eq!(plain.headers["x-prompt-tokens"], "2");
    }

    #[tokio::test]
    async fn a_stream_has_one_event_per_token() {
        let client = Setup::default().answering(PARIS);
        let answer = client.post("/generate_stream", &generate(json!({"details": true}))).await;
        assert_eq!(answer.headers["content-type"], "text/event-stream");
        assert_eq!(answer.headers["cache-control"], "no-cache");
        assert_eq!(answer.headers["x-accel-buffering"], "no");
        assert!(has_header(&answer, "x-compute-type") && !has_header(&answer, "x-total-time"));
        let event = |index: u32, text: &str, special: bool| {
            let token = json!({"id": index - 1, "text": text, "logprob": -0.5, "special": special});
            json!({"index": index, "token": token, "generated_text": null, "details": null})
        };
        let mut last = event(3, "</s>", true);
        last["generated_text"] = json!("Paris");
        last["details"] =
            json!({"finish_reason": "eos_token", "generated_tokens": 3, "seed": null, "input_length": 3});
        assert_eq!(answer.events(), [event(1, "Par", false), event(2, "is", false), last]);
    }

    #[tokio::test]
    async fn the_best_of_several_sequences_wins() {
        let (client, mut mail) = Setup::default().start();
        let body = generate(json!({"best_of": 2, "do_sample": true, "details": true}));
        let reply = async {
            let waiting = [mail.recv().await.unwrap(), mail.recv().await.unwrap()];
            let seeds = waiting.each_ref().map(|waiting| waiting.request.sampling.seed);
            assert_eq!(seeds[0].wrapping_add(1), seeds[1]);
            for (waiting, logprob) in std::iter::zip(&waiting, [-2.0, -1.0]) {
                last(waiting, &logprob.to_string(), logprob).await;
            }
        };
        let (answer, ()) = tokio::join!(client.post("/generate", &body), reply);
        let answer = answer.json();
        assert_eq!(answer["generated_text"], "-1");
        assert_eq!(answer["details"]["best_of_sequences"][0]["generated_text"], "-2");
        assert_eq!(answer["details"]["best_of_sequences"][0]["generated_tokens"], 1);
    }

    async fn last(waiting: &Waiting, text: &str, logprob: f32) {
        let mut step = step(&[text], 0, 0);
        step.token.logprob = logprob;
        let finished = Finished {
            text: text.to_owned(),
            tokens: proto::units::TokenCount(1),
            reason: crate::batching::FinishReason::Length,
            seed: None,
            queued: waiting.queued,
            started: waiting.queued,
            cached: proto::units::TokenCount(0),
        };
        send(waiting, Event::Last(step, finished)).await;
    }

    #[tokio::test]
    async fn tokens_carry_byte_offsets() {
        let client = Setup::default().answering(PARIS);
        let answer = client.post("/tokenize", &json!({"inputs": "é b", "parameters": {"truncate": 1}})).await;
        let token = |id: u32, text: &str, start: u32, stop: u32| json!({"id": id, "text": text, "start": start, "stop": stop});
        assert_eq!(answer.json(), json!([token(0, "", 0, 0), token(8, "é", 0, 2), token(2, "b", 3, 4)]));
        let answer = client.post("/chat_tokenize", &chat(json!({}))).await;
        let tokens = json!([token(1, "a", 0, 1), token(2, "b", 2, 3)]);
        assert_eq!(answer.json(), json!({"tokenize_response": tokens, "templated_text": "a b "}));
    }

    #[tokio::test]
    async fn what_is_not_there_is_refused() {
        let client = Setup::default().answering(PARIS);
        let answer = client.post("/generate", &generate(json!({"adapter_id": "x"}))).await;
        answer.assert_error(
            404,
            "adapter_not_found",
            "`adapter_id` is `x`, but no adapter of this name is loaded",
        );
        let answer =
            client.post("/generate", &generate(json!({"grammar": {"type": "regex", "value": "a"}}))).await;
        answer.assert_error(422, "validation", "Input validation error: `grammar` is not supported");
    }
}

mod openai {
    use super::*;

    const CHAT: &str = "/v1/chat/completions";

    #[tokio::test]
    async fn a_chat_is_answered_by_the_assistant() {
        let client = Setup::default().answering(PARIS);
        let answer = client.post(CHAT, &chat(json!({"model": "tgi"}))).await;
        let mut body = answer.json();
        let id = body["id"].take();
        assert!(id.as_str().unwrap().starts_with("chatcmpl-"));
        assert!(body["created"].take().is_u64());
        let expected = json!({
            "object": "chat.completion", "id": null, "created": null, "model": "acme/tiny",
            "system_fingerprint": "4.0.0-native",
            "choices": [{"index": 0, "message": {"role": "assistant", "content": "Paris"}, "logprobs": null,
                         "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5},
        });
        assert_eq!(body, expected);
        assert_eq!(answer.headers["x-compute-characters"], "4", "of the rendered prompt");
    }

    #[tokio::test]
    async fn a_stream_ends_with_the_usage_and_the_terminator() {
        let client = Setup::default().answering(PARIS);
        let body = chat(json!({"stream": true, "stream_options": {"include_usage": true}, "model": "other"}));
        let events = client.post(CHAT, &body).await.events();
        let choice = |content: &str, reason: Option<&str>| {
            json!([{"index": 0, "delta": {"role": "assistant", "content": content}, "logprobs": null,
                    "finish_reason": reason}])
        };
        let choices: Vec<_> = events[..4].iter().map(|event| event["choices"].clone()).collect();
        assert_eq!(choices, [choice("Par", None), choice("is", None), choice("", Some("stop")), json!([])]);
        assert_eq!(events[2]["usage"], Value::Null);
        let usage = json!({"prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5});
        assert_eq!(events[3]["usage"], usage);
        assert_eq!(events[4], "[DONE]");
        assert_eq!(
            (events.len(), &events[0]["id"], &events[0]["model"]),
            (5, &events[3]["id"], &json!("other"))
        );
    }

    #[tokio::test]
    async fn the_usage_says_what_was_found_in_the_cache_unless_a_client_of_tgi_asks() {
        let usage = async |more: Value, cached: [u32; 2]| {
            let (client, mut mail) = Setup::default().start();
            let choices = if more["n"] == 2 { 2 } else { 1 };
            let reply = async {
                for cached in &cached[..choices] {
                    answer_cached(&mail.recv().await.unwrap(), PARIS, *cached).await;
                }
            };
            let body = chat(more);
            let (answer, ()) = tokio::join!(client.post(CHAT, &body), reply);
            if body["stream"] == true {
                answer.events()[3 * choices]["usage"].clone()
            } else {
                answer.json()["usage"].clone()
            }
        };
        let details = |cached: u32| json!({"cached_tokens": cached});
        let stream = json!({"stream": true, "stream_options": {"include_usage": true}});
        for more in [json!({}), stream.clone(), json!({"model": "acme/tiny"})] {
            assert_eq!(usage(more.clone(), [1, 0]).await["prompt_tokens_details"], details(1));
            assert_eq!(usage(more, [0, 0]).await.get("prompt_tokens_details"), None);
        }
        assert_eq!(usage(json!({"model": "tgi"}), [1, 0]).await.get("prompt_tokens_details"), None);
        // The second choice finds what the first has left.
        for mut two in [json!({}), stream] {
            two["n"] = json!(2);
            assert_eq!(usage(two.clone(), [1, 2]).await["prompt_tokens_details"], details(1));
            assert_eq!(usage(two, [0, 2]).await.get("prompt_tokens_details"), None);
        }
    }

    #[tokio::test]
    async fn stop_strings_are_left_out_whole_or_streamed() {
        let client = Setup::default().answering(&["a S", "TO", "P b", "</s>"]);
        let answer = client.post(CHAT, &chat(json!({"stop": "STOP"}))).await.json();
        assert_eq!(answer["choices"][0]["message"]["content"], "a ");
        assert_eq!(answer["choices"][0]["finish_reason"], "stop");
        let events = client.post(CHAT, &chat(json!({"stop": ["STOP"], "stream": true}))).await.events();
        let contents = events.iter().map(|event| event["choices"][0]["delta"]["content"].as_str());
        assert_eq!(contents.flatten().collect::<Vec<_>>(), ["a ", "", "", ""]);
    }

    #[tokio::test]
    async fn logprobs_have_an_entry_per_token() {
        let client = Setup::default().answering(PARIS);
        let answer = client.post(CHAT, &chat(json!({"logprobs": true, "top_logprobs": 1}))).await.json();
        let content = answer["choices"][0]["logprobs"]["content"].as_array().unwrap();
        assert_eq!(content.len(), 3);
        let other = json!([{"token": "other", "logprob": -0.5}]);
        assert_eq!(content[2], json!({"token": "</s>", "logprob": -0.5, "top_logprobs": other}));
    }

    #[tokio::test]
    async fn every_choice_is_generated_with_its_own_seed() {
        let (client, mut mail) = Setup::default().start();
        let body = chat(json!({"n": 2, "seed": 7, "stream": true}));
        let reply = async {
            for seed in [7, 8] {
                let waiting = mail.recv().await.unwrap();
                assert_eq!(waiting.request.sampling.seed, seed);
                answer(&waiting, PARIS).await;
            }
        };
        let (streamed, ()) = tokio::join!(client.post(CHAT, &body), reply);
        let events = streamed.events();
        for index in 0..2 {
            let of_choice =
                events.iter().map(|event| &event["choices"][0]).filter(|choice| choice["index"] == index);
            let texts = of_choice.map(|choice| choice["delta"]["content"].as_str().unwrap());
            assert_eq!(texts.collect::<String>(), "Paris");
        }
        assert_eq!(events.len(), 7);
    }

    #[tokio::test]
    async fn openai_parameters_reach_the_sampler() {
        let (client, mut mail) = Setup::default().start();
        let body = chat(json!({
            "temperature": 0, "top_p": 0.5, "presence_penalty": 0.5, "frequency_penalty": 0.25, "min_p": 0.1,
            "logit_bias": {"3": -1.5}, "max_tokens": 1, "max_completion_tokens": 2, "seed": 5, "stop": "x",
        }));
        let reply = async {
            let waiting = mail.recv().await.unwrap();
            answer(&waiting, PARIS).await;
            waiting.request
        };
        let (_, request) = tokio::join!(client.post(CHAT, &body), reply);
        let sampling = request.sampling;
        assert_eq!((sampling.do_sample, sampling.temperature, sampling.top_p), (false, 1.0, 1.0));
        assert_eq!((sampling.presence_penalty, sampling.count_penalty), (0.5, 0.25));
        assert_eq!((sampling.frequency_penalty, sampling.seed), (0.0, 5));
        assert_eq!(sampling.logit_bias, [(proto::units::TokenId(3), -1.5)]);
        assert_eq!(request.stopping.max_new_tokens.0, 2);
        assert_eq!(request.stopping.stop_sequences, ["x"]);
        assert!(!request.prompt.add_special_tokens);
    }

    #[tokio::test]
    async fn what_would_change_the_answer_but_is_not_there_is_refused() {
        let client = Setup::default().answering(PARIS);
        let tools = json!([{"type": "function", "function": {"name": "f"}}]);
        let refused = async |more: Value, name: &str| {
            let message = format!("Input validation error: `{name}` is not supported");
            client.post(CHAT, &chat(more)).await.assert_error(422, "validation", &message);
        };
        refused(json!({"tools": tools}), "tools").await;
        refused(json!({"response_format": {"type": "json_object"}}), "response_format").await;
        let image =
            json!([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://a"}}]}]);
        refused(json!({"messages": image}), "image_url").await;
        let both = chat(json!({"tools": [], "response_format": {"type": "regex", "value": "a"}}));
        let message = "Tool error: Grammar and tools are mutually exclusive";
        client.post(CHAT, &both).await.assert_error(422, "tool_error", message);
        for fine in [
            json!({"tools": tools, "tool_choice": "none"}),
            json!({"tools": [], "tool_choice": "auto"}),
            json!({"response_format": {"type": "text"}}),
        ] {
            assert_eq!(client.post(CHAT, &chat(fine)).await.status, StatusCode::OK);
        }
    }

    #[tokio::test]
    async fn without_a_template_chats_are_refused_and_the_rest_works() {
        let client = Setup { template: None, ..Setup::default() }.answering(PARIS);
        let message = "Template error: template not found: the model's files have no chat template";
        client.post(CHAT, &chat(json!({"stream": true}))).await.assert_error(422, "template_error", message);
        assert_eq!(client.post("/generate", &generate(json!({}))).await.status, StatusCode::OK);
        let client = Setup::default().answering(PARIS);
        let empty = client.post(CHAT, &json!({"messages": []})).await;
        empty.assert_error(422, "template_error", "Template error: `messages` is empty");
    }

    #[tokio::test]
    async fn a_final_answer_is_continued() {
        let client = Setup::default().answering(PARIS);
        let said = json!([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b "}]);
        let answer = client.post("/chat_tokenize", &json!({"messages": said})).await;
        assert_eq!(answer.json()["templated_text"], "a b");
    }
}

mod layers {
    use super::*;

    fn keyed() -> Setup {
        Setup {
            access: Access { api_key: Some(ApiKey::new("secret")), origins: Vec::new() },
            ..Setup::default()
        }
    }

    #[tokio::test]
    async fn every_route_needs_the_key_unless_it_is_open() {
        let client = keyed().answering(PARIS);
        for path in ["/health", "/ping", "/info", "/metrics"] {
            assert_eq!(client.get(path).await.status, StatusCode::OK, "{path}");
        }
        for path in
            ["/", "/generate", "/generate_stream", "/tokenize", "/chat_tokenize", "/v1/chat/completions"]
        {
            for method in ["POST", "GET", "DELETE"] {
                let answer = client.ask(method, path, &[], "{nonsense").await;
                assert_eq!((answer.status.as_u16(), answer.text.as_str()), (401, ""), "{method} {path}");
                assert!(has_header(&answer, "access-control-allow-origin"));
            }
        }
        let key = ("authorization", "Bearer secret");
        let json = ("content-type", "application/json");
        let answer = client.ask("POST", "/tokenize", &[key, json], r#"{"inputs": "a"}"#).await;
        assert_eq!(answer.status, StatusCode::OK);
    }

    #[tokio::test]
    async fn unknown_paths_and_methods_have_empty_answers() {
        let client = Setup::default().answering(PARIS);
        let answer = client.get("/nope").await;
        assert_eq!((answer.status.as_u16(), answer.text.as_str()), (404, ""));
        let answer = client.get("/generate").await;
        assert_eq!((answer.status.as_u16(), answer.text.as_str()), (405, ""));
        assert!(has_header(&answer, "allow") && has_header(&answer, "access-control-allow-origin"));
    }

    #[tokio::test]
    async fn preflights_are_answered_without_the_key() {
        let client = keyed().answering(PARIS);
        let ask = [
            ("origin", "https://a.example"),
            ("access-control-request-method", "POST"),
            ("access-control-request-headers", "authorization,x-priority"),
        ];
        let answer = client.ask("OPTIONS", "/generate", &ask, "").await;
        assert_eq!((answer.status.as_u16(), answer.text.as_str()), (200, ""));
        assert_eq!(answer.headers["access-control-allow-methods"], "GET,POST");
        let allowed = "content-type,authorization,x-priority,x-request-timeout";
        assert_eq!(answer.headers["access-control-allow-headers"], allowed);
        assert_eq!(answer.headers["access-control-allow-origin"], "*");
    }

    #[tokio::test]
    async fn a_wildcard_among_the_origins_allows_all() {
        let origins = ["https://a.example", "*"].map(HeaderValue::from_static).to_vec();
        let access = Access { origins, ..Access::default() };
        let (client, _mail) = Setup { access, ..Setup::default() }.start();
        let answer = client.ask("GET", "/info", &[("origin", "https://b.example")], "").await;
        assert_eq!(answer.headers["access-control-allow-origin"], "*");
    }

    #[tokio::test]
    async fn listed_origins_are_echoed() {
        let origins = vec![HeaderValue::from_static("https://a.example")];
        let access = Access { origins, ..Access::default() };
        let client = Setup { access, ..Setup::default() }.answering(PARIS);
        let known = client.ask("GET", "/info", &[("origin", "https://a.example")], "").await;
        assert_eq!(known.headers["access-control-allow-origin"], "https://a.example");
        let unknown = client.ask("GET", "/info", &[("origin", "https://b.example")], "").await;
        assert!(!has_header(&unknown, "access-control-allow-origin"));
    }
}

mod status {
    use super::*;

    #[tokio::test]
    async fn health_is_an_empty_200_or_a_503_with_the_reason() {
        for path in ["/health", "/", "/ping"] {
            let healthy = Setup::default().answering(PARIS).get(path).await;
            assert_eq!((healthy.status.as_u16(), healthy.text.as_str()), (200, ""));
        }
        let setup = Setup::default();
        let availability = setup.availability.clone();
        let client = setup.answering(PARIS);
        availability.recovering("shard 0 has ended");
        let answer = client.get("/health").await;
        answer.assert_error(503, "healthcheck", "unhealthy");
        let body = answer.json();
        assert_eq!((&body["status"], &body["reason"]), (&json!("recovering"), &json!("shard 0 has ended")));
        let served = client.post("/generate", &generate(json!({}))).await;
        assert_eq!(served.status, StatusCode::OK, "requests wait for the shards");
        availability.failed("no shard starts any more");
        let body = client.get("/health").await.json();
        assert_eq!((&body["status"], &body["error_type"]), (&json!("unhealthy"), &json!("healthcheck")));
    }

    #[tokio::test]
    async fn without_a_batcher_the_server_is_unhealthy() {
        let (client, mail) = Setup::default().start();
        drop(mail);
        let health = client.get("/health").await.json();
        assert_eq!(
            (&health["status"], &health["reason"]),
            (&json!("unhealthy"), &json!("the batcher has stopped"))
        );
        let answer = client.post("/generate", &generate(json!({}))).await;
        let message = "Request failed during generation: the batcher has stopped";
        answer.assert_error(503, "generation", message);
    }

    #[tokio::test]
    async fn health_answers_under_overload() {
        let (client, mut mail) = Setup::default().start();
        let body = generate(json!({"best_of": 2, "do_sample": true}));
        let busy = tokio::spawn({
            let client = client.clone();
            async move { client.post("/generate", &body).await }
        });
        let waiting = [mail.recv().await.unwrap(), mail.recv().await.unwrap()];
        assert_eq!(client.post("/generate", &generate(json!({}))).await.status.as_u16(), 429);
        assert_eq!(client.get("/health").await.status, StatusCode::OK);
        for waiting in &waiting {
            answer(waiting, PARIS).await;
        }
        assert_eq!(busy.await.unwrap().status, StatusCode::OK);
    }

    #[tokio::test]
    async fn info_tells_what_is_served() {
        let info = Setup::default().answering(PARIS).get("/info").await.json();
        assert_eq!((&info["model_id"], &info["model_sha"]), (&json!("acme/tiny"), &Value::Null));
        assert_eq!(info["max_total_tokens"], 10);
    }

    #[tokio::test]
    async fn metrics_are_text() {
        let answer = Setup::default().answering(PARIS).get("/metrics").await;
        assert_eq!(answer.headers["content-type"], "text/plain; charset=utf-8");
        assert!(answer.text.contains("# TYPE tgi_request_count counter"));
    }
}
