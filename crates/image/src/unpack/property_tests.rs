//! Properties of unpacking for any archive: no panic, nothing outside of the directory is touched,
//! memory stays bounded, directories have the times of their entries.

#![allow(clippy::unwrap_used)]
use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use proptest::prelude::*;
use proptest::sample::{Index, select};

use super::skeleton_tests::unpack_and_rebuild;
use super::testing::{Meta, Tar};
use super::*;
use crate::limits::{ATTRIBUTES, EXTENSION_BYTES, Limits};

/// Names that meet each other, and after the first eleven those that try to get out or are special.
const NAMES: &[&str] = &[
    "a",
    "b",
    "a/b",
    "a/b/c",
    "b/a",
    "l",
    "l/a",
    "l/l",
    "a/l",
    "./a/",
    "a//b",
    ".",
    "./",
    "..",
    "../outside/x",
    "a/../../outside/x",
    "l/../../outside",
    "/a",
    ".wh.a",
    "a/.wh.b",
    ".wh..wh..opq",
    "a/.wh..wh..opq",
    ".wh.",
    ".wh...",
    ".wh..wh.plnk",
    "",
];
const TARGETS: &[&str] = &[
    "a",
    "b",
    "a/b",
    "l",
    ".",
    "..",
    "../..",
    "../outside",
    "../outside/victim",
    "/",
    "/a/../..",
    "/proc/self/root",
    "OUTSIDE",
    "OUTSIDE/victim",
    "a/../l",
    "",
];

#[derive(Debug, Clone)]
struct Item {
    name: &'static str,
    target: &'static str,
    kind: u8,
    mtime: u64,
    data: Vec<u8>,
    records: Vec<(&'static str, Vec<u8>)>,
}

fn item() -> impl Strategy<Value = Item> {
    let record = prop_oneof![
        select(NAMES).prop_map(|name| ("path", name.as_bytes().to_vec())),
        select(TARGETS).prop_map(|name| ("linkpath", name.as_bytes().to_vec())),
        any::<u16>().prop_map(|n| ("size", n.to_string().into_bytes())),
        any::<i32>().prop_map(|n| ("mtime", format!("{n}.5").into_bytes())),
        Just(("SCHILY.xattr.user.a", b"b".to_vec())),
        Just(("SCHILY.xattr.trusted.overlay.redirect", b"/etc".to_vec())),
        Just(("SCHILY.xattr.user.overlay.opaque", b"y".to_vec())),
        Just(("GNU.sparse.major", b"1".to_vec())),
        any::<u64>().prop_map(|n| ("GNU.sparse.realsize", n.to_string().into_bytes())),
        Just(("GNU.sparse.map", b"0,1,512,1".to_vec())),
        proptest::collection::vec(any::<u8>(), 0..20).prop_map(|value| ("comment", value)),
    ];
    (
        prop_oneof![20 => select(&NAMES[..11]), 1 => select(NAMES)],
        select(TARGETS),
        prop_oneof![20 => select(&b"0000555221"[..]), 1 => select(&b"34567xgLKSVZ"[..])],
        0..9u64,
        proptest::collection::vec(any::<u8>(), 0..600),
        prop_oneof![8 => Just(Vec::new()), 1 => proptest::collection::vec(record, 1..3)],
    )
        .prop_map(|(name, target, kind, mtime, mut data, records)| {
            if matches!(kind, b'1'..=b'6') {
                // These have none: the reader takes it for the next header.
                data.clear();
            }
            Item {
                name,
                target,
                kind,
                mtime,
                data,
                records,
            }
        })
}

/// Damage to an archive.
#[derive(Debug, Clone)]
enum Damage {
    Byte(Index, u8),
    /// Another byte of a header, whose checksum is made right.
    Header(Index, Index, u8),
    Cut(Index),
    Repeat(Index, Index),
}

fn damage() -> impl Strategy<Value = Damage> {
    prop_oneof![
        (any::<Index>(), any::<u8>()).prop_map(|(at, byte)| Damage::Byte(at, byte)),
        (any::<Index>(), any::<Index>(), any::<u8>())
            .prop_map(|(block, at, byte)| Damage::Header(block, at, byte)),
        any::<Index>().prop_map(Damage::Cut),
        (any::<Index>(), any::<Index>()).prop_map(|(from, to)| Damage::Repeat(from, to)),
    ]
}

fn archive(items: &[Item], outside: &Path) -> Vec<u8> {
    let outside = outside.to_str().unwrap();
    let mut tar = Tar::new();
    for item in items {
        if !item.records.is_empty() {
            let records: Vec<(&str, &[u8])> = item
                .records
                .iter()
                .map(|(key, value)| (*key, value.as_slice()))
                .collect();
            tar = tar.pax(&records);
        }
        let mode = 0o755;
        tar = tar.meta(Meta {
            mode,
            mtime: item.mtime,
            device: (u32::from(item.kind == b'3'), 3),
            ..Meta::default()
        });
        let target = item.target.replace("OUTSIDE", outside);
        tar = tar.raw(item.name, item.kind, target, &item.data);
    }
    tar.finish()
}

fn apply(archive: &mut Vec<u8>, damage: &Damage) {
    if archive.len() < 512 {
        return;
    }
    match damage {
        Damage::Byte(at, byte) => {
            let at = at.index(archive.len());
            archive[at] = *byte;
        }
        Damage::Header(block, at, byte) => {
            let block = block.index(archive.len() / 512) * 512;
            let header = &mut archive[block..block + 512];
            header[at.index(512)] = *byte;
            Tar::seal(header);
        }
        Damage::Cut(at) => archive.truncate(at.index(archive.len())),
        Damage::Repeat(from, to) => {
            let blocks = archive.len() / 512;
            let (from, to) = (from.index(blocks) * 512, to.index(blocks) * 512);
            let block = archive[from..from + 512].to_vec();
            archive.splice(to..to, block);
        }
    }
}

/// What is in a directory: names, kinds, times, contents.
fn listing(dir: &Path) -> BTreeMap<String, (u32, i64, i64, Vec<u8>)> {
    let mut found = BTreeMap::new();
    for entry in std::fs::read_dir(dir).unwrap() {
        let entry = entry.unwrap();
        let stat = std::fs::symlink_metadata(entry.path()).unwrap();
        let content = std::fs::read(entry.path()).unwrap_or_default();
        let name = entry.file_name().into_string().unwrap();
        found.insert(
            name,
            (stat.mode(), stat.mtime(), stat.mtime_nsec(), content),
        );
    }
    found
}

/// Most memory that this process (nextest runs each test in one) has had, as far as the kernel
/// knows: the number may fall a little.
pub(super) fn peak() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:"))
        .unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10
}

fn config(cases: u32) -> ProptestConfig {
    ProptestConfig {
        cases,
        failure_persistence: None,
        ..ProptestConfig::default()
    }
}

proptest! {
    #![proptest_config(config(400))]

    #[test]
    fn any_archive_stays_inside(
        items in proptest::collection::vec(item(), 0..12),
        damages in prop_oneof![
            2 => Just(Vec::new()),
            1 => proptest::collection::vec(damage(), 1..4),
        ],
    ) {
        let before = peak();
        let around = tempfile::tempdir().unwrap();
        let [outside, inside] = ["outside", "inside"].map(|name| around.path().join(name));
        std::fs::create_dir(&outside).unwrap();
        std::fs::create_dir(&inside).unwrap();
        std::fs::write(outside.join("victim"), "untouched").unwrap();
        let untouched = listing(&outside);
        let mut archive = archive(&items, &outside);
        for damage in &damages {
            apply(&mut archive, damage);
        }
        let limits = Limits { size: 1 << 20, inodes: 64, ..Limits::default() };
        let root = fs::open_dir(&inside).unwrap();
        let result = unpack_and_rebuild(&archive, root, &[], &mut Budget::new(limits));
        if let Ok(unpacked) = result {
            prop_assert!(unpacked.bytes <= limits.size && unpacked.entries <= limits.inodes);
        }
        prop_assert_eq!(listing(&outside), untouched);
        let names: Vec<String> = listing(around.path()).into_keys().collect();
        prop_assert_eq!(names, ["inside", "outside"]);
        // The archive, the writer's buffer, and what the allocator keeps.
        prop_assert!(peak().saturating_sub(before) < 16 << 20);
    }

    #[test]
    fn any_bytes_are_entries_or_an_error(
        mut bytes in proptest::collection::vec(any::<u8>(), 0..4096),
        headers in proptest::collection::vec((any::<Index>(), select(&b"0125xgLKSV"[..])), 0..6),
    ) {
        // Valid checksums, and small sizes, let the reader go on.
        for (block, kind) in headers {
            if bytes.len() >= 512 {
                let block = block.index(bytes.len() / 512) * 512;
                let header = &mut bytes[block..block + 512];
                for field in [100..108, 108..116, 116..124, 124..136, 136..148] {
                    header[field].fill(b'0');
                }
                header[133] = b'1';
                header[156] = kind;
                Tar::seal(header);
            }
        }
        let length = bytes.len() as u64;
        let mut reader = TarReader::new(bytes.as_slice());
        while let Ok(Some(entry)) = reader.next() {
            let xattrs = entry.xattrs.iter().map(|(name, value)| name.len() + value.len());
            prop_assert!(xattrs.sum::<usize>() <= ATTRIBUTES);
            prop_assert!((entry.path.len() + entry.link.len()) as u64 <= 2 * EXTENSION_BYTES);
            prop_assert!(reader.position() <= length);
        }
    }
}

/// A path of two letters, at most three deep.
fn plain_path() -> impl Strategy<Value = Vec<&'static str>> {
    proptest::collection::vec(select(&["a", "b"][..]), 1..4)
}

proptest! {
    #![proptest_config(config(300))]

    /// Directories and files in any order, which replace each other.
    #[test]
    fn directories_have_the_times_of_their_entries(
        entries in proptest::collection::vec((plain_path(), any::<bool>(), 1..99u64), 0..20),
    ) {
        let mut tar = Tar::new();
        // Directories by path, with their times; files have none.
        let mut expected: BTreeMap<String, Option<u64>> = BTreeMap::new();
        let mut valid = true;
        for (parts, is_dir, mtime) in entries {
            for depth in 1..parts.len() {
                let parent = expected.entry(parts[..depth].join("/")).or_insert(Some(0));
                valid &= parent.is_some();
            }
            let path = parts.join("/");
            tar = tar.meta(Meta { mode: 0o755, mtime, ..Meta::default() });
            if is_dir {
                tar = tar.dir(&path);
                expected.insert(path, Some(mtime));
            } else {
                tar = tar.file(&path, b"");
                let below = format!("{path}/");
                expected.retain(|known, _| !known.starts_with(&below));
                expected.insert(path, None);
            }
        }
        let dir = tempfile::tempdir().unwrap();
        let root = fs::open_dir(dir.path()).unwrap();
        let mut budget = Budget::new(Limits::default());
        let result = unpack_and_rebuild(&tar.finish(), root, &[], &mut budget);
        prop_assert_eq!(result.is_ok(), valid);
        if valid {
            for (path, time) in expected {
                let stat = std::fs::metadata(dir.path().join(&path)).unwrap();
                prop_assert_eq!(stat.is_dir(), time.is_some());
                if let Some(time) = time {
                    prop_assert_eq!(stat.mtime() as u64, time, "{}", path);
                }
            }
            prop_assert_eq!(std::fs::metadata(dir.path()).unwrap().mtime(), 0);
        }
    }
}
