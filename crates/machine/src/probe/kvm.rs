//! Whether KVM runs guest code on the processor.
//!
//! Some hosts have a `/dev/kvm` that accepts every call and then interprets guest kernel code a
//! thousand times slower than the processor (KVM nested in a paravirtual one). So the probe creates
//! a guest that counts in 64-bit kernel mode, and measures its speed. It runs in a forked child
//! under an alarm, because KVM_RUN of a broken KVM may not return.

#![allow(unsafe_code)]

use std::io::Read;
use std::os::fd::AsRawFd;
use std::time::Duration;

use super::KvmState;

/// Million instructions per second below which KVM interprets. A processor executes thousands, an
/// emulator with nested paging hundreds, an interpreter one or two.
const INTERPRETED_BELOW: u64 = 20;

/// Duration of the measurement.
const MEASURED: Duration = Duration::from_millis(30);

/// Timeout in seconds after which the probe is killed.
const PROBE_TIMEOUT: u32 = 3;

/// Whether `/dev/kvm` can be opened.
pub fn openable() -> Result<(), KvmState> {
    match std::fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/kvm")
    {
        Ok(_) => Ok(()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Err(KvmState::Absent),
        Err(error) if error.kind() == std::io::ErrorKind::PermissionDenied => {
            Err(KvmState::NoPermission)
        }
        // ENXIO, ENODEV: a device node without a driver.
        Err(_) => Err(KvmState::Absent),
    }
}

/// Tries KVM.
pub fn probe() -> KvmState {
    if let Err(state) = openable() {
        return state;
    }
    let answer = fork_and_read(|| match platform::measure(MEASURED) {
        Ok(rate) => format!("{rate}"),
        Err(why) => format!("!{why}"),
    });
    match answer {
        None => KvmState::Fails {
            why: format!("guest code did not come back within {PROBE_TIMEOUT} s"),
        },
        Some(answer) => match (answer.strip_prefix('!'), answer.parse::<u64>()) {
            (None, Ok(rate)) if rate >= INTERPRETED_BELOW => KvmState::Works {
                million_per_second: rate,
            },
            (None, Ok(rate)) => KvmState::Pretends {
                million_per_second: rate,
            },
            (Some(why), _) => KvmState::Fails {
                why: why.to_owned(),
            },
            (None, Err(_)) => KvmState::Fails {
                why: "the probe died".into(),
            },
        },
    }
}

/// Runs `question` in a forked child, under the alarm.
pub fn in_child(question: fn() -> bool) -> bool {
    fork_and_read(|| if question() { "y".into() } else { "n".into() }).as_deref() == Some("y")
}

/// Whether this process can trace a child, as a user-mode kernel does.
pub fn tracing_works() -> bool {
    // SAFETY: a plain fork; the child makes system calls only and exits. The parent waits for that
    // very child.
    unsafe {
        let child = libc::fork();
        if child == 0 {
            let traced = libc::ptrace(libc::PTRACE_TRACEME, 0, 0, 0) == 0;
            if traced {
                libc::raise(libc::SIGSTOP);
            }
            libc::_exit(i32::from(!traced));
        }
        let mut status = 0;
        if child < 0 || libc::waitpid(child, &mut status, libc::WUNTRACED) != child {
            return false;
        }
        let stopped = libc::WIFSTOPPED(status);
        if stopped {
            libc::kill(child, libc::SIGKILL);
            libc::waitpid(child, &mut status, 0);
        }
        stopped
    }
}

/// Runs `work` in a forked child and returns its text; `None` if the alarm killed it.
fn fork_and_read(work: impl FnOnce() -> String) -> Option<String> {
    let (read, write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).ok()?;
    // SAFETY: the child runs `work`, writes and exits without returning to the caller's code. Its
    // memory is a copy; callers are single-threaded commands, and should a lock be held after all,
    // the alarm ends the child.
    match unsafe { libc::fork() } {
        0 => {
            // SAFETY: the default action of the alarm's signal ends the process; `write` is open.
            unsafe {
                libc::signal(libc::SIGALRM, libc::SIG_DFL);
                libc::alarm(PROBE_TIMEOUT);
                let answer = work();
                libc::write(write.as_raw_fd(), answer.as_ptr().cast(), answer.len());
                libc::_exit(0)
            }
        }
        child if child > 0 => {
            drop(write);
            let mut answer = String::new();
            let read = std::fs::File::from(read)
                .take(4096)
                .read_to_string(&mut answer);
            let mut status = 0;
            // SAFETY: waits for the child just forked.
            unsafe { libc::waitpid(child, &mut status, 0) };
            (read.is_ok() && !libc::WIFSIGNALED(status)).then_some(answer)
        }
        _ => None,
    }
}

#[cfg(target_arch = "x86_64")]
mod platform {
    use std::time::Duration;

    use rustix::time::{ClockId, clock_gettime};

    use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_segment, kvm_userspace_memory_region};
    use kvm_ioctls::{Kvm, VcpuExit};

    /// Iterations between two exits to this process. Interpreted, they take ten milliseconds.
    const LOOPS: u32 = 10_000;
    /// Guest memory: page tables in the first pages, then the code.
    const MEMORY: usize = 0x10000;
    const PML4: u64 = 0x1000;
    const PDPT: u64 = 0x2000;
    const PD: u64 = 0x3000;
    const CODE: u64 = 0x8000;
    /// mov ecx, LOOPS; 1: dec ecx; jnz 1b; out 0x80, al; jmp to the start
    const PROGRAM: [u8; 13] = {
        let n = LOOPS.to_le_bytes();
        [
            0xb9, n[0], n[1], n[2], n[3], 0xff, 0xc9, 0x75, 0xfc, 0xe6, 0x80, 0xeb, 0xf3,
        ]
    };

    #[repr(C, align(4096))]
    struct Memory([u8; MEMORY]);

    /// Measures millions of instructions per second in 64-bit kernel mode.
    pub fn measure(during: Duration) -> Result<u64, String> {
        let failed = |what: &'static str| move |error| format!("{what}: {error}");
        let kvm = Kvm::new().map_err(failed("opening /dev/kvm"))?;
        for (capability, name) in hull_device_control::monitor::CAPABILITIES {
            if kvm.check_extension_raw(capability.into()) <= 0 {
                return Err(format!("it does not support {name}"));
            }
        }
        let vm = kvm
            .create_vm()
            .map_err(failed("creating a virtual machine"))?;

        let mut memory = Box::new(Memory([0; MEMORY]));
        let mut entry = |at: u64, value: u64| {
            memory.0[at as usize..][..8].copy_from_slice(&value.to_le_bytes());
        };
        // Present, writable; the last one maps 2 MiB at address 0.
        entry(PML4, PDPT | 3);
        entry(PDPT, PD | 3);
        entry(PD, 0x83);
        memory.0[CODE as usize..][..PROGRAM.len()].copy_from_slice(&PROGRAM);
        let region = kvm_userspace_memory_region {
            slot: 0,
            flags: 0,
            guest_phys_addr: 0,
            memory_size: MEMORY as u64,
            userspace_addr: memory.0.as_ptr() as u64,
        };
        // SAFETY: the memory outlives the virtual machine, and this process does not access it from
        // here on.
        unsafe { vm.set_user_memory_region(region) }.map_err(failed("giving it memory"))?;
        let mut vcpu = vm.create_vcpu(0).map_err(failed("creating a processor"))?;
        let cpuid = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(failed("reading the processor's features"))?;
        vcpu.set_cpuid2(&cpuid)
            .map_err(failed("setting the processor's features"))?;

        let mut sregs = vcpu.get_sregs().map_err(failed("reading registers"))?;
        let data = kvm_segment {
            limit: 0xffff_ffff,
            selector: 0x10,
            type_: 3,
            present: 1,
            s: 1,
            g: 1,
            db: 1,
            ..Default::default()
        };
        sregs.cs = kvm_segment {
            selector: 8,
            type_: 11,
            l: 1,
            db: 0,
            ..data
        };
        (sregs.ds, sregs.es, sregs.ss) = (data, data, data);
        sregs.cr3 = PML4;
        sregs.cr4 |= 1 << 5; // physical address extension
        sregs.cr0 |= 1 << 31 | 1; // paging, protection
        sregs.efer |= 1 << 10 | 1 << 8; // long mode: active, enabled
        vcpu.set_sregs(&sregs)
            .map_err(failed("setting registers"))?;
        let mut regs = vcpu.get_regs().map_err(failed("reading registers"))?;
        regs.rip = CODE;
        regs.rflags = 2;
        vcpu.set_regs(&regs).map_err(failed("setting registers"))?;

        let mut round = || match vcpu.run() {
            Ok(VcpuExit::IoOut(0x80, _)) => Ok(()),
            Ok(other) => Err(format!("unexpected exit: {other:?}")),
            Err(error) => Err(format!("running guest code: {error}")),
        };
        // The first round includes KVM's lazy setup.
        round()?;
        let (start, mut rounds) = (processor_time(), 0u64);
        while processor_time().saturating_sub(start) < during {
            round()?;
            rounds += 1;
        }
        let took = processor_time().saturating_sub(start);
        let instructions = rounds as f64 * f64::from(LOOPS) * 2.0;
        Ok((instructions / took.as_secs_f64() / 1e6) as u64)
    }

    /// Processor time of this thread, that of its guest included: on a busy host, others have their
    /// turns, which says nothing of KVM.
    fn processor_time() -> Duration {
        let time = clock_gettime(ClockId::ThreadCPUTime);
        Duration::new(
            time.tv_sec.unsigned_abs(),
            time.tv_nsec.unsigned_abs() as u32,
        )
    }
}

#[cfg(not(target_arch = "x86_64"))]
mod platform {
    use std::time::Duration;

    pub fn measure(_during: Duration) -> Result<u64, String> {
        Err(format!(
            "timing KVM is not supported on {}",
            std::env::consts::ARCH
        ))
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    #[test]
    fn the_probe_answers_in_time() {
        let start = Instant::now();
        let state = probe();
        println!("kvm: {state}");
        assert!(start.elapsed() < Duration::from_secs(u64::from(PROBE_TIMEOUT) + 2));
    }
}
