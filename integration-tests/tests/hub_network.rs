//! What lies between a Hub and those who ask it: proxies, and certificates that an organization makes itself.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use hub::{Hub, HubConfig, HubError, Order, Patience, Proxies, Source};
use integration_tests::fake_hub::{Content, FakeHub};
use integration_tests::fixtures;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ServerConfig, ServerConnection, StreamOwned};

fn hub_with_model() -> Result<FakeHub> {
    let fake = FakeHub::start()?;
    let files = [
        ("config.json", Content::of("{}")),
        ("tokenizer.json", Content::of("{}")),
        ("model.safetensors", Content::of("weights")),
    ];
    fake.add("org/model", files);
    Ok(fake)
}

/// Fetches the model, and says what it asked for along the way.
fn fetch(endpoint: &str, proxies: Proxies, certificates: Vec<PathBuf>) -> Result<(), HubError> {
    let cache = tempfile::tempdir().expect("a temporary directory");
    let config = HubConfig {
        endpoint: endpoint.to_owned(),
        token: None,
        cache: cache.path().to_owned(),
        offline: false,
        proxies,
        certificates,
        origin: None,
        patience: Patience { pause: Duration::from_millis(1), attempts: 3, ..Patience::default() },
    };
    Hub::new(config)?.fetch(&Source::new("org/model", None)?, &Order::default()).map(drop)
}

fn address_of(fake: &FakeHub) -> Result<SocketAddr> {
    fake.endpoint().strip_prefix("http://").context("an address")?.parse().context("an address")
}

/// A proxy that leads every name to one server. It notes what it was asked for.
fn proxy_to(server: SocketAddr) -> Result<(SocketAddr, Arc<Mutex<Vec<String>>>)> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let (address, asked) = (listener.local_addr()?, Arc::new(Mutex::new(Vec::new())));
    let notes = Arc::clone(&asked);
    thread::spawn(move || {
        for client in listener.incoming().flatten() {
            let notes = Arc::clone(&notes);
            // Who goes away in the middle is no trouble of the proxy's.
            thread::spawn(move || connect(client, server, &notes));
        }
    });
    Ok((address, asked))
}

fn connect(mut client: TcpStream, server: SocketAddr, asked: &Mutex<Vec<String>>) -> Result<()> {
    let mut reader = BufReader::new(client.try_clone()?);
    let mut head = String::new();
    while !head.ends_with("\r\n\r\n") && reader.read_line(&mut head)? > 0 {}
    asked.lock().expect("no panic").push(head.lines().next().unwrap_or_default().to_owned());
    let mut server = TcpStream::connect(server)?;
    client.write_all(b"HTTP/1.1 200 OK\r\n\r\n")?;
    let (mut back, mut forth) = (server.try_clone()?, client.try_clone()?);
    thread::spawn(move || {
        let done = std::io::copy(&mut back, &mut forth);
        done.and(forth.shutdown(Shutdown::Both))
    });
    std::io::copy(&mut reader, &mut server)?;
    Ok(server.shutdown(Shutdown::Write)?)
}

/// Puts TLS in front of a Hub: one request per connection.
fn tls_before(server: SocketAddr) -> Result<SocketAddr> {
    let directory = fixtures::directory("tls");
    let certificates =
        CertificateDer::pem_file_iter(directory.join("server.pem"))?.collect::<Result<_, _>>()?;
    let key = PrivateKeyDer::from_pem_file(directory.join("server.key"))?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_single_cert(certificates, key)?;
    let config = Arc::new(config);
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let address = listener.local_addr()?;
    thread::spawn(move || {
        for client in listener.incoming().flatten() {
            let config = Arc::clone(&config);
            // A client that does not trust the certificate ends the connection; that is what one test is about.
            thread::spawn(move || decrypt(client, server, config));
        }
    });
    Ok(address)
}

fn decrypt(client: TcpStream, server: SocketAddr, config: Arc<ServerConfig>) -> Result<()> {
    let mut client = BufReader::new(StreamOwned::new(ServerConnection::new(config)?, client));
    let mut head = String::new();
    while !head.ends_with("\r\n\r\n") && client.read_line(&mut head)? > 0 {}
    let mut server = TcpStream::connect(server)?;
    server.write_all(head.as_bytes())?;
    server.shutdown(Shutdown::Write)?;
    let mut answer = Vec::new();
    server.read_to_end(&mut answer)?;
    let first = answer.iter().position(|byte| *byte == b'\n').context("a status line")? + 1;
    let client = client.get_mut();
    client.write_all(&answer[..first])?;
    client.write_all(b"connection: close\r\n")?;
    client.write_all(&answer[first..])?;
    client.conn.send_close_notify();
    Ok(client.flush()?)
}

#[test]
fn a_proxy_leads_to_hosts_that_only_it_knows() -> Result<()> {
    let fake = hub_with_model()?;
    let (proxy, asked) = proxy_to(address_of(&fake)?)?;
    let url = format!("http://user:password@{proxy}");
    let proxies = |without: &str| Proxies::new(Some(("HTTP_PROXY", url.clone())), None, without);
    fetch("http://hub.invalid", proxies("")?, Vec::new())?;
    let seen = asked.lock().expect("no panic").clone();
    assert!(
        !seen.is_empty() && seen.iter().all(|line| line.starts_with("CONNECT hub.invalid:80 ")),
        "{seen:?}"
    );

    fetch(&fake.endpoint(), proxies("127.0.0.0/8")?, Vec::new())?;
    assert_eq!(asked.lock().expect("no panic").len(), seen.len(), "hosts of NO_PROXY are asked directly");
    Ok(())
}

#[test]
fn certificates_of_an_organization_are_trusted_when_they_are_named() -> Result<()> {
    let fake = hub_with_model()?;
    let endpoint = format!("https://{}", tls_before(address_of(&fake)?)?);
    fetch(&endpoint, Proxies::default(), vec![fixtures::directory("tls").join("ca.pem")])?;

    let error = fetch(&endpoint, Proxies::default(), Vec::new()).unwrap_err().to_string();
    assert!(error.contains("certificate is not trusted") && error.contains("SSL_CERT_FILE"), "{error}");
    assert!(error.contains("attempts in a row: 1"), "waiting does not help: {error}");
    Ok(())
}

#[test]
fn a_file_without_certificates_is_named() -> Result<()> {
    let cases = [fixtures::directory("tls").join("README.md"), PathBuf::from("/no/such/certificates.pem")];
    for path in cases {
        let error =
            fetch("https://hub.invalid", Proxies::default(), vec![path.clone()]).unwrap_err().to_string();
        assert!(error.contains(&path.display().to_string()), "{error}");
    }
    Ok(())
}
