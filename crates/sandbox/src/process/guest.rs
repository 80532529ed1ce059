//! Starts the processes of a guest, its devices and its machine, and notices when one of them ends.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use hull_jail::{self as jail, JailSpec, Started, Status};
use hull_machine::exit;
use hull_machine::{ConsoleRing, Kind, MachineSpec};
use hull_protocol::net_device_mac;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::devices::{Devices, Incoming};
use super::network::Nets;
use super::watch::watch;
use crate::error::{Context, Failure, Result};
use crate::paths::ContainerPaths;
use crate::request::MachineRequest;
use crate::rootless;

/// Sockets of the devices that every machine has, in the order of their descriptors in the device
/// process.
const SOCKETS: [&str; 3] = ["fs", "vsock", "entropy"];

/// Descriptor of the control socket in the device process; those of [`SOCKETS`] follow.
const CONTROL_FD: i32 = 3;

/// User ids of jailed processes begin here, above what distributions and container engines hand
/// out. Each sandbox adds the process id of its sandbox process, which no other has as long as it
/// lives.
const FIRST_JAIL_UID: u32 = 0x7000_0000;

/// In a user namespace with few ids, they are among so many of the highest ones.
const HIGHEST_IDS: u32 = 1024;

/// How long a machine may take to end after it has closed its devices.
const MACHINE_TIME: Duration = Duration::from_secs(2);

/// How long the device process may take to end after the machine that it served.
const AFTERMATH: Duration = Duration::from_millis(20);

/// Lines of the console that go with a failure.
const CONSOLE_LINES: usize = 50;

/// Most disks of a machine: each takes two descriptors of the device process among those that it
/// inherits.
const MAX_DISKS: usize = 16;

/// Most net devices of a machine whose kernel finds them only when it boots, which takes longer
/// with each.
const MAX_NETS_AT_BOOT: u8 = 4;

/// A disk of a machine.
#[derive(Debug)]
pub struct Disk {
    /// The block device, opened for what the guest may do.
    pub file: OwnedFd,
    /// The guest may only read.
    pub read_only: bool,
}

/// The processes of a guest. Dropping it ends them.
pub struct Guest {
    devices: Watched,
    machine: Watched,
    diagnostics: PathBuf,
    console: Arc<Mutex<ConsoleRing>>,
    /// The device process's control.
    pub control: Arc<Devices>,
    /// The machine's net devices.
    pub nets: Nets,
}

#[derive(Debug)]
struct Watched {
    pid: i32,
    pidfd: AsyncFd<OwnedFd>,
    /// The kernel tells it once; several may ask.
    status: OnceLock<Status>,
}

impl Watched {
    fn new(started: Started) -> Result<Self> {
        Ok(Self {
            pid: started.pid,
            pidfd: watch(started.pidfd, Interest::READABLE)?,
            status: OnceLock::new(),
        })
    }

    /// Waits for the end; how it ended, if that is not known already.
    async fn ended(&self) -> Option<Status> {
        if let Err(error) = self.pidfd.readable().await {
            tracing::error!("cannot watch process {}: {error}", self.pid);
        }
        if let Ok(Some(status)) = Status::reap(self.pidfd.as_fd()) {
            return Some(*self.status.get_or_init(|| status));
        }
        self.status.get().copied()
    }

    fn kill(&self) {
        use rustix::process::{Signal, pidfd_send_signal};
        // It may have ended already.
        let _ = pidfd_send_signal(&self.pidfd, Signal::KILL);
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        for process in [&self.machine, &self.devices] {
            process.kill();
        }
        for process in [&self.machine, &self.devices] {
            use rustix::process::{WaitId, WaitIdOptions, waitid};
            let id = WaitId::PidFd(process.pidfd.as_fd());
            // Nothing may run any more when the files are removed. SIGKILL does not keep us
            // waiting.
            let _ = waitid(id, WaitIdOptions::EXITED);
        }
    }
}

impl Guest {
    /// Starts the device process and the machine.
    ///
    /// # Errors
    /// Either cannot be started.
    pub fn start(
        paths: &ContainerPaths,
        request: &MachineRequest,
        disks: Vec<Disk>,
    ) -> Result<(Self, Incoming)> {
        let jail_uid = jail_uid();
        let nets = net_devices(request, disks.len());
        let (devices, control) =
            start_devices(&paths.devices(), request.choice.kind, nets, &disks)?;
        let devices = Watched::new(devices)?;
        let (control, incoming) = Devices::new(control)?;
        let control = Arc::new(control);

        let (ring, console_write) =
            ConsoleRing::create(&paths.console()).context(|| "create the console".into())?;
        let console = Arc::new(Mutex::new(ring));
        tokio::spawn(read_console(console.clone()));

        let spec = MachineSpec {
            kernel: request.choice.kernel.clone(),
            initramfs: request.initramfs.clone(),
            memory: request.memory,
            cpus: request.cpus,
            sockets: paths.devices(),
            nets: (0..nets).map(net_device_mac).collect(),
            disks: disks.len() as u32,
            jail_uid,
        };
        let machine = request
            .choice
            .machine()
            .and_then(|machine| machine.start(&spec, console_write))
            .map_err(|error| machine_failure(&error))?;
        Ok((
            Self {
                devices,
                machine: Watched::new(machine)?,
                diagnostics: paths.diagnostics(),
                console,
                nets: Nets {
                    control: control.clone(),
                    count: nets,
                    kind: request.choice.kind,
                    owner: jail_uid,
                },
                control,
            },
            incoming,
        ))
    }

    /// Process ids of device process and machine process.
    pub fn pids(&self) -> (i32, i32) {
        (self.devices.pid, self.machine.pid)
    }

    /// Waits until one of the processes ends; a line that says which and how. When both end, one
    /// has taken the other along: a device process that ended by itself is the cause, because it
    /// only does so when something is wrong.
    pub async fn broke_down(&self) -> String {
        tokio::select! {
            status = self.machine.ended() => {
                match tokio::time::timeout(AFTERMATH, self.devices.ended()).await {
                    Ok(devices) => match self.devices_broke_down(devices) {
                        Some(reason) => reason,
                        None => self.machine_broke_down(status).await,
                    },
                    Err(_) => self.machine_broke_down(status).await,
                }
            }
            status = self.devices.ended() => match self.devices_broke_down(status) {
                Some(reason) => reason,
                // It ends by itself when the machine has closed its sockets.
                None => match tokio::time::timeout(MACHINE_TIME, self.machine.ended()).await {
                    Ok(status) => self.machine_broke_down(status).await,
                    Err(_) => "the machine has left its devices".into(),
                },
            }
        }
    }

    /// How the device process ended, unless that was for lack of a machine.
    fn devices_broke_down(&self, status: Option<Status>) -> Option<String> {
        match status {
            Some(Status::Signal(signal)) => {
                Some(format!("the device process was killed by signal {signal}"))
            }
            Some(Status::Code(0)) => None,
            Some(Status::Code(code)) => {
                let said = last_line(&self.diagnostics);
                Some(format!("the device process ended with status {code}{said}"))
            }
            None => Some("the device process has ended".into()),
        }
    }

    async fn machine_broke_down(&self, status: Option<Status>) -> String {
        // What the guest's kernel had to say is still on its way through the pipe.
        tokio::time::sleep(Duration::from_millis(20)).await;
        let Some(status) = status else {
            return "the machine has ended".into();
        };
        exit::Exit::interpret(status, &self.console_tail()).to_string()
    }

    /// The last lines of the guest's console, fit for a person's terminal.
    pub fn console_tail(&self) -> Vec<String> {
        lock(&self.console).tail(CONSOLE_LINES)
    }
}

/// The last thing that the host's own processes had to say, to be appended to a message.
fn last_line(diagnostics: &Path) -> String {
    let text = fs::read(diagnostics).unwrap_or_default();
    String::from_utf8_lossy(&text)
        .lines()
        .rfind(|line| line.starts_with("error: "))
        .map(|line| format!(": {}", super::agent::printable(line)))
        .unwrap_or_default()
}

fn machine_failure(error: &hull_machine::Error) -> Failure {
    let failure = Failure::new(error.to_string());
    match error.hint() {
        Some(hint) => failure.hint(hint),
        None => failure,
    }
}

/// The user of this sandbox's jailed processes.
fn jail_uid() -> u32 {
    let pid = std::process::id();
    match rootless::in_user_namespace() {
        false => FIRST_JAIL_UID.wrapping_add(pid),
        // Not user 65534, whom images have; and not root.
        true => rootless::top_id()
            .saturating_sub(2 + pid % HIGHEST_IDS)
            .max(1),
    }
}

/// How many net devices a machine has beside its disks, of those that are asked for.
fn net_devices(request: &MachineRequest, disks: usize) -> u8 {
    let Some(most) = request.choice.kind.most_devices() else {
        return request.nets;
    };
    let room = most.saturating_sub(SOCKETS.len() + disks);
    u8::try_from(room)
        .unwrap_or(u8::MAX)
        .min(request.nets)
        .min(MAX_NETS_AT_BOOT)
}

/// Makes the sockets between machine and devices, and starts the device process on them.
fn start_devices(
    directory: &Path,
    kind: Kind,
    nets: u8,
    disks: &[Disk],
) -> Result<(Started, OwnedFd)> {
    let doing = || "start the device process".to_owned();
    if disks.len() > MAX_DISKS {
        return Err(Failure::new(format!(
            "not supported: {} disks: a machine has {MAX_DISKS} at most",
            disks.len()
        )));
    }
    fs::create_dir_all(directory).context(|| format!("create {}", directory.display()))?;
    let listen = |name: &str| {
        let path = directory.join(format!("{name}.sock"));
        UnixListener::bind(&path).context(|| format!("create {}", path.display()))
    };
    let listeners = SOCKETS
        .iter()
        .map(|name| listen(name))
        .collect::<Result<Vec<_>>>()?;
    let net_listeners = (0..nets)
        .map(|index| listen(&format!("net{index}")))
        .collect::<Result<Vec<_>>>()?;
    let disk_listeners = (0..disks.len())
        .map(|index| listen(&format!("disk{index}")))
        .collect::<Result<Vec<_>>>()?;
    let (ours, theirs) = socketpair(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )
    .context(doing)?;
    let executable = File::open("/proc/self/exe").context(doing)?;
    let stderr = io::stderr();

    let mut argv: Vec<OsString> = vec!["hull".into(), "device-process".into()];
    let mut fds = vec![(stderr.as_fd(), 2), (theirs.as_fd(), CONTROL_FD)];
    argv.extend(["--control-fd".into(), CONTROL_FD.to_string().into()]);
    for ((name, listener), fd) in SOCKETS.iter().zip(&listeners).zip(CONTROL_FD + 1..) {
        fds.push((listener.as_fd(), fd));
        argv.extend([format!("--{name}-fd").into(), fd.to_string().into()]);
    }
    let mut next = CONTROL_FD + 1 + listeners.len() as i32;
    let front_end = match kind {
        Kind::Qemu => ":qemu",
        _ => "",
    };
    for (index, listener) in (0..nets).zip(&net_listeners) {
        fds.push((listener.as_fd(), next));
        let mac: String = net_device_mac(index)
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        argv.extend(["--net-fd".into(), format!("{next}:{mac}{front_end}").into()]);
        next += 1;
    }
    for (disk, listener) in disks.iter().zip(&disk_listeners) {
        let (socket, file) = (next, next + 1);
        next += 2;
        fds.extend([(listener.as_fd(), socket), (disk.file.as_fd(), file)]);
        let read_only = if disk.read_only { ":ro" } else { "" };
        argv.extend([
            "--disk-fd".into(),
            format!("{socket}:{file}{read_only}").into(),
        ]);
    }
    let started = jail::spawn(JailSpec {
        name: "the device process",
        executable: executable.as_fd(),
        argv,
        env: Vec::new(),
        fds,
        fixed_addresses: false,
        // The executable is our own: it confines itself, first thing.
        confinement: None,
    })
    .context(doing)?;
    Ok((started, ours))
}

/// Carries the guest's console to its ring until the machine ends.
async fn read_console(ring: Arc<Mutex<ConsoleRing>>) {
    let pipe = match lock(&ring)
        .fd()
        .try_clone_to_owned()
        .context(|| "share the console's pipe".into())
        .and_then(|pipe| watch(pipe, Interest::READABLE))
    {
        Ok(pipe) => pipe,
        Err(error) => {
            tracing::error!("cannot read the guest's console: {error}");
            return;
        }
    };
    loop {
        let Ok(mut ready) = pipe.readable().await else {
            return;
        };
        ready.clear_ready();
        let mut ring = lock(&ring);
        let open = ring.drain();
        if let Err(error) = ring.flush() {
            tracing::warn!("cannot keep the guest's console: {error}");
        }
        if !matches!(open, Ok(true)) {
            return;
        }
    }
}

fn lock(ring: &Mutex<ConsoleRing>) -> MutexGuard<'_, ConsoleRing> {
    // A ring of bytes is valid at any time.
    ring.lock().unwrap_or_else(PoisonError::into_inner)
}
