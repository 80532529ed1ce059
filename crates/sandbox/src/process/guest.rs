//! Starts the processes of a guest, its devices and its machine, watches them, and pauses them.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use hull_jail::{self as jail, JailSpec, Started, Status};
use hull_machine::{
    ConsoleRing, DeviceConfig, DeviceWiring, Features, Machine, MachineConfig, NetDevices,
    ProcessRole, Wiring,
};
use hull_protocol::net_device_mac;
use rustix::fs::{Mode, OFlags};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::watch as signal;
use tokio::task::spawn_blocking;

use super::devices::{Devices, Incoming};
use super::network::Nets;
use super::supervise::{Ends, Reason, Verdict, supervise};
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
const MACHINE_EXIT_GRACE: Duration = Duration::from_secs(2);

/// How long the device process may take to end after the machine that it served. A device process
/// that ended before the machine, and so may be the cause, is noticed well within that.
const DEVICE_EXIT_GRACE: Duration = Duration::from_millis(40);

/// How long the end of the console may follow that of the machine, which held it open.
const CONSOLE_EXIT_GRACE: Duration = Duration::from_millis(40);

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
    machine: Arc<tokio::sync::Mutex<Box<dyn Machine>>>,
    /// The machine process.
    machine_process: Watched,
    ends: Mutex<Ends>,
    diagnostics: PathBuf,
    console: Arc<Mutex<ConsoleRing>>,
    /// Becomes true when the console has been read to its end.
    console_ended: signal::Receiver<bool>,
    /// The device process's control.
    pub control: Arc<Devices>,
    /// The machine's net devices.
    pub nets: Nets,
    /// What the machine can do.
    pub features: Features,
}

/// A process whose end is awaited.
#[derive(Debug)]
struct Watched {
    pid: i32,
    pidfd: AsyncFd<OwnedFd>,
}

impl Watched {
    fn new(pid: i32, pidfd: OwnedFd) -> Result<Self> {
        Ok(Self {
            pid,
            pidfd: watch(pidfd, Interest::READABLE)?,
        })
    }

    async fn ended(&self) {
        if let Err(error) = self.pidfd.readable().await {
            tracing::error!("cannot watch process {}: {error}", self.pid);
        }
    }

    fn kill(&self) {
        use rustix::process::{Signal, pidfd_send_signal};
        // It may have ended already.
        let _ = pidfd_send_signal(&self.pidfd, Signal::KILL);
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        use rustix::process::{WaitId, WaitIdOptions, waitid};
        for process in [&self.machine_process, &self.devices] {
            process.kill();
        }
        // Nothing may run any more when the files are removed. SIGKILL takes effect soon. The
        // machine is collected by its own handle.
        let options = WaitIdOptions::EXITED;
        for (process, options) in [
            (&self.machine_process, options | WaitIdOptions::NOWAIT),
            (&self.devices, options),
        ] {
            let _ = waitid(WaitId::PidFd(process.pidfd.as_fd()), options);
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
        let backend = request.choice.backend()?;
        let features = backend.features();
        let nets = net_devices(request, &features, disks.len());
        let (devices, control) = start_devices(&paths.devices(), features.net, nets, &disks)?;
        let devices = Watched::new(devices.pid, devices.pidfd)?;
        let (control, incoming) = Devices::new(control)?;
        let control = Arc::new(control);

        let (ring, console_write) =
            ConsoleRing::create(&paths.console()).context(|| "create the console".into())?;
        let console = Arc::new(Mutex::new(ring));
        let (ended, console_ended) = signal::channel(false);
        tokio::spawn(read_console(console.clone(), ended));

        let config = MachineConfig {
            kernel: request.choice.kernel.clone(),
            initramfs: request.initramfs.clone(),
            memory: request.memory,
            vcpus: request.cpus,
            hardware: request.choice.hardware,
        };
        let wiring = Wiring {
            console: console_write,
            devices: wire_devices(&paths.devices(), nets, disks.len())?,
            uid: jail_uid,
        };
        let machine = backend.start(&config, wiring)?;
        let process = machine
            .processes()
            .iter()
            .find(|process| process.role == ProcessRole::Machine)
            .ok_or_else(|| Failure::new("the machine has no process"))?;
        let pidfd = process
            .pidfd
            .try_clone()
            .context(|| "watch the machine".into())?;
        Ok((
            Self {
                devices,
                machine_process: Watched::new(process.pid, pidfd)?,
                machine: Arc::new(tokio::sync::Mutex::new(machine)),
                ends: Mutex::default(),
                diagnostics: paths.diagnostics(),
                console,
                console_ended,
                nets: Nets {
                    control: control.clone(),
                    count: nets,
                    devices: features.net,
                    owner: jail_uid,
                },
                control,
                features,
            },
            incoming,
        ))
    }

    /// Process ids of device process and machine process.
    pub fn pids(&self) -> (i32, i32) {
        (self.devices.pid, self.machine_process.pid)
    }

    #[expect(dead_code, reason = "for the pause of a sandbox")]
    /// Stops the guest: no code of it runs when this returns. Its devices go on.
    ///
    /// # Errors
    /// It has ended, or does not stop in time; it runs on then.
    pub async fn pause(&self) -> Result<()> {
        self.operate(|machine| machine.pause()).await
    }

    #[expect(dead_code, reason = "for the pause of a sandbox")]
    /// Lets a paused guest go on. Its monotonic clock goes on from where it stopped; its wall clock
    /// is to be set through the agent afterwards ([`Features::host_clock`] or not).
    ///
    /// # Errors
    /// It has ended, or does not answer in time.
    pub async fn resume(&self) -> Result<()> {
        self.operate(|machine| machine.resume()).await
    }

    /// Does something with the machine that takes time.
    async fn operate(
        &self,
        operation: fn(&mut dyn Machine) -> std::result::Result<(), hull_machine::Error>,
    ) -> Result<()> {
        let machine = self.machine.clone();
        spawn_blocking(move || operation(&mut **machine.blocking_lock()))
            .await
            .map_err(|error| Failure::new(format!("the operation was aborted: {error}")))?
            .map_err(Failure::from)
    }

    /// Waits until one of the processes ends; the reason as one line.
    pub async fn broke_down(&self) -> String {
        tokio::select! {
            () = self.machine_process.ended() => {}
            () = self.devices.ended() => {}
        }
        let reason = self.reason().await;
        if let Reason::Machine(_) = reason {
            // The last lines of the guest's kernel are in the pipe.
            let mut ended = self.console_ended.clone();
            let end = ended.wait_for(|ended| *ended);
            let _ = tokio::time::timeout(CONSOLE_EXIT_GRACE, end).await;
        }
        let diagnostics = last_error(&self.diagnostics);
        reason.describe(&self.console_tail(), diagnostics.as_deref())
    }

    /// Why the guest ended, when one of its processes has.
    async fn reason(&self) -> Reason {
        let mut waited = false;
        loop {
            match supervise(&self.observe().await, waited) {
                Verdict::Ended(reason) => return reason,
                Verdict::WaitFor(ProcessRole::Machine) => {
                    let end = self.machine_process.ended();
                    waited = tokio::time::timeout(MACHINE_EXIT_GRACE, end).await.is_err();
                }
                Verdict::WaitFor(ProcessRole::Devices) => {
                    let end = self.devices.ended();
                    waited = tokio::time::timeout(DEVICE_EXIT_GRACE, end).await.is_err();
                }
                // Woken early.
                Verdict::Running => tokio::select! {
                    () = self.machine_process.ended() => {}
                    () = self.devices.ended() => {}
                },
            }
        }
    }

    /// Looks which processes have ended.
    async fn observe(&self) -> Ends {
        let machine = self.machine.lock().await.exit();
        let mut ends = lock(&self.ends);
        let devices = match ends.devices {
            None => Status::reap(self.devices.pidfd.as_fd()).transpose(),
            // Collected before: a process is only once.
            known => known,
        };
        if ends.first.is_none() && (ends.machine.is_none() && ends.devices.is_none()) {
            ends.first = match (&machine, &devices) {
                (Some(_), None) => Some(ProcessRole::Machine),
                (None, Some(_)) => Some(ProcessRole::Devices),
                _ => None,
            };
        }
        ends.machine = machine;
        ends.devices = devices;
        ends.clone()
    }

    /// The last lines of the guest's console, fit for a person's terminal.
    pub fn console_tail(&self) -> Vec<String> {
        lock(&self.console).tail(CONSOLE_LINES)
    }
}

/// The last error that the host's own processes reported.
fn last_error(diagnostics: &Path) -> Option<String> {
    let text = fs::read(diagnostics).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let line = text.lines().rfind(|line| line.starts_with("error: "))?;
    Some(super::agent::printable(line))
}

impl From<hull_machine::Error> for Failure {
    fn from(error: hull_machine::Error) -> Self {
        let failure = Failure::new(error.to_string());
        match error.hint() {
            Some(hint) => failure.hint(hint),
            None => failure,
        }
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
fn net_devices(request: &MachineRequest, features: &Features, disks: usize) -> u8 {
    let room = match features.max_devices {
        Some(most) => most.saturating_sub(SOCKETS.len() + disks),
        None => usize::MAX,
    };
    let room = u8::try_from(room).unwrap_or(u8::MAX).min(request.nets);
    match features.net {
        NetDevices::AtBoot { .. } => room.min(MAX_NETS_AT_BOOT),
        NetDevices::HotPlug { .. } => room,
    }
}

/// The machine's ends of the sockets that [`start_devices`] creates. The vsock device is the first
/// one: the agent connects over it.
fn wire_devices(directory: &Path, nets: u8, disks: usize) -> Result<Vec<DeviceWiring>> {
    let fixed = [
        (DeviceConfig::Vsock, "vsock".to_owned()),
        (DeviceConfig::Fs, "fs".to_owned()),
        (DeviceConfig::Entropy, "entropy".to_owned()),
    ];
    let nets = (0..nets).map(|index| {
        let mac = net_device_mac(index);
        (DeviceConfig::Net { mac }, format!("net{index}"))
    });
    let disks = (0..disks).map(|index| (DeviceConfig::Block, format!("disk{index}")));
    fixed
        .into_iter()
        .chain(nets)
        .chain(disks)
        .map(|(config, name)| {
            let path = directory.join(format!("{name}.sock"));
            let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let socket = rustix::fs::open(&path, flags, Mode::empty())
                .context(|| format!("open {}", path.display()))?;
            Ok(DeviceWiring { config, socket })
        })
        .collect()
}

/// Makes the sockets between machine and devices, and starts the device process on them.
fn start_devices(
    directory: &Path,
    net: NetDevices,
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
    let front_end = match net {
        NetDevices::AtBoot {
            enables_rings_early: true,
        } => ":qemu",
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

/// Reads the guest's console into its ring until the machine ends, which `ended` is told.
async fn read_console(ring: Arc<Mutex<ConsoleRing>>, ended: signal::Sender<bool>) {
    read_to_end(ring).await;
    ended.send_replace(true);
}

async fn read_to_end(ring: Arc<Mutex<ConsoleRing>>) {
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

fn lock<T>(state: &Mutex<T>) -> MutexGuard<'_, T> {
    // What these hold is valid at any time.
    state.lock().unwrap_or_else(PoisonError::into_inner)
}
