//! The cluster of one node that `scripts/kubernetes` brings up, and `kubectl`. Each test has a
//! namespace in it, which is deleted on drop, with a check that the node has nothing left of it.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use serde_json::{Value, json};

use crate::{Invocation, Output, eventually};

/// The image with busybox, in the node's registry.
pub const BUSYBOX: &str = "localhost:5000/busybox:1";

/// How long something of a cluster may take on a busy machine.
const LIMIT: Duration = Duration::from_secs(60);

/// A namespace of the cluster.
pub struct Cluster {
    namespace: String,
    /// Directory of the test on the node, for volumes.
    directory: tempfile::TempDir,
}

impl Cluster {
    /// A namespace with the default service account.
    ///
    /// # Panics
    /// Outside of `scripts/kubernetes`.
    #[allow(clippy::new_without_default)] // it talks to a cluster
    pub fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        assert!(
            std::env::var_os("HULL_NODE").is_some(),
            "there is no cluster: scripts/kubernetes"
        );
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let namespace = format!("test-{}-{number}", std::process::id());
        let directory = tempfile::Builder::new()
            .prefix(&namespace)
            .tempdir_in("/var/lib")
            .unwrap();
        let cluster = Self {
            namespace,
            directory,
        };
        cluster
            .kubectl(["create", "namespace", &cluster.namespace])
            .run()
            .ok();
        eventually("the service account", LIMIT, || {
            cluster
                .kubectl(["get", "serviceaccount", "default"])
                .run()
                .status
                == 0
        });
        cluster
    }

    /// The namespace's name.
    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    /// A file or directory of the test on the node.
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// `kubectl …` in the test's namespace.
    pub fn kubectl<A: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = A>) -> Invocation {
        Invocation::new("kubectl")
            .args(["--namespace", &self.namespace])
            .args(arguments)
            .limit(2 * LIMIT)
    }

    /// Creates or changes an object; `kubectl apply -f`.
    #[track_caller]
    pub fn apply(&self, object: &Value) {
        self.try_apply(object).ok();
    }

    /// The same, which may fail.
    pub fn try_apply(&self, object: &Value) -> Output {
        self.kubectl(["apply", "-f", "-"])
            .input(object.to_string())
            .run()
    }

    /// An object as JSON.
    #[track_caller]
    pub fn get(&self, kind: &str, name: &str) -> Value {
        self.kubectl(["get", kind, name, "-o", "json"])
            .run()
            .ok()
            .json()
    }

    /// Waits until an object's JSON satisfies a condition.
    #[track_caller]
    pub fn until(&self, what: &str, kind: &str, name: &str, condition: impl Fn(&Value) -> bool) {
        let limit = 2 * LIMIT;
        let begin = std::time::Instant::now();
        loop {
            let object = self.get(kind, name);
            if condition(&object) {
                return;
            }
            assert!(
                begin.elapsed() < limit,
                "not within {limit:?}: {what}: {}\n{}",
                object["status"],
                self.kubectl(["describe", kind, name]).run().text()
            );
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// Creates a pod and waits until its containers are ready.
    #[track_caller]
    pub fn run(&self, pod: &Value) {
        self.apply(pod);
        self.ready(pod["metadata"]["name"].as_str().unwrap());
    }

    /// Waits until a pod's containers are ready.
    #[track_caller]
    pub fn ready(&self, pod: &str) {
        self.until("the pod is ready", "pod", pod, |pod| {
            let conditions = pod["status"]["conditions"].as_array();
            conditions.is_some_and(|all| {
                all.iter()
                    .any(|one| one["type"] == "Ready" && one["status"] == "True")
            })
        });
    }

    /// Creates a pod and waits until it has ended; its phase.
    #[track_caller]
    pub fn run_to_end(&self, pod: &Value) -> String {
        self.apply(pod);
        let name = pod["metadata"]["name"].as_str().unwrap();
        self.until("the pod has ended", "pod", name, |pod| {
            ["Succeeded", "Failed"].contains(&pod["status"]["phase"].as_str().unwrap_or_default())
        });
        let pod = self.get("pod", name);
        pod["status"]["phase"].as_str().unwrap().to_owned()
    }

    /// A shell script in the container of a pod, or in its first one; it may fail.
    pub fn try_sh(&self, pod: &str, script: &str) -> Output {
        let (pod, container) = pod.split_once('/').unwrap_or((pod, ""));
        let container = (!container.is_empty()).then_some(["-c", container]);
        self.kubectl(["exec", pod])
            .args(container.iter().flatten())
            .args(["--", "sh", "-c", script])
            .run()
    }

    /// A shell script in a container (`POD` or `POD/CONTAINER`) that succeeds; what it printed.
    #[track_caller]
    pub fn sh(&self, pod: &str, script: &str) -> String {
        self.try_sh(pod, script).ok().text()
    }

    /// What a pod's first container has printed.
    #[track_caller]
    pub fn logs(&self, pod: &str) -> String {
        self.kubectl(["logs", pod]).run().ok().text()
    }

    /// The address of a pod.
    #[track_caller]
    pub fn address(&self, pod: &str) -> String {
        let pod = self.get("pod", pod);
        pod["status"]["podIP"].as_str().unwrap().to_owned()
    }

    /// Events of an object, one `REASON: MESSAGE` in a line.
    pub fn events(&self, name: &str) -> String {
        let list = self.kubectl(["get", "events", "-o", "json"]).run().ok();
        let list = list.json();
        let of = |event: &&Value| event["involvedObject"]["name"] == name;
        let line = |event: &Value| {
            let text = |key: &str| event[key].as_str().unwrap_or_default().to_owned();
            format!("{}: {}\n", text("reason"), text("message"))
        };
        let items = list["items"].as_array().unwrap();
        items.iter().filter(of).map(line).collect()
    }

    /// Deletes an object and waits until it is gone.
    #[track_caller]
    pub fn delete(&self, kind: &str, name: &str) {
        self.kubectl(["delete", kind, name]).run().ok();
    }

    /// Starts, stops or kills what runs on the node: `tests/kubernetes/node ACTION NAME`.
    #[track_caller]
    pub fn node(&self, action: &str, name: &str) {
        let node = std::env::var_os("HULL_NODE").unwrap();
        // Its output would stay open in what it starts.
        let log = self.path("node.log");
        Invocation::new(node)
            .args([action, name])
            .output_to(&log, &log)
            .limit(LIMIT)
            .run()
            .ok();
    }

    /// Ids in containerd of the namespace's pods and containers.
    pub fn ids(&self) -> BTreeSet<String> {
        let label = format!("labels.\"io.kubernetes.pod.namespace\"=={}", self.namespace);
        let list = Invocation::new("ctr")
            .args(["--namespace", "k8s.io", "containers", "ls", "-q", &label])
            .run()
            .ok();
        list.text().lines().map(str::to_owned).collect()
    }

    /// What the node still has of containers.
    fn left_of(&self, ids: &BTreeSet<String>) -> Vec<String> {
        let mut left: Vec<_> = self.ids().into_iter().collect();
        for entry in fs::read_dir("/proc").unwrap().flatten() {
            let command = fs::read(entry.path().join("cmdline")).unwrap_or_default();
            let command = String::from_utf8_lossy(&command).replace('\0', " ");
            left.extend(ids.iter().any(|id| command.contains(id)).then_some(command));
        }
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
        let of = |line: &&str| ids.iter().any(|id| line.contains(id));
        left.extend(mounts.lines().filter(of).map(str::to_owned));
        let state = Path::new("/run/hull/containerd/k8s.io");
        let directories = ids.iter().map(|id| state.join(id));
        left.extend(directories.filter_map(|path| path.exists().then(|| format!("{path:?}"))));
        left
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        let failed = std::thread::panicking();
        let ids = self.ids();
        if failed {
            let about = self.kubectl(["describe", "pods"]).run();
            eprintln!("{}", about.text());
        }
        let name = self.namespace.clone();
        let deleted = self.kubectl(["delete", "namespace", &name]).run();
        if !failed {
            deleted.ok();
            eventually("nothing is left on the node", LIMIT, || {
                self.left_of(&ids).is_empty()
            });
        }
    }
}

/// A pod of hull with one container, `main`, that runs a shell script.
pub fn pod(name: &str, script: &str) -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "labels": {"app": name}},
        "spec": pod_spec(script),
    })
}

/// The specification of such a pod.
pub fn pod_spec(script: &str) -> Value {
    json!({
        "runtimeClassName": "hull",
        "terminationGracePeriodSeconds": 1,
        "automountServiceAccountToken": false,
        "enableServiceLinks": false,
        "containers": [container("main", script)],
    })
}

/// A container with busybox that runs a shell script.
pub fn container(name: &str, script: &str) -> Value {
    json!({"name": name, "image": BUSYBOX, "command": ["sh", "-c", script]})
}

/// Changes fields of an object, by JSON pointers, and creates those that are missing. The index
/// after the last one of a list adds to it.
pub fn with(mut object: Value, changes: &[(&str, Value)]) -> Value {
    for (pointer, value) in changes {
        let mut place = &mut object;
        for key in pointer.split('/').skip(1) {
            place = match key.parse::<usize>() {
                Ok(index) => {
                    if place.is_null() {
                        *place = json!([]);
                    }
                    let list = place.as_array_mut().expect("a list");
                    if index == list.len() {
                        list.push(Value::Null);
                    }
                    &mut list[index]
                }
                Err(_) => &mut place[key],
            };
        }
        *place = value.clone();
    }
    object
}
