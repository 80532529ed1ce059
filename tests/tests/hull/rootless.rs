//! hull called by a user who is not root.

use std::fs;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener};
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::time::Duration;

use hull_tests::network::{answers, ask, free_port, free_ports, get, has_ipv6, http_server};
use hull_tests::{
    Archive, Hull, Image, Lack, Layout, Netns, Options, busybox_archive, descendants, eventually,
    on_every_machine, udp_echo_program,
};

const LOOPBACK: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

on_every_machine!(a_container_runs_in_its_own_kernel_and_none_of_its_processes_is_root_s);

fn without_network(machine: &'static str) -> Hull {
    Hull::with(Options {
        machine,
        person: Some(Lack::Nothing),
        ..Options::default()
    })
}

fn lacking(lack: Lack) -> Hull {
    Hull::with(Options {
        configuration: "network = \"default\"".into(),
        person: Some(lack),
        ..Options::default()
    })
}

/// Real user ids of a process.
fn user_of(process: i32) -> u32 {
    let status = fs::read_to_string(format!("/proc/{process}/status")).unwrap_or_default();
    let ids = status.lines().find_map(|line| line.strip_prefix("Uid:"));
    let id = ids.and_then(|ids| ids.split_whitespace().next());
    id.map_or(u32::MAX, |id| id.parse().unwrap())
}

fn a_container_runs_in_its_own_kernel_and_none_of_its_processes_is_root_s(machine: &'static str) {
    let hull = without_network(machine);
    let person = hull.person.as_ref().unwrap();
    let container = hull.sleeper();
    let host = rustix::system::uname();
    let kernel = container.sh("uname -r").ok().text();
    assert_ne!(kernel, host.release().to_string_lossy());
    assert_eq!(container.sh("id -u; id -g").ok().text(), "0\n0");
    for which in ["sandbox", "devices", "machine"] {
        let process = container.host_process(which).as_raw_nonzero().get();
        assert!(
            person.owns(user_of(process)),
            "{which}: {}",
            user_of(process)
        );
    }
    let of_root: Vec<_> = descendants()
        .into_iter()
        .filter(|(process, _)| user_of(*process) == 0)
        .collect();
    assert_eq!(of_root, [], "processes of root");
}

#[test]
fn all_commands_work() {
    let hull = without_network("uml");
    let container = hull.start(
        &["--memory", "64m", "--hostname", "own", "-e", "A=b"],
        &["sh", "-c", "echo said; exec sleep 1000"],
    );
    eventually("it is logged", Duration::from_secs(5), || {
        container.does("logs").ok().text() == "said"
    });
    assert_eq!(container.sh("hostname; echo $A").ok().text(), "own\nb");
    assert_eq!(hull.names(), [container.name.as_str()]);
    let limit = container.sh("cat /sys/fs/cgroup/memory.max").ok().text();
    assert_eq!(limit, (64 << 20).to_string());
    container.does("pause").ok();
    container.does("unpause").ok();
    assert!(container.does("top").ok().text().contains("sleep 1000"));
    let stats = hull.hull(["stats", "--no-stream", &container.name]).run();
    assert!(stats.ok().text().contains(&container.name));
    let there = format!("{}:/tmp/copied", container.name);
    fs::write(hull.path("home/file"), "content").unwrap();
    hull.hull(["cp", "file", &there]).run().ok();
    assert_eq!(container.sh("cat /tmp/copied").ok().text(), "content");
    hull.hull(["cp", &there, "back"]).run().ok();
    let back = hull.path("home/back");
    let person = hull.person.as_ref().unwrap();
    assert_eq!(fs::metadata(&back).unwrap().uid(), person.uid);
    assert_eq!(fs::read_to_string(&back).unwrap(), "content");
    // One right after the other.
    container.does("stop").ok();
    container.does("rm").ok();
    assert_eq!(
        hull.hull(["image", "ls", "-q"])
            .run()
            .ok()
            .text()
            .lines()
            .count(),
        1
    );
    hull.hull(["image", "rm", "busybox"]).run().ok();
    hull.assert_clean();
}

#[test]
fn files_of_other_users_and_what_layers_hide_are_what_the_image_says() {
    let hull = without_network("uml");
    let base = fs::read(busybox_archive()).unwrap();
    let second = Archive::new()
        .directory("full/")
        .file("full/old", "")
        .owned("of-user", 1000)
        .owned("of-nobody", 65534)
        .null("null")
        .bytes();
    let third = Archive::new()
        .file("etc/.wh.group", "")
        .directory("full/")
        .file("full/.wh..wh..opq", "")
        .file("full/new", "")
        .bytes();
    let directory = hull.path("layout");
    Layout::write(
        &directory,
        &[("latest", &Image::new(&[base, second, third]))],
    );
    let reference = format!("oci:{}:latest", directory.display());
    hull.hull(["image", "pull", &reference]).run().ok();
    let script = "stat -c '%n %u:%g' /of-*; ls /full; ls /etc/group /null; touch /w; chown 5:6 /w; \
                  stat -c %u:%g /w; mkdir /full/sub; rm -r /full; mkdir /full; ls /full";
    let output = hull
        .hull(["run", "--rm", &reference, "sh", "-c", script])
        .run();
    let text = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    assert_eq!(
        text, "/of-nobody 65534:65534\n/of-user 1000:1000\nnew\n5:6",
        "{output:?}"
    );
}

#[test]
fn what_a_container_writes_into_a_directory_is_the_persons() {
    let hull = without_network("uml");
    let person = hull.person.as_ref().unwrap();
    let volume = hull.path("home/volume");
    fs::create_dir(&volume).unwrap();
    chown(&volume, Some(person.uid), Some(person.uid)).unwrap();
    let mount = format!("{}:/v", volume.display());
    hull.sh(&["-v", &mount], "echo a >/v/a; echo b >/v/b; chown 7 /v/b")
        .ok();
    let owner = |name: &str| fs::metadata(volume.join(name)).unwrap().uid();
    assert_eq!(owner("a"), person.uid);
    // User 0 is the caller, user 1 the first of the subordinate ids.
    assert_eq!(owner("b"), person.first_subordinate + 6);
    // What the caller may not read, no user in the container may.
    let secret = hull.path("secret");
    fs::write(&secret, "secret").unwrap();
    fs::set_permissions(&secret, fs::Permissions::from_mode(0o600)).unwrap();
    let mount = format!("{}:/secret", secret.display());
    hull.sh(&["-v", &mount], "cat /secret").ends(1);
}

#[test]
fn a_container_reaches_others_through_the_host() {
    let (outside, host, there) = Netns::beside_the_host();
    let hull = Hull::without_root();
    let serve = |address: Ipv4Addr| TcpListener::bind((address, 0)).unwrap();
    let inside = outside.enter(|| serve(there));
    let ours = serve(host);
    let container = hull.sleeper();
    for (listener, address) in [(inside, there), (ours, host)] {
        let port = listener.local_addr().unwrap().port();
        let answering = std::thread::spawn(move || {
            let (mut stream, from) = listener.accept().unwrap();
            std::io::Write::write_all(&mut stream, b"hello\n").unwrap();
            from.ip()
        });
        // Pasta of 2023 loses the end of a connection that both sides end at once.
        let script = format!("sleep 1 | nc {address} {port}");
        assert_eq!(container.sh(&script).ok().text(), "hello");
        // The host asks.
        assert_eq!(answering.join().unwrap(), IpAddr::V4(host));
    }
    // It has the host's addresses, and finds itself by name.
    let name = container.sh("hostname").ok().text();
    let known = container.sh("cat /etc/hosts").ok().text();
    let own = container.address();
    assert!(known.contains(&format!("{own}\t{name}")), "{known}");
}

#[test]
fn what_listens_on_the_host_s_loopback_interface_is_not_reached() {
    let hull = Hull::without_root();
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    listener.set_nonblocking(true).unwrap();
    let script = format!(
        "for a in 127.0.0.1 $(ip route | sed -n 's/^default via \\([^ ]*\\).*/\\1/p') 169.254.169.254; do \
         timeout 2 nc $a {port} </dev/null && echo reached $a; done; true"
    );
    assert_eq!(hull.sh(&[], &script).ok().text(), "");
    assert!(listener.accept().is_err(), "somebody came");
}

#[test]
fn a_published_port_is_reached_from_the_host_and_from_outside() {
    let (outside, host, _) = Netns::beside_the_host();
    let hull = Hull::without_root();
    let (one, two) = (free_port(), free_port());
    let options = [
        "-p",
        &format!("{one}:80"),
        "-p",
        &format!("127.0.0.1:{two}:80"),
    ];
    let _container = hull.start(&options, &["sh", "-c", &http_server("published")]);
    answers((LOOPBACK, one), "published");
    answers((host, one), "published");
    if has_ipv6() {
        answers(
            "[::1]:0"
                .parse::<SocketAddr>()
                .map(|mut address| {
                    address.set_port(one);
                    address
                })
                .unwrap(),
            "published",
        );
    }
    outside.enter(|| answers((host, one), "published"));
    answers((LOOPBACK, two), "published");
    assert!(get((host, two)).is_err(), "beyond its address");
}

#[test]
fn a_published_udp_port_is_reached_from_outside() {
    let (outside, host, _) = Netns::beside_the_host();
    let hull = Hull::without_root();
    let port = free_port();
    // Where the caller can read it.
    let program = hull.path("udp-echo");
    fs::copy(udp_echo_program(), &program).unwrap();
    let mount = format!("{}:/udp-echo:ro", program.display());
    let options = ["-v", &mount, "-p", &format!("{port}:7000/udp")];
    let _container = hull.start(&options, &["/udp-echo", "7000"]);
    eventually("an answer", Duration::from_secs(10), || {
        outside.enter(|| ask((host, port), b"datagram")) == Some(b"DATAGRAM".to_vec())
    });
}

#[test]
fn ports_that_cannot_be_published_are_named_and_nothing_is_left() {
    let hull = Hull::without_root();
    let port = free_port();
    let taken = TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).unwrap();
    let publish = |what: &str| hull.run(&["-p", what], &["true"]);
    publish(&format!("{port}:80")).fails(125, &["port is already allocated"]);
    drop(taken);
    publish(&format!("{}:80/sctp", free_ports(1))).fails(125, &["80/sctp"]);
    hull.assert_clean();
}

#[test]
fn options_that_need_root_are_refused_by_name() {
    let hull = Hull::without_root();
    let refused = |options: &[&str], why: &str| {
        hull.run(options, &["true"]).fails(125, &[why]);
    };
    refused(
        &["--network", "other"],
        "not supported without root: network other",
    );
    refused(&["--ip", "10.0.0.7"], "not supported without root: --ip");
    hull.assert_clean();
}

#[test]
fn whatever_is_killed_the_container_is_stopped_and_removing_it_leaves_nothing() {
    let hull = Hull::without_root();
    for which in ["sandbox", "devices", "machine"] {
        let port = free_port();
        let container = hull.start(&["-p", &format!("{port}:80")], &["sleep", "1000"]);
        container.kill_host_process(which);
        eventually("it is stopped", Duration::from_secs(2), || {
            container.state() == "stopped"
        });
        container.does("rm").ok();
        hull.assert_clean();
        // The port is free again.
        drop(TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).unwrap());
    }
}

#[test]
fn the_end_of_the_network_is_logged_and_the_container_goes_on() {
    let hull = Hull::without_root();
    let container = hull.sleeper();
    let is_pasta = |(process, what): (i32, String)| what.contains("pasta").then_some(process);
    let pasta = descendants()
        .into_iter()
        .find_map(is_pasta)
        .expect("a pasta");
    let pasta = rustix::process::Pid::from_raw(pasta).unwrap();
    rustix::process::kill_process(pasta, rustix::process::Signal::KILL).unwrap();
    let id = container.inspect()["Hull"]["id"]
        .as_str()
        .unwrap()
        .to_owned();
    let log = hull.path(&format!("run/sandboxes/{}/sandbox.log", &id[..24]));
    eventually("it is logged", Duration::from_secs(2), || {
        fs::read_to_string(&log)
            .unwrap()
            .contains("pasta has ended")
    });
    assert_eq!(container.sh("echo well").ok().text(), "well");
}

#[test]
fn who_has_no_subordinate_ids_is_told_what_to_do() {
    let hull = lacking(Lack::SubordinateIds);
    let why = "person is not root and has no subordinate ids in /etc/subuid";
    let output = hull.run(&[], &["true"]).fails(125, &[why]);
    let hint = "hint: sudo usermod --add-subuids";
    assert!(output.error().contains(hint), "{}", output.error());
    let check = hull.hull(["check"]).run().ends(1);
    assert!(
        check.text().contains("ERROR privileges"),
        "{}",
        check.text()
    );
}

#[test]
fn what_a_network_lacks_is_named_and_nothing_is_left() {
    for (lack, why, hint) in [
        (Lack::Taps, "tun", "chmod 0666 /dev/net/tun"),
        (Lack::Pasta, "pasta", "apt-get install passt"),
    ] {
        let hull = lacking(lack);
        let output = hull.run(&[], &["true"]).fails(125, &[why]);
        assert!(output.error().contains(hint), "{}", output.error());
        let check = hull.hull(["check"]).run().ends(1);
        assert!(check.text().contains(hint), "{}", check.text());
        hull.run(&["--network", "none"], &["true"]).ok();
        hull.assert_clean();
    }
}

#[test]
fn state_is_not_kept_where_others_can_change_it() {
    let hull = without_network("uml");
    let runtime = hull.path("home/runtime");
    let state = runtime.join("hull");
    fs::create_dir_all(&state).unwrap();
    let person = hull.person.as_ref().unwrap();
    // Owned by another user, and writable by everybody.
    for (owner, mode) in [(0, 0o755), (person.uid, 0o777)] {
        chown(&state, Some(owner), Some(owner)).unwrap();
        fs::set_permissions(&state, fs::Permissions::from_mode(mode)).unwrap();
        let list = hull
            .hull(["ps"])
            .env("RUNTIME", &runtime)
            .env("HULL_CONFIG", "");
        list.run().fails(125, &["runtime/hull", "others can write"]);
    }
}

#[test]
fn the_persons_own_configuration_and_directories_are_used() {
    let hull = without_network("uml");
    let home = hull.path("home");
    let own = home.join(".config/hull");
    fs::create_dir_all(&own).unwrap();
    fs::write(own.join("config.toml"), "cpus = 1\nmemory = \"128m\"\n").unwrap();
    let config = hull
        .hull(["config"])
        .env("HULL_CONFIG", "")
        .run()
        .ok()
        .text();
    let has = |key: &str, value: &str| {
        let found = config.lines().find(|line| line.starts_with(key)).unwrap();
        assert!(found.contains(value), "{found}");
    };
    has("memory", "128m");
    has("data_dir", &format!("{}/.local/share/hull", home.display()));
    let person = hull.person.as_ref().unwrap();
    has("run_dir", &format!("/tmp/hull-{}", person.uid));
}
