//! `hull network connect` and `disconnect` of containers that run.

use hull_tests::{Container, Hull, on_every_machine};

use super::created::Net;

on_every_machine!(a_running_container_joins_and_leaves_networks);

fn pings(from: &Container<'_>, name: &str) {
    from.exec(&["ping", "-c", "1", "-W", "5", name]).ok();
}

fn does_not_reach(from: &Container<'_>, name: &str) {
    let output = from.exec(&["ping", "-c", "1", "-W", "1", name]);
    assert_ne!(output.status, 0, "{name}: {}", output.text());
}

/// The interface of the default route.
fn way_out(of: &Container<'_>) -> String {
    let routes = of.exec(&["ip", "route"]).ok().text();
    let mut lines = routes.lines();
    let default = lines.find(|line| line.starts_with("default"));
    let last = default.and_then(|line| line.split_whitespace().last());
    last.unwrap_or_default().to_owned()
}

fn connect(network: &str, container: &Container<'_>) {
    network_command("connect", network, container);
}

fn disconnect(network: &str, container: &Container<'_>) {
    network_command("disconnect", network, container);
}

/// What must succeed.
fn network_command(verb: &str, network: &str, container: &Container<'_>) {
    let arguments = ["network", verb, network, &container.name];
    container.hull().hull(arguments).run().ok();
}

fn a_running_container_joins_and_leaves_networks(machine: &'static str) {
    let hull = Hull::networked(machine);
    let (one, two) = (Net::create(&hull, &[]), Net::create(&hull, &[]));
    let job = hull.start(
        &["--network", &one.name, "--stop-signal", "KILL"],
        &["sleep", "1000"],
    );
    let network = |arguments: &[&str]| hull.hull(["network"]).args(arguments).run();
    let address = two.address(77);
    let connect = [
        "connect", "--alias", "late", "--ip", &address, &two.name, &job.name,
    ];
    if machine == "qemu" {
        // It has its devices from the start on.
        network(&connect).fails(125, &["not supported", "2 networks"]);
        assert!(
            !job.inspect()["NetworkSettings"]["Networks"]
                .as_object()
                .unwrap()
                .contains_key(&two.name)
        );
        job.is_removed_by_force();
        return;
    }
    let other = hull.start(&["--network", &two.name], &["sleep", "1000"]);
    does_not_reach(&job, &other.name);
    network(&connect).ok();
    pings(&job, &other.name);
    pings(&other, "late");
    pings(&other, &job.name);
    assert_eq!(way_out(&job), "eth0");
    let hosts = job.exec(&["cat", "/etc/hosts"]).ok().text();
    assert!(hosts.contains(&address), "{hosts}");
    let settings = job.inspect()["NetworkSettings"].clone();
    assert_eq!(settings["Networks"][&two.name]["IPAddress"], address);
    assert_ne!(settings["Networks"][&one.name]["IPAddress"], "");
    network(&connect).fails(125, &["already"]);
    hull.hull(["network", "rm", &two.name])
        .run()
        .fails(1, &[&job.name]);

    // The other network becomes the way outside.
    network(&["disconnect", &one.name, &job.name]).ok();
    network(&["disconnect", &one.name, &job.name]).fails(1, &["is not in network"]);
    pings(&other, "late");
    assert_eq!(way_out(&job), "eth1");
    let settings = job.inspect()["NetworkSettings"].clone();
    assert_eq!(settings["IPAddress"], address);
    assert!(settings["Networks"].get(&one.name).is_none());

    // None at all, and one again.
    network(&["disconnect", &two.name, &job.name]).ok();
    does_not_reach(&other, &address);
    let links = job.exec(&["ip", "-o", "link"]).ok().text();
    assert!(!links.contains("eth"), "{links}");
    network(&["connect", &two.name, &job.name]).ok();
    pings(&job, &other.name);
    assert_eq!(way_out(&job), "eth0");

    let events = hull
        .hull([
            "events",
            "--since",
            "1h",
            "--until",
            "now",
            "-f",
            "type=network",
        ])
        .args([
            "--format",
            "{{.Actor.Attributes.container}} {{.Action}} {{.Actor.Attributes.name}}",
        ])
        .run()
        .ok()
        .text();
    let id = job.inspect()["Id"].as_str().unwrap().to_owned();
    let events = events.lines().filter_map(|line| line.strip_prefix(&id));
    let events: Vec<&str> = events.map(str::trim_start).collect();
    assert_eq!(
        events,
        [
            format!("connect {}", one.name),
            format!("connect {}", two.name),
            format!("disconnect {}", one.name),
            format!("disconnect {}", two.name),
            format!("connect {}", two.name),
        ]
    );

    // It has them at its next start, too.
    job.does("stop").ok();
    job.does("start").ok();
    pings(&other, &job.name);
    job.is_removed_by_force();
    other.is_removed_by_force();
    drop((one, two));
    hull.assert_clean();
}

#[test]
fn a_container_of_the_default_network_finds_names_in_one_that_it_joins() {
    let hull = Hull::networked("uml");
    let net = Net::create(&hull, &[]);
    let other = hull.start(&["--network", &net.name], &["sleep", "1000"]);
    let options = ["--add-host", "me:host-gateway"];
    let job = hull.start(&options, &["sleep", "1000"]);
    let before = job.exec(&["cat", "/etc/resolv.conf"]).ok().text();
    connect(&net.name, &job);
    pings(&job, &other.name);
    pings(&other, &job.name);
    disconnect(&net.name, &job);
    does_not_reach(&job, &other.name);
    assert_eq!(job.exec(&["cat", "/etc/resolv.conf"]).ok().text(), before);
    // What a process has changed is its own.
    job.sh("echo 10.0.0.1 mine >>/etc/hosts").ok();
    connect(&net.name, &job);
    let hosts = job.exec(&["cat", "/etc/hosts"]).ok().text();
    assert!(hosts.contains("10.0.0.1 mine"), "{hosts}");
    // The host has no address without a network: its name stays what it was.
    for network in [&net.name[..], "default"] {
        disconnect(network, &job);
    }
    connect("default", &job);
    job.is_removed_by_force();
    other.is_removed_by_force();
    drop(net);
    hull.assert_clean();
}

#[test]
fn published_ports_go_over_to_another_network_when_theirs_is_left() {
    let hull = Hull::networked("uml");
    let (one, two) = (Net::create(&hull, &[]), Net::create(&hull, &[]));
    let server = hull.start(
        &["--network", &one.name, "-p", "8080"],
        &["sh", "-c", "while :; do echo served | nc -l -p 8080; done"],
    );
    // Another one after each start.
    let port = || -> u16 {
        let published = server.does("port").ok().text();
        published
            .rsplit(':')
            .next()
            .unwrap()
            .trim()
            .parse()
            .unwrap()
    };
    let answers_at = |host: &str| {
        let (port, limit) = (port(), std::time::Duration::from_secs(10));
        hull_tests::eventually("an answer", limit, || {
            let stream = std::net::TcpStream::connect((host, port));
            let read = stream.and_then(|stream| {
                stream.set_read_timeout(Some(limit / 5))?;
                std::io::read_to_string(stream)
            });
            read.is_ok_and(|text| text == "served\n")
        });
    };
    let answers = || {
        answers_at("127.0.0.1");
        answers_at("::1");
    };
    answers();
    connect(&two.name, &server);
    answers();
    disconnect(&one.name, &server);
    answers();
    // Back, by way of no network at all: then there is nobody.
    disconnect(&two.name, &server);
    for host in ["127.0.0.1", "::1"] {
        let stream = std::net::TcpStream::connect((host, port()));
        let error = stream.and_then(std::io::read_to_string).unwrap_err();
        let kinds = [
            std::io::ErrorKind::ConnectionRefused,
            std::io::ErrorKind::ConnectionReset,
        ];
        assert!(kinds.contains(&error.kind()), "{host}: {error}");
    }
    connect(&one.name, &server);
    answers();
    // One that has left its networks is started without ports.
    disconnect(&one.name, &server);
    server.does("restart").ok();
    hull.hull(["network", "connect", &two.name, &server.name])
        .run()
        .fails(125, &["without one"]);
    server.does("kill").ok();
    connect(&two.name, &server);
    server.does("start").ok();
    answers();
    server.is_removed_by_force();
    drop((one, two));
    hull.assert_clean();
}

#[test]
fn an_internal_network_first_leaves_the_way_outside_and_ports_to_the_next() {
    let hull = Hull::networked("uml");
    let (inner, out) = (Net::create(&hull, &["--internal"]), Net::create(&hull, &[]));
    let job = hull.start(
        &[
            "--network",
            &inner.name,
            "--network",
            &out.name,
            "-p",
            "127.0.0.1:0:8080",
        ],
        &["sh", "-c", "while :; do echo served | nc -l -p 8080; done"],
    );
    assert_eq!(way_out(&job), "eth1");
    let published = job.does("port").ok().text();
    let address = published.rsplit(' ').next().unwrap();
    hull_tests::eventually("an answer", std::time::Duration::from_secs(10), || {
        std::net::TcpStream::connect(address).is_ok_and(|stream| {
            std::io::read_to_string(stream).is_ok_and(|text| text == "served\n")
        })
    });
    disconnect(&out.name, &job);
    assert_eq!(way_out(&job), "");
    job.is_removed_by_force();
    drop((inner, out));
    hull.assert_clean();
}

#[test]
fn a_container_without_a_network_joins_one_only_when_it_is_started_again() {
    let hull = Hull::networked("uml");
    let net = Net::create(&hull, &[]);
    let alone = hull.start(
        &["--network", "none", "--stop-signal", "KILL"],
        &["sleep", "1000"],
    );
    let connect = ["network", "connect", &net.name, &alone.name];
    hull.hull(connect)
        .run()
        .fails(125, &["not supported", "without one"]);
    alone.does("stop").ok();
    hull.hull(connect).run().ok();
    alone.does("start").ok();
    assert_eq!(way_out(&alone), "eth0");
    alone.is_removed_by_force();
    drop(net);
    hull.assert_clean();
}

#[test]
fn what_cannot_be_joined_changes_nothing() {
    let hull = Hull::networked("uml");
    let (one, two) = (Net::create(&hull, &[]), Net::create(&hull, &[]));
    let other = hull.start(&["--network", &two.name], &["sleep", "1000"]);
    let taken = other.address().to_string();
    let job = hull.start(&["--network", &one.name], &["sleep", "1000"]);
    let before = (job.inspect(), job.exec(&["ip", "addr"]).ok().text());
    let with_address = ["network", "connect", "--ip", &taken];
    hull.hull(with_address)
        .args([&two.name, &job.name])
        .run()
        .fails(125, &[&taken]);
    assert_eq!(
        (job.inspect(), job.exec(&["ip", "addr"]).ok().text()),
        before
    );
    connect(&two.name, &job);
    pings(&job, &other.name);
    job.is_removed_by_force();
    other.is_removed_by_force();
    drop((one, two));
    hull.assert_clean();
}

#[test]
fn what_joined_networks_have_on_the_host_goes_with_a_killed_sandbox() {
    let hull = Hull::networked("uml");
    let (one, two) = (Net::create(&hull, &[]), Net::create(&hull, &[]));
    let server = hull.start(&["--network", &one.name, "-p", "8080"], &["sleep", "1000"]);
    let network = |arguments: &[&str]| hull.hull(["network"]).args(arguments).run().ok();
    network(&["connect", &two.name, &server.name]);
    network(&["disconnect", &one.name, &server.name]);
    let id = server.inspect()["Id"].as_str().unwrap().to_owned();
    let rules = || {
        let saved = std::process::Command::new("iptables-save")
            .output()
            .unwrap();
        let text = String::from_utf8(saved.stdout).unwrap();
        text.lines().filter(|line| line.contains(&id)).count()
    };
    assert_ne!(rules(), 0);
    server.kill_host_process("sandbox");
    server.is_removed_by_force();
    assert_eq!(rules(), 0);
    // Its address can be had again.
    let options = ["--network", &two.name, "--ip", &two.address(2)];
    let again = hull.start(&options, &["sleep", "1000"]);
    again.is_removed_by_force();
    drop((one, two));
    hull.assert_clean();
}
