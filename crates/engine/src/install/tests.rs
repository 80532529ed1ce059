#![allow(clippy::unwrap_used)]
use std::collections::BTreeMap;

use super::*;

const RUNTIME_PATH: &str = "/usr/local/bin/hull-oci";

/// A root directory, with `etc` and these files.
fn root(files: &[(&str, &str)]) -> tempfile::TempDir {
    let root = tempfile::tempdir().unwrap();
    fs::create_dir(root.path().join("etc")).unwrap();
    for (path, text) in files {
        let path = root.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }
    root
}

/// All that is below a directory: mode, and text of files.
fn everything(directory: &Path) -> BTreeMap<PathBuf, (u32, Option<String>)> {
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        let mode = fs::metadata(&path).unwrap().mode();
        if path.is_dir() {
            found.extend(everything(&path));
            found.insert(path, (mode, None));
        } else {
            let text = fs::read_to_string(&path).unwrap();
            found.insert(path, (mode, Some(text)));
        }
    }
    found
}

fn install(engine: Engine, root: &Path, default: bool) -> Option<Change> {
    let change = engine.install(root, RUNTIME_PATH, default).unwrap().pop();
    if let Some(change) = &change {
        change.apply().unwrap();
    }
    change
}

fn refused(result: Result<Vec<Change>>) -> String {
    result.unwrap_err().message.to_owned()
}

const CONTAINERS_CONF: &str =
    "[engine]\nruntime = \"crun\"\n[engine.runtimes]\nmine = [\"/bin/mine\"]\n";

#[test]
fn what_is_installed_is_taken_back_exactly() {
    let none: &[(&str, &str)] = &[];
    let roots = [
        (Engine::Podman, none),
        (
            Engine::Podman,
            &[("etc/containers/containers.conf", CONTAINERS_CONF)],
        ),
        (
            Engine::Podman,
            &[("etc/containers/containers.conf.d/10-x.conf", "")],
        ),
        (Engine::Crio, none),
        (
            Engine::Crio,
            &[("etc/crio/crio.conf.d/00-default.conf", "[crio]\n")],
        ),
        (Engine::Docker, &[("etc/docker/registry/x", "")]),
        (Engine::Docker, &[("etc/docker/daemon.json", "{}")]),
        (
            Engine::Docker,
            &[("etc/docker/daemon.json", "{\"runtimes\": {}}\n")],
        ),
        (
            Engine::Docker,
            &[(
                "etc/docker/daemon.json",
                r#"{"debug":true,"hosts":["a,{","b\"}"]}"#,
            )],
        ),
        (
            Engine::Docker,
            &[(
                "etc/docker/daemon.json",
                "{\n\t\"runtimes\": {\n\t\t\"x\": {\"path\": \"/x\"}\n\t},\n\t\"debug\" : true\n}\n\n",
            )],
        ),
        (
            Engine::Docker,
            &[(
                "etc/docker/daemon.json",
                "{\n    \"log-opts\": {\n        \"max-size\": \"1m\"\n    }\n}",
            )],
        ),
    ];
    for (engine, files) in roots {
        for default in [false, true] {
            let root = root(files);
            let before = everything(root.path());
            install(engine, root.path(), default).unwrap();
            let installed = everything(root.path());
            assert_ne!(before, installed);
            assert_eq!(install(engine, root.path(), default), None);
            assert_eq!(everything(root.path()), installed);
            let change = engine.uninstall(root.path()).unwrap().remove(0);
            change.apply().unwrap();
            assert_eq!(everything(root.path()), before, "{engine:?} {files:?}");
            assert_eq!(engine.uninstall(root.path()).unwrap(), []);
        }
    }
}

#[test]
fn containerds_file_gets_a_block_that_goes_again() {
    let file = "etc/containerd/config.toml";
    let cri =
        "version = 2\n[plugins.\"io.containerd.grpc.v1.cri\".containerd]\n  snapshotter = \"x\"\n";
    let with_own = "version = 2\n[plugins.\"io.containerd.grpc.v1.cri\".containerd]\n  \
                    default_runtime_name = \"own\"\n  \
                    [plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.own]\n    \
                    runtime_type = \"io.containerd.own.v2\"\n";
    for (text, plugin) in [
        (None, "io.containerd.grpc.v1.cri"),
        (Some("version = 2\n"), "io.containerd.grpc.v1.cri"),
        (Some("version = 2"), "io.containerd.grpc.v1.cri"),
        (Some(cri), "io.containerd.grpc.v1.cri"),
        (Some("version = 3\n"), "io.containerd.cri.v1.runtime"),
        (Some(with_own), "io.containerd.grpc.v1.cri"),
    ] {
        let files: Vec<_> = text.into_iter().map(|text| (file, text)).collect();
        let root = root(&files);
        let before = everything(root.path());
        install(Engine::Containerd, root.path(), false).unwrap();
        let installed = fs::read_to_string(root.path().join(file)).unwrap();
        let value: toml::Value = toml::from_str(&installed).unwrap();
        let runtime = &value["plugins"][plugin]["containerd"]["runtimes"]["hull"];
        assert_eq!(
            runtime["runtime_type"].as_str(),
            Some("io.containerd.hull.v2")
        );
        // The default runtime is still there: containerd takes what a file names for all there is.
        let runtimes = &value["plugins"][plugin]["containerd"]["runtimes"];
        let default = runtimes.get("runc").or_else(|| runtimes.get("own"));
        assert!(default.is_some(), "{installed}");
        assert_eq!(runtimes.as_table().unwrap().len(), 2, "{installed}");
        assert_eq!(install(Engine::Containerd, root.path(), false), None);
        let change = Engine::Containerd.uninstall(root.path()).unwrap().remove(0);
        change.apply().unwrap();
        assert_eq!(everything(root.path()), before, "{text:?}");
        assert_eq!(Engine::Containerd.uninstall(root.path()).unwrap(), []);
    }
    for (text, part) in [
        ("[plugins.cri]\n", "version 1"),
        ("version = 2\nx", "not TOML"),
        (
            "version = 2\nplugins = {\"io.containerd.grpc.v1.cri\" = {containerd = {runtimes = {}}}}\n",
            "in one line",
        ),
    ] {
        let root = root(&[(file, text)]);
        let message = refused(Engine::Containerd.install(root.path(), RUNTIME_PATH, false));
        assert!(message.contains(part), "{message}");
    }
    let root = root(&[]);
    let message = refused(Engine::Containerd.install(root.path(), RUNTIME_PATH, true));
    assert!(message.contains("--default"), "{message}");
    install(Engine::Containerd, root.path(), false).unwrap();
    let path = root.path().join(file);
    let text = fs::read_to_string(&path).unwrap();
    fs::write(&path, text.replace("hull.v2", "other.v2")).unwrap();
    let message = refused(Engine::Containerd.uninstall(root.path()));
    assert!(message.contains("somebody has changed it"), "{message}");
}

#[test]
fn dockers_file_keeps_what_is_in_it() {
    let old = "{\n    \"debug\": true,\n    \"runtimes\": {\n        \"x\": {\n            \"path\": \"/x\"\n        }\n    }\n}\n";
    let root = root(&[("etc/docker/daemon.json", old)]);
    let path = root.path().join("etc/docker/daemon.json");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
    let change = install(Engine::Docker, root.path(), true).unwrap();
    let text = fs::read_to_string(&path).unwrap();
    assert_eq!(
        text,
        "{\n    \"debug\": true,\n    \"runtimes\": {\n        \"x\": {\n            \"path\": \"/x\"\n        },\n        \
         \"hull\": {\n          \"path\": \"/usr/local/bin/hull-oci\"\n        }\n    },\n    \
         \"default-runtime\": \"hull\"\n}\n"
    );
    assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o640);
    let lines = change.lines();
    assert_eq!(lines.iter().filter(|line| line.starts_with('+')).count(), 5);
    assert!(
        !lines.iter().any(|line| line.contains("debug")),
        "{lines:?}"
    );
    // Later, without hull but for the name.
    fs::write(&path, text.replace("hull-oci", "runc")).unwrap();
    let message = refused(Engine::Docker.uninstall(root.path()));
    assert!(message.contains("not as hull wrote it"), "{message}");
}

#[test]
fn a_second_time_can_add_the_default() {
    for engine in [Engine::Podman, Engine::Docker, Engine::Crio] {
        let root = root(&[]);
        let before = everything(root.path());
        install(engine, root.path(), false).unwrap();
        let change = install(engine, root.path(), true).unwrap();
        let removed = change
            .lines()
            .iter()
            .filter(|line| line.starts_with('-'))
            .count();
        assert!(removed <= 1, "{:?}", change.lines());
        // And is not taken back by a third one.
        assert_eq!(install(engine, root.path(), false), None);
        engine
            .uninstall(root.path())
            .unwrap()
            .remove(0)
            .apply()
            .unwrap();
        assert_eq!(everything(root.path()), before, "{engine:?}");
    }
}

#[test]
fn what_hull_cannot_tell_it_leaves_alone() {
    let podman = "etc/containers/containers.conf.d/50-hull.conf";
    let docker = "etc/docker/daemon.json";
    for (engine, file, text, words) in [
        (
            Engine::Podman,
            podman,
            "[engine.runtimes]\nhull = [\"/x\"]\n",
            "not as hull wrote it",
        ),
        (Engine::Podman, podman, "", "not as hull wrote it"),
        (
            Engine::Podman,
            "etc/containers/containers.conf",
            "[engine.runtimes]\nhull = [\"/x\"]\n",
            "already, which is /x",
        ),
        (
            Engine::Podman,
            "etc/containers/containers.conf",
            "[engine",
            "is not TOML",
        ),
        (
            Engine::Crio,
            "etc/crio/crio.conf",
            "[crio.runtime.runtimes.hull]\nruntime_path = \"/x\"\n",
            "already, which is /x",
        ),
        (
            Engine::Docker,
            docker,
            "not JSON",
            "is not Docker's JSON: expected",
        ),
        (Engine::Docker, docker, "", "is not Docker's JSON: EOF"),
        (Engine::Docker, docker, "[]", "is not an object"),
        (
            Engine::Docker,
            docker,
            r#"{"runtimes": 1}"#,
            "\"runtimes\" is not an object",
        ),
        (
            Engine::Docker,
            docker,
            r#"{"runtimes": {}, "runtimes": {}}"#,
            "more than once",
        ),
        (
            Engine::Docker,
            docker,
            r#"{"runtimes": {"hull": {"path": "/x"}}}"#,
            "already, which is /x",
        ),
        (
            Engine::Docker,
            docker,
            r#"{"default-runtime": "runc"}"#,
            "the default runtime \"runc\" already",
        ),
    ] {
        let root = root(&[(file, text)]);
        let before = everything(root.path());
        let message = refused(engine.install(root.path(), RUNTIME_PATH, true));
        assert!(message.contains(words), "{message}");
        assert!(message.contains(file), "{message}");
        assert!(!message.contains('\n'), "{message}");
        assert_eq!(everything(root.path()), before);
    }
}

#[test]
fn another_hull_is_told_apart() {
    for engine in [Engine::Podman, Engine::Docker, Engine::Crio] {
        let root = root(&[]);
        install(engine, root.path(), false).unwrap();
        let error = engine
            .install(root.path(), "/opt/bin/hull-oci", false)
            .unwrap_err();
        assert!(error.message.contains("which is /usr/local/bin/hull-oci"));
        assert!(error.hint.as_deref().unwrap().contains("hull uninstall"));
    }
}

#[test]
fn a_changed_file_of_hulls_stays() {
    for (engine, file) in [
        (
            Engine::Podman,
            "etc/containers/containers.conf.d/50-hull.conf",
        ),
        (Engine::Crio, "etc/crio/crio.conf.d/50-hull.conf"),
    ] {
        let root = root(&[]);
        install(engine, root.path(), false).unwrap();
        let path = root.path().join(file);
        let text = fs::read_to_string(&path).unwrap();
        fs::write(&path, format!("{text}x = 1\n")).unwrap();
        assert!(refused(engine.uninstall(root.path())).contains("not as hull wrote it"));
        assert!(path.exists());
    }
}

#[test]
fn a_link_stays_a_link_and_nothing_half_is_left() {
    let root = root(&[("real.json", "{}"), ("etc/docker/registry/x", "")]);
    let link = root.path().join("etc/docker/daemon.json");
    std::os::unix::fs::symlink("../../real.json", &link).unwrap();
    install(Engine::Docker, root.path(), false).unwrap();
    assert!(link.is_symlink());
    let real = fs::read_to_string(root.path().join("real.json")).unwrap();
    assert_eq!(
        real,
        r#"{"runtimes": { "hull": { "path": "/usr/local/bin/hull-oci" } }}"#
    );
    // A directory cannot be replaced by a file.
    let change = Change {
        path: root.path().join("etc/docker/registry"),
        before: None,
        after: Some("x".into()),
        directories: 0,
    };
    let before = everything(root.path());
    assert!(change.apply().is_err());
    assert_eq!(everything(root.path()), before);
}
