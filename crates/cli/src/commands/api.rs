//! `hull api`.

use std::fs;
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::signal::{SigSet, Signal};
use nix::unistd::Group;
use rustix::process::{Resource, getrlimit, setrlimit};

use super::config_for_root;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::output;

/// First descriptor that a service manager passes: sd_listen_fds(3).
const FIRST_PASSED: i32 = 3;

/// Arguments of `api`.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "What the docker command line, docker compose and client libraries ask for: \
                  DOCKER_HOST=unix:///run/hull/api.sock docker run …. No command of hull needs it. \
                  Who can open the socket can do what its owner can.\n\
                  With a socket of a service manager (hull install systemd), that one is served."
)]
pub struct Args {
    /// Socket to create; api.sock in the run directory when absent
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
    /// Group that may open it, too
    #[arg(long, value_name = "NAME")]
    group: Option<String>,
    /// End when nobody has asked for anything for so long; 0 for never
    #[arg(long, value_name = "SECONDS", default_value_t = 0)]
    time: u64,
}

/// Serves Docker's Engine API until a signal comes.
pub fn execute(args: Args) -> Result<u8> {
    let passed = passed()?;
    let config = config_for_root()?;
    // Until somebody takes them: the file of the socket would be left.
    let ending = SigSet::from_iter([Signal::SIGTERM, Signal::SIGINT]);
    ending.thread_block().context(|| "block signals")?;
    let idle = (args.time > 0).then(|| Duration::from_secs(args.time));
    let (listener, _created) = match (passed, &args.socket) {
        (Some(_), Some(_)) => {
            return Err(Error::invalid(
                "--socket, and a socket of the service manager: one of them is enough",
            ));
        }
        (Some(listener), None) => (listener, None),
        (None, socket) => {
            let default = || config.run_dir.join("api.sock");
            let path = socket.clone().unwrap_or_else(default);
            let created = Created::bind(&path, args.group.as_deref())?;
            output::note(format!("serving on {}", path.display()));
            (created.0, Some(created.1))
        }
    };
    take_descriptors();
    let version = env!("CARGO_PKG_VERSION");
    hull_api::serve(config, version, listener, idle, || {
        // Cannot fail: the argument is a constant.
        let _ = ending.thread_unblock();
    })?;
    Ok(0)
}

/// Descriptors for the connections of many clients; some programs that are started from here look
/// at each one that they might have.
const DESCRIPTORS: u64 = 65536;

/// Takes as many descriptors as there may be.
fn take_descriptors() {
    let mut limit = getrlimit(Resource::Nofile);
    let most = limit.maximum.unwrap_or(DESCRIPTORS).min(DESCRIPTORS);
    if limit.current.is_some_and(|current| current < most) {
        limit.current = Some(most);
        // With fewer there are fewer clients.
        let _ = setrlimit(Resource::Nofile, limit);
    }
}

/// The socket of the service manager that started this process: sd_listen_fds(3).
#[allow(unsafe_code)]
fn passed() -> Result<Option<UnixListener>> {
    let own = std::process::id().to_string();
    if std::env::var("LISTEN_PID").ok() != Some(own) {
        return Ok(None);
    }
    match std::env::var("LISTEN_FDS").as_deref() {
        Ok("1") => {}
        Ok("0") | Err(_) => return Ok(None),
        Ok(several) => {
            return Err(Error::invalid(format!(
                "the service manager passed {several} sockets: one is served"
            )));
        }
    }
    // SAFETY: the service manager has passed it, and nothing else in this process owns it.
    let socket = unsafe { OwnedFd::from_raw_fd(FIRST_PASSED) };
    rustix::io::fcntl_setfd(&socket, rustix::io::FdFlags::CLOEXEC)
        .context(|| "take over the service manager's socket")?;
    Ok(Some(socket.into()))
}

/// The file of a socket; removed with this, if it is still the same one.
struct Created {
    path: PathBuf,
    inode: u64,
}

impl Created {
    fn bind(path: &Path, group: Option<&str>) -> Result<(UnixListener, Self)> {
        let doing = || format!("create the socket {}", path.display());
        let gid = group.map(find_group).transpose()?;
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent).context(|| format!("create {}", parent.display()))?;
        }
        // There is one thread: nobody else creates files meanwhile.
        let before = rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o177));
        let bound = Self::bind_or_replace(path);
        rustix::process::umask(before);
        let listener = bound?;
        let inode = fs::metadata(path).context(doing)?.ino();
        let created = Self {
            path: path.to_owned(),
            inode,
        };
        if let Some(gid) = gid {
            std::os::unix::fs::chown(path, None, Some(gid)).context(doing)?;
            fs::set_permissions(path, fs::Permissions::from_mode(0o660)).context(doing)?;
        }
        Ok((listener, created))
    }

    fn bind_or_replace(path: &Path) -> Result<UnixListener> {
        let bound = match UnixListener::bind(path) {
            Err(error) if error.kind() == std::io::ErrorKind::AddrInUse => {
                remove_stale(path)?;
                UnixListener::bind(path)
            }
            bound => bound,
        };
        bound.context(|| format!("create the socket {}", path.display()))
    }
}

impl Drop for Created {
    fn drop(&mut self) {
        if fs::metadata(&self.path).is_ok_and(|found| found.ino() == self.inode) {
            // Left for the next one to remove.
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Removes the file of a socket on which nobody listens any more.
fn remove_stale(path: &Path) -> Result<()> {
    let shown = path.display();
    let is_socket = fs::symlink_metadata(path).is_ok_and(|found| found.file_type().is_socket());
    if !is_socket {
        return Err(Error::with_kind(
            ErrorKind::Exists,
            format!("{shown} exists, and is no socket"),
        )
        .hint("give another path with --socket"));
    }
    match UnixStream::connect(path) {
        Err(error) if error.kind() == std::io::ErrorKind::ConnectionRefused => {
            fs::remove_file(path).context(|| format!("remove {shown}"))
        }
        _ => Err(Error::with_kind(
            ErrorKind::Exists,
            format!("another process serves on {shown}"),
        )
        .hint("give another path with --socket, or end that process")),
    }
}

fn find_group(name: &str) -> Result<u32> {
    if let Ok(number) = name.parse() {
        return Ok(number);
    }
    let found = Group::from_name(name).context(|| format!("look up the group {name}"))?;
    match found {
        Some(group) => Ok(group.gid.as_raw()),
        None => Err(Error::invalid(format!(
            "--group: there is no group {name:?}"
        ))),
    }
}
