//! A sandbox as a library, with a real machine: what holds when its agent's connection breaks, and
//! when the machine is paused.
#![allow(clippy::unwrap_used)]

use std::fs::File;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use hull_machine::{Host, Kind, Requirements, choose};
use hull_sandbox::config::{
    ContainerConfig, EndPolicy, MachineConfig, ProcessConfig, SandboxConfig, Share, Stdio, Writers,
    share_name,
};
use hull_sandbox::shares::{self, ReadOnly};
use hull_sandbox::store::{Directory, SandboxDir, SandboxPath};
use hull_sandbox::{Process, Reason, Sandbox};
use serde_json::json;
use serde_json::value::to_raw_value;

/// A sandbox whose containers have the host's root file system, which they cannot write to.
struct Booted {
    sandbox: Sandbox,
    work: tempfile::TempDir,
}

const OUTPUT: Stdio = Stdio::Handover {
    terminal: false,
    stdin: false,
};

impl Booted {
    /// `None`, and why, where it cannot be.
    async fn new() -> Option<Self> {
        let stage = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/stage");
        let hull = stage.join("bin/hull");
        let file = |name: &str| -> PathBuf { stage.join("share/hull").join(name) };
        let (kernel, initramfs) = (file("kernel-um"), file("initramfs"));
        if !rustix::process::geteuid().is_root() {
            eprintln!("skipped: needs root");
            return None;
        }
        for needed in [&hull, &kernel, &initramfs] {
            if !needed.exists() {
                eprintln!("skipped: there is no {}: make stage", needed.display());
                return None;
            }
        }
        let work = tempfile::tempdir().unwrap();
        let host = Host {
            uml_kernel: Some(kernel),
            native_kernel: None,
            data_directory: work.path().to_owned(),
        };
        let requirements = Requirements {
            hardware_isolation: false,
            host,
        };
        let machine = MachineConfig {
            choice: choose(Some(Kind::Uml), &requirements).unwrap(),
            initramfs,
            memory: 256 << 20,
            cpus: 1,
            nets: 0,
            spare_disks: 0,
            hull: Some(hull),
        };
        let config = SandboxConfig::new(machine, EndPolicy::Explicit);
        let dir = SandboxDir::create(&SandboxPath::new(work.path(), "one")).unwrap();
        let sandbox = Sandbox::boot(config, dir, Vec::new()).await.unwrap();
        Some(Self { sandbox, work })
    }

    async fn run(&self, id: &str, script: &str) -> Process {
        let share = Share {
            name: share_name(id, "root"),
            is_file: false,
            writers: Writers::Guest,
            sealed: false,
        };
        let mount = shares::host(Path::new("/"), false, ReadOnly::Recursive).unwrap();
        let added = self
            .sandbox
            .add_shares(std::slice::from_ref(&share), vec![mount]);
        added.await.unwrap();
        let mount = |path: &str, kind: &str| json!({"destination": path, "type": kind});
        let spec = json!({
            "ociVersion": "1.2.0",
            "root": {"path": share.path(), "readonly": true},
            "process": process(script),
            "mounts": [mount("/proc", "proc"), mount("/dev", "tmpfs"), mount("/tmp", "tmpfs")],
            "linux": {"namespaces": [{"type": "pid"}, {"type": "mount"}]},
        });
        let mut config = ContainerConfig::new(id, to_raw_value(&spec).unwrap());
        config.stdio = OUTPUT;
        let directory = Directory::create(&self.work.path().join(id)).unwrap();
        let created = self.sandbox.create(config, directory, vec![share.name]);
        created.await.unwrap()
    }

    async fn exec(&self, id: &str, script: &str) -> (i32, String) {
        let config = ProcessConfig {
            container: id.to_owned(),
            process: to_raw_value(&process(script)).unwrap(),
            raw: Default::default(),
            stdio: OUTPUT,
            keeper: None,
            size: None,
        };
        let container = self.sandbox.container(id).unwrap();
        let mut process = container.exec(config).await.unwrap();
        let output = output_of(&mut process);
        let exit = process.wait().await;
        (exit.status, output.await.unwrap())
    }

    async fn end(self) {
        self.sandbox.shutdown(Reason::Terminated);
        self.sandbox.ended().await;
        let left = std::fs::read_dir(self.work.path().join("sandboxes")).unwrap();
        assert_eq!(left.count(), 0);
    }
}

fn process(script: &str) -> serde_json::Value {
    json!({
        "cwd": "/",
        "user": {"uid": 0, "gid": 0},
        "env": ["PATH=/usr/bin:/bin"],
        "args": ["/bin/sh", "-c", script],
    })
}

/// Reads a process's standard output to its end.
fn output_of(process: &mut Process) -> tokio::task::JoinHandle<String> {
    let stdout: OwnedFd = process.take_streams().remove(0);
    tokio::task::spawn_blocking(move || {
        let mut text = String::new();
        File::from(stdout).read_to_string(&mut text).unwrap();
        text
    })
}

#[tokio::test]
async fn the_agents_connection_is_cut_a_hundred_times_under_load_and_nothing_is_lost() {
    const LINES: usize = 30_000;
    let Some(booted) = Booted::new().await else {
        return;
    };
    let count = format!("i=0; while [ $i -lt {LINES} ]; do echo line $i; i=$((i+1)); done");
    let mut talking = booted
        .run("talking", &format!("{count}; exec sleep 1000"))
        .await;
    let reading = output_of(&mut talking);
    for round in 0..100 {
        let connections = booted.sandbox.reconnect().await.unwrap();
        assert!(connections > round, "{connections}");
        if round % 5 == 0 {
            let script = format!("echo {round}; exit 3");
            let exec = booted.exec("talking", &script);
            let cut = booted.sandbox.reconnect();
            let (exec, cut) = tokio::join!(exec, cut);
            cut.unwrap();
            assert_eq!(exec, (3, format!("{round}\n")));
        }
    }
    talking.signal(15).await.unwrap();
    // The init of a PID namespace ignores a signal that it has not asked for.
    talking.signal(9).await.unwrap();
    assert_eq!(talking.wait().await.status, 137);
    let text = reading.await.unwrap();
    for (number, line) in text.lines().enumerate() {
        assert_eq!(line, format!("line {number}"));
    }
    booted.end().await;
}

#[tokio::test]
async fn nothing_runs_in_a_paused_machine_and_its_wall_clock_is_set_afterwards() {
    let Some(booted) = Booted::new().await else {
        return;
    };
    let busy = booted.run("busy", "while :; do :; done").await;
    let machine = booted.sandbox.processes().machine;
    let used = || {
        let stat = std::fs::read_to_string(format!("/proc/{machine}/stat")).unwrap();
        let (_, fields) = stat.rsplit_once(')').unwrap();
        let ticks = |number: usize| fields.split_whitespace().nth(number - 3);
        ticks(14).unwrap().parse::<u64>().unwrap() + ticks(15).unwrap().parse::<u64>().unwrap()
    };
    let work = Duration::from_millis(1500);
    booted.sandbox.pause().await.unwrap();
    let before = used();
    tokio::time::sleep(work).await;
    assert_eq!(used(), before);
    booted.sandbox.resume().await.unwrap();
    let (status, time) = booted.exec("busy", "date +%s").await;
    assert_eq!(status, 0);
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap()
        .as_secs();
    let time: u64 = time.trim().parse().unwrap();
    assert!(now.abs_diff(time) <= 1, "{now} here, {time} there");
    busy.kill().await.unwrap();
    assert_eq!(busy.wait().await.status, 137);
    booted.end().await;
}
