//! Boots a guest kernel a number of times, without devices, and says how long each took.
//!
//! `cargo run -p hull-machine --example boot -- uml|qemu KERNEL INITRAMFS MEMORY-MIB [TIMES
//! [MARK]]`
//!
//! MARK is a text on the console whose first appearance is timed ("Run /init" if not given). The
//! last console is printed.

use std::os::fd::AsFd;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use hull_machine::{ConsoleRing, Devices, Host, Kind, MachineConfig, Requirements, Wiring, choose};
use rustix::event::{PollFd, PollFlags, poll};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [kind, kernel, initramfs, memory, rest @ ..] = arguments.as_slice() else {
        return Err("boot uml|qemu KERNEL INITRAMFS MEMORY-MIB [TIMES [MARK]]".into());
    };
    let times: usize = rest.first().map_or(Ok(1), |times| times.parse())?;
    let mark = rest.get(1).map_or("Run /init", String::as_str);
    let directory = tempfile::tempdir()?;
    let kind: Kind = kind.parse()?;
    let kernel = PathBuf::from(kernel);
    let choice = choose(
        Some(kind),
        &Requirements {
            hardware_isolation: false,
            host: Host {
                uml_kernel: Some(kernel.clone()),
                native_kernel: Some(kernel.clone()),
                data_directory: std::env::temp_dir().join("hull-boot-example"),
            },
        },
    )?;
    let config = MachineConfig {
        kernel,
        initramfs: initramfs.into(),
        memory: memory.parse::<u64>()? << 20,
        vcpus: 1,
        // To try KVM where the probe calls it too slow.
        hardware: choice.hardware || std::env::var_os("BOOT_WITH_KVM").is_some(),
        isolate_branches: false,
    };
    let mut all: Vec<[Duration; 3]> = Vec::new();
    for round in 0..times {
        let (mut ring, write) = ConsoleRing::create(&directory.path().join("console"))?;
        let start = Instant::now();
        let wiring = Wiring {
            console: write,
            devices: Devices::Sockets(Vec::new()),
            uid: 60_000,
        };
        let mut machine = choice.backend().start(&config, wiring)?;
        let jailed = start.elapsed();
        let mut marked = None;
        loop {
            poll(
                &mut [PollFd::from_borrowed_fd(ring.fd(), PollFlags::IN)],
                None,
            )?;
            let open = ring.drain()?;
            if marked.is_none() && ring.tail(usize::MAX).iter().any(|line| line.contains(mark)) {
                marked = Some(start.elapsed());
            }
            if !open {
                break;
            }
        }
        let pidfd = machine.processes()[0].pidfd.as_fd();
        poll(&mut [PollFd::from_borrowed_fd(pidfd, PollFlags::IN)], None)?;
        let exit = machine.exit().ok_or("still running")?;
        let ended = start.elapsed();
        all.push([jailed, marked.unwrap_or_default(), ended]);
        if round + 1 == times {
            for line in ring.tail(500) {
                println!("| {line}");
            }
            println!("{exit:?}: {}", exit.describe(&ring.tail(50)));
        }
    }
    for (index, what) in ["jailed", mark, "ended"].iter().enumerate() {
        let mut sorted: Vec<f64> = all
            .iter()
            .map(|round| round[index].as_secs_f64() * 1e3)
            .collect();
        sorted.sort_by(f64::total_cmp);
        println!(
            "{what}: min {:.1} ms, median {:.1} ms",
            sorted[0],
            sorted[sorted.len() / 2]
        );
    }
    Ok(())
}
