//! ARCHITECTURE.md's list of dependencies equals that of the manifests.

use std::collections::BTreeMap;

use hull_tests::{Invocation, repository};

/// Start of the block with a line for each crate: `name → name, name`.
const FENCE: &str = "```dependencies\n";

/// The crates below `crates/`, each with its dependencies, without the prefix `hull-`.
fn in_manifests() -> BTreeMap<String, Vec<String>> {
    let metadata = Invocation::new("cargo")
        .args(["metadata", "--no-deps", "--offline", "--format-version=1"])
        .with(|command| {
            command.current_dir(repository());
        })
        .run()
        .ok()
        .json();
    let crates = repository().join("crates");
    let packages = metadata["packages"].as_array().unwrap().iter();
    let packages = packages.filter(|package| {
        let manifest = package["manifest_path"].as_str().unwrap();
        manifest.starts_with(crates.to_str().unwrap())
    });
    let name = |value: &serde_json::Value| value["name"].as_str().unwrap().to_owned();
    packages
        .map(|package| {
            let dependencies = package["dependencies"].as_array().unwrap().iter();
            let mut dependencies: Vec<_> = dependencies
                .filter(|dependency| dependency["kind"].is_null())
                .filter_map(|dependency| Some(name(dependency).strip_prefix("hull-")?.to_owned()))
                .collect();
            dependencies.sort();
            let name = name(package);
            let name = name.strip_prefix("hull-").unwrap_or(&name).to_owned();
            (name, dependencies)
        })
        .collect()
}

fn shown(dependencies: &BTreeMap<String, Vec<String>>) -> String {
    let line = |(name, others): (&String, &Vec<String>)| format!("{name} → {}", others.join(", "));
    let lines = dependencies
        .iter()
        .map(|entry| line(entry).trim_end().to_owned() + "\n");
    lines.collect()
}

#[test]
fn the_picture_of_dependencies_is_the_manifests() {
    let page = std::fs::read_to_string(repository().join("ARCHITECTURE.md")).unwrap();
    let block = page
        .split_once(FENCE)
        .and_then(|(_, rest)| rest.split_once("```"));
    let (block, _) = block.expect("ARCHITECTURE.md has a block of dependencies");
    let expected = shown(&in_manifests());
    assert_eq!(block, expected, "ARCHITECTURE.md must say:\n{expected}");
}

#[test]
fn guest_code_depends_on_no_crate_of_the_host() {
    let dependencies = in_manifests();
    let mut reached = vec!["agent".to_owned()];
    let mut next = 0;
    while let Some(name) = reached.get(next).cloned() {
        next += 1;
        for other in &dependencies[&name] {
            if !reached.contains(other) {
                reached.push(other.clone());
            }
        }
    }
    let guests = ["agent", "agent-spec", "archive", "protocol"];
    for name in &reached {
        assert!(
            guests.contains(&name.as_str()),
            "the agent depends on {name}"
        );
    }
}
