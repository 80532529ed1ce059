//! Pushes to the real `docker-registry`, and to made up ones.

#![allow(clippy::unwrap_used)]

mod common;

use std::io::Write;

use common::{
    Layout, Proxy, Recorder, Registry, Tar, begin_answer, made_up_registry, noise, own_address,
    reference,
};
use hull_image::{
    Credentials, Error, Image, LayerState, Pull, Pushed, Reference, RegistryReference, Result,
    Store,
};

/// An htpasswd file: user "user", password "secret".
const USERS: &str = "user:$2y$04$MM0Gc1b5p.GmJNLn5Y0CX.DvsvbAtxRnaHVHJF0.0N979oeCC0ACi\n";

struct Here {
    _dir: tempfile::TempDir,
    store: Store,
}

impl Here {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path().join("store")).unwrap();
        Self { _dir: dir, store }
    }

    fn get(&self, reference: &Reference) -> Image {
        self.store
            .resolve(reference, Pull::Missing, &Credentials::anonymous(), &())
            .unwrap()
    }

    /// An image of the archives under a name.
    fn image(&self, layers: &[Vec<u8>], as_name: &Reference) -> Image {
        let image = self.get(&Layout::with(layers).reference());
        self.store
            .tag(&reference(&image.id), &name(as_name))
            .unwrap();
        image
    }

    fn push(&self, reference: &Reference) -> Result<Pushed> {
        self.store
            .push(&name(reference), &Credentials::anonymous(), &())
    }
}

fn name(reference: &Reference) -> RegistryReference {
    match reference {
        Reference::Registry(name) => name.clone(),
        other => panic!("{other}"),
    }
}

fn layers() -> Vec<Vec<u8>> {
    vec![
        Tar::new().file("big", noise(3_000_000)).finish(),
        Tar::new().file("small", b"2").finish(),
        Tar::new().file("big", noise(3_000_000)).finish(),
    ]
}

#[test]
fn what_is_pushed_is_pulled_with_the_same_id() {
    let (registry, here) = (Registry::start(), Here::new());
    let target = registry.name("team/app:1");
    let image = here.image(&layers(), &target);
    let pushed = here.push(&target).unwrap();
    assert_eq!(pushed.tag, "1");
    let there = Here::new();
    let pulled = there.get(&target);
    assert_eq!(pulled.id, image.id);
    assert_eq!(pulled.digest, Some(pushed.digest));
    assert_eq!(std::fs::read(pulled.layers[1].join("small")).unwrap(), b"2");
    // Of a pulled image the registry has all layers as they came: its manifest stays.
    let other = registry.name("team/app:2");
    there.store.tag(&target, &name(&other)).unwrap();
    assert_eq!(there.push(&other).unwrap().digest, pushed.digest);
}

#[test]
fn what_the_registry_has_is_not_sent_again() {
    let (registry, here) = (Registry::start(), Here::new());
    let proxy = Proxy::start(&registry);
    let target = proxy.name("app:1");
    here.image(&layers(), &target);
    let first = here.push(&target).unwrap();
    // Two different layers and the configuration.
    assert_eq!(proxy.requests("POST /v2/app/blobs/uploads/").len(), 3);
    let recorder = Recorder::default();
    let again = here
        .store
        .push(&name(&target), &Credentials::anonymous(), &recorder)
        .unwrap();
    assert_eq!(again, first);
    assert_eq!(proxy.requests("POST /v2/app/blobs/uploads/").len(), 3);
    assert!(
        recorder
            .states()
            .iter()
            .all(|state| *state == LayerState::Present),
        "nothing is packed again"
    );
    assert_eq!(recorder.finished(), 1);
}

#[test]
fn an_image_from_docker_is_pushed_to_another_registry() {
    let (one, other, here) = (Registry::start(), Registry::start(), Here::new());
    let layout = Layout::with(&layers());
    one.push_with(&layout, "latest", "app", &["--format", "v2s2"]);
    let image = here.get(&one.name("app"));
    let target = other.name("copy:x");
    here.store.tag(&one.name("app"), &name(&target)).unwrap();
    here.push(&target).unwrap();
    assert_eq!(Here::new().get(&target).id, image.id);
}

#[test]
fn credentials_are_needed_and_used() {
    let dir = tempfile::tempdir().unwrap();
    let users = dir.path().join("users");
    std::fs::write(&users, USERS).unwrap();
    let registry = Registry::start_with(&format!(
        "auth:\n  htpasswd:\n    realm: test\n    path: {}\n",
        users.display()
    ));
    let (here, target) = (Here::new(), registry.name("app:1"));
    here.image(&layers(), &target);
    let error = here.push(&target).unwrap_err();
    let port = registry.port;
    assert_eq!(
        error.to_string(),
        format!(
            "image \"localhost:{port}/app:1\" may not be pushed: registry localhost:{port} \
             answered 401 (no credentials were given: none are known)"
        )
    );
    assert_eq!(
        error.hint().unwrap(),
        format!("hull login localhost:{port}")
    );
    let credentials = Credentials::basic("user", "secret");
    here.store.push(&name(&target), &credentials, &()).unwrap();
    Here::new()
        .store
        .resolve(&target, Pull::Missing, &credentials, &())
        .unwrap();
}

#[test]
fn only_local_names_are_pushed() {
    let (registry, here) = (Registry::start(), Here::new());
    let image = here.image(&layers(), &registry.name("app:1"));
    let error = here.push(&registry.name("app:2")).unwrap_err();
    assert!(matches!(error, Error::NotFound { .. }), "{error}");
    let error = here.push(&reference(&image.id[7..19])).unwrap_err();
    assert!(error.is_not_found(), "{error}");
}

#[test]
fn a_registry_that_is_ill_is_asked_again_and_then_named() {
    let port = made_up_registry(|request, client| {
        let status = match request.split(' ').next() {
            Some("HEAD") => "404 Not Found",
            Some("POST") => "503 Service Unavailable",
            _ => "200 OK",
        };
        begin_answer(client, status, "Content-Length: 0\r\n");
    });
    let here = Here::new();
    let target = reference(&format!("localhost:{port}/app:1"));
    here.image(&layers(), &target);
    let error = here.push(&target).unwrap_err().to_string();
    assert_eq!(
        error,
        format!(
            "image \"localhost:{port}/app:1\" cannot be pushed: registry localhost:{port}: it \
             answered 503 to the request for the layer"
        )
    );
}

#[test]
fn a_login_gets_no_token_without_the_password() {
    // Its token service would be in another domain: an anonymous token proves nothing.
    let service = made_up_registry(|_, client| {
        begin_answer(client, "200 OK", "");
        let _ = client.write_all(b"{\"token\": \"t\"}");
    });
    let realm = format!("http://{}:{service}/token", own_address());
    let port = made_up_registry(move |request, client| {
        if request.contains("authorization: Basic") {
            begin_answer(client, "500 Leaked", "");
        } else if request.starts_with("GET /v2/ ") && !request.contains("Bearer") {
            let challenge = format!("WWW-Authenticate: Bearer realm=\"{realm}\"\r\n");
            begin_answer(client, "401 Unauthorized", &challenge);
        } else {
            begin_answer(client, "200 OK", "");
        }
    });
    let account = hull_image::Account::docker(Some(&format!("localhost:{port}"))).unwrap();
    let error = account.check("user", "secret").unwrap_err().to_string();
    assert!(error.contains("in another domain"), "{error}");
    // Without accounts, any is taken, as with Docker.
    let open = made_up_registry(|_, client| begin_answer(client, "200 OK", ""));
    let account = hull_image::Account::docker(Some(&format!("localhost:{open}"))).unwrap();
    account.check("user", "secret").unwrap();
}

#[test]
fn a_token_for_a_push_is_one_for_writing() {
    let (sender, requests) = std::sync::mpsc::channel();
    let port = made_up_registry(move |request, client| {
        let _ = sender.send(request.lines().next().unwrap_or("").to_owned());
        if request.starts_with("GET /v2/ ") {
            let host = request
                .lines()
                .find_map(|line| line.strip_prefix("host: "))
                .unwrap_or("localhost");
            let challenge =
                format!("WWW-Authenticate: Bearer realm=\"http://{host}/token\",service=\"s\"\r\n");
            begin_answer(client, "401 Unauthorized", &challenge);
        } else if request.starts_with("GET /token") {
            begin_answer(client, "200 OK", "");
            let _ = client.write_all(b"{\"token\": \"t\"}");
        } else {
            begin_answer(client, "403 Forbidden", "");
        }
    });
    let here = Here::new();
    let target = reference(&format!("localhost:{port}/team/app:1"));
    here.image(&layers(), &target);
    let error = here.push(&target).unwrap_err();
    assert!(matches!(error, Error::Unauthorized { .. }), "{error}");
    let asked: Vec<String> = requests.try_iter().collect();
    let scope = "scope=repository%3Ateam%2Fapp%3Apull%2Cpush";
    assert!(asked.iter().any(|line| line.contains(scope)), "{asked:?}");
}

#[test]
fn the_tags_of_a_repository_are_listed_also_in_parts() {
    let tags = |name: &Reference| {
        let tags = hull_image::remote_tags(&self::name(name), &Credentials::anonymous())?;
        Ok::<_, Error>(tags.iter().map(ToString::to_string).collect::<Vec<_>>())
    };
    let registry = Registry::start();
    let layout = Layout::with(&[Tar::new().file("a", b"1").finish()]);
    registry.push(&layout, "latest", "team/app:1");
    registry.push(&layout, "latest", "team/app:2");
    let name = registry.name("team/app");
    let host = format!("localhost:{}", registry.port);
    assert_eq!(
        tags(&name).unwrap(),
        [format!("{host}/team/app:1"), format!("{host}/team/app:2")]
    );
    assert!(tags(&registry.name("nothing")).unwrap_err().is_not_found());

    let port = made_up_registry(|request, client| {
        let (headers, body) = match request.split(' ').nth(1) {
            Some("/v2/a/tags/list") => (
                "Link: </v2/a/tags/list?last=x>; rel=\"next\"\r\n",
                r#"{"name":"a","tags":["x"]}"#,
            ),
            Some("/v2/a/tags/list?last=x") => ("", r#"{"name":"a","tags":["y"]}"#),
            Some("/v2/b/tags/list") => ("", r#"{"tags":null}"#),
            Some("/v2/c/tags/list") => ("Link: <http://192.0.2.7/>; rel=\"next\"\r\n", "{}"),
            Some("/v2/d/tags/list") => ("Link: </v2/d/tags/list>; rel=\"next\"\r\n", "{}"),
            Some("/v2/e/tags/list") => ("", r#"{"tags":["no tag"]}"#),
            _ => ("", "{}"),
        };
        begin_answer(client, "200 OK", headers);
        let _ = client.write_all(body.as_bytes());
    });
    let of = |name: &str| tags(&reference(&format!("localhost:{port}/{name}")));
    assert_eq!(
        of("a").unwrap(),
        [
            format!("localhost:{port}/a:x"),
            format!("localhost:{port}/a:y")
        ]
    );
    assert!(of("b").unwrap().is_empty());
    for (name, reason) in [("c", "elsewhere"), ("d", "1000 parts"), ("e", "no tag")] {
        let error = of(name).unwrap_err().to_string();
        assert!(error.contains(reason), "{error}");
    }
}
