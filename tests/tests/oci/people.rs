//! What people see with `hull` of containers that engines run with `hull-oci`.

use hull_tests::{Invocation, Oci, executable};

#[test]
fn containers_of_engines_are_listed_inspected_measured_entered_and_followed_with_hull() {
    let oci = Oci::new();
    let hull = |arguments: &[&str]| {
        Invocation::new(executable())
            .env("HULL_CONFIG", oci.path("config.toml"))
            .args(arguments)
            .run()
    };
    let init = oci.start(&oci.bundle());
    let listed = hull(&["ps", "--json"]).ok().json();
    assert_eq!(listed.as_array().unwrap().len(), 0, "hull's own only");
    let listed = hull(&["ps", "--all-engines", "--json"]).ok().json();
    let [only] = &listed.as_array().unwrap()[..] else {
        panic!("{listed}")
    };
    assert_eq!(only["id"], init.id.as_str());
    assert_eq!(
        (&only["engine"], &only["state"]),
        (&"oci".into(), &"running".into())
    );

    let output = hull(&["exec", &init.id, "sh", "-c", "echo inside; exit 3"]).ends(3);
    assert_eq!(output.text(), "inside");
    let inspected = hull(&["inspect", &init.id]).ok().json();
    assert_eq!(inspected[0]["Hull"]["id"], init.id.as_str());
    let metrics = hull(&["stats", "--no-stream", "--json", &init.id])
        .ok()
        .json();
    assert!(metrics.to_string().contains("\"pids\""), "{metrics}");

    // Its engine decides about it.
    for verb in ["stop", "kill", "rm", "pause"] {
        hull(&[verb, &init.id])
            .fails(1, &["no such container"])
            .hint("hull-oci");
    }
    init.does("kill").ok();
    oci.oci(["delete", "--force", &init.id]).run().ok();

    let filter = format!("container={}", init.id);
    let events = hull(&[
        "events", "--since", "1h", "--until", "now", "--format", "json", "--filter", &filter,
    ])
    .ok()
    .text();
    let kinds: Vec<String> = events
        .lines()
        .map(|line| {
            let event: serde_json::Value = serde_json::from_str(line).unwrap();
            assert_eq!(event["container"], init.id.as_str());
            event["type"].as_str().unwrap().to_owned()
        })
        .collect();
    let expected = [
        "created",
        "started",
        "exec_added",
        "exec_started",
        "exited",
        "exited",
        "deleted",
    ];
    assert_eq!(kinds, expected);
    hull(&["ps", "--all-engines", "--quiet"]).ok();
}
