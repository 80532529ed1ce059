//! Images from a registry.
//!
//! Called by the store. One thread talks to the registry (the only asynchronous code of this crate)
//! and downloads layer archives into the store's blobs, several at once; the caller's thread
//! unpacks them in order while others still download.

use std::collections::BTreeSet;
use std::fs::File;
use std::sync::Once;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::Duration;

use futures_util::StreamExt;
use oci_client::client::{ClientConfig, ClientProtocol};
use oci_client::secrets::RegistryAuth;

use super::download;
use super::manifest_request::{Failure, Manifests};
use crate::config;
use crate::credentials::Credentials;
use crate::digest::Digest;
use crate::error::{Error, Result, check_digest};
use crate::manifest::{self, Descriptor, Document, MAX_DOCUMENT, Manifest};
use crate::progress::{Event, Progress};
use crate::reference::{RegistryReference, Version};
use crate::store::{Image, LayerStream, Named, Plan, PlannedLayer, Pull, Store};

/// Number of parallel downloads.
const PARALLEL: usize = 3;
pub(super) const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Timeout while a registry sends a response.
pub(super) const READ_TIMEOUT: Duration = Duration::from_secs(60);
pub(super) const USER_AGENT: &str = concat!("hull/", env!("CARGO_PKG_VERSION"));

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
    pub client: oci_client::Client,
    pub reference: oci_client::Reference,
    pub name: &'a RegistryReference,
    manifests: Manifests,
    auth: RegistryAuth,
    credentials: String,
    /// Prefix of "registry X answered 404".
    local: &'static str,
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
            let session = Session::new(name, found.auth, found.description, pull)?;
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .map_err(|error| session.failed(error.to_string()))?;
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
                reason: "the transfer ended unexpectedly".to_owned(),
            }),
        }
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
        let path = store.blob_path(&digest);
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
            let _ = std::fs::remove_file(store.blob_path(&layer.digest));
        }
    }
    if gave_up { None } else { Some(result) }
}

impl<'a> Session<'a> {
    fn new(
        name: &'a RegistryReference,
        auth: RegistryAuth,
        credentials: String,
        pull: Pull,
    ) -> Result<Self> {
        let (registry, repository) = (name.registry.clone(), name.repository.clone());
        let reference = match &name.version {
            Version::Tag(tag) => oci_client::Reference::with_tag(registry, repository, tag.clone()),
            Version::Digest(digest) => {
                oci_client::Reference::with_digest(registry, repository, digest.to_string())
            }
        };
        let local = match pull {
            Pull::Always => "",
            _ => "no such reference in the local store, and ",
        };
        let failed = |reason: String| Error::Registry {
            reference: name.written().to_owned(),
            registry: name.registry.clone(),
            reason,
        };
        if !tls_ready() {
            let reason = "this machine has no CA certificates (package ca-certificates)";
            return Err(failed(reason.to_owned()));
        }
        let mut config = ClientConfig {
            protocol: ClientProtocol::Https,
            connect_timeout: Some(CONNECT_TIMEOUT),
            read_timeout: Some(READ_TIMEOUT),
            user_agent: USER_AGENT,
            ..ClientConfig::default()
        };
        if name.is_local() {
            config.protocol = ClientProtocol::Http;
            // Never use a proxy for this machine, whatever the environment says: `no_proxy` takes
            // effect only with a proxy, and `*` matches names only, not addresses.
            config.http_proxy = Some("http://localhost".to_owned());
            config.no_proxy = Some("*,127.0.0.0/8,::1".to_owned());
        }
        let client =
            oci_client::Client::try_from(config).map_err(|error| failed(error.to_string()))?;
        let manifests =
            Manifests::new(name.is_local()).map_err(|error| failed(error.to_string()))?;
        Ok(Self {
            client,
            manifests,
            reference,
            name,
            auth,
            credentials,
            local,
        })
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
        let (digest, bytes) = self.manifest(&self.reference).await?;
        let index = match manifest::parse(written, &bytes)? {
            Document::Manifest(manifest) => {
                return Ok((
                    Named {
                        manifest: digest,
                        index: None,
                        stamp: None,
                    },
                    bytes,
                    manifest,
                ));
            }
            Document::Index(index) => index,
        };
        let chosen = index.choose(written, store.platform())?.digest;
        let reference = self.reference.clone_with_digest(chosen.to_string());
        let (_, bytes) = self.manifest(&reference).await?;
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

    /// A manifest and its computed digest, which must match the reference's if that has one.
    async fn manifest(&self, reference: &oci_client::Reference) -> Result<(Digest, Vec<u8>)> {
        let bytes = self
            .manifests
            .get(&self.client, reference, &self.auth)
            .await
            .map_err(|failure| match failure {
                Failure::Client(error) => self.error("manifest", error),
                Failure::TooLarge => {
                    self.failed(format!("the manifest is larger than {MAX_DOCUMENT} bytes"))
                }
                Failure::Announced { expected, actual } => Error::WrongDigest {
                    reference: self.name.written().to_owned(),
                    what: "manifest",
                    expected,
                    actual,
                },
            })?;
        let actual = Digest::of(&bytes);
        let expected = reference.digest().and_then(|digest| digest.parse().ok());
        if let Some(expected) = expected {
            check_digest(self.name.written(), "manifest", expected, actual)?;
        }
        Ok((actual, bytes))
    }

    async fn config(&self, descriptor: &Descriptor) -> Result<Vec<u8>> {
        if descriptor.size > MAX_DOCUMENT {
            return Err(self.failed(format!("the config is larger than {MAX_DOCUMENT} bytes")));
        }
        let digest = descriptor.digest.to_string();
        let mut stream = self
            .client
            .pull_blob_stream(&self.reference, digest.as_str())
            .await
            .map_err(|error| self.error("config", error))?
            .stream;
        let mut bytes = Vec::new();
        while let Some(chunk) = stream.next().await {
            // The client reports a digest mismatch at the end of the stream; ours is checked later.
            let Ok(chunk) = chunk else { break };
            bytes.extend_from_slice(&chunk);
            if bytes.len() as u64 > descriptor.size {
                break;
            }
        }
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
            reason,
        }
    }

    /// Maps the client's errors to ours.
    pub(super) fn error(
        &self,
        what: &'static str,
        error: oci_client::errors::OciDistributionError,
    ) -> Error {
        use oci_client::errors::{OciDistributionError as Client, OciErrorCode as Code};
        match error {
            Client::UnauthorizedError { .. } | Client::AuthenticationFailure(_) => {
                self.status(what, 401, "")
            }
            Client::RegistryError { envelope, .. } => {
                let status = match envelope.errors.first().map(|error| &error.code) {
                    Some(
                        Code::ManifestUnknown
                        | Code::NameUnknown
                        | Code::BlobUnknown
                        | Code::NotFound
                        | Code::ManifestBlobUnknown,
                    ) => 404,
                    Some(Code::Unauthorized) => 401,
                    Some(Code::Denied) => 403,
                    _ => return self.failed(format!("{what}: {envelope}")),
                };
                self.status(what, status, "")
            }
            Client::ServerError { code, message, .. } => self.status(what, code, &message),
            Client::RequestError(error) if error.is_connect() || error.is_timeout() => {
                Error::Unreachable {
                    reference: self.name.written().to_owned(),
                    registry: self.name.registry.clone(),
                    reason: root_cause(&error),
                }
            }
            Client::RequestError(error) => self.failed(format!("{what}: {}", root_cause(&error))),
            Client::DigestError(oci_client::errors::DigestError::VerificationError {
                expected,
                actual,
            }) => match (expected.parse(), actual.parse()) {
                (Ok(expected), Ok(actual)) => Error::WrongDigest {
                    reference: self.name.written().to_owned(),
                    what,
                    expected,
                    actual,
                },
                _ => self.failed(format!("{what}: expected digest {expected}, got {actual}")),
            },
            other => self.failed(format!("{what}: {other}")),
        }
    }

    fn status(&self, what: &'static str, status: u16, message: &str) -> Error {
        let (reference, registry) = (self.name.written().to_owned(), self.name.registry.clone());
        match status {
            404 if what == "manifest" => Error::NotInRegistry {
                reference,
                registry,
                status,
                local: self.local,
            },
            401 | 403 => Error::Unauthorized {
                reference,
                registry,
                status,
                credentials: self.credentials.clone(),
            },
            _ => {
                let line = message.lines().next().unwrap_or("").trim();
                let line: String = line.chars().take(200).collect();
                let separator = if line.is_empty() { "" } else { ": " };
                self.failed(format!(
                    "it answered {status} to the request for the {what}{separator}{line}"
                ))
            }
        }
    }
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
