//! What happens to pods when something of their node ends and comes back.

use std::path::Path;
use std::time::Duration;

use hull_tests::kubernetes::{Cluster, pod, with};
use hull_tests::shim::{kill, machine_of, shim_of};
use hull_tests::{Invocation, eventually};
use serde_json::json;

/// Where hull-node says that containerd is to be started again, as tests tell it to: a node of
/// theirs has no systemd.
const ASKED: &str = "/run/node/asked";

fn configuration() -> String {
    std::fs::read_to_string("/etc/containerd/config.toml").unwrap()
}

fn start_containerd_again(cluster: &Cluster) {
    cluster.node("stop", "containerd");
    cluster.node("start", "containerd");
}

/// Starts containerd again as soon as hull-node asks for it.
fn start_containerd_again_when_asked(cluster: &Cluster) {
    eventually(
        "containerd is to be started again",
        Duration::from_secs(60),
        || Path::new(ASKED).exists(),
    );
    start_containerd_again(cluster);
    std::fs::remove_file(ASKED).unwrap();
}

/// Waits until the pods of the DaemonSet have done what they are there for.
fn rolled_out(cluster: &Cluster) {
    let rollout = [
        "-n",
        "kube-system",
        "rollout",
        "status",
        "daemonset",
        "hull-node",
    ];
    cluster.kubectl(rollout).run().ok();
}

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
    let apply = |action: &str, changes: bool| {
        let _ = std::fs::remove_file(ASKED);
        let text = daemon_set
            .replace(
                "registry.example/hull-node:0.1.0",
                "localhost:5000/hull-node:1",
            )
            .replace("systemctl restart containerd", &format!("touch {ASKED}"))
            .replace("args: [install]", &format!("args: [{action}]"));
        cluster
            .kubectl(["-n", "kube-system", "apply", "-f", "-"])
            .input(text)
            .run()
            .ok();
        if changes {
            start_containerd_again_when_asked(&cluster);
        }
        rolled_out(&cluster);
    };
    assert!(configuration().contains("io.containerd.hull.v2"));
    // The node has it from elsewhere: only files come.
    apply("install", false);
    assert!(!Path::new(ASKED).exists());
    apply("remove", true);
    assert!(!configuration().contains("hull"), "{}", configuration());
    assert!(!Path::new("/usr/local/share/hull").exists());
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

/// `helm …` in the namespace that has hull's pods.
fn helm<'a>(arguments: impl IntoIterator<Item = &'a str>) -> Invocation {
    let program = std::env::var_os("HULL_HELM").expect("scripts/kubernetes says where helm is");
    Invocation::new(program)
        .args(["--namespace", "kube-system"])
        .args(arguments)
        .limit(Duration::from_secs(120))
}

#[test]
fn alone_the_chart_installs_hull_upgrades_it_beside_a_pod_and_removes_it() {
    let cluster = Cluster::new();
    let chart = hull_tests::repository().join("deploy/kubernetes/chart");
    let release = |action: &str, tag: &str| {
        let restart = format!("restart=touch {ASKED}");
        let tag = format!("image.tag={tag}");
        helm([action, "hull", chart.to_str().unwrap()])
            .args(["--set", "image.repository=localhost:5000/hull-node"])
            .args(["--set-string", &tag, "--set", &restart])
            .args(["--set", "kubectl.image=localhost:5000/kubectl:1"])
            .args(["--set", "runtimeClass.name=charted"])
            .run()
            .ok();
    };
    let label = || cluster.get("node", "node")["metadata"]["labels"]["hull.dev/ready"].clone();
    let there = |kind: &str, name: &str| cluster.kubectl(["get", kind, name]).run().status == 0;

    // A node without hull.
    Invocation::new("hull")
        .args(["uninstall", "containerd"])
        .run()
        .ok();
    start_containerd_again(&cluster);
    let _ = std::fs::remove_file(ASKED);
    assert!(label().is_null());

    release("install", "1");
    start_containerd_again_when_asked(&cluster);
    rolled_out(&cluster);
    assert!(configuration().contains("io.containerd.hull.v2"));
    assert_eq!(label(), "true");

    let stays = pod("stays", "exec sleep 1000");
    cluster.run(&with(
        stays,
        &[("/spec/runtimeClassName", json!("charted"))],
    ));
    let boot = || cluster.sh("stays", "cat /proc/sys/kernel/random/boot_id");
    let machine = boot();
    let scheduled = cluster.get("pod", "stays");
    assert_eq!(
        scheduled["spec"]["nodeSelector"],
        json!({"hull.dev/ready": "true"})
    );

    release("upgrade", "2");
    rolled_out(&cluster);
    assert!(!Path::new(ASKED).exists());
    assert_eq!(label(), "true");
    assert_eq!(boot(), machine, "an upgrade leaves pods alone");

    // hull stays as long as the pod runs, and no other pod comes.
    let uninstall = helm(["uninstall", "hull", "--timeout", "10s"]).run();
    assert_ne!(uninstall.status, 0, "{}", uninstall.text());
    eventually("the label is gone", Duration::from_secs(60), || {
        label().is_null()
    });
    assert_eq!(boot(), machine);
    assert!(configuration().contains("io.containerd.hull.v2"));

    cluster.delete("pod", "stays");
    let uninstall = helm(["uninstall", "hull", "--timeout", "100s"]).start();
    start_containerd_again_when_asked(&cluster);
    uninstall.finish().ok();
    assert!(!configuration().contains("hull"), "{}", configuration());
    assert!(!Path::new("/usr/local/share/hull").exists());
    assert!(!Path::new("/usr/local/bin/hull").exists());
    assert!(label().is_null());
    for (kind, name) in [
        ("runtimeclass", "charted"),
        ("clusterrole", "hull-node"),
        ("clusterrolebinding", "hull-node"),
    ] {
        assert!(!there(kind, name), "{kind} {name} is left");
    }

    // For the other tests.
    Invocation::new("hull")
        .args(["install", "containerd"])
        .run()
        .ok();
    start_containerd_again(&cluster);
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
