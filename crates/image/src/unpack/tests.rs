#![allow(clippy::unwrap_used)]
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::Path;

use super::skeleton_tests::unpack_and_rebuild;
use super::testing::{Meta, Tar};
use super::*;
use crate::limits::Limits;

struct Tree(tempfile::TempDir);

impl Tree {
    fn path(&self, name: &str) -> std::path::PathBuf {
        self.0.path().join(name)
    }

    fn read(&self, name: &str) -> String {
        std::fs::read_to_string(self.path(name)).unwrap()
    }

    fn stat(&self, name: &str) -> std::fs::Metadata {
        std::fs::symlink_metadata(self.path(name)).unwrap()
    }

    fn is_whiteout(&self, name: &str) -> bool {
        let stat = self.stat(name);
        stat.file_type().is_char_device() && stat.rdev() == 0
    }

    fn is_opaque(&self, name: &str) -> bool {
        fs::is_opaque(fs::open_dir(self.path(name)).unwrap().as_fd())
    }

    fn fd(&self) -> OwnedFd {
        fs::open_dir(self.0.path()).unwrap()
    }
}

/// Unpacks as root, which these tests need for owners, devices and trusted attributes.
fn try_unpack(archive: Vec<u8>, lower: &[OwnedFd]) -> (Tree, Result<Unpacked, LayerError>) {
    assert!(
        rustix::process::geteuid().is_root(),
        "this test must run as root"
    );
    let tree = Tree(tempfile::tempdir().unwrap());
    let mut budget = Budget::new(Limits::default());
    let result = unpack_and_rebuild(&archive, tree.fd(), lower, &mut budget);
    (tree, result)
}

fn layer(archive: Tar) -> Tree {
    let (tree, result) = try_unpack(archive.finish(), &[]);
    result.unwrap();
    tree
}

fn refused(archive: Tar) -> String {
    let (tree, result) = try_unpack(archive.finish(), &[]);
    assert!(!Path::new("/tmp/hull-escaped").exists());
    drop(tree);
    result.unwrap_err().to_string()
}

#[test]
fn owner_mode_time_and_content() {
    let meta = Meta {
        mode: 0o4751,
        uid: 1234,
        gid: 5678,
        mtime: 1_234_567,
        device: (0, 0),
    };
    let (tree, result) = try_unpack(
        Tar::new()
            .mode(0o750)
            .dir("./")
            .meta(Meta {
                mode: 0o1777,
                uid: 1,
                gid: 2,
                mtime: 42,
                device: (0, 0),
            })
            .dir("tmp/")
            .meta(meta)
            .file("tmp/suid", b"x")
            .meta(Meta {
                uid: 7,
                gid: 8,
                mtime: 9,
                ..Meta::default()
            })
            .symlink("link", "/does/not/exist")
            .device("fifo", b'6', 0, 0)
            .mode(0o666)
            .device("null", b'3', 1, 3)
            .finish(),
        &[],
    );
    assert_eq!(
        result.unwrap(),
        Unpacked {
            bytes: 1,
            entries: 6,
            used_lower: false
        }
    );
    let file = tree.stat("tmp/suid");
    assert_eq!(
        (file.mode() & 0o7777, file.uid(), file.gid(), file.mtime()),
        (0o4751, 1234, 5678, 1_234_567)
    );
    let dir = tree.stat("tmp");
    assert_eq!(
        (dir.mode() & 0o7777, dir.uid(), dir.gid(), dir.mtime()),
        (0o1777, 1, 2, 42)
    );
    let link = tree.stat("link");
    assert_eq!((link.uid(), link.gid(), link.mtime()), (7, 8, 9));
    assert_eq!(
        std::fs::read_link(tree.path("link")).unwrap(),
        Path::new("/does/not/exist")
    );
    assert!(tree.stat("fifo").file_type().is_fifo());
    assert_eq!(tree.stat("null").rdev(), rustix::fs::makedev(1, 3));
    assert_eq!(tree.stat("null").mode() & 0o7777, 0o666);
    assert_eq!(tree.stat(".").mode() & 0o7777, 0o750);
}

#[test]
fn names_that_lead_outside_are_refused() {
    for name in [
        "../x",
        "a/../../x",
        "..",
        "a/..",
        "./../x",
        "/../x",
        "/a/../x",
    ] {
        let error = refused(Tar::new().file(name, b"x"));
        assert_eq!(
            error,
            format!("entry \"{name}\" leads outside of the layer")
        );
    }
    assert!(refused(Tar::new().symlink(".", "/")).contains("must be a directory"));
    let error = refused(Tar::new().file(".wh...", b""));
    assert_eq!(error, "entry \".wh...\" is no valid whiteout");
    assert!(refused(Tar::new().file(".wh.", b"")).contains("whiteout"));
    assert!(refused(Tar::new().file("..a/.wh..", b"")).contains("whiteout"));
}

#[test]
fn names_that_begin_with_a_slash_are_below_the_layers_root() {
    let tree = layer(
        Tar::new()
            .dir("/")
            .dir("/bin/")
            .file("/bin/a", b"a")
            .hard_link("/bin/b", "/bin/a")
            .file("//etc/name", b"name")
            .symlink("/usr", "bin"),
    );
    assert_eq!(tree.read("bin/b"), "a");
    assert_eq!(tree.read("etc/name"), "name");
    assert_eq!(tree.read("usr/a"), "a");
}

#[test]
fn symbolic_links_lead_at_most_to_the_root() {
    let outside = tempfile::tempdir().unwrap();
    let target = outside.path().to_str().unwrap();
    let tree = layer(
        Tar::new()
            .symlink("abs", target)
            .file("abs/a", b"a")
            .symlink("up", "../../../../../../../..")
            .file("up/b", b"b")
            .dir("d/")
            .symlink("d/self", "../d/./x/../")
            .dir("d/x")
            .file("d/self/c", b"c"),
    );
    assert_eq!(std::fs::read_dir(outside.path()).unwrap().count(), 0);
    assert_eq!(tree.read(&format!("{target}/a")[1..]), "a");
    assert_eq!(tree.read("b"), "b");
    assert_eq!(tree.read("d/c"), "c");
}

#[test]
fn the_last_part_of_a_name_is_never_followed() {
    let outside = tempfile::tempdir().unwrap();
    let victim = outside.path().join("victim");
    std::fs::write(&victim, "untouched").unwrap();
    let before = std::fs::metadata(&victim).unwrap();
    let path = victim.to_str().unwrap();
    let tree = layer(
        Tar::new()
            .symlink("f", path)
            .file("f", b"new")
            .symlink("d", outside.path().to_str().unwrap())
            .mode(0o700)
            .dir("d")
            .symlink("n", path)
            .device("n", b'3', 1, 3)
            .symlink("h", path)
            .hard_link("h2", "h"),
    );
    let after = std::fs::metadata(&victim).unwrap();
    assert_eq!(std::fs::read_to_string(&victim).unwrap(), "untouched");
    assert_eq!(
        (before.mode(), before.ino(), before.nlink()),
        (after.mode(), after.ino(), after.nlink())
    );
    assert_eq!(tree.read("f"), "new");
    assert!(tree.stat("d").is_dir());
    assert!(
        tree.stat("h2").is_symlink(),
        "a hard link to a symbolic link is one"
    );
}

#[test]
fn loops_and_files_as_parents() {
    let error = refused(
        Tar::new()
            .symlink("a", "b")
            .symlink("b", "a")
            .file("a/x", b""),
    );
    assert!(error.contains("loop of symbolic links"), "{error}");
    let error = refused(Tar::new().file("f", b"").file("f/x", b""));
    assert_eq!(error, "entry \"f/x\": \"f\" is no directory");
}

#[test]
fn hard_links() {
    let tree = layer(
        Tar::new()
            .dir("a")
            .file("a/f", b"1")
            .hard_link("b", "a/f")
            .hard_link("c", "/a/f")
            .hard_link("b", "a/f"),
    );
    let inode = tree.stat("a/f").ino();
    assert_eq!(
        (
            tree.stat("b").ino(),
            tree.stat("c").ino(),
            tree.stat("c").nlink()
        ),
        (inode, inode, 3)
    );
    for target in ["../../etc/passwd", "a/../../x"] {
        let error = refused(Tar::new().hard_link("h", target));
        assert_eq!(
            error,
            format!("hard link \"h\" to \"{target}\" leads outside of the layer")
        );
    }
    for target in ["etc/passwd", "/etc/passwd", "missing", "", "/"] {
        let error = refused(Tar::new().hard_link("h", target));
        assert!(
            error.contains("neither this layer nor a lower one has"),
            "{error}"
        );
    }
    let error = refused(Tar::new().symlink("s", "/etc").hard_link("h", "s/passwd"));
    assert!(error.contains("neither this layer"), "{error}");
    assert!(refused(Tar::new().dir("d").hard_link("h", "d")).contains("neither"));
    assert!(refused(Tar::new().file(".wh.w", b"").hard_link("h", "w")).contains("neither"));
}

#[test]
fn device_nodes() {
    for (kind, major, minor, name) in [
        (b'4', 8, 0, "block"),
        (b'3', 1, 1, "character"),
        (b'3', 10, 232, "character"),
    ] {
        let error = refused(Tar::new().dir("srv").device("srv/x", kind, major, minor));
        assert_eq!(
            error,
            format!("entry \"srv/x\" is {name} device {major}:{minor}, which images may not bring")
        );
        // Hidden by a container's own /dev.
        let below_dev = Tar::new().dir("dev").device("./dev/x", kind, major, minor);
        assert!(!layer(below_dev).path("dev/x").exists());
    }
    assert!(refused(Tar::new().device("x", b'4', 0, 0)).contains("block device 0:0"));
    let tree = layer(
        Tar::new()
            .device("gone", b'3', 0, 0)
            .device("dev/tty", b'3', 5, 0),
    );
    assert!(tree.is_whiteout("gone"));
    assert_eq!(tree.stat("dev/tty").rdev(), rustix::fs::makedev(5, 0));
    assert!(refused(Tar::new().raw("x", b'M', "", b"")).contains("not supported: entry type 'M'"));
}

#[test]
fn later_entries_replace_earlier_ones() {
    let tree = layer(
        Tar::new()
            .file("f", b"1")
            .file("f", b"two")
            .dir("was-dir")
            .file("was-dir/x", b"")
            .dir("was-dir/deep")
            .file("was-dir", b"file")
            .file("was-file", b"")
            .dir("was-file")
            .file("was-file/x", b"y")
            .mode(0o700)
            .dir("kept")
            .file("kept/x", b"x")
            .mode(0o711)
            .dir("kept")
            .file("to-link", b"")
            .symlink("to-link", "f"),
    );
    assert_eq!(
        (
            tree.read("f"),
            tree.read("was-dir"),
            tree.read("was-file/x")
        ),
        ("two".into(), "file".into(), "y".into())
    );
    assert_eq!(tree.stat("kept").permissions().mode() & 0o7777, 0o711);
    assert_eq!(tree.read("kept/x"), "x");
    assert!(tree.stat("to-link").is_symlink());
}

#[test]
fn whiteouts_hide_only_lower_layers() {
    let tree = layer(
        Tar::new()
            .file("d/.wh.gone", b"")
            .file("d/.wh..wh..opq", b"")
            .dir("new")
            .file("new/x", b"x")
            .file(".wh.new", b"")
            .file(".wh.file", b"")
            .file("file", b"here")
            .file("first", b"here")
            .file(".wh.first", b"")
            .file(".wh.dir", b"")
            .dir("dir")
            .file("dir/y", b"y")
            .file(".wh.implied", b"")
            .file("implied/z", b"z")
            .file(".wh..wh.plnk", b""),
    );
    assert!(tree.is_whiteout("d/gone"));
    assert!(tree.is_opaque("d"));
    assert!(tree.is_opaque("new") && tree.read("new/x") == "x");
    assert!(tree.is_opaque("dir") && tree.read("dir/y") == "y");
    assert!(tree.is_opaque("implied") && tree.read("implied/z") == "z");
    assert_eq!(
        (tree.read("file"), tree.read("first")),
        ("here".into(), "here".into())
    );
    assert!(!tree.is_opaque("."));
    let names: Vec<_> = std::fs::read_dir(tree.path("."))
        .unwrap()
        .map(|e| e.unwrap().file_name())
        .collect();
    assert!(
        names
            .iter()
            .all(|name| !name.as_bytes().starts_with(b".wh.")),
        "{names:?}"
    );
    assert_eq!(tree.stat("d/gone").mtime(), 0, "deterministic");
}

#[test]
fn extended_attributes() {
    let capability =
        b"\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00";
    let (tree, result) = try_unpack(
        Tar::new()
            .pax(&[
                ("SCHILY.xattr.security.capability", capability),
                ("SCHILY.xattr.user.note", b"a\nb"),
                ("SCHILY.xattr.trusted.overlay.redirect", b"/etc"),
                ("SCHILY.xattr.user.overlay.opaque", b"y"),
                ("SCHILY.xattr.security.selinux", b"x"),
            ])
            .file("ping", b"")
            .pax(&[("SCHILY.xattr.trusted.overlay.opaque", b"y")])
            .dir("d")
            .finish(),
        &[],
    );
    result.unwrap();
    let file = std::fs::File::open(tree.path("ping")).unwrap();
    let get = |name: &str| {
        let mut value = [0u8; 64];
        rustix::fs::fgetxattr(&file, name, &mut value[..]).map(|length| value[..length].to_vec())
    };
    assert_eq!(get("security.capability").unwrap(), capability);
    assert_eq!(get("user.note").unwrap(), b"a\nb");
    for dropped in [
        "trusted.overlay.redirect",
        "user.overlay.opaque",
        "security.selinux",
    ] {
        assert!(get(dropped).is_err(), "{dropped}");
    }
    assert!(!tree.is_opaque("d"));
}

#[test]
fn odd_and_long_names() {
    let long = "n".repeat(255);
    let deep = format!("{}/f", vec!["d".repeat(100); 20].join("/"));
    let tree = layer(
        Tar::new()
            .file(b"caf\xe9", b"latin1")
            .file(b"new\nline", b"")
            .pax(&[("path", long.as_bytes())])
            .file("x", b"long")
            .pax(&[("path", deep.as_bytes())])
            .file("x", b"deep"),
    );
    assert!(
        tree.0
            .path()
            .join(std::ffi::OsStr::from_bytes(b"caf\xe9"))
            .exists()
    );
    assert_eq!(
        (tree.read(&long), tree.read(&deep)),
        ("long".into(), "deep".into())
    );
    let error = refused(
        Tar::new()
            .pax(&[("path", "n".repeat(256).as_bytes())])
            .file("x", b""),
    );
    assert!(error.starts_with("cannot create \"nnn"), "{error}");
    let error = refused(
        Tar::new()
            .pax(&[("path", "n/".repeat(3000).as_bytes())])
            .file("x", b""),
    );
    assert!(error.contains("longer than 4095 bytes"), "{error}");
    let error = refused(Tar::new().pax(&[("path", b"a\0b")]).file("x", b""));
    assert!(error.contains("zero byte"), "{error}");
    let error = refused(Tar::new().file(b"../\x1b[31m\xff", b""));
    assert!(
        error.contains("\\u{1b}") && !error.contains('\x1b'),
        "{error}"
    );
}

#[test]
fn sparse_files_have_holes() {
    let size = (1u64 << 40).to_string();
    let tree = layer(
        Tar::new()
            .pax(&[
                ("GNU.sparse.size", size.as_bytes()),
                ("GNU.sparse.map", b"4096,3,1000000,2"),
            ])
            .file("s", b"abcde"),
    );
    let stat = tree.stat("s");
    assert_eq!(stat.len(), 1 << 40);
    assert!(stat.blocks() < 100);
    let file = std::fs::File::open(tree.path("s")).unwrap();
    let mut part = [0; 4];
    std::os::unix::fs::FileExt::read_exact_at(&file, &mut part, 999_999).unwrap();
    assert_eq!(&part, b"\0de\0");
}

#[test]
fn times_of_directories_survive_their_entries() {
    let meta = |mtime| Meta {
        mode: 0o755,
        mtime,
        ..Meta::default()
    };
    let tree = layer(
        Tar::new()
            .meta(meta(100))
            .dir("d")
            .file("d/f", b"")
            .symlink("l", "d")
            .meta(meta(200))
            .dir("l/sub")
            .file("d/sub/f", b"")
            .meta(meta(300))
            .dir("gone")
            .symlink("gone", "d")
            .file("implied/dir/f", b""),
    );
    let mtime = |name: &str| tree.stat(name).mtime();
    assert_eq!(
        (
            mtime("d"),
            mtime("d/sub"),
            mtime("implied"),
            mtime("implied/dir"),
            mtime(".")
        ),
        (100, 200, 0, 0, 0)
    );
}

#[test]
fn lower_layers_lend_missing_parents() {
    let bottom = layer(
        Tar::new()
            .meta(Meta {
                mode: 0o1777,
                uid: 3,
                gid: 4,
                ..Meta::default()
            })
            .dir("tmp")
            .dir("usr/lib")
            .symlink("lib", "usr/lib")
            .symlink("abs", "/usr/lib")
            .mode(0o700)
            .dir("hidden"),
    );
    let middle = layer(Tar::new().file(".wh.hidden", b""));
    let archive = Tar::new()
        .file("tmp/f", b"")
        .file("lib/so", b"so")
        .file("abs/so2", b"")
        .file("hidden/f", b"")
        .finish();
    let (top, result) = try_unpack(archive, &[middle.fd(), bottom.fd()]);
    assert!(result.unwrap().used_lower);
    let tmp = top.stat("tmp");
    assert_eq!((tmp.mode() & 0o7777, tmp.uid(), tmp.gid()), (0o1777, 3, 4));
    assert_eq!(top.read("usr/lib/so"), "so");
    assert!(top.path("usr/lib/so2").exists());
    assert!(
        !top.path("lib").exists(),
        "the link of the lower layer stays what it is"
    );
    assert_eq!(
        top.stat("hidden").mode() & 0o7777,
        0o755,
        "what was removed lends nothing"
    );
}

#[test]
fn hard_links_to_lower_layers_copy_up() {
    let bottom = layer(
        Tar::new()
            .dir("bin")
            .meta(Meta {
                mode: 0o4755,
                uid: 5,
                gid: 6,
                mtime: 77,
                device: (0, 0),
            })
            .pax(&[("SCHILY.xattr.user.k", b"v")])
            .file("bin/tool", b"tool"),
    );
    let archive = Tar::new().hard_link("bin/alias", "bin/tool").finish();
    let (top, result) = try_unpack(archive.clone(), &[bottom.fd()]);
    assert!(result.unwrap().used_lower);
    let (a, b) = (top.stat("bin/alias"), top.stat("bin/tool"));
    assert_eq!(
        (a.ino(), a.mode() & 0o7777, a.uid(), a.mtime()),
        (b.ino(), 0o4755, 5, 77)
    );
    assert_eq!(top.read("bin/alias"), "tool");
    let opaque = layer(Tar::new().dir("bin").file("bin/.wh..wh..opq", b""));
    let (_, result) = try_unpack(archive, &[opaque.fd(), bottom.fd()]);
    assert!(matches!(result, Err(LayerError::LinkTarget { .. })));
}

#[test]
fn an_archive_that_is_complete_does_not_look_below() {
    let bottom = layer(Tar::new().dir("d"));
    let (_, result) = try_unpack(
        Tar::new()
            .dir("d")
            .file("d/f", b"")
            .file(".wh.x", b"")
            .finish(),
        &[bottom.fd()],
    );
    assert!(!result.unwrap().used_lower);
}

/// All files below a directory: names, types, modes, owners, times, contents, links.
fn snapshot(dir: &Path) -> Vec<String> {
    let mut lines = Vec::new();
    let mut todo = vec![dir.to_owned()];
    while let Some(path) = todo.pop() {
        let stat = std::fs::symlink_metadata(&path).unwrap();
        let kind = stat.file_type();
        let content = match () {
            () if kind.is_symlink() => format!("{:?}", std::fs::read_link(&path).unwrap()),
            () if kind.is_file() => format!("{:?}", std::fs::read(&path).unwrap()),
            () if kind.is_dir() => {
                todo.extend(
                    std::fs::read_dir(&path)
                        .unwrap()
                        .map(|entry| entry.unwrap().path()),
                );
                format!("{}", fs::is_opaque(fs::open_dir(&path).unwrap().as_fd()))
            }
            () => format!("{}", stat.rdev()),
        };
        let name = path.strip_prefix(dir).unwrap().display().to_string();
        let links = if kind.is_dir() { 0 } else { stat.nlink() };
        let (mode, owner) = (stat.mode(), (stat.uid(), stat.gid()));
        lines.push(format!(
            "{name} {mode:o} {owner:?} {} {links} {content}",
            stat.mtime()
        ));
    }
    lines.sort();
    lines
}

/// Any sequence of entries leaves files outside unchanged, and gives the same result twice.
#[test]
fn random_archives_stay_inside_and_are_deterministic() {
    const NAMES: &[&str] = &[
        "a",
        "b",
        "a/b",
        "a/b/c",
        "l",
        "l/x",
        "l/l/y",
        "m",
        "m/a",
        "a/l",
        "a/l/z",
        ".wh.a",
        "a/.wh.b",
        "a/.wh..wh..opq",
        "b/.wh.l",
        "./",
        "l/",
        "m/.wh.a",
        "a/./b//d",
    ];
    const TARGETS: &[&str] = &[
        "a",
        "/",
        "..",
        "../../../../..",
        "l",
        "/a/b",
        "a/../m",
        "b/c",
        "../sentinel",
        "/tmp",
    ];
    let mut state = 0x1234_5678_9abc_def1_u64;
    let mut random = |bound: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        ((state >> 20) % bound as u64) as usize
    };
    let lower = Tar::new()
        .dir("a/b")
        .symlink("m", "/a")
        .file("low", b"low")
        .mode(0o700)
        .dir("b");
    let lower = layer(lower);
    let mut succeeded = 0;
    for _ in 0..600 {
        let mut archive = Tar::new();
        for number in 0..1 + random(12) {
            let (name, target) = (NAMES[random(NAMES.len())], TARGETS[random(TARGETS.len())]);
            archive = match random(8) {
                0 | 1 => archive.file(name, format!("{number}")),
                2 | 3 => archive.dir(name),
                4 | 5 => archive.symlink(name, target),
                6 => archive.hard_link(name, if random(3) == 0 { "low" } else { target }),
                _ => archive.device(name, b'3', random(2) as u32, 3),
            };
        }
        let archive = archive.finish();
        let outer = tempfile::tempdir().unwrap();
        std::fs::write(outer.path().join("sentinel"), "untouched").unwrap();
        let mut results = Vec::new();
        for name in ["one", "two"] {
            let root = outer.path().join(name);
            std::fs::create_dir(&root).unwrap();
            let fd = fs::open_dir(&root).unwrap();
            let result = unpack(
                archive.as_slice(),
                fd,
                &[lower.fd()],
                &mut Budget::new(Limits::default()),
            );
            let seen = if result.is_ok() {
                snapshot(&root)
            } else {
                Vec::new()
            };
            succeeded += usize::from(result.is_ok());
            results.push((format!("{result:?}"), seen));
        }
        assert_eq!(results[0], results[1]);
        assert_eq!(std::fs::read_dir(outer.path()).unwrap().count(), 3);
        assert_eq!(
            std::fs::read(outer.path().join("sentinel")).unwrap(),
            b"untouched"
        );
    }
    assert!(succeeded > 100, "only {succeeded} archives were good");
}

#[test]
fn truncated_and_compressed_archives() {
    let archive = Tar::new().file("f", vec![7; 100_000]).finish();
    let (_, result) = try_unpack(archive[..50_000].to_vec(), &[]);
    assert_eq!(result.unwrap_err().to_string(), "archive is truncated");
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    std::io::Write::write_all(&mut gzip, &archive).unwrap();
    let gzip = gzip.finish().unwrap();
    let zstd = zstd::encode_all(archive.as_slice(), 1).unwrap();
    for compressed in [&gzip, &zstd] {
        let mut content = Vec::new();
        compression::uncompress(compressed.as_slice())
            .unwrap()
            .read_to_end(&mut content)
            .unwrap();
        assert_eq!(content, archive);
        let tree = Tree(tempfile::tempdir().unwrap());
        let half = compression::uncompress(&compressed[..compressed.len() / 2]).unwrap();
        let error = unpack(half, tree.fd(), &[], &mut Budget::new(Limits::default()))
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("truncated") || error.contains("incomplete"),
            "{error}"
        );
    }
    let skipped = |kind: u8| [&[kind, 0x2a, 0x4d, 0x18, 3, 0, 0, 0], &b"abc"[..]].concat();
    for two in [
        [gzip.clone(), gzip].concat(),
        [
            skipped(0x50),
            zstd.clone(),
            skipped(0x5f),
            zstd,
            skipped(0x5e),
        ]
        .concat(),
    ] {
        let mut content = Vec::new();
        compression::uncompress(two.as_slice())
            .unwrap()
            .read_to_end(&mut content)
            .unwrap();
        assert_eq!(content.len(), 2 * archive.len());
    }
    let error = compression::uncompress(&b"BZh91AY"[..])
        .err()
        .unwrap()
        .to_string();
    assert!(error.contains("bzip2"), "{error}");
}
