//! What a record says in Docker's words.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::Path;

use hull_network::cni::{PortMapping, Protocol};
use hull_sandbox::store::{CONFIG_FILE, Directory, Exit, Record, Status, Stored};

use super::*;
use crate::config::Config;
use crate::container::{Any, Details, ENGINE};
use crate::options::RunOptions;
use crate::publish::{HostAddress, publish};
use crate::values::SecurityOption;
use crate::volumes::{self, Volume, store};

fn config(parent: &Path) -> Config {
    let mut config = Config::defaults().unwrap();
    config.data_dir = parent.join("data");
    config.run_dir = parent.join("run");
    config
}

/// A container that was created with these options and is in this state.
fn known(config: &Config, options: RunOptions, status: Status) -> Value {
    let details = Details {
        name: "web".into(),
        image: "busybox".into(),
        image_id: format!("sha256:{}", "0".repeat(64)),
        hostname: "box".into(),
        network: "default".into(),
        stop_signal: "TERM".into(),
        ports: vec![PortMapping {
            host_ip: None,
            host_port: 8080,
            container_port: 80,
            protocol: Protocol::Tcp,
        }],
        labels: [("a".to_owned(), "b".to_owned())].into(),
        options: Some(Box::new(options)),
        ..Details::default()
    };
    let id = "ab".repeat(32);
    let mut record = Record::new(&id, ENGINE, details);
    record.command = ["sleep", "10"].map(str::to_owned).into();
    let path = config.paths().container(&id);
    let directory = Directory::create(&path).unwrap();
    let spec = json!({
        "process": {"env": ["A=spec", "PATH=/p"], "cwd": "/w"},
        "linux": {"maskedPaths": ["/proc/kcore"]},
    });
    directory
        .write(CONFIG_FILE, spec.to_string().as_bytes())
        .unwrap();
    container(
        config,
        &Any::Own(Box::new(Stored {
            directory,
            record,
            status,
        })),
    )
}

fn running() -> Status {
    let mut status = Status::new(State::Running);
    status.started_ns = Some(0);
    status.addresses = vec!["10.87.0.2".parse().unwrap(), "fd00::2".parse().unwrap()];
    status.processes.machine = 42;
    status
}

#[test]
fn a_running_container_has_dockers_keys() {
    let parent = tempfile::tempdir().unwrap();
    let config = config(parent.path());
    let object = known(&config, RunOptions::default(), running());
    let keys: Vec<&String> = object.as_object().unwrap().keys().collect();
    for key in [
        "Id",
        "Created",
        "Path",
        "Args",
        "State",
        "Image",
        "LogPath",
        "Name",
        "Platform",
        "HostConfig",
        "GraphDriver",
        "Mounts",
        "Config",
        "NetworkSettings",
    ] {
        assert!(keys.iter().any(|found| *found == key), "{key}");
    }
    for (pointer, value) in [
        ("/Name", json!("/web")),
        ("/Path", json!("sleep")),
        ("/Args", json!(["10"])),
        ("/State/Status", json!("running")),
        ("/State/Running", json!(true)),
        ("/State/Pid", json!(42)),
        ("/State/StartedAt", json!("1970-01-01T00:00:00.000000000Z")),
        ("/State/FinishedAt", json!(NEVER)),
        ("/Config/Hostname", json!("box")),
        ("/Config/Image", json!("busybox")),
        ("/Config/Labels", json!({"a": "b"})),
        ("/Config/StopSignal", json!("SIGTERM")),
        // The image is gone: what the container got is known.
        ("/Config/Env", json!(["PATH=/p", "A=spec"])),
        ("/Config/Cmd", json!(["sleep", "10"])),
        ("/Config/Entrypoint", json!(null)),
        ("/Config/WorkingDir", json!("/w")),
        ("/HostConfig/Binds", json!(null)),
        ("/HostConfig/Runtime", json!("hull")),
        ("/HostConfig/NetworkMode", json!("default")),
        ("/HostConfig/Privileged", json!(false)),
        ("/HostConfig/MaskedPaths", json!(["/proc/kcore"])),
        ("/NetworkSettings/IPAddress", json!("10.87.0.2")),
        ("/NetworkSettings/GlobalIPv6Address", json!("fd00::2")),
        (
            "/NetworkSettings/Networks/default/IPAddress",
            json!("10.87.0.2"),
        ),
        (
            "/NetworkSettings/Ports",
            json!({"80/tcp": [{"HostIp": "0.0.0.0", "HostPort": "8080"}]}),
        ),
        ("/Mounts", json!([])),
    ] {
        assert_eq!(object.pointer(pointer), Some(&value), "{pointer}");
    }
}

#[test]
fn a_container_that_has_ended_says_how_and_has_no_addresses() {
    let parent = tempfile::tempdir().unwrap();
    let config = config(parent.path());
    let exit = Exit {
        oom_killed: true,
        ..Exit::because(137, "killed")
    };
    let status = Status {
        state: State::Stopped,
        exit: Some(exit),
        ..running()
    };
    let object = known(&config, RunOptions::default(), status);
    let state = &object["State"];
    assert_eq!(state["Status"], "exited");
    assert_eq!(
        (&state["ExitCode"], &state["Pid"]),
        (&json!(137), &json!(0))
    );
    assert_eq!(
        (&state["OOMKilled"], &state["Error"]),
        (&json!(true), &json!("killed"))
    );
    assert_ne!(state["FinishedAt"], NEVER);
    let network = &object["NetworkSettings"];
    assert_eq!(
        (&network["IPAddress"], &network["Ports"]),
        (&json!(""), &json!({}))
    );
}

#[test]
fn what_was_asked_for_is_in_the_host_configuration() {
    let parent = tempfile::tempdir().unwrap();
    let config = config(parent.path());
    let paths = config.paths();
    let hidden = "c".repeat(64);
    store::create(&paths, "data", Default::default()).unwrap();
    let hidden_volume = store::Wanted {
        anonymous: true,
        ..Default::default()
    };
    store::create(&paths, &hidden, hidden_volume).unwrap();
    let volume = |text: &str| volumes::volume(text.as_ref()).unwrap();
    let options = RunOptions {
        volumes: vec![
            volume("/srv:/srv:ro"),
            volume("data:/data"),
            volume(&format!("{hidden}:/cache")),
            Volume::anonymous("/own".into()),
        ],
        tmpfs: vec![volumes::tmpfs("/run:size=1m").unwrap()],
        environment: vec!["A=1".into(), "B=2".into()],
        command: vec!["true".into()],
        entrypoint: Some("/init".into()),
        memory: Some(64 << 20),
        cpus_milli: Some(1500),
        pids_limit: Some(50),
        read_only: true,
        init: true,
        user: Some("1:2".into()),
        cap_add: vec!["NET_ADMIN".into()],
        security: vec![
            SecurityOption::Unconfined,
            SecurityOption::NoNewPrivileges(true),
        ],
        sysctl: vec![("a.b".into(), "1".into())],
        network: crate::network::NetworkOptions {
            publish: vec![
                publish("127.0.0.1:8080:80").unwrap(),
                publish("8081:80").unwrap(),
                publish("53/udp").unwrap(),
            ],
            add_host: vec![("db".into(), HostAddress::Gateway)],
            ip: Some([10, 87, 0, 9].into()),
            ..Default::default()
        },
        ..RunOptions::default()
    };
    let object = known(&config, options, running());
    for (pointer, value) in [
        ("/HostConfig/Binds", json!(["/srv:/srv:ro", "data:/data"])),
        ("/HostConfig/Memory", json!(64 << 20)),
        ("/HostConfig/NanoCpus", json!(1_500_000_000)),
        ("/HostConfig/PidsLimit", json!(50)),
        ("/HostConfig/ReadonlyRootfs", json!(true)),
        ("/HostConfig/Init", json!(true)),
        ("/HostConfig/CapAdd", json!(["NET_ADMIN"])),
        ("/HostConfig/CapDrop", json!(null)),
        (
            "/HostConfig/SecurityOpt",
            json!(["seccomp=unconfined", "no-new-privileges=true"]),
        ),
        ("/HostConfig/Sysctls", json!({"a.b": "1"})),
        ("/HostConfig/Tmpfs", json!({"/run": "size=1m"})),
        ("/HostConfig/ExtraHosts", json!(["db:host-gateway"])),
        (
            "/HostConfig/PortBindings",
            json!({
                "80/tcp": [
                    {"HostIp": "127.0.0.1", "HostPort": "8080"},
                    {"HostIp": "", "HostPort": "8081"},
                ],
                "53/udp": [{"HostIp": "", "HostPort": ""}],
            }),
        ),
        ("/Config/ExposedPorts", json!({"53/udp": {}, "80/tcp": {}})),
        ("/Config/User", json!("1:2")),
        ("/Config/Entrypoint", json!(["/init"])),
        ("/Config/Cmd", json!(["true"])),
        ("/Config/Env", json!(["PATH=/p", "A=1", "B=2"])),
        (
            "/NetworkSettings/Networks/default/IPAMConfig/IPv4Address",
            json!("10.87.0.9"),
        ),
        (
            "/Mounts/0",
            json!({
                "Type": "bind", "Source": "/srv", "Destination": "/srv", "Mode": "ro", "RW": false,
                "Propagation": "rprivate",
            }),
        ),
        (
            "/Mounts/1",
            json!({
                "Type": "volume", "Name": "data", "Source": paths.volume("data").join("_data"),
                "Destination": "/data", "Driver": "local", "Mode": "", "RW": true,
                "Propagation": "",
            }),
        ),
        ("/Mounts/2/Name", json!(hidden)),
        (
            "/Mounts/3/Source",
            json!(paths.container(&"ab".repeat(32)).join("volumes/3")),
        ),
    ] {
        assert_eq!(object.pointer(pointer), Some(&value), "{pointer}");
    }
    let own = paths.container(&"ab".repeat(32)).join("volumes");
    assert!(!own.exists(), "looking creates nothing");
    let upper = object.pointer("/GraphDriver/Data/UpperDir").unwrap();
    assert!(upper.as_str().unwrap().ends_with("/upper"), "{upper}");
    fs::remove_dir_all(parent.path()).unwrap();
}

#[test]
fn an_image_has_its_names_and_the_digests_of_its_layers() {
    let listed = |reference: Option<&str>| hull_image::Listed {
        reference: reference.map(str::to_owned),
        id: hull_image::Digest::of(b"id"),
        digest: hull_image::Digest::of(b"manifest"),
        repo_digest: hull_image::Digest::of(b"list"),
        created: None,
        size: 1,
        labels: Default::default(),
    };
    let digest = hull_image::Digest::of(b"list");
    let all = [
        listed(Some("docker.io/library/busybox:1")),
        listed(Some("docker.io/library/busybox:2")),
        listed(Some("localhost:5000/a/b:v1")),
        listed(None),
    ];
    let id = hull_image::Digest::of(b"id").to_string();
    let names = Names::of(&id, &all);
    assert_eq!(
        names.tags,
        ["busybox:1", "busybox:2", "localhost:5000/a/b:v1"]
    );
    assert_eq!(
        names.digests,
        [
            format!("busybox@{digest}"),
            format!("localhost:5000/a/b@{digest}")
        ]
    );
    assert_eq!(Names::of("sha256:other", &all), Names::default());
    let found = hull_image::Image {
        id: id.clone(),
        reference: "docker.io/library/busybox:1".into(),
        digest: Some(digest),
        config: hull_image::ImageConfig {
            cmd: vec!["sh".into()],
            architecture: "amd64".into(),
            os: "linux".into(),
            exposed_ports: vec!["80/tcp".into()],
            ..Default::default()
        },
        layers: vec!["/l/1".into()],
        created: Some("2024-01-01T00:00:00Z".into()),
        size: 7,
    };
    let document = json!({"rootfs": {"diff_ids": ["sha256:1"]}, "author": "me", "history": []});
    let object = image(&found, &names, &document);
    for (pointer, value) in [
        ("/Id", json!(id)),
        ("/RepoTags/0", json!("busybox:1")),
        ("/Size", json!(7)),
        ("/Architecture", json!("amd64")),
        ("/Os", json!("linux")),
        ("/Author", json!("me")),
        ("/Config/Cmd", json!(["sh"])),
        ("/Config/Env", json!(null)),
        ("/Config/ExposedPorts", json!({"80/tcp": {}})),
        ("/RootFS", json!({"Type": "layers", "Layers": ["sha256:1"]})),
    ] {
        assert_eq!(object.pointer(pointer), Some(&value), "{pointer}");
    }
}
