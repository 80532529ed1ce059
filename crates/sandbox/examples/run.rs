//! Boots a sandbox, runs two containers in it and prints their events. Needs root.
//!
//! `cargo run -p hull-sandbox --example run -- HULL KERNEL INITRAMFS ROOTFS`
//!
//! HULL is the executable `hull`, KERNEL a user-mode kernel, ROOTFS a directory with a shell.

use std::error::Error;
use std::path::PathBuf;

use hull_machine::{Host, Kind, Requirements, choose};
use hull_sandbox::Sandbox;
use hull_sandbox::config::{
    ContainerConfig, EndPolicy, MachineConfig, SandboxConfig, Share, Writers, share_name,
};
use hull_sandbox::shares::{self, ReadOnly};
use hull_sandbox::store::{Directory, SandboxDir, SandboxPath};
use serde_json::{json, value::to_raw_value};

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<PathBuf> = std::env::args_os().skip(1).map(PathBuf::from).collect();
    let [hull, kernel, initramfs, rootfs] = arguments.as_slice() else {
        return Err("run HULL KERNEL INITRAMFS ROOTFS".into());
    };
    let work = tempfile::tempdir()?;
    let host = Host {
        uml_kernel: Some(kernel.clone()),
        native_kernel: None,
        data_directory: work.path().to_owned(),
    };
    let requirements = Requirements {
        hardware_isolation: false,
        host,
    };
    let machine = MachineConfig {
        choice: choose(Some(Kind::Uml), &requirements)?,
        initramfs: initramfs.clone(),
        memory: 256 << 20,
        cpus: 1,
        nets: 0,
        spare_disks: 0,
        hull: Some(hull.clone()),
    };
    let config = SandboxConfig::new(machine, EndPolicy::Explicit);
    let path = SandboxPath::new(work.path(), "example");
    let sandbox = Sandbox::boot(config, SandboxDir::create(&path)?, Vec::new()).await?;
    let mut events = sandbox.events();
    for (id, command) in [("one", "exit 3"), ("two", "sleep 0.1")] {
        let share = Share {
            name: share_name(id, "root"),
            is_file: false,
            writers: Writers::Guest,
            sealed: false,
        };
        let mount = shares::host(rootfs, false, ReadOnly::Recursive)?;
        sandbox
            .add_shares(std::slice::from_ref(&share), vec![mount])
            .await?;
        let spec = to_raw_value(&json!({
            "ociVersion": "1.2.0",
            "root": {"path": share.path(), "readonly": true},
            "process": {"cwd": "/", "user": {"uid": 0, "gid": 0}, "env": ["PATH=/bin"],
                "args": ["sh", "-c", command]},
            "mounts": [{"destination": "/proc", "type": "proc", "source": "proc"},
                {"destination": "/dev", "type": "tmpfs", "source": "tmpfs"}],
            "linux": {"namespaces": [{"type": "pid"}, {"type": "mount"}]},
        }))?;
        let directory = Directory::create(&work.path().join(id))?;
        let config = ContainerConfig::new(id, spec);
        let process = sandbox.create(config, directory, vec![share.name]).await?;
        let status = process.wait().await.status;
        println!("container {id} has ended with status {status}");
    }
    sandbox.shutdown(hull_sandbox::Reason::Removed);
    println!("the sandbox has ended: {}", sandbox.ended().await.reason);
    while let Ok(event) = events.try_recv() {
        println!("{}", serde_json::to_string(&event)?);
    }
    Ok(())
}
