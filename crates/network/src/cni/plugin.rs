//! One call of one plugin: its input and how its answer is read.

use std::ffi::{OsStr, OsString};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::attachment::Attachment;
use super::error::{Error, Fault, Result, one_line};
use super::list::{List, Plugin};
use super::outcome::CniResult;
use super::process::{self, Output};

/// Default plugin directories: upstream's, Debian's, Fedora's.
pub const PLUGIN_DIRECTORIES: [&str; 3] = ["/opt/cni/bin", "/usr/lib/cni", "/usr/libexec/cni"];

/// Operation of a plugin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// Attach.
    Add,
    /// Check that the attachment is as it was created.
    Check,
    /// Remove an attachment, also a partial one.
    Del,
}

impl Command {
    /// The value of `CNI_COMMAND`.
    pub fn name(self) -> &'static str {
        match self {
            Command::Add => "ADD",
            Command::Check => "CHECK",
            Command::Del => "DEL",
        }
    }
}

/// `portmap` runs iptables several times for each port: 100 ports take 9 s, and more take longer
/// each.
const TIMEOUT_PER_PORT: Duration = Duration::from_secs(1);

/// How plugins are run.
#[derive(Clone, Debug)]
pub struct Runner {
    /// Directories searched for plugins, in this order.
    pub directories: Vec<PathBuf>,
    /// Timeout of each call, without published ports.
    pub limit: Duration,
    /// Cancels when it becomes readable: the running plugin is killed.
    pub cancel: Option<Arc<OwnedFd>>,
    /// Inherited by plugins and by what they start. With a lock on it, others can tell when all of
    /// them have ended, also when the caller was killed.
    pub held: Option<Arc<OwnedFd>>,
}

impl Default for Runner {
    fn default() -> Runner {
        Runner {
            directories: PLUGIN_DIRECTORIES.map(PathBuf::from).to_vec(),
            limit: Duration::from_secs(30),
            cancel: None,
            held: None,
        }
    }
}

/// Parameters of one call.
pub(super) struct Call<'a> {
    pub list: &'a List,
    pub attachment: &'a Attachment,
    pub command: Command,
    /// `None` when the namespace is gone.
    pub netns: Option<&'a Path>,
    pub previous: Option<&'a CniResult>,
}

impl Runner {
    /// Finds the plugin's executable.
    pub(super) fn find(&self, list: &List, plugin: &Plugin) -> Result<PathBuf> {
        self.directories
            .iter()
            .map(|directory| directory.join(&plugin.kind))
            .find(|path| path.is_file())
            .ok_or_else(|| Error::NoPlugin {
                network: list.name().to_owned(),
                plugin: plugin.kind.clone(),
                directories: self.directories.clone(),
            })
    }

    /// Fails if a plugin of the network is not installed: `NoPlugin` for the first one.
    pub fn require(&self, list: &List) -> Result<()> {
        list.plugins
            .iter()
            .try_for_each(|plugin| self.find(list, plugin).map(drop))
    }

    /// Runs one plugin. The output is meaningful for [`Command::Add`] only.
    pub(super) fn call(&self, call: &Call<'_>, plugin: &Plugin) -> Result<Vec<u8>> {
        let Call {
            list,
            attachment,
            command,
            ..
        } = call;
        let path = self.find(list, plugin)?;
        let refused = |why: String| Error::Refused {
            network: list.name().to_owned(),
            why,
        };
        let plugin_path = std::env::join_paths(&self.directories).map_err(|error| {
            refused(format!("the directories of plugins make no path: {error}"))
        })?;
        let arguments: Vec<String> = attachment
            .args
            .iter()
            .map(|(name, value)| format!("{name}={value}"))
            .collect();
        let arguments = arguments.join(";");
        let search_path = search_path();
        let environment: [(&str, &OsStr); 7] = [
            ("CNI_COMMAND", command.name().as_ref()),
            ("CNI_CONTAINERID", attachment.container_id.as_ref()),
            (
                "CNI_NETNS",
                call.netns.map_or(OsStr::new(""), Path::as_os_str),
            ),
            ("CNI_IFNAME", attachment.ifname.as_ref()),
            ("CNI_ARGS", arguments.as_ref()),
            ("CNI_PATH", &plugin_path),
            ("PATH", &search_path),
        ];
        let config = Value::Object(execution_config(call, plugin)).to_string();
        let ports = u32::try_from(attachment.port_mappings.len()).unwrap_or(u32::MAX);
        let began = Instant::now();
        let answer = process::run(
            &path,
            &[],
            &environment,
            config.as_bytes(),
            self.limit
                .saturating_add(TIMEOUT_PER_PORT.saturating_mul(ports)),
            self.cancel.as_deref(),
            self.held.as_deref(),
        );
        tracing::debug!(
            network = list.name(),
            plugin = plugin.kind,
            command = command.name(),
            container = attachment.container_id,
            took = ?began.elapsed(),
            stderr = answer.as_ref().map(|output| last_lines(&output.stderr)).unwrap_or_default(),
            "CNI plugin"
        );
        answer
            .and_then(|output| {
                if output.status.success() {
                    Ok(output.stdout)
                } else {
                    Err(fault(&output))
                }
            })
            .map_err(|fault| failed(call, plugin, fault))
    }
}

/// The error of a plugin.
pub(super) fn failed(call: &Call<'_>, plugin: &Plugin, fault: Fault) -> Error {
    Error::Plugin {
        network: call.list.name().to_owned(),
        plugin: plugin.kind.clone(),
        command: call.command,
        fault,
    }
}

/// The plugin's input: its configuration as written, without the runtime's fields and with the
/// fields that the runtime adds.
fn execution_config(call: &Call<'_>, plugin: &Plugin) -> Map<String, Value> {
    let mut config = plugin.config.clone();
    config.remove("capabilities");
    config.insert("cniVersion".to_owned(), json!(call.list.version.name()));
    config.insert("name".to_owned(), json!(call.list.name()));
    if let Some(previous) = call.previous {
        config.insert("prevResult".to_owned(), previous.as_json().clone());
    }
    let mut arguments = call.attachment.capability_arguments(call.list.name());
    arguments.retain(|name, _| plugin.has_capability(name));
    if !arguments.is_empty() {
        config.insert("runtimeConfig".to_owned(), Value::Object(arguments));
    }
    config
}

/// The error that a failed plugin wrote, or its last output.
fn fault(output: &Output) -> Fault {
    #[derive(Deserialize)]
    struct Answer {
        #[serde(default)]
        code: u64,
        msg: String,
        #[serde(default)]
        details: String,
    }
    match serde_json::from_slice::<Answer>(&output.stdout) {
        Ok(answer) if !answer.msg.is_empty() || !answer.details.is_empty() => Fault::Answer {
            code: answer.code,
            message: one_line(&answer.msg),
            details: one_line(&answer.details),
        },
        _ => {
            // Some plugins write plain text, some of them to stdout.
            let said = [&output.stderr, &output.stdout].map(|text| last_lines(text));
            let said = said
                .into_iter()
                .find(|text| !text.is_empty())
                .unwrap_or_default();
            Fault::Died {
                status: output.status,
                said,
            }
        }
    }
}

/// The last lines of a plugin's output, joined into one.
fn last_lines(text: &[u8]) -> String {
    const MOST: usize = 3;
    let text = String::from_utf8_lossy(text);
    let lines: Vec<String> = text
        .lines()
        .map(one_line)
        .filter(|line| !line.is_empty())
        .collect();
    lines[lines.len().saturating_sub(MOST)..].join("; ")
}

/// The caller's `PATH`, plus the usual directories of `iptables`.
fn search_path() -> OsString {
    let own = std::env::var_os("PATH").unwrap_or_default();
    let mut directories: Vec<PathBuf> = std::env::split_paths(&own)
        .filter(|path| path.is_absolute())
        .collect();
    for directory in
        ["/usr/local/sbin", "/usr/sbin", "/usr/bin", "/sbin", "/bin"].map(PathBuf::from)
    {
        if !directories.contains(&directory) {
            directories.push(directory);
        }
    }
    std::env::join_paths(directories).unwrap_or(own)
}
