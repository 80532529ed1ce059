//! Running plugins, with scripts as plugins.

use std::sync::Arc;

use rustix::fs::{FlockOperation, flock};

use super::*;

#[test]
fn plugins_run_in_order_and_are_undone_in_reverse() {
    let house = House::new();
    house.plugin("one", ANSWER);
    house.plugin(
        "two",
        r#"[ $CNI_COMMAND != ADD ] || echo '{"ips": [{"address": "10.1.0.3/24", "gateway": "10.1.0.1"}]}'"#,
    );
    let mut record = record(list(
        json!([{ "type": "one", "cniVersion": "0.1.0", "key": "a" }, { "type": "two" }]),
    ));
    let result = record.add(&house.runner).unwrap().clone();
    assert_eq!(
        result.ips[0].address.to_string(),
        "10.1.0.3/24",
        "the last plugin's result is the result"
    );
    record.check(&house.runner).unwrap();
    record.del(&house.runner).unwrap();
    assert_eq!(
        house.calls(),
        [
            "ADD one",
            "ADD two",
            "CHECK one",
            "CHECK two",
            "DEL two",
            "DEL one"
        ]
    );

    assert_eq!(
        house.input("one", "ADD"),
        json!({ "cniVersion": "1.0.0", "name": "x", "type": "one", "key": "a" })
    );
    let first = json!({ "cniVersion": "1.0.0", "ips": [{ "address": "10.1.0.2/24" }], "own": 7 });
    assert_eq!(house.input("two", "ADD")["prevResult"], first);
    for (plugin, command) in [
        ("one", "CHECK"),
        ("two", "CHECK"),
        ("one", "DEL"),
        ("two", "DEL"),
    ] {
        assert_eq!(
            &house.input(plugin, command)["prevResult"],
            result.as_json(),
            "{plugin} {command}"
        );
    }
}

#[test]
fn older_plugins_are_not_told_more_than_their_version_has() {
    let house = House::new();
    house.plugin("one", ANSWER);
    let mut record = record(versioned("0.3.1", json!([{ "type": "one" }])));
    let result = record.add(&house.runner).unwrap();
    assert_eq!(result.as_json()["cniVersion"], "0.3.1");
    assert_eq!(result.as_json()["ips"][0]["version"], "4");
    record.check(&house.runner).unwrap();
    record.del(&house.runner).unwrap();
    assert_eq!(house.calls(), ["ADD one", "DEL one"]);
    assert_eq!(house.input("one", "DEL").get("prevResult"), None);
}

#[test]
fn the_environment_is_the_specifications_and_nothing_else() {
    let house = House::new();
    house.plugin(
        "one",
        &format!("env >{}\npwd >&2\n{ANSWER}", house.path("env").display()),
    );
    let mut attachment = attachment();
    attachment.args = vec![
        ("IgnoreUnknown".into(), "1".into()),
        ("K8S_POD_NAME".into(), "web".into()),
    ];
    let mut record = Record::new(list(json!([{ "type": "one" }])), attachment).unwrap();
    record.add(&house.runner).unwrap();
    let text = fs::read_to_string(house.path("env")).unwrap();
    // The shell sets two variables itself.
    let mut lines: Vec<&str> = text
        .lines()
        .filter(|line| !line.starts_with("PWD=") && !line.starts_with("_="))
        .collect();
    lines.retain(|line| !line.starts_with("PATH=") || !line.contains("/usr/sbin"));
    lines.sort_unstable();
    let path = format!("CNI_PATH={}", house.directory.path().display());
    assert_eq!(
        lines,
        [
            "CNI_ARGS=IgnoreUnknown=1;K8S_POD_NAME=web",
            "CNI_COMMAND=ADD",
            "CNI_CONTAINERID=c1",
            "CNI_IFNAME=eth0",
            "CNI_NETNS=/proc/self/ns/net",
            &path,
        ]
    );
}

#[test]
fn a_plugin_is_told_of_the_capabilities_that_it_declares() {
    let house = House::new();
    for name in ["none", "some", "rest"] {
        house.plugin(name, ANSWER);
    }
    let list = list(json!([
        { "type": "none" },
        { "type": "some", "capabilities": { "portMappings": true, "mac": false, "bandwidth": true } },
        { "type": "rest", "capabilities": { "ips": true, "mac": true, "dns": true, "aliases": true, "ipRanges": true } },
    ]));
    let mut attachment = attachment();
    attachment.port_mappings = vec![
        PortMapping {
            host_ip: None,
            host_port: 8080,
            container_port: 80,
            protocol: Protocol::Tcp,
        },
        PortMapping {
            host_ip: Some("::1".parse().unwrap()),
            host_port: 53,
            container_port: 53,
            protocol: Protocol::Udp,
        },
        PortMapping {
            host_ip: Some("0.0.0.0".parse().unwrap()),
            host_port: 9,
            container_port: 9,
            protocol: Protocol::Sctp,
        },
    ];
    attachment.ips = vec!["10.1.0.9/24".parse().unwrap(), "fd00::9".parse().unwrap()];
    attachment.mac = Some([2, 0, 0, 0, 0, 0xfe]);
    attachment.dns = Some(Dns {
        nameservers: vec!["10.1.0.1".into()],
        search: vec!["lan".into()],
        ..Dns::default()
    });
    attachment.aliases = vec!["db".into()];
    attachment
        .capabilities
        .insert("bandwidth".into(), json!({ "ingressRate": 1 }));
    Record::new(list, attachment)
        .unwrap()
        .add(&house.runner)
        .unwrap();

    assert_eq!(house.input("none", "ADD").get("runtimeConfig"), None);
    assert_eq!(house.input("some", "ADD").get("capabilities"), None);
    assert_eq!(
        house.input("some", "ADD")["runtimeConfig"],
        json!({
            "portMappings": [
                { "hostPort": 8080, "containerPort": 80, "protocol": "tcp" },
                { "hostPort": 53, "containerPort": 53, "protocol": "udp", "hostIP": "::1" },
                { "hostPort": 9, "containerPort": 9, "protocol": "sctp" },
            ],
            "bandwidth": { "ingressRate": 1 },
        })
    );
    assert_eq!(
        house.input("rest", "ADD")["runtimeConfig"],
        json!({
            "ips": ["10.1.0.9/24", "fd00::9"],
            "mac": "02:00:00:00:00:fe",
            "dns": { "servers": ["10.1.0.1"], "searches": ["lan"], "options": [] },
            "aliases": { "x": ["db"] },
        })
    );
}

#[test]
fn what_no_plugin_can_do_is_refused_before_anything_is_done() {
    let plain = list(json!([{ "type": "one" }]));
    let refused = |change: &dyn Fn(&mut Attachment)| {
        let mut attachment = attachment();
        change(&mut attachment);
        Record::new(plain.clone(), attachment)
            .unwrap_err()
            .to_string()
    };
    let published = PortMapping {
        host_ip: None,
        host_port: 1,
        container_port: 1,
        protocol: Protocol::Tcp,
    };
    assert_eq!(
        refused(&|a| a.port_mappings = vec![published.clone()]),
        r#"network "x": cannot publish ports: no plugin of it has the capability "portMappings""#
    );
    assert!(refused(&|a| a.mac = Some([2; 6])).contains("hardware address"));
    assert!(refused(&|a| a.ips = vec!["10.0.0.1".parse().unwrap()]).contains("chosen address"));
    assert!(refused(&|a| a.container_id = "../x".into()).contains("invalid container id"));
    assert!(
        refused(&|a| a.netns = "/nowhere".into())
            .contains("no network namespace /nowhere: No such file")
    );
}

#[test]
fn a_failure_in_the_middle_undoes_all_and_is_the_error() {
    let house = House::new();
    house.plugin("one", ANSWER);
    house.plugin(
        "two",
        r#"[ $CNI_COMMAND != ADD ] || { echo noise >&2; printf %s '{"cniVersion": "1.0.0", "code": 11, "msg": "no\nluck", "details": "today"}'; exit 1; }"#,
    );
    house.plugin("three", ANSWER);
    let mut record = record(list(
        json!([{ "type": "one" }, { "type": "two" }, { "type": "three" }]),
    ));
    let error = record.add(&house.runner).unwrap_err();
    assert_eq!(
        error.to_string(),
        r#"network "x": plugin two failed: no luck (today)"#
    );
    assert_eq!((error.code(), error.hint()), (Some(11), None));
    assert_eq!(
        house.calls(),
        ["ADD one", "ADD two", "DEL three", "DEL two", "DEL one"]
    );
    assert_eq!(
        house.input("one", "DEL")["prevResult"]["own"],
        7,
        "what the first said helps it to undo"
    );
    assert_eq!(record.result, None);
}

#[test]
fn undoing_goes_on_when_a_plugin_fails_and_says_so() {
    let house = House::new();
    house.plugin("one", ANSWER);
    house.plugin("two", "echo deep trouble >&2; exit 3");
    let mut record = record(list(json!([{ "type": "one" }, { "type": "two" }])));
    let error = record.add(&house.runner).unwrap_err().to_string();
    assert_eq!(
        error,
        "network \"x\": plugin two failed: exit status: 3: deep trouble; \
         it could not be undone: network \"x\": plugin two failed on DEL: exit status: 3: deep trouble"
    );
    assert_eq!(house.calls(), ["ADD one", "ADD two", "DEL two", "DEL one"]);
    assert!(record.result.is_some(), "kept for another try");
}

#[test]
fn a_record_kept_before_and_during_undoes_after_a_crash() {
    let house = House::new();
    house.plugin("one", ANSWER);
    house.plugin("two", ANSWER);
    let mut record = record(list(json!([{ "type": "one" }, { "type": "two" }])));
    let before = serde_json::to_string(&record).unwrap();
    let mut during = Vec::new();
    record
        .add_and_keep(&house.runner, &mut |record| {
            during.push(serde_json::to_string(record).unwrap());
            Ok(())
        })
        .unwrap();
    assert_eq!(during.len(), 2);
    assert_eq!(serde_json::from_str::<Record>(&during[1]).unwrap(), record);

    let before: Record = serde_json::from_str(&before).unwrap();
    before.del(&house.runner).unwrap();
    assert_eq!(house.input("one", "DEL").get("prevResult"), None);
    let during: Record = serde_json::from_str(&during[0]).unwrap();
    during.del(&house.runner).unwrap();
    assert_eq!(house.input("one", "DEL")["prevResult"]["own"], 7);
}

#[test]
fn a_record_that_cannot_be_kept_is_undone() {
    let house = House::new();
    house.plugin("one", ANSWER);
    let mut record = record(list(json!([{ "type": "one" }])));
    let error = record
        .add_and_keep(&house.runner, &mut |_| Err("disk full".into()))
        .unwrap_err();
    assert_eq!(error.to_string(), r#"network "x": disk full"#);
    assert_eq!(house.calls(), ["ADD one", "DEL one"]);
}

#[test]
fn a_namespace_that_is_gone_or_another_is_not_touched() {
    let house = House::new();
    house.plugin(
        "one",
        &format!(
            "echo \"<$CNI_NETNS>\" >{}\n{ANSWER}",
            house.path("netns").display()
        ),
    );
    let seen = || fs::read_to_string(house.path("netns")).unwrap();
    let netns = house.path("ns");
    fs::write(&netns, "").unwrap();
    let mut attachment = attachment();
    attachment.netns = netns.clone();
    let mut record = Record::new(list(json!([{ "type": "one" }])), attachment).unwrap();
    record.add(&house.runner).unwrap();
    record.del(&house.runner).unwrap();
    assert_eq!(seen(), format!("<{}>\n", netns.display()));
    // Created while the first exists, so that their inodes differ.
    fs::write(house.path("another"), "").unwrap();
    fs::rename(house.path("another"), &netns).unwrap();
    // Where namespaces can be created, plugins get a stand-in.
    let is_another = |seen: &str| seen == "<>\n" || seen.starts_with("</proc/");
    record.del(&house.runner).unwrap();
    assert!(is_another(&seen()), "{}", seen());
    fs::remove_file(&netns).unwrap();
    record.del(&house.runner).unwrap();
    assert!(is_another(&seen()), "{}", seen());
}

#[test]
fn a_plugin_that_hangs_is_killed_with_its_children() {
    let mut house = House::new();
    house.runner.limit = Duration::from_millis(300);
    let pids = house.path("pids");
    house.plugin(
        "one",
        &format!(
            "[ $CNI_COMMAND != ADD ] || {{ sleep 100 & echo $! $$ >{}; wait; }}",
            pids.display()
        ),
    );
    let began = Instant::now();
    let error = record(list(json!([{ "type": "one" }])))
        .add(&house.runner)
        .unwrap_err();
    assert_eq!(
        error.to_string(),
        r#"network "x": plugin one failed: it had not ended after 300ms and was killed"#
    );
    assert!(began.elapsed() < Duration::from_secs(5));
    for pid in fs::read_to_string(&pids).unwrap().split_whitespace() {
        let status = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        assert!(
            status.is_empty() || status.contains(") Z "),
            "{pid} lives: {status}"
        );
    }
}

#[test]
fn a_child_that_stays_is_not_waited_for() {
    let house = House::new();
    house.plugin("one", &format!("sleep 3 &\n{ANSWER}"));
    let began = Instant::now();
    record(list(json!([{ "type": "one" }])))
        .add(&house.runner)
        .unwrap();
    assert!(began.elapsed() < Duration::from_secs(2));
}

#[test]
fn a_plugin_need_not_read_its_configuration() {
    let house = House::new();
    house.script("one", &format!("#!/bin/sh\n{ANSWER}\n"));
    let config = json!([{ "type": "one", "long": "x".repeat(300 << 10) }]);
    record(list(config)).add(&house.runner).unwrap();
}

#[test]
fn a_long_configuration_and_much_talk_arrive() {
    let house = House::new();
    house.plugin(
        "one",
        &format!("head -c 500000 /dev/zero | tr '\\0' x >&2\n{ANSWER}"),
    );
    let long = "x".repeat(900 << 10);
    record(list(json!([{ "type": "one", "long": long }])))
        .add(&house.runner)
        .unwrap();
    assert_eq!(house.input("one", "ADD")["long"], json!(long));
}

#[test]
fn answers_that_are_none() {
    for (script, error) in [
        ("", "its result is not valid: it is empty"),
        ("echo hello", "its result is not valid: no JSON: "),
        (
            "echo '{\"ips\": [{}]}'",
            "its result is not valid: ips: no address",
        ),
        (
            "echo '{\"cniVersion\": \"0.2.0\", \"ip4\": {}}'",
            "its result is not valid: cniVersion \"0.2.0\" is not supported",
        ),
        ("exit 4", "exit status: 4"),
        (
            "echo a >&2; printf 'b\\033[31m\\nc\\nd\\n' >&2; exit 1",
            "exit status: 1: b [31m; c; d",
        ),
        ("echo plain words; exit 1", "exit status: 1: plain words"),
        (
            "echo '{\"code\": 7}'; exit 1",
            "exit status: 1: {\"code\": 7}",
        ),
        ("kill -SEGV $$", "signal: 11"),
        (
            "exec cat /dev/zero",
            "it wrote too much output and was killed",
        ),
    ] {
        let house = House::new();
        house.plugin(
            "one",
            &format!("[ $CNI_COMMAND = ADD ] || exit 0\n{script}"),
        );
        let found = record(list(json!([{ "type": "one" }])))
            .add(&house.runner)
            .unwrap_err()
            .to_string();
        let expected = format!("network \"x\": plugin one failed: {error}");
        assert!(found.starts_with(&expected), "{script}: {found}");
        assert_eq!(house.calls(), ["ADD one", "DEL one"], "{script}");
    }
}

#[test]
fn a_missing_plugin_shows_before_anything_is_done() {
    let mut house = House::new();
    house.plugin("one", ANSWER);
    house.runner.directories.push("/nowhere".into());
    let error = record(list(json!([{ "type": "one" }, { "type": "two" }])))
        .add(&house.runner)
        .unwrap_err();
    let expected = format!(
        "network \"x\": plugin two not found in {}, /nowhere",
        house.directory.path().display()
    );
    assert_eq!(error.to_string(), expected);
    assert_eq!(
        error.hint(),
        Some("apt-get install containernetworking-plugins")
    );
    assert!(house.calls().is_empty());
}

#[test]
fn a_file_that_is_no_program() {
    let house = House::new();
    fs::write(house.path("one"), "").unwrap();
    let error = record(list(json!([{ "type": "one" }])))
        .add(&house.runner)
        .unwrap_err()
        .to_string();
    assert!(
        error.starts_with("network \"x\": plugin one failed: Permission denied"),
        "{error}"
    );
}

#[test]
fn a_lock_is_held_as_long_as_something_runs_that_a_plugin_has_started() {
    let mut house = House::new();
    house.plugin("one", &format!("(sleep 0.5) >/dev/null 2>&1 &\n{ANSWER}"));
    let open = || std::os::fd::OwnedFd::from(fs::File::open(house.directory.path()).unwrap());
    let held = open();
    flock(&held, FlockOperation::NonBlockingLockExclusive).unwrap();
    let other = open();
    house.runner.held = Some(Arc::new(held));
    let mut record = record(list(json!([{ "type": "one" }])));
    assert!(!record.attached);
    record.add(&house.runner).unwrap();
    assert!(record.attached);
    house.runner.held = None;
    flock(&other, FlockOperation::NonBlockingLockExclusive).unwrap_err();
    flock(&other, FlockOperation::LockExclusive).unwrap();
}
