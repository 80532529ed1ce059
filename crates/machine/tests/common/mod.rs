//! What the tests with guest kernels share: finding a kernel, and archives to boot.

use std::fmt::Write;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::process::{Command, Stdio};

use hull_device_control::{DeviceConfig, Setup, Transport};
use hull_machine::{Devices, Host, Kind};

/// The newest guest kernel in the build's cache. `None`, with the reason on standard error, where
/// the test cannot run.
pub fn kernel(kind: Kind) -> Option<PathBuf> {
    let found = find_kernel(kind);
    if let Err(why) = &found {
        eprintln!("skipped: {why}");
    }
    found.ok()
}

fn find_kernel(kind: Kind) -> Result<PathBuf, &'static str> {
    if !rustix::process::geteuid().is_root() {
        return Err("needs root");
    }
    if kind == Kind::Qemu {
        Command::new("qemu-system-x86_64")
            .arg("--version")
            .stdout(Stdio::null())
            .status()
            .map_err(|_| "qemu is not installed")?;
    }
    if kind == Kind::Kvm {
        let data = tempfile::tempdir().map_err(|_| "no temporary directory")?;
        let host = Host {
            uml_kernel: None,
            native_kernel: Some("/proc/self/exe".into()),
            data_directory: data.path().to_owned(),
        };
        kind.backend()
            .probe(&host)
            .map_err(|_| "KVM does not work")?;
        executable().ok_or("hull is not built")?;
    }
    let cache = std::env::var_os("HULL_CACHE")
        .map(PathBuf::from)
        .or_else(|| std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache/hull")));
    let prefix = format!("{}-", kind.kernel_architecture());
    let directories = std::fs::read_dir(cache.ok_or("no cache directory")?.join("kernel"));
    directories
        .map_err(|_| "no guest kernel has been built")?
        .filter_map(|entry| entry.ok())
        .filter(|entry| entry.file_name().to_string_lossy().starts_with(&prefix))
        .map(|entry| entry.path().join("kernel"))
        .filter(|path| path.is_file())
        .max_by_key(|path| path.metadata().and_then(|found| found.modified()).ok())
        .ok_or("no guest kernel has been built")
}

/// hull's executable: `HULL_BINARY`, or what lies beside this test's directory.
fn executable() -> Option<PathBuf> {
    let built = || {
        let test = std::env::current_exe().ok()?;
        Some(test.parent()?.parent()?.join("hull"))
    };
    let path = std::env::var_os("HULL_BINARY")
        .map(PathBuf::from)
        .or_else(built)?;
    path.is_file().then_some(path)
}

/// No devices, as a machine of this kind has them, and what has to live as long as the machine.
pub fn no_devices(kind: Kind) -> (Devices, Option<OwnedFd>) {
    if kind != Kind::Kvm {
        return (Devices::Sockets(Vec::new()), None);
    }
    let (devices, control) = own_devices(Vec::new(), &[]);
    (devices, Some(control))
}

/// Devices for a machine of kind `kvm`, and the other end of its control socket. `disks` are the
/// files of the disks among them.
pub fn own_devices(devices: Vec<DeviceConfig>, disks: &[BorrowedFd<'_>]) -> (Devices, OwnedFd) {
    let (ours, control) = hull_ipc::pair().unwrap();
    let setup = Setup {
        transport: Transport::Mmio,
        devices,
    };
    hull_ipc::send(&ours, &setup, disks).unwrap();
    let executable = std::fs::File::open(executable().unwrap()).unwrap().into();
    let own = Devices::Own {
        control,
        executable,
    };
    (own, ours)
}

/// An initramfs.
#[derive(Default)]
pub struct Archive {
    bytes: Vec<u8>,
}

impl Archive {
    /// Adds a file or directory.
    pub fn add(self, name: &str, mode: u32, data: &[u8]) -> Self {
        self.entry(name, mode, (0, 0), data)
    }

    /// Adds a character device.
    #[allow(dead_code)]
    pub fn device(self, name: &str, major: u32, minor: u32) -> Self {
        self.entry(name, 0o020_600, (major, minor), &[])
    }

    /// The archive.
    pub fn finish(self) -> Vec<u8> {
        self.add("TRAILER!!!", 0, &[]).bytes
    }

    fn entry(mut self, name: &str, mode: u32, device: (u32, u32), data: &[u8]) -> Self {
        // "newc" (the kernel's Documentation/driver-api/early-userspace/buffer-format.rst).
        let fields = [
            1,
            mode,
            0,
            0,
            1,
            0,
            data.len() as u32,
            0,
            0,
            device.0,
            device.1,
            name.len() as u32 + 1,
            0,
        ];
        let mut header = String::from("070701");
        for field in fields {
            write!(header, "{field:08x}").unwrap();
        }
        for part in [
            [header.as_bytes(), name.as_bytes(), &[0]]
                .concat()
                .as_slice(),
            data,
        ] {
            self.bytes.extend(part);
            self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
        }
        self
    }
}
