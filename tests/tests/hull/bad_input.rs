//! Mistakes of users: each has its own message on one line, the right exit status, and leaves
//! nothing.

use std::fs;

use hull_tests::{Archive, Hull, Image, Invocation, Layout, Options, executable, no_kvm};

#[test]
fn commands_that_do_not_exist_or_are_not_executable_have_dockers_exit_status() {
    let hull = Hull::new();
    hull.run(&[], &["no-such-command"])
        .fails(127, &["no-such-command", "not found"]);
    hull.run(&[], &["/no/such/file"])
        .fails(127, &["/no/such/file"]);
    hull.run(&[], &["/etc/passwd"])
        .fails(126, &["/etc/passwd", "permission denied"]);
    hull.run(&[], &["/etc"]).fails(126, &["/etc"]);
    hull.assert_clean();
}

#[test]
fn bad_values_of_options_are_named() {
    let hull = Hull::new();
    for (options, part) in [
        (["-v", "rela/tive:/data"], "rela/tive"),
        (["-v", "/tmp:data"], "absolute"),
        (["-v", "/tmp:/data:rx"], "rx"),
        (
            [
                "--mount",
                "type=bind,source=/no/such/directory,target=/data",
            ],
            "/no/such/directory",
        ),
        (["--platform", "linux/s390x"], "linux/s390x"),
        (["--platform", "none/such/thing/else"], "--platform"),
        (["-m", "1m"], "1"),
        (["-m", "much"], "much"),
        (["-m", "-5"], "-5"),
        (["--cpus", "many"], "many"),
        (["-e", "=x"], "=x"),
        (["--env-file", "/no/such/file"], "/no/such/file"),
        (["-w", "relative"], "relative"),
        (["--name", "no spaces"], "no spaces"),
        (["--sysctl", "kernel.hostname"], "kernel.hostname"),
        (["--ulimit", "speed=1"], "speed"),
        (["--tmpfs", "relative"], "relative"),
        (["--shm-size", "big"], "big"),
        (["--stop-signal", "NOSUCH"], "NOSUCH"),
        (["--network", "host"], "host"),
        (["--machine", "vax"], "vax"),
        (["--pull", "sometimes"], "sometimes"),
        (["--detach-keys", "nonsense-"], "nonsense"),
        (["--kernel", "/no/such/kernel"], "/no/such/kernel"),
        (["--label", "=x"], "=x"),
    ] {
        let output = hull.run(&options, &["true"]);
        assert_eq!(output.status, 125, "{options:?}: {}", output.error());
        output.fails(125, &[part]);
    }
    hull.assert_clean();
}

#[test]
fn unknown_commands_and_options_get_the_nearest_known_one() {
    let hull = Hull::empty();
    hull.hull(["exce"]).run().fails(125, &["exce"]).hint("exec");
    hull.hull(["run", "--hostnam", "x", "busybox"])
        .run()
        .fails(125, &["--hostnam"])
        .hint("--hostname");
    hull.hull(["ps", "--al"])
        .run()
        .fails(125, &["--al"])
        .hint("--all");
    hull.hull(["run"]).run().ends(125);
    hull.hull::<&str>([]).run().ends(125);
}

#[test]
fn a_name_that_is_taken_is_told_with_its_owner() {
    let hull = Hull::new();
    let container = hull.sleeper();
    let id = container.inspect()["Hull"]["id"].as_str().unwrap()[..12].to_owned();
    hull.run(&["--name", &container.name], &["true"])
        .fails(125, &[&container.name, "in use", &id])
        .hint("hull rm");
}

#[test]
fn containers_that_do_not_exist_are_named() {
    let hull = Hull::empty();
    for verb in [
        "logs", "attach", "wait", "stop", "kill", "pause", "unpause", "rm", "top",
    ] {
        hull.hull([verb, "never-was"])
            .run()
            .fails(1, &["no such container", "never-was"]);
    }
    hull.hull(["stats", "--no-stream", "never-was"])
        .run()
        .fails(1, &["no such container"]);
    hull.hull(["cp", "never-was:/x", "/tmp/x"])
        .run()
        .fails(1, &["no such container"]);
}

#[test]
fn a_machine_that_does_not_work_or_is_not_installed_is_told() {
    let hull = Hull::new();
    if no_kvm().is_none() {
        println!("skipped for kvm: it works here");
    } else {
        let output = hull.run(&["--machine", "kvm"], &["true"]);
        output
            .fails(125, &["machine kind kvm does not work on this host: "])
            .hint("hull check");
    }
    let output = hull
        .hull(["run", "--rm", "--machine", "qemu", "busybox", "true"])
        .env("PATH", "/no/programs")
        .run();
    output
        .fails(125, &["qemu-system-", "not installed"])
        .hint("apt-get install qemu-system");
    hull.assert_clean();
}

#[test]
fn without_a_kernel_the_command_that_builds_it_is_named() {
    let guest = tempfile::tempdir().unwrap();
    let hull = Hull::with(Options {
        configuration: format!("guest_dir = {:?}", guest.path()),
        ..Options::default()
    });
    hull.run(&[], &["true"])
        .fails(125, &["kernel", guest.path().to_str().unwrap()])
        .hint("make ");
    hull.hull(["kernel", "info"])
        .run()
        .fails(125, &["kernel"])
        .hint("make ");
}

#[test]
fn a_file_that_is_no_kernel_is_told() {
    let hull = Hull::new();
    let kernel = hull.scratch().join("kernel");
    fs::write(&kernel, "not a kernel").unwrap();
    let output = hull.run(&["--kernel", kernel.to_str().unwrap()], &["true"]);
    assert_eq!(output.status, 125);
    assert!(output.error().contains("kernel"), "{}", output.error());
    hull.assert_clean();
}

#[test]
fn hardware_isolation_can_be_demanded() {
    let hull = Hull::with(Options {
        configuration: "isolation = \"hardware\"".into(),
        ..Options::default()
    });
    hull.run(&[], &["true"]).fails(125, &["isolation"]);
}

#[test]
fn an_unknown_key_of_the_configuration_gets_the_nearest_known_one() {
    let hull = Hull::with(Options {
        configuration: "memroy = \"1g\"".into(),
        without_image: true,
        ..Options::default()
    });
    hull.hull(["run", "busybox", "true"])
        .run()
        .fails(125, &["config.toml:4", "memroy"])
        .hint("memory");
    // It keeps nobody from looking at containers.
    let output = hull.hull(["ps", "-aq"]).run().ok();
    assert!(output.error().contains("memroy"), "{}", output.error());
    let hull = Hull::with(Options {
        configuration: "memory = 5".into(),
        without_image: true,
        ..Options::default()
    });
    hull.hull(["run", "busybox", "true"])
        .run()
        .fails(125, &["config.toml:4", "memory"]);
    let hull = Hull::with(Options {
        configuration: "memory = ".into(),
        without_image: true,
        ..Options::default()
    });
    hull.hull(["run", "busybox", "true"])
        .run()
        .fails(125, &["config.toml:4"]);
    hull.hull(["run", "busybox", "true"])
        .env("HULL_CONFIG", "/no/such/file")
        .run()
        .fails(125, &["/no/such/file"]);
}

#[test]
fn another_user_than_root_is_told_in_one_line() {
    let hull = Hull::empty();
    fs::set_permissions(
        hull.path(""),
        std::os::unix::fs::PermissionsExt::from_mode(0o755),
    )
    .unwrap();
    // The staged executable may be in a directory that only root enters.
    let copy = hull.path("hull");
    fs::copy(executable(), &copy).unwrap();
    Invocation::new("setpriv")
        .args(["--reuid", "65534", "--regid", "65534", "--clear-groups"])
        .arg(&copy)
        .args(["run", "busybox", "true"])
        .env("HULL_CONFIG", hull.path("config.toml"))
        .run()
        .fails(125, &["root"]);
}

#[test]
fn no_space_on_the_disk_is_told_and_leaves_nothing() {
    let hull = Hull::empty();
    let small = hull.path("small");
    fs::create_dir(&small).unwrap();
    // A namespace of its own for the mount; two megabytes do not hold the image.
    let image = Image::new(&[Archive::new().file("big", vec![7; 8 << 20]).bytes()]);
    let directory = hull.path("layout");
    Layout::write(&directory, &[("latest", &image)]);
    let configuration = hull.path("small.toml");
    let text = format!("run_dir = {:?}\ndata_dir = {:?}\n", hull.path("run"), small);
    fs::write(&configuration, text).unwrap();
    let script = "mount -t tmpfs -o size=2m tmpfs \"$1\" && exec \"$2\" image pull \"$3\"";
    Invocation::new("unshare")
        .args(["-m", "sh", "-c", script, "-"])
        .arg(&small)
        .arg(executable())
        .arg(format!("oci:{}", directory.display()))
        .env("HULL_CONFIG", &configuration)
        .run()
        .fails(125, &["no space left"]);
}

#[test]
fn a_directory_too_deep_for_sockets_is_told() {
    let hull = Hull::new();
    let deep = hull.path(&"d".repeat(100));
    let configuration = hull.path("deep.toml");
    fs::write(
        &configuration,
        format!(
            "machine = \"uml\"\nrun_dir = {deep:?}\ndata_dir = {:?}\n",
            hull.path("data")
        ),
    )
    .unwrap();
    let output = hull
        .hull(["run", "--rm", "busybox", "echo", "works"])
        .env("HULL_CONFIG", &configuration)
        .run();
    match output.status {
        0 => assert_eq!(output.text(), "works"),
        _ => drop(output.fails(125, &["run_dir"])),
    }
}

#[test]
fn a_damaged_state_file_is_named_and_rm_mends_it() {
    let hull = Hull::new();
    let container = hull.start(&[], &["true"]);
    container.wait();
    let id = container.inspect()["Hull"]["id"]
        .as_str()
        .unwrap()
        .to_owned();
    let state = hull.path("data/containers").join(&id).join("record.json");
    let whole = fs::read(&state).unwrap();
    fs::write(&state, &whole[..whole.len() / 2]).unwrap();
    let output = hull.hull(["ps", "-a"]).run().ok();
    assert!(output.error().contains("damaged"), "{}", output.error());
    hull.hull(["logs", &container.name])
        .run()
        .fails(125, &["record.json", "damaged"])
        .hint("hull rm -f");
    hull.hull(["rm", "-f", &container.name]).run().ok();
    hull.assert_clean();
}

#[test]
fn an_image_without_a_command_needs_one() {
    let hull = Hull::empty();
    let image = Image::new(&[Archive::new().file("x", "").bytes()]).with_config(|config| {
        config["config"] = serde_json::json!({});
    });
    let directory = hull.path("layout");
    Layout::write(&directory, &[("latest", &image)]);
    hull.hull(["run", "--rm", &format!("oci:{}", directory.display())])
        .run()
        .fails(125, &["no command"]);
}

#[test]
fn too_few_open_files_are_named_and_a_low_soft_limit_is_raised() {
    let hull = Hull::new();
    let run = |limit: &str| {
        let script = format!(
            "ulimit {limit}; exec {} run --rm --network none busybox echo here",
            executable().display()
        );
        Invocation::new("sh")
            .args(["-c", &script])
            .env("HULL_CONFIG", hull.path("config.toml"))
            .run()
    };
    assert_eq!(run("-S -n 64").ok().text(), "here");
    let output = run("-n 64").fails(125, &["open files are needed", "64 are allowed"]);
    assert!(output.error().contains("hint: ulimit -n"), "{output:?}");
    hull.assert_clean();
}

#[test]
fn more_processors_than_the_machine_can_have_are_noted() {
    let hull = Hull::on("uml");
    let output = hull
        .run(&["--cpus", "2", "--network", "none"], &["nproc"])
        .ok();
    assert_eq!(output.text(), "1");
    assert!(output.error().contains("note: --cpus 2"), "{output:?}");
}
