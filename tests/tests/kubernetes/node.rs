//! What happens to pods when something of their node ends and comes back.

use std::time::Duration;

use hull_tests::eventually;
use hull_tests::kubernetes::{Cluster, pod};
use hull_tests::shim::{kill, machine_of, shim_of};

/// Pods that run before stay the same, and new ones start.
fn lives_on(cluster: &Cluster, again: impl FnOnce()) {
    cluster.run(&pod(
        "before",
        "i=0; while sleep 0.2; do echo $i; i=$((i+1)); done",
    ));
    let boot = |name: &str| cluster.sh(name, "cat /proc/sys/kernel/random/boot_id");
    let machine = boot("before");
    again();
    eventually("the node answers", Duration::from_secs(60), || {
        cluster.try_sh("before", "true").status == 0
    });
    assert_eq!(boot("before"), machine);
    let pod_before = cluster.get("pod", "before");
    assert_eq!(
        pod_before["status"]["containerStatuses"][0]["restartCount"],
        0
    );
    let logged = cluster.logs("before").lines().count();
    eventually("more output", Duration::from_secs(20), || {
        cluster.logs("before").lines().count() > logged
    });
    cluster.run(&pod("after", "exec sleep 1000"));
    cluster.delete("pod", "before");
    cluster.delete("pod", "after");
}

#[test]
fn alone_pods_live_on_when_containerd_is_killed_and_started_again() {
    let cluster = Cluster::new();
    lives_on(&cluster, || {
        cluster.node("kill", "containerd");
        cluster.node("start", "containerd");
    });
}

#[test]
fn alone_pods_live_on_when_the_kubelet_is_started_again() {
    let cluster = Cluster::new();
    lives_on(&cluster, || {
        cluster.node("stop", "kubelet");
        cluster.node("start", "kubelet");
    });
}

#[test]
fn alone_the_daemon_set_takes_hull_from_a_node_and_puts_it_there() {
    let cluster = Cluster::new();
    let file = hull_tests::repository().join("deploy/kubernetes/node/daemonset.yaml");
    let daemon_set = std::fs::read_to_string(file).unwrap();
    let configuration = || std::fs::read_to_string("/etc/containerd/config.toml").unwrap();
    // What containerd is to be started again with is the test's: there is no systemd.
    let asked = "/run/node/asked";
    let apply = |action: &str, changes: bool| {
        let _ = std::fs::remove_file(asked);
        let environment =
            format!("env: [{{name: RESTART, value: touch {asked}}}]\n          args: [{action}]");
        let text = daemon_set
            .replace(
                "registry.example/hull-node:0.1.0",
                "localhost:5000/hull-node:1",
            )
            .replace("args: [install]", &environment);
        cluster
            .kubectl(["-n", "kube-system", "apply", "-f", "-"])
            .input(text)
            .run()
            .ok();
        if changes {
            eventually(
                "containerd is to be started again",
                Duration::from_secs(60),
                || std::path::Path::new(asked).exists(),
            );
            cluster.node("stop", "containerd");
            cluster.node("start", "containerd");
        }
        let rollout = [
            "-n",
            "kube-system",
            "rollout",
            "status",
            "daemonset",
            "hull-node",
        ];
        cluster.kubectl(rollout).run().ok();
    };
    assert!(configuration().contains("io.containerd.hull.v2"));
    // The node has it from elsewhere: only files come.
    apply("install", false);
    assert!(!std::path::Path::new(asked).exists());
    apply("remove", true);
    assert!(!configuration().contains("hull"), "{}", configuration());
    assert!(!std::path::Path::new("/usr/local/share/hull").exists());
    apply("install", true);
    assert!(configuration().contains("io.containerd.hull.v2"));
    cluster.run(&pod("after", "exec sleep 1000"));
    assert!(cluster.sh("after", "uname -r").contains("hull"));
    let shim = cluster
        .ids()
        .iter()
        .find_map(|id| shim_of("k8s.io", id))
        .unwrap();
    let executable = std::fs::read_link(format!("/proc/{shim}/exe")).unwrap();
    assert_eq!(executable.to_str(), Some("/usr/local/bin/hull"));
    let delete = ["-n", "kube-system", "delete", "daemonset", "hull-node"];
    cluster.kubectl(delete).run().ok();
}

#[test]
fn alone_a_pod_whose_machine_or_shim_was_killed_is_started_again() {
    let cluster = Cluster::new();
    for what in ["machine", "shim"] {
        cluster.run(&pod("victim", "exec sleep 1000"));
        let before = cluster.sh("victim", "cat /proc/sys/kernel/random/boot_id");
        let ids = cluster.ids();
        let shim = ids.iter().find_map(|id| shim_of("k8s.io", id));
        let shim = shim.expect("the pod has a shim");
        kill(match what {
            "machine" => machine_of(shim).expect("the shim has a machine"),
            _ => shim,
        });
        cluster.until("it was restarted", "pod", "victim", |pod| {
            pod["status"]["containerStatuses"][0]["restartCount"].as_u64() >= Some(1)
        });
        cluster.ready("victim");
        let after = cluster.sh("victim", "cat /proc/sys/kernel/random/boot_id");
        assert_ne!(after, before, "after its {what} was killed");
        cluster.delete("pod", "victim");
    }
}
