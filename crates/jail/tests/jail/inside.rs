//! The jailed side of the tests: enters a jail, looks around, reports.

use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::process::ExitCode;

use hull_jail::{
    self as jail, Bind, CapabilitySet, Confinement, Directory, FS_DEVICE_CAPABILITIES, Limits,
    Role, Root, Source, ThreadRole, Tmp, UNPACK_CAPABILITIES,
};

fn confinement(role: Role) -> Confinement {
    Confinement {
        role,
        uid: 60_000,
        gid: 60_000,
        capabilities: CapabilitySet::empty(),
        root: Root {
            proc: true,
            tmp: Some(Tmp {
                size: 1 << 20,
                huge_pages: true,
            }),
            ..Root::default()
        },
        limits: Limits::open_files(100),
        isolate_branches: false,
    }
}

/// Answers a question on standard output.
pub fn answer(question: &str, arguments: &[String]) -> ExitCode {
    match question {
        "look" => {
            // The role whose Landlock rules let it list its root directory.
            enter(&confinement(Role::Device));
            look();
        }
        "device" => {
            enter(&Confinement {
                uid: 0,
                gid: 0,
                capabilities: FS_DEVICE_CAPABILITIES,
                root: Root {
                    proc: true,
                    ..Root::default()
                },
                ..confinement(Role::Device)
            });
            list("root", "/");
            status();
            let root = std::fs::File::open("/").unwrap();
            let again = std::fs::File::open(format!("/proc/self/fd/{}", root.as_raw_fd()));
            println!(
                "reopened through /proc/self/fd: {}",
                if again.is_ok() { "yes" } else { "no" }
            );
            // What small libraries call where the C library has a newer call for it.
            let plain = rustix::fs::open("/", rustix::fs::OFlags::PATH, rustix::fs::Mode::empty());
            assert!(plain.is_ok() && rustix::fs::stat("/").is_ok());
            let threads = std::thread::spawn(|| ()).join().is_ok();
            println!("threads: {}", if threads { "yes" } else { "no" });
        }
        "thread" => {
            enter(&Confinement {
                uid: 0,
                gid: 0,
                capabilities: FS_DEVICE_CAPABILITIES,
                ..confinement(Role::Device)
            });
            let role = match arguments[0].as_str() {
                "vcpu" => ThreadRole::Vcpu,
                _ => ThreadRole::Io,
            };
            thread(role, &arguments[1]);
        }
        "attack" => {
            enter(&Confinement {
                uid: 0,
                gid: 0,
                capabilities: FS_DEVICE_CAPABILITIES,
                root: Root {
                    proc: true,
                    ..Root::default()
                },
                ..confinement(Role::Vmm)
            });
            super::attack::attempt(&arguments[0]);
        }
        "call" => {
            enter(&confinement(Role::Qemu));
            call(&arguments[0]);
        }
        "connect" => {
            let socket = rustix::fs::open(
                arguments[0].as_str(),
                rustix::fs::OFlags::PATH,
                rustix::fs::Mode::empty(),
            );
            // The name on the host is of no importance afterwards.
            std::fs::rename(&arguments[0], format!("{}.other", arguments[0])).unwrap();
            let mut confinement = confinement(Role::Uml);
            confinement.root.binds.push(Bind {
                source: Source::Descriptor(socket.unwrap()),
                target: "/sockets/here".into(),
                executable: false,
            });
            enter(&confinement);
            let mut stream = std::os::unix::net::UnixStream::connect("/sockets/here").unwrap();
            std::io::Write::write_all(&mut stream, b"hello").unwrap();
            print!("connected");
        }
        "leak" => {
            let host = super::inherited(7);
            // SAFETY: asks for the version only.
            let version = unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, 0, 0, 1) };
            enter(&confinement(Role::Uml));
            let flags = rustix::fs::OFlags::RDONLY;
            match rustix::fs::openat(&host, "etc/passwd", flags, rustix::fs::Mode::empty()) {
                Err(errno) => println!("{errno}"),
                Ok(_) if version < 0 => println!("landlock: absent"),
                Ok(_) => println!("opened"),
            }
        }
        "unpack" => {
            let host = super::inherited(7);
            let directory = |fd, writable| Directory {
                directory: super::inherited(fd),
                writable,
            };
            let mut confinement = confinement(Role::Unpack);
            confinement.uid = 0;
            confinement.gid = 0;
            confinement.capabilities = UNPACK_CAPABILITIES;
            confinement.root.tmp = None;
            confinement.root.directories = vec![directory(8, true), directory(9, false)];
            enter(&confinement);
            let create = |at: &OwnedFd| {
                use rustix::fs::{Mode, OFlags, mkdirat, openat};
                let flags = OFlags::CREATE | OFlags::WRONLY;
                openat(at, "file", flags, Mode::from_raw_mode(0o600))?;
                mkdirat(at, "directory", Mode::from_raw_mode(0o700))
            };
            let look = |at: &OwnedFd| {
                let flags = rustix::fs::OFlags::RDONLY;
                rustix::fs::openat(at, "there", flags, rustix::fs::Mode::empty()).map(drop)
            };
            let [layer, lower] = confinement.root.directories.as_slice() else {
                unreachable!()
            };
            for (name, at) in [
                ("layer", &layer.directory),
                ("lower", &lower.directory),
                ("host", &host),
            ] {
                println!("{name}: read {:?} write {:?}", look(at), create(at));
            }
        }
        "sleep" => {
            enter(&confinement(Role::Uml));
            // SAFETY: both sides of the fork only sleep.
            if arguments.first().is_some_and(|how| how == "fork") && unsafe { libc::fork() } == 0 {
                std::thread::sleep(std::time::Duration::from_secs(30));
            }
            print!(".");
            std::io::Write::flush(&mut std::io::stdout()).unwrap();
            std::thread::sleep(std::time::Duration::from_secs(30));
        }
        "descriptors" => {
            for fd in 3..200 {
                let mut stat = std::mem::MaybeUninit::<libc::stat>::uninit();
                // SAFETY: fstat fills the structure or fails.
                unsafe {
                    if libc::fstat(fd, stat.as_mut_ptr()) == 0 {
                        print!("{fd} {} ", stat.assume_init().st_ino);
                    }
                }
            }
        }
        other => panic!("no question {other}"),
    }
    ExitCode::SUCCESS
}

fn enter(confinement: &Confinement) {
    jail::enter("a test", confinement).unwrap();
}

fn look() {
    list("root", "/");
    println!("etc: {}", std::fs::read("/etc/passwd").unwrap_err());
    println!("write: {}", std::fs::write("/x", "").unwrap_err());
    println!(
        "tmp: {}",
        std::fs::write("/tmp/x", "x").map_or("not written", |()| "written")
    );
    let processes = std::fs::read_dir("/proc")
        .unwrap()
        .filter(|entry| {
            let name = entry.as_ref().unwrap().file_name();
            name.to_string_lossy().parse::<u32>().is_ok()
        })
        .count();
    println!("processes: {processes}");
    println!(
        "proc: {}",
        if Path::new("/proc/meminfo").exists() {
            "meminfo"
        } else {
            "no meminfo"
        }
    );
    let interfaces = std::fs::read_to_string("/proc/self/net/dev").unwrap();
    let names: Vec<&str> = interfaces
        .lines()
        .filter_map(|line| line.split_once(':'))
        .map(|(name, _)| name.trim())
        .collect();
    println!("interfaces: {}", names.join(" "));
    status();
    println!(
        "host: {}",
        rustix::system::uname().nodename().to_string_lossy()
    );
    let mut descriptors: Vec<u32> = (0..1000)
        // SAFETY: asks for flags only.
        .filter(|fd| unsafe { libc::fcntl(*fd as i32, libc::F_GETFD) } >= 0)
        .collect();
    descriptors.sort_unstable();
    let descriptors: Vec<String> = descriptors.iter().map(ToString::to_string).collect();
    println!("descriptors: {}", descriptors.join(" "));
    let core = rustix::process::getrlimit(rustix::process::Resource::Core);
    println!("core: {}", core.maximum.unwrap());
}

fn list(what: &str, path: &str) {
    let mut names: Vec<String> = std::fs::read_dir(path)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    println!("{what}: {}", names.join(" "));
}

fn status() {
    for line in std::fs::read_to_string("/proc/self/status")
        .unwrap()
        .lines()
    {
        let words: Vec<&str> = line.split_whitespace().collect();
        println!("{}", words.join(" "));
    }
}

/// Starts a thread of this role and reports what it and the rest of the process may do.
fn thread(role: ThreadRole, question: &str) {
    let print = |whose: &str, id: u32| {
        let status = std::fs::read_to_string(format!("/proc/self/task/{id}/status")).unwrap();
        for line in status.lines() {
            let words: Vec<&str> = line.split_whitespace().collect();
            println!("{whose} {}", words.join(" "));
        }
    };
    let (tell, told) = std::sync::mpsc::channel();
    let (finish, finished) = std::sync::mpsc::channel::<()>();
    std::thread::scope(|scope| {
        let confined = scope.spawn(move || {
            jail::restrict_thread("a test", role).unwrap();
            if question == "mount" {
                call("mount");
            }
            let opened =
                rustix::fs::open("/", rustix::fs::OFlags::RDONLY, rustix::fs::Mode::empty());
            let large = vec![1u8; 1 << 20];
            // SAFETY: the call fails, because there is no such descriptor.
            let polled =
                unsafe { libc::epoll_ctl(-1, libc::EPOLL_CTL_DEL, -1, std::ptr::null_mut()) };
            assert_eq!(polled, -1);
            let errno = std::io::Error::last_os_error().raw_os_error();
            // SAFETY: takes no arguments.
            let id = unsafe { libc::gettid() };
            tell.send((id, opened.unwrap_err(), large.len() == 1 << 20, errno))
                .unwrap();
            finished.recv().unwrap();
        });
        if let Ok((id, opened, memory, polled)) = told.recv() {
            println!("thread open: {opened}");
            println!("thread memory: {}", if memory { "works" } else { "fails" });
            let polled = match polled {
                Some(libc::ENOSYS) => "ENOSYS",
                Some(libc::EBADF) => "EBADF",
                _ => "other",
            };
            println!("thread epoll_ctl: {polled}");
            print("thread", id as u32);
            print("process", std::process::id());
            let opened = std::fs::File::open("/");
            println!(
                "process open: {}",
                if opened.is_ok() { "works" } else { "fails" }
            );
            finish.send(()).unwrap();
        }
        confined.join().unwrap();
    });
}

/// Makes one system call and prints what it fails with, if it lets us live.
fn call(name: &str) {
    // SAFETY: none of these calls can do anything to this process's memory: they fail, or the
    // process ends.
    let result = unsafe {
        match name {
            "mount" => libc::syscall(libc::SYS_mount, 0, c"/".as_ptr(), 0, 0, 0),
            "unshare" => libc::syscall(libc::SYS_unshare, 0),
            "ptrace" => libc::syscall(libc::SYS_ptrace, libc::PTRACE_TRACEME, 0, 0, 0),
            "execve" => libc::syscall(libc::SYS_execve, c"/x".as_ptr(), 0, 0),
            "bpf" => libc::syscall(libc::SYS_bpf, 0, 0, 0),
            "setns" => libc::syscall(libc::SYS_setns, 0, 0),
            "inet-socket" => libc::syscall(libc::SYS_socket, libc::AF_INET, libc::SOCK_STREAM, 0),
            "clone-newuser" => libc::syscall(
                libc::SYS_clone,
                libc::CLONE_NEWUSER | libc::SIGCHLD,
                0,
                0,
                0,
                0,
            ),
            "clone3" => libc::syscall(libc::SYS_clone3, 0, 0),
            "io_uring" => libc::syscall(libc::SYS_io_uring_setup, 1, 0),
            "x32" => libc::syscall(0x4000_0000 | libc::SYS_getpid),
            other => panic!("no call {other}"),
        }
    };
    let error = std::io::Error::last_os_error()
        .raw_os_error()
        .unwrap_or_default();
    println!("errno {}", if result < 0 { error } else { 0 });
}
