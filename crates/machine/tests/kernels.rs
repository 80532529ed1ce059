//! Guest kernels in the jail, with an initramfs of one small program, assembled here. Needs root
//! and a kernel in the cache of guest/kernel/build; a test that cannot run here prints the reason.

#![allow(clippy::unwrap_used)]

mod common;
#[path = "../../jail/tests/jail/program.rs"]
mod program;

use std::io::{BufRead, BufReader};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use hull_machine::probe::State;
use hull_machine::{
    ConsoleRing, Exit, Host, Kind, Machine, MachineConfig, Process, Requirements, Wiring,
};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use common::{Archive, kernel, no_devices};
use program::{EXIT, PAUSE, executable};

/// reboot(2) with a command.
fn reboot(command: u32) -> Vec<u8> {
    let mut code = vec![0xbf];
    code.extend(0xfee1_dead_u32.to_le_bytes()); // mov edi
    code.push(0xbe);
    code.extend(0x2812_1969_u32.to_le_bytes()); // mov esi
    code.push(0xba);
    code.extend(command.to_le_bytes()); // mov edx
    code.extend([0xb8, 169, 0, 0, 0, 0x0f, 0x05]); // mov eax; syscall
    code
}

const POWER_OFF: u32 = 0x4321_fedc;
const RESTART: u32 = 0x0123_4567;
struct Running {
    machine: Box<dyn Machine>,
    console: ConsoleRing,
    _directory: tempfile::TempDir,
    _control: Option<OwnedFd>,
}

fn start(kind: Kind, kernel: PathBuf, code: &[u8]) -> Result<Running, hull_machine::Error> {
    start_with(kind, kernel, code, 96 << 20, 1)
}

/// With memory in bytes, and a number of processors.
fn start_with(
    kind: Kind,
    kernel: PathBuf,
    code: &[u8],
    memory: u64,
    vcpus: u32,
) -> Result<Running, hull_machine::Error> {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    std::fs::write(
        path("initramfs"),
        Archive::default()
            .add("init", 0o100_755, &executable(code))
            .finish(),
    )
    .unwrap();
    let (console, write) = ConsoleRing::create(&path("console")).unwrap();
    let config = MachineConfig {
        kernel,
        initramfs: path("initramfs"),
        memory,
        vcpus,
        hardware: false,
        isolate_branches: false,
    };
    let (devices, control) = no_devices(kind);
    let wiring = Wiring {
        console: write,
        devices,
        uid: 60_000,
    };
    let machine = kind.backend().start(&config, wiring)?;
    Ok(Running {
        machine,
        console,
        _directory: directory,
        _control: control,
    })
}

impl Running {
    fn process(&self) -> &Process {
        &self.machine.processes()[0]
    }

    /// Waits for the end and says why.
    fn end(&mut self, timeout: Duration) -> Exit {
        let start = Instant::now();
        while self.console.drain().unwrap() {
            assert!(
                start.elapsed() < timeout,
                "still running: {:#?}",
                self.console.tail(50)
            );
            let time = Timespec {
                tv_sec: 1,
                tv_nsec: 0,
            };
            poll(
                &mut [PollFd::from_borrowed_fd(self.console.fd(), PollFlags::IN)],
                Some(&time),
            )
            .unwrap();
        }
        assert!(ends_within(self.process().pidfd.as_fd(), 5));
        self.machine.exit().unwrap()
    }

    /// The processes that the kernel started for its guest's.
    fn children(&self) -> Vec<i32> {
        let path = format!("/proc/{0}/task/{0}/children", self.process().pid);
        let children = std::fs::read_to_string(path).unwrap_or_default();
        children
            .split_whitespace()
            .map(|pid| pid.parse().unwrap())
            .collect()
    }

    /// Waits until the guest's first program runs.
    fn booted(&mut self) -> i32 {
        let start = Instant::now();
        loop {
            if let [child] = self.children().as_slice() {
                let name =
                    std::fs::read_to_string(format!("/proc/{child}/comm")).unwrap_or_default();
                if name.trim() == "uml-userspace" {
                    return *child;
                }
            }
            assert!(
                start.elapsed() < Duration::from_secs(20),
                "{:#?}",
                self.console.tail(50)
            );
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

fn gone(pid: i32) -> bool {
    let start = Instant::now();
    while std::path::Path::new(&format!("/proc/{pid}")).exists() {
        if start.elapsed() > Duration::from_secs(2) {
            return false;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    true
}

const END_TIMEOUT: Duration = Duration::from_secs(20);

#[test]
fn a_user_mode_kernel_boots_and_powers_off() {
    let Some(kernel) = kernel(Kind::Uml) else {
        return;
    };
    let mut running = start(Kind::Uml, kernel, &reboot(POWER_OFF)).unwrap();
    assert_eq!(
        running.end(END_TIMEOUT),
        Exit::PoweredOff,
        "{:#?}",
        running.console.tail(50)
    );
}

#[test]
fn a_panic_ends_a_user_mode_kernel() {
    let Some(kernel) = kernel(Kind::Uml) else {
        return;
    };
    let mut running = start(Kind::Uml, kernel, &EXIT).unwrap();
    let exit = running.end(END_TIMEOUT);
    assert_eq!(exit, Exit::Panicked);
    assert_eq!(
        exit.describe(&running.console.tail(50)),
        "guest kernel panic: Attempted to kill init! exitcode=0x00000000"
    );
}

#[test]
fn killing_a_user_mode_kernel_ends_everything() {
    let Some(kernel) = kernel(Kind::Uml) else {
        return;
    };
    let mut running = start(Kind::Uml, kernel, &PAUSE).unwrap();
    let child = running.booted();
    // Long enough to have been idle.
    std::thread::sleep(Duration::from_millis(300));
    assert!(
        !ends_within(running.process().pidfd.as_fd(), 0),
        "{:#?}",
        running.console.tail(50)
    );
    let signal = rustix::process::Signal::KILL;
    rustix::process::pidfd_send_signal(&running.process().pidfd, signal).unwrap();
    assert_eq!(
        running.end(END_TIMEOUT).to_string(),
        "the machine process was killed by SIGKILL"
    );
    assert!(gone(child));
}

/// The parent that [`a_user_mode_kernel_dies_with_the_parent`] kills: boots a guest and prints the
/// pids.
#[test]
#[ignore = "run by another test"]
fn parent_of_a_user_mode_kernel() {
    let mut running = start(Kind::Uml, kernel(Kind::Uml).unwrap(), &PAUSE).unwrap();
    let child = running.booted();
    println!("\npids {} {child}", running.process().pid);
    std::thread::sleep(Duration::from_secs(30));
}

#[test]
fn a_user_mode_kernel_dies_with_the_parent() {
    if kernel(Kind::Uml).is_none() {
        return;
    }
    let mut parent = Command::new("/proc/self/exe")
        .args([
            "--exact",
            "parent_of_a_user_mode_kernel",
            "--ignored",
            "--nocapture",
        ])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let output = BufReader::new(parent.stdout.take().unwrap());
    let line = output
        .lines()
        .map(Result::unwrap)
        .find_map(|line| line.strip_prefix("pids ").map(str::to_owned))
        .unwrap();
    parent.kill().unwrap();
    parent.wait().unwrap();
    for pid in line.split_whitespace() {
        assert!(gone(pid.parse().unwrap()), "{pid} survived");
    }
    assert_eq!(line.split_whitespace().count(), 2);
}

#[test]
fn a_file_that_is_no_kernel_is_refused() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped: needs root");
        return;
    }
    let missing = start(Kind::Uml, "/no/kernel".into(), &PAUSE).err().unwrap();
    let expect = "cannot use the guest kernel /no/kernel: No such file or directory (os error 2)";
    assert_eq!(missing.to_string(), expect);
    let text = executable_file(b"hello");
    let wrong = start(Kind::Uml, text.to_path_buf(), &PAUSE).err().unwrap();
    assert_eq!(
        wrong.to_string(),
        "cannot start the guest kernel: executing it: Exec format error (os error 8)"
    );
}

#[test]
fn the_probe_tries_the_kernel_in_a_jail() {
    let Some(kernel) = kernel(Kind::Uml) else {
        return;
    };
    let data = tempfile::tempdir().unwrap();
    let probe = |kernel: PathBuf| {
        let requirements = Requirements {
            hardware_isolation: false,
            host: Host {
                uml_kernel: Some(kernel),
                native_kernel: None,
                data_directory: data.path().to_owned(),
            },
        };
        hull_machine::probe(&requirements).uml
    };
    match probe(kernel) {
        State::Works { how } => assert!(how.starts_with("Linux "), "{how}"),
        State::Missing { why, .. } => panic!("{why}"),
    }
    let other = executable_file(&executable(&EXIT));
    match probe(other.to_path_buf()) {
        State::Missing { why, .. } => assert!(why.ends_with(" is not a user-mode kernel"), "{why}"),
        State::Works { how } => panic!("{how}"),
    }
}

fn boots_and_restarts(kind: Kind) {
    let Some(kernel) = kernel(kind) else {
        return;
    };
    let mut running = start(kind, kernel, &reboot(RESTART)).unwrap();
    assert_eq!(
        running.end(END_TIMEOUT * 3),
        Exit::PoweredOff,
        "{:#?}",
        running.console.tail(50)
    );
}

fn a_panic_ends(kind: Kind) {
    let Some(kernel) = kernel(kind) else {
        return;
    };
    let mut running = start(kind, kernel, &EXIT).unwrap();
    let exit = running.end(END_TIMEOUT * 3);
    assert_eq!(
        exit.describe(&running.console.tail(50)),
        "guest kernel panic: Attempted to kill init! exitcode=0x00000000"
    );
}

#[test]
fn qemu_boots_and_restarts() {
    boots_and_restarts(Kind::Qemu);
}

#[test]
fn a_panic_ends_qemu() {
    a_panic_ends(Kind::Qemu);
}

#[test]
fn kvm_boots_and_ends() {
    boots_and_restarts(Kind::Kvm);
    let Some(kernel) = kernel(Kind::Kvm) else {
        return;
    };
    // Without ACPI there is no power to switch off: the kernel stands still then.
    let running = start(Kind::Kvm, kernel, &reboot(POWER_OFF)).unwrap();
    assert!(!ends_within(running.process().pidfd.as_fd(), 5));
}

#[test]
fn kvm_boots_with_little_and_much_memory_and_many_processors() {
    let Some(kernel) = kernel(Kind::Kvm) else {
        return;
    };
    // The devices are in the middle of the memory of a large one.
    for (memory, vcpus) in [(64 << 20, 1), (256 << 20, 4), (256 << 20, 9), (5 << 30, 2)] {
        let code = reboot(RESTART);
        let mut running = start_with(Kind::Kvm, kernel.clone(), &code, memory, vcpus).unwrap();
        let exit = running.end(END_TIMEOUT * 3);
        let console = running.console.tail(50);
        assert_eq!(exit, Exit::PoweredOff, "{memory} {vcpus} {console:#?}");
    }
}

#[test]
fn a_panic_ends_kvm() {
    a_panic_ends(Kind::Kvm);
}

#[test]
fn hundred_machines_of_kind_kvm_boot_in_a_row() {
    let Some(kernel) = kernel(Kind::Kvm) else {
        return;
    };
    for round in 0..100 {
        let mut running = start(Kind::Kvm, kernel.clone(), &reboot(RESTART)).unwrap();
        let exit = running.end(END_TIMEOUT * 3);
        assert_eq!(
            exit,
            Exit::PoweredOff,
            "{round} {:#?}",
            running.console.tail(50)
        );
    }
}

fn ends_within(pidfd: BorrowedFd<'_>, seconds: i64) -> bool {
    let time = Timespec {
        tv_sec: seconds,
        tv_nsec: 0,
    };
    let mut events = [PollFd::from_borrowed_fd(pidfd, PollFlags::IN)];
    poll(&mut events, Some(&time)).unwrap() == 1
}

/// A file that may be executed.
fn executable_file(content: &[u8]) -> tempfile::TempPath {
    use std::os::unix::fs::PermissionsExt;
    let path = tempfile::NamedTempFile::new().unwrap().into_temp_path();
    std::fs::write(&path, content).unwrap();
    std::fs::set_permissions(&path, PermissionsExt::from_mode(0o755)).unwrap();
    path
}
