//! A registry in this process that serves given images and takes what is pushed, with an account
//! and faults on demand, and counts requests.

use std::collections::{BTreeSet, HashMap};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::digest;
use crate::images::{INDEX, Image, MANIFEST, descriptor};

/// A fault of the registry. Strings match paths that contain them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Responds with this status.
    Status(String, u16),
    /// Sends different bytes of the same length.
    OtherBytes(String),
    /// Closes the connection in the middle of the body, the first time only.
    BreakOffOnce(String),
    /// Closes the connection in the middle of the body, always.
    BreakOff(String),
    /// Delays each response.
    Slow(Duration),
}

#[derive(Default)]
struct State {
    /// Media type and content, by path.
    content: HashMap<String, (String, Vec<u8>)>,
    faults: Vec<Fault>,
    requests: Vec<String>,
    /// `Basic …` of the only account, if there is one.
    account: Option<String>,
}

/// A registry on localhost.
pub struct Registry {
    /// `localhost:PORT`.
    pub address: String,
    state: Arc<Mutex<State>>,
}

impl Registry {
    /// An empty registry; it serves until the test's process exits.
    pub fn new() -> Registry {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("localhost:{}", listener.local_addr().unwrap().port());
        let state = Arc::new(Mutex::new(State::default()));
        let shared = state.clone();
        std::thread::spawn(move || {
            for connection in listener.incoming().flatten() {
                let state = shared.clone();
                // Clients may disconnect.
                std::thread::spawn(move || drop(serve(connection, &state)));
            }
        });
        Registry { address, state }
    }

    /// From now on, only this user may pull and push.
    pub fn only_for(&self, user: &str, password: &str) {
        let encoded = base64(format!("{user}:{password}").as_bytes());
        self.state.lock().unwrap().account = Some(format!("Basic {encoded}"));
    }

    /// Serves an image; returns its reference for pulls.
    pub fn push(&self, name: &str, tag: &str, image: &Image) -> String {
        let mut state = self.state.lock().unwrap();
        for blob in image.blobs() {
            let path = format!("/v2/{name}/blobs/{}", digest(blob));
            state
                .content
                .insert(path, ("application/octet-stream".into(), blob.clone()));
        }
        for version in [tag.to_owned(), digest(&image.manifest)] {
            let path = format!("/v2/{name}/manifests/{version}");
            state
                .content
                .insert(path, (MANIFEST.into(), image.manifest.clone()));
        }
        format!("{}/{name}:{tag}", self.address)
    }

    /// Serves one name for several architectures.
    pub fn push_list(&self, name: &str, tag: &str, images: &[(&str, &Image)]) -> String {
        let mut manifests = Vec::new();
        for (architecture, image) in images {
            self.push(name, &format!("{tag}-{architecture}"), image);
            let mut entry = descriptor(MANIFEST, &image.manifest);
            entry["platform"] = serde_json::json!({"os": "linux", "architecture": architecture});
            manifests.push(entry);
        }
        let index =
            serde_json::json!({"schemaVersion": 2, "mediaType": INDEX, "manifests": manifests});
        let index = index.to_string().into_bytes();
        let mut state = self.state.lock().unwrap();
        for version in [tag.to_owned(), digest(&index)] {
            state.content.insert(
                format!("/v2/{name}/manifests/{version}"),
                (INDEX.into(), index.clone()),
            );
        }
        format!("{}/{name}:{tag}", self.address)
    }

    /// Injects a fault from now on.
    pub fn fault(&self, fault: Fault) {
        self.state.lock().unwrap().faults.push(fault);
    }

    /// Removes all faults.
    pub fn mend(&self) {
        self.state.lock().unwrap().faults.clear();
    }

    /// How often a path that contains `part` was fetched.
    pub fn fetched(&self, part: &str) -> usize {
        self.requests("GET", part)
    }

    /// How many blobs were sent here.
    pub fn received(&self) -> usize {
        self.requests("PUT", "/blobs/uploads/")
    }

    fn requests(&self, method: &str, part: &str) -> usize {
        let state = self.state.lock().unwrap();
        state
            .requests
            .iter()
            .filter(|line| {
                let line = line.strip_prefix(method);
                line.is_some_and(|path| path.starts_with(' ') && path.contains(part))
            })
            .count()
    }
}

impl Default for Registry {
    fn default() -> Self {
        Self::new()
    }
}

fn serve(connection: TcpStream, state: &Mutex<State>) -> std::io::Result<()> {
    let mut reader = BufReader::new(connection.try_clone()?);
    let mut writer = connection;
    loop {
        let mut request = String::new();
        if reader.read_line(&mut request)? == 0 {
            return Ok(());
        }
        let (mut from, mut length, mut authorization, mut media_type) =
            (0, 0, None, "application/octet-stream".to_owned());
        loop {
            let mut header = String::new();
            reader.read_line(&mut header)?;
            let value = |header: &str| header.split_once(": ").map(|(_, value)| value.to_owned());
            let (written, header) = (header.trim(), header.trim().to_ascii_lowercase());
            if header.starts_with("authorization: ") {
                authorization = value(written);
            } else if header.starts_with("content-length: ") {
                length = value(written)
                    .and_then(|value| value.parse().ok())
                    .unwrap_or(0);
            } else if header.starts_with("content-type: ") {
                media_type = value(written).unwrap_or(media_type);
            }
            if let Some(range) = header.strip_prefix("range: bytes=") {
                from = range
                    .split('-')
                    .next()
                    .and_then(|first| first.parse().ok())
                    .unwrap_or(0);
            }
            if header.is_empty() {
                break;
            }
        }
        let mut sent = vec![0; length];
        reader.read_exact(&mut sent)?;
        let mut words = request.split(' ');
        let (method, path) = (
            words.next().unwrap_or(""),
            words.next().unwrap_or("").to_owned(),
        );
        let (found, faults) = {
            let mut state = state.lock().unwrap();
            state.requests.push(format!("{method} {path}"));
            let faults = state.faults.clone();
            state
                .faults
                .retain(|fault| !matches!(fault, Fault::BreakOffOnce(part) if path.contains(part)));
            (state.content.get(&path).cloned(), faults)
        };
        let allowed = state.lock().unwrap().account.clone();
        let allowed = allowed.is_none_or(|account| authorization == Some(account));
        if !allowed || method == "POST" || method == "PUT" {
            let (status, headers) = match method {
                _ if !allowed => (401, "WWW-Authenticate: Basic realm=\"test\"\r\n".to_owned()),
                "POST" => (202, format!("Location: {path}1\r\n")),
                _ => (
                    201,
                    take(&mut state.lock().unwrap(), &path, media_type, sent),
                ),
            };
            write!(
                writer,
                "HTTP/1.1 {status} Status\r\nContent-Length: 0\r\n{headers}\r\n"
            )?;
            writer.flush()?;
            continue;
        }
        let (mut status, mut kind, mut body) = match found {
            Some((kind, body)) => (200, kind, body),
            None if path.ends_with("/tags/list") => (
                200,
                "application/json".into(),
                tags(&state.lock().unwrap(), &path),
            ),
            None if path == "/v2/_catalog" => (
                200,
                "application/json".into(),
                repositories(&state.lock().unwrap()),
            ),
            None if path == "/v2/" => (200, "application/json".into(), b"{}".to_vec()),
            None => (
                404,
                "application/json".into(),
                br#"{"errors":[{"code":"NOT_FOUND","message":"no"}]}"#.to_vec(),
            ),
        };
        let digest = digest(&body);
        let mut send = body.len();
        for fault in faults {
            match fault {
                Fault::Status(part, code) if path.contains(&part) => {
                    (status, kind, body) = (code, "text/plain".into(), b"no".to_vec());
                    send = body.len();
                }
                Fault::OtherBytes(part) if path.contains(&part) => {
                    body.iter_mut().for_each(|byte| *byte ^= 1)
                }
                Fault::BreakOffOnce(part) | Fault::BreakOff(part) if path.contains(&part) => {
                    send = body.len() / 2
                }
                Fault::Slow(time) => std::thread::sleep(time),
                _ => {}
            }
        }
        if status == 200 && from > 0 && from < body.len() {
            status = 206;
            body.drain(..from);
            send = send.saturating_sub(from);
        }
        write!(
            writer,
            "HTTP/1.1 {status} Status\r\nContent-Type: {kind}\r\nContent-Length: {}\r\n\
             Docker-Content-Digest: {digest}\r\nAccept-Ranges: bytes\r\n\r\n",
            body.len()
        )?;
        if method != "HEAD" {
            writer.write_all(&body[..send.min(body.len())])?;
            if send < body.len() {
                return Ok(());
            }
        }
        writer.flush()?;
    }
}

/// Keeps a blob or a manifest that was sent; header lines of the answer.
fn take(state: &mut State, path: &str, media_type: String, sent: Vec<u8>) -> String {
    let digest = digest(&sent);
    let (kept, versions) = match path.split_once("/blobs/uploads/") {
        Some((name, query)) => {
            let named = query.rsplit("digest=").next().unwrap_or("");
            assert_eq!(named.replace("%3A", ":"), digest);
            (format!("{name}/blobs"), vec![digest.clone()])
        }
        None => {
            let (kept, tag) = path.rsplit_once('/').unwrap();
            (kept.to_owned(), vec![tag.to_owned(), digest.clone()])
        }
    };
    for version in versions {
        let content = (media_type.clone(), sent.clone());
        state.content.insert(format!("{kept}/{version}"), content);
    }
    format!("Docker-Content-Digest: {digest}\r\n")
}

/// The list of a repository's tags.
fn tags(state: &State, path: &str) -> Vec<u8> {
    let manifests = path.replace("/tags/list", "/manifests/");
    let tags: Vec<&str> = state
        .content
        .keys()
        .filter_map(|path| path.strip_prefix(&manifests))
        .filter(|version| !version.starts_with("sha256:"))
        .collect();
    serde_json::json!({ "tags": tags }).to_string().into_bytes()
}

/// All names that have a manifest.
fn repositories(state: &State) -> Vec<u8> {
    let paths = state.content.keys();
    let names = paths.filter_map(|path| path.strip_prefix("/v2/")?.split_once("/manifests/"));
    let names: BTreeSet<&str> = names.map(|(name, _)| name).collect();
    serde_json::json!({ "repositories": names })
        .to_string()
        .into_bytes()
}

fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::new();
    for group in bytes.chunks(3) {
        let three = [0, 1, 2].map(|at| u32::from(group.get(at).copied().unwrap_or(0)));
        let bits = three[0] << 16 | three[1] << 8 | three[2];
        for digit in 0..4 {
            text.push(match digit <= group.len() {
                true => DIGITS[(bits >> (18 - 6 * digit) & 63) as usize].into(),
                false => '=',
            });
        }
    }
    text
}
