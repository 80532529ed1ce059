//! `hull api`, and the docker command line that talks to it.

use std::ffi::OsStr;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

use rustix::process::{Pid, Signal};
use serde_json::Value;

use crate::docker::program;
use crate::{Hull, Invocation, Output, Running, eventually, runtime};

/// A private hull that serves Docker's API.
pub struct Api {
    /// Its containers, images and configuration.
    pub hull: Hull,
    /// Images are built.
    buildah: bool,
    server: Option<Running>,
}

impl Api {
    /// Serves the containers of a hull.
    pub fn new(hull: Hull) -> Api {
        Api::serve(hull, false)
    }

    /// The same with a buildah of its own.
    pub fn with_buildah(hull: Hull) -> Api {
        Api::serve(hull, true)
    }

    fn serve(hull: Hull, buildah: bool) -> Api {
        runtime::needs(&["docker"]);
        let mut api = Api {
            hull,
            buildah,
            server: None,
        };
        api.start();
        api
    }

    /// Begins to serve, after [`Api::stop`].
    pub fn start(&mut self) {
        let server = self.hull.hull(["api"]);
        let server = match self.buildah {
            true => self.hull.with_buildah(server),
            false => server,
        };
        self.server = Some(server.limit(Duration::from_secs(600)).start());
        eventually("the API is served", Duration::from_secs(10), || {
            UnixStream::connect(self.socket()).is_ok()
        });
    }

    /// The process that serves.
    pub fn server_pid(&self) -> Pid {
        self.server.as_ref().unwrap().pid()
    }

    /// The path of its socket.
    pub fn socket(&self) -> PathBuf {
        self.hull.path("run/api.sock")
    }

    /// The environment that leads clients to it.
    pub fn environment(&self, invocation: Invocation) -> Invocation {
        invocation
            .env("DOCKER_HOST", format!("unix://{}", self.socket().display()))
            .env("DOCKER_CONFIG", self.hull.path("client"))
            .env("DOCKER_BUILDKIT", "0")
    }

    /// `docker …`.
    pub fn docker<A: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = A>) -> Invocation {
        let docker = Invocation::new(program("docker"));
        self.environment(docker)
            .args(arguments)
            .limit(Duration::from_secs(60))
    }

    /// `docker run --rm [OPTIONS] busybox COMMAND`, run until it exits.
    pub fn run(&self, options: &[&str], command: &[&str]) -> Output {
        self.docker(["run", "--rm"])
            .args(options)
            .arg("busybox")
            .args(command)
            .run()
    }

    /// A request without a client: its status and the object in its answer.
    pub fn ask(&self, method: &str, path: &str, body: &str) -> (u16, Value) {
        let mut stream = UnixStream::connect(self.socket()).unwrap();
        stream
            .set_read_timeout(Some(Duration::from_secs(20)))
            .unwrap();
        let length = body.len();
        write!(
            stream,
            "{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n{body}"
        )
        .unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        (status, serde_json::from_str(body).unwrap_or(Value::Null))
    }

    /// A request that takes over its connection, which is returned when that is granted.
    pub fn upgrade(&self, path: &str, body: &str) -> UnixStream {
        let mut stream = UnixStream::connect(self.socket()).unwrap();
        let length = body.len();
        write!(
            stream,
            "POST {path} HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n\
             Content-Type: application/json\r\nContent-Length: {length}\r\n\r\n{body}"
        )
        .unwrap();
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            let mut byte = [0];
            stream.read_exact(&mut byte).unwrap();
            head.push(byte[0]);
        }
        let head = String::from_utf8_lossy(&head);
        assert!(head.starts_with("HTTP/1.1 101 "), "{head}");
        stream
    }

    /// Ends the server.
    pub fn stop(&mut self) -> Output {
        let server = self.server.take().unwrap();
        server.signal(Signal::TERM);
        server.finish()
    }

    /// Fails if anything is left of its containers.
    pub fn assert_clean(&mut self) {
        self.stop().ok();
        self.hull.assert_clean();
    }
}

impl Drop for Api {
    fn drop(&mut self) {
        if let Some(server) = self.server.take() {
            server.signal(Signal::TERM);
            let _ = server.finish();
        }
    }
}
