//! Whole containers, on the machine that runs the tests: they need root, and a cgroup v2 hierarchy
//! with controllers at /sys/fs/cgroup, which most machines keep to themselves. Where either is
//! missing the tests report it and pass; the end-to-end tests create the same containers in a
//! guest.
//!
//! Each container is created by a process of its own (see [`in_own_process`]): the creator needs an
//! agent with one thread, and test programs have several.
#![allow(clippy::unwrap_used, unsafe_code)]

use std::io::Read;
use std::path::{Path, PathBuf};

use super::*;

/// Why whole containers cannot be created here.
fn obstacle() -> Option<&'static str> {
    if !rustix::process::geteuid().is_root() {
        return Some("not root");
    }
    let controllers =
        std::fs::read_to_string("/sys/fs/cgroup/cgroup.controllers").unwrap_or_default();
    let wanted = ["memory", "pids"];
    if !wanted
        .iter()
        .all(|name| controllers.split_whitespace().any(|word| word == *name))
    {
        return Some("no cgroup v2 with controllers at /sys/fs/cgroup");
    }
    if rustix::fs::access("/sys/fs/cgroup", rustix::fs::Access::WRITE_OK).is_err() {
        return Some("/sys/fs/cgroup cannot be written");
    }
    if !Path::new("/bin/busybox").exists() {
        return Some("no /bin/busybox to make a root from");
    }
    None
}

/// Runs `test` in a forked process with mounts of its own; false when it failed there.
fn in_own_process(test: impl FnOnce()) -> bool {
    // SAFETY: the child runs the test and ends. It is alone in its memory; that another thread may
    // have held a lock of the allocator is what fork's handlers of the C library are for.
    match unsafe { libc::fork() } {
        0 => {
            sys::unshare(sys::CLONE_NEWNS).unwrap();
            sys::mount_propagation(c"/", libc::MS_REC | libc::MS_PRIVATE).unwrap();
            let passed = std::panic::catch_unwind(std::panic::AssertUnwindSafe(test)).is_ok();
            sys::exit(if passed { 0 } else { 1 })
        }
        child => {
            let mut status = 0;
            // SAFETY: waits for the child that was just created.
            unsafe { libc::waitpid(child, &raw mut status, 0) };
            status == 0
        }
    }
}

/// A directory with busybox in it, gone when dropped.
struct Root(PathBuf);

impl Root {
    fn new(name: &str) -> Root {
        let path = std::env::temp_dir().join(format!("hull-root-{name}-{}", std::process::id()));
        std::fs::create_dir_all(path.join("bin")).unwrap();
        std::fs::copy("/bin/busybox", path.join("bin/busybox")).unwrap();
        for applet in ["sh", "cat", "id", "true", "hostname", "grep", "touch"] {
            std::fs::hard_link(path.join("bin/busybox"), path.join("bin").join(applet)).unwrap();
        }
        Root(path)
    }
}

impl Drop for Root {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// What a command in a container printed.
fn run(
    root: &Root,
    arguments: &[&str],
    change: impl FnOnce(&mut serde_json::Value),
) -> Result<String> {
    let mut spec = serde_json::json!({
        "ociVersion": "1.2.0",
        "root": {"path": root.0},
        "hostname": "inside",
        "process": {"user": {"uid": 0, "gid": 0}, "cwd": "/", "args": arguments, "env": ["PATH=/bin"]},
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"]},
        ],
        "linux": {
            "cgroupsPath": format!("/hull-test-{}", std::process::id()),
            "resources": {"pids": {"limit": 50}},
            "namespaces": [
                {"type": "pid"}, {"type": "network"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"},
                {"type": "cgroup"},
            ],
            "maskedPaths": ["/proc/kcore"],
        },
    });
    change(&mut spec);
    let spec = serde_json::from_value(spec).unwrap();
    let (mut reader, writer) = std::io::pipe().unwrap();
    let io = ChildIo::Pipes(Stdio {
        stdin: std::fs::File::open("/dev/null").unwrap().into(),
        stderr: writer.try_clone().unwrap().into(),
        stdout: writer.into(),
    });
    let (container, pending) = Container::begin_create("test", &spec, &RawArgs::default(), io)?;
    let run = || {
        let child = pending.finish()?;
        rustix::io::write(&child.gate, b"x").unwrap();
        let mut message = [0; 4096];
        match rustix::io::read(&child.gate, &mut message).unwrap() {
            0 => {}
            length => return Err(CreateError::decode(&message[..length])),
        }
        let mut output = String::new();
        reader.read_to_string(&mut output).unwrap();
        Ok(output)
    };
    let output = run();
    container.destroy().unwrap();
    output
}

fn test(name: &str, test: impl FnOnce(&Root)) {
    if let Some(why) = obstacle() {
        eprintln!("skipped: {why}");
        return;
    }
    let root = Root::new(name);
    assert!(in_own_process(|| test(&root)));
}

#[test]
fn a_container_has_its_own_everything() {
    test("own", |root| {
        let script = "id -u; hostname; echo $$; cat /proc/self/cgroup; grep -c . /proc/net/dev";
        let output = run(root, &["sh", "-c", script], |_| {}).unwrap();
        assert_eq!(output, "0\ninside\n1\n0::/\n3\n");
    });
}

#[test]
fn a_read_only_root_is_read_only() {
    test("readonly", |root| {
        let output = run(root, &["touch", "/x"], |spec| {
            spec["root"]["readonly"] = true.into()
        })
        .unwrap();
        assert!(output.contains("Read-only file system"), "{output}");
    });
}

#[test]
fn errors_come_back_by_kind() {
    test("errors", |root| {
        assert!(matches!(
            run(root, &["nonesuch"], |_| {}),
            Err(CreateError::CommandNotFound(_))
        ));
        assert!(matches!(
            run(root, &["/dev"], |_| {}),
            Err(CreateError::NotExecutable(_))
        ));
        let error = run(root, &["true"], |spec| {
            spec["mounts"][0]["type"] = "nonesuch".into();
        });
        assert!(matches!(error, Err(CreateError::Other(text)) if text.contains("/proc")));
    });
}

/// Enters the root of `spec` as a container's init does, and runs `inside` there.
fn in_root(name: &str, spec: impl FnOnce(&Path) -> serde_json::Value, inside: impl FnOnce()) {
    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped: not root");
        return;
    }
    let root = std::env::temp_dir().join(format!("hull-{name}-{}", std::process::id()));
    std::fs::create_dir_all(root.join("root/proc")).unwrap();
    let mut json = spec(&root);
    json["ociVersion"] = "1.2.0".into();
    json["root"]["path"] = root.join("root").to_str().into();
    json["linux"]["namespaces"] = serde_json::json!([{"type": "mount"}]);
    let passed = in_own_process(|| {
        let spec: Spec = serde_json::from_value(json).unwrap();
        let namespaces = Namespaces::new(spec.linux().as_ref().unwrap()).unwrap();
        let plan = RootfsPlan::new(&spec, &namespaces, Path::new("/sys/fs/cgroup/test")).unwrap();
        rustix::process::umask(rustix::fs::Mode::empty());
        let root = plan.attach().unwrap();
        let unsealed = plan.fill(root).unwrap();
        plan.protect(root, &unsealed).unwrap();
        plan.pivot(root).unwrap();
        plan.seal().unwrap();
        inside();
    });
    // Whatever the spec says, nothing may appear beside the root.
    let secret = std::fs::read_dir(root.join("secret")).map_or(0, Iterator::count);
    std::fs::remove_dir_all(&root).unwrap();
    assert!(passed);
    assert_eq!(secret, 0);
}

fn mount_line(target: &str) -> String {
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap();
    mounts
        .lines()
        .find(|line| line.split(' ').nth(1) == Some(target))
        .unwrap_or_default()
        .into()
}

const PROC: &str =
    r#"{"destination":"/proc","type":"proc","source":"proc","options":["nosuid","nodev"]}"#;
const DEV: &str = r#"{"destination":"/dev","type":"tmpfs","options":["mode=755"]}"#;

fn json(text: &str) -> serde_json::Value {
    serde_json::from_str(text).unwrap()
}

#[test]
fn the_root_is_entered_with_its_devices() {
    in_root(
        "devices",
        |_| json(&format!(r#"{{"mounts":[{PROC},{DEV}]}}"#)),
        || {
            assert!(!Path::new("/etc").exists());
            assert!(mount_line("/proc").contains("nosuid,nodev"));
            std::fs::write("/dev/null", "gone").unwrap();
            assert_eq!(
                std::fs::read_link("/dev/fd").unwrap(),
                Path::new("/proc/self/fd")
            );
            assert_eq!(
                std::fs::read_link("/dev/ptmx").unwrap(),
                Path::new("pts/ptmx")
            );
        },
    );
}

#[test]
fn binds_have_their_attributes() {
    let spec = |root: &Path| {
        let source = root.join("volume");
        std::fs::create_dir(&source).unwrap();
        std::fs::write(source.join("file"), "text").unwrap();
        let source = source.display();
        json(&format!(
            r#"{{"mounts":[{PROC},
                {{"destination":"/a/b","source":"{source}","options":["rbind","ro","noexec"]}},
                {{"destination":"/c","source":"{source}","options":["bind","rnosuid"]}},
                {{"destination":"/d/file","source":"{source}/file","options":["bind"]}}]}}"#
        ))
    };
    in_root("binds", spec, || {
        assert!(std::fs::write("/a/b/new", "").is_err());
        assert!(mount_line("/a/b").contains(" ro,noexec"));
        assert!(mount_line("/c").contains("nosuid"));
        std::fs::write("/c/new", "").unwrap();
        assert_eq!(std::fs::read_to_string("/d/file").unwrap(), "text");
    });
}

#[test]
fn hidden_and_protected_paths() {
    let spec = |_: &Path| {
        json(&format!(
            r#"{{"root":{{"readonly":true}},"mounts":[{PROC}],"linux":{{
                "maskedPaths":["/proc/meminfo","/proc/irq","/proc/nonesuch"],
                "readonlyPaths":["/proc/sys","/nonesuch/deeper"]}}}}"#
        ))
    };
    in_root("hidden", spec, || {
        assert_eq!(std::fs::read("/proc/meminfo").unwrap(), b"");
        assert_eq!(std::fs::read_dir("/proc/irq").unwrap().count(), 0);
        assert!(mount_line("/proc/sys").contains(" ro,nosuid,nodev"));
        let error = std::fs::write("/x", "").unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EROFS));
    });
}

#[test]
fn links_of_an_image_lead_nowhere_else() {
    let spec = |root: &Path| {
        std::os::unix::fs::symlink(root.join("secret"), root.join("root/out")).unwrap();
        std::fs::create_dir(root.join("secret")).unwrap();
        json(&format!(
            r#"{{"mounts":[{PROC},{{"destination":"/out/here","type":"tmpfs"}}]}}"#
        ))
    };
    in_root("links", spec, || {
        let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap();
        let line = mounts.lines().last().unwrap();
        assert!(
            line.contains("/secret/here") && line.starts_with("tmpfs "),
            "{line}"
        );
        assert!(Path::new("/out/here").is_dir());
    });
}
