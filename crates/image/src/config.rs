//! The configuration of an image: the part that `hull run` uses, its history, its parser and its
//! writer.
//!
//! Called when an image is installed, saved or pushed (parse), on every start (from the record),
//! and by `import` (write).

use std::collections::BTreeMap;

use serde::{Deserialize, Deserializer, Serialize};

use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::manifest::Platform;

/// An image's defaults for its containers.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ImageConfig {
    /// `ENTRYPOINT`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub entrypoint: Vec<String>,
    /// `CMD`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub cmd: Vec<String>,
    /// `ENV`, as `NAME=value`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub env: Vec<String>,
    /// `USER`, as written: `user[:group]`, names or numbers.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub user: String,
    /// `WORKDIR`.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub workdir: String,
    /// `LABEL`.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
    /// `STOPSIGNAL`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stop_signal: Option<String>,
    /// `EXPOSE`, as `80/tcp`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub exposed_ports: Vec<String>,
    /// `VOLUME`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub volumes: Vec<String>,
    /// `HEALTHCHECK`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub health: Option<HealthCheck>,
    /// Go's name of the architecture.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub architecture: String,
    /// Go's name of the operating system.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub os: String,
    /// Variant of the architecture.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub variant: Option<String>,
}

/// A command that tells whether a container is healthy. Times are in nanoseconds, and absent or 0
/// where there is a default.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct HealthCheck {
    /// `CMD` and arguments, `CMD-SHELL` and a script, or `NONE`.
    #[serde(deserialize_with = "or_default")]
    pub test: Vec<String>,
    /// Between two checks.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub interval: Option<u64>,
    /// After which a check has failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub timeout: Option<u64>,
    /// In which failures do not count.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub start_period: Option<u64>,
    /// Between two checks in that time.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub start_interval: Option<u64>,
    /// So many failures in a row are one too many.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub retries: Option<u32>,
}

impl HealthCheck {
    /// Whether there is a command.
    pub fn is_some(&self) -> bool {
        !self.command().is_empty()
    }

    /// The command with its arguments.
    pub fn command(&self) -> Vec<String> {
        match self.test.split_first() {
            Some((first, arguments)) if first == "CMD" => arguments.to_vec(),
            Some((first, [script])) if first == "CMD-SHELL" => {
                vec!["/bin/sh".to_owned(), "-c".to_owned(), script.clone()]
            }
            _ => Vec::new(),
        }
    }
}

impl ImageConfig {
    /// The platform that the image is for.
    pub fn platform(&self) -> Platform {
        Platform {
            os: self.os.clone(),
            architecture: self.architecture.clone(),
            variant: self.variant.clone(),
        }
    }

    /// Rejects an image for another platform. Missing fields match any platform.
    pub(crate) fn check_platform(&self, reference: &str, ours: &Platform) -> Result<()> {
        let fits = (self.os.is_empty() || self.os == ours.os)
            && (self.architecture.is_empty() || self.architecture == ours.architecture);
        if fits {
            return Ok(());
        }
        Err(Error::WrongPlatform {
            reference: reference.to_owned(),
            wanted: ours.to_string(),
            available: vec![self.platform().to_string()],
        })
    }
}

/// A parsed configuration document.
#[derive(Debug)]
pub(crate) struct Document {
    pub config: ImageConfig,
    pub diff_ids: Vec<Digest>,
    pub created: Option<String>,
    /// Oldest first.
    pub history: Vec<Step>,
}

/// A step of an image's history.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default)]
pub(crate) struct Step {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub created: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub created_by: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub comment: Option<String>,
    /// Whether it changed the configuration only.
    #[serde(
        deserialize_with = "or_default",
        skip_serializing_if = "std::ops::Not::not"
    )]
    pub empty_layer: bool,
}

/// The document as stored in an image. Docker writes `null` for empty lists and maps.
#[derive(Deserialize, Serialize, Default)]
struct Raw {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    created: Option<String>,
    #[serde(default, deserialize_with = "or_default")]
    architecture: String,
    #[serde(default, deserialize_with = "or_default")]
    os: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    variant: Option<String>,
    #[serde(default, deserialize_with = "or_default")]
    config: RawConfig,
    rootfs: RawRootfs,
    #[serde(
        default,
        deserialize_with = "or_default",
        skip_serializing_if = "Vec::is_empty"
    )]
    history: Vec<Step>,
}

#[derive(Deserialize, Serialize, Default)]
#[serde(rename_all = "PascalCase", default)]
struct RawConfig {
    #[serde(deserialize_with = "or_default", skip_serializing_if = "Vec::is_empty")]
    entrypoint: Vec<String>,
    #[serde(deserialize_with = "or_default", skip_serializing_if = "Vec::is_empty")]
    cmd: Vec<String>,
    #[serde(deserialize_with = "or_default", skip_serializing_if = "Vec::is_empty")]
    env: Vec<String>,
    #[serde(
        deserialize_with = "or_default",
        skip_serializing_if = "String::is_empty"
    )]
    user: String,
    #[serde(
        deserialize_with = "or_default",
        skip_serializing_if = "String::is_empty"
    )]
    working_dir: String,
    #[serde(
        deserialize_with = "or_default",
        skip_serializing_if = "BTreeMap::is_empty"
    )]
    labels: BTreeMap<String, String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    stop_signal: Option<String>,
    #[serde(
        deserialize_with = "or_default",
        skip_serializing_if = "BTreeMap::is_empty"
    )]
    exposed_ports: BTreeMap<String, Empty>,
    #[serde(
        deserialize_with = "or_default",
        skip_serializing_if = "BTreeMap::is_empty"
    )]
    volumes: BTreeMap<String, Empty>,
    #[serde(skip_serializing_if = "Option::is_none")]
    healthcheck: Option<HealthCheck>,
}

/// The `{}` that Docker writes as the value of each key of a set.
#[derive(Default, Serialize)]
struct Empty {}

impl<'de> Deserialize<'de> for Empty {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        serde::de::IgnoredAny::deserialize(deserializer).map(|_| Self {})
    }
}

#[derive(Deserialize, Serialize, Default)]
struct RawRootfs {
    #[serde(rename = "type", default)]
    kind: String,
    #[serde(default, deserialize_with = "or_default")]
    diff_ids: Vec<Digest>,
}

/// Reads `null` as the default.
fn or_default<'de, T: Default + Deserialize<'de>, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<T, D::Error> {
    Option::<T>::deserialize(deserializer).map(Option::unwrap_or_default)
}

/// Parses the configuration of an image with `layers` layers.
pub(crate) fn parse(reference: &str, bytes: &[u8], layers: usize) -> Result<Document> {
    let document = parse_any(reference, bytes)?;
    if document.diff_ids.len() != layers {
        return Err(invalid(
            reference,
            format!(
                "it lists {} layers, the manifest {layers}",
                document.diff_ids.len()
            ),
        ));
    }
    Ok(document)
}

fn invalid(reference: &str, reason: String) -> Error {
    Error::Invalid {
        reference: reference.to_owned(),
        what: "config",
        reason,
    }
}

/// Parses the configuration of an image with any number of layers.
pub(crate) fn parse_any(reference: &str, bytes: &[u8]) -> Result<Document> {
    let raw: Raw =
        serde_json::from_slice(bytes).map_err(|error| invalid(reference, error.to_string()))?;
    let config = ImageConfig {
        entrypoint: raw.config.entrypoint,
        cmd: raw.config.cmd,
        env: raw.config.env,
        user: raw.config.user,
        workdir: raw.config.working_dir,
        labels: raw.config.labels,
        stop_signal: raw.config.stop_signal.filter(|signal| !signal.is_empty()),
        exposed_ports: raw.config.exposed_ports.into_keys().collect(),
        volumes: raw.config.volumes.into_keys().collect(),
        health: raw.config.healthcheck,
        architecture: raw.architecture,
        os: raw.os,
        variant: raw.variant.filter(|variant| !variant.is_empty()),
    };
    Ok(Document {
        config,
        diff_ids: raw.rootfs.diff_ids,
        created: raw.created,
        history: raw.history,
    })
}

/// Serializes the configuration document of an image with the given layers.
pub(crate) fn write(
    config: &ImageConfig,
    diff_ids: Vec<Digest>,
    created: String,
    comment: &str,
) -> Result<Vec<u8>, serde_json::Error> {
    let set = |keys: &[String]| keys.iter().map(|key| (key.clone(), Empty {})).collect();
    let history = diff_ids
        .iter()
        .map(|_| Step {
            created: Some(created.clone()),
            comment: Some(comment.to_owned()),
            ..Step::default()
        })
        .collect();
    let raw = Raw {
        created: Some(created.clone()),
        architecture: config.architecture.clone(),
        os: config.os.clone(),
        variant: config.variant.clone(),
        config: RawConfig {
            entrypoint: config.entrypoint.clone(),
            cmd: config.cmd.clone(),
            env: config.env.clone(),
            user: config.user.clone(),
            working_dir: config.workdir.clone(),
            labels: config.labels.clone(),
            stop_signal: config.stop_signal.clone(),
            exposed_ports: set(&config.exposed_ports),
            volumes: set(&config.volumes),
            healthcheck: config.health.clone(),
        },
        rootfs: RawRootfs {
            kind: "layers".to_owned(),
            diff_ids,
        },
        history,
    };
    serde_json::to_vec(&raw)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn dockers_nulls_are_nothing() {
        let digest = Digest::of(b"x");
        let text = format!(
            r#"{{"architecture":"amd64","os":"linux","created":"2024-01-01T00:00:00Z",
            "config":{{"Cmd":["sh"],"Entrypoint":null,"Env":["A=b"],"Labels":null,"Volumes":null,"User":"",
            "WorkingDir":"/w","ExposedPorts":{{"80/tcp":{{}}}},"Hostname":"","StopSignal":"SIGINT"}},
            "rootfs":{{"type":"layers","diff_ids":["{digest}"]}},"history":null}}"#
        );
        let document = parse("x", text.as_bytes(), 1).unwrap();
        assert_eq!(document.config.cmd, ["sh"]);
        assert!(document.config.entrypoint.is_empty());
        assert_eq!(document.config.exposed_ports, ["80/tcp"]);
        assert_eq!(document.config.workdir, "/w");
        assert_eq!(document.config.stop_signal.as_deref(), Some("SIGINT"));
        assert_eq!(document.diff_ids, [digest]);
        let error = parse("x", text.as_bytes(), 2).unwrap_err().to_string();
        assert_eq!(
            error,
            "invalid config of image \"x\": it lists 1 layers, the manifest 2"
        );
    }

    #[test]
    fn written_is_what_is_read() {
        let config = ImageConfig {
            entrypoint: vec!["/e".into()],
            env: vec!["A=b c".into()],
            labels: BTreeMap::from([("l".into(), "v".into())]),
            volumes: vec!["/data".into()],
            architecture: "amd64".into(),
            os: "linux".into(),
            ..ImageConfig::default()
        };
        let ids = vec![Digest::of(b"1"), Digest::of(b"2")];
        let bytes = write(&config, ids.clone(), "2024-01-01T00:00:00Z".into(), "test").unwrap();
        let document = parse("x", &bytes, 2).unwrap();
        assert_eq!((document.config, document.diff_ids), (config, ids));
        assert_eq!(document.created.as_deref(), Some("2024-01-01T00:00:00Z"));
        assert_eq!(document.history.len(), 2);
        assert_eq!(document.history[0].comment.as_deref(), Some("test"));
    }

    #[test]
    fn another_architecture_is_named() {
        let config = ImageConfig {
            os: "linux".into(),
            architecture: "s390x".into(),
            ..Default::default()
        };
        let ours = Platform {
            os: "linux".into(),
            architecture: "amd64".into(),
            variant: None,
        };
        let error = config.check_platform("x", &ours).unwrap_err().to_string();
        assert_eq!(
            error,
            "image \"x\" is not available for linux/amd64: it is for linux/s390x"
        );
        ImageConfig::default().check_platform("x", &ours).unwrap();
    }
}
