//! `hull info`: what there is on this host.

use hull_engine::info;
use serde_json::Value;

use super::config_for_existing;
use crate::error::Result;
use crate::format::ObjectFormat;
use crate::images;
use crate::output::{self, binary_size};

/// Arguments of `info`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Print JSON
    #[arg(long, conflicts_with = "format")]
    json: bool,
    /// Print with a template of Go's, such as '{{.ServerVersion}}', or "json"
    #[arg(short, long, value_name = "FORMAT", value_parser = ObjectFormat::parse)]
    format: Option<ObjectFormat>,
}

/// Prints what is known of the host, its machines, containers and images.
pub fn execute(args: Args) -> Result<u8> {
    let config = config_for_existing()?;
    let version = env!("CARGO_PKG_VERSION");
    let info = info::info(&config, &images::store(&config)?, version)?;
    match &args.format {
        Some(format) => output::print(format.line(&info)?)?,
        None if args.json => output::print_json(&info)?,
        None => {
            output::print(text(&info))?;
            let warnings = info["Warnings"].as_array().into_iter().flatten();
            for warning in warnings.filter_map(Value::as_str) {
                output::note(format!("warning: {warning}"));
            }
        }
    }
    Ok(0)
}

/// For people, as Docker shows it.
fn text(info: &Value) -> String {
    let mut text = String::new();
    let mut line = |depth: usize, name: &str, value: &Value| {
        let value = match value {
            Value::String(text) => output::printable(text),
            Value::Null => "none".to_owned(),
            other => other.to_string(),
        };
        text.push_str(&format!("{}{name}: {value}\n", " ".repeat(depth)));
    };
    line(0, "Containers", &info["Containers"]);
    for state in ["Running", "Paused", "Stopped"] {
        line(1, state, &info[format!("Containers{state}")]);
    }
    for (name, key) in [
        ("Images", "Images"),
        ("Volumes", "Volumes"),
        ("Server Version", "ServerVersion"),
        ("Storage Driver", "Driver"),
    ] {
        line(0, name, &info[key]);
    }
    line(1, "Backing Filesystem", &info["DriverStatus"][0][1]);
    for (name, key) in [
        ("Cgroup Version", "CgroupVersion"),
        ("Default Network", "DefaultNetwork"),
        ("Machine Kind", "Machine"),
        ("Default Machine", "DefaultMachine"),
    ] {
        line(0, name, &info[key]);
    }
    line(0, "Machines", &Value::from(""));
    for machine in info["Machines"].as_array().into_iter().flatten() {
        let works = if machine["Works"] == true {
            "works"
        } else {
            "does not work"
        };
        let details = machine["Details"].as_str().unwrap_or_default();
        let kind = machine["Kind"].as_str().unwrap_or_default();
        line(1, kind, &Value::from(format!("{works}: {details}")));
    }
    let memory = binary_size(info["MemTotal"].as_u64().unwrap_or(0));
    for (name, value) in [
        ("Kernel Version", &info["KernelVersion"]),
        ("Operating System", &info["OperatingSystem"]),
        ("OSType", &info["OSType"]),
        ("Architecture", &info["Architecture"]),
        ("CPUs", &info["NCPU"]),
        ("Total Memory", &Value::from(memory)),
        ("Name", &info["Name"]),
        ("ID", &info["ID"]),
        ("Data Directory", &info["DockerRootDir"]),
        ("Run Directory", &info["RunDir"]),
        ("Rootless", &info["Rootless"]),
    ] {
        line(0, name, value);
    }
    text.lines()
        .map(|line| format!("{}\n", line.trim_end()))
        .collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn text_for_people_has_dockers_shape() {
        let text = text(&json!({
            "Containers": 3, "ContainersRunning": 1, "ContainersPaused": 0, "ContainersStopped": 2,
            "Images": 1, "Driver": "overlayfs", "DriverStatus": [["Backing Filesystem", "ext4"]],
            "Machines": [
                {"Kind": "uml", "Works": true, "Details": "fast"},
                {"Kind": "kvm", "Works": false, "Details": "no /dev/kvm"},
            ],
            "MemTotal": 1 << 30, "NCPU": 2, "Name": "host\u{1b}",
        }));
        for part in [
            "Containers: 3\n Running: 1\n Paused: 0\n Stopped: 2\nImages: 1\n",
            "Storage Driver: overlayfs\n Backing Filesystem: ext4\n",
            "Machines:\n uml: works: fast\n kvm: does not work: no /dev/kvm\n",
            "CPUs: 2\nTotal Memory: 1GiB\nName: host\u{fffd}\n",
        ] {
            assert!(text.contains(part), "{text}");
        }
    }
}
