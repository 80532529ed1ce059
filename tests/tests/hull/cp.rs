//! `hull cp`, both ways.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};

use hull_tests::{Hull, on_every_machine};

on_every_machine!(files_and_directories_are_copied_both_ways);

fn files_and_directories_are_copied_both_ways(machine: &'static str) {
    let hull = Hull::on(machine);
    let container = hull.sleeper();
    let name = container.name.as_str();
    let scratch = hull.scratch();
    fs::create_dir_all(scratch.join("tree/sub")).unwrap();
    fs::write(scratch.join("tree/sub/file"), "content\n").unwrap();
    fs::set_permissions(
        scratch.join("tree/sub/file"),
        fs::Permissions::from_mode(0o751),
    )
    .unwrap();
    symlink("sub/file", scratch.join("tree/link")).unwrap();
    let source = scratch.join("tree");

    hull.hull(["cp", source.to_str().unwrap(), &format!("{name}:/tmp/tree")])
        .run()
        .ok();
    let script = "cat /tmp/tree/sub/file; stat -c %a /tmp/tree/sub/file; readlink /tmp/tree/link";
    assert_eq!(container.sh(script).ok().text(), "content\n751\nsub/file");

    container
        .sh("echo more >>/tmp/tree/sub/file; chown 12:34 /tmp/tree/sub/file")
        .ok();
    let back = scratch.join("back");
    hull.hull(["cp", &format!("{name}:/tmp/tree"), back.to_str().unwrap()])
        .run()
        .ok();
    assert_eq!(
        fs::read_to_string(back.join("sub/file")).unwrap(),
        "content\nmore\n"
    );
    assert_eq!(
        fs::metadata(back.join("sub/file")).unwrap().mode() & 0o777,
        0o751
    );
    assert_eq!(
        fs::read_link(back.join("link")).unwrap().to_str(),
        Some("sub/file")
    );
}

#[test]
fn the_destination_is_named_by_dockers_rules() {
    let hull = Hull::new();
    let container = hull.sleeper();
    let name = container.name.as_str();
    let scratch = hull.scratch();
    fs::write(scratch.join("file"), "x").unwrap();
    let file = scratch.join("file");
    let file = file.to_str().unwrap();
    let copy = |to: &str| hull.hull(["cp", file, &format!("{name}:{to}")]).run();
    copy("/tmp").ok();
    copy("/tmp/renamed").ok();
    copy("/tmp/").ok();
    container.sh("cmp /tmp/file /tmp/renamed").ok();
    copy("/no/such/place").fails(1, &["/no/such"]);
    copy("/nowhere/").fails(1, &["/nowhere"]);
    hull.hull(["cp", &format!("{name}:/no/file"), "/tmp/x"])
        .run()
        .fails(1, &["/no/file"]);
    hull.hull(["cp", "/no/host/file", &format!("{name}:/tmp")])
        .run()
        .fails(1, &["/no/host/file"]);
    hull.hull(["cp", file, "nobody:/tmp"])
        .run()
        .fails(1, &["no such container"]);
    hull.hull(["cp", file, "/tmp/other"])
        .run()
        .fails(125, &["neither side"]);
}

#[test]
fn an_archive_can_be_streamed_both_ways() {
    let hull = Hull::new();
    let container = hull.sleeper();
    let name = container.name.as_str();
    let archive = hull_tests::Archive::new()
        .file("streamed", "by tar\n")
        .bytes();
    hull.hull(["cp", "-", &format!("{name}:/tmp")])
        .input(archive)
        .run()
        .ok();
    assert_eq!(
        container.exec(&["cat", "/tmp/streamed"]).ok().text(),
        "by tar"
    );
    let output = hull
        .hull(["cp", &format!("{name}:/tmp/streamed"), "-"])
        .run()
        .ok();
    let mut archive = tar::Archive::new(output.stdout.as_slice());
    let entry = archive.entries().unwrap().next().unwrap().unwrap();
    assert_eq!(entry.path().unwrap().to_str(), Some("streamed"));
}

#[test]
fn links_planted_in_a_container_do_not_lead_the_copy_astray() {
    let hull = Hull::new();
    let container = hull.sleeper();
    let name = container.name.as_str();
    let target = hull.scratch().join("target");
    fs::create_dir(&target).unwrap();
    let outside = hull.scratch().join("outside");
    fs::create_dir(&outside).unwrap();
    // In the container the link leads to the container's own directory; on the host it must lead
    // nowhere.
    container
        .sh(&format!(
            "mkdir -p /tmp/t {0}; ln -s {0} /tmp/t/link; echo x >/tmp/t/file",
            outside.display()
        ))
        .ok();
    hull.hull(["cp", &format!("{name}:/tmp/t/."), target.to_str().unwrap()])
        .run()
        .ok();
    container
        .sh("rm /tmp/t/link; mkdir /tmp/t/link; echo gotcha >/tmp/t/link/file")
        .ok();
    // The second copy finds a link where the archive has a directory.
    let _ = hull
        .hull(["cp", &format!("{name}:/tmp/t/."), target.to_str().unwrap()])
        .run();
    assert!(!outside.join("file").exists());
    // And into the container: a link to / there leads to the container's /, as a path inside would.
    container.sh("ln -s / /tmp/root").ok();
    let file = target.join("file");
    hull.hull([
        "cp",
        file.to_str().unwrap(),
        &format!("{name}:/tmp/root/copied"),
    ])
    .run()
    .ok();
    container.exec(&["cat", "/copied"]).ok();
}

#[test]
fn what_is_copied_out_has_the_name_that_was_asked_for_and_changes_nothing_that_was_there() {
    let hull = Hull::new();
    let container = hull.sleeper();
    let from = |path: &str| format!("{}:{path}", container.name);
    container
        .sh("mkdir -p /tmp/a/b && echo x >/tmp/a/b/file && ln -s b /tmp/a/link && chmod 777 /tmp/a")
        .ok();
    let home = hull.scratch().join("home");
    fs::create_dir(&home).unwrap();
    fs::set_permissions(&home, fs::Permissions::from_mode(0o700)).unwrap();
    let to = home.to_str().unwrap();
    for path in ["/tmp/a/b/..", "/tmp/a/.", "/tmp/./a/link"] {
        hull.hull(["cp", &from(path), to]).run().ok();
    }
    hull.hull(["cp", "-L", &from("/tmp/a/link"), &format!("{to}/followed")])
        .run()
        .ok();
    let read = |path: &str| fs::read_to_string(home.join(path)).unwrap();
    for path in ["a/b/file", "b/file", "followed/file"] {
        assert_eq!(read(path), "x\n", "{path}");
    }
    assert_eq!(
        fs::read_link(home.join("link")).unwrap().to_str(),
        Some("b")
    );
    assert_eq!(fs::metadata(&home).unwrap().mode() & 0o7777, 0o700);
    assert_eq!(fs::metadata(home.join("a")).unwrap().mode() & 0o7777, 0o777);

    // The root directory has no name: what is in it goes where it is sent.
    let root = hull.scratch().join("root");
    fs::create_dir(&root).unwrap();
    hull.hull(["cp", &from("/etc"), root.to_str().unwrap()])
        .run()
        .ok();
    assert!(root.join("etc/passwd").is_file());
    let whole = hull.scratch().join("whole");
    hull.hull(["cp", &from("/"), whole.to_str().unwrap()]).run();
    assert!(whole.join("etc/passwd").is_file() && whole.join("tmp/a/b/file").is_file());
}

#[test]
fn cp_into_a_read_only_root_says_that_it_is_read_only() {
    let hull = Hull::new();
    let file = hull.path("file");
    fs::write(&file, "content").unwrap();
    let options = [
        "run",
        "-d",
        "--name",
        "ro",
        "--read-only",
        "--network",
        "none",
    ];
    hull.hull(options)
        .args(["busybox", "sleep", "1000"])
        .run()
        .ok();
    let output = hull.hull(["cp"]).arg(&file).arg("ro:/root/").run();
    assert!(
        output.error().contains("Read-only file system"),
        "{output:?}"
    );
}
