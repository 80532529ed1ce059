//! A private podman: images, containers, locks and configuration are in a temporary directory. On
//! drop, everything is removed, with a check that nothing is left.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use crate::{Invocation, Netns, Output, Runtime, busybox_archive, leaks, runtime};

/// A private podman.
pub struct Podman {
    directory: tempfile::TempDir,
    /// The runtime of its containers.
    pub runtime: Runtime,
    host: Option<Host>,
    next: AtomicU32,
}

/// The host of a podman with networks: private interfaces and packet filters, and private
/// directories in which all podmans of a host keep namespaces and allocated addresses and names.
struct Host {
    netns: Netns,
    /// Keeps the mount namespace alive.
    holder: Child,
}

impl Host {
    fn new() -> Host {
        let netns = Netns::new();
        let shared = "/run/containers/networks /run/netns";
        let script = format!(
            "mkdir -p {shared} && for directory in {shared}; do mount -t tmpfs tmpfs $directory || exit; done; \
             echo ready; exec sleep 1000"
        );
        let mut holder = netns
            .command("unshare")
            .args(["--mount", "--propagation", "private", "sh", "-c", &script])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        let stdout = holder.stdout.take().unwrap();
        BufReader::new(stdout).read_line(&mut line).unwrap();
        assert_eq!(line, "ready\n", "no mount namespace");
        Host { netns, holder }
    }

    fn pid(&self) -> i32 {
        self.holder.id().cast_signed()
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        let _ = self.holder.kill();
        let _ = self.holder.wait();
    }
}

impl Podman {
    /// With the image `busybox`.
    pub fn new() -> Podman {
        Podman::with(None)
    }

    /// With networks, on a private host ([`Podman::host`]), and the image `busybox`.
    pub fn with_networks() -> Podman {
        runtime::needs(&["nsenter", "unshare"]);
        for program in ["netavark", "aardvark-dns"] {
            let directories = ["/usr/lib/podman", "/usr/libexec/podman"];
            assert!(
                directories
                    .iter()
                    .any(|directory| Path::new(directory).join(program).exists()),
                "{program} is not installed: scripts/setup test"
            );
        }
        Podman::with(Some(Host::new()))
    }

    fn with(host: Option<Host>) -> Podman {
        runtime::needs(&["podman", "conmon"]);
        leaks::adopt_orphans();
        // A socket's path has at most 107 bytes.
        let directory = tempfile::Builder::new()
            .prefix("p")
            .rand_bytes(5)
            .tempdir_in("/tmp")
            .unwrap();
        let runtime = Runtime::in_directory(directory.path());
        // Limits: podman's defaults need CAP_SYS_RESOURCE, and `kube play` of 4.3 takes the soft
        // limit for the hard one. Locks: in a file, because all podmans of a machine share the
        // default shared memory. Capabilities: podman's own and NET_RAW, which podman 5 no longer
        // gives, and without which busybox cannot ping.
        let configuration = "[containers]\n\
             default_capabilities = [\"CHOWN\", \"DAC_OVERRIDE\", \"FOWNER\", \"FSETID\", \"KILL\", \
             \"NET_BIND_SERVICE\", \"NET_RAW\", \"SETFCAP\", \"SETGID\", \"SETPCAP\", \"SETUID\", \
             \"SYS_CHROOT\"]\n\
             default_ulimits = [\"nofile=4096:4096\", \"nproc=4096:4096\"]\n\
             netns = \"none\"\n\
             [engine]\n\
             lock_type = \"file\"\n\
             [network]\n\
             network_backend = \"netavark\"\n";
        fs::write(directory.path().join("containers.conf"), configuration).unwrap();
        let storage = format!(
            "[storage]\ndriver = \"overlay\"\ngraphroot = {:?}\nrunroot = {:?}\n",
            directory.path().join("root"),
            directory.path().join("runroot")
        );
        fs::write(directory.path().join("storage.conf"), storage).unwrap();
        let podman = Podman {
            directory,
            runtime,
            host,
            next: AtomicU32::new(0),
        };
        podman
            .podman(["import", "-q", "--change", "CMD [\"sh\"]"])
            .args(["--change", "ENV PATH=/bin:/usr/bin"])
            .arg(busybox_archive())
            .arg("busybox")
            .run()
            .ok();
        podman
    }

    /// `podman …`.
    pub fn podman<A: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = A>) -> Invocation {
        let (program, own) = self.command();
        Invocation::new(program)
            .args(own)
            .with(|command| self.environment(command))
            .args(arguments)
            .limit(Duration::from_secs(60))
    }

    /// `buildah …`, with the same images.
    pub fn buildah(&self, arguments: &[&str]) -> Invocation {
        runtime::needs(&["buildah"]);
        Invocation::new("buildah")
            .arg("--root")
            .arg(self.path("root"))
            .arg("--runroot")
            .arg(self.path("runroot"))
            .with(|command| self.environment(command))
            .args(arguments)
            .limit(Duration::from_secs(60))
    }

    /// The host of its networks.
    pub fn host(&self) -> &Netns {
        &self.host.as_ref().expect("a podman with networks").netns
    }

    fn command(&self) -> (&'static str, Vec<String>) {
        let path = |name: &str| self.path(name).display().to_string();
        let own = [
            ("--root", path("root")),
            ("--runroot", path("runroot")),
            ("--tmpdir", path("tmp")),
            ("--network-config-dir", path("networks")),
            ("--cgroup-manager", "cgroupfs".into()),
            ("--events-backend", "file".into()),
            ("--runtime", self.runtime.path.display().to_string()),
        ];
        let own = own
            .into_iter()
            .flat_map(|(name, value)| [name.to_owned(), value]);
        let Some(host) = &self.host else {
            return ("podman", own.collect());
        };
        let enter = [
            format!("--net={}", host.netns.path().display()),
            format!("--mount=/proc/{}/ns/mnt", host.pid()),
            format!("--wdns={}", self.directory.path().display()),
            "podman".to_owned(),
        ];
        ("nsenter", enter.into_iter().chain(own).collect())
    }

    fn environment(&self, command: &mut Command) {
        command
            // conmon leaves a file there after an OOM kill.
            .current_dir(self.directory.path())
            // Version 5 warns of hosts with version 1 of control groups.
            .env("PODMAN_IGNORE_CGROUPSV1_WARNING", "1")
            .env("CONTAINERS_CONF", self.path("containers.conf"))
            .env("CONTAINERS_STORAGE_CONF", self.path("storage.conf"))
            .env("HOME", self.directory.path())
            .env("TMPDIR", self.scratch())
            .env_remove("XDG_RUNTIME_DIR");
    }

    /// A file or directory below the test's directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// A temporary directory of the test.
    pub fn scratch(&self) -> PathBuf {
        let path = self.path("scratch");
        fs::create_dir_all(&path).unwrap();
        path
    }

    /// A unique name.
    pub fn unique(&self, prefix: &str) -> String {
        format!("{prefix}-{}", self.next.fetch_add(1, Ordering::Relaxed))
    }

    /// `podman run --rm [OPTIONS] busybox COMMAND`, run until it exits.
    pub fn run(&self, options: &[&str], command: &[&str]) -> Output {
        self.podman(["run", "--rm"])
            .args(network(options))
            .args(options)
            .arg("busybox")
            .args(command)
            .run()
    }

    /// A shell script in a new container, run until it exits.
    pub fn sh(&self, options: &[&str], script: &str) -> Output {
        self.run(options, &["sh", "-c", script])
    }

    /// Starts a container with `podman run -d`; returns its name.
    pub fn start(&self, options: &[&str], command: &[&str]) -> String {
        let name = self.unique("c");
        self.podman(["run", "-d", "--name", &name])
            .args(network(options))
            .args(options)
            .arg("busybox")
            .args(command)
            .run()
            .ok();
        name
    }

    /// Starts a container with a shell script that keeps running, and waits until it prints
    /// `ready`.
    pub fn ready(&self, options: &[&str], script: &str) -> String {
        let name = self.start(options, &["sh", "-c", script]);
        crate::eventually("ready", Duration::from_secs(20), || {
            self.logs(&name).contains("ready")
        });
        name
    }

    /// Starts an idle container, which stops when asked to; returns its name.
    pub fn sleeper(&self, options: &[&str]) -> String {
        self.start(
            options,
            &["sh", "-c", "trap 'exit 0' TERM; sleep 1000 & wait"],
        )
    }

    /// `podman VERB NAME`, run until it exits.
    pub fn does(&self, verb: &str, name: &str) -> Output {
        self.podman([verb, name]).run()
    }

    /// `podman exec NAME COMMAND`, run until it exits.
    pub fn exec(&self, name: &str, command: &[&str]) -> Output {
        self.podman(["exec", name]).args(command).run()
    }

    /// A shell script in a running container.
    pub fn exec_sh(&self, name: &str, script: &str) -> Output {
        self.exec(name, &["sh", "-c", script])
    }

    /// Standard output of a container.
    pub fn logs(&self, name: &str) -> String {
        self.does("logs", name).ok().text()
    }

    /// Part of a container's `podman inspect`, as a Go template.
    pub fn inspect(&self, name: &str, template: &str) -> String {
        self.podman(["inspect", "--format", template, name])
            .run()
            .ok()
            .text()
    }

    /// `created`, `running`, `paused`, `exited`.
    pub fn state(&self, name: &str) -> String {
        self.inspect(name, "{{.State.Status}}")
    }

    /// Waits until a container exits; returns its exit status.
    pub fn wait(&self, name: &str) -> i32 {
        self.does("wait", name).ok().text().parse().unwrap()
    }

    /// Removes all containers and pods and asserts that nothing is left of them.
    #[track_caller]
    pub fn assert_clean(&self) {
        let mut problems = self.remove_all();
        let holder = self.host.as_ref().map(Host::pid);
        problems.extend(self.problems(holder.as_slice()));
        assert!(problems.is_empty(), "left behind:\n{}", problems.join("\n"));
    }

    /// Not with `Invocation`: a panic here would hide the first one.
    fn remove_all(&self) -> Vec<String> {
        let mut problems = Vec::new();
        let mut all: Vec<&[&str]> = vec![
            &["pod", "rm", "--all", "--force", "--time", "0"],
            &["rm", "--all", "--force", "--time", "0"],
            &["volume", "rm", "--all", "--force"],
        ];
        if self.host.is_some() {
            all.push(&["network", "prune", "--force"]);
        }
        for arguments in all {
            let (program, own) = self.command();
            let mut command = Command::new("timeout");
            command.arg("60").arg(program).args(own).args(arguments);
            self.environment(&mut command);
            match command.output() {
                Ok(output) if output.status.success() => {}
                Ok(output) => problems.push(format!(
                    "podman {}: {}",
                    arguments.join(" "),
                    String::from_utf8_lossy(&output.stderr)
                )),
                Err(error) => problems.push(format!("podman {}: {error}", arguments.join(" "))),
            }
        }
        problems
    }

    fn problems(&self, except: &[i32]) -> Vec<String> {
        let directory = self.directory.path();
        let mut problems = runtime::problems(&self.runtime, directory, &self.ids(), &[], except);
        if let Some(host) = &self.host {
            problems.extend(leaks::mounts_below_seen_by(host.pid(), directory));
            // A bridge is removed with the last container in its network.
            let interfaces = host.netns.interfaces();
            let interfaces = interfaces.iter().filter(|name| *name != "lo");
            problems.extend(interfaces.map(|name| format!("interface {name}")));
        }
        // podman itself bind mounts its layers' directory onto itself, and does not remove a pod's
        // control group in hierarchies without controllers.
        let own = self.path("root/overlay").display().to_string();
        problems.retain(|problem| {
            let of_layers =
                problem.starts_with("mount ") && problem.split(' ').nth(5) == Some(own.as_str());
            let of_pod = ["unified", "systemd"].iter().any(|hierarchy| {
                problem.starts_with(&format!("/sys/fs/cgroup/{hierarchy}/libpod_parent/"))
                    && fs::remove_dir(problem).is_ok()
            });
            !of_layers && !of_pod
        });
        problems
    }

    /// Ids of all containers and pods so far, from podman's event log.
    fn ids(&self) -> Vec<String> {
        let events = fs::read_to_string(self.path("tmp/events/events.log")).unwrap_or_default();
        let ids: BTreeSet<String> = events
            .lines()
            .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok())
            .filter(|event| event["Type"] == "container" || event["Type"] == "pod")
            .filter_map(|event| event["ID"].as_str().map(str::to_owned))
            .filter(|id| id.len() == 64)
            .collect();
        ids.into_iter().collect()
    }
}

impl Default for Podman {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for Podman {
    fn drop(&mut self) {
        let failed = std::thread::panicking();
        if failed {
            self.runtime.show_diagnostics();
        }
        let mut problems = self.remove_all();
        let holder = self.host.as_ref().map(Host::pid);
        problems.extend(self.problems(holder.as_slice()));
        let own = self.path("root/overlay");
        let _ = rustix::mount::unmount(&own, rustix::mount::UnmountFlags::DETACH);
        if problems.is_empty() {
            return;
        }
        let problems = problems.join("\n");
        if failed {
            eprintln!("left behind:\n{problems}");
        } else {
            self.runtime.show_diagnostics();
            panic!("left behind:\n{problems}");
        }
    }
}

/// `--network none`, unless the test sets another network or a pod.
fn network(options: &[&str]) -> &'static [&'static str] {
    let own = ["--network", "--pod"];
    if options.iter().any(|option| own.contains(option)) {
        &[]
    } else {
        &["--network", "none"]
    }
}
