//! The packages of `make dist`.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use hull_tests::{Invocation, busybox_archive, executable, guest_files, repository};

/// The packages of the release that hull's package depends on, as apt has them.
const DEPENDENCIES: [&str; 4] = [
    "libc6",
    "libgcc-s1",
    "containernetworking-plugins",
    "iptables",
];

/// The Debian package in `directory`.
fn package(directory: &Path) -> PathBuf {
    let entries = fs::read_dir(directory);
    let entries =
        entries.unwrap_or_else(|error| panic!("{}: {error}: make dist", directory.display()));
    entries
        .map(|entry| entry.unwrap().path())
        .find(|path| path.extension().is_some_and(|extension| extension == "deb"))
        .expect("a package: make dist")
}

#[test]
fn a_debian_without_a_compiler_runs_a_container_from_the_package_and_removes_it_again() {
    let root = Invocation::new(repository().join("scripts/debian-root"))
        .arg("bookworm")
        .args(DEPENDENCIES)
        // A minute when it is not cached; more on a busy machine.
        .limit(Duration::from_secs(1000))
        .run()
        .ok()
        .text();
    let directory = tempfile::tempdir().unwrap();
    let script = r#"
        root=$1 here=$2 package=$3 image=$4
        # All of it goes with this process: mounts, processes, interfaces.
        mount -t tmpfs tmpfs "$here"
        mkdir "$here/upper" "$here/work" "$here/root"
        mount -t overlay -o "lowerdir=$root,upperdir=$here/upper,workdir=$here/work" overlay "$here/root"
        cd "$here/root"
        mount -t proc proc proc
        mount --rbind /sys sys
        mount --rbind /dev dev
        # The files of a container cannot be on an overlay.
        for place in run tmp var/lib/hull; do mkdir -p $place; mount -t tmpfs tmpfs $place; done
        cp "$package" tmp/hull.deb
        cp "$image" tmp/busybox.tar
        ip link set lo up
        exec env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root DEBIAN_FRONTEND=noninteractive \
          chroot . sh -euc '
            for program in cc gcc cargo make; do
              if command -v $program; then echo "there is a compiler"; exit 1; fi
            done
            begin=$(date +%s)
            apt-get install -q -y --no-install-recommends /tmp/hull.deb >/tmp/log 2>&1 || { cat /tmp/log; exit 1; }
            hull image import /tmp/busybox.tar busybox >/dev/null
            echo "kernel: $(hull run --rm --machine uml busybox uname -r)"
            echo "address: $(hull run --rm --machine uml busybox ip -o -4 addr show dev eth0 | wc -l)"
            echo "seconds: $(($(date +%s) - begin))"
            hull-oci --version | head -n 1
            ls /usr/share/man/man1/hull-run.1.gz /usr/share/bash-completion/completions/hull
            zcat /usr/share/doc/hull/changelog.gz | head -n 1
            dpkg -L hull >/tmp/files
            dpkg --verify hull
            apt-get purge -q -y hull >/tmp/log 2>&1 || { cat /tmp/log; exit 1; }
            # Directories of others stay.
            while read -r file; do [ -d "$file" ] || [ ! -e "$file" ] || echo "left: $file"; done </tmp/files
            find / -xdev -name "*hull*" ! -path "/var/log/*" ! -path /var/lib/hull | sed "s/^/left: /"
            grep -s hull /proc/[0-9]*/comm | sed "s/^/runs: /"
          '
    "#;
    let output = Invocation::new("unshare")
        .args([
            "--mount",
            "--pid",
            "--fork",
            "--kill-child",
            "--net",
            "--ipc",
            "--uts",
        ])
        .args([
            "--propagation",
            "private",
            "bash",
            "-euc",
            script,
            "package",
        ])
        .args([
            Path::new(&root),
            directory.path(),
            &package(&repository().join("target/dist")),
        ])
        .arg(busybox_archive())
        .limit(Duration::from_secs(100))
        .run()
        .ok();
    let text = output.text();
    let value = |key: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(key));
        line.unwrap_or_else(|| panic!("no {key:?}: {text}\n{}", output.error()))
            .trim()
    };
    assert!(value("kernel:").ends_with("-hull"), "{text}");
    assert_eq!(value("address:"), "1", "{text}");
    let seconds: u64 = value("seconds:").parse().unwrap();
    assert!(
        seconds < 60,
        "a minute is enough from the package to a container: {text}"
    );
    assert!(text.contains("\nhull-oci"), "{text}");
    assert!(
        text.contains("/hull-run.1.gz") && text.contains("# Changelog"),
        "{text}"
    );
    assert!(
        !text.contains("left: ") && !text.contains("runs: "),
        "{text}"
    );
}

#[test]
fn packages_made_twice_have_the_same_bytes() {
    let directory = tempfile::tempdir().unwrap();
    let sums = ["022", "077"].map(|umask| {
        let output = directory.path().join(umask);
        let zone = if umask == "022" { "UTC" } else { "Asia/Tokyo" };
        Invocation::new("bash")
            .args([
                "-euc",
                "umask $1; exec scripts/dist --compress none \"$2\"",
                "dist",
                umask,
            ])
            .arg(&output)
            .env("TZ", zone)
            .with(|command| {
                command.current_dir(repository());
            })
            .limit(Duration::from_secs(300))
            .run()
            .ok();
        // Without a fixed time, files would get the current one.
        std::thread::sleep(Duration::from_millis(1100));
        fs::read_to_string(output.join("SHA256SUMS")).unwrap()
    });
    assert_eq!(sums[0], sums[1]);
    assert_eq!(sums[0].lines().count(), 2, "{}", sums[0]);
}

#[test]
fn executables_name_no_place_of_the_machine_that_built_them() {
    let home = std::env::var("HOME").unwrap();
    let places = [format!("{home}/.cargo"), repository().display().to_string()];
    for path in [
        executable(),
        guest_files().join("initramfs"),
        guest_files().join("kernel-um"),
    ] {
        let bytes = fs::read(&path).unwrap();
        for place in &places {
            let found = bytes
                .windows(place.len())
                .any(|window| window == place.as_bytes());
            assert!(!found, "{} contains {place}", path.display());
        }
    }
}
