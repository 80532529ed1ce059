//! The command lines of QEMU and of the kernel it boots.

use std::ffi::OsString;

use crate::MachineConfig;
use hull_device_control::DeviceConfig;

use crate::wiring::Placed;

/// QEMU's end of the monitor connection.
pub const MONITOR_FD: i32 = 3;

/// Firmware directories of distributions, in addition to QEMU's own.
pub const FIRMWARE: [&str; 2] = ["/usr/share/qemu", "/usr/share/seabios"];

/// Room for the code of the guest that an emulator has translated, bytes. QEMU would take up to 1
/// GiB, beyond any bound on the machine's memory; when it is full, it begins anew.
pub const TRANSLATED_CODE: u64 = 64 << 20;

/// The arguments, including `argv[0]`.
pub fn command_line(program: &str, config: &MachineConfig, devices: &[Placed]) -> Vec<OsString> {
    let mut line: Vec<OsString> = vec![program.into()];
    let mut add = |arguments: &[&str]| line.extend(arguments.iter().map(OsString::from));
    add(&["-no-user-config", "-nodefaults", "-nographic", "-no-reboot"]);
    for firmware in FIRMWARE {
        add(&["-L", firmware]);
    }
    add(&[
        "-sandbox",
        "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
    ]);
    let emulated = format!("tcg,thread=multi,tb-size={}", TRANSLATED_CODE >> 20);
    let (accelerator, processor) = match config.hardware {
        true => ("kvm", "host"),
        false => (emulated.as_str(), "max"),
    };
    add(&["-accel", accelerator, "-cpu", processor]);
    // The firmware starts the kernel itself, without option ROMs, which saves 30 ms.
    add(&[
        "-M",
        "microvm,acpi=off,x-option-roms=off,memory-backend=memory",
    ]);
    let (vcpus, memory) = (
        config.vcpus.to_string(),
        format!("{}K", config.memory >> 10),
    );
    add(&["-smp", &vcpus, "-m", &memory]);
    // Memory is shared with the device process.
    let backend = format!(
        "memory-backend-memfd,id=memory,size={},share=on",
        config.memory
    );
    add(&["-object", &backend]);
    add(&["-kernel", "/kernel", "-initrd", "/initramfs"]);
    let kernel = kernel_command_line(config, &cpuinfo());
    add(&["-append", &kernel]);
    add(&[
        "-chardev",
        "stdio,id=console,signal=off",
        "-serial",
        "chardev:console",
    ]);
    add(&[
        "-chardev",
        &format!("socket,id=monitor,fd={MONITOR_FD}"),
        "-mon",
        "chardev=monitor,mode=control",
    ]);
    for placed in devices {
        let (id, path) = (placed.name.as_str(), placed.path());
        add(&["-chardev", &format!("socket,id={id}-socket,path={path}")]);
        let device = match placed.config {
            DeviceConfig::Fs => "vhost-user-fs-device,tag=hull",
            DeviceConfig::Vsock => "vhost-user-vsock-device",
            DeviceConfig::Entropy => "vhost-user-rng",
            DeviceConfig::Disk { .. } => "vhost-user-blk,num-queues=1",
            // A machine whose disks are all there at boot has no spare ones; its memory is shared
            // with the device process, which cannot give it back.
            DeviceConfig::SpareDisk | DeviceConfig::Balloon => continue,
            DeviceConfig::Net { mac, .. } => {
                // QEMU does not read the address from the device process.
                let mac = mac.map(|byte| format!("{byte:02x}")).join(":");
                add(&[
                    "-netdev",
                    &format!("vhost-user,id={id},chardev={id}-socket"),
                    "-device",
                    &format!("virtio-net-device,netdev={id},mac={mac}"),
                ]);
                continue;
            }
        };
        add(&["-device", &format!("{device},chardev={id}-socket")]);
    }
    line
}

fn cpuinfo() -> String {
    std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default()
}

fn kernel_command_line(config: &MachineConfig, cpuinfo: &str) -> String {
    // Only warnings and errors. A guest without ACPI ends by rebooting (see `-no-reboot`). Memory
    // of single CPUs is mapped by pages, as in crate vmm.
    let mut line = String::from(
        "console=ttyS0 quiet loglevel=5 panic=-1 reboot=t no_timer_check \
         dummy.numdummies=0 fb_tunnels=none percpu_alloc=page",
    );
    if !config.hardware {
        // An emulated guest reads the host's time stamp counter, but on a busy host it cannot
        // calibrate it reliably: it would fall back to a clock with a resolution of ten
        // milliseconds.
        if let Some(frequency) = tsc_khz(cpuinfo) {
            line.push_str(&format!(" tsc=reliable tsc_early_khz={frequency}"));
        }
        if config.vcpus == 1 {
            // Calibrating the local timer takes a tenth of a second; the other one needs none.
            line.push_str(" nolapic_timer");
        }
    }
    line
}

/// Frequency of the host's time stamp counter, derived from the speed of the delay loop that the
/// kernel reports: two loops per cycle.
fn tsc_khz(cpuinfo: &str) -> Option<u64> {
    let line = cpuinfo.lines().find(|line| line.starts_with("bogomips"))?;
    let bogomips: f64 = line.split_once(':')?.1.trim().parse().ok()?;
    (bogomips > 0.0).then_some((bogomips * 500.0).round() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wiring::names;

    #[test]
    fn the_frequency_of_the_time_stamp_counter_is_half_the_bogomips() {
        assert_eq!(
            tsc_khz("processor\t: 0\nbogomips\t: 5192.24\n"),
            Some(2_596_120)
        );
        assert_eq!(tsc_khz("processor\t: 0\n"), None);
    }

    #[test]
    fn devices_are_wired_to_their_sockets() {
        let config = MachineConfig {
            kernel: "/k".into(),
            initramfs: "/i".into(),
            memory: 64 << 20,
            vcpus: 1,
            hardware: false,
            isolate_branches: false,
        };
        let mac = [2, 0, 0, 0, 0, 0xab];
        let devices = names([
            DeviceConfig::Vsock,
            DeviceConfig::Net {
                mac,
                early_enable: true,
            },
        ]);
        let line = command_line("qemu", &config, &devices);
        let line: Vec<_> = line.iter().map(|word| word.to_string_lossy()).collect();
        for word in [
            "socket,id=vsock0-socket,path=/sockets/vsock0",
            "vhost-user-vsock-device,chardev=vsock0-socket",
            "vhost-user,id=net0,chardev=net0-socket",
            "virtio-net-device,netdev=net0,mac=02:00:00:00:00:ab",
            "socket,id=monitor,fd=3",
        ] {
            assert!(
                line.iter().any(|found| found == word),
                "no {word}: {line:?}"
            );
        }
    }
}
