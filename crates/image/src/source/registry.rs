//! Images from a registry.
//!
//! Called by the store. One thread talks to the registry (the only asynchronous code of this crate)
//! and downloads layer archives into the store's blobs, several at once; the caller's thread
//! unpacks them in order while others still download.

use std::collections::BTreeSet;
use std::fs::File;
use std::sync::Once;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use futures_util::StreamExt;

use super::download;
use super::http::{Access, Failure, Http};
use super::remote::RemoteImage;
use crate::config;
use crate::credentials::{Credentials, Found};
use crate::digest::Digest;
use crate::error::{Error, Result, Transfer, check_digest};
use crate::manifest::{self, Descriptor, Document, MAX_DOCUMENT, Manifest};
use crate::progress::{Event, Progress};
use crate::reference::{RegistryReference, Version};
use crate::store::{Image, LayerStream, Named, Plan, PlannedLayer, Pull, Store};

/// Number of parallel downloads.
const PARALLEL: usize = 3;

/// From the registry's thread to the unpacking thread.
enum Message {
    /// The image is already complete.
    Present(Box<Image>, Named),
    /// The parts of the image.
    Plan(Box<Plan>),
    /// The archive of a layer is in the store.
    Arrived(usize),
}

/// A connection to a registry for one image.
pub(super) struct Session<'a> {
    pub http: Http,
    pub name: &'a RegistryReference,
    /// Which credentials are used.
    credentials: String,
    /// Prefix of "registry X answered 404".
    local: &'static str,
    transfer: Transfer,
}

/// Downloads the missing parts of an image, and installs it.
pub(crate) fn pull(
    store: &Store,
    name: &RegistryReference,
    pull: Pull,
    credentials: &Credentials,
    progress: &dyn Progress,
) -> Result<Image> {
    let found = credentials.find(&name.registry)?;
    let _work = store.begin_work()?;
    std::thread::scope(|scope| {
        let (sender, receiver) = sync_channel(PARALLEL);
        let fetcher = scope.spawn(move || {
            let local = match pull {
                Pull::Always => "",
                _ => "no such reference in the local store, and ",
            };
            let session = Session::new(name, found, Access::Pull, local)?;
            let runtime = session.runtime()?;
            runtime.block_on(session.fetch(store, &sender, progress))
        });
        let installed = install(store, &receiver, progress);
        // Lets the fetcher end if the installation failed.
        drop(receiver);
        match (installed, fetcher.join()) {
            // The fetcher's error closed the channel early.
            (_, Ok(Err(error))) => Err(error),
            (Some(result), _) => result,
            (None, _) => Err(Error::Registry {
                reference: name.written().to_owned(),
                registry: name.registry.clone(),
                transfer: Transfer::Pull,
                reason: "the transfer ended unexpectedly".to_owned(),
            }),
        }
    })
}

/// Whether a registry takes credentials; otherwise why not.
pub(crate) fn check(registry: &RegistryReference, found: Found) -> Result<(), String> {
    let session = Session::new(registry, found, Access::Login, "");
    let session = session.map_err(|error| error.to_string())?;
    let runtime = session.runtime().map_err(|error| error.to_string())?;
    runtime.block_on(async {
        let checked = session.http.check().await;
        if let Some(realm) = session.http.withheld().await {
            return Err(format!(
                "the credentials were not sent to its token service {realm} in another domain"
            ));
        }
        checked.map_err(|failure| match failure {
            Failure::Transport(error) => format!("it cannot be reached: {}", root_cause(&error)),
            Failure::Slow => "it takes too long to answer".to_owned(),
            Failure::Status {
                status: status @ (401 | 403),
                ..
            } => format!("it answered {status}: the user name or the password is wrong"),
            Failure::Status { status, message } => {
                format!("it answered {status}{}", first_line(&message))
            }
            Failure::Refused(reason) => reason,
            Failure::TooLarge | Failure::Announced { .. } => "its answer is unusable".to_owned(),
        })
    })
}

/// Unpacks downloaded layers. `None` if the fetcher gave up.
fn install(
    store: &Store,
    messages: &Receiver<Message>,
    progress: &dyn Progress,
) -> Option<Result<Image>> {
    let plan = match messages.recv() {
        Ok(Message::Plan(plan)) => plan,
        Ok(Message::Present(image, named)) => {
            let named = store.set_name(&image.reference, named);
            return Some(named.map(|()| *image));
        }
        _ => return None,
    };
    let mut arrived = BTreeSet::new();
    let mut gave_up = false;
    let mut open = |index: usize| {
        let digest = plan.layers[index].digest;
        // An archive is downloaded only once, for the first layer that uses it.
        let first = plan
            .layers
            .iter()
            .position(|layer| layer.digest == digest)
            .unwrap_or(index);
        while !arrived.contains(&first) {
            match messages.recv() {
                Ok(Message::Arrived(index)) => arrived.insert(index),
                _ => {
                    gave_up = true;
                    return Err(Error::Damaged {
                        reference: plan.written.clone(),
                        what: format!("the archive of layer {digest}"),
                    });
                }
            };
        }
        let path = store.archive_path(&digest);
        let file = File::open(&path).map_err(|error| Error::io("open", &path, error))?;
        let size = file.metadata().ok().map(|metadata| metadata.len());
        // The digest was checked by the download.
        Ok(LayerStream {
            reader: Box::new(file),
            digest: None,
            size,
        })
    };
    let result = store.install(&plan, &mut open, progress);
    let refused = |error: &Error| match error {
        Error::NoSpace { .. } | Error::Reserve { .. } => true,
        Error::Layer { source, .. } => source.is_of_host(),
        _ => false,
    };
    if result.as_ref().map_or_else(refused, |_| true) {
        // The layers are unpacked, or failed: the archives are not needed any more.
        for layer in &plan.layers {
            let _ = std::fs::remove_file(store.archive_path(&layer.digest));
        }
    }
    if gave_up { None } else { Some(result) }
}

impl<'a> Session<'a> {
    /// `local` is the prefix of "registry X answered 404".
    pub(super) fn new(
        name: &'a RegistryReference,
        found: Found,
        access: Access,
        local: &'static str,
    ) -> Result<Self> {
        let transfer = match access {
            Access::Push => Transfer::Push,
            Access::Pull | Access::Login => Transfer::Pull,
            Access::Search => Transfer::Search,
        };
        let failed = |reason: String| Error::Registry {
            reference: name.written().to_owned(),
            registry: name.registry.clone(),
            transfer,
            reason,
        };
        if !tls_ready() {
            let reason = "this machine has no CA certificates (package ca-certificates)";
            return Err(failed(reason.to_owned()));
        }
        Ok(Self {
            http: Http::new(name, found.auth, access).map_err(failed)?,
            name,
            credentials: found.description,
            local,
            transfer,
        })
    }

    /// What runs the requests on the calling thread.
    pub(super) fn runtime(&self) -> Result<tokio::runtime::Runtime> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build();
        runtime.map_err(|error| self.failed(error.to_string()))
    }

    /// Finds the parts of the image, then downloads the missing layers.
    async fn fetch(
        &self,
        store: &Store,
        messages: &SyncSender<Message>,
        progress: &dyn Progress,
    ) -> Result<()> {
        let (named, bytes, manifest) = self.choose(store).await?;
        if let Ok(image) = store.image(&named.manifest, &self.name.to_string()) {
            image
                .config
                .check_platform(self.name.written(), store.platform())?;
            // The receiver is gone only if the other side failed, which reports the reason.
            let _ = messages.send(Message::Present(Box::new(image), named));
            return Ok(());
        }
        let plan = self.plan(store, named, bytes, &manifest).await?;
        let size = manifest
            .layers
            .iter()
            .fold(0u64, |sum, layer| sum.saturating_add(layer.size));
        let limit = store.limits().size;
        if size > limit {
            return Err(Error::TooLarge {
                reference: self.name.written().to_owned(),
                what: "archives of layers",
                size,
                limit,
            });
        }
        let missing = store.missing_layers(&plan)?;
        progress.event(Event::Started {
            reference: self.name.written(),
            layers: plan.layers.len(),
        });
        let mut seen = BTreeSet::new();
        let wanted: Vec<(usize, Descriptor, PlannedLayer)> = manifest
            .layers
            .into_iter()
            .zip(plan.layers.iter().cloned())
            .enumerate()
            .filter(|(index, (descriptor, _))| missing[*index] && seen.insert(descriptor.digest))
            .map(|(index, (descriptor, planned))| (index, descriptor, planned))
            .collect();
        if messages.send(Message::Plan(Box::new(plan))).is_err() {
            return Ok(());
        }
        let mut arriving = futures_util::stream::iter(wanted)
            .map(|(index, descriptor, planned)| async move {
                download::layer(self, store, &descriptor, &planned, progress)
                    .await
                    .map(|()| index)
            })
            .buffered(PARALLEL);
        while let Some(index) = arriving.next().await {
            if messages.send(Message::Arrived(index?)).is_err() {
                break;
            }
        }
        Ok(())
    }

    /// Finds the manifest for our platform.
    async fn choose(&self, store: &Store) -> Result<(Named, Vec<u8>, Manifest)> {
        let written = self.name.written();
        let (digest, bytes) = self.manifest(&self.name.version).await?;
        let index = match manifest::parse(written, &bytes)? {
            Document::Manifest(manifest) => {
                return Ok((Named::image(digest), bytes, manifest));
            }
            Document::Index(index) => index,
        };
        let chosen = index.choose(written, store.platform())?.digest;
        let (_, bytes) = self.manifest(&Version::Digest(chosen)).await?;
        match manifest::parse(written, &bytes)? {
            Document::Manifest(manifest) => Ok((
                Named {
                    manifest: chosen,
                    index: Some(digest),
                    stamp: None,
                },
                bytes,
                manifest,
            )),
            Document::Index(_) => Err(Error::Unsupported {
                reference: written.to_owned(),
                what: "a manifest list in a manifest list".to_owned(),
            }),
        }
    }

    /// What the name stands for in the registry.
    pub(super) async fn describe(&self) -> Result<RemoteImage> {
        let written = self.name.written();
        let (digest, bytes) = self.manifest(&self.name.version).await?;
        let size = bytes.len() as u64;
        let document = manifest::parse(written, &bytes)?;
        let media_type = document.media_type(&bytes);
        let platforms = match document {
            Document::Index(index) => {
                let platforms = index
                    .manifests
                    .into_iter()
                    .filter_map(|entry| entry.platform);
                platforms.collect()
            }
            Document::Manifest(image) => {
                let config = self.config(&image.config).await?;
                let config = config::parse(written, &config, image.layers.len())?.config;
                vec![config.platform()]
            }
        };
        Ok(RemoteImage {
            media_type,
            digest,
            size,
            platforms,
        })
    }

    async fn plan(
        &self,
        store: &Store,
        named: Named,
        bytes: Vec<u8>,
        manifest: &Manifest,
    ) -> Result<Plan> {
        let written = self.name.written();
        let config = self.config(&manifest.config).await?;
        let document = config::parse(written, &config, manifest.layers.len())?;
        // Before anything large is downloaded.
        document.config.check_platform(written, store.platform())?;
        let layers = manifest
            .layers
            .iter()
            .zip(document.diff_ids)
            .map(|(layer, diff_id)| PlannedLayer {
                digest: layer.digest,
                diff_id,
            })
            .collect();
        Ok(Plan {
            written: written.to_owned(),
            name: Some(self.name.to_string()),
            named,
            manifest: bytes,
            config,
            layers,
        })
    }

    /// A manifest and its computed digest, which must match the wanted one if that is known.
    async fn manifest(&self, version: &Version) -> Result<(Digest, Vec<u8>)> {
        let (text, expected) = match version {
            Version::Tag(tag) => (tag.clone(), None),
            Version::Digest(digest) => (digest.to_string(), Some(*digest)),
        };
        let bytes = match self.http.manifest(&text).await {
            Ok(bytes) => bytes,
            Err(failure) => return Err(self.error("manifest", failure).await),
        };
        let actual = Digest::of(&bytes);
        if let Some(expected) = expected {
            check_digest(self.name.written(), "manifest", expected, actual)?;
        }
        Ok((actual, bytes))
    }

    async fn config(&self, descriptor: &Descriptor) -> Result<Vec<u8>> {
        if descriptor.size > MAX_DOCUMENT {
            return Err(self.failed(format!("the config is larger than {MAX_DOCUMENT} bytes")));
        }
        let answer = self.http.small_blob(&descriptor.digest, descriptor.size);
        let bytes = match answer.await {
            Ok(bytes) => bytes,
            Err(failure) => return Err(self.error("config", failure).await),
        };
        if (bytes.len() as u64) < descriptor.size {
            return Err(Error::Truncated {
                reference: self.name.written().to_owned(),
                what: "config",
                digest: descriptor.digest,
                expected: descriptor.size,
                actual: bytes.len() as u64,
            });
        }
        let actual = Digest::of(&bytes);
        check_digest(self.name.written(), "config", descriptor.digest, actual)?;
        Ok(bytes)
    }

    pub(super) fn failed(&self, reason: String) -> Error {
        Error::Registry {
            reference: self.name.written().to_owned(),
            registry: self.name.registry.clone(),
            transfer: self.transfer,
            reason,
        }
    }

    /// The error of a failed request for `what`.
    pub(super) async fn error(&self, what: &'static str, failure: Failure) -> Error {
        let unreachable = |reason: String| Error::Unreachable {
            reference: self.name.written().to_owned(),
            registry: self.name.registry.clone(),
            transfer: self.transfer,
            reason,
        };
        match failure {
            Failure::Transport(error) if error.is_connect() || error.is_timeout() => {
                unreachable(root_cause(&error))
            }
            Failure::Transport(error) => self.failed(format!("{what}: {}", root_cause(&error))),
            Failure::Slow => unreachable(match self.transfer {
                Transfer::Pull | Transfer::Search => {
                    format!("it takes too long to send the {what}")
                }
                Transfer::Push => format!("it takes too long to receive the {what}"),
            }),
            Failure::TooLarge => {
                self.failed(format!("the {what} is larger than {MAX_DOCUMENT} bytes"))
            }
            Failure::Announced { expected, actual } => Error::WrongDigest {
                reference: self.name.written().to_owned(),
                what,
                expected,
                actual,
            },
            Failure::Refused(reason) => self.failed(reason),
            Failure::Status { status, message } => self.status(what, status, &message).await,
        }
    }

    async fn status(&self, what: &'static str, status: u16, message: &str) -> Error {
        let (reference, registry) = (self.name.written().to_owned(), self.name.registry.clone());
        match status {
            404 if matches!(what, "manifest" | "list of tags")
                && self.transfer == Transfer::Pull =>
            {
                Error::NotInRegistry {
                    reference,
                    registry,
                    status,
                    local: self.local,
                }
            }
            401 | 403 => match self.http.withheld().await {
                Some(realm) => Error::CredentialsWithheld {
                    reference,
                    registry,
                    status,
                    transfer: self.transfer,
                    realm,
                },
                None => Error::Unauthorized {
                    reference,
                    registry,
                    status,
                    transfer: self.transfer,
                    credentials: self.credentials.clone(),
                },
            },
            _ => self.failed(format!(
                "it answered {status} to the request for the {what}{}",
                first_line(message)
            )),
        }
    }
}

/// A colon and the first line of a registry's message, if it has one.
fn first_line(message: &str) -> String {
    let line = message.lines().next().unwrap_or("").trim();
    let printable = |character: &char| !character.is_control();
    let line: String = line.chars().filter(printable).take(200).collect();
    let separator = if line.is_empty() { "" } else { ": " };
    format!("{separator}{line}")
}

/// The innermost cause: the outer ones only say that a request failed.
fn root_cause(error: &dyn std::error::Error) -> String {
    let mut cause = error;
    while let Some(inner) = cause.source() {
        cause = inner;
    }
    cause.to_string()
}

/// Selects the TLS provider of this process. `false` if there are no trusted certificates, in which
/// case the HTTP client would panic, even without TLS.
fn tls_ready() -> bool {
    static PROVIDER: Once = Once::new();
    PROVIDER.call_once(|| {
        // Fails if the process has a provider already, which is fine.
        let _ = rustls::crypto::ring::default_provider().install_default();
    });
    !rustls_native_certs::load_native_certs().certs.is_empty()
}
