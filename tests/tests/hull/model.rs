//! Containers, volumes and networks that come and go in any order: what is there is what a model of
//! a few lines says.

use std::collections::{BTreeMap, BTreeSet};

use hull_tests::Hull;

/// The model.
#[derive(Default)]
struct Model {
    containers: BTreeMap<String, Uses>,
    volumes: BTreeSet<String>,
    networks: BTreeSet<String>,
}

/// What a container uses.
struct Uses {
    volumes: BTreeSet<String>,
    network: String,
}

/// Marsaglia's xorshift64: the order is another one at each run, and known from its seed.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % bound
    }

    /// Not the beginning of an id, which is hexadecimal.
    fn name(&mut self, prefix: &str, bound: u64) -> String {
        format!("{prefix}{}", self.below(bound))
    }
}

impl Model {
    fn uses_volume(&self, name: &str) -> bool {
        let mut all = self.containers.values();
        all.any(|container| container.volumes.contains(name))
    }

    fn uses_network(&self, name: &str) -> bool {
        let mut all = self.containers.values();
        all.any(|container| container.network == name)
    }

    /// One command, and whether it is to succeed.
    fn step(&mut self, random: &mut Random, prefix: &str) -> (Vec<String>, bool) {
        let words = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect();
        let container = random.name("n", 40);
        let volume = random.name("v", 8);
        let network = random.name(prefix, 4);
        match random.below(20) {
            0..8 => {
                let volumes: BTreeSet<String> =
                    (0..random.below(3)).map(|_| random.name("v", 8)).collect();
                let network = match random.below(2) {
                    0 => "none".to_owned(),
                    _ => network,
                };
                let mut command = vec!["create".into(), "--name".into(), container.clone()];
                command.extend(["--network".into(), network.clone()]);
                for volume in &volumes {
                    command.extend(["-v".into(), format!("{volume}:/{volume}")]);
                }
                command.extend(["busybox".into(), "true".into()]);
                let is_there = network == "none" || self.networks.contains(&network);
                let succeeds = is_there && !self.containers.contains_key(&container);
                if succeeds {
                    self.volumes.extend(volumes.iter().cloned());
                    self.containers.insert(container, Uses { volumes, network });
                }
                (command, succeeds)
            }
            8..12 => {
                let command = words(&["rm", &container]);
                (command, self.containers.remove(&container).is_some())
            }
            12..14 => {
                let to = random.name("n", 40);
                let command = words(&["rename", &container, &to]);
                let is_free = !self.containers.contains_key(&to);
                let renamed = match is_free {
                    true => self.containers.remove(&container),
                    false => None,
                };
                let succeeds = renamed.is_some();
                if let Some(uses) = renamed {
                    self.containers.insert(to, uses);
                }
                (command, succeeds)
            }
            14 => {
                self.volumes.insert(volume.clone());
                (words(&["volume", "create", &volume]), true)
            }
            15 => {
                let succeeds = !self.uses_volume(&volume) && self.volumes.remove(&volume);
                (words(&["volume", "rm", &volume]), succeeds)
            }
            16..18 => {
                let number: u64 = network.trim_start_matches(prefix).parse().unwrap();
                let subnet = format!("10.253.{number}.0/24");
                let command = words(&["network", "create", "--subnet", &subnet, &network]);
                (command, self.networks.insert(network))
            }
            18 => {
                let succeeds = !self.uses_network(&network) && self.networks.remove(&network);
                (words(&["network", "rm", &network]), succeeds)
            }
            _ => {
                // All of them, seldom.
                if random.below(10) != 0 {
                    return (words(&["volume", "inspect", &volume]), {
                        self.volumes.contains(&volume)
                    });
                }
                self.containers.clear();
                (words(&["container", "prune", "--force"]), true)
            }
        }
    }

    fn check(&self, hull: &Hull, prefix: &str) {
        let lines = |arguments: &[&str]| {
            let text = hull.hull(arguments).run().ok().text();
            text.lines().map(str::to_owned).collect::<BTreeSet<_>>()
        };
        let names: BTreeSet<_> = self.containers.keys().cloned().collect();
        assert_eq!(lines(&["ps", "-a", "--format", "{{.Names}}"]), names);
        assert_eq!(lines(&["volume", "ls", "-q"]), self.volumes);
        let mut networks = lines(&["network", "ls", "-q"]);
        networks.retain(|name| name.starts_with(prefix));
        assert_eq!(networks, self.networks);
    }
}

#[test]
fn what_is_created_and_removed_in_any_order_is_what_is_there() {
    let hull = Hull::new();
    let seed = std::process::id();
    println!("seed {seed}");
    let mut random = Random(u64::from(seed) | 1 << 40);
    let mut model = Model::default();
    let prefix = format!("m{seed}-");
    let mut created = 0;
    let mut steps = 0;
    while created < 200 {
        let (command, succeeds) = model.step(&mut random, &prefix);
        created += i32::from(succeeds && command[0] == "create");
        let output = hull.hull(&command).run();
        assert_eq!(
            output.status == 0,
            succeeds,
            "step {steps}, {command:?}: {}",
            output.error()
        );
        steps += 1;
        if steps % 20 == 0 {
            model.check(&hull, &prefix);
        }
    }
    model.check(&hull, &prefix);
    hull.hull(["container", "prune", "-f"]).run().ok();
    hull.hull(["volume", "prune", "-a", "-f"]).run().ok();
    for network in &model.networks {
        hull.hull(["network", "rm", network]).run().ok();
    }
    model = Model::default();
    model.check(&hull, &prefix);
    hull.assert_clean();
}
