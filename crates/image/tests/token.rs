//! Hostile registries and token services: bounds of answers, and where credentials go.

#![allow(clippy::unwrap_used)]

mod common;

use std::io::Write;
use std::net::TcpStream;
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use common::{begin_answer, host_architecture, made_up_registry, own_address, reference};
use hull_image::{Credentials, Digest, Error, Pull, Store};
use serde_json::json;

/// `Basic`, of user:secret.
const SECRET: &str = "dXNlcjpzZWNyZXQ=";

/// A server whose requests are told, each before its answer.
fn server(answer: impl Fn(&str, &mut TcpStream) + Send + 'static) -> (u16, Receiver<String>) {
    let (sender, requests) = channel();
    let port = made_up_registry(move |request, client| {
        let _ = sender.send(request.to_owned());
        answer(request, client);
    });
    (port, requests)
}

/// A registry with a token service at `realm`, that answers other requests with `status`.
fn registry(realm: String, status: &'static str) -> (u16, Receiver<String>) {
    server(move |request, client| {
        if request.starts_with("GET /v2/ ") {
            let challenge = format!("WWW-Authenticate: Bearer realm=\"{realm}\"\r\n");
            begin_answer(client, "401 Unauthorized", &challenge);
        } else {
            begin_answer(client, status, "");
        }
    })
}

/// The error of a pull with credentials, which it does not contain.
fn pull(port: u16) -> Error {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let name = reference(&format!("localhost:{port}/x"));
    let credentials = Credentials::basic("user", "secret");
    let error = store
        .resolve(&name, Pull::Missing, &credentials, &())
        .unwrap_err();
    let told = format!("{error} {error:?} {:?}", error.hint());
    assert!(!told.contains("secret") && !told.contains(SECRET), "{told}");
    error
}

fn with_authorization(requests: &Receiver<String>) -> Vec<String> {
    let all = requests.try_iter();
    all.filter(|request| request.to_lowercase().contains("authorization"))
        .collect()
}

#[test]
fn a_token_without_end() {
    for status in ["200 OK", "500 Internal Server Error"] {
        let (sender, sent) = channel();
        let (service, _requests) = server(move |_, client| {
            begin_answer(client, status, "");
            let mut count = 0;
            while client.write_all(&[b' '; 65536]).is_ok() {
                count += 65536;
            }
            let _ = sender.send(count);
        });
        let (port, _) = registry(format!("http://localhost:{service}/token"), "200 OK");
        let error = pull(port).to_string();
        let expected = match status {
            "200 OK" => "token answered more than 1048576 bytes",
            _ => "token answered 500",
        };
        assert!(
            error.contains("its token service http://localhost:"),
            "{error}"
        );
        assert!(error.ends_with(expected), "{error}");
        // What was read, and what lay in the sockets' buffers.
        let sent = sent.recv_timeout(Duration::from_secs(10)).unwrap();
        assert!(sent < 16 << 20, "{sent}");
    }
}

#[test]
fn a_token_that_ends_before_its_time_is_replaced() {
    let tokens = std::sync::atomic::AtomicU32::new(0);
    let (service, asked) = server(move |_, client| {
        let number = tokens.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        begin_answer(client, "200 OK", "");
        let _ = write!(client, "{{\"token\": \"t{number}\", \"expires_in\": 300}}");
    });
    let config = json!({"architecture": host_architecture(), "os": "linux",
        "rootfs": {"type": "layers", "diff_ids": []}})
    .to_string();
    let digest = Digest::of(config.as_bytes());
    let manifest = json!({"schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": {"mediaType": "application/vnd.oci.image.config.v1+json",
            "digest": digest.to_string(), "size": config.len()},
        "layers": []})
    .to_string();
    let (port, requests) = server(move |request, client| {
        let token = |name: &str| request.contains(&format!("Bearer {name}\r\n"));
        let challenge =
            format!("WWW-Authenticate: Bearer realm=\"http://localhost:{service}/token\"\r\n");
        if request.starts_with("GET /v2/x/manifests/") && token("t0") {
            begin_answer(client, "200 OK", "");
            let _ = client.write_all(manifest.as_bytes());
        } else if request.starts_with("GET /v2/x/blobs/") && token("t1") {
            begin_answer(client, "200 OK", "");
            let _ = client.write_all(config.as_bytes());
        } else {
            begin_answer(client, "401 Unauthorized", &challenge);
        }
    });
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let name = reference(&format!("localhost:{port}/x"));
    let credentials = Credentials::basic("user", "secret");
    let pulled = store.resolve(&name, Pull::Missing, &credentials, &());
    let requests: Vec<_> = requests.try_iter().collect();
    assert_eq!(asked.try_iter().count(), 2, "{pulled:?} {requests:?}");
    assert_eq!(pulled.unwrap().id, digest.to_string());
}

#[test]
fn a_token_service_that_redirects() {
    let (other, stolen) = server(|_, client| begin_answer(client, "200 OK", ""));
    let (service, asked) = server(move |_, client| {
        let location = format!("Location: http://localhost:{other}/token\r\n");
        begin_answer(client, "307 Temporary Redirect", &location);
    });
    let (port, _) = registry(format!("http://localhost:{service}/token"), "200 OK");
    let error = pull(port).to_string();
    assert!(
        error.ends_with("token redirects, which is not followed"),
        "{error}"
    );
    assert_eq!(
        with_authorization(&asked).len(),
        1,
        "it is the registry's own"
    );
    assert_eq!(stolen.try_iter().count(), 0);
}

#[test]
fn a_foreign_token_service_gets_no_credentials() {
    let (service, asked) = server(|_, client| {
        begin_answer(client, "200 OK", "");
        let _ = client.write_all(br#"{"access_token":"anonymous","expires_in":"300"}"#);
    });
    let realm = format!("http://{}:{service}/token", own_address());
    let (port, requests) = registry(format!("{realm}?account=x"), "401 Unauthorized");
    let error = pull(port);
    assert_eq!(
        error.to_string(),
        format!(
            "image \"localhost:{port}/x\" may not be pulled: registry localhost:{port} answered 401 \
             without credentials, which were not sent to its token service {realm} in another domain"
        )
    );
    assert!(error.hint().unwrap().contains(&realm));
    let asked: Vec<String> = asked.try_iter().collect();
    assert_eq!(asked.len(), 1);
    assert!(
        asked[0].starts_with("GET /token?account=x&scope=repository%3Ax%3Apull "),
        "{asked:?}"
    );
    assert!(
        !asked[0].to_lowercase().contains("authorization"),
        "{asked:?}"
    );
    let authorized = with_authorization(&requests);
    assert_eq!(authorized.len(), 1);
    assert!(
        authorized[0].contains("authorization: Bearer anonymous\r\n"),
        "{authorized:?}"
    );
    // Without credentials, a public image can be had.
    let (port, _) = registry(realm, "404 Not Found");
    assert!(pull(port).is_not_found());
}

#[test]
fn the_own_token_service_gets_them() {
    let (service, asked) = server(|_, client| {
        begin_answer(client, "200 OK", "");
        let _ = client.write_all(br#"{"token":"mine"}"#);
    });
    let (port, requests) = registry(format!("http://127.0.0.1:{service}/token"), "404 Not Found");
    assert!(pull(port).is_not_found());
    assert!(with_authorization(&asked)[0].contains(&format!("Basic {SECRET}")));
    assert!(with_authorization(&requests)[0].contains("Bearer mine"));
}

#[test]
fn refusals_of_token_services() {
    for (body, expected) in [
        (&b"{"[..], "token did not answer with a token"),
        (b"{\"token\":\"\"}", "token did not answer with a token"),
        (
            b"{\"token\":\"a\\nb\"}",
            "has characters that no header may have",
        ),
    ] {
        let (service, _) = server(move |_, client| {
            begin_answer(client, "200 OK", "");
            let _ = client.write_all(body);
        });
        let (port, _) = registry(format!("http://localhost:{service}/token"), "200 OK");
        let error = pull(port).to_string();
        assert!(error.ends_with(expected), "{error}");
    }
    let (service, _) = server(|_, client| begin_answer(client, "401 Unauthorized", ""));
    let (port, _) = registry(format!("http://localhost:{service}/token"), "200 OK");
    assert!(matches!(
        pull(port),
        Error::Unauthorized { status: 401, .. }
    ));
    let (port, _) = registry("ftp://localhost/token".to_owned(), "200 OK");
    assert!(pull(port).to_string().ends_with("does not use https"));
}

#[test]
fn redirects_lose_the_credentials() {
    // Manifest and blobs are elsewhere.
    let config = Digest::of(b"config");
    let manifest = json!({
        "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": {
            "mediaType": "application/vnd.oci.image.config.v1+json", "size": 6, "digest": config,
        },
        "layers": [],
        "annotations": {"architecture": host_architecture()},
    });
    let (other, elsewhere) = server(move |request, client| {
        if request.contains("/manifests/") {
            begin_answer(client, "200 OK", "");
            let _ = client.write_all(manifest.to_string().as_bytes());
        } else {
            begin_answer(client, "404 Not Found", "");
        }
    });
    let (port, requests) = server(move |request, client| {
        if request.starts_with("GET /v2/ ") {
            return begin_answer(
                client,
                "401 Unauthorized",
                "WWW-Authenticate: Basic realm=\"x\"\r\n",
            );
        }
        let path = request.split(' ').nth(1).unwrap();
        let location = format!("Location: http://localhost:{other}{path}\r\n");
        begin_answer(client, "307 Temporary Redirect", &location);
    });
    let error = pull(port).to_string();
    assert!(
        error.contains("it answered 404 to the request for the config"),
        "{error}"
    );
    assert_eq!(with_authorization(&requests).len(), 2);
    let elsewhere: Vec<String> = elsewhere.try_iter().collect();
    assert_eq!(elsewhere.len(), 2, "{elsewhere:?}");
    for request in elsewhere {
        assert!(
            !request.to_lowercase().contains("authorization"),
            "{request}"
        );
    }
}

#[test]
fn redirects_in_a_circle() {
    let (port, requests) = server(|request, client| {
        let path = request.split(' ').nth(1).unwrap();
        begin_answer(client, "302 Found", &format!("Location: {path}\r\n"));
    });
    let error = pull(port).to_string();
    assert!(error.ends_with("it redirects more than 5 times"), "{error}");
    assert_eq!(requests.try_iter().count(), 6);
}
