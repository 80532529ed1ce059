//! The OCI validation suite of runtime-tools (`scripts/oci-validation`): hull-oci passes what runc
//! passes. `docs/oci-validation.md` explains what each program checks, and why some can pass
//! nowhere.

use std::path::PathBuf;
use std::time::Duration;

use hull_tests::{Invocation, Runtime, adopt_orphans, leaked_processes, repository};

/// Programs that a container manager on the host cannot pass and hull has to, because its guest can
/// do what the host cannot: docs/oci-validation.md.
const AND_THESE: &[&str] = &[
    "linux_rootfs_propagation",
    "linux_seccomp",
    "poststart_fail",
    "poststop_fail",
    "process_capabilities",
];

/// Programs that runc passes, and that check on the host what hull has in the guest:
/// docs/oci-validation.md.
const NOT_FOR_HULL: &[&str] = &[
    "delete_resources",
    "linux_cgroups_pids",
    "linux_cgroups_relative_pids",
    "linux_ns_itype",
    "linux_ns_path",
    "mounts",
];

/// Each of the named programs becomes a test.
macro_rules! programs {
    ($($name:ident)+) => {
        const PROGRAMS: &[&str] = &[$(stringify!($name)),+];
        mod passes_what_runc_passes {
            $(#[test] fn $name() { super::compare(stringify!($name)); })+
        }
    };
}

programs! {
    config_updates_without_affect create default delete delete_only_create_resources
    delete_resources hooks hooks_stdin hostname kill kill_no_effect killsig linux_cgroups_blkio
    linux_cgroups_cpus linux_cgroups_devices linux_cgroups_hugetlb linux_cgroups_memory
    linux_cgroups_network linux_cgroups_pids linux_cgroups_relative_blkio
    linux_cgroups_relative_cpus linux_cgroups_relative_devices linux_cgroups_relative_hugetlb
    linux_cgroups_relative_memory linux_cgroups_relative_network linux_cgroups_relative_pids
    linux_devices linux_masked_paths linux_mount_label linux_ns_itype linux_ns_nopath linux_ns_path
    linux_ns_path_type linux_process_apparmor_profile linux_readonly_paths linux_rootfs_propagation
    linux_seccomp linux_sysctl linux_uid_mappings misc_props mounts pidfile poststart poststart_fail
    poststop poststop_fail prestart prestart_fail process process_capabilities
    process_capabilities_fail process_oom_score_adj process_rlimits process_rlimits_fail
    process_user root_readonly_true start state
}

#[test]
fn every_program_is_a_test_and_documented() {
    let list = suite().arg("--list").run().ok().text();
    assert_eq!(list.split_whitespace().collect::<Vec<_>>(), PROGRAMS);
    let page = std::fs::read_to_string(repository().join("docs/oci-validation.md")).unwrap();
    for program in PROGRAMS {
        assert!(page.contains(&format!("| `{program}` |")), "{program}");
    }
    let (_, reasons) = page.split_once("## What cannot apply to hull").unwrap();
    for program in NOT_FOR_HULL {
        assert!(reasons.contains(&format!("`{program}`")), "{program}");
    }
}

fn suite() -> Invocation {
    // Building it takes half a minute, once.
    Invocation::new(repository().join("scripts/oci-validation")).limit(Duration::from_secs(280))
}

/// Runs a program of the suite; returns whether it passes, and its output.
fn run(program: &str, runtime: &str, logs: &str) -> (bool, String) {
    let line = suite()
        .args(["--log", logs, runtime, program])
        .run()
        .ok()
        .text();
    let read = |name: String| std::fs::read(PathBuf::from(logs).join(name)).unwrap_or_default();
    let shown = format!(
        "{runtime}: {line}\n{}{}",
        String::from_utf8_lossy(&read(format!("{program}.tap"))),
        String::from_utf8_lossy(&read(format!("{program}.tap.err"))),
    );
    (line.split('\t').nth(1) == Some("pass"), shown)
}

fn compare(program: &str) {
    adopt_orphans();
    let directory = tempfile::Builder::new()
        .prefix("v")
        .rand_bytes(5)
        .tempdir_in("/tmp")
        .unwrap();
    let runtime = Runtime::in_directory(directory.path());
    if program == "killsig" {
        // It sends the signal as soon as the state is "running". The shell that is to handle it
        // takes longer to start in a guest than on the host, and process 1 is not ended by signals
        // that it does not handle yet.
        runtime.delay("kill", Duration::from_millis(300));
    }
    let logs = |name: &str| directory.path().join(name).display().to_string();
    let (expected, reference) = run(program, "runc", &logs("runc"));
    // runc leaves processes of some programs behind; that is not looked at here.
    leaked_processes();
    let (passes, shown) = run(program, runtime.path.to_str().unwrap(), &logs("hull"));
    let left = leaked_processes();
    println!("{reference}\n{shown}");
    let asked_for = expected && !(runtime.is_hull() && NOT_FOR_HULL.contains(&program));
    if asked_for || AND_THESE.contains(&program) {
        assert!(passes, "{program} is to pass");
    } else {
        println!("runc does not pass {program}; hull-oci: {passes}");
    }
    assert!(
        left.is_empty() || !runtime.is_hull(),
        "left behind: {left:?}"
    );
}
