//! Published ports (`hull run -p`): from where a container is reached through the host, and what
//! happens if a port is taken.

use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener};
use std::time::Duration;

use hull_tests::network::{
    GATEWAY, GATEWAY6, answers, ask, free_port, free_ports, get, has_ipv6, http_server, rules_with,
};
use hull_tests::{Container, Hull, Netns, Options, eventually, on_every_machine, udp_echo_program};

const LOOPBACK: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

on_every_machine!(a_published_port_is_reached_on_every_address_of_the_host);

fn web_server<'a>(hull: &'a Hull, options: &[&str], text: &str) -> Container<'a> {
    hull.start(options, &["sh", "-c", &http_server(text)])
}

/// Nothing answers there.
#[track_caller]
fn silent(address: impl Into<SocketAddr>) {
    let address = address.into();
    if let Ok(text) = get(address) {
        panic!("{address} answers: {text}");
    }
}

fn a_published_port_is_reached_on_every_address_of_the_host(machine: &'static str) {
    let (outside, host, _) = Netns::beside_the_host();
    let hull = Hull::networked(machine);
    let port = free_port();
    let _container = web_server(&hull, &["-p", &format!("{port}:80")], "published");
    answers((LOOPBACK, port), "published");
    answers((GATEWAY, port), "published");
    answers((host, port), "published");
    if has_ipv6() {
        answers((GATEWAY6, port), "published");
    }
    // From another host; from a container, its own included.
    outside.enter(|| answers((host, port), "published"));
    let url = format!("http://{host}:{port}/index.html");
    let output = hull.run(&[], &["wget", "-q", "-O", "-", &url]);
    assert_eq!(output.ok().text(), "published");
    let output = _container.exec(&["wget", "-q", "-O", "-", &url]);
    assert_eq!(output.ok().text(), "published", "its own port");
}

#[test]
fn a_port_published_on_an_address_is_reached_there_only() {
    let (outside, host, _) = Netns::beside_the_host();
    let hull = Hull::networked("uml");
    let (one, two) = (free_port(), free_port());
    let options = [
        "-p",
        &format!("127.0.0.1:{one}:80"),
        "-p",
        &format!("{host}:{two}:80"),
    ];
    let _container = web_server(&hull, &options, "here");
    answers((LOOPBACK, one), "here");
    answers((host, two), "here");
    silent((GATEWAY, one));
    silent((LOOPBACK, two));
    outside.enter(|| {
        answers((host, two), "here");
        silent((host, one));
    });
}

#[test]
fn ports_are_published_on_the_address_of_the_configuration() {
    let hull = Hull::with(Options {
        configuration: "network = \"default\"\npublish_address = \"127.0.0.1\"".into(),
        ..Options::default()
    });
    let (one, two) = (free_port(), free_port());
    let options = [
        "-p",
        &format!("{one}:80"),
        "-p",
        &format!("0.0.0.0:{two}:80"),
    ];
    let _container = web_server(&hull, &options, "local");
    answers((LOOPBACK, one), "local");
    silent((GATEWAY, one));
    answers((GATEWAY, two), "local");
}

#[test]
fn ports_of_udp_are_published_apart_from_those_of_tcp() {
    let hull = Hull::networked("uml");
    let port = free_port();
    // One number on the host, for two ports of the container.
    let options = [
        "-p",
        &format!("{port}:4000/udp"),
        "-p",
        &format!("{port}:80/tcp"),
    ];
    let program = format!("{}:/udp-echo:ro", udp_echo_program().display());
    let script = format!("/udp-echo 4000 & {}", http_server("tcp"));
    let options = [&options[..], &["-v", &program]].concat();
    let _container = hull.start(&options, &["sh", "-c", &script]);
    answers((LOOPBACK, port), "tcp");
    let mut hosts = vec![LOOPBACK, GATEWAY.into()];
    if has_ipv6() {
        hosts.push(GATEWAY6.into());
    }
    for host in hosts {
        eventually("an answer", Duration::from_secs(10), || {
            ask((host, port), b"question").as_deref() == Some(b"QUESTION")
        });
    }
}

#[test]
fn ranges_of_ports_are_published() {
    let hull = Hull::networked("uml");
    let first = free_ports(3);
    let script = "for port in 8000 8001 8002; do \
        mkdir /srv-$port; echo $port >/srv-$port/index.html; httpd -p $port -h /srv-$port; done; sleep 1000";
    let range = format!("{first}-{}:8000-8002", first + 2);
    let _container = hull.start(&["-p", &range], &["sh", "-c", script]);
    for index in 0..3 {
        let text = format!("{}", 8000 + index);
        answers((LOOPBACK, first + index), &text);
    }
}

#[test]
fn one_port_takes_the_first_free_one_of_a_range() {
    let hull = Hull::networked("uml");
    let first = free_ports(3);
    let _taken = TcpListener::bind((Ipv4Addr::UNSPECIFIED, first)).unwrap();
    let range = format!("{first}-{}:80", first + 2);
    let _one = web_server(&hull, &["-p", &range], "one");
    let _two = web_server(&hull, &["-p", &range], "two");
    answers((LOOPBACK, first + 1), "one");
    answers((LOOPBACK, first + 2), "two");
    let output = hull.run(&["-p", &range], &["true"]);
    output.fails(125, &[&format!("{first}-{}", first + 2)]);
}

#[test]
fn a_port_without_a_number_on_the_host_gets_a_free_one() {
    let hull = Hull::networked("uml");
    let container = web_server(&hull, &["-p", "80"], "somewhere");
    // The packet filter has the rule.
    let destination = format!("--to-destination {}:80", container.address());
    let rules = rules_with(&destination);
    let port = rules
        .iter()
        .find_map(|rule| {
            let mut words = rule.split(' ');
            words.find(|word| *word == "--dport")?;
            words.next()?.parse::<u16>().ok()
        })
        .unwrap_or_else(|| panic!("no rule: {rules:?}"));
    answers((LOOPBACK, port), "somewhere");
}

#[test]
fn the_port_of_the_host_that_was_found_is_shown() {
    let hull = Hull::networked("uml");
    let container = web_server(&hull, &["-p", "80"], "somewhere");
    let shown = container.inspect();
    let port = shown["Hull"]["ports"][0]["host_port"]
        .as_u64()
        .unwrap_or_else(|| panic!("hull inspect names no port: {:?}", shown["Hull"]["network"]));
    answers((LOOPBACK, u16::try_from(port).unwrap()), "somewhere");
    let listed = hull.hull(["ps"]).run().ok().text();
    assert!(listed.contains(&port.to_string()), "{listed}");
}

#[test]
fn a_port_that_is_taken_is_named_and_nothing_is_left() {
    let hull = Hull::networked("uml");
    let port = free_port();
    let published = format!("127.0.0.1:{port}:80");
    let taken = TcpListener::bind((LOOPBACK, port)).unwrap();
    for options in [
        vec!["-p", &published],
        vec!["-p", "80", "-p", &published],
        vec!["-p", &published, "-d"],
    ] {
        let output = hull.run(&options, &["sleep", "1000"]);
        output.fails(125, &["publish", &port.to_string(), "already"]);
        hull.assert_clean();
        let rules = rules_with(&format!("--dport {port} "));
        assert!(rules.is_empty(), "{rules:?}");
    }
    // The other protocol's port is free.
    hull.run(&["-p", &format!("{published}/udp")], &["true"])
        .ok();
    drop(taken);
    let _container = web_server(&hull, &["-p", &published], "free");
    answers((LOOPBACK, port), "free");
}

#[test]
fn two_containers_cannot_have_one_port() {
    let hull = Hull::networked("uml");
    let port = free_port();
    let published = format!("{port}:80");
    let first = web_server(&hull, &["-p", &published], "first");
    answers((LOOPBACK, port), "first");
    // Nor on one of the host's addresses.
    for other in [published.clone(), format!("127.0.0.1:{port}:80")] {
        let output = hull.run(&["-p", &other], &["true"]);
        output.fails(125, &["publish", &port.to_string(), "already"]);
    }
    answers((LOOPBACK, port), "first");
    assert_eq!(hull.names(), [first.name.as_str()]);
}

#[test]
fn nobody_on_the_host_can_take_a_published_port() {
    let hull = Hull::networked("uml");
    let port = free_port();
    let container = web_server(&hull, &["-p", &format!("{port}:80")], "mine");
    answers((LOOPBACK, port), "mine");
    let error = TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::AddrInUse);
    hull.hull(["rm", "-f", &container.name]).run().ok();
    TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).unwrap();
}

#[test]
fn a_port_is_free_again_after_the_end() {
    let hull = Hull::networked("uml");
    let port = free_port();
    let published = format!("{port}:80");
    for round in ["rm -f", "kill", "exit"] {
        let script = format!("mkfifo /end; ({}) & read word </end", http_server("again"));
        let container = hull.start(&["-p", &published], &["sh", "-c", &script]);
        answers((LOOPBACK, port), "again");
        match round {
            "rm -f" => {}
            "kill" => {
                container.does("kill").ok();
                container.wait();
                // Stopped, it has no ports, even before it is removed.
                drop(TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).unwrap());
            }
            "exit" => {
                // The container may end before this command.
                container.sh("echo word >/end");
                assert_eq!(container.wait(), 0);
            }
            other => panic!("{other}"),
        }
        let removed = hull.hull(["rm", "-f", &container.name]).run();
        removed.ok();
        silent((LOOPBACK, port));
        let rules = rules_with(&format!("--dport {port} "));
        assert!(rules.is_empty(), "{round}: {rules:?}");
    }
    hull.assert_clean();
}

#[test]
fn containers_reach_others_and_are_reached_where_the_host_forwards_nothing_by_itself() {
    let (host, outside) = (Netns::new(), Netns::new());
    host.join("eth0", &outside, "eth0");
    host.ip("address add 198.51.100.1/24 dev eth0");
    outside.ip("address add 198.51.100.2/24 dev eth0");
    for program in ["iptables", "ip6tables"] {
        let mut drop = host.command(program);
        assert!(
            drop.args(["-P", "FORWARD", "DROP"])
                .status()
                .unwrap()
                .success()
        );
    }
    let hull = Hull::networked("uml");
    let network = format!("--net={}", host.path().display());
    let name = hull.unique("c");
    let port = free_port();
    let publish = format!("{port}:80");
    let server = http_server("published");
    // Existing rules are left alone, and created again after they have been removed.
    for round in 0..3 {
        if round == 2 {
            let mut flush = host.command("iptables");
            assert!(flush.arg("-F").status().unwrap().success());
        }
        hull.hull([
            "run", "-d", "--name", &name, "-p", &publish, "busybox", "sh", "-c", &server,
        ])
        .under(&["nsenter", &network])
        .run()
        .ok();
        outside.enter(|| answers((Ipv4Addr::new(198, 51, 100, 1), port), "published"));
        let container = hull.container(&name);
        container.sh("ping -c 1 -W 5 198.51.100.2").ok();
        hull.hull(["rm", "-f", &name]).run().ok();
    }
    let mut rules = host.command("iptables");
    let rules = rules.args(["-S"]).output().unwrap();
    let rules = String::from_utf8(rules.stdout).unwrap();
    assert_eq!(rules.matches("-i hull0 -j ACCEPT").count(), 1, "{rules}");
    assert_eq!(rules.matches("-A FORWARD").count(), 1, "{rules}");
    // What the administrator forbids is forbidden.
    let mut forbid = host.command("iptables");
    let forbid = forbid.args(["-A", "HULL-USER", "-d", "198.51.100.2", "-j", "DROP"]);
    assert!(forbid.status().unwrap().success());
    hull.hull([
        "run",
        "--rm",
        "busybox",
        "ping",
        "-c",
        "1",
        "-W",
        "1",
        "198.51.100.2",
    ])
    .under(&["nsenter", &network])
    .run()
    .ends(1);
}
