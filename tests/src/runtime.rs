//! The OCI runtime that engines and the validation suite are tested with, and detection of what it
//! leaves behind.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::{executable, installed, leaks};

/// An OCI runtime with private state: `hull-oci` beside the staged `hull`. While writing a test,
/// `HULL_TEST_RUNTIME=runc` shows whether it passes with a known runtime.
pub struct Runtime {
    /// The script that engines call, which executes the runtime.
    pub path: PathBuf,
    /// The runtime's executable.
    pub program: PathBuf,
    directory: PathBuf,
}

impl Runtime {
    /// The runtime, with its state in a directory.
    pub fn in_directory(directory: &Path) -> Runtime {
        let program = program();
        let runtime = Runtime {
            path: directory.join("runtime"),
            program,
            directory: directory.to_owned(),
        };
        let configuration = directory.join("config.toml");
        fs::write(
            &configuration,
            format!(
                "machine = {:?}\nrun_dir = {:?}\ndata_dir = {:?}\n",
                crate::usual_machine(),
                directory.join("run"),
                directory.join("data")
            ),
        )
        .unwrap();
        // A script passes the configuration, because engines set the environment of their runtime.
        // runc gets a state directory instead, unless the engine sets one.
        let state = if runtime.is_hull() {
            String::new()
        } else {
            format!(
                "case \" $* \" in *' --root '*) ;; *) set -- --root {:?} \"$@\" ;; esac\n",
                directory.join("run")
            )
        };
        let script = format!(
            "#!/bin/sh\nprintf '%s\\n' \"$*\" >>{:?}\n{state}HULL_CONFIG={configuration:?} exec {:?} \"$@\"\n",
            directory.join("calls"),
            runtime.program
        );
        fs::write(&runtime.path, script).unwrap();
        fs::set_permissions(&runtime.path, fs::Permissions::from_mode(0o755)).unwrap();
        runtime
    }

    /// Waits before each call of a command.
    pub fn delay(&self, command: &str, by: Duration) {
        let script = fs::read_to_string(&self.path).unwrap();
        let wait = format!(
            "case \" $* \" in *' {command} '*) sleep {} ;; esac\n",
            by.as_secs_f32()
        );
        let script = script.replacen("#!/bin/sh\n", &format!("#!/bin/sh\n{wait}"), 1);
        fs::write(&self.path, script).unwrap();
    }

    /// Whether the runtime is hull.
    pub fn is_hull(&self) -> bool {
        !["runc", "crun"].contains(&self.program.file_name().unwrap().to_str().unwrap())
    }

    /// What is left of containers: state and control groups with one of their ids in the path.
    /// `beside`: more directories in which engines let the runtime keep state.
    pub fn remains(&self, ids: &[String], beside: &[PathBuf]) -> Vec<String> {
        let mut found = Vec::new();
        let mut places = vec![self.directory.join("run"), self.directory.join("data")];
        places.extend(beside.iter().cloned());
        places.extend(["/run/hull", "/run/hull-oci", "/run/runc"].map(PathBuf::from));
        places.push("/sys/fs/cgroup".into());
        for place in places {
            below(&place, 5, &mut |path| {
                let name = path.file_name().unwrap_or_default().to_string_lossy();
                if ids.iter().any(|id| name.contains(id.as_str())) {
                    found.push(path.display().to_string());
                }
            });
        }
        // Machines have other names than containers.
        if self.is_hull() {
            // `roots` lists the directories in which engines keep state; it stays while those
            // exist.
            found.retain(|path| !path.contains("/run/roots/"));
            below(&self.directory.join("run"), 2, &mut |path| {
                let name = path.file_name().unwrap_or_default();
                let parent = path.parent();
                let named = parent.is_some_and(|parent| parent.ends_with("sandboxes"));
                if name.len() == 64 || named {
                    found.push(path.display().to_string());
                }
            });
            found.sort();
            found.dedup();
        }
        found
    }

    /// Shows the runtime's calls and logs, for a failed test.
    pub fn show_diagnostics(&self) {
        show(&self.directory.join("calls"));
        below(&self.directory.join("run"), 3, &mut |path| {
            let name = path.file_name().unwrap_or_default();
            if [
                "record.json",
                "status.json",
                "sandbox.log",
                "console",
                "log",
                "oci.log",
            ]
            .iter()
            .any(|file| name == *file)
            {
                show(path);
            }
        });
    }
}

/// Prints the end of a file.
pub(crate) fn show(path: &Path) {
    if let Ok(bytes) = fs::read(path) {
        let text = String::from_utf8_lossy(&bytes);
        let lines: Vec<&str> = text.lines().collect();
        eprintln!("--- {}", path.display());
        eprintln!("{}", lines[lines.len().saturating_sub(40)..].join("\n"));
    }
}

/// What an engine's containers left: processes, mounts, and paths with one of their ids.
pub(crate) fn problems(
    runtime: &Runtime,
    directory: &Path,
    ids: &[String],
    beside: &[PathBuf],
    except: &[i32],
) -> Vec<String> {
    let mut problems = leaks::leaked_processes_except(Duration::from_secs(10), except);
    problems.extend(leaks::mounts_below(directory));
    problems.extend(runtime.remains(ids, beside));
    problems
}

/// Checks that an engine can be tested here.
///
/// # Panics
/// Without root, or if one of the programs is missing: `make test` installs them.
pub fn needs(programs: &[&str]) {
    assert!(
        rustix::process::geteuid().is_root(),
        "hull runs containers as root only, for now"
    );
    for program in programs {
        assert!(
            installed(program),
            "{program} is not installed: scripts/setup test"
        );
    }
}

fn program() -> PathBuf {
    let Some(name) = std::env::var_os("HULL_TEST_RUNTIME") else {
        let path = executable().with_file_name("hull-oci");
        assert!(path.exists(), "{} is not there: make stage", path.display());
        return path;
    };
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .map(|directory| directory.join(&name))
        .find(|path| path.exists())
        .unwrap_or_else(|| panic!("HULL_TEST_RUNTIME: no {}", Path::new(&name).display()))
}

/// Calls `visit` for everything below a directory, up to a depth. Does not follow symbolic links.
fn below(directory: &Path, depth: u32, visit: &mut dyn FnMut(&Path)) {
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        let path = entry.path();
        visit(&path);
        if depth > 1 && entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            below(&path, depth - 1, visit);
        }
    }
}
