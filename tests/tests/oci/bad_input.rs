//! Errors in a bundle or a command: one line with runc's message, runc's exit status, and nothing
//! left behind.

use std::fs;
use std::time::Duration;

use hull_tests::{Bundle, Oci};
use serde_json::json;

/// `create` of a bundle fails with this message and leaves nothing.
#[track_caller]
fn refused(oci: &Oci, bundle: &Bundle, words: &[&str]) {
    let init = oci.init();
    oci.creates(&init, bundle, &[]).fails(1, words);
    init.does("state").fails(1, &["container does not exist"]);
    assert!(!init.pid_file().exists());
    // `run` fails as well.
    oci.oci(["run", "--bundle"])
        .arg(&bundle.path)
        .arg(oci.unique())
        .run()
        .fails(1, words);
    oci.assert_clean();
}

#[test]
fn a_bundle_without_a_usable_configuration_is_refused() {
    let oci = Oci::new();
    let bundle = oci.bundle();
    let mut whole = bundle.config.clone();
    for (text, words) in [
        ("{", "config.json"),
        ("", "config.json"),
        ("[]", "config.json"),
        ("\0\u{1}nonsense", "config.json"),
        (r#"{"ociVersion": 3}"#, "ociVersion"),
        (r#"{"ociVersion": "1.2.0"}"#, "root"),
    ] {
        bundle.write(text);
        refused(&oci, &bundle, &[words]);
    }
    for version in ["0.5.0", "2.0.0", "invalid", ""] {
        whole["ociVersion"] = json!(version);
        bundle.write(whole.to_string());
        refused(&oci, &bundle, &["unsupported ociVersion"]);
    }
    fs::remove_file(bundle.path.join("config.json")).unwrap();
    refused(&oci, &bundle, &["config.json not found"]);
    fs::remove_dir_all(&bundle.path).unwrap();
    refused(&oci, &bundle, &["bundle", "No such file"]);
}

#[test]
fn a_field_of_the_wrong_type_is_named() {
    let oci = Oci::new();
    let bundle = oci.bundle();
    for (path, value) in [
        ("/process/args", json!("sh")),
        ("/process/user/uid", json!("root")),
        ("/mounts", json!({})),
        ("/linux/namespaces/0/type", json!("nonsense")),
        ("/hostname", json!(["x"])),
    ] {
        let mut config = bundle.config.clone();
        *config.pointer_mut(path).unwrap() = value;
        bundle.write(config.to_string());
        refused(&oci, &bundle, &["config.json"]);
    }
}

#[test]
fn a_command_that_is_not_there_is_an_error_of_create() {
    let oci = Oci::new();
    let bundle = oci.bundle().args(&["no-such-command"]);
    refused(&oci, &bundle, &["no-such-command", "not found in $PATH"]);
    refused(
        &oci,
        &bundle.args(&["/etc/passwd"]),
        &["/etc/passwd", "permission denied"],
    );
    refused(&oci, &oci.bundle().args(&[]), &["args"]);
    let bundle = oci
        .bundle()
        .with(|config| config["process"]["cwd"] = json!("relative"));
    refused(&oci, &bundle, &["process.cwd", "not an absolute path"]);
    let bundle = oci.bundle().with(|config| {
        config.as_object_mut().unwrap().remove("process");
    });
    refused(&oci, &bundle, &["process"]);
}

#[test]
fn a_missing_root_or_mount_source_is_named() {
    let oci = Oci::new();
    let bundle = oci
        .bundle()
        .with(|config| config["root"]["path"] = json!("nothing"));
    refused(
        &oci,
        &bundle,
        &["rootfs", "nothing", "no such file or directory"],
    );
    let bundle = oci.bundle().mount(
        json!({"destination": "/data", "type": "bind", "source": "/no/such", "options": ["rbind"]}),
    );
    refused(
        &oci,
        &bundle,
        &["/data", "/no/such", "no such file or directory"],
    );
    assert!(!bundle.root("data").exists());
}

/// A device that a guest has nothing like: the control of loop devices, the host's memory, KVM.
fn character_device_of_the_host() -> (u32, u32) {
    let known = [(10, 237), (1, 1), (10, 232), (10, 144)];
    let there =
        |(major, minor): &(u32, u32)| fs::exists(format!("/sys/dev/char/{major}:{minor}")).unwrap();
    known.into_iter().find(there).unwrap()
}

#[test]
fn what_is_the_hosts_and_cannot_be_the_guests_is_refused_by_name() {
    let oci = Oci::new();
    let namespace = |kind: &str, path: &str| {
        oci.bundle().with(|config| {
            for namespace in config["linux"]["namespaces"].as_array_mut().unwrap() {
                if namespace["type"] == kind {
                    namespace["path"] = json!(path);
                }
            }
        })
    };
    let bundle = oci.bundle().with(|config| {
        let namespaces = config["linux"]["namespaces"].as_array_mut().unwrap();
        namespaces.retain(|namespace| namespace["type"] != "network");
    });
    refused(&oci, &bundle, &["not supported", "network namespace"]);
    refused(
        &oci,
        &namespace("ipc", "/proc/self/ns/ipc"),
        &["not supported", "ipc"],
    );
    refused(
        &oci,
        &namespace("uts", "/proc/1/ns/uts"),
        &["not supported", "uts"],
    );
    refused(
        &oci,
        &namespace("network", "/no/such"),
        &["network namespace /no/such"],
    );
    let (major, minor) = character_device_of_the_host();
    let device = json!([{"path": "/dev/hosts", "type": "c", "major": major, "minor": minor}]);
    let bundle = oci
        .bundle()
        .with(|config| config["linux"]["devices"] = device);
    refused(&oci, &bundle, &["linux.devices", "/dev/hosts"]);
    let bundle = oci.bundle().mount(
        json!({"destination": "/data", "type": "ext4", "source": "/dev/sda1", "options": []}),
    );
    refused(&oci, &bundle, &["not supported", "/data", "ext4"]);
    let bundle = oci
        .bundle()
        .with(|config| config["linux"]["sysctl"] = json!({"vm.nosuch": "1"}));
    refused(&oci, &bundle, &["linux.sysctl", "nosuch"]);
}

#[test]
fn an_id_that_exists_or_is_none_is_refused() {
    let oci = Oci::new();
    let bundle = oci.bundle();
    let init = oci.start(&bundle);
    let other = oci.init();
    let create = |id: &str| {
        oci.oci(["create", "--bundle"])
            .arg(&bundle.path)
            .arg(id)
            .output_to(&oci.path("out"), &oci.path("create.err"))
            .run()
    };
    create(&init.id).fails(1, &["container with given ID already exists"]);
    assert_eq!(init.status(), "running", "the first one is not disturbed");
    init.sh("true").ok();
    let long = "x".repeat(300);
    for id in ["a/b", "../x", "/etc", ".", "..", "", "a b", "ä", &long] {
        create(id).fails(1, &["invalid container id"]);
        for verb in ["start", "state", "kill", "delete", "pause", "ps", "events"] {
            oci.oci([verb, id])
                .run()
                .fails(1, &["invalid container id"]);
        }
    }
    other.does("state").fails(1, &["does not exist"]);
}

#[test]
fn commands_about_an_unknown_container_say_so() {
    let oci = Oci::new();
    for arguments in [
        &["start", "nobody"][..],
        &["state", "nobody"],
        &["kill", "nobody", "TERM"],
        &["delete", "nobody"],
        &["pause", "nobody"],
        &["resume", "nobody"],
        &["ps", "nobody"],
        &["events", "nobody"],
        &["update", "--memory", "64m", "nobody"],
    ] {
        oci.oci(arguments)
            .run()
            .fails(1, &["container does not exist"]);
    }
    oci.oci(["delete", "--force", "nobody"]).run().ok();
}

#[test]
fn a_command_at_the_wrong_time_is_refused_in_runcs_words() {
    let oci = Oci::new();
    let init = oci.create(&oci.bundle());
    init.does("pause").fails(1, &["created"]);
    init.does("start").ok();
    init.does("start")
        .fails(1, &["cannot start an already running container"]);
    init.does("delete").fails(
        1,
        &["cannot delete container", "that is not stopped: running"],
    );
    init.does("resume").fails(1, &["running"]);
    for signal in ["NOPE", "999", "-3", "SIGSIGTERM"] {
        init.kill(signal).fails(1, &["unknown signal", signal]);
    }
    init.sh("true").ok();
    init.kill("KILL").ok();
    init.becomes("stopped");
    init.does("start")
        .fails(1, &["cannot start a container that has stopped"]);
    init.kill("TERM").fails(1, &["container not running"]);
    init.does("pause").fails(1, &["container not running"]);
    init.does("delete").ok();
    oci.assert_clean();
}

#[test]
fn a_terminal_and_a_console_socket_belong_together() {
    let oci = Oci::new();
    let with = oci
        .bundle()
        .with(|config| config["process"]["terminal"] = json!(true));
    let init = oci.init();
    oci.creates(&init, &with, &[])
        .fails(1, &["tty", "console socket"]);
    let socket = oci.path("nobody-listens");
    let option = ["--console-socket", socket.to_str().unwrap()];
    oci.creates(&init, &with, &option)
        .fails(1, &["nobody-listens"]);
    oci.creates(&init, &oci.bundle(), &option)
        .fails(1, &["console socket"]);
    oci.assert_clean();
}

#[test]
fn what_a_container_cannot_have_from_its_caller_is_refused() {
    let oci = Oci::new();
    let bundle = oci.bundle();
    let init = oci.init();
    oci.creates(&init, &bundle, &["--preserve-fds", "2"])
        .fails(1, &["--preserve-fds"]);
    for verb in ["checkpoint", "restore"] {
        oci.oci([verb, "x"]).run().fails(1, &["not supported"]);
    }
    oci.oci(["no-such-verb"]).run().ends(1);
    oci.oci(["create"]).run().ends(1);
}

#[test]
fn a_configuration_of_ten_megabytes_works_or_is_one_error() {
    let oci = Oci::new();
    // Annotations are for the host only.
    let bundle = oci.bundle().sh("echo works").with(|config| {
        for number in 0..1000 {
            config["annotations"][format!("org.example.{number}")] = json!("x".repeat(10_000));
        }
    });
    let length = fs::metadata(bundle.path.join("config.json")).unwrap().len();
    assert!(length > 10_000_000);
    let output = oci
        .oci(["run", "--bundle"])
        .arg(&bundle.path)
        .arg(oci.unique())
        .run()
        .ok();
    assert_eq!(output.text(), "works");
    // This goes to the guest, and is too large for it.
    let bundle = oci.bundle().with(|config| {
        let env: Vec<String> = (0..10_000)
            .map(|number| format!("V{number}={}", "x".repeat(1000)))
            .collect();
        config["process"]["env"] = json!(env);
    });
    refused(&oci, &bundle, &["not supported", "config.json", "bytes"]);
    // Larger than the limit for reading.
    bundle.write(vec![b' '; 40 << 20]);
    refused(&oci, &bundle, &["longer than 32 MiB"]);
}

#[test]
fn a_thousand_mounts_work() {
    let oci = Oci::new();
    let source = oci.path("source");
    fs::create_dir(&source).unwrap();
    fs::write(source.join("file"), "content").unwrap();
    let bundle = oci
        .bundle()
        .sh("grep -c ' /data/' /proc/self/mountinfo; cat /data/999/file")
        .with(|config| {
            let mounts = config["mounts"].as_array_mut().unwrap();
            for number in 0..1000 {
                mounts.push(json!({
                    "destination": format!("/data/{number}"),
                    "source": source,
                    "options": ["rbind", "ro"],
                }));
            }
        });
    let output = oci
        .oci(["run", "--bundle"])
        .arg(&bundle.path)
        .arg(oci.unique())
        .limit(Duration::from_secs(100))
        .run()
        .ok();
    assert_eq!(output.text(), "1000\ncontent");
    println!("a thousand mounts: {:?}", output.took);
    oci.assert_clean();
}
