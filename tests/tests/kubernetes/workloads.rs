//! What keeps pods running: deployments, sets, jobs; and services in front of them.

use std::time::Duration;

use hull_tests::eventually;
use hull_tests::kubernetes::{Cluster, container, pod, pod_spec, with};
use serde_json::{Value, json};

fn workload(kind: &str, api: &str, name: &str, spec: Value) -> Value {
    json!({
        "apiVersion": api,
        "kind": kind,
        "metadata": {"name": name},
        "spec": spec,
    })
}

/// A web server that answers with a text, and is ready when it answers.
fn web(text: &str) -> Value {
    let script = format!("mkdir /www; echo {text} >/www/index.html; exec httpd -f -p 8080 -h /www");
    with(
        pod_spec(&script),
        &[(
            "/containers/0/readinessProbe",
            json!({"httpGet": {"path": "/", "port": 8080}, "periodSeconds": 1}),
        )],
    )
}

fn deployment(replicas: u32, spec: Value) -> Value {
    workload(
        "Deployment",
        "apps/v1",
        "web",
        json!({
            "replicas": replicas,
            "selector": {"matchLabels": {"app": "web"}},
            "template": {"metadata": {"labels": {"app": "web"}}, "spec": spec},
        }),
    )
}

fn service(name: &str) -> Value {
    workload(
        "Service",
        "v1",
        name,
        json!({"selector": {"app": name}, "ports": [{"port": 80, "targetPort": 8080}]}),
    )
}

fn cluster_ip(cluster: &Cluster, name: &str) -> String {
    let service = cluster.get("service", name);
    service["spec"]["clusterIP"].as_str().unwrap().to_owned()
}

#[test]
fn a_deployment_is_rolled_out_and_updated_while_its_service_answers() {
    let cluster = Cluster::new();
    // Old pods answer until the node's rules have left them out.
    let drained = |text| {
        with(
            web(text),
            &[
                (
                    "/containers/0/lifecycle",
                    json!({"preStop": {"exec": {"command": ["sleep", "3"]}}}),
                ),
                ("/terminationGracePeriodSeconds", json!(10)),
            ],
        )
    };
    cluster.apply(&deployment(3, drained("one")));
    cluster.apply(&service("web"));
    let rolled_out = || {
        cluster
            .kubectl(["rollout", "status", "deployment", "web"])
            .run()
            .ok()
    };
    rolled_out();
    let address = cluster_ip(&cluster, "web");
    let script = format!(
        "while sleep 0.1; do timeout 5 wget -qO- http://{address} >>/answers 2>/errors || echo failed >>/answers; done"
    );
    cluster.run(&pod("client", &script));
    let answers = || cluster.sh("client", "cat /answers 2>/dev/null || true");
    eventually("the service answers", Duration::from_secs(30), || {
        answers().contains("one")
    });
    cluster.apply(&deployment(3, drained("two")));
    rolled_out();
    eventually("the new ones answer", Duration::from_secs(30), || {
        answers().ends_with("two")
    });
    assert!(!answers().contains("failed"), "{}", answers());
    cluster.apply(&deployment(1, drained("two")));
    rolled_out();
}

#[test]
fn pods_of_hull_and_of_runc_reach_each_other_by_address_and_by_service() {
    let cluster = Cluster::new();
    let server = |name: &str, class: &str| {
        let server = json!({
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": name, "labels": {"app": name}},
            "spec": web(name),
        });
        match class {
            "hull" => server,
            _ => with(server, &[("/spec/runtimeClassName", Value::Null)]),
        }
    };
    for (name, class) in [("in-hull", "hull"), ("in-runc", "runc")] {
        cluster.apply(&server(name, class));
        cluster.apply(&service(name));
    }
    for (from, to) in [
        ("in-hull", "in-runc"),
        ("in-runc", "in-hull"),
        ("in-hull", "in-hull"),
    ] {
        cluster.ready(from);
        cluster.ready(to);
        for address in [
            format!("{}:8080", cluster.address(to)),
            cluster_ip(&cluster, to),
        ] {
            eventually("an answer", Duration::from_secs(20), || {
                let got = cluster.try_sh(from, &format!("timeout 2 wget -qO- http://{address}"));
                got.text() == to
            });
        }
    }
    assert!(cluster.sh("in-hull", "uname -r").contains("hull"));
    assert!(!cluster.sh("in-runc", "uname -r").contains("hull"));
}

#[test]
fn a_job_runs_its_pods_to_completion_and_tries_failed_ones_again() {
    let cluster = Cluster::new();
    let job = |name: &str, script: &str, spec: Value| {
        let mut job = workload("Job", "batch/v1", name, spec);
        job["spec"]["template"]["spec"] =
            with(pod_spec(script), &[("/restartPolicy", json!("Never"))]);
        job
    };
    cluster.apply(&job(
        "four",
        "echo done",
        json!({"completions": 4, "parallelism": 2}),
    ));
    cluster.until("all are done", "job", "four", |job| {
        job["status"]["succeeded"] == 4
    });
    let logs = cluster
        .kubectl(["logs", "--selector", "job-name=four"])
        .run()
        .ok();
    assert_eq!(logs.text(), ["done"; 4].join("\n"));
    cluster.apply(&job("fails", "exit 3", json!({"backoffLimit": 1})));
    cluster.until("it has failed", "job", "fails", |job| {
        job["status"]["failed"] == 2
    });
}

#[test]
fn a_cron_job_starts_jobs() {
    let cluster = Cluster::new();
    let template = with(
        pod_spec("echo every minute"),
        &[("/restartPolicy", json!("Never"))],
    );
    cluster.apply(&workload(
        "CronJob",
        "batch/v1beta1",
        "often",
        json!({
            "schedule": "* * * * *",
            "jobTemplate": {"spec": {"template": {"spec": template}}},
        }),
    ));
    eventually("a job has ended", Duration::from_secs(100), || {
        let jobs = cluster
            .kubectl(["get", "jobs", "-o", "json"])
            .run()
            .ok()
            .json();
        let jobs = jobs["items"].as_array().unwrap().clone();
        jobs.iter().any(|job| job["status"]["succeeded"] == 1)
    });
    cluster.delete("cronjob", "often");
}

#[test]
fn a_stateful_set_keeps_names_and_volumes_when_pods_are_replaced() {
    let cluster = Cluster::new();
    for number in 0..2 {
        let name = format!("{}-{number}", cluster.namespace());
        std::fs::create_dir(cluster.path(&name)).unwrap();
        cluster.apply(&workload(
            "PersistentVolume",
            "v1",
            &name,
            json!({
                "capacity": {"storage": "10Mi"},
                "accessModes": ["ReadWriteOnce"],
                "storageClassName": cluster.namespace(),
                "persistentVolumeReclaimPolicy": "Retain",
                "hostPath": {"path": cluster.path(&name)},
            }),
        ));
    }
    let spec = with(
        pod_spec("hostname >>/data/names; exec sleep 1000"),
        &[(
            "/containers/0/volumeMounts",
            json!([{"name": "data", "mountPath": "/data"}]),
        )],
    );
    cluster.apply(&workload(
        "StatefulSet",
        "apps/v1",
        "db",
        json!({
            "serviceName": "db",
            "replicas": 2,
            "selector": {"matchLabels": {"app": "db"}},
            "template": {"metadata": {"labels": {"app": "db"}}, "spec": spec},
            "volumeClaimTemplates": [{
                "metadata": {"name": "data"},
                "spec": {
                    "accessModes": ["ReadWriteOnce"],
                    "storageClassName": cluster.namespace(),
                    "resources": {"requests": {"storage": "10Mi"}},
                },
            }],
        }),
    ));
    let rolled_out = || {
        cluster.until("both are ready", "statefulset", "db", |set| {
            set["status"]["readyReplicas"] == 2
        });
    };
    rolled_out();
    for name in ["db-0", "db-1"] {
        assert_eq!(cluster.sh(name, "cat /data/names"), name);
    }
    cluster.delete("pod", "db-0");
    rolled_out();
    cluster.ready("db-0");
    assert_eq!(cluster.sh("db-0", "cat /data/names"), "db-0\ndb-0");
    cluster.delete("statefulset", "db");
    cluster.kubectl(["delete", "pvc", "--all"]).run().ok();
    for number in 0..2 {
        cluster.delete("pv", &format!("{}-{number}", cluster.namespace()));
    }
}

#[test]
fn a_daemon_set_has_a_pod_on_the_node() {
    let cluster = Cluster::new();
    cluster.apply(&workload(
        "DaemonSet",
        "apps/v1",
        "agents",
        json!({
            "selector": {"matchLabels": {"app": "agents"}},
            "template": {
                "metadata": {"labels": {"app": "agents"}},
                "spec": pod_spec("exec sleep 1000"),
            },
        }),
    ));
    cluster.until("it is ready", "daemonset", "agents", |set| {
        set["status"]["numberReady"] == 1
    });
}

#[test]
fn init_containers_run_one_after_the_other_before_the_others() {
    let cluster = Cluster::new();
    let mut order = with(
        pod("order", "echo main >>/shared/order; exec sleep 1000"),
        &[
            (
                "/spec/initContainers",
                json!([
                    container("first", "sleep 0.5; echo first >>/shared/order"),
                    container("second", "echo second >>/shared/order"),
                ]),
            ),
            ("/spec/volumes", json!([{"name": "shared", "emptyDir": {}}])),
        ],
    );
    for place in [
        "/spec/initContainers/0",
        "/spec/initContainers/1",
        "/spec/containers/0",
    ] {
        let mounts = json!([{"name": "shared", "mountPath": "/shared"}]);
        order = with(order, &[(&format!("{place}/volumeMounts"), mounts)]);
    }
    cluster.run(&order);
    assert_eq!(
        cluster.sh("order", "cat /shared/order"),
        "first\nsecond\nmain"
    );
    // One that fails keeps the others from starting.
    let failing = with(
        pod("failing", "sleep 1000"),
        &[
            ("/spec/initContainers", json!([container("init", "exit 4")])),
            ("/spec/restartPolicy", json!("Never")),
        ],
    );
    assert_eq!(cluster.run_to_end(&failing), "Failed");
    let pod = cluster.get("pod", "failing");
    assert_eq!(
        pod["status"]["initContainerStatuses"][0]["state"]["terminated"]["exitCode"],
        4
    );
}
