//! Manifests, manifest lists and platforms: parsing, and choosing the manifest for this platform.
//!
//! Called by the sources of images (registry, layout, archive). The input is untrusted: sizes and
//! counts are checked, unknown fields are ignored as the formats require.

use serde::{Deserialize, Serialize};

use crate::digest::Digest;
use crate::error::{Error, Result};

/// Largest manifest, manifest list or configuration accepted, as in other tools.
pub(crate) const MAX_DOCUMENT: u64 = 4 << 20;
/// Most layers of an image: the limit of overlayfs.
const MAX_LAYERS: usize = 500;

pub(crate) const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";
pub(crate) const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const OCI_CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const OCI_LAYER: &str = "application/vnd.oci.image.layer.v1.tar";
const OCI_LAYER_GZIP: &str = "application/vnd.oci.image.layer.v1.tar+gzip";
const DOCKER_LIST: &str = "application/vnd.docker.distribution.manifest.list.v2+json";
const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
const DOCKER_CONFIG: &str = "application/vnd.docker.container.image.v1+json";

/// Media types requested from a registry.
pub(crate) const ACCEPTED: &[&str] = &[OCI_INDEX, OCI_MANIFEST, DOCKER_LIST, DOCKER_MANIFEST];

/// Operating system and processor of an image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Platform {
    /// Go's name of the operating system: `linux`.
    #[serde(default)]
    pub os: String,
    /// Go's name of the architecture: `amd64`, `arm64`, …
    #[serde(default)]
    pub architecture: String,
    /// `v7`, `v8`, …
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub variant: Option<String>,
}

impl Platform {
    /// Linux on this processor.
    pub fn host() -> Self {
        let architecture = match std::env::consts::ARCH {
            "x86_64" => "amd64",
            "aarch64" => "arm64",
            "x86" => "386",
            "powerpc64" => "ppc64le",
            other => other,
        };
        Self {
            os: "linux".to_owned(),
            architecture: architecture.to_owned(),
            variant: None,
        }
    }

    /// How well an image for `other` runs here: `None` not at all, else lower is better.
    fn distance(&self, other: &Platform) -> Option<u32> {
        if other.os != self.os || other.architecture != self.architecture {
            return None;
        }
        let baseline = match self.architecture.as_str() {
            "amd64" => "v1",
            "arm64" => "v8",
            _ => "",
        };
        match (
            other.variant.as_deref().unwrap_or(""),
            self.variant.as_deref(),
        ) {
            (variant, Some(wanted)) if variant == wanted => Some(0),
            ("", _) => Some(1),
            (variant, _) if variant == baseline => Some(1),
            // A variant above the baseline may or may not run.
            _ => Some(2),
        }
    }
}

impl std::fmt::Display for Platform {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.os, self.architecture)?;
        match self.variant.as_deref() {
            None | Some("") => Ok(()),
            Some(variant) => write!(f, "/{variant}"),
        }
    }
}

impl std::str::FromStr for Platform {
    type Err = String;

    /// Parses `OS/ARCHITECTURE[/VARIANT]`, or an architecture of Linux alone; also the kernel's
    /// names of architectures.
    fn from_str(text: &str) -> Result<Self, String> {
        let parts: Vec<&str> = text.split('/').collect();
        let (os, architecture, variant) = match parts.as_slice() {
            [architecture] => ("linux", *architecture, None),
            [os, architecture] => (*os, *architecture, None),
            [os, architecture, variant] => (*os, *architecture, Some(*variant)),
            _ => ("", "", None),
        };
        let word = |part: &str| {
            let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"_-.".contains(&byte);
            !part.is_empty() && part.bytes().all(plain)
        };
        if !parts.iter().all(|part| word(part)) || os.is_empty() {
            return Err(format!(
                "{text:?} is no platform: give OS/ARCHITECTURE[/VARIANT], like linux/arm64"
            ));
        }
        let (architecture, variant) = match (architecture, variant) {
            ("x86_64" | "x86-64", variant) => ("amd64", variant),
            ("aarch64", variant) => ("arm64", variant),
            ("i386" | "i686" | "x86", variant) => ("386", variant),
            ("armhf", None) => ("arm", Some("v7")),
            ("armel", None) => ("arm", Some("v6")),
            other => other,
        };
        Ok(Self {
            os: os.to_owned(),
            architecture: architecture.to_owned(),
            variant: variant.map(str::to_owned),
        })
    }
}

/// Refers to content.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Descriptor {
    #[serde(default)]
    pub media_type: String,
    pub digest: Digest,
    pub size: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub platform: Option<Platform>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub annotations: Option<std::collections::BTreeMap<String, String>>,
}

/// A single image: configuration and layers, lowest first.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Manifest {
    pub schema_version: u32,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub media_type: Option<String>,
    pub config: Descriptor,
    pub layers: Vec<Descriptor>,
}

/// Several images, one per platform.
#[derive(Debug, Clone, Deserialize)]
pub(crate) struct Index {
    pub manifests: Vec<Descriptor>,
}

/// A parsed manifest or manifest list.
pub(crate) enum Document {
    Manifest(Manifest),
    Index(Index),
}

impl Document {
    /// Its media type, for which OCI documents may leave out the field. `bytes` are its own.
    pub(crate) fn media_type(&self, bytes: &[u8]) -> String {
        let shape: Option<Shape> = serde_json::from_slice(bytes).ok();
        let usual = match self {
            Self::Manifest(_) => OCI_MANIFEST,
            Self::Index(_) => OCI_INDEX,
        };
        let written = shape.and_then(|shape| shape.media_type);
        let written = written.filter(|text| !text.is_empty());
        written.unwrap_or_else(|| usual.to_owned())
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Shape {
    #[serde(default)]
    schema_version: u32,
    #[serde(default)]
    media_type: Option<String>,
    #[serde(default)]
    manifests: Option<serde::de::IgnoredAny>,
    #[serde(default)]
    fs_layers: Option<serde::de::IgnoredAny>,
}

/// Parses a manifest or a manifest list.
pub(crate) fn parse(reference: &str, bytes: &[u8]) -> Result<Document> {
    let invalid = |what, error: serde_json::Error| Error::Invalid {
        reference: reference.to_owned(),
        what,
        reason: error.to_string(),
    };
    let unsupported = |what: String| Error::Unsupported {
        reference: reference.to_owned(),
        what,
    };
    let shape: Shape = serde_json::from_slice(bytes).map_err(|error| invalid("manifest", error))?;
    if shape.schema_version == 1 || shape.fs_layers.is_some() {
        return Err(unsupported(
            "image manifest version 2, schema 1 (deprecated; push the image again with a current tool)"
                .to_owned(),
        ));
    }
    let media_type = shape.media_type.as_deref().unwrap_or("");
    match media_type {
        OCI_INDEX | DOCKER_LIST => {}
        "" if shape.manifests.is_some() => {}
        OCI_MANIFEST | DOCKER_MANIFEST | "" => {
            let manifest: Manifest =
                serde_json::from_slice(bytes).map_err(|error| invalid("manifest", error))?;
            manifest.check(reference)?;
            return Ok(Document::Manifest(manifest));
        }
        other => return Err(unsupported(format!("manifest of media type {other}"))),
    }
    serde_json::from_slice(bytes)
        .map(Document::Index)
        .map_err(|error| invalid("index", error))
}

/// Creates a manifest for an image without one, whose layers are plain archives of the given
/// digests and sizes.
pub(crate) fn synthesize(
    config: &[u8],
    layers: &[(Digest, u64)],
) -> Result<Vec<u8>, serde_json::Error> {
    let layers = layers
        .iter()
        .map(|&(digest, size)| Descriptor::new(OCI_LAYER, digest, size))
        .collect();
    describe(config, layers)
}

/// Creates a manifest for an image with these layers.
pub(crate) fn describe(
    config: &[u8],
    layers: Vec<Descriptor>,
) -> Result<Vec<u8>, serde_json::Error> {
    serde_json::to_vec(&Manifest {
        schema_version: 2,
        media_type: Some(OCI_MANIFEST.to_owned()),
        config: Descriptor::new(OCI_CONFIG, Digest::of(config), config.len() as u64),
        layers,
    })
}

impl Descriptor {
    fn new(media_type: &str, digest: Digest, size: u64) -> Self {
        Self {
            media_type: media_type.to_owned(),
            digest,
            size,
            platform: None,
            annotations: None,
        }
    }

    /// A layer that is compressed with gzip.
    pub(crate) fn gzip_layer(digest: Digest, size: u64) -> Self {
        Self::new(OCI_LAYER_GZIP, digest, size)
    }

    /// The same layer in a manifest of OCI's form.
    pub(crate) fn as_oci_layer(&self) -> Self {
        let docker = self
            .media_type
            .strip_prefix("application/vnd.docker.image.rootfs.");
        let compression = docker.map(|rest| rest.rsplit('.').next().unwrap_or(rest));
        let media_type = match compression {
            Some("tar") => OCI_LAYER.to_owned(),
            Some(compression) => format!("{OCI_LAYER}+{compression}"),
            None => self.media_type.clone(),
        };
        Self {
            media_type,
            ..self.clone()
        }
    }
}

impl Manifest {
    fn check(&self, reference: &str) -> Result<()> {
        let unsupported = |what: String| Error::Unsupported {
            reference: reference.to_owned(),
            what,
        };
        if self.layers.len() > MAX_LAYERS {
            return Err(unsupported(format!(
                "{} layers (at most {MAX_LAYERS})",
                self.layers.len()
            )));
        }
        match self.config.media_type.as_str() {
            OCI_CONFIG | DOCKER_CONFIG | "" => {}
            other => {
                return Err(unsupported(format!(
                    "artifact of media type {other}, not an image"
                )));
            }
        }
        for layer in &self.layers {
            if !is_layer(&layer.media_type) {
                return Err(unsupported(format!(
                    "layer of media type {}",
                    layer.media_type
                )));
            }
        }
        Ok(())
    }
}

/// Known layer types: a tar archive, plain or compressed with gzip or zstd, distributable or not.
fn is_layer(media_type: &str) -> bool {
    let oci = media_type
        .strip_prefix("application/vnd.oci.image.layer.")
        .map(|rest| rest.strip_prefix("nondistributable.").unwrap_or(rest));
    match oci {
        Some(rest) => matches!(rest, "v1.tar" | "v1.tar+gzip" | "v1.tar+zstd"),
        None => matches!(
            media_type,
            "" | "application/vnd.docker.image.rootfs.diff.tar"
                | "application/vnd.docker.image.rootfs.diff.tar.gzip"
                | "application/vnd.docker.image.rootfs.diff.tar.zstd"
                | "application/vnd.docker.image.rootfs.foreign.diff.tar"
                | "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip"
        ),
    }
}

impl Index {
    /// The entry that fits `platform` best.
    pub(crate) fn choose(&self, reference: &str, platform: &Platform) -> Result<&Descriptor> {
        // Lists contain attestations and the like as images for the platform "unknown".
        let images = self.manifests.iter().filter(|entry| {
            matches!(
                entry.media_type.as_str(),
                "" | OCI_MANIFEST | DOCKER_MANIFEST | OCI_INDEX | DOCKER_LIST
            )
        });
        let known = images.filter(|entry| {
            entry
                .platform
                .as_ref()
                .is_none_or(|platform| platform.architecture != "unknown")
        });
        let mut best: Option<(u32, &Descriptor)> = None;
        let mut available = Vec::new();
        for entry in known {
            let distance = match &entry.platform {
                Some(theirs) => {
                    let name = theirs.to_string();
                    if !available.contains(&name) {
                        available.push(name);
                    }
                    platform.distance(theirs)
                }
                // Decided by its configuration.
                None => Some(3),
            };
            if let Some(distance) = distance
                && best.is_none_or(|(known, _)| distance < known)
            {
                best = Some((distance, entry));
            }
        }
        best.map(|(_, entry)| entry)
            .ok_or_else(|| Error::WrongPlatform {
                reference: reference.to_owned(),
                wanted: platform.to_string(),
                available,
            })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn entry(os: &str, architecture: &str, variant: Option<&str>, content: &str) -> Descriptor {
        Descriptor {
            media_type: OCI_MANIFEST.to_owned(),
            digest: Digest::of(content.as_bytes()),
            size: 1,
            platform: Some(Platform {
                os: os.to_owned(),
                architecture: architecture.to_owned(),
                variant: variant.map(str::to_owned),
            }),
            annotations: None,
        }
    }

    fn amd64() -> Platform {
        Platform {
            os: "linux".to_owned(),
            architecture: "amd64".to_owned(),
            variant: None,
        }
    }

    #[test]
    fn platforms_are_written_as_dockers() {
        for (text, platform) in [
            ("linux/arm64", "linux/arm64"),
            ("linux/arm/v7", "linux/arm/v7"),
            ("arm64", "linux/arm64"),
            ("linux/x86_64", "linux/amd64"),
            ("aarch64", "linux/arm64"),
        ] {
            assert_eq!(text.parse::<Platform>().unwrap().to_string(), platform);
        }
        for bad in ["", "linux/", "a/b/c/d", "linux/a b"] {
            assert!(bad.parse::<Platform>().is_err(), "{bad}");
        }
    }

    #[test]
    fn the_best_platform_is_chosen() {
        let index = Index {
            manifests: vec![
                entry("windows", "amd64", None, "w"),
                entry("linux", "arm64", Some("v8"), "a"),
                entry("linux", "amd64", Some("v3"), "v3"),
                entry("linux", "amd64", None, "plain"),
            ],
        };
        assert_eq!(
            index.choose("x", &amd64()).unwrap().digest,
            Digest::of(b"plain")
        );
        let v3 = Platform {
            variant: Some("v3".to_owned()),
            ..amd64()
        };
        assert_eq!(index.choose("x", &v3).unwrap().digest, Digest::of(b"v3"));
    }

    #[test]
    fn a_missing_platform_names_what_is_there() {
        let index = Index {
            manifests: vec![
                entry("linux", "arm64", Some("v8"), "a"),
                entry("linux", "s390x", None, "s"),
                entry("unknown", "unknown", None, "attestation"),
            ],
        };
        let error = index.choose("foo", &amd64()).unwrap_err().to_string();
        assert_eq!(
            error,
            "image \"foo\" is not available for linux/amd64: it is for linux/arm64/v8, linux/s390x"
        );
    }

    #[test]
    fn dockers_layers_in_ocis_form() {
        for (docker, oci) in [
            ("application/vnd.docker.image.rootfs.diff.tar", OCI_LAYER),
            (
                "application/vnd.docker.image.rootfs.diff.tar.gzip",
                OCI_LAYER_GZIP,
            ),
            (
                "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip",
                OCI_LAYER_GZIP,
            ),
            (OCI_LAYER_GZIP, OCI_LAYER_GZIP),
        ] {
            let layer = Descriptor::new(docker, Digest::of(b""), 1).as_oci_layer();
            assert_eq!(layer.media_type, oci);
        }
    }

    #[test]
    fn schema_1_and_artifacts_are_refused_by_name() {
        let old = br#"{"schemaVersion":1,"name":"x","fsLayers":[]}"#;
        assert!(
            parse("x", old)
                .err()
                .unwrap()
                .to_string()
                .contains("schema 1")
        );
        let digest = Digest::of(b"");
        let chart = format!(
            r#"{{"schemaVersion":2,"config":{{"mediaType":"application/vnd.cncf.helm.config.v1+json",
                "digest":"{digest}","size":0}},"layers":[]}}"#
        );
        assert!(
            parse("x", chart.as_bytes())
                .err()
                .unwrap()
                .to_string()
                .contains("helm")
        );
        let odd = format!(
            r#"{{"schemaVersion":2,"config":{{"digest":"{digest}","size":0}},
                "layers":[{{"mediaType":"application/x-foo","digest":"{digest}","size":1}}]}}"#
        );
        assert!(
            parse("x", odd.as_bytes())
                .err()
                .unwrap()
                .to_string()
                .contains("x-foo")
        );
        assert!(
            parse("x", b"{")
                .err()
                .unwrap()
                .to_string()
                .contains("invalid manifest")
        );
    }
}
