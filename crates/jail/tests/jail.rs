//! The jail from inside and outside, and guest kernels in it. Needs root; what cannot run here says
//! why.
//!
//! Not a libtest binary: it executes itself as the jailed process, which must have one thread.

#![allow(clippy::unwrap_used, unsafe_code)]

#[path = "jail/attack.rs"]
mod attack;
#[path = "jail/inside.rs"]
mod inside;
#[path = "jail/program.rs"]
mod program;

use std::ffi::OsString;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd};
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use hull_jail::{
    self as jail, Bind, CapabilitySet, Confinement, JailSpec, Limits, Role, Root, Source, Started,
    Status, Tmp,
};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// Passed, or the reason why it could not run.
type Outcome = Result<(), &'static str>;

type Test = (&'static str, fn() -> Outcome);

const TESTS: &[Test] = &[
    (
        "nothing_of_the_host_is_reachable",
        nothing_of_the_host_is_reachable,
    ),
    (
        "the_device_process_keeps_its_capabilities_only",
        device_process_keeps_its_capabilities,
    ),
    (
        "dangerous_calls_kill_and_unknown_ones_fail",
        dangerous_calls_kill,
    ),
    (
        "landlock_stops_what_a_leaked_descriptor_reaches",
        landlock_stops_leaks,
    ),
    ("jailed_processes_die_with_the_parent", die_with_the_parent),
    (
        "failures_name_the_step_and_leave_no_process",
        failures_are_named,
    ),
    ("foreign_executables_run_confined", foreign_executables),
    ("descriptors_arrive_at_their_numbers", descriptors_arrive),
    ("the_jail_is_set_up_in_time", set_up_in_time),
    ("a_thread_is_confined_further", a_thread_is_confined),
    (
        "nothing_that_an_attacker_in_the_monitor_tries_succeeds",
        attacks_fail,
    ),
    (
        "landlock_keeps_to_the_directories_named",
        landlock_keeps_to_the_directories_named,
    ),
    (
        "a_socket_is_mounted_by_its_descriptor",
        sockets_are_mounted_by_descriptor,
    ),
];

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if let [role, question, rest @ ..] = arguments.as_slice() {
        match role.as_str() {
            "inside" => return inside::answer(question, rest),
            "middle" => return middle(question),
            _ => {}
        }
    }
    let has = |flag: &str| arguments.iter().any(|argument| argument == flag);
    if has("--list") {
        // As libtest prints it; none of the tests is to be ignored.
        for (name, _) in TESTS.iter().filter(|_| !has("--ignored")) {
            println!("{name}: test");
        }
        return ExitCode::SUCCESS;
    }
    let filter = arguments.iter().find(|argument| !argument.starts_with('-'));
    if !rustix::process::geteuid().is_root() {
        println!("jail tests skipped: they need root");
        return ExitCode::SUCCESS;
    }
    let mut failed = 0;
    for (name, test) in TESTS {
        let matches = |filter: &String| match has("--exact") {
            true => name == filter,
            false => name.contains(filter.as_str()),
        };
        if !filter.is_none_or(matches) {
            continue;
        }
        match std::panic::catch_unwind(test) {
            Ok(Ok(())) => println!("test {name} ... ok"),
            Ok(Err(why)) => println!("test {name} ... skipped: {why}"),
            Err(_) => {
                println!("test {name} ... FAILED");
                failed += 1;
            }
        }
    }
    if failed == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

/// Starts this executable in fresh namespaces; there it enters the jail that `question` is about
/// and answers on standard output.
fn start_inside(
    question: &str,
    arguments: &[&str],
    extra: &[(BorrowedFd<'_>, i32)],
) -> (Started, OwnedFd) {
    let executable = open("/proc/self/exe");
    let (read, write) = rustix::pipe::pipe().unwrap();
    let mut argv: Vec<OsString> = vec!["jail".into(), "inside".into(), question.into()];
    argv.extend(arguments.iter().map(OsString::from));
    let error = std::io::stderr();
    let mut fds = vec![(write.as_fd(), 1), (error.as_fd(), 2)];
    fds.extend(extra);
    let started = jail::spawn(JailSpec {
        name: "a test",
        executable: executable.as_fd(),
        argv,
        env: vec![("RUST_BACKTRACE".into(), "0".into())],
        fds,
        fixed_addresses: false,
        confinement: None,
    })
    .unwrap();
    (started, read)
}

fn ask(question: &str, arguments: &[&str], extra: &[(BorrowedFd<'_>, i32)]) -> (String, Status) {
    let (started, read) = start_inside(question, arguments, extra);
    let mut answer = String::new();
    std::fs::File::from(read)
        .read_to_string(&mut answer)
        .unwrap();
    (answer, ended(&started, 5))
}

fn open(path: &str) -> OwnedFd {
    let flags = rustix::fs::OFlags::PATH | rustix::fs::OFlags::CLOEXEC;
    rustix::fs::open(path, flags, rustix::fs::Mode::empty()).unwrap()
}

/// Waits for a child to end.
fn ended(started: &Started, seconds: i64) -> Status {
    assert!(
        ends_within(started.pidfd.as_fd(), seconds),
        "{} is still running",
        started.pid
    );
    Status::reap(started.pidfd.as_fd()).unwrap().unwrap()
}

fn ends_within(pidfd: BorrowedFd<'_>, seconds: i64) -> bool {
    let time = Timespec {
        tv_sec: seconds,
        tv_nsec: 0,
    };
    poll(
        &mut [PollFd::from_borrowed_fd(pidfd, PollFlags::IN)],
        Some(&time),
    )
    .unwrap()
        == 1
}

fn nothing_of_the_host_is_reachable() -> Outcome {
    let (answer, status) = ask("look", &[], &[]);
    assert_eq!(status, Status::Code(0), "{answer}");
    let expect = [
        "root: proc tmp",
        "etc: No such file or directory (os error 2)",
        "write: Read-only file system (os error 30)",
        "tmp: written",
        "processes: 1",
        "proc: no meminfo",
        "interfaces: lo",
        "CapEff: 0000000000000000",
        "CapPrm: 0000000000000000",
        "CapBnd: 0000000000000000",
        "CapInh: 0000000000000000",
        "CapAmb: 0000000000000000",
        "NoNewPrivs: 1",
        "Seccomp: 2",
        "Groups:",
        "Uid: 60000 60000 60000 60000",
        "host: hull",
        "descriptors: 0 1 2",
        "NSsid: 1",
        "core: 1",
    ];
    for line in expect {
        assert!(
            answer.lines().any(|found| found == line),
            "no \"{line}\" in:\n{answer}"
        );
    }
    Ok(())
}

fn device_process_keeps_its_capabilities() -> Outcome {
    let (answer, status) = ask("device", &[], &[]);
    assert_eq!(status, Status::Code(0), "{answer}");
    let kept = jail::FS_DEVICE_CAPABILITIES.bits();
    for line in [
        format!("CapEff: {kept:016x}"),
        format!("CapPrm: {kept:016x}"),
        format!("CapBnd: {kept:016x}"),
        "CapInh: 0000000000000000".into(),
        "root: proc".into(),
        "reopened through /proc/self/fd: yes".into(),
        "threads: yes".into(),
    ] {
        assert!(
            answer.lines().any(|found| found == line),
            "no \"{line}\" in:\n{answer}"
        );
    }
    Ok(())
}

fn dangerous_calls_kill() -> Outcome {
    for call in ["mount", "unshare", "ptrace", "execve", "bpf", "setns"] {
        let (answer, status) = ask("call", &[call], &[]);
        assert_eq!(status, Status::Signal(libc::SIGSYS), "{call}: {answer}");
    }
    for call in ["inet-socket", "clone-newuser", "clone3", "io_uring", "x32"] {
        let (answer, status) = ask("call", &[call], &[]);
        assert_eq!(
            (answer.trim(), status),
            ("errno 38", Status::Code(0)),
            "{call}"
        );
    }
    Ok(())
}

fn attacks_fail() -> Outcome {
    let place = tempfile::tempdir().unwrap();
    std::fs::write(place.path().join("x"), "").unwrap();
    let shared = rustix::mount::open_tree(
        rustix::fs::CWD,
        place.path(),
        rustix::mount::OpenTreeFlags::OPEN_TREE_CLONE
            | rustix::mount::OpenTreeFlags::OPEN_TREE_CLOEXEC,
    )
    .unwrap();
    assert!(attack::ATTEMPTS.len() >= 40);
    for (name, _) in attack::ATTEMPTS {
        let (answer, status) = ask("attack", &[name], &[(shared.as_fd(), attack::SHARED)]);
        let failed = match status {
            Status::Signal(signal) => signal == libc::SIGSYS,
            Status::Code(code) => code == 0 && answer.starts_with("refused: "),
        };
        assert!(failed, "{name}: {answer} {status}");
    }
    Ok(())
}

fn a_thread_is_confined() -> Outcome {
    for (role, other) in [("vcpu", "ENOSYS"), ("io", "EBADF")] {
        let (answer, status) = ask("thread", &[role, "look"], &[]);
        assert_eq!(status, Status::Code(0), "{answer}");
        for line in [
            "thread CapEff: 0000000000000000",
            "thread Seccomp_filters: 2",
            "thread open: Function not implemented (os error 38)",
            "thread memory: works",
            "process open: works",
            &format!("thread epoll_ctl: {other}"),
        ] {
            assert!(
                answer.lines().any(|found| found == line),
                "{role}: no \"{line}\" in:\n{answer}"
            );
        }
        let kept = jail::FS_DEVICE_CAPABILITIES.bits();
        assert!(answer.contains(&format!("process CapEff: {kept:016x}\n")));
        let (answer, status) = ask("thread", &[role, "mount"], &[]);
        assert_eq!(status, Status::Signal(libc::SIGSYS), "{role}: {answer}");
    }
    Ok(())
}

fn landlock_stops_leaks() -> Outcome {
    let host = open("/");
    let (answer, _) = ask("leak", &[], &[(host.as_fd(), 7)]);
    match answer.trim() {
        "Permission denied (os error 13)" => Ok(()),
        "landlock: absent" => Err("this kernel has no landlock"),
        other => panic!("a leaked directory: {other}"),
    }
}

fn landlock_keeps_to_the_directories_named() -> Outcome {
    let Some(_) = jail::landlock_version() else {
        return Err("this kernel has no landlock");
    };
    let places = [(); 3].map(|()| tempfile::tempdir().unwrap());
    for place in &places {
        std::fs::write(place.path().join("there"), "").unwrap();
    }
    let [layer, lower, host] = places
        .each_ref()
        .map(|place| detached_mount(place.path().to_str().unwrap()));
    let descriptors = [(host.as_fd(), 7), (layer.as_fd(), 8), (lower.as_fd(), 9)];
    let (answer, status) = ask("unpack", &[], &descriptors);
    assert_eq!(status, Status::Code(0), "{answer}");
    let expected = "layer: read Ok(()) write Ok(())\n\
        lower: read Ok(()) write Err(Os { code: 13, kind: PermissionDenied, message: \"Permission denied\" })\n";
    assert!(answer.starts_with(expected), "{answer}");
    let denied = answer.lines().nth(2).unwrap();
    assert_eq!(denied.matches("PermissionDenied").count(), 2, "{answer}");
    Ok(())
}

/// A mount of a directory that no namespace has.
fn detached_mount(directory: &str) -> OwnedFd {
    use rustix::mount::{OpenTreeFlags, open_tree};
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    open_tree(rustix::fs::CWD, directory, flags).unwrap()
}

fn die_with_the_parent() -> Outcome {
    for kind in ["own", "own-forking", "foreign"] {
        let mut middle = Command::new("/proc/self/exe")
            .args(["middle", kind])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(middle.stdout.take().unwrap())
            .read_line(&mut line)
            .unwrap();
        let pids: Vec<i32> = line
            .split_whitespace()
            .map(|pid| pid.parse().unwrap())
            .collect();
        assert!(!pids.is_empty(), "{kind}");
        let pidfds: Vec<OwnedFd> = pids
            .iter()
            .map(|pid| {
                let pid = rustix::process::Pid::from_raw(*pid).unwrap();
                rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()).unwrap()
            })
            .collect();
        std::thread::sleep(Duration::from_millis(50));
        for pidfd in &pidfds {
            assert!(!ends_within(pidfd.as_fd(), 0), "{kind}: ended too early");
        }
        middle.kill().unwrap();
        middle.wait().unwrap();
        for (pid, pidfd) in pids.iter().zip(&pidfds) {
            assert!(
                ends_within(pidfd.as_fd(), 2),
                "{kind}: {pid} survived its parent"
            );
        }
    }
    Ok(())
}

/// A parent to be killed: starts a jailed process, prints the pids and waits.
fn middle(kind: &str) -> ExitCode {
    let pids = match kind {
        "foreign" => {
            vec![foreign(&program::PAUSE).pid]
        }
        "own-forking" => {
            let (started, read) = start_inside("sleep", &["fork"], &[]);
            std::fs::File::from(read).read_exact(&mut [0]).unwrap();
            let children = format!("/proc/{0}/task/{0}/children", started.pid);
            let children = std::fs::read_to_string(children).unwrap();
            children
                .split_whitespace()
                .map(|pid| pid.parse().unwrap())
                .chain([started.pid])
                .collect()
        }
        _ => {
            let (started, read) = start_inside("sleep", &[], &[]);
            std::fs::File::from(read).read_exact(&mut [0]).unwrap();
            vec![started.pid]
        }
    };
    let pids: Vec<String> = pids.iter().map(ToString::to_string).collect();
    println!("{}", pids.join(" "));
    std::io::stdout().flush().unwrap();
    std::thread::sleep(Duration::from_secs(30));
    ExitCode::SUCCESS
}

/// A file that can be executed, or not.
fn executable_file(content: &[u8]) -> tempfile::TempPath {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(content).unwrap();
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    file.as_file().set_permissions(mode).unwrap();
    file.into_temp_path()
}

/// Starts a static program of a few instructions, confined as a user-mode kernel is.
fn foreign(code: &[u8]) -> Started {
    let file = executable_file(&program::executable(code));
    let executable = open(file.to_str().unwrap());
    jail::spawn(JailSpec {
        name: "a program",
        executable: executable.as_fd(),
        argv: vec!["program".into(), "argument".into()],
        env: vec![("A".into(), "b".into())],
        fds: Vec::new(),
        fixed_addresses: true,
        confinement: Some(Confinement {
            role: Role::Uml,
            uid: 60_000,
            gid: 60_001,
            capabilities: CapabilitySet::empty(),
            root: Root {
                tmp: Some(Tmp {
                    size: 1 << 20,
                    huge_pages: false,
                }),
                binds: vec![Bind {
                    source: Source::Descriptor(open("/etc")),
                    target: "/some/where/etc".into(),
                    executable: false,
                }],
                links: vec![("/lib".into(), "usr/lib".into())],
                ..Root::default()
            },
            limits: Limits {
                open_files: 64,
                processes: Some(7),
                file_size: Some(4096),
            },
            isolate_branches: true,
        }),
    })
    .unwrap()
}

fn foreign_executables() -> Outcome {
    let started = foreign(&program::PAUSE);
    let proc = |name: &str| format!("/proc/{}/{name}", started.pid);
    let read = |name: &str| std::fs::read_to_string(proc(name)).unwrap();
    let status = read("status");
    let field = |name: &str| {
        let line = status.lines().find(|line| line.starts_with(name)).unwrap();
        line.split_whitespace()
            .skip(1)
            .collect::<Vec<_>>()
            .join(" ")
    };
    assert_eq!(field("Uid:"), "60000 60000 60000 60000");
    assert_eq!(field("Gid:"), "60001 60001 60001 60001");
    assert_eq!(field("Groups:"), "");
    assert_eq!(field("NStgid:"), format!("{} 1", started.pid));
    for capabilities in ["CapInh:", "CapPrm:", "CapEff:", "CapBnd:", "CapAmb:"] {
        assert_eq!(field(capabilities), "0000000000000000");
    }
    assert_eq!(
        (field("NoNewPrivs:"), field("Seccomp:")),
        ("1".into(), "2".into())
    );
    // The kernel's words where a process may choose.
    for speculation in ["Speculation_Store_Bypass:", "SpeculationIndirectBranch:"] {
        let found = field(speculation);
        let chosen = found.starts_with("thread ") || found.starts_with("conditional ");
        assert!(!chosen || found.contains("force"), "{speculation} {found}");
    }
    assert_eq!(
        (field("SigBlk:"), field("SigIgn:")),
        ("0".repeat(16), "0".repeat(16))
    );
    assert_eq!(
        (read("cmdline"), read("environ")),
        ("program\0argument\0".into(), "A=b\0".into())
    );
    assert_eq!(read("personality").trim(), "00040000");
    let limits = read("limits");
    for (resource, limit) in [
        ("Max open files", "64"),
        ("Max processes", "7"),
        ("Max file size", "4096"),
        ("Max msgqueue size", "0"),
        ("Max core file size", "1"),
    ] {
        let line = limits.lines().find(|line| line.starts_with(resource));
        let line = line.unwrap().trim_start_matches(resource);
        let both: Vec<_> = line.split_whitespace().take(2).collect();
        assert_eq!(both, [limit, limit], "{resource}");
    }
    let mut root: Vec<_> = std::fs::read_dir(proc("root"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    root.sort();
    assert_eq!(root, ["lib", "some", "tmp"]);
    let mounts = read("mountinfo");
    for (point, options) in [
        ("/", "ro,nosuid,nodev,noexec"),
        ("/tmp", "rw,nosuid,nodev"),
        ("/some/where/etc", "ro,nosuid,nodev,noexec"),
    ] {
        let mount = mounts
            .lines()
            .find(|line| line.split(' ').nth(4) == Some(point))
            .unwrap();
        assert!(
            mount.split(' ').nth(5).unwrap().starts_with(options),
            "{mount}"
        );
    }
    assert_eq!(mounts.lines().count(), 3, "{mounts}");
    let descriptors = std::fs::read_dir(proc("fd")).unwrap().count();
    assert_eq!(descriptors, 3);
    for namespace in ["mnt", "pid", "net", "ipc", "uts"] {
        let of =
            |process: &str| std::fs::read_link(format!("/proc/{process}/ns/{namespace}")).unwrap();
        assert_ne!(of("self"), of(&started.pid.to_string()), "{namespace}");
    }
    rustix::process::pidfd_send_signal(&started.pidfd, rustix::process::Signal::KILL).unwrap();
    assert_eq!(ended(&started, 5), Status::Signal(libc::SIGKILL));
    Ok(())
}

fn descriptors_arrive() -> Outcome {
    // Sources and targets overlap on purpose.
    let (first, second) = (open("/etc"), open("/tmp"));
    let pair = [
        (second.as_fd(), 3),
        (first.as_fd(), 4),
        (second.as_fd(), 60),
    ];
    let (answer, status) = ask("descriptors", &[], &pair);
    let expect = format!(
        "3 {} 4 {} 60 {} ",
        inode("/tmp"),
        inode("/etc"),
        inode("/tmp")
    );
    assert_eq!((answer, status), (expect, Status::Code(0)));
    Ok(())
}

fn inode(path: &str) -> u64 {
    rustix::fs::stat(path).unwrap().st_ino
}

fn sockets_are_mounted_by_descriptor() -> Outcome {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
    let user = Some(60_000);
    std::os::unix::fs::chown(&path, user, user).unwrap();
    let (answer, status) = ask("connect", &[path.to_str().unwrap()], &[]);
    assert_eq!((answer.as_str(), status), ("connected", Status::Code(0)));
    let (mut connection, _) = listener.accept().unwrap();
    let mut sent = String::new();
    connection.read_to_string(&mut sent).unwrap();
    assert_eq!(sent, "hello");
    Ok(())
}

fn failures_are_named() -> Outcome {
    let executable = open("/etc/passwd");
    let spec = |confinement| JailSpec {
        name: "a test",
        executable: executable.as_fd(),
        argv: vec!["x".into()],
        env: Vec::new(),
        fds: Vec::new(),
        fixed_addresses: false,
        confinement,
    };
    let error = jail::spawn(spec(None)).unwrap_err().to_string();
    assert_eq!(
        error,
        "cannot start a test: executing it: Permission denied (os error 13)"
    );
    let missing = Bind {
        source: "/no/such".into(),
        target: "/x".into(),
        executable: false,
    };
    let confinement = |binds| Confinement {
        role: Role::Uml,
        uid: 60_000,
        gid: 60_000,
        capabilities: CapabilitySet::empty(),
        root: Root {
            binds,
            ..Root::default()
        },
        limits: Limits::open_files(64),
        isolate_branches: false,
    };
    let error = jail::spawn(spec(Some(confinement(vec![missing]))))
        .unwrap_err()
        .to_string();
    assert_eq!(
        error,
        "cannot start a test: cannot put /no/such into its jail: No such file or directory (os error 2)"
    );
    let upwards = Bind {
        source: "/etc".into(),
        target: "/a/../b".into(),
        executable: false,
    };
    assert!(jail::spawn(spec(Some(confinement(vec![upwards])))).is_err());
    let error = jail::spawn(JailSpec {
        argv: vec!["a\0b".into()],
        ..spec(None)
    })
    .unwrap_err();
    assert_eq!(
        error.to_string(),
        "cannot start a test: an argument contains a zero byte"
    );
    // Every child of the failed attempts has been collected.
    let options = rustix::process::WaitOptions::NOHANG;
    assert!(rustix::process::wait(options).is_err_and(|errno| errno == rustix::io::Errno::CHILD));
    Ok(())
}

fn set_up_in_time() -> Outcome {
    let mut times: Vec<Duration> = Vec::new();
    for _ in 0..20 {
        let start = Instant::now();
        let started = foreign(&program::EXIT);
        times.push(start.elapsed());
        assert_eq!(ended(&started, 5), Status::Code(0));
    }
    times.sort();
    println!(
        "     jail and exec: fastest {:?}, median {:?}",
        times[0], times[10]
    );
    // Far above what it takes, for machines that are busy with other things.
    assert!(times[0] < Duration::from_millis(50), "{times:?}");
    Ok(())
}

/// Takes a descriptor that was inherited.
fn inherited(fd: i32) -> OwnedFd {
    // SAFETY: the caller names a descriptor that this process was given and nothing else uses.
    unsafe { OwnedFd::from_raw_fd(fd) }
}
