//! Writable block devices for tests: loop devices on files of the test.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

/// A loop device, detached on drop: declare it before its users.
pub struct LoopDevice {
    /// Its node on the host.
    pub path: PathBuf,
    /// Its major number.
    pub major: u32,
    /// Its minor number.
    pub minor: u32,
    directory: tempfile::TempDir,
}

impl LoopDevice {
    /// A loop device with this content; `None`, with the reason reported, if there are no loop
    /// devices.
    pub fn new(content: &[u8]) -> Option<LoopDevice> {
        let directory = tempfile::Builder::new()
            .prefix("l")
            .tempdir_in("/tmp")
            .unwrap();
        let file = directory.path().join("file");
        fs::write(&file, content).unwrap();
        let output = Command::new("losetup")
            .args(["--find", "--show"])
            .arg(&file)
            .output();
        let output = match output {
            Ok(output) if output.status.success() => output,
            Ok(output) => {
                let error = String::from_utf8_lossy(&output.stderr);
                crate::left_out(&format!("no loop device is to be had: {}", error.trim()));
                return None;
            }
            Err(error) => {
                crate::left_out(&format!("no loop device is to be had: losetup: {error}"));
                return None;
            }
        };
        let path = PathBuf::from(String::from_utf8(output.stdout).unwrap().trim());
        let device = fs::metadata(&path).unwrap().rdev();
        Some(LoopDevice {
            major: rustix::fs::major(device),
            minor: rustix::fs::minor(device),
            path,
            directory,
        })
    }

    /// The backing file.
    pub fn file(&self) -> PathBuf {
        self.directory.path().join("file")
    }

    /// Its numbers as `7:0`.
    pub fn numbers(&self) -> String {
        format!("{}:{}", self.major, self.minor)
    }

    /// Whether it is still attached to its file.
    fn attached(&self) -> bool {
        let backing = format!("/sys/dev/block/{}/loop/backing_file", self.numbers());
        fs::read_to_string(backing).is_ok_and(|path| Path::new(path.trim()) == self.file())
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        let _ = Command::new("losetup")
            .arg("--detach")
            .arg(&self.path)
            .output();
        // It is detached once it is no longer open.
        let begin = Instant::now();
        while self.attached() {
            if begin.elapsed() > Duration::from_secs(5) {
                let problem = format!("{} is still in use", self.path.display());
                if std::thread::panicking() {
                    eprintln!("left behind: {problem}");
                    return;
                }
                panic!("left behind: {problem}");
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}
