//! What a container's root file system has become: `diff`, `commit` and `export`.
//!
//! Changes are what is in the upper directory of the overlay. A container decides what is there,
//! also while it is read: that is done by a thread whose root is that directory, so no link leads
//! to the host. Guests write through, so the directory is what the container wrote, but for what
//! programs have in shared mappings.

use std::fs::{File, Metadata};
use std::io::{self, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use hull_archive::append_link;
use hull_image::unpack::tar_reader::{Entry, Kind, TarReader};
use hull_image::{Image, ImageConfig, Import, is_opaque, is_whiteout, pack_changes};
use hull_sandbox::control::protocol::Request;
use hull_sandbox::shares::{Disk, enter_upper};
use hull_sandbox::store::State;
use rustix::fs::{Mode, OFlags, ResolveFlags, openat2};

use crate::config::Config;
use crate::container::{self, Container};
use crate::copy::ArchiveReader;
use crate::dns;
use crate::error::{Context, Error, Result, of_image};
use crate::options::RunOptions;
use crate::paths::Paths;
use crate::spec;
use crate::unpacker;

/// How a path differs from the image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ChangeKind {
    /// It is not in the image.
    Added,
    /// It is in the image, too.
    Changed,
    /// It is only in the image.
    Deleted,
}

impl ChangeKind {
    /// Docker's letter.
    pub fn letter(self) -> char {
        match self {
            Self::Added => 'A',
            Self::Changed => 'C',
            Self::Deleted => 'D',
        }
    }
}

/// One difference.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    /// How.
    pub kind: ChangeKind,
    /// Where, from the container's root.
    pub path: PathBuf,
}

/// What was made for mounts of the container, and is no change of its own: empty files for
/// hosts, hostname and resolv.conf, and empty directories for file systems that every container
/// has. `name` is relative to the root.
fn is_mount_point(name: &Path, metadata: &Metadata) -> bool {
    const DIRECTORIES: [&str; 3] = ["dev", "proc", "sys"];
    let of_file = || {
        let mut files = dns::FILES.iter();
        files.any(|file| name == Path::new("etc").join(file))
    };
    match metadata.is_dir() {
        true => DIRECTORIES.iter().any(|own| name == Path::new(own)),
        false => metadata.len() == 0 && of_file(),
    }
}

/// Calls `work` in a thread whose root is the upper directory of the container's overlay.
fn in_upper<T: Send>(container: &Container, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    let directory = container.directory.path();
    let file = directory.join("layer.img");
    let disk = file.exists().then(|| Disk {
        file,
        place: directory.join("layer"),
        // It has its size.
        size: u64::MAX,
    });
    if disk.is_some() && !container::is_idle(container) {
        return Err(Error::unsupported(format_args!(
            "looking at the changes of container {} while it runs: its writable layer is a file \
             system of its own (--storage-opt size)",
            container.record.details.name
        ))
        .hint("hull stop comes first"));
    }
    let upper = disk
        .as_ref()
        .map_or(directory, |disk| &disk.place)
        .join("upper");
    // One that was never started has none, and is to have none afterwards: it gets its attributes
    // from the image.
    let is_new = disk.is_none() && !upper.exists();
    if is_new {
        std::fs::create_dir(&upper).context(|| format!("create {}", upper.display()))?;
    }
    let worked = std::thread::scope(|scope| {
        let working = scope.spawn(|| {
            enter_upper(&upper, disk.as_ref())?;
            work()
        });
        working
            .join()
            .unwrap_or_else(|_| Err(Error::new("the thread panicked")))
    });
    if is_new {
        std::fs::remove_dir(&upper).context(|| format!("remove {}", upper.display()))?;
    }
    worked
}

/// Holds a container that is idle still; one that runs goes on.
fn still(paths: &Paths, name: &str) -> Result<(Container, Option<File>)> {
    let found = container::find(paths, name)?;
    if !container::is_idle(&found) {
        return Ok((found, None));
    }
    let lock = container::lock(&found)?;
    Ok((container::find(paths, &found.record.id)?, Some(lock)))
}

/// What differs from the image, by path.
///
/// # Errors
/// There is no such container, or its files cannot be read.
pub fn diff(paths: &Paths, name: &str) -> Result<Vec<Change>> {
    let (container, _lock) = still(paths, name)?;
    let open = |layer: &PathBuf| {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        rustix::fs::open(layer, flags, Mode::empty())
            .context(|| format!("open {}", layer.display()))
    };
    let layers = &container.record.details.layers;
    let layers: Vec<_> = layers.iter().map(open).collect::<Result<_>>()?;
    // Without a look at marks of what is gone: a layer below decides.
    let in_image = |name: &Path| {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
        layers
            .iter()
            .any(|layer| openat2(layer, name, flags, Mode::empty(), resolve).is_ok())
    };
    let mut changes = in_upper(&container, || walk(Path::new("/"), &in_image))?;
    changes.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(changes)
}

fn walk(root: &Path, in_image: &dyn Fn(&Path) -> bool) -> Result<Vec<Change>> {
    let mut changes = Vec::new();
    // Directories below an opaque one hide what the image has.
    let mut waiting = vec![(PathBuf::new(), false)];
    while let Some((directory, hides)) = waiting.pop() {
        let path = root.join(&directory);
        let entries = match std::fs::read_dir(&path) {
            // Removed meanwhile, by a container that runs.
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            entries => entries.context(|| format!("read {}", path.display()))?,
        };
        let (mut mount_points, mut others) = (0, 0);
        for entry in entries {
            let name = directory.join(
                entry
                    .context(|| format!("read {}", path.display()))?
                    .file_name(),
            );
            let path = root.join(&name);
            let metadata = match path.symlink_metadata() {
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                metadata => metadata.context(|| format!("read {}", path.display()))?,
            };
            if is_mount_point(&name, &metadata) {
                mount_points += 1;
                continue;
            }
            others += 1;
            let kind = match () {
                () if is_whiteout(&metadata) => ChangeKind::Deleted,
                () if !hides && in_image(&name) => ChangeKind::Changed,
                () => ChangeKind::Added,
            };
            if metadata.is_dir() {
                let hides = hides || kind == ChangeKind::Added || is_opaque(&path);
                waiting.push((name.clone(), hides));
            }
            changes.push(Change {
                kind,
                path: Path::new("/").join(name),
            });
        }
        if mount_points > 0 && others == 0 {
            // It is there for them.
            let own = Path::new("/").join(&directory);
            changes.retain(|change| change.path != own);
        }
    }
    Ok(changes)
}

/// Makes an image of a container: its own and what the container has changed, with what was asked
/// for as its defaults. `pause` freezes a container that runs meanwhile.
///
/// # Errors
/// There is no such container, its image is a plain directory, or a change is invalid.
pub fn commit(config: &Config, name: &str, import: &Import, pause: bool) -> Result<Image> {
    let paths = config.paths();
    let container = container::find(&paths, name)?;
    let id = &container.record.id;
    if !pause || container.status.state != State::Running {
        return commit_as_it_is(config, id, import);
    }
    let freeze = |frozen| {
        container::connect(&container)?.do_(&Request::Freeze {
            container: id.clone(),
            frozen,
        })
    };
    freeze(true)?;
    let image = commit_as_it_is(config, id, import);
    let thawed = freeze(false);
    // Why there is no image says more.
    let image = image?;
    thawed?;
    Ok(image)
}

fn commit_as_it_is(config: &Config, name: &str, import: &Import) -> Result<Image> {
    let (container, _lock) = still(&config.paths(), name)?;
    let details = &container.record.details;
    let store = unpacker::store(config)?;
    let base = details
        .image_id
        .parse()
        .and_then(|reference| store.inspect(&reference))
        .map_err(of_image)?;
    let defaults = match &details.options {
        Some(options) => defaults(options, &base.config),
        None => base.config.clone(),
    };
    let pack = |output: &mut File| {
        in_upper(&container, || {
            pack_changes(Path::new("/"), &is_mount_point, output)
                .context(|| "read the container's writable layer")
        })
        .map_err(io::Error::other)
    };
    store
        .commit(&base, defaults, import, pack, &())
        .map_err(of_image)
}

/// Defaults of an image of a container, as Docker takes them over from its options.
fn defaults(options: &RunOptions, image: &ImageConfig) -> ImageConfig {
    let text = |word: &std::ffi::OsString| word.to_string_lossy().into_owned();
    let mut config = image.clone();
    if let Some(entrypoint) = &options.entrypoint {
        let words = spec::entrypoint_words(entrypoint);
        config.entrypoint = words.iter().map(text).collect();
        // That of the image was for another entry point.
        config.cmd = Vec::new();
    }
    if !options.command.is_empty() {
        config.cmd = options.command.iter().map(text).collect();
    }
    for variable in &options.environment {
        let variable = text(variable);
        let name = variable.split('=').next().unwrap_or_default().to_owned() + "=";
        config.env.retain(|known| !known.starts_with(&name));
        config.env.push(variable);
    }
    if let Some(user) = &options.user {
        config.user.clone_from(user);
    }
    if let Some(directory) = &options.directory {
        config.workdir.clone_from(directory);
    }
    if options.stop_signal.is_some() {
        config.stop_signal.clone_from(&options.stop_signal);
    }
    config.labels.extend(options.labels.iter().cloned());
    if options.health.is_some() {
        config.health.clone_from(&options.health);
    }
    let published = options.network.publish.iter();
    let published = published.flat_map(|ports| &ports.0);
    let published =
        published.map(|port| format!("{}/{}", port.container_port, port.protocol.name()));
    for port in options.expose.iter().cloned().chain(published) {
        if !config.exposed_ports.contains(&port) {
            config.exposed_ports.push(port);
        }
    }
    for volume in &options.volumes {
        let place = volume.destination.display().to_string();
        let known = spec::image_volumes(image).contains(&volume.destination);
        if !known && !matches!(volume.source, crate::volumes::Source::Host(_)) {
            config.volumes.push(place);
        }
    }
    config
}

/// Writes the root file system of a container as an archive, without what is mounted in it.
///
/// # Errors
/// There is no such container, it cannot be read, or `output` not be written.
pub fn export(paths: &Paths, name: &str, output: impl Write) -> Result<()> {
    let container = container::find(paths, name)?;
    let options = container.record.details.options.as_deref();
    let mut mounted: Vec<PathBuf> = options.map_or_else(Vec::new, |options| {
        let volumes = options.volumes.iter().map(|volume| &volume.destination);
        let memory = options.tmpfs.iter().map(|tmpfs| &tmpfs.destination);
        volumes.chain(memory).cloned().collect()
    });
    mounted.extend(["/dev", "/proc", "/sys"].map(PathBuf::from));
    let archive = ArchiveReader::ask(paths, &container, "/".to_owned(), false)?;
    let mut archive = TarReader::new(archive);
    let mut written = tar::Builder::new(io::BufWriter::with_capacity(1 << 18, output));
    loop {
        let entry = match archive.next() {
            Ok(Some(entry)) => entry,
            Ok(None) => break,
            Err(error) => return Err(archive.get_mut().explain(&error)),
        };
        let name = entry.path.strip_prefix(b"./").unwrap_or(&entry.path);
        let place = Path::new("/").join(Path::new(std::ffi::OsStr::from_bytes(name)));
        let is_hidden = |above: &PathBuf| place.starts_with(above) && place != *above;
        if name.is_empty() || name == b"." || mounted.iter().any(is_hidden) {
            continue;
        }
        let relative = place.strip_prefix("/").unwrap_or(&place).to_owned();
        append(&mut written, Name::Path(&relative), &entry, &mut archive)
            .context(|| format!("export {}", place.display()))?;
    }
    let flushed = written.into_inner().and_then(|mut output| output.flush());
    flushed.context(|| "write the archive")?;
    archive.get_mut().finish()
}

/// Writes the archive of a directory with `.` for its name, as Docker names what is in a directory:
/// `./`, `./file`.
///
/// # Errors
/// The container's, or that of the output.
pub fn content(archive: ArchiveReader, output: impl Write) -> Result<()> {
    let mut archive = TarReader::new(archive);
    let mut written = tar::Builder::new(io::BufWriter::with_capacity(1 << 18, output));
    let below = |path: &[u8]| {
        let path = path.strip_prefix(b"./").unwrap_or(path);
        let rest = path.splitn(2, |byte| *byte == b'/').nth(1);
        [b"./", rest.unwrap_or_default()].concat()
    };
    loop {
        let mut entry = match archive.next() {
            Ok(Some(entry)) => entry,
            Ok(None) => break,
            Err(error) => return Err(archive.get_mut().explain(&error)),
        };
        if entry.kind == Kind::HardLink {
            entry.link = below(&entry.link);
        }
        append(
            &mut written,
            Name::Exact(&below(&entry.path)),
            &entry,
            &mut archive,
        )
        .context(|| "write the archive")?;
    }
    let flushed = written.into_inner().and_then(|mut output| output.flush());
    flushed.context(|| "write the archive")?;
    archive.get_mut().finish()
}

/// The name of an entry in an archive.
#[derive(Clone, Copy)]
enum Name<'a> {
    /// As the library writes a path: without dots.
    Path(&'a Path),
    /// Byte by byte.
    Exact(&'a [u8]),
}

impl Name<'_> {
    fn append(
        self,
        written: &mut tar::Builder<impl Write>,
        header: &mut tar::Header,
        data: impl Read,
    ) -> io::Result<()> {
        let bytes = match self {
            Name::Path(path) => return written.append_data(header, path, data),
            Name::Exact(bytes) => bytes,
        };
        let field = &mut header.as_old_mut().name;
        let short = &bytes[..bytes.len().min(field.len())];
        field.fill(0);
        field[..short.len()].copy_from_slice(short);
        if short.len() < bytes.len() {
            long(written, tar::EntryType::GNULongName, bytes)?;
        }
        header.set_cksum();
        written.append(header, data)
    }

    fn append_link(
        self,
        written: &mut tar::Builder<impl Write>,
        header: &mut tar::Header,
        target: &[u8],
    ) -> io::Result<()> {
        if let Name::Path(path) = self {
            let target = Path::new(std::ffi::OsStr::from_bytes(target));
            return append_link(written, header, path, target);
        }
        if header.set_link_name_literal(target).is_err() {
            long(written, tar::EntryType::GNULongLink, target)?;
        }
        self.append(written, header, io::empty())
    }
}

/// GNU's extension for a name that is longer than its field in a header.
fn long(
    written: &mut tar::Builder<impl Write>,
    kind: tar::EntryType,
    name: &[u8],
) -> io::Result<()> {
    let mut header = tar::Header::new_gnu();
    let field = &mut header.as_old_mut().name;
    const NAME: &[u8] = b"././@LongLink";
    field[..NAME.len()].copy_from_slice(NAME);
    header.set_mode(0o644);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    header.set_size(name.len() as u64 + 1);
    header.set_entry_type(kind);
    header.set_cksum();
    written.append(&header, name.chain(&b"\0"[..]))
}

fn append(
    written: &mut tar::Builder<impl Write>,
    name: Name<'_>,
    entry: &Entry,
    data: &mut impl Read,
) -> io::Result<()> {
    let mut header = tar::Header::new_gnu();
    header.set_mode(entry.mode);
    header.set_uid(entry.uid.into());
    header.set_gid(entry.gid.into());
    header.set_mtime(u64::try_from(entry.mtime.0).unwrap_or_default());
    header.set_size(0);
    let link = match name {
        Name::Path(_) => entry.link.strip_prefix(b"./").unwrap_or(&entry.link),
        Name::Exact(_) => &entry.link,
    };
    header.set_entry_type(match entry.kind {
        Kind::File => tar::EntryType::Regular,
        Kind::Directory => tar::EntryType::Directory,
        Kind::Symlink => tar::EntryType::Symlink,
        Kind::HardLink => tar::EntryType::Link,
        Kind::Fifo => tar::EntryType::Fifo,
        Kind::CharDevice => tar::EntryType::Char,
        Kind::BlockDevice => tar::EntryType::Block,
        // Sockets and the like mean nothing elsewhere.
        Kind::Other(_) => return Ok(()),
    });
    match entry.kind {
        Kind::File => {
            header.set_size(entry.stored);
            name.append(written, &mut header, data.take(entry.stored))
        }
        Kind::Symlink | Kind::HardLink => name.append_link(written, &mut header, link),
        _ => {
            header.set_device_major(entry.device.0)?;
            header.set_device_minor(entry.device.1)?;
            name.append(written, &mut header, io::empty())
        }
    }
}
