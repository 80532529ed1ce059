//! Pulls from the real `docker-registry`, undisturbed and disturbed.

#![allow(clippy::unwrap_used)]

mod common;

use std::io::Write;
use std::path::PathBuf;
use std::sync::mpsc::channel;
use std::time::Duration;

use common::{
    Layout, Proxy, Recorder, Registry, Tar, begin_answer, free_port, host_architecture,
    made_up_registry, names, noise, own_address, reference, run,
};
use hull_image::{Credentials, Digest, Error, Image, LayerState, Pull, Reference, Result, Store};
use serde_json::json;

/// An htpasswd file: user "user", password "secret".
const USERS: &str = "user:$2y$04$MM0Gc1b5p.GmJNLn5Y0CX.DvsvbAtxRnaHVHJF0.0N979oeCC0ACi\n";

/// A store with its directory.
struct Here {
    dir: tempfile::TempDir,
    store: Store,
}

impl Here {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path().join("store")).unwrap();
        Self { dir, store }
    }

    fn pull(&self, reference: &Reference) -> Result<Image> {
        self.store
            .resolve(reference, Pull::Missing, &Credentials::anonymous(), &())
    }

    /// After a failure: no image, no layer, no archive.
    fn assert_empty(&self) {
        let root = self.store.root();
        assert!(self.store.list().unwrap().is_empty());
        assert_eq!(names(root.join("layers")), Vec::<String>::new());
        assert_eq!(names(root.join("images")), Vec::<String>::new());
        assert_eq!(names(root.join("blobs/sha256")), Vec::<String>::new());
    }

    /// The growing archive of a layer.
    fn part(&self, layer: &Digest) -> PathBuf {
        let name = format!("{}.part", layer.hex());
        self.store.root().join("blobs/sha256").join(name)
    }
}

fn two_layers() -> Vec<Vec<u8>> {
    vec![
        Tar::new()
            .dir("bin")
            .mode(0o755)
            .file("bin/true", b"#!\n")
            .dir("etc")
            .file("etc/old", b"old")
            .finish(),
        Tar::new()
            .dir("etc")
            .file("etc/.wh.old", b"")
            .file("etc/new", b"new")
            .finish(),
    ]
}

/// An image with one layer that does not compress.
fn big_layer(size: usize) -> Vec<Vec<u8>> {
    vec![Tar::new().file("big", noise(size)).finish()]
}

/// The digest of the only layer of a layout's only image.
fn only_layer(layout: &Layout) -> Digest {
    let read = |path| -> serde_json::Value {
        serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
    };
    let index = read(layout.path().join("index.json"));
    let digest =
        |value: &serde_json::Value| value["digest"].as_str().unwrap().parse::<Digest>().unwrap();
    let manifest = read(layout.blob_path(&digest(&index["manifests"][0])));
    digest(&manifest["layers"][0])
}

/// A registry that has an image of one layer, and the layer's digest.
fn serve(name: &str, layers: &[Vec<u8>]) -> (Registry, Digest) {
    let registry = Registry::start();
    let layout = Layout::with(layers);
    registry.push(&layout, "latest", name);
    (registry, only_layer(&layout))
}

#[test]
fn pulls_once_and_then_needs_no_registry() {
    let registry = Registry::start();
    registry.push(&Layout::with(&two_layers()), "latest", "demo:v1");
    let (here, name) = (Here::new(), registry.name("demo:v1"));
    let recorder = Recorder::default();
    let image = here
        .store
        .resolve(&name, Pull::Missing, &Credentials::anonymous(), &recorder)
        .unwrap();
    assert_eq!(image.config.cmd, ["/bin/true"]);
    assert_eq!(image.created.as_deref(), Some("2024-01-02T03:04:05Z"));
    assert_eq!(image.size, 9);
    assert_eq!(
        std::fs::read(image.layers[0].join("etc/new")).unwrap(),
        b"new"
    );
    assert_eq!(
        std::fs::read(image.layers[1].join("etc/old")).unwrap(),
        b"old"
    );
    assert_eq!(
        recorder
            .states()
            .iter()
            .filter(|state| **state == LayerState::Done)
            .count(),
        2
    );
    assert_eq!(recorder.finished(), 1);
    // Only manifest and configuration stay.
    assert_eq!(names(here.store.root().join("blobs/sha256")).len(), 2);

    // Asked again, the registry says that all is here.
    let recorder = Recorder::default();
    let again = here
        .store
        .resolve(&name, Pull::Always, &Credentials::anonymous(), &recorder)
        .unwrap();
    assert_eq!(again, image);
    assert!(recorder.states().is_empty());

    let by_digest = format!("localhost:{}/demo@{}", registry.port, image.digest.unwrap());
    let port = registry.port;
    drop(registry);
    assert_eq!(here.pull(&name).unwrap(), image);
    assert_eq!(here.pull(&reference(&by_digest)).unwrap().id, image.id);
    let id = &image.id["sha256:".len()..];
    assert_eq!(here.pull(&reference(&id[..8])).unwrap().id, image.id);
    assert_eq!(here.pull(&reference(id)).unwrap().id, image.id);
    let error = here
        .store
        .resolve(&name, Pull::Always, &Credentials::anonymous(), &())
        .unwrap_err();
    let text = error.to_string();
    let expected = format!(
        "image \"localhost:{port}/demo:v1\" cannot be pulled: registry localhost:{port} cannot be reached:"
    );
    assert!(
        text.starts_with(&expected) && text.contains("refused"),
        "{text}"
    );
    assert!(matches!(error, Error::Unreachable { .. }));
}

#[test]
fn an_image_that_is_not_there() {
    let registry = Registry::start();
    let (here, port) = (Here::new(), registry.port);
    let error = here.pull(&registry.name("foo")).unwrap_err();
    assert_eq!(
        error.to_string(),
        format!(
            "image \"localhost:{port}/foo\" not found: no such reference in the local store, \
             and registry localhost:{port} answered 404"
        )
    );
    assert!(error.is_not_found() && error.hint().unwrap().contains("hull image ls"));
    registry.push(&Layout::with(&two_layers()), "latest", "foo:there");
    let error = here.pull(&registry.name("foo:elsewhere")).unwrap_err();
    assert!(error.is_not_found(), "{error}");
    let error = here
        .store
        .resolve(
            &registry.name("foo"),
            Pull::Never,
            &Credentials::anonymous(),
            &(),
        )
        .unwrap_err();
    assert!(
        error
            .to_string()
            .ends_with("no such reference in the local store, and pulling is off"),
        "{error}"
    );
    here.assert_empty();
}

#[test]
fn a_registry_that_is_down() {
    let (here, port) = (Here::new(), free_port());
    let error = here
        .pull(&reference(&format!("127.0.0.1:{port}/foo")))
        .unwrap_err();
    assert!(matches!(error, Error::Unreachable { .. }), "{error}");
    assert!(error.to_string().contains("Connection refused"), "{error}");
    // Nothing there speaks TLS, and the name does not exist.
    let error = here.pull(&reference("registry.invalid/foo")).unwrap_err();
    assert!(matches!(error, Error::Unreachable { .. }), "{error}");
    here.assert_empty();
}

#[test]
fn a_truncated_layer() {
    let (registry, layer) = serve("cut", &big_layer(500_000));
    let file = std::fs::OpenOptions::new()
        .write(true)
        .open(registry.blob(&layer))
        .unwrap();
    let size = file.metadata().unwrap().len();
    file.set_len(300_000).unwrap();
    let here = Here::new();
    let name = registry.name("cut");
    let error = here.pull(&name).unwrap_err().to_string();
    assert_eq!(
        error,
        format!(
            "layer {layer} of image \"{}\" is truncated: 300000 of {size} bytes",
            name.written()
        )
    );
    here.assert_empty();
}

#[test]
fn a_corrupt_layer() {
    let (registry, layer) = serve("bad", &big_layer(500_000));
    let mut bytes = std::fs::read(registry.blob(&layer)).unwrap();
    bytes[250_000] ^= 1;
    std::fs::write(registry.blob(&layer), &bytes).unwrap();
    let here = Here::new();
    let error = here.pull(&registry.name("bad")).unwrap_err();
    let Error::WrongDigest {
        what: "layer",
        expected,
        actual,
        ..
    } = &error
    else {
        panic!("{error}")
    };
    assert_eq!((*expected, *actual), (layer, Digest::of(&bytes)));
    here.assert_empty();
}

#[test]
fn a_corrupt_manifest_and_config() {
    let registry = Registry::start();
    let mut layout = Layout::new();
    let entry = layout.image("latest", host_architecture(), &two_layers());
    registry.push(&layout, "latest", "bad");
    let manifest: Digest = entry["digest"].as_str().unwrap().parse().unwrap();
    let text = std::fs::read_to_string(layout.blob_path(&manifest)).unwrap();
    let parsed: serde_json::Value = serde_json::from_str(&text).unwrap();
    let config: Digest = parsed["config"]["digest"]
        .as_str()
        .unwrap()
        .parse()
        .unwrap();
    let here = Here::new();
    let config_text = std::fs::read_to_string(registry.blob(&config)).unwrap();
    std::fs::write(
        registry.blob(&config),
        config_text.replace("/bin/true", "/bin/evil"),
    )
    .unwrap();
    let error = here.pull(&registry.name("bad")).unwrap_err();
    assert!(
        matches!(error, Error::WrongDigest { what: "config", .. }),
        "{error}"
    );
    std::fs::write(registry.blob(&config), &config_text).unwrap();
    // By tag the registry could say anything; by digest it cannot.
    std::fs::write(registry.blob(&manifest), format!("{text} ")).unwrap();
    let error = here
        .pull(&registry.name(&format!("bad@{manifest}")))
        .unwrap_err();
    assert!(!error.is_not_found(), "{error}");
    here.assert_empty();
}

#[test]
fn a_manifest_without_end() {
    for status in ["200 OK", "404 Not Found"] {
        let (sender, sent) = channel();
        let port = made_up_registry(move |request, client| {
            if request.starts_with("GET /v2/ ") {
                return begin_answer(client, "200 OK", "");
            }
            begin_answer(client, status, "");
            let mut count = 0;
            while client.write_all(&[b' '; 65536]).is_ok() {
                count += 65536;
            }
            let _ = sender.send(count);
        });
        let here = Here::new();
        let error = here
            .pull(&reference(&format!("localhost:{port}/endless")))
            .unwrap_err();
        let expected = match status {
            "200 OK" => "the manifest is larger than 4194304 bytes".to_owned(),
            // Of an error's body, a part is enough.
            _ => format!("registry localhost:{port} answered 404"),
        };
        assert!(error.to_string().ends_with(&expected), "{error}");
        // What was read, and what lay in the sockets' buffers.
        let sent = sent.recv_timeout(Duration::from_secs(10)).unwrap();
        assert!(sent < 32 << 20, "{sent}");
        here.assert_empty();
    }
}

#[test]
fn a_token_is_asked_for_once() {
    let (sender, asked) = channel();
    let port = made_up_registry(move |request, client| {
        let line = request.lines().next().unwrap().to_owned();
        let host = request
            .lines()
            .find_map(|line| line.strip_prefix("host: "))
            .unwrap();
        if line.starts_with("GET /v2/ ") {
            let challenge =
                format!("WWW-Authenticate: Bearer realm=\"http://{host}/token\",service=\"s\"\r\n");
            begin_answer(client, "401 Unauthorized", &challenge);
        } else if line.starts_with("GET /token") {
            begin_answer(client, "200 OK", "");
            let _ = client.write_all(br#"{"token":"open-sesame"}"#);
        } else if !request.contains("authorization: Bearer open-sesame\r\n") {
            begin_answer(client, "401 Unauthorized", "");
        } else if line.contains("/manifests/latest ") {
            begin_answer(client, "200 OK", "");
            let entry = json!({
                "digest": Digest::of(b"missing"), "size": 7,
                "mediaType": "application/vnd.oci.image.manifest.v1+json",
                "platform": {"os": "linux", "architecture": host_architecture()},
            });
            let list = json!({
                "schemaVersion": 2, "manifests": [entry],
                "mediaType": "application/vnd.oci.image.index.v1+json",
            });
            let _ = client.write_all(list.to_string().as_bytes());
        } else {
            begin_answer(client, "404 Not Found", "");
        }
        let _ = sender.send(line);
    });
    let here = Here::new();
    let error = here
        .pull(&reference(&format!("localhost:{port}/guarded")))
        .unwrap_err();
    assert!(error.is_not_found(), "{error}");
    let asked: Vec<String> = asked.try_iter().collect();
    let tokens = asked.iter().filter(|line| line.contains("/token"));
    assert_eq!(tokens.count(), 1, "{asked:?}");
    here.assert_empty();
}

#[test]
fn a_layer_that_the_registry_lost() {
    let (registry, layer) = serve("lost", &two_layers()[..1]);
    std::fs::remove_file(registry.blob(&layer)).unwrap();
    let here = Here::new();
    let error = here.pull(&registry.name("lost")).unwrap_err().to_string();
    assert!(
        error.contains("it answered 404 to the request for the layer: "),
        "{error}"
    );
    assert_eq!(
        names(here.store.root().join("layers")),
        Vec::<String>::new()
    );
    assert!(here.store.list().unwrap().is_empty());
}

#[test]
fn images_for_other_machines() {
    let registry = Registry::start();
    let mut layout = Layout::new();
    let other = if host_architecture() == "s390x" {
        "riscv64"
    } else {
        "s390x"
    };
    let foreign = layout.image("foreign", other, &two_layers());
    let ours = layout.image("ours", host_architecture(), &two_layers()[..1]);
    layout.index("both", &[foreign.clone(), ours]);
    layout.index("only", &[foreign]);
    registry.push(&layout, "foreign", "x:foreign");
    registry.push_with(&layout, "both", "x:both", &["--all"]);
    registry.push_with(&layout, "only", "x:only", &["--all"]);
    let here = Here::new();
    for tag in ["x:foreign", "x:only"] {
        let error = here.pull(&registry.name(tag)).unwrap_err().to_string();
        let port = registry.port;
        let host = host_architecture();
        assert_eq!(
            error,
            format!(
                "image \"localhost:{port}/{tag}\" is not available for linux/{host}: it is for linux/{other}"
            )
        );
    }
    here.assert_empty();
    let image = here.pull(&registry.name("x:both")).unwrap();
    assert_eq!(
        (image.config.architecture.as_str(), image.layers.len()),
        (host_architecture(), 1)
    );
}

#[test]
fn a_broken_transfer_is_continued() {
    let (registry, layer) = serve("big", &big_layer(2_000_000));
    let proxy = Proxy::start(&registry);
    let (here, name) = (Here::new(), proxy.name("big"));
    // Each connection breaks after 100 kB: what gets through is kept from one attempt to the next.
    proxy.cut(600_000, 1);
    let recorder = Recorder::default();
    let image = here
        .store
        .resolve(&name, Pull::Missing, &Credentials::anonymous(), &recorder)
        .unwrap();
    assert_eq!(
        std::fs::read(image.layers[0].join("big")).unwrap(),
        noise(2_000_000)
    );
    let requests = proxy.requests(&layer.to_string());
    assert_eq!(requests.len(), 2, "{requests:?}");
    assert!(!requests[1].contains("bytes=0-"), "{requests:?}");
}

#[test]
fn a_given_up_pull_is_continued_by_the_next() {
    let (registry, layer) = serve("big", &big_layer(2_000_000));
    let proxy = Proxy::start(&registry);
    let here = Here::new();
    let part = here.part(&layer);
    // As a killed pull leaves it, and one byte of it is wrong: resumed, found wrong, fetched anew.
    let blob = std::fs::read(registry.blob(&layer)).unwrap();
    std::fs::write(&part, &blob[..1_500_000]).unwrap();
    here.pull(&proxy.name("big")).unwrap();
    let requests = proxy.requests(&layer.to_string());
    assert!(
        requests.len() == 1 && requests[0].contains("bytes=1500000-"),
        "{requests:?}"
    );
    assert!(!part.exists());

    let here = Here::new();
    let part = here.part(&layer);
    let mut bad = blob[..1_000_000].to_vec();
    bad[0] ^= 1;
    std::fs::write(&part, &bad).unwrap();
    here.pull(&proxy.name("big")).unwrap();
    let requests = proxy.requests(&layer.to_string());
    assert!(
        requests[1].contains("bytes=1000000-") && requests[2].contains("bytes=0-"),
        "{requests:?}"
    );
}

#[test]
fn two_pulls_at_once_do_the_work_once() {
    let registry = Registry::start();
    let proxy = Proxy::start(&registry);
    let mut layers = big_layer(1_000_000);
    layers.extend(big_layer(1_500_000));
    layers.push(layers[0].clone());
    registry.push(&Layout::with(&layers), "latest", "twice");
    proxy.slow(Duration::from_millis(2));
    let here = Here::new();
    let images: Vec<Image> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..4)
            .map(|_| {
                scope.spawn(|| {
                    let store = Store::open(here.dir.path().join("store")).unwrap();
                    store
                        .resolve(
                            &proxy.name("twice"),
                            Pull::Missing,
                            &Credentials::anonymous(),
                            &(),
                        )
                        .unwrap()
                })
            })
            .collect();
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap())
            .collect()
    });
    assert!(images.iter().all(|image| image == &images[0]));
    assert_eq!(images[0].layers.len(), 3);
    let layer_requests = proxy.requests("range: bytes=");
    assert_eq!(
        layer_requests.len(),
        2,
        "each layer once: {layer_requests:?}"
    );
    assert_eq!(names(here.store.root().join("layers")).len(), 2);
    assert_eq!(names(here.store.root().join("blobs/sha256")).len(), 2);
}

#[test]
fn credentials() {
    let users = users();
    let registry = Registry::start_with(&auth(&users));
    registry.push_with(
        &Layout::with(&two_layers()),
        "latest",
        "private",
        &["--dest-creds", "user:secret"],
    );
    let (here, name) = (Here::new(), registry.name("private"));
    let error = here.pull(&name).unwrap_err();
    let port = registry.port;
    assert_eq!(
        error.to_string(),
        format!(
            "image \"localhost:{port}/private\" may not be pulled: registry localhost:{port} answered 401 \
             (no credentials were given: none are known)"
        )
    );
    assert_eq!(
        error.hint().unwrap(),
        format!("hull login localhost:{port}")
    );
    let wrong = Credentials::basic("user", "wrong");
    let error = here
        .store
        .resolve(&name, Pull::Missing, &wrong, &())
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("401 to the credentials of user \"user\"") && !error.contains("wrong"),
        "{error}"
    );
    here.assert_empty();
    let config = here.dir.path().join("config.json");
    // user:secret
    let text = format!(r#"{{"auths":{{"localhost:{port}":{{"auth":"dXNlcjpzZWNyZXQ="}}}}}}"#);
    std::fs::write(&config, text).unwrap();
    here.store
        .resolve(
            &name,
            Pull::Missing,
            &Credentials::docker_config(config),
            &(),
        )
        .unwrap();
}

/// Not a test of its own: a pull in a process with an environment of its own, see [`pull_with`].
#[test]
fn pull_in_a_child() {
    let (Ok(root), Ok(name)) = (
        std::env::var("HULL_TEST_STORE"),
        std::env::var("HULL_TEST_IMAGE"),
    ) else {
        return;
    };
    let store = Store::open(root).unwrap();
    match store.resolve(
        &reference(&name),
        Pull::Missing,
        &Credentials::docker(),
        &(),
    ) {
        Ok(image) => println!("pulled {}", image.layers.len()),
        Err(error) => println!("failed: {error}"),
    }
}

/// Pulls with some environment variables; gives what the child says.
fn pull_with(here: &Here, name: &str, environment: &[(&str, &str)]) -> String {
    let output = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "pull_in_a_child", "--nocapture", "-q"])
        .env("HULL_TEST_STORE", here.store.root())
        .env("HULL_TEST_IMAGE", name)
        .envs(environment.iter().copied())
        .output()
        .unwrap();
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[test]
fn https_trusts_only_known_certificates() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).display().to_string();
    let address = own_address();
    let authority = [
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:P-256",
        "-nodes",
        "-days",
        "2",
        "-x509",
    ];
    let mut arguments = vec!["req"];
    arguments.extend(authority);
    let (ca_key, ca, key, request, certificate, names_file) = (
        path("ca.key"),
        path("ca.pem"),
        path("key"),
        path("request"),
        path("cert.pem"),
        path("names"),
    );
    arguments.extend([
        "-subj",
        "/CN=test authority",
        "-keyout",
        &ca_key,
        "-out",
        &ca,
    ]);
    run("openssl", &arguments);
    let mut arguments = vec!["req"];
    arguments.extend(&authority[..5]);
    arguments.extend([
        "-subj",
        "/CN=test registry",
        "-keyout",
        &key,
        "-out",
        &request,
    ]);
    run("openssl", &arguments);
    std::fs::write(
        &names_file,
        format!("subjectAltName=IP:{address},IP:127.0.0.1\n"),
    )
    .unwrap();
    run(
        "openssl",
        &[
            "x509",
            "-req",
            "-in",
            &request,
            "-CA",
            &ca,
            "-CAkey",
            &ca_key,
            "-CAcreateserial",
            "-days",
            "2",
            "-extfile",
            &names_file,
            "-out",
            &certificate,
        ],
    );
    let tls = format!("  tls:\n    certificate: {certificate}\n    key: {key}\n");
    let registry = Registry::start_on("0.0.0.0", &tls);
    registry.push(&Layout::with(&two_layers()), "latest", "secure");
    let name = format!("{address}:{}/secure", registry.port);
    let here = Here::new();
    let said = pull_with(&here, &name, &[]);
    assert!(
        said.contains("cannot be reached: invalid peer certificate"),
        "{said}"
    );
    let said = pull_with(&here, &name, &[("SSL_CERT_FILE", &ca)]);
    assert!(said.contains("pulled 2"), "{said}");
    // A machine without any certificates: an error, and no panic of a library.
    let said = pull_with(
        &Here::new(),
        &name,
        &[
            ("SSL_CERT_FILE", "/nonexistent"),
            ("SSL_CERT_DIR", "/nonexistent"),
        ],
    );
    assert!(said.contains("no CA certificates"), "{said}");
}

#[test]
fn credential_helpers() {
    let users = users();
    let registry = Registry::start_with(&auth(&users));
    registry.push_with(
        &Layout::with(&two_layers()),
        "latest",
        "private",
        &["--dest-creds", "user:secret"],
    );
    let name = format!("localhost:{}/private", registry.port);
    let dir = tempfile::tempdir().unwrap();
    let helper = dir.path().join("docker-credential-test");
    let path = format!(
        "{}:{}",
        dir.path().display(),
        std::env::var("PATH").unwrap()
    );
    let docker_config = dir.path().display().to_string();
    let environment = [
        ("PATH", path.as_str()),
        ("DOCKER_CONFIG", docker_config.as_str()),
    ];
    std::fs::write(dir.path().join("config.json"), r#"{"credsStore":"test"}"#).unwrap();
    let say = |script: &str| {
        std::fs::write(&helper, format!("#!/bin/sh\n{script}\n")).unwrap();
        run("chmod", &["755", helper.to_str().unwrap()]);
        pull_with(&Here::new(), &name, &environment)
    };
    let answer = format!(
        "read server; [ \"$1 $server\" = \"get localhost:{}\" ] && echo '{{\"Username\":\"user\",\"Secret\":\"secret\"}}'",
        registry.port
    );
    assert!(say(&answer).contains("pulled 2"));
    let said = say("echo credentials not found in native keychain; exit 1");
    assert!(
        said.contains("answered 401 (no credentials were given"),
        "{said}"
    );
    let said = say("echo the keyring is locked; exit 1");
    assert!(
        said.contains("docker-credential-test failed (exit status: 1): the keyring is locked"),
        "{said}"
    );
    let said = say("echo nonsense");
    assert!(
        said.contains("did not answer with a user name and a secret"),
        "{said}"
    );
}

/// A file with user "user", whose password is "secret".
fn users() -> tempfile::NamedTempFile {
    let users = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(users.path(), USERS).unwrap();
    users
}

fn auth(users: &tempfile::NamedTempFile) -> String {
    format!(
        "auth:\n  htpasswd:\n    realm: test\n    path: {}\n",
        users.path().display()
    )
}

#[test]
fn a_full_disk() {
    let registry = Registry::start();
    registry.push(&Layout::with(&big_layer(3_000_000)), "latest", "big");
    let dir = tempfile::tempdir().unwrap();
    let mount = dir.path().join("small");
    std::fs::create_dir(&mount).unwrap();
    let path = mount.to_str().unwrap();
    struct Unmount(String);
    impl Drop for Unmount {
        fn drop(&mut self) {
            run("umount", &[&self.0]);
        }
    }
    // Room for neither the archive, nor (with more) the layer beside it.
    for size in ["size=2m", "size=5m"] {
        run("mount", &["-t", "tmpfs", "-o", size, "tmpfs", path]);
        let _unmount = Unmount(path.to_owned());
        let store = Store::open(mount.join("store")).unwrap();
        let error = store
            .resolve(
                &registry.name("big"),
                Pull::Missing,
                &Credentials::anonymous(),
                &(),
            )
            .unwrap_err();
        assert!(
            matches!(error, Error::NoSpace { .. } | Error::Reserve { .. }),
            "{size}: {error}"
        );
        assert!(error.to_string().starts_with("no space left "), "{error}");
        assert!(store.list().unwrap().is_empty());
        for dir in ["layers", "images", "blobs/sha256"] {
            assert_eq!(
                names(store.root().join(dir)),
                Vec::<String>::new(),
                "{size} {dir}"
            );
        }
    }
}
