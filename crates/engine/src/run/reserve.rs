//! A new container on disk: its directory with what was asked for, its name, its volumes.

use std::fs::File;

use hull_image::Image;
use hull_sandbox::store::{Directory, Record, SandboxPath, State, Status, remove_all};
use hull_sandbox::{Event, EventKind, append_event};

use super::{Place, Run};
use crate::container::{self, Details, ENGINE};
use crate::error::{Context, Result};
use crate::names;
use crate::spec;
use crate::volumes::{Volume, store};

/// Random names that are tried.
const NAME_ATTEMPTS: u32 = 10;

/// A container that was created.
#[derive(Debug)]
pub struct Created {
    /// Its id.
    pub id: String,
    /// Its name.
    pub name: String,
}

impl Run<'_> {
    /// Creates the container, which waits to be started: there is no machine for it yet.
    ///
    /// # Errors
    /// Anything that keeps it from being created; then nothing of it is left.
    pub fn create(mut self, image: &Image) -> Result<Created> {
        self.options.publish_declared(&image.config)?;
        let made_up = self.options.settle(&image.config)?;
        let (directory, lock) = self.reserve(self.record(image, None)?, &made_up)?;
        let written = Status::new(State::Created).write(&directory);
        drop(lock);
        let read = written.and_then(|()| container::find(&self.paths, &self.id));
        match read {
            Ok(container) => {
                if let Err(error) = self.report_creation() {
                    tracing::warn!("{error}");
                }
                Ok(Created {
                    id: self.id,
                    name: container.record.details.name,
                })
            }
            Err(error) => {
                let everything = container::Removing::everything();
                if let Err(error) = container::remove(&self.paths, &self.id, everything) {
                    tracing::warn!("{error}");
                }
                Err(error)
            }
        }
    }

    /// Writes an event, which a sandbox does for a container that is started with its creation.
    fn report_creation(&self) -> Result<()> {
        let run = self.paths.run();
        Directory::create(run)?;
        let kind = EventKind::Created {
            container: self.id.clone(),
        };
        let sandbox = SandboxPath::new(run, &self.sandbox);
        append_event(&sandbox, &Event::now(&self.sandbox, kind))
            .context(|| "write the log of events")
    }

    /// What is known of the container before it is in a machine.
    pub(super) fn record(&self, image: &Image, place: Option<&Place>) -> Result<Record<Details>> {
        let options = &self.options;
        let command = spec::command(options.entrypoint.as_ref(), &options.command, &image.config)?;
        let mut labels = image.config.labels.clone();
        labels.extend(options.labels.iter().cloned());
        let mut record = Record::new(
            &self.id,
            ENGINE,
            Details {
                name: options.name.clone().unwrap_or_default(),
                image: options.image.clone(),
                image_id: image.id.clone(),
                hostname: self.own_hostname(),
                terminal: options.terminal,
                stdin: options.interactive,
                auto_remove: options.remove,
                stop_signal: options
                    .stop_signal
                    .clone()
                    .or_else(|| image.config.stop_signal.clone())
                    .unwrap_or_else(|| "TERM".to_owned()),
                network: options.network.name(),
                labels,
                volumes: options.volumes.iter().map(Volume::to_string).collect(),
                layers: image.layers.clone(),
                options: Some(Box::new(options.clone())),
                ..Details::default()
            },
        );
        if let Some(place) = place {
            place.describe(&mut record);
        }
        record.command = command
            .iter()
            .map(|word| word.to_string_lossy().into_owned())
            .collect();
        Ok(record)
    }

    /// Creates the container's directory, takes its name, and creates its volumes, of which some
    /// have names that were `made_up`. What a killed command left of either is in nobody's way.
    /// Returns the directory with the container's lock, for which others wait that change it.
    pub(super) fn reserve(
        &self,
        mut record: Record<Details>,
        made_up: &[String],
    ) -> Result<(Directory, File)> {
        // A directory of this name always has a record: whose it is can be told at any moment.
        let staging = self.paths.staging(record.creator);
        let path = self.paths.container(&self.id);
        let doing = || format!("create {}", path.display());
        let directory = Directory::create_new(&staging).context(doing)?;
        let (directory, lock) = record
            .write(&directory)
            .and_then(|()| container::lock_in(&directory, &self.id))
            .and_then(|lock| Ok((directory.rename_to(&path).context(doing)?, lock)))
            .inspect_err(|_| drop(remove_all(&staging)))?;
        let claimed = self
            .claim(&mut record, &directory)
            .and_then(|()| store::provide(&self.paths, &self.options.volumes, made_up));
        if let Err(error) = claimed {
            if let Err(error) = container::erase(&self.paths, &self.id, None) {
                tracing::warn!("{error}");
            }
            // Some may be there already.
            if let Err(error) = store::remove_anonymous(&self.paths, &self.options.volumes) {
                tracing::warn!("{error}");
            }
            return Err(error);
        }
        Ok((directory, lock))
    }

    fn claim(&self, record: &mut Record<Details>, directory: &Directory) -> Result<()> {
        let given = self.options.name.as_deref();
        let mut attempt = 0;
        loop {
            let name = match given {
                Some(name) => name.to_owned(),
                None => names::random(attempt)?,
            };
            record.details.name.clone_from(&name);
            record.write(directory)?;
            match names::claim(&self.paths, &name, &self.id) {
                Ok(()) => return Ok(()),
                Err(_) if attempt == 0 => container::sweep(&self.paths),
                Err(_) if given.is_none() && attempt < NAME_ATTEMPTS => {}
                Err(error) => return Err(error),
            }
            attempt += 1;
        }
    }
}
