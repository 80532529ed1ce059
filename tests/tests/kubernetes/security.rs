//! What a pod's security context says, and what a guest cannot have.

use std::time::Duration;

use hull_tests::eventually;
use hull_tests::kubernetes::{Cluster, pod, with};
use serde_json::{Value, json};

/// A pod that sleeps, with a security context of its container.
fn secured(name: &str, context: Value) -> Value {
    with(
        pod(name, "exec sleep 1000"),
        &[("/spec/containers/0/securityContext", context)],
    )
}

fn capability(cluster: &Cluster, pod: &str, bit: u32) -> bool {
    let all = cluster.sh(pod, "awk '/CapEff/ {print $2}' /proc/1/status");
    u64::from_str_radix(&all, 16).unwrap() & (1 << bit) != 0
}

const NET_ADMIN: u32 = 12;
const NET_RAW: u32 = 13;
const SYS_ADMIN: u32 = 21;

#[test]
fn capabilities_are_added_and_dropped() {
    let cluster = Cluster::new();
    let context = json!({"capabilities": {"add": ["NET_ADMIN"], "drop": ["NET_RAW"]}});
    cluster.run(&secured("one", context));
    assert!(capability(&cluster, "one", NET_ADMIN));
    assert!(!capability(&cluster, "one", NET_RAW));
    cluster.sh(
        "one",
        "ip link add name test type dummy 2>/dev/null || ip link set lo mtu 1400",
    );
    cluster.run(&secured("none", json!({"capabilities": {"drop": ["ALL"]}})));
    assert_eq!(
        cluster.sh("none", "awk '/CapEff/ {print $2}' /proc/1/status"),
        "0000000000000000"
    );
}

#[test]
fn seccomp_profiles_apply_in_the_guest() {
    let cluster = Cluster::new();
    let mode = |pod: &str| cluster.sh(pod, "awk '/^Seccomp:/ {print $2}' /proc/1/status");
    let default = json!({"seccompProfile": {"type": "RuntimeDefault"}});
    cluster.run(&secured("default", default));
    assert_eq!(mode("default"), "2");
    cluster.run(&secured(
        "unconfined",
        json!({"seccompProfile": {"type": "Unconfined"}}),
    ));
    assert_eq!(mode("unconfined"), "0");
    let profiles = "/var/lib/kubelet/seccomp";
    std::fs::create_dir_all(profiles).unwrap();
    let name = format!("{}.json", cluster.namespace());
    let profile = json!({
        "defaultAction": "SCMP_ACT_ALLOW",
        "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO"}],
    });
    let path = format!("{profiles}/{name}");
    std::fs::write(&path, profile.to_string()).unwrap();
    let local = json!({"seccompProfile": {"type": "Localhost", "localhostProfile": name}});
    cluster.run(&secured("local", local));
    assert_ne!(cluster.try_sh("local", "mkdir /new").status, 0);
    cluster.sh("local", "touch /file");
    std::fs::remove_file(path).unwrap();
}

#[test]
fn a_root_file_system_is_read_only_and_users_are_not_root() {
    let cluster = Cluster::new();
    let context = json!({
        "readOnlyRootFilesystem": true, "runAsUser": 1234, "runAsNonRoot": true,
        "allowPrivilegeEscalation": false,
    });
    cluster.run(&secured("one", context));
    let refused = cluster.try_sh("one", "touch /tmp/file");
    assert!(
        refused.error().contains("Read-only file system"),
        "{}",
        refused.error()
    );
    assert_eq!(
        cluster.sh("one", "id -u; awk '/NoNewPrivs/ {print $2}' /proc/1/status"),
        "1234\n1"
    );
    cluster.apply(&secured("root", json!({"runAsNonRoot": true})));
    cluster.until("it is refused", "pod", "root", |_| {
        cluster.events("root").contains("runAsNonRoot")
    });
}

#[test]
fn a_privileged_container_has_all_of_the_guest_and_nothing_of_the_node() {
    let cluster = Cluster::new();
    cluster.run(&secured("all", json!({"privileged": true})));
    assert!(capability(&cluster, "all", SYS_ADMIN));
    cluster.sh(
        "all",
        "mkdir /m; mount -t tmpfs none /m; echo 1 >/proc/sys/kernel/panic_on_oops",
    );
    assert!(cluster.sh("all", "uname -r").contains("hull"));
    // The node's devices are not the guest's.
    for device in ["loop-control", "fuse", "kvm", "vda"] {
        let host = std::path::Path::new("/dev").join(device).exists();
        let guest = cluster
            .try_sh("all", &format!("test -e /dev/{device}"))
            .status
            == 0;
        assert!(!guest || !host || device == "fuse", "{device}");
    }
}

#[test]
fn kernel_parameters_of_a_pod_are_those_of_its_guest() {
    let cluster = Cluster::new();
    let host = std::fs::read_to_string("/proc/sys/net/core/somaxconn").unwrap();
    let one = with(
        pod("one", "exec sleep 1000"),
        &[(
            "/spec/securityContext",
            json!({"sysctls": [
                {"name": "kernel.shm_rmid_forced", "value": "1"},
                {"name": "net.ipv4.ip_local_port_range", "value": "20000 30000"},
                {"name": "net.core.somaxconn", "value": "777"},
                {"name": "kernel.msgmax", "value": "9999"},
            ]}),
        )],
    );
    cluster.run(&one);
    let read = "cd /proc/sys; cat kernel/shm_rmid_forced net/core/somaxconn kernel/msgmax";
    assert_eq!(cluster.sh("one", read), "1\n777\n9999");
    assert_eq!(
        cluster.sh(
            "one",
            "awk '{print $1, $2}' /proc/sys/net/ipv4/ip_local_port_range"
        ),
        "20000 30000"
    );
    assert_eq!(
        std::fs::read_to_string("/proc/sys/net/core/somaxconn").unwrap(),
        host
    );
}

#[test]
fn the_network_of_the_node_is_refused_by_name() {
    let cluster = Cluster::new();
    cluster.apply(&with(
        pod("host", "exec sleep 1000"),
        &[("/spec/hostNetwork", json!(true))],
    ));
    eventually("it says why", Duration::from_secs(60), || {
        let events = cluster.events("host");
        events.contains("FailedCreatePodSandBox")
            && events.contains("network")
            && events.contains("not supported")
    });
    let described = cluster
        .kubectl(["describe", "pod", "host"])
        .run()
        .ok()
        .text();
    assert!(described.contains("not supported"), "{described}");
}
