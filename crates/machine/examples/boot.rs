//! Boots a guest kernel a number of times, without devices, and says how long each took.
//!
//! `cargo run -p hull-machine --example boot -- uml|qemu KERNEL INITRAMFS MEMORY-MIB [TIMES [MARK]]`
//!
//! MARK is a text on the console whose first appearance is timed ("Run /init" if not given). The last console is printed.

use std::os::fd::AsFd;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use hull_machine::{Choice, ConsoleRing, Exit, Kind, MachineSpec, Requirements, choose};
use rustix::event::{PollFd, PollFlags, poll};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [kind, kernel, initramfs, memory, rest @ ..] = arguments.as_slice() else {
        return Err("boot uml|qemu KERNEL INITRAMFS MEMORY-MIB [TIMES [MARK]]".into());
    };
    let times: usize = rest.first().map_or(Ok(1), |times| times.parse())?;
    let mark = rest.get(1).map_or("Run /init", String::as_str);
    let directory = tempfile::tempdir()?;
    let sockets = directory.path().join("sockets");
    std::fs::create_dir(&sockets)?;
    let kind: Kind = kind.parse()?;
    let kernel = PathBuf::from(kernel);
    let choice = choose(
        Some(kind),
        &Requirements {
            hardware_isolation: false,
            uml_kernel: Some(kernel.clone()),
            native_kernel: Some(kernel.clone()),
            data_directory: std::env::temp_dir().join("hull-boot-example"),
        },
    )?;
    // To try KVM where the probe calls it too slow.
    let hardware = choice.hardware || std::env::var_os("BOOT_WITH_KVM").is_some();
    let machine = Choice { hardware, ..choice }.machine()?;
    let spec = MachineSpec {
        kernel,
        initramfs: initramfs.into(),
        memory: memory.parse::<u64>()? << 20,
        cpus: 1,
        sockets,
        nets: Vec::new(),
        disks: 0,
        jail_uid: 60_000,
    };
    let mut all: Vec<[Duration; 3]> = Vec::new();
    for round in 0..times {
        let (mut ring, write) = ConsoleRing::create(&directory.path().join("console"))?;
        let start = Instant::now();
        let started = machine.start(&spec, write)?;
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
        poll(
            &mut [PollFd::from_borrowed_fd(
                started.pidfd.as_fd(),
                PollFlags::IN,
            )],
            None,
        )?;
        let status = hull_jail::Status::reap(started.pidfd.as_fd())?.ok_or("still running")?;
        let ended = start.elapsed();
        all.push([jailed, marked.unwrap_or_default(), ended]);
        if round + 1 == times {
            for line in ring.tail(500) {
                println!("| {line}");
            }
            println!("{status:?}: {}", Exit::interpret(status, &ring.tail(50)));
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
