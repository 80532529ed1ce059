//! A process of a container, from its spec to `execve`: the same for the container's init and for
//! processes executed later.
//!
//! The agent builds the [`ProcessPlan`]. The child calls [`ProcessPlan::become_user`], waits at the
//! gate, then calls [`ProcessPlan::execute`]. What needs privileges outside of the container's user
//! namespace is set by the agent on the waiting child ([`super::limits`]).
#![allow(unsafe_code)]

use std::ffi::{CStr, CString, c_char};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use oci_spec::runtime::{Box as ConsoleSize, LinuxPersonality, LinuxPersonalityDomain, Process};
use rustix::fs::{Access, AtFlags, CWD, FileType, Gid, Mode, OFlags, Uid};
use rustix::io::Errno;

use super::capabilities::CapabilitySets;
use super::error::{Context, CreateError, Result, reason};
use super::paths::{self, Missing};
use super::seccomp::Filter;
use super::users::{self, User};
use super::{RawArgs, sys};

/// `umask` when the spec names none.
const UMASK: u32 = 0o022;

/// Where a command without a slash is looked for when the environment has no PATH.
const DEFAULT_PATH: &[u8] = b"/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

const PER_LINUX: libc::c_ulong = 0;
const PER_LINUX32: libc::c_ulong = 8;

/// A process to be, checked and converted.
#[derive(Debug)]
pub(super) struct ProcessPlan {
    arguments: Vec<CString>,
    environment: Vec<CString>,
    pub(super) cwd: CString,
    /// `user[:group]` to be looked up in the container, instead of the three fields below.
    name: Option<String>,
    /// User id as the spec gives it.
    pub(super) uid: u32,
    gid: u32,
    groups: Vec<Gid>,
    umask: u32,
    capabilities: CapabilitySets,
    no_new_privileges: bool,
    personality: Option<libc::c_ulong>,
    pub(super) console_size: Option<ConsoleSize>,
    seccomp: Option<Arc<Filter>>,
}

/// Arguments of `execve`. The pointers are to the plan's strings, and to `_home`.
pub(super) struct Executable {
    path: CString,
    arguments: Vec<*const c_char>,
    environment: Vec<*const c_char>,
    _home: Option<CString>,
}

impl ProcessPlan {
    pub(super) fn new(
        process: &Process,
        raw: &RawArgs,
        personality: Option<&LinuxPersonality>,
        seccomp: Option<Arc<Filter>>,
    ) -> Result<ProcessPlan> {
        let strings = |field: &str, strings: &Option<Vec<String>>, raw: &[Vec<u8>]| {
            if !raw.is_empty() {
                return raw
                    .iter()
                    .map(|string| sys::c_string(field, string.clone()))
                    .collect();
            }
            strings
                .iter()
                .flatten()
                .map(|string| sys::c_string(field, string))
                .collect::<Result<Vec<_>>>()
        };
        let arguments = strings("process.args", process.args(), &raw.arguments)?;
        if arguments.is_empty() {
            return Err(CreateError::invalid("process.args", "is empty"));
        }
        if !process.cwd().is_absolute() {
            return Err(CreateError::invalid(
                "process.cwd",
                format_args!("{} is not an absolute path", process.cwd().display()),
            ));
        }
        let given =
            |value: &Option<String>| value.as_deref().is_some_and(|value| !value.is_empty());
        if process
            .apparmor_profile()
            .as_deref()
            .is_some_and(|name| !name.is_empty() && name != "unconfined")
        {
            return Err(CreateError::unsupported(
                "process.apparmorProfile",
                "the guest kernel has no AppArmor",
            ));
        }
        if given(process.selinux_label()) {
            return Err(CreateError::unsupported(
                "process.selinuxLabel",
                "the guest kernel has no SELinux",
            ));
        }
        if given(process.command_line()) {
            return Err(CreateError::unsupported(
                "process.commandLine",
                "is for Windows",
            ));
        }
        let user = process.user();
        let groups = user
            .additional_gids()
            .iter()
            .flatten()
            .map(|gid| Gid::from_raw(*gid))
            .collect();
        Ok(ProcessPlan {
            arguments,
            environment: strings("process.env", process.env(), &raw.environment)?,
            cwd: sys::c_path("process.cwd", process.cwd())?,
            name: user.username().clone().filter(|name| !name.is_empty()),
            uid: user.uid(),
            gid: user.gid(),
            groups,
            umask: user.umask().unwrap_or(UMASK),
            capabilities: CapabilitySets::new(process.capabilities().as_ref())?,
            no_new_privileges: process.no_new_privileges().unwrap_or(false),
            personality: personality.map(persona).transpose()?,
            console_size: process.console_size(),
            seccomp,
        })
    }

    /// Changes to the working directory; with `make` it is created if missing. Runs in the
    /// container's root, as root, after all descriptors that lead outside are closed: a link like
    /// /proc/self/fd/N must find nothing.
    pub(super) fn enter_cwd(&self, make: bool) -> Result<()> {
        let what = || format!("cannot enter process.cwd {}", self.cwd.to_string_lossy());
        match rustix::process::chdir(&*self.cwd) {
            Ok(()) => {}
            Err(Errno::NOENT) if make => {
                let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
                let root = rustix::fs::openat(CWD, c"/", flags, Mode::empty()).context(what)?;
                let directory =
                    paths::find_or_make(root.as_fd(), &self.cwd, || Ok(Missing::Directory));
                rustix::process::fchdir(directory.context(what)?).context(what)?;
            }
            Err(error) => return Err(error).context(what),
        }
        // With a shared PID namespace a link may lead into another process's root; getcwd then
        // returns a path without a leading slash.
        if self.cwd.as_c_str() != c"/"
            && !rustix::process::getcwd(Vec::new())
                .context(what)?
                .to_bytes()
                .starts_with(b"/")
        {
            return Err(CreateError::other(what(), "it is outside of the container"));
        }
        Ok(())
    }

    /// The user to become. Runs in the container's root.
    fn user(&self) -> Result<User> {
        let Some(name) = &self.name else {
            return Ok(User {
                uid: self.uid,
                gid: self.gid,
                groups: self.groups.iter().map(|gid| gid.as_raw()).collect(),
                home: None,
            });
        };
        let user = users::find(name).map_err(|why| CreateError::invalid("process.user", why))?;
        // The agent gave the streams to the spec's numeric user. /dev/stdout must open for this
        // one.
        for stream in 0..3 {
            // SAFETY: the three are open, and stay so while this process prepares itself.
            super::give(unsafe { BorrowedFd::borrow_raw(stream) }, user.uid);
        }
        Ok(user)
    }

    /// An entry for HOME, if the environment has none: programs expect it.
    fn home(&self, user: &User) -> Option<CString> {
        if self
            .environment
            .iter()
            .any(|entry| entry.to_bytes().starts_with(b"HOME="))
        {
            return None;
        }
        let home = match &user.home {
            Some(home) => home.clone(),
            None => users::home_of(user.uid),
        };
        // A home with a NUL byte is ignored.
        CString::new(format!("HOME={home}")).ok()
    }

    /// Drops what the process must not have, and looks its command up with the remaining rights.
    pub(super) fn become_user(&self) -> Result<Executable> {
        if let Some(personality) = self.personality {
            // SAFETY: takes a number.
            if unsafe { libc::personality(personality) } < 0 {
                return Err(std::io::Error::last_os_error())
                    .context(|| "cannot set linux.personality");
            }
        }
        let user = self.user()?;
        let home = self.home(&user);
        self.capabilities.drop_bounding()?;
        if !self.no_new_privileges {
            // Without no_new_privs it takes CAP_SYS_ADMIN, which is about to go.
            self.load_seccomp()?;
        }
        if user.uid != 0 {
            CapabilitySets::keep_over_setuid()?;
        }
        let groups: Vec<Gid> = user.groups.iter().map(|gid| Gid::from_raw(*gid)).collect();
        rustix::thread::set_thread_groups(&groups)
            .context(|| "cannot set process.user.additionalGids")?;
        let gid = Gid::from_raw(user.gid);
        rustix::thread::set_thread_res_gid(gid, gid, gid)
            .context(|| format!("cannot set process.user.gid {}", user.gid))?;
        let uid = Uid::from_raw(user.uid);
        rustix::thread::set_thread_res_uid(uid, uid, uid)
            .context(|| format!("cannot set process.user.uid {}", user.uid))?;
        self.capabilities.apply()?;
        if self.no_new_privileges {
            sys::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0)
                .context(|| "cannot set process.noNewPrivileges")?;
        }
        rustix::process::umask(Mode::from_raw_mode(self.umask));
        Ok(Executable {
            path: self.find_command()?,
            arguments: sys::pointers(self.arguments.iter()),
            environment: sys::pointers(self.environment.iter().chain(&home)),
            _home: home,
        })
    }

    fn load_seccomp(&self) -> Result<()> {
        self.seccomp.as_ref().map_or(Ok(()), |filter| filter.load())
    }

    /// Looks up the command's path as a shell would.
    fn find_command(&self) -> Result<CString> {
        let name = self.arguments[0].to_bytes();
        let path = self
            .environment
            .iter()
            .find_map(|entry| entry.to_bytes().strip_prefix(b"PATH="))
            .filter(|path| !path.is_empty());
        find_command(name, path.unwrap_or(DEFAULT_PATH), &mut examine)
    }

    /// With no_new_privs, loads the filter, which needs no privileges then: as late as possible, so
    /// that it has to let through less.
    pub(super) fn confine(&self) -> Result<()> {
        match self.no_new_privileges {
            true => self.load_seccomp(),
            false => Ok(()),
        }
    }

    /// Executes the command. Returns only on failure.
    pub(super) fn execute(&self, executable: &Executable) -> CreateError {
        if let Err(error) = reset_signals() {
            return error;
        }
        let error = sys::execve(
            &executable.path,
            &executable.arguments,
            &executable.environment,
        );
        let message = format!(
            "cannot execute {}: {}",
            executable.path.to_string_lossy(),
            reason(&error)
        );
        match error.raw_os_error() {
            // Also when a script's interpreter, or a program's loader, is missing.
            Some(libc::ENOENT | libc::ENOTDIR) => CreateError::CommandNotFound(message),
            Some(
                libc::EACCES
                | libc::EPERM
                | libc::ENOEXEC
                | libc::EISDIR
                | libc::ELIBBAD
                | libc::EINVAL
                | libc::ETXTBSY
                | libc::ELOOP,
            ) => CreateError::NotExecutable(message),
            _ => CreateError::Other(message),
        }
    }
}

/// Resets signals to what a new process expects. `clone3` has reset the agent's handlers; left are
/// its mask, and SIGPIPE, the only signal that the agent ignores.
pub(super) fn reset_signals() -> Result<()> {
    // SAFETY: an empty set is a valid set, and SIG_DFL is a valid disposition.
    let failed = unsafe {
        let mut empty = std::mem::zeroed();
        libc::sigemptyset(&mut empty);
        libc::sigprocmask(libc::SIG_SETMASK, &empty, std::ptr::null_mut()) < 0
            || libc::signal(libc::SIGPIPE, libc::SIG_DFL) == libc::SIG_ERR
    };
    if failed {
        Err(std::io::Error::last_os_error()).context(|| "cannot reset signals")
    } else {
        Ok(())
    }
}

fn persona(personality: &LinuxPersonality) -> Result<libc::c_ulong> {
    if personality
        .flags()
        .as_ref()
        .is_some_and(|flags| !flags.is_empty())
    {
        return Err(CreateError::unsupported(
            "linux.personality.flags",
            "none are defined",
        ));
    }
    Ok(match personality.domain() {
        LinuxPersonalityDomain::PerLinux => PER_LINUX,
        LinuxPersonalityDomain::PerLinux32 => PER_LINUX32,
    })
}

/// What is at a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Found {
    Nothing,
    Executable,
    /// Something that cannot be executed, and why.
    Other(&'static str),
}

fn examine(path: &CStr) -> Found {
    let access = rustix::fs::accessat(CWD, path, Access::EXEC_OK, AtFlags::EACCESS);
    let permitted = match access {
        Ok(()) => true,
        Err(Errno::ACCESS) => return Found::Other("permission denied"),
        Err(Errno::LOOP) => return Found::Other("too many levels of symbolic links"),
        // A seccomp filter forbids the check; `execve` decides.
        Err(Errno::PERM | Errno::NOSYS) => false,
        Err(_) => return Found::Nothing,
    };
    let Ok(stat) = rustix::fs::stat(path) else {
        return Found::Nothing;
    };
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile if permitted || stat.st_mode & 0o111 != 0 => Found::Executable,
        FileType::RegularFile => Found::Other("permission denied"),
        FileType::Directory => Found::Other("is a directory"),
        _ => Found::Other("is not a file"),
    }
}

fn find_command(
    name: &[u8],
    path: &[u8],
    examine: &mut dyn FnMut(&CStr) -> Found,
) -> Result<CString> {
    let shown = String::from_utf8_lossy(name);
    let not_executable = |path: &CStr, why| {
        CreateError::NotExecutable(format!("cannot execute {}: {why}", path.to_string_lossy()))
    };
    let candidate = |bytes: Vec<u8>| sys::c_string("process.args", bytes);
    if name.contains(&b'/') {
        let command = candidate(name.to_vec())?;
        return match examine(&command) {
            Found::Executable => Ok(command),
            Found::Nothing => Err(CreateError::CommandNotFound(format!(
                "cannot execute {shown}: no such file or directory"
            ))),
            Found::Other(why) => Err(not_executable(&command, why)),
        };
    }
    let mut refused = None;
    if !name.is_empty() {
        for directory in path.split(|byte| *byte == b':') {
            // An empty entry is the working directory.
            let directory = if directory.is_empty() {
                b"."
            } else {
                directory
            };
            let command = candidate([directory, name].join(&b'/'))?;
            match examine(&command) {
                Found::Executable => return Ok(command),
                Found::Nothing => {}
                Found::Other(why) => refused = refused.or(Some(not_executable(&command, why))),
            }
        }
    }
    Err(refused.unwrap_or_else(|| {
        CreateError::CommandNotFound(format!(
            "cannot execute {shown:?}: not found in the container's PATH"
        ))
    }))
}

/// Puts the three streams where a process expects them.
pub(super) fn set_stdio(
    stdin: BorrowedFd<'_>,
    stdout: BorrowedFd<'_>,
    stderr: BorrowedFd<'_>,
) -> Result<()> {
    for (from, to) in [(stdin, 0), (stdout, 1), (stderr, 2)] {
        sys::duplicate(from, to, 0).context(|| "cannot set up the standard streams")?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn find(name: &str, path: &str, files: &[(&str, Found)]) -> Result<String> {
        find_command(name.as_bytes(), path.as_bytes(), &mut |candidate| {
            let candidate = candidate.to_str().unwrap();
            files
                .iter()
                .find(|(path, _)| *path == candidate)
                .map_or(Found::Nothing, |(_, found)| *found)
        })
        .map(|path| path.into_string().unwrap())
    }

    #[test]
    fn the_first_executable_in_path_wins() {
        let files = [
            ("/b/ls", Found::Other("permission denied")),
            ("/c/ls", Found::Executable),
        ];
        assert_eq!(find("ls", "/a:/b:/c", &files).unwrap(), "/c/ls");
        assert_eq!(
            find("ls", "/a::/b", &[("./ls", Found::Executable)]).unwrap(),
            "./ls"
        );
    }

    #[test]
    fn missing_and_refused_are_kept_apart() {
        let files = [("/b/ls", Found::Other("permission denied"))];
        assert!(matches!(
            find("ls", "/a:/b", &files),
            Err(CreateError::NotExecutable(_))
        ));
        assert!(matches!(
            find("ls", "/a", &files),
            Err(CreateError::CommandNotFound(_))
        ));
        assert!(matches!(
            find("", "/a", &files),
            Err(CreateError::CommandNotFound(_))
        ));
        assert!(matches!(
            find("/b/ls", "/a", &files),
            Err(CreateError::NotExecutable(_))
        ));
        assert!(matches!(
            find("./ls", "/b", &files),
            Err(CreateError::CommandNotFound(_))
        ));
    }

    #[test]
    fn the_system_is_asked_as_told() {
        assert_eq!(examine(c"/bin/sh"), Found::Executable);
        assert_eq!(examine(c"/bin"), Found::Other("is a directory"));
        assert_eq!(examine(c"/etc/hostname/x"), Found::Nothing);
        assert_eq!(examine(c"/etc/passwd"), Found::Other("permission denied"));
    }

    #[test]
    fn wrong_specs_are_named() {
        let plan = |json: &str| {
            let process: Process = serde_json::from_str(json).unwrap();
            ProcessPlan::new(&process, &RawArgs::default(), None, None)
                .unwrap_err()
                .to_string()
        };
        let rest = r#""user":{"uid":0,"gid":0},"cwd":"/""#;
        assert!(plan(&format!(r#"{{{rest},"args":[]}}"#)).contains("process.args"));
        assert!(plan(&format!(r#"{{{rest},"args":["a\u0000b"]}}"#)).contains("NUL"));
        assert!(
            plan(&format!(r#"{{{rest},"args":["a"],"apparmorProfile":"x"}}"#))
                .contains("apparmorProfile")
        );
        assert!(
            plan(&format!(r#"{{{rest},"args":["a"],"selinuxLabel":"x"}}"#))
                .contains("selinuxLabel")
        );
        assert!(
            plan(r#"{"user":{"uid":0,"gid":0},"cwd":"x","args":["a"]}"#).contains("process.cwd")
        );
    }
}
