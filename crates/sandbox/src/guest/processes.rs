//! Starts the processes of a guest, its devices and its machine, watches them, and pauses them.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use hull_device_control::{CONTROL_FD, DeviceConfig, DeviceType, MAX_DISKS, Setup, Transport};
use hull_ipc::watch;
use hull_jail::{self as jail, JailSpec, Started, Status};
use hull_machine::{
    ConsoleRing, DeviceWiring, Devices as MachineDevices, Features, Machine,
    MachineConfig as MachineStart, NetDevices, ProcessRole, Wiring,
};
use hull_protocol::net_device_mac;
use rustix::fs::{Mode, OFlags};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::watch as signal;
use tokio::task::spawn_blocking;

use super::supervise::{Ends, Reason, Verdict, supervise};
use super::{Devices, Dials};
use crate::config::MachineConfig;
use crate::error::{Context, Error, Result};
use crate::network::Nets;
use crate::rootless;
use crate::store::{HostProcesses, SandboxPath};

/// Devices that every machine has: fs, vsock, entropy.
const FIXED_DEVICES: usize = 3;

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

/// `oom_score_adj` of a guest's processes (proc_pid_oom_score_adj(5)): a fifth of the host's memory
/// more than they use.
const OOM_SCORE_ADJ: &str = "200";

/// Lines of the console that go with a failure.
const CONSOLE_LINES: usize = 50;

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
    /// The device process, of a kind of machine that has one.
    devices: Option<Watched>,
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
    /// How many disks can be added.
    pub spare_disks: usize,
    /// What the machine can do.
    pub features: Features,
}

/// What a guest consists of, started.
pub struct Parts {
    /// The device process, of a kind of machine that has one.
    pub devices: Option<Started>,
    /// What controls the devices.
    pub control: Devices,
    /// The machine.
    pub machine: Box<dyn Machine>,
    /// The reading side of its console.
    pub console: ConsoleRing,
    /// What it can do.
    pub features: Features,
    /// How many net devices it has.
    pub nets: u8,
    /// How many disks can be added.
    pub spare_disks: usize,
    /// The user of its jailed processes.
    pub uid: u32,
}

/// Pauses a machine, as long as there is one.
pub struct MachineHandle(Weak<tokio::sync::Mutex<Box<dyn Machine>>>);

impl std::fmt::Debug for MachineHandle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("MachineHandle").finish_non_exhaustive()
    }
}

impl MachineHandle {
    /// Stops the guest: no code of it runs when this returns. Its devices go on.
    ///
    /// # Errors
    /// It has ended, or does not stop in time; it runs on then.
    pub async fn pause(&self) -> Result<()> {
        self.operate(|machine| machine.pause()).await
    }

    /// Lets a paused guest go on. Its monotonic clock goes on from where it stopped; its wall clock
    /// is to be set through the agent afterwards.
    ///
    /// # Errors
    /// It has ended, or does not answer in time.
    pub async fn resume(&self) -> Result<()> {
        self.operate(|machine| machine.resume()).await
    }

    async fn operate(
        &self,
        operation: fn(&mut dyn Machine) -> std::result::Result<(), hull_machine::Error>,
    ) -> Result<()> {
        let Some(machine) = self.0.upgrade() else {
            return Err(Error::wrong_state("the machine has ended"));
        };
        spawn_blocking(move || operation(&mut **machine.blocking_lock()))
            .await
            .context(|| "operate the machine")?
            .map_err(Error::from)
    }
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
            pidfd: watch(pidfd, Interest::READABLE).context(|| "watch a process")?,
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
        let all = [Some(&self.machine_process), self.devices.as_ref()];
        for process in all.into_iter().flatten() {
            process.kill();
        }
        // Nothing may run any more when the files are removed. SIGKILL takes effect soon. The
        // machine is collected by its own handle.
        let options = WaitIdOptions::EXITED;
        let machine = (&self.machine_process, options | WaitIdOptions::NOWAIT);
        let devices = self.devices.iter().map(|process| (process, options));
        for (process, options) in std::iter::once(machine).chain(devices) {
            let _ = waitid(WaitId::PidFd(process.pidfd.as_fd()), options);
        }
    }
}

impl Guest {
    /// Starts the device process and the machine, whose branches may be kept apart from those of
    /// other processes.
    ///
    /// # Errors
    /// Either cannot be started.
    pub fn start(
        path: &SandboxPath,
        request: &MachineConfig,
        isolate_branches: bool,
        disks: Vec<Disk>,
    ) -> Result<(Self, Dials)> {
        let jail_uid = jail_uid();
        let backend = request.choice.backend();
        let features = backend.features();
        let nets = net_devices(request, &features, disks.len());
        let spare_disks = match features.disks {
            hull_machine::Disks::AtBoot => 0,
            hull_machine::Disks::HotPlug { .. } => {
                usize::from(request.spare_disks).min(MAX_DISKS.saturating_sub(disks.len()))
            }
        };
        let setup = setup(&features, nets, &disks, spare_disks)?;
        let (ours, theirs) = hull_ipc::pair().context(|| "create a control socket")?;
        let executable = request.hull.as_deref();
        let executable = File::open(executable.unwrap_or(Path::new("/proc/self/exe")))
            .context(|| "open hull's executable")?;
        let (devices, listeners, machine_devices) = match setup.transport {
            Transport::VhostUser => {
                let listeners = listen(&path.devices(), &setup)?;
                let started = start_devices(&executable, &theirs)?;
                drop(theirs);
                let wired = MachineDevices::Sockets(wire_devices(&path.devices(), &setup)?);
                (Some(started), listeners, wired)
            }
            Transport::Mmio => {
                let own = MachineDevices::Own {
                    control: theirs,
                    executable: executable.into(),
                };
                (None, Vec::new(), own)
            }
        };
        let mut descriptors = Vec::new();
        let mut sockets = listeners.iter().map(|listener| listener.as_fd());
        let mut files = disks.iter().map(|disk| disk.file.as_fd());
        for device in &setup.devices {
            descriptors.extend(sockets.next());
            if device.device_type() == DeviceType::Disk {
                descriptors.extend(files.next());
            }
        }
        let (control, incoming) = Devices::start(ours, &setup, &descriptors, Dials::PORTS)?;
        let dials = Dials::new(incoming);

        let (console, console_write) =
            ConsoleRing::create(&path.console()).context(|| "create the console")?;
        let config = MachineStart {
            kernel: request.choice.kernel.clone(),
            initramfs: request.initramfs.clone(),
            memory: request.memory,
            vcpus: request.cpus,
            hardware: request.choice.hardware,
            isolate_branches,
        };
        let wiring = Wiring {
            console: console_write,
            devices: machine_devices,
            uid: jail_uid,
        };
        let machine = backend.start(&config, wiring)?;
        let started = machine.processes().iter().map(|process| process.pid);
        let device_process = devices.iter().map(|devices| devices.pid);
        for pid in started.chain(device_process) {
            prefer_for_oom(pid);
        }
        let parts = Parts {
            machine,
            devices,
            control,
            console,
            features,
            nets,
            spare_disks,
            uid: jail_uid,
        };
        Ok((Self::watch(path, parts)?, dials))
    }

    /// Watches processes that have been started.
    ///
    /// # Errors
    /// The machine has no process, or no descriptors are left.
    pub fn watch(path: &SandboxPath, parts: Parts) -> Result<Self> {
        let control = Arc::new(parts.control);
        let process = parts
            .machine
            .processes()
            .iter()
            .find(|process| process.role == ProcessRole::Machine)
            .ok_or_else(|| Error::new("the machine has no process"))?;
        let pidfd = process.pidfd.try_clone().context(|| "watch the machine")?;
        let machine_process = Watched::new(process.pid, pidfd)?;
        let console = Arc::new(Mutex::new(parts.console));
        let (ended, console_ended) = signal::channel(false);
        tokio::spawn(read_console(console.clone(), ended));
        Ok(Self {
            devices: match parts.devices {
                Some(devices) => Some(Watched::new(devices.pid, devices.pidfd)?),
                None => None,
            },
            machine_process,
            machine: Arc::new(tokio::sync::Mutex::new(parts.machine)),
            ends: Mutex::default(),
            diagnostics: path.diagnostics(),
            console,
            console_ended,
            nets: Nets {
                control: control.clone(),
                count: parts.nets,
                devices: parts.features.net,
                owner: parts.uid,
            },
            control,
            spare_disks: parts.spare_disks,
            features: parts.features,
        })
    }

    /// The host's processes of its sandbox, of which this process is one.
    pub fn processes(&self) -> HostProcesses {
        HostProcesses {
            sandbox: std::process::id().cast_signed(),
            devices: self.devices.as_ref().map_or(0, |devices| devices.pid),
            machine: self.machine_process.pid,
        }
    }

    /// What pauses it.
    pub fn handle(&self) -> MachineHandle {
        MachineHandle(Arc::downgrade(&self.machine))
    }

    async fn first_end(&self) {
        tokio::select! {
            () = self.machine_process.ended() => {}
            () = self.devices_ended() => {}
        }
    }

    /// Waits for the end of the device process, for ever where there is none.
    async fn devices_ended(&self) {
        match &self.devices {
            Some(devices) => devices.ended().await,
            None => std::future::pending().await,
        }
    }

    /// The same, when a process ends within this time.
    pub async fn broke_down_within(&self, time: Duration) -> Option<String> {
        tokio::time::timeout(time, self.first_end()).await.ok()?;
        Some(self.broke_down().await)
    }

    /// Waits until one of the processes ends; the reason as one line.
    pub async fn broke_down(&self) -> String {
        self.first_end().await;
        let reason = self.reason().await;
        if let Reason::Machine(_) = reason {
            // The last lines of the guest's kernel are in the pipe.
            let mut ended = self.console_ended.clone();
            let end = ended.wait_for(|ended| *ended);
            let _ = tokio::time::timeout(CONSOLE_EXIT_GRACE, end).await;
        }
        let diagnostics = match (&reason, &self.devices) {
            // It is the device process's message, if there is one.
            (Reason::Machine(_), Some(_)) => None,
            _ => last_error(&self.diagnostics),
        };
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
                    let end = self.devices_ended();
                    waited = tokio::time::timeout(DEVICE_EXIT_GRACE, end).await.is_err();
                }
                // Woken early.
                Verdict::Running => self.first_end().await,
            }
        }
    }

    /// Looks which processes have ended.
    async fn observe(&self) -> Ends {
        let machine = self.machine.lock().await.exit();
        let mut ends = lock(&self.ends);
        let devices = match (ends.devices, &self.devices) {
            (None, Some(devices)) => Status::reap(devices.pidfd.as_fd()).transpose(),
            // Collected before, which a process can be only once; or there is none.
            (known, _) => known,
        };
        ends.own_devices = self.devices.is_none();
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

/// When the host has no memory left, a guest goes before the host's own programs.
fn prefer_for_oom(pid: i32) {
    let path = format!("/proc/{pid}/oom_score_adj");
    // It may have ended.
    if let Err(error) = fs::write(path, OOM_SCORE_ADJ) {
        tracing::debug!("cannot set the OOM score of process {pid}: {error}");
    }
}

/// The last error that the host's own processes reported.
fn last_error(diagnostics: &Path) -> Option<String> {
    let text = fs::read(diagnostics).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let line = text.lines().rfind(|line| line.starts_with("error: "))?;
    Some(super::agent::printable(line))
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
fn net_devices(request: &MachineConfig, features: &Features, disks: usize) -> u8 {
    let room = match features.max_devices {
        Some(most) => most.saturating_sub(FIXED_DEVICES + disks),
        None => usize::MAX,
    };
    let room = u8::try_from(room).unwrap_or(u8::MAX).min(request.nets);
    match features.net {
        NetDevices::AtBoot { .. } => room.min(MAX_NETS_AT_BOOT),
        NetDevices::HotPlug { .. } => room,
    }
}

/// The devices of a machine. The vsock device is the first one that the guest probes: the agent
/// connects over it.
fn setup(features: &Features, nets: u8, disks: &[Disk], spare_disks: usize) -> Result<Setup> {
    if disks.len() > MAX_DISKS {
        return Err(Error::unsupported(format_args!(
            "{} disks: a machine has {MAX_DISKS} at most",
            disks.len()
        )));
    }
    let early_enable = match features.net {
        NetDevices::AtBoot {
            enables_rings_early,
        } => enables_rings_early,
        NetDevices::HotPlug { .. } => false,
    };
    let mut devices = vec![DeviceConfig::Vsock, DeviceConfig::Fs, DeviceConfig::Entropy];
    if features.own_devices {
        devices.push(DeviceConfig::Balloon);
    }
    devices.extend((0..nets).map(|index| DeviceConfig::Net {
        mac: net_device_mac(index),
        early_enable,
    }));
    devices.extend(disks.iter().map(|disk| DeviceConfig::Disk {
        read_only: disk.read_only,
    }));
    devices.extend(std::iter::repeat_n(DeviceConfig::SpareDisk, spare_disks));
    let transport = match features.own_devices {
        true => Transport::Mmio,
        false => Transport::VhostUser,
    };
    Ok(Setup { transport, devices })
}

fn socket_path(directory: &Path, name: &str) -> PathBuf {
    directory.join(format!("{name}.sock"))
}

/// The machine's ends of the sockets that [`listen`] creates.
fn wire_devices(directory: &Path, setup: &Setup) -> Result<Vec<DeviceWiring>> {
    let devices = setup.devices.iter().cloned();
    devices
        .zip(setup.names())
        .map(|(config, name)| {
            let path = socket_path(directory, &name);
            let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let socket = rustix::fs::open(&path, flags, Mode::empty())
                .context(|| format!("open {}", path.display()))?;
            Ok(DeviceWiring { config, socket })
        })
        .collect()
}

/// Creates the sockets between machine and device process.
fn listen(directory: &Path, setup: &Setup) -> Result<Vec<UnixListener>> {
    fs::create_dir_all(directory).context(|| format!("create {}", directory.display()))?;
    setup
        .names()
        .map(|name| {
            let path = socket_path(directory, &name);
            UnixListener::bind(&path).context(|| format!("create {}", path.display()))
        })
        .collect()
}

/// Starts the device process.
fn start_devices(executable: &File, control: &OwnedFd) -> Result<Started> {
    let stderr = io::stderr();
    Ok(jail::spawn(JailSpec {
        name: "the device process",
        executable: executable.as_fd(),
        argv: vec!["hull".into(), "device-process".into()],
        env: Vec::new(),
        fds: vec![(stderr.as_fd(), 2), (control.as_fd(), CONTROL_FD)],
        fixed_addresses: false,
        // The executable is our own: it confines itself, first thing.
        confinement: None,
    })?)
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
        .context(|| "share the console's pipe")
        .and_then(|pipe| watch(pipe, Interest::READABLE).context(|| "watch the console"))
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
