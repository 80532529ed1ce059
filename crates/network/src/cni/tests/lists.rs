//! Finding and reading lists.

use super::*;

fn write(directory: &Path, files: &[(&str, &str)]) {
    for (name, text) in files {
        fs::write(directory.join(name), text).unwrap();
    }
}

#[test]
fn networks_are_found_in_the_order_of_their_files() {
    let (first, second) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    write(
        first.path(),
        &[
            (
                "20-b.conflist",
                r#"{"cniVersion": "0.4.0", "name": "b", "plugins": [{"type": "t2"}]}"#,
            ),
            (
                "10-a.conf",
                r#"{"cniVersion": "0.3.1", "name": "a", "type": "t1", "mtu": 9}"#,
            ),
            (
                "30-b.json",
                r#"{"cniVersion": "1.0.0", "name": "b", "type": "other"}"#,
            ),
            ("05-broken.conflist", "{"),
            (
                "40-c.txt",
                r#"{"cniVersion": "1.0.0", "name": "c", "type": "t"}"#,
            ),
        ],
    );
    write(
        second.path(),
        &[(
            "00.json",
            r#"{"cniVersion": "1.1.0", "name": "d", "plugins": [{"type": "t4"}]}"#,
        )],
    );
    let missing = first.path().join("missing");
    let directories = [first.path(), &missing, second.path()];
    assert_eq!(List::names(&directories).unwrap(), ["a", "b", "d"]);

    let a = List::load(&directories, "a").unwrap();
    assert_eq!(
        (a.name(), a.version.name(), a.plugins.len()),
        ("a", "0.3.1", 1)
    );
    assert_eq!(
        a.plugins[0].config["mtu"], 9,
        "what hull does not know is kept"
    );
    assert_eq!(List::load(&directories, "b").unwrap().plugins[0].kind, "t2");
    assert_eq!(List::load(&directories, "d").unwrap().plugins[0].kind, "t4");

    let error = List::load(&directories, "c").unwrap_err().to_string();
    assert!(
        error.starts_with(r#"network "c" not found: CNI has "a", "b", "d"; "#),
        "{error}"
    );
    assert!(
        error.contains("05-broken.conflist: no JSON: EOF"),
        "{error}"
    );
    let error = List::load(&[&missing], "c").unwrap_err().to_string();
    assert_eq!(error, r#"network "c" not found: CNI has no other"#);
}

#[test]
fn further_plugins_are_in_a_directory_of_the_networks_name() {
    let directory = tempfile::tempdir().unwrap();
    fs::create_dir(directory.path().join("x")).unwrap();
    write(
        directory.path(),
        &[
            (
                "x.conflist",
                r#"{"cniVersion": "1.1.0", "name": "x", "plugins": [{"type": "t1"}]}"#,
            ),
            (
                "y.conflist",
                r#"{"cniVersion": "1.1.0", "name": "y", "loadOnlyInlinedPlugins": true}"#,
            ),
            ("x/2.conf", r#"{"type": "t3"}"#),
            ("x/1.conf", r#"{"type": "t2"}"#),
        ],
    );
    let kinds = |list: List| {
        list.plugins
            .into_iter()
            .map(|plugin| plugin.kind)
            .collect::<Vec<_>>()
    };
    assert_eq!(
        kinds(List::load(&[directory.path()], "x").unwrap()),
        ["t1", "t2", "t3"]
    );
    let error = List::load(&[directory.path()], "y")
        .unwrap_err()
        .to_string();
    assert!(error.ends_with("y.conflist: it has no plugins"), "{error}");
}

#[test]
fn mistakes_are_named_with_their_place() {
    for (value, why) in [
        (json!([]), "without a name: it is no JSON object"),
        (
            json!({ "cniVersion": "1.0.0" }),
            "without a name: it has no name",
        ),
        (json!({ "name": 3 }), "without a name: its name is 3"),
        (
            json!({ "name": "a/b", "type": "t" }),
            r#""a/b": the name "a/b" is not made of"#,
        ),
        (
            json!({ "name": "x", "type": "t" }),
            r#""x": it has no cniVersion"#,
        ),
        (
            json!({ "name": "x", "cniVersion": "0.2.0", "type": "t" }),
            r#"cniVersion "0.2.0" is not supported: 0.3.1, 0.4.0, 1.0.0, 1.1.0"#,
        ),
        (
            json!({ "name": "x", "cniVersion": 1, "type": "t" }),
            "its cniVersion is 1",
        ),
        (
            json!({ "name": "x", "cniVersion": "1.0.0" }),
            "it has no plugins",
        ),
        (
            json!({ "name": "x", "cniVersion": "1.0.0", "plugins": [] }),
            "it has no plugins",
        ),
        (
            json!({ "name": "x", "cniVersion": "1.0.0", "plugins": {} }),
            "plugins is no list",
        ),
        (
            json!({ "name": "x", "cniVersion": "1.0.0", "plugins": [{ "type": "a" }, {}] }),
            "plugin 2: it has no type",
        ),
        (
            json!({ "name": "x", "cniVersion": "1.0.0", "plugins": [{ "type": "../a" }] }),
            r#"plugin 1: its type "../a" is no plain file name"#,
        ),
        (
            json!({ "name": "x", "cniVersion": "1.0.0", "plugins": [{ "type": ".." }] }),
            "no plain file name",
        ),
        (
            json!({ "name": "x", "cniVersion": "1.0.0", "plugins": [7] }),
            "plugin 1: it is no JSON object",
        ),
        (
            json!({ "name": "x", "cniVersion": "1.0.0", "type": "t", "capabilities": ["ips"] }),
            "its capabilities are not",
        ),
        (
            json!({ "name": "x", "cniVersion": "1.0.0", "type": "t", "disableCheck": 1 }),
            "disableCheck is 1",
        ),
    ] {
        let error = List::from_value(value.clone()).unwrap_err().to_string();
        assert!(
            error.starts_with("invalid network configuration ") && error.contains(why),
            "{value}: {error}"
        );
    }
}

#[test]
fn the_newest_version_that_both_know() {
    let version = |value: Value| {
        let mut all = json!({ "name": "x", "type": "t" });
        all.as_object_mut()
            .unwrap()
            .append(&mut value.as_object().unwrap().clone());
        List::from_value(all)
            .map(|list| list.version.name())
            .map_err(|error| error.to_string())
    };
    assert_eq!(
        version(json!({ "cniVersions": ["0.4.0", "1.0.0", "9.0.0"] })).unwrap(),
        "1.0.0"
    );
    assert_eq!(
        version(json!({ "cniVersion": "1.1.0", "cniVersions": ["0.4.0"] })).unwrap(),
        "1.1.0"
    );
    assert!(version(json!({ "cniVersions": ["9.0.0"] })).is_err());
}

#[test]
fn hulls_own_network() {
    let v4 = DEFAULT_IPV4.parse().unwrap();
    let v6 = Some(DEFAULT_IPV6.parse().unwrap());
    let network = BridgeNetwork {
        name: DEFAULT_NAME,
        bridge: DEFAULT_BRIDGE,
        ipv4: v4,
        ipv6: v6,
        gateways: &[],
        ranges: &[],
        internal: false,
        data_dir: Path::new("/var/lib/hull/networks"),
        published: true,
    };
    let list = bridge_network(&network).unwrap();
    assert_eq!(list.name(), "default");
    for capability in ["portMappings", "ips", "mac"] {
        assert!(list.has_capability(capability), "{capability}");
    }
    let config: Value = list.clone().into();
    assert_eq!(
        config["plugins"][0]["ipam"],
        json!({
            "type": "host-local",
            "dataDir": "/var/lib/hull/networks",
            "ranges": [[{ "subnet": "10.87.0.0/16" }], [{ "subnet": "fd68:756c:6c00::/64" }]],
            "routes": [{ "dst": "0.0.0.0/0" }, { "dst": "::/0" }],
        })
    );
    assert_eq!(
        List::from_value(config).unwrap(),
        list,
        "as JSON it is a list like any other"
    );

    for (internal, routes) in [(false, json!([{ "dst": "0.0.0.0/0" }])), (true, json!([]))] {
        let list = bridge_network(&BridgeNetwork {
            ipv6: None,
            internal,
            ..network
        });
        assert_eq!(list.unwrap().plugins[0].config["ipam"]["routes"], routes);
    }
    for (v4, v6, bridge) in [
        ("10.0.0.0", None, "hull0"),
        ("10.0.0.0/31", None, "hull0"),
        ("fd00::/64", None, "hull0"),
        ("10.0.0.0/8", Some("10.0.0.0/8"), "hull0"),
        ("10.0.0.0/8", Some("fd00::/127"), "hull0"),
        ("10.0.0.0/8", None, "a-name-that-is-too-long"),
    ] {
        let wrong = BridgeNetwork {
            bridge,
            ipv4: v4.parse().unwrap(),
            ipv6: v6.map(|text: &str| text.parse().unwrap()),
            ..network
        };
        assert!(bridge_network(&wrong).is_err(), "{wrong:?}");
    }
}

#[test]
fn gateways_and_ranges_are_parts_of_their_subnets() {
    let network = |gateway: &str, range: &str| {
        let gateways: Vec<_> = gateway
            .split_whitespace()
            .map(|ip| ip.parse().unwrap())
            .collect();
        let ranges: Vec<Address> = range
            .split_whitespace()
            .map(|ip| ip.parse().unwrap())
            .collect();
        bridge_network(&BridgeNetwork {
            name: "net",
            bridge: "hull0",
            ipv4: "10.0.5.0/24".parse().unwrap(),
            ipv6: Some("fd00::/64".parse().unwrap()),
            gateways: &gateways,
            ranges: &ranges,
            internal: false,
            data_dir: Path::new("/leases"),
            published: false,
        })
    };
    let mut list = network("10.0.5.254", "10.0.5.0/25 fd00::f0/124").unwrap();
    assert_eq!(
        list.plugins[0].config["ipam"]["ranges"],
        json!([
            [{
                "subnet": "10.0.5.0/24", "gateway": "10.0.5.254",
                "rangeStart": "10.0.5.1", "rangeEnd": "10.0.5.127",
            }],
            [{ "subnet": "fd00::/64", "rangeStart": "fd00::f0", "rangeEnd": "fd00::ff" }],
        ])
    );
    list.admit_addresses(&["10.0.5.200".parse().unwrap()]);
    assert_eq!(
        list.plugins[0].config["ipam"]["ranges"],
        json!([
            [{ "subnet": "10.0.5.0/24", "gateway": "10.0.5.254" }],
            [{ "subnet": "fd00::/64", "rangeStart": "fd00::f0", "rangeEnd": "fd00::ff" }],
        ])
    );
    for (gateway, range) in [
        ("10.0.6.1", ""),
        ("10.0.5.0", ""),
        ("10.0.5.255", ""),
        ("", "10.0.6.0/25"),
        ("", "10.0.0.0/16"),
        ("", "10.0.5.0/32"),
        ("", "10.0.5.255/32"),
        ("", "10.0.5.0/31"),
        ("10.0.5.9", "10.0.5.9/32"),
    ] {
        assert!(network(gateway, range).is_err(), "{gateway} {range}");
    }
}
