//! Tests of the installed plugins. A network namespace of the test stands for the host's, so that
//! nothing is left on the host.

use std::process::{Child, Command, Stdio};

use super::*;

/// A process in a new network namespace.
struct Namespace(Child);

impl Namespace {
    fn new() -> Option<Namespace> {
        let mut child = Command::new("unshare")
            .args(["--net", "sh", "-c", "echo ready; exec sleep 60"])
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .ok()?;
        let mut line = String::new();
        let read = std::io::BufRead::read_line(
            &mut std::io::BufReader::new(child.stdout.take()?),
            &mut line,
        );
        (read.is_ok() && line == "ready\n").then_some(Namespace(child))
    }

    fn path(&self) -> PathBuf {
        format!("/proc/{}/ns/net", self.0.id()).into()
    }

    fn ip(&self, arguments: &str) -> String {
        let pid = self.0.id().to_string();
        output(
            Command::new("nsenter")
                .args(["-n", "-t", &pid, "ip"])
                .args(arguments.split(' ')),
        )
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn output(command: &mut Command) -> String {
    let output = command.output().unwrap();
    assert!(
        output.status.success(),
        "{command:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Packet filter rules of all tables that concern a container.
fn rules_of(words: &[&str]) -> Vec<String> {
    let all = ["iptables-save", "ip6tables-save"].map(|program| output(&mut Command::new(program)));
    let lines = all.iter().flat_map(|text| text.lines());
    lines
        .filter(|line| words.iter().any(|word| line.contains(word)))
        .map(str::to_owned)
        .collect()
}

fn can_run() -> Result<(), &'static str> {
    if !rustix::process::geteuid().is_root() {
        return Err("not root");
    }
    let plugins = ["bridge", "host-local", "portmap", "firewall"];
    let runner = Runner::default();
    if !plugins.iter().all(|name| {
        runner
            .directories
            .iter()
            .any(|directory| directory.join(name).is_file())
    }) {
        return Err("containernetworking-plugins is not installed");
    }
    for program in ["iptables-save", "ip6tables-save"] {
        if !Command::new(program)
            .output()
            .is_ok_and(|output| output.status.success())
        {
            return Err("packet filters cannot be listed");
        }
    }
    if Namespace::new().is_none() {
        return Err("no new network namespace");
    }
    Ok(())
}

/// Runs a test of this executable again, in a network namespace that stands for the host's.
fn run_inside(variable: &str, test: &str) {
    let status = Command::new("unshare")
        .args([
            "--net",
            "sh",
            "-c",
            "ip link set lo up && exec \"$0\" --exact \"$1\" --nocapture",
        ])
        .arg(std::env::current_exe().unwrap())
        .arg(test)
        .env(variable, "1")
        .status()
        .unwrap();
    assert!(status.success(), "{status}");
}

#[test]
fn hulls_own_network_with_real_plugins() {
    const INSIDE: &str = "HULL_TEST_INSIDE";
    if std::env::var_os(INSIDE).is_none() {
        match can_run() {
            Ok(()) => run_inside(
                INSIDE,
                "cni::tests::real::hulls_own_network_with_real_plugins",
            ),
            Err(reason) => eprintln!("left out: hull's own network with real plugins: {reason}"),
        }
        return;
    }
    let (namespace, second) = (Namespace::new().unwrap(), Namespace::new().unwrap());
    let data = tempfile::tempdir().unwrap();
    let id = std::process::id();
    let v4 = "10.231.87.0/24".parse().unwrap();
    let v6 = Some("fd68:756c:6c00:7e57::/64".parse().unwrap());
    let list = bridge_network(&BridgeNetwork {
        name: DEFAULT_NAME,
        bridge: "hulltest0",
        ipv4: v4,
        ipv6: v6,
        gateways: &[],
        ranges: &[],
        internal: false,
        data_dir: data.path(),
        published: true,
    })
    .unwrap();
    let container = format!("hull-test-{id}");
    let runner = Runner::default();
    let attach = |netns: PathBuf, name: &str| Attachment {
        container_id: format!("{container}-{name}"),
        netns,
        ifname: "eth0".into(),
        ..Attachment::default()
    };
    let traces = || rules_of(&[&container, "10.231.87.", "fd68:756c:6c00:7e57:"]);
    let leases = || {
        let names = fs::read_dir(data.path().join("default"))
            .into_iter()
            .flatten()
            .flatten();
        let names = names.map(|entry| entry.file_name().into_string().unwrap());
        let mut names: Vec<String> = names
            .filter(|name| name.starts_with("10.") || name.starts_with("fd"))
            .collect();
        names.sort();
        names
    };

    let mut attachment = attach(namespace.path(), "a");
    attachment.mac = Some([2, 0x68, 0x75, 0x6c, 0x6c, 1]);
    attachment.ips = vec![
        "10.231.87.9".parse().unwrap(),
        "fd68:756c:6c00:7e57::9".parse().unwrap(),
    ];
    attachment.port_mappings = vec![PortMapping {
        host_ip: None,
        host_port: 47_187,
        container_port: 80,
        protocol: Protocol::Tcp,
    }];
    let mut record = Record::new(list.clone(), attachment).unwrap();
    let result = record.add(&runner).unwrap().clone();
    let addresses: Vec<String> = result
        .addresses("eth0")
        .map(|ip| ip.address.to_string())
        .collect();
    assert_eq!(addresses, ["10.231.87.9/24", "fd68:756c:6c00:7e57::9/64"]);
    assert_eq!(
        result.interface("eth0").unwrap().mac,
        Some([2, 0x68, 0x75, 0x6c, 0x6c, 1])
    );
    assert_eq!(result.ips[0].gateway, Some("10.231.87.1".parse().unwrap()));
    let shown = namespace.ip("-o addr show dev eth0");
    assert!(
        shown.contains("10.231.87.9/24") && shown.contains("fd68:756c:6c00:7e57::9/64"),
        "{shown}"
    );
    assert!(
        namespace
            .ip("-o link show dev eth0")
            .contains("02:68:75:6c:6c:01")
    );
    assert!(namespace.ip("-4 route").contains("default via 10.231.87.1"));
    assert!(
        namespace
            .ip("-6 route")
            .contains("default via fd68:756c:6c00:7e57::1")
    );
    assert!(
        traces()
            .iter()
            .any(|rule| rule.contains("--dport 80") || rule.contains("10.231.87.9:80")),
        "{:?}",
        traces()
    );

    let mut other = Record::new(list.clone(), attach(second.path(), "b")).unwrap();
    other.add(&runner).unwrap();
    other.list.disable_check = false;
    other.check(&runner).unwrap();
    assert_eq!(leases().len(), 4);
    // A record without a result, whose namespace is gone.
    let forgotten = Record::new(list, attach(second.path(), "b")).unwrap();
    drop(second);
    forgotten.del(&runner).unwrap();
    assert_eq!(leases(), ["10.231.87.9", "fd68:756c:6c00:7e57::9"]);
    other.del(&runner).unwrap();

    record.del(&runner).unwrap();
    record.del(&runner).unwrap();
    assert!(leases().is_empty(), "{:?}", leases());
    let links = namespace.ip("-o link");
    assert!(!links.contains("eth0"), "{links}");
    // Masquerading is removed by the addresses in the container's namespace: rules of "b", whose
    // namespace went first, remain.
    let left: Vec<String> = traces()
        .into_iter()
        .filter(|rule| !rule.contains(&format!("{container}-b")))
        .collect();
    assert!(left.is_empty(), "{left:#?}");

    // A plugin that fails after others have succeeded.
    let house = House::new();
    house.plugin(
        "late",
        "[ $CNI_COMMAND != ADD ] || { echo too late >&2; exit 1; }",
    );
    let mut runner = runner;
    runner.directories.push(house.directory.path().to_owned());
    let mut config: Value = record.list.clone().into();
    let plugins = config["plugins"].as_array_mut().unwrap();
    plugins.push(json!({ "type": "late" }));
    let list = List::from_value(config).unwrap();
    let mut failing = Record::new(list, attach(namespace.path(), "c")).unwrap();
    let error = failing.add(&runner).unwrap_err().to_string();
    assert_eq!(
        error,
        "network \"default\": plugin late failed: exit status: 1: too late"
    );
    assert!(house.input("late", "ADD")["prevResult"]["ips"].is_array());
    assert!(leases().is_empty());
    assert!(!namespace.ip("-o link").contains("eth0"));
    assert!(
        !traces()
            .iter()
            .any(|rule| rule.contains(&format!("{container}-c")))
    );
}
