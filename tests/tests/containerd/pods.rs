//! Pods, as the kubelet runs them by CRI.

use std::collections::HashMap;
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixListener;
use std::time::Duration;

use hull_tests::cri::{
    ContainerConfig, ContainerStatus, Cri, Dns, IdMapping, Mount, Namespaces, PodConfig,
    PodSecurity, Resources, Users, container, linux,
};
use hull_tests::{Containerd, eventually, unix_client_program};

const HANDLER: &str = "hull";

const EXITED: i32 = 2;

/// Creates and starts a container.
pub fn runs(cri: &Cri, id: &str, of: &PodConfig, config: ContainerConfig) -> String {
    let container = cri.create(id, of, config).unwrap();
    cri.start(&container).unwrap();
    container
}

/// Executes a shell script that succeeds; what it printed.
fn sh(cri: &Cri, id: &str, script: &str) -> String {
    let done = cri.exec(id, &["sh", "-c", script]).unwrap();
    let error = String::from_utf8_lossy(&done.stderr).into_owned();
    assert_eq!(done.status, 0, "{script}: {error}");
    String::from_utf8_lossy(&done.stdout).trim().to_owned()
}

fn ended(cri: &Cri, id: &str) -> ContainerStatus {
    eventually("the container has ended", Duration::from_secs(30), || {
        cri.container(id).state == EXITED
    });
    cri.container(id)
}

#[test]
fn containers_of_a_pod_share_one_machine_and_its_network() {
    let containerd = Containerd::with_pods();
    let cri = containerd.cri();
    let config = containerd.pod("web");
    let id = cri.run_pod(&config, HANDLER).unwrap();
    let address = cri.pod(&id).network.unwrap().ip;
    let script = "echo hello >/index.html; httpd -f -p 8080 -h /";
    let web = runs(&cri, &id, &config, container("web", script));
    let other = runs(
        &cri,
        &id,
        &config,
        container("other", "echo in the log; sleep 1000"),
    );
    assert_eq!(sh(&cri, &web, "hostname"), "web");
    assert!(sh(&cri, &web, "uname -r").contains("hull"));
    assert!(sh(&cri, &other, "ip addr show eth0").contains(&address));
    eventually("the server answers", Duration::from_secs(10), || {
        let got = cri.exec(&other, &["wget", "-qO-", "http://localhost:8080"]);
        got.unwrap().stdout == b"hello\n"
    });
    // One shim and one machine for all three.
    assert_eq!(
        sh(&cri, &web, "cat /proc/sys/kernel/random/boot_id"),
        sh(&cri, &other, "cat /proc/sys/kernel/random/boot_id")
    );
    // Processes are each container's own.
    assert!(!sh(&cri, &other, "ps").contains("httpd"));
    let log = containerd.path("logs").join("other.log");
    eventually("the log", Duration::from_secs(5), || {
        std::fs::read_to_string(&log).is_ok_and(|text| text.contains("stdout F in the log"))
    });
    let second = containerd.pod("client");
    let second_id = cri.run_pod(&second, HANDLER).unwrap();
    let client = runs(&cri, &second_id, &second, container("client", "sleep 1000"));
    assert_eq!(
        sh(&cri, &client, &format!("wget -qO- http://{address}:8080")),
        "hello"
    );
    cri.remove_pod(&second_id).unwrap();
    cri.remove_pod(&id).unwrap();
    containerd.assert_clean();
}

#[test]
fn a_container_is_restarted_in_a_living_pod() {
    let containerd = Containerd::with_pods();
    let cri = containerd.cri();
    let config = containerd.pod("restarts");
    let id = cri.run_pod(&config, HANDLER).unwrap();
    for attempt in 0..3 {
        let mut one = container("one", &format!("exit {}", attempt + 3));
        one.metadata.as_mut().unwrap().attempt = attempt;
        let one = runs(&cri, &id, &config, one);
        let status = ended(&cri, &one);
        assert_eq!(status.exit_code, i32::try_from(attempt).unwrap() + 3);
        assert_eq!(status.reason, "Error");
        cri.remove(&one).unwrap();
    }
    let script = "trap 'exit 0' TERM; touch /ready; sleep 1000 & wait";
    let slow = runs(&cri, &id, &config, container("slow", script));
    eventually("it is ready", Duration::from_secs(10), || {
        cri.exec(&slow, &["ls", "/ready"]).unwrap().status == 0
    });
    cri.stop(&slow, 10).unwrap();
    assert_eq!(ended(&cri, &slow).reason, "Completed");
    assert_eq!(cri.pod(&id).state, 0);
    cri.remove_pod(&id).unwrap();
    containerd.assert_clean();
}

#[test]
fn limits_of_a_pod_make_its_machine_and_hold() {
    let containerd = Containerd::with_pods();
    let cri = containerd.cri();
    let mut config = containerd.pod("limits");
    config.linux.as_mut().unwrap().resources = Some(Resources {
        memory: 200 << 20,
        ..Resources::default()
    });
    let id = cri.run_pod(&config, HANDLER).unwrap();
    let limited = |memory| Some(linux(memory, Namespaces::own_processes()));
    let mut steady = container("steady", "sleep 1000");
    steady.linux = limited(100 << 20);
    let steady = runs(&cri, &id, &config, steady);
    let total: u64 = sh(&cri, &steady, "grep MemTotal /proc/meminfo | tr -dc 0-9")
        .parse()
        .unwrap();
    assert!((200 << 10..300 << 10).contains(&total), "{total} kB");
    assert_eq!(
        sh(&cri, &steady, "cat /sys/fs/cgroup/memory.max"),
        (100 << 20).to_string()
    );
    let mut greedy = container("greedy", "sleep 1; tail /dev/zero");
    greedy.linux = limited(40 << 20);
    let greedy = runs(&cri, &id, &config, greedy);
    let status = ended(&cri, &greedy);
    assert_eq!(
        (status.exit_code, status.reason.as_str()),
        (137, "OOMKilled")
    );
    let change = Resources {
        memory: 60 << 20,
        ..Resources::default()
    };
    cri.update(&steady, change).unwrap();
    assert_eq!(
        sh(&cri, &steady, "cat /sys/fs/cgroup/memory.max"),
        (60 << 20).to_string()
    );
    let stats = cri.stats(&steady);
    assert!(stats.cpu.unwrap().usage.unwrap().value > 0);
    assert!((1..60 << 20).contains(&stats.memory.unwrap().working_set.unwrap().value));
    cri.remove_pod(&id).unwrap();
    containerd.assert_clean();
}

#[test]
fn annotations_decide_about_the_machine_where_the_host_allows_it() {
    let containerd = Containerd::with_pods();
    let cri = containerd.cri();
    let mut config = containerd.pod("annotated");
    let annotate =
        |name: &str, value: &str| HashMap::from([(format!("hull.dev/{name}"), value.to_owned())]);
    config.annotations = annotate("memory", "300m");
    let error = cri.run_pod(&config, HANDLER).unwrap_err();
    assert!(
        error.contains("hull.dev/memory") && error.contains("pod_annotations"),
        "{error}"
    );
    containerd.configure("pod_annotations = [\"hull.dev/memory\", \"hull.dev/cpus\"]\n");
    let id = cri.run_pod(&config, HANDLER).unwrap();
    let one = runs(&cri, &id, &config, container("one", "sleep 1000"));
    let total = sh(&cri, &one, "grep MemTotal /proc/meminfo | tr -dc 0-9");
    let total: u64 = total.parse().unwrap();
    assert!((270 << 10..300 << 10).contains(&total), "{total} kB");
    cri.remove_pod(&id).unwrap();
    config.annotations = annotate("cpus", "many");
    let error = cri.run_pod(&config, HANDLER).unwrap_err();
    assert!(
        error.contains("hull.dev/cpus") && error.contains("many"),
        "{error}"
    );
    containerd.assert_clean();
}

#[test]
fn a_pod_has_one_of_the_kernels_that_the_host_lists() {
    let containerd = Containerd::with_pods();
    let cri = containerd.cri();
    let kernel = containerd.path("kernel-um-other");
    std::fs::copy(hull_tests::guest_files().join("kernel-um"), &kernel).unwrap();
    let mut config = containerd.pod("kernel");
    let name = kernel.to_str().unwrap().to_owned();
    config.annotations = HashMap::from([("hull.dev/kernel".to_owned(), name)]);
    containerd.configure("pod_annotations = [\"hull.dev/kernel\"]\n");
    let error = cri.run_pod(&config, HANDLER).unwrap_err();
    assert!(
        error.contains("none of this host's kernels for pods"),
        "{error}"
    );
    containerd.configure(&format!("pod_kernels = [{kernel:?}]\n"));
    let id = cri.run_pod(&config, HANDLER).unwrap();
    let one = runs(&cri, &id, &config, container("one", "sleep 1000"));
    assert!(sh(&cri, &one, "uname -r").contains("hull"));
    let shim = hull_tests::shim::shim_of("k8s.io", &id).unwrap();
    let machine = hull_tests::shim::machine_of(shim).unwrap();
    let executable = std::fs::read_link(format!("/proc/{machine}/exe")).unwrap();
    assert!(executable.ends_with("kernel-um-other"), "{executable:?}");
    cri.remove_pod(&id).unwrap();
    containerd.assert_clean();
}

#[test]
fn namespaces_are_shared_as_the_pod_says() {
    let containerd = Containerd::with_pods();
    let cri = containerd.cri();
    let mut config = containerd.pod("shared");
    let shared = Some(Namespaces::default());
    let of_pod = config.linux.as_mut().unwrap();
    of_pod.security = Some(PodSecurity {
        namespaces: shared.clone(),
    });
    of_pod.sysctls = HashMap::from([("net.ipv4.ip_unprivileged_port_start".into(), "79".into())]);
    let id = cri.run_pod(&config, HANDLER).unwrap();
    let in_pod = |name: &str, script: &str, namespaces: Namespaces| {
        let mut one = container(name, script);
        one.linux = Some(linux(0, namespaces));
        runs(&cri, &id, &config, one)
    };
    let first = in_pod("first", "exec sleep 4321", Namespaces::default());
    let second = in_pod("second", "sleep 1000", Namespaces::default());
    assert!(sh(&cri, &second, "ps").contains("sleep 4321"));
    let port = "cat /proc/sys/net/ipv4/ip_unprivileged_port_start";
    assert_eq!(sh(&cri, &first, port), "79");
    // Memory that is shared by name.
    sh(&cri, &first, "echo shared >/dev/shm/x");
    assert_eq!(sh(&cri, &second, "cat /dev/shm/x"), "shared");
    // As of an ephemeral container that looks at another one.
    let alone = Namespaces::own_processes();
    let target = in_pod("target", "exec sleep 8765", alone.clone());
    let third = in_pod("third", "sleep 1000", alone);
    assert!(!sh(&cri, &third, "ps").contains("sleep 8765"));
    let debugger = in_pod(
        "debugger",
        "sleep 1000",
        Namespaces {
            pid: 3,
            target: target.clone(),
            ..Namespaces::default()
        },
    );
    let seen = sh(&cri, &debugger, "ps");
    assert!(
        seen.contains("sleep 8765") && !seen.contains("sleep 4321"),
        "{seen}"
    );
    cri.remove_pod(&id).unwrap();
    containerd.assert_clean();
}

#[test]
fn what_a_pod_cannot_have_is_named() {
    let containerd = Containerd::with_pods();
    let cri = containerd.cri();
    let mut config = containerd.pod("network");
    let namespaces = Namespaces {
        network: 2,
        ..Namespaces::own_processes()
    };
    config.linux.as_mut().unwrap().security = Some(PodSecurity {
        namespaces: Some(namespaces),
    });
    let error = cri.run_pod(&config, HANDLER).unwrap_err();
    assert!(
        error.contains("not supported") && error.contains("network"),
        "{error}"
    );
    let config = containerd.pod("commands");
    let id = cri.run_pod(&config, HANDLER).unwrap();
    let mut none = container("none", "");
    none.command = vec!["nonexistent".to_owned()];
    let started = cri
        .create(&id, &config, none)
        .and_then(|none| cri.start(&none));
    let error = started.unwrap_err();
    assert!(
        error.contains("executable file not found in $PATH"),
        "{error}"
    );
    cri.remove_pod(&id).unwrap();
    containerd.assert_clean();
}

#[test]
fn volumes_are_files_of_the_host_whose_changes_are_seen() {
    let containerd = Containerd::with_pods();
    let cri = containerd.cri();
    let config = containerd.pod("volumes");
    let id = cri.run_pod(&config, HANDLER).unwrap();
    // As the kubelet writes config maps: a link to a directory, which is replaced.
    let map = containerd.path("map");
    std::fs::create_dir_all(map.join("..1")).unwrap();
    std::fs::write(map.join("..1/key"), "old").unwrap();
    std::os::unix::fs::symlink("..1", map.join("..data")).unwrap();
    std::os::unix::fs::symlink("..data/key", map.join("key")).unwrap();
    let empty = containerd.path("empty");
    std::fs::create_dir(&empty).unwrap();
    let mount = |host: &std::path::Path, at: &str, readonly| Mount {
        container_path: at.to_owned(),
        host_path: host.display().to_string(),
        readonly,
        ..Mount::default()
    };
    let with_mounts = |name: &str| ContainerConfig {
        mounts: vec![mount(&map, "/map", true), mount(&empty, "/empty", false)],
        ..container(name, "sleep 1000")
    };
    let one = runs(&cri, &id, &config, with_mounts("one"));
    let two = runs(&cri, &id, &config, with_mounts("two"));
    assert_eq!(sh(&cri, &one, "cat /map/key"), "old");
    assert_eq!(
        sh(&cri, &one, "touch /map/x 2>&1 | grep -c Read-only; true"),
        "1"
    );
    sh(&cri, &one, "echo hello >/empty/x");
    assert_eq!(sh(&cri, &two, "cat /empty/x"), "hello");
    std::fs::create_dir(map.join("..2")).unwrap();
    std::fs::write(map.join("..2/key"), "new").unwrap();
    std::os::unix::fs::symlink("..2", map.join("..new")).unwrap();
    std::fs::rename(map.join("..new"), map.join("..data")).unwrap();
    eventually("the new value", Duration::from_secs(5), || {
        sh(&cri, &two, "cat /map/key") == "new"
    });
    cri.remove_pod(&id).unwrap();
    containerd.assert_clean();
}

#[test]
fn a_socket_of_the_host_leads_to_its_server_from_the_container_that_has_it() {
    let containerd = Containerd::with_pods();
    let cri = containerd.cri();
    let config = containerd.pod("sockets");
    let id = cri.run_pod(&config, HANDLER).unwrap();
    let socket = containerd.path("server.sock");
    let listener = UnixListener::bind(&socket).unwrap();
    let mount = |host: &std::path::Path, at: &str| Mount {
        container_path: at.to_owned(),
        host_path: host.display().to_string(),
        readonly: true,
        ..Mount::default()
    };
    let with = |name: &str, at: &[&str]| ContainerConfig {
        mounts: at
            .iter()
            .map(|at| mount(&socket, at))
            .chain([mount(&unix_client_program(), "/client")])
            .collect(),
        ..container(name, "sleep 1000")
    };
    // The one that is there first has none.
    let one = runs(&cri, &id, &config, with("one", &[]));
    let two = runs(&cri, &id, &config, with("two", &["/a", "/run/b"]));
    sh(&cri, &one, "test -x /client -a ! -e /a");
    let serving = std::thread::spawn(move || {
        for _ in 0..2 {
            let (mut stream, _) = listener.accept().unwrap();
            stream.write_all(b"from the host\n").unwrap();
        }
        listener
    });
    for path in ["/a", "/run/b"] {
        let talk = format!("/client {path} talk </dev/null");
        assert_eq!(sh(&cri, &two, &talk), "from the host");
    }
    drop(serving.join().unwrap());
    let refused = sh(&cri, &two, "/client /a try || true");
    assert_eq!(refused, "Connection refused");
    cri.remove_pod(&id).unwrap();
    containerd.assert_clean();
}

#[test]
fn a_pod_with_users_of_its_own_owns_the_files_of_its_image_and_volumes() {
    if !Containerd::is_2_or_later("volumes with mapped ids") {
        return;
    }
    let containerd = Containerd::with_pods();
    let cri = containerd.cri();
    let maps = || {
        let (host, container, length) = (200_000, 0, 65_536);
        vec![IdMapping {
            host,
            container,
            length,
        }]
    };
    let namespaces = || Namespaces {
        users: Some(Users {
            mode: 0,
            uids: maps(),
            gids: maps(),
        }),
        ..Namespaces::own_processes()
    };
    let mut config = containerd.pod("users");
    config.linux.as_mut().unwrap().security = Some(PodSecurity {
        namespaces: Some(namespaces()),
    });
    let id = cri.run_pod(&config, HANDLER).unwrap();
    let volume = containerd.path("volume");
    std::fs::create_dir(&volume).unwrap();
    std::fs::write(volume.join("file"), "of the node").unwrap();
    let mut with_volume = container("one", "sleep 1000");
    with_volume.mounts = vec![Mount {
        container_path: "/v".to_owned(),
        host_path: volume.display().to_string(),
        uids: maps(),
        gids: maps(),
        ..Mount::default()
    }];
    with_volume.linux = Some(linux(0, namespaces()));
    let one = runs(&cri, &id, &config, with_volume);
    let ids = "id -u; cat /proc/self/uid_map; stat -c %u:%g / /bin/busybox /v /v/file /etc/hosts";
    let seen = sh(&cri, &one, ids);
    let seen: Vec<_> = seen.split_whitespace().collect();
    let all = ["0:0"; 5];
    assert_eq!(seen[..4], ["0", "0", "200000", "65536"]);
    assert_eq!(seen[4..], all);
    sh(
        &cri,
        &one,
        "touch /v/new /new && chown 5:6 /v/new /new && rm /bin/busybox",
    );
    let new = std::fs::metadata(volume.join("new")).unwrap();
    assert_eq!((new.uid(), new.gid()), (5, 6));
    cri.remove_pod(&id).unwrap();
    containerd.assert_clean();
}

#[test]
fn a_pod_of_containerd_s_sandbox_service_needs_no_container_that_holds_it() {
    let Some(containerd) = Containerd::with_pods_of_the_shim("fifo") else {
        return;
    };
    let cri = containerd.cri();
    let mut config = containerd.pod("bare");
    config.dns = Some(Dns {
        servers: vec!["192.0.2.1".to_owned()],
        searches: vec!["a.test".to_owned(), "b.test".to_owned()],
    });
    let linux_pod = config.linux.as_mut().unwrap();
    linux_pod.sysctls =
        HashMap::from([("net.ipv4.ip_unprivileged_port_start".into(), "79".into())]);
    linux_pod.resources = Some(Resources {
        memory: 200 << 20,
        ..Resources::default()
    });
    let id = cri.run_pod(&config, HANDLER).unwrap();
    let status = cri.pod(&id);
    assert_eq!(status.state, 0);
    let address = status.network.unwrap().ip;
    let script = "echo hello >/index.html; httpd -f -p 8080 -h /";
    let one = runs(&cri, &id, &config, container("one", script));
    let two = runs(&cri, &id, &config, container("two", "sleep 1000"));
    assert_eq!(sh(&cri, &one, "hostname"), "bare");
    assert!(sh(&cri, &two, "ip addr show eth0").contains(&address));
    let port = "cat /proc/sys/net/ipv4/ip_unprivileged_port_start";
    assert_eq!(sh(&cri, &one, port), "79");
    let total = sh(&cri, &one, "grep MemTotal /proc/meminfo | tr -dc 0-9");
    let total: u64 = total.parse().unwrap();
    assert!((200 << 10..300 << 10).contains(&total), "{total} kB");
    eventually("the server answers", Duration::from_secs(10), || {
        let got = cri.exec(&two, &["wget", "-qO-", "http://localhost:8080"]);
        got.unwrap().stdout == b"hello\n"
    });
    assert_eq!(
        sh(&cri, &two, "cat /etc/resolv.conf"),
        "nameserver 192.0.2.1\nsearch a.test b.test"
    );
    // It stays without containers.
    for container in [&one, &two] {
        cri.stop(container, 0).unwrap();
        cri.remove(container).unwrap();
    }
    assert_eq!(cri.pod(&id).state, 0);
    let again = runs(&cri, &id, &config, container("again", "sleep 1000"));
    assert_eq!(sh(&cri, &again, "echo alive"), "alive");
    cri.remove_pod(&id).unwrap();
    containerd.assert_clean();
}

// Not with a containerd that is killed meanwhile: 2.1 opens the streams again and gives them up at
// once, with the context of what found the container again.
#[test]
fn output_over_streams_of_the_shim_is_whole() {
    let Some(containerd) = Containerd::with_pods_of_the_shim("streaming") else {
        return;
    };
    let cri = containerd.cri();
    let config = containerd.pod("streams");
    let id = cri.run_pod(&config, HANDLER).unwrap();
    let script = "seq 1 200000; echo error >&2; exit 3";
    let one = runs(&cri, &id, &config, container("one", script));
    let two = runs(&cri, &id, &config, container("two", "sleep 1000"));
    assert_eq!(sh(&cri, &two, "seq 1 20000 | tail -n 1"), "20000");
    assert_eq!(sh(&cri, &two, "seq 1 20000").lines().count(), 20_000);
    assert_eq!(ended(&cri, &one).exit_code, 3);
    let log = containerd.path("logs/one.log");
    // "TIME stdout F TEXT"
    let lines = |stream: &str| -> Vec<String> {
        let log = std::fs::read_to_string(&log).unwrap_or_default();
        let texts = log.lines().filter_map(|line| {
            let mut words = line.splitn(4, ' ').skip(1);
            (words.next()? == stream).then(|| words.nth(1).unwrap_or_default().to_owned())
        });
        texts.collect()
    };
    eventually("all output is there", Duration::from_secs(20), || {
        lines("stdout").len() == 200_000
    });
    let expected = (1..=200_000).map(|number| number.to_string());
    assert!(lines("stdout").into_iter().eq(expected));
    assert_eq!(lines("stderr"), ["error"]);
    cri.remove_pod(&id).unwrap();
    containerd.assert_clean();
}

#[test]
fn many_pods_come_and_go_at_once() {
    // HULL_TEST_PODS=60 shows what a node takes.
    let count = std::env::var("HULL_TEST_PODS").map_or(12, |count| count.parse().unwrap());
    const AT_ONCE: usize = 6;
    let containerd = Containerd::with_pods();
    let next = std::sync::atomic::AtomicUsize::new(0);
    let work = || {
        let cri = containerd.cri();
        let mut pods = Vec::new();
        loop {
            let number = next.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            if number >= count {
                break;
            }
            let config = containerd.pod(&format!("pod{number}"));
            let id = cri.run_pod(&config, HANDLER).unwrap();
            let one = runs(&cri, &id, &config, container("one", "sleep 1000"));
            let two = runs(&cri, &id, &config, container("two", "sleep 1000"));
            for container in [&one, &two] {
                assert_eq!(sh(&cri, container, "hostname"), format!("pod{number}"));
            }
            pods.push(id);
        }
        for id in &pods {
            assert_eq!(cri.pod(id).state, 0);
            cri.remove_pod(id).unwrap();
        }
        pods.len()
    };
    let done: usize = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..AT_ONCE).map(|_| scope.spawn(work)).collect();
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap())
            .sum()
    });
    assert_eq!(done, count);
    containerd.assert_clean();
}
