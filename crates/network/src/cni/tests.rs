//! Lists, attachments and their removal, with plugins that are small scripts, and with real ones.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::*;

mod lists;
mod plugins;
mod real;

/// A directory with scripts as plugins, and the files that record their calls.
struct House {
    directory: tempfile::TempDir,
    runner: Runner,
}

impl House {
    fn new() -> House {
        let directory = tempfile::tempdir().unwrap();
        let runner = Runner {
            directories: vec![directory.path().to_owned()],
            limit: Duration::from_secs(10),
            cancel: None,
            held: None,
        };
        House { directory, runner }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// A plugin that records its call, saves its input as `NAME.COMMAND`, and continues with
    /// `script`.
    fn plugin(&self, name: &str, script: &str) {
        let house = self.directory.path().display();
        let text = format!(
            "#!/bin/sh\necho \"$CNI_COMMAND {name}\" >>{house}/calls\ncat >{house}/{name}.$CNI_COMMAND\n{script}\n"
        );
        self.script(name, &text);
    }

    fn script(&self, name: &str, text: &str) {
        let path = self.path(name);
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    }

    fn calls(&self) -> Vec<String> {
        let text = fs::read_to_string(self.path("calls")).unwrap_or_default();
        text.lines().map(str::to_owned).collect()
    }

    fn input(&self, name: &str, command: &str) -> Value {
        serde_json::from_slice(&fs::read(self.path(&format!("{name}.{command}"))).unwrap()).unwrap()
    }
}

/// Script: the answer of a plugin that assigns an address.
const ANSWER: &str = r#"[ "$CNI_COMMAND" != ADD ] || echo '{"cniVersion": "1.0.0", "ips": [{"address": "10.1.0.2/24"}], "own": 7}'"#;

fn list(plugins: Value) -> List {
    versioned("1.0.0", plugins)
}

fn versioned(version: &str, plugins: Value) -> List {
    List::from_value(json!({ "cniVersion": version, "name": "x", "plugins": plugins })).unwrap()
}

fn attachment() -> Attachment {
    Attachment {
        container_id: "c1".into(),
        netns: "/proc/self/ns/net".into(),
        ifname: "eth0".into(),
        ..Attachment::default()
    }
}

fn record(list: List) -> Record {
    Record::new(list, attachment()).unwrap()
}
