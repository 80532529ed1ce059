//! The system call filter of `hull run`: what it keeps from containers, and that it does not
//! disturb programs.

use std::collections::BTreeMap;
use std::fs;

use hull_tests::{Hull, Invocation, Output, on_every_machine, posix_results, repository};
use serde_json::json;

on_every_machine!(the_filter_refuses_what_containers_do_not_use);

/// Runs `tests/seccomp/calls.c` in a container: the result of each system call.
fn calls(hull: &Hull, options: &[&str]) -> BTreeMap<String, String> {
    let program = hull.scratch().join("calls");
    if !program.exists() {
        Invocation::new("cc")
            .args(["-static", "-O1", "-pthread", "-o"])
            .args([&program, &repository().join("tests/seccomp/calls.c")])
            .run()
            .ok();
    }
    let volume = format!("{}:/calls:ro", program.display());
    let mut all = vec!["-v", &volume];
    all.extend(options);
    posix_results(&hull.run(&all, &["/calls"]).ok().text())
}

/// The calls that the filter has refused, and the one that it reports as missing.
fn refused(results: &BTreeMap<String, String>) -> Vec<&str> {
    results
        .iter()
        .filter(|(_, result)| *result == "EPERM")
        .map(|(name, _)| name.as_str())
        .collect()
}

fn the_filter_refuses_what_containers_do_not_use(machine: &'static str) {
    let hull = Hull::on(machine);
    let results = calls(&hull, &[]);
    assert_eq!(
        refused(&results),
        [
            "add_key",
            "bpf",
            "clone",
            "io_uring_setup",
            "keyctl",
            "mount",
            "perf_event_open",
            "personality read-implies-exec",
            "socket vsock",
            "socket vsock, long",
            "unshare",
        ]
    );
    // So that C libraries fall back to the older clone, and programs to what they know besides.
    assert_eq!(results["clone3"], "ENOSYS");
    assert_eq!(results["unknown"], "ENOSYS");
    for name in [
        "getpid",
        "clone plain",
        "socket inet",
        "socket unix",
        "personality",
        "ptrace",
    ] {
        assert_eq!(results[name], "ok", "{name}");
    }
    assert_eq!(results["fchmodat2"], "ok");
    assert_eq!(results["thread"], "ok");
}

#[test]
fn unconfined_is_no_filter() {
    let hull = Hull::new();
    let option = ["--security-opt", "seccomp=unconfined"];
    let results = calls(&hull, &option);
    for name in [
        "mount",
        "unshare",
        "clone",
        "clone3",
        "keyctl",
        "add_key",
        "io_uring_setup",
    ] {
        assert!(
            !["EPERM", "ENOSYS"].contains(&results[name].as_str()),
            "{name}: {}",
            results[name]
        );
    }
    assert_eq!(results["unshare"], "ok");
    assert_eq!(hull.sh(&option, MODE).ok().text(), "0");
    assert_eq!(hull.sh(&[], MODE).ok().text(), "2");
}

/// 2 with a filter, 0 without.
const MODE: &str = "sed -n 's/^Seccomp:\\t//p' /proc/self/status";

#[test]
fn a_capability_opens_its_system_calls() {
    let hull = Hull::new();
    let results = calls(&hull, &["--cap-add", "SYS_ADMIN"]);
    assert_eq!(
        refused(&results),
        [
            "add_key",
            "io_uring_setup",
            "keyctl",
            "personality read-implies-exec",
            "socket vsock",
            "socket vsock, long",
        ]
    );
    assert_eq!(results["clone3"], "EINVAL");
    let script = "mkdir /tmp/m && mount -t tmpfs none /tmp/m && umount /tmp/m && echo done";
    assert_eq!(
        hull.sh(&["--cap-add", "SYS_ADMIN"], script).ok().text(),
        "done"
    );
}

#[test]
fn usual_programs_do_not_notice_the_filter() {
    let hull = Hull::new();
    let script = "set -e
        cd /tmp; echo a >f; ln f g; ln -s f h; chmod 600 f; chown 1:1 f; touch -d @0 f; rm g h; mkfifo p; tar c f | tar t
        seq 1000 | sort -rn | head -n 1
        (sleep 0.1; echo late) & wait
        nc -l -p 99 >got & server=$!
        for try in 1 2 3 4 5 6 7 8 9; do echo hello | nc 127.0.0.1 99 2>/dev/null && break; sleep 0.2; done
        wait $server; cat got
        su -s /bin/sh nobody -c id 2>/dev/null | cut -c 1-4 || true
        timeout 5 true; date >/dev/null; ps >/dev/null; df >/dev/null; free >/dev/null";
    let text = hull.sh(&[], script).ok().text();
    assert!(text.starts_with("f\n1000\nlate\nhello"), "{text}");
    let container = hull.sleeper();
    let mode = hull.hull(["exec", &container.name, "sh", "-c", MODE]).run();
    assert_eq!(mode.ok().text(), "2");
}

#[test]
fn a_profile_of_the_users_own_takes_its_place() {
    let hull = Hull::new();
    let run = |profile: &str, options: &[&str], script: &str| -> Output {
        let file = hull.scratch().join("profile.json");
        fs::write(&file, profile).unwrap();
        let option = format!("seccomp={}", file.display());
        let mut all = vec!["--security-opt", &option];
        all.extend(options);
        hull.sh(&all, script)
    };
    let rule = json!({"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 28});
    let profile = json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [rule]}).to_string();
    let output = run(&profile, &[], "mkdir /tmp/no");
    assert_ne!(output.status, 0);
    assert!(
        output.error().contains("No space left"),
        "28 is ENOSPC: {}",
        output.error()
    );
    // Docker's own form: a rule that a capability lifts.
    let mut rule = rule;
    rule["excludes"] = json!({"caps": ["CAP_SYS_ADMIN"]});
    let profile = json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [rule]}).to_string();
    assert_ne!(run(&profile, &[], "mkdir /tmp/no").status, 0);
    run(&profile, &["--cap-add", "SYS_ADMIN"], "mkdir /tmp/yes").ends(0);
    for (profile, words) in [
        ("{", "is no seccomp profile: EOF"),
        (
            r#"{"defaultAction": "ALLOW"}"#,
            "is no seccomp profile: unknown variant",
        ),
        (
            r#"{"defaultAction": "SCMP_ACT_ALLOW", "syscals": []}"#,
            "is no seccomp profile: unknown field `syscals`",
        ),
    ] {
        let output = run(profile, &[], "true");
        assert_eq!(output.status, 125);
        assert!(output.error().contains(words), "{}", output.error());
    }
    let option = "seccomp=/nonexistent";
    let output = hull.sh(&["--security-opt", option], "true");
    assert!(
        output.error().contains("/nonexistent"),
        "{}",
        output.error()
    );
    hull.assert_clean();
}
