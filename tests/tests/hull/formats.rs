//! Output for programs: `--format` with templates, the keys of `docker inspect`, and what is there
//! on the whole: `info`, `system df`, `system prune`.

use std::time::Duration;

use hull_tests::{Hull, eventually, on_every_machine};
use serde_json::{Value, json};

on_every_machine!(what_is_asked_for_is_in_dockers_keys_of_a_running_container);

/// Output of a command that succeeds.
fn text(hull: &Hull, arguments: &[&str]) -> String {
    hull.hull(arguments).run().ok().text()
}

/// A line of JSON for each line of output.
fn objects(hull: &Hull, arguments: &[&str]) -> Vec<Value> {
    text(hull, arguments)
        .lines()
        .map(|line| serde_json::from_str(line).unwrap_or_else(|why| panic!("{line}: {why}")))
        .collect()
}

#[test]
fn ps_prints_what_a_template_asks_for() {
    let hull = Hull::new();
    let running = hull.start(
        &["--label", "role=web", "-v", "data:/data"],
        &["sleep", "1000"],
    );
    let ended = hull.start(&[], &["sh", "-c", "exit 3"]);
    ended.wait();
    let ps = |format: &str| text(&hull, &["ps", "-a", "--format", format]);
    let (running, ended) = (&running.name, &ended.name);
    assert_eq!(
        ps("{{.Names}} {{.State}} {{.Image}} {{.Networks}} {{.LocalVolumes}}"),
        format!("{ended} exited busybox none 0\n{running} running busybox none 1")
    );
    assert_eq!(
        ps(r#"{{.Label "role"}}|{{.Labels}}|{{.Mounts}}|{{.Command}}"#),
        "|||\"sh -c exit 3\"\nweb|role=web|data|\"sleep 1000\""
    );
    let template = r#"{{if eq .State "running"}}{{upper .Names}}{{else}}-{{end}}"#;
    assert_eq!(ps(template), format!("-\n{}", running.to_uppercase()));
    assert_eq!(
        ps(r"table {{.Names}}\t{{.State}}"),
        format!("NAMES   STATE\n{ended}     exited\n{running}     running")
    );
    let listed = objects(&hull, &["ps", "-a", "--format", "json"]);
    assert_eq!(
        listed,
        objects(&hull, &["ps", "-a", "--format", "{{json .}}"])
    );
    assert_eq!(listed[0]["Names"], ended.as_str());
    assert!(
        listed[0]["Status"]
            .as_str()
            .unwrap()
            .starts_with("Exited (3)")
    );
    assert_eq!(listed[1]["Machine"], "uml");
    let id = ps("{{.ID}}").lines().next().unwrap().to_owned();
    assert_eq!(id.len(), 12);
    assert_eq!(
        text(&hull, &["ps", "-aq", "--format", "table"])
            .lines()
            .next(),
        Some(&id[..])
    );
}

#[test]
fn a_mistake_in_a_template_is_named_with_its_place() {
    let hull = Hull::new();
    for (arguments, why) in [
        (
            &["ps", "--format", "{{.Name}}"][..],
            "column 3: there is no field .Name",
        ),
        (&["ps", "--format", "{{.Names"], "column 1: {{ has no end"),
        (
            &["image", "ls", "--format", "{{nope .ID}}"],
            "column 3: function \"nope\"",
        ),
        (
            &["stats", "--no-stream", "--format", "table {{.Nope}}"],
            "column 9: there is no field",
        ),
        (
            &["image", "inspect", "-f", "{{.Nope}}", "busybox"],
            "no field .Nope; there are .Arch",
        ),
    ] {
        let output = hull.hull(arguments).run().fails(125, &[why]);
        assert_eq!(output.text(), "");
    }
}

#[test]
fn ps_shows_the_last_containers_their_sizes_and_those_before_and_after_another() {
    let hull = Hull::new();
    let first = hull.start(&[], &["sh", "-c", "head -c 100000 /dev/zero >/file"]);
    first.wait();
    let second = hull.start(&["-v", "data:/data"], &["sleep", "1000"]);
    let third = hull.start(&[], &["true"]);
    third.wait();
    let names = |options: &[&str]| {
        let arguments = [&["ps", "--format", "{{.Names}}"], options].concat();
        let listed = text(&hull, &arguments);
        listed.lines().map(str::to_owned).collect::<Vec<_>>()
    };
    assert_eq!(names(&["-l"]), [third.name.as_str()]);
    assert_eq!(
        names(&["-n", "2"]),
        [third.name.as_str(), second.name.as_str()]
    );
    assert_eq!(names(&["-n", "-1"]), [second.name.as_str()]);
    let filtered = |filter: &str| names(&["-a", "--filter", filter]);
    assert_eq!(
        filtered(&format!("before={}", second.name)),
        [first.name.as_str()]
    );
    assert_eq!(
        filtered(&format!("since={}", second.name)),
        [third.name.as_str()]
    );
    assert_eq!(filtered("volume=data"), [second.name.as_str()]);
    assert_eq!(filtered("volume=/data"), [second.name.as_str()]);
    assert_eq!(filtered("network=none").len(), 3);
    assert_eq!(filtered("publish=80").len(), 0);
    hull.hull(["ps", "--filter", "before=nobody"])
        .run()
        .fails(1, &["no such container: nobody"]);
    let size = text(
        &hull,
        &[
            "ps",
            "-a",
            "--filter",
            &format!("name=^{}$", first.name),
            "--format",
            "{{.Size}}",
        ],
    );
    assert!(size.starts_with("100kB (virtual "), "{size}");
    let table = text(&hull, &["ps", "-as"]);
    assert!(
        table.contains("SIZE") && table.contains("100kB (virtual "),
        "{table}"
    );
    for container in [&first, &second, &third] {
        container.is_removed_by_force();
    }
    text(&hull, &["volume", "rm", "data"]);
}

#[test]
fn images_and_volumes_are_printed_as_a_template_asks_for() {
    let hull = Hull::new();
    let images = text(
        &hull,
        &[
            "image",
            "ls",
            "--format",
            "{{.Repository}}:{{.Tag}} {{.ID}}",
        ],
    );
    let (name, id) = images.split_once(' ').unwrap();
    assert_eq!((name, id.len()), ("busybox:latest", 12));
    let inspect = |format: &str| text(&hull, &["image", "inspect", "--format", format, "busybox"]);
    assert_eq!(
        inspect("{{index .RepoTags 0}} {{.Os}}"),
        "busybox:latest linux"
    );
    assert_eq!(inspect("{{.Config.Cmd}} {{len .RootFS.Layers}}"), "[sh] 1");
    assert!(inspect("{{.Id}}").starts_with(&format!("sha256:{id}")));
    assert!(inspect("{{.Size}}").parse::<u64>().unwrap() > 1000);
    text(&hull, &["volume", "create", "--label", "a=b", "data"]);
    let volumes = text(
        &hull,
        &[
            "volume",
            "ls",
            "--format",
            r#"{{.Name}} {{.Driver}} {{.Scope}} {{.Label "a"}}"#,
        ],
    );
    assert_eq!(volumes, "data local local b");
    let inspected = text(
        &hull,
        &["volume", "inspect", "-f", "{{.Mountpoint}}", "data"],
    );
    assert!(inspected.ends_with("/volumes/data/_data"), "{inspected}");
    text(&hull, &["volume", "rm", "data"]);
}

#[test]
fn inspect_finds_containers_images_and_volumes_or_only_what_is_asked_for() {
    let hull = Hull::new();
    text(&hull, &["create", "--name", "same", "busybox", "true"]);
    text(&hull, &["volume", "create", "same"]);
    let name = |options: &[&str]| {
        let arguments = [&["inspect", "--format", "{{.Name}}"], options].concat();
        hull.hull(arguments).run()
    };
    assert_eq!(name(&["same"]).ok().text(), "/same");
    assert_eq!(name(&["--type", "volume", "same"]).ok().text(), "same");
    name(&["--type", "image", "same"]).fails(1, &["no such image: same"]);
    let output = hull
        .hull(["container", "inspect", "-f", "{{.State.Status}}", "same"])
        .run()
        .ok();
    assert_eq!(output.text(), "created");
    hull.hull(["container", "inspect", "busybox"])
        .run()
        .fails(1, &["no such container: busybox"]);
    // The others are printed all the same.
    let output =
        name(&["nobody", "same"]).fails(1, &["no such container, image, volume or network"]);
    assert_eq!(output.text(), "/same");
    hull.container("same").does("rm").ok();
    text(&hull, &["volume", "rm", "same"]);
}

fn what_is_asked_for_is_in_dockers_keys_of_a_running_container(machine: &'static str) {
    let hull = Hull::on(machine);
    let directory = hull.scratch();
    let bind = format!("{}:/host:ro", directory.display());
    let container = hull.start(
        &[
            "-v",
            &bind,
            "-v",
            "data:/data",
            "-e",
            "A=1",
            "-w",
            "/tmp",
            "-m",
            "64m",
            "--hostname",
            "box",
            "--label",
            "role=web",
            "--init",
            "--stop-signal",
            "INT",
        ],
        &["sleep", "1000"],
    );
    let object = container.inspect();
    assert_eq!(
        object["Hull"]["id"], object["Id"],
        "hull's own keys are there"
    );
    for (pointer, value) in [
        ("/Name", json!(format!("/{}", container.name))),
        ("/Path", json!("sleep")),
        ("/Args", json!(["1000"])),
        ("/State/Status", json!("running")),
        ("/State/ExitCode", json!(0)),
        ("/Config/Hostname", json!("box")),
        ("/Config/Image", json!("busybox")),
        ("/Config/Cmd", json!(["sleep", "1000"])),
        ("/Config/WorkingDir", json!("/tmp")),
        ("/Config/Labels/role", json!("web")),
        ("/Config/StopSignal", json!("SIGINT")),
        ("/HostConfig/Memory", json!(64 << 20)),
        ("/HostConfig/Init", json!(true)),
        ("/HostConfig/Binds", json!([bind, "data:/data"])),
        ("/Mounts/0/Type", json!("bind")),
        ("/Mounts/0/RW", json!(false)),
        ("/Mounts/1/Name", json!("data")),
        ("/Mounts/1/Destination", json!("/data")),
        ("/NetworkSettings/Ports", json!({})),
    ] {
        assert_eq!(object.pointer(pointer), Some(&value), "{pointer}");
    }
    let pid = object["State"]["Pid"].as_i64().unwrap();
    assert!(std::path::Path::new(&format!("/proc/{pid}")).exists());
    let inspect = |format: &str| text(&hull, &["inspect", "-f", format, &container.name]);
    let env = inspect("{{range .Config.Env}}{{println .}}{{end}}");
    assert!(env.lines().any(|variable| variable == "A=1"), "{env}");
    let mounts = "{{range .Mounts}}{{.Destination}}={{.RW}} {{end}}";
    assert_eq!(inspect(mounts).trim_end(), "/host=false /data=true");
    assert_eq!(inspect("{{json .Config.Entrypoint}}"), "null");
    container.does("kill").ok();
    assert_eq!(container.wait(), 137);
    assert_eq!(
        inspect("{{.State.Status}} {{.State.ExitCode}} {{.State.Running}}"),
        "exited 137 false"
    );
    container.does("rm").ok();
    text(&hull, &["volume", "rm", "data"]);
}

#[test]
fn the_address_and_the_ports_of_a_container_are_found_with_templates() {
    let hull = Hull::networked("uml");
    let container = hull.start(&["-p", "127.0.0.1:0:80"], &["sleep", "1000"]);
    let inspect = |format: &str| text(&hull, &["inspect", "-f", format, &container.name]);
    let address = container.address().to_string();
    assert_eq!(inspect("{{.NetworkSettings.IPAddress}}"), address);
    let each = "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}";
    assert_eq!(inspect(each), address);
    assert!(!inspect("{{.NetworkSettings.Gateway}}").is_empty());
    assert_eq!(inspect("{{.NetworkSettings.MacAddress}}").len(), 17);
    let port = inspect(r#"{{(index (index .NetworkSettings.Ports "80/tcp") 0).HostPort}}"#);
    assert_eq!(
        container.does("port").ok().text(),
        format!("80/tcp -> 127.0.0.1:{port}")
    );
    let published = |filter: String| {
        text(
            &hull,
            &["ps", "--filter", &filter, "--format", "{{.Names}}"],
        )
    };
    assert_eq!(published(format!("publish={port}")), container.name);
    assert_eq!(published("expose=80/tcp".into()), container.name);
    assert_eq!(published("expose=81".into()), "");
    container.is_removed_by_force();
    hull.assert_clean();
}

#[test]
fn stats_events_version_and_info_take_templates() {
    let hull = Hull::new();
    let container = hull.sleeper();
    let stats = text(
        &hull,
        &[
            "stats",
            "--no-stream",
            "--format",
            "{{.Container}} {{.Name}} {{.PIDs}}",
            &container.name,
        ],
    );
    assert_eq!(stats, format!("{0} {0} 1", container.name));
    let stats = objects(&hull, &["stats", "--no-stream", "--format", "json"]);
    assert!(
        stats[0]["CPUPerc"].as_str().unwrap().ends_with('%'),
        "{stats:?}"
    );
    assert!(
        stats[0]["MemUsage"].as_str().unwrap().contains(" / "),
        "{stats:?}"
    );
    let events = text(
        &hull,
        &[
            "events",
            "--since",
            "1h",
            "--until",
            "now",
            "--format",
            "{{.Type}} {{.Action}} {{.Actor.ID}}",
        ],
    );
    let id = container.inspect()["Hull"]["id"]
        .as_str()
        .unwrap()
        .to_owned();
    let started = format!("container start {id}");
    assert!(events.lines().any(|line| line == started), "{events}");
    let version = env!("CARGO_PKG_VERSION");
    assert_eq!(
        text(&hull, &["version", "--format", "{{.Server.Version}}"]),
        version
    );
    let info = "{{.Containers}} {{.ContainersRunning}} {{.Images}} {{.ServerVersion}}";
    assert_eq!(
        text(&hull, &["info", "--format", info]),
        format!("1 1 1 {version}")
    );
    let info = &objects(&hull, &["system", "info", "--format", "json"])[0];
    assert_eq!(info["DockerRootDir"], hull.path("data").to_str().unwrap());
    assert!(info["NCPU"].as_u64().unwrap() > 0 && info["MemTotal"].as_u64().unwrap() > 1 << 20);
    let machines = info["Machines"].as_array().unwrap();
    let uml = machines.iter().find(|machine| machine["Kind"] == "uml");
    assert_eq!(uml.unwrap()["Works"], true, "{machines:?}");
    let shown = text(&hull, &["info"]);
    assert!(shown.starts_with("Containers: 1\n Running: 1\n"), "{shown}");
    container.is_removed_by_force();
}

#[test]
fn what_takes_space_is_shown_and_what_nothing_uses_is_removed() {
    let hull = Hull::new();
    let running = hull.start(&["-v", "named:/named"], &["sleep", "1000"]);
    let ended = hull.start(
        &["-v", "/anonymous"],
        &[
            "sh",
            "-c",
            "head -c 5000 /dev/zero >/anonymous/f; head -c 70000 /dev/zero >/f",
        ],
    );
    ended.wait();
    hull.hull(["image", "import", "--change", "CMD [\"true\"]"])
        .arg(hull.path("busybox.tar"))
        .arg("unused")
        .run()
        .ok();
    running.sh("head -c 3000 /dev/zero >/named/f").ok();
    let df = |format: &str| text(&hull, &["system", "df", "--format", format]);
    let row = "{{.Type}}: {{.TotalCount}} {{.Active}}";
    assert_eq!(df(row), "Images: 2 1\nContainers: 2 1\nLocal Volumes: 2 2");
    eventually("files are counted", Duration::from_secs(10), || {
        let sizes = df("{{.Size}} {{.Reclaimable}}");
        let lines: Vec<&str> = sizes.lines().collect();
        lines[1].ends_with("70kB (100%)") && lines[2] == "8kB 0B (0%)"
    });
    let table = text(&hull, &["system", "df", "-v"]);
    assert!(
        table.contains(&running.name) && table.contains("named"),
        "{table}"
    );

    let pruned = text(&hull, &["system", "prune", "-f", "--volumes"]);
    assert!(pruned.ends_with("Total reclaimed space: 75kB"), "{pruned}");
    assert_eq!(hull.names(), [running.name.as_str()]);
    assert_eq!(text(&hull, &["volume", "ls", "-q"]), "named");
    let left = text(&hull, &["image", "ls", "--format", "{{.Repository}}"]);
    let mut left: Vec<_> = left.lines().collect();
    left.sort_unstable();
    assert_eq!(left, ["busybox", "unused"]);

    running.is_removed_by_force();
    text(&hull, &["system", "prune", "-af"]);
    assert_eq!(text(&hull, &["image", "ls", "-q"]), "");
    assert_eq!(
        text(&hull, &["volume", "ls", "-q"]),
        "named",
        "people named it"
    );
    text(&hull, &["volume", "rm", "named"]);
    hull.assert_clean();
}
