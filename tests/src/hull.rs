//! A private hull: configuration, state and images are in a temporary directory. On drop, its
//! containers are removed, with a check that nothing is left.

use std::ffi::OsStr;
use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use rustix::fs::{FlockOperation, flock};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::{
    Invocation, Lack, Output, Person, cgroup, executable, leaks, network, repository, runtime,
};

/// Differences from the default [`Hull`].
#[derive(Default)]
pub struct Options {
    /// Machine kind; `uml` if empty.
    pub machine: &'static str,
    /// More lines for the configuration file.
    pub configuration: String,
    /// Without the image `busybox`.
    pub without_image: bool,
    /// Call hull as a user without root, and without this.
    pub person: Option<Lack>,
}

/// A private hull.
pub struct Hull {
    directory: tempfile::TempDir,
    /// Machine kind of its containers.
    pub machine: &'static str,
    next: AtomicU32,
    leaks_expected: bool,
    /// The calling user, if not root.
    pub person: Option<Person>,
}

impl Hull {
    /// With user-mode Linux and the image `busybox`.
    pub fn new() -> Hull {
        Hull::with(Options::default())
    }

    /// With another machine kind and the image `busybox`.
    pub fn on(machine: &'static str) -> Hull {
        Hull::with(Options {
            machine,
            ..Options::default()
        })
    }

    /// With user-mode Linux and no image.
    pub fn empty() -> Hull {
        Hull::with(Options {
            without_image: true,
            ..Options::default()
        })
    }

    /// With another machine kind and the image `busybox`; containers have a network by default.
    pub fn networked(machine: &'static str) -> Hull {
        Hull::with(Options {
            machine,
            configuration: "network = \"default\"".into(),
            ..Options::default()
        })
    }

    /// With user-mode Linux and the image `busybox`, called by a user without root; containers have
    /// a network by default.
    pub fn without_root() -> Hull {
        Hull::with(Options {
            configuration: "network = \"default\"".into(),
            person: Some(Lack::Nothing),
            ..Options::default()
        })
    }

    /// With options. Unless configured, containers have no network: plugins take longer than most
    /// tests.
    pub fn with(options: Options) -> Hull {
        assert!(
            rustix::process::geteuid().is_root(),
            "tests make namespaces and users of their own: they run as root"
        );
        leaks::adopt_orphans();
        // A socket's path has at most 107 bytes.
        let directory = tempfile::Builder::new()
            .prefix("h")
            .rand_bytes(5)
            .tempdir_in("/tmp")
            .unwrap();
        let machine = if options.machine.is_empty() {
            crate::usual_machine()
        } else {
            options.machine
        };
        let has_network = options.configuration.lines().any(|line| {
            line.split('=')
                .next()
                .is_some_and(|key| key.trim() == "network")
        });
        let network = if has_network {
            ""
        } else {
            "network = \"none\""
        };
        let configuration = format!(
            "machine = {machine:?}\nrun_dir = {:?}\ndata_dir = {:?}\n{}\n{network}\ncgroup_parent = {:?}\n",
            directory.path().join("run"),
            directory.path().join("data"),
            options.configuration,
            cgroup_parent(directory.path()),
        );
        fs::write(directory.path().join("config.toml"), configuration).unwrap();
        let person = options
            .person
            .map(|lack| Person::new(directory.path(), lack));
        let hull = Hull {
            directory,
            machine,
            next: AtomicU32::new(0),
            leaks_expected: false,
            person,
        };
        if !options.without_image && options.person != Some(Lack::SubordinateIds) {
            hull.import_busybox("busybox");
        }
        hull
    }

    /// Imports the test image under a name.
    pub fn import_busybox(&self, name: &str) {
        // Readable for users without root.
        let archive = self.path("busybox.tar");
        fs::copy(busybox_archive(), &archive).unwrap();
        self.hull(["image", "import", "--change", "CMD [\"sh\"]"])
            .arg(archive)
            .arg(name)
            .run()
            .ok();
    }

    /// A temporary directory of the test.
    pub fn scratch(&self) -> PathBuf {
        let path = self.path("scratch");
        fs::create_dir_all(&path).unwrap();
        path
    }

    /// A file or directory below the test's directory: `run`, `data`, `config.toml`.
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// The control group below which machines have theirs.
    pub fn cgroup_parent(&self) -> String {
        cgroup_parent(self.directory.path())
    }

    /// `hull …`.
    pub fn hull<A: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = A>) -> Invocation {
        let invocation = match &self.person {
            None => Invocation::new(executable()),
            Some(person) => Invocation::new(person.executable()).under(&person.wrapper()),
        };
        invocation
            .env("HULL_CONFIG", self.path("config.toml"))
            .args(arguments)
            .limit(self.limit())
    }

    /// A command that calls buildah, whose images are this installation's.
    pub fn with_buildah(&self, invocation: Invocation) -> Invocation {
        runtime::needs(&["buildah"]);
        let path = self.path("storage.conf");
        let images = self.path("buildah");
        let text = format!(
            "[storage]\ndriver = \"vfs\"\ngraphroot = \"{0}\"\nrunroot = \"{0}-run\"\n",
            images.display()
        );
        fs::write(&path, text).unwrap();
        invocation.env("CONTAINERS_STORAGE_CONF", path)
    }

    /// `hull run --rm [OPTIONS] busybox COMMAND`, run until it exits.
    pub fn run(&self, options: &[&str], command: &[&str]) -> Output {
        self.hull(["run", "--rm"])
            .args(options)
            .arg("busybox")
            .args(command)
            .run()
    }

    /// A shell script in a new container, run until it exits.
    pub fn sh(&self, options: &[&str], script: &str) -> Output {
        self.run(options, &["sh", "-c", script])
    }

    /// Starts a container with `hull run -d`.
    pub fn start(&self, options: &[&str], command: &[&str]) -> Container<'_> {
        let name = self.unique("c");
        self.hull(["run", "-d", "--name", &name])
            .args(options)
            .arg("busybox")
            .args(command)
            .run()
            .ok();
        Container { hull: self, name }
    }

    /// Starts a container that keeps running.
    pub fn sleeper(&self) -> Container<'_> {
        self.start(&[], &["sleep", "1000"])
    }

    /// A unique name.
    pub fn unique(&self, prefix: &str) -> String {
        format!("{prefix}-{}", self.next.fetch_add(1, Ordering::Relaxed))
    }

    /// The handle of a container that was created otherwise.
    pub fn container(&self, name: &str) -> Container<'_> {
        Container {
            hull: self,
            name: name.to_owned(),
        }
    }

    /// Names of all containers.
    pub fn names(&self) -> Vec<String> {
        let list = self.hull(["ps", "-a", "--json"]).run().ok().json();
        let list = list.as_array().expect("a list").clone();
        list.iter()
            .map(|container| container["name"].as_str().expect("a name").to_owned())
            .collect()
    }

    /// What remains of containers in the state and data directories.
    pub fn remains(&self) -> Vec<String> {
        let mut found = Vec::new();
        for directory in ["run/sandboxes", "data/names", "data/containers"] {
            let entries = fs::read_dir(self.path(directory)).into_iter().flatten();
            found.extend(
                entries
                    .flatten()
                    .map(|entry| entry.path().display().to_string()),
            );
        }
        found
    }

    /// Asserts that nothing is left of any container.
    #[track_caller]
    pub fn assert_clean(&self) {
        let problems = self.problems();
        assert!(problems.is_empty(), "left behind:\n{}", problems.join("\n"));
    }

    /// Whether nothing is left of any container.
    pub fn is_clean(&self) -> bool {
        self.problems().is_empty()
    }

    fn problems(&self) -> Vec<String> {
        let mut problems = leaks::leaked_processes();
        problems.extend(leaks::mounts_below(self.directory.path()));
        problems.extend(self.remains());
        let groups = cgroup::below(&self.cgroup_parent());
        problems.extend(
            groups
                .iter()
                .map(|group| format!("control group {}", group.display())),
        );
        problems
    }

    /// Time limit of a command with this machine kind.
    fn limit(&self) -> Duration {
        Duration::from_secs(if self.machine == "qemu" { 60 } else { 30 })
    }

    /// Shows the logs of host processes and guests, for a failed test.
    fn show_diagnostics(&self) {
        let below = |directory| fs::read_dir(self.path(directory)).into_iter().flatten();
        for entry in below("run/sandboxes")
            .chain(below("data/containers"))
            .flatten()
        {
            for file in [
                "record.json",
                "status.json",
                "supervisor.log",
                "sandbox.log",
                "console",
            ] {
                let path = entry.path().join(file);
                if let Ok(bytes) = fs::read(&path) {
                    let text = String::from_utf8_lossy(&bytes);
                    let lines: Vec<&str> = text.lines().collect();
                    eprintln!("--- {}", path.display());
                    eprintln!("{}", lines[lines.len().saturating_sub(40)..].join("\n"));
                }
            }
        }
    }
}

impl Default for Hull {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for Hull {
    fn drop(&mut self) {
        let failed = std::thread::panicking();
        if failed {
            self.show_diagnostics();
        }
        let ids: Vec<String> = fs::read_dir(self.path("data/containers"))
            .into_iter()
            .flatten()
            .flatten()
            .map(|entry| entry.file_name().to_string_lossy().into_owned())
            .filter(|name| name.len() == 64)
            .collect();
        let mut problems = Vec::new();
        if !ids.is_empty() {
            // Not with `Invocation`: a panic here would hide the first one.
            let removing = self.hull(["rm", "-f"]).args(&ids);
            let removed = removing.into_parts().0.output();
            match removed {
                Ok(output) if output.status.success() => {}
                Ok(output) => problems.push(format!(
                    "hull rm -f: {}",
                    String::from_utf8_lossy(&output.stderr)
                )),
                Err(error) => problems.push(format!("hull rm -f: {error}")),
            }
        }
        problems.extend(self.problems());
        problems.extend(ids.iter().flat_map(|id| network::leases_with(id)));
        cgroup::remove(&self.cgroup_parent());
        cgroup::remove(CGROUP_PARENTS);
        if !problems.is_empty() && !self.leaks_expected {
            let problems = problems.join("\n");
            if failed {
                eprintln!("left behind:\n{problems}");
            } else {
                self.show_diagnostics();
                panic!("left behind:\n{problems}");
            }
        }
    }
}

/// The group above those of all tests.
const CGROUP_PARENTS: &str = "/hull-tests";

fn cgroup_parent(directory: &Path) -> String {
    let name = directory.file_name().unwrap_or_default();
    format!("{CGROUP_PARENTS}/{}", name.to_string_lossy())
}

/// A container of a [`Hull`]; removed when that is dropped.
pub struct Container<'a> {
    hull: &'a Hull,
    /// Its name.
    pub name: String,
}

impl Container<'_> {
    /// The installation that it is of.
    pub fn hull(&self) -> &Hull {
        self.hull
    }

    /// `hull exec NAME COMMAND`, run until it exits.
    pub fn exec(&self, command: &[&str]) -> Output {
        self.exec_with(&[], command)
    }

    /// `hull exec OPTIONS NAME COMMAND`, run until it exits.
    pub fn exec_with(&self, options: &[&str], command: &[&str]) -> Output {
        self.hull
            .hull(["exec"])
            .args(options)
            .arg(&self.name)
            .args(command)
            .run()
    }

    /// A shell script in the container.
    pub fn sh(&self, script: &str) -> Output {
        self.exec(&["sh", "-c", script])
    }

    /// `hull VERB NAME`, run until it exits.
    pub fn does(&self, verb: &str) -> Output {
        self.hull.hull([verb, &self.name]).run()
    }

    /// `hull rm -f NAME`.
    #[track_caller]
    pub fn is_removed_by_force(&self) {
        self.hull.hull(["rm", "-f", &self.name]).run().ok();
    }

    /// Output of `hull inspect`.
    pub fn inspect(&self) -> Value {
        let list = self.does("inspect").ok().json();
        list[0].clone()
    }

    /// Its state in `hull inspect`.
    pub fn state(&self) -> String {
        self.inspect()["Hull"]["state"]
            .as_str()
            .expect("a state")
            .to_owned()
    }

    /// The addresses of its network interface, as seen in the container.
    pub fn addresses(&self) -> Vec<IpAddr> {
        network::addresses(&self.sh("ip -o addr show dev eth0").ok().text())
    }

    /// Its IPv4 address.
    pub fn address(&self) -> IpAddr {
        let all = self.addresses();
        *all.iter().find(|address| address.is_ipv4()).unwrap()
    }

    /// Process id of one of its host processes: `sandbox`, `devices`, `machine`.
    ///
    /// The machine process is the one with the devices where there is no device process.
    pub fn host_process(&self, which: &str) -> Pid {
        let processes = &self.inspect()["Hull"]["processes"];
        let of = |which: &str| processes[which].as_i64().expect("a pid");
        let pid = match (which, of(which)) {
            ("devices", 0) => of("machine"),
            (_, pid) => pid,
        };
        Pid::from_raw(i32::try_from(pid).unwrap()).unwrap_or_else(|| panic!("no {which} process"))
    }

    /// Kills one of its host processes.
    pub fn kill_host_process(&self, which: &str) {
        kill_process(self.host_process(which), Signal::KILL).unwrap();
    }

    /// Waits with `hull wait` until it exits; returns the status that it prints.
    pub fn wait(&self) -> i32 {
        self.does("wait")
            .ok()
            .text()
            .parse()
            .expect("hull wait prints a number")
    }
}

/// The test image as an archive, created on first use.
pub fn busybox_archive() -> &'static Path {
    static ARCHIVE: OnceLock<PathBuf> = OnceLock::new();
    ARCHIVE.get_or_init(|| {
        let directory = repository().join("target/e2e");
        fs::create_dir_all(&directory).unwrap();
        let archive = directory.join("busybox.tar");
        let lock = fs::File::create(directory.join("lock")).unwrap();
        flock(&lock, FlockOperation::LockExclusive).unwrap();
        if !archive.exists() {
            Invocation::new(repository().join("scripts/busybox-rootfs"))
                .arg(&archive)
                .run()
                .ok();
        }
        archive
    })
}
