//! The contestants: runc and hull's machine kinds, each with the same root file systems; how each
//! runs a command, keeps a container and executes in it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use crate::Options;

/// Kinds of machine, in the order of their columns.
const KINDS: [&str; 3] = ["kvm", "uml", "qemu"];

/// Timeout of one measurement in seconds: emulation may take very long.
const LIMIT: &str = "180";

/// A contestant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Contestant {
    /// runc, on the host's kernel.
    Runc,
    /// hull, with a kind of machine.
    Hull(&'static str),
}

impl Contestant {
    /// Heading of its column.
    pub fn name(self) -> String {
        match self {
            Contestant::Runc => "runc".to_owned(),
            Contestant::Hull(machine) => format!("hull {machine}"),
        }
    }

    /// Emulation is slow: fewer rounds suffice.
    pub fn is_slow(self) -> bool {
        self == Contestant::Hull("qemu")
    }
}

/// Root file system of a container.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Root {
    /// Busybox and nothing else.
    Busybox,
    /// Busybox, GNU tar, fio, iperf3 and the programs in `bench/guest`.
    Tools,
}

/// Shared by all measurements; removed at the end.
pub struct Setup {
    /// A directory on the disk of the containers' files.
    pub directory: PathBuf,
    /// Machine kinds of hull that work here.
    pub machines: Vec<&'static str>,
    hull: PathBuf,
    next: AtomicU32,
}

/// A running container; killed and removed when dropped.
pub struct Running<'a> {
    setup: &'a Setup,
    contestant: Contestant,
    /// Its name.
    pub name: String,
}

/// The kinds of machine that hull says work here.
fn working_machines(hull: &Path) -> Result<Vec<&'static str>> {
    let report = Command::new(hull).args(["check", "--json"]).output()?;
    let report: Value = serde_json::from_slice(&report.stdout).context("hull check --json")?;
    let findings = report["findings"].as_array().context("no findings")?;
    let works = |kind: &&str| {
        let what = format!("machine {kind}");
        let found = findings.iter().find(|finding| finding["what"] == what);
        let works = found.is_some_and(|finding| finding["level"] == "ok");
        if !works {
            let why = found.map_or(&Value::Null, |finding| &finding["found"]);
            eprintln!("machine kind {kind} is left out: {why}");
        }
        works
    };
    Ok(KINDS.into_iter().filter(works).collect())
}

/// What only some groups need, into their root file system.
fn add_tools(root: &Path, repository: &Path) -> Result<()> {
    for program in ["/usr/bin/fio", "/usr/bin/iperf3", "/bin/tar", "/bin/ls"] {
        copy_with_libraries(Path::new(program), root, &root.join("gnu"))?;
    }
    for program in ["work", "net"] {
        run(Command::new("cc")
            .args(["-static", "-O2", "-w", "-o"])
            .arg(root.join("bin").join(program))
            .arg(repository.join(format!("bench/guest/{program}.c"))))?;
    }
    Ok(())
}

impl Setup {
    /// Creates root file systems, images and the configuration.
    pub fn prepare(options: &Options) -> Result<Setup> {
        let repository = &options.repository;
        let directory = repository.join("target/bench");
        let _ = fs::remove_dir_all(&directory);
        fs::create_dir_all(&directory)?;
        let hull = repository.join("target/stage/bin/hull");
        let mut machines = working_machines(&hull)?;
        if !options.machines.is_empty() {
            machines.retain(|machine| options.machines.iter().any(|wanted| wanted == machine));
        }
        let setup = Setup {
            directory,
            machines,
            hull,
            next: AtomicU32::new(0),
        };
        // Socket paths must be short: state is separate from data.
        for machine in KINDS {
            let configuration = format!(
                "run_dir = \"/run/hull-bench\"\ndata_dir = {:?}\nmachine = {machine:?}\n",
                setup.directory.join("data")
            );
            fs::write(setup.configuration(machine), configuration)?;
        }

        let archive = setup.directory.join("busybox.tar");
        run(Command::new(repository.join("scripts/busybox-rootfs")).arg(&archive))?;
        let tools = options.wants_any_of(&["cpu", "files", "network"]);
        let roots = match tools {
            true => vec![Root::Busybox, Root::Tools],
            false => vec![Root::Busybox],
        };
        for root in &roots {
            fs::create_dir(setup.root(*root))?;
            run(Command::new("tar")
                .arg("-xf")
                .arg(&archive)
                .arg("-C")
                .arg(setup.root(*root)))?;
        }
        if tools {
            add_tools(&setup.root(Root::Tools), repository)?;
        }
        for root in roots {
            let name = image(root);
            let archive = setup.directory.join(format!("{name}.tar"));
            run(Command::new("tar")
                .arg("-cf")
                .arg(&archive)
                .arg("-C")
                .arg(setup.root(root))
                .arg("."))?;
            run(setup
                .hull("uml")
                .args(["image", "import"])
                .arg(&archive)
                .arg(name)
                .stdout(Stdio::null()))?;
        }
        Ok(setup)
    }

    /// The root file system as a directory.
    pub fn root(&self, root: Root) -> PathBuf {
        self.directory.join(image(root).to_owned() + "-root")
    }

    fn configuration(&self, machine: &str) -> PathBuf {
        self.directory.join(format!("{machine}.toml"))
    }

    fn hull(&self, machine: &str) -> Command {
        let mut command = Command::new(&self.hull);
        command.env("HULL_CONFIG", self.configuration(machine));
        command
    }

    /// The OCI runtime's command line, with a state directory of its own.
    pub fn oci(&self, contestant: Contestant) -> Command {
        let mut command = match contestant {
            Contestant::Runc => Command::new("runc"),
            Contestant::Hull(machine) => {
                let mut command = Command::new(self.hull.with_file_name("hull-oci"));
                command.env("HULL_CONFIG", self.configuration(machine));
                command
            }
        };
        command
            .arg("--root")
            .arg(self.directory.join("oci"))
            .stdin(Stdio::null())
            .stdout(Stdio::null());
        command
    }

    /// A program that starts shims of containerd: it finds hull's, with its configuration.
    pub fn with_shims(&self, program: &str, contestant: Contestant) -> Command {
        let mut command = Command::new(program);
        if let Contestant::Hull(machine) = contestant {
            command.env("HULL_CONFIG", self.configuration(machine));
        }
        let path = std::env::var("PATH").unwrap_or_default();
        let beside = self.hull.parent().unwrap_or(Path::new("/"));
        command.env("PATH", format!("{}:{path}", beside.display()));
        command
    }

    /// A unique name.
    pub fn unique(&self) -> String {
        format!(
            "bench-{}-{}",
            std::process::id(),
            self.next.fetch_add(1, Ordering::Relaxed)
        )
    }

    /// A bundle: runc's default specification, without a terminal and without limits that need
    /// privileges.
    pub fn bundle(&self, root: Root, arguments: &[&str], volume: Option<&Path>) -> Result<PathBuf> {
        let bundle = self.directory.join("bundles").join(self.unique());
        fs::create_dir_all(&bundle)?;
        run(Command::new("runc").arg("spec").arg("-b").arg(&bundle))?;
        let path = bundle.join("config.json");
        let mut spec: Value = serde_json::from_slice(&fs::read(&path)?)?;
        spec["root"] = json!({"path": self.root(root), "readonly": false});
        spec["process"]["args"] = json!(arguments);
        spec["process"]["terminal"] = json!(false);
        if let Some(process) = spec["process"].as_object_mut() {
            process.remove("rlimits");
        }
        if let (Some(volume), Some(mounts)) = (volume, spec["mounts"].as_array_mut()) {
            mounts.push(json!({"destination": "/work", "type": "bind", "source": volume, "options": ["rbind", "rw"]}));
        }
        fs::write(&path, spec.to_string())?;
        Ok(bundle)
    }

    /// A command that runs `arguments` in a new container, to its end, and removes it. Prepares as
    /// much as possible in advance.
    pub fn once(&self, contestant: Contestant, arguments: &[&str]) -> Result<Command> {
        let mut command = match contestant {
            Contestant::Runc => {
                let mut command = Command::new("runc");
                command
                    .args(["run", "-b"])
                    .arg(self.bundle(Root::Busybox, arguments, None)?)
                    .arg(self.unique());
                command
            }
            Contestant::Hull(machine) => self.hull_run(machine, "none", arguments),
        };
        command.stdin(Stdio::null()).stdout(Stdio::null());
        Ok(command)
    }

    /// `hull run` with `arguments` and a network.
    pub fn hull_run(&self, machine: &str, network: &str, arguments: &[&str]) -> Command {
        let mut command = self.hull(machine);
        command
            .args(["run", "--rm", "--network", network])
            .arg(image(Root::Busybox))
            .args(arguments);
        command
    }

    /// Starts a container that sleeps; `volume` is mounted at `/work`.
    pub fn start(
        &self,
        contestant: Contestant,
        root: Root,
        volume: Option<&Path>,
    ) -> Result<Running<'_>> {
        let name = self.unique();
        let arguments = ["sleep", "100000"];
        let mut command = match contestant {
            Contestant::Runc => {
                let mut command = Command::new("runc");
                command
                    .args(["run", "-d", "-b"])
                    .arg(self.bundle(root, &arguments, volume)?)
                    .arg(&name);
                command
            }
            Contestant::Hull(machine) => {
                let mut command = self.hull(machine);
                command.args(["run", "-d", "--network", "none", "--name", &name]);
                if let Some(volume) = volume {
                    command.arg("-v").arg(format!("{}:/work", volume.display()));
                }
                command.arg(image(root)).args(arguments);
                command
            }
        };
        // A container of runc inherits the descriptors: a pipe for errors would never end.
        let status = command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .status()?;
        if !status.success() {
            bail!("{}: {command:?}: {status}", contestant.name());
        }
        Ok(Running {
            setup: self,
            contestant,
            name,
        })
    }
}

impl Drop for Setup {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.directory);
        let _ = fs::remove_dir_all("/run/hull-bench");
    }
}

impl Running<'_> {
    /// A command that executes `arguments` in the container.
    pub fn exec(&self, arguments: &[&str]) -> Command {
        let mut command = match self.contestant {
            Contestant::Runc => Command::new("runc"),
            Contestant::Hull(machine) => self.setup.hull(machine),
        };
        command
            .args(["exec", &self.name])
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::null());
        command
    }

    /// Output of `arguments`, executed in the container; `None` after [`LIMIT`].
    pub fn output(&self, arguments: &[&str]) -> Result<Option<String>> {
        let exec = self.exec(arguments);
        let output = Command::new("timeout")
            .arg(LIMIT)
            .arg(exec.get_program())
            .args(exec.get_args())
            .envs(
                exec.get_envs()
                    .filter_map(|(name, value)| Some((name, value?))),
            )
            .stdin(Stdio::null())
            .output()?;
        if output.status.code() == Some(124) {
            eprintln!(
                "  {}: {arguments:?}: given up after {LIMIT} s",
                self.contestant.name()
            );
            return Ok(None);
        }
        if !output.status.success() {
            let error = String::from_utf8_lossy(&output.stderr).into_owned();
            bail!("{}: {arguments:?}: {error}", self.contestant.name());
        }
        Ok(Some(String::from_utf8(output.stdout)?))
    }

    /// The seconds printed by the program in `bench/guest`, one per line.
    pub fn seconds(&self, arguments: &[&str]) -> Result<Vec<f64>> {
        let text = self.output(arguments)?.unwrap_or_default();
        text.lines()
            .map(|line| {
                line.trim()
                    .parse()
                    .with_context(|| format!("no number: {line:?}"))
            })
            .collect()
    }

    /// Host processes by role, from `hull inspect` and `runc state`.
    pub fn processes(&self) -> Result<Vec<(&'static str, i64)>> {
        let find = |value: &Value, key: &str| {
            value[key]
                .as_i64()
                .with_context(|| format!("no process {key}"))
        };
        match self.contestant {
            Contestant::Runc => {
                let output = Command::new("runc").args(["state", &self.name]).output()?;
                let state: Value = serde_json::from_slice(&output.stdout)?;
                Ok(vec![("container", find(&state, "pid")?)])
            }
            Contestant::Hull(machine) => {
                let output = self
                    .setup
                    .hull(machine)
                    .args(["inspect", &self.name])
                    .output()?;
                let state: Value = serde_json::from_slice(&output.stdout)?;
                let processes = &state[0]["Hull"]["processes"];
                ["sandbox", "devices", "machine"]
                    .into_iter()
                    .map(|role| Ok((role, find(processes, role)?)))
                    .collect()
            }
        }
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        let removed = match self.contestant {
            Contestant::Runc => Command::new("runc")
                .args(["delete", "--force", &self.name])
                .output(),
            Contestant::Hull(machine) => self
                .setup
                .hull(machine)
                .args(["rm", "-f", &self.name])
                .output(),
        };
        match removed {
            Ok(output) if output.status.success() => {}
            Ok(output) => eprintln!(
                "{}: cannot remove: {}",
                self.name,
                String::from_utf8_lossy(&output.stderr)
            ),
            Err(error) => eprintln!("{}: cannot remove: {error}", self.name),
        }
    }
}

fn image(root: Root) -> &'static str {
    match root {
        Root::Busybox => "busybox",
        Root::Tools => "tools",
    }
}

/// Runs a command that must succeed.
pub fn run(command: &mut Command) -> Result<()> {
    let output = command
        .stderr(Stdio::piped())
        .spawn()
        .and_then(std::process::Child::wait_with_output);
    let output = output.with_context(|| format!("{command:?}"))?;
    if !output.status.success() {
        bail!(
            "{command:?}: {}: {}",
            output.status,
            String::from_utf8_lossy(&output.stderr)
        );
    }
    Ok(())
}

/// Copies a program to `to`, and its shared libraries to the same paths as on the host.
fn copy_with_libraries(program: &Path, root: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to)?;
    let name = program.file_name().context("a program has a name")?;
    fs::copy(program, to.join(name)).with_context(|| format!("copy {}", program.display()))?;
    let output = Command::new("ldd").arg(program).output()?;
    for word in String::from_utf8(output.stdout)?
        .split_whitespace()
        .filter(|word| word.starts_with('/'))
    {
        let destination = root.join(word.trim_start_matches('/'));
        fs::create_dir_all(destination.parent().unwrap_or(root))?;
        if !destination.exists() {
            fs::copy(word, &destination).with_context(|| format!("copy {word}"))?;
        }
    }
    Ok(())
}
