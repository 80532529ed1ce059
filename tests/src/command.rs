//! Commands that cannot hang a test: each has a time limit, after which its output is shown.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

/// A command about to run.
#[must_use]
pub struct Invocation {
    command: Command,
    input: Option<Vec<u8>>,
    output: Option<(PathBuf, PathBuf)>,
    limit: Duration,
}

/// Result of a command.
#[derive(Debug)]
pub struct Output {
    /// The command line, for messages.
    pub what: String,
    /// Exit status; 128 + n after signal n.
    pub status: i32,
    /// Standard output.
    pub stdout: Vec<u8>,
    /// Standard error.
    pub stderr: Vec<u8>,
    /// How long it ran.
    pub took: Duration,
}

impl Invocation {
    /// A command with an empty standard input and a limit of 30 seconds.
    pub fn new(program: impl AsRef<OsStr>) -> Invocation {
        Invocation {
            command: Command::new(program),
            input: None,
            output: None,
            limit: Duration::from_secs(30),
        }
    }

    /// Adds an argument.
    pub fn arg(mut self, argument: impl AsRef<OsStr>) -> Self {
        self.command.arg(argument);
        self
    }

    /// Adds arguments.
    pub fn args<A: AsRef<OsStr>>(mut self, arguments: impl IntoIterator<Item = A>) -> Self {
        self.command.args(arguments);
        self
    }

    /// Sets an environment variable.
    pub fn env(mut self, name: &str, value: impl AsRef<OsStr>) -> Self {
        self.command.env(name, value);
        self
    }

    /// Provides standard input: these bytes, then end of file.
    pub fn input(mut self, bytes: impl Into<Vec<u8>>) -> Self {
        self.input = Some(bytes.into());
        self
    }

    /// Redirects standard output and standard error to files, for commands that leave processes
    /// running with them open.
    pub fn output_to(mut self, stdout: &Path, stderr: &Path) -> Self {
        self.output = Some((stdout.to_owned(), stderr.to_owned()));
        self
    }

    /// Sets the time limit.
    pub fn limit(mut self, limit: Duration) -> Self {
        self.limit = limit;
        self
    }

    /// Modifies the underlying command.
    pub fn with(mut self, change: impl FnOnce(&mut Command)) -> Self {
        change(&mut self.command);
        self
    }

    /// The same command, run by another one.
    pub fn under(self, wrapper: &[&str]) -> Invocation {
        let mut command = Command::new(wrapper[0]);
        command
            .args(&wrapper[1..])
            .arg(self.command.get_program())
            .args(self.command.get_args());
        for (name, value) in self.command.get_envs() {
            if let Some(value) = value {
                command.env(name, value);
            }
        }
        Invocation { command, ..self }
    }

    /// The underlying command and its time limit.
    pub fn into_parts(self) -> (Command, Duration) {
        (self.command, self.limit)
    }

    /// Runs the command until it exits.
    pub fn run(self) -> Output {
        let input = self.input.clone();
        let mut running = self.start_with(if input.is_some() {
            Stdio::piped()
        } else {
            Stdio::null()
        });
        if let Some(input) = input {
            let mut stdin = running.stdin.take().unwrap();
            // A command need not read all of it.
            std::thread::spawn(move || drop(stdin.write_all(&input)));
        }
        running.finish()
    }

    /// Starts the command; the test controls its standard input.
    pub fn start(self) -> Running {
        self.start_with(Stdio::piped())
    }

    fn start_with(mut self, stdin: Stdio) -> Running {
        let what = format!("{:?}", self.command);
        let end = |file: Option<&PathBuf>| match file {
            None => Stdio::piped(),
            Some(path) => File::create(path).unwrap().into(),
        };
        let files = self.output.as_ref();
        let mut child = self
            .command
            .stdin(stdin)
            .stdout(end(files.map(|files| &files.0)))
            .stderr(end(files.map(|files| &files.1)))
            .spawn()
            .unwrap_or_else(|error| panic!("{what}: {error}"));
        let (stdout, stderr) = match self.output {
            None => (
                Collected::of(child.stdout.take().unwrap()),
                Collected::of(child.stderr.take().unwrap()),
            ),
            Some((stdout, stderr)) => (Collected::File(stdout), Collected::File(stderr)),
        };
        Running {
            what,
            stdin: child.stdin.take(),
            child,
            stdout,
            stderr,
            began: Instant::now(),
            limit: self.limit,
        }
    }
}

/// A running command.
pub struct Running {
    what: String,
    child: Child,
    /// Its standard input; take it to close it.
    pub stdin: Option<ChildStdin>,
    stdout: Collected,
    stderr: Collected,
    began: Instant,
    limit: Duration,
}

impl Running {
    /// Writes to its standard input.
    pub fn write(&mut self, bytes: impl AsRef<[u8]>) {
        let stdin = self.stdin.as_mut().expect("stdin is closed");
        stdin.write_all(bytes.as_ref()).unwrap();
        stdin.flush().unwrap();
    }

    /// Closes its standard input.
    pub fn close_input(&mut self) {
        self.stdin = None;
    }

    /// Waits until its standard output contains `text`.
    pub fn wait_for(&mut self, text: &str) {
        loop {
            if String::from_utf8_lossy(&self.stdout.so_far()).contains(text) {
                return;
            }
            let ended = self.child.try_wait().unwrap();
            if ended.is_some() || self.began.elapsed() > self.limit {
                panic!("{}: no {text:?} in its output\n{}", self.what, self.shown());
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Its standard output so far.
    pub fn so_far(&self) -> String {
        String::from_utf8_lossy(&self.stdout.so_far()).into_owned()
    }

    /// Its process id.
    pub fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) {
        kill_process(self.pid(), signal).unwrap();
    }

    /// Whether it is still running.
    pub fn is_running(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    /// Waits until it exits.
    pub fn finish(mut self) -> Output {
        use std::os::unix::process::ExitStatusExt;
        let status = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break status;
            }
            if self.began.elapsed() > self.limit * crate::patience() {
                let _ = self.child.kill();
                let _ = self.child.wait();
                panic!(
                    "{}: still running after {:?}\n{}",
                    self.what,
                    self.limit,
                    self.shown()
                );
            }
            std::thread::sleep(Duration::from_millis(2));
        };
        let took = self.began.elapsed();
        let what = self.what;
        Output {
            status: status
                .code()
                .unwrap_or_else(|| 128 + status.signal().unwrap_or(0)),
            stdout: self.stdout.all(&what, "standard output"),
            stderr: self.stderr.all(&what, "standard error"),
            what,
            took,
        }
    }

    fn shown(&self) -> String {
        format!(
            "standard output: {}\nstandard error: {}",
            String::from_utf8_lossy(&self.stdout.so_far()),
            String::from_utf8_lossy(&self.stderr.so_far())
        )
    }
}

/// Whether a line reports the progress of a pull.
fn is_progress(line: &str) -> bool {
    let layer = line.split(": ").next().unwrap_or_default();
    line.starts_with("pulling ")
        || layer.len() == 12 && layer.bytes().all(|byte| byte.is_ascii_hexdigit())
}

/// Destination of output.
enum Collected {
    /// Read by a thread, so that no pipe fills up.
    Read {
        bytes: Arc<Mutex<Vec<u8>>>,
        reader: JoinHandle<()>,
    },
    /// Written to this file.
    File(PathBuf),
}

impl Collected {
    fn of(mut source: impl Read + Send + 'static) -> Collected {
        let bytes = Arc::new(Mutex::new(Vec::new()));
        let into = bytes.clone();
        let reader = std::thread::spawn(move || {
            let mut chunk = vec![0; 64 << 10];
            while let Ok(n @ 1..) = source.read(&mut chunk) {
                into.lock().unwrap().extend_from_slice(&chunk[..n]);
            }
        });
        Collected::Read { bytes, reader }
    }

    fn so_far(&self) -> Vec<u8> {
        match self {
            Collected::Read { bytes, .. } => bytes.lock().unwrap().clone(),
            Collected::File(path) => std::fs::read(path).unwrap(),
        }
    }

    fn all(self, what: &str, stream: &str) -> Vec<u8> {
        let (bytes, reader) = match self {
            Collected::Read { bytes, reader } => (bytes, reader),
            Collected::File(path) => return std::fs::read(path).unwrap(),
        };
        let begin = Instant::now();
        while !reader.is_finished() {
            assert!(
                begin.elapsed() < Duration::from_secs(10),
                "{what}: has ended, but somebody keeps its {stream} open"
            );
            std::thread::sleep(Duration::from_millis(2));
        }
        reader.join().unwrap();
        std::mem::take(&mut bytes.lock().unwrap())
    }
}

impl Output {
    /// Standard output as text, without trailing newlines.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout)
            .trim_end_matches('\n')
            .to_owned()
    }

    /// Standard error as text.
    pub fn error(&self) -> String {
        String::from_utf8_lossy(&self.stderr).into_owned()
    }

    /// Standard output as JSON.
    #[track_caller]
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.stdout)
            .unwrap_or_else(|error| panic!("{}: no JSON: {error}: {}", self.what, self.text()))
    }

    /// Asserts that it succeeded.
    #[track_caller]
    pub fn ok(self) -> Output {
        self.ends(0)
    }

    /// Asserts its exit status.
    #[track_caller]
    pub fn ends(self, status: i32) -> Output {
        assert_eq!(
            self.status,
            status,
            "exit status of {}\nstandard output: {}\nstandard error: {}",
            self.what,
            self.text(),
            self.error()
        );
        self
    }

    /// Asserts that hull failed with this status and reported it properly: one line that starts
    /// with `error: ` and contains each of `parts`, and at most one more line, a hint.
    #[track_caller]
    pub fn fails(self, status: i32, parts: &[&str]) -> Output {
        let output = self.ends(status);
        let error = output.error();
        let line = error.lines().find(|line| line.starts_with("error: "));
        let line = line
            .unwrap_or_else(|| panic!("{}: no line begins with \"error: \": {error}", output.what));
        for part in parts {
            assert!(
                line.contains(part),
                "{}: no {part:?} in {line:?}",
                output.what
            );
        }
        let lines = error
            .lines()
            .filter(|line| !line.starts_with("hint: ") && !is_progress(line))
            .count();
        assert_eq!(
            lines, 1,
            "{}: one line and a hint are enough: {error}",
            output.what
        );
        output
    }

    /// Asserts that there is a hint containing `part`.
    #[track_caller]
    pub fn hint(self, part: &str) -> Output {
        let error = self.error();
        let hint = error.lines().find(|line| line.starts_with("hint: "));
        assert!(
            hint.is_some_and(|hint| hint.contains(part)),
            "{}: no hint {part:?}: {error}",
            self.what
        );
        self
    }
}
