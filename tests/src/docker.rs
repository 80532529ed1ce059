//! A private dockerd with its own containerd: state, images and sockets are in a temporary
//! directory. It has no bridge and no packet filter; or, in a network namespace that acts as its
//! host, all of Docker's networking. On drop, both are stopped, with a check that nothing is left.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use rustix::mount::{UnmountFlags, unmount};
use rustix::process::{Pid, Signal, kill_process};

use crate::{Invocation, Netns, Output, Runtime, busybox_archive, leaks, runtime};

/// A private Docker.
pub struct Docker {
    directory: tempfile::TempDir,
    /// The runtime of its containers.
    pub runtime: Runtime,
    /// Parent of its containers' control groups.
    parent: String,
    containerd: Option<Child>,
    daemon: Option<Child>,
    /// The host of both, if they have networks. Dropped after them: it can be deleted when they
    /// have exited.
    host: Option<Netns>,
    next: AtomicU32,
}

impl Docker {
    /// With the image `busybox`.
    pub fn new() -> Docker {
        Docker::on(None)
    }

    /// With networks: bridges, NAT and name resolution, in a network namespace as its host.
    pub fn with_networks() -> Docker {
        Docker::on(Some(Netns::new()))
    }

    fn on(host: Option<Netns>) -> Docker {
        runtime::needs(&["dockerd", "containerd"]);
        leaks::adopt_orphans();
        // A socket's path has at most 107 bytes.
        let directory = tempfile::Builder::new()
            .prefix("d")
            .rand_bytes(5)
            .tempdir_in("/tmp")
            .unwrap();
        let runtime = Runtime::in_directory(directory.path());
        let name = directory.path().file_name().unwrap().to_str().unwrap();
        let mut docker = Docker {
            parent: format!("hull-tests-{name}"),
            directory,
            runtime,
            containerd: None,
            daemon: None,
            host,
            next: AtomicU32::new(0),
        };
        docker.start_containerd();
        docker.start_daemon();
        docker
            .docker(["import", "--change", "CMD [\"sh\"]"])
            .arg(busybox_archive())
            .arg("busybox")
            .run()
            .ok();
        docker
    }

    fn start_containerd(&mut self) {
        let path = |name: &str| self.path(name).display().to_string();
        // `opt` would create a directory in /opt.
        let configuration = format!(
            "version = 2\nroot = {:?}\nstate = {:?}\n\
             disabled_plugins = [\"io.containerd.grpc.v1.cri\", \"io.containerd.internal.v1.opt\"]\n\
             [grpc]\naddress = {:?}\n[ttrpc]\naddress = {:?}\n",
            path("containerd"),
            path("containerd-state"),
            path("c.sock"),
            path("c.ttrpc"),
        );
        fs::write(self.path("containerd.toml"), configuration).unwrap();
        let mut command = self.on_its_host("containerd");
        // For the shim, which containerd looks for.
        let beside = crate::executable().parent().unwrap().to_owned();
        let programs = std::env::var("PATH").unwrap_or_default();
        command
            .env("PATH", format!("{}:{programs}", beside.display()))
            .env("HULL_CONFIG", self.path("config.toml"))
            .arg("--config")
            .arg(self.path("containerd.toml"))
            .args(["--log-level", "info"]);
        self.containerd = Some(spawn(command, &self.path("containerd.log")));
        let socket = self.path("c.sock");
        self.comes_up("containerd", |_| {
            std::os::unix::net::UnixStream::connect(&socket).is_ok()
        });
    }

    /// Starts dockerd; also after [`Docker::kill_daemon`].
    pub fn start_daemon(&mut self) {
        let mut configuration = serde_json::json!({
            "runtimes": {"hull": {"path": self.runtime.path}},
            "default-runtime": "hull",
            "live-restore": true,
            "data-root": self.path("docker"),
            "exec-root": self.path("exec"),
            "pidfile": self.path("dockerd.pid"),
            "hosts": [format!("unix://{}", self.socket())],
            "containerd": self.path("c.sock"),
            "exec-opts": ["native.cgroupdriver=cgroupfs"],
            "cgroup-parent": format!("/{}", self.parent),
            "bridge": "none",
            "iptables": false,
            "ip6tables": false,
            "ip-forward": false,
            "ip-masq": false,
            "userland-proxy": false,
        });
        if self.host.is_some() {
            for key in ["bridge", "iptables", "ip6tables", "ip-forward", "ip-masq"] {
                configuration.as_object_mut().unwrap().remove(key);
            }
        }
        // Old versions keep a key in /etc/docker unless told otherwise, and want a privilege that
        // they may not have; new ones do not know the options.
        if self.has_shims() {
            configuration["runtimes"]["shim"] =
                serde_json::json!({"runtimeType": "io.containerd.hull.v2"});
        } else {
            configuration["deprecated-key-path"] = serde_json::json!(self.path("key.json"));
            configuration["oom-score-adjust"] = serde_json::json!(0);
        }
        fs::write(self.path("daemon.json"), configuration.to_string()).unwrap();
        let mut command = self.on_its_host("dockerd");
        command.arg("--config-file").arg(self.path("daemon.json"));
        self.daemon = Some(spawn(command, &self.path("dockerd.log")));
        self.comes_up("dockerd", |docker| {
            docker.docker(["version"]).run().status == 0
        });
    }

    /// Whether this Docker takes containerd's shims for runtimes: the runtime `shim` is hull's.
    pub fn has_shims(&self) -> bool {
        let version = Invocation::new(program("dockerd")).arg("--version").run();
        !version.ok().text().contains(" 20.10.")
    }

    /// Waits until `is_up`; fails at once if the daemon exits.
    fn comes_up(&mut self, what: &str, is_up: impl Fn(&Docker) -> bool) {
        let begin = Instant::now();
        while !is_up(self) {
            let child = if what == "dockerd" {
                &mut self.daemon
            } else {
                &mut self.containerd
            };
            let ended = child.as_mut().and_then(|child| child.try_wait().unwrap());
            assert!(
                ended.is_none() && begin.elapsed() < Duration::from_secs(30),
                "{what} does not come up: {ended:?}"
            );
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Kills dockerd, as in a crash; containers and containerd keep running.
    pub fn kill_daemon(&mut self) {
        end(&mut self.daemon, Signal::KILL);
    }

    /// Its host, if it has networks.
    pub fn host(&self) -> &Netns {
        self.host.as_ref().expect("a Docker with networks")
    }

    fn on_its_host(&self, name: &str) -> Command {
        let program = program(name);
        match &self.host {
            Some(host) => host.command(program.to_str().unwrap()),
            None => Command::new(program),
        }
    }

    fn socket(&self) -> String {
        self.path("d.sock").display().to_string()
    }

    /// `docker …`.
    pub fn docker<A: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = A>) -> Invocation {
        Invocation::new(program("docker"))
            .env("DOCKER_HOST", format!("unix://{}", self.socket()))
            .env("DOCKER_CONFIG", self.path("client"))
            .args(arguments)
            .limit(Duration::from_secs(60))
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

    /// `docker run --rm [OPTIONS] busybox COMMAND`, run until it exits.
    pub fn run(&self, options: &[&str], command: &[&str]) -> Output {
        self.docker(["run", "--rm"])
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

    /// Starts a container with `docker run -d`; returns its name.
    pub fn start(&self, options: &[&str], command: &[&str]) -> String {
        let name = self.unique("c");
        self.docker(["run", "-d", "--name", &name])
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

    /// `docker VERB NAME`, run until it exits.
    pub fn does(&self, verb: &str, name: &str) -> Output {
        self.docker([verb, name]).run()
    }

    /// `docker exec NAME COMMAND`, run until it exits.
    pub fn exec(&self, name: &str, command: &[&str]) -> Output {
        self.docker(["exec", name]).args(command).run()
    }

    /// A shell script in a running container.
    pub fn exec_sh(&self, name: &str, script: &str) -> Output {
        self.exec(name, &["sh", "-c", script])
    }

    /// Standard output of a container.
    pub fn logs(&self, name: &str) -> String {
        self.does("logs", name).ok().text()
    }

    /// Part of a container's `docker inspect`, as a Go template.
    pub fn inspect(&self, name: &str, template: &str) -> String {
        self.docker(["inspect", "--format", template, name])
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

    /// Removes all containers and asserts that nothing is left of them, while the daemons keep
    /// running.
    #[track_caller]
    pub fn assert_clean(&self) {
        self.remove_all();
        let daemons: Vec<i32> = [&self.containerd, &self.daemon]
            .into_iter()
            .flatten()
            .map(|child| child.id().cast_signed())
            .collect();
        let problems = self.problems(&daemons);
        assert!(problems.is_empty(), "left behind:\n{}", problems.join("\n"));
    }

    /// Not with `Invocation`: a panic here would hide the first one.
    fn remove_all(&self) {
        let socket = format!("unix://{}", self.socket());
        let docker = |arguments: &[&str]| {
            let output = Command::new("timeout")
                .arg("60")
                .arg(program("docker"))
                .args(arguments)
                .env("DOCKER_HOST", &socket)
                .env("DOCKER_CONFIG", self.path("client"))
                .output();
            output.map_or_else(
                |_| String::new(),
                |output| String::from_utf8_lossy(&output.stdout).into_owned(),
            )
        };
        let all = docker(&["ps", "--all", "--quiet", "--no-trunc"]);
        let mut command = vec!["rm", "--force", "--volumes"];
        command.extend(all.split_whitespace());
        if command.len() > 3 {
            docker(&command);
        }
    }

    fn problems(&self, daemons: &[i32]) -> Vec<String> {
        let directory = self.directory.path();
        let beside = [self.path("exec"), self.path("containerd-state")];
        let mut problems =
            runtime::problems(&self.runtime, directory, &self.ids(), &beside, daemons);
        // dockerd itself bind mounts its directory onto itself.
        let own = self.path("docker").display().to_string();
        problems.retain(|problem| {
            !(problem.starts_with("mount ") && problem.split(' ').nth(5) == Some(own.as_str()))
        });
        if let Some(netns) = &self.host {
            let interfaces = netns.interfaces();
            let of_containers = interfaces.iter().filter(|name| name.starts_with("veth"));
            problems.extend(of_containers.map(|name| format!("interface {name}")));
        }
        for controller in fs::read_dir("/sys/fs/cgroup")
            .into_iter()
            .flatten()
            .flatten()
        {
            for group in fs::read_dir(controller.path().join(&self.parent))
                .into_iter()
                .flatten()
                .flatten()
                .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
            {
                problems.push(format!("control group {}", group.path().display()));
            }
        }
        problems
    }

    /// Ids of all containers so far, as passed to the runtime.
    fn ids(&self) -> Vec<String> {
        let calls = fs::read_to_string(self.path("calls")).unwrap_or_default();
        let mut ids: Vec<String> = calls
            .split_whitespace()
            .filter(|word| word.len() == 64 && word.bytes().all(|byte| byte.is_ascii_hexdigit()))
            .map(str::to_owned)
            .collect();
        ids.sort();
        ids.dedup();
        ids
    }
}

impl Default for Docker {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for Docker {
    fn drop(&mut self) {
        let failed = std::thread::panicking();
        if failed {
            self.show_diagnostics();
        }
        if self.daemon.is_some() {
            self.remove_all();
        }
        end(&mut self.daemon, Signal::TERM);
        end(&mut self.containerd, Signal::TERM);
        let problems = self.problems(&[]);
        // Remains after dockerd is killed.
        let _ = unmount(self.path("docker"), UnmountFlags::DETACH);
        for controller in fs::read_dir("/sys/fs/cgroup")
            .into_iter()
            .flatten()
            .flatten()
        {
            let _ = fs::remove_dir(controller.path().join(&self.parent));
        }
        if problems.is_empty() {
            return;
        }
        let problems = problems.join("\n");
        if failed {
            eprintln!("left behind:\n{problems}");
        } else {
            self.show_diagnostics();
            panic!("left behind:\n{problems}");
        }
    }
}

impl Docker {
    fn show_diagnostics(&self) {
        self.runtime.show_diagnostics();
        runtime::show(&self.path("dockerd.log"));
        runtime::show(&self.path("containerd.log"));
    }
}

/// Prefers Debian's programs to others on the machine, so that client and daemon have the same
/// version.
pub(crate) fn program(name: &str) -> PathBuf {
    ["/usr/bin", "/usr/sbin"]
        .iter()
        .map(|directory| Path::new(directory).join(name))
        .find(|path| path.exists())
        .unwrap_or_else(|| name.into())
}

/// `--network none`, unless the test sets another one.
fn network(options: &[&str]) -> &'static [&'static str] {
    if options.contains(&"--network") {
        &[]
    } else {
        &["--network", "none"]
    }
}

fn spawn(mut command: Command, log: &Path) -> Child {
    let log = File::options().append(true).create(true).open(log).unwrap();
    command
        .stdin(Stdio::null())
        .stdout(log.try_clone().unwrap())
        .stderr(log)
        .spawn()
        .unwrap()
}

/// Stops a daemon with the signal, then with SIGKILL.
fn end(daemon: &mut Option<Child>, signal: Signal) {
    let Some(mut child) = daemon.take() else {
        return;
    };
    let _ = kill_process(Pid::from_child(&child), signal);
    let begin = Instant::now();
    while let Ok(None) = child.try_wait() {
        if begin.elapsed() > Duration::from_secs(20) {
            let _ = child.kill();
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}
