//! Pods by CRI, with runc's shim and hull's as two runtimes of one containerd.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use hull_tests::Containerd;
use hull_tests::cri::{Cri, PodConfig, container};

use crate::Options;
use crate::contestants::{Contestant, Setup};
use crate::report::{Better, Results};

const READY: &str = "pod ready: to the first container's output";
const SECOND: &str = "pod: a second container's output";
const EXEC: &str = "pod: exec true";
const REMOVED: &str = "pod removed";
const TEN: &str = "ten pods at once: to the last output";

/// How long output may take.
const OUTPUT: Duration = Duration::from_secs(60);

/// Prints something at once, and ends when it is told to.
const SCRIPT: &str = "echo ready; trap 'exit 0' TERM; sleep 1000 & wait";

/// A pod of one of the runtimes.
struct Pod<'a> {
    containerd: &'a Containerd,
    cri: Cri,
    config: PodConfig,
    id: String,
}

impl<'a> Pod<'a> {
    fn run(containerd: &'a Containerd, handler: &str, name: &str) -> Result<Self> {
        let cri = containerd.cri();
        let mut config = containerd.pod(name);
        config.log_directory = containerd.path(name).display().to_string();
        let id = cri.run_pod(&config, handler).map_err(anyhow::Error::msg)?;
        Ok(Self {
            containerd,
            cri,
            config,
            id,
        })
    }

    /// Starts a container, until its output is in its log.
    fn start(&self, name: &str) -> Result<String> {
        let config = container(name, SCRIPT);
        let log = self.config.log_directory.clone() + "/" + &config.log_path;
        let id = self.cri.create(&self.id, &self.config, config);
        let id = id.map_err(anyhow::Error::msg)?;
        self.cri.start(&id).map_err(anyhow::Error::msg)?;
        let begin = Instant::now();
        while !fs::read_to_string(&log).is_ok_and(|text| text.contains("ready")) {
            if begin.elapsed() > OUTPUT {
                bail!("no output of {name} in {log}");
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(id)
    }

    fn remove(self) -> Result<()> {
        self.cri.remove_pod(&self.id).map_err(anyhow::Error::msg)?;
        fs::remove_dir_all(self.containerd.path(&self.config.hostname))?;
        Ok(())
    }
}

/// Milliseconds of a call.
fn timed<T>(call: impl FnOnce() -> Result<T>) -> Result<(f64, T)> {
    let begin = Instant::now();
    let done = call()?;
    Ok((begin.elapsed().as_secs_f64() * 1e3, done))
}

/// A pod, from its start to its removal; and ten of them at once.
pub fn measure(options: &Options, setup: &Setup, results: &mut Results) -> Result<()> {
    // The tests' containerd is one for machines of kind uml.
    let Some(machine) = setup.machines.iter().find(|machine| **machine == "uml") else {
        return Ok(());
    };
    for row in [READY, SECOND, EXEC, REMOVED, TEN] {
        results.row(row, "ms", Better::Lower);
    }
    let containerd = Containerd::with_pods();
    let contestants = [
        ("runc", Contestant::Runc),
        ("hull", Contestant::Hull(machine)),
    ];
    for round in 0..=options.rounds(20) {
        for (handler, contestant) in contestants {
            let name = format!("{handler}-{round}");
            let (ready, pod) = timed(|| {
                let pod = Pod::run(&containerd, handler, &name)?;
                pod.start("one").map(|id| (pod, id))
            })?;
            let (pod, one) = pod;
            let (second, _) = timed(|| pod.start("two"))?;
            let (exec, _) = timed(|| {
                let done = pod.cri.exec(&one, &["true"]).map_err(anyhow::Error::msg)?;
                match done.status {
                    0 => Ok(()),
                    status => bail!("true ended with {status}"),
                }
            })?;
            let (removed, ()) = timed(|| pod.remove())?;
            if round > 0 {
                let figures = [
                    (READY, ready),
                    (SECOND, second),
                    (EXEC, exec),
                    (REMOVED, removed),
                ];
                for (row, figure) in figures {
                    results.add(row, contestant, figure);
                }
            }
        }
    }
    for round in 0..options.rounds(5) {
        for (handler, contestant) in contestants {
            let (all, pods) = timed(|| {
                std::thread::scope(|scope| {
                    let starting: Vec<_> = (0..10)
                        .map(|number| {
                            let name = format!("{handler}-{round}-{number}");
                            let containerd = &containerd;
                            scope.spawn(move || {
                                let pod = Pod::run(containerd, handler, &name)?;
                                pod.start("one").map(|_| pod)
                            })
                        })
                        .collect();
                    let started = starting.into_iter().map(|pod| match pod.join() {
                        Ok(pod) => pod,
                        Err(_) => bail!("a thread of the bench panicked"),
                    });
                    started.collect::<Result<Vec<_>>>()
                })
            })?;
            results.add(TEN, contestant, all);
            pods.into_iter().try_for_each(Pod::remove)?;
        }
    }
    containerd.assert_clean();
    Ok(())
}
