//! Which proxy leads to a server, if any.

use std::fmt;
use std::net::IpAddr;

use http::Uri;
use ureq::Proxy;

use crate::config::ConfigError;

/// Proxies by the scheme of what is asked for, and hosts that are asked directly.
#[derive(Clone, Default)]
pub struct Proxies {
    http: Option<Proxy>,
    https: Option<Proxy>,
    without: Vec<String>,
}

impl Proxies {
    /// From the values of the usual variables, each with its name.
    ///
    /// Errors with the name of the variable whose value is not the URL of a proxy.
    pub fn new(
        http: Option<(&'static str, String)>,
        https: Option<(&'static str, String)>,
        without: &str,
    ) -> Result<Self, ConfigError> {
        let proxy = |named: Option<(&'static str, String)>| {
            named.map(|(name, url)| Proxy::new(&url).map_err(|_| ConfigError::Proxy(name))).transpose()
        };
        let without = without.split(',').map(|host| host.trim().to_ascii_lowercase());
        Ok(Self {
            http: proxy(http)?,
            https: proxy(https)?,
            without: without.filter(|host| !host.is_empty()).collect(),
        })
    }

    /// The proxies for `http` and for `https`.
    pub(crate) fn both(&self) -> (Option<&Proxy>, Option<&Proxy>) {
        (self.http.as_ref(), self.https.as_ref())
    }

    /// Whether this server is asked directly.
    pub(crate) fn are_passed_by(&self, uri: &Uri) -> bool {
        let host = uri.host().unwrap_or_default().trim_matches(['[', ']']).to_ascii_lowercase();
        self.without.iter().any(|rule| {
            let (rule, port) = match rule.rsplit_once(':') {
                Some((name, port)) if !name.contains(':') => (name, Some(port)),
                _ => (rule.as_str(), None),
            };
            port.is_none_or(|port| uri.port().is_some_and(|own| own.as_str() == port)) && matches(rule, &host)
        })
    }
}

/// Whether a rule of `NO_PROXY` means this host: `*`, a name with all names below it, an address or a network.
fn matches(rule: &str, host: &str) -> bool {
    let name = rule.trim_start_matches('*').trim_start_matches('.');
    rule == "*"
        || host == name
        || (!name.is_empty() && host.strip_suffix(name).is_some_and(|rest| rest.ends_with('.')))
        || in_network(rule, host)
}

fn in_network(rule: &str, host: &str) -> bool {
    let Some((network, length)) = rule.split_once('/') else { return false };
    let bits = |address: &str| match address.parse() {
        Ok(IpAddr::V4(address)) => Some((u128::from(address.to_bits()) << 96, 32)),
        Ok(IpAddr::V6(address)) => Some((address.to_bits(), 128)),
        Err(_) => None,
    };
    match (bits(network), bits(host), length.parse::<u32>()) {
        (Some((network, width)), Some((host, host_width)), Ok(length))
            if width == host_width && length <= width =>
        {
            length == 0 || (network ^ host) >> (128 - length) == 0
        }
        _ => false,
    }
}

/// Without user names and passwords.
impl fmt::Debug for Proxies {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shown =
            |proxy: &Option<Proxy>| proxy.as_ref().map(|proxy| format!("{}:{}", proxy.host(), proxy.port()));
        formatter
            .debug_struct("Proxies")
            .field("http", &shown(&self.http))
            .field("https", &shown(&self.https))
            .field("without", &self.without)
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn proxies(without: &str) -> Proxies {
        let named = |url: &str| Some(("HTTPS_PROXY", url.to_owned()));
        Proxies::new(named("http://me:hush@one:1"), named("socks5://two:2"), without).unwrap()
    }

    #[test]
    fn each_scheme_has_its_proxy() {
        let proxies = proxies("");
        let (http, https) = proxies.both();
        assert_eq!((http.map(Proxy::port), https.map(Proxy::port)), (Some(1), Some(2)));
    }

    #[test]
    fn hosts_of_no_proxy_are_asked_directly() {
        let cases = [
            ("example.com", "https://example.com/", true),
            ("example.com", "https://hub.example.com/", true),
            (".example.com", "https://hub.example.com/", true),
            ("*.example.com", "https://hub.example.com/", true),
            ("example.com", "https://badexample.com/", false),
            ("other, example.com:8080", "https://example.com:8080/", true),
            ("example.com:8080", "https://example.com:81/", false),
            ("*", "https://anything/", true),
            ("10.0.0.0/8", "http://10.1.2.3:99/", true),
            ("10.0.0.0/8", "http://11.1.2.3/", false),
            ("fd00::/8", "http://[fd12::1]/", true),
            ("::1", "http://[::1]:80/", true),
            ("0.0.0.0/0", "http://1.2.3.4/", true),
            ("", "https://a/", false),
        ];
        for (without, uri, direct) in cases {
            assert_eq!(proxies(without).are_passed_by(&uri.parse().unwrap()), direct, "{without} {uri}");
        }
    }

    #[test]
    fn passwords_are_neither_printed_nor_part_of_errors() {
        assert!(!format!("{:?}", proxies("")).contains("hush"));
        let error =
            Proxies::new(Some(("HTTP_PROXY", "gopher://me:hush@one".to_owned())), None, "").unwrap_err();
        assert!(error.to_string().contains("HTTP_PROXY") && !error.to_string().contains("hush"), "{error}");
    }
}
