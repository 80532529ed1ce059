//! Accounts at registries: checks a user name and a password with the registry, and keeps them
//! where Docker does.
//!
//! Called by `hull login` and `hull logout`. Writes `$DOCKER_CONFIG/config.json` or
//! `~/.docker/config.json`, of which everything else is kept, or calls the credential helper that
//! is named there. Never includes a secret in a message.

use std::fs::{self, DirBuilder, OpenOptions};
use std::io::{ErrorKind, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, fchown};
use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::Serialize;
use serde_json::ser::PrettyFormatter;
use serde_json::{Map, Serializer, Value, json};

use crate::credentials::{Auth, Credentials, Found, docker_config_file, helper_for, run_helper};
use crate::credentials::{host_of_key, key_of};
use crate::error::{Error, Result};
use crate::reference::RegistryReference;
use crate::source;

/// The account at one registry.
#[derive(Debug)]
pub struct Account {
    file: PathBuf,
    registry: RegistryReference,
}

/// Where a password was stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StoredIn {
    /// In this file, unencrypted.
    File(PathBuf),
    /// By this credential helper.
    Helper(String),
}

impl Account {
    /// The account at a registry, `HOST[:PORT]` or a URL as Docker takes it; at Docker Hub without
    /// one. Kept in Docker's configuration of this user.
    ///
    /// # Errors
    /// `InvalidReference` if that is no registry, `Credentials` for a user without a home
    /// directory.
    pub fn docker(registry: Option<&str>) -> Result<Self> {
        let registry = RegistryReference::of_registry(registry.unwrap_or("docker.io"))?;
        let file = docker_config_file().ok_or_else(|| Error::Credentials {
            registry: registry.registry.clone(),
            reason: "neither DOCKER_CONFIG nor a home directory is set".to_owned(),
        })?;
        Ok(Self { file, registry })
    }

    /// Host and port of the registry.
    pub fn registry(&self) -> &str {
        &self.registry.registry
    }

    fn failed(&self, reason: String) -> Error {
        Error::Credentials {
            registry: self.registry().to_owned(),
            reason,
        }
    }

    /// The user name and password that are stored.
    ///
    /// # Errors
    /// `Credentials` if they cannot be read.
    pub fn stored(&self) -> Result<Option<(String, String)>> {
        let found = Credentials::docker_config(&self.file).find(self.registry())?;
        Ok(match found.auth {
            Auth::Basic(user, password) => Some((user, password)),
            Auth::Anonymous | Auth::Bearer(_) => None,
        })
    }

    /// Checks a user name and a password with the registry.
    ///
    /// # Errors
    /// `Login` if the registry does not take them, or cannot be asked.
    pub fn check(&self, user: &str, password: &str) -> Result<()> {
        let found = Found {
            auth: Auth::Basic(user.to_owned(), password.to_owned()),
            description: String::new(),
        };
        source::registry::check(&self.registry, found).map_err(|reason| Error::Login {
            registry: self.registry().to_owned(),
            reason,
        })
    }

    /// Stores a user name and a password, which were checked.
    ///
    /// # Errors
    /// `Credentials` if the configuration cannot be read or written, or the helper fails.
    pub fn store(&self, user: &str, password: &str) -> Result<StoredIn> {
        let key = key_of(self.registry());
        let helper = helper_for(&self.file, self.registry()).map_err(|why| self.failed(why))?;
        let (entry, stored_in) = match helper {
            Some(helper) => {
                let secret = json!({"ServerURL": key, "Username": user, "Secret": password});
                run_helper(&helper, "store", secret.to_string().as_bytes())
                    .map_err(|why| self.failed(why))?;
                (json!({}), StoredIn::Helper(helper))
            }
            None => {
                let auth = STANDARD.encode(format!("{user}:{password}"));
                (json!({ "auth": auth }), StoredIn::File(self.file.clone()))
            }
        };
        self.change(|auths| {
            self.remove_from(auths);
            auths.insert(key.to_owned(), entry);
        })?;
        Ok(stored_in)
    }

    /// Removes what is stored; whether there was anything.
    ///
    /// # Errors
    /// `Credentials` if the configuration cannot be read or written, or the helper fails.
    pub fn forget(&self) -> Result<bool> {
        let key = key_of(self.registry());
        let helper = helper_for(&self.file, self.registry()).map_err(|why| self.failed(why))?;
        let mut found = false;
        if let Some(helper) = helper {
            let run = |action| {
                run_helper(&helper, action, key.as_bytes()).map_err(|why| self.failed(why))
            };
            if run("get")?.is_some() {
                run("erase")?;
                found = true;
            }
        }
        self.change(|auths| found |= self.remove_from(auths))?;
        Ok(found)
    }

    /// Removes all entries of the registry; whether there were any.
    fn remove_from(&self, auths: &mut Map<String, Value>) -> bool {
        let before = auths.len();
        auths.retain(|key, _| host_of_key(key) != self.registry());
        auths.len() < before
    }

    /// Changes `auths` in the configuration.
    fn change(&self, change: impl FnOnce(&mut Map<String, Value>)) -> Result<()> {
        let shown = self.file.display();
        let unusable =
            |why: String| self.failed(format!("{shown} is no Docker configuration: {why}"));
        let before = match fs::read(&self.file) {
            Ok(text) => {
                serde_json::from_slice(&text).map_err(|error| unusable(error.to_string()))?
            }
            Err(error) if error.kind() == ErrorKind::NotFound => json!({}),
            Err(error) => return Err(self.failed(format!("cannot read {shown}: {error}"))),
        };
        let mut config = before.clone();
        let object = config.as_object_mut();
        let object = object.ok_or_else(|| unusable("it is no object".to_owned()))?;
        let mut auths = match object.get("auths") {
            None | Some(Value::Null) => Map::new(),
            Some(Value::Object(auths)) => auths.clone(),
            Some(_) => return Err(unusable("auths is no object".to_owned())),
        };
        change(&mut auths);
        if !auths.is_empty() || object.contains_key("auths") {
            object.insert("auths".to_owned(), Value::Object(auths));
        }
        if config == before {
            return Ok(());
        }
        write_private(&self.file, &config)
            .map_err(|error| self.failed(format!("cannot write {shown}: {error}")))
    }
}

/// Replaces a file by one that only its owner can read. A symbolic link stays one.
fn write_private(path: &Path, value: &Value) -> std::io::Result<()> {
    let path = path.canonicalize().unwrap_or_else(|_| path.to_owned());
    if let Some(dir) = path.parent() {
        DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
    }
    let mut text = Vec::new();
    let formatter = PrettyFormatter::with_indent(b"\t");
    value.serialize(&mut Serializer::with_formatter(&mut text, formatter))?;
    text.push(b'\n');
    let temporary = path.with_added_extension(format!("{}.tmp", std::process::id()));
    let write = || {
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&temporary)?;
        file.write_all(&text)?;
        // With the home directory of somebody else, as sudo may leave it, the file stays theirs.
        let owner =
            fs::metadata(&path).or_else(|_| fs::metadata(path.parent().unwrap_or(&path)))?;
        fchown(&file, Some(owner.uid()), Some(owner.gid()))?;
        file.sync_all()?;
        fs::rename(&temporary, &path)
    };
    let written = write();
    if written.is_err() {
        // The first error matters more.
        let _ = fs::remove_file(&temporary);
    }
    written
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn account(dir: &Path, registry: &str) -> Account {
        Account {
            file: dir.join("docker/config.json"),
            registry: RegistryReference::of_registry(registry).unwrap(),
        }
    }

    #[test]
    fn what_is_stored_is_found_and_forgotten() {
        let dir = tempfile::tempdir().unwrap();
        assert!(!account(dir.path(), "x.org").forget().unwrap());
        assert!(!dir.path().join("docker").exists());
        for registry in ["docker.io", "localhost:5000", "https://ghcr.io/v2/"] {
            let account = account(dir.path(), registry);
            assert_eq!(account.stored().unwrap(), None);
            account.store("user", "pass:word").unwrap();
            let stored = Some(("user".to_owned(), "pass:word".to_owned()));
            assert_eq!(account.stored().unwrap(), stored);
        }
        let file = dir.path().join("docker/config.json");
        let mode = fs::metadata(&file).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let text = fs::read_to_string(&file).unwrap();
        assert!(text.contains("https://index.docker.io/v1/"), "{text}");
        let hub = account(dir.path(), "index.docker.io");
        assert!(hub.forget().unwrap());
        assert!(!hub.forget().unwrap());
        assert_eq!(hub.stored().unwrap(), None);
        assert!(account(dir.path(), "ghcr.io").stored().unwrap().is_some());
    }

    #[test]
    fn the_rest_of_dockers_configuration_stays() {
        let dir = tempfile::tempdir().unwrap();
        let account = account(dir.path(), "x.org");
        fs::create_dir(dir.path().join("docker")).unwrap();
        let real = dir.path().join("real.json");
        std::os::unix::fs::symlink(&real, &account.file).unwrap();
        fs::write(
            &real,
            r#"{"psFormat":"x","auths":{"http://x.org/v2/":{"auth":"b2xkOm9sZA=="},"y.org":{}}}"#,
        )
        .unwrap();
        account.store("a", "b").unwrap();
        let config: Value = serde_json::from_slice(&fs::read(&real).unwrap()).unwrap();
        assert_eq!(
            config,
            json!({"psFormat": "x", "auths": {"y.org": {}, "x.org": {"auth": "YTpi"}}})
        );
        for unusable in ["[]", "{", r#"{"auths":[]}"#] {
            fs::write(&real, unusable).unwrap();
            assert!(account.store("a", "b").is_err());
            assert_eq!(fs::read_to_string(&real).unwrap(), unusable);
        }
    }

    #[test]
    fn a_registry_is_named_as_docker_names_it() {
        for (text, registry) in [
            ("docker.io", "docker.io"),
            ("https://index.docker.io/v1/", "docker.io"),
            ("localhost:5000", "localhost:5000"),
            ("http://x.org/v2/", "x.org"),
            ("registry", "registry"),
        ] {
            let parsed = RegistryReference::of_registry(text).unwrap();
            assert_eq!(parsed.registry, registry, "{text}");
        }
        for bad in ["", "a b", "x:y", "-x"] {
            assert!(RegistryReference::of_registry(bad).is_err(), "{bad}");
        }
    }
}
