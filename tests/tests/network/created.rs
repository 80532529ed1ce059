//! `hull network`: networks that people create, in which containers find each other by their names.

use std::process::Command;

use hull_tests::{Hull, on_every_machine};

on_every_machine!(
    containers_of_a_network_find_each_other_by_their_names,
    a_container_is_in_several_networks_each_with_its_names,
);

/// A network with a name of its own on this host; removed when this is dropped.
pub(super) struct Net<'a> {
    hull: &'a Hull,
    pub(super) name: String,
}

impl<'a> Net<'a> {
    pub(super) fn create(hull: &'a Hull, options: &[&str]) -> Self {
        // What hull chooses is free for one installation; tests have many.
        let number = hull_tests::network::number();
        let ipv4 = format!("10.{}.{}.0/24", 200 + number / 256, number % 256);
        let ipv6 = format!("fd68:756c:7e57:{number:x}::/64");
        // Names of rules of the packet filter are the host's.
        let name = format!("t{number}");
        hull.hull(["network", "create", "--subnet", &ipv4, "--subnet", &ipv6])
            .args(options)
            .arg(&name)
            .run()
            .ok();
        Self { hull, name }
    }

    fn inspect(&self) -> serde_json::Value {
        let all = self
            .hull
            .hull(["network", "inspect", &self.name])
            .run()
            .ok();
        all.json()[0].clone()
    }

    /// An address in its IPv4 subnet.
    pub(super) fn address(&self, last: u8) -> String {
        let subnet = self.inspect()["Subnets"][0].as_str().unwrap().to_owned();
        subnet.replace(".0/24", &format!(".{last}"))
    }

    fn bridge(&self) -> String {
        let bridge = &self.inspect()["Options"]["com.docker.network.bridge.name"];
        bridge.as_str().unwrap().to_owned()
    }
}

impl Drop for Net<'_> {
    fn drop(&mut self) {
        let removed = self.hull.hull(["network", "rm", "-f", &self.name]);
        let status = removed.into_parts().0.status();
        assert!(std::thread::panicking() || status.is_ok_and(|status| status.success()));
    }
}

/// What the host has of a bridge: the interface, rules of iptables and of nf_tables.
fn traces(network: &str, bridge: &str) -> Vec<String> {
    let mut found = Vec::new();
    for command in [
        &["ip", "-o", "link"][..],
        &["iptables", "-S"],
        &["ip6tables", "-S"],
        &["nft", "list", "tables"],
    ] {
        let output = Command::new(command[0]).args(&command[1..]).output();
        let text = output.map(|output| output.stdout).unwrap_or_default();
        let text = String::from_utf8_lossy(&text).into_owned();
        let mut lines = text.lines();
        found.extend(
            lines
                .by_ref()
                .filter(|line| line.contains(bridge) || line.contains(&format!("hull-{network}")))
                .map(str::to_owned),
        );
    }
    found
}

fn containers_of_a_network_find_each_other_by_their_names(machine: &'static str) {
    let hull = Hull::networked(machine);
    let net = Net::create(&hull, &[]);
    let network = ["--network", &net.name];
    let server = hull.start(
        &[
            network[0],
            network[1],
            "--network-alias",
            "www",
            "-h",
            "Server",
        ],
        &["sleep", "1000"],
    );
    let address = server.address().to_string();
    let asks = |name: &str| {
        let script =
            format!("nslookup {name} | grep '^Address' | tail -n +2; ping -c 1 -W 5 {name}");
        hull.sh(&network, &script)
    };
    let linked = format!("{}:linked", server.name);
    let options = ["--network", &net.name, "--link", &linked];
    hull.run(&options, &["ping", "-c", "1", "-W", "5", "linked"])
        .ok();
    for name in [&server.name[..], "www", "server"] {
        let output = asks(name).ok();
        assert!(
            output.text().contains(&address),
            "{name}: {}",
            output.text()
        );
    }
    // As Docker, with the network's name after the container's, both ways.
    let whole = format!("{}.{}", server.name, net.name);
    assert!(asks(&whole).ok().text().contains(&address));
    let output = hull.sh(&network, &format!("nslookup {address}")).ok();
    let found = format!("name = {whole}");
    assert!(output.text().contains(&found), "{}", output.text());
    hull.sh(&network, "ping -c 1 -W 1 nobody-of-this-name")
        .ends(1);
    // Under another name it is found by that one. Machines of kind qemu keep it until a restart.
    if machine == "uml" {
        hull.hull(["rename", &server.name, "renamed"]).run().ok();
        assert!(asks("renamed").ok().text().contains(&address));
        hull.sh(&network, &format!("nslookup {}", server.name))
            .ends(1);
        hull.hull(["rename", "renamed", &server.name]).run().ok();
    }
    // Elsewhere there are no such names.
    hull.sh(&[], "ping -c 1 -W 1 www").ends(1);
    let second = hull.start(
        &[network[0], network[1], "--network-alias", "www"],
        &["sleep", "1000"],
    );
    let both = hull.sh(&network, "nslookup www").ok().text();
    let other = second.address().to_string();
    assert!(both.contains(&address) && both.contains(&other), "{both}");
    hull.hull(["stop", "-t", "0", &server.name]).run().ok();
    let one = hull.sh(&network, "nslookup www").ok().text();
    assert!(!one.contains(&address) && one.contains(&other), "{one}");
    server.does("start").ok();
    asks(&server.name).ok();
    second.kill_host_process("sandbox");
    second.does("wait").ok();
    let one = hull.sh(&network, "nslookup www").ok().text();
    assert!(!one.contains(&other), "{one}");
    server.is_removed_by_force();
    second.is_removed_by_force();
}

#[test]
fn what_a_network_has_on_the_host_goes_with_it() {
    let hull = Hull::networked("uml");
    let net = Net::create(&hull, &["--label", "a=b"]);
    assert_eq!(net.inspect()["Labels"]["a"], "b");
    let address = net.address(9);
    let (name, bridge) = (net.name.clone(), net.bridge());
    let container = hull.start(&["--network", &name, "--ip", &address], &["sleep", "1000"]);
    assert_eq!(container.address().to_string(), address);
    hull.hull(["network", "rm", &name])
        .run()
        .fails(1, &["has containers:", &container.name]);
    hull.run(&["--network", &name, "--ip", "11.1.1.1"], &["true"])
        .fails(125, &["--ip: 11.1.1.1 is not in 10."]);
    assert!(
        traces(&name, &bridge).len() >= 6,
        "{:?}",
        traces(&name, &bridge)
    );
    container.is_removed_by_force();
    drop(net);
    assert_eq!(traces(&name, &bridge), [""; 0]);
    hull.run(&["--network", &name], &["true"])
        .fails(125, &[&name]);
}

#[test]
fn nothing_goes_from_one_network_to_another_and_nothing_leaves_an_internal_one() {
    let hull = Hull::networked("uml");
    let (one, two) = (Net::create(&hull, &[]), Net::create(&hull, &["--internal"]));
    let start = |net: &Net<'_>| hull.start(&["--network", &net.name], &["sleep", "1000"]);
    let (first, second) = (start(&one), start(&two));
    let ping = |net: &Net<'_>, address: &str| {
        let script = format!("ping -c 1 -W 2 {address} >/dev/null && echo reached || echo not");
        hull.sh(&["--network", &net.name], &script).ok().text()
    };
    let addresses = [first.address().to_string(), second.address().to_string()];
    assert_eq!(ping(&one, &addresses[0]), "reached");
    assert_eq!(ping(&two, &addresses[1]), "reached");
    assert_eq!(ping(&one, &addresses[1]), "not");
    assert_eq!(ping(&two, &addresses[0]), "not");
    let routes = second.sh("ip route | grep default || true").ok().text();
    assert_eq!(routes, "");
    hull.run(&["--network", &two.name, "-p", "8080:80"], &["true"])
        .fails(125, &["--publish", "is internal"]);
    first.is_removed_by_force();
    second.is_removed_by_force();
}

fn a_container_is_in_several_networks_each_with_its_names(machine: &'static str) {
    let hull = Hull::networked(machine);
    let (out, inner) = (Net::create(&hull, &[]), Net::create(&hull, &["--internal"]));
    let near = hull.start(&["--network", &out.name], &["sleep", "1000"]);
    let far = hull.start(&["--network", &inner.name], &["sleep", "1000"]);
    let address = inner.address(99);
    let endpoint = format!("name={},alias=inside,ip={address}", inner.name);
    let both = hull.start(
        &[
            "--network",
            &out.name,
            "--network",
            &endpoint,
            "--network-alias",
            "outside",
            "--stop-signal",
            "KILL",
        ],
        &["sleep", "1000"],
    );
    let pings = |from: &hull_tests::Container<'_>, name: &str| {
        from.exec(&["ping", "-c", "1", "-W", "5", name]).ok();
    };
    pings(&both, &near.name);
    pings(&both, &far.name);
    pings(&near, "outside");
    pings(&far, "inside");
    pings(&far, &both.name);
    for (from, name) in [(&near, "inside"), (&far, "outside"), (&near, &far.name[..])] {
        let output = from.exec(&["ping", "-c", "1", "-W", "1", name]);
        assert_ne!(output.status, 0, "{name}: {}", output.text());
    }
    // Its way out is the first one.
    let routes = both.exec(&["ip", "route"]).ok().text();
    let defaults: Vec<&str> = routes
        .lines()
        .filter(|line| line.starts_with("default"))
        .collect();
    assert!(
        defaults.len() == 1 && defaults[0].contains("eth0"),
        "{routes}"
    );
    let inspected = both.inspect();
    let networks = &inspected["NetworkSettings"]["Networks"];
    assert_eq!(networks[&inner.name]["IPAddress"], address);
    assert_eq!(networks[&inner.name]["Aliases"][0], "inside");
    assert_eq!(
        networks[&out.name]["IPAddress"],
        inspected["NetworkSettings"]["IPAddress"]
    );
    hull.hull(["network", "rm", &inner.name])
        .run()
        .fails(1, &[&both.name]);
    // What was stopped has them again.
    both.does("stop").ok();
    both.does("start").ok();
    pings(&both, &far.name);
    both.is_removed_by_force();
    near.is_removed_by_force();
    far.is_removed_by_force();
    drop((out, inner));
    hull.assert_clean();
}

#[test]
fn a_container_that_does_not_run_is_connected_and_disconnected() {
    let hull = Hull::networked("uml");
    let (one, two) = (Net::create(&hull, &[]), Net::create(&hull, &[]));
    let other = hull.start(&["--network", &two.name], &["sleep", "1000"]);
    let job = hull.start(
        &["--network", &one.name, "--stop-signal", "KILL"],
        &["sleep", "1000"],
    );
    let network = |arguments: &[&str]| hull.hull(["network"]).args(arguments).run();
    job.does("stop").ok();
    network(&["connect", "--alias", "late", &two.name, &job.name]).ok();
    network(&["connect", &two.name, &job.name]).fails(125, &["already"]);
    network(&["connect", "nosuch", &job.name]).fails(125, &["nosuch"]);
    job.does("start").ok();
    job.exec(&["ping", "-c", "1", "-W", "5", &other.name]).ok();
    other.exec(&["ping", "-c", "1", "-W", "5", "late"]).ok();
    job.does("stop").ok();
    network(&["disconnect", &one.name, &job.name]).ok();
    network(&["disconnect", &one.name, &job.name]).fails(1, &["is not in network"]);
    job.does("start").ok();
    job.exec(&["ping", "-c", "1", "-W", "5", &other.name]).ok();
    assert!(!job.exec(&["ip", "link"]).ok().text().contains("eth1"));
    job.does("stop").ok();
    network(&["disconnect", &two.name, &job.name]).ok();
    job.does("start").ok();
    assert!(!job.exec(&["ip", "link"]).ok().text().contains("eth0"));
    job.is_removed_by_force();
    other.is_removed_by_force();
    drop((one, two));
    hull.assert_clean();
}

#[test]
fn networks_are_listed_and_removed_by_conditions() {
    let hull = Hull::networked("uml");
    let (one, two) = (
        Net::create(&hull, &["--label", "a=b"]),
        Net::create(&hull, &["--internal"]),
    );
    let ls = |arguments: &[&str]| {
        let listed = hull.hull(["network", "ls"]).args(arguments).run().ok();
        listed.text()
    };
    let format = [
        "--format",
        "{{.Name}} {{.Driver}} {{.Internal}} {{.Labels}}",
    ];
    let of_two = format!("name={}", two.name);
    assert_eq!(
        ls(&[&["-f", &of_two], &format[..]].concat()),
        format!("{} bridge true ", two.name)
    );
    assert_eq!(ls(&["-q", "-f", "label=a=b"]), one.name);
    assert_eq!(
        ls(&["-q", "-f", "type=builtin", "-f", "driver=null"]),
        "none"
    );
    assert_eq!(ls(&["-q", "-f", "label=a=c"]), "");
    hull.hull(["network", "ls", "-f", "colour=red"])
        .run()
        .fails(125, &["colour"]);
    let inspect = [
        "network",
        "inspect",
        "-f",
        "{{.Name}} {{.Internal}}",
        &two.name,
    ];
    assert_eq!(
        hull.hull(inspect).run().ok().text(),
        format!("{} true", two.name)
    );
    let prune = |filter: &str| {
        let pruned = hull
            .hull(["network", "prune", "-f", "--filter", filter])
            .run()
            .ok();
        pruned.text()
    };
    assert_eq!(prune("until=1h"), "");
    assert_eq!(prune("label!=a"), two.name);
    assert_eq!(prune("label=a"), one.name);
    drop((one, two));
    hull.assert_clean();
}

#[test]
fn networks_that_contradict_each_other_are_refused_by_name() {
    let hull = Hull::networked("uml");
    let net = Net::create(&hull, &[]);
    for (options, part) in [
        (
            &["--network", "none", "--network", &net.name][..],
            "contradict",
        ),
        (&["--network", &net.name, "--network", "none"], "none"),
        (
            &["--network", &net.name, "--network", &net.name],
            "given twice",
        ),
        (&["--network", &net.name, "--network", "nosuch"], "nosuch"),
        (&["--network", "name=x,colour=red"], "invalid network"),
        (&["--network", "alias=x"], "it has no name="),
        (&["--network", "name=default,alias=x"], "not found by names"),
    ] {
        hull.hull(["run", "--rm"])
            .args(options)
            .args(["busybox", "true"])
            .run()
            .fails(125, &[part]);
    }
    drop(net);
    hull.assert_clean();
}

#[test]
fn a_network_that_cannot_be_is_refused_by_name() {
    let hull = Hull::networked("uml");
    let net = Net::create(&hull, &[]);
    let (subnet, own) = (format!("{}/16", net.address(0)), net.address(0));
    let create = |options: &[&str]| hull.hull(["network", "create"]).args(options).run();
    create(&[&net.name]).fails(125, &["network", "exists"]);
    create(&["--subnet", &subnet, "other"]).fails(125, &["overlaps", &own]);
    create(&["--subnet", "10.203.0.0", "other"]).fails(125, &["invalid subnet"]);
    create(&["-d", "macvlan", "other"]).fails(125, &["not supported: network driver"]);
    create(&["host"]).fails(125, &["invalid network name"]);
    hull.hull(["network", "rm", "default"])
        .run()
        .fails(125, &["it is always there"]);
    hull.hull(["network", "rm", "nobody"])
        .run()
        .fails(1, &["no such network: nobody"]);
    let list = hull.hull(["network", "ls", "-q"]).run().ok().text();
    assert!(
        list.contains(&net.name) && list.contains("default"),
        "{list}"
    );
    hull.run(&["--network-alias", "x"], &["true"])
        .fails(125, &["--network-alias", "not found by names"]);
}

#[test]
fn a_network_that_is_removed_while_an_image_is_pulled_does_not_come_back() {
    let hull = Hull::networked("uml");
    let net = Net::create(&hull, &[]);
    // The container has no record until its image is there; a pipe is an image that takes its time.
    let pipe = hull.path("image.tar");
    let made = Command::new("mkfifo").arg(&pipe).status().unwrap();
    assert!(made.success());
    let reference = format!("docker-archive:{}", pipe.display());
    let running = hull
        .hull(["run", "--rm", "--network", &net.name, &reference, "true"])
        .start();
    std::thread::sleep(std::time::Duration::from_millis(500));
    hull.hull(["network", "rm", &net.name]).run().ok();
    let archive = hull.path("saved.tar");
    hull.hull(["image", "save", "-o", archive.to_str().unwrap(), "busybox"])
        .run()
        .ok();
    std::fs::copy(&archive, &pipe).unwrap();
    let said = running.finish().ends(125).error();
    assert!(said.contains("was removed meanwhile"), "{said}");
    hull.hull(["network", "exists", &net.name]).run().ends(1);
    hull.assert_clean();
}
