//! The system call filter of containers that `hull run` starts, and the reading of profiles that
//! users bring.
//!
//! The guest's kernel is the container's own, and the machine's wall is behind it. The filter keeps
//! the way to that kernel narrow all the same: what containers do not use, programs in them cannot
//! attack. It allows by name and refuses everything else, with EPERM; what only makes sense with a
//! capability is allowed with the capability. The agent leaves out names that the guest's kernel
//! does not know, and answers ENOSYS for system calls newer than all that a profile names, as if
//! the kernel did not have them.

use std::path::Path;

use oci_spec::runtime::LinuxSeccomp;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::error::{Context, Error, Result};

/// Which filter a container has.
#[derive(Debug, Clone, Default)]
pub enum Seccomp {
    /// The one below.
    #[default]
    Default,
    /// None at all.
    Unconfined,
    /// A profile in Docker's form, or the runtime specification's.
    Profile(Box<Profile>),
}

/// The own namespaces that `clone` can ask for; CLONE_NEWTIME is not among its flags.
const CLONE_NEW: u64 = 0x7e02_0000;

/// Address families are below 64: what distinguishes this one from the others is in six bits.
const AF_VSOCK: u64 = 40;
const FAMILY_BITS: u32 = 6;

/// The execution domains of programs as they are: PER_LINUX, PER_LINUX32, both with UNAME26, and
/// the question.
const PERSONALITIES: [u64; 5] = [0, 8, 0x2_0000, 0x2_0008, 0xffff_ffff];

/// What every container may call.
const ALLOWED: &[&str] = &[
    // Files by descriptor.
    "read write readv writev pread64 pwrite64 preadv pwritev preadv2 pwritev2 lseek close close_range dup dup2 \
     dup3 fcntl flock ioctl ftruncate fallocate fadvise64 readahead fsync fdatasync sync syncfs sync_file_range \
     sendfile copy_file_range splice tee vmsplice pipe pipe2 cachestat",
    // Files by name.
    "open openat openat2 creat access faccessat faccessat2 stat lstat fstat newfstatat statx statfs fstatfs \
     truncate readlink readlinkat getdents getdents64 getcwd chdir fchdir mkdir mkdirat rmdir rename renameat \
     renameat2 link linkat symlink symlinkat unlink unlinkat mknod mknodat chmod fchmod fchmodat fchmodat2 chown \
     fchown lchown fchownat umask utime utimes futimesat utimensat name_to_handle_at file_getattr file_setattr",
    // Attributes of files, and being told of changes. fanotify_mark needs a descriptor of
    // fanotify_init.
    "setxattr lsetxattr fsetxattr setxattrat getxattr lgetxattr fgetxattr getxattrat listxattr llistxattr \
     flistxattr listxattrat removexattr lremovexattr fremovexattr removexattrat inotify_init inotify_init1 \
     inotify_add_watch inotify_rm_watch fanotify_mark",
    // The mounts that /proc/self/mountinfo shows, too.
    "statmount listmount",
    // Waiting for descriptors, asynchronous input and output.
    "select pselect6 poll ppoll epoll_create epoll_create1 epoll_ctl epoll_ctl_old epoll_wait epoll_wait_old \
     epoll_pwait epoll_pwait2 eventfd eventfd2 signalfd signalfd4 timerfd_create timerfd_settime timerfd_gettime \
     io_setup io_destroy io_submit io_cancel io_getevents io_pgetevents",
    // Memory.
    "brk mmap munmap mremap mprotect msync mincore madvise mlock mlock2 munlock mlockall munlockall \
     remap_file_pages memfd_create memfd_secret membarrier pkey_alloc pkey_free pkey_mprotect mseal \
     map_shadow_stack process_mrelease",
    // Processes: clone is below, with conditions.
    "fork vfork execve execveat exit exit_group wait4 waitid getpid getppid gettid getpgid setpgid getpgrp \
     getsid setsid pidfd_open pidfd_send_signal prctl arch_prctl set_tid_address set_thread_area get_thread_area \
     modify_ldt set_robust_list get_robust_list rseq rseq_slice_yield restart_syscall getpriority setpriority \
     ioprio_get ioprio_set getrlimit setrlimit prlimit64 getrusage times getcpu",
    // Looking into one's own processes. The kernel asks for the right to, and since 4.8 a tracer
    // cannot undo this filter.
    "ptrace process_vm_readv process_vm_writev",
    // Scheduling.
    "sched_yield sched_getaffinity sched_setaffinity sched_getattr sched_setattr sched_getparam sched_setparam \
     sched_getscheduler sched_setscheduler sched_get_priority_max sched_get_priority_min sched_rr_get_interval",
    // Locks between threads.
    "futex futex_waitv futex_wait futex_wake futex_requeue",
    // Signals.
    "rt_sigaction rt_sigprocmask rt_sigreturn rt_sigpending rt_sigsuspend rt_sigtimedwait rt_sigqueueinfo \
     rt_tgsigqueueinfo sigaltstack kill tkill tgkill pause uretprobe uprobe",
    // Users, groups, capabilities; a process can only give up rights, and wall itself in further.
    "getuid geteuid getgid getegid getresuid getresgid getgroups setuid setgid setreuid setregid setresuid \
     setresgid setgroups setfsuid setfsgid capget capset seccomp landlock_create_ruleset landlock_add_rule \
     landlock_restrict_self lsm_get_self_attr lsm_set_self_attr lsm_list_modules",
    // Time; setting the clock needs a capability, here and of the kernel.
    "time gettimeofday nanosleep alarm getitimer setitimer clock_gettime clock_getres clock_nanosleep \
     timer_create timer_settime timer_gettime timer_getoverrun timer_delete adjtimex clock_adjtime",
    // Sockets: socket is below, with conditions. socketcall would go around them; 32-bit C
    // libraries need it no more.
    "socketpair bind listen accept accept4 connect shutdown getsockname getpeername getsockopt setsockopt sendto \
     sendmsg sendmmsg recvfrom recvmsg recvmmsg",
    // Messages, semaphores and shared memory, in the container's own namespace.
    "shmget shmat shmdt shmctl semget semop semctl semtimedop msgget msgsnd msgrcv msgctl mq_open mq_unlink \
     mq_timedsend mq_timedreceive mq_notify mq_getsetattr",
    // The system.
    "uname sysinfo getrandom",
];

/// What programs of 32 bits have besides: wider forms of what has got too narrow, and what 64 bits
/// have never had.
const ALLOWED_32: &str = "fcntl64 _llseek ftruncate64 fadvise64_64 arm_fadvise64_64 sync_file_range2 arm_sync_file_range sendfile64 \
     stat64 lstat64 fstat64 fstatat64 oldstat oldlstat oldfstat statfs64 fstatfs64 truncate64 readdir chown32 \
     fchown32 lchown32 utimensat_time64 _newselect pselect6_time64 ppoll_time64 timerfd_settime64 \
     timerfd_gettime64 io_pgetevents_time64 mmap2 waitpid set_tls cacheflush breakpoint nice ugetrlimit \
     sched_rr_get_interval_time64 futex_time64 rt_sigtimedwait_time64 sigreturn signal sigaction sigprocmask \
     sigpending sigsuspend getuid32 geteuid32 getgid32 getegid32 getresuid32 getresgid32 getgroups32 setuid32 \
     setgid32 setreuid32 setregid32 setresuid32 setresgid32 setgroups32 setfsuid32 setfsgid32 clock_gettime64 \
     clock_getres_time64 clock_nanosleep_time64 timer_settime64 timer_gettime64 clock_adjtime64 send recv \
     recvmmsg_time64 semtimedop_time64 ipc mq_timedsend_time64 mq_timedreceive_time64";

/// What is allowed with any of the capabilities before it.
const WITH_CAPABILITY: &[(&[&str], &str)] = &[
    // Mounts, and namespaces; those of clone are below.
    (
        &["SYS_ADMIN"],
        "mount umount umount2 mount_setattr move_mount open_tree open_tree_attr fsopen fsconfig fsmount fspick \
         quotactl quotactl_fd fanotify_init unshare setns listns sethostname setdomainname",
    ),
    (&["SYS_ADMIN", "BPF"], "bpf"),
    (&["SYS_ADMIN", "PERFMON"], "perf_event_open"),
    (&["SYS_ADMIN", "SYSLOG"], "syslog"),
    (&["DAC_READ_SEARCH"], "open_by_handle_at"),
    (&["SYS_BOOT"], "reboot"),
    (&["SYS_CHROOT"], "chroot fchroot"),
    (&["SYS_MODULE"], "init_module finit_module delete_module"),
    (
        &["SYS_NICE"],
        "get_mempolicy set_mempolicy set_mempolicy_home_node mbind migrate_pages move_pages",
    ),
    (&["SYS_PACCT"], "acct"),
    (&["SYS_PTRACE"], "kcmp pidfd_getfd process_madvise"),
    (&["SYS_RAWIO"], "iopl ioperm"),
    (
        &["SYS_TIME"],
        "settimeofday stime clock_settime clock_settime64",
    ),
    (&["SYS_TTY_CONFIG"], "vhangup"),
];

// Refused to all, by not being named: the kernel's key rings, which know no namespaces (add_key,
// request_key, keyctl); what attacks on kernels are made with and programs do without (io_uring_*,
// userfaultfd); another kernel, swap (kexec_*, swapon, swapoff); what is obsolete (uselib, ustat,
// sysfs, _sysctl, nfsservctl, lookup_dcookie, vm86, …).

impl Seccomp {
    /// `linux.seccomp` of a process with these capabilities (`CAP_…`), on a kernel that executes
    /// programs of 32 bits or does not.
    pub(super) fn for_capabilities(
        &self,
        capabilities: &[String],
        has_32_bits: bool,
    ) -> Option<Value> {
        match self {
            Seccomp::Default => Some(default_filter(capabilities, has_32_bits)),
            Seccomp::Unconfined => None,
            Seccomp::Profile(profile) => Some(profile.filter(capabilities)),
        }
    }
}

fn words<'a>(texts: impl Iterator<Item = &'a &'static str>) -> impl Iterator<Item = &'static str> {
    texts.flat_map(|text| text.split_whitespace())
}

fn has(capabilities: &[String], name: &str) -> bool {
    let name = name.strip_prefix("CAP_").unwrap_or(name);
    capabilities
        .iter()
        .any(|capability| capability.strip_prefix("CAP_") == Some(name))
}

/// The architectures whose programs a guest executes.
fn architectures() -> &'static [&'static str] {
    match std::env::consts::ARCH {
        "x86_64" => &["SCMP_ARCH_X86_64", "SCMP_ARCH_X86"],
        "aarch64" => &["SCMP_ARCH_AARCH64", "SCMP_ARCH_ARM"],
        _ => &[],
    }
}

/// What is not needed is left out: each name is read, and looked up, in the guest at each start.
fn default_filter(capabilities: &[String], has_32_bits: bool) -> Value {
    let mut allowed: Vec<&str> = words(ALLOWED.iter()).collect();
    let mut architectures = architectures();
    if has_32_bits {
        allowed.extend(ALLOWED_32.split_whitespace());
    } else {
        architectures = &architectures[..architectures.len().min(1)];
    }
    for (needed, calls) in WITH_CAPABILITY {
        if needed.iter().any(|name| has(capabilities, name)) {
            allowed.extend(calls.split_whitespace());
        }
    }
    let mut rules = Vec::new();
    let mut allow_if = |call: &str, argument: u32, operator: &str, value: u64, second: u64| {
        rules.push(json!({
            "names": [call],
            "action": "SCMP_ACT_ALLOW",
            "args": [{"index": argument, "value": value, "valueTwo": second, "op": operator}],
        }));
    };
    for persona in PERSONALITIES {
        allow_if("personality", 0, "SCMP_CMP_EQ", persona, 0);
    }
    // Not the machine's line to its host. The kernel looks at 32 bits of the argument and a
    // comparison at 64, so "not equal" would be said of a family with something above: hence bit by
    // bit, any that is not as in AF_VSOCK.
    for bit in 0..FAMILY_BITS {
        let mask = 1 << bit;
        allow_if("socket", 0, "SCMP_CMP_MASKED_EQ", mask, !AF_VSOCK & mask);
    }
    if has(capabilities, "SYS_ADMIN") {
        allowed.extend(["clone", "clone3"]);
    } else {
        allow_if("clone", 0, "SCMP_CMP_MASKED_EQ", CLONE_NEW, 0);
        // Its flags are in memory, where a filter cannot look. C libraries take clone when there is
        // no clone3.
        rules.push(json!({
            "names": ["clone3"],
            "action": "SCMP_ACT_ERRNO",
            "errnoRet": rustix::io::Errno::NOSYS.raw_os_error(),
        }));
    }
    rules.push(json!({"names": allowed, "action": "SCMP_ACT_ALLOW"}));
    json!({
        "defaultAction": "SCMP_ACT_ERRNO",
        "defaultErrnoRet": rustix::io::Errno::PERM.raw_os_error(),
        "architectures": architectures,
        "syscalls": rules,
    })
}

/// A profile in Docker's form: the specification's, with rules for some architectures, capabilities
/// and kernels only.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Profile {
    default_action: Value,
    #[serde(default)]
    default_errno_ret: Option<u32>,
    #[serde(default)]
    architectures: Option<Vec<String>>,
    #[serde(default)]
    arch_map: Option<Vec<ArchMap>>,
    #[serde(default)]
    flags: Option<Vec<String>>,
    #[serde(default)]
    listener_path: Option<String>,
    #[serde(default)]
    listener_metadata: Option<String>,
    #[serde(default)]
    syscalls: Option<Vec<Rule>>,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct ArchMap {
    architecture: String,
    #[serde(default)]
    sub_architectures: Option<Vec<String>>,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Rule {
    /// One, in the oldest form.
    #[serde(default)]
    name: Option<String>,
    #[serde(default)]
    names: Option<Vec<String>>,
    action: Value,
    #[serde(default)]
    errno_ret: Option<u32>,
    /// podman's profiles have it, for people.
    #[serde(default, rename = "errno")]
    _errno: Option<Value>,
    #[serde(default)]
    args: Option<Vec<Value>>,
    #[serde(default, rename = "comment")]
    _comment: Option<Value>,
    #[serde(default)]
    includes: Option<Condition>,
    #[serde(default)]
    excludes: Option<Condition>,
}

/// When a rule holds, or does not.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Condition {
    #[serde(default)]
    arches: Option<Vec<String>>,
    #[serde(default)]
    caps: Option<Vec<String>>,
    #[serde(default, rename = "minKernel")]
    _min_kernel: Option<Value>,
}

/// This architecture in Docker's profiles, as Go names it.
fn go_architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

impl Condition {
    fn is_for_this_architecture(&self) -> Option<bool> {
        let arches = self.arches.as_ref().filter(|list| !list.is_empty())?;
        Some(arches.iter().any(|arch| arch == go_architecture()))
    }
}

impl Rule {
    /// By Docker's rules: included by all that is asked for, excluded by any. Guest kernels are
    /// newer than all kernels that profiles ask for.
    fn holds(&self, capabilities: &[String]) -> bool {
        let included = self.includes.as_ref().is_none_or(|includes| {
            includes.is_for_this_architecture() != Some(false)
                && includes
                    .caps
                    .iter()
                    .flatten()
                    .all(|name| has(capabilities, name))
        });
        let excluded = self.excludes.as_ref().is_some_and(|excludes| {
            excludes.is_for_this_architecture() == Some(true)
                || excludes
                    .caps
                    .iter()
                    .flatten()
                    .any(|name| has(capabilities, name))
        });
        included && !excluded
    }
}

impl Profile {
    /// Reads a profile.
    ///
    /// # Errors
    /// The file cannot be read, or is no profile.
    pub fn read(path: &Path) -> Result<Profile> {
        let bytes = std::fs::read(path)
            .context(|| format!("read the seccomp profile {}", path.display()))?;
        Self::parse(&bytes, &path.display())
    }

    /// The same of its text; `what` names it in messages.
    ///
    /// # Errors
    /// It is no profile.
    pub fn parse(text: &[u8], what: &dyn std::fmt::Display) -> Result<Profile> {
        let wrong = |error: &dyn std::fmt::Display| {
            Error::invalid(format!("{what} is no seccomp profile: {error}"))
            .hint("profiles are JSON as Docker and podman take them; \"seccomp=unconfined\" is no filter at all")
        };
        let profile: Profile = serde_json::from_slice(text).map_err(|error| wrong(&error))?;
        // Wrong actions, flags and operators are found here, not in the guest.
        serde_json::from_value::<LinuxSeccomp>(profile.unconditional())
            .map_err(|error| wrong(&error))?;
        Ok(profile)
    }

    fn filter(&self, capabilities: &[String]) -> Value {
        self.with_rules(|rule| rule.holds(capabilities))
    }

    fn unconditional(&self) -> Value {
        self.with_rules(|_| true)
    }

    fn with_rules(&self, holds: impl Fn(&Rule) -> bool) -> Value {
        let rules: Vec<Value> = self
            .syscalls
            .iter()
            .flatten()
            .filter(|rule| holds(rule))
            .map(|rule| {
                let mut names = rule.names.clone().unwrap_or_default();
                names.extend(rule.name.clone());
                let mut value = json!({"names": names, "action": rule.action});
                if let Some(number) = rule.errno_ret {
                    value["errnoRet"] = json!(number);
                }
                if let Some(arguments) = &rule.args {
                    value["args"] = json!(arguments);
                }
                value
            })
            .collect();
        let mut architectures = self.architectures.clone().unwrap_or_default();
        let own = self::architectures().first();
        for map in self.arch_map.iter().flatten() {
            if Some(&map.architecture.as_str()) == own {
                architectures.push(map.architecture.clone());
                architectures.extend(map.sub_architectures.iter().flatten().cloned());
            }
        }
        let mut value = json!({
            "defaultAction": self.default_action,
            "architectures": architectures,
            "syscalls": rules,
        });
        let optional = [
            ("defaultErrnoRet", json!(self.default_errno_ret)),
            ("flags", json!(self.flags)),
            ("listenerPath", json!(self.listener_path)),
            ("listenerMetadata", json!(self.listener_metadata)),
        ];
        for (name, field) in optional {
            if !field.is_null() {
                value[name] = field;
            }
        }
        value
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn names(filter: &Value) -> Vec<String> {
        let rules = filter["syscalls"].as_array().unwrap();
        rules
            .iter()
            .filter(|rule| rule["action"] == "SCMP_ACT_ALLOW" && rule["args"].is_null())
            .flat_map(|rule| rule["names"].as_array().unwrap())
            .map(|name| name.as_str().unwrap().to_owned())
            .collect()
    }

    #[test]
    fn each_call_is_named_once() {
        let mut all: Vec<&str> = words(ALLOWED.iter()).collect();
        all.extend(words(WITH_CAPABILITY.iter().map(|(_, calls)| calls)));
        all.extend(ALLOWED_32.split_whitespace());
        all.extend(["clone", "clone3", "socket", "personality"]);
        let count = all.len();
        all.sort_unstable();
        all.dedup();
        assert_eq!(all.len(), count);
    }

    #[test]
    fn capabilities_open_what_belongs_to_them() {
        let with = |list: &[&str]| {
            let list: Vec<String> = list.iter().map(|name| format!("CAP_{name}")).collect();
            names(&default_filter(&list, false))
        };
        let usual = with(&["CHOWN", "SYS_CHROOT"]);
        assert!(usual.contains(&"chroot".into()) && usual.contains(&"ptrace".into()));
        for name in [
            "mount", "bpf", "clone", "clone3", "unshare", "keyctl", "reboot", "syslog",
        ] {
            assert!(!usual.contains(&name.into()), "{name}");
        }
        let admin = with(&["SYS_ADMIN"]);
        for name in [
            "mount",
            "bpf",
            "clone",
            "clone3",
            "unshare",
            "syslog",
            "perf_event_open",
        ] {
            assert!(admin.contains(&name.into()), "{name}");
        }
        assert!(!admin.contains(&"keyctl".into()) && !admin.contains(&"chroot".into()));
        assert!(with(&["BPF"]).contains(&"bpf".into()));
        assert!(!with(&["BPF"]).contains(&"mount".into()));
    }

    #[test]
    fn only_one_address_family_is_kept_out() {
        let filter = default_filter(&[], true);
        let allowed = |family: u64| {
            filter["syscalls"].as_array().unwrap().iter().any(|rule| {
                let argument = &rule["args"][0];
                rule["names"][0] == "socket"
                    && family & argument["value"].as_u64().unwrap()
                        == argument["valueTwo"].as_u64().unwrap()
            })
        };
        for family in 0..46 {
            assert_eq!(allowed(family), family != AF_VSOCK, "{family}");
        }
        assert!(!allowed(AF_VSOCK | 1 << 32));
    }

    #[test]
    fn it_is_what_the_specification_asks_for() {
        let filter = default_filter(&[], true);
        let parsed: LinuxSeccomp = serde_json::from_value(filter).unwrap();
        assert_eq!(parsed.default_errno_ret(), Some(1));
        assert!(Seccomp::Unconfined.for_capabilities(&[], true).is_none());
    }

    fn read(text: &str) -> Result<Profile> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        Profile::read(file.path())
    }

    #[test]
    fn dockers_conditions() {
        let profile = read(
            r#"{"defaultAction":"SCMP_ACT_ERRNO","defaultErrnoRet":38,"archMap":[
                {"architecture":"SCMP_ARCH_X86_64","subArchitectures":["SCMP_ARCH_X86"]},
                {"architecture":"SCMP_ARCH_AARCH64","subArchitectures":["SCMP_ARCH_ARM"]},
                {"architecture":"SCMP_ARCH_S390X","subArchitectures":["SCMP_ARCH_S390"]}],
              "syscalls":[
                {"names":["read"],"action":"SCMP_ACT_ALLOW","args":null,"comment":"","includes":{},"excludes":{}},
                {"name":"write","action":"SCMP_ACT_ALLOW","includes":{"minKernel":"4.8"}},
                {"names":["mount"],"action":"SCMP_ACT_ALLOW","includes":{"caps":["CAP_SYS_ADMIN"]}},
                {"names":["nomount"],"action":"SCMP_ACT_ALLOW","excludes":{"caps":["CAP_SYS_ADMIN"]}},
                {"names":["here"],"action":"SCMP_ACT_ALLOW","includes":{"arches":["amd64","arm64"]}},
                {"names":["there"],"action":"SCMP_ACT_ALLOW","includes":{"arches":["s390x"]}},
                {"names":["nothere"],"action":"SCMP_ACT_ALLOW","excludes":{"arches":["amd64","arm64"]}}]}"#,
        )
        .unwrap();
        let plain = profile.filter(&[]);
        assert_eq!(names(&plain), ["read", "write", "nomount", "here"]);
        assert_eq!(plain["architectures"].as_array().unwrap().len(), 2);
        assert_eq!(plain["defaultErrnoRet"], 38);
        let admin = profile.filter(&["CAP_SYS_ADMIN".into()]);
        assert_eq!(names(&admin), ["read", "write", "mount", "here"]);
    }

    #[test]
    fn what_is_no_profile_is_said() {
        for (text, words) in [
            ("not json", "expected"),
            ("{}", "defaultAction"),
            (r#"{"defaultAction":"SCMP_ACT_NONE"}"#, "SCMP_ACT_NONE"),
            (
                r#"{"defaultAction":"SCMP_ACT_ALLOW","syscals":[]}"#,
                "syscals",
            ),
        ] {
            let failure = read(text).unwrap_err();
            assert!(failure.message.contains(words), "{}", failure.message);
            assert!(failure.hint.is_some());
        }
    }
}
