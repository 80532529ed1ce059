//! The outer archive of saved images: its members, to be read in any order.
//!
//! Called for `docker-archive:` and by `load`. An archive in a file is read twice: once to list its
//! members, then each member at its offset. One that is compressed, or comes through a pipe, is
//! first written, uncompressed, to an unnamed temporary file of the store.

use std::collections::HashMap;
use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;

use crate::error::{Error, Result};
use crate::limits::{MEMBER_NAMES, MEMBERS};
use crate::manifest::MAX_DOCUMENT;
use crate::store::Store;
use crate::unpack::compression::{Compression, uncompress};
use crate::unpack::tar_reader::{Kind, TarReader};

/// Location of a member's bytes.
#[derive(Clone, Copy)]
pub(super) struct Member {
    pub offset: u64,
    pub size: u64,
}

pub(super) struct Archive<'a> {
    pub written: &'a str,
    file: File,
    members: HashMap<Vec<u8>, Member>,
    /// Old archives use a link if two images share a layer.
    links: HashMap<Vec<u8>, Vec<u8>>,
}

impl<'a> Archive<'a> {
    pub(super) fn open(written: &'a str, store: &Store, file: File) -> Result<Self> {
        let failed = |reason: String| Error::Source {
            reference: written.to_owned(),
            reason,
        };
        let mut file = plain(written, store, file)?;
        let (mut members, mut links, mut names) = (HashMap::new(), HashMap::new(), 0usize);
        let mut reader = TarReader::new(&mut file);
        while let Some(entry) = reader.next().map_err(|error| failed(error.to_string()))? {
            names = names.saturating_add(entry.path.len() + entry.link.len());
            if members.len() + links.len() >= MEMBERS || names > MEMBER_NAMES {
                return Err(failed(format!(
                    "it has more than {MEMBERS} members, or {MEMBER_NAMES} bytes of names"
                )));
            }
            let name = entry
                .path
                .strip_prefix(b"./")
                .unwrap_or(&entry.path)
                .to_vec();
            match entry.kind {
                Kind::File => {
                    members.insert(
                        name,
                        Member {
                            offset: reader.position(),
                            size: entry.stored,
                        },
                    );
                    // Skip without reading; truncation is detected when the member is read.
                    let unread = i64::try_from(reader.unread()).unwrap_or(i64::MAX);
                    reader
                        .get_mut()
                        .seek_relative(unread)
                        .map_err(|error| failed(error.to_string()))?;
                    reader.skipped();
                }
                Kind::Symlink => {
                    let parent = name.iter().rposition(|&byte| byte == b'/').unwrap_or(0);
                    let target = [&name[..parent], b"/", &entry.link].concat();
                    links.insert(name, normalize(&target));
                }
                Kind::HardLink => {
                    links.insert(name, normalize(&entry.link));
                }
                _ => {}
            }
        }
        Ok(Self {
            written,
            file,
            members,
            links,
        })
    }

    pub(super) fn failed(&self, reason: String) -> Error {
        Error::Source {
            reference: self.written.to_owned(),
            reason,
        }
    }

    pub(super) fn has(&self, name: &str) -> bool {
        self.members.contains_key(name.as_bytes())
    }

    pub(super) fn member(&self, name: &str) -> Result<Member> {
        let name = normalize(name.as_bytes());
        let target = self.links.get(&name).unwrap_or(&name);
        self.members.get(target).copied().ok_or_else(|| {
            self.failed(format!(
                "it has no member {}",
                String::from_utf8_lossy(target)
            ))
        })
    }

    /// The bytes of a member. Only one is read at a time.
    pub(super) fn read(&self, member: Member) -> Result<std::io::Take<File>> {
        let at_offset = || {
            let mut file = self.file.try_clone()?;
            file.seek(SeekFrom::Start(member.offset))?;
            Ok(file.take(member.size))
        };
        at_offset().map_err(|error: std::io::Error| self.failed(error.to_string()))
    }

    pub(super) fn document(&self, name: &str) -> Result<Vec<u8>> {
        let Member { offset, size } = self.member(name)?;
        if size > MAX_DOCUMENT {
            return Err(self.failed(format!("{name} is larger than {MAX_DOCUMENT} bytes")));
        }
        let mut bytes = vec![0; size as usize];
        self.file
            .read_exact_at(&mut bytes, offset)
            .map_err(|error| self.failed(format!("{name}: {error}")))?;
        Ok(bytes)
    }
}

/// Resolves `.` and `..` in a member's name.
fn normalize(name: &[u8]) -> Vec<u8> {
    let mut parts: Vec<&[u8]> = Vec::new();
    for part in name.split(|&byte| byte == b'/') {
        match part {
            b"" | b"." => {}
            b".." => {
                parts.pop();
            }
            _ => parts.push(part),
        }
    }
    parts.join(&b'/')
}

/// The archive itself, or its uncompressed content.
fn plain(written: &str, store: &Store, mut file: File) -> Result<File> {
    let failed = |reason: String| Error::Source {
        reference: written.to_owned(),
        reason,
    };
    // A pipe has no position, and a file that was read in part is no whole archive.
    if file.stream_position().is_ok_and(|position| position == 0) {
        let mut start = [0; 4];
        let read = file.read_at(&mut start, 0);
        let read = read.map_err(|error| failed(error.to_string()))?;
        if Compression::of(&start[..read]).is_none() {
            return Ok(file);
        }
    }
    let mut copy = store.temporary_file()?;
    let mut content =
        uncompress(BufReader::new(&mut file)).map_err(|error| failed(error.to_string()))?;
    copy_within_limits(written, store, &mut content, &mut copy)?;
    copy.rewind().map_err(|error| failed(error.to_string()))?;
    Ok(copy)
}

/// Copies uncompressed content into a file of the store: not more than an image may have, and not
/// more than the file system has.
fn copy_within_limits(
    written: &str,
    store: &Store,
    content: &mut impl Read,
    copy: &mut File,
) -> Result<()> {
    const DOING: &str = "uncompress the archive into";
    let (limit, mut disk) = (store.limits().size, store.disk()?);
    let mut buffer = vec![0; 256 * 1024];
    let mut size = 0u64;
    loop {
        let read = match content.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(read) => read,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
            Err(error) => {
                return Err(Error::Source {
                    reference: written.to_owned(),
                    reason: error.to_string(),
                });
            }
        };
        size = size.saturating_add(read as u64);
        if size > limit {
            return Err(Error::TooLarge {
                reference: written.to_owned(),
                what: "an archive",
                size,
                limit,
            });
        }
        disk.bytes(read as u64)
            .map_err(|error| Error::disk(DOING, store.root(), error))?;
        copy.write_all(&buffer[..read])
            .map_err(|error| Error::io(DOING, store.root(), error))?;
    }
}
