//! containerd: one file that everybody writes into, so hull has a marked block at its end. What is
//! before stays as it is, byte for byte.

use std::path::Path;

use toml::Value;

use super::{Change, RUNTIME, missing_directories, read};
use crate::error::{Error, Result};

/// The file, relative to the root directory.
const PATH: &str = "etc/containerd/config.toml";

const BEGIN: &str =
    "# Written by \"hull install containerd\"; \"hull uninstall containerd\" takes it back.\n";
const END: &str = "# End of what hull has written.\n";

/// How the line begins that remembers the directories that were made for the file.
const DIRECTORIES: &str = "# Directories made for this file: ";

/// The line that remembers that the file did not end with an end of line.
const UNENDED: &str = "# The line before had no end.\n";

/// What a file begins with that hull has made.
const NEW: &str = "version = 2\n\n";

/// The type of the runtime: containerd looks for `containerd-shim-hull-v2` in its PATH.
const TYPE: &str = "io.containerd.hull.v2";

/// The type of containerd's own default runtime.
const RUNC: &str = "io.containerd.runc.v2";

/// The CRI plugin by the version of the file's format.
fn plugin(version: i64) -> Option<&'static str> {
    match version {
        2 => Some("io.containerd.grpc.v1.cri"),
        3 => Some("io.containerd.cri.v1.runtime"),
        _ => None,
    }
}

/// The runtimes that a configuration names.
fn runtimes<'a>(value: &'a Value, plugin: &str) -> Option<&'a Value> {
    let containerd = value.get("plugins")?.get(plugin)?.get("containerd")?;
    containerd.get("runtimes")
}

/// What a configuration says of the runtime: its type.
fn known(value: &Value, plugin: &str) -> Option<String> {
    let runtime = runtimes(value, plugin)?.get(RUNTIME)?;
    Some(runtime.get("runtime_type")?.as_str()?.to_owned())
}

/// What hull writes.
#[derive(Clone, Copy)]
struct Block {
    /// How many directories were made for the file; `None` when it was there.
    directories: Option<usize>,
    /// The file before had no end of its last line.
    unended: bool,
    /// The file named no runtime. containerd then has runc; once one is named, only those that are.
    alone: bool,
}

impl Block {
    fn text(self, plugin: &str) -> String {
        let directories = self
            .directories
            .map(|count| format!("{DIRECTORIES}{count}\n"))
            .unwrap_or_default();
        let unended = if self.unended { UNENDED } else { "" };
        let table = |name: &str, kind: &str| {
            format!(
                "[plugins.\"{plugin}\".containerd.runtimes.{name}]\n  runtime_type = \"{kind}\"\n"
            )
        };
        let runc = match self.alone {
            true => table("runc", RUNC),
            false => String::new(),
        };
        let own = table(RUNTIME, TYPE);
        format!("{BEGIN}{directories}{unended}{runc}{own}{END}")
    }
}

pub(super) fn install(root: &Path, default: bool) -> Result<Option<Change>> {
    if default {
        return Err(
            Error::unsupported("--default for containerd: pods choose their runtime")
                .hint("a RuntimeClass with handler: hull; ctr run --runtime io.containerd.hull.v2"),
        );
    }
    let path = root.join(PATH);
    let before = read(&path)?;
    let directories = before.is_none().then(|| missing_directories(&path));
    let text = before.clone().unwrap_or_else(|| NEW.to_owned());
    let value: Value = toml::from_str(&text).map_err(|error| {
        Error::new(format!(
            "{} is not TOML: {}",
            path.display(),
            error.message()
        ))
        .hint("hull adds nothing to a configuration that containerd cannot read")
    })?;
    let version = value.get("version").and_then(Value::as_integer);
    let Some(plugin) = version.and_then(plugin) else {
        return Err(Error::unsupported(format_args!(
            "{} has version {} of its format, and 2 and 3 are known",
            path.display(),
            version.unwrap_or(1)
        ))
        .hint("containerd config migrate"));
    };
    match known(&value, plugin) {
        Some(kind) if kind == TYPE => return Ok(None),
        Some(other) => return Err(super::drop_in::taken(&path, &other)),
        None => {}
    }
    let unended = !text.is_empty() && !text.ends_with('\n');
    let newline = if unended { "\n" } else { "" };
    let block = Block {
        directories,
        unended,
        alone: runtimes(&value, plugin).is_none(),
    };
    let after = format!("{text}{newline}{}", block.text(plugin));
    // A table that is written in one line cannot be added to.
    let fits = toml::from_str::<Value>(&after).is_ok_and(|value| known(&value, plugin).is_some());
    if !fits {
        return Err(Error::unsupported(format_args!(
            "{} writes the runtimes of plugin {plugin} in one line",
            path.display()
        ))
        .hint(format!(
            "add {RUNTIME} = {{ runtime_type = \"{TYPE}\" }} to them by hand"
        )));
    }
    Ok(Some(Change {
        path,
        before,
        after: Some(after),
        directories: 0,
    }))
}

pub(super) fn uninstall(root: &Path) -> Result<Option<Change>> {
    let path = root.join(PATH);
    let Some(before) = read(&path)? else {
        return Ok(None);
    };
    let Some((head, rest)) = before.split_once(BEGIN) else {
        return Ok(None);
    };
    let changed = || {
        Error::new(format!(
            "what hull has written into {} is not as it was: somebody has changed it",
            path.display()
        ))
        .hint("remove it by hand, with its first line")
    };
    let (own, tail) = rest.split_once(END).ok_or_else(changed)?;
    let directories = own
        .lines()
        .find_map(|line| line.strip_prefix(DIRECTORIES)?.parse().ok());
    let block = Block {
        directories,
        unended: own.contains(UNENDED),
        alone: own.contains(RUNC),
    };
    let written = [2, 3]
        .into_iter()
        .filter_map(plugin)
        .any(|plugin| block.text(plugin) == format!("{BEGIN}{own}{END}"));
    if !written {
        return Err(changed());
    }
    let head = match block.unended {
        true => head.strip_suffix('\n').unwrap_or(head),
        false => head,
    };
    let after = format!("{head}{tail}");
    let made_by_hull = directories.is_some() && after == NEW;
    Ok(Some(Change {
        path,
        directories: directories.unwrap_or_default(),
        after: (!made_by_hull).then_some(after),
        before: Some(before),
    }))
}
