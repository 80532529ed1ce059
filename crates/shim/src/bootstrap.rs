//! What containerd executes for a moment: `start`, `delete`, `-info`.
//!
//! How `start` answers depends on who asks. containerd 2.3 and later writes `BootstrapParams` to
//! standard input and reads a `BootstrapResult`; 1.7 to 2.2 sets `GRPC_ADDRESS` and reads JSON;
//! 1.6 and CRI-O read the bare address. Standard error stays empty when all is well: containerd
//! reads both together.

use std::fs::{self, File};
use std::io::{ErrorKind, PipeWriter, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use containerd_shim_protos::api::DeleteResponse;
use containerd_shim_protos::bootstrap_api::{BootstrapParams, BootstrapResult};
use containerd_shim_protos::types::introspection::{RuntimeInfo, RuntimeVersion};
use hull_oci::pod::POD_NAMES;
use hull_sandbox::{Context, Error, Result};
use protobuf::well_known_types::timestamp::Timestamp;
use protobuf::{Message, MessageField};
use rustix::fs::OFlags;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::flags::Flags;
use crate::{NAME, Settings, create, options};

/// Environment variable that names hull's configuration.
const CONFIG: &str = "HULL_CONFIG";

/// Where shims have their sockets, unless containerd names another directory.
const SOCKETS: &str = "/run/containerd/s";

/// Longest path of a socket (`sun_path`, unix(7)), bytes.
const MAX_SOCKET: usize = 107;

/// Most bytes of parameters that are read.
const MAX_PARAMETERS: u64 = 16 << 20;

/// What `start` writes to the server when containerd has its address.
pub(crate) const TOLD: u8 = 1;

/// Exit status of a container whose shim is no more: SIGKILL's.
const KILLED: u32 = 128 + 9;

/// The version of the task service that is answered with. Version 3 has the same messages as 2.
const MODERN_VERSION: i32 = 3;
const JSON_VERSION: i32 = 2;

/// Starts the server of a pod, unless it is there, and prints its address.
///
/// # Errors
/// The socket cannot be made, or the process cannot be started.
pub fn start(flags: &Flags) -> Result<()> {
    let mut input = Vec::new();
    std::io::stdin()
        .take(MAX_PARAMETERS)
        .read_to_end(&mut input)
        .context(|| "read the parameters")?;
    let parameters = parameters(&input, flags);
    let config = options::config_path(&input, parameters.as_ref())?;
    let bundle = std::env::current_dir().context(|| "find the bundle")?;
    let group = pod_of(&bundle)?.unwrap_or_else(|| flags.id.clone());
    let directory = parameters
        .as_ref()
        .and_then(|parameters| parameters.socket_dir.clone())
        .filter(|directory| !directory.is_empty())
        .map_or_else(|| PathBuf::from(SOCKETS), PathBuf::from);
    let socket = socket(&directory, flags, &group)?;
    let address = format!("unix://{}", socket.display());
    if let Some(config) = &config {
        options::remember(&bundle, config)?;
    }
    let server = if let Some(listener) = listen(&socket)? {
        let started = write_address(&bundle, &address)
            .and_then(|()| spawn(flags, &bundle, listener, config.as_deref()));
        if started.is_err() {
            // Nobody listens.
            let _ = fs::remove_file(&socket);
        }
        Some(started?)
    } else {
        write_address(&bundle, &address)?;
        None
    };
    let answer = match (parameters, std::env::var_os("GRPC_ADDRESS")) {
        (Some(_), _) => BootstrapResult {
            version: MODERN_VERSION,
            address,
            protocol: "ttrpc".to_owned(),
            ..BootstrapResult::default()
        }
        .write_to_bytes()
        .context(|| "encode the answer")?,
        (None, Some(_)) => {
            json!({"version": JSON_VERSION, "address": address, "protocol": "ttrpc"})
                .to_string()
                .into_bytes()
        }
        (None, None) => address.into_bytes(),
    };
    print(&answer)?;
    server.map_or(Ok(()), |mut server| {
        let told = server.write_all(&[TOLD]);
        told.context(|| "tell the shim that containerd knows it")
    })
}

fn print(answer: &[u8]) -> Result<()> {
    let mut stdout = std::io::stdout().lock();
    stdout
        .write_all(answer)
        .and_then(|()| stdout.flush())
        .context(|| "write the answer")
}

/// The parameters of containerd 2.3 and later. Before, the same place had an `Any`, which parses
/// as these: they are the ones meant when they name the same container as the command line.
fn parameters(input: &[u8], flags: &Flags) -> Option<BootstrapParams> {
    let parameters = BootstrapParams::parse_from_bytes(input).ok()?;
    (!flags.id.is_empty()
        && parameters.instance_id == flags.id
        && parameters.namespace == flags.namespace)
        .then_some(parameters)
}

/// The pod that the container of a bundle is in.
fn pod_of(bundle: &Path) -> Result<Option<String>> {
    let path = bundle.join("config.json");
    let text = match fs::read(&path) {
        Ok(text) => text,
        // The bundle of a sandbox has none.
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error).context(|| format!("read {}", path.display())),
    };
    let config: Value =
        serde_json::from_slice(&text).context(|| format!("read {}", path.display()))?;
    let annotations = &config["annotations"];
    Ok(POD_NAMES
        .iter()
        .find_map(|name| annotations[name].as_str())
        .map(str::to_owned))
}

/// The socket of a pod's server. containerd's own shims call theirs the same way.
fn socket(directory: &Path, flags: &Flags, group: &str) -> Result<PathBuf> {
    let name = format!("{}/{}/{group}", flags.address, flags.namespace);
    let digest: String = Sha256::digest(name.as_bytes())
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    let socket = directory.join(digest);
    match socket.as_os_str().len() {
        ..=MAX_SOCKET => Ok(socket),
        length => Err(Error::invalid(format!(
            "the path of the socket {} is {length} bytes long, and may have {MAX_SOCKET}",
            socket.display()
        ))),
    }
}

/// Makes a socket; `None` when somebody answers there.
fn listen(path: &Path) -> Result<Option<UnixListener>> {
    let doing = || format!("listen on {}", path.display());
    if let Some(directory) = path.parent() {
        let mut builder = fs::DirBuilder::new();
        let made = builder.recursive(true).mode(0o711).create(directory);
        made.context(|| format!("create {}", directory.display()))?;
    }
    for _ in 0..2 {
        match UnixListener::bind(path) {
            Ok(listener) => return Ok(Some(listener)),
            Err(error) if error.kind() == ErrorKind::AddrInUse => {}
            Err(error) => return Err(error).context(doing),
        }
        if UnixStream::connect(path).is_ok() {
            return Ok(None);
        }
        // Of one that was killed.
        fs::remove_file(path).context(|| format!("remove {}", path.display()))?;
    }
    Err(Error::new(format!(
        "somebody else starts a shim at {}",
        path.display()
    )))
}

/// Starts the server, with the listening socket as its standard input and the log that containerd
/// reads as its standard error. It ends unless [`TOLD`] is written to what this returns, which is
/// its standard output: when `start` is killed, containerd knows nothing of it.
fn spawn(
    flags: &Flags,
    bundle: &Path,
    listener: UnixListener,
    config: Option<&Path>,
) -> Result<PipeWriter> {
    let (told, tell) = std::io::pipe().context(|| "create a pipe")?;
    // Read and write: nobody waits for who reads it, and it stays when that goes.
    let log = File::options()
        .read(true)
        .write(true)
        .custom_flags(OFlags::NONBLOCK.bits() as i32)
        .open(bundle.join("log"));
    let log = match log {
        Ok(log) => Stdio::from(log),
        // CRI-O makes none.
        Err(error) if error.kind() == ErrorKind::NotFound => Stdio::null(),
        Err(error) => return Err(error).context(|| "open the log of the shim"),
    };
    let child = Command::new("/proc/self/exe")
        .arg0(NAME)
        .args(flags.for_server())
        .envs(config.map(|config| (CONFIG, config)))
        .current_dir(bundle)
        .stdin(Stdio::from(OwnedFd::from(listener)))
        .stdout(told)
        .stderr(log)
        .process_group(0)
        .spawn()
        .context(|| "start the shim")?;
    adjust_oom_score(child.id());
    Ok(tell)
}

/// Lets the shim be killed before containerd when the host is out of memory.
fn adjust_oom_score(pid: u32) {
    const MAX: i32 = 1000; // include/uapi/linux/oom.h
    let read = |pid: u32| -> Option<i32> {
        let text = fs::read_to_string(format!("/proc/{pid}/oom_score_adj")).ok()?;
        text.trim().parse().ok()
    };
    let Some(parent) = rustix::process::getppid() else {
        return;
    };
    if let Some(score) = read(parent.as_raw_nonzero().get().unsigned_abs()) {
        let score = (score + 1).min(MAX);
        // Some hosts do not allow it; the shim works without.
        let _ = fs::write(format!("/proc/{pid}/oom_score_adj"), score.to_string());
    }
}

/// Writes the address where containerd 1.6 and 1.7 look for it after a restart.
fn write_address(bundle: &Path, address: &str) -> Result<()> {
    let path = bundle.join("address");
    let new = bundle.join(".address");
    fs::write(&new, address)
        .and_then(|()| fs::rename(&new, &path))
        .context(|| format!("write {}", path.display()))
}

/// Removes what a container has on the host, when its server does not answer any more, and prints
/// how it has ended.
///
/// # Errors
/// The bundle is not there, or standard output is closed. What cannot be removed is said, and does
/// not keep the rest from being removed.
pub fn delete(
    flags: &Flags,
    settings: impl FnOnce(Option<&Path>) -> Result<Settings>,
) -> Result<()> {
    let bundle = match &flags.bundle {
        Some(bundle) => bundle.clone(),
        None => std::env::current_dir().context(|| "find the bundle")?,
    };
    // containerd starts no shim for a container of a sandbox: its sandbox's was told.
    let of_pod = || {
        let pod = pod_of(&bundle).ok().flatten()?;
        options::remembered(&bundle.parent()?.join(pod))
    };
    let config = options::remembered(&bundle).or_else(of_pod);
    let settings = settings(config.as_deref())?;
    let exit = create::clear(&settings, &flags.namespace, &flags.id, &bundle);
    let (status, ended_ns) = exit.map_or_else(
        || (KILLED, hull_sandbox::store::unix_time_ns()),
        |exit| (exit.status.unsigned_abs(), exit.at_ns),
    );
    // The socket of a server that lives is another container's of the pod.
    if let Ok(address) = fs::read_to_string(bundle.join("address"))
        && let Some(socket) = address.trim().strip_prefix("unix://")
        && UnixStream::connect(socket).is_err()
    {
        // Gone already is as good.
        let _ = fs::remove_file(socket);
    }
    let answer = DeleteResponse {
        pid: 0,
        exit_status: status,
        exited_at: MessageField::some(timestamp(ended_ns)),
        ..DeleteResponse::default()
    };
    print(&answer.write_to_bytes().context(|| "encode the answer")?)
}

/// Nanoseconds since 1970 UTC as protobuf says them.
pub(crate) fn timestamp(ns: u64) -> Timestamp {
    const SECOND: u64 = 1_000_000_000;
    Timestamp {
        seconds: (ns / SECOND).cast_signed(),
        nanos: (ns % SECOND) as i32,
        ..Timestamp::default()
    }
}

/// Describes the runtime (`ctr run --runtime io.containerd.hull.v2`, `ctr plugin inspect-runtime`).
///
/// # Errors
/// Standard output is closed.
pub fn info() -> Result<()> {
    let features = protobuf::well_known_types::any::Any {
        type_url: "types.containerd.io/opencontainers/runtime-spec/1/features/Features".to_owned(),
        value: hull_oci::features::features().to_string().into_bytes(),
        ..Default::default()
    };
    let answer = RuntimeInfo {
        name: "io.containerd.hull.v2".to_owned(),
        version: MessageField::some(RuntimeVersion {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            ..RuntimeVersion::default()
        }),
        features: MessageField::some(features),
        ..RuntimeInfo::default()
    };
    print(&answer.write_to_bytes().context(|| "encode the answer")?)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn flags() -> Flags {
        Flags {
            id: "c1".to_owned(),
            namespace: "k8s.io".to_owned(),
            address: "/run/containerd/containerd.sock".to_owned(),
            ..Flags::default()
        }
    }

    #[test]
    fn options_of_older_containerds_are_not_taken_for_parameters() {
        let any = protobuf::well_known_types::any::Any {
            type_url: "containerd.runc.v1.Options".to_owned(),
            value: vec![1, 2, 3],
            ..Default::default()
        };
        assert!(parameters(&any.write_to_bytes().unwrap(), &flags()).is_none());
        assert!(parameters(b"", &flags()).is_none());
        let modern = BootstrapParams {
            instance_id: "c1".to_owned(),
            namespace: "k8s.io".to_owned(),
            socket_dir: Some("/run/x".to_owned()),
            ..BootstrapParams::default()
        };
        let read = parameters(&modern.write_to_bytes().unwrap(), &flags()).unwrap();
        assert_eq!(read.socket_dir.as_deref(), Some("/run/x"));
    }

    #[test]
    fn containers_of_a_pod_have_one_socket() {
        let bundle = tempfile::tempdir().unwrap();
        assert_eq!(pod_of(bundle.path()).unwrap(), None);
        for (annotation, pod) in [(POD_NAMES[0], "p1"), (POD_NAMES[1], "p2")] {
            let config = json!({"annotations": {annotation: pod}});
            fs::write(bundle.path().join("config.json"), config.to_string()).unwrap();
            assert_eq!(pod_of(bundle.path()).unwrap().as_deref(), Some(pod));
        }
        let directory = Path::new(SOCKETS);
        let one = socket(directory, &flags(), "p1").unwrap();
        assert_eq!(one, socket(directory, &flags(), "p1").unwrap());
        assert_ne!(one, socket(directory, &flags(), "p2").unwrap());
        let long = PathBuf::from("/").join("x".repeat(60));
        assert!(socket(&long, &flags(), "p1").is_err());
    }

    #[test]
    fn a_socket_that_nobody_answers_is_made_anew() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s/one");
        let listener = listen(&path).unwrap().unwrap();
        assert!(listen(&path).unwrap().is_none());
        drop(listener);
        assert!(listen(&path).unwrap().is_some());
    }
}
