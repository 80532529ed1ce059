//! Archives are created again, byte by byte. The tests of unpacking and its properties call
//! [`unpack_and_rebuild`], too.

#![allow(clippy::unwrap_used)]

use std::convert::Infallible;

use super::rebuild::{RebuildError, rebuild};
use super::testing::Tar;
use super::*;
use crate::limits::{Disk, Limits, Reserve};

/// Unpacks; if that succeeds, creates the archive again from what there is then, and compares.
pub fn unpack_and_rebuild(
    archive: &[u8],
    root: OwnedFd,
    lower: &[OwnedFd],
    budget: &mut Budget,
) -> Result<Unpacked, LayerError> {
    let again = rustix::io::dup(&root).unwrap();
    let file = tempfile::tempfile().unwrap();
    let skeleton = record_to(&file);
    let (unpacked, complete) = unpack_recorded(archive, root, lower, budget, skeleton)?;
    if complete {
        let rebuilt = rebuilt(&file, &again, archive.len() as u64).unwrap();
        assert!(
            rebuilt == archive,
            "{} and {}",
            rebuilt.len(),
            archive.len()
        );
    }
    Ok(unpacked)
}

fn record_to(file: &std::fs::File) -> Skeleton {
    let disk = fs::open_dir("/tmp").unwrap();
    Skeleton::write_to(
        file.try_clone().unwrap(),
        Disk::new(disk, Reserve::default()),
    )
}

fn rebuilt(file: &std::fs::File, root: &OwnedFd, length: u64) -> Result<Vec<u8>, String> {
    let mut bytes = Vec::new();
    let spool = || Ok::<_, Infallible>(tempfile::tempfile().unwrap());
    let mut receive = |piece: &[u8]| {
        bytes.extend_from_slice(piece);
        Ok(())
    };
    match rebuild(file, root, length, spool, &mut receive) {
        Ok(()) => Ok(bytes),
        Err(RebuildError::Damaged(reason)) => Err(reason),
    }
}

/// An unpacked archive: its directory, its skeleton, and whether that is complete.
fn recorded(archive: &[u8]) -> (tempfile::TempDir, std::fs::File, bool) {
    let dir = tempfile::tempdir().unwrap();
    let file = tempfile::tempfile().unwrap();
    let root = fs::open_dir(dir.path()).unwrap();
    let mut budget = Budget::new(Limits::default());
    let (_, complete) = unpack_recorded(archive, root, &[], &mut budget, record_to(&file)).unwrap();
    (dir, file, complete)
}

fn comes_back(archive: &[u8]) {
    let dir = tempfile::tempdir().unwrap();
    let root = fs::open_dir(dir.path()).unwrap();
    let mut budget = Budget::new(Limits::default());
    unpack_and_rebuild(archive, root, &[], &mut budget).unwrap();
    let (_dir, _, complete) = recorded(archive);
    assert!(complete);
}

#[test]
fn all_kinds_of_entries_come_back() {
    let long = "d/".repeat(80) + "name";
    let big: Vec<u8> = (0..300_000u32).flat_map(u32::to_le_bytes).collect();
    comes_back(
        &Tar::new()
            .dir("./")
            .dir("etc")
            .file("etc/file", b"content")
            .file("etc/empty", b"")
            .file("big", &big)
            .hard_link("link", "etc/file")
            .symlink("symbolic", "../../etc")
            .file("etc/.wh.gone", b"")
            .file("etc/.wh..wh..opq", b"")
            .pax(&[("path", long.as_bytes()), ("SCHILY.xattr.user.x", b"1")])
            .file("short", b"long name")
            .pax(&[
                ("GNU.sparse.size", b"1000100"),
                ("GNU.sparse.map", b"4096,3,1000000,2"),
            ])
            .file("sparse", b"abcde")
            .raw("etc/.wh.with-data", b'0', "", b"whiteout with data")
            .finish(),
    );
}

#[test]
fn what_follows_the_end_and_archives_without_an_end_come_back() {
    comes_back(&Tar::new().file("a", b"1").cut());
    comes_back(b"");
    let mut padded = Tar::new().file("a", b"1").finish();
    padded.extend([0; 10_000]);
    padded.extend(b"and more");
    comes_back(&padded);
}

#[test]
fn files_that_later_entries_replace_come_back() {
    comes_back(
        &Tar::new()
            .file("file", b"first")
            .file("file", b"second, longer")
            .dir("file")
            .file("file/inner", b"third")
            .dir("file/deep")
            .file("file/deep/inner", b"fourth")
            .hard_link("other", "file/inner")
            .file("file", b"fifth")
            .file("other", b"sixth")
            .symlink("file", "other")
            .hard_link("other", "file")
            .finish(),
    );
}

#[test]
fn files_behind_symbolic_links_come_back() {
    comes_back(
        &Tar::new()
            .dir("real")
            .symlink("door", "real")
            .file("door/inside", b"through the door")
            .dir("door")
            .file("door/inside", b"another")
            .finish(),
    );
}

#[test]
fn replacing_without_an_end_is_not_kept() {
    let mut tar = Tar::new().file("a", b"content");
    for _ in 0..10 {
        tar = tar.hard_link("b", "a").file("a", b"").hard_link("a", "b");
    }
    let (_dir, _, complete) = recorded(&tar.finish());
    assert!(!complete);
}

#[test]
fn a_changed_layer_is_refused_by_the_files_name() {
    let archive = Tar::new().file("etc/file", b"content").finish();
    for change in [
        |path: &std::path::Path| std::fs::write(path, "short").unwrap(),
        |path: &std::path::Path| std::fs::remove_file(path).unwrap(),
        |path: &std::path::Path| {
            std::fs::remove_file(path).unwrap();
            std::os::unix::fs::symlink("/etc/passwd", path).unwrap();
        },
    ] {
        let (dir, file, _) = recorded(&archive);
        change(&dir.path().join("etc/file"));
        let root = fs::open_dir(dir.path()).unwrap();
        let error = rebuilt(&file, &root, archive.len() as u64).unwrap_err();
        assert!(error.contains("\"etc/file\""), "{error}");
    }
}

#[test]
fn any_skeleton_is_read_or_refused() {
    use std::io::{Seek, Write};
    let dir = tempfile::tempdir().unwrap();
    let root = fs::open_dir(dir.path()).unwrap();
    let number = 8u64.to_le_bytes();
    let huge = u64::MAX.to_le_bytes();
    for records in [
        vec![],
        vec![9],
        [&[1][..], &u32::MAX.to_le_bytes()].concat(),
        [&[2][..], &number, &2u32.to_le_bytes(), b".."].concat(),
        [&[3][..], &number, &huge, &[5]].concat(),
        [&[4][..], &number, &huge, &[5]].concat(),
        [&[4][..], &number, &number, b"ab"].concat(),
    ] {
        let mut file = tempfile::tempfile().unwrap();
        let mut gzip = flate2::write::GzEncoder::new(&file, flate2::Compression::fast());
        gzip.write_all(&records).unwrap();
        gzip.finish().unwrap();
        file.rewind().unwrap();
        assert!(rebuilt(&file, &root, 100).is_err(), "{records:?}");
    }
}
