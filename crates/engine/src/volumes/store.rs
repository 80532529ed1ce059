//! Volumes with names: directories of hull's own that containers share and that outlive them.
//!
//! `DATA/volumes/NAME` has the content in `_data` and what is known of it in `volume.json`. It
//! appears by rename, so it is always whole. `_data` of a volume that is a directory of the host is
//! a symbolic link to that; of one with a size it is where its file system is mounted. Which
//! containers use a volume is in their records and nowhere else. A volume is created for a
//! container after the record that names it was written, and removed only while no record names it;
//! both under one lock.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use hull_sandbox::store::{Directory, ProcessId, read_versioned, remove_all, unix_time_ns};
use rustix::fs::{FlockOperation, Mode, OFlags, ResolveFlags, flock, openat2};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::backing::{self, Backing};
use super::{Source, Volume};
use regex::Regex;

use crate::container;
use crate::entries::{self, Lock};
use crate::error::{Context, Error, Result};
use crate::listing::name_pattern;
use crate::paths::Paths;
use crate::time;
use crate::usage;

/// Version of [`VolumeRecord`].
const VERSION: u32 = 1;

/// Name of the file with what is known of a volume.
const FILE: &str = "volume.json";

/// Name of the directory with the content; Docker's.
const CONTENT: &str = "_data";

/// Name of the directory of volumes that go with their container.
const OWN: &str = "volumes";

/// What is known of a volume.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeRecord {
    /// Format of the file: [`VERSION`].
    pub version: u32,
    /// When it was created, nanoseconds since 1970 UTC.
    pub created_ns: u64,
    /// Labels.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    /// Options of Docker's driver `local`: see [`Backing`].
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub options: BTreeMap<String, String>,
    /// It was created for one container, which did not name it.
    #[serde(default)]
    pub anonymous: bool,
}

/// A volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredVolume {
    /// Its name.
    pub name: String,
    /// Where its content is.
    pub content: PathBuf,
    /// What is known of it.
    pub record: VolumeRecord,
}

impl StoredVolume {
    /// The object of `docker volume inspect`.
    pub fn object(&self) -> Value {
        json!({
            "Name": self.name,
            "Driver": "local",
            "Mountpoint": self.content,
            "CreatedAt": time::format_rfc3339(i128::from(self.record.created_ns)),
            "Labels": self.record.labels,
            "Anonymous": self.record.anonymous,
            "Scope": "local",
            "Options": self.record.options,
        })
    }

    /// Bytes that its content takes of the host where hull keeps it.
    pub fn size(&self) -> u64 {
        match fs::metadata(backing::image(&self.content)) {
            // In units of 512 bytes: stat(2).
            Ok(image) => image.blocks().saturating_mul(512),
            Err(_) => usage::of_directory(&self.content),
        }
    }

    fn backing(&self) -> Result<Backing> {
        Backing::parse(&self.record.options).map_err(Error::invalid)
    }
}

/// Held while volumes are created and removed.
fn lock(paths: &Paths) -> Result<Lock> {
    let directory = paths.volumes();
    let lock = Lock::take(&directory)?;
    let doing = || format!("read {}", directory.display());
    // What a killed command left.
    for entry in fs::read_dir(&directory).context(doing)?.flatten() {
        if entry.file_name().as_encoded_bytes().starts_with(b".") {
            remove_all(&entry.path())?;
        }
    }
    Ok(lock)
}

/// The volume of this name.
///
/// # Errors
/// `NotFound`; its record is damaged, or a newer hull's.
pub fn find(paths: &Paths, name: &str) -> Result<StoredVolume> {
    let missing = || {
        Error::not_found(format!("no such volume: {name}")).hint("hull volume ls lists all volumes")
    };
    super::volume_name(name).map_err(|_| missing())?;
    let path = paths.volume(name);
    let directory = match Directory::open(&path) {
        Ok(directory) => directory,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Err(missing()),
        Err(error) => return Err(error).context(|| format!("open {}", path.display())),
    };
    let record = read_versioned(&directory, FILE, VERSION)?;
    Ok(StoredVolume {
        name: name.to_owned(),
        content: path.join(CONTENT),
        record: record
            .ok_or_else(|| Error::new(format!("volume {name} is damaged: it has no {FILE}")))?,
    })
}

/// All volumes, by name. One that cannot be read comes as its name and the reason.
///
/// # Errors
/// Their directory cannot be read.
pub fn list(paths: &Paths) -> Result<Vec<Result<StoredVolume, (String, Error)>>> {
    let names = entries::names(&paths.volumes())?;
    let read = |name: String| find(paths, &name).map_err(|error| (name, error));
    Ok(names.into_iter().map(read).collect())
}

/// What a volume is to be.
#[derive(Debug, Clone, Default)]
pub struct Wanted {
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// Options of Docker's driver `local`: see [`Backing`].
    pub options: BTreeMap<String, String>,
    /// It is for one container, which does not name it.
    pub anonymous: bool,
}

/// Creates a volume; one of this name that is there already is as good, unless it has other options
/// than those that are asked for.
///
/// # Errors
/// `InvalidArgument` for its options; `Exists` when it is there with others; it cannot be created.
pub fn create(paths: &Paths, name: &str, wanted: Wanted) -> Result<StoredVolume> {
    let _lock = lock(paths)?;
    create_locked(paths, name, wanted)
}

fn create_locked(paths: &Paths, name: &str, wanted: Wanted) -> Result<StoredVolume> {
    let backing = Backing::parse(&wanted.options).map_err(Error::invalid)?;
    if paths.volume(name).exists() {
        let volume = find(paths, name)?;
        let same = wanted.options.is_empty() || volume.record.options == wanted.options;
        return match same {
            true => Ok(volume),
            false => Err(Error::exists(format!(
                "volume {name} is there already, with other options"
            ))
            .hint(format!("hull volume inspect {name}"))),
        };
    }
    let record = VolumeRecord {
        version: VERSION,
        created_ns: unix_time_ns(),
        labels: wanted.labels,
        options: wanted.options,
        anonymous: wanted.anonymous,
    };
    let ProcessId { pid, started } = ProcessId::own();
    let staging = paths.volumes().join(format!(".{pid}-{started}"));
    let doing = || format!("create volume {name}");
    let created = Directory::create_new(&staging)
        .context(doing)
        .and_then(|directory| {
            let content = staging.join(CONTENT);
            match &backing {
                Backing::Host(path) => std::os::unix::fs::symlink(path, content),
                Backing::Directory | Backing::Sized(_) => create_content(&content),
            }
            .context(doing)?;
            let text = serde_json::to_vec_pretty(&record).context(doing)?;
            directory.write(FILE, &text)?;
            directory.rename_to(&paths.volume(name)).context(doing)
        });
    created.inspect_err(|_| drop(remove_all(&staging)))?;
    let volume = find(paths, name)?;
    // What is wrong with it is said now, not when a container wants it.
    if let Err(error) = backing.prepare(name, &volume.content) {
        remove_locked(paths, name)?;
        return Err(error);
    }
    Ok(volume)
}

/// An empty directory that everybody in a container can enter: Docker's mode.
fn create_content(path: &Path) -> std::io::Result<()> {
    fs::DirBuilder::new().mode(0o755).create(path)?;
    // Whatever the umask is.
    fs::set_permissions(path, fs::Permissions::from_mode(0o755))
}

/// Creates the volumes of a container that are not there yet. Its record names them.
///
/// # Errors
/// One cannot be created.
pub(crate) fn provide(paths: &Paths, volumes: &[Volume], anonymous: &[String]) -> Result<()> {
    let named = volumes.iter().filter_map(|volume| match &volume.source {
        Source::Named(name) => Some((name, &volume.options)),
        Source::Host(_) | Source::Anonymous => None,
    });
    let mut held = None;
    for (name, options) in named {
        if held.is_none() {
            held = Some(lock(paths)?);
        }
        let wanted = Wanted {
            options: options.clone(),
            anonymous: anonymous.contains(name),
            ..Wanted::default()
        };
        create_locked(paths, name, wanted)?;
    }
    Ok(())
}

/// Where a volume of a container is: its `index`-th, in `container`. It may not be there yet.
pub(crate) fn content(paths: &Paths, container: &Path, index: usize, volume: &Volume) -> PathBuf {
    match &volume.source {
        Source::Host(path) => path.clone(),
        Source::Named(name) => paths.volume(name).join(CONTENT),
        Source::Anonymous => container.join(OWN).join(index.to_string()),
    }
}

/// Where the content of a volume of a container is: its `index`-th, in `container`. One with a name
/// has been [prepared](prepare).
///
/// # Errors
/// It cannot be created; a subpath leads nowhere.
pub(crate) fn source(
    paths: &Paths,
    container: &Path,
    index: usize,
    volume: &Volume,
) -> Result<Located> {
    let content = content(paths, container, index, volume);
    match &volume.source {
        Source::Host(_) => return Ok(Located::at(content)),
        Source::Anonymous if !content.exists() => {
            Directory::create(&container.join(OWN))?;
            create_content(&content).context(|| format!("create {}", content.display()))?;
        }
        Source::Named(_) | Source::Anonymous => {}
    }
    let Some(subpath) = &volume.subpath else {
        return Ok(Located::at(content));
    };
    // A container decides what is in a volume: no link of it leads out.
    let doing = || format!("find {} in volume {volume}", subpath.display());
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    let root = rustix::fs::open(&content, flags | OFlags::DIRECTORY, Mode::empty());
    let root = root.context(doing)?;
    let inside = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    let opened = openat2(&root, subpath, flags, Mode::empty(), inside).context(doing)?;
    Ok(Located {
        path: format!("/proc/self/fd/{}", opened.as_raw_fd()).into(),
        _opened: Some(opened),
    })
}

/// Makes the content of a volume with a name available at its place; of others it is.
///
/// # Errors
/// There is no such volume; it cannot be mounted; the host has no such directory.
pub(crate) fn prepare(paths: &Paths, volume: &Volume) -> Result<()> {
    let Source::Named(name) = &volume.source else {
        return Ok(());
    };
    let mut volume = find(paths, name)?;
    let mut held = None;
    if let Backing::Sized(_) = volume.backing()? {
        // Two that mount it at once would mount it twice, and it may be removed.
        held = Some(lock(paths)?);
        volume = find(paths, name)?;
    }
    let prepared = volume.backing()?.prepare(name, &volume.content);
    drop(held);
    prepared
}

/// Held by who fills a volume; waits for others.
///
/// # Errors
/// There is no such volume.
pub(crate) fn hold(paths: &Paths, name: &str) -> Result<File> {
    let path = paths.volume(name);
    let doing = || format!("lock {}", path.display());
    let directory = File::open(&path).context(doing)?;
    rustix::io::retry_on_intr(|| flock(&directory, FlockOperation::LockExclusive))
        .context(doing)?;
    Ok(directory)
}

/// A path, valid as long as this lives.
#[derive(Debug)]
pub(crate) struct Located {
    /// The path.
    pub path: PathBuf,
    _opened: Option<OwnedFd>,
}

impl Located {
    fn at(path: PathBuf) -> Self {
        Self {
            path,
            _opened: None,
        }
    }
}

/// Names of volumes, and the containers that use them.
///
/// # Errors
/// A container cannot be read: it may use any of them.
pub fn users(paths: &Paths) -> Result<BTreeMap<String, Vec<String>>> {
    let mut users: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for container in container::list(paths)? {
        let container = container.map_err(|(_, error)| error)?;
        let details = container.record.details;
        for volume in details.options.iter().flat_map(|options| &options.volumes) {
            if let Source::Named(volume) = &volume.source {
                let users = users.entry(volume.clone()).or_default();
                users.push(details.name.clone());
            }
        }
    }
    Ok(users)
}

/// Removes a volume that no container uses.
///
/// # Errors
/// `NotFound`; `WrongState` when a container uses it; its files cannot be removed.
pub fn remove(paths: &Paths, name: &str) -> Result<()> {
    find(paths, name)?;
    let _lock = lock(paths)?;
    if let Some(users) = users(paths)?.get(name) {
        return Err(
            Error::wrong_state(format!("volume {name} is used by {}", users.join(", ")))
                .hint("remove the containers first: hull rm"),
        );
    }
    remove_locked(paths, name)
}

fn remove_locked(paths: &Paths, name: &str) -> Result<()> {
    // It vanishes at once, however much there is in it.
    let ProcessId { pid, started } = ProcessId::own();
    let trash = paths.volumes().join(format!(".{pid}-{started}-removed"));
    let path = paths.volume(name);
    let content = path.join(CONTENT);
    if content.symlink_metadata().is_ok() {
        hull_sandbox::shares::unmount_disk(&content)?;
    }
    match fs::rename(&path, &trash) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        renamed => renamed.context(|| format!("remove {}", path.display()))?,
    }
    remove_all(&trash)
}

/// Removes all volumes that no container uses and that match: with `all` also those that people
/// named. Returns their names.
///
/// # Errors
/// A volume cannot be removed.
pub fn prune(
    paths: &Paths,
    all: bool,
    matches: impl Fn(&StoredVolume) -> bool,
) -> Result<Vec<String>> {
    let _lock = lock(paths)?;
    let users = users(paths)?;
    let mut removed = Vec::new();
    for volume in list(paths)?.into_iter().flatten() {
        let wanted = (all || volume.record.anonymous) && matches(&volume);
        if wanted && !users.contains_key(&volume.name) {
            remove_locked(paths, &volume.name)?;
            removed.push(volume.name);
        }
    }
    Ok(removed)
}

/// Removes the volumes that were created for a container which is gone now, unless others use
/// them.
///
/// # Errors
/// A volume cannot be removed.
pub fn remove_anonymous(paths: &Paths, of_container: &[Volume]) -> Result<()> {
    let names = of_container
        .iter()
        .filter_map(|volume| match &volume.source {
            Source::Named(name) => Some(name),
            Source::Host(_) | Source::Anonymous => None,
        });
    let anonymous: Vec<&String> = names
        .filter(|name| find(paths, name).is_ok_and(|volume| volume.record.anonymous))
        .collect();
    if anonymous.is_empty() {
        return Ok(());
    }
    let _lock = lock(paths)?;
    let users = users(paths)?;
    for name in anonymous {
        if !users.contains_key(name) {
            remove_locked(paths, name)?;
        }
    }
    Ok(())
}

/// One condition on volumes.
#[derive(Clone, Debug)]
pub enum Filter {
    /// A regular expression that its name has a part of.
    Name(Regex),
    /// A label, with this value.
    Label(String, Option<String>),
    /// Whether no container uses it.
    Dangling(bool),
    /// Its driver: all are Docker's `local`.
    Driver(String),
}

impl Filter {
    /// Reads `KEY=VALUE`.
    pub fn parse(text: &str) -> Result<Self, String> {
        let wrong = |why: &str| format!("invalid filter {text:?}: {why}");
        match text.split_once('=') {
            Some(("name", name)) => name_pattern(text, name).map(Self::Name),
            Some(("label", label)) => Ok(match label.split_once('=') {
                Some((key, value)) => Self::Label(key.to_owned(), Some(value.to_owned())),
                None => Self::Label(label.to_owned(), None),
            }),
            Some(("driver", driver)) => Ok(Self::Driver(driver.to_owned())),
            Some(("dangling", "true" | "1")) => Ok(Self::Dangling(true)),
            Some(("dangling", "false" | "0")) => Ok(Self::Dangling(false)),
            Some(("dangling", _)) => Err(wrong("dangling is true or false")),
            _ => Err(wrong(
                "give name=…, label=…, driver=… or dangling=true|false",
            )),
        }
    }

    /// Whether it selects a volume.
    pub fn matches(&self, volume: &StoredVolume, is_used: bool) -> bool {
        match self {
            Self::Name(name) => name.is_match(&volume.name),
            Self::Label(key, value) => volume
                .record
                .labels
                .get(key)
                .is_some_and(|has| value.as_ref().is_none_or(|value| has == value)),
            Self::Dangling(wanted) => *wanted != is_used,
            Self::Driver(driver) => driver == "local",
        }
    }
}

/// The volumes that all conditions select, and what is wrong with others.
///
/// # Errors
/// The directories of volumes or containers cannot be read.
pub fn select(paths: &Paths, filters: &[Filter]) -> Result<(Vec<StoredVolume>, Vec<Error>)> {
    let mut asked = filters.iter();
    let users = match asked.any(|filter| matches!(filter, Filter::Dangling(_))) {
        true => users(paths)?,
        false => BTreeMap::new(),
    };
    let (mut volumes, mut wrong) = (Vec::new(), Vec::new());
    for volume in list(paths)? {
        match volume {
            Ok(volume) => volumes.push(volume),
            Err((name, mut error)) => {
                error.message = format!("volume {name}: {}", error.message);
                wrong.push(error);
            }
        }
    }
    volumes.retain(|volume| {
        let is_used = users.contains_key(&volume.name);
        filters.iter().all(|filter| filter.matches(volume, is_used))
    });
    Ok((volumes, wrong))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn anonymous() -> Wanted {
        Wanted {
            anonymous: true,
            ..Wanted::default()
        }
    }

    #[test]
    fn a_volume_that_is_a_directory_of_the_host_is_removed_without_it() {
        let (directory, paths) = Paths::temporary();
        let host = directory.path().join("host");
        let options =
            [("type", "none"), ("o", "bind")].map(|(key, value)| (key.into(), value.into()));
        let mut wanted = Wanted {
            options: options.into(),
            ..Wanted::default()
        };
        let device = host.to_str().unwrap().to_owned();
        wanted.options.insert("device".into(), device);
        let error = create(&paths, "db", wanted.clone()).unwrap_err();
        assert!(error.message.contains("of volume db"), "{error}");
        assert_eq!(list(&paths).unwrap().len(), 0);
        fs::create_dir(&host).unwrap();
        fs::write(host.join("file"), "kept").unwrap();
        let created = create(&paths, "db", wanted.clone()).unwrap();
        assert_eq!(create(&paths, "db", wanted).unwrap(), created);
        create(&paths, "db", Wanted::default()).unwrap();
        let other = Wanted {
            options: BTreeMap::from([("size".into(), "1g".into())]),
            ..Wanted::default()
        };
        create(&paths, "db", other).unwrap_err();
        assert_eq!(fs::read(created.content.join("file")).unwrap(), b"kept");
        remove(&paths, "db").unwrap();
        assert!(host.join("file").exists());
    }

    #[test]
    fn a_volume_is_there_once_it_was_created_and_gone_once_it_was_removed() {
        let (_directory, paths) = Paths::temporary();
        assert_eq!(list(&paths).unwrap().len(), 0);
        let labels = BTreeMap::from([("a".to_owned(), "b".to_owned())]);
        let wanted = Wanted {
            labels: labels.clone(),
            ..Wanted::default()
        };
        let created = create(&paths, "db", wanted).unwrap();
        assert_eq!(created.record.labels, labels);
        fs::write(created.content.join("file"), "kept").unwrap();
        assert_eq!(create(&paths, "db", anonymous()).unwrap(), created);
        assert_eq!(find(&paths, "db").unwrap(), created);
        assert_eq!(list(&paths).unwrap().len(), 1);
        remove(&paths, "db").unwrap();
        assert_eq!(
            remove(&paths, "db").unwrap_err().kind,
            crate::error::ErrorKind::NotFound
        );
        assert_eq!(fs::read_dir(paths.volumes()).unwrap().count(), 0);
        find(&paths, "../containers").unwrap_err();
    }

    #[test]
    fn only_volumes_without_a_name_of_their_own_are_pruned_unless_all_are() {
        let (_directory, paths) = Paths::temporary();
        create(&paths, "named", Wanted::default()).unwrap();
        create(&paths, "anonymous", anonymous()).unwrap();
        assert_eq!(prune(&paths, false, |_| true).unwrap(), ["anonymous"]);
        assert_eq!(prune(&paths, true, |_| false).unwrap().len(), 0);
        assert_eq!(prune(&paths, true, |_| true).unwrap(), ["named"]);
    }

    #[test]
    fn no_link_in_a_volume_leads_out_of_it() {
        let (directory, paths) = Paths::temporary();
        let content = create(&paths, "db", Wanted::default()).unwrap().content;
        fs::create_dir(content.join("inside")).unwrap();
        std::os::unix::fs::symlink(directory.path(), content.join("out")).unwrap();
        let at = |subpath: &str| {
            let volume = Volume {
                source: Source::Named("db".into()),
                subpath: Some(subpath.into()),
                ..Volume::anonymous("/x".into())
            };
            source(&paths, directory.path(), 0, &volume)
        };
        let located = at("inside").unwrap();
        assert_eq!(
            fs::read_link(&located.path).unwrap(),
            content.join("inside")
        );
        let error = at("out").unwrap_err();
        assert!(
            error.message.contains("find out in volume db:/x:rw"),
            "{error}"
        );
    }
}
