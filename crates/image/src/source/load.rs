//! Takes in all images of an archive, with all their names.
//!
//! Called by `hull image load`. Reads what `docker save`, `podman save` and skopeo write: Docker's
//! form, and an OCI image layout in an archive. Where an archive is both, Docker's is read, as by
//! Docker.

use std::fs::File;
use std::io::{self, Read};

use super::archive::Archive;
use super::docker_archive;
use super::oci_layout::{self, Files, INDEX, Layout};
use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::manifest::Descriptor;
use crate::progress::Progress;
use crate::reference::{Reference, Version};
use crate::save::{IMAGE_NAME, REF_NAME};
use crate::store::{Image, Named, Store};

/// An image that was taken in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Loaded {
    /// Digest of its configuration.
    pub id: String,
    /// The names it was given, with all defaults.
    pub names: Vec<Reference>,
}

impl Store {
    /// Takes in the images of an archive: plain, or compressed with gzip or zstd; a file or a pipe.
    /// `what` names it in messages.
    ///
    /// # Errors
    /// `Source` if it is no such archive, and what installing an image returns. Images before the
    /// one that fails stay.
    pub fn load(&self, what: &str, file: File, progress: &dyn Progress) -> Result<Vec<Loaded>> {
        let _work = self.begin_work()?;
        let archive = Archive::open(what, self, file)?;
        if archive.has(docker_archive::MANIFEST) {
            self.load_docker(&archive, progress)
        } else if archive.has(INDEX) {
            self.load_layout(&archive, progress)
        } else {
            Err(archive.failed(
                "it holds no images: it has neither a manifest.json (docker save) nor an \
                 index.json (OCI layout)"
                    .to_owned(),
            ))
        }
    }

    fn load_docker(&self, archive: &Archive<'_>, progress: &dyn Progress) -> Result<Vec<Loaded>> {
        let mut loaded = Vec::new();
        for saved in docker_archive::images(archive)? {
            // Its id says all: an image that is here from elsewhere is the same one.
            let id = Digest::of(&archive.document(&saved.config)?);
            let image = match self.complete_image(&id)? {
                Some(image) => image,
                None => docker_archive::install(self, archive, &saved, None, progress)?,
            };
            let names = saved.tags().iter();
            let names = names
                .map(|tag| name(archive, tag))
                .collect::<Result<Vec<_>>>()?;
            loaded.push(self.give_names(image, names)?);
        }
        match loaded.is_empty() {
            true => Err(archive.failed("it holds no image".to_owned())),
            false => Ok(loaded),
        }
    }

    fn load_layout(&self, archive: &Archive<'_>, progress: &dyn Progress) -> Result<Vec<Loaded>> {
        let layout = Layout {
            written: archive.written,
            place: archive.written.to_owned(),
            files: archive,
        };
        let mut loaded: Vec<Loaded> = Vec::new();
        for entry in layout.entries()? {
            let names: Vec<Reference> = entry_name(archive, &entry)?.into_iter().collect();
            let image = oci_layout::install(self, &layout, entry, None, progress)?;
            let one = self.give_names(image, names)?;
            // An entry for each name of one image.
            match loaded.iter_mut().find(|known| known.id == one.id) {
                Some(known) => known.names.extend(one.names),
                None => loaded.push(one),
            }
        }
        match loaded.is_empty() {
            true => Err(archive.failed("it holds no image".to_owned())),
            false => Ok(loaded),
        }
    }

    fn give_names(&self, image: Image, names: Vec<Reference>) -> Result<Loaded> {
        if let Some(manifest) = image.digest {
            for name in &names {
                let named = Named::image(manifest);
                self.set_name(&name.to_string(), named)?;
            }
        }
        Ok(Loaded {
            id: image.id,
            names,
        })
    }
}

/// A name in an archive: a full or short name with a tag.
fn name(archive: &Archive<'_>, text: &str) -> Result<Reference> {
    match text.parse() {
        Ok(Reference::Registry(name)) if matches!(name.version, Version::Tag(_)) => {
            Ok(Reference::Registry(name))
        }
        Ok(_) => Err(archive.failed(format!("\"{text}\" is no name with a tag"))),
        Err(error) => Err(archive.failed(error.to_string())),
    }
}

/// The name of an entry of a layout; none if it has only a tag.
fn entry_name(archive: &Archive<'_>, entry: &Descriptor) -> Result<Option<Reference>> {
    let annotation = |key| entry.annotations.as_ref()?.get(key);
    match (annotation(IMAGE_NAME), annotation(REF_NAME)) {
        (Some(full), _) => name(archive, full).map(Some),
        (None, Some(text)) if text.contains(['/', ':']) => name(archive, text).map(Some),
        _ => Ok(None),
    }
}

impl Files for Archive<'_> {
    fn open(&self, path: &str) -> io::Result<Box<dyn Read>> {
        let member = match self.member(path) {
            Ok(member) => self.read(member),
            Err(_) => return Err(io::ErrorKind::NotFound.into()),
        };
        match member {
            Ok(member) => Ok(Box::new(member)),
            Err(error) => Err(io::Error::other(error)),
        }
    }

    fn exists(&self) -> bool {
        true
    }
}

impl Store {
    /// An image by the digest of its configuration, if all of it is here.
    fn complete_image(&self, id: &Digest) -> Result<Option<Image>> {
        match self.inspect(&Reference::Id(*id)) {
            Ok(image) => {
                image
                    .config
                    .check_platform(&image.reference, self.platform())?;
                Ok(Some(image))
            }
            Err(Error::NotFound { .. } | Error::Damaged { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }
}
