//! The roles of the executable that no person calls: sandbox process and device process, and the names that belong
//! to container engines. Looked at before anything else, because a sandbox process is part of every start.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use hull_devices::transport::vhost_user::FrontEnd;

use hull_sandbox::role;
use hull_sandbox::store::SandboxPath;

use crate::error::{self, Context, Error, HULL_FAILED, Result};

/// The name under which container engines call the OCI runtime.
const OCI_NAME: &str = "hull-oci";

/// The name that belongs to containerd.
const SHIM_NAME: &str = "containerd-shim-hull-v2";

/// Does the work of another role, if the arguments ask for one.
pub fn dispatch(arguments: &[OsString]) -> Option<ExitCode> {
    if let Some(session) = hull_oci::keeper::is_wanted() {
        hull_oci::keeper::run(session);
    }
    let called_as = arguments.first().map(Path::new).and_then(Path::file_name);
    if called_as == Some(OsStr::new(OCI_NAME)) {
        return Some(crate::oci::main(arguments));
    }
    if called_as == Some(OsStr::new(SHIM_NAME)) {
        error::print(
            &Error::unsupported(format_args!("{SHIM_NAME}, yet"))
                .hint("hull-oci is there for podman, Docker and CRI-O"),
        );
        return Some(ExitCode::FAILURE);
    }
    let outcome = match arguments.get(1)?.to_str()? {
        role::ROLE => sandbox_process(&arguments[2..]),
        "device-process" => device_process(&arguments[2..]),
        _ => return None,
    };
    Some(match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            error::print(&error);
            ExitCode::from(HULL_FAILED)
        }
    })
}

/// Takes `--name value` pairs apart.
struct Pairs<'a> {
    rest: std::slice::Iter<'a, OsString>,
}

impl<'a> Pairs<'a> {
    fn next(&mut self) -> Result<Option<(&'a str, &'a OsStr)>> {
        let Some(name) = self.rest.next() else {
            return Ok(None);
        };
        let value = self.rest.next();
        match (
            name.to_str().and_then(|name| name.strip_prefix("--")),
            value,
        ) {
            (Some(name), Some(value)) => Ok(Some((name, value))),
            _ => Err(Error::new(format!(
                "internal command: unexpected argument {name:?}"
            ))),
        }
    }
}

fn unknown(name: &str) -> Error {
    Error::new(format!("internal command: unknown option --{name}"))
}

fn missing(name: &str) -> Error {
    Error::new(format!("internal command: no --{name}"))
}

/// `sandbox-process --directory DIR --id ID`, with the connection of who started it as standard
/// input.
fn sandbox_process(arguments: &[OsString]) -> Result<()> {
    // The command that started us blocked signals for its own purposes.
    hull_engine::attach::unblock_all();
    close_inherited();
    log_to_stderr();
    let (mut sandboxes, mut id) = (None, None);
    let mut pairs = Pairs {
        rest: arguments.iter(),
    };
    while let Some((name, value)) = pairs.next()? {
        match name {
            "directory" => sandboxes = Some(PathBuf::from(value)),
            "id" => id = value.to_str(),
            _ => return Err(unknown(name)),
        }
    }
    let path = SandboxPath {
        sandboxes: sandboxes.ok_or_else(|| missing("directory"))?,
        id: id.ok_or_else(|| missing("id"))?.to_owned(),
    };
    role::run(&path, connection_on_stdin()?.into())
}

/// Closes what an engine or a shell left open in who started this process: somebody may wait for its end, and this
/// process lives on. Called before this process opens anything.
fn close_inherited() {
    let Ok(open) = std::fs::read_dir("/proc/self/fd") else {
        return;
    };
    let inherited: Vec<i32> = open
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter(|fd| *fd > 2)
        .collect();
    for fd in inherited {
        // One of them was the directory's own, which is closed by now.
        let _ = nix::unistd::close(fd);
    }
}

/// Moves the connection away from standard input, so that closing it closes it.
fn connection_on_stdin() -> Result<UnixStream> {
    let connection = std::io::stdin()
        .as_fd()
        .try_clone_to_owned()
        .context(|| "take over the first connection")?;
    let nothing = File::open("/dev/null").context(|| "open /dev/null")?;
    rustix::stdio::dup2_stdin(&nothing).context(|| "close standard input")?;
    Ok(UnixStream::from(connection))
}

/// `device-process --control-fd N --fs-fd N --vsock-fd N --entropy-fd N [--net-fd SOCKET:MAC[:qemu]]… [--disk-fd SOCKET:FILE[:ro]]…`
/// with hardware addresses as 12 hexadecimal digits.
fn device_process(arguments: &[OsString]) -> Result<()> {
    hull_engine::attach::unblock_all();
    log_to_stderr();
    let options = device_process_options(arguments)?;
    hull_sandbox::device_process::run(options)
}

fn device_process_options(
    arguments: &[OsString],
) -> Result<hull_devices::device_process::DeviceProcessOptions> {
    let mut options = hull_devices::device_process::DeviceProcessOptions {
        control_fd: -1,
        ..Default::default()
    };
    let mut pairs = Pairs {
        rest: arguments.iter(),
    };
    while let Some((name, value)) = pairs.next()? {
        let wrong = || {
            Error::new(format!(
                "internal command: --{name} {value:?} is no descriptor"
            ))
        };
        let text = value.to_str().ok_or_else(wrong)?;
        let number = || text.parse().map_err(|_| wrong());
        match name {
            "control-fd" => options.control_fd = number()?,
            "fs-fd" => options.fs_fd = Some(number()?),
            "vsock-fd" => options.vsock_fd = Some(number()?),
            "net-fd" => {
                let (fd, mac) = text.split_once(':').ok_or_else(wrong)?;
                let (mac, front_end) = match mac.strip_suffix(":qemu") {
                    Some(mac) => (mac, FrontEnd::QemuNet),
                    None => (mac, FrontEnd::Usual),
                };
                let mac = u64::from_str_radix(mac, 16).map_err(|_| wrong())?;
                let [_, _, mac @ ..] = mac.to_be_bytes();
                options
                    .nets
                    .push(hull_devices::device_process::NetDeviceOptions {
                        socket_fd: fd.parse().map_err(|_| wrong())?,
                        mac,
                        front_end,
                    });
            }
            "entropy-fd" => options.entropy_fd = Some(number()?),
            "disk-fd" => {
                let mut parts = text.split(':');
                let mut descriptor = || {
                    parts
                        .next()
                        .and_then(|part| part.parse().ok())
                        .ok_or_else(wrong)
                };
                let (socket_fd, file_fd) = (descriptor()?, descriptor()?);
                let read_only = match (parts.next(), parts.next()) {
                    (None, _) => false,
                    (Some("ro"), None) => true,
                    _ => return Err(wrong()),
                };
                options
                    .disks
                    .push(hull_devices::device_process::DiskOptions {
                        socket_fd,
                        file_fd,
                        read_only,
                    });
            }
            _ => return Err(unknown(name)),
        }
    }
    match options.control_fd {
        -1 => Err(missing("control-fd")),
        _ => Ok(options),
    }
}

/// Messages of the host processes go to their standard error, which is the container's `sandbox.log`.
fn log_to_stderr() {
    let level = std::env::var("HULL_LOG")
        .ok()
        .and_then(|level| level.parse().ok())
        .unwrap_or(tracing::Level::WARN);
    tracing_subscriber::fmt()
        .with_max_level(level)
        .with_ansi(false)
        .with_writer(std::io::stderr)
        .init();
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn words(text: &str) -> Vec<OsString> {
        text.split_whitespace().map(OsString::from).collect()
    }

    #[test]
    fn commands_of_people_are_left_alone() {
        for arguments in [
            "hull",
            "hull run x",
            "hull --help",
            "hull run sandbox-process",
        ] {
            assert!(dispatch(&words(arguments)).is_none(), "{arguments}");
        }
    }

    #[test]
    fn names_of_engines_are_answered() {
        assert!(dispatch(&words("/usr/bin/hull-oci --version")).is_some());
        assert!(dispatch(&words("containerd-shim-hull-v2")).is_some());
    }

    #[test]
    fn descriptors_of_a_device_process() {
        let options = device_process_options(&words(
            "--control-fd 3 --fs-fd 4 --vsock-fd 5 --entropy-fd 6 --disk-fd 7:8 --disk-fd 9:10:ro",
        ))
        .unwrap();
        assert_eq!((options.control_fd, options.fs_fd), (3, Some(4)));
        assert_eq!((options.vsock_fd, options.entropy_fd), (Some(5), Some(6)));
        let disks: Vec<_> = options
            .disks
            .iter()
            .map(|disk| (disk.socket_fd, disk.file_fd, disk.read_only))
            .collect();
        assert_eq!(disks, [(7, 8, false), (9, 10, true)]);
        for wrong in [
            "",
            "--fs-fd 4",
            "--control-fd x",
            "--control-fd",
            "--bogus 3",
            "--control-fd 3 --disk-fd 4",
            "--control-fd 3 --disk-fd 4:5:rw",
        ] {
            assert!(device_process_options(&words(wrong)).is_err(), "{wrong}");
        }
    }
}
