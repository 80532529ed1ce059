//! The control group of one container. The agent creates it before the clone, so that the
//! container's init starts in it.
//!
//! cgroup v2 only. The agent itself stays in the root group, which may have both processes and
//! children.

mod device_program;
mod resources;

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Component, Path, PathBuf};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use oci_spec::runtime::LinuxResources;
use rustix::event::{PollFd, PollFlags};
use rustix::fs::{AtFlags, CWD, Mode, OFlags};
use rustix::process::{Pid, Signal};

use self::device_program::DeviceProgram;
use self::resources::{Absent, Setting};
use super::error::{Context, CreateError, Result, reason};
use super::sys;

const ROOT: &str = "/sys/fs/cgroup";

/// Controllers that every container's group gets: for its limits, and for its statistics.
const ALWAYS: [&str; 4] = ["cpu", "io", "memory", "pids"];

/// How long the kernel may take to freeze or to end the processes of a group.
const CGROUP_TIMEOUT: Duration = Duration::from_secs(5);

/// A group to be created.
#[derive(Debug)]
pub(super) struct CgroupPlan {
    /// Relative to the root group.
    path: PathBuf,
    settings: Vec<Setting>,
    devices: DeviceProgram,
}

/// The group of one container.
#[derive(Debug)]
pub(super) struct Cgroup {
    path: PathBuf,
    directory: OwnedFd,
    /// The attached device program.
    devices: Mutex<Option<OwnedFd>>,
}

impl CgroupPlan {
    /// `path` is linux.cgroupsPath.
    pub(super) fn new(
        id: &str,
        path: Option<&Path>,
        resources: Option<&LinuxResources>,
    ) -> Result<CgroupPlan> {
        let path = path
            .filter(|path| !path.as_os_str().is_empty())
            .unwrap_or(Path::new(id));
        let invalid = |why: &str| {
            CreateError::invalid(
                "linux.cgroupsPath",
                format_args!("{}: {why}", path.display()),
            )
        };
        let mut relative = PathBuf::new();
        for component in path.components() {
            match component {
                Component::Normal(name) => relative.push(name),
                Component::RootDir | Component::CurDir => {}
                Component::ParentDir | Component::Prefix(_) => {
                    return Err(invalid("leads upwards"));
                }
            }
        }
        if relative.as_os_str().is_empty() {
            return Err(invalid("is the root of all groups"));
        }
        let devices = resources
            .and_then(|resources| resources.devices().as_deref())
            .unwrap_or_default();
        Ok(CgroupPlan {
            path: relative,
            settings: resources
                .map(resources::settings)
                .transpose()?
                .unwrap_or_default(),
            devices: DeviceProgram::new(devices)?,
        })
    }

    /// Path of the group.
    pub(super) fn path(&self) -> PathBuf {
        Path::new(ROOT).join(&self.path)
    }

    /// Creates the group without its limits; see [`Cgroup::apply`].
    pub(super) fn create(&self) -> Result<Cgroup> {
        let path = self.path();
        let mut parent =
            open_directory(CWD, Path::new(ROOT)).context(|| format!("cannot open {ROOT}"))?;
        let controllers = controllers(&self.settings)?;
        let mut existed = false;
        for name in &self.path {
            enable(parent.as_fd(), &controllers)?;
            existed = false;
            match rustix::fs::mkdirat(&parent, name, Mode::from_raw_mode(0o755)) {
                Ok(()) => {}
                Err(rustix::io::Errno::EXIST) => existed = true,
                Err(error) => {
                    return Err(error)
                        .context(|| format!("cannot make control group {}", path.display()));
                }
            }
            parent = open_directory(parent.as_fd(), Path::new(name))
                .context(|| format!("cannot open control group {}", path.display()))?;
        }
        let cgroup = Cgroup {
            path,
            directory: parent,
            devices: Mutex::new(None),
        };
        if existed
            && cgroup
                .read("cgroup.events")?
                .lines()
                .any(|line| line == "populated 1")
        {
            return Err(CreateError::invalid(
                "linux.cgroupsPath",
                format_args!("{} has processes in it already", cgroup.path.display()),
            ));
        }
        Ok(cgroup)
    }
}

/// Controllers that settings need, and those of [`ALWAYS`], in the format of subtree_control.
fn controllers(settings: &[Setting]) -> Result<String> {
    let available = available_controllers()?;
    let has = |controller: &str| available.iter().any(|name| name == controller);
    let mut chosen: Vec<&str> = ALWAYS
        .into_iter()
        .filter(|controller| has(controller))
        .collect();
    for setting in settings {
        let controller = setting.file.split('.').next().unwrap_or_default();
        if has(controller) {
            if !chosen.contains(&controller) {
                chosen.push(controller);
            }
        } else if setting.absent == Absent::Fail {
            return Err(CreateError::unsupported(
                setting.field,
                format_args!("the guest kernel has no {controller} controller"),
            ));
        }
    }
    Ok(chosen
        .iter()
        .map(|controller| format!("+{controller} "))
        .collect())
}

/// Enables controllers for the children of a group.
fn enable(parent: BorrowedFd<'_>, controllers: &str) -> Result<()> {
    sys::write_file(parent, c"cgroup.subtree_control", controllers.as_bytes())
        .context(|| format!("cannot enable the controllers {controllers}"))
}

/// Controllers of the guest's kernel.
fn available_controllers() -> Result<&'static [String]> {
    static CONTROLLERS: OnceLock<Vec<String>> = OnceLock::new();
    if let Some(controllers) = CONTROLLERS.get() {
        return Ok(controllers);
    }
    let path = format!("{ROOT}/cgroup.controllers");
    let text = std::fs::read_to_string(&path).context(|| format!("cannot read {path}"))?;
    Ok(CONTROLLERS.get_or_init(|| text.split_whitespace().map(str::to_owned).collect()))
}

fn open_directory(parent: BorrowedFd<'_>, path: &Path) -> rustix::io::Result<OwnedFd> {
    rustix::fs::openat(
        parent,
        path,
        OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )
}

impl Cgroup {
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn directory(&self) -> BorrowedFd<'_> {
        self.directory.as_fd()
    }

    /// The group below this one that a process of the container is in; `None` if it is in this one,
    /// or gone.
    pub(super) fn group_of(&self, pid: u32) -> Option<OwnedFd> {
        let text = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?;
        let path = text.lines().find_map(|line| line.strip_prefix("0::/"))?;
        let path = Path::new(ROOT).join(path);
        if path == self.path || !path.starts_with(&self.path) {
            return None;
        }
        open_directory(CWD, &path).ok()
    }

    /// Sets all limits.
    pub(super) fn apply(&self, plan: &CgroupPlan) -> Result<()> {
        for setting in &plan.settings {
            self.set(setting)?;
        }
        self.set_devices(&plan.devices)
    }

    fn set(&self, setting: &Setting) -> Result<()> {
        let failed = |error: io::Error, file: &str, value: &str| {
            let why = match error.kind() {
                io::ErrorKind::NotFound => "the guest kernel has no such control".into(),
                _ => reason(&error),
            };
            CreateError::other(
                format_args!("cannot set {} ({file} to {value:?})", setting.field),
                why,
            )
        };
        match sys::write_file(
            &self.directory,
            setting.file.as_ref(),
            setting.value.as_bytes(),
        ) {
            Ok(()) => Ok(()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => match &setting.absent {
                Absent::Fail => Err(failed(error, &setting.file, &setting.value)),
                Absent::Ignore => Ok(()),
                Absent::Write(file, value) => {
                    sys::write_file(&self.directory, *file, value.as_bytes())
                        .map_err(|error| failed(error, file, value))
                }
            },
            Err(error) => Err(failed(error, &setting.file, &setting.value)),
        }
    }

    fn set_devices(&self, program: &DeviceProgram) -> Result<()> {
        let mut attached = self.devices.lock().unwrap_or_else(PoisonError::into_inner);
        let loaded = program
            .attach(self.directory(), attached.as_ref().map(AsFd::as_fd))
            .context(|| "cannot set linux.resources.devices")?;
        *attached = loaded;
        Ok(())
    }

    /// Changes the limits in `resources`.
    pub(super) fn update(&self, resources: &LinuxResources) -> Result<()> {
        let plan = resources::settings(resources)?;
        let memory = resources.memory().as_ref();
        if memory.and_then(|memory| memory.check_before_update()) == Some(true)
            && let Some(limit) = memory
                .and_then(|memory| memory.limit())
                .filter(|limit| *limit > 0)
        {
            let used = self.read("memory.current")?;
            if used.trim().parse::<i64>().is_ok_and(|used| used > limit) {
                return Err(CreateError::invalid(
                    "linux.resources.memory.limit",
                    format_args!("{limit} is less than the {} in use", used.trim()),
                ));
            }
        }
        self.enable_on_the_way(&plan)?;
        for setting in &plan {
            self.set(setting)?;
        }
        match resources.devices() {
            Some(devices) if !devices.is_empty() => self.set_devices(&DeviceProgram::new(devices)?),
            _ => Ok(()),
        }
    }

    /// Enables controllers that later limits need, from the root group down to this one.
    fn enable_on_the_way(&self, settings: &[Setting]) -> Result<()> {
        let controllers = controllers(settings)?;
        let mut group = PathBuf::from(ROOT);
        for name in self.path.strip_prefix(ROOT).unwrap_or(&self.path) {
            let parent = open_directory(CWD, &group)
                .context(|| format!("cannot open {}", group.display()))?;
            enable(parent.as_fd(), &controllers)?;
            group.push(name);
        }
        Ok(())
    }

    fn read(&self, file: &str) -> Result<String> {
        let path = self.path.join(file);
        std::fs::read_to_string(&path).context(|| format!("cannot read {}", path.display()))
    }

    /// Gives the group's delegatable files, as the kernel lists them, to the owner of a user
    /// namespace.
    pub(super) fn delegate(&self, uid: u32) -> Result<()> {
        let files = std::fs::read_to_string("/sys/kernel/cgroup/delegate")
            .unwrap_or_else(|_| "cgroup.procs\ncgroup.subtree_control\ncgroup.threads\n".into());
        let owner = Some(rustix::fs::Uid::from_raw(uid));
        for file in std::iter::once(".").chain(files.lines()) {
            match rustix::fs::chownat(&self.directory, file, owner, None, AtFlags::empty()) {
                Ok(()) | Err(rustix::io::Errno::NOENT) => {}
                Err(error) => {
                    return Err(error)
                        .context(|| format!("cannot delegate {}/{file}", self.path.display()));
                }
            }
        }
        Ok(())
    }

    /// Freezes or thaws, and waits until it is done.
    pub(super) fn freeze(&self, frozen: bool) -> Result<()> {
        let word = if frozen { "1" } else { "0" };
        sys::write_file(&self.directory, c"cgroup.freeze", word.as_bytes())
            .context(|| format!("cannot write {}/cgroup.freeze", self.path.display()))?;
        if self.wait_for_event("frozen", word)? {
            return Ok(());
        }
        if frozen {
            // Do not leave it half frozen.
            let _ = sys::write_file(&self.directory, c"cgroup.freeze", b"0");
        }
        Err(CreateError::other(
            format_args!(
                "cannot {} {}",
                if frozen { "freeze" } else { "thaw" },
                self.path.display()
            ),
            format_args!(
                "the kernel did not manage to within {} seconds",
                CGROUP_TIMEOUT.as_secs()
            ),
        ))
    }

    /// Waits until cgroup.events has `key value`; false on timeout.
    fn wait_for_event(&self, key: &str, value: &str) -> Result<bool> {
        let what = || format!("cannot watch {}/cgroup.events", self.path.display());
        let events = rustix::fs::openat(
            &self.directory,
            c"cgroup.events",
            OFlags::RDONLY | OFlags::CLOEXEC,
            Mode::empty(),
        )
        .context(what)?;
        let end = Instant::now() + CGROUP_TIMEOUT;
        loop {
            let mut buffer = [0; 256];
            let length = rustix::io::pread(&events, &mut buffer, 0).context(what)?;
            let text = String::from_utf8_lossy(&buffer[..length]);
            if text
                .lines()
                .any(|line| line.split_once(' ') == Some((key, value)))
            {
                return Ok(true);
            }
            let Some(left) = end.checked_duration_since(Instant::now()) else {
                return Ok(false);
            };
            let timeout = rustix::time::Timespec {
                tv_sec: left.as_secs() as i64,
                tv_nsec: i64::from(left.subsec_nanos()),
            };
            match rustix::event::poll(&mut [PollFd::new(&events, PollFlags::PRI)], Some(&timeout)) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error).context(what),
            }
        }
    }

    /// Sends a signal to every process in the group and below.
    pub(super) fn signal(&self, signal: i32) -> Result<()> {
        if signal == libc::SIGKILL {
            return sys::write_file(&self.directory, c"cgroup.kill", b"1")
                .context(|| format!("cannot write {}/cgroup.kill", self.path.display()));
        }
        let signal = Signal::from_named_raw(signal)
            .ok_or_else(|| CreateError::invalid("signal", format_args!("{signal} is unknown")))?;
        signal_tree(&self.path, signal)
    }

    /// Kills what is left and removes the group with all below it.
    pub(super) fn destroy(&self) -> Result<()> {
        match rustix::fs::rmdir(&self.path) {
            Ok(()) | Err(rustix::io::Errno::NOENT) => return Ok(()),
            Err(_) => {}
        }
        self.signal(libc::SIGKILL)?;
        // Killed processes of a frozen group stay until it is thawed.
        let _ = sys::write_file(&self.directory, c"cgroup.freeze", b"0");
        if !self.wait_for_event("populated", "0")? {
            return Err(CreateError::other(
                format_args!("cannot remove {}", self.path.display()),
                format_args!(
                    "its processes did not end within {} seconds",
                    CGROUP_TIMEOUT.as_secs()
                ),
            ));
        }
        remove_tree(&self.path).context(|| format!("cannot remove {}", self.path.display()))
    }
}

fn signal_tree(path: &Path, signal: Signal) -> Result<()> {
    let procs = path.join("cgroup.procs");
    let text =
        std::fs::read_to_string(&procs).context(|| format!("cannot read {}", procs.display()))?;
    for pid in text
        .lines()
        .filter_map(|line| line.parse().ok())
        .filter_map(Pid::from_raw)
    {
        match rustix::process::kill_process(pid, signal) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => {}
            Err(error) => {
                return Err(error)
                    .context(|| format!("cannot signal process {}", pid.as_raw_nonzero()));
            }
        }
    }
    for child in children(path).context(|| format!("cannot list {}", path.display()))? {
        signal_tree(&child, signal)?;
    }
    Ok(())
}

fn children(path: &Path) -> io::Result<Vec<PathBuf>> {
    let mut children = Vec::new();
    for entry in std::fs::read_dir(path)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            children.push(entry.path());
        }
    }
    Ok(children)
}

fn remove_tree(path: &Path) -> io::Result<()> {
    for child in children(path)? {
        remove_tree(&child)?;
    }
    Ok(rustix::fs::rmdir(path)?)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn path(path: &str) -> Result<PathBuf> {
        CgroupPlan::new("c1", Some(Path::new(path)), None).map(|plan| plan.path)
    }

    #[test]
    fn paths_stay_below_the_root() {
        assert_eq!(path("").unwrap(), Path::new("c1"));
        assert_eq!(path("/pod/c1").unwrap(), Path::new("pod/c1"));
        assert_eq!(path("pod//./c1").unwrap(), Path::new("pod/c1"));
        assert!(path("/").unwrap_err().to_string().contains("root"));
        assert!(
            path("/pod/../..")
                .unwrap_err()
                .to_string()
                .contains("upwards")
        );
        // The host has told systemd's notation apart.
        let name = "system.slice:docker:abc";
        assert_eq!(path(name).unwrap(), Path::new(name));
    }
}
