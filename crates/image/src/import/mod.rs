//! Creates an image with one layer from an archive or a directory, as `docker import` does.
//!
//! Called by `hull image import`.

mod change;
mod commit;
mod stream;
mod tree;

use std::io::{BufReader, Read};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

pub use self::tree::{is_opaque, is_whiteout, pack_changes};

use crate::config::{self, ImageConfig};
use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::manifest;
use crate::progress::{Event, Progress};
use crate::reference::RegistryReference;
use crate::store::{Image, LayerStream, Named, Plan, PlannedLayer, Store};

/// Source of an imported image.
pub enum Source<'a> {
    /// A tar archive, plain or compressed with gzip or zstd.
    Archive(Box<dyn Read + 'a>),
    /// A directory, without file systems mounted in it.
    Directory(PathBuf),
}

/// Properties of an imported image.
#[derive(Debug, Clone, Default)]
pub struct Import {
    /// Its name, if any.
    pub name: Option<RegistryReference>,
    /// Instructions as in a Dockerfile: `CMD`, `ENTRYPOINT`, `ENV`, `EXPOSE`, `LABEL`,
    /// `STOPSIGNAL`, `USER`, `VOLUME`, `WORKDIR`.
    pub changes: Vec<String>,
    /// A comment for its history.
    pub message: Option<String>,
    /// Who made it.
    pub author: Option<String>,
    /// RFC 3339; `None` for now.
    pub created: Option<String>,
}

impl Import {
    /// Applies its instructions.
    fn apply(&self, config: &mut ImageConfig) -> Result<()> {
        self.changes.iter().try_for_each(|change| {
            change::apply(config, change).map_err(|reason| Error::InvalidChange {
                change: change.clone(),
                reason,
            })
        })
    }

    /// When the image is created.
    fn created(&self) -> String {
        let now = || rfc3339(SystemTime::now());
        self.created.clone().unwrap_or_else(now)
    }

    /// What to install: a configuration with its layers and their sizes, lowest first. `what` names
    /// the source in messages.
    fn plan(&self, what: &str, config: Vec<u8>, layers: &[(Digest, u64)]) -> Result<Plan> {
        let manifest =
            manifest::synthesize(&config, layers).map_err(|error| invalid(what, &error))?;
        Ok(Plan {
            written: what.to_owned(),
            name: self.name.as_ref().map(ToString::to_string),
            named: Named::image(Digest::of(&manifest)),
            manifest,
            config,
            layers: layers
                .iter()
                .map(|(diff_id, _)| PlannedLayer::uncompressed(*diff_id))
                .collect(),
        })
    }
}

fn invalid(what: &str, error: &serde_json::Error) -> Error {
    Error::Invalid {
        reference: what.to_owned(),
        what: "config",
        reason: error.to_string(),
    }
}

impl Store {
    /// Creates an image. `what` names the source in messages.
    pub fn import(
        &self,
        what: &str,
        source: Source<'_>,
        import: &Import,
        progress: &dyn Progress,
    ) -> Result<Image> {
        let mut config = ImageConfig {
            os: self.platform().os.clone(),
            architecture: self.platform().architecture.clone(),
            variant: self.platform().variant.clone(),
            ..ImageConfig::default()
        };
        import.apply(&mut config)?;
        let _work = self.begin_work()?;
        progress.event(Event::Started {
            reference: what,
            layers: 1,
        });
        let (diff_id, size) = match source {
            Source::Archive(archive) => self.import_layer(what, BufReader::new(archive))?,
            Source::Directory(dir) => self.import_directory(what, &dir)?,
        };
        let message = import
            .message
            .clone()
            .unwrap_or_else(|| format!("imported from {what}"));
        let config = config::write(&config, vec![diff_id], import.created(), &message)
            .map_err(|error| invalid(what, &error))?;
        let plan = import.plan(what, config, &[(diff_id, size)])?;
        let mut open = |_| -> Result<LayerStream> {
            // It was created above, and is not removed while the work lock is held.
            Err(Error::Damaged {
                reference: what.to_owned(),
                what: format!("layer {diff_id}"),
            })
        };
        self.install(&plan, &mut open, progress)
    }

    /// One thread packs, the other unpacks: so the layer corresponds exactly to the archive.
    fn import_directory(&self, what: &str, dir: &Path) -> Result<(Digest, u64)> {
        let failed = |reason: String| Error::Source {
            reference: what.to_owned(),
            reason,
        };
        let (writer, reader) = stream::pipe();
        std::thread::scope(|scope| {
            let packer = scope.spawn(move || tree::pack(dir, writer));
            let unpacked = self.import_layer(what, BufReader::new(reader));
            match packer.join() {
                // A broken pipe is only a consequence of failed unpacking.
                Ok(Err(error)) if unpacked.is_ok() || !error.is_broken_pipe() => {
                    Err(failed(error.to_string()))
                }
                Ok(_) => unpacked,
                Err(_) => Err(failed("packing it ended unexpectedly".to_owned())),
            }
        })
    }
}

/// Formats a time as `2026-11-21T23:00:00.123456789Z`: images of one second are told apart.
fn rfc3339(time: SystemTime) -> String {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    let seconds = since.as_secs();
    let fraction = match since.subsec_nanos() {
        0 => String::new(),
        nanoseconds => format!(".{nanoseconds:09}"),
    };
    let (days, rest) = (seconds / 86_400, seconds % 86_400);
    let (year, month, day) = civil(days);
    let (hour, minute, second) = (rest / 3600, rest / 60 % 60, rest % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}{fraction}Z")
}

/// Year, month and day of a number of days since 1970-01-01.
fn civil(mut days: u64) -> (u64, u64, u64) {
    let leap = |year: u64| {
        year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400))
    };
    let mut year = 1970;
    loop {
        let length = if leap(year) { 366 } else { 365 };
        if days < length {
            break;
        }
        days -= length;
        year += 1;
    }
    let february = if leap(year) { 29 } else { 28 };
    let mut month = 1;
    for length in [31, february, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31] {
        if days < length {
            break;
        }
        days -= length;
        month += 1;
    }
    (year, month, days + 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn times_are_written_as_rfc_3339() {
        for (seconds, text) in [
            (0, "1970-01-01T00:00:00Z"),
            (951_782_400, "2000-02-29T00:00:00Z"),
            (1_709_210_096, "2024-02-29T12:34:56Z"),
            (4_107_542_399, "2100-02-28T23:59:59Z"),
            (4_107_542_400, "2100-03-01T00:00:00Z"),
        ] {
            assert_eq!(rfc3339(UNIX_EPOCH + Duration::from_secs(seconds)), text);
        }
    }
}
