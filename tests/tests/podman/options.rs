//! podman with hull as its runtime: the effects of options of `podman run`.

use std::io::Write;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::time::{Duration, Instant};

use hull_tests::{LoopDevice, Podman, left_out, unix_client_program};

#[test]
fn podman_volumes_can_be_written_or_only_read() {
    let podman = Podman::new();
    let scratch = podman.scratch();
    std::fs::write(scratch.join("file"), "content\n").unwrap();
    let volume = format!("{}:/data", scratch.display());
    let script = "cat /data/file && echo new >/data/new && mkdir /data/dir";
    let output = podman.sh(&["-v", &volume], script).ok();
    assert_eq!(output.text(), "content");
    let new = std::fs::read_to_string(scratch.join("new")).unwrap();
    assert_eq!(new, "new\n");
    assert!(scratch.join("dir").is_dir());

    let volume = format!("{}:/data:ro", scratch.display());
    let output = podman.sh(&["-v", &volume], "cat /data/file; echo no >/data/no");
    assert_eq!(output.text(), "content");
    assert_ne!(output.status, 0);
    assert!(output.error().contains("ead-only"), "{}", output.error());
    assert!(!scratch.join("no").exists());
}

#[test]
fn podman_volumes_can_be_one_file() {
    let podman = Podman::new();
    let scratch = podman.scratch();
    let file = scratch.join("file");
    std::fs::write(&file, "content\n").unwrap();
    let volume = format!("{}:/etc/one", file.display());
    let output = podman.sh(&["-v", &volume], "cat /etc/one; echo more >>/etc/one");
    assert_eq!(output.ok().text(), "content");
    let content = std::fs::read_to_string(&file).unwrap();
    assert_eq!(content, "content\nmore\n");
}

#[test]
fn podman_sockets_of_the_host_lead_to_their_servers() {
    let podman = Podman::new();
    let socket = podman.scratch().join("server.sock");
    let listener = UnixListener::bind(&socket).unwrap();
    std::fs::set_permissions(&socket, PermissionsExt::from_mode(0o666)).unwrap();
    let serving = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let peer = rustix::net::sockopt::socket_peercred(&stream).unwrap();
        write!(stream, "hello {}", peer.uid.as_raw()).unwrap();
    });
    let client = format!("{}:/client:ro", unix_client_program().display());
    let socket = format!("{}:/s", socket.display());
    let options = ["--user", "1234", "-v", &client, "-v", &socket];
    let output = podman.run(&options, &["/client", "/s", "talk"]).ok();
    assert_eq!(output.text(), "hello 1234");
    serving.join().unwrap();
}

#[test]
fn podman_volumes_can_have_mapped_ids() {
    let podman = Podman::new();
    let scratch = podman.scratch();
    std::fs::write(scratch.join("file"), "").unwrap();
    let volume = format!("{}:/data:idmap", scratch.display());
    let options = ["--uidmap", "0:100000:65536", "-v", &volume];
    let output = podman.sh(&options, "stat -c %u:%g /data/file; touch /data/new; id -u");
    assert_eq!(output.ok().text(), "0:0\n0");
    let new = std::fs::metadata(scratch.join("new")).unwrap();
    assert_eq!((new.uid(), new.gid()), (0, 0));
}

#[test]
fn podman_named_volumes_outlive_their_container() {
    let podman = Podman::new();
    podman
        .sh(&["-v", "kept:/data"], "echo one >/data/file")
        .ok();
    let output = podman.sh(&["-v", "kept:/data"], "cat /data/file").ok();
    assert_eq!(output.text(), "one");
}

#[test]
fn podman_files_belong_to_whom_the_container_says() {
    let podman = Podman::new();
    let scratch = podman.scratch();
    let volume = format!("{}:/data", scratch.display());
    podman
        .sh(
            &["-v", &volume],
            "echo >/data/file; chown 1234:5678 /data/file; chmod 640 /data/file",
        )
        .ok();
    let file = std::fs::metadata(scratch.join("file")).unwrap();
    assert_eq!((file.uid(), file.gid()), (1234, 5678));
    assert_eq!(file.mode() & 0o7777, 0o640);
}

#[test]
fn podman_tmpfs_and_shm_are_as_large_as_asked_for() {
    let podman = Podman::new();
    let script = "df -k /scratch /dev/shm | sed 1d | tr -s ' ' | cut -d ' ' -f 1-2; echo >/scratch/x && echo >/dev/shm/x";
    let output = podman
        .sh(
            &["--tmpfs", "/scratch:size=16m", "--shm-size", "32m"],
            script,
        )
        .ok();
    let text = output.text();
    let sizes: Vec<&str> = text
        .lines()
        .map(|line| line.split(' ').next_back().unwrap())
        .collect();
    assert_eq!(sizes, ["16384", "32768"], "{text}");
}

#[test]
fn podman_sysctls_are_set() {
    let podman = Podman::new();
    let output = podman
        .sh(
            &["--sysctl", "kernel.msgmax=16384"],
            "cat /proc/sys/kernel/msgmax",
        )
        .ok();
    assert_eq!(output.text(), "16384");
}

#[test]
fn podman_capabilities_can_be_added_and_dropped() {
    let podman = Podman::new();
    let effective = |options: &[&str]| {
        let output = podman
            .sh(options, "sed -n 's/^CapEff:\\t//p' /proc/self/status")
            .ok();
        u64::from_str_radix(&output.text(), 16).unwrap()
    };
    let usual = effective(&[]);
    let (chown, net_admin) = (1 << 0, 1 << 12);
    assert_ne!(usual & chown, 0);
    assert_eq!(usual & net_admin, 0);
    assert_eq!(
        effective(&["--cap-add", "NET_ADMIN", "--cap-drop", "CHOWN"]),
        usual & !chown | net_admin
    );
    assert_eq!(effective(&["--cap-drop", "ALL"]), 0);
    podman
        .sh(&["--cap-drop", "CHOWN"], "chown nobody /etc/passwd")
        .ends(1);
}

#[test]
fn podman_ulimits_are_set() {
    let podman = Podman::new();
    // The last option: without a number podman asks for more than root has here.
    let options = [
        "--ulimit",
        "nofile=100:200",
        "--ulimit",
        "core=0",
        "--ulimit",
        "nproc=4096",
    ];
    let script = "ulimit -Sn; ulimit -Hn; ulimit -c; \
                  sed -n 's/^Max processes *\\([0-9]*\\) .*/\\1/p' /proc/self/limits";
    let output = podman.sh(&options, script).ok();
    assert_eq!(output.text(), "100\n200\n0\n4096");
}

#[test]
fn podman_memory_limits_bite() {
    let podman = Podman::new();
    let options = ["-m", "64m", "--memory-swap", "64m"];
    podman.sh(&options, "exec tail /dev/zero").ends(137);
    // Another container is not disturbed by its limit.
    podman.run(&options, &["true"]).ok();
}

#[test]
fn podman_pids_limits_bite() {
    let podman = Podman::new();
    let script =
        "i=0; while [ $i -lt 40 ]; do sleep 1000 & i=$((i+1)); done; echo all forty; exit 0";
    let output = podman.sh(&["--pids-limit", "20"], script);
    assert!(output.error().contains("fork"), "{}", output.error());
    assert!(!output.text().contains("forty"));
    let output = podman.sh(&["--pids-limit", "60"], script).ok();
    assert!(output.text().contains("forty"));
}

#[test]
fn podman_cpu_limits_bite() {
    let podman = Podman::new();
    // What the shell's children used: the second line of `times`, user and system time.
    let script = "timeout 4 sh -c 'while :; do :; done'; times | tail -n 1";
    let begin = Instant::now();
    let text = podman.sh(&["--cpus", "0.25"], script).ok().text();
    let took = begin.elapsed();
    let user = text.split(' ').next().unwrap();
    let (minutes, seconds) = user.trim_end_matches('s').split_once('m').unwrap();
    let used = minutes.parse::<f64>().unwrap() * 60.0 + seconds.parse::<f64>().unwrap();
    assert!(
        used < 2.0,
        "{used} seconds of 4 on a quarter of a processor ({took:?})"
    );
}

#[test]
fn podman_read_only_root_file_systems_cannot_be_written() {
    let podman = Podman::new();
    let output = podman.sh(
        &["--read-only", "--tmpfs", "/scratch"],
        "echo >/scratch/yes && echo >/etc/no",
    );
    assert_ne!(output.status, 0);
    assert!(output.error().contains("/etc/no"), "{}", output.error());
    assert!(output.error().contains("ead-only"), "{}", output.error());
}

#[test]
fn podman_user_directory_environment_and_hostname_are_as_asked_for() {
    let podman = Podman::new();
    let output = podman
        .sh(
            &[
                "--user",
                "nobody:users",
                "--workdir",
                "/var/tmp",
                "--env",
                "A=b c",
                "--hostname",
                "here",
            ],
            "echo $(id -u):$(id -g) $PWD \"$A\" $(hostname)",
        )
        .ok();
    assert_eq!(output.text(), "65534:100 /var/tmp b c here");
    let output = podman.sh(&["--user", "1234:5678"], "id -u; id -g; echo $HOME");
    assert!(output.ok().text().starts_with("1234\n5678\n"));
}

#[test]
fn podman_entry_point_groups_and_stop_signal_are_as_asked_for() {
    let podman = Podman::new();
    let output = podman.run(
        &["--entrypoint", "/bin/echo", "--env", "A=b"],
        &["an", "argument"],
    );
    assert_eq!(output.ok().text(), "an argument");
    let output = podman.sh(&["--user", "1000:1000", "--group-add", "100"], "id -G");
    assert_eq!(output.ok().text(), "1000 100");
    let script = "trap 'exit 9' USR1; echo ready; while :; do sleep 0.05; done";
    let name = podman.ready(&["--stop-signal", "USR1"], script);
    podman.does("stop", &name).ok();
    assert_eq!(podman.wait(&name), 9);
}

#[test]
fn podman_no_new_privileges_and_seccomp_profiles_hold() {
    let podman = Podman::new();
    let script = "sed -n 's/^NoNewPrivs:\\t//p;s/^Seccomp:\\t//p' /proc/self/status";
    let output = podman.sh(&["--security-opt", "no-new-privileges"], script);
    assert_eq!(output.ok().text(), "1\n2");
    let profile = podman.scratch().join("profile.json");
    let json = serde_json::json!({
        "defaultAction": "SCMP_ACT_ALLOW",
        "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 28}],
    });
    std::fs::write(&profile, json.to_string()).unwrap();
    let option = format!("seccomp={}", profile.display());
    let output = podman.sh(&["--security-opt", &option], "mkdir /tmp/no");
    assert_ne!(output.status, 0);
    let error = output.error();
    assert!(error.contains("No space left"), "28 is ENOSPC: {error}");
    let output = podman.sh(&["--security-opt", "seccomp=unconfined"], script);
    assert_eq!(output.ok().text(), "0\n0");
}

#[test]
fn podman_init_is_process_1_and_takes_orphans() {
    let podman = Podman::new();
    // An orphan that has ended is gone, not a zombie.
    let script = "echo $$; tr '\\0' ' ' </proc/1/cmdline; echo; \
                  sh -c 'sleep 0.2 & exit'; sleep 1; ps -o stat | grep -c Z";
    let output = podman.sh(&["--init"], script);
    let text = output.text();
    let lines: Vec<&str> = text.lines().collect();
    assert_ne!(lines[0], "1", "{text}");
    assert!(lines[1].contains("init"), "{text}");
    assert_eq!(lines[2], "0", "{text}");
}

#[test]
fn podman_device_fuse_is_there_when_asked_for() {
    let podman = Podman::new();
    podman.sh(&[], "test -e /dev/fuse").ends(1);
    let output = podman
        .sh(
            &["--device", "/dev/fuse"],
            "stat -c '%F %t %T' /dev/fuse; exec 3<>/dev/fuse && echo opened",
        )
        .ok();
    assert_eq!(output.text(), "character special file a e5\nopened");
}

#[test]
fn podman_usual_containers_have_the_usual_devices_only() {
    let podman = Podman::new();
    let output = podman.sh(&[], "ls /dev").ok();
    let text = output.text();
    for device in ["null", "zero", "full", "random", "urandom", "tty", "ptmx"] {
        assert!(text.lines().any(|line| line == device), "{device}: {text}");
    }
    for device in ["kvm", "mem", "kmsg", "vda", "fuse"] {
        assert!(!text.lines().any(|line| line == device), "{device}: {text}");
    }
}

#[test]
fn podman_usual_containers_cannot_look_at_what_is_masked() {
    let podman = Podman::new();
    // Which of them exist depends on the kernel.
    let script = "for file in /proc/kcore /proc/keys /proc/latency_stats /proc/timer_list /proc/sched_debug; do \
                  [ ! -e $file ] || cat $file; done; \
                  for dir in /proc/acpi /proc/scsi /sys/firmware; do [ ! -e $dir ] || ls $dir; done";
    let output = podman.sh(&[], script).ok();
    assert_eq!(output.text(), "");
    let output = podman.sh(&[], "echo 1 >/proc/sys/kernel/panic");
    assert_ne!(output.status, 0);
    assert!(output.error().contains("ead-only"), "{}", output.error());
    let script = "[ ! -e /proc/sysrq-trigger ] || ! echo h >/proc/sysrq-trigger";
    podman.sh(&[], script).ok();
}

#[test]
fn podman_privileged_sees_everything_in_the_guest_and_nothing_of_the_host() {
    let podman = Podman::new();
    let can = "mkdir -p /mnt && mount -t tmpfs none /mnt && echo mounted; \
               echo other-name >/proc/sys/kernel/hostname && hostname; \
               sed -n 's/^CapEff:\\t//p' /proc/self/status";
    let output = podman.sh(&["--privileged"], can).ok();
    let text = output.text();
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines[..2], ["mounted", "other-name"], "{text}");
    let capabilities = u64::from_str_radix(lines[2], 16).unwrap();
    assert_ne!(capabilities & 1 << 21, 0, "SYS_ADMIN: {text}");
    if !podman.runtime.is_hull() {
        return left_out("a privileged container of this runtime sees the host");
    }
    let script = "find /dev -type b -o -type c | while read -r device; do \
                  echo $device $(stat -c '%F %t:%T' $device); done";
    let text = podman.sh(&["--privileged"], script).ok().text();
    assert!(!text.contains("/dev/kvm"), "{text}");
    // No disk of the host: neither by name nor by number.
    for disk in std::fs::read_dir("/sys/class/block").unwrap().flatten() {
        let name = disk.file_name().into_string().unwrap();
        if name.starts_with("loop") || name.starts_with("ram") || name.starts_with("zram") {
            continue;
        }
        assert!(!text.contains(&format!("/dev/{name} ")), "{name}: {text}");
        let number = std::fs::read_to_string(disk.path().join("dev")).unwrap();
        let (major, minor) = number.trim().split_once(':').unwrap();
        let number = format!(
            "block special file {:x}:{:x}",
            major.parse::<u32>().unwrap(),
            minor.parse::<u32>().unwrap()
        );
        assert!(!text.lines().any(|line| line.ends_with(&number)), "{text}");
    }
    let host = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
    let output = podman.sh(&["--privileged"], "cat /proc/sys/kernel/random/boot_id");
    assert_ne!(output.ok().text(), host.trim());
    // It turns off its own only.
    let panic = || std::fs::read_to_string("/proc/sys/kernel/panic_on_oops").unwrap();
    let before = panic();
    let other = if before.trim() == "1" { "0" } else { "1" };
    podman
        .sh(
            &["--privileged"],
            &format!("echo {other} >/proc/sys/kernel/panic_on_oops"),
        )
        .ok();
    assert_eq!(panic(), before);
}

#[test]
fn podman_block_devices_can_be_written_or_only_read() {
    let Some(disk) = LoopDevice::new(&vec![b'x'; 1 << 20]) else {
        return;
    };
    let podman = Podman::new();
    let device = format!("{}:/dev/xvda", disk.path.display());
    let write = "echo written | dd of=/dev/xvda conv=fsync";
    let output = podman.sh(
        &["--device", &device],
        &format!("{write} && head -c 9 /dev/xvda"),
    );
    assert_eq!(output.ok().text(), "written\nx");
    let bytes = std::fs::read(disk.file()).unwrap();
    assert!(bytes.starts_with(b"written\nxxx"));

    let output = podman.sh(&["--device", &format!("{device}:r")], "head -c 7 /dev/xvda");
    assert_eq!(output.ok().text(), "written");
    let output = podman.sh(&["--device", &format!("{device}:r")], "echo no >/dev/xvda");
    assert_ne!(output.status, 0);
    assert!(
        output.error().contains("not permitted"),
        "{}",
        output.error()
    );
}

#[test]
fn podman_start_takes_no_longer_than_a_user_waits() {
    let podman = Podman::new();
    let took = podman.run(&[], &["true"]).ok().took;
    assert!(took < Duration::from_secs(10), "{took:?}");
}

#[test]
fn podman_tmpfs_can_be_used_by_the_containers_user() {
    let podman = Podman::new();
    let options = ["--user", "1000", "--tmpfs", "/new"];
    podman.sh(&options, "touch /new/x").ok();
    let options = ["--mount", "type=tmpfs,dst=/new,tmpfs-mode=700"];
    let output = podman.sh(&options, "stat -c %a /new").ok();
    assert_eq!(output.text(), "700");
}

#[test]
fn podman_cp_to_a_tmpfs_fails_and_to_the_root_works() {
    let podman = Podman::new();
    let file = podman.scratch().join("file");
    std::fs::write(&file, "content\n").unwrap();
    let name = podman.sleeper(&["--tmpfs", "/tmp"]);
    let copy = |to: &str| {
        let target = format!("{name}:{to}");
        podman.podman(["cp", file.to_str().unwrap(), &target]).run()
    };
    let output = copy("/tmp/file");
    assert_ne!(output.status, 0);
    assert!(output.error().contains("read-only"), "{}", output.error());
    copy("/root/file").ok();
    assert_eq!(
        podman.exec(&name, &["cat", "/root/file"]).ok().text(),
        "content"
    );
}

#[test]
fn podman_overlay_volumes_and_images_are_mounted() {
    let podman = Podman::new();
    let scratch = podman.scratch();
    std::fs::write(scratch.join("file"), "content\n").unwrap();
    let volume = format!("{}:/data:O", scratch.display());
    let script = "cat /data/file; echo new >/data/file; cat /data/file";
    let output = podman.sh(&["-v", &volume], script).ok();
    assert_eq!(output.text(), "content\nnew");
    let left = std::fs::read_to_string(scratch.join("file")).unwrap();
    assert_eq!(left, "content\n");
    let mount = "type=image,source=busybox,destination=/image";
    podman
        .sh(
            &["--mount", mount],
            "test -x /image/bin/sh && ! touch /image/x",
        )
        .ok();
}

#[test]
fn podman_users_can_be_mapped_in_a_cgroup_namespace() {
    let podman = Podman::new();
    let options = ["--uidmap", "0:100000:65536", "--cgroupns=private"];
    let output = podman.sh(&options, "id -u; cat /proc/self/cgroup").ok();
    assert_eq!(output.text(), "0\n0::/");
}
