//! The headers that say how urgent a request is, and how long its client waits.

use axum::extract::FromRequestParts;
use http::HeaderMap;
use http::request::Parts;

use super::error::ApiError;
use crate::request::terms::{PRIORITY, TIMEOUT, Terms};

/// What the headers of a request say.
#[derive(Debug)]
pub(super) struct Headers(pub(super) Terms);

impl<S: Sync> FromRequestParts<S> for Headers {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, ApiError> {
        let (priority, timeout) = (value(&parts.headers, PRIORITY), value(&parts.headers, TIMEOUT));
        Ok(Self(Terms::read(priority.as_deref(), timeout.as_deref())?))
    }
}

fn value(headers: &HeaderMap, name: &str) -> Option<String> {
    headers.get(name).map(|value| String::from_utf8_lossy(value.as_bytes()).into_owned())
}
