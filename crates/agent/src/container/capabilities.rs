//! The five capability sets of a process.
//!
//! [`super::process_plan`] calls the three steps in order, around the change of user. Sets are bit
//! masks, as the kernel has them.
#![allow(unsafe_code)]

use oci_spec::runtime::{Capabilities, Capability, LinuxCapabilities};
use rustix::io::Errno;

use super::error::{Context, CreateError, Result};
use super::sys;

/// The final sets of a process.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct CapabilitySets {
    bounding: u64,
    effective: u64,
    permitted: u64,
    inheritable: u64,
    ambient: u64,
}

/// The kernel's numbers.
fn number(capability: Capability) -> u32 {
    use Capability::*;
    match capability {
        Chown => 0,
        DacOverride => 1,
        DacReadSearch => 2,
        Fowner => 3,
        Fsetid => 4,
        Kill => 5,
        Setgid => 6,
        Setuid => 7,
        Setpcap => 8,
        LinuxImmutable => 9,
        NetBindService => 10,
        NetBroadcast => 11,
        NetAdmin => 12,
        NetRaw => 13,
        IpcLock => 14,
        IpcOwner => 15,
        SysModule => 16,
        SysRawio => 17,
        SysChroot => 18,
        SysPtrace => 19,
        SysPacct => 20,
        SysAdmin => 21,
        SysBoot => 22,
        SysNice => 23,
        SysResource => 24,
        SysTime => 25,
        SysTtyConfig => 26,
        Mknod => 27,
        Lease => 28,
        AuditWrite => 29,
        AuditControl => 30,
        Setfcap => 31,
        MacOverride => 32,
        MacAdmin => 33,
        Syslog => 34,
        WakeAlarm => 35,
        BlockSuspend => 36,
        AuditRead => 37,
        Perfmon => 38,
        Bpf => 39,
        CheckpointRestore => 40,
    }
}

/// The highest number above. A newer kernel's higher ones are dropped, up to the first that the
/// kernel does not know.
const LAST: u32 = 40;

fn mask(set: &Option<Capabilities>) -> u64 {
    set.iter()
        .flatten()
        .fold(0, |mask, capability| mask | 1 << number(*capability))
}

impl CapabilitySets {
    /// Without capabilities in the spec, all sets are empty.
    pub(super) fn new(spec: Option<&LinuxCapabilities>) -> Result<CapabilitySets> {
        let Some(spec) = spec else {
            return Ok(CapabilitySets::default());
        };
        let mut sets = CapabilitySets {
            bounding: mask(spec.bounding()),
            effective: mask(spec.effective()),
            permitted: mask(spec.permitted()),
            inheritable: mask(spec.inheritable()),
            ambient: mask(spec.ambient()),
        };
        // The kernel would refuse these with a bare EPERM.
        if sets.effective & !sets.permitted != 0 {
            return Err(CreateError::invalid(
                "process.capabilities.effective",
                "names one that is not permitted",
            ));
        }
        // It would refuse these as well, but other runtimes drop them silently: specs of engines,
        // and of `runc spec`, have ambient capabilities that are not inheritable.
        sets.ambient &= sets.permitted & sets.inheritable;
        Ok(sets)
    }

    /// First step, with all capabilities: drops what no program may ever gain again.
    pub(super) fn drop_bounding(&self) -> Result<()> {
        for number in 0..64 {
            if self.bounding & 1 << number != 0 {
                continue;
            }
            match sys::prctl(libc::PR_CAPBSET_DROP, number, 0) {
                Ok(()) => {}
                // The kernel has no capability of this number.
                Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                    if number > u64::from(LAST) {
                        break;
                    }
                }
                Err(error) => {
                    return Err(error).context(|| format!("cannot drop capability {number}"));
                }
            }
        }
        Ok(())
    }

    /// Before the change of user: lets the permitted set survive it.
    pub(super) fn keep_over_setuid() -> Result<()> {
        sys::prctl(libc::PR_SET_KEEPCAPS, 1, 0).context(|| "cannot keep capabilities over setuid")
    }

    /// Last step.
    pub(super) fn apply(&self) -> Result<()> {
        capset(self).context(|| "cannot set process.capabilities")?;
        // The ambient set is empty: the agent has none, and setuid clears it.
        for number in (0..=LAST).filter(|number| self.ambient & 1 << number != 0) {
            sys::prctl(
                libc::PR_CAP_AMBIENT,
                libc::PR_CAP_AMBIENT_RAISE as libc::c_ulong,
                number.into(),
            )
            .context(|| format!("cannot raise ambient capability {number}"))?;
        }
        Ok(())
    }
}

fn capset(sets: &CapabilitySets) -> rustix::io::Result<()> {
    /// _LINUX_CAPABILITY_VERSION_3: two 32-bit halves per set.
    const VERSION: u32 = 0x2008_0522;
    #[repr(C)]
    struct Header {
        version: u32,
        pid: i32,
    }
    #[repr(C)]
    struct Half {
        effective: u32,
        permitted: u32,
        inheritable: u32,
    }
    let header = Header {
        version: VERSION,
        pid: 0,
    };
    let half = |shift: u32| Half {
        effective: (sets.effective >> shift) as u32,
        permitted: (sets.permitted >> shift) as u32,
        inheritable: (sets.inheritable >> shift) as u32,
    };
    let halves = [half(0), half(32)];
    // SAFETY: header and halves have the layout of version 3 and outlive the call.
    let result = unsafe { libc::syscall(libc::SYS_capset, &raw const header, halves.as_ptr()) };
    if result < 0 {
        return Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::INVAL));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn sets(json: &str) -> Result<CapabilitySets> {
        let spec: LinuxCapabilities = serde_json::from_str(json).unwrap();
        CapabilitySets::new(Some(&spec))
    }

    #[test]
    fn masks() {
        let sets = sets(
            r#"{"bounding":["CAP_CHOWN","CAP_BPF"],"permitted":["CAP_KILL"],"effective":["CAP_KILL"],
                "inheritable":["CAP_KILL"],"ambient":["CAP_KILL"]}"#,
        )
        .unwrap();
        assert_eq!(sets.bounding, 1 | 1 << 39);
        assert_eq!(
            (sets.permitted, sets.effective, sets.ambient),
            (1 << 5, 1 << 5, 1 << 5)
        );
        assert_eq!(
            CapabilitySets::new(None).unwrap(),
            CapabilitySets::default()
        );
    }

    #[test]
    fn impossible_sets_are_named() {
        assert!(
            sets(r#"{"effective":["CAP_KILL"]}"#)
                .unwrap_err()
                .to_string()
                .contains("effective")
        );
    }

    #[test]
    fn an_ambient_capability_that_cannot_be_raised_is_left_out() {
        let sets = sets(r#"{"permitted":["CAP_KILL"],"ambient":["CAP_KILL"]}"#).unwrap();
        assert_eq!(sets.ambient, 0);
    }
}
