//! The command line, which is Go's: `-name value` and `-name=value`, with one or two dashes, and a
//! word for the action.

use std::ffi::OsString;
use std::path::PathBuf;

use hull_sandbox::{Error, Result};

/// What containerd calls the shim with.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Flags {
    /// Namespace of containerd.
    pub namespace: String,
    /// Id of the container, or of the pod.
    pub id: String,
    /// containerd's gRPC socket: part of the name of the shim's own.
    pub address: String,
    /// Executable that publishes events where there is no ttrpc socket.
    pub publish_binary: PathBuf,
    /// The bundle, for `delete`; for others it is the working directory.
    pub bundle: Option<PathBuf>,
    /// Log more.
    pub debug: bool,
    /// Print the version.
    pub version: bool,
    /// Describe the runtime.
    pub info: bool,
    /// `start`, `delete`, or empty for the server.
    pub action: String,
}

impl Flags {
    /// Parses a command line, whose first word is the program.
    ///
    /// # Errors
    /// `InvalidArgument` for what containerd does not call a shim with.
    pub fn parse(arguments: &[OsString]) -> Result<Self> {
        let mut flags = Self::default();
        let mut words = arguments.iter().skip(1);
        while let Some(word) = words.next() {
            let word = utf8(word)?;
            let Some(name) = word.strip_prefix('-') else {
                flags.action = word.to_owned();
                break;
            };
            let name = name.strip_prefix('-').unwrap_or(name);
            let (name, value) = match name.split_once('=') {
                Some((name, value)) => (name, Some(value.to_owned())),
                None => (name, None),
            };
            let switch = match name {
                "debug" => Some(&mut flags.debug),
                "v" | "version" => Some(&mut flags.version),
                "info" => Some(&mut flags.info),
                _ => None,
            };
            if let Some(switch) = switch {
                *switch = !matches!(value.as_deref(), Some("false" | "0"));
                continue;
            }
            let value = match value {
                Some(value) => value,
                None => utf8(
                    words
                        .next()
                        .ok_or_else(|| Error::invalid(format!("flag needs a value: -{name}")))?,
                )?
                .to_owned(),
            };
            match name {
                "namespace" => flags.namespace = value,
                "id" => flags.id = value,
                "address" => flags.address = value,
                "publish-binary" => flags.publish_binary = value.into(),
                "bundle" => flags.bundle = Some(value.into()),
                // Where a shim is told its socket by others than containerd.
                "socket" => {}
                _ => {
                    return Err(Error::invalid(format!("unknown flag -{name}")).hint(
                        "containerd starts this program: configure runtime_type = \
                               \"io.containerd.hull.v2\"",
                    ));
                }
            }
        }
        Ok(flags)
    }

    /// The arguments for the server of the same container.
    pub fn for_server(&self) -> Vec<OsString> {
        let mut arguments: Vec<OsString> = Vec::new();
        for (name, value) in [
            ("-namespace", &self.namespace),
            ("-id", &self.id),
            ("-address", &self.address),
        ] {
            arguments.extend([name.into(), value.into()]);
        }
        arguments.extend(["-publish-binary".into(), self.publish_binary.clone().into()]);
        if self.debug {
            arguments.push("-debug".into());
        }
        arguments
    }
}

fn utf8(word: &OsString) -> Result<&str> {
    word.to_str()
        .ok_or_else(|| Error::invalid(format!("argument {word:?} is not UTF-8")))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn parse(line: &str) -> Result<Flags> {
        let words: Vec<OsString> = line.split(' ').map(Into::into).collect();
        Flags::parse(&words)
    }

    #[test]
    fn gos_notations_are_read_and_written_back() {
        let flags = parse(
            "shim -namespace k8s.io --address=/run/c.sock -publish-binary /usr/bin/containerd \
             -id abc -debug start",
        )
        .unwrap();
        assert_eq!(flags.namespace, "k8s.io");
        assert_eq!(flags.address, "/run/c.sock");
        assert!(flags.debug);
        assert_eq!(flags.action, "start");
        let mut words: Vec<OsString> = vec!["shim".into()];
        words.extend(flags.for_server());
        let server = Flags::parse(&words).unwrap();
        assert_eq!(
            server,
            Flags {
                action: String::new(),
                ..flags
            }
        );
        assert!(!parse("shim -debug=false -id x start").unwrap().debug);
        assert!(parse("shim -info").unwrap().info);
    }

    #[test]
    fn what_containerd_does_not_say_is_refused() {
        for line in ["shim -id", "shim -frobnicate x start"] {
            assert_eq!(
                parse(line).unwrap_err().kind,
                hull_sandbox::ErrorKind::InvalidArgument
            );
        }
    }
}
