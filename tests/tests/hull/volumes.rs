//! `hull run -v`: host directories and files in a container, and what the file system keeps of
//! POSIX.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::time::Duration;

use hull_tests::{
    Hull, Invocation, Running, eventually, on_every_machine, posix_program, posix_results,
    repository, watch_program,
};

on_every_machine!(
    a_directory_is_shared_both_ways,
    a_read_only_directory_cannot_be_written,
    a_program_that_watches_a_volume_is_told_of_what_others_change
);

fn a_directory_is_shared_both_ways(machine: &'static str) {
    let hull = Hull::on(machine);
    let directory = hull.scratch();
    fs::write(directory.join("from-host"), "hello\n").unwrap();
    let volume = format!("{}:/data", directory.display());
    let output = hull
        .sh(
            &["-v", &volume],
            "cat /data/from-host; echo back >/data/from-container",
        )
        .ok();
    assert_eq!(output.text(), "hello");
    assert_eq!(
        fs::read_to_string(directory.join("from-container")).unwrap(),
        "back\n"
    );
}

fn a_read_only_directory_cannot_be_written(machine: &'static str) {
    let hull = Hull::on(machine);
    let directory = hull.scratch();
    fs::write(directory.join("file"), "kept").unwrap();
    let volume = format!("{}:/data:ro", directory.display());
    // Not even by a guest that remounts: the host refuses.
    let script = "echo x >/data/file; rm /data/file; mkdir /data/new; mount -o remount,rw /data; mount -o remount,rw,bind /data
                  echo x >/data/file; touch /data/other; chmod 777 /data/file; ls /data";
    let output = hull.sh(&["-v", &volume, "--cap-add", "ALL"], script).ok();
    assert_eq!(output.text(), "file", "{}", output.error());
    assert_eq!(fs::read_to_string(directory.join("file")).unwrap(), "kept");
    assert_eq!(
        fs::metadata(directory.join("file"))
            .unwrap()
            .permissions()
            .mode()
            & 0o777,
        0o644
    );
}

#[test]
fn a_single_file_can_be_shared() {
    let hull = Hull::new();
    let file = hull.scratch().join("file");
    fs::write(&file, "content\n").unwrap();
    let volume = format!("{}:/etc/one", file.display());
    assert_eq!(
        hull.sh(&["-v", &volume], "cat /etc/one; echo more >>/etc/one")
            .ok()
            .text(),
        "content"
    );
    assert_eq!(fs::read_to_string(&file).unwrap(), "content\nmore\n");
}

#[test]
fn a_container_with_a_single_file_leaves_nothing_behind() {
    let hull = Hull::new();
    let file = hull.scratch().join("file");
    fs::write(&file, "content").unwrap();
    let mount = format!("{}:/etc/file", file.display());
    for command in ["true", "/nothing"] {
        hull.run(&["--name", "same", "-v", &mount], &[command]);
        hull.assert_clean();
    }
}

#[test]
fn what_the_host_changes_is_seen_at_once() {
    let hull = Hull::new();
    let directory = hull.scratch();
    let volume = format!("{}:/data", directory.display());
    let container = hull.start(&["-v", &volume], &["sleep", "1000"]);
    for content in ["first", "second, longer", "3"] {
        fs::write(directory.join("file"), content).unwrap();
        assert_eq!(container.sh("cat /data/file").ok().text(), content);
    }
    fs::remove_file(directory.join("file")).unwrap();
    container.sh("cat /data/file").ends(1);
}

// Names of a list are valid for a moment; what is opened and removed is what has the name now.
#[test]
fn a_file_that_the_host_replaces_after_the_directory_was_listed_is_the_new_one() {
    let hull = Hull::new();
    let directory = hull.path("listed");
    fs::create_dir(&directory).unwrap();
    for name in ["read", "removed"] {
        fs::write(directory.join(name), "old").unwrap();
    }
    let script = "turn=1; while ls -l /vol >/dev/null; echo listed $turn; read go; do
        cat /vol/read; rm /vol/removed; turn=$((turn + 1)); done";
    let volume = format!("{}:/vol", directory.display());
    let mut shell = hull
        .hull(["run", "--rm", "-i", "--network", "none", "-v", &volume])
        .args(["busybox", "sh", "-c", script])
        .start();
    for turn in 1..=20 {
        shell.wait_for(&format!("listed {turn}\n"));
        for name in ["read", "removed"] {
            let new = directory.join("new");
            fs::write(&new, format!("content {turn}\n")).unwrap();
            fs::rename(&new, directory.join(name)).unwrap();
        }
        shell.write("go\n");
        shell.wait_for(&format!("content {turn}\n"));
    }
    shell.close_input();
    shell.finish().ok();
    assert!(!directory.join("removed").exists());
}

#[test]
fn symbolic_links_in_a_share_never_lead_outside_it() {
    let hull = Hull::new();
    let directory = hull.scratch();
    fs::write(hull.path("secret"), "the host's").unwrap();
    symlink(hull.path("secret"), directory.join("absolute")).unwrap();
    symlink("../secret", directory.join("relative")).unwrap();
    symlink("/", directory.join("root")).unwrap();
    let volume = format!("{}:/data", directory.display());
    // A link is followed in the container's tree, where there is no such file.
    let script = format!(
        "cat /data/absolute; cat /data/relative; cat /data/root{}; cat /data/../secret; echo end",
        hull.path("secret").display()
    );
    assert_eq!(hull.sh(&["-v", &volume], &script).ok().text(), "end");
}

#[test]
fn owners_modes_times_and_links_are_the_hosts() {
    let hull = Hull::new();
    let directory = hull.scratch();
    let volume = format!("{}:/data", directory.display());
    let script = "cd /data; echo x >file; chown 1234:5678 file; chmod 2640 file; touch -d '2001-02-03 04:05:06' file
                  ln file hard; ln -s file soft; mkfifo pipe; mknod device c 1 3; mkdir -m 1777 directory; stat -c %h file";
    assert_eq!(hull.sh(&["-v", &volume], script).ok().text(), "2");
    let file = fs::metadata(directory.join("file")).unwrap();
    assert_eq!(
        (file.uid(), file.gid(), file.mode() & 0o7777, file.nlink()),
        (1234, 5678, 0o2640, 2)
    );
    assert_eq!(file.mtime(), 981_173_106);
    assert_eq!(
        fs::read_link(directory.join("soft")).unwrap().to_str(),
        Some("file")
    );
    assert_eq!(
        fs::metadata(directory.join("device")).unwrap().rdev(),
        0x103
    );
    assert_eq!(
        fs::metadata(directory.join("directory")).unwrap().mode() & 0o7777,
        0o1777
    );
}

#[test]
fn another_user_inside_has_that_users_rights() {
    let hull = Hull::new();
    let directory = hull.scratch();
    fs::write(directory.join("private"), "roots").unwrap();
    fs::set_permissions(directory.join("private"), fs::Permissions::from_mode(0o600)).unwrap();
    fs::create_dir(directory.join("open")).unwrap();
    fs::set_permissions(directory.join("open"), fs::Permissions::from_mode(0o777)).unwrap();
    let volume = format!("{}:/data", directory.display());
    let script = "cat /data/private 2>/dev/null || echo no; echo x >/data/open/mine && echo yes; touch /data/new 2>/dev/null || echo no";
    assert_eq!(
        hull.sh(&["-v", &volume, "-u", "nobody"], script)
            .ok()
            .text(),
        "no\nyes\nno"
    );
    assert_eq!(
        fs::metadata(directory.join("open/mine")).unwrap().uid(),
        65534
    );
}

#[test]
fn ten_volumes_at_once() {
    let hull = Hull::new();
    let mut options = Vec::new();
    for n in 0..10 {
        let directory = hull.scratch().join(n.to_string());
        fs::create_dir(&directory).unwrap();
        fs::write(directory.join("number"), n.to_string()).unwrap();
        options.extend([
            "-v".to_owned(),
            format!("{}:/data/{n}", directory.display()),
        ]);
    }
    let options: Vec<&str> = options.iter().map(String::as_str).collect();
    assert_eq!(
        hull.sh(&options, "cat /data/*/number").ok().text(),
        "0123456789"
    );
}

#[test]
fn names_may_be_any_bytes() {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;
    let hull = Hull::new();
    let directory = hull.scratch();
    fs::write(directory.join(OsStr::from_bytes(b"b\xff\n c")), "x").unwrap();
    let volume = format!("{}:/data", directory.display());
    let output = hull
        .sh(
            &["-v", &volume],
            "cd /data; for f in *; do printf %s \"$f\"; cp \"$f\" copy-\"$f\"; done",
        )
        .ok();
    assert_eq!(output.stdout, b"b\xff\n c");
    assert!(
        directory
            .join(OsStr::from_bytes(b"copy-b\xff\n c"))
            .exists()
    );
}

#[test]
fn a_big_file_keeps_its_content() {
    let hull = Hull::new();
    let directory = hull.scratch();
    let volume = format!("{}:/data", directory.display());
    let script = "dd if=/dev/urandom of=/data/big bs=1M count=64 2>/dev/null; sync; sha256sum </data/big | cut -c 1-64";
    let inside = hull.sh(&["-v", &volume], script).ok().text();
    let outside = Invocation::new("sha256sum")
        .arg(directory.join("big"))
        .run()
        .ok()
        .text();
    assert_eq!(inside, outside[..64]);
}

/// Known differences from a native file system: one check to a line, with the reason.
fn known_differences(kind: &str) -> BTreeMap<String, String> {
    let text = fs::read_to_string(repository().join("tests/posix/differences.txt")).unwrap();
    text.lines()
        .filter(|line| !line.is_empty() && !line.starts_with('#'))
        .filter_map(|line| line.strip_prefix(kind)?.trim_start().split_once(": "))
        .map(|(name, reason)| (name.to_owned(), reason.to_owned()))
        .collect()
}

fn compare_with_native(kind: &str, options: &[&str], directory: &str) {
    let hull = Hull::new();
    let program = posix_program();
    let native = hull.scratch().join("native");
    fs::create_dir(&native).unwrap();
    let expected = Invocation::new(&program).arg(&native).run().ok();
    let mount = format!("{}:/checks:ro", program.display());
    let volume = format!("{}:/volume", hull.scratch().display());
    let mut all = vec!["-v", &mount, "-v", &volume, "--cap-add", "ALL"];
    all.extend(options);
    let found = hull
        .sh(
            &all,
            &format!("mkdir -p {directory} && /checks {directory}"),
        )
        .ok();
    let (expected, found) = (
        posix_results(&expected.text()),
        posix_results(&found.text()),
    );
    assert!(expected.len() > 100, "only {} checks", expected.len());
    let known = known_differences(kind);
    let mut surprises = Vec::new();
    for (name, result) in &expected {
        let other = found.get(name).map_or("missing", String::as_str);
        match (result == other, known.contains_key(name)) {
            (false, false) => {
                surprises.push(format!("{name}: native {result}, in the container {other}"))
            }
            (true, true) => surprises.push(format!(
                "{name}: no difference any more, but differences.txt has one"
            )),
            _ => {}
        }
    }
    assert!(
        surprises.is_empty(),
        "{} of {} checks:\n{}",
        surprises.len(),
        expected.len(),
        surprises.join("\n")
    );
}

#[test]
fn a_volume_passes_the_posix_checks_as_a_native_directory_does() {
    compare_with_native("volume", &[], "/volume/checked");
}

#[test]
fn the_root_file_system_passes_the_posix_checks_as_a_native_directory_does() {
    compare_with_native("root", &[], "/checked");
}

/// A root file system with busybox and a link from /var/run to /run.
fn small_root(hull: &Hull) -> std::path::PathBuf {
    let root = hull.path("root");
    for directory in ["bin", "proc", "sys", "dev", "tmp", "etc", "run", "var"] {
        fs::create_dir_all(root.join(directory)).unwrap();
    }
    let archive = hull.path("busybox.tar");
    let unpacked = std::process::Command::new("tar")
        .args(["-xf", archive.to_str().unwrap(), "-C"])
        .arg(&root)
        .status()
        .unwrap();
    assert!(unpacked.success());
    let _ = fs::remove_dir_all(root.join("var/run"));
    let _ = fs::remove_file(root.join("var/run"));
    symlink("/run", root.join("var/run")).unwrap();
    root
}

#[test]
fn a_mount_below_another_one_is_seen_in_any_order_of_the_options() {
    let hull = Hull::new();
    let root = format!("rootfs:{}", small_root(&hull).display());
    let scratch = hull.scratch();
    for name in ["a", "b", "c"] {
        fs::create_dir(scratch.join(name)).unwrap();
        fs::write(scratch.join(name).join("file"), format!("{name}\n")).unwrap();
    }
    let volume = |name: &str, place: &str| format!("{}:{place}", scratch.join(name).display());
    let volumes = [
        volume("a", "/run"),
        volume("b", "/var/run/secrets/x:ro"),
        volume("a", "/data"),
        volume("c", "/data/sub"),
    ];
    let script = "cat /run/file /run/secrets/x/file /var/run/secrets/x/file /data/file \
                  /data/sub/file; echo x >/data/t/x; ls /data/t";
    for order in [[0, 1, 2, 3], [3, 2, 1, 0], [1, 3, 0, 2]] {
        let mut run = hull.hull(["run", "--rm", "--tmpfs", "/data/t"]);
        for index in order {
            run = run.args(["-v", volumes[index].as_str()]);
        }
        let output = run.args([root.as_str(), "sh", "-c", script]).run().ok();
        assert_eq!(output.text(), "a\nb\nb\na\nc\nx", "{order:?}");
    }
    assert!(!scratch.join("a/t/x").exists(), "that is in memory");
}

#[test]
fn a_volume_of_an_image_is_writable_in_a_read_only_container() {
    let hull = Hull::new();
    let archive = hull.path("busybox.tar");
    hull.hull(["image", "import", "-c", "VOLUME /var/data /etc /new/dir"])
        .arg(archive)
        .arg("declares")
        .run()
        .ok();
    let script = "ls -d /var/data /new/dir && echo x >/new/dir/x && cat /etc/passwd | head -n 1 \
                  && echo y >/etc/y && cat /etc/hosts >/dev/null; touch /z; true";
    let run = |options: &[&str]| {
        hull.hull(["run", "--rm"])
            .args(options)
            .args(["declares", "sh", "-c", script])
            .run()
            .ok()
    };
    let output = run(&["--read-only"]);
    assert!(
        output.text().starts_with("/new/dir\n/var/data\nroot:"),
        "{}",
        output.text()
    );
    assert!(
        output.error().contains("/z: Read-only"),
        "{}",
        output.error()
    );
    // They are there otherwise, too.
    let output = run(&[]);
    assert!(
        output.text().starts_with("/new/dir\n/var/data\nroot:"),
        "{}",
        output.text()
    );
    assert_eq!(output.error(), "");
}

#[test]
fn files_that_the_hosts_kernel_makes_have_their_content() {
    let hull = Hull::new();
    let options = ["-v", "/proc:/host/proc:ro", "-v", "/sys:/host/sys:ro"];
    let script = "grep . /host/proc/version; grep -c . /host/proc/mounts; grep . /host/sys/kernel/uevent_seqnum
                  timeout 5 dd if=/host/proc/kmsg of=/dev/null bs=4k count=1 2>/dev/null; ls /host/proc/self >/dev/null && echo end";
    let output = hull.sh(&options, script).ok().text();
    let lines: Vec<&str> = output.lines().collect();
    assert_eq!(
        lines[0],
        fs::read_to_string("/proc/version").unwrap().trim()
    );
    assert!(lines[1].parse::<u32>().unwrap() > 0);
    assert!(lines[2].parse::<u64>().is_ok());
    assert_eq!(lines[3..], ["end"]);
}

#[test]
fn a_volume_holds_the_upper_directory_of_an_overlay() {
    let hull = Hull::new();
    let directory = hull.scratch();
    let volume = format!("{}:/data", directory.display());
    let script = "mkdir -p /tmp/low/sub /data/up /data/work /tmp/all; echo original >/tmp/low/file; echo x >/tmp/low/gone
                  ln -s file /tmp/low/link
                  mount -t overlay overlay -o lowerdir=/tmp/low,upperdir=/data/up,workdir=/data/work /tmp/all || exit 1
                  cd /tmp/all; echo more >>file; rm gone; chmod 600 file; chown -h 5:5 link; rm -r sub; mkdir sub; touch sub/new
                  cat file; ls . sub; cd /; umount /tmp/all
                  mount -t overlay overlay -o lowerdir=/tmp/low,upperdir=/data/up,workdir=/data/work /tmp/all; ls /tmp/all";
    let options = ["-v", &volume, "--tmpfs", "/tmp", "--cap-add", "ALL"];
    let options = [&options[..], &["--security-opt", "seccomp=unconfined"]].concat();
    let output = hull.sh(&options, script).ok().text();
    let expected = "original\nmore\n.:\nfile\nlink\nsub\n\nsub:\nnew\nfile\nlink\nsub";
    assert_eq!(output, expected);
}

/// The volume with the program that prints the events of files.
fn watch_mount() -> String {
    format!("{}:/watch:ro", watch_program().display())
}

/// Starts a program in a container that prints the events of files in a volume.
fn watcher(hull: &Hull, volume: &std::path::Path, files: &[&str]) -> Running {
    let program = watch_mount();
    let volume = format!("{}:/v", volume.display());
    let mut watcher = hull
        .hull([
            "run",
            "--rm",
            "-i",
            "--network",
            "none",
            "-v",
            &program,
            "-v",
            &volume,
        ])
        .args(["busybox", "/watch"])
        .args(files)
        .start();
    watcher.wait_for("ready\n");
    watcher
}

/// The events that it has printed about a file.
fn told(output: &str, of: &str) -> Vec<String> {
    let events = output.lines().filter_map(|line| {
        let (watched, rest) = line.split_once(' ')?;
        let (event, name) = rest.split_once(' ')?;
        (name == of || (name.is_empty() && watched == of)).then_some(event)
    });
    events.map(str::to_owned).collect()
}

fn a_program_that_watches_a_volume_is_told_of_what_others_change(machine: &'static str) {
    let hull = Hull::on(machine);
    let volume = hull.path("watched");
    let in_volume = |name: &str| volume.join(name);
    fs::create_dir_all(in_volume("below/deep")).unwrap();
    fs::write(in_volume("below/deep/file"), "one").unwrap();
    let watched = ["/v", "/v/below/deep", "/v/below/deep/file"];
    let watcher = watcher(&hull, &volume, &watched);

    fs::write(in_volume("new"), "one").unwrap();
    fs::rename(in_volume("new"), in_volume("config")).unwrap();
    fs::create_dir(in_volume("made")).unwrap();
    fs::write(in_volume("below/deep/file"), "two").unwrap();
    fs::remove_file(in_volume("below/deep/file")).unwrap();
    // Another machine is as the host.
    let mount = format!("{}:/v", volume.display());
    hull.sh(
        &["-v", &mount],
        "mkdir /v/others; echo x >/v/below/deep/others",
    )
    .ok();
    fs::write(in_volume("end"), "").unwrap();
    let output = watcher.finish().ok().text();

    let told = |of: &str| told(&output, of);
    assert_eq!(
        told("new"),
        ["create", "modify", "written", "from"],
        "{output}"
    );
    assert_eq!(told("config"), ["to"], "{output}");
    assert_eq!(told("made"), ["directory-create"], "{output}");
    assert_eq!(told("others")[0], "directory-create", "{output}");
    assert_eq!(
        told("others")[1..],
        ["create", "modify", "written"],
        "{output}"
    );
    // It is cut and then written: one event or two.
    let mut of_file = told("/v/below/deep/file");
    of_file.dedup();
    assert_eq!(of_file[..2], ["modify", "written"], "{output}");
    assert_eq!(
        of_file[of_file.len() - 2..],
        ["gone", "ignored"],
        "{output}"
    );
    assert_eq!(
        told("file").last().map(String::as_str),
        Some("delete"),
        "{output}"
    );
}

#[test]
fn what_a_container_does_to_a_volume_is_told_in_another_one_of_its_machine() {
    let hull = Hull::new();
    let volume = hull.path("common");
    fs::create_dir(&volume).unwrap();
    let program = watch_mount();
    let mount = format!("{}:/v", volume.display());
    let script = "/watch /v >/tmp/told; cat /tmp/told; sleep 1000";
    let watcher = hull.start(&["-v", &program, "-v", &mount], &["sh", "-c", script]);
    eventually("it watches", Duration::from_secs(10), || {
        watcher.sh("cat /tmp/told").text() == "ready"
    });
    let network = format!("container:{}", watcher.name);
    let script = "echo x >/v/new; mv /v/new /v/moved; touch /v/end";
    let other = [
        "run",
        "--rm",
        "--network",
        &network,
        "-v",
        &mount,
        "busybox",
        "sh",
        "-c",
        script,
    ];
    hull.hull(other).run().ok();
    let mut output = String::new();
    eventually("it has ended", Duration::from_secs(10), || {
        output = watcher.sh("cat /tmp/told").text();
        output.contains("moved")
    });
    assert_eq!(
        told(&output, "new"),
        ["create", "modify", "written", "from"],
        "{output}"
    );
    assert_eq!(told(&output, "moved"), ["to"], "{output}");
}

// A config map of Kubernetes changes so.
#[test]
fn a_volume_whose_link_is_replaced_tells_of_that_and_of_the_end_of_what_it_led_to() {
    let hull = Hull::new();
    let volume = hull.path("projected");
    let in_volume = |name: &str| volume.join(name);
    fs::create_dir_all(in_volume("..1")).unwrap();
    fs::write(in_volume("..1/key"), "one\n").unwrap();
    symlink("..1", in_volume("..data")).unwrap();
    symlink("..data/key", in_volume("key")).unwrap();
    // The link is followed: what is watched is the file.
    let watcher = watcher(&hull, &volume, &["/v", "/v/key"]);

    fs::create_dir(in_volume("..2")).unwrap();
    fs::write(in_volume("..2/key"), "two\n").unwrap();
    symlink("..2", in_volume("..data_tmp")).unwrap();
    fs::rename(in_volume("..data_tmp"), in_volume("..data")).unwrap();
    fs::remove_dir_all(in_volume("..1")).unwrap();
    fs::write(in_volume("end"), "").unwrap();
    let output = watcher.finish().ok().text();
    assert_eq!(told(&output, "..data"), ["to"], "{output}");
    assert_eq!(told(&output, "..2"), ["directory-create"], "{output}");
    assert_eq!(told(&output, "..1"), ["directory-delete"], "{output}");
    let of_key = told(&output, "/v/key");
    assert_eq!(of_key[of_key.len() - 2..], ["gone", "ignored"], "{output}");
}

#[test]
fn what_a_container_does_itself_is_told_once() {
    let hull = Hull::new();
    let volume = hull.path("own");
    fs::create_dir(&volume).unwrap();
    let program = watch_mount();
    let mount = format!("{}:/v", volume.display());
    let script = "/watch /v >/tmp/told & until grep -q ready /tmp/told; do sleep 0.1; done
        echo x >/v/own; mv /v/own /v/moved; rm /v/moved; sleep 0.5; echo >/v/end; wait; cat /tmp/told";
    let output = hull.sh(&["-v", &program, "-v", &mount], script).ok();
    let told = |of: &str| told(&output.text(), of);
    assert_eq!(told("own"), ["create", "modify", "written", "from"]);
    assert_eq!(told("moved"), ["to", "delete"]);
}
