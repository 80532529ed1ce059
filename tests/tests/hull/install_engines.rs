//! `hull install ENGINE` with the real engines: what it writes is what they read.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use hull_tests::{Docker, Invocation, Podman, Runtime, eventually, executable};
use rustix::process::{Pid, Signal, kill_process};

/// A hull elsewhere, with the test's own runtime beside its executable.
fn installation(directory: &Path, runtime: &Runtime) -> PathBuf {
    let bin = directory.join("bin");
    fs::create_dir_all(&bin).unwrap();
    fs::copy(executable(), bin.join("hull")).unwrap();
    fs::copy(&runtime.path, bin.join("hull-oci")).unwrap();
    fs::set_permissions(bin.join("hull-oci"), fs::Permissions::from_mode(0o755)).unwrap();
    bin.join("hull")
}

fn hull(hull: &Path, arguments: &[&str], root: &Path) -> Invocation {
    Invocation::new(hull)
        .args(arguments)
        .arg("--root")
        .arg(root)
}

#[test]
fn podman_knows_hull_after_its_installation_and_not_after_its_removal() {
    let podman = Podman::new();
    let root = podman.scratch().join("root");
    let etc = root.join("etc/containers");
    fs::create_dir_all(&etc).unwrap();
    for file in ["policy.json", "registries.conf"] {
        let _ = fs::copy(Path::new("/etc/containers").join(file), etc.join(file));
    }
    fs::copy(podman.path("containers.conf"), etc.join("containers.conf")).unwrap();
    let program = installation(&podman.scratch(), &podman.runtime);
    // podman with this /etc/containers: in a mount namespace of its own.
    let within = |runtime: Option<&str>, arguments: &[&str]| {
        let script = format!(
            "mount --bind {} /etc/containers && unset CONTAINERS_CONF && exec \"$@\"",
            etc.display()
        );
        let own = podman.podman(
            runtime
                .map(|name| ["--runtime", name])
                .into_iter()
                .flatten(),
        );
        own.args(arguments)
            .under(&["unshare", "--mount", "sh", "-c", &script, "sh"])
    };
    let run = ["run", "--rm", "--network", "none", "busybox", "uname", "-r"];

    assert_ne!(within(Some("hull"), &run).run().status, 0);
    let shown = hull(&program, &["install", "podman", "--dry-run"], &root)
        .run()
        .ok();
    assert!(shown.text().contains("+ hull = ["), "{}", shown.text());
    assert!(!etc.join("containers.conf.d").exists());
    hull(&program, &["install", "podman"], &root).run().ok();
    let release = within(Some("hull"), &run).run().ok().text();
    assert!(release.ends_with("-hull"), "{release}");
    // The engine's own runtimes are still there.
    let info = ["info", "--format", "{{.Host.OCIRuntime.Name}}"];
    assert_eq!(within(Some("runc"), &info).run().ok().text(), "runc");
    let again = hull(&program, &["install", "podman"], &root).run().ok();
    assert!(
        again.text().starts_with("nothing to do"),
        "{}",
        again.text()
    );

    hull(&program, &["install", "podman", "--default"], &root)
        .run()
        .ok();
    let without_option = Invocation::new("podman")
        .args(["--root".as_ref(), podman.path("root").as_os_str()])
        .args(["--runroot".as_ref(), podman.path("runroot").as_os_str()])
        .args(["--tmpdir".as_ref(), podman.path("tmp").as_os_str()])
        .args(["--cgroup-manager", "cgroupfs", "--events-backend", "file"])
        .args(info)
        .env("CONTAINERS_STORAGE_CONF", podman.path("storage.conf"))
        .env("HOME", podman.path(""));
    let script = format!(
        "mount --bind {} /etc/containers && unset CONTAINERS_CONF && exec \"$@\"",
        etc.display()
    );
    let name = without_option
        .under(&["unshare", "--mount", "sh", "-c", &script, "sh"])
        .run()
        .ok()
        .text();
    assert_eq!(name, "hull");

    hull(&program, &["uninstall", "podman"], &root).run().ok();
    assert!(!etc.join("containers.conf.d").exists());
    assert_ne!(within(Some("hull"), &run).run().status, 0);
    let again = hull(&program, &["uninstall", "podman"], &root).run().ok();
    assert!(
        again.text().starts_with("nothing to do"),
        "{}",
        again.text()
    );
}

#[test]
fn docker_knows_hull_after_its_installation_and_a_reload() {
    let docker = Docker::new();
    let root = docker.scratch().join("root");
    let file = root.join("etc/docker/daemon.json");
    fs::create_dir_all(file.parent().unwrap()).unwrap();
    let text = fs::read_to_string(docker.path("daemon.json")).unwrap();
    let mut configuration: serde_json::Value = serde_json::from_str(&text).unwrap();
    configuration["runtimes"] = serde_json::json!({"other": {"path": "/usr/sbin/runc"}});
    configuration
        .as_object_mut()
        .unwrap()
        .remove("default-runtime");
    let before = serde_json::to_string_pretty(&configuration).unwrap();
    fs::write(&file, &before).unwrap();
    let program = installation(&docker.scratch(), &docker.runtime);
    let reload = || {
        fs::copy(&file, docker.path("daemon.json")).unwrap();
        let pid = fs::read_to_string(docker.path("dockerd.pid")).unwrap();
        let pid = Pid::from_raw(pid.trim().parse().unwrap()).unwrap();
        kill_process(pid, Signal::HUP).unwrap();
    };
    let runtimes = || {
        let format = "{{.DefaultRuntime}} {{range $name, $runtime := .Runtimes}}{{$name}}={{$runtime.Path}} {{end}}";
        docker
            .docker(["info", "--format", format])
            .run()
            .ok()
            .text()
    };

    let output = hull(&program, &["install", "docker", "--default"], &root)
        .run()
        .ok();
    assert!(output.text().contains("+"), "{}", output.text());
    reload();
    let path = program.with_file_name("hull-oci");
    let expected = format!("hull={}", path.display());
    eventually("dockerd knows the runtime", Duration::from_secs(10), || {
        let runtimes = runtimes();
        runtimes.starts_with("hull ") && runtimes.contains(&expected) && runtimes.contains("other=")
    });
    let release = docker.run(&[], &["uname", "-r"]).ok().text();
    assert!(release.ends_with("-hull"), "{release}");
    let again = hull(&program, &["install", "docker", "--default"], &root)
        .run()
        .ok();
    assert!(
        again.text().starts_with("nothing to do"),
        "{}",
        again.text()
    );

    hull(&program, &["uninstall", "docker"], &root).run().ok();
    assert_eq!(fs::read_to_string(&file).unwrap(), before);
}

#[test]
fn what_goes_wrong_is_one_line_and_nothing_is_written() {
    let directory = tempfile::tempdir().unwrap();
    let runtime = Runtime::in_directory(directory.path());
    let program = installation(directory.path(), &runtime);
    let root = directory.path().join("root");
    fs::create_dir_all(root.join("etc/docker")).unwrap();
    fs::write(root.join("etc/docker/daemon.json"), "{,}").unwrap();
    let output = hull(&program, &["install", "docker"], &root).run();
    assert_eq!(output.status, 125);
    let error = output.error();
    assert!(
        error.contains("etc/docker/daemon.json is not Docker's JSON"),
        "{error}"
    );
    assert_eq!(error.lines().count(), 2, "{error}");
    // A user without root's rights.
    fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let denied = hull(&program, &["install", "podman"], &root)
        .under(&[
            "setpriv",
            "--reuid=65534",
            "--clear-groups",
            "--inh-caps=-all",
        ])
        .run();
    assert_eq!(denied.status, 125);
    let error = denied.error();
    assert!(error.contains("50-hull.conf: Permission denied"), "{error}");
    assert!(
        error.contains("hint: it takes the rights of root"),
        "{error}"
    );
    assert!(!root.join("etc/containers").exists());
    fs::remove_file(program.with_file_name("hull-oci")).unwrap();
    let error = hull(&program, &["install", "crio"], &root).run().error();
    assert!(
        error.contains("hull-oci is not installed beside hull"),
        "{error}"
    );
    assert!(!root.join("etc/crio").exists());
}
