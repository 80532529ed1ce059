//! Docker's command line talks to `hull api`: no daemon of Docker's is there.

use std::fs;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use hull_tests::{
    Api, Hull, Invocation, Output, Registry, Terminal, busybox_archive, eventually, executable,
};
use rustix::process::Signal;
use serde_json::json;

/// Docker says why something was not done, in its own words.
fn refused(output: Output, status: i32, part: &str) {
    let output = output.ends(status);
    assert!(output.error().contains(part), "{part}: {}", output.error());
}

fn api() -> Api {
    Api::new(Hull::new())
}

#[test]
fn docker_run_has_output_errors_input_and_exit_status_of_the_process() {
    let mut api = api();
    let output = api
        .run(&[], &["sh", "-c", "echo out; echo error >&2; exit 7"])
        .ends(7);
    assert_eq!(
        (output.text(), output.error()),
        ("out".into(), "error\n".into())
    );
    let input = vec![b'x'; 3 << 20];
    let output = api
        .docker(["run", "--rm", "-i", "busybox", "md5sum"])
        .input(input.clone())
        .run()
        .ok();
    let plain = Invocation::new("md5sum").input(input).run().ok();
    assert_eq!(output.text(), plain.text());
    let output = api
        .run(&[], &["sh", "-c", "head -c 5000000 /dev/zero"])
        .ok();
    assert_eq!(output.stdout.len(), 5_000_000);
    refused(api.run(&[], &["nosuch"]), 127, "nosuch");
    refused(api.run(&[], &["/etc/passwd"]), 126, "/etc/passwd");
    // Whatever is quick: the end of a container is known also when it is gone.
    for status in 0..10 {
        let script = format!("exit {status}");
        api.run(&[], &["sh", "-c", &script]).ends(status);
    }
    api.assert_clean();
}

#[test]
fn an_image_that_is_not_here_is_pulled_or_the_reason_is_told() {
    let api = api();
    let run = api.docker(["run", "--rm", "127.0.0.1:1/nothing:1", "true"]);
    refused(run.run(), 125, "127.0.0.1:1");
}

#[test]
fn a_terminal_has_the_callers_size_and_can_be_left() {
    let mut api = api();
    let run = api.docker(["run", "-it", "--name", "term", "busybox", "sh"]);
    let mut terminal = Terminal::start(run, 33, 99);
    terminal.wait_for("# ");
    terminal.write("stty size; tty\n");
    terminal.wait_for("33 99");
    terminal.wait_for("/dev/pts/");
    terminal.resize(44, 111);
    eventually("the new size arrives", Duration::from_secs(5), || {
        terminal.write("stty size\n");
        std::thread::sleep(Duration::from_millis(100));
        terminal.screen().contains("44 111")
    });
    terminal.write("\x10\x11");
    terminal.wait();
    let state = api.docker(["inspect", "-f", "{{.State.Status}}", "term"]);
    assert_eq!(state.run().ok().text(), "running");
    let attach = api.docker(["attach", "term"]);
    let mut terminal = Terminal::start(attach, 24, 80);
    terminal.write("echo again; exit 5\n");
    terminal.wait_for("again");
    assert_eq!(terminal.wait(), 5);
    api.docker(["rm", "term"]).run().ok();
    api.assert_clean();
}

#[test]
fn a_container_is_created_started_entered_listed_changed_and_removed() {
    let mut api = api();
    let docker = |arguments: &[&str]| api.docker(arguments).run();
    docker(&[
        "create", "--name", "job", "-l", "a=b", "-e", "X=y", "busybox", "sleep", "1000",
    ])
    .ok();
    docker(&["start", "job"]).ok();
    docker(&["start", "job"]).ok();
    assert_eq!(
        docker(&["exec", "-e", "Z=z", "job", "sh", "-c", "echo $X$Z; exit 3"])
            .ends(3)
            .text(),
        "yz"
    );
    docker(&["exec", "job", "nosuch"]).ends(127);
    docker(&["exec", "-d", "job", "touch", "/tmp/detached"]).ok();
    eventually("the process has run", Duration::from_secs(5), || {
        docker(&["exec", "job", "test", "-e", "/tmp/detached"]).status == 0
    });
    let listed = docker(&[
        "ps",
        "--format",
        "{{.Names}} {{.Image}} {{.State}} {{.Labels}}",
    ]);
    assert_eq!(listed.ok().text(), "job busybox running a=b");
    assert_eq!(docker(&["ps", "-q", "-f", "label=a=c"]).ok().text(), "");
    let inspected = docker(&["inspect", "job"]).ok().json();
    assert_eq!(inspected[0]["Config"]["Cmd"], json!(["sleep", "1000"]));
    assert_eq!(inspected[0]["State"]["Running"], true);
    assert!(docker(&["top", "job"]).ok().text().contains("sleep 1000"));
    let columns = docker(&["top", "job", "-o", "pid,comm"]).ok().text();
    assert!(columns.starts_with("PID "), "{columns}");
    assert!(
        columns.lines().nth(1).unwrap().starts_with("1 "),
        "{columns}"
    );
    assert!(
        docker(&["stats", "--no-stream", "job"])
            .ok()
            .text()
            .contains("job")
    );
    docker(&["pause", "job"]).ok();
    refused(docker(&["exec", "job", "true"]), 1, "paused");
    docker(&["unpause", "job"]).ok();
    docker(&["rename", "job", "work"]).ok();
    docker(&[
        "update",
        "--pids-limit",
        "50",
        "--restart",
        "on-failure:2",
        "work",
    ])
    .ok();
    docker(&["restart", "-t", "0", "work"]).ok();
    refused(docker(&["rm", "work"]), 1, "running");
    docker(&["stop", "-t", "0", "work"]).ok();
    docker(&["stop", "-t", "0", "work"]).ok();
    assert_eq!(docker(&["wait", "work"]).ok().text(), "137");
    docker(&["start", "work"]).ok();
    docker(&["kill", "-s", "KILL", "work"]).ok();
    docker(&["rm", "-v", "work"]).ok();
    refused(docker(&["inspect", "work"]), 1, "work");
    api.assert_clean();
}

#[test]
fn docker_wait_and_logs_follow_a_container_to_its_end() {
    let mut api = api();
    let script = "for i in 1 2 3; do echo line $i; sleep 0.3; done; echo error >&2; exit 4";
    api.docker(["run", "-d", "--name", "job", "busybox", "sh", "-c", script])
        .run()
        .ok();
    let waiting = api.docker(["wait", "job"]).start();
    let followed = api.docker(["logs", "-f", "job"]).run().ok();
    assert_eq!(followed.text(), "line 1\nline 2\nline 3");
    assert_eq!(followed.error(), "error\n");
    assert_eq!(waiting.finish().ok().text(), "4");
    let logs = |options: &[&str]| {
        let output = api.docker(["logs"]).args(options).arg("job").run().ok();
        output.text() + &output.error()
    };
    assert_eq!(logs(&["--tail", "2"]), "line 3error\n");
    // The command line counts in whole seconds.
    std::thread::sleep(Duration::from_secs(1));
    let all = logs(&["--since", "1h", "--until", "0s"]);
    assert_eq!(all.lines().count(), 3, "{all}");
    assert_eq!(logs(&["--until", "1h"]), "");
    assert_eq!(logs(&["--since", "0s"]), "");
    assert!(logs(&["-t", "--tail", "1"]).contains("Z error"));
    // A container is attached to from its first output on, and each start has its own.
    let again = api.docker(["start", "-a", "job"]).run().ends(4);
    assert_eq!(again.text(), "line 1\nline 2\nline 3");
    api.docker(["rm", "job"]).run().ok();
    api.assert_clean();
}

#[test]
fn clients_that_go_away_leave_nothing_behind() {
    let mut api = api();
    api.docker([
        "run",
        "-d",
        "--name",
        "job",
        "busybox",
        "sh",
        "-c",
        "echo up; sleep 1000",
    ])
    .run()
    .ok();
    let threads = |api: &Api| {
        let pid = api.server_pid().as_raw_nonzero();
        fs::read_dir(format!("/proc/{pid}/task")).unwrap().count()
    };
    let descriptors = |api: &Api| {
        let pid = api.server_pid().as_raw_nonzero();
        fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count()
    };
    eventually("it is at rest", Duration::from_secs(5), || {
        threads(&api) <= 3
    });
    // The connection of `docker run` may be still among them.
    let (most_threads, most_descriptors) = (threads(&api), descriptors(&api));
    let mut followers: Vec<_> = [
        &["logs", "-f", "job"][..],
        &["attach", "job"],
        &["wait", "job"],
        &["events"],
        &["stats", "job"],
    ]
    .into_iter()
    .map(|arguments| api.docker(arguments).start())
    .collect();
    std::thread::sleep(Duration::from_millis(1500));
    for follower in &mut followers {
        assert!(follower.is_running());
        follower.signal(Signal::KILL);
    }
    for follower in followers {
        follower.finish();
    }
    eventually(
        "threads and descriptors are gone",
        Duration::from_secs(30),
        || threads(&api) <= most_threads && descriptors(&api) <= most_descriptors,
    );
    api.docker(["rm", "-f", "job"]).run().ok();
    api.assert_clean();
}

#[test]
fn files_go_in_and_out_and_become_images() {
    let mut api = api();
    let scratch = api.hull.scratch();
    let here = |name: &str| scratch.join(name).display().to_string();
    fs::create_dir(scratch.join("tree")).unwrap();
    fs::write(scratch.join("tree/file"), "data\n").unwrap();
    let docker = |arguments: &[&str]| api.docker(arguments).run();
    docker(&[
        "create",
        "--name",
        "job",
        "busybox",
        "cat",
        "/srv/tree/file",
    ])
    .ok();
    refused(docker(&["cp", &here("tree"), "job:/no/where"]), 1, "/no");
    docker(&["cp", &here("tree"), "job:/tree"]).ok();
    docker(&["cp", "job:/tree/file", &here("back")]).ok();
    assert_eq!(fs::read_to_string(scratch.join("back")).unwrap(), "data\n");
    // What is in a directory, and names with dots.
    fs::create_dir(scratch.join("into")).unwrap();
    docker(&["cp", "job:/tree/.", &here("into")]).ok();
    assert_eq!(
        fs::read_to_string(scratch.join("into/file")).unwrap(),
        "data\n"
    );
    docker(&["cp", "job:/tree/.", &here("made.new")]).ok();
    assert_eq!(
        fs::read_to_string(scratch.join("made.new/file")).unwrap(),
        "data\n"
    );
    docker(&["cp", "job:/tree", &here("copy")]).ok();
    assert_eq!(
        fs::read_to_string(scratch.join("copy/file")).unwrap(),
        "data\n"
    );
    refused(docker(&["cp", "job:/nowhere", &here("x")]), 1, "/nowhere");
    assert_eq!(
        docker(&["diff", "job"]).ok().text(),
        "A /tree\nA /tree/file"
    );
    docker(&[
        "commit",
        "-m",
        "a tree",
        "-c",
        "CMD cat /tree/file",
        "job",
        "made:1",
    ])
    .ok();
    assert_eq!(docker(&["run", "--rm", "made:1"]).ok().text(), "data");
    assert!(
        docker(&["history", "made:1"])
            .ok()
            .text()
            .contains("a tree")
    );
    docker(&["save", "-o", &here("made.tar"), "made:1"]).ok();
    docker(&["tag", "made:1", "other:2"]).ok();
    assert!(
        docker(&["rmi", "made:1"])
            .ok()
            .text()
            .contains("Untagged: made:1")
    );
    docker(&["rmi", "other:2"]).ok();
    docker(&["load", "-i", &here("made.tar")]).ok();
    let images = docker(&["images", "--format", "{{.Repository}}:{{.Tag}}"])
        .ok()
        .text();
    let mut images: Vec<&str> = images.lines().collect();
    images.sort_unstable();
    assert_eq!(images, ["busybox:latest", "made:1"]);
    docker(&["export", "-o", &here("all.tar"), "job"]).ok();
    docker(&["import", &here("all.tar"), "flat:1"]).ok();
    assert_eq!(
        docker(&["run", "--rm", "flat:1", "cat", "/tree/file"])
            .ok()
            .text(),
        "data"
    );
    refused(docker(&["rmi", "busybox"]), 1, "busybox");
    docker(&["rm", "job"]).ok();
    assert!(docker(&["system", "df"]).ok().text().contains("Images"));
    api.assert_clean();
}

#[test]
fn volumes_and_networks_are_dockers() {
    let mut api = Api::new(Hull::networked("uml"));
    let net = api.hull.unique("net");
    let docker = |arguments: &[&str]| api.docker(arguments).run();
    docker(&["volume", "create", "-d", "local", "--label", "a=b", "data"]).ok();
    refused(docker(&["volume", "create", "-d", "nfs", "x"]), 1, "nfs");
    docker(&["network", "create", "--label", "a=b", &net]).ok();
    docker(&[
        "run",
        "-d",
        "--name",
        "srv",
        "--network",
        &net,
        "--network-alias",
        "server",
        "-v",
        "data:/data",
        "busybox",
        "sh",
        "-c",
        "echo page >/data/index.html; exec httpd -f -p 80 -h /data",
    ])
    .ok();
    let get = "until wget -qO- http://server/; do sleep 0.1; done; wget -qO- http://srv/";
    let got = api.run(&["--network", &net], &["sh", "-c", get]).ok();
    assert_eq!(got.text(), "page\npage");
    // A running container comes into the network, and leaves it.
    docker(&["run", "-d", "--name", "late", "busybox", "sleep", "1000"]).ok();
    docker(&["network", "connect", "--alias", "later", &net, "late"]).ok();
    let page = docker(&["exec", "late", "wget", "-qO-", "http://server/"]);
    assert_eq!(page.ok().text(), "page");
    docker(&["exec", "srv", "ping", "-c", "1", "-W", "5", "later"]).ok();
    docker(&["network", "disconnect", &net, "late"]).ok();
    let unknown = docker(&["exec", "late", "ping", "-c", "1", "-W", "1", "server"]);
    assert_eq!(unknown.status, 1);
    docker(&["rm", "-f", "late"]).ok();
    let address = docker(&[
        "inspect",
        "-f",
        "{{range .NetworkSettings.Networks}}{{.IPAddress}} {{.Gateway}}{{end}}",
        "srv",
    ]);
    let address = address.ok().text();
    let (address, gateway) = address.split_once(' ').unwrap();
    assert!(
        !address.is_empty() && gateway.ends_with(".1"),
        "{address} {gateway}"
    );
    let network = docker(&["network", "inspect", &net]).ok().json();
    let id = network[0]["Id"].as_str().unwrap();
    let listed = docker(&["ps", "-q", "-f", &format!("network={id}")]).ok();
    assert_eq!(listed.text().lines().count(), 1);
    api.run(&["--network", id], &["wget", "-qO-", "http://srv/"])
        .ok();
    docker(&["network", "prune", "-f", "--filter", "label=a=b"]).ok();
    // Created since.
    docker(&["network", "prune", "-f", "--filter", "until=1h"]).ok();
    refused(
        docker(&["network", "prune", "-f", "--filter", "colour=red"]),
        1,
        "colour",
    );
    assert_eq!(network[0]["Labels"]["a"], "b");
    assert_eq!(network[0]["IPAM"]["Config"][0]["Gateway"], gateway);
    let containers = network[0]["Containers"].as_object().unwrap();
    assert_eq!(containers.values().next().unwrap()["Name"], "srv");
    refused(docker(&["volume", "rm", "data"]), 1, "data");
    refused(docker(&["network", "rm", &net]), 1, &net);
    docker(&["rm", "-f", "srv"]).ok();
    docker(&["network", "rm", &net]).ok();
    assert_eq!(docker(&["volume", "ls", "-q"]).ok().text(), "data");
    docker(&["volume", "prune", "-f", "--filter", "label=a=c"]).ok();
    assert_eq!(docker(&["volume", "ls", "-q"]).ok().text(), "data");
    // Old clients mean all, new ones say so.
    let (status, answer) = api.ask("POST", "/v1.41/volumes/prune", "");
    assert_eq!((status, &answer["VolumesDeleted"]), (200, &json!(["data"])));
    assert_eq!(docker(&["volume", "ls", "-q"]).ok().text(), "");
    assert!(docker(&["network", "ls"]).ok().text().contains("bridge"));
    api.assert_clean();
}

#[test]
fn images_are_pulled_and_pushed_with_progress() {
    let mut api = api();
    let registry = Registry::new();
    let name = format!("{}/some/busybox:1", registry.address);
    let docker = |arguments: &[&str]| api.docker(arguments).run();
    docker(&["tag", "busybox", &name]).ok();
    let pushed = docker(&["push", &name]).ok().text();
    assert!(pushed.contains("1: digest: sha256:"), "{pushed}");
    docker(&["rmi", &name]).ok();
    docker(&["rmi", "busybox"]).ok();
    // Pulled because it is not here.
    let run = docker(&["run", "--rm", &name, "echo", "pulled"]).ok();
    assert_eq!(run.text(), "pulled");
    assert!(run.error().contains("Pull complete"), "{}", run.error());
    assert!(
        docker(&["pull", &name])
            .ok()
            .text()
            .contains("Digest: sha256:")
    );
    let missing = format!("{}/some/nothing:1", registry.address);
    let (status, answer) = api.ask("POST", &format!("/images/create?fromImage={missing}"), "");
    assert_eq!(status, 404, "{answer}");
    let term = format!("{}/busy", registry.address);
    let found = docker(&["search", "--format", "{{.Name}}", &term])
        .ok()
        .text();
    assert_eq!(found, name.trim_end_matches(":1"));
    let (status, described) = api.ask("GET", &format!("/distribution/{name}/json"), "");
    assert_eq!(status, 200, "{described}");
    let digest = described["Descriptor"]["digest"].as_str().unwrap();
    assert!(pushed.contains(digest), "{pushed}");
    assert_eq!(described["Platforms"][0]["os"], "linux");
    let (status, answer) = api.ask("GET", &format!("/distribution/{missing}/json"), "");
    assert_eq!(status, 404, "{answer}");
    docker(&["rmi", &name]).ok();
    api.assert_clean();
}

#[test]
fn an_entry_point_that_is_none_keeps_the_images_command() {
    let mut api = api();
    api.docker(["create", "--name", "base", "busybox"])
        .run()
        .ok();
    let changes = [
        "ENTRYPOINT [\"echo\", \"of the image\"]",
        "CMD [\"echo\", \"command\"]",
    ];
    api.docker([
        "commit", "-c", changes[0], "-c", changes[1], "base", "made:1",
    ])
    .run()
    .ok();
    assert_eq!(
        api.docker(["run", "--rm", "made:1"]).run().ok().text(),
        "of the image echo command"
    );
    let body = r#"{"Image": "made:1", "Entrypoint": []}"#;
    let (status, answer) = api.ask("POST", "/containers/create?name=bare", body);
    assert_eq!(status, 201, "{answer}");
    assert_eq!(
        api.docker(["start", "-a", "bare"]).run().ok().text(),
        "command"
    );
    api.docker(["rm", "base", "bare"]).run().ok();
    api.assert_clean();
}

#[test]
fn a_filter_of_system_calls_is_what_the_command_line_has_read() {
    let mut api = api();
    let profile = api.hull.scratch().join("profile.json");
    let text = r#"{"defaultAction": "SCMP_ACT_ALLOW",
        "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO"}]}"#;
    fs::write(&profile, text).unwrap();
    let option = format!("seccomp={}", profile.display());
    let made = api.run(&["--security-opt", &option], &["mkdir", "/x"]);
    assert_ne!(made.status, 0);
    api.run(&["--security-opt", "seccomp=unconfined"], &["mkdir", "/x"])
        .ok();
    api.assert_clean();
}

#[test]
fn input_of_a_container_in_the_background_outlives_who_attaches() {
    let mut api = api();
    api.docker(["run", "-d", "-i", "--name", "job", "busybox", "cat"])
        .run()
        .ok();
    for word in ["one", "two"] {
        let attached = api.docker(["attach", "--no-stdin=false", "job"]);
        let mut attached = attached.start();
        attached.write(format!("{word}\n"));
        attached.wait_for(word);
        attached.signal(Signal::KILL);
        attached.finish();
    }
    let logs = api.docker(["logs", "job"]).run().ok();
    assert_eq!(logs.text(), "one\ntwo");
    api.docker(["rm", "-f", "job"]).run().ok();
    // hull's own command line is the same.
    api.hull
        .hull(["run", "-di", "--name", "own", "busybox", "cat"])
        .run()
        .ok();
    for word in ["one", "two"] {
        let mut attached = api.hull.hull(["attach", "own"]).start();
        attached.write(format!("{word}\n"));
        eventually("it arrives", Duration::from_secs(5), || {
            let logs = api.hull.hull(["logs", "own"]).run().ok();
            logs.text().contains(word)
        });
        attached.signal(Signal::KILL);
        attached.finish();
    }
    api.hull.hull(["rm", "-f", "own"]).run().ok();
    api.assert_clean();
}

#[test]
fn an_execution_that_is_left_runs_on_and_its_end_is_known() {
    let mut api = api();
    api.docker(["run", "-d", "--name", "job", "busybox", "sleep", "1000"])
        .run()
        .ok();
    let create = r#"{"AttachStdin": true, "AttachStdout": true, "Tty": true,
        "Cmd": ["sh", "-c", "read line; sleep 1; exit 9"]}"#;
    let (_, made) = api.ask("POST", "/containers/job/exec", create);
    let exec = made["Id"].as_str().unwrap().to_owned();
    let start = format!("/exec/{exec}/start");
    let mut connection = api.upgrade(&start, r#"{"Tty": true}"#);
    connection.write_all(b"line\n").unwrap();
    // What was sent before the end of the connection arrives.
    drop(connection);
    let (_, known) = api.ask("GET", &format!("/exec/{exec}/json"), "");
    assert_eq!(known["Running"], true, "{known}");
    eventually("its end is known", Duration::from_secs(5), || {
        let (_, known) = api.ask("GET", &format!("/exec/{exec}/json"), "");
        known["ExitCode"] == 9 && known["Running"] == false
    });
    api.docker(["rm", "-f", "job"]).run().ok();
    api.assert_clean();
}

#[test]
fn events_name_the_container_its_image_and_its_labels() {
    let mut api = api();
    let begin = "1m";
    api.run(&["--name", "told", "-l", "a=b"], &["true"]).ok();
    api.docker([
        "run", "--name", "kept", "-l", "a=b", "busybox", "sh", "-c", "exit 3",
    ])
    .run()
    .ends(3);
    // The command line counts in whole seconds.
    std::thread::sleep(Duration::from_secs(1));
    let format = "{{.Action}} {{index .Actor.Attributes \"name\"}} {{index .Actor.Attributes \"image\"}} \
                  {{index .Actor.Attributes \"exitCode\"}}";
    let events = api
        .docker([
            "events",
            "--since",
            begin,
            "--until",
            "0s",
            "-f",
            "container=kept",
            "--format",
            format,
        ])
        .run()
        .ok();
    let events = events.text();
    let actions: Vec<&str> = events.lines().map(str::trim_end).collect();
    assert_eq!(
        actions,
        [
            "create kept busybox",
            "start kept busybox",
            "die kept busybox 3"
        ]
    );
    api.docker(["rm", "kept"]).run().ok();
    api.assert_clean();
}

#[test]
fn docker_build_makes_images_by_buildah() {
    let mut api = Api::with_buildah(Hull::new());
    let directory = api.hull.scratch();
    fs::copy(busybox_archive(), directory.join("busybox.tar")).unwrap();
    let recipe =
        "FROM scratch\nADD busybox.tar /\nARG WORD\nRUN echo $WORD >/word\nCMD cat /word\n";
    fs::write(directory.join("Recipe"), recipe).unwrap();
    let built = api
        .docker(["build", "-t", "built:1", "--build-arg", "WORD=hello", "-f"])
        .arg(directory.join("Recipe"))
        .arg(&directory)
        .limit(Duration::from_secs(120))
        .run()
        .ok();
    assert!(
        built.text().contains("Successfully tagged built:1"),
        "{}",
        built.text()
    );
    assert_eq!(
        api.docker(["run", "--rm", "built:1"]).run().ok().text(),
        "hello"
    );
    fs::write(
        directory.join("Recipe"),
        "FROM scratch\nADD busybox.tar /\nRUN exit 9\n",
    )
    .unwrap();
    let build = api
        .docker(["build", "-t", "built:2", "-f"])
        .arg(directory.join("Recipe"))
        .arg(&directory)
        .limit(Duration::from_secs(120))
        .run();
    refused(build, 1, "build failed");
    api.assert_clean();
}

/// docker compose as a plugin of Docker's command line, or the program before it.
fn compose(api: &Api, project: &Path, arguments: &[&str]) -> Invocation {
    let places = [
        "/usr/libexec/docker/cli-plugins",
        "/usr/bin",
        "/usr/local/bin",
    ];
    let mut found = places
        .map(|place| Path::new(place).join("docker-compose"))
        .into_iter();
    let program = found.find(|path| path.exists());
    let program = program.expect("docker-compose is not installed: scripts/setup test");
    api.environment(Invocation::new(program))
        .args(["-f", "compose.yaml"])
        .args(arguments)
        .with(|command| {
            command.current_dir(project);
        })
        .limit(Duration::from_secs(120))
}

#[test]
fn compose_brings_a_project_up_and_down() {
    let mut api = Api::new(Hull::networked("uml"));
    // Its name is that of the project, and so of its network.
    let project = api.hull.scratch().join(api.hull.unique("proj"));
    fs::create_dir_all(project.join("conf")).unwrap();
    let file = r#"
version: "2.4"
services:
  web:
    image: busybox
    command: ["sh", "-c", "cp /conf/page /data/index.html; exec httpd -f -p 80 -h /data"]
    volumes: ["data:/data", "./conf:/conf:ro"]
    healthcheck: {test: ["CMD", "test", "-e", "/data/index.html"], interval: 300ms}
    restart: unless-stopped
    stop_signal: SIGKILL
  client:
    image: busybox
    depends_on: {web: {condition: service_healthy}}
    command: ["sh", "-c", "wget -qO- http://web/; exec sleep 1000"]
    stop_signal: SIGKILL
volumes: {data: {}}
"#;
    fs::write(project.join("compose.yaml"), file).unwrap();
    fs::write(project.join("conf/page"), "a page\n").unwrap();
    let does = |arguments: &[&str]| compose(&api, &project, arguments).run();
    does(&["up", "-d"]).ok();
    eventually("the client has its page", Duration::from_secs(10), || {
        does(&["logs", "--no-color", "client"])
            .ok()
            .text()
            .contains("a page")
    });
    // What is there stays.
    let ids = || api.docker(["ps", "-q", "--no-trunc"]).run().ok().text();
    let before = ids();
    assert_eq!(before.lines().count(), 2);
    does(&["up", "-d"]).ok();
    assert_eq!(ids(), before);
    let ran = does(&["exec", "-T", "web", "cat", "/conf/page"]).ok();
    assert_eq!(ran.text(), "a page");
    let ran = does(&["run", "--rm", "-T", "client", "wget", "-qO-", "http://web/"]).ok();
    assert_eq!(ran.text(), "a page");
    does(&["stop"]).ok();
    does(&["start"]).ok();
    assert_eq!(ids().lines().count(), 2);
    does(&["down", "-v"]).ok();
    assert_eq!(api.docker(["ps", "-aq"]).run().ok().text(), "");
    assert_eq!(api.docker(["volume", "ls", "-q"]).run().ok().text(), "");
    api.assert_clean();
}

#[test]
fn what_has_no_meaning_in_a_machine_is_refused_by_name() {
    let mut api = api();
    for (options, part) in [
        (&["--pid", "host"][..], "PidMode host"),
        (&["--ipc", "host"], "IpcMode host"),
        (&["--uts", "host"], "UTSMode host"),
        (&["--userns", "host"], "UsernsMode host"),
        (&["--network", "host"], "the host's network"),
        (&["--device", "/dev/null"], "Devices"),
        (&["--runtime", "other"], "other"),
        (&["--link", "some:other"], "--link"),
        (&["--volume-driver", "nfs", "-v", "v:/v"], "nfs"),
        (&["--log-driver", "syslog"], "syslog"),
        (&["--log-opt", "tag={{.Nothing}}"], "tag"),
        (&["--cgroup-parent", "/x"], "CgroupParent"),
        (&["--cpuset-mems", "0"], "CpusetMems"),
        (
            &["--blkio-weight-device", "/dev/sda:100"],
            "BlkioWeightDevice",
        ),
        (
            &["--mount", "type=volume,src=nfs,dst=/v,volume-opt=type=nfs"],
            "a volume of type nfs",
        ),
    ] {
        refused(api.run(options, &["true"]), 125, part);
    }
    for (method, path, body, status, part) in [
        ("GET", "/v1.51/nothing", "", 404, "page not found"),
        ("POST", "/v1.51/containers/create", "{", 400, "invalid JSON"),
        (
            "POST",
            "/v1.51/containers/create",
            "{\"Image\": 5}",
            400,
            "invalid request",
        ),
        // Docker's client of version 26 leaves --device-read-bps out.
        (
            "POST",
            "/containers/create",
            r#"{"Image": "busybox", "HostConfig":
                {"BlkioDeviceReadBps": [{"Path": "/dev/sda", "Rate": 1}]}}"#,
            501,
            "BlkioDeviceReadBps",
        ),
        ("POST", "/containers/create", "{}", 400, "no image"),
        (
            "POST",
            "/containers/create?name=/b%20d",
            "{\"Image\": \"busybox\"}",
            400,
            "invalid container name",
        ),
        (
            "POST",
            "/containers/nobody/start",
            "",
            404,
            "No such container: nobody",
        ),
        (
            "GET",
            "/containers/json?filters=x",
            "",
            400,
            "invalid filters",
        ),
        ("GET", "/containers/json?limit=x", "", 400, "limit"),
        (
            "GET",
            "/containers/..%2f..%2fetc/json",
            "",
            404,
            "No such container",
        ),
        ("GET", "/volumes/..%2f..", "", 404, "no such volume"),
        ("GET", "/networks/..%2f..", "", 404, "not found"),
        ("POST", "/swarm/init", "{}", 501, "not supported"),
        ("POST", "/exec/abc/start", "{}", 404, "No such exec"),
    ] {
        let (got, answer) = api.ask(method, path, body);
        assert_eq!(got, status, "{method} {path}: {answer}");
        let message = answer["message"].as_str().unwrap();
        assert!(message.contains(part), "{method} {path}: {message}");
    }
    let long = format!("{{\"Image\": \"{}\"}}", "x".repeat(5 << 20));
    let (status, _) = api.ask("POST", "/containers/create", &long);
    assert_eq!(status, 400);
    api.assert_clean();
}

#[test]
fn containers_outlive_the_server_and_are_everybodys() {
    let mut api = api();
    api.docker(["run", "-d", "--name", "job", "busybox", "sleep", "1000"])
        .run()
        .ok();
    api.stop().ok();
    api.start();
    assert_eq!(
        api.docker(["ps", "--format", "{{.Names}}"])
            .run()
            .ok()
            .text(),
        "job"
    );
    assert_eq!(api.hull.names(), ["job"]);
    api.docker(["exec", "job", "true"]).run().ok();
    api.hull.hull(["rm", "-f", "job"]).run().ok();
    assert_eq!(api.docker(["ps", "-aq"]).run().ok().text(), "");
    api.assert_clean();
}

#[test]
fn who_is_not_root_has_an_api_of_their_own() {
    let mut api = Api::new(Hull::without_root());
    assert_eq!(api.run(&[], &["id", "-u"]).ok().text(), "0");
    api.docker(["run", "-d", "--name", "job", "-v", "data:/data", "busybox"])
        .args(["sh", "-c", "echo kept >/data/file; echo up; sleep 1000"])
        .run()
        .ok();
    eventually("it is up", Duration::from_secs(5), || {
        api.docker(["logs", "job"]).run().ok().text() == "up"
    });
    let read = api.docker(["exec", "job", "cat", "/data/file"]).run().ok();
    assert_eq!(read.text(), "kept");
    let network = api.docker(["network", "create", "some"]).run();
    refused(network, 1, "without root");
    api.docker(["rm", "-fv", "job"]).run().ok();
    api.assert_clean();
}

#[test]
fn the_socket_is_its_owners_and_a_stale_one_is_replaced() {
    let mut api = api();
    let socket = api.socket();
    assert_eq!(fs::metadata(&socket).unwrap().mode() & 0o777, 0o600);
    api.hull
        .hull(["api"])
        .run()
        .fails(125, &["another process serves on", "api.sock"]);
    api.stop().ok();
    assert!(!socket.exists());
    // A server that was killed leaves its file.
    drop(UnixListener::bind(&socket).unwrap());
    api.start();
    api.stop().ok();
    fs::write(&socket, "").unwrap();
    api.hull
        .hull(["api"])
        .run()
        .fails(125, &["exists, and is no socket"]);
    fs::remove_file(&socket).unwrap();
    let other = api.hull.path("other.sock");
    let begin = Instant::now();
    let group = api
        .hull
        .hull(["api", "--time", "1", "--group", "daemon", "--socket"])
        .arg(&other)
        .start();
    eventually("it serves", Duration::from_secs(5), || other.exists());
    let metadata = fs::metadata(&other).unwrap();
    eventually("the group has it", Duration::from_secs(5), || {
        fs::metadata(&other).is_ok_and(|metadata| metadata.mode() & 0o777 == 0o660)
    });
    assert_ne!(metadata.ino(), 0);
    group.finish().ok();
    assert!(begin.elapsed() > Duration::from_secs(1));
    api.hull
        .hull(["api", "--group", "no-such-group"])
        .run()
        .fails(125, &["no-such-group"]);
}

#[test]
fn a_service_manager_passes_the_socket() {
    let hull = Hull::new();
    let path = hull.path("passed.sock");
    // As systemd does it: descriptor 3, and the process's own id in the environment.
    let listener = UnixListener::bind(&path).unwrap();
    let script = "exec 3<&0 </dev/null; LISTEN_FDS=1 LISTEN_PID=$$ exec \"$0\" api --time 2";
    let mut served = Command::new("sh")
        .args(["-c", script])
        .arg(executable())
        .env("HULL_CONFIG", hull.path("config.toml"))
        .stdin(OwnedFd::from(listener))
        .spawn()
        .unwrap();
    let docker = Invocation::new("docker")
        .env("DOCKER_HOST", format!("unix://{}", path.display()))
        .env("DOCKER_CONFIG", hull.path("client"))
        .args(["run", "--rm", "busybox", "echo", "passed"])
        .run()
        .ok();
    assert_eq!(docker.text(), "passed");
    assert!(served.wait().unwrap().success());
    assert!(path.exists(), "it is the service manager's");
    hull.assert_clean();
}
