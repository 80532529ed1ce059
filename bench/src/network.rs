//! A container's network: both contestants as OCI runtimes, in network namespaces with the same
//! setup (`place`), with the same servers. runc's container is in its namespace; hull's guest is
//! behind it. "In" is towards the container.
//!
//! All traffic is between the bench's own namespaces, for a few seconds each. Servers and clients
//! exit by themselves after a while, in case the bench is killed.

mod place;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use serde_json::{Value, json};

use self::place::{Host, Pod};
use crate::contestants::{Contestant, Root, Setup};
use crate::oci::call;
use crate::report::{Better, Results};
use crate::{Options, all};

/// Ports of the container's servers, besides iperf3's.
const HTTP: &str = "8080";
const CLOSING: &str = "8081";
/// Maximum lifetime of the container's servers in seconds.
const LIFE: &str = "180";
/// UDP rate in Mbit/s, and the size of a datagram, which is not fragmented.
const UDP_RATE: &str = "200M";
const UDP_LENGTH: &str = "1448";
/// Numbers of parallel connections for the highest request rate; clients that connect.
const AT_ONCE: [&str; 2] = ["1", "16"];
const CLIENTS: &str = "8";

/// Directions, and iperf3's options for them.
const DIRECTIONS: [(&str, &[&str]); 2] = [("in", &[]), ("out", &["-R"])];
const STREAMS: [(&str, &str); 2] = [("1 stream", "1"), ("8 streams", "8")];

/// Runs the measurements.
pub fn measure(options: &Options, setup: &Setup, results: &mut Results) -> Result<()> {
    traffic_rows(results);
    // Seconds for each measurement.
    let seconds = if options.quick { "2" } else { "5" };
    for round in 0..options.rounds(3) {
        for contestant in all(setup) {
            if contestant.is_slow() && round > 0 {
                continue;
            }
            let server = Server::start(setup, contestant)?;
            let mut measuring = Measuring {
                server: &server,
                results,
                seconds,
            };
            measuring.tcp()?;
            measuring.udp()?;
            measuring.http()?;
            measuring.connections()?;
        }
    }
    oci_start(options, setup, results)?;
    run_start(options, setup, results)
}

fn traffic_rows(results: &mut Results) {
    for (direction, _) in DIRECTIONS {
        for (streams, _) in STREAMS {
            let name = format!("network: TCP {direction}, {streams}");
            results.row(&name, "Gbit/s", Better::Higher);
        }
        results.row(&own_cpu(direction), "s", Better::Lower);
        results.row(&whole_cpu(direction), "s", Better::Lower);
    }
    for (direction, _) in DIRECTIONS {
        let [arrived, lost, jitter] = udp_names(direction);
        results.row(&arrived, "Mbit/s", Better::Higher);
        results.row(&lost, "%", Better::Lower);
        results.row(&jitter, "ms", Better::Lower);
    }
    for connections in AT_ONCE {
        let [rate, half, most] = http_names(connections);
        results.row(&rate, "1/s", Better::Higher);
        results.row(&half, "ms", Better::Lower);
        results.row(&most, "ms", Better::Lower);
    }
    results.row(CONNECTIONS, "1/s", Better::Higher);
}

const CONNECTIONS: &str = "network: connect and close";

fn own_cpu(direction: &str) -> String {
    format!("  CPU per GB {direction}: the container's processes")
}

fn whole_cpu(direction: &str) -> String {
    format!("  CPU per GB {direction}: the whole machine")
}

fn udp_names(direction: &str) -> [String; 3] {
    let name = format!("network: UDP {direction}, 200 Mbit/s");
    ["arrived", "lost", "jitter"].map(|what| format!("{name}: {what}"))
}

fn http_names(connections: &str) -> [String; 3] {
    let name = format!("network: HTTP, {connections} at once");
    ["requests", "median", "99 of 100"].map(|what| format!("{name}: {what}"))
}

/// A container in a namespace with a network, and its servers.
struct Server<'a> {
    setup: &'a Setup,
    contestant: Contestant,
    id: String,
    pod: Pod,
    host: Host,
}

impl<'a> Server<'a> {
    fn start(setup: &'a Setup, contestant: Contestant) -> Result<Self> {
        let host = Host::new()?;
        let pod = host.pod()?;
        let command = format!("/gnu/iperf3 -s & exec net serve {HTTP} {CLOSING} {LIFE}");
        let server = Self {
            setup,
            contestant,
            id: setup.unique(),
            pod,
            host,
        };
        let bundle = bundle(setup, &server.id, Some(&server.pod), &command)?;
        start(setup, contestant, &server.id, &bundle)?;
        for port in [HTTP, CLOSING] {
            server.client(&["wait", &server.pod.address, port, "60"])?;
        }
        Ok(server)
    }

    /// Runs a command in the clients' namespace; returns its output.
    fn on_host(&self, command: &mut Command) -> Result<String> {
        let output = self
            .host
            .namespace
            .enter(command)
            .stderr(Stdio::inherit())
            .output()
            .with_context(|| format!("{command:?}"))?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        if !output.status.success() {
            let name = self.contestant.name();
            bail!("{name}: {command:?}: {}: {text}", output.status);
        }
        Ok(text)
    }

    /// Runs the clients of `bench/guest/net.c`.
    fn client(&self, arguments: &[&str]) -> Result<String> {
        let program = self.setup.root(Root::Tools).join("bin/net");
        self.on_host(Command::new(program).args(arguments))
    }

    fn iperf(&self, arguments: &[&str]) -> Result<Value> {
        let mut command = Command::new("timeout");
        command
            .args(["60", "iperf3", "--json", "-c", &self.pod.address])
            .args(arguments);
        // The server may not listen yet, or still be busy with the previous client.
        let mut tries = 0;
        loop {
            let failure = match self.on_host(&mut command) {
                Ok(text) => {
                    let answer: Value = serde_json::from_str(&text)?;
                    // Some failures are not in its exit code.
                    match answer.get("error") {
                        None => return Ok(answer),
                        Some(error) => anyhow!("iperf3: {error}"),
                    }
                }
                Err(error) => error,
            };
            tries += 1;
            if tries == 10 {
                return Err(failure);
            }
            sleep(Duration::from_millis(500));
        }
    }

    /// Processor time of the container's processes on the host, in seconds.
    fn cpu(&self) -> Result<f64> {
        let own = |group: &str, file: &str| {
            fs::read_to_string(format!("/sys/fs/cgroup/{group}{}/{file}", self.id)).ok()
        };
        for group in ["cpuacct/", "cpu,cpuacct/"] {
            if let Some(text) = own(group, "cpuacct.usage") {
                return Ok(text.trim().parse::<f64>()? / 1e9);
            }
        }
        let text = own("", "cpu.stat").context("no control group of the container")?;
        let usage = text
            .lines()
            .find_map(|line| line.strip_prefix("usage_usec "))
            .context("cpu.stat has no usage_usec")?;
        Ok(usage.parse::<f64>()? / 1e6)
    }
}

impl Drop for Server<'_> {
    fn drop(&mut self) {
        if let Err(error) = delete(self.setup, self.contestant, &self.id) {
            eprintln!("{error:#}");
        }
    }
}

/// Busy time of the machine's processors, in seconds.
fn busy() -> Result<f64> {
    let text = fs::read_to_string("/proc/stat")?;
    let ticks: Vec<f64> = text
        .lines()
        .next()
        .unwrap_or_default()
        .split_whitespace()
        .skip(1)
        .map(str::parse)
        .collect::<Result<_, _>>()?;
    // user, nice, system, irq, softirq; without idle and iowait.
    let sum: f64 = [0, 1, 2, 5, 6]
        .iter()
        .filter_map(|column| ticks.get(*column))
        .sum();
    Ok(sum / 100.0)
}

/// The measurements of one container.
struct Measuring<'a> {
    server: &'a Server<'a>,
    results: &'a mut Results,
    seconds: &'static str,
}

impl Measuring<'_> {
    fn add(&mut self, name: &str, value: f64) {
        self.results.add(name, self.server.contestant, value);
    }

    fn tcp(&mut self) -> Result<()> {
        for (direction, arguments) in DIRECTIONS {
            for (streams, count) in STREAMS {
                let before = (self.server.cpu()?, busy()?);
                let mut all = vec!["-t", self.seconds, "-P", count];
                all.extend(arguments);
                let value = self.server.iperf(&all)?;
                let after = (self.server.cpu()?, busy()?);
                let received = &value["end"]["sum_received"];
                let rate = number(&received["bits_per_second"])?;
                let gigabytes = number(&received["bytes"])? / 1e9;
                let name = format!("network: TCP {direction}, {streams}");
                self.add(&name, rate / 1e9);
                if count == "1" {
                    self.add(&own_cpu(direction), (after.0 - before.0) / gigabytes);
                    self.add(&whole_cpu(direction), (after.1 - before.1) / gigabytes);
                }
            }
        }
        Ok(())
    }

    fn udp(&mut self) -> Result<()> {
        for (direction, arguments) in DIRECTIONS {
            let mut all = vec!["-u", "-b", UDP_RATE, "-l", UDP_LENGTH, "-t", self.seconds];
            all.extend(arguments);
            let value = self.server.iperf(&all)?;
            let sum = &value["end"]["sum"];
            let length: f64 = UDP_LENGTH.parse()?;
            let arrived = number(&sum["packets"])? - number(&sum["lost_packets"])?;
            let rate = arrived * length * 8.0 / self.seconds.parse::<f64>()? / 1e6;
            let values = [
                rate,
                number(&sum["lost_percent"])?,
                number(&sum["jitter_ms"])?,
            ];
            for (name, value) in udp_names(direction).iter().zip(values) {
                self.add(name, value);
            }
        }
        Ok(())
    }

    fn http(&mut self) -> Result<()> {
        let url = format!("http://{}:{HTTP}/", self.server.pod.address);
        for connections in AT_ONCE {
            let mut command = Command::new("timeout");
            command
                .args(["60", "wrk", "--latency", "--threads", "1"])
                .args(["--connections", connections, "--duration", self.seconds])
                .arg(&url);
            let text = self.server.on_host(&mut command)?;
            if let Some(line) = text.lines().find(|line| line.contains("Socket errors")) {
                eprintln!("  {}: {}", self.server.contestant.name(), line.trim());
            }
            for (name, value) in http_names(connections).iter().zip(wrk(&text)?) {
                self.add(name, value);
            }
        }
        Ok(())
    }

    fn connections(&mut self) -> Result<()> {
        let address = &self.server.pod.address;
        let text = self
            .server
            .client(&["connect", address, CLOSING, self.seconds, CLIENTS])?;
        self.add(CONNECTIONS, text.trim().parse()?);
        Ok(())
    }
}

fn number(value: &Value) -> Result<f64> {
    value
        .as_f64()
        .with_context(|| format!("iperf3 did not say a number, but {value}"))
}

/// Requests per second, and the median and the 99th percentile of latency in milliseconds, from the
/// output of wrk.
fn wrk(text: &str) -> Result<[f64; 3]> {
    let value = |key: &str| {
        let word = text
            .lines()
            .find_map(|line| line.trim().strip_prefix(key))
            .with_context(|| format!("wrk did not say {key}: {text}"))?;
        Ok::<_, anyhow::Error>(word.trim().to_owned())
    };
    let time = |key: &str| {
        let word = value(key)?;
        let (number, factor) = ["us", "ms", "s"]
            .iter()
            .zip([1e-3, 1.0, 1e3])
            .find_map(|(unit, factor)| Some((word.strip_suffix(unit)?, factor)))
            .with_context(|| format!("not a time of wrk's: {word}"))?;
        Ok::<_, anyhow::Error>(number.parse::<f64>()? * factor)
    };
    Ok([value("Requests/sec:")?.parse()?, time("50%")?, time("99%")?])
}

/// A bundle in a pod's namespace, or in an empty one that the runtime creates.
fn bundle(setup: &Setup, id: &str, pod: Option<&Pod>, command: &str) -> Result<PathBuf> {
    let bundle = setup.bundle(Root::Tools, &["sh", "-c", command], None)?;
    let path = bundle.join("config.json");
    let mut spec: Value = serde_json::from_slice(&fs::read(&path)?)?;
    // The cgroup whose processor time is read.
    spec["linux"]["cgroupsPath"] = json!(format!("/{id}"));
    if let Some(namespaces) = spec["linux"]["namespaces"].as_array_mut()
        && let Some(pod) = pod
    {
        for namespace in namespaces {
            if namespace["type"] == "network" {
                namespace["path"] = json!(pod.namespace.path());
            }
        }
    }
    // iperf3 maps a file with its data.
    if let Some(mounts) = spec["mounts"].as_array_mut() {
        mounts.push(json!({"destination": "/tmp", "type": "tmpfs", "source": "tmpfs"}));
    }
    fs::write(&path, spec.to_string())?;
    Ok(bundle)
}

fn start(setup: &Setup, contestant: Contestant, id: &str, bundle: &Path) -> Result<()> {
    let mut create = setup.oci(contestant);
    call(create.args(["create", "-b"]).arg(bundle).arg(id))?;
    call(setup.oci(contestant).args(["start", id]))
}

fn delete(setup: &Setup, contestant: Contestant, id: &str) -> Result<()> {
    call(setup.oci(contestant).args(["delete", "--force", id]))
}

/// Cost of a network for `create`, `start` and `delete`: each round without and with one.
fn oci_start(options: &Options, setup: &Setup, results: &mut Results) -> Result<()> {
    let names = ["without a network", "with a network", "added by it"]
        .map(|what| format!("network: create, start, delete, {what}"));
    for name in &names {
        results.row(name, "ms", Better::Lower);
    }
    let host = Host::new()?;
    for round in 0..=options.rounds(20) {
        for contestant in all(setup) {
            if contestant.is_slow() && round > options.rounds(4) {
                continue;
            }
            let mut took = [0.0; 2];
            for (with, took) in took.iter_mut().enumerate() {
                let pod = (with == 1).then(|| host.pod()).transpose()?;
                let id = setup.unique();
                let bundle = bundle(setup, &id, pod.as_ref(), "exit 0")?;
                let begin = Instant::now();
                let started = start(setup, contestant, &id, &bundle);
                // Also deletes a container that did not start.
                delete(setup, contestant, &id)?;
                started?;
                *took = begin.elapsed().as_secs_f64() * 1e3;
            }
            if round > 0 {
                results.add(&names[0], contestant, took[0]);
                results.add(&names[1], contestant, took[1]);
                // The ratio of two differences, one of them about zero, is meaningless.
                if contestant != Contestant::Runc {
                    results.add(&names[2], contestant, took[1] - took[0]);
                }
            }
        }
    }
    Ok(())
}

/// Cost of `--network default` for `hull run`, including its plugins, on a host that is one of the
/// bench's own namespaces.
fn run_start(options: &Options, setup: &Setup, results: &mut Results) -> Result<()> {
    let names = ["--network none", "--network default", "added by it"]
        .map(|what| format!("network: run --rm IMAGE true, {what}"));
    for name in &names {
        results.row(name, "ms", Better::Lower);
    }
    let host = Host::new()?;
    for round in 0..=options.rounds(20) {
        for machine in &setup.machines {
            let contestant = Contestant::Hull(machine);
            if contestant.is_slow() && round > options.rounds(4) {
                continue;
            }
            let mut took = [0.0; 2];
            for (network, took) in ["none", "default"].iter().zip(&mut took) {
                let mut command =
                    host.namespace
                        .enter(&setup.hull_run(machine, network, &["true"]));
                let begin = Instant::now();
                call(command.stdout(Stdio::null()))?;
                *took = begin.elapsed().as_secs_f64() * 1e3;
            }
            if round > 0 {
                let values = [took[0], took[1], took[1] - took[0]];
                for (name, value) in names.iter().zip(values) {
                    results.add(name, contestant, value);
                }
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn what_wrk_prints_is_understood() {
        let text = "Running 1s test @ http://127.0.0.1:18080/\n  1 threads and 4 connections\n  \
                    Thread Stats   Avg      Stdev     Max   +/- Stdev\n    \
                    Latency   420.83us    1.12ms  12.15ms   90.98%\n  Latency Distribution\n     \
                    50%   63.00us\n     75%   93.00us\n     90%    1.33ms\n     99%    5.64ms\n  \
                    42407 requests in 1.01s, 5.22MB read\nRequests/sec:  42155.88\n";
        assert_eq!(wrk(text).unwrap(), [42155.88, 0.063, 5.64]);
        assert!(wrk("nothing").is_err());
    }
}
