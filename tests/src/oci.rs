//! Calls the runtime directly with bundles, with the command line that engines and users use. The
//! test acts as the engine: as a subreaper, it gets the keepers as children. On drop, everything is
//! removed, with a check that nothing is left.

use std::fs;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, WaitOptions, kill_process, waitpid};
use serde_json::{Value, json};

use crate::{
    Console, Invocation, Netns, Output, Runtime, busybox_archive, eventually, leaks, runtime,
};

/// Timeout for what only takes bookkeeping on the host.
const SOON: Duration = Duration::from_secs(5);

/// A runtime with a private state directory.
pub struct Oci {
    directory: tempfile::TempDir,
    /// The runtime.
    pub runtime: Runtime,
    next: AtomicU32,
}

impl Oci {
    /// Without containers.
    pub fn new() -> Oci {
        runtime::needs(&[]);
        leaks::adopt_orphans();
        // A socket's path has at most 107 bytes.
        let directory = tempfile::Builder::new()
            .prefix("o")
            .rand_bytes(5)
            .tempdir_in("/tmp")
            .unwrap();
        Oci {
            runtime: Runtime::in_directory(directory.path()),
            directory,
            next: AtomicU32::new(0),
        }
    }

    /// Without containers, with another machine kind than the default.
    pub fn on(machine: &str) -> Oci {
        let oci = Oci::new();
        let file = oci.path("config.toml");
        let text = fs::read_to_string(&file).unwrap();
        let usual = format!("machine = {:?}", crate::usual_machine());
        assert!(text.contains(&usual));
        fs::write(
            &file,
            text.replace(&usual, &format!("machine = {machine:?}")),
        )
        .unwrap();
        oci
    }

    /// A file or directory below the test's directory: `state`, `run`.
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// A name that is unique on this machine.
    pub fn unique(&self) -> String {
        let directory = self.directory.path().file_name().unwrap().to_str().unwrap();
        format!("{directory}-{}", self.next.fetch_add(1, Ordering::Relaxed))
    }

    /// `hull-oci …`.
    pub fn oci<A: AsRef<std::ffi::OsStr>>(
        &self,
        arguments: impl IntoIterator<Item = A>,
    ) -> Invocation {
        Invocation::new(&self.runtime.path)
            .arg("--root")
            .arg(self.path("state"))
            .args(arguments)
    }

    /// A bundle with busybox whose process sleeps, as `hull-oci spec` writes it but without a
    /// terminal.
    pub fn bundle(&self) -> Bundle {
        let path = self.path(&format!("bundle-{}", self.unique()));
        fs::create_dir_all(path.join("rootfs")).unwrap();
        Invocation::new("tar")
            .arg("-xf")
            .arg(busybox_archive())
            .arg("-C")
            .arg(path.join("rootfs"))
            .run()
            .ok();
        self.oci(["spec", "--bundle"]).arg(&path).run().ok();
        let text = fs::read(path.join("config.json")).unwrap();
        let bundle = Bundle {
            path,
            config: serde_json::from_slice(&text).unwrap(),
        };
        bundle
            .with(|config| {
                config["process"]["terminal"] = json!(false);
                config["root"]["readonly"] = json!(false);
            })
            .args(&["sleep", "1000"])
    }

    /// `create`, which must succeed.
    #[track_caller]
    pub fn create(&self, bundle: &Bundle) -> Init<'_> {
        let init = self.init();
        self.creates(&init, bundle, &[]).ok();
        init
    }

    /// `create` and `start`, which must succeed.
    #[track_caller]
    pub fn start(&self, bundle: &Bundle) -> Init<'_> {
        let init = self.create(bundle);
        init.does("start").ok();
        init
    }

    /// `create`; may fail.
    pub fn creates(&self, init: &Init<'_>, bundle: &Bundle, options: &[&str]) -> Output {
        self.creating(init, bundle, options).run()
    }

    /// An invocation of `create`. Its output goes to files, because the keeper keeps them open.
    pub fn creating(&self, init: &Init<'_>, bundle: &Bundle, options: &[&str]) -> Invocation {
        self.oci(["create", "--bundle"])
            .arg(&bundle.path)
            .arg("--pid-file")
            .arg(init.pid_file())
            .args(options)
            .arg(&init.id)
            .output_to(&init.file("out"), &init.file("err"))
    }

    /// A container that does not exist yet.
    pub fn init(&self) -> Init<'_> {
        self.named(&self.unique())
    }

    /// The container with this id.
    pub fn named(&self, id: &str) -> Init<'_> {
        Init {
            oci: self,
            id: id.to_owned(),
        }
    }

    /// A console socket, and its path.
    pub fn console_socket(&self) -> (UnixListener, PathBuf) {
        let path = self.path(&format!("console-{}", self.unique()));
        (UnixListener::bind(&path).unwrap(), path)
    }

    /// `run` with a console socket: returns the container, in the background, and its terminal.
    pub fn run_on_console(&self, bundle: &Bundle) -> (Init<'_>, Console) {
        let init = self.init();
        let (listener, path) = self.console_socket();
        let console = std::thread::spawn(move || Console::receive(&listener));
        let socket = path.to_str().unwrap();
        self.creates(&init, bundle, &["--console-socket", socket])
            .ok();
        init.does("start").ok();
        (init, console.join().unwrap())
    }

    /// Ids of all containers.
    pub fn ids(&self) -> Vec<String> {
        let listed = self.oci(["list", "-q"]).run().ok().text();
        listed.lines().map(str::to_owned).collect()
    }

    /// Asserts that nothing is left of any container.
    #[track_caller]
    pub fn assert_clean(&self) {
        let problems = self.problems();
        assert!(problems.is_empty(), "left behind:\n{}", problems.join("\n"));
    }

    fn problems(&self) -> Vec<String> {
        let directory = self.directory.path();
        let name = directory.file_name().unwrap().to_str().unwrap().to_owned();
        let state = self.path("state");
        let mut problems = runtime::problems(
            &self.runtime,
            directory,
            std::slice::from_ref(&name),
            std::slice::from_ref(&state),
            &[],
        );
        // Regardless of its name.
        for place in [state, self.path("run/sandboxes")] {
            for entry in fs::read_dir(place).into_iter().flatten().flatten() {
                problems.push(entry.path().display().to_string());
            }
        }
        problems.sort();
        problems.dedup();
        problems
    }

    /// Not with `Invocation`: a panic here would hide the first one.
    fn remove_all(&self) -> Vec<String> {
        let mut problems = Vec::new();
        for entry in fs::read_dir(self.path("state"))
            .into_iter()
            .flatten()
            .flatten()
        {
            let deleted = Command::new("timeout")
                .arg("60")
                .arg(&self.runtime.path)
                .arg("--root")
                .arg(self.path("state"))
                .args(["delete", "--force"])
                .arg(entry.file_name())
                .output()
                .unwrap();
            if !deleted.status.success() {
                let error = String::from_utf8_lossy(&deleted.stderr).into_owned();
                problems.push(format!("delete --force {:?}: {error}", entry.file_name()));
            }
        }
        problems
    }
}

impl Default for Oci {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for Oci {
    fn drop(&mut self) {
        let failed = std::thread::panicking();
        if failed {
            self.show();
        }
        let mut problems = self.remove_all();
        problems.extend(self.problems());
        if problems.is_empty() {
            return;
        }
        let problems = problems.join("\n");
        if failed {
            eprintln!("left behind:\n{problems}");
        } else {
            self.show();
            panic!("left behind:\n{problems}");
        }
    }
}

impl Oci {
    fn show(&self) {
        self.runtime.show_diagnostics();
        for entry in fs::read_dir(self.directory.path())
            .into_iter()
            .flatten()
            .flatten()
        {
            let extension = entry.path().extension().map(ToOwned::to_owned);
            if extension.is_some_and(|extension| extension == "err") {
                runtime::show(&entry.path());
            }
        }
    }
}

/// A bundle: a root file system with busybox, and its configuration.
pub struct Bundle {
    /// Its directory.
    pub path: PathBuf,
    /// Contents of `config.json`.
    pub config: Value,
}

impl Bundle {
    /// Modifies the configuration and the file.
    pub fn with(mut self, change: impl FnOnce(&mut Value)) -> Bundle {
        change(&mut self.config);
        self.write(self.config.to_string());
        self
    }

    /// Sets the process's arguments.
    pub fn args(self, arguments: &[&str]) -> Bundle {
        self.with(|config| config["process"]["args"] = json!(arguments))
    }

    /// Makes the process a shell script.
    pub fn sh(self, script: &str) -> Bundle {
        self.args(&["sh", "-c", script])
    }

    /// Adds limits to `linux.resources`.
    pub fn resources(self, kind: &str, limits: Value) -> Bundle {
        self.with(|config| config["linux"]["resources"][kind] = limits)
    }

    /// Adds a mount.
    pub fn mount(self, mount: Value) -> Bundle {
        self.with(|config| config["mounts"].as_array_mut().unwrap().push(mount))
    }

    /// Uses the network namespace at a path, with permission to ping.
    pub fn at_network(self, path: &str) -> Bundle {
        let bundle = self.with(|config| {
            let namespaces = config["linux"]["namespaces"].as_array_mut().unwrap();
            for namespace in namespaces {
                if namespace["type"] == "network" {
                    namespace["path"] = json!(path);
                }
            }
        });
        bundle.pinging()
    }

    /// The same, for a [`Netns`].
    pub fn inside(self, netns: &Netns) -> Bundle {
        self.at_network(netns.path().to_str().unwrap())
    }

    /// Permits ping.
    pub fn pinging(self) -> Bundle {
        self.with(|config| {
            for set in ["bounding", "effective", "permitted"] {
                let set = config["process"]["capabilities"][set].as_array_mut();
                set.unwrap().push(json!("CAP_NET_RAW"));
            }
        })
    }

    /// Adds a shell script as a hook.
    pub fn hook(self, kind: &str, script: &str) -> Bundle {
        self.with(|config| {
            let hooks = &mut config["hooks"][kind];
            let mut list = hooks.as_array().cloned().unwrap_or_default();
            let environment = ["PATH=/usr/sbin:/usr/bin:/sbin:/bin"];
            list.push(json!({"path": "/bin/sh", "args": ["sh", "-c", script], "env": environment}));
            *hooks = Value::Array(list);
        })
    }

    /// Writes `config.json`.
    pub fn write(&self, text: impl AsRef<[u8]>) {
        fs::write(self.path.join("config.json"), text).unwrap();
    }

    /// A path in its root file system.
    pub fn root(&self, path: &str) -> PathBuf {
        self.path.join("rootfs").join(path)
    }
}

/// A container and its keeper.
pub struct Init<'a> {
    oci: &'a Oci,
    /// Its id.
    pub id: String,
}

impl Init<'_> {
    fn file(&self, extension: &str) -> PathBuf {
        self.oci.path(&format!("{}.{extension}", self.id))
    }

    /// The file to which `create` writes the process id.
    pub fn pid_file(&self) -> PathBuf {
        self.file("pid")
    }

    /// The keeper of the container.
    pub fn keeper(&self) -> Pid {
        pid_in(&self.pid_file())
    }

    /// `hull-oci VERB ID`.
    pub fn does(&self, verb: &str) -> Output {
        self.oci.oci([verb, &self.id]).run()
    }

    /// `hull-oci delete --force ID`.
    pub fn delete(&self) -> Output {
        self.oci.oci(["delete", "--force", &self.id]).run()
    }

    /// `hull-oci kill ID SIGNAL`.
    pub fn kill(&self, signal: &str) -> Output {
        self.oci.oci(["kill", &self.id, signal]).run()
    }

    /// `hull-oci exec OPTIONS ID COMMAND`.
    pub fn executing(&self, options: &[&str], command: &[&str]) -> Invocation {
        self.oci
            .oci(["exec"])
            .args(options)
            .arg(&self.id)
            .args(command)
    }

    /// The same, run until it exits.
    pub fn exec(&self, options: &[&str], command: &[&str]) -> Output {
        self.executing(options, command).run()
    }

    /// A shell script in the container.
    pub fn sh(&self, script: &str) -> Output {
        self.exec(&[], &["sh", "-c", script])
    }

    /// Starts a shell script in the container that keeps running.
    pub fn goes_on(&self, script: &str) {
        let name = self.oci.unique();
        let [stdout, stderr] = ["out", "err"].map(|end| self.oci.path(&format!("{name}.{end}")));
        self.executing(&["--detach"], &["sh", "-c", script])
            .output_to(&stdout, &stderr)
            .run()
            .ok();
    }

    /// Waits until a script prints what is wanted: changes on the host reach the guest within a
    /// second, and running the script takes a moment too.
    #[track_caller]
    pub fn prints(&self, script: &str, wanted: impl Fn(&str) -> bool) {
        let limit = Duration::from_secs(2);
        let begin = Instant::now();
        let mut last = String::new();
        while begin.elapsed() < limit {
            last = self.sh(script).ok().text();
            if wanted(&last) {
                return;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        panic!("not within {limit:?}: {script}: {last}");
    }

    /// Whether a ping from the container is answered.
    pub fn pings(&self, address: &str) -> bool {
        self.sh(&format!("ping -c 1 -W 2 {address}")).status == 0
    }

    /// Asserts that a ping from the container is answered.
    #[track_caller]
    pub fn reaches(&self, address: &str) {
        self.sh(&format!("ping -c 1 -W 5 {address}")).ok();
    }

    /// Output of `state`.
    pub fn state(&self) -> Value {
        self.does("state").ok().json()
    }

    /// `created`, `running`, `paused`, `stopped`.
    pub fn status(&self) -> String {
        self.state()["status"].as_str().unwrap().to_owned()
    }

    /// Waits for a status.
    #[track_caller]
    pub fn becomes(&self, status: &str) {
        eventually(status, SOON, || self.status() == status);
    }

    /// Its process's standard output so far.
    pub fn output(&self) -> String {
        fs::read_to_string(self.file("out")).unwrap()
    }

    /// Its process's standard error so far.
    pub fn error(&self) -> String {
        fs::read_to_string(self.file("err")).unwrap()
    }

    /// Waits until its process has printed a text.
    #[track_caller]
    pub fn says(&self, text: &str) {
        eventually(text, Duration::from_secs(20), || {
            self.output().contains(text)
        });
    }

    /// Waits until its keeper, a child of this process, exits; returns the status.
    #[track_caller]
    pub fn ends(&self) -> i32 {
        end_of(self.keeper())
    }

    /// Waits until it is stopped or gone, deletes it twice, and asserts that nothing is left.
    #[track_caller]
    pub fn is_gone_after_delete(&self) {
        eventually("stopped, or not there", SOON, || {
            let state = self.does("state");
            state.status != 0 || state.json()["status"] == "stopped"
        });
        self.delete().ok();
        self.delete().ok();
        self.oci.assert_clean();
    }

    /// The same for a container that may be running, because the process to kill had exited
    /// already.
    #[track_caller]
    pub fn is_gone_after_a_kill(&self) {
        eventually("a stage that lasts", SOON, || {
            let state = self.does("state");
            state.status != 0 || state.json()["status"] != "creating"
        });
        self.delete().ok();
        self.delete().ok();
        self.oci.assert_clean();
    }

    /// A host process of its machine: `pod`, `devices`, `machine`. The last two are one of kind
    /// `kvm`.
    pub fn host_process(&self, which: &str) -> Option<Pid> {
        let (devices, machine): (&[&str], &[&str]) = match crate::usual_machine() {
            "kvm" => (&["machine-process"], &["machine-process"]),
            _ => (&["device-process"], &["linux mem=", "umid=hull"]),
        };
        let words: &[&str] = match which {
            "pod" => &[
                "sandbox-process",
                self.oci.directory.path().to_str().unwrap(),
            ],
            "devices" => devices,
            "machine" => machine,
            other => panic!("no process is called {other}"),
        };
        let found = leaks::descendants();
        let mut found = found
            .iter()
            .filter(|(_, command)| words.iter().all(|word| command.contains(word)));
        found.next().and_then(|(pid, _)| Pid::from_raw(*pid))
    }

    /// Kills a host process: one of those, or `keeper`.
    pub fn kill_host_process(&self, which: &str) {
        let pid = match which {
            "keeper" => self.keeper(),
            other => self
                .host_process(other)
                .unwrap_or_else(|| panic!("no process {other}")),
        };
        kill_process(pid, Signal::KILL).unwrap();
    }
}

/// The process id in a file.
pub fn pid_in(file: &Path) -> Pid {
    let text = fs::read_to_string(file).unwrap();
    Pid::from_raw(text.parse().unwrap()).unwrap()
}

/// Waits until an adopted child exits; returns its status, 128 + n after signal n.
#[track_caller]
pub fn end_of(child: Pid) -> i32 {
    let mut status = 0;
    eventually("the process ends", Duration::from_secs(20), || {
        let Some((_, ended)) = waitpid(Some(child), WaitOptions::NOHANG).unwrap() else {
            return false;
        };
        status = ended
            .exit_status()
            .unwrap_or_else(|| 128 + ended.terminating_signal().unwrap());
        true
    });
    status
}
