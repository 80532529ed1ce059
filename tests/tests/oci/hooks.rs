//! Hooks of a bundle: where and when they run, what they receive, and what happens to the container
//! when one fails.

use std::fs;
use std::time::Duration;

use hull_tests::{Oci, eventually};
use serde_json::Value;

#[test]
fn hooks_of_the_host_run_in_their_order_and_are_told_the_state() {
    let oci = Oci::new();
    let log = oci.path("log");
    let told = |name: &str| oci.path(&format!("told-{name}"));
    let mut bundle = oci.bundle().sh("echo runs; exec sleep 1000");
    for kind in ["poststop", "poststart", "createRuntime", "prestart"] {
        for number in [1, 2] {
            let name = format!("{kind}{number}");
            let script = format!(
                "echo {name} >>{}; cat >{}",
                log.display(),
                told(&name).display()
            );
            bundle = bundle.hook(kind, &script);
        }
    }
    let order = || -> Vec<String> {
        let text = fs::read_to_string(&log).unwrap_or_default();
        text.lines().map(str::to_owned).collect()
    };
    let state =
        |name: &str| -> Value { serde_json::from_slice(&fs::read(told(name)).unwrap()).unwrap() };
    let create = ["prestart1", "prestart2", "createRuntime1", "createRuntime2"];

    let init = oci.create(&bundle);
    assert_eq!(order(), create);
    let keeper = init.keeper().as_raw_nonzero().get();
    for name in create {
        let state = state(name);
        assert_eq!(state["status"], "creating", "{name}");
        assert_eq!(state["id"], init.id.as_str());
        assert_eq!(state["pid"], keeper);
        assert_eq!(state["bundle"], bundle.path.to_str().unwrap());
    }
    init.does("start").ok();
    assert_eq!(order()[4..], ["poststart1", "poststart2"]);
    assert_eq!(state("poststart1")["status"], "running");
    assert_eq!(state("poststart1")["pid"], keeper);
    init.kill("KILL").ok();
    init.becomes("stopped");
    assert_eq!(order().len(), 6, "nothing runs at the end of the process");
    init.does("delete").ok();
    assert_eq!(order()[6..], ["poststop1", "poststop2"]);
    assert_eq!(state("poststop2")["status"], "stopped");
}

#[test]
fn hooks_of_the_container_run_inside() {
    let oci = Oci::new();
    let bundle = oci.bundle().sh("cat /from-hook; echo runs").hook(
        "startContainer",
        "echo startContainer >/from-hook; cat >/told",
    );
    let init = oci.create(&bundle);
    assert!(!bundle.root("from-hook").exists(), "it runs at start");
    init.does("start").ok();
    assert_eq!(init.ends(), 0);
    assert_eq!(init.output(), "startContainer\nruns\n");
    let told: Value = serde_json::from_slice(&fs::read(bundle.root("told")).unwrap()).unwrap();
    assert_eq!(told["id"], init.id.as_str());
}

#[test]
fn the_network_namespace_of_the_process_that_hooks_are_told_is_the_containers() {
    let oci = Oci::new();
    let seen = oci.path("seen");
    let script = format!(
        "pid=$(sed 's/.*\"pid\":\\([0-9]*\\).*/\\1/'); readlink /proc/$pid/ns/net >{}; readlink /proc/self/ns/net >>{}",
        seen.display(),
        seen.display()
    );
    let init = oci.create(&oci.bundle().hook("prestart", &script));
    let text = fs::read_to_string(&seen).unwrap();
    let names: Vec<&str> = text.lines().collect();
    assert_ne!(names[0], names[1], "one of its own");
    let keeper = init.keeper().as_raw_nonzero();
    let own = fs::read_link(format!("/proc/{keeper}/ns/net")).unwrap();
    assert_eq!(own.to_str().unwrap(), names[0]);
}

#[test]
fn a_hook_that_fails_during_create_is_named_and_nothing_is_left() {
    let oci = Oci::new();
    for kind in ["prestart", "createRuntime"] {
        let bundle = oci.bundle().hook(kind, "echo this went wrong >&2; exit 3");
        let init = oci.init();
        oci.creates(&init, &bundle, &[])
            .fails(1, &[kind, "this went wrong", "3"]);
        init.does("state").fails(1, &["does not exist"]);
        assert!(!init.pid_file().exists());
        oci.assert_clean();
    }
}

#[test]
fn a_hook_of_the_container_that_fails_is_an_error_and_nothing_is_left() {
    let oci = Oci::new();
    let bundle = oci
        .bundle()
        .hook("startContainer", "echo this went wrong >&2; exit 3");
    let init = oci.create(&bundle);
    init.does("start").fails(1, &["startContainer"]);
    init.becomes("stopped");
    init.does("delete").ok();
    oci.assert_clean();
    let bundle = oci.bundle().with(|config| {
        config["hooks"] = serde_json::json!({"createContainer": [{"path": "/no/such"}]});
    });
    let init = oci.init();
    oci.creates(&init, &bundle, &[])
        .fails(1, &["createContainer", "/no/such"]);
    init.does("state").fails(1, &["does not exist"]);
    oci.assert_clean();
}

#[test]
fn a_hook_that_takes_too_long_is_ended() {
    let oci = Oci::new();
    let bundle = oci
        .bundle()
        .hook("createRuntime", "exec sleep 1000")
        .with(|config| config["hooks"]["createRuntime"][0]["timeout"] = serde_json::json!(1));
    let init = oci.init();
    let output = oci
        .creates(&init, &bundle, &[])
        .fails(1, &["createRuntime", "timed out"]);
    assert!(output.took < Duration::from_secs(5), "{:?}", output.took);
    oci.assert_clean();
}

#[test]
fn hooks_that_fail_after_start_and_delete_are_told_and_change_nothing() {
    let oci = Oci::new();
    let log = oci.path("log");
    let note = format!("echo ran >>{}", log.display());
    let bundle = oci
        .bundle()
        .hook("poststart", "exit 3")
        .hook("poststart", &note)
        .hook("poststop", "exit 4")
        .hook("poststop", &note);
    let init = oci.create(&bundle);
    let output = init.does("start").ok();
    assert!(output.error().contains("poststart"), "{}", output.error());
    assert_eq!(init.status(), "running");
    eventually("the second one", Duration::from_secs(5), || {
        fs::read_to_string(&log).is_ok_and(|text| text == "ran\n")
    });
    let output = init.delete().ok();
    assert!(output.error().contains("poststop"), "{}", output.error());
    assert_eq!(fs::read_to_string(&log).unwrap(), "ran\nran\n");
    oci.assert_clean();
}
