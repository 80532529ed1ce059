//! What a person does with a pod: exec, cp, logs, port-forward, attach, debug, top.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use hull_tests::kubernetes::{Cluster, container, pod, with};
use hull_tests::{Terminal, eventually};
use serde_json::json;

#[test]
fn exec_has_input_output_and_the_exit_status() {
    let cluster = Cluster::new();
    cluster.run(&pod("one", "exec sleep 1000"));
    cluster.try_sh("one", "exit 7").ends(7);
    let both = cluster.try_sh("one", "echo out; echo err >&2").ok();
    assert_eq!(both.text(), "out");
    assert_eq!(both.error().trim(), "err");
    let bytes = vec![b'x'; 3 << 20];
    let counted = cluster
        .kubectl(["exec", "-i", "one", "--", "wc", "-c"])
        .input(bytes)
        .run()
        .ok();
    assert_eq!(counted.text().trim(), (3 << 20).to_string());
    let large = cluster.kubectl([
        "exec",
        "one",
        "--",
        "sh",
        "-c",
        "head -c 20000000 /dev/zero",
    ]);
    assert_eq!(large.run().ok().stdout.len(), 20_000_000);
    let missing = cluster
        .kubectl(["exec", "one", "--", "no-such-program"])
        .run();
    assert_ne!(missing.status, 0);
    assert!(
        missing.error().contains("no-such-program"),
        "{}",
        missing.error()
    );
}

#[test]
fn exec_with_a_terminal_has_its_size_and_echo() {
    let cluster = Cluster::new();
    cluster.run(&pod("one", "exec sleep 1000"));
    let shell = cluster.kubectl(["exec", "-it", "one", "--", "sh"]);
    let mut terminal = Terminal::start(shell, 30, 100);
    terminal.write("stty size; tty\n");
    terminal.wait_for("30 100");
    terminal.wait_for("/dev/pts/0");
    terminal.resize(40, 120);
    terminal.write("until stty size | grep '40 120'; do :; done\n");
    terminal.wait_for("\n40 120");
    terminal.write("exit 5\n");
    assert_eq!(terminal.wait(), 5);
}

#[test]
fn files_are_copied_in_and_out() {
    let cluster = Cluster::new();
    cluster.run(&pod("one", "exec sleep 1000"));
    let source = cluster.path("source");
    std::fs::create_dir_all(source.join("a/b")).unwrap();
    std::fs::write(source.join("a/b/text"), "text").unwrap();
    std::fs::write(source.join("large"), vec![7; 5 << 20]).unwrap();
    let source = source.to_str().unwrap();
    cluster.kubectl(["cp", source, "one:/tmp/in"]).run().ok();
    assert_eq!(cluster.sh("one", "cat /tmp/in/a/b/text"), "text");
    let back = cluster.path("back");
    cluster
        .kubectl(["cp", "one:/tmp/in", back.to_str().unwrap()])
        .run()
        .ok();
    assert_eq!(std::fs::read(back.join("large")).unwrap(), vec![7; 5 << 20]);
}

#[test]
fn logs_are_followed_rotated_and_kept_of_the_container_before() {
    let cluster = Cluster::new();
    cluster.apply(&pod(
        "restarts",
        "echo this is $(cat /proc/uptime); sleep 1; exit 1",
    ));
    cluster.until("it was restarted", "pod", "restarts", |pod| {
        pod["status"]["containerStatuses"][0]["restartCount"].as_u64() >= Some(1)
    });
    let previous = cluster
        .kubectl(["logs", "--previous", "restarts"])
        .run()
        .ok();
    assert!(
        previous.text().starts_with("this is"),
        "{}",
        previous.text()
    );
    cluster.delete("pod", "restarts");

    cluster.run(&pod(
        "talks",
        "i=0; while sleep 0.2; do echo line $i; i=$((i+1)); done",
    ));
    let mut followed = cluster.kubectl(["logs", "-f", "talks"]).start();
    followed.wait_for("line 10\n");
    drop(followed);

    // The kubelet rotates every ten seconds what has more than 100 KiB.
    cluster.run(&pod(
        "much",
        "while sleep 0.05; do head -c 3000 /dev/zero | tr '\\0' x; echo; done",
    ));
    let uid = cluster.get("pod", "much")["metadata"]["uid"]
        .as_str()
        .unwrap()
        .to_owned();
    let directory = format!("/var/log/pods/{}_much_{uid}/main", cluster.namespace());
    eventually("a second file", Duration::from_secs(60), || {
        std::fs::read_dir(&directory).unwrap().count() > 1
    });
    // What is written later is in the new file.
    let file = format!("{directory}/0.log");
    let before = std::fs::metadata(&file).map_or(0, |file| file.len());
    eventually("more in the new file", Duration::from_secs(20), || {
        std::fs::metadata(&file).is_ok_and(|file| file.len() != before)
    });
}

#[test]
fn a_port_of_the_pod_is_forwarded() {
    let cluster = Cluster::new();
    // On loopback only: what is forwarded comes from inside the pod.
    let script = "echo hello >/index.html; exec httpd -f -p 127.0.0.1:8080 -h /";
    cluster.run(&pod("web", script));
    let mut forward = cluster.kubectl(["port-forward", "web", ":8080"]).start();
    forward.wait_for("Forwarding from 127.0.0.1:");
    let text = forward.so_far();
    let port = text.split("127.0.0.1:").nth(1).unwrap();
    let port: u16 = port.split(' ').next().unwrap().parse().unwrap();
    let get = || -> std::io::Result<String> {
        let mut connection = TcpStream::connect(("127.0.0.1", port))?;
        connection.write_all(b"GET / HTTP/1.0\r\n\r\n")?;
        let mut answer = String::new();
        connection.read_to_string(&mut answer)?;
        Ok(answer)
    };
    eventually("an answer", Duration::from_secs(10), || {
        get().is_ok_and(|answer| answer.ends_with("hello\n"))
    });
    for _ in 0..5 {
        assert!(get().unwrap().ends_with("hello\n"));
    }
}

#[test]
fn attach_reads_and_writes_the_streams_of_a_running_container() {
    let cluster = Cluster::new();
    let one = with(
        pod(
            "one",
            "while read line; do echo \"you said $line\"; done; sleep 1000",
        ),
        &[("/spec/containers/0/stdin", json!(true))],
    );
    cluster.run(&one);
    let mut attached = cluster.kubectl(["attach", "-i", "one"]).start();
    attached.write("hello\n");
    attached.wait_for("you said hello");
    drop(attached);
    let mut again = cluster.kubectl(["attach", "-i", "one"]).start();
    again.write("again\n");
    again.wait_for("you said again");
    drop(again);
    assert_eq!(cluster.logs("one"), "you said hello\nyou said again");
}

#[test]
fn a_debug_container_sees_the_processes_of_its_target() {
    let cluster = Cluster::new();
    let two = with(
        pod("two", "exec sleep 12345"),
        &[("/spec/containers/1", container("other", "exec sleep 54321"))],
    );
    cluster.run(&two);
    let image = hull_tests::kubernetes::BUSYBOX;
    cluster
        .kubectl([
            "alpha", "debug", "two", "--image", image, "--target", "main", "-c", "debugger",
        ])
        .args(["--", "sh", "-c", "ps; sleep 1000"])
        .run()
        .ok();
    cluster.until("the debugger runs", "pod", "two", |pod| {
        !pod["status"]["ephemeralContainerStatuses"][0]["state"]["running"].is_null()
    });
    let logs = || {
        cluster
            .kubectl(["logs", "two", "-c", "debugger"])
            .run()
            .ok()
            .text()
    };
    eventually("its output", Duration::from_secs(10), || {
        logs().contains("sleep 12345")
    });
    assert!(!logs().contains("sleep 54321"), "{}", logs());
}

#[test]
fn the_kubelet_knows_what_a_pod_uses() {
    let cluster = Cluster::new();
    let busy = "head -c 20000000 /dev/urandom >/dev/shm/used; while :; do :; done";
    let busy = with(
        pod("busy", busy),
        &[(
            "/spec/containers/0/resources",
            json!({"limits": {"cpu": "200m", "memory": "100Mi"}}),
        )],
    );
    cluster.run(&busy);
    let path = "/api/v1/nodes/node/proxy/stats/summary";
    let used = || {
        let summary = cluster.kubectl(["get", "--raw", path]).run().ok().json();
        let pods = summary["pods"].as_array().unwrap().clone();
        let of = |pod: &serde_json::Value| pod["podRef"]["namespace"] == cluster.namespace();
        pods.into_iter()
            .find(of)
            .map(|pod| pod["containers"][0].clone())
    };
    // A fifth of a processor, and what lies in the memory file system.
    eventually("plausible numbers", Duration::from_secs(60), || {
        used().is_some_and(|used| {
            let cpu = used["cpu"]["usageNanoCores"].as_u64().unwrap_or(0);
            let memory = used["memory"]["workingSetBytes"].as_u64().unwrap_or(0);
            (100_000_000..300_000_000).contains(&cpu) && (20_000_000..60_000_000).contains(&memory)
        })
    });
}
