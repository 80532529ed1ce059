#![allow(clippy::unwrap_used)]
use super::super::testing::{Meta, Tar};
use super::*;

fn entries(archive: &[u8]) -> Result<Vec<(Entry, Vec<u8>)>, TarError> {
    let mut reader = TarReader::new(archive);
    let mut entries = Vec::new();
    while let Some(entry) = reader.next()? {
        let mut data = Vec::new();
        reader.read_to_end(&mut data)?;
        entries.push((entry, data));
    }
    Ok(entries)
}

fn error(archive: &[u8]) -> String {
    entries(archive).unwrap_err().to_string()
}

#[test]
fn reads_what_is_written() {
    let meta = Meta {
        mode: 0o4755,
        uid: 12,
        gid: 34,
        mtime: 99,
        device: (0, 0),
    };
    let archive = Tar::new()
        .dir("d/")
        .meta(meta)
        .file("d/f", b"hello")
        .symlink("l", "d/f")
        .hard_link("h", "d/f")
        .device("null", b'3', 1, 3)
        .raw("fifo", b'6', "", b"")
        .raw("old-dir/", b'0', "", b"")
        .finish();
    let entries = entries(&archive).unwrap();
    let kinds: Vec<Kind> = entries.iter().map(|(entry, _)| entry.kind).collect();
    use Kind::*;
    assert_eq!(
        kinds,
        [
            Directory, File, Symlink, HardLink, CharDevice, Fifo, Directory
        ]
    );
    let (file, data) = &entries[1];
    assert_eq!(
        (file.mode, file.uid, file.gid, file.mtime),
        (0o4755, 12, 34, (99, 0))
    );
    assert_eq!(data, b"hello");
    assert_eq!(entries[2].0.link, b"d/f");
    assert_eq!(entries[4].0.device, (1, 3));
}

#[test]
fn pax_records_override_the_header() {
    let long = "x/".repeat(1000);
    let archive = Tar::new()
        .pax(&[
            ("path", long.as_bytes()),
            ("uid", b"4000000"),
            ("mtime", b"-1.25"),
            ("SCHILY.xattr.user.a", b"b\nc=\0d"),
        ])
        .file("short", b"")
        .file("next", b"")
        .finish();
    let entries = entries(&archive).unwrap();
    let first = &entries[0].0;
    assert_eq!(first.path, long.as_bytes());
    assert_eq!((first.uid, first.mtime), (4_000_000, (-2, 750_000_000)));
    assert_eq!(first.xattrs, [(b"user.a".to_vec(), b"b\nc=\0d".to_vec())]);
    assert_eq!(entries[1].0.path, b"next", "records are for one entry");
    assert!(entries[1].0.xattrs.is_empty());
}

#[test]
fn gnu_long_names_and_binary_numbers() {
    let name = [b"\xff\xfe".as_slice(), &[b'n'; 300]].concat();
    let mut archive = Tar::new()
        .raw(
            "././@LongLink",
            b'L',
            "",
            &[name.as_slice(), b"\0"].concat(),
        )
        .raw("././@LongLink", b'K', "", b"target\0")
        .symlink("short", "")
        .finish();
    // The uid of the last header, in binary: 2^31 + 5.
    let at = archive.len() - 1024 - 512;
    archive[at + 108..at + 116].copy_from_slice(&[0x80, 0, 0, 0, 0x80, 0, 0, 5]);
    Tar::seal(&mut archive[at..at + 512]);
    let entries = entries(&archive).unwrap();
    assert_eq!(entries[0].0.path, name);
    assert_eq!(entries[0].0.link, b"target");
    assert_eq!(entries[0].0.uid, (1 << 31) + 5);
}

#[test]
fn ustar_prefixes() {
    let mut archive = Tar::new().file("name", b"").finish();
    archive[345..351].copy_from_slice(b"prefix");
    Tar::seal(&mut archive[..512]);
    assert_eq!(entries(&archive).unwrap()[0].0.path, b"prefix/name");
}

#[test]
fn damage_is_named() {
    let good = Tar::new().file("a", b"hello").finish();
    let mut flipped = good.clone();
    flipped[0] = b'b';
    assert_eq!(
        error(&flipped),
        "archive is damaged at byte 0: bad header checksum"
    );
    for end in [1, 511, 513, 700] {
        assert_eq!(error(&good[..end]), "archive is truncated", "{end}");
    }
    assert_eq!(
        error(&Tar::new().header_only("a", b'0', 1 << 32).cut()),
        "archive is truncated"
    );
    assert!(error(b"not a tar archive at all").contains("truncated"));
    assert!(error(&[b'x'; 1024]).contains("bad size") || error(&[b'x'; 1024]).contains("checksum"));
    // An archive without the two zero blocks at its end is valid.
    assert_eq!(entries(&Tar::new().file("a", b"").cut()).unwrap().len(), 1);
}

#[test]
fn bad_pax_records_are_refused() {
    for record in [
        &b"5"[..],
        b"99999 a=b\n",
        b"6 a=b\nx",
        b"0 \n",
        b"7 a=bcd",
        b"6 abc\n",
        b"-6 a=b\n",
    ] {
        let archive = Tar::new()
            .raw("x", b'x', "", record)
            .file("a", b"")
            .finish();
        assert!(error(&archive).contains("bad PAX record"), "{record:?}");
    }
    for (key, value) in [
        ("size", "x"),
        ("size", "99999999999999999999"),
        ("uid", "4294967296"),
        ("mtime", "a.b"),
    ] {
        let archive = Tar::new()
            .pax(&[(key, value.as_bytes())])
            .file("a", b"")
            .finish();
        assert!(error(&archive).contains("bad PAX"), "{key}={value}");
    }
}

#[test]
fn extension_headers_are_bounded() {
    let huge = Tar::new().header_only("x", b'x', 2 << 20).cut();
    assert!(error(&huge).contains("exceeds a limit"));
    let mut many = Tar::new();
    for _ in 0..20 {
        many = many.pax(&[("path", b"p")]);
    }
    assert!(error(&many.file("a", b"").finish()).contains("extension headers in a row"));
}

#[test]
fn sparse_files_of_all_dialects() {
    let expected = Sparse {
        segments: vec![(512, 3), (2000, 2)],
        size: 3000,
    };
    let version_0 = Tar::new()
        .pax(&[
            ("GNU.sparse.size", b"3000"),
            ("GNU.sparse.numblocks", b"2"),
            ("GNU.sparse.offset", b"512"),
            ("GNU.sparse.numbytes", b"3"),
            ("GNU.sparse.offset", b"2000"),
            ("GNU.sparse.numbytes", b"2"),
        ])
        .file("s", b"abcde")
        .finish();
    let version_01 = Tar::new()
        .pax(&[
            ("GNU.sparse.size", b"3000"),
            ("GNU.sparse.map", b"512,3,2000,2"),
        ])
        .file("s", b"abcde")
        .finish();
    let mut data = b"2\n512\n3\n2000\n2\n".to_vec();
    data.resize(512, 0);
    data.extend(b"abcde");
    let version_1 = Tar::new()
        .pax(&[
            ("GNU.sparse.major", b"1"),
            ("GNU.sparse.minor", b"0"),
            ("GNU.sparse.name", b"s"),
            ("GNU.sparse.realsize", b"3000"),
        ])
        .file("GNUSparseFile.0/s", &data)
        .finish();
    let mut old = Tar::new().raw("s", b'S', "", b"abcde").finish();
    old[257..265].copy_from_slice(b"ustar  \0");
    old[345..512].fill(0);
    for (index, number) in [512, 3, 2000, 2].iter().enumerate() {
        let at = 386 + index * 12;
        old[at..at + 11].copy_from_slice(format!("{number:011o}").as_bytes());
    }
    old[483..494].copy_from_slice(format!("{:011o}", 3000).as_bytes());
    Tar::seal(&mut old[..512]);
    for archive in [version_0, version_01, version_1, old] {
        let entries = entries(&archive).unwrap();
        assert_eq!(entries[0].0.path, b"s");
        assert_eq!(entries[0].0.sparse.as_ref(), Some(&expected));
        assert_eq!(entries[0].1, b"abcde");
    }
}

#[test]
fn sparse_maps_that_lie_are_refused() {
    for (map, size) in [
        ("0,3,2,2", "10"),
        ("0,5", "4"),
        ("0,4", "10"),
        ("18446744073709551615,5", "10"),
        ("0", "9"),
    ] {
        let archive = Tar::new()
            .pax(&[
                ("GNU.sparse.size", size.as_bytes()),
                ("GNU.sparse.map", map.as_bytes()),
            ])
            .file("s", b"abcde")
            .finish();
        assert!(error(&archive).contains("sparse map"), "{map}");
    }
    let mut data = b"999999999\n".to_vec();
    data.resize(512, b'1');
    let archive = Tar::new()
        .pax(&[("GNU.sparse.major", b"1"), ("GNU.sparse.realsize", b"1")])
        .file("s", &data)
        .finish();
    assert!(error(&archive).contains("exceeds a limit"));
}

/// The reader never panics on damaged input.
#[test]
fn random_damage_never_panics() {
    let mut data = b"2\n512\n3\n2000\n2\n".to_vec();
    data.resize(517, 0);
    let good = Tar::new()
        .pax(&[
            ("path", b"a/b"),
            ("mtime", b"1.5"),
            ("SCHILY.xattr.user.x", b"y"),
        ])
        .file("f", b"content")
        .pax(&[("GNU.sparse.major", b"1"), ("GNU.sparse.realsize", b"3000")])
        .file("s", &data)
        .hard_link("h", "f")
        .finish();
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    for _ in 0..20_000 {
        let mut bad = good.clone();
        for _ in 0..3 {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            let at = (state % bad.len() as u64) as usize;
            bad[at] = (state >> 32) as u8;
            // Most changes would only fail the checksum.
            let header = at / 512 * 512;
            Tar::seal(&mut bad[header..header + 512]);
        }
        let _ = entries(&bad);
    }
}
