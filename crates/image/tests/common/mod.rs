//! What the tests of this crate share: OCI layouts made from nothing, a real registry, and a proxy
//! that cuts lines.
//!
//! A missing tool fails the test with its name.

#![allow(dead_code, unused_imports, clippy::unwrap_used)] // each test binary uses a part

#[path = "../../src/unpack/testing.rs"]
pub mod testing;

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use hull_image::{Digest, Event, LayerState, Progress, Reference};
use serde_json::{Value, json};

pub use testing::Tar;

/// Runs a tool; its absence or failure fails the test.
pub fn run(program: &str, arguments: &[&str]) {
    let output = Command::new(program)
        .args(arguments)
        .output()
        .unwrap_or_else(|error| panic!("this test needs {program}: {error}"));
    assert!(
        output.status.success(),
        "{program} {arguments:?}: {}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}

pub fn reference(text: &str) -> Reference {
    text.parse().unwrap()
}

/// Bytes that no compression makes smaller.
pub fn noise(length: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64 ^ length as u64;
    (0..length)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 24) as u8
        })
        .collect()
}

pub fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// An OCI image layout in a directory of its own.
pub struct Layout {
    dir: tempfile::TempDir,
    entries: Vec<Value>,
}

impl Layout {
    pub fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(dir.path().join("blobs/sha256")).unwrap();
        std::fs::write(
            dir.path().join("oci-layout"),
            r#"{"imageLayoutVersion":"1.0.0"}"#,
        )
        .unwrap();
        Self {
            dir,
            entries: Vec::new(),
        }
    }

    /// A layout with one image for this machine, tagged `latest`, of the given archives, lowest
    /// first.
    pub fn with(layers: &[Vec<u8>]) -> Self {
        let mut layout = Self::new();
        layout.image("latest", host_architecture(), layers);
        layout
    }

    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    pub fn reference(&self) -> Reference {
        reference(&format!("oci:{}", self.path().display()))
    }

    pub fn blob_path(&self, digest: &Digest) -> PathBuf {
        self.path().join("blobs/sha256").join(digest.hex())
    }

    pub fn blob(&self, bytes: &[u8]) -> Digest {
        let digest = Digest::of(bytes);
        std::fs::write(self.blob_path(&digest), bytes).unwrap();
        digest
    }

    /// Adds an image; gives the descriptor of its manifest.
    pub fn image(&mut self, tag: &str, architecture: &str, layers: &[Vec<u8>]) -> Value {
        let ids: Vec<String> = layers
            .iter()
            .map(|layer| Digest::of(layer).to_string())
            .collect();
        let config = json!({
            "architecture": architecture, "os": "linux", "created": "2024-01-02T03:04:05Z",
            "config": {"Cmd": ["/bin/true"], "Env": ["PATH=/bin"], "Labels": {"tag": tag}},
            "rootfs": {"type": "layers", "diff_ids": ids},
        });
        let compressed: Vec<Vec<u8>> = layers.iter().map(|layer| gzip(layer)).collect();
        self.image_of(
            tag,
            &config,
            &compressed,
            "application/vnd.oci.image.layer.v1.tar+gzip",
        )
    }

    pub fn image_of(
        &mut self,
        tag: &str,
        config: &Value,
        layers: &[Vec<u8>],
        layer_type: &str,
    ) -> Value {
        let config_bytes = config.to_string().into_bytes();
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": self.descriptor("application/vnd.oci.image.config.v1+json", &config_bytes),
            "layers": layers.iter().map(|layer| self.descriptor(layer_type, layer)).collect::<Vec<_>>(),
        });
        let manifest = manifest.to_string().into_bytes();
        let mut entry = self.descriptor("application/vnd.oci.image.manifest.v1+json", &manifest);
        entry["platform"] = json!({"os": config["os"], "architecture": config["architecture"]});
        self.tag(tag, entry.clone());
        entry
    }

    /// Adds a list of images.
    pub fn index(&mut self, tag: &str, manifests: &[Value]) {
        let list = json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.index.v1+json",
            "manifests": manifests,
        });
        let entry = self.descriptor(
            "application/vnd.oci.image.index.v1+json",
            list.to_string().as_bytes(),
        );
        self.tag(tag, entry);
    }

    pub fn descriptor(&self, media_type: &str, bytes: &[u8]) -> Value {
        let digest = self.blob(bytes).to_string();
        json!({"mediaType": media_type, "digest": digest, "size": bytes.len()})
    }

    pub fn tag(&mut self, tag: &str, mut entry: Value) {
        entry["annotations"] = json!({"org.opencontainers.image.ref.name": tag});
        self.entries.push(entry);
        let index = json!({"schemaVersion": 2, "manifests": self.entries});
        std::fs::write(self.path().join("index.json"), index.to_string()).unwrap();
    }
}

/// The architecture as images name it.
pub fn host_architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

/// A `docker-registry` of its own, with its storage in a temporary directory.
pub struct Registry {
    child: Child,
    pub port: u16,
    storage: tempfile::TempDir,
}

impl Registry {
    pub fn start() -> Self {
        Self::start_with("")
    }

    /// With further lines of configuration.
    pub fn start_with(more: &str) -> Self {
        Self::start_on("127.0.0.1", more)
    }

    /// On an address, with further lines of the configuration of `http` and what follows it.
    pub fn start_on(address: &str, more: &str) -> Self {
        let storage = tempfile::tempdir().unwrap();
        let port = free_port();
        let config = format!(
            "version: 0.1\nlog:\n  level: error\nstorage:\n  filesystem:\n    rootdirectory: {}\n\
             http:\n  addr: {address}:{port}\n{more}",
            storage.path().join("data").display()
        );
        let file = storage.path().join("config.yml");
        std::fs::write(&file, config).unwrap();
        let log = std::fs::File::create(storage.path().join("log")).unwrap();
        let child = Command::new("docker-registry")
            .arg("serve")
            .arg(&file)
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap_or_else(|error| panic!("this test needs docker-registry: {error}"));
        let registry = Self {
            child,
            port,
            storage,
        };
        let start = Instant::now();
        while TcpStream::connect(("127.0.0.1", port)).is_err() {
            assert!(
                start.elapsed() < Duration::from_secs(20),
                "docker-registry does not answer"
            );
            std::thread::sleep(Duration::from_millis(20));
        }
        registry
    }

    /// Copies an image of a layout to the registry.
    pub fn push(&self, layout: &Layout, tag: &str, name: &str) {
        self.push_with(layout, tag, name, &[]);
    }

    pub fn push_with(&self, layout: &Layout, tag: &str, name: &str, options: &[&str]) {
        let from = format!("oci:{}:{tag}", layout.path().display());
        let to = format!("docker://127.0.0.1:{}/{name}", self.port);
        let mut arguments = vec![
            "--insecure-policy",
            "copy",
            "-q",
            "--preserve-digests",
            "--dest-tls-verify=false",
        ];
        arguments.extend(options);
        arguments.extend([from.as_str(), to.as_str()]);
        run("skopeo", &arguments);
    }

    pub fn name(&self, name: &str) -> Reference {
        reference(&format!("localhost:{}/{name}", self.port))
    }

    /// The file that holds a blob.
    pub fn blob(&self, digest: &Digest) -> PathBuf {
        let hex = digest.hex();
        self.storage
            .path()
            .join("data/docker/registry/v2/blobs/sha256")
            .join(&hex[..2])
            .join(&hex)
            .join("data")
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .port()
}

/// Stands between a client and a registry, counts, and cuts connections.
pub struct Proxy {
    pub port: u16,
    state: Arc<ProxyState>,
}

#[derive(Default)]
struct ProxyState {
    /// Bytes after which a connection towards the client is cut; 0 for never.
    cut_after: AtomicU64,
    /// How many connections are still to be cut.
    cuts: AtomicUsize,
    /// First lines and range headers of what was asked.
    requests: Mutex<Vec<String>>,
    /// Pause before each piece of an answer.
    slow: Mutex<Duration>,
}

impl Proxy {
    pub fn start(registry: &Registry) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let state = Arc::new(ProxyState::default());
        let (shared, target) = (state.clone(), registry.port);
        // The thread ends with the test's process.
        std::thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let Ok(server) = TcpStream::connect(("127.0.0.1", target)) else {
                    continue;
                };
                let (to_server, to_client) = (shared.clone(), shared.clone());
                let ends = (client.try_clone().unwrap(), server.try_clone().unwrap());
                std::thread::spawn(move || to_server.requests(client, server));
                std::thread::spawn(move || to_client.answers(ends.1, ends.0));
            }
        });
        Self { port, state }
    }

    pub fn name(&self, name: &str) -> Reference {
        reference(&format!("localhost:{}/{name}", self.port))
    }

    /// Cuts the next `times` connections that carry more than `bytes`.
    pub fn cut(&self, bytes: u64, times: usize) {
        self.state.cut_after.store(bytes, Ordering::SeqCst);
        self.state.cuts.store(times, Ordering::SeqCst);
    }

    pub fn slow(&self, pause: Duration) {
        *self.state.slow.lock().unwrap() = pause;
    }

    /// The requests so far whose text contains `what`.
    pub fn requests(&self, what: &str) -> Vec<String> {
        let all = self.state.requests.lock().unwrap();
        all.iter()
            .filter(|request| request.contains(what))
            .cloned()
            .collect()
    }
}

impl ProxyState {
    fn requests(&self, mut client: TcpStream, mut server: TcpStream) {
        let mut buffer = [0; 16384];
        while let Ok(read @ 1..) = client.read(&mut buffer) {
            // Requests without a body are small and come in one piece.
            let text = String::from_utf8_lossy(&buffer[..read]).into_owned();
            let range = text
                .lines()
                .find(|line| line.to_lowercase().starts_with("range:"))
                .unwrap_or("");
            let first = text.lines().next().unwrap_or("");
            self.requests
                .lock()
                .unwrap()
                .push(format!("{first} {range}"));
            if server.write_all(&buffer[..read]).is_err() {
                break;
            }
        }
        let _ = server.shutdown(Shutdown::Both);
    }

    fn answers(&self, mut server: TcpStream, mut client: TcpStream) {
        let mut buffer = [0; 16384];
        let mut sent = 0;
        while let Ok(read @ 1..) = server.read(&mut buffer) {
            let pause = *self.slow.lock().unwrap();
            if !pause.is_zero() {
                std::thread::sleep(pause);
            }
            sent += read as u64;
            let limit = self.cut_after.load(Ordering::SeqCst);
            let cut = limit > 0 && sent > limit && {
                let decrement = |cuts: usize| cuts.checked_sub(1);
                self.cuts
                    .fetch_update(Ordering::SeqCst, Ordering::SeqCst, decrement)
                    .is_ok()
            };
            if cut || client.write_all(&buffer[..read]).is_err() {
                break;
            }
        }
        let _ = client.shutdown(Shutdown::Both);
        let _ = server.shutdown(Shutdown::Both);
    }
}

/// Keeps what is reported.
#[derive(Default)]
pub struct Recorder(Mutex<Vec<(String, LayerState)>>, AtomicUsize);

impl Progress for Recorder {
    fn event(&self, event: Event<'_>) {
        match event {
            Event::Layer { digest, state } => {
                self.0.lock().unwrap().push((digest.to_string(), state))
            }
            Event::Finished => _ = self.1.fetch_add(1, Ordering::SeqCst),
            Event::Started { .. } => {}
        }
    }
}

impl Recorder {
    pub fn states(&self) -> Vec<LayerState> {
        self.0
            .lock()
            .unwrap()
            .iter()
            .map(|(_, state)| *state)
            .collect()
    }

    pub fn finished(&self) -> usize {
        self.1.load(Ordering::SeqCst)
    }
}

/// Names in a directory of the store, sorted.
pub fn names(dir: impl AsRef<Path>) -> Vec<String> {
    let mut names: Vec<String> = std::fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

/// A registry of our own: `answer` gets each request's text and the connection, which is closed
/// afterwards; its port.
pub fn made_up_registry(answer: impl Fn(&str, &mut TcpStream) + Send + 'static) -> u16 {
    let listener = TcpListener::bind("0.0.0.0:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    // The thread ends with the test's process.
    std::thread::spawn(move || {
        for mut client in listener.incoming().flatten() {
            // Requests without a body are small and come in one piece.
            let mut request = [0; 4096];
            let read = client.read(&mut request).unwrap_or(0);
            answer(&String::from_utf8_lossy(&request[..read]), &mut client);
        }
    });
    port
}

/// Sends the beginning of an answer: a status, and further header lines.
pub fn begin_answer(client: &mut TcpStream, status: &str, headers: &str) {
    let _ = write!(
        client,
        "HTTP/1.1 {status}\r\nConnection: close\r\n{headers}\r\n"
    );
}

/// An address of this machine that is not a loopback one, so that https is spoken with it.
pub fn own_address() -> String {
    let socket = std::net::UdpSocket::bind("0.0.0.0:0").unwrap();
    // Nothing is sent: it only chooses a route.
    socket
        .connect("192.0.2.1:9")
        .expect("this test needs a network address beside loopback");
    socket.local_addr().unwrap().ip().to_string()
}
