//! Who is let in: nobody before there are routes, and no new work once the end has begun.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll};

use axum::Router;
use axum::body::{Body, Bytes, HttpBody};
use axum::extract::{Request, State};
use axum::middleware::Next;
use axum::response::Response;
use axum::routing::future::RouteFuture;
use axum::routing::get;
use http::Method;
use hyper::body::{Frame, SizeHint};
use tower::Service;

use super::error::{self, ApiError};
use super::{Access, body, cors};
use crate::availability::{Availability, InFlight, Status, Unavailable};

/// Stands in front of routes that are not there yet, and says so until it is opened. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Gate {
    closed: Router,
    routes: Arc<OnceLock<Router>>,
}

impl Gate {
    /// Closed. Web pages may read its answers as they may read those of the routes.
    pub(crate) fn new(availability: Availability, access: &Access) -> Self {
        let health = get(health).fallback(refuse);
        let closed = Router::new()
            .route("/", health.clone())
            .route("/ping", health.clone())
            .route("/health", health)
            .fallback(refuse)
            .with_state(availability)
            .layer(cors(access));
        Self { closed, routes: Arc::default() }
    }

    /// From now on `routes` answer, on connections that are open already, too. To be called once.
    pub(crate) fn open(&self, routes: Router) {
        self.routes.set(routes).expect("a gate is opened once");
    }
}

impl Service<Request> for Gate {
    type Response = Response;
    type Error = Infallible;
    type Future = RouteFuture<Infallible>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request) -> Self::Future {
        self.routes.get().unwrap_or(&self.closed).clone().call(request)
    }
}

async fn health(State(availability): State<Availability>) -> Response {
    error::health(availability.check())
}

/// A client that still sends when the answer comes may never see it, so its body is read first.
async fn refuse(request: Request) -> ApiError {
    body::discard(request.into_body()).await;
    let reason = "the server is starting".to_owned();
    Unavailable { status: Status::Starting, reason }.into()
}

/// Lets work in, which is what is posted, while the server is not about to end; and holds the end back until the answer
/// has left.
pub(super) async fn admit(
    State(availability): State<Availability>,
    request: Request,
    next: Next,
) -> Result<Response, ApiError> {
    if request.method() != Method::POST {
        return Ok(next.run(request).await);
    }
    match availability.enter() {
        Ok(in_flight) => {
            let response = next.run(request).await;
            Ok(response.map(|body| Body::new(Held { body, _in_flight: in_flight })))
        }
        Err(unavailable) => {
            body::discard(request.into_body()).await;
            Err(unavailable.into())
        }
    }
}

/// A body that is dropped when it has been sent, or its client has left.
struct Held {
    body: Body,
    _in_flight: InFlight,
}

impl HttpBody for Held {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.body).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
