//! What a user asks for with `hull run` and `hull create`: kept in the container's record, so that
//! it can be started again as it was asked for.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use hull_image::{HealthCheck, ImageConfig};
use serde::{Deserialize, Serialize};

use crate::error::{Context, Error, ErrorKind, Result};
use crate::exact;
use crate::health;
use crate::log_options::LogOptions;
use crate::names;
use crate::network::NetworkOptions;
use crate::paths::Paths;
use crate::publish;
use crate::run::check_length;
use crate::spec;
use crate::spec::seccomp::{Profile, Seccomp};
use crate::values::{CpuList, Machine, Restart, SecurityOption, Ulimit};
use crate::volumes::{self, Source, Tmpfs, Volume};

/// What a user asks for.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct RunOptions {
    /// Image reference as given.
    pub image: String,
    /// Arguments after the image.
    #[serde(with = "exact::list")]
    pub command: Vec<OsString>,
    /// Keep standard input open.
    pub interactive: bool,
    /// Standard input is open for ever, not until its first client goes.
    pub stdin_stays: bool,
    /// With a terminal.
    pub terminal: bool,
    /// Remove the container when it ends.
    pub remove: bool,
    /// Name; a random one when absent.
    pub name: Option<String>,
    /// `NAME=VALUE`, in order.
    #[serde(with = "exact::list")]
    pub environment: Vec<OsString>,
    /// What outlives the root file system; of a container that is there, with all that its image
    /// declares.
    pub volumes: Vec<Volume>,
    /// File systems in memory.
    pub tmpfs: Vec<Tmpfs>,
    /// Working directory.
    pub directory: Option<String>,
    /// `user[:group]`.
    pub user: Option<String>,
    /// Replaces the image's entry point.
    #[serde(with = "exact::option")]
    pub entrypoint: Option<OsString>,
    /// Further groups of its processes, names or numbers.
    pub groups: Vec<String>,
    /// It may do in its guest whatever root may there.
    pub privileged: bool,
    /// How gladly the guest's kernel kills it for lack of memory, -1000 to 1000.
    pub oom_score_adj: Option<i32>,
    /// Its part of processors, 2 to 262144.
    pub cpu_shares: Option<u64>,
    /// Seconds between stop signal and SIGKILL.
    pub stop_timeout: Option<i64>,
    /// Ports that the image does not declare, as `80/tcp`.
    pub expose: Vec<String>,
    /// Publish all ports that it or its image declares.
    pub publish_all: bool,
    /// Host name.
    pub hostname: Option<String>,
    /// When it is started again after it ended.
    pub restart: Restart,
    /// The check of its health.
    pub health: Option<HealthCheck>,
    /// Run an init process.
    pub init: bool,
    /// Signal that `stop` sends first.
    pub stop_signal: Option<String>,
    /// Labels.
    pub labels: Vec<(String, String)>,
    /// For programs that read its specification.
    pub annotations: Vec<(String, String)>,
    /// What is kept of its output.
    pub log: LogOptions,
    /// Memory limit, bytes; 0 for none.
    pub memory: Option<u64>,
    /// What `memory` may be together with swap of the host, bytes; -1 for all that there is.
    pub memory_swap: Option<i64>,
    /// Processors of the host that it is to stay on; all when empty.
    pub host_cpus: CpuList,
    /// Processors, in thousandths; 0 for no limit.
    pub cpus_milli: Option<u64>,
    /// Most processes.
    pub pids_limit: Option<i64>,
    /// Resource limits of processes.
    pub ulimits: Vec<Ulimit>,
    /// Size of /dev/shm, bytes.
    pub shm_size: Option<u64>,
    /// Size of the writable layer, bytes; 0 for no limit.
    pub storage_size: Option<u64>,
    /// The root file system is read-only.
    pub read_only: bool,
    /// Capabilities to add.
    pub cap_add: Vec<String>,
    /// Capabilities to drop.
    pub cap_drop: Vec<String>,
    /// Security options.
    pub security: Vec<SecurityOption>,
    /// Kernel parameters.
    pub sysctl: Vec<(String, String)>,
    /// The network.
    pub network: NetworkOptions,
    /// Machine kind.
    pub machine: Option<Machine>,
    /// Guest kernel.
    #[serde(with = "exact::option")]
    pub kernel: Option<PathBuf>,
}

impl RunOptions {
    /// Adds the ports that are declared to those that are published, if that is wanted.
    ///
    /// # Errors
    /// One is no port.
    pub(crate) fn publish_declared(&mut self, image: &ImageConfig) -> Result<()> {
        if !self.publish_all {
            return Ok(());
        }
        for declared in image.exposed_ports.iter().chain(&self.expose) {
            let ports = publish::publish(declared).map_err(Error::invalid)?;
            let mut known = self.network.publish.iter().flat_map(|ports| &ports.0);
            let is_known = ports.0.iter().any(|port| {
                known.any(|known| {
                    (known.container_port, known.protocol) == (port.container_port, port.protocol)
                })
            });
            if !is_known {
                self.network.publish.push(ports);
            }
        }
        Ok(())
    }

    /// The guest speaks of the specification; a person has given options.
    pub fn in_users_words(&self, mut error: Error) -> Error {
        let words = [
            ("invalid spec: process.user", "--user"),
            ("cannot enter process.cwd", "--workdir: cannot enter"),
            ("cannot set process.rlimits RLIMIT_", "--ulimit "),
            ("cannot set linux.resources.pids.limit", "--pids-limit"),
            ("cannot set linux.resources.memory.limit", "--memory"),
            ("cannot set linux.resources.cpu.quota", "--cpus"),
            ("invalid spec: linux.sysctl", "--sysctl"),
        ];
        for (of_spec, of_option) in words {
            if let Some(rest) = error.message.strip_prefix(of_spec) {
                // Names of limits are written in small letters.
                let rest = match (of_option.starts_with("--ulimit"), rest.split_once(':')) {
                    (true, Some((name, why))) => format!("{}:{why}", name.to_lowercase()),
                    _ => rest.to_owned(),
                };
                error.message = format!("{of_option}{rest}");
                return error;
            }
        }
        if let Some(rest) = error.message.strip_prefix("cannot bind /run/hull/shares/")
            && let Some((share, rest)) = rest.split_once(" to ")
            && let Some(index) = share.rsplit_once("-volume")
            && let Ok(index) = index.1.trim_end_matches("/file").parse::<usize>()
            && let Some(volume) = self.volumes.get(index)
        {
            error.message = format!("cannot mount volume {volume} at {rest}");
            return error;
        }
        let first = self.command.first().map(|word| word.to_string_lossy());
        let never_ran = matches!(
            error.kind,
            ErrorKind::CommandNotFound | ErrorKind::NotExecutable
        );
        if never_ran && first.is_some_and(|word| word.starts_with('-')) {
            return error.hint("options of hull run go before the image");
        }
        error
    }

    /// What can be found wrong before an image is pulled.
    ///
    /// # Errors
    /// Options that make no sense, or contradict each other or the host.
    pub(crate) fn check(&self, paths: &Paths) -> Result<()> {
        volumes::check_distinct(&self.volumes, &self.tmpfs).map_err(Error::invalid)?;
        spec::capabilities(&self.cap_add, &self.cap_drop)?;
        self.seccomp()?;
        check_length(paths.run())?;
        if self.remove && self.restart != Restart::No {
            return Err(Error::invalid(
                "--rm and --restart contradict each other: a container that is removed cannot be \
                 started again",
            ));
        }
        for volume in &self.volumes {
            if let Source::Host(path) = &volume.source {
                check_host_path(path)?;
            }
        }
        check_swap(self.memory, self.memory_swap)?;
        self.host_cpus.check()?;
        check_cpus(self.cpus_milli)?;
        Ok(())
    }

    /// The system call filter that is asked for; the last one counts.
    pub(crate) fn seccomp(&self) -> Result<Seccomp> {
        let mut seccomp = Seccomp::Default;
        for option in &self.security {
            match option {
                SecurityOption::Unconfined => seccomp = Seccomp::Unconfined,
                SecurityOption::Seccomp(file) => {
                    seccomp = Seccomp::Profile(Box::new(Profile::read(file)?));
                }
                SecurityOption::SeccompText(text) => {
                    let profile = Profile::parse(text.as_bytes(), &"what was given")?;
                    seccomp = Seccomp::Profile(Box::new(profile));
                }
                SecurityOption::NoNewPrivileges(_) => {}
            }
        }
        Ok(seccomp)
    }

    pub(crate) fn no_new_privileges(&self) -> bool {
        let said = self.security.iter().rev().find_map(|option| match option {
            SecurityOption::NoNewPrivileges(yes) => Some(*yes),
            _ => None,
        });
        said.unwrap_or(false)
    }

    /// Makes what is relative absolute, and what the image decides a part of the options: they mean
    /// the same whenever and wherever the container is started again. Returns the names of volumes
    /// that it made up.
    ///
    /// # Errors
    /// There are no random numbers; a path has no current directory.
    pub(crate) fn settle(&mut self, image: &ImageConfig) -> Result<Vec<String>> {
        if let Some(kernel) = &mut self.kernel {
            make_absolute(kernel)?;
        }
        for option in &mut self.security {
            if let SecurityOption::Seccomp(file) = option {
                make_absolute(file)?;
            }
        }
        self.health = health::settle(self.health.take(), image.health.as_ref());
        health::require(&self.health)?;
        for place in spec::image_volumes(image) {
            let mut given = self.tmpfs.iter().map(|tmpfs| &tmpfs.destination);
            let mut volumes = self.volumes.iter().map(|volume| &volume.destination);
            if !given.any(|given| *given == place) && !volumes.any(|given| *given == place) {
                self.volumes.push(Volume::anonymous(place));
            }
        }
        let mut made_up = Vec::new();
        // Those of a container that is removed when it ends are in its own directory.
        if !self.remove {
            for volume in &mut self.volumes {
                if volume.source == Source::Anonymous {
                    let name = names::new_id()?;
                    volume.source = Source::Named(name.clone());
                    made_up.push(name);
                }
            }
        }
        Ok(made_up)
    }
}

fn make_absolute(path: &mut PathBuf) -> Result<()> {
    *path = std::path::absolute(&path).context(|| format!("find {}", path.display()))?;
    Ok(())
}

/// Checks a number of processors, in thousandths.
///
/// # Errors
/// The host has fewer.
pub(crate) fn check_cpus(cpus_milli: Option<u64>) -> Result<()> {
    let available = std::thread::available_parallelism().map_or(1, usize::from);
    match cpus_milli {
        Some(milli) if milli > available as u64 * 1000 => Err(Error::invalid(format!(
            "--cpus: {} CPUs are asked for, and there are {available}",
            milli as f64 / 1000.0
        ))),
        _ => Ok(()),
    }
}

/// Checks what memory may be together with swap.
///
/// # Errors
/// There is no limit of memory, or a larger one.
pub(crate) fn check_swap(memory: Option<u64>, memory_swap: Option<i64>) -> Result<()> {
    let Some(both) = memory_swap.filter(|both| *both > 0) else {
        return Ok(());
    };
    let problem = match memory.filter(|memory| *memory > 0) {
        None => "it needs --memory",
        Some(memory) if both.unsigned_abs() < memory => {
            "memory and swap together are less than --memory"
        }
        Some(_) => return Ok(()),
    };
    Err(Error::invalid(format!("--memory-swap: {problem}")))
}

fn check_host_path(path: &Path) -> Result<()> {
    let source = path.display();
    match std::fs::metadata(path) {
        Ok(_) => Ok(()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Err(Error::invalid(format!(
            "host path {source} of a volume does not exist"
        ))
        .hint(format!("mkdir -p {source}"))),
        Err(error) => Err(error).context(|| format!("read the host path {source} of a volume")),
    }
}
