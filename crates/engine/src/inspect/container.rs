//! A container in Docker's words.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use hull_image::{ImageConfig, Store};
use hull_sandbox::store::{Directory, State, Status};
use serde_json::{Value, json};

use super::{NEVER, RESTARTING, host_config, list, network, set, state_name};
use crate::config::Config;
use crate::container::{Any, Details};
use crate::health::Health;
use crate::options::RunOptions;
use crate::paths::Paths;
use crate::spec::{self, DEFAULT_PATH, keep_last_of_each};
use crate::supervise;
use crate::time;
use crate::volumes::{Source, Volume, store};

/// What is known of a container.
pub(super) struct Known<'a> {
    pub paths: Paths,
    pub directory: &'a Directory,
    pub details: Cow<'a, Details>,
    pub options: Cow<'a, RunOptions>,
    pub image: ImageConfig,
    pub status: &'a Status,
    /// It waits to be started again.
    pub restarting: bool,
    pub health: Option<Health>,
    /// Its OCI configuration; `null` before its first start.
    pub spec: Value,
}

/// The object of `docker inspect` for a container.
pub fn container(config: &Config, container: &Any) -> Value {
    let spec = container.config().unwrap_or_default();
    let (command, created_ns, status) = match container {
        Any::Own(own) => (&own.record.command, own.record.created_ns, &own.status),
        Any::Engine(other) => {
            let stored = &other.stored;
            (
                &stored.record.command,
                stored.record.created_ns,
                &stored.status,
            )
        }
    };
    let details = match container {
        Any::Own(own) => Cow::Borrowed(&own.record.details),
        Any::Engine(other) => Cow::Owned(Details {
            name: other.stored.record.id.clone(),
            hostname: text(&spec["hostname"]),
            terminal: spec["process"]["terminal"].as_bool().unwrap_or_default(),
            ..Details::default()
        }),
    };
    let options = match container {
        Any::Own(own) => own.record.details.options.as_deref().map(Cow::Borrowed),
        Any::Engine(_) => None,
    };
    let known = Known {
        paths: config.paths(),
        directory: container.directory(),
        image: image_of(config, &details.image_id).unwrap_or_else(|| from_spec(&spec, command)),
        details,
        options: options.unwrap_or_default(),
        status,
        restarting: match container {
            Any::Own(own) => supervise::is_restarting(own),
            Any::Engine(_) => false,
        },
        health: match container {
            Any::Own(own) => Health::of(own),
            Any::Engine(_) => None,
        },
        spec,
    };
    let files = |name: &str| known.directory.path().join(name);
    let (path, args) = match command.split_first() {
        Some((path, args)) => (path.as_str(), args),
        None => ("", &[][..]),
    };
    json!({
        "Id": container.id(),
        "Created": time::format_rfc3339(i128::from(created_ns)),
        "Path": path,
        "Args": args,
        "State": known.state(),
        "Image": known.details.image_id,
        "ResolvConfPath": "",
        "HostnamePath": "",
        "HostsPath": "",
        "LogPath": files("log"),
        "Name": format!("/{}", known.details.name),
        "RestartCount": known.details.restarts,
        "Driver": "overlayfs",
        "Platform": "linux",
        "MountLabel": "",
        "ProcessLabel": "",
        "AppArmorProfile": "",
        "ExecIDs": null,
        "HostConfig": host_config::host_config(&known),
        "GraphDriver": known.graph_driver(),
        "Mounts": known.mounts(),
        "Config": known.config(),
        "NetworkSettings": network::settings(&known),
    })
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

/// The configuration of the image that a container was created from, if it is still there.
fn image_of(config: &Config, id: &str) -> Option<ImageConfig> {
    let reference = id.parse().ok()?;
    let store = Store::open(config.data_dir.join("images")).ok()?;
    store.inspect(&reference).ok().map(|image| image.config)
}

/// What an image that is not known may have said, as far as the container's configuration tells.
fn from_spec(spec: &Value, command: &[String]) -> ImageConfig {
    let process = &spec["process"];
    let env = process["env"].as_array().into_iter().flatten();
    ImageConfig {
        cmd: command.to_vec(),
        env: env.map(text).collect(),
        user: text(&process["user"]["username"]),
        workdir: text(&process["cwd"]),
        ..ImageConfig::default()
    }
}

impl Known<'_> {
    fn state(&self) -> Value {
        let Status { state, exit, .. } = self.status;
        let is_up = matches!(state, State::Running | State::Paused);
        let at = |ns: u64| time::format_rfc3339(i128::from(ns));
        let ended = exit.as_ref().filter(|_| *state == State::Stopped);
        let processes = self.status.processes;
        let mut object = json!({
            "Status": match self.restarting {
                true => RESTARTING,
                false => state_name(*state),
            },
            "Running": is_up,
            "Paused": *state == State::Paused,
            "Restarting": self.restarting,
            "OOMKilled": ended.is_some_and(|exit| exit.oom_killed),
            "Dead": false,
            "Pid": match (is_up, processes.machine) {
                (false, _) => 0,
                (true, 0) => processes.sandbox,
                (true, machine) => machine,
            },
            "ExitCode": ended.map_or(0, |exit| exit.status),
            "Error": ended.and_then(|exit| exit.reason.clone()).unwrap_or_default(),
            "StartedAt": self.status.started_ns.map_or_else(|| NEVER.to_owned(), at),
            "FinishedAt": exit.as_ref().map_or_else(|| NEVER.to_owned(), |exit| at(exit.at_ns)),
        });
        if let Some(health) = &self.health {
            let log = health.log.iter().map(|probe| {
                json!({
                    "Start": at(probe.start_ns),
                    "End": at(probe.end_ns),
                    "ExitCode": probe.exit,
                    "Output": probe.output,
                })
            });
            object["Health"] = json!({
                "Status": health.status.name(),
                "FailingStreak": health.failing_streak,
                "Log": log.collect::<Vec<_>>(),
            });
        }
        object
    }

    fn config(&self) -> Value {
        let (options, image) = (&self.options, &self.image);
        let lossy = |text: &OsStr| text.to_string_lossy().into_owned();
        let entrypoint = match &options.entrypoint {
            Some(text) => {
                let words = spec::entrypoint_words(text);
                words.iter().map(|word| lossy(word)).collect()
            }
            None => image.entrypoint.clone(),
        };
        let command = match (options.command.is_empty(), &options.entrypoint) {
            (true, None) => image.cmd.clone(),
            _ => options.command.iter().map(|word| lossy(word)).collect(),
        };
        let published = options.network.publish.iter().flat_map(|ports| &ports.0);
        let published =
            published.map(|port| format!("{}/{}", port.container_port, port.protocol.name()));
        let mut exposed: Vec<String> = image
            .exposed_ports
            .iter()
            .chain(&options.expose)
            .cloned()
            .chain(published)
            .collect();
        exposed.sort();
        exposed.dedup();
        let mut object = json!({
            "Hostname": self.details.hostname,
            "Domainname": "",
            "User": options.user.as_ref().unwrap_or(&image.user),
            "AttachStdin": false,
            "AttachStdout": true,
            "AttachStderr": true,
            "ExposedPorts": set(exposed),
            "Tty": self.details.terminal,
            "OpenStdin": self.details.stdin,
            "StdinOnce": self.details.stdin && !options.stdin_stays,
            "Env": self.environment(),
            "Cmd": list(command),
            "Image": self.details.image,
            "Healthcheck": self.options.health,
            "Volumes": set(image.volumes.iter().cloned()),
            "WorkingDir": options.directory.as_ref().unwrap_or(&image.workdir),
            "Entrypoint": list(entrypoint),
            "OnBuild": null,
            "Labels": self.details.labels,
            "StopSignal": signal(&self.details.stop_signal),
        });
        if let Some(seconds) = options.stop_timeout {
            object["StopTimeout"] = json!(seconds);
        }
        object
    }

    /// As the image and the user gave it, without what is the container's own.
    fn environment(&self) -> Vec<String> {
        let given = self.options.environment.iter().map(|text| text.as_bytes());
        let of_image = self.image.env.iter().map(|text| text.as_bytes());
        let mut all: Vec<Vec<u8>> = [DEFAULT_PATH.as_bytes()]
            .into_iter()
            .chain(of_image)
            .chain(given)
            .map(<[u8]>::to_vec)
            .collect();
        keep_last_of_each(&mut all);
        all.iter()
            .map(|text| String::from_utf8_lossy(text).into_owned())
            .collect()
    }

    fn graph_driver(&self) -> Value {
        let directory = self.directory.path();
        let upper = writable_layer(directory);
        let layers: Vec<String> = self
            .details
            .layers
            .iter()
            .map(|layer| layer.display().to_string())
            .collect();
        json!({
            "Name": "overlayfs",
            "Data": {
                "LowerDir": layers.join(":"),
                "UpperDir": upper,
                "WorkDir": upper.with_file_name("work"),
            },
        })
    }

    /// Volumes and directories of the host.
    fn mounts(&self) -> Vec<Value> {
        let volumes = self.options.volumes.iter().enumerate();
        volumes
            .map(|(index, volume)| self.mount(index, volume))
            .collect()
    }

    fn mount(&self, index: usize, volume: &Volume) -> Value {
        let (kind, source) = match &volume.source {
            Source::Host(path) => ("bind", path.clone()),
            Source::Named(_) | Source::Anonymous => ("volume", {
                let content = store::content(&self.paths, self.directory.path(), index, volume);
                match &volume.subpath {
                    Some(subpath) => content.join(subpath),
                    None => content,
                }
            }),
        };
        let mut mount = json!({"Type": kind});
        if kind == "volume" {
            mount["Name"] = match &volume.source {
                Source::Named(name) => json!(name),
                _ => json!(""),
            };
        }
        mount["Source"] = json!(source.display().to_string());
        mount["Destination"] = json!(volume.destination.display().to_string());
        if kind == "volume" {
            mount["Driver"] = json!("local");
        }
        mount["Mode"] = json!(if volume.read_only { "ro" } else { "" });
        mount["RW"] = json!(!volume.read_only);
        mount["Propagation"] = json!(if kind == "bind" { "rprivate" } else { "" });
        mount
    }

    /// Whether a volume was created for this container and has no name of its own.
    pub(super) fn is_anonymous(&self, volume: &Volume) -> bool {
        match &volume.source {
            Source::Host(_) => false,
            Source::Anonymous => true,
            Source::Named(name) => {
                store::find(&self.paths, name).is_ok_and(|volume| volume.record.anonymous)
            }
        }
    }

    /// Labels and the like, as a map.
    pub(super) fn map(pairs: &[(String, String)]) -> Value {
        let pairs: BTreeMap<&String, &String> =
            pairs.iter().map(|(key, value)| (key, value)).collect();
        match pairs.is_empty() {
            true => Value::Null,
            false => json!(pairs),
        }
    }
}

/// Where what a container writes to its root file system is.
pub(crate) fn writable_layer(directory: &Path) -> PathBuf {
    match directory.join("layer.img").exists() {
        true => directory.join("layer/upper"),
        false => directory.join("upper"),
    }
}

/// The name of a signal, with SIG.
fn signal(text: &str) -> String {
    let is_name = text.starts_with(|c: char| c.is_ascii_alphabetic());
    match is_name && !text.starts_with("SIG") {
        true => format!("SIG{text}"),
        false => text.to_owned(),
    }
}
