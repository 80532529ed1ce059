//! A private containerd, whose state, images and sockets are in a temporary directory, and `ctr`.
//! Its containers run with the shim beside the staged `hull`, which takes the configuration of the
//! test from containerd's environment. On drop it is stopped, with a check that nothing is left.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use rustix::mount::{UnmountFlags, unmount};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;

use crate::cri::{Cri, LinuxPod, Namespaces, PodConfig, PodMetadata, PodSecurity};
use crate::shim::shim_of;
use crate::{Invocation, Netns, Output, busybox_archive, digest, executable, leaks, runtime};

/// The runtime of hull's containers.
const RUNTIME: &str = "io.containerd.hull.v2";

/// The namespace of pods in containerd.
const POD_NAMESPACE: &str = "k8s.io";

/// The image that holds a pod.
const PAUSE: &str = "localhost/pause:1";

/// The image with busybox.
pub const BUSYBOX: &str = "docker.io/library/busybox:latest";

/// A private containerd.
pub struct Containerd {
    directory: tempfile::TempDir,
    daemon: Option<Child>,
    next: AtomicU32,
    /// The host of pods, where their networks are. Dropped last.
    host: Option<Netns>,
    /// Who makes pods: `podsandbox`, or the shim.
    sandboxer: &'static str,
    /// How the streams of their processes reach the shim: `fifo`, or `streaming`.
    io_type: &'static str,
}

impl Containerd {
    /// With the image [`BUSYBOX`] in the test's namespace.
    pub fn new() -> Self {
        Self::on(None, "podsandbox", "fifo")
    }

    /// With the CRI service, a bridge network and the image [`BUSYBOX`] for pods, in a network
    /// namespace as its host.
    pub fn with_pods() -> Self {
        Self::on(Some(Netns::new()), "podsandbox", "fifo")
    }

    /// The same, where the shim makes pods, without a container that holds them, and perhaps serves
    /// the streams of their processes; `None` when this containerd is too old for that, which is
    /// said.
    pub fn with_pods_of_the_shim(io_type: &'static str) -> Option<Self> {
        Self::is_2_or_later("sandbox service")
            .then(|| Self::on(Some(Netns::new()), "shim", io_type))
    }

    /// Whether this containerd is of version 2 or later; that it lacks something otherwise is said.
    pub fn is_2_or_later(for_what: &str) -> bool {
        let version = Invocation::new("containerd").arg("--version").run().ok();
        let old = version.text().contains(" 1.");
        if old {
            crate::left_out(&format!("containerd before 2 has no {for_what}"));
        }
        !old
    }

    fn on(host: Option<Netns>, sandboxer: &'static str, io_type: &'static str) -> Self {
        runtime::needs(&["containerd", "ctr"]);
        leaks::adopt_orphans();
        // A socket's path has at most 107 bytes.
        let directory = tempfile::Builder::new()
            .prefix("t")
            .rand_bytes(5)
            .tempdir_in("/tmp")
            .unwrap();
        let mut containerd = Self {
            directory,
            daemon: None,
            next: AtomicU32::new(0),
            host,
            sandboxer,
            io_type,
        };
        let path = |name: &str| containerd.path(name);
        fs::write(
            path("config.toml"),
            format!(
                "machine = {:?}\nrun_dir = {:?}\ndata_dir = {:?}\n",
                crate::usual_machine(),
                path("run"),
                path("data")
            ),
        )
        .unwrap();
        // `opt` would create a directory in /opt.
        let configuration = format!(
            "version = 2\nroot = {:?}\nstate = {:?}\n\
             disabled_plugins = [{}\"io.containerd.internal.v1.opt\"]\n\
             [grpc]\naddress = {:?}\n[ttrpc]\naddress = {:?}\n{}",
            path("root"),
            path("state"),
            match containerd.host {
                Some(_) => "",
                None => "\"io.containerd.grpc.v1.cri\", ",
            },
            path("c.sock"),
            path("c.ttrpc"),
            match containerd.host {
                Some(_) => containerd.pods(),
                None => String::new(),
            },
        );
        fs::write(path("containerd.toml"), configuration).unwrap();
        containerd.start();
        let image = containerd.path("busybox-image.tar");
        write_image(&image);
        let image = image.to_str().unwrap().to_owned();
        let namespaces = match containerd.host {
            Some(_) => vec![POD_NAMESPACE.to_owned()],
            None => vec![containerd.namespace()],
        };
        for namespace in namespaces {
            containerd
                .ctr(["--namespace", &namespace, "images", "import", &image])
                .run()
                .ok();
        }
        containerd
    }

    /// The part of containerd's configuration that pods need.
    fn pods(&self) -> String {
        let networks = self.path("cni");
        fs::create_dir(&networks).unwrap();
        let network = json!({
            "cniVersion": "0.4.0",
            "name": "pods",
            "plugins": [{
                "type": "bridge",
                "bridge": "pods0",
                "isGateway": true,
                "ipMasq": false,
                "ipam": {
                    "type": "host-local",
                    "ranges": [[{"subnet": "10.89.0.0/24"}]],
                    "routes": [{"dst": "0.0.0.0/0"}],
                    "dataDir": self.path("ipam"),
                },
            }],
        });
        fs::write(networks.join("pods.conflist"), network.to_string()).unwrap();
        format!(
            "[plugins.\"io.containerd.grpc.v1.cri\"]\n\
             sandbox_image = {PAUSE:?}\nrestrict_oom_score_adj = true\ndisable_apparmor = true\n\
             stream_server_port = \"0\"\n\
             [plugins.\"io.containerd.grpc.v1.cri\".cni]\n\
             bin_dir = \"/usr/lib/cni\"\nconf_dir = {networks:?}\n\
             [plugins.\"io.containerd.grpc.v1.cri\".containerd]\n\
             default_runtime_name = \"hull\"\n\
             [plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.hull]\n\
             runtime_type = {RUNTIME:?}\nsandboxer = {:?}\nio_type = {:?}\n\
             pod_annotations = [\"hull.dev/*\"]\n\
             [plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.runc]\n\
             runtime_type = \"io.containerd.runc.v2\"\n",
            self.sandboxer, self.io_type
        )
    }

    /// Adds to hull's configuration.
    pub fn configure(&self, text: &str) {
        let path = self.path("config.toml");
        let before = fs::read_to_string(&path).unwrap();
        fs::write(&path, before + text).unwrap();
    }

    /// Its process.
    pub fn daemon(&self) -> i32 {
        let daemon = self.daemon.as_ref().expect("containerd runs");
        daemon.id().cast_signed()
    }

    /// Its CRI service.
    pub fn cri(&self) -> Cri {
        Cri::connect(&self.path("c.sock"))
    }

    /// A pod whose containers have processes of their own.
    pub fn pod(&self, name: &str) -> PodConfig {
        PodConfig {
            metadata: Some(PodMetadata {
                name: name.to_owned(),
                uid: format!("uid-{name}"),
                namespace: "default".to_owned(),
            }),
            hostname: name.to_owned(),
            log_directory: self.path("logs").display().to_string(),
            dns: None,
            annotations: HashMap::new(),
            linux: Some(LinuxPod {
                cgroup_parent: self.cgroup_parent(),
                security: Some(PodSecurity {
                    namespaces: Some(Namespaces::own_processes()),
                }),
                ..LinuxPod::default()
            }),
        }
    }

    /// Parent of the control groups of the test's pods.
    pub fn cgroup_parent(&self) -> String {
        format!("/{}", self.namespace())
    }

    /// Starts it; also after [`Containerd::kill`].
    pub fn start(&mut self) {
        let beside = executable().parent().unwrap().to_owned();
        let path = std::env::var("PATH").unwrap_or_default();
        let log = File::options()
            .create(true)
            .append(true)
            .open(self.path("containerd.log"))
            .unwrap();
        let mut command = match &self.host {
            Some(host) => host.command("containerd"),
            None => Command::new("containerd"),
        };
        let child = command
            .arg("--config")
            .arg(self.path("containerd.toml"))
            .args(["--log-level", "debug"])
            .env("PATH", format!("{}:{path}", beside.display()))
            .env("HULL_CONFIG", self.path("config.toml"))
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        self.daemon = Some(child);
        let begin = Instant::now();
        while self.ctr(["version"]).run().status != 0 {
            assert!(
                begin.elapsed() < Duration::from_secs(30),
                "containerd does not come up"
            );
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Kills it, as in a crash; containers keep running.
    pub fn kill(&mut self) {
        end(&mut self.daemon, Signal::KILL);
    }

    /// A file or directory below the test's directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Where the shim keeps the state of the test's containers.
    pub fn state_directory(&self) -> PathBuf {
        self.path("run/containerd").join(self.namespace())
    }

    /// The namespace in containerd, which is part of the paths of control groups.
    fn namespace(&self) -> String {
        let name = self.directory.path().file_name().unwrap();
        format!("hull-tests-{}", name.to_str().unwrap())
    }

    /// `ctr …` in the test's namespace.
    pub fn ctr<A: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = A>) -> Invocation {
        Invocation::new("ctr")
            .env("CONTAINERD_ADDRESS", self.path("c.sock"))
            .env("CONTAINERD_NAMESPACE", self.namespace())
            .args(arguments)
            .limit(Duration::from_secs(60))
    }

    /// A unique id.
    pub fn unique(&self) -> String {
        format!("c-{}", self.next.fetch_add(1, Ordering::Relaxed))
    }

    /// `ctr run --rm [OPTIONS] busybox COMMAND`, run until it exits.
    pub fn run(&self, options: &[&str], command: &[&str]) -> Output {
        self.ctr(["run", "--rm", "--runtime", RUNTIME])
            .args(options)
            .args([BUSYBOX, &self.unique()])
            .args(command)
            .run()
    }

    /// Starts a container; its id.
    pub fn start_container(&self, options: &[&str], command: &[&str]) -> String {
        let id = self.unique();
        self.ctr(["run", "-d", "--runtime", RUNTIME])
            .args(options)
            .args([BUSYBOX, &id])
            .args(command)
            .run()
            .ok();
        id
    }

    /// A shell script in a running container.
    pub fn exec(&self, id: &str, script: &str) -> Output {
        self.ctr(["task", "exec", "--exec-id", &self.unique(), id])
            .args(["sh", "-c", script])
            .run()
    }

    /// Deletes the task of a container that has stopped; its exit status.
    pub fn status(&self, id: &str) -> i32 {
        let deleted = self.ctr(["task", "rm", id]).run().ok();
        // ctr tells a status other than 0 in a warning.
        let warning = deleted.error();
        let status = warning.split("non-zero exit code ").nth(1).unwrap_or("0");
        let digits: String = status.chars().take_while(char::is_ascii_digit).collect();
        self.ctr(["container", "rm", id]).run().ok();
        digits.parse().unwrap()
    }

    /// `RUNNING`, `PAUSED`, `STOPPED`; empty when there is no task.
    pub fn state(&self, id: &str) -> String {
        let text = self.ctr(["task", "ls"]).run().ok().text();
        text.lines()
            .filter_map(|line| line.split_whitespace().collect::<Vec<_>>().try_into().ok())
            .find(|[name, ..]: &[&str; 3]| *name == id)
            .map(|[.., state]| state.to_owned())
            .unwrap_or_default()
    }

    /// Waits until a container is in a state.
    pub fn becomes(&self, id: &str, state: &str) {
        crate::eventually(state, Duration::from_secs(20), || self.state(id) == state);
    }

    /// Removes a container and its task.
    pub fn remove(&self, id: &str) {
        self.ctr(["task", "rm", "--force", id]).run();
        self.ctr(["container", "rm", id]).run().ok();
    }

    /// The process of a container's shim.
    pub fn shim(&self, id: &str) -> i32 {
        shim_of(&self.namespace(), id).expect("the container has a shim")
    }

    /// What containers that are removed have left, while containerd runs.
    #[track_caller]
    pub fn assert_clean(&self) {
        let daemon = self.daemon.as_ref().map(|child| child.id().cast_signed());
        let problems = self.problems(&daemon.into_iter().collect::<Vec<_>>());
        assert!(problems.is_empty(), "left behind:\n{}", problems.join("\n"));
    }

    fn problems(&self, daemons: &[i32]) -> Vec<String> {
        let mut problems = leaks::leaked_processes_except(Duration::from_secs(10), daemons);
        problems.extend(leaks::mounts_below(self.directory.path()));
        for place in [
            self.path("run/sandboxes"),
            self.state_directory(),
            self.path("run/containerd").join(POD_NAMESPACE),
        ] {
            let entries = fs::read_dir(place).into_iter().flatten().flatten();
            problems.extend(entries.map(|entry| entry.path().display().to_string()));
        }
        problems.extend(self.groups().into_iter().filter_map(|group| {
            let inside = fs::read_dir(&group).into_iter().flatten().flatten();
            let has = inside
                .into_iter()
                .any(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
            has.then(|| format!("control groups in {}", group.display()))
        }));
        problems
    }

    /// The parents of the control groups of the test's containers.
    fn groups(&self) -> Vec<PathBuf> {
        let mut places = vec![PathBuf::from("/sys/fs/cgroup")];
        let hierarchies = fs::read_dir("/sys/fs/cgroup").into_iter().flatten();
        places.extend(hierarchies.flatten().map(|entry| entry.path()));
        places
            .into_iter()
            .map(|place| place.join(self.namespace()))
            .filter(|group| group.is_dir())
            .collect()
    }
}

impl Default for Containerd {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        let failed = std::thread::panicking();
        if failed {
            runtime::show(&self.path("containerd.log"));
        }
        if self.daemon.is_some() {
            for namespace in [self.namespace().as_str(), POD_NAMESPACE] {
                let ctr = |arguments: &[&str]| {
                    let of = ["--namespace", namespace];
                    self.ctr(of.iter().chain(arguments)).run()
                };
                let listed = |kind: &str| {
                    let text = ctr(&[kind, "ls", "-q"]).stdout;
                    let text = String::from_utf8_lossy(&text).into_owned();
                    text.split_whitespace()
                        .map(str::to_owned)
                        .collect::<Vec<_>>()
                };
                for id in listed("task") {
                    ctr(&["task", "rm", "--force", &id]);
                }
                for id in listed("container") {
                    ctr(&["container", "rm", &id]);
                }
            }
        }
        let daemon = self.daemon.as_ref().map(|child| child.id().cast_signed());
        let problems = self.problems(&daemon.into_iter().collect::<Vec<_>>());
        end(&mut self.daemon, Signal::TERM);
        // Of pods that a failed test has left.
        for mount in leaks::mounts_below(self.directory.path()) {
            if let Some(path) = mount.split(' ').nth(5) {
                let _ = unmount(path, UnmountFlags::DETACH);
            }
        }
        for group in self.groups() {
            // One that is in use was reported.
            let _ = fs::remove_dir(group);
        }
        if !failed {
            assert!(problems.is_empty(), "left behind:\n{}", problems.join("\n"));
        }
    }
}

fn end(daemon: &mut Option<Child>, signal: Signal) {
    if let Some(mut child) = daemon.take() {
        let pid = Pid::from_raw(child.id().cast_signed()).unwrap();
        // It may have ended by itself.
        let _ = kill_process(pid, signal);
        let _ = child.wait();
    }
}

/// Images of busybox as containerd imports them: a shell, and what holds a pod.
fn write_image(path: &Path) {
    let layer = fs::read(busybox_archive()).unwrap();
    let describe = |kind: &str, bytes: &[u8]| {
        json!({"mediaType": format!("application/vnd.oci.image.{kind}"),
            "digest": digest(bytes), "size": bytes.len()})
    };
    let mut blobs = vec![layer.clone()];
    let mut manifests = Vec::new();
    let pause = ["sh", "-c", "trap 'exit 0' TERM INT; sleep 1000000 & wait"];
    for (name, command) in [(BUSYBOX, &["sh"][..]), (PAUSE, &pause)] {
        let config = json!({
            "architecture": crate::architecture(),
            "os": "linux",
            "config": {"Env": ["PATH=/bin:/usr/bin"], "Cmd": command},
            "rootfs": {"type": "layers", "diff_ids": [digest(&layer)]},
        })
        .to_string()
        .into_bytes();
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": describe("config.v1+json", &config),
            "layers": [describe("layer.v1.tar", &layer)],
        })
        .to_string()
        .into_bytes();
        let mut listed = describe("manifest.v1+json", &manifest);
        listed["annotations"] = json!({"io.containerd.image.name": name});
        manifests.push(listed);
        blobs.extend([config, manifest]);
    }
    let index = json!({"schemaVersion": 2, "manifests": manifests}).to_string();
    let mut archive = tar::Builder::new(File::create(path).unwrap());
    let mut add = |name: &str, content: &[u8]| {
        let mut header = tar::Header::new_gnu();
        header.set_size(content.len() as u64);
        header.set_mode(0o644);
        archive.append_data(&mut header, name, content).unwrap();
    };
    add("oci-layout", br#"{"imageLayoutVersion": "1.0.0"}"#);
    for blob in &blobs {
        add(&format!("blobs/{}", digest(blob).replace(':', "/")), blob);
    }
    add("index.json", index.as_bytes());
    archive.finish().unwrap();
}
