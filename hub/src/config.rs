//! What the environment says about the Hub, read once. The only reader of the environment in this crate.

use std::env;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use http::Uri;

use crate::proxy::Proxies;
use crate::token::Token;

/// The public Hub.
const PUBLIC_ENDPOINT: &str = "https://huggingface.co";

/// Where systems keep the certificates they trust, the first that exists counts: Debian, Red Hat, SUSE, Alpine, BSD.
const SYSTEM_CERTIFICATES: [&str; 6] = [
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/cert.pem",
    "/usr/local/share/certs/ca-root-nss.crt",
];

/// Variables that hold a token. Only processes that speak to the Hub need them.
pub const TOKEN_VARIABLES: [&str; 3] = ["HF_API_TOKEN", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"];

/// How to reach the Hub and where to keep what comes from it.
#[derive(Clone, Debug)]
pub struct HubConfig {
    /// Scheme, host and path prefix of the Hub, without a slash at the end (`HF_ENDPOINT`).
    pub endpoint: String,
    /// What to identify with, if anything.
    pub token: Option<Token>,
    /// Directory of the cache, in the layout that Python's `huggingface_hub` has.
    pub cache: PathBuf,
    /// Whether the network must not be used (`HF_HUB_OFFLINE`).
    pub offline: bool,
    /// Proxies by scheme, and hosts that need none.
    pub proxies: Proxies,
    /// Files of certificates to trust besides the built-in ones.
    pub certificates: Vec<PathBuf>,
    /// Who is asking, for the Hub's statistics (`HF_HUB_USER_AGENT_ORIGIN`).
    pub origin: Option<String>,
    /// How long to wait and how often to try again.
    pub patience: Patience,
}

/// How long to wait and how often to try again.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    /// Longest time to connect.
    pub connect: Duration,
    /// Longest silence of a server.
    pub silence: Duration,
    /// Attempts in a row that may bring nothing.
    pub attempts: u32,
    /// The pause after the first failure; each following one is twice as long.
    pub pause: Duration,
    /// Longest pause that a server may ask for.
    pub pause_max: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(10),
            silence: Duration::from_secs(30),
            attempts: 6,
            pause: Duration::from_millis(500),
            pause_max: Duration::from_secs(300),
        }
    }
}

impl Patience {
    /// For a question whose answer one can do without: one attempt, and little waiting.
    pub fn hurried(self) -> Self {
        let short = Duration::from_secs(5);
        Self { connect: self.connect.min(short), silence: self.silence.min(short), attempts: 1, ..self }
    }
}

/// Why the environment makes no configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// A variable that should be text.
    #[error("{0} is not UTF-8 text")]
    NotText(&'static str),
    /// An endpoint that is no URL.
    #[error("HF_ENDPOINT `{0}` is not the URL of a server, such as https://huggingface.co")]
    Endpoint(String),
    /// A token that cannot be sent.
    #[error("the token from {0} holds characters that no token has")]
    Token(String),
    /// A proxy that is no URL. Its value may hold a password, so it is not shown.
    #[error("{0} is not the URL of a proxy, such as http://proxy.example:3128")]
    Proxy(&'static str),
    /// There is no place for the cache.
    #[error(
        "no place for the Hub's cache: none of --huggingface-hub-cache, HF_HUB_CACHE, HF_HOME and HOME is set"
    )]
    NoCache,
}

impl HubConfig {
    /// Reads the environment. `cache` is what a flag says; it comes before every variable.
    ///
    /// Errors with the variable that cannot be understood.
    pub fn from_env(cache: Option<&Path>) -> Result<Self, ConfigError> {
        Self::from_variables(&|name| env::var_os(name), cache)
    }

    fn from_variables(
        get: &dyn Fn(&'static str) -> Option<OsString>,
        cache: Option<&Path>,
    ) -> Result<Self, ConfigError> {
        let variables = Variables { get };
        let home = variables.hub_home();
        Ok(Self {
            endpoint: variables.endpoint()?,
            token: variables.token(home.as_deref())?,
            cache: variables.cache(cache, home.as_deref()).ok_or(ConfigError::NoCache)?,
            offline: variables.switch("HF_HUB_OFFLINE")?,
            proxies: variables.proxies()?,
            certificates: variables.certificates(),
            origin: variables.text("HF_HUB_USER_AGENT_ORIGIN")?,
            patience: Patience::default(),
        })
    }
}

/// The environment, or what a test puts in its place.
struct Variables<'a> {
    get: &'a dyn Fn(&'static str) -> Option<OsString>,
}

impl Variables<'_> {
    /// A variable's value; an empty one says nothing.
    fn value(&self, name: &'static str) -> Option<OsString> {
        (self.get)(name).filter(|value| !value.is_empty())
    }

    fn text(&self, name: &'static str) -> Result<Option<String>, ConfigError> {
        let text = self.value(name).map(|value| value.into_string().map_err(|_| ConfigError::NotText(name)));
        Ok(text.transpose()?.map(|text| text.trim().to_owned()).filter(|text| !text.is_empty()))
    }

    /// A path; `~/` at its start is the user's home.
    fn path(&self, name: &'static str) -> Option<PathBuf> {
        let path = PathBuf::from(self.value(name)?);
        match (path.strip_prefix("~"), self.value("HOME")) {
            (Ok(rest), Some(home)) => Some(Path::new(&home).join(rest)),
            _ => Some(path),
        }
    }

    fn switch(&self, name: &'static str) -> Result<bool, ConfigError> {
        let word = self.text(name)?.unwrap_or_default().to_ascii_lowercase();
        Ok(["1", "true", "yes", "on"].contains(&word.as_str()))
    }

    fn endpoint(&self) -> Result<String, ConfigError> {
        let Some(text) = self.text("HF_ENDPOINT")? else { return Ok(PUBLIC_ENDPOINT.to_owned()) };
        let endpoint = text.trim_end_matches('/');
        let known = |uri: &Uri| {
            matches!(uri.scheme_str(), Some("http" | "https"))
                && uri.host().is_some_and(|host| !host.is_empty())
                && uri.query().is_none()
        };
        match endpoint.parse::<Uri>() {
            Ok(uri) if known(&uri) => Ok(endpoint.to_owned()),
            _ => Err(ConfigError::Endpoint(text)),
        }
    }

    /// The directory of everything of the Hub on this machine.
    fn hub_home(&self) -> Option<PathBuf> {
        self.path("HF_HOME")
            .or_else(|| Some(self.path("XDG_CACHE_HOME")?.join("huggingface")))
            .or_else(|| Some(self.path("HOME")?.join(".cache/huggingface")))
    }

    fn cache(&self, flag: Option<&Path>, home: Option<&Path>) -> Option<PathBuf> {
        flag.filter(|path| !path.as_os_str().is_empty())
            .map(Path::to_owned)
            .or_else(|| self.path("HUGGINGFACE_HUB_CACHE"))
            .or_else(|| self.path("HF_HUB_CACHE"))
            .or_else(|| Some(home?.join("hub")))
    }

    fn token(&self, home: Option<&Path>) -> Result<Option<Token>, ConfigError> {
        for name in TOKEN_VARIABLES {
            if let Some(text) = self.text(name)? {
                return Ok(Some(Token::new(&text, name)?));
            }
        }
        let Some(path) = self.path("HF_TOKEN_PATH").or_else(|| Some(home?.join("token"))) else {
            return Ok(None);
        };
        // Most machines have no such file; one that cannot be read is as good as none.
        match fs::read_to_string(&path) {
            Ok(text) if !text.trim().is_empty() => Token::new(text.trim(), path.display()).map(Some),
            _ => Ok(None),
        }
    }

    /// Lower-case names win, as in curl and Python.
    fn proxies(&self) -> Result<Proxies, ConfigError> {
        let either = |lower, upper| {
            Ok(self.text(lower)?.map(|text| (lower, text)).or(self.text(upper)?.map(|text| (upper, text))))
        };
        let all = either("all_proxy", "ALL_PROXY")?;
        let http = either("http_proxy", "HTTP_PROXY")?.or_else(|| all.clone());
        let https = either("https_proxy", "HTTPS_PROXY")?.or(all);
        let without: Option<(&str, String)> = either("no_proxy", "NO_PROXY")?;
        Proxies::new(http, https, without.as_ref().map_or("", |(_, hosts)| hosts))
    }

    /// What the user names comes in place of the system's store, as with OpenSSL.
    fn certificates(&self) -> Vec<PathBuf> {
        let named: Vec<_> =
            ["SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"].into_iter().filter_map(|name| self.path(name)).collect();
        if !named.is_empty() {
            return named;
        }
        SYSTEM_CERTIFICATES.iter().map(PathBuf::from).find(|path| path.is_file()).into_iter().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(variables: &[(&'static str, &str)], flag: Option<&str>) -> Result<HubConfig, ConfigError> {
        let get = |name: &'static str| {
            variables.iter().find(|(known, _)| *known == name).map(|(_, value)| OsString::from(value))
        };
        HubConfig::from_variables(&get, flag.map(Path::new))
    }

    #[test]
    fn the_cache_is_where_the_first_of_flag_and_variables_says() {
        let variables = [
            ("HUGGINGFACE_HUB_CACHE", "/a"),
            ("HF_HUB_CACHE", "/b"),
            ("HF_HOME", "/c"),
            ("XDG_CACHE_HOME", "/d"),
            ("HOME", "/e"),
        ];
        let expected = ["/a", "/b", "/c/hub", "/d/huggingface/hub", "/e/.cache/huggingface/hub"];
        for (first, expected) in expected.iter().enumerate() {
            assert_eq!(config(&variables[first..], None).unwrap().cache, Path::new(expected));
        }
        assert_eq!(config(&variables, Some("/flag")).unwrap().cache, Path::new("/flag"));
        assert_eq!(
            config(&[("HF_HOME", "~/hf"), ("HOME", "/e")], None).unwrap().cache,
            Path::new("/e/hf/hub")
        );
        assert!(matches!(config(&[], None), Err(ConfigError::NoCache)));
    }

    #[test]
    fn the_token_is_the_first_variable_or_the_file_and_is_never_shown() {
        let home = tempfile::tempdir().unwrap();
        fs::write(home.path().join("token"), "hf_file\n").unwrap();
        let home = home.path().to_str().unwrap();
        let variables = [
            ("HF_API_TOKEN", "hf_api"),
            ("HF_TOKEN", "hf_own"),
            ("HUGGING_FACE_HUB_TOKEN", "hf_old"),
            ("HF_HOME", home),
        ];
        let expected = ["hf_api", "hf_own", "hf_old", "hf_file"];
        for (first, expected) in expected.iter().enumerate() {
            let config = config(&variables[first..], None).unwrap();
            let token = config.token.as_ref().unwrap();
            assert_eq!(token.header(), format!("Bearer {expected}"));
            assert!(token.source().contains(if first < 3 { variables[first].0 } else { "/token" }));
            assert!(!format!("{config:?}").contains(expected));
        }
        assert!(config(&[("HOME", "/no/such")], None).unwrap().token.is_none());
    }

    #[test]
    fn a_token_that_cannot_be_sent_is_an_error_that_does_not_show_it() {
        let error = config(&[("HOME", "/h"), ("HF_TOKEN", "hf a\nb")], None).unwrap_err().to_string();
        assert!(error.contains("HF_TOKEN") && !error.contains("hf a"), "{error}");
    }

    #[test]
    fn offline_is_any_word_for_yes() {
        for (word, expected) in
            [("1", true), ("TRUE", true), ("yes", true), ("On", true), ("0", false), ("", false)]
        {
            let config = config(&[("HOME", "/h"), ("HF_HUB_OFFLINE", word)], None).unwrap();
            assert_eq!(config.offline, expected, "{word}");
        }
    }

    #[test]
    fn an_endpoint_has_to_be_the_url_of_a_server() {
        let endpoint =
            |text| config(&[("HOME", "/h"), ("HF_ENDPOINT", text)], None).map(|config| config.endpoint);
        assert_eq!(endpoint("http://mirror:8080/hf/").unwrap(), "http://mirror:8080/hf");
        assert_eq!(endpoint("").unwrap(), PUBLIC_ENDPOINT);
        for wrong in ["mirror", "ftp://mirror", "http://", "https://a?b"] {
            assert!(matches!(endpoint(wrong), Err(ConfigError::Endpoint(_))), "{wrong}");
        }
    }

    #[test]
    fn certificates_that_are_named_replace_the_systems() {
        let named = config(&[("HOME", "/h"), ("SSL_CERT_FILE", "/ca.pem")], None).unwrap().certificates;
        assert_eq!(named, [Path::new("/ca.pem")]);
    }
}
