//! `hull check`, `hull kernel`, `hull config`, `hull version`, help, manual pages and completions.

use std::fs;

use hull_tests::{Hull, Invocation, Options, executable};

#[test]
fn check_succeeds_where_run_works_and_says_which_machine_auto_picks() {
    let hull = Hull::new();
    let text = hull.hull(["check"]).run().ok().text();
    for part in ["kvm", "uml", "kernel", "privileges"] {
        assert!(text.to_lowercase().contains(part), "no {part}: {text}");
    }
    let checked = hull.hull(["check", "--json"]).run().ok().json();
    assert_eq!(checked["ready"], true, "{checked}");
}

#[test]
fn check_says_what_of_the_host_machines_get() {
    let info = fs::read_to_string("/proc/meminfo").unwrap();
    let total: u64 = info.split_whitespace().nth(1).unwrap().parse().unwrap();
    let hull = Hull::with(Options {
        configuration: format!("memory = \"{}g\"", (total >> 20) + 2),
        without_image: true,
        ..Options::default()
    });
    let text = hull.hull(["check"]).run().ok().text();
    assert!(
        text.contains("GiB for a machine, more than the host's"),
        "{text}"
    );
    let of_uml = "1 for a machine of kind uml, of the host's";
    let alone = std::thread::available_parallelism().unwrap().get() == 1;
    assert_eq!(text.contains(of_uml), !alone, "{text}");
    let deep = hull.path(&"d".repeat(100));
    let configuration = hull.path("deep.toml");
    fs::write(&configuration, format!("run_dir = {deep:?}\n")).unwrap();
    let check = hull.hull(["check"]).env("HULL_CONFIG", &configuration);
    let text = check.run().ends(1).text();
    assert_eq!(text.matches("run directory").count(), 1, "{text}");
    assert!(text.contains("too long for the sockets"), "{text}");
}

#[test]
fn check_measures_what_a_pod_costs_beside_its_containers() {
    let hull = Hull::new();
    let text = hull.hull(["check", "--overhead"]).run().ok().text();
    assert!(text.contains("  podFixed:\n    memory: "), "{text}");
    let measured = hull
        .hull(["check", "--overhead", "--json"])
        .run()
        .ok()
        .json();
    let memory = measured["memory"].as_u64().unwrap();
    // What is reserved is more than what an idle guest takes.
    assert!((64 << 20..256 << 20).contains(&memory), "{measured}");
    let machine = measured["idle"]["machine"].as_u64().unwrap();
    assert!((1 << 20..memory).contains(&machine), "{measured}");
    hull.assert_clean();
}

#[test]
fn check_fails_where_run_cannot_work_and_names_the_remedy() {
    let guest = tempfile::tempdir().unwrap();
    let hull = Hull::with(Options {
        configuration: format!("guest_dir = {:?}", guest.path()),
        without_image: true,
        ..Options::default()
    });
    let output = hull.hull(["check"]).run().ends(1);
    assert!(output.text().contains("make "), "{}", output.text());
    let checked = hull.hull(["check", "--json"]).run().ends(1).json();
    assert_eq!(checked["ready"], false, "{checked}");
}

#[test]
fn check_starts_a_machine_and_says_why_it_does_not_come_up() {
    let hull = Hull::new();
    let text = hull.hull(["check"]).run().ok().text();
    assert!(text.contains("a uml machine is up in "), "{text}");
    hull.assert_clean();

    // All files are there, and the guest has nothing to execute.
    let guest = tempfile::tempdir().unwrap();
    for file in ["kernel-um", "kernel-um.json"] {
        let own = hull_tests::guest_files().join(file);
        std::os::unix::fs::symlink(own, guest.path().join(file)).unwrap();
    }
    fs::write(guest.path().join("initramfs"), "").unwrap();
    let hull = Hull::with(Options {
        configuration: format!("guest_dir = {:?}", guest.path()),
        without_image: true,
        ..Options::default()
    });
    let text = hull.hull(["check"]).run().ends(1).text();
    assert!(text.contains("ERROR start"), "{text}");
    assert!(text.contains("guest"), "{text}");
    hull.assert_clean();
}

#[test]
fn auto_picks_a_machine_that_works() {
    let hull = Hull::new();
    let output = hull.run(&["--machine", "auto"], &["uname", "-s"]).ok();
    assert_eq!(output.text(), "Linux");
}

#[test]
fn kernel_info_shows_version_size_and_configuration() {
    let hull = Hull::empty();
    let text = hull.hull(["kernel", "info"]).run().ok().text();
    for part in ["version", "size", "config"] {
        assert!(text.contains(part), "no {part}: {text}");
    }
    let list = hull
        .hull(["kernel", "info", "--machine", "uml", "--json"])
        .run()
        .ok()
        .json();
    assert!(
        list[0]["version"].as_str().unwrap().ends_with("-hull"),
        "{list}"
    );
    assert!(list[0]["size"].as_u64().unwrap() > 1 << 20, "{list}");
}

#[test]
fn config_shows_every_value_and_where_it_comes_from() {
    let hull = Hull::with(Options {
        configuration: "cpus = 2".into(),
        without_image: true,
        ..Options::default()
    });
    let text = hull.hull(["config"]).run().ok().text();
    let line = |key: &str| {
        text.lines()
            .find(|line| line.starts_with(key))
            .unwrap_or_else(|| panic!("no {key}: {text}"))
    };
    assert!(line("cpus = 2").contains("config.toml:4"), "{text}");
    assert!(line("pull = \"missing\"").ends_with("# default"), "{text}");
    // The output, and the default file, are configuration files themselves.
    for arguments in [&["config"][..], &["config", "--default"]] {
        let file = hull.path("again.toml");
        fs::write(&file, hull.hull(arguments).run().ok().stdout).unwrap();
        hull.hull(["config"]).env("HULL_CONFIG", &file).run().ok();
    }
}

#[test]
fn version_and_help_are_short_and_there() {
    let hull = Hull::empty();
    assert!(
        hull.hull(["version"])
            .run()
            .ok()
            .text()
            .contains(env!("CARGO_PKG_VERSION"))
    );
    assert!(
        hull.hull(["--version"])
            .run()
            .ok()
            .text()
            .contains(env!("CARGO_PKG_VERSION"))
    );
    let help = hull.hull(["--help"]).run().ok().text();
    for command in [
        "run", "exec", "ps", "logs", "attach", "wait", "stop", "kill", "pause", "rm", "inspect",
        "stats", "top", "cp", "image", "check", "kernel",
    ] {
        assert!(
            help.lines()
                .any(|line| line.trim_start().starts_with(command)),
            "{command}: {help}"
        );
        hull.hull([command, "--help"]).run().ok();
    }
    assert!(!help.contains("sandbox-process"), "{help}");
}

#[test]
fn manual_pages_and_completions_are_made() {
    let hull = Hull::empty();
    let pages = hull.path("man");
    hull.hull(["man"]).arg(&pages).run().ok();
    assert!(pages.join("hull.1").exists() && pages.join("hull-run.1").exists());
    for shell in ["bash", "zsh", "fish"] {
        let script = hull.hull(["completions", shell]).run().ok();
        assert!(script.text().contains("hull"), "{shell}");
    }
    let script = hull.path("completion.bash");
    fs::write(
        &script,
        hull.hull(["completions", "bash"]).run().ok().stdout,
    )
    .unwrap();
    Invocation::new("bash").arg("-n").arg(&script).run().ok();
}

#[test]
fn the_shell_completes_names_of_what_there_is() {
    let hull = Hull::new();
    let (up, down) = ("completed-up".to_owned(), "completed-down".to_owned());
    hull.hull([
        "run",
        "-d",
        "--network",
        "none",
        "--name",
        &up,
        "busybox",
        "sleep",
        "1000",
    ])
    .run()
    .ok();
    hull.hull([
        "run",
        "--network",
        "none",
        "--name",
        &down,
        "busybox",
        "true",
    ])
    .run()
    .ok();
    let completed = |words: &str| {
        let script = format!(
            "source <(hull completions bash)
             COMP_WORDS=({words}) COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)) COMP_TYPE=9
             _clap_complete_hull hull \"${{COMP_WORDS[COMP_CWORD]}}\"
             printf '%s\n' \"${{COMPREPLY[@]}}\""
        );
        let directory = executable().parent().unwrap().display().to_string();
        let output = Invocation::new("bash")
            .args(["-c", &script])
            .env("PATH", format!("{directory}:/usr/bin:/bin"))
            .env("HULL_CONFIG", hull.path("config.toml"))
            .run()
            .ok();
        let lines = output.text();
        lines
            .lines()
            .map(|line| line.trim().to_owned())
            .collect::<Vec<_>>()
    };
    assert_eq!(completed("hull exec ''"), [up.as_str()]);
    let all = completed("hull rm ''");
    assert!(all.contains(&up) && all.contains(&down), "{all:?}");
    assert_eq!(completed("hull run --rm bus"), ["busybox"]);
    assert!(completed("hull cp ''").contains(&format!("{down}:")));
    assert_eq!(completed("hull run --mach"), ["--machine"]);
    assert!(completed("hull ps --filter ''").contains(&"status=running".to_owned()));
    assert!(completed("hull kill --signal T").contains(&"TERM".to_owned()));
    assert_eq!(completed("hull image r"), ["rm"]);
    hull.hull(["volume", "create", "some-data"]).run().ok();
    assert_eq!(completed("hull volume rm ''"), ["some-data"]);
    assert_eq!(completed("hull run --network d"), ["default"]);
    assert!(completed("hull network inspect ''").contains(&"none".to_owned()));
}

#[test]
fn a_reader_that_goes_away_is_no_error() {
    let hull = Hull::empty();
    let script = format!("{} --help | head -n 1", executable().display());
    let output = Invocation::new("sh")
        .args(["-c", &script])
        .env("HULL_CONFIG", hull.path("config.toml"))
        .run()
        .ok();
    assert_eq!(output.error(), "");
}

#[test]
fn an_installation_is_complete_works_where_it_is_and_can_be_removed() {
    use std::os::unix::fs::MetadataExt;
    let hull = Hull::new();
    let root = hull.path("installed");
    let install = hull_tests::repository().join("scripts/install");
    Invocation::new(&install)
        .arg(&root)
        .args(["/usr", "/etc"])
        .run()
        .ok();
    let inode = |name: &str| fs::metadata(root.join("usr/bin").join(name)).unwrap().ino();
    assert_eq!(inode("hull"), inode("hull-oci"));
    assert_eq!(inode("hull"), inode("containerd-shim-hull-v2"));
    for file in [
        "etc/hull/config.toml.example",
        "usr/share/hull/initramfs",
        "usr/share/man/man1/hull-run.1",
        "usr/share/bash-completion/completions/hull",
        "usr/share/zsh/site-functions/_hull",
        "usr/share/fish/vendor_completions.d/hull.fish",
    ] {
        assert!(root.join(file).exists(), "{file}");
    }
    let output = Invocation::new(root.join("usr/bin/hull"))
        .args(["run", "--rm", "busybox", "echo", "works"])
        .env("HULL_CONFIG", hull.path("config.toml"))
        .run()
        .ok();
    assert_eq!(output.text(), "works");
    fs::write(root.join("etc/hull/config.toml"), "").unwrap();
    Invocation::new(&install)
        .arg("--remove")
        .arg(&root)
        .args(["/usr", "/etc"])
        .run()
        .ok();
    let left = Invocation::new("find")
        .arg(&root)
        .args(["-type", "f"])
        .run()
        .ok()
        .text();
    assert_eq!(
        left,
        root.join("etc/hull/config.toml").to_str().unwrap(),
        "only the user's own"
    );
}
