//! The life of a pod's containers: probes, hooks, ends, restarts, limits.

use std::time::{Duration, Instant};

use hull_tests::eventually;
use hull_tests::kubernetes::{Cluster, container, pod, with};
use serde_json::{Value, json};

fn status(pod: &Value, index: usize) -> Value {
    pod["status"]["containerStatuses"][index].clone()
}

fn restarts(pod: &Value) -> u64 {
    status(pod, 0)["restartCount"].as_u64().unwrap_or(0)
}

#[test]
fn readiness_follows_probes_by_command_http_and_tcp() {
    let cluster = Cluster::new();
    let probes = [
        (
            "by-command",
            json!({"exec": {"command": ["test", "-e", "/tmp/index.html"]}}),
        ),
        ("by-http", json!({"httpGet": {"path": "/", "port": 8080}})),
        ("by-tcp", json!({"tcpSocket": {"port": 8080}})),
    ];
    let script = "sleep 2; echo up >/tmp/index.html; exec httpd -f -p 8080 -h /tmp";
    for (name, probe) in &probes {
        let mut probe = probe.clone();
        probe["periodSeconds"] = json!(1);
        cluster.apply(&with(
            pod(name, script),
            &[("/spec/containers/0/readinessProbe", probe)],
        ));
    }
    for (name, _) in &probes {
        cluster.ready(name);
    }
    cluster.sh("by-command", "rm /tmp/index.html");
    cluster.until("it is not ready", "pod", "by-command", |pod| {
        status(pod, 0)["ready"] == false
    });
}

#[test]
fn a_container_that_fails_its_liveness_probe_is_restarted_alone() {
    let cluster = Cluster::new();
    let two = with(
        pod("two", "touch /alive; sleep 3; rm /alive; sleep 1000"),
        &[
            (
                "/spec/containers/0/livenessProbe",
                json!({
                    "exec": {"command": ["cat", "/alive"]},
                    "periodSeconds": 1,
                    "failureThreshold": 1,
                }),
            ),
            ("/spec/containers/1", container("other", "exec sleep 1000")),
        ],
    );
    cluster.apply(&two);
    cluster.until("it was restarted", "pod", "two", |pod| restarts(pod) >= 1);
    let pod = cluster.get("pod", "two");
    assert_eq!(status(&pod, 1)["restartCount"], 0);
    assert!(
        cluster.events("two").contains("Unhealthy"),
        "{}",
        cluster.events("two")
    );
}

#[test]
fn a_startup_probe_holds_the_others_back() {
    let cluster = Cluster::new();
    let slow = with(
        pod("slow", "sleep 4; touch /up; sleep 1000"),
        &[
            (
                "/spec/containers/0/startupProbe",
                json!({
                    "exec": {"command": ["cat", "/up"]}, "periodSeconds": 1, "failureThreshold": 30,
                }),
            ),
            (
                "/spec/containers/0/livenessProbe",
                json!({
                    "exec": {"command": ["cat", "/up"]}, "periodSeconds": 1, "failureThreshold": 1,
                }),
            ),
        ],
    );
    cluster.run(&slow);
    assert_eq!(restarts(&cluster.get("pod", "slow")), 0);
}

#[test]
fn a_container_that_takes_too_much_memory_is_oom_killed_and_says_so() {
    let cluster = Cluster::new();
    let greedy = with(
        pod("greedy", "exec tail /dev/zero"),
        &[
            (
                "/spec/containers/0/resources",
                json!({"limits": {"memory": "32Mi"}}),
            ),
            ("/spec/containers/1", container("other", "exec sleep 1000")),
        ],
    );
    cluster.apply(&greedy);
    cluster.until("it was killed", "pod", "greedy", |pod| {
        let status = status(pod, 0);
        [&status["state"], &status["lastState"]]
            .into_iter()
            .any(|state| {
                state["terminated"]["reason"] == "OOMKilled"
                    && state["terminated"]["exitCode"] == 137
            })
    });
    assert_eq!(status(&cluster.get("pod", "greedy"), 1)["restartCount"], 0);
}

#[test]
fn limits_hold_in_the_guest_and_size_the_machine() {
    let cluster = Cluster::new();
    let limited = with(
        pod("limited", "exec sleep 1000"),
        &[
            (
                "/spec/containers/0/resources",
                json!({"limits": {"cpu": "250m", "memory": "64Mi"}}),
            ),
            (
                "/spec/containers/1",
                with(
                    container("other", "exec sleep 1000"),
                    &[(
                        "/resources",
                        json!({"limits": {"cpu": "500m", "memory": "128Mi"}}),
                    )],
                ),
            ),
        ],
    );
    cluster.run(&limited);
    let read = |file: &str| cluster.sh("limited", &format!("cat /sys/fs/cgroup/{file}"));
    assert_eq!(read("memory.max"), (64 << 20).to_string());
    assert_eq!(read("cpu.max"), "25000 100000");
    let total = "awk '/MemTotal/ {print int($2 / 1024)}' /proc/meminfo";
    let total: u64 = cluster.sh("limited", total).parse().unwrap();
    assert!((192..320).contains(&total), "{total} MiB");
}

#[test]
fn the_termination_message_comes_from_the_file_and_from_the_log() {
    let cluster = Cluster::new();
    let never = ("/spec/restartPolicy", json!("Never"));
    let file = with(
        pod("file", "echo from the file >/dev/termination-log; exit 2"),
        std::slice::from_ref(&never),
    );
    let log = with(
        pod("log", "echo from the log; exit 3"),
        &[
            never,
            (
                "/spec/containers/0/terminationMessagePolicy",
                json!("FallbackToLogsOnError"),
            ),
        ],
    );
    for (pod, message, code) in [(file, "from the file\n", 2), (log, "from the log\n", 3)] {
        assert_eq!(cluster.run_to_end(&pod), "Failed");
        let name = pod["metadata"]["name"].as_str().unwrap();
        let ended = status(&cluster.get("pod", name), 0)["state"]["terminated"].clone();
        assert_eq!(ended["message"], message);
        assert_eq!(ended["exitCode"], code);
        assert_eq!(ended["reason"], "Error");
    }
}

#[test]
fn a_pod_ends_gracefully_and_by_force_after_its_grace_period() {
    let cluster = Cluster::new();
    std::fs::create_dir(cluster.path("shared")).unwrap();
    let volume = |pod: Value| {
        with(
            pod,
            &[
                (
                    "/spec/volumes",
                    json!([{"name": "v", "hostPath": {"path": cluster.path("shared")}}]),
                ),
                (
                    "/spec/containers/0/volumeMounts",
                    json!([{"name": "v", "mountPath": "/v"}]),
                ),
            ],
        )
    };
    let polite = with(
        volume(pod(
            "polite",
            "trap 'echo ended >/v/polite; exit 0' TERM; touch /v/up; while :; do sleep 0.1; done",
        )),
        &[("/spec/terminationGracePeriodSeconds", json!(30))],
    );
    cluster.run(&polite);
    eventually("it is up", Duration::from_secs(10), || {
        cluster.path("shared/up").exists()
    });
    let begin = Instant::now();
    cluster.delete("pod", "polite");
    assert!(
        begin.elapsed() < Duration::from_secs(25),
        "{:?}",
        begin.elapsed()
    );
    assert_eq!(
        std::fs::read_to_string(cluster.path("shared/polite")).unwrap(),
        "ended\n"
    );

    let deaf = with(
        volume(pod("deaf", "trap '' TERM; while :; do sleep 0.1; done")),
        &[("/spec/terminationGracePeriodSeconds", json!(2))],
    );
    cluster.run(&deaf);
    let begin = Instant::now();
    cluster.delete("pod", "deaf");
    let took = begin.elapsed();
    assert!(
        (Duration::from_secs(2)..Duration::from_secs(30)).contains(&took),
        "{took:?}"
    );
}

#[test]
fn hooks_run_after_the_start_and_before_the_stop() {
    let cluster = Cluster::new();
    std::fs::create_dir(cluster.path("shared")).unwrap();
    let hooked = with(
        pod(
            "hooked",
            "trap 'echo stopped >>/v/order; exit 0' TERM; while :; do sleep 0.1; done",
        ),
        &[
            (
                "/spec/volumes",
                json!([{"name": "v", "hostPath": {"path": cluster.path("shared")}}]),
            ),
            (
                "/spec/containers/0/volumeMounts",
                json!([{"name": "v", "mountPath": "/v"}]),
            ),
            (
                "/spec/containers/0/lifecycle",
                json!({
                    "postStart": {"exec": {"command": ["sh", "-c", "echo started >>/v/order"]}},
                    "preStop": {"exec": {"command": ["sh", "-c", "echo stopping >>/v/order"]}},
                }),
            ),
            ("/spec/terminationGracePeriodSeconds", json!(20)),
        ],
    );
    cluster.run(&hooked);
    cluster.delete("pod", "hooked");
    let order = std::fs::read_to_string(cluster.path("shared/order")).unwrap();
    assert_eq!(order, "started\nstopping\nstopped\n");
}

#[test]
fn a_container_that_cannot_start_says_why_in_its_status() {
    let cluster = Cluster::new();
    let missing = with(
        pod("missing", ""),
        &[("/spec/containers/0/command", json!(["/no/such/program"]))],
    );
    cluster.apply(&missing);
    cluster.until("it says why", "pod", "missing", |pod| {
        let status = status(pod, 0);
        [
            &status["state"]["waiting"],
            &status["lastState"]["terminated"],
            &status["state"]["terminated"],
        ]
        .into_iter()
        .any(|state| {
            let message = state["message"].as_str().unwrap_or_default();
            message.contains("/no/such/program") && message.contains("no such file")
        })
    });
}

#[test]
fn a_pod_that_writes_more_than_its_volume_may_hold_is_evicted() {
    let cluster = Cluster::new();
    let full = with(
        pod("full", "head -c 20000000 /dev/zero >/data/file; sleep 1000"),
        &[
            (
                "/spec/volumes",
                json!([{"name": "data", "emptyDir": {"sizeLimit": "5Mi"}}]),
            ),
            (
                "/spec/containers/0/volumeMounts",
                json!([{"name": "data", "mountPath": "/data"}]),
            ),
        ],
    );
    assert_eq!(cluster.run_to_end(&full), "Failed");
    let pod = cluster.get("pod", "full");
    assert_eq!(pod["status"]["reason"], "Evicted", "{}", pod["status"]);
}
