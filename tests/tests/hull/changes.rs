//! What becomes of a container's files: `diff`, `commit`, `export`; and of its limits: `update`.

use std::collections::BTreeMap;
use std::fs;

use hull_tests::{Hull, on_every_machine};

on_every_machine!(
    an_image_of_a_container_has_what_that_changed_and_its_options,
    limits_of_a_running_container_change_at_once
);

const SCRIPT: &str = "echo new >/new; rm /bin/true; mkdir -p /a/b; chmod 700 /tmp; \
                      ln -s /etc/passwd /link; rm -r /usr; mkdir /usr; touch /usr/only";

fn an_image_of_a_container_has_what_that_changed_and_its_options(machine: &'static str) {
    let hull = Hull::on(machine);
    let options = [
        "run", "-d", "--name", "job", "-e", "A=b", "-w", "/tmp", "busybox",
    ];
    let script = format!("mkdir -p /usr/old; {SCRIPT}; echo done; sleep 1000");
    hull.hull(options).args(["sh", "-c", &script]).run().ok();
    let job = hull.container("job");
    hull_tests::eventually("it is done", std::time::Duration::from_secs(20), || {
        job.does("logs").ok().text() == "done"
    });
    let commit = |name: &str| {
        hull.hull([
            "commit",
            "-m",
            "made",
            "-c",
            "CMD [\"cat\", \"/new\"]",
            "job",
            name,
        ])
        .run()
        .ok()
        .text()
    };
    let id = commit("made:1");
    assert!(id.starts_with("sha256:"), "{id}");
    assert_eq!(job.state(), "running", "it is frozen for a moment only");
    assert_eq!(
        hull.hull(["run", "--rm", "made:1"]).run().ok().text(),
        "new"
    );
    let script = "echo $A; pwd; cat /new; test -e /bin/true || echo gone; stat -c %a /tmp; \
                  readlink /link; ls /usr; ls -d /a/b";
    let seen = hull
        .hull(["run", "--rm", "made:1", "sh", "-c", script])
        .run()
        .ok();
    assert_eq!(
        seen.text(),
        "b\n/tmp\nnew\ngone\n700\n/etc/passwd\nonly\n/a/b"
    );
    job.is_removed_by_force();
    // A second one on top of it.
    hull.hull([
        "run",
        "--name",
        "job",
        "made:1",
        "sh",
        "-c",
        "echo more >>/new",
    ])
    .run()
    .ok();
    commit("made:2");
    let seen = hull
        .hull(["run", "--rm", "made:2", "cat", "/new"])
        .run()
        .ok();
    assert_eq!(seen.text(), "new\nmore");
    job.does("rm").ok();
    hull.assert_clean();
}

#[test]
fn what_a_container_changed_is_listed_as_docker_does() {
    let hull = Hull::new();
    hull.hull(["create", "--name", "job", "busybox", "sh", "-c", SCRIPT])
        .run()
        .ok();
    let job = hull.container("job");
    assert_eq!(job.does("diff").ok().text(), "", "before it was started");
    job.does("start").ok();
    job.does("wait").ok();
    let changes = job.does("diff").ok().text();
    let lines: Vec<&str> = changes.lines().collect();
    for line in [
        "A /a",
        "A /a/b",
        "C /bin",
        "D /bin/true",
        "A /link",
        "A /new",
        "C /tmp",
    ] {
        assert!(lines.contains(&line), "{line}: {changes}");
    }
    assert!(!changes.contains("/etc"), "{changes}");
    assert!(!changes.contains("/proc"), "{changes}");
    job.does("rm").ok();
}

#[test]
fn the_files_of_a_container_are_exported_without_its_volumes() {
    let hull = Hull::new();
    let script = "echo new >/new; echo secret >/data/x; ln /new /hard";
    for options in [&["-d"][..], &[]] {
        let script = format!(
            "{script}; {}",
            if options.is_empty() {
                "true"
            } else {
                "sleep 1000"
            }
        );
        hull.hull(["run", "--name", "job", "-v", "/data"])
            .args(options)
            .args(["busybox", "sh", "-c", &script])
            .run()
            .ok();
        let job = hull.container("job");
        hull_tests::eventually("it has written", std::time::Duration::from_secs(20), || {
            job.does("diff").ok().text().contains("/hard")
        });
        let file = hull.scratch().join("files.tar");
        hull.hull(["export", "-o", file.to_str().unwrap(), "job"])
            .run()
            .ok();
        let mut archive = tar::Archive::new(fs::File::open(&file).unwrap());
        let entries: BTreeMap<String, u64> = archive
            .entries()
            .unwrap()
            .map(|entry| {
                let entry = entry.unwrap();
                let path = entry.path().unwrap().display().to_string();
                (path, entry.size())
            })
            .collect();
        let has = |name: &str| entries.contains_key(name);
        assert!(
            has("bin/busybox") && has("new") && has("hard"),
            "{entries:?}"
        );
        assert!(has("data") && !has("data/x"), "{entries:?}");
        assert!(has("proc") && !has("proc/version"), "{entries:?}");
        hull.hull(["rm", "-fv", "job"]).run().ok();
    }
    hull.hull(["export", "nobody"])
        .run()
        .fails(1, &["no such container: nobody"]);
}

#[test]
fn nothing_of_the_host_gets_into_an_image_by_links_of_a_container() {
    let hull = Hull::new();
    fs::write(hull.scratch().join("secret"), "secret").unwrap();
    let secret = hull.scratch().join("secret").display().to_string();
    let script = format!("rm -rf /opt; ln -s {} /opt; ln -s {secret} /file", "/");
    hull.hull(["run", "--name", "bad", "busybox", "sh", "-c", &script])
        .run()
        .ok();
    hull.hull(["commit", "bad", "bad:1"]).run().ok();
    let script = "readlink /opt; readlink /file; cat /file 2>/dev/null || echo nothing";
    let seen = hull
        .hull(["run", "--rm", "bad:1", "sh", "-c", script])
        .run()
        .ok();
    assert_eq!(seen.text(), format!("/\n{secret}\nnothing"));
    hull.container("bad").does("rm").ok();
}

fn limits_of_a_running_container_change_at_once(machine: &'static str) {
    let hull = Hull::on(machine);
    let container = hull.start(&["-m", "64m"], &["sleep", "1000"]);
    let update = |options: &[&str]| {
        hull.hull(["update"])
            .args(options)
            .arg(&container.name)
            .run()
    };
    update(&[
        "-m",
        "32m",
        "--pids-limit",
        "7",
        "--cpus",
        "0.5",
        "-c",
        "512",
    ])
    .ok();
    let limits = "cd /sys/fs/cgroup; cat memory.max pids.max cpu.max cpu.weight";
    // The weight is runc's of so many shares.
    let changed = "33554432\n7\n50000 100000\n59";
    assert_eq!(container.sh(limits).ok().text(), changed);
    for option in [["--memory-swap", "-1"], ["--cpuset-cpus", "0"]] {
        update(&option)
            .fails(125, &["not supported", option[0], "while its machine runs"])
            .hint("hull stop");
    }
    update(&["-m", "8g"]).fails(125, &["--memory", "the machine of container"]);
    update(&[]).fails(125, &["nothing to change"]);
    hull.hull(["restart", "-t", "0", &container.name])
        .run()
        .ok();
    assert_eq!(container.sh(limits).ok().text(), changed, "they are kept");
    hull.hull(["stop", "-t", "0", &container.name]).run().ok();
    update(&["--memory-swap", "16m"]).fails(125, &["--memory-swap", "less than --memory"]);
    update(&["--memory-swap", "48m", "--cpuset-cpus", "0"]).ok();
    let asked = container.inspect()["HostConfig"].clone();
    assert_eq!(asked["CpusetCpus"], "0");
    assert_eq!(asked["MemorySwap"], 48 << 20);
    update(&["--memory-swap", "0"]).ok();
    assert_eq!(container.inspect()["HostConfig"]["MemorySwap"], 0);
    let other = hull.hull([
        "create",
        "--network",
        &format!("container:{}", container.name),
    ]);
    let other = other.args(["busybox", "true"]).run().ok().text();
    hull.hull(["update", "--memory-swap", "-1", &other])
        .run()
        .fails(125, &["--memory-swap", "in the machine of another one"]);
    hull.hull(["rm", &other]).run().ok();
    hull.hull(["start", &container.name]).run().ok();
    container.is_removed_by_force();
}
