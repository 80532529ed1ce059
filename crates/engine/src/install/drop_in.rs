//! Engines that read a directory of files: hull has a file of its own there. Whether it is still as
//! hull wrote it shows when it is written again from what it says.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use toml::Value;

use super::{Change, RUNTIME, missing_directories, read};
use crate::error::{Context, Error, Result};

/// What distinguishes such engines. Paths are relative to the root directory.
pub(super) struct DropIn {
    /// As an argument of `hull install`.
    pub command: &'static str,
    /// hull's file.
    pub path: &'static str,
    /// The file that is read before the directory.
    pub main: &'static str,
    /// The text of hull's file, below its head.
    pub render: fn(runtime: &str, default: bool) -> String,
    /// The path of the runtime, in any of the engine's files.
    pub runtime: fn(&Value) -> Option<String>,
    /// The name of the default runtime, likewise.
    pub default: fn(&Value) -> Option<String>,
}

/// A string of a TOML file.
pub(super) fn text(value: &Value) -> Option<String> {
    value.as_str().map(str::to_owned)
}

/// A string as TOML writes it.
pub(super) fn quoted(text: &str) -> String {
    Value::from(text).to_string()
}

/// How the line begins that remembers the directories.
const DIRECTORIES: &str = "# Directories made for this file: ";

/// What hull's file says.
#[derive(Debug, PartialEq, Eq)]
struct Written {
    runtime: String,
    default: bool,
    /// How many directories were made for it.
    directories: usize,
}

impl DropIn {
    fn write(&self, written: &Written) -> String {
        let command = self.command;
        let mut text = format!(
            "# Written by \"hull install {command}\"; \"hull uninstall {command}\" takes it back.\n"
        );
        if written.directories > 0 {
            text.push_str(&format!("{DIRECTORIES}{}\n", written.directories));
        }
        text.push('\n');
        text.push_str(&(self.render)(&written.runtime, written.default));
        text
    }

    /// What a text says, if it is as hull wrote it.
    fn understand(&self, text: &str) -> Option<Written> {
        let value: Value = toml::from_str(text).ok()?;
        let directories = text
            .lines()
            .find_map(|line| line.strip_prefix(DIRECTORIES)?.parse().ok());
        let written = Written {
            runtime: (self.runtime)(&value)?,
            default: (self.default)(&value).is_some(),
            directories: directories.unwrap_or(0),
        };
        (self.write(&written) == text).then_some(written)
    }

    /// hull's own file, or that it is not as hull wrote it.
    fn own(&self, path: &Path) -> Result<Option<(String, Written)>> {
        let Some(text) = read(path)? else {
            return Ok(None);
        };
        match self.understand(&text) {
            Some(written) => Ok(Some((text, written))),
            None => Err(Error::new(format!(
                "{} is not as hull wrote it: somebody has changed it",
                path.display()
            ))
            .hint("put what is yours into another file of the directory, and remove this one")),
        }
    }

    /// Finds the runtime's name in the engine's other files, with another path.
    fn check_others(&self, root: &Path, runtime: &str) -> Result<()> {
        let own = root.join(self.path);
        let mut files = vec![root.join(self.main)];
        if let Some(directory) = own.parent() {
            files.extend(files_of(directory)?);
        }
        for file in files.into_iter().filter(|file| *file != own) {
            let Some(text) = read(&file)? else { continue };
            let value: Value = toml::from_str(&text).map_err(|error| {
                Error::new(format!(
                    "{} is not TOML: {}",
                    file.display(),
                    error.message()
                ))
                .hint("hull adds nothing to a configuration that the engine cannot read")
            })?;
            if let Some(other) = (self.runtime)(&value)
                && other != runtime
            {
                return Err(taken(&file, &other));
            }
        }
        Ok(())
    }
}

/// A runtime of hull's name leads elsewhere.
pub(super) fn taken(file: &Path, other: &str) -> Error {
    Error::new(format!(
        "{} has a runtime {RUNTIME:?} already, which is {other}",
        file.display()
    ))
}

fn files_of(directory: &Path) -> Result<Vec<PathBuf>> {
    let what = || format!("cannot read {}", directory.display());
    let entries = match fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error).context(what),
    };
    let mut files = Vec::new();
    for entry in entries {
        let path = entry.context(what)?.path();
        if path
            .extension()
            .is_some_and(|extension| extension == "conf")
        {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

pub(super) fn install(
    engine: &DropIn,
    root: &Path,
    runtime: &str,
    default: bool,
) -> Result<Option<Change>> {
    engine.check_others(root, runtime)?;
    let path = root.join(engine.path);
    let (before, written) = match engine.own(&path)? {
        None => (
            None,
            Written {
                runtime: runtime.to_owned(),
                default,
                directories: missing_directories(&path),
            },
        ),
        Some((_, old)) if old.runtime != runtime => {
            return Err(taken(&path, &old.runtime).hint(format!(
                "hull uninstall {0}, then hull install {0} again",
                engine.command
            )));
        }
        Some((_, old)) if old.default || !default => return Ok(None),
        Some((text, old)) => (
            Some(text),
            Written {
                default: true,
                ..old
            },
        ),
    };
    Ok(Some(Change {
        path,
        before,
        after: Some(engine.write(&written)),
        directories: 0,
    }))
}

pub(super) fn uninstall(engine: &DropIn, root: &Path) -> Result<Option<Change>> {
    let path = root.join(engine.path);
    Ok(engine.own(&path)?.map(|(text, written)| Change {
        path,
        before: Some(text),
        after: None,
        directories: written.directories,
    }))
}
