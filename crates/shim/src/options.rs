//! Options of a runtime: `ConfigPath` in containerd's configuration of it, and of `ctr run
//! --runtime-config-path`, names a file to take for hull's own configuration.

use std::fs;
use std::path::{Path, PathBuf};

use containerd_shim_protos::bootstrap_api::BootstrapParams;
use hull_sandbox::{Context, Error, Result};
use protobuf::Message;
use protobuf::well_known_types::any::Any;

use crate::wire::{Value, fields, text};

/// The end of the name of the message (containerd's pkg/runtimeoptions/v1); older versions have
/// another beginning. Options of another type are other runtimes'.
const TYPE: &str = "runtimeoptions.v1.Options";

/// File of a bundle that remembers the configuration's path, for `delete`.
const FILE: &str = "hull-config";

/// The configuration that options name: those that containerd before 2.3 writes to standard input,
/// or an extension of the parameters of later ones.
///
/// # Errors
/// `InvalidArgument` when the options cannot be read, or name no absolute path; `Unsupported` when
/// they hold a configuration themselves.
pub fn config_path(input: &[u8], parameters: Option<&BootstrapParams>) -> Result<Option<PathBuf>> {
    let options = match parameters {
        None => Any::parse_from_bytes(input).into_iter().collect(),
        Some(parameters) => parameters
            .extensions
            .iter()
            .filter_map(|extension| extension.value.as_ref().cloned())
            .collect::<Vec<_>>(),
    };
    match options.into_iter().find(|any| any.type_url.ends_with(TYPE)) {
        Some(options) => read(&options.value),
        None => Ok(None),
    }
}

fn read(options: &[u8]) -> Result<Option<PathBuf>> {
    const CONFIG_PATH: u32 = 2;
    const CONFIG_BODY: u32 = 3;
    let (mut path, mut has_body) = (String::new(), false);
    fields(options, |number, value| {
        match (number, value) {
            (CONFIG_PATH, Value::Bytes(bytes)) => path = text(bytes),
            (CONFIG_BODY, Value::Bytes(bytes)) => has_body = !bytes.is_empty(),
            _ => {}
        }
        Ok(())
    })
    .map_err(|error| Error::invalid(format!("options of the runtime: {error}")))?;
    match path.as_str() {
        "" if has_body => Err(Error::unsupported(
            "options of the runtime that hold a configuration",
        )
        .hint("ConfigPath = \"/etc/hull/other.toml\"")),
        "" => Ok(None),
        path if path.starts_with('/') => Ok(Some(PathBuf::from(path))),
        path => Err(Error::invalid(format!(
            "options of the runtime: ConfigPath {path:?} is not an absolute path"
        ))),
    }
}

/// Remembers a configuration's path in a bundle.
///
/// # Errors
/// The file cannot be written.
pub fn remember(bundle: &Path, config: &Path) -> Result<()> {
    let file = bundle.join(FILE);
    fs::write(&file, config.as_os_str().as_encoded_bytes())
        .context(|| format!("write {}", file.display()))
}

/// The path that was remembered.
pub fn remembered(bundle: &Path) -> Option<PathBuf> {
    // A bundle without is one of the usual configuration.
    fs::read_to_string(bundle.join(FILE))
        .ok()
        .map(PathBuf::from)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn options(type_url: &str, value: &[u8]) -> Vec<u8> {
        Any {
            type_url: type_url.to_owned(),
            value: value.to_vec(),
            ..Any::default()
        }
        .write_to_bytes()
        .unwrap()
    }

    #[test]
    fn a_configuration_is_named_by_its_path() {
        let named = [0x12, 4, b'/', b'a', b'/', b'b'];
        for kind in [TYPE, "cri.runtimeoptions.v1.Options"] {
            let path = config_path(&options(kind, &named), None).unwrap();
            assert_eq!(path.as_deref(), Some(Path::new("/a/b")));
        }
        for (kind, value) in [("containerd.runc.v1.Options", &named[..]), (TYPE, &[])] {
            assert_eq!(config_path(&options(kind, value), None).unwrap(), None);
        }
        assert_eq!(config_path(&[], None).unwrap(), None);
        let relative = config_path(&options(TYPE, &[0x12, 1, b'a']), None).unwrap_err();
        assert!(
            relative.message.contains("not an absolute path"),
            "{relative}"
        );
        let body = config_path(&options(TYPE, &[0x1a, 1, b'a']), None).unwrap_err();
        assert_eq!(body.kind, hull_sandbox::ErrorKind::Unsupported);
    }

    #[test]
    fn a_bundle_remembers_its_configuration() {
        let bundle = tempfile::tempdir().unwrap();
        assert_eq!(remembered(bundle.path()), None);
        remember(bundle.path(), Path::new("/a/b")).unwrap();
        assert_eq!(
            remembered(bundle.path()).as_deref(),
            Some(Path::new("/a/b"))
        );
    }
}
