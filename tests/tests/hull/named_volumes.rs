//! Volumes with names, and those that hull names.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::process::Command;

use hull_tests::{Hull, LoopDevice, on_every_machine};

on_every_machine!(a_volume_outlives_its_containers_and_begins_with_what_the_image_has);

fn a_volume_outlives_its_containers_and_begins_with_what_the_image_has(machine: &'static str) {
    let hull = Hull::on(machine);
    image_with_volume(&hull);
    let run = |volume: &str, script: &str| {
        hull.hull(["run", "--rm", "-v", volume, "www", "sh", "-c", script])
            .run()
            .ok()
            .text()
    };
    let shown = run(
        "site:/www",
        "cat /www/index; stat -c %u:%g:%a /www /www/index",
    );
    assert_eq!(shown, "hello\n33:33:750\n33:34:640");
    run("site:/www", "echo more >/www/more; rm /www/index");
    assert_eq!(run("site:/www", "ls /www"), "more", "it is filled once");
    assert_eq!(run("empty:/www:nocopy", "ls /www"), "");
    let list = hull.hull(["volume", "ls", "-q"]).run().ok().text();
    assert_eq!(list, "empty\nsite");
    hull.hull(["volume", "rm", "site", "empty"]).run().ok();
    hull.hull(["volume", "rm", "site"])
        .run()
        .fails(1, &["no such volume: site"]);
    hull.assert_clean();
}

/// Imports the image `www`, which has something where it declares a volume.
fn image_with_volume(hull: &Hull) {
    let script = "mkdir -m 750 /www; echo hello >/www/index; chmod 640 /www/index; \
                  chown 33:33 /www; chown 33:34 /www/index";
    hull.hull(["run", "--name", "filler", "busybox", "sh", "-c", script])
        .run()
        .ok();
    let files = hull.hull(["cp", "filler:/", "-"]).run().ok().stdout;
    hull.hull(["image", "import", "--change", "VOLUME /www", "-", "www"])
        .input(files)
        .run()
        .ok();
    hull.container("filler").does("rm").ok();
}

#[test]
fn a_volume_that_a_container_uses_is_kept() {
    let hull = Hull::new();
    let container = hull.start(&["-v", "data:/data"], &["sleep", "1000"]);
    hull.hull(["volume", "rm", "data"])
        .run()
        .fails(1, &["volume data is used by", &container.name]);
    assert_eq!(hull.hull(["volume", "prune", "-af"]).run().ok().text(), "");
    container.is_removed_by_force();
    assert_eq!(hull.hull(["volume", "prune", "-f"]).run().ok().text(), "");
    assert_eq!(
        hull.hull(["volume", "prune", "-af"]).run().ok().text(),
        "data"
    );
}

#[test]
fn volumes_without_names_go_with_their_container_when_that_is_wanted() {
    let hull = Hull::new();
    let volumes = || hull.hull(["volume", "ls", "-q"]).run().ok().text();
    hull.run(&["-v", "/data"], &["touch", "/data/x"]).ok();
    assert_eq!(volumes(), "", "with --rm");
    for options in [&["rm", "-v"][..], &["rm"]] {
        let container = hull.start(&["-v", "/data"], &["true"]);
        container.does("wait").ok();
        assert_eq!(volumes().len(), 64);
        hull.hull(options).arg(&container.name).run().ok();
    }
    let left = volumes();
    assert_eq!(hull.hull(["volume", "prune", "-f"]).run().ok().text(), left);
}

#[test]
fn a_container_has_the_volumes_of_another_one() {
    let hull = Hull::new();
    let first = hull.start(&["-v", "data:/data", "-v", "/private"], &["true"]);
    first.does("wait").ok();
    let from = format!("{}:ro", first.name);
    hull.sh(
        &["--volumes-from", &first.name],
        "echo x >/data/x; echo y >/private/y",
    )
    .ok();
    let output = hull
        .sh(
            &["--volumes-from", &from],
            "cat /data/x /private/y; touch /data/z",
        )
        .ends(1);
    assert_eq!(output.text(), "x\ny");
    let output = hull.run(
        &["--mount", "type=volume,src=data,dst=/x,readonly"],
        &["cat", "/x/x"],
    );
    assert_eq!(output.ok().text(), "x");
    let content = hull.hull(["volume", "inspect", "data"]).run().ok().json();
    let path = content[0]["Mountpoint"].as_str().unwrap().to_owned();
    assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o755);
    assert_eq!(fs::read_to_string(format!("{path}/x")).unwrap(), "x\n");
    hull.hull(["rm", "-v", &first.name]).run().ok();
    hull.hull(["volume", "rm", "data"]).run().ok();
    assert_eq!(hull.hull(["volume", "ls", "-q"]).run().ok().text(), "");
}

#[test]
fn a_new_volume_is_filled_once_by_those_that_start_at_once() {
    let hull = Hull::new();
    image_with_volume(&hull);
    let started: Vec<_> = ["site:/www", "site:/www:ro", "site:/www", "site:/www:ro"]
        .into_iter()
        .map(|volume| {
            let arguments = ["run", "--rm", "-v", volume, "www", "cat", "/www/index"];
            hull.hull(arguments).start()
        })
        .collect();
    for one in started {
        assert_eq!(one.finish().ok().text(), "hello");
    }
    let write = [
        "run",
        "--rm",
        "-v",
        "other:/www:ro",
        "www",
        "touch",
        "/www/x",
    ];
    let refused = hull.hull(write).run().ends(1);
    assert!(refused.error().contains("Read-only file system"));
    hull.hull(["volume", "rm", "site", "other"]).run().ok();
    hull.assert_clean();
}

#[test]
fn a_volume_with_a_size_holds_no_more_and_is_one_for_all_its_containers() {
    // It says why when there are none.
    let Some(_) = LoopDevice::new(&[0; 4096]) else {
        return;
    };
    let hull = Hull::new();
    let volume = |arguments: &[&str]| hull.hull(["volume"]).args(arguments).run();
    volume(&["create", "-o", "size=24m", "cache"]).ok();
    let mount = ["-v", "cache:/cache"];
    // Databases want it empty.
    assert_eq!(hull.sh(&mount, "ls -A /cache").ok().text(), "");
    let container = hull.start(&mount, &["sleep", "1000"]);
    let write = "dd if=/dev/zero of=/cache/x bs=1M count=64 2>&1 | grep -c 'No space left'; \
                 ls -s /cache/x";
    let full = hull.sh(&mount, write).ok().text();
    let blocks: u64 = full
        .strip_prefix("1\n")
        .and_then(|line| line.split_whitespace().next())
        .unwrap()
        .parse()
        .unwrap();
    assert!((10 << 10..24 << 10).contains(&blocks), "{full}");
    container.exec(&["rm", "/cache/x"]).ok();
    container.exec(&["sh", "-c", "echo kept >/cache/y"]).ok();
    let mountpoint = volume(&["inspect", "-f", "{{.Mountpoint}}", "cache"]).ok();
    let kept = PathBuf::from(mountpoint.text()).join("y");
    assert_eq!(fs::read_to_string(&kept).unwrap(), "kept\n");
    // As after a boot of the host: it is mounted again, and only once for those who have it.
    let unmounted = Command::new("umount").arg(mountpoint.text()).status();
    assert!(unmounted.unwrap().success());
    assert!(!kept.exists());
    hull.sh(&mount, "cat /cache/y; echo more >>/cache/y").ok();
    assert_eq!(
        container.exec(&["cat", "/cache/y"]).ok().text(),
        "kept\nmore"
    );
    container.is_removed_by_force();
    volume(&["rm", "cache"]).ok();
    assert!(!kept.parent().unwrap().exists());
    hull.assert_clean();
}

#[test]
fn a_directory_of_the_host_is_a_volume() {
    let hull = Hull::new();
    let directory = hull.path("given");
    fs::create_dir(&directory).unwrap();
    let device = format!("device={}", directory.display());
    let bind = ["-o", "type=none", "-o", "o=bind", "-o", &device];
    hull.hull(["volume", "create"])
        .args(bind)
        .arg("given")
        .run()
        .ok();
    hull.sh(&["-v", "given:/x"], "echo kept >/x/y").ok();
    hull.hull(["volume", "rm", "given"]).run().ok();
    assert_eq!(fs::read_to_string(directory.join("y")).unwrap(), "kept\n");
    let gone = [
        "-o",
        "type=none",
        "-o",
        "o=bind",
        "-o",
        "device=/nonexistent",
    ];
    hull.hull(["volume", "create"])
        .args(gone)
        .arg("gone")
        .run()
        .fails(125, &["/nonexistent", "volume gone"]);
    for (options, why) in [
        (&["-o", "type=nfs", "-o", "device=:/x"][..], "type nfs"),
        (&["-o", "color=red"], "color"),
        (&["-o", "size=1k"], "too small"),
    ] {
        hull.hull(["volume", "create"])
            .args(options)
            .arg("wrong")
            .run()
            .fails(125, &[why]);
    }
    let asked = ["--mount", "type=volume,src=made,dst=/x,volume-opt=size=1k"];
    hull.run(&asked, &["true"]).fails(125, &["too small"]);
    assert_eq!(hull.hull(["volume", "ls", "-q"]).run().ok().text(), "");
}
