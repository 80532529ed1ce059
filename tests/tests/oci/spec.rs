//! Configurations that runc takes, and what containers see then.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::time::{Duration, Instant};

use hull_tests::{Bundle, Oci, Output};
use serde_json::{Value, json};

/// `run` of a bundle with this command.
fn run(oci: &Oci, bundle: Bundle, command: &[&str]) -> Output {
    let bundle = bundle.args(command);
    let invocation = oci.oci(["run", "--bundle"]).arg(&bundle.path);
    invocation.arg(oci.unique()).run()
}

fn tmpfs(destination: &str, options: &[&str]) -> Value {
    json!({"destination": destination, "type": "tmpfs", "source": "tmpfs", "options": options})
}

#[test]
fn a_user_namespace_goes_with_a_cgroup_namespace() {
    let oci = Oci::new();
    let bundle = oci.bundle().with(|config| {
        let namespaces = config["linux"]["namespaces"].as_array_mut().unwrap();
        namespaces.retain(|namespace| namespace["type"] != "cgroup");
        namespaces.push(json!({"type": "cgroup"}));
        namespaces.push(json!({"type": "user"}));
        let ids = json!([{"containerID": 0, "hostID": 100_000, "size": 65_534}]);
        config["linux"]["uidMappings"] = ids.clone();
        config["linux"]["gidMappings"] = ids;
    });
    let chown = hull_tests::Invocation::new("chown").args(["-R", "100000:100000"]);
    chown.arg(bundle.root("")).run().ok();
    let script = "id -u; cat /proc/self/cgroup; cat /sys/fs/cgroup/cgroup.procs | wc -l";
    let output = run(&oci, bundle, &["sh", "-c", script]).ok();
    let text = output.text();
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines[..2], ["0", "0::/"], "{text}");
    assert_ne!(lines[2], "0", "the container's own group");
}

/// Gives the container a user namespace, in which id 0 is 100000 of the guest.
fn with_users(oci: &Oci) -> Bundle {
    let bundle = oci.bundle().with(|config| {
        let namespaces = config["linux"]["namespaces"].as_array_mut().unwrap();
        namespaces.push(json!({"type": "user"}));
        config["linux"]["uidMappings"] = ids(100_000, 65_536);
        config["linux"]["gidMappings"] = ids(100_000, 65_536);
    });
    let chown = hull_tests::Invocation::new("chown").args(["-R", "100000:100000"]);
    chown.arg(bundle.root("")).run().ok();
    bundle
}

fn ids(host: u32, size: u32) -> Value {
    json!([{"containerID": 0, "hostID": host, "size": size}])
}

#[test]
fn ids_of_mounts_are_mapped_for_a_user_namespace() {
    let oci = Oci::new();
    let volume = oci.path("volume");
    fs::create_dir(&volume).unwrap();
    fs::set_permissions(&volume, fs::Permissions::from_mode(0o777)).unwrap();
    for (name, owner) in [("root", 0), ("user", 1000), ("other", 70_000)] {
        fs::write(volume.join(name), name).unwrap();
        chown(volume.join(name), Some(owner), Some(owner)).unwrap();
    }
    let set_id = |name: &str| {
        fs::set_permissions(volume.join(name), fs::Permissions::from_mode(0o6777)).unwrap();
    };
    set_id("user");
    let mount = |at: &str, options: Value, mapped: bool| {
        let mut mount = json!({
            "destination": at, "type": "bind", "source": volume, "options": options,
        });
        if mapped {
            mount["uidMappings"] = ids(100_000, 65_536);
            mount["gidMappings"] = ids(100_000, 65_536);
        }
        mount
    };
    let bundle = with_users(&oci)
        .mount(mount("/plain", json!(["bind"]), false))
        .mount(mount("/mapped", json!(["rbind"]), true))
        .mount(mount("/asked", json!(["bind", "ridmap", "ro"]), false));
    let script = "stat -c '%u:%g %n' /plain/root /mapped/* /asked/user
        cd /mapped
        echo new >new && mkdir directory && ln -s x link && mkfifo fifo
        echo more >>user && stat -c '%a %n' user
        chmod 600 root && touch root && cat root
        mv root moved && ln moved linked && rm moved
        touch /asked/no 2>&1 | grep -c 'Read-only'";
    let output = run(&oci, bundle, &["sh", "-c", script]).ok();
    assert_eq!(
        output.text(),
        "65534:65534 /plain/root\n65534:65534 /mapped/other\n0:0 /mapped/root\n\
         1000:1000 /mapped/user\n1000:1000 /asked/user\n777 user\nroot1",
        "{}",
        output.error()
    );
    for (name, owner) in [
        ("new", 0),
        ("directory", 0),
        ("link", 0),
        ("fifo", 0),
        ("linked", 0),
        ("user", 1000),
        ("other", 70_000),
    ] {
        let found = fs::symlink_metadata(volume.join(name)).unwrap();
        assert_eq!(found.uid(), owner, "{name}");
    }
    assert_eq!(
        fs::metadata(volume.join("linked")).unwrap().mode() & 0o777,
        0o600
    );

    // A user of the namespace that is not root.
    set_id("user");
    let bundle = with_users(&oci)
        .mount(mount("/mapped", json!(["bind"]), true))
        .with(|config| config["process"]["user"] = json!({"uid": 7, "gid": 8}));
    let script = "cd /mapped; echo mine >mine; echo more >>user; stat -c '%u:%g %a %n' mine user
        cat linked 2>&1 | grep -c denied";
    let output = run(&oci, bundle, &["sh", "-c", script]).ok();
    assert_eq!(output.text(), "7:8 644 mine\n1000:1000 777 user\n1");
    let mine = fs::metadata(volume.join("mine")).unwrap();
    assert_eq!((mine.uid(), mine.gid()), (7, 8));
}

#[test]
fn ids_of_a_mount_are_mapped_without_a_user_namespace_too() {
    let oci = Oci::new();
    let volume = oci.path("volume");
    fs::create_dir(&volume).unwrap();
    fs::write(volume.join("file"), "").unwrap();
    let mapped = |ids: &Value| {
        oci.bundle().mount(json!({
            "destination": "/v", "type": "bind", "source": volume, "options": ["bind"],
            "uidMappings": ids, "gidMappings": ids,
        }))
    };
    let output = run(
        &oci,
        mapped(&ids(500, 10)),
        &["stat", "-c", "%u:%g", "/v/file"],
    );
    assert_eq!(output.ok().text(), "500:500");
    // Nobody has an id to create a file with.
    let output = run(&oci, mapped(&ids(500, 10)), &["touch", "/v/new"]);
    assert!(
        output.error().contains("Value too large"),
        "{}",
        output.error()
    );
    let none = mapped(&json!([]));
    let none = none.with(|config| {
        let mounts = config["mounts"].as_array_mut().unwrap();
        mounts.last_mut().unwrap()["options"] = json!(["bind", "idmap"]);
    });
    let output = run(&oci, none, &["true"]);
    assert!(
        output
            .error()
            .contains("neither the mount nor the container has mappings"),
        "{}",
        output.error()
    );
    assert_ne!(output.status, 0);
}

#[test]
fn a_tmpfs_has_the_mode_that_is_named_or_that_of_its_mount_point() {
    let oci = Oci::new();
    let bundle = || {
        let mut bundle = oci.bundle();
        fs::create_dir(bundle.root("private")).unwrap();
        let mode = fs::Permissions::from_mode(0o712);
        fs::set_permissions(bundle.root("private"), mode).unwrap();
        for (at, options) in [
            ("/private", &[][..]),
            ("/new", &[]),
            ("/named", &["mode=0700"]),
        ] {
            bundle = bundle.mount(tmpfs(at, options));
            let copied: Vec<_> = options.iter().copied().chain(["tmpcopyup"]).collect();
            bundle = bundle.mount(tmpfs(&format!("{at}-copied"), &copied));
        }
        fs::create_dir(bundle.root("private-copied")).unwrap();
        let mode = fs::Permissions::from_mode(0o712);
        fs::set_permissions(bundle.root("private-copied"), mode).unwrap();
        bundle
    };
    let script = "stat -c %a /private /private-copied /new /new-copied /named /named-copied";
    let bundle = bundle();
    let path = bundle.path.clone();
    let output = run(&oci, bundle, &["sh", "-c", script]).ok();
    assert_eq!(output.text(), "712\n712\n1777\n1777\n700\n700");
    // The mount points are there now.
    let again = oci.oci(["run", "--bundle"]).arg(path).arg(oci.unique());
    assert_eq!(again.run().ok().text(), "712\n712\n1777\n1777\n700\n700");
}

#[test]
fn dev_can_be_a_read_only_tmpfs() {
    let oci = Oci::new();
    let bundle = oci.bundle().with(|config| {
        for mount in config["mounts"].as_array_mut().unwrap() {
            if mount["destination"] == "/dev" {
                mount["options"].as_array_mut().unwrap().push(json!("ro"));
            }
        }
    });
    let script = "echo x >/dev/null; test -d /dev/pts; touch /dev/shm/x; touch /dev/x";
    let output = run(&oci, bundle, &["sh", "-c", script]).ends(1);
    assert_eq!(output.error(), "touch: /dev/x: Read-only file system\n");
}

#[test]
fn a_read_only_bind_leaves_what_is_mounted_below_writable() {
    let oci = Oci::new();
    let source = oci.path("source");
    fs::create_dir_all(source.join("below")).unwrap();
    let mount = |at: &std::path::Path| {
        let invocation = hull_tests::Invocation::new("mount");
        invocation.args(["-t", "tmpfs", "t"]).arg(at).run().ok();
    };
    mount(&source.join("below"));
    let bind = |option: &str| {
        json!({
            "destination": "/mnt", "type": "bind", "source": source, "options": ["rbind", option],
        })
    };
    let script = "touch /mnt/below/x && ! touch /mnt/x";
    let partly = run(&oci, oci.bundle().mount(bind("ro")), &["sh", "-c", script]);
    let script = "! touch /mnt/below/y && ! touch /mnt/x";
    let whole = run(&oci, oci.bundle().mount(bind("rro")), &["sh", "-c", script]);
    let seen = source.join("below/x").exists();
    let umount = hull_tests::Invocation::new("umount");
    umount.arg(source.join("below")).run().ok();
    partly.ok();
    whole.ok();
    assert!(seen);
}

#[test]
fn kernel_parameters_without_a_namespace_are_the_guests_own() {
    let oci = Oci::new();
    let bundle = oci.bundle().with(|config| {
        config["linux"]["sysctl"] = json!({
            "vm.max_map_count": "262144", "fs.file-max": "123456", "kernel.pid_max": "40000",
        });
    });
    let before = fs::read_to_string("/proc/sys/fs/file-max").unwrap();
    let files = ["vm/max_map_count", "fs/file-max", "kernel/pid_max"];
    let files = files.map(|file| format!("/proc/sys/{file}"));
    let output = run(&oci, bundle, &["cat", &files[0], &files[1], &files[2]]).ok();
    assert_eq!(output.text(), "262144\n123456\n40000");
    assert_eq!(fs::read_to_string("/proc/sys/fs/file-max").unwrap(), before);
    let bundle = oci.bundle().with(|config| {
        config["linux"]["sysctl"] = json!({"vm.no_such": "1"});
    });
    run(&oci, bundle, &["true"]).fails(1, &["linux.sysctl", "vm/no_such"]);
}

#[test]
fn what_runc_takes_is_taken() {
    let oci = Oci::new();
    let bundle = oci.bundle().with(|config| {
        config["process"].as_object_mut().unwrap().remove("user");
        config["process"]["scheduler"] =
            json!({"policy": "SCHED_BATCH", "flags": ["SCHED_FLAG_RESET_ON_FORK"]});
        config["linux"]["resources"]["devices"] = json!([{"allow": true, "access": "rwa"}]);
        config["linux"]["seccomp"] = json!({
            "defaultAction": "SCMP_ACT_ALLOW", "listenerPath": "/nobody/listens",
        });
    });
    assert_eq!(run(&oci, bundle, &["id", "-u"]).ok().text(), "0");
}

#[test]
fn hooks_in_a_container_without_new_privileges_are_under_its_filter() {
    let oci = Oci::new();
    let bundle = oci.bundle().with(|config| {
        config["process"]["noNewPrivileges"] = json!(true);
        config["linux"]["seccomp"] = json!({
            "defaultAction": "SCMP_ACT_ALLOW",
            "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO"}],
        });
    });
    let bundle = bundle.hook("startContainer", "mkdir /dev/shm/made");
    let output = run(&oci, bundle, &["true"]).ends(1);
    assert!(
        output.error().contains("startContainer"),
        "{}",
        output.error()
    );
}

#[test]
fn a_frozen_control_group_is_refused_and_a_container_frozen_from_outside_deleted() {
    let Some((group, v1)) = freezer() else {
        hull_tests::left_out("there is no freezer");
        return;
    };
    let oci = Oci::new();
    let name = oci.unique();
    let directory = group.join(&name);
    let freeze = |frozen: bool| match v1 {
        true => {
            let word = if frozen { "FROZEN" } else { "THAWED" };
            fs::write(directory.join("freezer.state"), word).unwrap();
        }
        false => {
            let word = if frozen { "1" } else { "0" };
            fs::write(directory.join("cgroup.freeze"), word).unwrap();
        }
    };
    let bundle = oci.bundle().with(|config| {
        config["linux"]["cgroupsPath"] = json!(format!("/{name}"));
    });
    fs::create_dir(&directory).unwrap();
    freeze(true);
    let init = oci.init();
    oci.creates(&init, &bundle, &[]).ends(1);
    assert!(
        init.error().contains("unexpectedly frozen"),
        "{}",
        init.error()
    );
    freeze(false);
    let init = oci.start(&bundle);
    freeze(true);
    let begin = Instant::now();
    init.delete().ok();
    assert!(begin.elapsed() < Duration::from_secs(15));
    assert!(!directory.exists());
}

/// The directory of the freezer's groups, and whether it is version 1.
fn freezer() -> Option<(std::path::PathBuf, bool)> {
    let root = std::path::Path::new("/sys/fs/cgroup");
    let old = root.join("freezer");
    if old.exists() {
        return Some((old, true));
    }
    root.join("cgroup.controllers")
        .exists()
        .then(|| (root.to_owned(), false))
}

#[test]
fn containers_with_one_control_group_are_deleted_one_after_the_other() {
    let oci = Oci::new();
    let name = oci.unique();
    let bundle = oci.bundle().with(|config| {
        config["linux"]["cgroupsPath"] = json!(format!("/{name}"));
    });
    let one = oci.start(&bundle);
    let two = oci.start(&bundle);
    assert!(two.error().contains("not empty"), "{}", two.error());
    one.delete().ok();
    assert_eq!(oci.ids(), std::slice::from_ref(&two.id));
    two.sh("true").ok();
    two.delete().ok();
    assert!(hull_tests::cgroup::named(&name).is_empty());
}
