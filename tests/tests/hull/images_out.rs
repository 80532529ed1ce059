//! Images on their way to others: names, archives, registries and accounts there; and what is said
//! of images that are here.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

use hull_tests::{
    Archive, Hull, Image, Invocation, Layout, Registry, Terminal, architecture, busybox_archive,
    installed, left_out,
};
use serde_json::Value;

/// Busybox in one layer; another one with a file that is there twice, and a whiteout.
fn two_layers() -> Image {
    let second = Archive::new()
        .file("second", "first content")
        .file("second", "layer two\n")
        .file("etc/.wh.group", "");
    Image::new(&[fs::read(busybox_archive()).unwrap(), second.bytes()]).with_config(|config| {
        config["created"] = "2024-01-02T03:04:05Z".into();
        config["config"]["Labels"] = serde_json::json!({"kind": "test"});
        config["history"] = serde_json::json!([
            {"created": "2024-01-01T00:00:00Z", "created_by": "ADD busybox.tar / # base"},
            {"created_by": "ENV FROM_IMAGE=yes", "empty_layer": true},
            {"created_by": "RUN echo layer two", "comment": "the second"},
        ]);
    })
}

/// A hull with the image of two layers under a name.
fn with_image(name: &str) -> Hull {
    let hull = Hull::empty();
    import(&hull, &two_layers(), name);
    hull
}

fn import(hull: &Hull, image: &Image, name: &str) {
    let directory = hull.path(&hull.unique("layout"));
    Layout::write(&directory, &[("latest", image)]);
    let source = format!("oci:{}", directory.display());
    hull.hull(["image", "import", &source, name]).run().ok();
}

fn id(hull: &Hull, name: &str) -> String {
    let inspected = hull.hull(["image", "inspect", name]).run().ok().json();
    inspected[0]["Hull"]["id"].as_str().unwrap().to_owned()
}

/// The names of the images that `image ls` shows with these options.
fn listed(hull: &Hull, options: &[&str]) -> Vec<String> {
    let arguments = [&["image", "ls", "--json"], options].concat();
    let list = hull.hull(arguments).run().ok().json();
    let name = |image: &Value| image["reference"].as_str().unwrap_or("<none>").to_owned();
    let mut names: Vec<String> = list.as_array().unwrap().iter().map(name).collect();
    names.sort();
    names
}

#[test]
fn an_image_that_is_saved_and_loaded_has_its_id_and_its_names_and_runs() {
    let hull = with_image("app:1");
    hull.hull(["tag", "app:1", "localhost:5000/team/app:x"])
        .run()
        .ok();
    let file = hull.path("saved.tar");
    let names = ["app:1", "localhost:5000/team/app:x"];
    hull.hull(["save", "-o"]).arg(&file).args(names).run().ok();
    let mode = fs::metadata(&file).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);

    let other = Hull::empty();
    let loaded = other.hull(["load", "-i"]).arg(&file).run().ok();
    assert_eq!(
        loaded.text(),
        "Loaded image: app:1\nLoaded image: localhost:5000/team/app:x"
    );
    assert_eq!(id(&other, "app:1"), id(&hull, "app:1"));
    let output = other
        .hull(["run", "--rm", "--pull", "never", "app:1", "cat", "/second"])
        .run()
        .ok();
    assert_eq!(output.text(), "layer two");
    let again = other.path("again.tar");
    other
        .hull(["save", "-o"])
        .arg(&again)
        .args(names)
        .run()
        .ok();
    assert!(
        fs::read(again).unwrap() == fs::read(file).unwrap(),
        "the same images give the same archive"
    );
}

#[test]
fn archives_go_through_pipes_and_not_to_terminals() {
    let hull = with_image("app:1");
    let saved = hull.hull(["image", "save", "app:1"]).run().ok();
    let other = Hull::empty();
    let loaded = other.hull(["image", "load"]).input(saved.stdout).run().ok();
    assert_eq!(loaded.text(), "Loaded image: app:1");

    let by_id = hull.hull(["save", &id(&hull, "app:1")]).run().ok();
    let nameless = Hull::empty();
    let loaded = nameless.hull(["load"]).input(by_id.stdout).run().ok();
    let expected = format!("Loaded image ID: {}", id(&hull, "app:1"));
    assert_eq!(loaded.text(), expected);

    let mut terminal = Terminal::start(hull.hull(["save", "app:1"]), 24, 80);
    terminal.wait_for("not written to a terminal");
    assert_eq!(terminal.wait(), 125);
    let mut terminal = Terminal::start(hull.hull(["load"]), 24, 80);
    terminal.wait_for("not read from a terminal");
    assert_eq!(terminal.wait(), 125);
}

#[test]
fn what_cannot_be_saved_leaves_no_file() {
    let hull = with_image("app:1");
    let file = hull.path("saved.tar");
    hull.hull(["save", "-o"])
        .arg(&file)
        .args(["app:1", "nothing"])
        .run()
        .fails(1, &["nothing", "not found"]);
    let inspected = hull.hull(["image", "inspect", "app:1"]).run().ok().json();
    let layer = PathBuf::from(inspected[0]["Hull"]["layers"][0].as_str().unwrap());
    fs::write(layer.join("second"), "LAYER TWO\n").unwrap();
    hull.hull(["save", "-o"])
        .arg(&file)
        .arg("app:1")
        .run()
        .fails(125, &["app:1", "archive of layer sha256:"])
        .hint("hull image rm");
    let left: Vec<_> = fs::read_dir(file.parent().unwrap())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.contains("saved"))
        .collect();
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn skopeo_reads_what_is_saved_as_dockers_and_as_ocis_archive() {
    if !installed("skopeo") {
        left_out("skopeo is not installed");
        return;
    }
    let hull = with_image("app:1");
    let file = hull.path("saved.tar");
    hull.hull(["save", "-o"]).arg(&file).arg("app:1").run().ok();
    for kind in ["docker-archive", "oci-archive"] {
        let copy = hull.path(kind);
        Invocation::new("skopeo")
            .args(["--insecure-policy", "copy", "-q"])
            .arg(format!("{kind}:{}", file.display()))
            .arg(format!("oci:{}:latest", copy.display()))
            .run()
            .ok();
        let other = Hull::empty();
        let source = format!("oci:{}", copy.display());
        other
            .hull(["image", "import", &source, "copied"])
            .run()
            .ok();
        let output = other
            .hull(["run", "--rm", "copied", "cat", "/second"])
            .run()
            .ok();
        assert_eq!(output.text(), "layer two", "{kind}");
    }
}

#[test]
fn what_is_pushed_is_pulled_by_others_and_sent_once() {
    let hull = with_image("app:1");
    let registry = Registry::new();
    let target = format!("{}/team/app:1", registry.address);
    hull.hull(["push", &target])
        .run()
        .fails(1, &[&target, "not found"]);
    hull.hull(["tag", "app:1", &target]).run().ok();
    let output = hull.hull(["push", &target]).run().ok().text();
    let lines: Vec<&str> = output.lines().collect();
    let name = format!("{}/team/app", registry.address);
    assert_eq!(lines[0], format!("The push refers to repository [{name}]"));
    assert!(lines[1].starts_with("1: digest: sha256:"), "{output}");
    assert!(lines[1].contains(" size: "), "{output}");
    assert_eq!(registry.received(), 3, "two layers and a configuration");
    let again = hull.hull(["push", &target]).run().ok().text();
    assert_eq!(again, output, "the same image has the same digest");
    assert_eq!(registry.received(), 3);

    let other = Hull::empty();
    let output = other
        .hull(["run", "--rm", &target, "cat", "/second"])
        .run()
        .ok();
    assert_eq!(output.text(), "layer two");
    assert_eq!(id(&other, &target), id(&hull, "app:1"));
}

#[test]
fn all_tags_of_a_repository_are_pushed_and_pulled() {
    let hull = with_image("app:1");
    let registry = Registry::new();
    let name = format!("{}/app", registry.address);
    for tag in ["one", "two"] {
        hull.hull(["tag", "app:1", &format!("{name}:{tag}")])
            .run()
            .ok();
    }
    hull.hull(["push", "-a", &name]).run().ok();
    let other = Hull::empty();
    other.hull(["pull", "-q", "-a", &name]).run().ok();
    assert_eq!(
        listed(&other, &[]),
        [format!("{name}:one"), format!("{name}:two")]
    );
    hull.hull(["push", "-a", &format!("{name}:one")])
        .run()
        .fails(125, &["--all-tags"]);
}

#[test]
fn an_image_for_another_platform_is_pulled_when_it_is_asked_for() {
    let hull = Hull::empty();
    let registry = Registry::new();
    let ours = two_layers();
    let other = Image::for_architecture("s390x", &[Archive::new().file("x", "").bytes()]);
    let reference = registry.push_list(
        "app",
        "multi",
        &[("s390x", &other), (architecture(), &ours)],
    );
    hull.hull(["pull", "--platform", "linux/s390x", &reference])
        .run()
        .ok();
    let inspected = hull
        .hull(["image", "inspect", &reference])
        .run()
        .ok()
        .json();
    assert_eq!(inspected[0]["Hull"]["config"]["architecture"], "s390x");
    hull.hull(["pull", "--platform", "linux/riscv64", &reference])
        .run()
        .fails(125, &["linux/riscv64", "linux/s390x"]);
}

#[test]
fn after_a_login_a_private_registry_can_be_pushed_to_until_the_logout() {
    let hull = with_image("app:1");
    let registry = Registry::new();
    registry.only_for("user", "se:cret");
    let target = format!("{}/app:1", registry.address);
    hull.hull(["tag", "app:1", &target]).run().ok();
    let configuration = hull.path("docker");
    let call = |arguments: &[&str]| {
        hull.hull(arguments)
            .env("DOCKER_CONFIG", configuration.as_os_str())
    };
    let refused = |output: hull_tests::Output| {
        output
            .fails(125, &["may not be pushed", "401", &registry.address])
            .hint(&format!("hull login {}", registry.address))
    };
    refused(call(&["push", &target]).run());
    let login = ["login", "-u", "user", "--password-stdin", &registry.address];
    call(&login)
        .input("wrong\n")
        .run()
        .fails(125, &["cannot log in", &registry.address, "401"]);
    assert!(!configuration.exists());
    let output = call(&login).input("se:cret\n").run().ok();
    assert_eq!(output.text(), "Login Succeeded");
    let file = configuration.join("config.json");
    let mode = fs::metadata(&file).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    call(&["push", &target]).run().ok();
    call(&["pull", &target]).run().ok();
    // What is stored is tried before anything is asked for.
    call(&["login", &registry.address]).run().ok();
    let output = call(&["logout", &registry.address]).run().ok();
    assert_eq!(
        output.text(),
        format!("Removing login credentials for {}", registry.address)
    );
    refused(call(&["push", &target]).run());
    let output = call(&["logout", &registry.address]).run().ok();
    assert_eq!(
        output.text(),
        format!("Not logged in to {}", registry.address)
    );
}

#[test]
fn a_password_that_is_typed_is_not_shown() {
    let hull = Hull::empty();
    let registry = Registry::new();
    registry.only_for("user", "secret");
    let configuration = hull.path("docker");
    let login = hull
        .hull(["login", &registry.address])
        .env("DOCKER_CONFIG", configuration.as_os_str());
    let mut terminal = Terminal::start(login, 24, 80);
    terminal.wait_for("Username");
    terminal.write("user\r");
    terminal.wait_for("Password: ");
    terminal.write("secreX\x7ft\r");
    terminal.wait_for("Login Succeeded");
    assert_eq!(terminal.wait(), 0);
    assert!(
        !terminal.screen().contains("secre"),
        "{}",
        terminal.screen()
    );
    assert!(terminal.echoes(), "the terminal is as before");
    hull.hull(["login", "-u", "user", &registry.address])
        .env("DOCKER_CONFIG", configuration.as_os_str())
        .run()
        .fails(125, &["no terminal"])
        .hint("--password-stdin");
}

#[test]
fn a_credential_helper_keeps_the_password_when_docker_is_configured_so() {
    let hull = with_image("app:1");
    let registry = Registry::new();
    registry.only_for("user", "secret");
    let configuration = hull.path("docker");
    let programs = hull.path("programs");
    fs::create_dir(&configuration).unwrap();
    fs::create_dir(&programs).unwrap();
    let file = configuration.join("config.json");
    fs::write(&file, r#"{"credsStore": "kept", "psFormat": "x"}"#).unwrap();
    let helper = programs.join("docker-credential-kept");
    let store = hull.path("kept.json");
    let script = format!(
        "#!/bin/sh\ncase $1 in\nstore) cat >{0} ;;\nerase) rm {0} ;;\n\
         get) cat {0} 2>/dev/null || {{ echo credentials not found in native keychain; exit 1; }} ;;\n\
         esac\n",
        store.display()
    );
    fs::write(&helper, script).unwrap();
    fs::set_permissions(&helper, fs::Permissions::from_mode(0o755)).unwrap();
    let path = format!(
        "{}:{}",
        programs.display(),
        std::env::var("PATH").unwrap_or_default()
    );
    let call = |arguments: &[&str]| {
        hull.hull(arguments)
            .env("DOCKER_CONFIG", configuration.as_os_str())
            .env("PATH", &path)
    };
    call(&["login", "-u", "user", "--password-stdin", &registry.address])
        .input("secret")
        .run()
        .ok();
    let kept: Value = serde_json::from_slice(&fs::read(&store).unwrap()).unwrap();
    assert_eq!(kept["ServerURL"], registry.address.as_str());
    assert_eq!(kept["Secret"], "secret");
    let config: Value = serde_json::from_slice(&fs::read(&file).unwrap()).unwrap();
    assert_eq!(config["psFormat"], "x");
    assert_eq!(
        config["auths"][&registry.address],
        serde_json::json!({}),
        "no secret is in the file"
    );
    let target = format!("{}/app:1", registry.address);
    hull.hull(["tag", "app:1", &target]).run().ok();
    call(&["push", &target]).run().ok();
    call(&["logout", &registry.address]).run().ok();
    assert!(!store.exists());
}

#[test]
fn the_history_of_an_image_is_shown_newest_first() {
    let hull = with_image("app:1");
    let table = hull.hull(["history", "app:1"]).run().ok().text();
    let lines: Vec<&str> = table.lines().collect();
    assert!(lines[0].starts_with("IMAGE "), "{table}");
    let short = &id(&hull, "app:1")["sha256:".len()..][..12];
    assert!(lines[1].starts_with(short), "{table}");
    assert!(lines[1].contains("RUN echo layer two"), "{table}");
    assert!(lines[1].ends_with("the second"), "{table}");
    assert!(lines[2].starts_with("<missing>"), "{table}");
    assert!(lines[2].contains("0B"), "{table}");
    assert!(lines[3].contains("ADD busybox.tar"), "{table}");
    let json = hull
        .hull(["image", "history", "--json", "app:1"])
        .run()
        .ok()
        .json();
    assert!(json[0]["size"].as_u64().unwrap() >= 10, "{json}");
    assert_eq!(json[1]["empty_layer"], true);
    let ids = hull
        .hull(["history", "-q", "--no-trunc", "app:1"])
        .run()
        .ok()
        .text();
    assert_eq!(ids.lines().next().unwrap(), id(&hull, "app:1"));
    assert_eq!(ids.lines().count(), 3);
    let template = "{{.Size}} {{.CreatedBy}} ({{.Comment}})";
    let lines = hull
        .hull(["history", "--human=false", "--format", template, "app:1"])
        .run()
        .ok()
        .text();
    let size = json[0]["size"].as_u64().unwrap();
    let newest = format!("{size} RUN echo layer two (the second)");
    assert_eq!(lines.lines().next(), Some(newest.as_str()));
}

#[test]
fn a_registry_is_searched_for_images() {
    let hull = with_image("app:1");
    let registry = Registry::new();
    let host = &registry.address;
    for name in ["team/web", "team/website", "db"] {
        let target = format!("{host}/{name}");
        hull.hull(["tag", "app:1", &target]).run().ok();
        hull.hull(["push", "-q", &target]).run().ok();
    }
    let search = |options: &[&str], term: &str| {
        let term = format!("{host}/{term}");
        hull.hull(["search"]).args(options).arg(&term).run()
    };
    let names = search(&["--format", "{{.Name}}"], "web").ok().text();
    assert_eq!(names, format!("{host}/team/web\n{host}/team/website"));
    let table = search(&["--limit", "1"], "web").ok().text();
    assert_eq!(table.lines().count(), 2, "{table}");
    assert!(table.starts_with("NAME "), "{table}");
    // A name that was found can be pulled.
    hull.hull(["pull", "-q", table.split_whitespace().nth(4).unwrap()])
        .run()
        .ok();
    let none = search(&["--filter", "stars=1", "--json"], "web")
        .ok()
        .json();
    assert_eq!(none, serde_json::json!([]));
    assert_eq!(
        search(&["-f", "is-official=false"], "nothing")
            .ok()
            .text()
            .lines()
            .count(),
        1
    );
    search(&["--limit", "0"], "web").fails(125, &["--limit", "from 1 to 100"]);
    search(&["-f", "name=x"], "web").fails(125, &["name=x", "stars="]);
    search(&[], "").fails(125, &["nothing to search for"]);
    hull.hull(["search", "localhost:1/web"]).run().fails(
        125,
        &[
            "localhost:1/web",
            "cannot be searched for",
            "cannot be reached",
        ],
    );
}

#[test]
fn an_image_of_a_list_has_the_lists_digest_in_its_registry() {
    let hull = Hull::empty();
    let registry = Registry::new();
    let reference = registry.push_list("app", "multi", &[(architecture(), &two_layers())]);
    hull.hull(["pull", "-q", &reference]).run().ok();
    let digests = hull
        .hull([
            "image",
            "inspect",
            "-f",
            "{{index .RepoDigests 0}}",
            &reference,
        ])
        .run()
        .ok()
        .text();
    let (name, digest) = digests.split_once('@').unwrap();
    assert_eq!(name, format!("{}/app", registry.address));
    let listed = hull.hull(["images", "--digests"]).run().ok().text();
    assert!(listed.contains(digest), "{listed}");
    // By this digest the registry has it, and so it is found here.
    hull.hull(["rmi", &reference]).run().ok();
    hull.hull(["pull", "-q", &digests]).run().ok();
    hull.hull(["image", "exists", &digests]).run().ok();
}

#[test]
fn images_are_listed_by_name_label_and_age() {
    let hull = with_image("app:1");
    let newer = two_layers().with_config(|config| {
        config["created"] = "2025-01-01T00:00:00Z".into();
        config["config"]["Labels"] = Value::Null;
    });
    import(&hull, &newer, "localhost:5000/team/app:2");
    let (old, new) = ("docker.io/library/app:1", "localhost:5000/team/app:2");
    for (filters, expected) in [
        (&["reference=app"][..], vec![old]),
        (&["reference=*/*/app:*"], vec![new]),
        (&["reference=a*", "reference=*/*/a*"], vec![old, new]),
        (
            &["before=localhost:5000/team/app:2", "reference=app"],
            vec![old],
        ),
        (&["since=app:1", "reference=*/*/app"], vec![new]),
        (&["label=kind=test", "reference=app"], vec![old]),
        (&["label=other"], vec![]),
        (&["dangling=true"], vec![]),
    ] {
        let options: Vec<&str> = filters.iter().flat_map(|one| ["-f", one]).collect();
        assert_eq!(listed(&hull, &options), expected, "{filters:?}");
    }
    assert_eq!(listed(&hull, &["app"]), [old]);
    let table = hull
        .hull(["images", "-a", "--digests", "-f", "reference=app"])
        .run()
        .ok()
        .text();
    assert!(
        table.contains("DIGEST") && table.contains("sha256:"),
        "{table}"
    );
    hull.hull(["image", "ls", "-f", "before=nothing"])
        .run()
        .fails(1, &["nothing", "not found"]);
    hull.hull(["image", "ls", "-f", "dangling=maybe"])
        .run()
        .fails(125, &["dangling"]);
}

#[test]
fn a_tag_needs_an_image_and_a_name() {
    let hull = with_image("app:1");
    hull.hull(["tag", "nothing", "other"])
        .run()
        .fails(1, &["nothing", "not found"]);
    hull.hull(["tag", "app:1", "UPPER"])
        .run()
        .fails(125, &["UPPER"]);
    let digest = format!("app@sha256:{}", "0".repeat(64));
    hull.hull(["tag", "app:1", &digest])
        .run()
        .fails(125, &["digest"]);
    let short = &id(&hull, "app:1")["sha256:".len()..][..12];
    hull.hull(["image", "tag", short, "by-id"]).run().ok();
    assert_eq!(id(&hull, "by-id"), id(&hull, "app:1"));
}
