//! The configuration file: read, checked, and remembered with the place of each value. Commands
//! read it when they need a value; the sandbox process gets its values from the command and never
//! reads the file.
//!
//! `config/default.toml` documents every key and is itself the source of the defaults, so the two
//! cannot differ.

use std::ffi::OsString;
use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};

use clap::ValueEnum;
use hull_sandbox::LinkLocal;
use hull_sandbox::config::NetworkLimits;
use toml::Spanned;
use toml::de::{DeArray, DeTable, DeValue};

use crate::error::{Context, Error, Result};
use crate::home::Home;
use crate::paths::Paths;
use crate::values::{self, DetachKeys, Machine, Network, NetworkFilter, Pull};

/// The file with every key, its default and its explanation.
pub const DEFAULT: &str = include_str!("../config/default.toml");

/// Annotations of pods that are known: kind of machine, memory of the guest, processors.
pub const ANNOTATIONS: [&str; 4] = [
    "hull.dev/machine",
    "hull.dev/kernel",
    "hull.dev/memory",
    "hull.dev/cpus",
];

const SYSTEM_FILE: &str = "/etc/hull/config.toml";

/// What is in force.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// Machine kind.
    pub machine: Machine,
    /// Machines without hardware isolation are refused.
    pub hardware_isolation: bool,
    /// Guest memory, bytes.
    pub memory: u64,
    /// Guest processors.
    pub cpus: u32,
    /// Guest kernel instead of the installed one.
    pub kernel: Option<PathBuf>,
    /// Network of containers.
    pub network: Network,
    /// Which guests may send only from their own addresses.
    pub network_filter: NetworkFilter,
    /// With the filter: whether guests reach services on link-local addresses.
    pub link_local_services: bool,
    /// Where ports are published that name no address.
    pub publish_address: IpAddr,
    /// When to ask registries.
    pub pull: Pull,
    /// Most bytes of an image's layers, uncompressed; 0 is no limit.
    pub image_max_size: u64,
    /// Most files, directories and links of an image's layers; 0 is no limit.
    pub image_max_inodes: u64,
    /// Size of /dev/shm, bytes.
    pub shm_size: u64,
    /// Size of the writable layer, bytes; 0 is no limit.
    pub storage_size: u64,
    /// Most processes; 0 is no limit.
    pub pids_limit: i64,
    /// Seconds between stop signal and SIGKILL.
    pub stop_timeout: i64,
    /// Bytes that detach.
    pub detach_keys: DetachKeys,
    /// Most output kept, bytes.
    pub log_size: u64,
    /// Processors of one core run one machine at a time.
    pub core_sched: bool,
    /// Annotations that pods may have: of [`ANNOTATIONS`].
    pub pod_annotations: Vec<String>,
    /// Guest kernels that pods may choose.
    pub pod_kernels: Vec<PathBuf>,
    /// The control group above those of machines; none are made without it.
    pub cgroup_parent: Option<PathBuf>,
    /// Images and writable layers.
    pub data_dir: PathBuf,
    /// State of containers.
    pub run_dir: PathBuf,
    /// Guest kernels and initramfs, when not beside the executable.
    pub guest_dir: Option<PathBuf>,
    /// Whoever calls is not root.
    pub without_root: bool,
    /// The user id of who calls without root.
    pub person: Option<u32>,
    /// hull's own executable, as its path was when this was read.
    pub executable: PathBuf,
    /// Every key, in the order of the default file, with what it was set to and where.
    pub origins: Vec<Origin>,
    /// Where errors of keys go that need not be right; `None` where all have to be.
    wrong: Option<Vec<Error>>,
}

/// Where the value of one key comes from.
#[derive(Clone, Debug, PartialEq)]
pub struct Origin {
    /// The key.
    pub key: String,
    /// The value, as TOML.
    pub value: String,
    /// `default`, or file and line.
    pub place: String,
}

impl Config {
    /// Reads the configuration in force: that of the file which HULL_CONFIG names, or of the
    /// system's, and after that, without root, of the person's own.
    pub fn load() -> Result<Config> {
        Ok(Config::load_all(None)?.0)
    }

    /// Reads the configuration in force for a person who is root of a user namespace already.
    ///
    /// # Errors
    /// As [`Config::load`].
    pub fn load_as(uid: u32) -> Result<Config> {
        let chosen = std::env::var_os("HULL_CONFIG");
        let home = Some(Home::of(uid)?);
        Config::load_from(chosen, Path::new(SYSTEM_FILE), home, None)
    }

    /// For commands that start nothing: keys that are wrong, and do not say where files are, come
    /// as errors beside the others.
    ///
    /// # Errors
    /// The file cannot be read, is no TOML, or a wrong key says where files are.
    pub fn load_for_existing() -> Result<(Config, Vec<Error>)> {
        Config::load_all(Some(Vec::new()))
    }

    /// Reads the configuration of a file, as if HULL_CONFIG named it.
    ///
    /// # Errors
    /// As [`Config::load`].
    pub fn load_file(path: &Path) -> Result<Config> {
        let chosen = Some(path.as_os_str().to_owned());
        Config::load_from(chosen, Path::new(SYSTEM_FILE), Home::of_caller()?, None)
    }

    fn load_all(wrong: Option<Vec<Error>>) -> Result<(Config, Vec<Error>)> {
        let chosen = std::env::var_os("HULL_CONFIG");
        let home = Home::of_caller()?;
        let mut config = Config::load_from(chosen, Path::new(SYSTEM_FILE), home, wrong)?;
        let wrong = config.wrong.take().unwrap_or_default();
        Ok((config, wrong))
    }

    fn load_from(
        chosen: Option<OsString>,
        system: &Path,
        home: Option<Home>,
        wrong: Option<Vec<Error>>,
    ) -> Result<Config> {
        let mut config = Config {
            wrong,
            ..Config::defaults()?
        };
        let chosen = chosen.filter(|path| !path.is_empty()).map(PathBuf::from);
        if let Some(path) = chosen {
            config.move_home(home.as_ref());
            return match config.apply_file(&path)? {
                true => Ok(config),
                false => Err(Error::new(format!(
                    "cannot read the configuration {}: no such file",
                    path.display()
                ))
                .hint("HULL_CONFIG names this file")),
            };
        }
        config.apply_file(system)?;
        if let Some(home) = home {
            // The system's are root's.
            config.move_home(Some(&home));
            config.apply_file(&home.config)?;
        }
        Ok(config)
    }

    /// Applies a file; false when there is none.
    fn apply_file(&mut self, path: &Path) -> Result<bool> {
        match std::fs::read_to_string(path) {
            Ok(text) => self.apply(&text, Some(path)).map(|()| true),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(false),
            Err(error) => {
                Err(error).context(|| format!("read the configuration {}", path.display()))
            }
        }
    }

    /// Without root, files are in the person's own directories.
    fn move_home(&mut self, home: Option<&Home>) {
        let Some(home) = home else { return };
        self.without_root = true;
        self.person = Some(home.uid);
        for (key, path, value) in [
            ("data_dir", &home.data, &mut self.data_dir),
            ("run_dir", &home.run, &mut self.run_dir),
        ] {
            value.clone_from(path);
            if let Some(origin) = self.origins.iter_mut().find(|origin| origin.key == key) {
                origin.value = toml::Value::from(path.to_string_lossy().as_ref()).to_string();
                origin.place = "default without root".to_owned();
            }
        }
    }

    /// The defaults.
    pub fn defaults() -> Result<Config> {
        let mut config = Config {
            machine: Machine::Auto,
            hardware_isolation: false,
            memory: 0,
            cpus: 0,
            kernel: None,
            network: Network::None,
            network_filter: NetworkFilter::Own,
            link_local_services: false,
            publish_address: IpAddr::V4(Ipv4Addr::UNSPECIFIED),
            pull: Pull::Missing,
            image_max_size: 0,
            image_max_inodes: 0,
            shm_size: 0,
            storage_size: 0,
            pids_limit: 0,
            stop_timeout: 0,
            detach_keys: DetachKeys::default(),
            log_size: 0,
            core_sched: false,
            pod_annotations: Vec::new(),
            pod_kernels: Vec::new(),
            cgroup_parent: None,
            data_dir: PathBuf::new(),
            run_dir: PathBuf::new(),
            guest_dir: None,
            without_root: false,
            person: None,
            executable: std::env::current_exe().context(|| "find hull's own executable")?,
            origins: Vec::new(),
            wrong: None,
        };
        config.apply(DEFAULT, None)?;
        Ok(config)
    }

    #[cfg(test)]
    fn parse(text: &str, path: &Path) -> Result<Config> {
        let mut config = Config::defaults()?;
        config.apply(text, Some(path))?;
        Ok(config)
    }

    /// Sets every key of `text`; without a path it is the default file, which brings the keys into
    /// being.
    fn apply(&mut self, text: &str, path: Option<&Path>) -> Result<()> {
        let place = |at: usize| match path {
            Some(path) => {
                let line = text.get(..at).unwrap_or(text).matches('\n').count() + 1;
                format!("{}:{line}", path.display())
            }
            None => "default".to_owned(),
        };
        let table = DeTable::parse(text).map_err(|error| {
            let at = error.span().map_or(0, |span| span.start);
            Error::new(format!("{}: {}", place(at), error.message()))
        })?;
        // The parsed table is sorted by key; people read in the file's order.
        let mut entries: Vec<_> = table.get_ref().iter().collect();
        entries.sort_by_key(|(key, _)| key.span().start);
        for (key, value) in entries {
            let name = key.get_ref().as_ref();
            let place = place(key.span().start);
            let failed = match self.set(name, value) {
                Ok(true) => None,
                Ok(false) => Some(self.unknown_key(name, &place)),
                Err(why) => Some(Error::new(format!("{place}: {name}: {why}"))),
            };
            match (failed, &mut self.wrong) {
                (Some(error), Some(wrong)) if !matches!(name, "data_dir" | "run_dir") => {
                    wrong.push(error);
                    continue;
                }
                (Some(error), _) => return Err(error),
                (None, _) => {}
            }
            let value = text.get(value.span()).unwrap_or_default().to_owned();
            match self.origins.iter_mut().find(|origin| origin.key == name) {
                Some(origin) => (origin.value, origin.place) = (value, place),
                None => self.origins.push(Origin {
                    key: name.to_owned(),
                    value,
                    place,
                }),
            }
        }
        Ok(())
    }

    fn unknown_key(&self, name: &str, place: &str) -> Error {
        let keys = self.origins.iter().map(|origin| origin.key.as_str());
        let error = Error::new(format!("{place}: unknown key {name:?}"));
        match values::nearest(name, keys) {
            Some(near) => error.hint(format!(
                "did you mean {near:?}? `hull config --default` lists all keys"
            )),
            None => error.hint("`hull config --default` lists all keys"),
        }
    }

    /// Sets one key; false when there is no such key.
    fn set(
        &mut self,
        name: &str,
        value: &Spanned<DeValue<'_>>,
    ) -> std::result::Result<bool, String> {
        let value = value.get_ref();
        match name {
            "machine" => self.machine = choice(value)?,
            "isolation" => {
                self.hardware_isolation = match string(value)? {
                    "any" => false,
                    "hardware" => true,
                    other => return Err(format!("{other:?} is none of \"any\", \"hardware\"")),
                }
            }
            "memory" => {
                self.memory = values::memory(string(value)?)?;
                if self.memory == 0 {
                    return Err("a guest needs memory".to_owned());
                }
            }
            "cpus" => self.cpus = integer(value, 1, 1024)? as u32,
            "kernel" => self.kernel = path(value)?,
            "network" => {
                self.network = match values::network(string(value)?)? {
                    Network::Container(_) => {
                        return Err("only one container can join another one: --network".into());
                    }
                    network => network,
                }
            }
            "network_filter" => self.network_filter = choice(value)?,
            "link_local_services" => self.link_local_services = boolean(value)?,
            "core_sched" => self.core_sched = boolean(value)?,
            "pod_annotations" => {
                let names = list(value)?.iter();
                let names = names.map(|name| annotation(name.get_ref()));
                self.pod_annotations = names.collect::<Result<_, _>>()?;
            }
            "pod_kernels" => {
                let kernels = list(value)?.iter().map(|kernel| path(kernel.get_ref()));
                let kernels = kernels.collect::<Result<Vec<_>, _>>()?;
                self.pod_kernels = kernels.into_iter().flatten().collect();
            }
            "publish_address" => {
                let text = string(value)?;
                self.publish_address = text
                    .parse()
                    .map_err(|_| format!("{text:?} is not an address"))?;
            }
            "pull" => self.pull = choice(value)?,
            "image_max_size" => self.image_max_size = values::size(string(value)?)?,
            "image_max_inodes" => {
                self.image_max_inodes = integer(value, 0, i64::MAX)?.unsigned_abs();
            }
            "shm_size" => self.shm_size = values::size(string(value)?)?,
            "storage_size" => self.storage_size = values::size(string(value)?)?,
            "pids_limit" => self.pids_limit = integer(value, 0, i64::MAX)?,
            "stop_timeout" => self.stop_timeout = integer(value, -1, 1 << 31)?,
            "detach_keys" => self.detach_keys = values::detach_keys(string(value)?)?,
            "log_size" => self.log_size = values::size(string(value)?)?,
            "cgroup_parent" => self.cgroup_parent = path(value)?,
            "data_dir" => self.data_dir = path(value)?.ok_or("a directory is needed")?,
            "run_dir" => self.run_dir = path(value)?.ok_or("a directory is needed")?,
            "guest_dir" => self.guest_dir = path(value)?,
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// What holds for a network: one of hull's own, or one that an engine has set up.
    pub fn network_limits(&self, own: bool) -> NetworkLimits {
        NetworkLimits {
            filter: match self.network_filter {
                NetworkFilter::All => true,
                NetworkFilter::Own => own,
                NetworkFilter::None => false,
            },
            link_local: match self.link_local_services {
                true => LinkLocal::All,
                false => LinkLocal::None,
            },
            rate: 0,
        }
    }

    /// Where state and images are.
    pub fn paths(&self) -> Paths {
        Paths::new(&self.run_dir, &self.data_dir)
    }
}

fn wrong_type(value: &DeValue<'_>, wanted: &str) -> String {
    format!(
        "{wanted} is needed, not a value of type {}",
        value.type_str()
    )
}

fn string<'a>(value: &'a DeValue<'_>) -> std::result::Result<&'a str, String> {
    value.as_str().ok_or_else(|| wrong_type(value, "a string"))
}

fn list<'a, 'b>(value: &'a DeValue<'b>) -> std::result::Result<&'a DeArray<'b>, String> {
    value.as_array().ok_or_else(|| wrong_type(value, "a list"))
}

fn boolean(value: &DeValue<'_>) -> std::result::Result<bool, String> {
    value
        .as_bool()
        .ok_or_else(|| wrong_type(value, "true or false"))
}

fn integer(value: &DeValue<'_>, least: i64, most: i64) -> std::result::Result<i64, String> {
    let number = value
        .as_integer()
        .ok_or_else(|| wrong_type(value, "a whole number"))?;
    i64::from_str_radix(number.as_str(), number.radix())
        .ok()
        .filter(|number| (least..=most).contains(number))
        .ok_or_else(|| format!("{} is not from {least} to {most}", number.as_str()))
}

fn annotation(value: &DeValue<'_>) -> std::result::Result<String, String> {
    let name = string(value)?;
    match ANNOTATIONS.contains(&name) {
        true => Ok(name.to_owned()),
        false => Err(format!("{name:?} is none of {}", ANNOTATIONS.join(", "))),
    }
}

/// An absolute path; `None` when it is empty.
fn path(value: &DeValue<'_>) -> std::result::Result<Option<PathBuf>, String> {
    let path = Path::new(string(value)?);
    if path.as_os_str().is_empty() {
        Ok(None)
    } else if path.is_absolute() {
        Ok(Some(path.to_owned()))
    } else {
        Err(format!("{path:?} is not an absolute path"))
    }
}

fn choice<T: ValueEnum>(value: &DeValue<'_>) -> std::result::Result<T, String> {
    let text = string(value)?;
    T::from_str(text, false).map_err(|_| {
        let names: Vec<String> = T::value_variants()
            .iter()
            .map(|variant| format!("{:?}", values::enum_name(variant.clone())))
            .collect();
        format!("{text:?} is none of {}", names.join(", "))
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn parse(text: &str) -> Result<Config> {
        Config::parse(text, Path::new("test.toml"))
    }

    #[test]
    fn a_wrong_key_does_not_keep_from_what_exists() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("config.toml");
        let load = |text: &str, wrong: Option<Vec<Error>>| {
            std::fs::write(&path, text).unwrap();
            Config::load_from(
                Some(path.clone().into()),
                Path::new("/nowhere"),
                None,
                wrong,
            )
        };
        let text = "cpus = 2\nmemroy = '1g'\npids_limit = 'x'\ndata_dir = '/mine'";
        assert!(load(text, None).is_err());
        let config = load(text, Some(Vec::new())).unwrap();
        assert_eq!(
            (config.cpus, config.data_dir.as_path()),
            (2, Path::new("/mine"))
        );
        let wrong: Vec<String> = config
            .wrong
            .unwrap()
            .into_iter()
            .map(|e| e.message)
            .collect();
        assert!(wrong[0].contains("unknown key \"memroy\""), "{wrong:?}");
        assert_eq!(wrong.len(), 2);
        assert!(load("data_dir = 1", Some(Vec::new())).is_err());
    }

    #[test]
    fn the_default_file_sets_every_key() {
        let config = Config::defaults().unwrap();
        assert_eq!(config.machine, Machine::Auto);
        assert_eq!(config.memory, 256 << 20);
        assert_eq!(config.cpus, 1);
        assert_eq!(config.detach_keys.0, [16, 17]);
        assert_eq!(config.data_dir, Path::new("/var/lib/hull"));
        assert_eq!(config.guest_dir, None);
        assert_eq!(config.origins.len(), 25, "one origin for each key");
        assert!(
            config
                .origins
                .iter()
                .all(|origin| origin.place == "default")
        );
    }

    #[test]
    fn a_file_overrides_and_is_remembered() {
        let config = parse("# mine\nmemory = '1g'\ncpus = 2\n").unwrap();
        assert_eq!((config.memory, config.cpus), (1 << 30, 2));
        let origin = config
            .origins
            .iter()
            .find(|origin| origin.key == "cpus")
            .unwrap();
        assert_eq!(
            (origin.value.as_str(), origin.place.as_str()),
            ("2", "test.toml:3")
        );
    }

    #[test]
    fn mistakes_are_named_with_their_line() {
        for (text, message) in [
            ("memroy = '1g'", "test.toml:1: unknown key \"memroy\""),
            (
                "\nmachine = 'xen'",
                "test.toml:2: machine: \"xen\" is none of \"auto\", \"kvm\", \"qemu\", \"uml\"",
            ),
            (
                "cpus = 'two'",
                "test.toml:1: cpus: a whole number is needed, not a value of type string",
            ),
            ("cpus = 0", "test.toml:1: cpus: 0 is not from 1 to 1024"),
            (
                "memory = '1m'",
                "test.toml:1: memory: memory limit 1m is too small: at least 6m",
            ),
            (
                "data_dir = 'x'",
                "test.toml:1: data_dir: \"x\" is not an absolute path",
            ),
            (
                "pod_annotations = ['hull.dev/x']",
                "test.toml:1: pod_annotations: \"hull.dev/x\" is none of hull.dev/machine, hull.dev/kernel, hull.dev/memory, hull.dev/cpus",
            ),
            (
                "isolation = 'none'",
                "test.toml:1: isolation: \"none\" is none of \"any\", \"hardware\"",
            ),
            (
                "[machine]\nx = 1",
                "test.toml:1: machine: a string is needed, not a value of type table",
            ),
        ] {
            assert_eq!(parse(text).unwrap_err().message, message, "{text}");
        }
        assert!(
            parse("a = \n")
                .unwrap_err()
                .message
                .starts_with("test.toml:1: ")
        );
        let error = parse("memroy = '1g'").unwrap_err();
        assert!(error.hint.unwrap().contains("did you mean \"memory\""));
    }

    #[test]
    fn which_file() {
        let directory = tempfile::tempdir().unwrap();
        let system = directory.path().join("system.toml");
        let chosen = directory.path().join("chosen.toml");
        let load =
            |chosen: Option<&Path>| Config::load_from(chosen.map(Into::into), &system, None, None);
        assert_eq!(load(None).unwrap().cpus, 1);
        std::fs::write(&system, "cpus = 2").unwrap();
        assert_eq!(load(None).unwrap().cpus, 2);
        assert_eq!(load(Some(Path::new(""))).unwrap().cpus, 2);
        let error = load(Some(&chosen)).unwrap_err();
        assert!(error.message.contains("chosen.toml"), "{}", error.message);
        std::fs::write(&chosen, "memory = '1g'").unwrap();
        assert_eq!(load(Some(&chosen)).unwrap().cpus, 1);

        // Without root: the system's file holds but for directories, the person's own goes before
        // it.
        let home = || Home {
            uid: 1000,
            config: directory.path().join("own.toml"),
            data: "/home/ann/data".into(),
            run: "/run/ann".into(),
        };
        let load = |chosen: Option<&Path>| {
            Config::load_from(chosen.map(Into::into), &system, Some(home()), None).unwrap()
        };
        std::fs::write(&system, "cpus = 2\nrun_dir = '/run/other'").unwrap();
        let config = load(None);
        assert_eq!(
            (config.cpus, config.run_dir.as_path()),
            (2, Path::new("/run/ann"))
        );
        std::fs::write(home().config, "cpus = 3\ndata_dir = '/mine'").unwrap();
        let config = load(None);
        assert_eq!(
            (config.cpus, config.data_dir.as_path()),
            (3, Path::new("/mine"))
        );
        let config = load(Some(&chosen));
        assert_eq!(
            (config.cpus, config.data_dir.as_path()),
            (1, Path::new("/home/ann/data"))
        );
    }
}
