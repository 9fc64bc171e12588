//! The token that opens private and gated repositories.

use std::fmt::{self, Display};

use crate::config::ConfigError;

/// A token and where it is from. Its text goes into one header and nowhere else.
#[derive(Clone)]
pub struct Token {
    header: String,
    source: String,
}

impl Token {
    /// A token from a variable or a file of this name.
    ///
    /// Errors when it holds anything but visible ASCII characters.
    pub fn new(text: &str, source: impl Display) -> Result<Self, ConfigError> {
        if text.is_empty() || !text.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err(ConfigError::Token(source.to_string()));
        }
        Ok(Self { header: format!("Bearer {text}"), source: source.to_string() })
    }

    /// The variable or file it is from.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// The value of the `Authorization` header.
    pub(crate) fn header(&self) -> &str {
        &self.header
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "Token(*** from {})", self.source)
    }
}
