//! The route table and the layer stack.
//!
//! - `body.rs`: JSON in; `error.rs`: errors out, the only place with status codes.
//! - `gate.rs`: who is let in, and when; `auth.rs`: the API-key layer.
//! - `generate.rs`, `native.rs`: the native routes and their answers; `openai/`: OpenAI's.
//! - `tokenize.rs`; `status.rs`: health, info, metrics; `adapters.rs`: adapters come and go.
//! - `terms.rs`, `headers.rs`: what headers say, of requests and of answers; `sse.rs`: how streams leave.
//!
//! What is absent: decisions. Handlers translate between JSON and the core's types.

use std::sync::Arc;

use axum::Router;
use axum::extract::Request;
use axum::middleware::from_fn_with_state;
use axum::routing::{get, post};
use http::Method;
use http::header::{
    ACCESS_CONTROL_REQUEST_HEADERS, ACCESS_CONTROL_REQUEST_METHOD, AUTHORIZATION, CONTENT_TYPE, HeaderName,
    HeaderValue, ORIGIN,
};
use tower_http::catch_panic::CatchPanicLayer;
use tower_http::cors::{AllowOrigin, CorsLayer};
use tower_http::trace::TraceLayer;

pub(crate) use self::auth::ApiKey;
pub(crate) use self::gate::Gate;
pub(crate) use self::status::Info;
use crate::adapters::Adapters;
use crate::availability::Availability;
use crate::chat::template::ChatTemplate;
use crate::infer::Infer;
use crate::metrics::Metrics;
use crate::request::terms::{PRIORITY, TIMEOUT};
use crate::text::Tokenizer;

mod adapters;
mod auth;
mod body;
mod error;
mod gate;
mod generate;
mod headers;
mod native;
mod openai;
mod sse;
mod status;
mod terms;
mod tokenize;

#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;

/// What handlers work with.
#[derive(Debug)]
pub(crate) struct App {
    pub(crate) infer: Infer,
    pub(crate) tokenizer: Tokenizer,
    pub(crate) template: ChatTemplate,
    pub(crate) adapters: Adapters,
    pub(crate) metrics: Metrics,
    pub(crate) availability: Availability,
    pub(crate) info: Info,
    /// Value of `x-compute-type`.
    pub(crate) compute_type: HeaderValue,
    pub(crate) body_bytes_max: usize,
}

/// Who may use the routes.
#[derive(Clone, Debug, Default)]
pub(crate) struct Access {
    /// Without a key, everybody.
    pub(crate) api_key: Option<ApiKey>,
    /// Web pages that may; empty, or with `*` among them, is all.
    pub(crate) origins: Vec<HeaderValue>,
}

/// All routes.
pub(crate) fn router(app: Arc<App>, access: &Access) -> Router {
    // A path belongs to one side with all its methods, so that a wrong method without the key is a 401 too.
    let mut protected = Router::new()
        .route("/", post(generate::root).get(status::health))
        .route("/generate", post(generate::generate))
        .route("/generate_stream", post(generate::generate_stream))
        .route("/tokenize", post(tokenize::tokenize))
        .route("/chat_tokenize", post(tokenize::chat_tokenize))
        .route("/v1/chat/completions", post(openai::chat::chat_completions))
        .route("/v1/load_lora_adapter", post(adapters::load))
        .route("/v1/unload_lora_adapter", post(adapters::unload))
        .route_layer(from_fn_with_state(app.availability.clone(), gate::admit));
    if let Some(key) = &access.api_key {
        protected = protected.route_layer(from_fn_with_state(key.clone(), auth::require_key));
    }
    let open = operators().route("/ping", get(status::health)).route("/info", get(status::info));
    protected
        .merge(open)
        .with_state(app)
        // The last layer is the first that a request meets. Panics turn into answers inside of CORS, so that browsers
        // may read them; CORS answers preflights, which carry no key, before the key is asked for.
        .layer(CatchPanicLayer::custom(error::panicked))
        .layer(cors(access))
        .layer(TraceLayer::new_for_http().make_span_with(
            |request: &Request| tracing::info_span!("http", method = %request.method(), path = request.uri().path()),
        ))
}

/// The routes of the listener for operators' tools.
pub(crate) fn operators_router(app: Arc<App>) -> Router {
    operators().with_state(app)
}

fn operators() -> Router<Arc<App>> {
    Router::new().route("/health", get(status::health)).route("/metrics", get(status::metrics))
}

fn cors(access: &Access) -> CorsLayer {
    let origins = match access.origins.as_slice() {
        [] => AllowOrigin::any(),
        // A list with the wildcard in it is not a list of origins, and the library panics on it.
        origins if origins.iter().any(|origin| origin == "*") => AllowOrigin::any(),
        origins => AllowOrigin::list(origins.iter().cloned()),
    };
    CorsLayer::new()
        .allow_origin(origins)
        .allow_methods([Method::GET, Method::POST])
        .allow_headers([
            CONTENT_TYPE,
            AUTHORIZATION,
            HeaderName::from_static(PRIORITY),
            HeaderName::from_static(TIMEOUT),
        ])
        // On every answer, as TGI has it, so that no cache mixes up origins.
        .vary([ORIGIN, ACCESS_CONTROL_REQUEST_METHOD, ACCESS_CONTROL_REQUEST_HEADERS])
}
