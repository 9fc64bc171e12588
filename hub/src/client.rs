//! Questions to the Hub and to the servers it sends one to: redirects, tokens, and what a refusal means.

use std::error::Error as _;
use std::fs;
use std::io::Read;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use http::header::{AUTHORIZATION, CONTENT_LENGTH, LOCATION, RANGE, RETRY_AFTER};
use http::{HeaderMap, Method, Request, Uri};
use tracing::debug;
use ureq::tls::{Certificate, PemItem, RootCerts, TlsConfig, parse_pem};
use ureq::{Agent, Body, Proxy};

use crate::config::{HubConfig, Patience};
use crate::error::HubError;
use crate::repo::{Source, escaped};
use crate::url::{joined, same_server, shown};

/// Most redirects of one question.
const REDIRECTS_MAX: usize = 10;

/// Largest answer that is read as a whole: the list of files of a repository.
const LIST_BYTES_MAX: u64 = 64 << 20;

/// Most of a server's own words that go into an error message.
const MESSAGE_CHARS_MAX: usize = 300;

/// Connections that are kept for the next question.
const IDLE_CONNECTIONS: usize = 16;

/// Speaks to the Hub. Cheap to clone; the clones share their connections.
#[derive(Clone, Debug)]
pub(crate) struct Client {
    config: Arc<HubConfig>,
    endpoint: Uri,
    tls: TlsConfig,
    agents: Agents,
}

/// One pool of connections for each way out.
#[derive(Clone, Debug)]
struct Agents {
    direct: Agent,
    http_proxy: Option<Agent>,
    https_proxy: Option<Agent>,
}

/// How one attempt failed.
#[derive(Debug)]
pub(crate) enum Failure {
    /// It may succeed next time.
    Passing {
        /// What was asked for.
        url: String,
        /// What happened.
        reason: String,
        /// How long the server asks to wait.
        wait: Option<Duration>,
    },
    /// It will not.
    Final(HubError),
}

/// Which redirects to follow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Follow {
    /// All of them.
    All,
    /// Those that stay on the same server; the answer that leads elsewhere is the answer.
    SameServer,
}

/// An answer, its body still to be read.
pub(crate) struct Answer {
    /// Where it came from.
    pub(crate) url: Uri,
    /// Status code: 2xx, or 3xx where redirects are not followed.
    pub(crate) status: u16,
    /// The headers of all answers on the way; later ones replace earlier ones.
    pub(crate) headers: HeaderMap,
    body: Body,
}

impl Client {
    /// A client that trusts the certificates of the configuration.
    ///
    /// Errors when those cannot be read.
    pub(crate) fn new(config: Arc<HubConfig>) -> Result<Self, HubError> {
        let endpoint: Uri =
            config.endpoint.parse().expect("an endpoint is a URL: checked by the configuration");
        let tls = TlsConfig::builder()
            .root_certs(RootCerts::Specific(Arc::new(roots(&config)?)))
            .unversioned_rustls_crypto_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .build();
        let agents = Agents::new(&config, &tls, config.patience);
        Ok(Self { config, endpoint, tls, agents })
    }

    /// The same client for a question whose answer one can do without.
    pub(crate) fn hurried(&self) -> Self {
        let mut config = HubConfig::clone(&self.config);
        config.patience = config.patience.hurried();
        let agents = Agents::new(&config, &self.tls, config.patience);
        Self { config: Arc::new(config), agents, ..self.clone() }
    }

    pub(crate) fn patience(&self) -> Patience {
        self.config.patience
    }

    /// The URL of a revision's description, with the list of its files.
    pub(crate) fn description_url(&self, source: &Source) -> Uri {
        let revision = escaped(source.revision(), false);
        self.url(&format!("/api/models/{}/revision/{revision}?blobs=true", source.id()))
    }

    /// The URL of a file.
    pub(crate) fn file_url(&self, source: &Source, revision: &str, file: &str) -> Uri {
        self.url(&format!("/{}/resolve/{}/{}", source.id(), escaped(revision, false), escaped(file, true)))
    }

    fn url(&self, path: &str) -> Uri {
        let url = format!("{}{path}", self.config.endpoint);
        url.parse().expect("an endpoint with an escaped path is a URL")
    }

    /// Asks once.
    pub(crate) fn ask(&self, question: &Question<'_>) -> Result<Answer, Failure> {
        let mut url = question.url.clone();
        let mut headers = HeaderMap::new();
        for _ in 0..=REDIRECTS_MAX {
            let response = self.send(question, &url)?;
            let status = response.status().as_u16();
            let target = response.headers().get(LOCATION).and_then(|target| target.to_str().ok());
            let target = target.filter(|_| response.status().is_redirection()).map(str::to_owned);
            let (parts, body) = response.into_parts();
            // The length of a redirect's own body says nothing.
            headers.remove(CONTENT_LENGTH);
            for (name, value) in &parts.headers {
                headers.insert(name, value.clone());
            }
            let answer = Answer { url: url.clone(), status, headers: headers.clone(), body };
            let Some(target) = target else { return self.judged(question, answer) };
            let Some(next) = joined(&url, &target) else {
                let problem = "a redirect to something that is no URL".to_owned();
                return Err(Failure::Final(HubError::BadAnswer { url: shown(&url), problem }));
            };
            debug!("{} leads to {}", shown(&url), shown(&next));
            if question.follow == Follow::SameServer && !same_server(&url, &next) {
                return Ok(answer);
            }
            url = next;
        }
        let problem = format!("more than {REDIRECTS_MAX} redirects");
        Err(Failure::Final(HubError::BadAnswer { url: shown(question.url), problem }))
    }

    fn send(&self, question: &Question<'_>, url: &Uri) -> Result<http::Response<Body>, Failure> {
        let mut request = Request::builder().method(question.method.clone()).uri(url.clone());
        if let Some(Range { start, end }) = &question.range {
            request = request.header(RANGE, format!("bytes={start}-{}", end.saturating_sub(1)));
        }
        // Nobody but the Hub gets to see the token.
        if let Some(token) = self.config.token.as_ref().filter(|_| same_server(url, &self.endpoint)) {
            request = request.header(AUTHORIZATION, token.header());
        }
        let request = request.body(()).map_err(|error| {
            let problem = format!("cannot be asked for: {error}");
            Failure::Final(HubError::BadAnswer { url: shown(url), problem })
        })?;
        let agent = self.agents.on_the_way_to(url, &self.config);
        agent.run(request).map_err(|error| failed(url, &error))
    }

    /// Tells answers from refusals.
    fn judged(&self, question: &Question<'_>, answer: Answer) -> Result<Answer, Failure> {
        let status = answer.status;
        if (200..300).contains(&status) {
            return Ok(answer);
        }
        let url = shown(&answer.url);
        // Words of our own for what the Hub says with these; other servers may mean something else.
        let ours = same_server(&answer.url, &self.endpoint);
        let code = answer.text_of("x-error-code").unwrap_or_default();
        let wait = answer.text_of(RETRY_AFTER.as_str()).and_then(|text| text.trim().parse().ok());
        let message = answer.message();
        let source = question.source;
        let (id, endpoint, token) =
            (source.id().to_owned(), self.config.endpoint.clone(), self.token_in_words());
        Err(Failure::Final(match (status, code.as_str(), question.file) {
            (408 | 425 | 429 | 500 | 502 | 503 | 504, ..) => {
                let wait = wait.map(Duration::from_secs);
                return Err(Failure::Passing { url, reason: format!("status {status}{message}"), wait });
            }
            // A signed link that has expired, which the Hub replaces when it is asked again.
            (401 | 403 | 404 | 410, _, Some(_)) if !ours => {
                return Err(Failure::Passing {
                    url,
                    reason: format!("status {status}{message}"),
                    wait: None,
                });
            }
            (401 | 403, "GatedRepo", _) => HubError::Gated { id, endpoint, token },
            (401 | 404, "RepoNotFound", _) => HubError::NoRepository { id, endpoint, token },
            (404, "RevisionNotFound", _) => {
                HubError::NoRevision { id, revision: source.revision().to_owned(), endpoint }
            }
            (404, "EntryNotFound", Some(file)) => {
                HubError::NoFile { source_name: source.to_string(), file: file.to_owned() }
            }
            (401 | 403, ..) if ours => HubError::Refused { id, endpoint, status, message, token },
            (404, _, None) if ours => HubError::NoRepository { id, endpoint, token },
            _ => HubError::Status { url, status, message },
        }))
    }

    fn token_in_words(&self) -> String {
        match &self.config.token {
            Some(token) => format!("the token from {} was used", token.source()),
            None => "no token was found in HF_TOKEN, HUGGING_FACE_HUB_TOKEN or the token file".to_owned(),
        }
    }
}

/// What to ask for.
pub(crate) struct Question<'a> {
    /// `GET` or `HEAD`.
    pub(crate) method: Method,
    /// Where.
    pub(crate) url: &'a Uri,
    /// Which bytes; none is all of them.
    pub(crate) range: Option<Range<u64>>,
    /// Which redirects to follow.
    pub(crate) follow: Follow,
    /// What it is about, for error messages.
    pub(crate) source: &'a Source,
    /// The file that it is about.
    pub(crate) file: Option<&'a str>,
}

impl Answer {
    /// A header's text.
    pub(crate) fn text_of(&self, name: &str) -> Option<String> {
        Some(self.headers.get(name)?.to_str().ok()?.to_owned())
    }

    /// The body, as it comes.
    pub(crate) fn into_reader(self) -> impl Read {
        self.body.into_reader()
    }

    /// The whole body.
    pub(crate) fn read(self) -> Result<Vec<u8>, Failure> {
        let url = self.url.clone();
        let mut content = Vec::new();
        match self.into_reader().take(LIST_BYTES_MAX + 1).read_to_end(&mut content) {
            Ok(_) if content.len() as u64 > LIST_BYTES_MAX => {
                let problem = format!("more than {LIST_BYTES_MAX} bytes");
                Err(Failure::Final(HubError::BadAnswer { url: shown(&url), problem }))
            }
            Ok(_) => Ok(content),
            Err(error) => Err(Failure::Passing { url: shown(&url), reason: error.to_string(), wait: None }),
        }
    }

    /// What the server says about its refusal, with a colon in front; nothing when it says nothing.
    fn message(self) -> String {
        let mut message = self.text_of("x-error-message").unwrap_or_default();
        if message.is_empty() {
            let mut body = Vec::new();
            // A body that cannot be read is as good as none: the status has been said.
            let _ = self.into_reader().take(64 << 10).read_to_end(&mut body);
            message = serde_json::from_slice::<serde_json::Value>(&body)
                .ok()
                .and_then(|body| Some(body.get("error")?.as_str()?.to_owned()))
                .unwrap_or_default();
        }
        let plain = message.chars().map(|letter| if letter.is_control() { ' ' } else { letter });
        let message: String = plain.take(MESSAGE_CHARS_MAX).collect();
        if message.trim().is_empty() { String::new() } else { format!(": {}", message.trim()) }
    }
}

impl Agents {
    fn new(config: &HubConfig, tls: &TlsConfig, patience: Patience) -> Self {
        let agent = |proxy: Option<Proxy>| {
            Agent::config_builder()
                .proxy(proxy)
                .tls_config(tls.clone())
                .http_status_as_error(false)
                .max_redirects(0)
                .max_redirects_will_error(false)
                .user_agent(user_agent(config))
                // What comes is compared with checksums of the files themselves.
                .accept_encoding("identity")
                .timeout_resolve(Some(patience.connect))
                .timeout_connect(Some(patience.connect))
                .timeout_send_request(Some(patience.silence))
                .timeout_recv_response(Some(patience.silence))
                .timeout_per_read(Some(patience.silence))
                .max_idle_connections(2 * IDLE_CONNECTIONS)
                .max_idle_connections_per_host(IDLE_CONNECTIONS)
                .build()
                .new_agent()
        };
        let (http, https) = config.proxies.both();
        Self {
            direct: agent(None),
            http_proxy: http.cloned().map(|proxy| agent(Some(proxy))),
            https_proxy: https.cloned().map(|proxy| agent(Some(proxy))),
        }
    }

    fn on_the_way_to(&self, url: &Uri, config: &HubConfig) -> &Agent {
        let proxied = match url.scheme_str() {
            Some("http") => &self.http_proxy,
            _ => &self.https_proxy,
        };
        proxied.as_ref().filter(|_| !config.proxies.are_passed_by(url)).unwrap_or(&self.direct)
    }
}

fn user_agent(config: &HubConfig) -> String {
    let origin = config.origin.iter().map(|origin| {
        origin.chars().filter(|letter| letter.is_ascii_graphic() && *letter != ';').collect::<String>()
    });
    let own = format!("text-generation-launcher/{}", env!("CARGO_PKG_VERSION"));
    [own].into_iter().chain(origin.map(|origin| format!("origin/{origin}"))).collect::<Vec<_>>().join("; ")
}

/// The certificates to trust: the built-in ones, and those of the configured files.
fn roots(config: &HubConfig) -> Result<Vec<Certificate<'static>>, HubError> {
    let mut roots: Vec<_> = webpki_root_certs::TLS_SERVER_ROOT_CERTS
        .iter()
        .map(|root| Certificate::from_der(root.as_ref()))
        .collect();
    for path in &config.certificates {
        let problem = |problem: String| HubError::Certificates { path: path.clone(), problem };
        let text = fs::read(path).map_err(|error| problem(error.to_string()))?;
        let before = roots.len();
        roots.extend(parse_pem(&text).filter_map(|item| match item {
            Ok(PemItem::Certificate(certificate)) => Some(certificate),
            _ => None,
        }));
        if roots.len() == before {
            return Err(problem("no certificate in PEM form".to_owned()));
        }
    }
    Ok(roots)
}

/// A question that got no answer. Certificates that are not trusted do not become so by waiting.
fn failed(url: &Uri, error: &ureq::Error) -> Failure {
    let (reason, is_final) = match error {
        ureq::Error::Timeout(which) => (format!("no answer in time ({which})"), false),
        ureq::Error::HostNotFound => {
            (format!("no host `{}` is known", url.host().unwrap_or_default()), false)
        }
        ureq::Error::Rustls(error) => (tls_reason(error), true),
        ureq::Error::Io(io) => match io.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>()) {
            Some(error @ rustls::Error::InvalidCertificate(_)) => (tls_reason(error), true),
            _ => (io.to_string(), false),
        },
        ureq::Error::ConnectProxyFailed(what) => (format!("the proxy refuses: {what}"), false),
        error => (error.source().map_or_else(|| error.to_string(), ToString::to_string), false),
    };
    match is_final {
        true => Failure::Final(HubError::Unreachable { url: shown(url), reason, attempts: 1 }),
        false => Failure::Passing { url: shown(url), reason, wait: None },
    }
}

fn tls_reason(error: &rustls::Error) -> String {
    match error {
        rustls::Error::InvalidCertificate(problem) => format!(
            "its certificate is not trusted ({problem:?}); if a proxy of your organization issued it, name the \
            file of its certificates in SSL_CERT_FILE"
        ),
        error => error.to_string(),
    }
}
