//! Image references of users: parsed once and always displayed the same way.
//!
//! Called by the command line (to parse) and by the store (to look up and to pull). Parsing uses
//! neither the network nor the store; only `oci:`, `docker-archive:` and `rootfs:` paths are made
//! absolute.

use std::fmt;
use std::path::{Component, Path, PathBuf};
use std::str::FromStr;

use crate::digest::Digest;
use crate::error::Error;

/// The registry of names without one, as in Docker.
pub(crate) const DEFAULT_REGISTRY: &str = "docker.io";
/// Longest name that registries accept, without tag and digest.
pub(crate) const MAX_NAME: usize = 255;

/// Where an image comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reference {
    /// An image of a registry, or a local one with such a name.
    Registry(RegistryReference),
    /// A local image by its full id: 64 hexadecimal digits, optionally prefixed with `sha256:`. (A
    /// prefix of an id could be a name; the store looks for both.)
    Id(Digest),
    /// `oci:DIR[:TAG]`, an OCI image layout.
    OciLayout {
        /// The directory that holds `index.json`.
        dir: PathBuf,
        /// Tag of the image; required only if the layout has several.
        tag: Option<String>,
    },
    /// `docker-archive:FILE[:TAG]`, as written by `docker save`.
    DockerArchive {
        /// The archive.
        file: PathBuf,
        /// Tag of the image; required only if the archive has several.
        tag: Option<String>,
    },
    /// `rootfs:DIR`, a plain directory that is used as it is and never changed.
    Rootfs {
        /// The directory.
        dir: PathBuf,
    },
}

/// The parts of a registry reference, with defaults.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RegistryReference {
    /// Host and, if given, port.
    pub registry: String,
    /// Path of the repository in the registry.
    pub repository: String,
    /// Tag or digest.
    pub version: Version,
    /// What the user wrote.
    written: String,
}

/// Selects an image of a repository. A digest takes precedence over a tag, as in Docker.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Version {
    /// A tag, `latest` when none was written.
    Tag(String),
    /// A digest of a manifest or manifest list.
    Digest(Digest),
}

impl Reference {
    /// The reference as the user wrote it, for messages.
    pub fn written(&self) -> String {
        match self {
            Self::Registry(reference) => reference.written.clone(),
            _ => self.to_string(),
        }
    }

    /// The short name for display: without `docker.io/` and `library/`, but with `:latest`.
    pub fn familiar(&self) -> String {
        let text = self.to_string();
        match text.strip_prefix("docker.io/") {
            Some(rest) => rest.strip_prefix("library/").unwrap_or(rest).to_owned(),
            None => text,
        }
    }
}

impl RegistryReference {
    /// A registry without a repository, for accounts: `HOST[:PORT]`, or a URL of it.
    pub(crate) fn of_registry(text: &str) -> Result<Self, Error> {
        let registry = crate::credentials::host_of_key(text).to_owned();
        check_host(&registry).map_err(|reason| Error::InvalidReference {
            reference: text.to_owned(),
            reason,
        })?;
        Ok(Self {
            registry,
            repository: String::new(),
            version: Version::Tag(String::new()),
            written: text.to_owned(),
        })
    }

    /// Where to search and what for: `[REGISTRY/]TEXT`. The text is the repository, which need not
    /// be one.
    pub(crate) fn of_search(text: &str) -> Result<Self, Error> {
        let invalid = |reason: &str| Error::InvalidReference {
            reference: text.to_owned(),
            reason: reason.to_owned(),
        };
        let (registry, term) = match text.split_once('/') {
            Some((host, term)) if is_host(host) => (host, term),
            _ => (DEFAULT_REGISTRY, text),
        };
        let term = term.trim();
        if term.is_empty() {
            return Err(invalid("there is nothing to search for"));
        }
        if text.len() > MAX_NAME {
            return Err(invalid(&format!("it is longer than {MAX_NAME} characters")));
        }
        Ok(Self {
            repository: term.to_owned(),
            written: text.to_owned(),
            ..Self::of_registry(registry)?
        })
    }

    /// The same name with another tag.
    ///
    /// # Errors
    /// `InvalidReference` if that is no tag.
    pub(crate) fn with_tag(&self, tag: &str) -> Result<Self, Error> {
        let written = format!("{}:{tag}", self.name());
        parse_registry(&written).map_err(|reason| Error::InvalidReference {
            reference: written,
            reason,
        })
    }

    /// Registry and repository, without tag and digest.
    pub fn name(&self) -> String {
        format!("{}/{}", self.registry, self.repository)
    }

    /// The digest, if the reference has one.
    pub fn digest(&self) -> Option<&Digest> {
        match &self.version {
            Version::Digest(digest) => Some(digest),
            Version::Tag(_) => None,
        }
    }

    /// Whether the user wrote neither a tag nor a digest.
    pub fn is_name_only(&self) -> bool {
        let last = self.written.rsplit('/').next().unwrap_or(&self.written);
        !last.contains([':', '@'])
    }

    /// Whether the registry runs on this machine, and plain HTTP is used.
    pub fn is_local(&self) -> bool {
        let host = match self.registry.strip_prefix('[') {
            Some(rest) => rest.split(']').next().unwrap_or(rest),
            None => self.registry.split(':').next().unwrap_or(&self.registry),
        };
        host == "localhost"
            || host
                .parse::<std::net::IpAddr>()
                .is_ok_and(|address| address.is_loopback())
    }

    /// The reference as the user wrote it.
    pub fn written(&self) -> &str {
        &self.written
    }
}

impl fmt::Display for RegistryReference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.registry, self.repository)?;
        match &self.version {
            Version::Tag(tag) => write!(f, ":{tag}"),
            Version::Digest(digest) => write!(f, "@{digest}"),
        }
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (kind, path, tag) = match self {
            Self::Registry(reference) => return reference.fmt(f),
            Self::Id(digest) => return digest.fmt(f),
            Self::OciLayout { dir, tag } => ("oci", dir, tag.as_ref()),
            Self::DockerArchive { file, tag } => ("docker-archive", file, tag.as_ref()),
            Self::Rootfs { dir } => ("rootfs", dir, None),
        };
        write!(f, "{kind}:{}", path.display())?;
        tag.map_or(Ok(()), |tag| write!(f, ":{tag}"))
    }
}

impl FromStr for Reference {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let invalid = |reason: String| Error::InvalidReference {
            reference: text.to_owned(),
            reason,
        };
        if let Some(rest) = text.strip_prefix("rootfs:") {
            return Ok(Self::Rootfs {
                dir: absolute(rest).map_err(invalid)?,
            });
        }
        if let Some(rest) = text.strip_prefix("oci:") {
            let (dir, tag) = split_path(rest);
            return Ok(Self::OciLayout {
                dir: absolute(dir).map_err(invalid)?,
                tag,
            });
        }
        if let Some(rest) = text.strip_prefix("docker-archive:") {
            let (file, tag) = split_path(rest);
            return Ok(Self::DockerArchive {
                file: absolute(file).map_err(invalid)?,
                tag,
            });
        }
        if let Some(digest) = Digest::from_hex(text.strip_prefix("sha256:").unwrap_or(text)) {
            return Ok(Self::Id(digest));
        }
        for scheme in ["http://", "https://", "docker://"] {
            if let Some(rest) = text.strip_prefix(scheme) {
                return Err(invalid(format!(
                    "an image's name has no {scheme:?} before it: {rest}"
                )));
            }
        }
        parse_registry(text).map(Self::Registry).map_err(invalid)
    }
}

/// Splits `PATH[:TAG]`. An existing path may contain colons; otherwise the text after the first
/// colon is the tag, which for archives may be a name with a tag (`FILE:name:tag`).
fn split_path(text: &str) -> (&str, Option<String>) {
    if Path::new(text).exists() {
        return (text, None);
    }
    match text.split_once(':') {
        Some((path, tag)) if !tag.is_empty() => (path, Some(tag.to_owned())),
        Some((path, _)) => (path, None),
        None => (text, None),
    }
}

/// Makes a path absolute lexically; symbolic links are kept.
fn absolute(text: &str) -> Result<PathBuf, String> {
    if text.is_empty() {
        return Err("the path is empty".to_owned());
    }
    let path = std::path::absolute(text).map_err(|error| error.to_string())?;
    let mut clean = PathBuf::new();
    for component in path.components() {
        match component {
            Component::ParentDir => {
                // `x/..` equals `.` only if x is not a symbolic link: leave that to the kernel.
                return Ok(path);
            }
            other => clean.push(other),
        }
    }
    Ok(clean)
}

fn parse_registry(text: &str) -> Result<RegistryReference, String> {
    if text.is_empty() {
        return Err("it is empty".to_owned());
    }
    let (rest, digest) = match text.split_once('@') {
        Some((rest, digest)) => (
            rest,
            Some(
                digest
                    .parse::<Digest>()
                    .map_err(|error| error.to_string())?,
            ),
        ),
        None => (text, None),
    };
    // A colon after the last slash starts a tag; one before it belongs to a port.
    let (name, tag) = match rest.rfind(':') {
        Some(colon) if !rest[colon..].contains('/') && !rest[colon..].contains(']') => {
            (&rest[..colon], Some(&rest[colon + 1..]))
        }
        _ => (rest, None),
    };
    if let Some(tag) = tag {
        check_tag(tag)?;
    }
    let (registry, path) = match name.split_once('/') {
        Some((host, path)) if is_host(host) => (host.to_owned(), path.to_owned()),
        _ => (DEFAULT_REGISTRY.to_owned(), name.to_owned()),
    };
    let (registry, path) = match registry.as_str() {
        "docker.io" | "index.docker.io" | "registry-1.docker.io" => {
            let path = if path.contains('/') {
                path
            } else {
                format!("library/{path}")
            };
            (DEFAULT_REGISTRY.to_owned(), path)
        }
        _ => (registry, path),
    };
    check_host(&registry)?;
    check_repository(&path)?;
    if registry.len() + 1 + path.len() > MAX_NAME {
        return Err(format!("its name is longer than {MAX_NAME} characters"));
    }
    let version = match (digest, tag) {
        (Some(digest), _) => Version::Digest(digest),
        (None, Some(tag)) => Version::Tag(tag.to_owned()),
        (None, None) => Version::Tag("latest".to_owned()),
    };
    Ok(RegistryReference {
        registry,
        repository: path,
        version,
        written: text.to_owned(),
    })
}

/// Docker's rule: the first part is a host if it contains a dot, a colon or capitals, or is
/// `localhost`.
fn is_host(part: &str) -> bool {
    part == "localhost"
        || part.contains(['.', ':', '['])
        || part.bytes().any(|byte| byte.is_ascii_uppercase())
}

fn check_host(host: &str) -> Result<(), String> {
    let (name, port) = match host.strip_prefix('[') {
        Some(rest) => {
            let (address, after) = rest
                .split_once(']')
                .ok_or_else(|| format!("\"{host}\" lacks a closing bracket"))?;
            if address.parse::<std::net::Ipv6Addr>().is_err() {
                return Err(format!("\"{address}\" is no IPv6 address"));
            }
            match after {
                "" => ("", None),
                _ => ("", Some(after.strip_prefix(':').unwrap_or(after))),
            }
        }
        None => match host.split_once(':') {
            Some((name, port)) => (name, Some(port)),
            None => (host, None),
        },
    };
    if !host.starts_with('[') {
        let label_ok = |label: &str| {
            !label.is_empty()
                && label
                    .bytes()
                    .all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
                && !label.starts_with('-')
                && !label.ends_with('-')
        };
        if !name.split('.').all(label_ok) {
            return Err(format!("\"{host}\" is no host name"));
        }
    }
    match port {
        Some(port) if port.parse::<u16>().is_err() => Err(format!("\"{port}\" is no port")),
        _ => Ok(()),
    }
}

fn check_repository(path: &str) -> Result<(), String> {
    if path.bytes().any(|byte| byte.is_ascii_uppercase()) {
        return Err("the repository name must be lower case".to_owned());
    }
    for part in path.split('/') {
        if !repository_part_ok(part) {
            return Err(format!("\"{part}\" is no part of a repository name"));
        }
    }
    Ok(())
}

/// `[a-z0-9]+` joined by one dot, one or two underscores, or any number of dashes.
fn repository_part_ok(part: &str) -> bool {
    let bytes = part.as_bytes();
    let word = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    match (bytes.first(), bytes.last()) {
        (Some(&first), Some(&last)) if word(first) && word(last) => {}
        _ => return false,
    }
    bytes.split(|&byte| word(byte)).all(|separator| {
        matches!(separator, b"" | b"." | b"_" | b"__") || separator.iter().all(|&byte| byte == b'-')
    })
}

fn check_tag(tag: &str) -> Result<(), String> {
    let word = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
    let valid = tag.len() <= 128
        && tag.bytes().next().is_some_and(word)
        && tag
            .bytes()
            .all(|byte| word(byte) || byte == b'.' || byte == b'-');
    if valid {
        Ok(())
    } else {
        Err(format!("\"{tag}\" is no tag"))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn registry_names_get_dockers_defaults() {
        let digest = format!("sha256:{}", "0".repeat(64));
        for (written, full) in [
            ("busybox", "docker.io/library/busybox:latest".to_owned()),
            ("busybox:1.36", "docker.io/library/busybox:1.36".to_owned()),
            ("user/tool", "docker.io/user/tool:latest".to_owned()),
            (
                "docker.io/busybox",
                "docker.io/library/busybox:latest".to_owned(),
            ),
            ("index.docker.io/a/b", "docker.io/a/b:latest".to_owned()),
            ("localhost/foo", "localhost/foo:latest".to_owned()),
            (
                "localhost:5000/foo/bar:v1",
                "localhost:5000/foo/bar:v1".to_owned(),
            ),
            ("127.0.0.1:5000/foo", "127.0.0.1:5000/foo:latest".to_owned()),
            ("[::1]:5000/foo", "[::1]:5000/foo:latest".to_owned()),
            ("[::1]/foo:x", "[::1]/foo:x".to_owned()),
            (
                "ghcr.io/a/b__c-d.e/f--g",
                "ghcr.io/a/b__c-d.e/f--g:latest".to_owned(),
            ),
            (
                &format!("quay.io/x/y@{digest}"),
                format!("quay.io/x/y@{digest}"),
            ),
            (
                &format!("quay.io/x/y:tag@{digest}"),
                format!("quay.io/x/y@{digest}"),
            ),
        ] {
            let reference: Reference = written.parse().unwrap();
            assert_eq!(reference.to_string(), full, "{written}");
            assert_eq!(reference.written(), written);
            assert_eq!(
                full.parse::<Reference>().unwrap().to_string(),
                full,
                "stable"
            );
        }
    }

    #[test]
    fn names_without_tag_and_digest() {
        let digest = format!("a/b@sha256:{}", "0".repeat(64));
        for (written, only) in [
            ("busybox", true),
            ("localhost:5000/a", true),
            ("localhost:5000/a:1", false),
            ("busybox:latest", false),
            (digest.as_str(), false),
        ] {
            let Reference::Registry(name) = written.parse().unwrap() else {
                panic!()
            };
            assert_eq!(name.is_name_only(), only, "{written}");
        }
    }

    #[test]
    fn familiar_names_leave_the_defaults_out() {
        for (written, familiar) in [
            ("busybox", "busybox:latest"),
            ("user/tool:1", "user/tool:1"),
            ("ghcr.io/a/b", "ghcr.io/a/b:latest"),
        ] {
            assert_eq!(written.parse::<Reference>().unwrap().familiar(), familiar);
        }
    }

    #[test]
    fn bad_names_are_refused_with_a_reason() {
        for (bad, reason) in [
            ("", "empty"),
            ("Busybox", "lower case"),
            ("a//b", "no part"),
            ("a/../b", "no part"),
            ("a:", "no tag"),
            ("a:b c", "no tag"),
            ("-a", "no part"),
            ("a..b/c", "no host name"),
            ("http://localhost:5000/a", "has no \"http://\""),
            ("localhost:x/a", "no port"),
            ("localhost:99999/a", "no port"),
            ("[::g]/a", "no IPv6"),
            ("a@sha512:00", "sha512"),
            ("a@sha256:00", "invalid digest"),
            ("https://x.org/a", "no"),
            ("a___b", "no part"),
        ] {
            let error = bad.parse::<Reference>().unwrap_err().to_string();
            assert!(error.contains(reason), "{bad}: {error}");
        }
        assert!("a/".repeat(200).parse::<Reference>().is_err());
    }

    #[test]
    fn loopback_registries_are_local() {
        for (name, local) in [
            ("localhost:5000/a", true),
            ("localhost/a", true),
            ("127.0.0.1/a", true),
            ("127.3.2.1:80/a", true),
            ("[::1]:5000/a", true),
            ("10.0.0.1:5000/a", false),
            ("localhost.org/a", false),
            ("a", false),
        ] {
            let Reference::Registry(reference) = name.parse().unwrap() else {
                panic!()
            };
            assert_eq!(reference.is_local(), local, "{name}");
        }
    }

    #[test]
    fn whole_ids() {
        let id = Digest::of(b"x");
        assert_eq!(id.hex().parse::<Reference>().unwrap(), Reference::Id(id));
        assert_eq!(
            id.to_string().parse::<Reference>().unwrap(),
            Reference::Id(id)
        );
        assert!(matches!(
            id.short().parse::<Reference>().unwrap(),
            Reference::Registry(_)
        ));
    }

    #[test]
    fn paths_and_their_tags() {
        let parse = |text: &str| text.parse::<Reference>().unwrap();
        assert_eq!(
            parse("rootfs:/a/b"),
            Reference::Rootfs { dir: "/a/b".into() }
        );
        assert_eq!(
            parse("oci:/x/y:v1"),
            Reference::OciLayout {
                dir: "/x/y".into(),
                tag: Some("v1".into())
            }
        );
        assert_eq!(
            parse("oci:/x/./y"),
            Reference::OciLayout {
                dir: "/x/y".into(),
                tag: None
            }
        );
        assert_eq!(
            parse("docker-archive:/x.tar:foo:1"),
            Reference::DockerArchive {
                file: "/x.tar".into(),
                tag: Some("foo:1".into())
            }
        );
        assert!("rootfs:".parse::<Reference>().is_err());
        let dir = tempfile::tempdir().unwrap();
        let odd = dir.path().join("with:colon");
        std::fs::create_dir(&odd).unwrap();
        assert_eq!(
            parse(&format!("oci:{}", odd.display())),
            Reference::OciLayout {
                dir: odd,
                tag: None
            }
        );
    }
}
