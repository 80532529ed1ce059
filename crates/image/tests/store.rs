//! The store without a registry: layouts, archives, imports, names, holds, removal, and all of it
//! at once.

#![allow(clippy::unwrap_used)]

mod common;

use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::Path;

use common::{Layout, Recorder, Tar, gzip, host_architecture, names, noise, reference, run};
use hull_image::{
    Credentials, Digest, Error, Image, Import, ImportSource, LayerState, Limits, Pull, Reference,
    RegistryReference, Reserve, Result, Store,
};

fn store() -> (tempfile::TempDir, Store) {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path().join("store")).unwrap();
    (dir, store)
}

fn get(store: &Store, reference: &Reference) -> Result<Image> {
    store.resolve(reference, Pull::Missing, &Credentials::anonymous(), &())
}

fn assert_empty(store: &Store) {
    assert!(store.list().unwrap().is_empty());
    for dir in ["layers", "images", "blobs/sha256"] {
        assert_eq!(names(store.root().join(dir)), Vec::<String>::new(), "{dir}");
    }
}

fn name(text: &str) -> RegistryReference {
    match reference(text) {
        Reference::Registry(name) => name,
        other => panic!("{other}"),
    }
}

fn import(store: &Store, as_name: &str, archive: Vec<u8>) -> Image {
    let import = Import {
        name: Some(name(as_name)),
        ..Import::default()
    };
    store
        .import(
            "test",
            ImportSource::Archive(Box::new(std::io::Cursor::new(archive))),
            &import,
            &(),
        )
        .unwrap()
}

fn never(_: &str) -> bool {
    false
}

#[test]
fn a_layout_is_unpacked_once_and_shared() {
    let (_dir, store) = store();
    let base = Tar::new().mode(0o755).file("base", b"base").finish();
    let mut layout = Layout::new();
    layout.image(
        "one",
        host_architecture(),
        &[base.clone(), Tar::new().file("one", b"1").finish()],
    );
    layout.image(
        "two",
        host_architecture(),
        &[base, Tar::new().file("two", b"22").finish()],
    );
    let path = layout.path().display();
    let one = get(&store, &reference(&format!("oci:{path}:one"))).unwrap();
    let recorder = Recorder::default();
    let two = store
        .resolve(
            &reference(&format!("oci:{path}:two")),
            Pull::Missing,
            &Credentials::anonymous(),
            &recorder,
        )
        .unwrap();
    assert!(recorder.states().contains(&LayerState::Present));
    assert_eq!(one.layers[1], two.layers[1]);
    assert_eq!((one.size, two.size), (5, 6));
    assert_eq!(
        std::fs::metadata(store.root())
            .unwrap()
            .permissions()
            .mode()
            & 0o777,
        0o700
    );
    let error = get(&store, &layout.reference()).unwrap_err().to_string();
    assert!(
        error.contains("holds 2 images; name one by its tag: one, two"),
        "{error}"
    );
    let error = get(&store, &reference(&format!("oci:{path}:three")))
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("has no tag \"three\", it has: one, two"),
        "{error}"
    );
    // Found again without the layout's blobs.
    let again = get(&store, &reference(&format!("oci:{path}:one"))).unwrap();
    assert_eq!(again, one);
}

#[test]
fn a_changed_layout_is_noticed() {
    let (_dir, store) = store();
    let mut layout = Layout::with(&[Tar::new().file("f", b"1").finish()]);
    let old = get(&store, &layout.reference()).unwrap();
    let newer = Layout::with(&[Tar::new().file("f", b"2").finish()]);
    run(
        "cp",
        &[
            "-a",
            &format!("{}/.", newer.path().display()),
            layout.path().to_str().unwrap(),
        ],
    );
    let new = get(&store, &layout.reference()).unwrap();
    assert_ne!(old.id, new.id);
    assert_eq!(std::fs::read(new.layers[0].join("f")).unwrap(), b"2");
    assert_eq!(store.list().unwrap().len(), 2);
    assert_eq!(
        store.list().unwrap()[1].reference,
        None,
        "the old one lost its name"
    );
    assert_eq!(store.prune(false, &never).unwrap().images, [old.id]);
    layout.image("x", host_architecture(), &[]);
}

#[test]
fn layouts_written_by_other_tools() {
    let (dir, store) = store();
    let layout = dir.path().join("layout");
    let image = format!("{}:made", layout.display());
    run("umoci", &["init", "--layout", layout.to_str().unwrap()]);
    run("umoci", &["new", "--image", &image]);
    let bundle = dir.path().join("bundle");
    run(
        "umoci",
        &["unpack", "--image", &image, bundle.to_str().unwrap()],
    );
    std::fs::create_dir(bundle.join("rootfs/etc")).unwrap();
    std::fs::write(bundle.join("rootfs/etc/file"), "one").unwrap();
    run(
        "umoci",
        &[
            "repack",
            "--refresh-bundle",
            "--image",
            &image,
            bundle.to_str().unwrap(),
        ],
    );
    std::fs::remove_file(bundle.join("rootfs/etc/file")).unwrap();
    run(
        "umoci",
        &["repack", "--image", &image, bundle.to_str().unwrap()],
    );
    run(
        "umoci",
        &[
            "config",
            "--image",
            &image,
            "--config.cmd",
            "/bin/x",
            "--config.user",
            "7:8",
        ],
    );
    let from_layout = get(&store, &reference(&format!("oci:{image}"))).unwrap();
    assert_eq!(
        (
            from_layout.config.cmd.as_slice(),
            from_layout.config.user.as_str()
        ),
        (&["/bin/x".to_owned()][..], "7:8")
    );
    assert_eq!(from_layout.layers.len(), 2);
    let whiteout = std::fs::symlink_metadata(from_layout.layers[0].join("etc/file")).unwrap();
    assert!(whiteout.file_type().is_char_device() && whiteout.rdev() == 0);
    assert_eq!(
        std::fs::read(from_layout.layers[1].join("etc/file")).unwrap(),
        b"one"
    );

    // The same through `docker save` format, plain and compressed.
    let archive = dir.path().join("image.tar");
    let to = format!("docker-archive:{}:made:v1", archive.display());
    run(
        "skopeo",
        &[
            "--insecure-policy",
            "copy",
            "-q",
            &format!("oci:{image}"),
            &to,
        ],
    );
    let saved = get(
        &store,
        &reference(&format!("docker-archive:{}", archive.display())),
    )
    .unwrap();
    assert_eq!(saved.layers, from_layout.layers);
    assert_eq!(saved.id, from_layout.id);
    let again = get(
        &store,
        &reference(&format!("docker-archive:{}:v1", archive.display())),
    )
    .unwrap();
    assert_eq!(again.id, saved.id);
    let packed = dir.path().join("image.tar.gz");
    std::fs::write(&packed, gzip(&std::fs::read(&archive).unwrap())).unwrap();
    let packed = format!("docker-archive:{}", packed.display());
    assert_eq!(get(&store, &reference(&packed)).unwrap().id, saved.id);
    let error = get(
        &store,
        &reference(&format!("docker-archive:{}:nope", archive.display())),
    )
    .unwrap_err();
    assert!(
        error.to_string().contains("has no tag \"nope\", it has:"),
        "{error}"
    );
}

#[test]
fn broken_sources_leave_nothing() {
    let (dir, store) = store();
    let path = dir.path().display();
    for (text, says) in [
        (format!("oci:{path}/missing"), "does not exist"),
        (
            format!("oci:{path}"),
            "is no OCI image layout: it has no index.json",
        ),
        (format!("docker-archive:{path}/missing.tar"), "No such file"),
        (format!("rootfs:{path}/missing"), "No such file"),
        ("rootfs:/etc/passwd".to_owned(), "is no directory"),
        ("docker-archive:/etc/passwd".to_owned(), "cannot be read"),
    ] {
        let error = get(&store, &reference(&text)).unwrap_err().to_string();
        assert!(error.contains(says), "{text}: {error}");
    }
    let layer = Tar::new().file("f", noise(100_000)).finish();
    // A layer that is cut, one that is changed, a manifest that is changed.
    for (what, says) in [
        ("cut", "is truncated"),
        ("flip", "is corrupt"),
        ("gone", "No such file"),
    ] {
        let layout = Layout::with(std::slice::from_ref(&layer));
        let blob = layout.blob_path(&Digest::of(&gzip(&layer)));
        let mut bytes = std::fs::read(&blob).unwrap();
        match what {
            "cut" => bytes.truncate(50_000),
            "flip" => bytes[50_000] ^= 1,
            _ => std::fs::remove_file(&blob).unwrap(),
        }
        if what != "gone" {
            std::fs::write(&blob, &bytes).unwrap();
        }
        let error = get(&store, &layout.reference()).unwrap_err().to_string();
        assert!(error.contains(says), "{what}: {error}");
        assert_empty(&store);
    }
    // The archive is what the manifest says, but not what the configuration says.
    let mut layout = Layout::new();
    let config = serde_json::json!({
        "architecture": host_architecture(), "os": "linux", "config": {},
        "rootfs": {"type": "layers", "diff_ids": [Digest::of(b"other").to_string()]},
    });
    layout.image_of(
        "x",
        &config,
        &[layer],
        "application/vnd.oci.image.layer.v1.tar",
    );
    let error = get(&store, &layout.reference()).unwrap_err().to_string();
    assert!(
        error.contains("its uncompressed content has digest"),
        "{error}"
    );
    assert_empty(&store);
}

#[test]
fn hostile_layers_leave_nothing() {
    let (_dir, store) = store();
    for (archive, says) in [
        (
            Tar::new().file("good", b"").file("../evil", b""),
            "entry \"../evil\" leads outside of the layer",
        ),
        (
            Tar::new().file("/../evil", b""),
            "entry \"/../evil\" leads outside of the layer",
        ),
        (
            Tar::new().device("srv/sda", b'4', 8, 0),
            "entry \"srv/sda\" is block device 8:0, which images may not bring",
        ),
        (
            Tar::new().hard_link("shadow", "../../../etc/shadow"),
            "leads outside of the layer",
        ),
        (
            Tar::new().header_only("x", b'x', 1 << 30),
            "exceeds a limit",
        ),
    ] {
        let layout = Layout::with(&[archive.finish()]);
        let error = get(&store, &layout.reference()).unwrap_err();
        let text = error.to_string();
        assert!(text.contains(says), "{text}");
        assert!(
            text.starts_with("layer sha256:") && text.contains("of image \"oci:"),
            "{text}"
        );
        assert_empty(&store);
    }
}

#[test]
fn a_plain_directory_is_used_in_place() {
    let (dir, store) = store();
    let rootfs = dir.path().join("rootfs");
    std::fs::create_dir(&rootfs).unwrap();
    let image = get(&store, &reference(&format!("rootfs:{}", rootfs.display()))).unwrap();
    assert_eq!(
        (image.layers.as_slice(), image.digest),
        (&[rootfs.canonicalize().unwrap()][..], None)
    );
    assert!(store.hold(&image, "c").unwrap().is_none());
    assert_empty(&store);
}

#[test]
fn imports_of_archives() {
    let (_dir, store) = store();
    let archive = Tar::new().dir("./").file("./f", b"content").finish();
    let import = Import {
        name: Some(name("mine:1")),
        changes: vec!["CMD [\"/f\"]".into(), "ENV A=b".into(), "WORKDIR /w".into()],
        message: None,
        author: None,
        created: Some("2020-01-01T00:00:00Z".into()),
    };
    let source = |bytes: Vec<u8>| ImportSource::Archive(Box::new(std::io::Cursor::new(bytes)));
    let image = store
        .import("x.tar", source(archive.clone()), &import, &())
        .unwrap();
    assert_eq!(image.reference, "docker.io/library/mine:1");
    assert_eq!(
        (image.config.cmd.as_slice(), image.config.workdir.as_str()),
        (&["/f".to_owned()][..], "/w")
    );
    assert_eq!(image.config.architecture, host_architecture());
    assert_eq!(
        std::fs::read(image.layers[0].join("f")).unwrap(),
        b"content"
    );
    // A local image wins over a registry of that name.
    assert_eq!(get(&store, &reference("mine:1")).unwrap(), image);
    // The same again, compressed, is the same image.
    for compressed in [
        gzip(&archive),
        zstd::encode_all(archive.as_slice(), 1).unwrap(),
    ] {
        let again = store
            .import("x.tar", source(compressed), &import, &())
            .unwrap();
        assert_eq!((&again.id, again.digest), (&image.id, image.digest));
    }
    assert_eq!(names(store.root().join("layers")).len(), 1);
    let raw: serde_json::Value =
        serde_json::from_slice(&store.raw_config(&image).unwrap()).unwrap();
    assert_eq!(raw["history"][0]["comment"], "imported from x.tar");
    let bad = Import {
        changes: vec!["RUN x".into()],
        ..Import::default()
    };
    assert!(matches!(
        store.import("x", source(archive), &bad, &()),
        Err(Error::InvalidChange { .. })
    ));
    let error = store
        .import("x", source(b"no archive".to_vec()), &Import::default(), &())
        .unwrap_err();
    assert!(
        error.to_string().contains("archive is truncated"),
        "{error}"
    );
    assert_eq!(names(store.root().join("layers")).len(), 1);
}

#[test]
fn imports_of_directories() {
    let (dir, store) = store();
    let tree = dir.path().join("tree");
    std::fs::create_dir_all(tree.join("a/b")).unwrap();
    std::fs::write(tree.join("a/f"), "x").unwrap();
    std::fs::hard_link(tree.join("a/f"), tree.join("g")).unwrap();
    std::os::unix::fs::symlink("/etc/passwd", tree.join("link")).unwrap();
    std::fs::set_permissions(tree.join("a/f"), std::fs::Permissions::from_mode(0o4755)).unwrap();
    std::fs::set_permissions(&tree, std::fs::Permissions::from_mode(0o751)).unwrap();
    std::os::unix::fs::chown(tree.join("a/b"), Some(3_000_000), Some(7)).unwrap();
    std::fs::write(tree.join("n".repeat(200)), "long").unwrap();
    run("mkfifo", &[tree.join("fifo").to_str().unwrap()]);
    let _socket = std::os::unix::net::UnixListener::bind(tree.join("socket")).unwrap();
    let directory = || ImportSource::Directory(tree.clone());
    let created = Import {
        author: None,
        created: Some("2020-01-01T00:00:00Z".into()),
        ..Import::default()
    };
    let image = store.import("tree", directory(), &created, &()).unwrap();
    let layer = &image.layers[0];
    let stat = |name: &str| std::fs::symlink_metadata(layer.join(name)).unwrap();
    assert_eq!(stat("a/f").ino(), stat("g").ino());
    assert_eq!(stat("a/f").mode() & 0o7777, 0o4755);
    assert_eq!((stat("a/b").uid(), stat("a/b").gid()), (3_000_000, 7));
    assert_eq!(stat(".").mode() & 0o7777, 0o751);
    assert_eq!(
        std::fs::read_link(layer.join("link")).unwrap(),
        Path::new("/etc/passwd")
    );
    assert_eq!(std::fs::read(layer.join("n".repeat(200))).unwrap(), b"long");
    assert!(stat("fifo").file_type().is_fifo() && !layer.join("socket").exists());
    assert_eq!(
        store.import("tree", directory(), &created, &()).unwrap().id,
        image.id,
        "deterministic"
    );
    let missing = ImportSource::Directory(dir.path().join("missing"));
    let error = store
        .import("missing", missing, &created, &())
        .unwrap_err()
        .to_string();
    assert!(error.contains("No such file"), "{error}");
}

#[test]
fn names_and_removal() {
    let (_dir, store) = store();
    let a = import(&store, "a", Tar::new().file("f", b"a").finish());
    import(&store, "b", Tar::new().file("f", b"b").finish());
    store.tag(&reference("a"), &name("also:a")).unwrap();
    let listed: Vec<_> = store
        .list()
        .unwrap()
        .into_iter()
        .filter_map(|image| image.reference)
        .collect();
    assert_eq!(
        listed,
        [
            "docker.io/library/a:latest",
            "docker.io/library/also:a",
            "docker.io/library/b:latest"
        ]
    );
    let id = reference(&a.id);
    assert!(matches!(
        store.remove(&id, false, &never),
        Err(Error::SeveralNames { .. })
    ));
    let removed = store.remove(&reference("a"), false, &never).unwrap();
    assert_eq!((removed.untagged.len(), removed.images.len()), (1, 0));
    assert!(get(&store, &reference("also:a")).is_ok());
    let removed = store.remove(&id, false, &never).unwrap();
    assert_eq!(
        (removed.untagged, removed.images, removed.bytes),
        (vec!["docker.io/library/also:a".into()], vec![a.id], 1)
    );
    assert!(
        store
            .remove(&reference("a"), false, &never)
            .unwrap_err()
            .is_not_found()
    );
    store.remove(&reference("b"), true, &never).unwrap();
    assert_empty(&store);
}

#[test]
fn what_a_container_uses_stays() {
    let (_dir, store) = store();
    let image = import(&store, "used", Tar::new().file("f", b"x").finish());
    let hold = store.hold(&image, "container").unwrap().unwrap();
    // The process lives, though nobody knows the container.
    let error = store.remove(&reference("used"), false, &never).unwrap_err();
    assert_eq!(error.to_string(), "image \"used\" is in use by container");
    drop(hold);
    // The process is gone, the container is not.
    let known = |id: &str| id == "container";
    assert!(matches!(
        store.remove(&reference("used"), false, &known),
        Err(Error::InUse { .. })
    ));
    assert!(store.prune(true, &known).unwrap().images.is_empty());
    // By force the name goes, the image stays: the container may be started again.
    let removed = store.remove(&reference("used"), true, &known).unwrap();
    assert!(removed.images.is_empty() && removed.untagged.len() == 1);
    let [left] = &store.list().unwrap()[..] else {
        panic!("one image is left");
    };
    assert!(left.reference.is_none() && image.layers[0].join("f").exists());
    assert!(matches!(
        store.remove(&reference(&image.id), true, &known),
        Err(Error::InUse { .. })
    ));
    assert!(
        matches!(store.hold(&image, "second"), Ok(Some(_))),
        "its layers are there"
    );
    store.release("second").unwrap();
    // Neither process nor container: nothing is held.
    store.prune(false, &never).unwrap();
    assert_empty(&store);
    assert_eq!(names(store.root().join("holds")), Vec::<String>::new());
    assert!(matches!(
        store.hold(&image, "third"),
        Err(Error::Damaged { .. })
    ));
    assert!(store.hold(&image, "../x").is_err());
    assert_eq!(names(store.root().join("holds")), Vec::<String>::new());
}

#[test]
fn what_was_left_behind_is_cleared() {
    let (_dir, store) = store();
    let layout = Layout::with(&[Tar::new().file("f", b"x").finish()]);
    // As if an unpacking process had been killed: half a layer.
    let diff_id = Digest::of(&Tar::new().file("f", b"x").finish());
    let partial = store
        .root()
        .join("layers")
        .join(format!("{}.partial", diff_id.hex()));
    std::fs::create_dir_all(partial.join("diff/half/done")).unwrap();
    let image = get(&store, &layout.reference()).unwrap();
    assert_eq!(names(&image.layers[0]), ["f"]);
    std::fs::create_dir_all(store.root().join("layers/0000.partial/diff/x")).unwrap();
    std::fs::create_dir_all(store.root().join("layers/trash-0000/diff/x")).unwrap();
    std::fs::write(store.root().join("blobs/sha256/0000.part"), "x").unwrap();
    store.prune(false, &never).unwrap();
    assert_eq!(names(store.root().join("layers")).len(), 1);
    assert_eq!(names(store.root().join("blobs/sha256")).len(), 2);
    assert_eq!(get(&store, &layout.reference()).unwrap(), image);
}

#[test]
fn a_layer_whose_files_are_gone_is_unpacked_anew() {
    let (_dir, store) = store();
    let layout = Layout::with(&[Tar::new().file("f", b"x").finish()]);
    let image = get(&store, &layout.reference()).unwrap();
    std::fs::remove_dir_all(&image.layers[0]).unwrap();
    assert_eq!(get(&store, &layout.reference()).unwrap(), image);
    assert_eq!(names(&image.layers[0]), ["f"]);
}

#[test]
fn damage_in_the_store_is_named() {
    let (_dir, store) = store();
    let image = import(&store, "a", Tar::new().file("f", b"a").finish());
    std::fs::remove_dir_all(image.layers[0].parent().unwrap()).unwrap();
    let never_pull =
        |store: &Store| store.resolve(&reference("a"), Pull::Never, &Credentials::anonymous(), &());
    let error = never_pull(&store).unwrap_err();
    assert!(matches!(error, Error::Damaged { .. }), "{error}");
    assert_eq!(
        error.hint().unwrap(),
        "hull image pull docker.io/library/a:latest"
    );
    std::fs::write(store.root().join("references.json"), "{\"version\":1,\"na").unwrap();
    let error = never_pull(&store).unwrap_err().to_string();
    assert!(error.contains("references.json is corrupt"), "{error}");
    std::fs::write(
        store.root().join("references.json"),
        "{\"version\":9,\"names\":{}}",
    )
    .unwrap();
    let error = never_pull(&store).unwrap_err().to_string();
    assert!(error.contains("format version 9"), "{error}");
}

#[test]
fn what_a_newer_hull_wrote_is_neither_damaged_nor_removed() {
    let (_dir, store) = store();
    let newer = import(&store, "newer", Tar::new().file("f", b"a").finish());
    let record = record_of(&store, &newer);
    std::fs::write(&record, r#"{"version":9,"something":"else"}"#).unwrap();
    for error in [
        store.list().map(drop).unwrap_err(),
        store.prune(true, &|_| false).map(drop).unwrap_err(),
        store.inspect(&reference("newer")).map(drop).unwrap_err(),
    ] {
        assert!(matches!(error, Error::StoreVersion { .. }), "{error}");
    }
    assert!(record.exists() && newer.layers[0].exists());
}

#[test]
fn a_damaged_hold_keeps_all_layers_until_its_container_is_removed() {
    let (_dir, store) = store();
    let image = import(&store, "used", Tar::new().file("f", b"a").finish());
    drop(store.hold(&image, "box").unwrap());
    let hold = store.root().join("holds/box.json");
    std::fs::write(&hold, "").unwrap();
    let error = store.prune(true, &|_| true).map(drop).unwrap_err();
    assert_eq!(error.hint().unwrap(), "hull rm box");
    assert!(image.layers[0].exists());
    store.release("box").unwrap();
    store.prune(true, &|_| false).unwrap();
    assert!(!image.layers[0].exists());
}

/// Where the store describes an image.
fn record_of(store: &Store, image: &Image) -> std::path::PathBuf {
    let digest = image.digest.unwrap().to_string();
    let hex = digest.strip_prefix("sha256:").unwrap();
    store.root().join(format!("images/{hex}.json"))
}

#[test]
fn an_image_with_a_damaged_record_hides_no_other_and_can_be_removed() {
    let (_dir, store) = store();
    let bad = import(&store, "bad", Tar::new().file("f", b"a").finish());
    import(&store, "good", Tar::new().file("f", b"b").finish());
    std::fs::write(record_of(&store, &bad), "{").unwrap();
    assert_eq!(store.list().unwrap().len(), 1);
    assert_eq!(store.list_with_damages().unwrap().1.len(), 1);
    let error = store.inspect(&reference("bad")).unwrap_err();
    assert!(matches!(error, Error::Damaged { .. }), "{error}");
    store.inspect(&reference("good")).unwrap();
    let removed = store.remove(&reference("bad"), false, &|_| false).unwrap();
    assert_eq!(removed.untagged, ["docker.io/library/bad:latest"]);
    assert!(store.list_with_damages().unwrap().1.is_empty());
    store.inspect(&reference("good")).unwrap();
}

/// It is on the path of every start.
#[test]
fn finding_a_local_image_takes_no_longer_with_many_images() {
    let (_dir, store) = store();
    let tar = |text: &str| Tar::new().file("f", text.as_bytes()).finish();
    let image = import(&store, "quick", tar("quick"));
    let quick = reference("quick");
    let find = || {
        let before = reads_of_this_thread();
        let store = Store::open(store.root()).unwrap();
        assert_eq!(get(&store, &quick).unwrap().id, image.id);
        reads_of_this_thread() - before
    };
    let one = find();
    for number in 0..20 {
        let other = format!("image-{number}");
        import(&store, &other, tar(&other));
    }
    assert_eq!(find(), one, "reads of files");
}

/// The number of read system calls so far (`syscr` of proc_pid_io(5)).
fn reads_of_this_thread() -> u64 {
    let io = std::fs::read_to_string("/proc/thread-self/io").unwrap();
    let count = io.lines().find_map(|line| line.strip_prefix("syscr: "));
    count.unwrap().parse().unwrap()
}

#[test]
fn a_layer_that_hides_everything_below() {
    let (_dir, store) = store();
    let layout = Layout::with(&[
        Tar::new().file("old", b"old").finish(),
        Tar::new()
            .file(".wh..wh..opq", b"")
            .file("new", b"n")
            .finish(),
    ]);
    let image = get(&store, &layout.reference()).unwrap();
    assert_eq!((image.layers.len(), image.size), (1, 1));
}

#[test]
fn an_incomplete_layer_belongs_to_its_stack() {
    let (_dir, store) = store();
    let incomplete = Tar::new().file("tmp/f", b"x").finish();
    let with_tmp = |mode| Tar::new().mode(mode).dir("tmp").finish();
    let open = get(
        &store,
        &Layout::with(&[with_tmp(0o1777), incomplete.clone()]).reference(),
    )
    .unwrap();
    let closed = get(
        &store,
        &Layout::with(&[with_tmp(0o700), incomplete.clone()]).reference(),
    )
    .unwrap();
    let mode = |image: &Image| {
        std::fs::metadata(image.layers[0].join("tmp"))
            .unwrap()
            .mode()
            & 0o7777
    };
    assert_eq!((mode(&open), mode(&closed)), (0o1777, 0o700));
    let alone = get(&store, &Layout::with(&[incomplete]).reference()).unwrap();
    assert_eq!(mode(&alone), 0o755);
}

/// Not a test of its own: what [`killed_at_any_moment`] starts and kills.
#[test]
fn victim() {
    let (Ok(root), Ok(layout)) = (
        std::env::var("HULL_TEST_STORE"),
        std::env::var("HULL_TEST_LAYOUT"),
    ) else {
        return;
    };
    let store = Store::open(root).unwrap();
    get(&store, &reference(&layout)).unwrap();
}

#[test]
fn killed_at_any_moment() {
    let (dir, _) = store();
    let root = dir.path().join("store");
    let mut archive = Tar::new();
    for number in 0..300 {
        archive = archive.file(format!("f{number}"), noise(number * 10));
    }
    let layout = Layout::with(&[
        archive.finish(),
        Tar::new().file("big", noise(1_000_000)).finish(),
        Tar::new().file("f1", b"last").finish(),
    ]);
    let text = layout.reference().to_string();
    let offline = reference(&text);
    let mut killed = 0;
    for round in 0..25 {
        let mut child = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "victim", "-q"])
            .env("HULL_TEST_STORE", &root)
            .env("HULL_TEST_LAYOUT", &text)
            .stdout(std::process::Stdio::null())
            .stderr(std::process::Stdio::null())
            .spawn()
            .unwrap();
        std::thread::sleep(std::time::Duration::from_millis(round * 8));
        child.kill().unwrap();
        killed += usize::from(!child.wait().unwrap().success());
        let store = Store::open(&root).unwrap();
        // Complete, or not there at all.
        match store.inspect(&offline) {
            Ok(image) => {
                assert_eq!(image.layers.len(), 3);
                assert_eq!(names(&image.layers[2]).len(), 300);
                if round % 2 == 0 {
                    store.remove(&offline, false, &never).unwrap();
                }
            }
            Err(error) => assert!(error.is_not_found(), "{error}"),
        }
    }
    assert!(killed > 3, "only {killed} were killed in time");
    let store = Store::open(&root).unwrap();
    assert_eq!(get(&store, &offline).unwrap().layers.len(), 3);
    store.prune(true, &never).unwrap();
    assert_empty(&store);
}

/// Twenty threads as twenty processes: everything at once, and nothing is lost that is in use.
#[test]
fn everything_at_once() {
    let (dir, _) = store();
    let root = dir.path().join("store");
    let layout = Layout::with(&[
        Tar::new().file("a", noise(200_000)).finish(),
        Tar::new().file("b", noise(100_000)).finish(),
    ]);
    std::thread::scope(|scope| {
        for thread in 0..20 {
            let (root, layout) = (&root, &layout);
            scope.spawn(move || {
                let store = Store::open(root).unwrap();
                for round in 0..5 {
                    match thread % 4 {
                        0 => _ = store.prune(thread % 8 == 0, &never).unwrap(),
                        1 => {
                            _ = import(
                                &store,
                                &format!("i{thread}"),
                                Tar::new().file("i", b"i").finish(),
                            )
                        }
                        _ => {
                            let id = format!("c{thread}-{round}");
                            // Removed between resolving and holding: again, as a caller would.
                            let (image, hold) = loop {
                                let image = match get(&store, &layout.reference()) {
                                    Err(Error::Damaged { .. }) => continue,
                                    image => image.unwrap(),
                                };
                                match store.hold(&image, &id) {
                                    Err(Error::Damaged { .. }) => {}
                                    hold => break (image, hold.unwrap().unwrap()),
                                }
                            };
                            std::thread::yield_now();
                            assert_eq!(
                                std::fs::read(image.layers[1].join("a")).unwrap().len(),
                                200_000
                            );
                            hold.release().unwrap();
                        }
                    }
                }
            });
        }
    });
    let store = Store::open(&root).unwrap();
    store.prune(true, &never).unwrap();
    assert_empty(&store);
}

#[test]
fn images_over_a_limit_leave_nothing() {
    let big = Tar::new()
        .file("a", noise(50_000))
        .file("b", noise(50_000))
        .finish();
    let low = Tar::new().file("low", b"x").finish();
    let layout = Layout::with(&[low.clone(), big.clone()]);
    let dir = tempfile::tempdir().unwrap();
    let open = |limits| Store::open(dir.path()).unwrap().with_limits(limits);
    let resolve = |store: &Store| get(store, &layout.reference());
    let store = open(Limits::with(80_000, 0));
    let error = resolve(&store).unwrap_err();
    assert!(
        error
            .to_string()
            .ends_with("the image has more than 80000 bytes uncompressed"),
        "{error}"
    );
    assert!(error.hint().unwrap().contains("image_max_size"));
    // The lower layer stays until `prune`, as after any other error.
    assert_eq!(names(dir.path().join("layers")).len(), 1);
    let store = open(Limits::with(0, 2));
    let error = resolve(&store).unwrap_err();
    assert!(
        error.hint().unwrap().contains("image_max_inodes"),
        "{error}"
    );
    let reserve = Reserve {
        one_of: 1,
        most_bytes: u64::MAX,
        most_inodes: 0,
    };
    let store = open(Limits {
        reserve,
        ..Limits::default()
    });
    let error = resolve(&store).unwrap_err();
    assert!(matches!(error, Error::Reserve { .. }), "{error}");
    assert_eq!(error.hint().unwrap(), "hull image prune");
    assert_eq!(names(dir.path().join("layers")).len(), 1);
    assert!(store.list().unwrap().is_empty());
    resolve(&open(Limits::default())).unwrap();
    // Layers that exist count, too.
    let more = Layout::with(&[big, low, Tar::new().file("new", b"x").finish()]);
    let error = get(&open(Limits::with(80_000, 0)), &more.reference()).unwrap_err();
    assert!(error.hint().unwrap().contains("image_max_size"), "{error}");
    // An image that is installed stays usable.
    resolve(&open(Limits::with(10, 0))).unwrap();
}
