//! Guest kernels in the jail, with an initramfs of one tiny program, assembled here.

use std::fmt::Write;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use hull_machine::exit::{self, Exit};
use hull_machine::probe::State;
use hull_machine::{Choice, ConsoleRing, Kind, MachineSpec, Requirements, Started};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::Outcome;

/// The newest guest kernel in the build's cache.
fn kernel(kind: Kind) -> Result<PathBuf, &'static str> {
    let cache = std::env::var_os("HULL_CACHE")
        .map(PathBuf::from)
        .or_else(|| std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache/hull")));
    let prefix = format!("{}-", kind.kernel_architecture());
    let directories = std::fs::read_dir(cache.ok_or("no cache directory")?.join("kernel"));
    directories
        .map_err(|_| "no guest kernel has been built")?
        .filter_map(|entry| entry.ok())
        .filter(|entry| entry.file_name().to_string_lossy().starts_with(&prefix))
        .map(|entry| entry.path().join("kernel"))
        .filter(|path| path.is_file())
        .max_by_key(|path| path.metadata().and_then(|found| found.modified()).ok())
        .ok_or("no guest kernel has been built")
}

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
/// exit(2), by which PID 1 makes a kernel panic: xor edi, edi; mov eax, 60; syscall
pub const EXIT: [u8; 9] = [0x31, 0xff, 0xb8, 60, 0, 0, 0, 0x0f, 0x05];
/// pause(2) for ever: mov eax, 34; syscall; jmp back
pub const PAUSE: [u8; 9] = [0xb8, 34, 0, 0, 0, 0x0f, 0x05, 0xeb, 0xf7];

/// A static executable of `code`.
pub fn executable(code: &[u8]) -> Vec<u8> {
    const BASE: u64 = 0x40_0000;
    const HEADERS: u64 = 64 + 56;
    let mut elf = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    for half in [2u16, 62] {
        elf.extend(half.to_le_bytes());
    }
    elf.extend(1u32.to_le_bytes());
    for word in [BASE + HEADERS, 64, 0] {
        elf.extend(word.to_le_bytes());
    }
    elf.extend(0u32.to_le_bytes());
    for half in [64u16, 56, 1, 0, 0, 0] {
        elf.extend(half.to_le_bytes());
    }
    // One segment: everything, readable and executable.
    elf.extend(1u32.to_le_bytes());
    elf.extend(5u32.to_le_bytes());
    let size = HEADERS + code.len() as u64;
    for word in [0, BASE, BASE, size, size, 0x1000] {
        elf.extend(word.to_le_bytes());
    }
    elf.extend(code);
    elf
}

/// An archive with `/init`.
fn initramfs(code: &[u8]) -> Vec<u8> {
    let mut archive = Vec::new();
    for (name, mode, data) in [
        ("init", 0o100_755u32, executable(code)),
        ("TRAILER!!!", 0, Vec::new()),
    ] {
        let mut header = String::from("070701");
        for field in [
            1,
            mode,
            0,
            0,
            1,
            0,
            data.len() as u32,
            0,
            0,
            0,
            0,
            name.len() as u32 + 1,
            0,
        ] {
            write!(header, "{field:08x}").unwrap();
        }
        archive.extend(header.bytes().chain(name.bytes()).chain([0]));
        archive.resize(archive.len().next_multiple_of(4), 0);
        archive.extend(data);
        archive.resize(archive.len().next_multiple_of(4), 0);
    }
    archive
}

struct Running {
    started: Started,
    console: ConsoleRing,
    _directory: tempfile::TempDir,
}

fn start(kind: Kind, kernel: PathBuf, code: &[u8]) -> Result<Running, hull_machine::Error> {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    std::fs::write(path("initramfs"), initramfs(code)).unwrap();
    std::fs::create_dir(path("sockets")).unwrap();
    let (console, write) = ConsoleRing::create(&path("console")).unwrap();
    let choice = Choice {
        kind,
        hardware: false,
        kernel: kernel.clone(),
        why: String::new(),
    };
    let spec = MachineSpec {
        kernel,
        initramfs: path("initramfs"),
        memory: 96 << 20,
        cpus: 1,
        sockets: path("sockets"),
        nets: Vec::new(),
        disks: 0,
        jail_uid: 60_000,
    };
    let started = choice.machine()?.start(&spec, write)?;
    Ok(Running {
        started,
        console,
        _directory: directory,
    })
}

impl Running {
    /// Waits for the end and says why.
    fn end(&mut self, patience: Duration) -> Exit {
        let start = Instant::now();
        while self.console.drain().unwrap() {
            assert!(
                start.elapsed() < patience,
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
        assert!(super::ends_within(self.started.pidfd.as_fd(), 5));
        let status = exit::reap(self.started.pidfd.as_fd()).unwrap().unwrap();
        Exit::interpret(status, &self.console.tail(50))
    }

    /// The processes that the kernel started for its guest's.
    fn children(&self) -> Vec<i32> {
        let path = format!("/proc/{0}/task/{0}/children", self.started.pid);
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

const PATIENCE: Duration = Duration::from_secs(20);

pub fn uml_powers_off() -> Outcome {
    let mut running = start(Kind::Uml, kernel(Kind::Uml)?, &reboot(POWER_OFF)).unwrap();
    assert_eq!(
        running.end(PATIENCE),
        Exit::PoweredOff,
        "{:#?}",
        running.console.tail(50)
    );
    Ok(())
}

pub fn uml_panics() -> Outcome {
    let mut running = start(Kind::Uml, kernel(Kind::Uml)?, &EXIT).unwrap();
    let exit = running.end(PATIENCE);
    assert_eq!(
        exit.to_string(),
        "guest kernel panic: Attempted to kill init! exitcode=0x00000000"
    );
    Ok(())
}

pub fn uml_killed() -> Outcome {
    let mut running = start(Kind::Uml, kernel(Kind::Uml)?, &PAUSE).unwrap();
    let child = running.booted();
    // Long enough to have been idle.
    std::thread::sleep(Duration::from_millis(300));
    assert!(
        !super::ends_within(running.started.pidfd.as_fd(), 0),
        "{:#?}",
        running.console.tail(50)
    );
    let signal = rustix::process::Signal::KILL;
    rustix::process::pidfd_send_signal(&running.started.pidfd, signal).unwrap();
    assert_eq!(
        running.end(PATIENCE).to_string(),
        "the machine process was killed by SIGKILL"
    );
    assert!(gone(child));
    Ok(())
}

/// As the parent that gets killed: boots a guest and prints the pids.
pub fn middle() {
    let mut running = start(Kind::Uml, kernel(Kind::Uml).unwrap(), &PAUSE).unwrap();
    let child = running.booted();
    println!("{} {child}", running.started.pid);
    std::thread::sleep(Duration::from_secs(30));
}

pub fn uml_dies_with_parent() -> Outcome {
    kernel(Kind::Uml)?;
    let mut parent = Command::new("/proc/self/exe")
        .args(["middle", "uml"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    let output = parent.stdout.take().unwrap();
    std::io::BufRead::read_line(&mut std::io::BufReader::new(output), &mut line).unwrap();
    parent.kill().unwrap();
    parent.wait().unwrap();
    for pid in line.split_whitespace() {
        assert!(gone(pid.parse().unwrap()), "{pid} survived");
    }
    assert_eq!(line.split_whitespace().count(), 2);
    Ok(())
}

pub fn no_kernel() -> Outcome {
    let missing = start(Kind::Uml, "/no/kernel".into(), &PAUSE).err().unwrap();
    let expect = "cannot use the guest kernel /no/kernel: No such file or directory (os error 2)";
    assert_eq!(missing.to_string(), expect);
    let text = super::executable_file(b"hello");
    let wrong = start(Kind::Uml, text.to_path_buf(), &PAUSE).err().unwrap();
    assert_eq!(
        wrong.to_string(),
        "cannot start the guest kernel: executing it: Exec format error (os error 8)"
    );
    Ok(())
}

pub fn probed() -> Outcome {
    let kernel = kernel(Kind::Uml)?;
    let data = tempfile::tempdir().unwrap();
    let probe = |kernel: PathBuf| {
        let requirements = Requirements {
            hardware_isolation: false,
            uml_kernel: Some(kernel),
            native_kernel: None,
            data_directory: data.path().to_owned(),
        };
        hull_machine::probe(&requirements).uml
    };
    match probe(kernel) {
        State::Works { how } => assert!(how.starts_with("Linux "), "{how}"),
        State::Missing { why, .. } => panic!("{why}"),
    }
    let other = super::executable_file(&executable(&EXIT));
    match probe(other.to_path_buf()) {
        State::Missing { why, .. } => assert!(why.ends_with(" is not a user-mode kernel"), "{why}"),
        State::Works { how } => panic!("{how}"),
    }
    Ok(())
}

fn qemu() -> Result<PathBuf, &'static str> {
    let there = Command::new("qemu-system-x86_64")
        .arg("--version")
        .stdout(Stdio::null())
        .status();
    there.map_err(|_| "qemu is not installed")?;
    kernel(Kind::Qemu)
}

pub fn qemu_restarts() -> Outcome {
    let mut running = start(Kind::Qemu, qemu()?, &reboot(RESTART)).unwrap();
    assert_eq!(
        running.end(PATIENCE * 3),
        Exit::PoweredOff,
        "{:#?}",
        running.console.tail(50)
    );
    Ok(())
}

pub fn qemu_panics() -> Outcome {
    let mut running = start(Kind::Qemu, qemu()?, &EXIT).unwrap();
    let exit = running.end(PATIENCE * 3);
    assert_eq!(
        exit.to_string(),
        "guest kernel panic: Attempted to kill init! exitcode=0x00000000"
    );
    Ok(())
}
