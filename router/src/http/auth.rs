//! The API-key layer. It wraps every route that is not listed as open.

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::middleware::Next;
use axum::response::Response;
use http::header::AUTHORIZATION;

use super::error;

/// The key clients must show. It is never printed.
#[derive(Clone)]
pub(crate) struct ApiKey(Arc<str>);

impl ApiKey {
    pub(crate) fn new(key: &str) -> Self {
        Self(key.into())
    }

    /// Whether a header value is `Bearer` (in any case) and this key, exactly.
    fn admits(&self, header: &[u8]) -> bool {
        let Some((scheme, key)) = header.split_at_checked("Bearer ".len()) else { return false };
        scheme.eq_ignore_ascii_case(b"Bearer ") && constant_time_eq(key, self.0.as_bytes())
    }
}

impl std::fmt::Debug for ApiKey {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("ApiKey(…)")
    }
}

/// Lets a request pass that shows the key.
pub(super) async fn require_key(State(key): State<ApiKey>, request: Request, next: Next) -> Response {
    match request.headers().get(AUTHORIZATION) {
        Some(header) if key.admits(header.as_bytes()) => next.run(request).await,
        _ => error::unauthorized(),
    }
}

/// Compares in a time that depends on the lengths alone.
fn constant_time_eq(given: &[u8], key: &[u8]) -> bool {
    if given.len() != key.len() {
        return false;
    }
    let difference = std::iter::zip(given, key).fold(0, |difference, (a, b)| difference | (a ^ b));
    // The optimizer must not leave the loop early.
    std::hint::black_box(difference) == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_scheme_may_be_in_any_case_but_the_key_is_exact() {
        let key = ApiKey::new("Secret");
        assert!(key.admits(b"Bearer Secret"));
        assert!(key.admits(b"bearer Secret"));
        for wrong in ["Bearer secret", "Bearer Secret ", "Bearer ", "Secret", "Basic Secret", ""] {
            assert!(!key.admits(wrong.as_bytes()), "{wrong:?}");
        }
    }

    #[test]
    fn a_key_is_not_printed() {
        assert_eq!(format!("{:?}", ApiKey::new("Secret")), "ApiKey(…)");
    }
}
