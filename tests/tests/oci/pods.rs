//! Containers that share a machine, with `hull-oci` as podman and CRI-O call it.

use std::path::Path;

use hull_tests::{Bundle, Init, Oci, descendants, shared_memory_program};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use serde_json::json;

/// A bundle of a pod, as CRI-O writes it; podman writes the same name.
fn in_pod(bundle: Bundle, pod: &str) -> Bundle {
    bundle.with(|config| config["annotations"]["io.kubernetes.cri-o.SandboxID"] = json!(pod))
}

/// The container joins namespaces of another one, through the process that stands for that one on
/// the host.
fn joining(bundle: Bundle, other: &Init<'_>, kinds: &[(&str, &str)]) -> Bundle {
    let pid = other.keeper().as_raw_nonzero();
    bundle.with(|config| {
        for namespace in config["linux"]["namespaces"].as_array_mut().unwrap() {
            let kind = namespace["type"].as_str().unwrap().to_owned();
            if let Some((_, file)) = kinds.iter().find(|(name, _)| *name == kind) {
                namespace["path"] = json!(format!("/proc/{pid}/ns/{file}"));
            }
        }
    })
}

fn machines() -> usize {
    let found = descendants();
    found
        .values()
        .filter(|command| command.contains("sandbox-process"))
        .count()
}

fn namespace(init: &Init<'_>, file: &str) -> String {
    init.sh(&format!("readlink /proc/self/ns/{file}"))
        .ok()
        .text()
}

#[test]
fn containers_of_a_pod_share_one_machine() {
    let oci = Oci::new();
    let pod = oci.unique();
    let one = oci.start(&in_pod(oci.bundle(), &pod));
    let two = oci.start(&in_pod(oci.bundle(), &pod));
    assert_eq!(machines(), 1);
    let kernel = |init: &Init<'_>| init.sh("cat /proc/sys/kernel/random/boot_id").ok().text();
    assert_eq!(kernel(&one), kernel(&two));
    // Otherwise they are apart.
    for file in ["pid", "mnt", "uts", "ipc", "net"] {
        assert_ne!(namespace(&one, file), namespace(&two, file), "{file}");
    }
    one.sh("echo one >/only").ok();
    two.sh("test ! -e /only").ok();

    one.kill("KILL").ok();
    assert_eq!(one.ends(), 137);
    one.does("delete").ok();
    assert_eq!(two.sh("echo still").ok().text(), "still");
    // The machine ends with its last container.
    two.delete().ok();
    assert_eq!(machines(), 0);
    oci.assert_clean();
}

#[test]
fn containers_of_different_pods_have_different_machines() {
    let oci = Oci::new();
    let one = oci.start(&in_pod(oci.bundle(), &oci.unique()));
    let two = oci.start(&in_pod(oci.bundle(), &oci.unique()));
    assert_eq!(machines(), 2);
    one.delete().ok();
    assert_eq!(two.sh("echo still").ok().text(), "still");
}

#[test]
fn namespaces_of_another_container_can_be_joined_and_so_is_its_machine() {
    let oci = Oci::new();
    let one = oci.start(&oci.bundle());
    let kinds = [
        ("network", "net"),
        ("ipc", "ipc"),
        ("uts", "uts"),
        ("pid", "pid"),
    ];
    let bundle = joining(oci.bundle(), &one, &kinds)
        // The host name is that of the namespace joined.
        .with(|config| {
            config.as_object_mut().unwrap().remove("hostname");
        });
    let two = oci.start(&bundle);
    assert_eq!(machines(), 1);
    for (_, file) in kinds {
        assert_eq!(namespace(&one, file), namespace(&two, file), "{file}");
    }
    assert_ne!(namespace(&one, "mnt"), namespace(&two, "mnt"));
    let listed = two.sh("ps").ok().text();
    assert_eq!(listed.matches("sleep 1000").count(), 2, "{listed}");
}

#[test]
fn the_namespaces_of_two_machines_cannot_be_mixed() {
    let oci = Oci::new();
    let (one, two) = (oci.start(&oci.bundle()), oci.start(&oci.bundle()));
    let bundle = joining(oci.bundle(), &one, &[("ipc", "ipc")]);
    let bundle = joining(bundle, &two, &[("uts", "uts")]).with(|config| {
        config.as_object_mut().unwrap().remove("hostname");
    });
    let three = oci.init();
    oci.creates(&three, &bundle, &[])
        .fails(1, &["not supported", "different machines"]);
    three.does("state").fails(1, &["does not exist"]);
}

#[test]
fn a_container_of_a_pod_that_is_just_ending_gets_a_new_machine() {
    let oci = Oci::new();
    let pod = oci.unique();
    let bundle = in_pod(oci.bundle(), &pod);
    for _ in 0..5 {
        let one = oci.start(&bundle);
        one.kill("KILL").ok();
        // No waiting: the machine is on its way out.
        let two = oci.start(&bundle);
        assert_eq!(two.sh("echo up").ok().text(), "up");
        one.delete().ok();
        two.delete().ok();
    }
    oci.assert_clean();
}

#[test]
fn a_pod_whose_machine_is_killed_stops_all_its_containers() {
    let oci = Oci::new();
    let bundle = in_pod(oci.bundle(), &oci.unique());
    let (one, two) = (oci.start(&bundle), oci.start(&bundle));
    one.kill_host_process("machine");
    one.becomes("stopped");
    two.becomes("stopped");
    assert_ne!(one.ends(), 0);
    assert_ne!(two.ends(), 0);
    one.does("delete").ok();
    two.does("delete").ok();
    oci.assert_clean();
}

/// A tmpfs of the host, as engines create for the memory of a pod; unmounted when dropped.
struct HostMemory(tempfile::TempDir);

impl HostMemory {
    fn new(options: &str) -> HostMemory {
        let directory = tempfile::tempdir_in("/tmp").unwrap();
        let data = std::ffi::CString::new(options).unwrap();
        let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
        mount("shm", directory.path(), "tmpfs", flags, data.as_c_str()).unwrap();
        HostMemory(directory)
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    /// As podman and Docker bind it.
    fn bound(&self, bundle: Bundle) -> Bundle {
        let source = self.path();
        bundle
            .with(|config| {
                let mounts = config["mounts"].as_array_mut().unwrap();
                mounts.retain(|mount| mount["destination"] != "/dev/shm");
            })
            .mount(json!({
                "destination": "/dev/shm", "type": "bind", "source": source,
                "options": ["bind", "private", "nosuid", "noexec", "nodev"],
            }))
    }
}

impl Drop for HostMemory {
    fn drop(&mut self) {
        let _ = unmount(self.path(), UnmountFlags::DETACH);
    }
}

#[test]
fn containers_of_a_pod_share_memory() {
    let memory = HostMemory::new("size=1m,mode=1777");
    let other = HostMemory::new("size=1m,mode=1777");
    let oci = Oci::new();
    let pod = oci.unique();
    let bundle = || {
        let bundle = in_pod(memory.bound(oci.bundle()), &pod);
        std::fs::copy(shared_memory_program(), bundle.root("bin/shared")).unwrap();
        bundle
    };
    let (one, two) = (oci.start(&bundle()), oci.start(&bundle()));
    one.sh("echo seen >/dev/shm/file").ok();
    assert_eq!(two.sh("cat /dev/shm/file").ok().text(), "seen");
    // Mapped: one stores, the other loads.
    let asking = one.executing(&[], &["shared", "ask"]).start();
    two.sh("until test -e /dev/shm/question; do sleep 0.01; done; shared answer")
        .ok();
    asking.finish().ok();

    // Others do not share it: in the same pod with other memory, and in another pod.
    let apart = oci.start(&in_pod(other.bound(oci.bundle()), &pod));
    let outside = oci.start(&memory.bound(oci.bundle()));
    let own = oci.start(&in_pod(oci.bundle(), &pod));
    for container in [&apart, &outside, &own] {
        assert_eq!(container.sh("ls -A /dev/shm").ok().text(), "");
        container.sh("echo >/dev/shm/own").ok();
    }
    assert_eq!(machines(), 2);
    assert_eq!(one.sh("ls /dev/shm").ok().text(), "file\nquestion");
    let found = one.sh("stat -c %a:%u:%g /dev/shm; grep ' /dev/shm ' /proc/mounts");
    let found = found.ok().text();
    assert!(found.starts_with("1777:0:0\n"), "{found}");
    assert!(found.contains("nosuid,nodev,noexec"), "{found}");
}

#[test]
fn shared_memory_is_as_large_as_the_hosts() {
    let memory = HostMemory::new("size=1m,mode=1777");
    let oci = Oci::new();
    let pod = oci.unique();
    let bundle = || in_pod(memory.bound(oci.bundle()), &pod);
    let (one, two) = (oci.start(&bundle()), oci.start(&bundle()));
    let write = |init: &Init<'_>, name: &str, kib: u32| {
        init.sh(&format!(
            "dd if=/dev/zero of=/dev/shm/{name} bs=1k count={kib}"
        ))
    };
    write(&one, "half", 600).ok();
    // Both share its size limit.
    let full = write(&two, "other", 600);
    assert_ne!(full.status, 0);
    assert!(full.error().contains("No space left"), "{}", full.error());
    one.sh("rm /dev/shm/half").ok();
    write(&two, "other", 600).ok();
}

#[test]
fn shared_memory_ends_with_the_last_container_that_has_it() {
    let memory = HostMemory::new("size=1m,mode=1777");
    let oci = Oci::new();
    let pod = oci.unique();
    let infra = oci.start(&in_pod(oci.bundle(), &pod));
    let bundle = || in_pod(memory.bound(oci.bundle()), &pod);
    let (one, two) = (oci.start(&bundle()), oci.start(&bundle()));
    one.sh("echo kept >/dev/shm/file").ok();
    one.delete().ok();
    assert_eq!(two.sh("cat /dev/shm/file").ok().text(), "kept");
    let three = oci.start(&bundle());
    two.delete().ok();
    assert_eq!(three.sh("cat /dev/shm/file").ok().text(), "kept");
    three.delete().ok();
    let four = oci.start(&bundle());
    assert_eq!(four.sh("ls -A /dev/shm").ok().text(), "");
    assert_eq!(infra.sh("echo still").ok().text(), "still");
    assert_eq!(machines(), 1);
}
