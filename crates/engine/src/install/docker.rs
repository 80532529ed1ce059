//! Docker has one file, which is not hull's alone.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use super::drop_in::taken;
use super::json::Object;
use super::{Change, EXECUTABLE, RUNTIME, read};
use crate::error::{Error, Result};

const PATH: &str = "etc/docker/daemon.json";
const RUNTIMES: &str = "runtimes";
const DEFAULT: &str = "default-runtime";

/// The file as it is.
struct Daemon {
    path: PathBuf,
    text: String,
    outer: Object,
    value: Map<String, Value>,
}

impl Daemon {
    fn read(root: &Path) -> Result<Option<Daemon>> {
        let path = root.join(PATH);
        let Some(text) = read(&path)? else {
            return Ok(None);
        };
        let wrong = |why: &str| {
            Error::new(format!("{} is not Docker's JSON: {why}", path.display()))
                .hint("dockerd does not start with it either: mend it first")
        };
        let value: Value =
            serde_json::from_str(&text).map_err(|error| wrong(&error.to_string()))?;
        let Value::Object(value) = value else {
            return Err(wrong("it is not an object"));
        };
        let outer = Object::outermost(&text).ok_or_else(|| wrong("it is not an object"))?;
        for name in [RUNTIMES, DEFAULT] {
            if outer.count(name) > 1 {
                return Err(wrong(&format!("it has {name:?} more than once")));
            }
        }
        match value.get(RUNTIMES) {
            None | Some(Value::Object(_)) => {}
            Some(_) => return Err(wrong("\"runtimes\" is not an object")),
        }
        Ok(Some(Daemon {
            path,
            text,
            outer,
            value,
        }))
    }

    /// What the file says of hull's runtime.
    fn runtime(&self) -> Option<&Value> {
        self.value.get(RUNTIMES)?.get(RUNTIME)
    }

    fn change(self, after: Option<String>) -> Option<Change> {
        (after.as_ref() != Some(&self.text)).then_some(Change {
            path: self.path,
            before: Some(self.text),
            after,
            // Docker makes it itself when it needs it.
            directories: 1,
        })
    }
}

/// `{"path": RUNTIME}`, over several lines.
fn entry(runtime: &str) -> String {
    format!("{{\n  \"path\": {}\n}}", json!(runtime))
}

fn indented(text: &str) -> String {
    text.replace('\n', "\n  ")
}

pub(super) fn install(root: &Path, runtime: &str, default: bool) -> Result<Option<Change>> {
    let entry = entry(runtime);
    let runtimes = format!("{{\n  \"{RUNTIME}\": {}\n}}", indented(&entry));
    let Some(daemon) = Daemon::read(root)? else {
        let mut text = format!("{{\n  \"{RUNTIMES}\": {}", indented(&runtimes));
        if default {
            text.push_str(&format!(",\n  \"{DEFAULT}\": \"{RUNTIME}\""));
        }
        text.push_str("\n}\n");
        return Ok(Some(Change {
            path: root.join(PATH),
            before: None,
            after: Some(text),
            directories: 0,
        }));
    };
    let mut after = daemon.text.clone();
    match daemon.runtime() {
        None => {
            after = match daemon.outer.object(&after, RUNTIMES) {
                Some(object) => object.add(&after, RUNTIME, &entry),
                None => daemon.outer.add(&after, RUNTIMES, &runtimes),
            }
        }
        Some(old) if old.get("path").and_then(Value::as_str) == Some(runtime) => {}
        Some(old) => {
            let other = old.get("path").and_then(Value::as_str);
            let other = other.map_or_else(|| old.to_string(), str::to_owned);
            return Err(taken(&daemon.path, &other)
                .hint("hull uninstall docker, or remove it, then hull install docker again"));
        }
    }
    if default {
        match daemon.value.get(DEFAULT) {
            None => {
                // The text has changed.
                after = Object::outermost(&after)
                    .map(|outer| outer.add(&after, DEFAULT, &json!(RUNTIME).to_string()))
                    .unwrap_or(after);
            }
            Some(old) if old == RUNTIME => {}
            Some(old) => {
                return Err(Error::new(format!(
                    "{} has the default runtime {old} already",
                    daemon.path.display()
                ))
                .hint(format!(
                    "remove \"{DEFAULT}\" from it, or leave out --default"
                )));
            }
        }
    }
    Ok(daemon.change(Some(after)))
}

pub(super) fn uninstall(root: &Path) -> Result<Option<Change>> {
    let Some(daemon) = Daemon::read(root)? else {
        return Ok(None);
    };
    let Some(runtime) = daemon.runtime() else {
        return Ok(None);
    };
    let path = runtime.get("path").and_then(Value::as_str);
    let is_hulls = path.is_some_and(|path| Path::new(path).ends_with(EXECUTABLE))
        && runtime.as_object().is_some_and(|object| object.len() == 1);
    if !is_hulls {
        return Err(Error::new(format!(
            "the runtime {RUNTIME:?} in {} is not as hull wrote it: {runtime}",
            daemon.path.display()
        ))
        .hint("remove it by hand"));
    }
    let after = without_runtime(&daemon);
    Ok(daemon.change(after))
}

/// The text without what hull wrote; `None` when nothing is left that was there before.
fn without_runtime(daemon: &Daemon) -> Option<String> {
    let mut text = daemon.text.clone();
    if daemon
        .value
        .get(DEFAULT)
        .is_some_and(|value| value == RUNTIME)
    {
        text = daemon.outer.without(&text, DEFAULT)?;
    }
    let outer = Object::outermost(&text)?;
    match outer.object(&text, RUNTIMES)?.without(&text, RUNTIME) {
        Some(text) => Some(text),
        None => outer.without(&text, RUNTIMES),
    }
}
