//! Output in the host's journal: with a real systemd-journald in a mount namespace of its own.

use hull_tests::{Hull, Output};
use serde_json::Value;

/// Runs a container beside a journal; the messages of its name in that, one JSON object a line.
fn with_journal(hull: &Hull, options: &[&str], command: &[&str]) -> Output {
    let script = "
        set -e
        mount -t tmpfs tmpfs /run/systemd
        mkdir -p /run/systemd/journal /run/log
        mount -t tmpfs tmpfs /run/log
        [ -s /etc/machine-id ] || {
            echo 0123456789abcdef0123456789abcdef > /run/systemd/machine-id
            mount --bind /run/systemd/machine-id /etc/machine-id
        }
        /lib/systemd/systemd-journald & journal=$!
        trap 'kill $journal' EXIT
        tries=0
        until [ -S /run/systemd/journal/socket ]; do
            tries=$((tries + 1)); [ $tries -lt 200 ]; sleep 0.05
        done
        \"$@\" >&2
        journalctl --sync
        journalctl --no-pager --all -o json _TRANSPORT=journal CONTAINER_NAME=web";
    let wrapper = ["unshare", "--mount", "sh", "-c", script, "sh"];
    let run = ["run", "--rm", "--name", "web", "--log-driver", "journald"];
    let run = hull.hull(run).args(options).arg("busybox").args(command);
    run.under(&wrapper).run()
}

#[test]
fn output_goes_to_the_hosts_journal_line_by_line() {
    let hull = Hull::new();
    let long = "for i in $(seq 2000); do printf 0123456789; done; echo";
    let script = format!("echo one; echo wrong >&2; {long}; printf unended");
    let options = [
        "--log-opt",
        "tag={{.Name}}/{{.ImageName}}",
        "--log-opt",
        "labels=com.example/role",
        "--log-opt",
        "env=PLACE,NOTHING",
        "-l",
        "com.example/role=front",
        "-e",
        "PLACE=here",
    ];
    let output = with_journal(&hull, &options, &["sh", "-c", &script]).ok();
    let lines = output.text();
    let lines: Vec<Value> = lines
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    let text = |line: &Value, field: &str| line[field].as_str().unwrap_or_default().to_owned();
    let find = |wanted: &str| {
        let line = lines.iter().find(|line| text(line, "MESSAGE") == wanted);
        line.unwrap_or_else(|| panic!("no {wanted:?} among {} lines", lines.len()))
    };
    let one = find("one");
    assert_eq!(text(one, "PRIORITY"), "6");
    assert_eq!(text(one, "CONTAINER_NAME"), "web");
    assert_eq!(text(one, "CONTAINER_ID_FULL").len(), 64);
    assert_eq!(text(one, "CONTAINER_ID").len(), 12);
    assert_eq!(text(one, "SYSLOG_IDENTIFIER"), "web/busybox");
    assert_eq!(text(one, "COM_EXAMPLE_ROLE"), "front");
    assert_eq!(text(one, "PLACE"), "here");
    assert_eq!(text(find("wrong"), "PRIORITY"), "3");
    find("unended");
    let parts: Vec<&Value> = lines
        .iter()
        .filter(|line| {
            text(line, "MESSAGE").starts_with("0123456789") || text(line, "MESSAGE").len() > 100
        })
        .collect();
    let lengths: Vec<usize> = parts
        .iter()
        .map(|line| text(line, "MESSAGE").len())
        .collect();
    assert_eq!(lengths, [16 * 1024, 20_000 - 16 * 1024]);
    assert_eq!(text(parts[0], "CONTAINER_PARTIAL_MESSAGE"), "true");
    hull.assert_clean();
}

#[test]
fn without_a_journal_a_container_that_wants_one_does_not_start() {
    let hull = Hull::new();
    let script = "mount -t tmpfs tmpfs /run/systemd && exec \"$@\"";
    let run = ["run", "--rm", "--log-driver", "journald", "busybox", "true"];
    hull.hull(run)
        .under(&["unshare", "--mount", "sh", "-c", script, "sh"])
        .run()
        .fails(125, &["journal", "/run/systemd/journal/socket"])
        .hint("systemd-journald");
    hull.assert_clean();
}
