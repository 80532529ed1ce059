//! What option values look like: sizes, processors, names, signals, environment, limits. Each
//! function takes the text of one value and returns it checked, or one line that names the value
//! and says what is wrong with it. Called by the argument parser and by the configuration; touches
//! nothing outside of its argument.

use std::collections::BTreeSet;
use std::ffi::{OsStr, OsString};
use std::fmt;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use crate::error::Context;
use crate::exact;

/// Machine kind as asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Machine {
    /// The first that works here: kvm, uml, qemu.
    Auto,
    /// Hardware virtualization, built-in VMM.
    Kvm,
    /// QEMU, with hardware virtualization or emulation.
    Qemu,
    /// User-mode Linux: no virtualization needed.
    Uml,
}

impl Machine {
    /// The kind of machine that is requested; `None`: the first that works.
    pub fn kind(self) -> Option<hull_machine::Kind> {
        enum_name(self).parse().ok()
    }
}

/// Network of a container as asked for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Network {
    /// Loopback only.
    None,
    /// A network by name: hull's own, `default`, or one of the host's CNI configurations.
    Named(String),
    /// That of another container, by name or id.
    Container(String),
}

/// `none`, the name of a network, or `container:` and the name of a container.
pub fn network(text: &str) -> Result<Network, String> {
    let is_name = |text: &str| {
        let mut bytes = text.bytes();
        bytes
            .next()
            .is_some_and(|byte| byte.is_ascii_alphanumeric())
            && bytes.all(|byte| byte.is_ascii_alphanumeric() || b"_.-".contains(&byte))
    };
    match text {
        "none" => Ok(Network::None),
        // Docker's and podman's name of what a container gets that asks for nothing.
        "bridge" => Ok(Network::Named("default".into())),
        "host" => Err(
            "not supported: host: the host's network: a guest's kernel has a network of its own; \
             publish its ports with -p"
                .into(),
        ),
        _ if is_name(text) => Ok(Network::Named(text.into())),
        _ => match text.strip_prefix("container:") {
            Some(container) if !container.is_empty() => Ok(Network::Container(container.into())),
            _ => Err(format!(
                "invalid network {text:?}: give default, none, container:NAME, or a name that hull \
                 network ls has"
            )),
        },
    }
}

impl std::fmt::Display for Network {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Network::None => f.write_str("none"),
            Network::Named(name) => f.write_str(name),
            Network::Container(name) => write!(f, "container:{name}"),
        }
    }
}

/// Which guests may send only frames from their own addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum NetworkFilter {
    /// All.
    All,
    /// Those in networks that hull sets up, not those of engines.
    Own,
    /// None.
    None,
}

/// When to ask the registry for an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Pull {
    /// Before every start.
    Always,
    /// When the image is not in the store.
    Missing,
    /// Never.
    Never,
}

/// When a container that ended is started again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Restart {
    /// Never.
    #[default]
    No,
    /// When it ended with another status than 0, at most so often one after the other.
    OnFailure(Option<u32>),
    /// Always; also at boot, when it was stopped by a person before.
    Always,
    /// Always, but not at boot when it was stopped by a person before.
    UnlessStopped,
}

/// `no`, `on-failure[:MOST]`, `always`, `unless-stopped`.
pub fn restart(text: &str) -> Result<Restart, String> {
    match text.split_once(':') {
        None => match text {
            "" | "no" => Ok(Restart::No),
            "on-failure" => Ok(Restart::OnFailure(None)),
            "always" => Ok(Restart::Always),
            "unless-stopped" => Ok(Restart::UnlessStopped),
            _ => Err(format!(
                "invalid restart policy {text:?}: give no, on-failure[:MOST], always or \
                 unless-stopped"
            )),
        },
        Some(("on-failure", most)) => match most.parse() {
            // Docker's: no limit.
            Ok(0) => Ok(Restart::OnFailure(None)),
            Ok(most) => Ok(Restart::OnFailure(Some(most))),
            Err(_) => Err(format!(
                "invalid restart policy {text:?}: {most:?} is no number"
            )),
        },
        Some((policy, _)) => Err(format!(
            "invalid restart policy {text:?}: {policy} takes no number"
        )),
    }
}

impl std::fmt::Display for Restart {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Restart::No => f.write_str("no"),
            Restart::OnFailure(None) => f.write_str("on-failure"),
            Restart::OnFailure(Some(most)) => write!(f, "on-failure:{most}"),
            Restart::Always => f.write_str("always"),
            Restart::UnlessStopped => f.write_str("unless-stopped"),
        }
    }
}

/// A value of `--security-opt`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SecurityOption {
    /// No system call filter.
    Unconfined,
    /// The system call filter of a file.
    Seccomp(#[serde(with = "exact")] PathBuf),
    /// The system call filter of a profile that was given as it is.
    SeccompText(String),
    /// Whether programs can bring privileges along.
    NoNewPrivileges(bool),
}

/// `seccomp=unconfined`, `seccomp=FILE`, `no-new-privileges[=true|false]`; Docker takes a colon,
/// too.
pub fn security_option(text: &str) -> Result<SecurityOption, String> {
    let (name, value) = match text.split_once(['=', ':']) {
        Some((name, value)) => (name, Some(value)),
        None => (text, None),
    };
    match (name, value) {
        ("seccomp", Some("unconfined")) => Ok(SecurityOption::Unconfined),
        // As the docker command line passes the file on that it has read.
        ("seccomp", Some(profile)) if profile.starts_with('{') => {
            Ok(SecurityOption::SeccompText(profile.to_owned()))
        }
        ("seccomp", Some(file)) if !file.is_empty() => Ok(SecurityOption::Seccomp(file.into())),
        ("no-new-privileges", None | Some("true")) => Ok(SecurityOption::NoNewPrivileges(true)),
        ("no-new-privileges", Some("false")) => Ok(SecurityOption::NoNewPrivileges(false)),
        _ => Err(format!(
            "invalid security option {text:?}: give seccomp=unconfined, seccomp=FILE or no-new-privileges"
        )),
    }
}

/// The name of a value of one of the enumerations above, as a user writes it.
pub fn enum_name<T: ValueEnum>(value: T) -> String {
    value
        .to_possible_value()
        .map(|value| value.get_name().to_owned())
        .unwrap_or_default()
}

/// A size in bytes: `512m`, `1.5g`, `64MiB`, `4096`. Powers of 1024, as Docker reads memory sizes.
pub fn size(text: &str) -> Result<u64, String> {
    let wrong = || format!("invalid size {text:?}: give a number with b, k, m, g or t, like 512m");
    let lower = text.trim().to_ascii_lowercase();
    let digits = lower
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(lower.len());
    let (number, unit) = lower.split_at(digits);
    let number: f64 = number.parse().map_err(|_| wrong())?;
    let power = match unit.trim_start() {
        "" | "b" => 0,
        "k" | "kb" | "kib" => 1,
        "m" | "mb" | "mib" => 2,
        "g" | "gb" | "gib" => 3,
        "t" | "tb" | "tib" => 4,
        _ => return Err(wrong()),
    };
    let bytes = number * 1024f64.powi(power);
    if bytes >= 9e18 {
        return Err(format!("size {text:?} is too large"));
    }
    Ok(bytes as u64)
}

/// An option of the storage of a container: `size=SIZE`, bytes.
pub fn storage_option(text: &str) -> Result<u64, String> {
    match text.split_once('=') {
        Some(("size", value)) => size(value),
        _ => Err(format!(
            "unknown storage option {text:?}: there is size=SIZE"
        )),
    }
}

/// A memory limit; Docker's least is 6 MB.
pub fn memory(text: &str) -> Result<u64, String> {
    let bytes = size(text)?;
    if bytes != 0 && bytes < 6 << 20 {
        return Err(format!("memory limit {text} is too small: at least 6m"));
    }
    Ok(bytes)
}

/// A number of processors with decimals, in thousandths.
pub fn cpus(text: &str) -> Result<u64, String> {
    text.parse::<f64>()
        .ok()
        .filter(|number| number.is_finite() && *number <= 4096.0)
        .filter(|number| *number >= 0.01 || *number == 0.0)
        .map(|number| (number * 1e3).round() as u64)
        .ok_or_else(|| {
            format!("invalid number of CPUs {text:?}: give a number from 0.01, like 1.5")
        })
}

/// Memory together with swap, bytes; -1 for no limit of swap.
pub fn memory_swap(text: &str) -> Result<i64, String> {
    if text == "-1" {
        return Ok(-1);
    }
    i64::try_from(size(text)?).map_err(|_| format!("{text} is too large"))
}

/// Processors of the host, by their numbers.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct CpuList(pub Vec<u32>);

/// Processors that `sched_setaffinity` takes (rustix's set, as the C library's).
const MOST_CPUS: u32 = 1024;

impl CpuList {
    /// Finds out whether the host lets this process use them all.
    ///
    /// # Errors
    /// One is not there.
    pub fn check(&self) -> crate::error::Result<()> {
        let allowed = rustix::thread::sched_getaffinity(None)
            .context(|| "ask for the processors of the host")?;
        match self.0.iter().find(|cpu| !allowed.is_set(**cpu as usize)) {
            None => Ok(()),
            Some(missing) => {
                let there: Vec<u32> = (0..MOST_CPUS)
                    .filter(|cpu| allowed.is_set(*cpu as usize))
                    .collect();
                Err(crate::error::Error::invalid(format!(
                    "--cpuset-cpus: there is no processor {missing}; there are {}",
                    CpuList(there)
                )))
            }
        }
    }
}

/// As the kernel writes it: `0-3,7`.
impl fmt::Display for CpuList {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut separator = "";
        for run in self.0.chunk_by(|one, next| one + 1 == *next) {
            match run {
                [one] => write!(formatter, "{separator}{one}")?,
                [first, .., last] => write!(formatter, "{separator}{first}-{last}")?,
                [] => {}
            }
            separator = ",";
        }
        Ok(())
    }
}

/// A list of processors: `0-3,7`.
pub fn cpu_list(text: &str) -> Result<CpuList, String> {
    let failed = || format!("invalid processors {text:?}: give numbers, like 0-3 or 0,2");
    let number = |text: &str| -> Result<u32, String> {
        let number = text.trim().parse().map_err(|_| failed())?;
        match number < MOST_CPUS {
            true => Ok(number),
            false => Err(failed()),
        }
    };
    let mut cpus = BTreeSet::new();
    for part in text.split(',').filter(|_| !text.is_empty()) {
        let (first, last) = match part.split_once('-') {
            Some((first, last)) => (number(first)?, number(last)?),
            None => (number(part)?, number(part)?),
        };
        if first > last {
            return Err(failed());
        }
        cpus.extend(first..=last);
    }
    Ok(CpuList(cpus.into_iter().collect()))
}

/// A stream of the caller.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum StreamName {
    /// Standard input.
    Stdin,
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
}

/// As Docker takes `--name "$NAME"`: an empty text is as none, and others are checked.
pub fn or_empty(
    check: fn(&str) -> Result<String, String>,
) -> impl Fn(&str) -> Result<String, String> + Clone + Send + Sync {
    move |text| match text {
        "" => Ok(String::new()),
        text => check(text),
    }
}

/// A number of seconds; negative ones mean for ever.
pub fn seconds(text: &str) -> Result<i64, String> {
    text.parse()
        .map_err(|_| format!("invalid number of seconds {text:?}"))
}

/// A limit on processes; 0 and -1 mean none.
pub fn pids_limit(text: &str) -> Result<i64, String> {
    text.parse::<i64>()
        .ok()
        .filter(|number| *number >= -1)
        .ok_or_else(|| {
            format!("invalid limit of processes {text:?}: give a number, or -1 for none")
        })
}

/// A container's name: `[a-zA-Z0-9][a-zA-Z0-9_.-]+`.
pub fn container_name(text: &str) -> Result<String, String> {
    let name = text.strip_prefix('/').unwrap_or(text);
    let mut characters = name.chars();
    let valid = characters.next().is_some_and(|c| c.is_ascii_alphanumeric())
        && name.len() >= 2
        && characters.all(|c| c.is_ascii_alphanumeric() || "_.-".contains(c));
    if !valid {
        return Err(format!(
            "invalid container name {text:?}: only [a-zA-Z0-9][a-zA-Z0-9_.-]+ is allowed"
        ));
    }
    if name.len() > 200 {
        return Err(format!(
            "invalid container name {text:?}: more than 200 characters"
        ));
    }
    Ok(name.to_owned())
}

/// A host name that the kernel and other hosts accept.
pub fn hostname(text: &str) -> Result<String, String> {
    let valid = !text.is_empty()
        && text.len() <= 64
        && !text.starts_with(['-', '.'])
        && text
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || "-._".contains(c));
    if valid {
        Ok(text.to_owned())
    } else {
        Err(format!(
            "invalid hostname {text:?}: up to 64 letters, digits, dots and hyphens"
        ))
    }
}

/// `user[:group]`, names or numbers; looked up in the container.
pub fn user(text: &str) -> Result<String, String> {
    let (user, group) = text.split_once(':').unwrap_or((text, "0"));
    let bad = |part: &str| part.is_empty() || part.contains([':', '/', ' ', '\t', '\n']);
    if bad(user) || bad(group) {
        return Err(format!("invalid user {text:?}: give USER or USER:GROUP"));
    }
    Ok(text.to_owned())
}

/// A group, by name or number; looked up in the container.
pub fn group(text: &str) -> Result<String, String> {
    let is_wrong = |c: char| c.is_control() || c.is_whitespace() || ":+".contains(c);
    match text.is_empty() || text.chars().any(is_wrong) {
        true => Err(format!("invalid group {text:?}")),
        false => Ok(text.to_owned()),
    }
}

/// A working directory inside a container.
pub fn directory(text: &str) -> Result<String, String> {
    if Path::new(text).is_absolute() {
        Ok(text.to_owned())
    } else {
        Err(format!(
            "invalid working directory {text:?}: it must be an absolute path"
        ))
    }
}

/// `NAME=VALUE`, or `NAME` for the caller's own value. `None` when the caller has no such variable:
/// as with Docker, the container then has none either.
pub fn environment(text: &OsStr) -> Result<Option<OsString>, String> {
    let bytes = text.as_bytes();
    if bytes.is_empty() || bytes[0] == b'=' {
        return Err(format!("invalid environment variable {text:?}: no name"));
    }
    if bytes.contains(&b'=') {
        return Ok(Some(text.to_owned()));
    }
    Ok(std::env::var_os(text).map(|value| {
        let mut variable = text.to_owned();
        variable.push("=");
        variable.push(value);
        variable
    }))
}

/// Reads the text of an environment file: one `NAME=VALUE` or `NAME` a line, `#` comments, no
/// quoting.
pub fn environment_file(path: &Path, text: &[u8]) -> Result<Vec<OsString>, String> {
    let mut variables = Vec::new();
    let text = text.strip_prefix(b"\xef\xbb\xbf").unwrap_or(text);
    for (index, line) in text.split(|byte| *byte == b'\n').enumerate() {
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        let line = line.trim_ascii_start();
        if line.is_empty() || line[0] == b'#' {
            continue;
        }
        let place = || format!("{} line {}", path.display(), index + 1);
        let name = line.split(|byte| *byte == b'=').next().unwrap_or(line);
        if name.iter().any(u8::is_ascii_whitespace) {
            let name = String::from_utf8_lossy(name);
            return Err(format!(
                "{}: variable {name:?} contains whitespace",
                place()
            ));
        }
        let line = OsString::from_vec(line.to_vec());
        variables.extend(environment(&line).map_err(|error| format!("{}: {error}", place()))?);
    }
    Ok(variables)
}

/// A label: `KEY=VALUE` or `KEY`.
pub fn label(text: &str) -> Result<(String, String), String> {
    let (key, value) = text.split_once('=').unwrap_or((text, ""));
    if key.trim().is_empty() {
        return Err(format!("invalid label {text:?}: no name"));
    }
    Ok((key.to_owned(), value.to_owned()))
}

/// Docker's weight of processors (cpu(7) of control groups version 1): 2 to 262144, 0 for the usual
/// one.
pub fn cpu_shares(text: &str) -> Result<u64, String> {
    match text.parse() {
        Ok(shares @ (0 | 2..=262_144)) => Ok(shares),
        _ => Err(format!(
            "invalid weight {text:?}: give a number from 2 to 262144"
        )),
    }
}

/// A kernel parameter for the container: `net.core.somaxconn=1024`.
pub fn sysctl(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() && !name.contains(['/', ' ']) => {
            Ok((name.to_owned(), value.to_owned()))
        }
        _ => Err(format!(
            "invalid sysctl {text:?}: give NAME=VALUE, like net.core.somaxconn=1024"
        )),
    }
}

/// A resource limit of processes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ulimit {
    /// In capitals, without `RLIMIT_`.
    pub name: String,
    /// Soft limit; `u64::MAX` is none.
    pub soft: u64,
    /// Hard limit; `u64::MAX` is none.
    pub hard: u64,
}

const ULIMITS: [&str; 15] = [
    "core",
    "cpu",
    "data",
    "fsize",
    "locks",
    "memlock",
    "msgqueue",
    "nice",
    "nofile",
    "nproc",
    "rss",
    "rtprio",
    "rttime",
    "sigpending",
    "stack",
];

/// `name=soft[:hard]`, -1 or `unlimited` for none.
pub fn ulimit(text: &str) -> Result<Ulimit, String> {
    let (name, limits) = text.split_once('=').ok_or_else(|| {
        format!("invalid ulimit {text:?}: give NAME=SOFT[:HARD], like nofile=1024:4096")
    })?;
    if !ULIMITS.contains(&name) {
        let known = ULIMITS.join(", ");
        return Err(format!(
            "invalid ulimit {text:?}: {name:?} is none of {known}"
        ));
    }
    let number = |limit: &str| match limit {
        "-1" | "unlimited" => Ok(u64::MAX),
        limit => limit
            .parse()
            .map_err(|_| format!("invalid ulimit {text:?}: {limit:?} is no number")),
    };
    let (soft, hard) = limits.split_once(':').unwrap_or((limits, limits));
    let (soft, hard) = (number(soft)?, number(hard)?);
    if soft > hard {
        return Err(format!(
            "invalid ulimit {text:?}: the soft limit is above the hard one"
        ));
    }
    Ok(Ulimit {
        name: name.to_ascii_uppercase(),
        soft,
        hard,
    })
}

/// A signal by number or name, `SIG` optional.
pub fn signal(text: &str) -> Result<u32, String> {
    hull_sandbox::signals::parse(text).ok_or_else(|| {
        format!("unknown signal {text:?}: give a name like TERM or a number from 1 to 64")
    })
}

/// A signal that is kept by its name.
pub fn signal_name(text: &str) -> Result<String, String> {
    signal(text).map(|_| text.to_owned())
}

/// Keys that detach from a container, as the bytes that a terminal sends.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DetachKeys(pub Vec<u8>);

/// Reads detach keys: `ctrl-p,ctrl-q`.
pub fn detach_keys(text: &str) -> Result<DetachKeys, String> {
    let key = |key: &str| -> Option<u8> {
        let byte = |text: &str| match text.as_bytes() {
            [byte] if byte.is_ascii_graphic() => Some(*byte),
            _ => None,
        };
        match key.strip_prefix("ctrl-") {
            Some(letter) => match byte(letter)? {
                letter @ b'a'..=b'z' => Some(letter - b'a' + 1),
                b'@' => Some(0),
                sign @ (b'[' | b'\\' | b']' | b'^' | b'_') => Some(sign - b'A' + 1),
                _ => None,
            },
            None => byte(key),
        }
    };
    text.split(',').map(key).collect::<Option<_>>().map(DetachKeys).ok_or_else(|| {
        format!("invalid detach keys {text:?}: letters or ctrl- and one of a-z @ [ \\ ] ^ _, with commas between")
    })
}

/// The number of lines of `--tail`: `None` is all of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tail(pub Option<usize>);

/// Reads a number of lines, or `all`.
pub fn tail(text: &str) -> Result<Tail, String> {
    if text == "all" || text == "-1" {
        return Ok(Tail(None));
    }
    text.parse()
        .map(|lines| Tail(Some(lines)))
        .map_err(|_| format!("invalid number of lines {text:?}: give a number or \"all\""))
}

/// The candidate that differs from `word` in the fewest letters, when it is near enough to have
/// been meant.
pub fn nearest<'a>(word: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    candidates
        .into_iter()
        .map(|candidate| (edit_distance(word, candidate), candidate))
        // Of two that are as near, the one of which it is the beginning.
        .min_by_key(|(distance, candidate)| (*distance, !candidate.starts_with(word)))
        .filter(|(distance, candidate)| {
            let letters = candidate.trim_start_matches('-').len();
            // One that is wholly another word is no slip of the finger.
            *distance <= 2 && distance * 3 <= letters
        })
        .map(|(_, candidate)| candidate)
}

fn edit_distance(a: &str, b: &str) -> usize {
    let (a, b): (Vec<char>, Vec<char>) = (a.chars().collect(), b.chars().collect());
    // Rows of the usual table, and the one before: two letters in the wrong order are one edit.
    let (mut before, mut previous): (Vec<usize>, Vec<usize>) =
        (Vec::new(), (0..=b.len()).collect());
    for i in 0..a.len() {
        let mut row = vec![i + 1];
        for j in 0..b.len() {
            let replaced = previous[j] + usize::from(a[i] != b[j]);
            let mut least = replaced.min(previous[j + 1] + 1).min(row[j] + 1);
            if i > 0 && j > 0 && a[i] == b[j - 1] && a[i - 1] == b[j] {
                least = least.min(before[j - 1] + 1);
            }
            row.push(least);
        }
        before = std::mem::replace(&mut previous, row);
    }
    previous[b.len()]
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn sizes() {
        for (text, bytes) in [
            ("0", 0),
            ("4096", 4096),
            ("512m", 512 << 20),
            ("512M", 512 << 20),
            ("512MiB", 512 << 20),
            ("1.5g", 3 << 29),
            ("64 kb", 64 << 10),
        ] {
            assert_eq!(size(text), Ok(bytes), "{text}");
        }
        for text in [
            "",
            "m",
            "-1",
            "1x",
            "1.2.3m",
            "99999999999999999999g",
            "NaN",
            "inf",
        ] {
            assert!(size(text).is_err(), "{text}");
        }
        assert!(memory("1m").unwrap_err().contains("at least 6m"));
    }

    #[test]
    fn processors() {
        assert_eq!(cpus("1.5"), Ok(1500));
        assert_eq!(cpus("0"), Ok(0), "no limit, as Docker");
        for text in ["", "two", "-1", "0.001", "inf", "NaN", "5000"] {
            assert!(cpus(text).is_err(), "{text}");
        }
    }

    #[test]
    fn names() {
        for name in ["ab", "web-1", "A_b.c", "0x"] {
            assert_eq!(container_name(name), Ok(name.to_owned()));
        }
        for name in ["", "a", "-a", ".a", "a b", "a/b", "ä1", "a\n"] {
            assert!(container_name(name).is_err(), "{name}");
        }
    }

    #[test]
    fn environment_of_the_caller_and_given() {
        let read = |text: &str| environment(OsStr::new(text));
        assert_eq!(read("A=b=c"), Ok(Some("A=b=c".into())));
        assert_eq!(read("A="), Ok(Some("A=".into())));
        assert_eq!(read("SURELY_NOT_SET_ANYWHERE"), Ok(None));
        assert!(
            read("PATH")
                .unwrap()
                .unwrap()
                .as_bytes()
                .starts_with(b"PATH=")
        );
        assert!(read("=x").is_err());
        assert!(read("").is_err());
    }

    #[test]
    fn environment_files() {
        let path = Path::new("file.env");
        let text =
            b"\xef\xbb\xbf# comment\nA=1\r\n\n  B=two words \nNOT_SET_ANYWHERE_EITHER\nC=\xff\n";
        let variables = environment_file(path, text).unwrap();
        let expected: [&[u8]; 3] = [b"A=1", b"B=two words ", b"C=\xff"];
        assert_eq!(
            variables.iter().map(|v| v.as_bytes()).collect::<Vec<_>>(),
            expected
        );
        let error = environment_file(path, b"A=1\nB C=2\n").unwrap_err();
        assert_eq!(
            error,
            "file.env line 2: variable \"B C\" contains whitespace"
        );
    }

    #[test]
    fn limits() {
        let limit = |name: &str, soft, hard| Ulimit {
            name: name.to_owned(),
            soft,
            hard,
        };
        assert_eq!(ulimit("nofile=10:20"), Ok(limit("NOFILE", 10, 20)));
        assert_eq!(ulimit("core=-1"), Ok(limit("CORE", u64::MAX, u64::MAX)));
        for text in ["", "nofile", "nofile=", "nofile=x", "nofile=5:4", "files=1"] {
            assert!(ulimit(text).is_err(), "{text}");
        }
    }

    #[test]
    fn detaching() {
        assert_eq!(detach_keys("ctrl-p,ctrl-q"), Ok(DetachKeys(vec![16, 17])));
        assert_eq!(detach_keys("a,ctrl-["), Ok(DetachKeys(vec![b'a', 27])));
        for text in ["", "ctrl-", "ctrl-A1", "ab"] {
            assert!(detach_keys(text).is_err(), "{text}");
        }
    }

    #[test]
    fn users_directories_hosts() {
        for good in ["0", "root", "1000:1000", "www-data:adm"] {
            assert!(user(good).is_ok(), "{good}");
        }
        for bad in ["", ":1", "1:", "a:b:c", "a b"] {
            assert!(user(bad).is_err(), "{bad}");
        }
        assert!(directory("/srv").is_ok());
        assert!(directory("srv").is_err());
        assert!(hostname("web-1.example").is_ok());
        assert!(hostname("").is_err());
        assert!(hostname("a b").is_err());
    }

    #[test]
    fn near_words() {
        let keys = ["memory", "machine", "cpus"];
        assert_eq!(nearest("memroy", keys), Some("memory"));
        assert_eq!(nearest("machines", keys), Some("machine"));
        assert_eq!(nearest("zzzzzzzz", keys), None);
        assert_eq!(nearest("rnu", ["ps", "run", "rm"]), Some("run"));
    }
}
