//! A host file or directory as an archive for a container.

use std::ffi::OsStr;
use std::fs::{File, Metadata};
use std::io::{self, Read, Write};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use hull_archive::append_link;

use super::{ArchiveWriter, CHUNK};
use crate::error::{Context, Result};

/// Writes a host file or directory, with all that is in it, under `name`; `.` stands for the
/// contents alone. With `keep_owners` not set, everything belongs to root in the container, as with
/// Docker.
pub fn pack(
    to: &mut ArchiveWriter,
    source: &Path,
    name: &OsStr,
    follow: bool,
    keep_owners: bool,
) -> Result<()> {
    let mut packer = Packer {
        archive: tar::Builder::new(io::BufWriter::with_capacity(CHUNK, to)),
        keep_owners,
    };
    let packed = if name == "." {
        packer.contents(source, Path::new(""))
    } else {
        packer.add(source, Path::new(name), follow)
    };
    let packed = packed.and_then(|()| {
        let archive = packer.archive.into_inner()?;
        archive.into_inner().map_err(|error| error.into_error())?;
        Ok(())
    });
    match packed {
        Err(error) if super::is_closed(&error) => Ok(()),
        packed => packed.context(|| format!("read {}", source.display())),
    }
}

struct Packer<W: Write> {
    archive: tar::Builder<W>,
    keep_owners: bool,
}

impl<W: Write> Packer<W> {
    fn add(&mut self, source: &Path, name: &Path, follow: bool) -> io::Result<()> {
        let metadata = match follow {
            true => source.metadata()?,
            false => source.symlink_metadata()?,
        };
        let mut header = self.header(&metadata);
        let kind = metadata.file_type();
        if kind.is_dir() {
            self.archive.append_data(&mut header, name, io::empty())?;
            self.contents(source, name)
        } else if kind.is_symlink() {
            append_link(&mut self.archive, &mut header, name, &source.read_link()?)
        } else if kind.is_file() {
            let file = File::open(source)?;
            // A file that grows or shrinks meanwhile must not upset the archive.
            let data = file.chain(io::repeat(0)).take(metadata.len());
            self.archive.append_data(&mut header, name, data)
        } else if kind.is_socket() {
            Ok(())
        } else {
            let device = metadata.rdev();
            header.set_device_major(rustix::fs::major(device))?;
            header.set_device_minor(rustix::fs::minor(device))?;
            self.archive.append_data(&mut header, name, io::empty())
        }
    }

    fn contents(&mut self, directory: &Path, name: &Path) -> io::Result<()> {
        let mut entries = std::fs::read_dir(directory)?
            .map(|entry| entry.map(|entry| entry.file_name()))
            .collect::<io::Result<Vec<_>>>()?;
        entries.sort();
        for entry in entries {
            self.add(&directory.join(&entry), &name.join(&entry), false)?;
        }
        Ok(())
    }

    fn header(&self, metadata: &Metadata) -> tar::Header {
        let mut header = tar::Header::new_gnu();
        header.set_metadata(metadata);
        if metadata.is_dir() || !metadata.is_file() {
            header.set_size(0);
        }
        if !self.keep_owners {
            header.set_uid(0);
            header.set_gid(0);
        }
        header
    }
}
