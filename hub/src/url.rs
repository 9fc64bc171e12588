//! What `http::Uri` leaves open: relative references, and what of a URL may be shown.

use http::Uri;

/// Where a `Location` header leads from `base`; none when it is no URL of http or https.
pub(crate) fn joined(base: &Uri, target: &str) -> Option<Uri> {
    let target = target.split('#').next().unwrap_or_default();
    let scheme = base.scheme_str()?;
    let authority = base.authority()?;
    let url = if target.contains("://") && target.split(':').next().is_some_and(is_scheme) {
        target.to_owned()
    } else if let Some(rest) = target.strip_prefix("//") {
        format!("{scheme}://{rest}")
    } else if target.starts_with('/') {
        format!("{scheme}://{authority}{target}")
    } else {
        let directory = base.path().rsplit_once('/').map_or("", |(directory, _)| directory);
        format!("{scheme}://{authority}{directory}/{target}")
    };
    let url: Uri = url.parse().ok()?;
    let known = matches!(url.scheme_str(), Some("http" | "https"));
    Some(url).filter(|url| known && url.host().is_some_and(|host| !host.is_empty()))
}

fn is_scheme(word: &str) -> bool {
    !word.is_empty() && word.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"+-.".contains(&byte))
}

/// Whether two URLs have the same scheme, host and port: who may see what was meant for one may see it for the other.
pub(crate) fn same_server(one: &Uri, other: &Uri) -> bool {
    let port =
        |uri: &Uri| uri.port_u16().or(if uri.scheme_str() == Some("http") { Some(80) } else { Some(443) });
    let host = |uri: &Uri| uri.host().map(str::to_ascii_lowercase);
    one.scheme_str() == other.scheme_str() && host(one) == host(other) && port(one) == port(other)
}

/// A URL for people. Queries hold signatures, and user names do not belong there: both are left out.
pub(crate) fn shown(url: &Uri) -> String {
    let authority = url.authority().map_or("", |authority| authority.as_str());
    let server = authority.rsplit('@').next().unwrap_or_default();
    format!("{}://{server}{}", url.scheme_str().unwrap_or("http"), url.path())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn uri(text: &str) -> Uri {
        text.parse().unwrap()
    }

    #[test]
    fn references_of_every_kind_are_resolved() {
        let base = uri("https://hub:8443/org/name/resolve/main/a.bin?x=1");
        let cases = [
            ("https://cdn/b?sig=1#part", "https://cdn/b?sig=1"),
            ("//cdn/b", "https://cdn/b"),
            ("/new/name?u=http://x", "https://hub:8443/new/name?u=http://x"),
            ("b.bin", "https://hub:8443/org/name/resolve/main/b.bin"),
        ];
        for (target, expected) in cases {
            assert_eq!(joined(&base, target), Some(uri(expected)), "{target}");
        }
        for wrong in ["ftp://cdn/b", "https://", "http://a b/"] {
            assert_eq!(joined(&base, wrong), None, "{wrong}");
        }
    }

    #[test]
    fn a_server_is_scheme_host_and_port() {
        let hub = uri("https://Hub.example/a");
        assert!(same_server(&hub, &uri("https://hub.example:443/b")));
        for other in ["http://hub.example/a", "https://hub.example:444/a", "https://cdn.example/a"] {
            assert!(!same_server(&hub, &uri(other)), "{other}");
        }
    }

    #[test]
    fn signatures_and_passwords_are_not_shown() {
        assert_eq!(shown(&uri("https://me:hush@cdn:1/a/b?signature=hush")), "https://cdn:1/a/b");
    }
}
