//! `hull image` and where images come from: registries, layouts, archives, directories.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use hull_tests::{
    Archive, Fault, Hull, Image, Invocation, Layout, Output, Registry, busybox_archive, digest,
    eventually, installed, left_out,
};

/// Busybox in one layer; a file and a whiteout in a second one.
fn two_layers() -> Image {
    let second = Archive::new().file("second", "layer two\n");
    on_busybox(second.file("etc/.wh.group", ""))
}

/// The same with another second layer.
fn newer() -> Image {
    on_busybox(Archive::new().file("second", "newer\n"))
}

fn on_busybox(second: Archive) -> Image {
    let base = fs::read(busybox_archive()).unwrap();
    Image::new(&[base, second.bytes()])
}

/// A layout in the test's directory.
fn layout(hull: &Hull, images: &[(&str, &Image)]) -> String {
    let directory = hull.path("layout");
    Layout::write(&directory, images);
    directory.to_str().unwrap().to_owned()
}

/// Busybox as a directory, in the test's.
fn busybox_directory(hull: &Hull) -> PathBuf {
    let root = hull.path("root");
    fs::create_dir(&root).unwrap();
    Invocation::new("tar")
        .args(["-x", "-C"])
        .arg(&root)
        .arg("-f")
        .arg(busybox_archive())
        .run()
        .ok();
    root
}

fn pull(hull: &Hull, reference: &str) -> Output {
    hull.hull(["image", "pull", reference]).run()
}

/// Runs an image and prints its second layer's file.
fn second(hull: &Hull, reference: &str) -> Output {
    hull.hull(["run", "--rm", reference, "cat", "/second"])
        .run()
}

/// The ids of all images.
fn images(hull: &Hull) -> String {
    hull.hull(["image", "ls", "-q"]).run().ok().text()
}

#[test]
fn an_image_is_pulled_from_a_registry_and_then_there() {
    let hull = Hull::empty();
    let registry = Registry::new();
    let reference = registry.push("team/app", "1", &two_layers());
    let output = second(&hull, &reference).ok();
    assert_eq!(output.text(), "layer two");
    let requests = registry.fetched("");
    let script = "ls /etc/group 2>/dev/null; echo $FROM_IMAGE $PWD";
    let output = hull
        .hull(["run", "--rm", &reference, "sh", "-c", script])
        .run()
        .ok();
    assert_eq!(
        output.text(),
        "yes /tmp",
        "whiteout, environment, directory"
    );
    assert_eq!(
        registry.fetched(""),
        requests,
        "what is there is not asked for again"
    );
    assert!(
        hull.hull(["image", "ls"])
            .run()
            .ok()
            .text()
            .contains("team/app")
    );
}

#[test]
fn pull_can_be_always_missing_or_never() {
    let hull = Hull::empty();
    let registry = Registry::new();
    let reference = registry.push("app", "latest", &two_layers());
    let run = |when: &str| {
        hull.hull(["run", "--rm", "--pull", when, &reference, "cat", "/second"])
            .run()
    };
    run("never").fails(125, &["not found"]);
    assert_eq!(run("missing").ok().text(), "layer two");
    let other = newer();
    registry.push("app", "latest", &other);
    assert_eq!(run("missing").ok().text(), "layer two");
    assert_eq!(run("always").ok().text(), "newer");
    let base = digest(&other.layers[0]);
    assert_eq!(
        registry.fetched(&base),
        1,
        "a layer that is there is not fetched again"
    );
}

#[test]
fn an_image_is_named_by_digest() {
    let hull = Hull::empty();
    let registry = Registry::new();
    let image = two_layers();
    registry.push("app", "1", &image);
    let reference = format!("{}/app@{}", registry.address, digest(&image.manifest));
    assert_eq!(second(&hull, &reference).ok().text(), "layer two");
}

#[test]
fn the_image_for_this_architecture_is_picked_from_a_list() {
    let hull = Hull::empty();
    let registry = Registry::new();
    let ours = two_layers();
    let other = Image::for_architecture("s390x", &[Archive::new().file("x", "").bytes()]);
    let reference = registry.push_list(
        "app",
        "multi",
        &[("s390x", &other), (hull_tests::architecture(), &ours)],
    );
    assert_eq!(second(&hull, &reference).ok().text(), "layer two");
    assert_eq!(registry.fetched(&digest(&other.layers[0])), 0);
}

#[test]
fn an_image_for_another_architecture_is_refused_by_name() {
    let hull = Hull::empty();
    let registry = Registry::new();
    let reference = registry.push(
        "app",
        "1",
        &Image::for_architecture("s390x", &[Archive::new().file("x", "").bytes()]),
    );
    hull.hull(["run", "--rm", &reference, "true"])
        .run()
        .fails(125, &["s390x", hull_tests::architecture()]);
    let only = registry.push_list("list", "1", &[("riscv64", &two_layers())]);
    hull.hull(["run", "--rm", &only, "true"])
        .run()
        .fails(125, &["riscv64"]);
}

#[test]
fn an_image_that_nobody_has_is_named_with_who_was_asked() {
    let hull = Hull::empty();
    let registry = Registry::new();
    let reference = format!("{}/nothing:1", registry.address);
    hull.hull(["run", "--rm", &reference, "true"])
        .run()
        .fails(
            125,
            &[
                &reference,
                "not found",
                "local store",
                &registry.address,
                "404",
            ],
        )
        .hint("hull image ls");
    hull.hull(["run", "--rm", "--pull", "never", "nothing", "true"])
        .run()
        .fails(125, &["nothing", "not found"]);
    assert!(hull.remains().is_empty());
}

#[test]
fn a_registry_that_is_down_or_ill_is_named() {
    let hull = Hull::empty();
    hull.hull(["run", "--rm", "localhost:1/app", "true"])
        .run()
        .fails(125, &["localhost:1", "cannot be reached"]);
    let registry = Registry::new();
    let reference = registry.push("app", "1", &two_layers());
    registry.fault(Fault::Status("manifests".into(), 500));
    hull.hull(["run", "--rm", &reference, "true"])
        .run()
        .fails(125, &[&registry.address, "500"]);
    registry.mend();
    registry.fault(Fault::Status("manifests".into(), 401));
    hull.hull(["run", "--rm", &reference, "true"])
        .run()
        .fails(125, &[&registry.address, "401"])
        .hint("hull login");
    registry.mend();
    hull.hull(["run", "--rm", &reference, "true"]).run().ok();
}

#[test]
fn a_layer_with_other_content_than_its_digest_says_is_refused() {
    let hull = Hull::empty();
    let registry = Registry::new();
    let image = two_layers();
    let reference = registry.push("app", "1", &image);
    let layer = digest(&image.layers[1]);
    registry.fault(Fault::OtherBytes(layer.clone()));
    pull(&hull, &reference).fails(125, &["layer", &layer, "corrupt"]);
    assert_eq!(images(&hull), "");
    registry.mend();
    pull(&hull, &reference).ok();
}

#[test]
fn a_layer_that_ends_early_is_refused_and_the_next_pull_resumes() {
    let hull = Hull::empty();
    let registry = Registry::new();
    let image = two_layers();
    let reference = registry.push("app", "1", &image);
    let (first, second) = (digest(&image.layers[0]), digest(&image.layers[1]));
    registry.fault(Fault::BreakOff(second.clone()));
    pull(&hull, &reference).fails(125, &["layer", &second]);
    assert_eq!(images(&hull), "", "nothing half usable");
    registry.mend();
    pull(&hull, &reference).ok();
    assert_eq!(
        registry.fetched(&first),
        1,
        "what arrived whole is not fetched again"
    );
    hull.hull(["run", "--rm", &reference, "true"]).run().ok();
}

#[test]
fn a_pull_that_is_killed_leaves_nothing_half_usable_and_resumes() {
    let hull = Hull::empty();
    let registry = Registry::new();
    let reference = registry.push("app", "1", &two_layers());
    registry.fault(Fault::Slow(Duration::from_millis(300)));
    let mut pull = hull.hull(["image", "pull", &reference]).start();
    eventually("a blob is asked for", Duration::from_secs(10), || {
        registry.fetched("/blobs/") > 0
    });
    assert!(pull.is_running());
    pull.signal(rustix::process::Signal::KILL);
    pull.finish().ends(137);
    assert_eq!(images(&hull), "");
    registry.mend();
    hull.hull(["run", "--rm", &reference, "true"]).run().ok();
}

#[test]
fn two_pulls_of_one_image_at_once_do_the_work_once() {
    let hull = Hull::empty();
    let registry = Registry::new();
    let image = two_layers();
    let reference = registry.push("app", "1", &image);
    registry.fault(Fault::Slow(Duration::from_millis(200)));
    let pulls: Vec<_> = (0..2)
        .map(|_| hull.hull(["image", "pull", &reference]).start())
        .collect();
    for pull in pulls {
        pull.finish().ok();
    }
    for layer in &image.layers {
        assert_eq!(registry.fetched(&digest(layer)), 1);
    }
}

#[test]
fn layers_that_lead_outside_are_refused_and_leave_nothing() {
    let hull = Hull::empty();
    let outside = hull.path("outside");
    fs::create_dir(&outside).unwrap();
    let outside_name = outside.to_str().unwrap();
    let bad = [
        ("leads outside", Archive::new().file("../escaped", "x")),
        ("leads outside", Archive::new().file("a/../../escaped", "x")),
        (
            "leads outside",
            Archive::new().hard_link("link", "../../../etc/passwd"),
        ),
        ("device", Archive::new().device("srv/evil")),
    ];
    for (number, (why, archive)) in bad.into_iter().enumerate() {
        let image = Image::new(&[archive.bytes()]);
        let directory = hull.path(&format!("layout-{number}"));
        Layout::write(&directory, &[("latest", &image)]);
        let reference = format!("oci:{}", directory.display());
        pull(&hull, &reference).fails(125, &["layer", why]);
    }
    // A link out of the layer is allowed; writing through it is not.
    let through = Archive::new()
        .symlink("door", outside_name)
        .file("door/file", "x")
        .bytes();
    let directory = hull.path("layout-through");
    Layout::write(&directory, &[("latest", &Image::new(&[through]))]);
    let _ = pull(&hull, &format!("oci:{}", directory.display()));
    assert_eq!(fs::read_dir(&outside).unwrap().count(), 0);
    assert!(!hull.path("escaped").exists());
}

#[test]
fn garbage_is_refused_by_name() {
    let hull = Hull::empty();
    let image = two_layers();
    let directory = hull.path("layout");
    Layout::write(&directory, &[("latest", &image)]);
    let reference = format!("oci:{}", directory.display());
    let layer = Layout::blob(&directory, &digest(&image.layers[1]));
    let whole = fs::read(&layer).unwrap();
    fs::write(&layer, &whole[..whole.len() / 2]).unwrap();
    pull(&hull, &reference).fails(125, &["layer"]);
    fs::write(&layer, b"garbage").unwrap();
    pull(&hull, &reference).fails(125, &["layer"]);
    fs::write(directory.join("index.json"), b"{").unwrap();
    pull(&hull, &reference).fails(125, &["index"]);
    pull(&hull, "oci:/no/such/directory").fails(125, &["/no/such/directory"]);
    pull(&hull, "docker-archive:/no/such/file").fails(125, &["/no/such/file"]);
    pull(&hull, "a/UPPER").fails(125, &["invalid image reference", "UPPER"]);
}

#[test]
fn layouts_archives_and_directories_are_images_too() {
    let hull = Hull::empty();
    let image = two_layers();
    let directory = layout(&hull, &[("one", &image), ("two", &image)]);
    let output = second(&hull, &format!("oci:{directory}:one")).ok();
    assert_eq!(output.text(), "layer two");
    hull.hull(["run", "--rm", &format!("oci:{directory}"), "true"])
        .run()
        .fails(125, &["one", "two"]);

    let root = busybox_directory(&hull);
    let reference = format!("rootfs:{}", root.display());
    let output = hull
        .hull([
            "run",
            "--rm",
            &reference,
            "sh",
            "-c",
            "echo changed >/new; cat /new",
        ])
        .run()
        .ok();
    assert_eq!(output.text(), "changed");
    assert!(!root.join("new").exists(), "the directory is never changed");
}

#[test]
fn what_other_tools_save_and_serve_is_read() {
    let hull = Hull::empty();
    if !installed("skopeo") || !installed("docker-registry") {
        left_out("skopeo or docker-registry is not installed");
        return;
    }
    let directory = layout(&hull, &[("latest", &two_layers())]);
    let saved = hull.path("saved.tar");
    let copy = |to: &str| {
        Invocation::new("skopeo")
            .args([
                "--insecure-policy",
                "copy",
                "-q",
                "--dest-tls-verify=false",
                &format!("oci:{directory}:latest"),
                to,
            ])
            .run()
            .ok()
    };
    copy(&format!("docker-archive:{}:app:1", saved.display()));
    let output = second(&hull, &format!("docker-archive:{}", saved.display())).ok();
    assert_eq!(output.text(), "layer two");

    let port = std::net::TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .port();
    let configuration = format!(
        "version: 0.1\nlog:\n  level: error\nstorage:\n  filesystem:\n    rootdirectory: {}\nhttp:\n  addr: 127.0.0.1:{port}\n",
        hull.path("registry").display()
    );
    fs::write(hull.path("registry.yml"), configuration).unwrap();
    let registry = Invocation::new("docker-registry")
        .arg("serve")
        .arg(hull.path("registry.yml"))
        .start();
    eventually("the registry listens", Duration::from_secs(20), || {
        std::net::TcpStream::connect(("127.0.0.1", port)).is_ok()
    });
    copy(&format!("docker://localhost:{port}/app:1"));
    let output = second(&hull, &format!("localhost:{port}/app:1")).ok();
    assert_eq!(output.text(), "layer two");
    registry.signal(rustix::process::Signal::KILL);
    registry.finish();
}

#[test]
fn images_are_listed_inspected_and_removed() {
    let hull = Hull::new();
    let list = hull.hull(["image", "ls", "--json"]).run().ok().json();
    assert_eq!(list.as_array().unwrap().len(), 1, "{list}");
    let inspected = hull.hull(["image", "inspect", "busybox"]).run().ok().json();
    assert!(inspected[0].is_object(), "{inspected}");
    let container = hull.sleeper();
    hull.hull(["image", "rm", "busybox"])
        .run()
        .fails(1, &["in use"]);
    container.does("kill").ok();
    container.wait();
    container.does("rm").ok();
    hull.hull(["image", "rm", "busybox"]).run().ok();
    assert_eq!(images(&hull), "");
    hull.hull(["image", "rm", "busybox"]).run().ends(1);
}

#[test]
fn prune_removes_what_has_no_name_and_no_container() {
    let hull = Hull::empty();
    let registry = Registry::new();
    let reference = registry.push("app", "1", &two_layers());
    pull(&hull, &reference).ok();
    registry.push("app", "1", &newer());
    pull(&hull, &reference).ok();
    hull.hull(["image", "prune"]).run().ok();
    assert_eq!(
        hull.hull([
            "run", "--rm", "--pull", "never", &reference, "cat", "/second"
        ])
        .run()
        .ok()
        .text(),
        "newer"
    );
    hull.hull(["image", "prune", "--all", "--force"]).run().ok();
    assert_eq!(images(&hull), "");
}

#[test]
fn owners_modes_links_and_attributes_of_layers_are_kept() {
    let hull = Hull::empty();
    let root = busybox_directory(&hull);
    let prepare = format!(
        "cd {} && echo x >owned && chown 12:34 owned && chmod 6751 owned && ln owned linked && mkfifo pipe && mkdir -m 1777 sticky",
        root.display()
    );
    Invocation::new("sh").args(["-c", &prepare]).run().ok();
    let archive = hull.path("image.tar");
    Invocation::new("tar")
        .args(["-c", "--numeric-owner", "-C"])
        .arg(&root)
        .arg("-f")
        .arg(&archive)
        .arg(".")
        .run()
        .ok();
    hull.hull(["image", "import"])
        .arg(&archive)
        .arg("attributes")
        .run()
        .ok();
    let script = "stat -c '%u:%g %a %h' /owned; stat -c %F /pipe; stat -c %a /sticky";
    let output = hull
        .hull(["run", "--rm", "attributes", "sh", "-c", script])
        .run()
        .ok();
    assert_eq!(output.text(), "12:34 6751 2\nfifo\n1777");
}
