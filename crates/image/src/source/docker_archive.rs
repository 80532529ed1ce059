//! `docker-archive:FILE[:TAG]`: archives of `docker save`, old and new style, plain or compressed.
//!
//! Called by the store. The archive is read twice: once to list its members, then each layer at its
//! offset. A compressed archive is first uncompressed into an unnamed temporary file of the store.

use std::collections::HashMap;
use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom, Write};
use std::path::Path;

use serde::Deserialize;

use crate::config;
use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::limits::{MEMBER_NAMES, MEMBERS};
use crate::manifest::{self, MAX_DOCUMENT};
use crate::progress::{Event, Progress};
use crate::reference::Reference;
use crate::store::{Image, LayerStream, Named, Plan, PlannedLayer, Stamp, Store};
use crate::unpack::compression::{Compression, uncompress};
use crate::unpack::tar_reader::{Kind, TarReader};

/// One image of `manifest.json`.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Saved {
    config: String,
    #[serde(default)]
    repo_tags: Option<Vec<String>>,
    layers: Vec<String>,
}

/// Location of a member's bytes.
#[derive(Clone, Copy)]
struct Member {
    offset: u64,
    size: u64,
}

struct Archive<'a> {
    written: &'a str,
    file: File,
    members: HashMap<Vec<u8>, Member>,
    /// Old archives use a link if two images share a layer.
    links: HashMap<Vec<u8>, Vec<u8>>,
}

/// Installs an image of an archive.
pub(crate) fn resolve(
    store: &Store,
    reference: &Reference,
    path: &Path,
    tag: Option<&str>,
    progress: &dyn Progress,
) -> Result<Image> {
    let written = reference.written();
    let failed = |reason: String| Error::Source {
        reference: written.clone(),
        reason,
    };
    let file = File::open(path).map_err(|error| failed(format!("{}: {error}", path.display())))?;
    let stamp = Stamp::of(&file).map_err(|error| failed(format!("{}: {error}", path.display())))?;
    let key = reference.to_string();
    if let Some(named) = store.named(&key)?
        && named.stamp.as_ref() == Some(&stamp)
    {
        match store.image(&named.manifest, &key) {
            Err(Error::Damaged { .. }) => {}
            Err(error) => return Err(error),
            Ok(image) => {
                image.config.check_platform(&written, store.platform())?;
                return Ok(image);
            }
        }
    }
    let _work = store.begin_work()?;
    let archive = Archive::open(&written, store, file)?;
    let saved = archive.find(tag)?;
    progress.event(Event::Started {
        reference: &written,
        layers: saved.layers.len(),
    });
    let config = archive.document(&saved.config)?;
    let document = config::parse(&written, &config, saved.layers.len())?;
    let members: Vec<Member> = saved
        .layers
        .iter()
        .map(|layer| archive.member(layer))
        .collect::<Result<_>>()?;
    let contents: Vec<(Digest, u64)> = document
        .diff_ids
        .iter()
        .zip(&members)
        .map(|(&diff_id, member)| (diff_id, member.size))
        .collect();
    let manifest =
        manifest::synthesize(&config, &contents).map_err(|error| failed(error.to_string()))?;
    let named = Named {
        manifest: Digest::of(&manifest),
        index: None,
        stamp: Some(stamp),
    };
    let layers = document
        .diff_ids
        .iter()
        .map(|&diff_id| PlannedLayer {
            digest: diff_id,
            diff_id,
        })
        .collect();
    let plan = Plan {
        written: written.clone(),
        name: Some(key),
        named,
        manifest,
        config,
        layers,
    };
    let mut open = |index: usize| {
        let Member { offset, size } = members[index];
        let mut file = archive
            .file
            .try_clone()
            .map_err(|error| failed(error.to_string()))?;
        file.seek(SeekFrom::Start(offset))
            .map_err(|error| failed(error.to_string()))?;
        // The layer may be compressed, and only the digest of the uncompressed archive is known.
        Ok(LayerStream {
            reader: Box::new(file.take(size)),
            digest: None,
            size: Some(size),
        })
    };
    store.install(&plan, &mut open, progress)
}

impl<'a> Archive<'a> {
    fn open(written: &'a str, store: &Store, file: File) -> Result<Self> {
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

    fn failed(&self, reason: String) -> Error {
        Error::Source {
            reference: self.written.to_owned(),
            reason,
        }
    }

    fn member(&self, name: &str) -> Result<Member> {
        let name = normalize(name.as_bytes());
        let target = self.links.get(&name).unwrap_or(&name);
        self.members.get(target).copied().ok_or_else(|| {
            self.failed(format!(
                "it has no member {}",
                String::from_utf8_lossy(target)
            ))
        })
    }

    fn document(&self, name: &str) -> Result<Vec<u8>> {
        let Member { offset, size } = self.member(name)?;
        if size > MAX_DOCUMENT {
            return Err(self.failed(format!("{name} is larger than {MAX_DOCUMENT} bytes")));
        }
        let mut bytes = vec![0; size as usize];
        std::os::unix::fs::FileExt::read_exact_at(&self.file, &mut bytes, offset)
            .map_err(|error| self.failed(format!("{name}: {error}")))?;
        Ok(bytes)
    }

    fn find(&self, tag: Option<&str>) -> Result<Saved> {
        if !self.members.contains_key(&b"manifest.json"[..]) {
            return Err(self.failed("it is no docker archive: it has no manifest.json".to_owned()));
        }
        let bytes = self.document("manifest.json")?;
        let saved: Vec<Saved> = serde_json::from_slice(&bytes).map_err(|error| Error::Invalid {
            reference: self.written.to_owned(),
            what: "manifest.json",
            reason: error.to_string(),
        })?;
        let tags = |saved: &Saved| saved.repo_tags.clone().unwrap_or_default();
        let all: Vec<String> = saved.iter().flat_map(tags).collect();
        let count = saved.len();
        let mut matching = saved.into_iter().filter(|saved| match tag {
            None => true,
            Some(tag) => tags(saved).iter().any(|known| same_name(known, tag)),
        });
        match (matching.next(), matching.next(), tag) {
            (Some(only), None, _) => Ok(only),
            (Some(first), Some(_), Some(_)) => Ok(first),
            (Some(_), Some(_), None) => Err(self.failed(format!(
                "it holds {count} images; name one by its tag: {}",
                all.join(", ")
            ))),
            (None, _, Some(tag)) => Err(self.failed(format!(
                "it has no tag \"{tag}\", it has: {}",
                all.join(", ")
            ))),
            (None, _, None) => Err(self.failed("it holds no image".to_owned())),
        }
    }
}

/// Whether the user's reference matches the name in the archive: the same name, or only its tag.
fn same_name(known: &str, wanted: &str) -> bool {
    let full = |name: &str| {
        name.parse::<Reference>()
            .map(|reference| reference.to_string())
    };
    known == wanted
        || matches!((full(known), full(wanted)), (Ok(a), Ok(b)) if a == b)
        || known.rsplit_once(':').is_some_and(|(_, tag)| tag == wanted)
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
    let mut start = [0; 4];
    let read = std::os::unix::fs::FileExt::read_at(&file, &mut start, 0)
        .map_err(|error| failed(error.to_string()))?;
    if Compression::of(&start[..read]).is_none() {
        return Ok(file);
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
