//! Block devices of the host as disks of the machine.

use std::fs;
use std::io::Read;

use hull_tests::{Bundle, Init, Invocation, LoopDevice, Oci, installed, left_out};
use serde_json::json;

const SIZE: usize = 4 << 20;

hull_tests::on_every_machine!(
    a_block_device_is_read_and_written_at_the_path_asked_for,
    a_block_device_that_may_be_read_cannot_be_written,
    several_block_devices_are_not_mixed_up,
);

/// Bytes that identify each sector and its disk.
fn content(name: &str) -> Vec<u8> {
    (0..SIZE / 512)
        .flat_map(|sector| format!("{name:<255} {sector:<255}\n").into_bytes())
        .collect()
}

/// The container has the device at a path, with this access to it.
fn with(bundle: Bundle, disk: &LoopDevice, path: &str, access: &str) -> Bundle {
    let (major, minor) = (disk.major, disk.minor);
    bundle.with(|config| {
        let linux = &mut config["linux"];
        let add = |list: &mut serde_json::Value, value| match list.as_array_mut() {
            Some(list) => list.push(value),
            None => *list = json!([value]),
        };
        add(
            &mut linux["devices"],
            json!({
                "path": path, "type": "b", "major": major, "minor": minor,
                "fileMode": 0o640, "uid": 0, "gid": 6,
            }),
        );
        if !access.is_empty() {
            add(
                &mut linux["resources"]["devices"],
                json!({"allow": true, "type": "b", "major": major, "minor": minor, "access": access}),
            );
        }
    })
}

/// A shell script fails in the container, with this message.
#[track_caller]
fn cannot(init: &Init<'_>, script: &str, words: &str) {
    let output = init.sh(script);
    assert_ne!(output.status, 0, "{script}");
    assert!(
        output.error().contains(words),
        "{script}: {}",
        output.error()
    );
}

fn in_pod(bundle: Bundle, pod: &str) -> Bundle {
    bundle.with(|config| config["annotations"]["io.kubernetes.cri-o.SandboxID"] = json!(pod))
}

fn sum(bytes: &[u8]) -> String {
    let output = Invocation::new("md5sum").input(bytes).run().ok();
    output.text()[..32].to_owned()
}

fn a_block_device_is_read_and_written_at_the_path_asked_for(machine: &str) {
    let Some(disk) = LoopDevice::new(&content("host")) else {
        return;
    };
    let oci = Oci::on(machine);
    let bundle = with(oci.bundle(), &disk, "/dev/xvda", "rwm");
    let mut new = vec![0; 2049 * 512];
    let mut random = fs::File::open("/dev/urandom").unwrap();
    random.read_exact(&mut new).unwrap();
    fs::write(bundle.root("new"), &new).unwrap();
    let init = oci.start(&bundle);
    assert_eq!(
        init.sh("stat -c '%F %a %u:%g' /dev/xvda").ok().text(),
        "block special file 640 0:6"
    );
    // All of the host's content.
    assert_eq!(
        init.sh("md5sum </dev/xvda | cut -c 1-32").ok().text(),
        sum(&content("host"))
    );
    // A megabyte in the middle, not beginning with a page, and a sector at the end.
    init.sh(
        "dd if=/new of=/dev/xvda bs=512 seek=1001 count=2048 conv=fsync &&
         dd if=/new of=/dev/xvda bs=512 skip=2048 seek=8191 conv=fsync",
    )
    .ok();
    let mut expected = content("host");
    expected[1001 * 512..3049 * 512].copy_from_slice(&new[..2048 * 512]);
    expected[SIZE - 512..].copy_from_slice(&new[2048 * 512..]);
    // The host sees it while the container runs, on the device and in the file below it.
    assert!(fs::read(&disk.path).unwrap() == expected, "on the device");
    assert!(fs::read(disk.file()).unwrap() == expected, "in the file");
    // It is no larger than on the host.
    cannot(
        &init,
        "dd if=/new of=/dev/xvda bs=512 seek=8192 count=1",
        "No space left",
    );
    // What is not synced by then is written when the machine ends.
    init.sh("echo last >/dev/xvda").ok();
    init.kill("KILL").ok();
    init.ends();
    init.delete().ok();
    oci.assert_clean();
    assert_eq!(fs::read(disk.file()).unwrap()[..5], *b"last\n");
}

fn a_block_device_that_may_be_read_cannot_be_written(machine: &str) {
    let Some(disk) = LoopDevice::new(&content("host")) else {
        return;
    };
    let oci = Oci::on(machine);
    let init = oci.start(&with(oci.bundle(), &disk, "/dev/xvda", "rm"));
    let read = init.sh("md5sum </dev/xvda | cut -c 1-32").ok().text();
    assert_eq!(read, sum(&content("host")));
    cannot(&init, "echo no >/dev/xvda", "Operation not permitted");
    // The guest's kernel could not either: the host has opened it for reading.
    assert_eq!(init.sh("cat /sys/block/vda/ro").ok().text(), "1");
    init.delete().ok();
    assert!(fs::read(disk.file()).unwrap() == content("host"));
}

fn several_block_devices_are_not_mixed_up(machine: &str) {
    let names = ["one", "two", "three"];
    let disks: Vec<_> = names
        .iter()
        .map_while(|name| LoopDevice::new(&content(name)))
        .collect();
    let [one, two, three] = disks.as_slice() else {
        return;
    };
    let oci = Oci::on(machine);
    // Not in the order of their numbers; one of them has two names.
    let bundle = with(oci.bundle(), two, "/dev/two", "rw");
    let bundle = with(bundle, three, "/dev/three", "r");
    let bundle = with(bundle, one, "/dev/one", "rw");
    let init = oci.start(&with(bundle, two, "/dev/again", ""));
    for (path, name) in [
        ("one", "one"),
        ("two", "two"),
        ("three", "three"),
        ("again", "two"),
    ] {
        let begin = format!("head -c 8 /dev/{path}");
        assert_eq!(init.sh(&begin).ok().text(), format!("{name:<8}"));
    }
    init.sh("for disk in one two; do echo written $disk | dd of=/dev/$disk conv=fsync; done")
        .ok();
    cannot(&init, "echo no >/dev/three", "Operation not permitted");
    for (disk, begin) in [
        (one, "written one\n"),
        (two, "written two\n"),
        (three, "three"),
    ] {
        let bytes = fs::read(disk.file()).unwrap();
        assert!(bytes.starts_with(begin.as_bytes()), "{begin}");
        assert!(bytes[512..] == content(begin.trim().split(' ').next_back().unwrap())[512..]);
    }
}

#[test]
fn a_block_device_without_a_rule_is_not_accessible() {
    let Some(disk) = LoopDevice::new(&content("host")) else {
        return;
    };
    let oci = Oci::new();
    let init = oci.start(&with(oci.bundle(), &disk, "/dev/xvda", ""));
    cannot(&init, "head -c 5 /dev/xvda", "Operation not permitted");
    cannot(&init, "echo no >/dev/xvda", "Operation not permitted");
    // Neither by a node of the container's own.
    cannot(
        &init,
        "mknod /tmp/disk b $(cat /sys/block/vda/dev | tr : ' ') && head -c 5 /tmp/disk",
        "Operation not permitted",
    );
}

#[test]
fn a_file_system_on_a_block_device_is_the_same_inside_and_outside() {
    if !installed("mkfs.ext4") || !installed("debugfs") {
        return left_out("mkfs.ext4 and debugfs are not installed");
    }
    let Some(disk) = LoopDevice::new(&vec![0; 16 << 20]) else {
        return;
    };
    let mkfs = Invocation::new("mkfs.ext4").arg("-q").arg(&disk.path);
    mkfs.run().ok();
    let oci = Oci::new();
    let bundle = with(oci.bundle(), &disk, "/dev/xvda", "rwm").with(|config| {
        for set in ["bounding", "effective", "permitted"] {
            let set = config["process"]["capabilities"][set].as_array_mut();
            set.unwrap().push(json!("CAP_SYS_ADMIN"));
        }
    });
    let init = oci.start(&bundle);
    init.sh("mkdir /tmp/disk && mount -t ext4 /dev/xvda /tmp/disk && echo inside >/tmp/disk/file && umount /tmp/disk")
        .ok();
    init.delete().ok();
    let debugfs = Invocation::new("debugfs").args(["-R", "cat /file"]);
    assert_eq!(debugfs.arg(disk.file()).run().ok().text(), "inside");
}

#[test]
fn a_block_device_can_be_bound_like_a_file() {
    let Some(disk) = LoopDevice::new(&content("host")) else {
        return;
    };
    let oci = Oci::new();
    let bound = |options: &[&str], access: &str| {
        let (major, minor) = (disk.major, disk.minor);
        let rule =
            json!({"allow": true, "type": "b", "major": major, "minor": minor, "access": access});
        oci.bundle()
            .mount(json!({
                "destination": "/dev/xvda", "type": "bind", "source": disk.path, "options": options,
            }))
            .with(|config| {
                let rules = config["linux"]["resources"]["devices"].as_array_mut();
                rules.unwrap().push(rule);
            })
    };
    let init = oci.start(&bound(&["rbind", "rprivate"], "rwm"));
    assert_eq!(init.sh("head -c 4 /dev/xvda").ok().text(), "host");
    init.sh("echo written | dd of=/dev/xvda conv=fsync").ok();
    init.delete().ok();
    let init = oci.start(&bound(&["rbind", "ro"], "rwm"));
    assert_eq!(init.sh("head -c 7 /dev/xvda").ok().text(), "written");
    cannot(&init, "echo no >/dev/xvda", "");
    init.delete().ok();
    assert_eq!(fs::read(disk.file()).unwrap()[..8], *b"written\n");
    // A privileged container has no device of the host.
    let bundle = bound(&["rbind"], "rwm").with(|config| {
        config["linux"]["resources"]["devices"] = json!([{"allow": true, "access": "rwm"}]);
    });
    let init = oci.init();
    oci.creates(&init, &bundle, &[])
        .fails(1, &["not supported", "mounts: /dev/xvda: block device"]);
    oci.assert_clean();
}

#[test]
fn a_block_device_in_a_user_namespace_is_the_guests_node() {
    let Some(disk) = LoopDevice::new(&content("host")) else {
        return;
    };
    let oci = Oci::new();
    let bundle = with(oci.bundle(), &disk, "/dev/xvda", "rwm").with(|config| {
        let linux = &mut config["linux"];
        linux["namespaces"]
            .as_array_mut()
            .unwrap()
            .push(json!({"type": "user"}));
        for mappings in ["uidMappings", "gidMappings"] {
            linux[mappings] = json!([{"containerID": 0, "hostID": 0, "size": 65536}]);
        }
        let mounts = config["mounts"].as_array_mut().unwrap();
        mounts.retain(|mount| mount["type"] != "cgroup");
    });
    let init = oci.start(&bundle);
    let found = init.sh("stat -c '%F %a' /dev/xvda && head -c 4 /dev/xvda");
    assert_eq!(found.ok().text(), "block special file 600\nhost");
}

#[test]
fn a_pods_disks_are_those_that_its_machine_was_started_with() {
    let disks = ["one", "two"].map(|name| LoopDevice::new(&content(name)));
    let [Some(one), Some(two)] = &disks else {
        return;
    };
    let oci = Oci::new();
    let pod = oci.unique();
    let first = oci.start(&in_pod(with(oci.bundle(), one, "/dev/first", "r"), &pod));
    // Another container, at another path.
    let second = oci.start(&in_pod(with(oci.bundle(), one, "/dev/second", "r"), &pod));
    assert_eq!(second.sh("head -c 3 /dev/second").ok().text(), "one");
    second.sh("test ! -e /dev/first").ok();
    // One without it does not reach it.
    let third = oci.start(&in_pod(oci.bundle(), &pod));
    cannot(
        &third,
        "mknod /tmp/disk b $(cat /sys/block/vda/dev | tr : ' ') && head -c 5 /tmp/disk",
        "Operation not permitted",
    );
    let refused = |bundle: Bundle, words: &str| {
        let init = oci.init();
        oci.creates(&init, &in_pod(bundle, &pod), &[])
            .fails(1, &[words]);
        init.does("state").fails(1, &["container does not exist"]);
    };
    refused(
        with(oci.bundle(), two, "/dev/xvda", "rwm"),
        &format!(
            "not supported: linux.devices: /dev/xvda (b {}): the machine of its pod already runs, and its disks are those it was started with",
            two.numbers()
        ),
    );
    refused(
        with(oci.bundle(), one, "/dev/xvda", "rwm"),
        "the machine of its pod already runs, and only reads from this disk",
    );
    assert_eq!(first.sh("head -c 3 /dev/first").ok().text(), "one");
}

#[test]
fn what_is_killed_lets_a_block_device_go() {
    let Some(disk) = LoopDevice::new(&content("host")) else {
        return;
    };
    for process in ["pod", "devices", "machine", "keeper"] {
        let oci = Oci::new();
        let init = oci.start(&with(oci.bundle(), &disk, "/dev/xvda", "rwm"));
        init.sh("echo synced | dd of=/dev/xvda conv=fsync").ok();
        init.kill_host_process(process);
        init.is_gone_after_delete();
        let bytes = fs::read(&disk.path).unwrap();
        assert!(bytes.starts_with(b"synced\n"), "{process}");
    }
}
