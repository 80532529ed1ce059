//! containerd with its own shim for runc, and with hull's, in one private containerd per kind of
//! machine: a shim takes its configuration from containerd's environment.

use std::fs::{self, File};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, kill_process};

use crate::contestants::{Contestant, Root, Setup};
use crate::oci::call;
use crate::report::{Better, Results};
use crate::{Options, all};

/// How long a daemon may take to come up.
const UP: Duration = Duration::from_secs(30);

/// A containerd.
struct Containerd<'a> {
    setup: &'a Setup,
    contestant: Contestant,
    directory: tempfile::TempDir,
    daemon: Child,
}

impl<'a> Containerd<'a> {
    fn start(setup: &'a Setup, contestant: Contestant) -> Result<Self> {
        // A socket's path has at most 107 bytes.
        let directory = tempfile::Builder::new().prefix("b").tempdir_in("/tmp")?;
        let path = |name: &str| directory.path().join(name);
        fs::write(
            path("containerd.toml"),
            format!(
                "version = 2\nroot = {:?}\nstate = {:?}\n\
                 disabled_plugins = [\"io.containerd.grpc.v1.cri\", \
                 \"io.containerd.internal.v1.opt\"]\n\
                 [grpc]\naddress = {:?}\n[ttrpc]\naddress = {:?}\n",
                path("root"),
                path("state"),
                path("c.sock"),
                path("c.ttrpc"),
            ),
        )?;
        let mut command = setup.with_shims("containerd", contestant);
        let log = File::create(path("log"))?;
        let daemon = command
            .arg("--config")
            .arg(path("containerd.toml"))
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("start containerd")?;
        let containerd = Self {
            setup,
            contestant,
            directory,
            daemon,
        };
        let begin = Instant::now();
        while !containerd
            .ctr(&["version"])
            .stderr(Stdio::null())
            .status()?
            .success()
        {
            if begin.elapsed() > UP {
                bail!("containerd does not come up");
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(containerd)
    }

    fn ctr(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new("ctr");
        command
            .arg("--address")
            .arg(self.socket())
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::null());
        command
    }

    fn socket(&self) -> PathBuf {
        self.directory.path().join("c.sock")
    }

    /// `ctr run` of a command in a container of the busybox image's files.
    fn run(&self, option: &str, id: &str, arguments: &[&str]) -> Command {
        let runtime = match self.contestant {
            Contestant::Runc => "io.containerd.runc.v2",
            Contestant::Hull(_) => "io.containerd.hull.v2",
        };
        let mut command = self.ctr(&["run", option, "--runtime", runtime, "--rootfs"]);
        command
            .args(["--env", "PATH=/bin"])
            .arg(self.setup.root(Root::Busybox))
            .arg(id)
            .args(arguments);
        command
    }
}

impl Drop for Containerd<'_> {
    fn drop(&mut self) {
        if let Some(pid) = Pid::from_raw(self.daemon.id().cast_signed()) {
            // It may have ended by itself.
            let _ = kill_process(pid, Signal::TERM);
        }
        let _ = self.daemon.wait();
    }
}

/// `ctr run --rm`, and `ctr task exec` in a running container.
pub fn measure(options: &Options, setup: &Setup, results: &mut Results) -> Result<()> {
    let (run, exec) = (
        "containerd: ctr run --rm true",
        "containerd: ctr task exec true",
    );
    results.row(run, "ms", Better::Lower);
    results.row(exec, "ms", Better::Lower);
    let all = all(setup).into_iter();
    let all = all.map(|contestant| Containerd::start(setup, contestant));
    let all = all.collect::<Result<Vec<_>>>()?;
    let idle: Vec<String> = all.iter().map(|_| setup.unique()).collect();
    for (containerd, id) in all.iter().zip(&idle) {
        call(&mut containerd.run("-d", id, &["sleep", "1000"]))?;
    }
    let measured = (|| {
        for round in 0..=options.rounds(30) {
            for (containerd, idle) in all.iter().zip(&idle) {
                let contestant = containerd.contestant;
                if contestant.is_slow() && round > options.rounds(6) {
                    continue;
                }
                let id = setup.unique();
                let name = format!("exec-{id}");
                let calls = [
                    (run, containerd.run("--rm", &id, &["true"])),
                    (
                        exec,
                        containerd.ctr(&["task", "exec", "--exec-id", &name, idle, "true"]),
                    ),
                ];
                for (row, mut command) in calls {
                    let begin = Instant::now();
                    call(&mut command)?;
                    if round > 0 {
                        results.add(row, contestant, begin.elapsed().as_secs_f64() * 1e3);
                    }
                }
            }
        }
        Ok(())
    })();
    for (containerd, id) in all.iter().zip(&idle) {
        // The first error is the one to tell.
        let _ = containerd.ctr(&["task", "rm", "--force", id]).status();
        let _ = containerd.ctr(&["container", "rm", id]).status();
    }
    measured
}
