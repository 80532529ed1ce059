//! Files in a directory of the host (`-v DIRECTORY:/work`): the fs device against the same
//! directory through runc, which is the host's own, on an ext4 created for it. The host's cache is
//! warm; the guest's is cold, as each measurement uses a new container.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use serde_json::Value;

use crate::contestants::{Contestant, Root, Running, Setup, run};
use crate::report::{Better, Results};
use crate::{Options, all};

/// Number of files in the tree that is unpacked.
const TREE: usize = 20_000;
/// Number of files written, stat'ed, read and removed as git does.
const SMALL: usize = 5_000;

/// fio's jobs: row, unit, additional arguments.
const JOBS: [(&str, &str, &[&str]); 4] = [
    (
        "files: sequential read, 1 GiB",
        "MB/s",
        &["--rw=read", "--bs=1M", "--filename=/work/big", "--size=1G"],
    ),
    (
        "files: sequential write, 256 MiB and fsync",
        "MB/s",
        &[
            "--rw=write",
            "--bs=1M",
            "--filename=/work/written",
            "--size=256M",
            "--end_fsync=1",
        ],
    ),
    (
        "files: random read, 4 KiB",
        "IOPS",
        &[
            "--rw=randread",
            "--bs=4k",
            "--filename=/work/big",
            "--size=1G",
            "--time_based",
            "--runtime=5",
        ],
    ),
    (
        "files: random write, 4 KiB",
        "IOPS",
        &[
            "--rw=randwrite",
            "--bs=4k",
            "--filename=/work/written",
            "--size=256M",
            "--time_based",
            "--runtime=5",
        ],
    ),
];

/// A new ext4 with a journal, in a file, mounted until this is dropped. Independent of the host's
/// file system: ext4 without a journal checks every recently deleted inode before it allocates one,
/// so each unpacking would pay for the removals before it.
struct Disk {
    mounted: PathBuf,
}

impl Disk {
    fn new(directory: &Path) -> Result<Self> {
        let image = directory.join("work.ext4");
        fs::File::create(&image)?.set_len(8 << 30)?;
        run(Command::new("mkfs.ext4").arg("-qF").arg(&image))?;
        let mounted = directory.join("work");
        fs::create_dir(&mounted)?;
        run(Command::new("mount")
            .args(["-o", "loop"])
            .arg(&image)
            .arg(&mounted))?;
        Ok(Self { mounted })
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        if let Err(error) = run(Command::new("umount").arg(&self.mounted)) {
            eprintln!("{error:#}");
        }
    }
}

/// Runs the measurements.
pub fn measure(options: &Options, setup: &Setup, results: &mut Results) -> Result<()> {
    let disk = Disk::new(&setup.directory)?;
    let work = disk.mounted.clone();
    run(Command::new("dd")
        .args(["if=/dev/urandom", "bs=1M", "count=1024"])
        .arg(format!("of={}/big", work.display())))?;
    let count = archive(&work)?;
    let unpack = format!("files: untar of {count} files");
    let list = format!("files: ls -lR of {count} files");
    let small = ["write", "look at", "read", "remove"]
        .map(|what| format!("files: {what} {SMALL} small files"));
    for (name, unit, _) in JOBS {
        results.row(name, unit, Better::Higher);
    }
    for name in [&unpack, &list].into_iter().chain(&small) {
        results.row(name, "s", Better::Lower);
    }
    for round in 0..options.rounds(3) {
        for contestant in all(setup) {
            if contestant.is_slow() && round > 0 {
                continue;
            }
            let fresh = || setup.start(contestant, Root::Tools, Some(&work));
            for (name, unit, arguments) in JOBS {
                if let Some(value) = fio(&fresh()?, contestant, arguments, unit)? {
                    results.add(name, contestant, value);
                }
            }
            let tree = work.join("tree");
            fs::create_dir(&tree)?;
            let command = [
                "work",
                "time",
                "/gnu/tar",
                "-xf",
                "/work/tree.tar",
                "-C",
                "/work/tree",
            ];
            let unpacked = fresh()?.seconds(&command)?;
            for seconds in &unpacked {
                results.add(&unpack, contestant, *seconds);
            }
            if !unpacked.is_empty() {
                let command = ["work", "time", "/gnu/ls", "-lR", "/work/tree"];
                for seconds in fresh()?.seconds(&command)? {
                    results.add(&list, contestant, seconds);
                }
            }
            fs::remove_dir_all(&tree)?;
            let seconds =
                fresh()?.seconds(&["work", "small", "/work/small", &SMALL.to_string()])?;
            // A run that timed out leaves its files.
            let _ = fs::remove_dir_all(work.join("small"));
            for (name, seconds) in small.iter().zip(seconds) {
                results.add(name, contestant, seconds);
            }
            let _ = fs::remove_file(work.join("written"));
        }
    }
    Ok(())
}

fn fio(
    container: &Running<'_>,
    contestant: Contestant,
    arguments: &[&str],
    unit: &str,
) -> Result<Option<f64>> {
    let mut command = vec![
        "/gnu/fio",
        "--name=job",
        "--ioengine=psync",
        "--invalidate=0",
        "--output-format=json",
    ];
    command.extend(arguments);
    let Some(text) = container.output(&command)? else {
        return Ok(None);
    };
    // fio may print messages before its JSON.
    let begin = text
        .find('{')
        .with_context(|| format!("{}: fio printed no JSON: {text}", contestant.name()))?;
    let value: Value = serde_json::from_str(&text[begin..])?;
    let job = &value["jobs"][0];
    let side = if arguments[0].contains("read") {
        &job["read"]
    } else {
        &job["write"]
    };
    let key = if unit == "IOPS" { "iops" } else { "bw_bytes" };
    let value = side[key]
        .as_f64()
        .with_context(|| format!("fio did not say {key}"))?;
    Ok(Some(if unit == "IOPS" { value } else { value / 1e6 }))
}

/// Creates an archive of this machine's files: real names, sizes, directories.
fn archive(work: &Path) -> Result<usize> {
    let script = format!(
        "find /usr/include /usr/share /usr/lib/python3 /usr/src -xdev -type f -size -200k 2>/dev/null | LC_ALL=C sort | \
         head -n {TREE} >\"$1/list\"; tar -cf \"$1/tree.tar\" -C / -T \"$1/list\" 2>/dev/null; wc -l <\"$1/list\""
    );
    let output = Command::new("sh")
        .args(["-c", &script, "-"])
        .arg(work)
        .output()?;
    Ok(String::from_utf8(output.stdout)?.trim().parse()?)
}
