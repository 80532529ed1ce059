//! Images in archives: saved, read by other tools, taken in again.

#![allow(clippy::unwrap_used)]

mod common;

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

use common::{Layout, Tar, gzip, noise, reference, run};
use hull_image::{Credentials, Error, Image, Loaded, Pull, Reference, RegistryReference, Store};

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

    /// A store with an image of two layers, which has these names.
    fn with(names: &[&str]) -> Self {
        let here = Self::new();
        let layout = Layout::with(&layers());
        let image = here.get(&layout.reference());
        for text in names {
            here.store.tag(&reference(&image.id), &name(text)).unwrap();
        }
        here
    }

    fn get(&self, reference: &Reference) -> Image {
        self.store
            .resolve(reference, Pull::Missing, &Credentials::anonymous(), &())
            .unwrap()
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn save(&self, images: &[&str]) -> hull_image::Result<PathBuf> {
        let path = self.path("saved.tar");
        let images: Vec<Reference> = images.iter().map(|image| reference(image)).collect();
        self.store
            .save(&images, File::create(&path).unwrap(), &path, &())?;
        Ok(path)
    }

    fn load(&self, path: &Path) -> hull_image::Result<Vec<Loaded>> {
        self.store.load("test", File::open(path).unwrap(), &())
    }
}

fn layers() -> Vec<Vec<u8>> {
    vec![
        Tar::new()
            .dir("bin")
            .mode(0o755)
            .file("bin/true", noise(100_000))
            .hard_link("bin/false", "bin/true")
            .file("bin/again", b"first")
            .file("bin/again", b"second")
            .finish(),
        Tar::new()
            .file("bin/.wh.true", b"")
            .symlink("etc", "../../x")
            .finish(),
    ]
}

fn name(text: &str) -> RegistryReference {
    match reference(text) {
        Reference::Registry(name) => name,
        other => panic!("{other}"),
    }
}

fn names(loaded: &Loaded) -> Vec<String> {
    loaded.names.iter().map(Reference::familiar).collect()
}

#[test]
fn what_is_saved_has_the_same_id_and_names_when_it_is_loaded() {
    let here = Here::with(&["app:1", "app:2", "localhost:5000/other:x"]);
    let id = here.store.inspect(&reference("app:1")).unwrap().id;
    let path = here.save(&["app:1", "localhost:5000/other:x"]).unwrap();
    let there = Here::new();
    let loaded = there.load(&path).unwrap();
    assert_eq!(loaded.len(), 1);
    assert_eq!(loaded[0].id, id);
    assert_eq!(names(&loaded[0]), ["app:1", "localhost:5000/other:x"]);
    let image = there.store.inspect(&reference("app:1")).unwrap();
    assert_eq!(image.id, id);
    let upper = std::fs::read_link(image.layers[0].join("etc")).unwrap();
    assert_eq!(upper, Path::new("../../x"));
    assert_eq!(
        std::fs::read(image.layers[1].join("bin/again")).unwrap(),
        b"second"
    );
    // And once more, from there: byte for byte.
    let again = there.save(&["app:1", "localhost:5000/other:x"]).unwrap();
    assert_eq!(std::fs::read(again).unwrap(), std::fs::read(path).unwrap());
}

#[test]
fn a_name_without_a_tag_saves_all_tags_and_an_id_none() {
    let here = Here::with(&["app:1", "app:2", "application:1"]);
    let id = here.store.inspect(&reference("app:1")).unwrap().id;
    let there = Here::new();
    let loaded = there.load(&here.save(&["app"]).unwrap()).unwrap();
    assert_eq!(names(&loaded[0]), ["app:1", "app:2"]);
    let loaded = there.load(&here.save(&[&id]).unwrap()).unwrap();
    assert_eq!(
        (loaded[0].id.as_str(), loaded[0].names.len()),
        (id.as_str(), 0)
    );
    let error = here.save(&["nothing"]).unwrap_err();
    assert!(error.is_not_found());
}

#[test]
fn skopeo_reads_what_is_saved_in_both_forms() {
    let here = Here::with(&["app:1"]);
    let path = here.save(&["app:1"]).unwrap();
    let saved = path.display();
    for from in [
        format!("docker-archive:{saved}"),
        format!("docker-archive:{saved}:app:1"),
        format!("oci-archive:{saved}"),
        format!("oci-archive:{saved}:1"),
    ] {
        let to = format!("oci:{}:latest", here.path("copy").display());
        run("skopeo", &["--insecure-policy", "copy", "-q", &from, &to]);
        let there = Here::new();
        let image = there.get(&reference(&to));
        let ours = here.store.inspect(&reference("app:1")).unwrap();
        assert_eq!(image.config, ours.config, "{from}");
        assert_eq!(image.layers.len(), 2, "{from}");
        std::fs::remove_dir_all(here.path("copy")).unwrap();
    }
}

#[test]
fn archives_of_other_tools_are_loaded_compressed_or_not_and_through_pipes() {
    let here = Here::new();
    let layout = Layout::with(&layers());
    let from = format!("oci:{}", layout.path().display());
    let archive = here.path("archive");
    for (kind, name, expected) in [
        ("docker-archive", ":app:1", vec!["app:1"]),
        ("oci-archive", ":docker.io/library/app:2", vec!["app:2"]),
        ("oci-archive", ":only-a-tag", vec![]),
    ] {
        let to = format!("{kind}:{}{name}", archive.display());
        run("skopeo", &["--insecure-policy", "copy", "-q", &from, &to]);
        let bytes = std::fs::read(&archive).unwrap();
        let compressed = here.path("compressed");
        for content in [
            gzip(&bytes),
            zstd::encode_all(&*bytes, 1).unwrap(),
            bytes.clone(),
        ] {
            std::fs::write(&compressed, content).unwrap();
            let there = Here::new();
            let loaded = there.load(&compressed).unwrap();
            assert_eq!(names(&loaded[0]), expected, "{kind}");
            assert!(there.store.inspect(&reference(&loaded[0].id)).is_ok());
        }
        let there = Here::new();
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        let writing = std::thread::spawn(move || File::from(writer).write_all(&bytes).unwrap());
        let loaded = there.store.load("pipe", reader.into(), &()).unwrap();
        writing.join().unwrap();
        assert_eq!(names(&loaded[0]), expected, "{kind}");
        std::fs::remove_file(&archive).unwrap();
    }
}

#[test]
fn all_images_of_an_archive_are_loaded() {
    let here = Here::with(&["one:1"]);
    let mut layout = Layout::new();
    layout.image(
        "two",
        common::host_architecture(),
        &[layers()[0].clone(), Tar::new().file("two", b"2").finish()],
    );
    let two = here.get(&reference(&format!("oci:{}:two", layout.path().display())));
    here.store.tag(&reference(&two.id), &name("two:1")).unwrap();
    let path = here.save(&["one:1", "two:1"]).unwrap();
    let there = Here::new();
    let loaded = there.load(&path).unwrap();
    let all: Vec<_> = loaded.iter().flat_map(names).collect();
    assert_eq!(all, ["one:1", "two:1"]);
    assert_eq!(there.store.inspect(&reference("two:1")).unwrap().id, two.id);
}

#[test]
fn an_image_that_is_here_already_gets_the_archives_names() {
    let here = Here::with(&["app:1"]);
    let path = here.save(&["app:1"]).unwrap();
    here.store
        .tag(&reference("app:1"), &name("kept:1"))
        .unwrap();
    here.store
        .remove(&reference("app:1"), false, &|_| false)
        .unwrap();
    let before = here.store.inspect(&reference("kept:1")).unwrap();
    here.load(&path).unwrap();
    let after = here.store.inspect(&reference("app:1")).unwrap();
    assert_eq!((after.id, after.digest), (before.id, before.digest));
}

#[test]
fn what_is_no_archive_of_images_is_refused_by_name() {
    let here = Here::new();
    let path = here.path("other");
    for (content, reason) in [
        (Tar::new().file("a", b"b").finish(), "holds no images"),
        (
            Tar::new().file("manifest.json", b"[]").finish(),
            "holds no image",
        ),
        (
            Tar::new().file("manifest.json", b"{").finish(),
            "manifest.json",
        ),
        (Tar::new().file("index.json", b"{").finish(), "index"),
        (b"no archive".to_vec(), "test"),
        (
            Tar::new()
                .file(
                    "manifest.json",
                    br#"[{"Config":"c","RepoTags":null,"Layers":[]}]"#,
                )
                .finish(),
            "no member c",
        ),
    ] {
        std::fs::write(&path, &content).unwrap();
        let error = here.load(&path).unwrap_err().to_string();
        assert!(error.contains(reason), "{error}");
    }
    assert!(here.store.list().unwrap().is_empty());
}

#[test]
fn a_layer_that_an_older_hull_unpacked_or_somebody_changed_is_refused_with_a_hint() {
    let here = Here::with(&["app:1"]);
    let image = here.store.inspect(&reference("app:1")).unwrap();
    let file = image.layers[1].join("bin/again");
    let content = std::fs::read(&file).unwrap();
    std::fs::write(&file, b"SECOND").unwrap();
    let error = here.save(&["app:1"]).unwrap_err();
    assert!(
        error.to_string().contains("not those of the image"),
        "{error}"
    );
    std::fs::write(&file, content).unwrap();
    here.save(&["app:1"]).unwrap();

    let record = image.layers[1].parent().unwrap().join("layer.json");
    let text = std::fs::read_to_string(&record).unwrap();
    let mut json: serde_json::Value = serde_json::from_str(&text).unwrap();
    json.as_object_mut().unwrap().remove("archive").unwrap();
    std::fs::write(&record, json.to_string()).unwrap();
    let error = here.save(&["app:1"]).unwrap_err();
    assert!(matches!(error, Error::NoArchive { .. }), "{error}");
    assert!(
        error
            .hint()
            .unwrap()
            .contains("pull, load or import it again")
    );
}

#[test]
fn a_layer_below_one_that_hides_it_is_saved_too() {
    let here = Here::new();
    let layout = Layout::with(&[
        Tar::new().file("hidden", b"1").finish(),
        Tar::new()
            .file(".wh..wh..opq", b"")
            .file("top", b"2")
            .finish(),
    ]);
    let image = here.get(&layout.reference());
    assert_eq!(image.layers.len(), 1);
    here.store.prune(false, &|_| false).unwrap();
    here.store
        .tag(&reference(&image.id), &name("app:1"))
        .unwrap();
    let there = Here::new();
    let loaded = there.load(&here.save(&["app:1"]).unwrap()).unwrap();
    assert_eq!(loaded[0].id, image.id);
}

#[test]
fn the_history_has_the_sizes_of_layers_newest_first() {
    let here = Here::new();
    let mut layout = Layout::new();
    let layers = [
        Tar::new().file("a", b"123").finish(),
        Tar::new().file("b", b"12345").finish(),
    ];
    let ids: Vec<String> = layers
        .iter()
        .map(|layer| hull_image::Digest::of(layer).to_string())
        .collect();
    let config = serde_json::json!({
        "architecture": common::host_architecture(), "os": "linux",
        "rootfs": {"type": "layers", "diff_ids": ids},
        "history": [
            {"created": "2024-01-01T00:00:00Z", "created_by": "ADD a", "comment": "first"},
            {"created_by": "ENV x=y", "empty_layer": true},
            {"created_by": "ADD b"},
        ],
    });
    layout.image_of(
        "latest",
        &config,
        &layers,
        "application/vnd.oci.image.layer.v1.tar",
    );
    let image = here.get(&layout.reference());
    let history = here.store.history(&image).unwrap();
    let shown: Vec<_> = history
        .iter()
        .map(|step| (step.created_by.as_str(), step.size, step.comment.as_str()))
        .collect();
    assert_eq!(
        shown,
        [("ADD b", 5, ""), ("ENV x=y", 0, ""), ("ADD a", 3, "first")]
    );
    let plain = here.get(&Layout::with(&layers).reference());
    assert_eq!(here.store.history(&plain).unwrap().len(), 2);
}
