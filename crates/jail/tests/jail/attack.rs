//! What somebody tries who has taken over the process of a virtual machine monitor.

use std::os::fd::RawFd;

use libc::{c_char, c_int, c_long};

/// A directory of the host that is shared with the guest: the root of a detached mount.
pub const SHARED: RawFd = 7;

const STRING: fn(&'static std::ffi::CStr) -> c_long = |text| text.as_ptr() as c_long;

/// An attempt: its name, and system calls, of which the last one is the aim.
type Attempt = (&'static str, fn() -> c_long);

/// Everything that is tried.
pub const ATTEMPTS: &[Attempt] = &[
    // Files of the host.
    ("open_a_file", || open(c"/etc/passwd", libc::O_RDONLY)),
    ("open_kvm", || open(c"/dev/kvm", libc::O_RDWR)),
    ("open_memory", || open(c"/dev/mem", libc::O_RDWR)),
    ("make_a_device_node", || {
        call(
            libc::SYS_mknodat,
            &[libc::AT_FDCWD as c_long, STRING(c"/m"), 0o20600, 0x101],
        )
    }),
    ("make_a_directory", || {
        call(
            libc::SYS_mkdirat,
            &[libc::AT_FDCWD as c_long, STRING(c"/d"), 0o700],
        )
    }),
    ("leave_a_share_upwards", || {
        openat(SHARED, c"../../../../../../etc/passwd", libc::O_RDONLY)
    }),
    ("leave_a_share_by_proc", || {
        open(c"/proc/self/fd/7/../../etc/passwd", libc::O_RDONLY)
    }),
    ("leave_by_the_root_of_process_1", || {
        open(c"/proc/1/root/etc/passwd", libc::O_RDONLY)
    }),
    ("leave_by_the_directory_of_process_1", || {
        open(c"/proc/1/cwd/etc/passwd", libc::O_RDONLY)
    }),
    ("open_by_handle", || {
        call(libc::SYS_open_by_handle_at, &[c_long::from(SHARED), 0, 0])
    }),
    ("change_a_setting_of_the_kernel", || {
        open(c"/proc/sys/kernel/core_pattern", libc::O_WRONLY)
    }),
    ("trigger_sysrq", || {
        open(c"/proc/sysrq-trigger", libc::O_WRONLY)
    }),
    ("read_kernel_memory", || {
        open(c"/proc/kcore", libc::O_RDONLY)
    }),
    ("change_the_mode_of_the_executable", || {
        let file = open(c"/proc/self/exe", libc::O_RDONLY);
        assert!(file >= 0);
        call(libc::SYS_fchmod, &[file, 0o755])
    }),
    ("take_over_the_executable", || {
        let file = open(c"/proc/self/exe", libc::O_RDONLY);
        call(libc::SYS_fchown, &[file, 0, 0])
    }),
    ("write_to_the_executable", || {
        open(c"/proc/self/exe", libc::O_RDWR)
    }),
    // Mounts and namespaces.
    ("mount", || {
        call(libc::SYS_mount, &[0, STRING(c"/"), STRING(c"proc"), 0, 0])
    }),
    ("unmount", || {
        call(libc::SYS_umount2, &[STRING(c"/proc"), 0])
    }),
    ("pivot_root", || {
        call(libc::SYS_pivot_root, &[STRING(c"/"), STRING(c"/")])
    }),
    ("chroot", || call(libc::SYS_chroot, &[STRING(c"/proc")])),
    ("open_tree", || {
        call(libc::SYS_open_tree, &[c_long::from(SHARED), STRING(c""), 1])
    }),
    ("move_mount", || {
        call(libc::SYS_move_mount, &[c_long::from(SHARED), 0, 0, 0, 0])
    }),
    ("new_file_system", || {
        call(libc::SYS_fsopen, &[STRING(c"tmpfs"), 0])
    }),
    ("writable_mount", || {
        call(libc::SYS_mount_setattr, &[c_long::from(SHARED), 0, 0, 0, 0])
    }),
    ("new_user_namespace", || {
        call(libc::SYS_unshare, &[libc::CLONE_NEWUSER.into()])
    }),
    ("enter_a_namespace", || {
        call(libc::SYS_setns, &[c_long::from(SHARED), 0])
    }),
    ("clone_into_a_user_namespace", || {
        call(
            libc::SYS_clone,
            &[(libc::CLONE_NEWUSER | libc::SIGCHLD).into(), 0, 0, 0, 0],
        )
    }),
    ("clone3", || call(libc::SYS_clone3, &[0, 0])),
    // Networks.
    ("internet_socket", || {
        socket(libc::AF_INET, libc::SOCK_STREAM)
    }),
    ("ipv6_socket", || socket(libc::AF_INET6, libc::SOCK_DGRAM)),
    ("packet_socket", || socket(libc::AF_PACKET, libc::SOCK_RAW)),
    ("netlink_socket", || {
        socket(libc::AF_NETLINK, libc::SOCK_RAW)
    }),
    ("vsock_socket", || socket(libc::AF_VSOCK, libc::SOCK_STREAM)),
    ("crypto_socket", || {
        socket(libc::AF_ALG, libc::SOCK_SEQPACKET)
    }),
    // Other processes.
    ("trace", || {
        call(libc::SYS_ptrace, &[libc::PTRACE_ATTACH.into(), 2, 0, 0])
    }),
    ("read_memory_of_another", || {
        call(libc::SYS_process_vm_readv, &[2, 0, 0, 0, 0, 0])
    }),
    ("take_a_descriptor_of_another", || {
        call(libc::SYS_pidfd_getfd, &[3, 0, 0])
    }),
    ("signal_a_process_of_the_host", || {
        call(libc::SYS_kill, &[parent_outside(), 9])
    }),
    ("outlive_the_sandbox", || {
        call(
            libc::SYS_prctl,
            &[libc::PR_SET_PDEATHSIG.into(), 0, 0, 0, 0],
        )
    }),
    // Programs and kernels.
    ("execute", || {
        call(libc::SYS_execve, &[STRING(c"/proc/self/exe"), 0, 0])
    }),
    ("execute_a_descriptor", || {
        call(
            libc::SYS_execveat,
            &[c_long::from(SHARED), STRING(c"x"), 0, 0, 0],
        )
    }),
    ("load_a_module", || call(libc::SYS_init_module, &[0, 0, 0])),
    ("load_a_kernel", || {
        call(libc::SYS_kexec_load, &[0, 0, 0, 0])
    }),
    ("reboot", || {
        call(libc::SYS_reboot, &[0xfee1_dead, 0x2812_1969, 0, 0])
    }),
    ("bpf", || call(libc::SYS_bpf, &[0, 0, 0])),
    ("performance_counters", || {
        call(libc::SYS_perf_event_open, &[0, 0, -1, -1, 0])
    }),
    ("userfaultfd", || call(libc::SYS_userfaultfd, &[0])),
    ("io_uring", || call(libc::SYS_io_uring_setup, &[1, 0])),
    ("add_a_key", || call(libc::SYS_add_key, &[0, 0, 0, 0, 0])),
    ("read_a_key", || call(libc::SYS_keyctl, &[0, 0, 0, 0, 0])),
    ("kernel_log", || call(libc::SYS_syslog, &[3, 0, 0])),
    ("set_the_clock", || call(libc::SYS_clock_settime, &[0, 0])),
    ("swap", || call(libc::SYS_swapon, &[STRING(c"/x"), 0])),
    ("host_name", || {
        call(libc::SYS_sethostname, &[STRING(c"x"), 1])
    }),
    ("shared_memory_of_others", || {
        call(libc::SYS_shmget, &[1, 4096, 0o1600])
    }),
    ("message_queue", || {
        call(libc::SYS_mq_open, &[STRING(c"/q"), 0o102, 0o600, 0])
    }),
    ("another_virtual_machine", || ioctl(SHARED, 0xae01)),
    ("input_of_a_terminal", || ioctl(0, libc::TIOCSTI)),
    ("more_open_files", || {
        let more = libc::rlimit64 {
            rlim_cur: 1 << 30,
            rlim_max: 1 << 30,
        };
        let limit = (&raw const more) as c_long;
        call(
            libc::SYS_prlimit64,
            &[0, libc::RLIMIT_NOFILE.into(), limit, 0],
        )
    }),
];

/// Tries one of them, and prints how it went if the process lives.
pub fn attempt(name: &str) {
    let (_, attempt) = ATTEMPTS
        .iter()
        .find(|(other, _)| *other == name)
        .unwrap_or_else(|| panic!("no attempt {name}"));
    match attempt() {
        -1 => println!("refused: {}", std::io::Error::last_os_error()),
        result => println!("SUCCEEDED: {result}"),
    }
}

fn call(number: c_long, arguments: &[c_long]) -> c_long {
    let argument = |index: usize| arguments.get(index).copied().unwrap_or(0);
    // SAFETY: the calls above have no effect on this process's memory: they fail, or end it.
    unsafe {
        libc::syscall(
            number,
            argument(0),
            argument(1),
            argument(2),
            argument(3),
            argument(4),
            argument(5),
        )
    }
}

fn open(path: &'static std::ffi::CStr, flags: c_int) -> c_long {
    openat(libc::AT_FDCWD, path, flags)
}

fn openat(directory: RawFd, path: &'static std::ffi::CStr, flags: c_int) -> c_long {
    call(
        libc::SYS_openat,
        &[directory.into(), STRING(path), flags.into()],
    )
}

fn socket(family: c_int, kind: c_int) -> c_long {
    call(libc::SYS_socket, &[family.into(), kind.into(), 0])
}

fn ioctl(fd: RawFd, request: libc::c_ulong) -> c_long {
    let text: [c_char; 2] = [0; 2];
    call(
        libc::SYS_ioctl,
        &[fd.into(), request as c_long, text.as_ptr() as c_long],
    )
}

/// A process id that exists on every host and not in the jail.
fn parent_outside() -> c_long {
    2
}
