//! `hull run --network container:NAME`: containers that share the network, and the machine, of
//! another one.

use std::fs;
use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

use hull_tests::network::{answers, free_port, http_server};
use hull_tests::{Container, Hull, eventually, on_every_machine};

on_every_machine!(containers_share_addresses_and_loopback_and_end_alone);

/// The option with which a container joins this one's network.
fn of(container: &Container<'_>) -> String {
    format!("container:{}", container.name)
}

fn joined<'a>(
    hull: &'a Hull,
    container: &Container<'_>,
    options: &[&str],
    script: &str,
) -> Container<'a> {
    let network = of(container);
    let options = [&["--network", &network], options].concat();
    hull.start(&options, &["sh", "-c", script])
}

fn containers_share_addresses_and_loopback_and_end_alone(machine: &'static str) {
    let hull = Hull::networked(machine);
    let port = free_port();
    let first = hull.start(&["-p", &format!("{port}:80")], &["sleep", "1000"]);
    // One container publishes the port, the other listens on it.
    let second = joined(&hull, &first, &[], &http_server("of the second"));
    answers((IpAddr::V4(Ipv4Addr::LOCALHOST), port), "of the second");
    let fetch = "wget -q -O - http://127.0.0.1/index.html";
    assert_eq!(first.sh(fetch).ok().text(), "of the second");
    let third = hull.sh(&["--network", &of(&first)], fetch);
    assert_eq!(third.ok().text(), "of the second");
    let addresses = "ip -o addr; hostname; cat /etc/hosts /etc/resolv.conf";
    assert_eq!(
        second.sh(addresses).ok().text(),
        first.sh(addresses).ok().text()
    );
    // Everything else is each one's own.
    assert_eq!(second.sh("ls /srv").ok().text(), "index.html");
    first.sh("test ! -e /srv").ok();
    assert!(!first.sh("ps").ok().text().contains("httpd"));
    assert_eq!(
        first.inspect()["Hull"]["machine"],
        second.inspect()["Hull"]["machine"]
    );
    second.does("kill").ok();
    assert_eq!(second.wait(), 137);
    first.sh("true").ok();
    second.does("rm").ok();
    assert_eq!(hull.names(), [first.name.as_str()]);
}

#[test]
fn commands_work_on_a_container_that_has_joined() {
    let hull = Hull::networked("uml");
    let first = hull.sleeper();
    let second = joined(&hull, &first, &["-m", "32m"], "echo said; exec sleep 1000");
    eventually("it is logged", Duration::from_secs(5), || {
        second.does("logs").ok().text() == "said"
    });
    let limit = second.sh("cat /sys/fs/cgroup/memory.max").ok().text();
    assert_eq!(limit, (32 << 20).to_string());
    second.does("pause").ok();
    assert_eq!(
        (second.state(), first.state()),
        ("paused".into(), "running".into())
    );
    second.does("unpause").ok();
    assert!(second.does("top").ok().text().contains("sleep 1000"));
    let stats = hull.hull(["stats", "--no-stream"]).run().ok().text();
    assert!(
        stats.contains(&first.name) && stats.contains(&second.name),
        "{stats}"
    );
    let file = hull.scratch().join("file");
    fs::write(&file, "content").unwrap();
    let there = format!("{}:/file", second.name);
    hull.hull(["cp", file.to_str().unwrap(), &there]).run().ok();
    assert_eq!(second.sh("cat /file").ok().text(), "content");
    second.does("stop").ok();
    // What it wrote is still there, although its machine goes on.
    let upper = format!(
        "data/containers/{}/upper/file",
        second.inspect()["Hull"]["id"].as_str().unwrap()
    );
    assert_eq!(fs::read_to_string(hull.path(&upper)).unwrap(), "content");
    second.does("rm").ok();
    let status = hull.sh(&["--network", &of(&first)], "exit 7");
    assert_eq!(status.status, 7);
    let missing = hull.run(&["--network", &of(&first)], &["/nothing"]);
    missing.fails(127, &["/nothing"]);
    assert_eq!(hull.names(), [first.name.as_str()]);
}

#[test]
fn whoever_joins_one_that_has_joined_is_in_the_same_machine() {
    let hull = Hull::networked("uml");
    let first = hull.sleeper();
    let second = joined(&hull, &first, &[], "exec sleep 1000");
    let third = joined(&hull, &second, &[], &http_server("of the third"));
    second.does("rm").fails(1, &["is running"]);
    hull.hull(["rm", "-f", &second.name]).run().ok();
    let fetch = "until wget -q -O - http://127.0.0.1/index.html; do sleep 0.05; done";
    assert_eq!(first.sh(fetch).ok().text(), "of the third");
    assert_eq!(third.state(), "running");
}

/// A way to end a container.
type End = fn(&Container<'_>);

#[test]
fn a_sandbox_that_breaks_down_ends_all_its_containers_with_a_reason() {
    let hull = Hull::networked("uml");
    let ends: [(&str, End); 3] = [
        ("its machine is killed", |one| {
            one.kill_host_process("machine")
        }),
        ("its devices are killed", |one| {
            one.kill_host_process("devices")
        }),
        ("its sandbox process is killed", |one| {
            one.kill_host_process("sandbox")
        }),
    ];
    for (how, end) in ends {
        let first = hull.start(&["--stop-signal", "KILL"], &["sleep", "1000"]);
        let others: Vec<_> = (0..3)
            .map(|_| joined(&hull, &first, &[], "exec sleep 1000"))
            .collect();
        end(&first);
        for other in &others {
            eventually(how, Duration::from_secs(2), || other.state() == "stopped");
            let exit = other.inspect()["Hull"]["exit"].clone();
            assert_ne!(exit["status"], 0, "{how}: {exit}");
            assert_ne!(exit["reason"], "", "{how}: {exit}");
            other.does("rm").ok();
        }
        eventually(how, Duration::from_secs(2), || first.state() == "stopped");
        first.does("rm").ok();
        hull.assert_clean();
    }
}

/// The container whose network is shared ends in this way.
fn however_it_goes(goes: End) {
    let hull = Hull::networked("uml");
    let first = hull.sleeper();
    let serve = format!("echo ready; {}", http_server("still"));
    let second = joined(&hull, &first, &[], &serve);
    eventually("it is ready", Duration::from_secs(5), || {
        second.does("logs").ok().text() == "ready"
    });
    goes(&first);
    assert_eq!(second.state(), "running");
    // The addresses went with the container that had them; loopback is there.
    eventually("its network is left", Duration::from_secs(5), || {
        !second.sh("ip -o -4 addr").ok().text().contains("eth0")
    });
    let fetch = "wget -q -O - http://127.0.0.1/index.html";
    assert_eq!(second.sh(fetch).ok().text(), "still");
    second.does("stop").ok();
    second.does("rm").ok();
}

#[test]
fn when_the_one_stops_the_others_go_on_without_its_network_as_dockers_do() {
    however_it_goes(|first| {
        first.does("stop").ok();
        first.does("rm").ok();
    });
}

#[test]
fn when_the_one_is_removed_by_force_the_others_go_on_without_its_network() {
    however_it_goes(|first| {
        first.does("rm").fails(1, &["is running"]);
        first.is_removed_by_force();
    });
}

#[test]
fn what_another_container_has_decided_is_refused_by_name() {
    let hull = Hull::networked("uml");
    let first = hull.sleeper();
    let network = of(&first);
    for (option, value) in [
        ("--publish", "80"),
        ("--dns", "192.0.2.1"),
        ("--add-host", "name:192.0.2.1"),
        ("--mac-address", "02:00:00:00:00:01"),
        ("--ip", "10.87.0.7"),
        ("--network-rate", "1m"),
        ("--hostname", "other"),
        ("--machine", "qemu"),
        ("--sysctl", "net.ipv4.ip_forward=1"),
        ("--memory", "2g"),
    ] {
        let output = hull.run(&["--network", &network, option, value], &["true"]);
        output.fails(125, &[option]);
    }
    assert_eq!(hull.names(), [first.name.as_str()]);
}

#[test]
fn a_container_that_is_not_there_or_does_not_run_cannot_be_joined() {
    let hull = Hull::networked("uml");
    hull.run(&["--network", "container:nobody"], &["true"])
        .fails(125, &["no such container: nobody"]);
    let first = hull.sleeper();
    first.does("stop").ok();
    hull.run(&["--network", &of(&first)], &["true"])
        .fails(125, &[&first.name, "is not running"]);
    first.does("rm").ok();
    hull.assert_clean();
}

#[test]
fn many_come_and_go_at_once() {
    let hull = Hull::networked("uml");
    let first = hull.sleeper();
    let network = of(&first);
    std::thread::scope(|scope| {
        for number in 0..8 {
            let (hull, network) = (&hull, &network);
            scope.spawn(move || {
                for round in 0..3 {
                    let script = format!("echo {number}-{round}");
                    let output = hull.sh(&["--network", network], &script);
                    assert_eq!(output.ok().text(), format!("{number}-{round}"));
                }
            });
        }
    });
    assert_eq!(hull.names(), [first.name.as_str()]);
    assert_eq!(first.sh("echo well").ok().text(), "well");
}
