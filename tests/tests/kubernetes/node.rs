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
