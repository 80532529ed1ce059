//! The book in `docs/` is correct: its commands work, and the page of the configuration is hull's
//! output.

use std::fs;
use std::path::Path;
use std::time::Duration;

use hull_tests::{Invocation, busybox_archive, executable, repository};

/// Starts a block whose lines with `$ ` are commands.
const FENCE: &str = "```console";

/// The commands of a page, in their order.
fn commands(page: &str) -> Vec<String> {
    let text = fs::read_to_string(repository().join("docs").join(page)).unwrap();
    let mut lines = text.lines();
    let mut commands = Vec::new();
    while lines.by_ref().any(|line| line == FENCE) {
        let block = lines.by_ref().take_while(|line| *line != "```");
        for line in block {
            if let Some(command) = line.strip_prefix("$ ") {
                commands.push(command.to_owned());
            } else if let Some(rest) = line.strip_prefix("> ") {
                let last: &mut String = commands.last_mut().expect("a command goes on");
                last.push('\n');
                last.push_str(rest);
            }
        }
    }
    commands
}

/// Runs the commands of a page, each of which must succeed, with directories, networks and
/// processes of their own.
fn works(page: &str) {
    let directory = tempfile::Builder::new()
        .prefix("h")
        .rand_bytes(5)
        .tempdir_in("/tmp")
        .unwrap();
    let file = |name: &str| directory.path().join(name);
    let configuration = format!(
        "machine = \"uml\"\nrun_dir = {:?}\ndata_dir = {:?}\n",
        file("run"),
        file("data")
    );
    fs::write(file("config.toml"), configuration).unwrap();
    let mut script = "ip link set lo up
        mkdir -p /var/lib/cni; mount -t tmpfs tmpfs /var/lib/cni
        hull image import --change 'CMD [\"sh\"]' \"$1\" busybox >/dev/null
        cd /tmp\n"
        .to_owned();
    for command in commands(page) {
        let quoted = command.replace('\'', r"'\''");
        script.push_str(&format!("printf '$ %s\\n' '{quoted}'\n{command}\n"));
    }
    let programs = executable();
    let programs = programs.parent().unwrap().display().to_string();
    let output = Invocation::new("unshare")
        .args([
            "--mount",
            "--pid",
            "--fork",
            "--kill-child",
            "--mount-proc",
            "--net",
        ])
        .args([
            "--propagation",
            "private",
            "bash",
            "-euo",
            "pipefail",
            "-c",
            &script,
            "book",
        ])
        .arg(busybox_archive())
        .env("HULL_CONFIG", file("config.toml"))
        .env(
            "PATH",
            format!("{programs}:{}", std::env::var("PATH").unwrap()),
        )
        .limit(Duration::from_secs(100))
        .run();
    println!("{}\n{}", output.text(), output.error());
    output.ok();
}

macro_rules! pages {
    ($($name:ident)+) => {
        mod commands_work {
            $(#[test] fn $name() { super::works(concat!(stringify!($name), ".md")); })+
        }

        /// The pages with commands.
        const PAGES: &[&str] = &[$(concat!(stringify!($name), ".md")),+];
    };
}

pages! {
    containerd engines formats install networking resources run
    security storage troubleshooting
}

#[test]
fn each_page_with_commands_is_tried() {
    for entry in fs::read_dir(repository().join("docs")).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        let has_commands = name.ends_with(".md") && !commands(&name).is_empty();
        assert_eq!(has_commands, PAGES.contains(&name.as_str()), "{name}");
    }
}

#[test]
fn the_page_of_the_configuration_is_what_hull_prints() {
    let printed = Invocation::new(executable())
        .args(["config", "--default"])
        .run()
        .ok();
    let expected = Invocation::new(repository().join("scripts/configuration-page"))
        .input(printed.stdout)
        .run()
        .ok();
    let page = fs::read_to_string(repository().join("docs/configuration.md")).unwrap();
    assert!(
        page.into_bytes() == expected.stdout,
        "docs/configuration.md: hull config --default | scripts/configuration-page >docs/configuration.md"
    );
}

#[test]
fn links_between_pages_lead_somewhere() {
    let docs = repository().join("docs");
    let mut pages = vec![];
    for directory in [repository(), &docs] {
        let entries = fs::read_dir(directory)
            .unwrap()
            .map(|entry| entry.unwrap().path());
        pages.extend(
            entries.filter(|path| path.extension().is_some_and(|extension| extension == "md")),
        );
    }
    for page in pages {
        let text = fs::read_to_string(&page).unwrap();
        for link in text.split("](").skip(1) {
            let target = link.split(')').next().unwrap();
            let file = target.split('#').next().unwrap();
            if target.contains("://") || file.is_empty() {
                continue;
            }
            let path = page.parent().unwrap_or(Path::new("/")).join(file);
            assert!(path.exists(), "{}: {target} leads nowhere", page.display());
        }
    }
}
