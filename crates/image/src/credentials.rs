//! Registry credentials from Docker's configuration.
//!
//! Called by the registry source, once per pull or push, and by `login`. Reads
//! `$DOCKER_CONFIG/config.json` or `~/.docker/config.json` and runs the credential helpers named
//! there; writes nothing, and never includes a secret in a message.

use std::collections::HashMap;
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;

use crate::error::{Error, Result};

/// Key of Docker Hub in `config.json`.
const DOCKER_HUB: &str = "https://index.docker.io/v1/";

/// Source of credentials.
#[derive(Clone)]
pub struct Credentials(Kind);

#[derive(Clone)]
enum Kind {
    Anonymous,
    Docker(PathBuf),
    Fixed(String, String),
}

/// How to authenticate to a registry.
#[derive(Clone, PartialEq, Eq)]
pub(crate) enum Auth {
    /// Not at all.
    Anonymous,
    /// With a user and a password.
    Basic(String, String),
    /// With a token for the registry itself.
    Bearer(String),
}

impl std::fmt::Debug for Auth {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Anonymous => "Auth(anonymous)",
            Self::Basic(..) => "Auth(basic)",
            Self::Bearer(_) => "Auth(bearer)",
        })
    }
}

/// Credentials for one registry, and their description for messages.
pub(crate) struct Found {
    pub auth: Auth,
    pub description: String,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct Config {
    auths: HashMap<String, Entry>,
    cred_helpers: HashMap<String, String>,
    creds_store: Option<String>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct Entry {
    auth: String,
    username: String,
    password: String,
    identitytoken: String,
    registrytoken: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Helped {
    username: String,
    secret: String,
}

impl Credentials {
    /// Credentials from Docker's configuration.
    pub fn docker() -> Self {
        docker_config_file().map_or(Self(Kind::Anonymous), Self::docker_config)
    }

    /// Credentials from a file like Docker's `config.json`, which may be missing.
    pub fn docker_config(file: impl Into<PathBuf>) -> Self {
        Self(Kind::Docker(file.into()))
    }

    /// No credentials.
    pub fn anonymous() -> Self {
        Self(Kind::Anonymous)
    }

    /// The same credentials for every registry.
    pub fn basic(user: impl Into<String>, password: impl Into<String>) -> Self {
        Self(Kind::Fixed(user.into(), password.into()))
    }

    pub(crate) fn find(&self, registry: &str) -> Result<Found> {
        let anonymous = |why: &str| Found {
            auth: Auth::Anonymous,
            description: format!("(no credentials were given: {why})"),
        };
        match &self.0 {
            Kind::Anonymous => Ok(anonymous("none are known")),
            Kind::Fixed(user, password) => Ok(basic(user.clone(), password.clone(), "the caller")),
            Kind::Docker(path) => {
                let found = from_config(path, registry).map_err(|reason| Error::Credentials {
                    registry: registry.to_owned(),
                    reason,
                })?;
                Ok(found
                    .unwrap_or_else(|| anonymous(&format!("{} has none for it", path.display()))))
            }
        }
    }
}

impl std::fmt::Debug for Credentials {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self.0 {
            Kind::Anonymous => "Credentials(anonymous)",
            Kind::Docker(_) => "Credentials(docker)",
            Kind::Fixed(..) => "Credentials(fixed)",
        })
    }
}

fn basic(user: String, password: String, source: &str) -> Found {
    let description = format!("to the credentials of user \"{user}\" from {source}");
    Found {
        auth: Auth::Basic(user, password),
        description,
    }
}

/// Docker's configuration of this user.
pub(crate) fn docker_config_file() -> Option<PathBuf> {
    let dir = match std::env::var_os("DOCKER_CONFIG").filter(|dir| !dir.is_empty()) {
        Some(dir) => PathBuf::from(dir),
        None => std::env::home_dir()?.join(".docker"),
    };
    Some(dir.join("config.json"))
}

fn read_config(path: &Path) -> Result<Option<Config>, String> {
    let text = match std::fs::read(path) {
        Ok(text) => text,
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {
            return Ok(None);
        }
        Err(error) => return Err(format!("cannot read {}: {error}", path.display())),
    };
    serde_json::from_slice(&text)
        .map(Some)
        .map_err(|error| format!("{} is no Docker configuration: {error}", path.display()))
}

impl Config {
    /// The credential helper of a registry.
    fn helper(&self, registry: &str) -> Option<&str> {
        let helper = by_host(&self.cred_helpers, registry).or(self.creds_store.as_ref())?;
        Some(helper.as_str()).filter(|helper| !helper.is_empty())
    }
}

/// The credential helper that keeps the passwords of a registry.
pub(crate) fn helper_for(path: &Path, registry: &str) -> Result<Option<String>, String> {
    let config = read_config(path)?;
    Ok(config.and_then(|config| config.helper(registry).map(str::to_owned)))
}

fn from_config(path: &Path, registry: &str) -> Result<Option<Found>, String> {
    let Some(config) = read_config(path)? else {
        return Ok(None);
    };
    if let Some(helper) = config.helper(registry)
        && let Some(found) = ask_helper(helper, registry)?
    {
        return Ok(Some(found));
    }
    let Some(entry) = by_host(&config.auths, registry) else {
        return Ok(None);
    };
    let source = path.display().to_string();
    if !entry.registrytoken.is_empty() {
        let description = format!("to the token from {source}");
        return Ok(Some(Found {
            auth: Auth::Bearer(entry.registrytoken.clone()),
            description,
        }));
    }
    if !entry.identitytoken.is_empty() {
        return Err(format!(
            "not supported: identity token in {source} (log in with a password or access token)"
        ));
    }
    if entry.auth.is_empty() {
        let (user, password) = (entry.username.clone(), entry.password.clone());
        return Ok((!user.is_empty()).then(|| basic(user, password, &source)));
    }
    let malformed =
        || format!("the \"auth\" of {registry} in {source} is not base64 of user:password");
    let decoded = STANDARD
        .decode(entry.auth.trim())
        .map_err(|_| malformed())?;
    let decoded = String::from_utf8(decoded).map_err(|_| malformed())?;
    let (user, password) = decoded.split_once(':').ok_or_else(malformed)?;
    Ok(Some(basic(
        user.to_owned(),
        password.trim_end_matches('\0').to_owned(),
        &source,
    )))
}

/// The host of a key: keys can be hosts, or URLs as written by old versions of Docker.
pub(crate) fn host_of_key(key: &str) -> &str {
    let key = key
        .strip_prefix("https://")
        .or(key.strip_prefix("http://"))
        .unwrap_or(key);
    match key.split('/').next().unwrap_or(key) {
        "index.docker.io" | "registry-1.docker.io" => "docker.io",
        host => host,
    }
}

/// The key that Docker writes for a registry.
pub(crate) fn key_of(registry: &str) -> &str {
    match registry {
        "docker.io" => DOCKER_HUB,
        registry => registry,
    }
}

fn by_host<'m, T>(map: &'m HashMap<String, T>, registry: &str) -> Option<&'m T> {
    let exact = map.get(registry).or_else(|| map.get(key_of(registry)));
    exact.or_else(|| {
        // Docker keeps parts of a login by browser beside it; a key with a path is for a part.
        let is_token = |key: &str| key.ends_with("access-token") || key.ends_with("refresh-token");
        let keys = map.keys().filter(|key| !is_token(key));
        let of_host = keys.filter(|key| host_of_key(key) == registry);
        of_host
            .min_by_key(|key| (key.len(), key.as_str()))
            .and_then(|key| map.get(key))
    })
}

/// Asks a credential helper.
fn ask_helper(name: &str, registry: &str) -> Result<Option<Found>, String> {
    let Some(answer) = run_helper(name, "get", key_of(registry).as_bytes())? else {
        return Ok(None);
    };
    let program = format!("docker-credential-{name}");
    let helped: Helped = serde_json::from_slice(&answer)
        .map_err(|_| format!("{program} did not answer with a user name and a secret"))?;
    if helped.username == "<token>" {
        return Err(format!("not supported: {program} gave an identity token"));
    }
    Ok(Some(basic(helped.username, helped.secret, &program)))
}

/// Runs `docker-credential-NAME ACTION` with an input. What it answers; `None` if it has no
/// credentials.
pub(crate) fn run_helper(
    name: &str,
    action: &str,
    input: &[u8],
) -> Result<Option<Vec<u8>>, String> {
    let program = format!("docker-credential-{name}");
    if name.contains('/') {
        return Err(format!("\"{name}\" is no name of a credential helper"));
    }
    let failed = |error: std::io::Error| format!("{program}: {error}");
    let mut child = Command::new(&program)
        .arg(action)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(failed)?;
    if let Some(mut stdin) = child.stdin.take() {
        // A helper that does not read its input reports the reason in its output.
        let _ = stdin.write_all(input);
    }
    let output = child.wait_with_output().map_err(failed)?;
    if !output.status.success() {
        let said = [output.stdout, output.stderr].concat();
        let said = String::from_utf8_lossy(&said).trim().to_owned();
        return match said.contains("credentials not found") {
            true => Ok(None),
            false => Err(format!("{program} failed ({}): {said}", output.status)),
        };
    }
    Ok(Some(output.stdout))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn find(config: &str, registry: &str) -> Result<Found> {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("config.json");
        std::fs::write(&file, config).unwrap();
        Credentials::docker_config(file).find(registry)
    }

    fn user(found: &Found) -> Option<(&str, &str)> {
        match &found.auth {
            Auth::Basic(user, password) => Some((user, password)),
            _ => None,
        }
    }

    #[test]
    fn auths_are_found_by_host() {
        // user:pass:word
        let config = r#"{"auths":{
            "https://index.docker.io/v1/":{"auth":"dXNlcjpwYXNzOndvcmQ="},
            "localhost:5000":{"username":"a","password":"b"},
            "http://old.example/v2/":{"username":"c","password":"d"}}}"#;
        assert_eq!(
            user(&find(config, "docker.io").unwrap()),
            Some(("user", "pass:word"))
        );
        assert_eq!(
            user(&find(config, "localhost:5000").unwrap()),
            Some(("a", "b"))
        );
        assert_eq!(
            user(&find(config, "old.example").unwrap()),
            Some(("c", "d"))
        );
        assert_eq!(find(config, "ghcr.io").unwrap().auth, Auth::Anonymous);
        assert!(
            find(config, "docker.io")
                .unwrap()
                .description
                .contains("\"user\"")
        );
    }

    #[test]
    fn missing_and_broken_files() {
        let missing = Credentials::docker_config("/nonexistent/config.json")
            .find("x.org")
            .unwrap();
        assert_eq!(missing.auth, Auth::Anonymous);
        for broken in [
            "{",
            r#"{"auths":{"x.org":{"auth":"%%%"}}}"#,
            r#"{"auths":{"x.org":{"auth":"eA=="}}}"#,
        ] {
            assert!(
                matches!(find(broken, "x.org"), Err(Error::Credentials { .. })),
                "{broken}"
            );
        }
        let token = r#"{"auths":{"x.org":{"auth":"","identitytoken":"t"}}}"#;
        assert!(
            find(token, "x.org")
                .err()
                .unwrap()
                .to_string()
                .contains("not supported")
        );
    }

    #[test]
    fn a_missing_helper_is_named() {
        let config = r#"{"credHelpers":{"x.org":"hull-test-missing"}}"#;
        let error = find(config, "x.org").err().unwrap().to_string();
        assert!(
            error.contains("docker-credential-hull-test-missing"),
            "{error}"
        );
        assert!(find(config, "y.org").is_ok());
        assert!(find(r#"{"credsStore":"../x"}"#, "y.org").is_err());
    }
}
