//! Disk space: what containers, volumes and images take of it. Called by `ps --size`, `system df`
//! and `system prune`. It only counts: no link of a guest is followed, and what vanishes meanwhile
//! counts nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use hull_image::{Listed, Store};
use rustix::fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags, openat, statat};

use crate::container::{self, Container};
use crate::error::{Result, of_image};
use crate::inspect::writable_layer;
use crate::paths::Paths;
use crate::volumes::store::{self, StoredVolume};

/// Directories in each other that are looked into: each takes a descriptor.
const DEEPEST: usize = 200;

/// The bytes of all files below a directory; each file is counted once, whatever names it has.
pub fn of_directory(path: &Path) -> u64 {
    let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::RDONLY;
    match openat(CWD, path, flags, Mode::empty()) {
        Ok(directory) => below(directory, &mut BTreeSet::new(), 0),
        Err(_) => 0,
    }
}

fn below(directory: OwnedFd, seen: &mut BTreeSet<(u64, u64)>, depth: usize) -> u64 {
    let Ok(entries) = Dir::read_from(&directory) else {
        return 0;
    };
    let mut bytes: u64 = 0;
    for entry in entries.flatten() {
        let name = entry.file_name();
        if matches!(name.to_bytes(), b"." | b"..") {
            continue;
        }
        let Ok(found) = statat(directory.as_fd(), name, AtFlags::SYMLINK_NOFOLLOW) else {
            continue;
        };
        match FileType::from_raw_mode(found.st_mode) {
            FileType::RegularFile => {
                // Of types that depend on the architecture.
                #[allow(clippy::useless_conversion, clippy::unnecessary_cast)]
                let is_new =
                    found.st_nlink < 2 || seen.insert((found.st_dev as u64, found.st_ino as u64));
                if is_new {
                    bytes = bytes.saturating_add(u64::try_from(found.st_size).unwrap_or(0));
                }
            }
            FileType::Directory if depth < DEEPEST => {
                let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                if let Ok(inner) = openat(directory.as_fd(), name, flags, Mode::empty()) {
                    bytes = bytes.saturating_add(below(inner, seen, depth + 1));
                }
            }
            _ => {}
        }
    }
    bytes
}

/// The bytes that the container in a directory has written to its root file system. Of one with a
/// limit that does not run, they are those that its file system takes.
pub fn of_container(directory: &Path) -> u64 {
    const BLOCK: u64 = 512;
    let upper = writable_layer(directory);
    match (
        upper.exists(),
        std::fs::metadata(directory.join("layer.img")),
    ) {
        (false, Ok(disk)) => disk.blocks() * BLOCK,
        _ => of_directory(&upper),
    }
}

/// An image with its containers.
#[derive(Debug)]
pub struct ImageUsage {
    /// One for each name.
    pub listed: Vec<Listed>,
    /// Containers that were created from it.
    pub containers: usize,
    /// Its layers: names and bytes.
    pub layers: Vec<(String, u64)>,
}

/// A container and what it has written.
#[derive(Debug)]
pub struct ContainerUsage {
    /// The container.
    pub container: Container,
    /// Bytes.
    pub bytes: u64,
}

/// A volume and what is in it.
#[derive(Debug)]
pub struct VolumeUsage {
    /// The volume.
    pub volume: StoredVolume,
    /// Containers that use it.
    pub containers: usize,
    /// Bytes.
    pub bytes: u64,
}

/// What there is.
#[derive(Debug)]
pub struct Usage {
    /// All images that can be read.
    pub images: Vec<ImageUsage>,
    /// All containers that can be read.
    pub containers: Vec<ContainerUsage>,
    /// All volumes that can be read.
    pub volumes: Vec<VolumeUsage>,
}

impl ImageUsage {
    /// Bytes of its layers, also those that other images have, too.
    pub fn bytes(&self) -> u64 {
        self.layers.iter().map(|(_, bytes)| bytes).sum()
    }
}

impl Usage {
    /// Bytes of the layers of all images, each counted once; and how many of these only images have
    /// that no container was created from.
    pub fn image_bytes(&self) -> (u64, u64) {
        let mut layers: BTreeMap<&str, (u64, bool)> = BTreeMap::new();
        for image in &self.images {
            for (name, bytes) in &image.layers {
                let layer = layers.entry(name).or_insert((*bytes, false));
                layer.1 |= image.containers > 0;
            }
        }
        let sum = |used: bool| {
            let wanted = layers.values().filter(|(_, is_used)| *is_used == used);
            wanted.map(|(bytes, _)| bytes).sum::<u64>()
        };
        (sum(true) + sum(false), sum(false))
    }
}

/// Counts everything.
///
/// # Errors
/// What there is cannot be listed.
pub fn all(paths: &Paths, images: &Store) -> Result<Usage> {
    let containers: Vec<Container> = container::list(paths)?.into_iter().flatten().collect();
    let mut by_id: BTreeMap<String, Vec<Listed>> = BTreeMap::new();
    let (listed, _) = images.list_with_damages().map_err(of_image)?;
    for listed in listed {
        by_id.entry(listed.id.to_string()).or_default().push(listed);
    }
    let created_from = |id: &String| {
        let of_image = |container: &&Container| container.record.details.image_id == *id;
        containers.iter().filter(of_image).count()
    };
    let layers = |listed: &[Listed]| {
        let manifest = listed.first().map(|listed| listed.digest);
        // One that cannot be read counts nothing.
        manifest.and_then(|manifest| images.layers_of(&manifest).ok())
    };
    let images = by_id
        .into_iter()
        .map(|(id, listed)| ImageUsage {
            containers: created_from(&id),
            layers: layers(&listed).unwrap_or_default(),
            listed,
        })
        .collect();
    let users = store::users(paths)?;
    let volumes = store::list(paths)?.into_iter().flatten();
    let volumes = volumes
        .map(|volume| VolumeUsage {
            containers: users.get(&volume.name).map_or(0, Vec::len),
            bytes: volume.size(),
            volume,
        })
        .collect();
    let containers = containers
        .into_iter()
        .map(|container| ContainerUsage {
            bytes: of_container(container.directory.path()),
            container,
        })
        .collect();
    Ok(Usage {
        images,
        containers,
        volumes,
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::fs;

    use super::*;

    #[test]
    fn each_file_counts_once_and_no_link_is_followed() {
        let parent = tempfile::tempdir().unwrap();
        let outside = parent.path().join("outside");
        fs::write(&outside, [0; 1000]).unwrap();
        let counted = parent.path().join("counted");
        fs::create_dir_all(counted.join("a/b")).unwrap();
        fs::write(counted.join("a/b/file"), [0; 10]).unwrap();
        fs::hard_link(counted.join("a/b/file"), counted.join("again")).unwrap();
        fs::write(counted.join("other"), [0; 5]).unwrap();
        std::os::unix::fs::symlink(&outside, counted.join("link")).unwrap();
        std::os::unix::fs::symlink(parent.path(), counted.join("a/up")).unwrap();
        assert_eq!(of_directory(&counted), 15);
        assert_eq!(of_directory(&parent.path().join("nothing")), 0);
        assert_eq!(of_directory(&counted.join("a/up")), 0);
    }
}
