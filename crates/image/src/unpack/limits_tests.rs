//! Bounds of memory, time and disk against hostile layers.

#![allow(clippy::unwrap_used)]
use std::os::unix::fs::MetadataExt;
use std::time::{Duration, Instant};

use super::property_tests::peak;
use super::testing::{Meta, Tar};
use super::*;
use crate::limits::{Limits, Reserve};

fn unpack_within(archive: Vec<u8>, limits: Limits) -> Result<tempfile::TempDir, LayerError> {
    let tree = tempfile::tempdir().unwrap();
    let root = fs::open_dir(tree.path()).unwrap();
    unpack(archive.as_slice(), root, &[], &mut Budget::new(limits)).map(|_| tree)
}

fn refused(archive: Tar, limits: Limits) -> String {
    let error = unpack_within(archive.finish(), limits).unwrap_err();
    assert!(error.is_of_host() || matches!(error, LayerError::Entry { .. }));
    error.to_string()
}

fn at(mtime: u64) -> Meta {
    Meta {
        mode: 0o755,
        mtime,
        ..Meta::default()
    }
}

#[test]
fn times_of_directories_in_any_order() {
    let archive = Tar::new()
        .file("made/by/file", b"")
        .meta(at(11))
        .dir("a/")
        .file("a/one", b"")
        .meta(at(12))
        .dir("a/b/")
        .file("a/two", b"")
        .file("a/b/three", b"")
        // The directory of the last entry again, with another time.
        .meta(at(13))
        .dir("a/b/")
        .file("a/b/four", b"")
        .symlink("link", "a/b")
        // By another name.
        .file("link/five", b"")
        .file("a/b/.wh.gone", b"")
        .hard_link("a/b/six", "a/one")
        // Replaced by a file, and that by a directory.
        .meta(at(14))
        .dir("c/")
        .file("c/f", b"")
        .file("c", b"")
        .meta(at(16))
        .dir("c/")
        .file("c/new", b"")
        .meta(at(15))
        .dir("./")
        .file("last", b"")
        .finish();
    let tree = unpack_within(archive, Limits::default()).unwrap();
    let time = |name: &str| std::fs::metadata(tree.path().join(name)).unwrap().mtime();
    let names = ["made", "made/by", "a", "a/b", "c", "."];
    assert_eq!(names.map(time), [0, 0, 11, 13, 16, 15]);
    for name in ["a/b/five", "a/b/six", "c/new", "last"] {
        assert!(tree.path().join(name).exists(), "{name}");
    }
}

#[test]
fn the_time_of_a_directory_that_a_link_copies_into() {
    let lower = unpack_within(
        Tar::new().file("d/target", b"x").finish(),
        Limits::default(),
    );
    let lower = lower.unwrap();
    let archive = Tar::new()
        .meta(at(21))
        .dir("d/")
        .file("d/first", b"")
        .hard_link("d/link", "d/target")
        .file("d/last", b"")
        .finish();
    let tree = tempfile::tempdir().unwrap();
    let root = fs::open_dir(tree.path()).unwrap();
    let lower = [fs::open_dir(lower.path()).unwrap()];
    let mut budget = Budget::new(Limits::default());
    unpack(archive.as_slice(), root, &lower, &mut budget).unwrap();
    assert_eq!(
        std::fs::metadata(tree.path().join("d")).unwrap().mtime(),
        21
    );
}

#[test]
fn many_extended_attributes_take_linear_time() {
    // As many as fit: 1 MiB of records, 64 KiB of them kept. Quadratic, this takes seconds.
    let names: Vec<String> = (0..8000)
        .map(|n| format!("SCHILY.xattr.trusted.{n:x}"))
        .collect();
    let mut records: Vec<(&str, &[u8])> = Vec::new();
    for _ in 0..3 {
        records.extend(names[..4000].iter().map(|name| (name.as_str(), &b""[..])));
    }
    let start = Instant::now();
    for _ in 0..20 {
        let archive = Tar::new().pax(&records).file("f", b"").finish();
        unpack_within(archive, Limits::default()).unwrap();
    }
    assert!(
        start.elapsed() < Duration::from_secs(10),
        "{:?}",
        start.elapsed()
    );
    let value = vec![b'x'; 40_000];
    let two: [(&str, &[u8]); 2] = [
        ("SCHILY.xattr.trusted.a", &value),
        ("SCHILY.xattr.trusted.b", &value),
    ];
    let error = unpack_within(
        Tar::new().pax(&two).file("f", b"").finish(),
        Limits::default(),
    );
    let error = error.unwrap_err().to_string();
    assert!(
        error.ends_with("extended attributes of more than 65536 bytes for one entry"),
        "{error}"
    );
    // One attribute twice is one.
    let same = [two[0], two[0], ("SCHILY.xattr.trusted.c", &b"1"[..])];
    unpack_within(
        Tar::new().pax(&same).file("f", b"").finish(),
        Limits::default(),
    )
    .unwrap();
}

#[test]
fn extension_headers_are_bounded_in_all() {
    let half = vec![b' '; 600_000];
    for kind in [b'x', b'g', b'L', b'V'] {
        let mut archive = Tar::new();
        for _ in 0..2 {
            archive = match kind {
                b'x' => archive.pax(&[("comment", &half)]),
                _ => archive.raw("extension", kind, "", &half),
            };
        }
        let error = unpack_within(archive.file("f", b"").finish(), Limits::default());
        let error = error.unwrap_err().to_string();
        assert!(
            error.contains("before one entry (at most 1048576)"),
            "{error}"
        );
    }
}

#[test]
fn memory_does_not_grow_with_directories() {
    let step = "d".repeat(240);
    let parent = format!("{step}/").repeat(15);
    let mut archive = Tar::new().pax(&[("path", parent.as_bytes())]).dir("x");
    for n in 0..2000 {
        let name = format!("{parent}{n:0200}/");
        archive = archive.pax(&[("path", name.as_bytes())]).dir("x");
    }
    let archive = archive.finish();
    let before = peak();
    let _tree = unpack_within(archive, Limits::default()).unwrap();
    // 2000 paths of 3.8 kB have 7.6 MB.
    let grown = peak().saturating_sub(before);
    assert!(grown < 4 << 20, "{grown} bytes");
}

#[test]
fn bytes_entries_and_depth_are_bounded() {
    let limits = Limits {
        size: 100_000,
        inodes: 5,
        ..Limits::default()
    };
    let fits = Tar::new().file("a", vec![0; 90_000]).finish();
    unpack_within(fits, limits).unwrap();
    let error = refused(
        Tar::new()
            .file("a", vec![0; 50_000])
            .file("b", vec![0; 50_000]),
        limits,
    );
    assert_eq!(error, "the image has more than 100000 bytes uncompressed");
    // Before anything is written.
    let announced = Tar::new().header_only("a", b'0', 1 << 32);
    assert_eq!(refused(announced, limits), error);
    let many = "the image has more than 5 files, directories and links";
    assert_eq!(refused(Tar::new().file("1/2/3/4/5/f", b""), limits), many);
    let links = (0..6).fold(Tar::new(), |tar, n| tar.symlink(format!("l{n}"), "x"));
    assert_eq!(refused(links, limits), many);
    let deep = "d/".repeat(600);
    let error = refused(
        Tar::new().pax(&[("path", deep.as_bytes())]).dir("x"),
        Limits::default(),
    );
    assert!(
        error.ends_with("name of more than 512 components"),
        "{error}"
    );
    let long = "x".repeat(4096);
    let error = refused(
        Tar::new().pax(&[("path", long.as_bytes())]).file("x", b""),
        Limits::default(),
    );
    assert!(error.ends_with("name is longer than 4095 bytes"), "{error}");
    // Links that lead far.
    let far = "a/../".repeat(800);
    let error = refused(
        Tar::new()
            .pax(&[("linkpath", far.as_bytes())])
            .symlink("l", "x")
            .dir("a/")
            .file("l/l/l/l/l/f", b""),
        Limits::default(),
    );
    assert!(error.contains("2048 steps away"), "{error}");
}

#[test]
fn what_follows_the_end_counts() {
    let limits = Limits {
        size: 100_000,
        ..Limits::default()
    };
    let mut budget = Budget::new(limits);
    drain(&[0; 90_000][..], &mut budget).unwrap();
    let error = drain(io::repeat(0), &mut budget).unwrap_err();
    assert!(matches!(error, LayerError::TooLarge { limit: 100_000 }));
}

#[test]
fn a_part_of_the_disk_stays_free() {
    let limits = Limits {
        reserve: Reserve {
            one_of: 1,
            most_bytes: u64::MAX,
            most_inodes: 0,
        },
        ..Limits::default()
    };
    let error = refused(Tar::new().file("a", b"x"), limits);
    assert!(
        error.starts_with("no space left on its file system: ")
            && error.ends_with("must stay free"),
        "{error}"
    );
}
