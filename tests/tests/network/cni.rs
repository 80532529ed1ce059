//! Networks of `/etc/cni/net.d`, plugins that fail, and what a container's network leaves on the
//! host: nothing.

use std::fs;
use std::net::{Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};
use std::time::Duration;

use hull_tests::network::{
    BRIDGE, CniNetwork, Traces, answers, free_port, http_server, leases_with,
};
use hull_tests::{Container, Hull, eventually, on_every_machine};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;

on_every_machine!(nothing_of_a_network_is_left_however_a_container_ends);

fn published<'a>(hull: &'a Hull, port: u16) -> Container<'a> {
    let publish = format!("{port}:80");
    hull.start(&["-p", &publish], &["sh", "-c", &http_server("here")])
}

fn nothing_of_a_network_is_left_however_a_container_ends(machine: &'static str) {
    let hull = Hull::networked(machine);
    let port = free_port();
    for end in ["kill", "rm -f", "machine", "devices", "sandbox"] {
        let container = published(&hull, port);
        answers((Ipv4Addr::LOCALHOST, port), "here");
        let traces = Traces::of(&container, BRIDGE);
        match end {
            "rm -f" => {}
            "kill" => {
                container.does("kill").ok();
                container.wait();
                // Before the container is removed.
                traces.assert_gone();
            }
            process => container.kill_host_process(process),
        }
        hull.hull(["rm", "-f", &container.name]).run().ok();
        eprintln!("after {end}");
        traces.assert_gone();
        hull.assert_clean();
        drop(TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).unwrap());
    }
}

#[test]
fn a_container_that_ends_by_itself_leaves_nothing() {
    let hull = Hull::networked("uml");
    let output = hull
        .sh(&["-p", "80"], "hostname; ip -o addr show dev eth0")
        .ok();
    let text = output.text();
    let (id, listed) = text.split_once('\n').unwrap();
    assert_eq!(id.len(), 12);
    assert!(!hull_tests::network::addresses(listed).is_empty());
    assert_eq!(leases_with(id), [""; 0]);
    assert_eq!(hull_tests::network::rules_with(id), [""; 0]);
    hull.assert_clean();
}

#[test]
fn a_container_whose_command_is_not_there_leaves_nothing() {
    let network = CniNetwork::new(|_| {});
    let hull = Hull::new();
    let output = hull.run(&["--network", &network.name], &["no-such-command"]);
    output.fails(127, &["no-such-command"]);
    network.assert_clean();
    hull.assert_clean();
}

#[test]
fn what_a_killed_container_left_is_removed_with_it() {
    // Not before: its resources on the host belong to a container that can be inspected.
    let network = CniNetwork::new(|_| {});
    let hull = Hull::new();
    let container = hull.start(&["--network", &network.name], &["sleep", "1000"]);
    container.kill_host_process("sandbox");
    eventually("stopped", Duration::from_secs(10), || {
        container.state() == "stopped"
    });
    container.does("rm").ok();
    network.assert_clean();
    hull.assert_clean();
}

#[test]
fn a_network_of_the_host_is_found_by_its_name() {
    let network = CniNetwork::new(|_| {});
    let hull = Hull::new();
    let options = ["--network", &network.name];
    let server = hull.start(&options, &["sh", "-c", &http_server("in it")]);
    assert_eq!(server.inspect()["Hull"]["network"], network.name.as_str());
    let octets =
        |address: std::net::IpAddr| address.to_string().rsplit_once('.').unwrap().0.to_owned();
    assert_eq!(octets(server.address()), octets(network.gateway.into()));
    answers((server.address(), 80), "in it");
    let url = format!("http://{}/index.html", server.address());
    let output = hull.run(&options, &["wget", "-q", "-O", "-", &url]);
    assert_eq!(output.ok().text(), "in it");
    hull.hull(["rm", "-f", &server.name]).run().ok();
    network.assert_clean();
}

#[test]
fn a_container_can_have_the_address_it_asks_for_in_a_network_that_gives_it() {
    let network = CniNetwork::new(|configuration| {
        configuration["plugins"][0]["capabilities"] = json!({"ips": true, "mac": true});
    });
    let hull = Hull::new();
    let ip = Ipv4Addr::from(u32::from(network.gateway) + 76);
    let options = [
        "--network",
        &network.name,
        "--ip",
        &ip.to_string(),
        "--mac-address",
        "02:42:c0:a8:01:08",
    ];
    let container = hull.start(&options, &["sleep", "1000"]);
    assert_eq!(container.address(), std::net::IpAddr::from(ip));
    let mac = container.sh("cat /sys/class/net/eth0/address").ok().text();
    assert_eq!(mac, "02:42:c0:a8:01:08");
}

#[test]
fn what_a_network_cannot_give_is_refused() {
    let network = CniNetwork::new(|_| {});
    let hull = Hull::new();
    for (option, value) in [
        ("-p", "127.0.0.1:0:80"),
        ("--mac-address", "02:42:c0:a8:01:08"),
    ] {
        let output = hull.run(&["--network", &network.name, option, value], &["true"]);
        output.fails(125, &[&network.name]);
    }
    network.assert_clean();
    hull.assert_clean();
}

#[test]
fn a_network_without_free_addresses_says_so_and_the_others_are_not_disturbed() {
    let network = CniNetwork::new(|configuration| {
        let ranges = &mut configuration["plugins"][0]["ipam"]["ranges"];
        let subnet = ranges[0][0]["subnet"]
            .as_str()
            .unwrap()
            .replace("/24", "/30");
        ranges[0][0]["subnet"] = subnet.into();
    });
    let hull = Hull::new();
    let options = ["--network", network.name.as_str()];
    let first = hull.start(&options, &["sleep", "1000"]);
    let before = network.traces();
    hull.run(&options, &["true"])
        .fails(125, &[&network.name, "no IP addresses available"]);
    assert_eq!(network.traces(), before);
    let gateway = network.gateway.to_string();
    first.exec(&["ping", "-c", "1", "-W", "5", &gateway]).ok();
    hull.hull(["rm", "-f", &first.name]).run().ok();
    hull.run(&options, &["ping", "-c", "1", "-W", "5", &gateway])
        .ok();
    network.assert_clean();
    hull.assert_clean();
}

#[test]
fn a_plugin_that_is_not_installed_is_named() {
    let network = CniNetwork::new(|configuration| {
        let plugins = configuration["plugins"].as_array_mut().unwrap();
        plugins.push(json!({"type": "no-such-plugin"}));
    });
    let hull = Hull::new();
    hull.run(&["--network", &network.name], &["true"])
        .fails(125, &[&network.name, "no-such-plugin", "not found"])
        .hint("containernetworking-plugins");
    network.assert_clean();
    hull.assert_clean();
}

#[test]
fn a_plugin_that_fails_is_heard_and_what_others_did_before_it_is_undone() {
    let plugin =
        Plugin::that_adds("echo '{\"code\": 117, \"msg\": \"the switch is on fire\"}'; exit 1");
    let network = plugin.network();
    let hull = Hull::new();
    hull.run(&["--network", &network.name], &["true"])
        .fails(125, &[&network.name, &plugin.name, "the switch is on fire"]);
    network.assert_clean();
    // The same in the background.
    let output = hull
        .hull(["run", "-d", "--network", &network.name, "busybox", "true"])
        .run();
    output.fails(125, &["the switch is on fire"]);
    network.assert_clean();
    for name in hull.names() {
        hull.hull(["rm", &name]).run().ok();
    }
    hull.assert_clean();
}

#[test]
fn a_plugin_that_says_nothing_or_nonsense_is_named() {
    for (script, part) in [
        ("exit 3", "3"),
        ("kill -9 $$", "signal"),
        ("echo nonsense", "result"),
        ("echo out of order >&2; exit 4", "out of order"),
    ] {
        let plugin = Plugin::that_adds(script);
        let network = plugin.network();
        let hull = Hull::new();
        hull.run(&["--network", &network.name], &["true"])
            .fails(125, &[&network.name, &plugin.name, part]);
        network.assert_clean();
        hull.assert_clean();
    }
}

#[test]
fn a_run_that_waits_for_a_plugin_that_hangs_can_be_interrupted() {
    let plugin = Plugin::that_adds("sleep 1000");
    let network = plugin.network();
    let hull = Hull::new();
    let running = hull
        .hull(["run", "--rm", "--network", &network.name, "busybox", "true"])
        .limit(Duration::from_secs(60))
        .start();
    std::thread::sleep(Duration::from_millis(500));
    running.signal(rustix::process::Signal::INT);
    let output = running.finish();
    assert_eq!(output.status, 130, "{}", output.error());
    network.assert_clean();
    hull.assert_clean();
}

#[test]
fn a_plugin_that_hangs_is_ended_and_named() {
    let plugin = Plugin::that_adds("sleep 1000");
    let network = plugin.network();
    let hull = Hull::new();
    hull.hull(["run", "--rm", "--network", &network.name, "busybox", "true"])
        .limit(Duration::from_secs(100))
        .run()
        .fails(125, &[&network.name, &plugin.name, "30s", "killed"]);
    network.assert_clean();
    hull.assert_clean();
}

#[test]
fn a_network_that_cannot_be_undone_keeps_its_container_until_rm_has_undone_it() {
    let scratch = tempfile::tempdir_in("/tmp").unwrap();
    let broken = scratch.path().join("broken");
    // Passes the result of the plugin before it on.
    let pass = "import json, sys; print(json.dumps(json.load(sys.stdin)[\"prevResult\"]))";
    let script = format!(
        "[ $CNI_COMMAND != ADD ] || exec python3 -c '{pass}'\n\
         [ ! -e {} ] || {{ echo '{{\"code\": 117, \"msg\": \"not now\"}}'; exit 1; }}",
        broken.display()
    );
    let plugin = Plugin::new(&script);
    let network = plugin.network();
    let hull = Hull::new();
    for rm in [&[][..], &["--rm"]] {
        let name = hull.unique("stays");
        let container = hull.container(&name);
        hull.hull(["run", "-d", "--network", &network.name, "--name", &name])
            .args(rm)
            .args(["busybox", "sleep", "1000"])
            .run()
            .ok();
        std::fs::write(&broken, "").unwrap();
        container.does("kill").ok();
        eventually("stopped", Duration::from_secs(10), || {
            container.state() == "stopped"
        });
        container.does("rm").fails(125, &[&network.name, "not now"]);
        assert_eq!(hull.names(), [name.as_str()]);
        std::fs::remove_file(&broken).unwrap();
        container.does("rm").ok();
        network.assert_clean();
        hull.assert_clean();
    }
}

#[test]
fn a_plugin_adds_nothing_after_the_sandbox_process_was_killed_and_its_work_undone() {
    let directory = tempfile::tempdir().unwrap();
    let file = |name: &str| directory.path().join(name);
    // It is at work, and so is a process that it has started, as iptables is.
    let script = format!(
        "cat >/dev/null; cd {}; case $CNI_COMMAND in ADD)\n\
         echo $PPID >sandbox.new; mv sandbox.new sandbox\n\
         sh -c 'sleep 1; echo child >>rules; sleep 0.2' & wait; echo plugin >>rules;;\n\
         DEL) rm -f rules; echo $(cat rules 2>&1) >>deleted;; esac",
        directory.path().display()
    );
    let plugin = Plugin::new(&script);
    let network = plugin.network();
    let hull = Hull::new();
    let running = hull
        .hull([
            "run",
            "--name",
            "victim",
            "--network",
            &network.name,
            "busybox",
            "true",
        ])
        .start();
    eventually("the plugin runs", Duration::from_secs(20), || {
        file("sandbox").exists()
    });
    let pid = fs::read_to_string(file("sandbox")).unwrap();
    let pid = Pid::from_raw(pid.trim().parse().unwrap()).unwrap();
    kill_process(pid, Signal::KILL).unwrap();
    running.finish().ends(125);
    let _ = hull.hull(["rm", "-f", "victim"]).run();
    assert!(file("deleted").exists(), "its work is undone");
    std::thread::sleep(Duration::from_secs(2));
    let left = fs::read_to_string(file("rules")).unwrap_or_default();
    assert_eq!(left, "", "nothing is added after that");
    network.assert_clean();
    hull.assert_clean();
}

/// A plugin that is a shell script, gone when dropped.
struct Plugin {
    name: String,
    file: PathBuf,
}

impl Plugin {
    fn new(script: &str) -> Plugin {
        use std::os::unix::fs::PermissionsExt;
        let name = format!("hull-test-{}", std::process::id());
        let directory = ["/usr/lib/cni", "/opt/cni/bin"]
            .iter()
            .find(|directory| Path::new(directory).is_dir())
            .unwrap();
        let file = Path::new(directory).join(&name);
        std::fs::write(&file, format!("#!/bin/sh\n{script}\n")).unwrap();
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o755)).unwrap();
        Plugin { name, file }
    }

    /// A plugin that runs this to attach, and has nothing to undo.
    fn that_adds(script: &str) -> Plugin {
        Plugin::new(&format!("[ $CNI_COMMAND = ADD ] || exit 0\n{script}"))
    }

    /// A bridge, and then this plugin.
    fn network(&self) -> CniNetwork {
        CniNetwork::new(|configuration| {
            let plugins = configuration["plugins"].as_array_mut().unwrap();
            plugins.push(json!({"type": self.name}));
        })
    }
}

impl Drop for Plugin {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.file);
    }
}
