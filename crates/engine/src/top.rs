//! The processes of a container as tables of ps: which columns its options ask for, and what is in
//! them. Called by the command line and the API.

use std::collections::HashMap;

use hull_sandbox::control::client::unexpected;
use hull_sandbox::control::protocol::{Reply, Request};
use hull_sandbox::metrics::ProcessInfo;

use crate::container::Any;
use crate::error::{Error, Result};
use crate::time;

/// What a column shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Field {
    Pid,
    Ppid,
    User,
    Group,
    State,
    Name,
    Command,
    Terminal,
    ProcessorTime,
    Elapsed,
    ElapsedSeconds,
    Start,
    LongStart,
    Resident,
    Virtual,
    ProcessorShare,
    ProcessorPercent,
    MemoryPercent,
}

/// ps's names of fields (ps(1), STANDARD FORMAT SPECIFIERS), with their headings.
const FIELDS: [(&str, &str, Field); 39] = [
    ("pid", "PID", Field::Pid),
    ("ppid", "PPID", Field::Ppid),
    ("user", "USER", Field::User),
    ("euser", "EUSER", Field::User),
    ("uname", "USER", Field::User),
    ("uid", "UID", Field::User),
    ("euid", "EUID", Field::User),
    ("group", "GROUP", Field::Group),
    ("egroup", "EGROUP", Field::Group),
    ("gid", "GID", Field::Group),
    ("egid", "EGID", Field::Group),
    ("s", "S", Field::State),
    ("state", "S", Field::State),
    ("stat", "STAT", Field::State),
    ("comm", "COMMAND", Field::Name),
    ("ucmd", "CMD", Field::Name),
    ("ucomm", "COMMAND", Field::Name),
    ("args", "COMMAND", Field::Command),
    ("cmd", "CMD", Field::Command),
    ("command", "COMMAND", Field::Command),
    ("tty", "TT", Field::Terminal),
    ("tt", "TT", Field::Terminal),
    ("tname", "TTY", Field::Terminal),
    ("time", "TIME", Field::ProcessorTime),
    ("cputime", "TIME", Field::ProcessorTime),
    ("etime", "ELAPSED", Field::Elapsed),
    ("etimes", "ELAPSED", Field::ElapsedSeconds),
    ("start", "STARTED", Field::Start),
    ("stime", "STIME", Field::Start),
    ("start_time", "START", Field::Start),
    ("lstart", "STARTED", Field::LongStart),
    ("rss", "RSS", Field::Resident),
    ("rssize", "RSS", Field::Resident),
    ("vsz", "VSZ", Field::Virtual),
    ("vsize", "VSZ", Field::Virtual),
    ("c", "C", Field::ProcessorShare),
    ("pcpu", "%CPU", Field::ProcessorPercent),
    ("%cpu", "%CPU", Field::ProcessorPercent),
    ("%mem", "%MEM", Field::MemoryPercent),
];

/// `ps -ef`.
const FULL: [(&str, Field); 8] = [
    ("UID", Field::User),
    ("PID", Field::Pid),
    ("PPID", Field::Ppid),
    ("C", Field::ProcessorShare),
    ("STIME", Field::Start),
    ("TTY", Field::Terminal),
    ("TIME", Field::ProcessorTime),
    ("CMD", Field::Command),
];

/// `ps aux`.
const USERS: [(&str, Field); 11] = [
    ("USER", Field::User),
    ("PID", Field::Pid),
    ("%CPU", Field::ProcessorPercent),
    ("%MEM", Field::MemoryPercent),
    ("VSZ", Field::Virtual),
    ("RSS", Field::Resident),
    ("TTY", Field::Terminal),
    ("STAT", Field::State),
    ("START", Field::Start),
    ("TIME", Field::ProcessorTime),
    ("COMMAND", Field::Command),
];

/// Most processes of a container that are shown: twice the ids that a guest's kernel gives
/// (PID_MAX_DEFAULT, include/linux/threads.h).
const MOST: usize = 65_536;

/// The columns of a table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Columns(Vec<(String, Field)>);

impl Columns {
    /// Reads options of ps, as words: `-ef`, `aux`, `-o FIELD[=HEADING],…`, or names of fields as
    /// podman takes them. None are `-ef`. All processes of the container are always shown.
    ///
    /// # Errors
    /// One line that names what is not there.
    pub fn parse<S: AsRef<str>>(words: &[S]) -> std::result::Result<Self, String> {
        let mut columns = Vec::new();
        let mut usual: &[(&str, Field)] = &FULL;
        let mut words = words.iter().map(AsRef::as_ref);
        while let Some(word) = words.next() {
            let letters = word.trim_start_matches('-');
            // `-o`, `-eo`, `axo`, with the fields in the same word or the next one.
            let list = match letters.find('o') {
                _ if word.starts_with("--") => match word.split_once('=') {
                    Some(("--format", list)) => Some(list),
                    _ if word == "--format" => Some(""),
                    _ => return Err(unknown(word)),
                },
                Some(at)
                    if letters[..at]
                        .bytes()
                        .all(|letter| b"aefuwxA".contains(&letter)) =>
                {
                    Some(&letters[at + 1..])
                }
                _ => None,
            };
            match list {
                Some("") => {
                    let list = words.next().unwrap_or_default();
                    if list.is_empty() {
                        return Err(format!("{word}: no fields are given"));
                    }
                    add(&mut columns, list)?;
                }
                Some(list) => add(&mut columns, list)?,
                None if letters.bytes().all(|letter| b"aefuwxA".contains(&letter)) => {
                    if letters.contains('u') {
                        usual = &USERS;
                    }
                }
                None if !word.starts_with('-') => add(&mut columns, word)?,
                None => return Err(unknown(word)),
            }
        }
        if columns.is_empty() {
            let usual = usual
                .iter()
                .map(|(heading, field)| ((*heading).to_owned(), *field));
            columns.extend(usual);
        }
        Ok(Self(columns))
    }

    /// The headings.
    pub fn headings(&self) -> Vec<String> {
        self.0.iter().map(|(heading, _)| heading.clone()).collect()
    }

    /// A row for each process.
    pub fn rows(&self, table: &Processes) -> Vec<Vec<String>> {
        let row = |process| {
            self.0
                .iter()
                .map(|(_, field)| table.text(process, *field))
                .collect()
        };
        table.list.iter().map(row).collect()
    }
}

fn unknown(option: &str) -> String {
    format!("not supported: option {option:?} of ps: give -ef, aux, or -o with names of fields")
}

/// Adds the fields of a list: with commas or spaces between them, each perhaps with a heading.
fn add(columns: &mut Vec<(String, Field)>, list: &str) -> std::result::Result<(), String> {
    for part in list.split(',') {
        let (names, heading) = match part.split_once('=') {
            Some((names, heading)) => (names, Some(heading)),
            None => (part, None),
        };
        let names: Vec<&str> = names.split_whitespace().collect();
        for (index, name) in names.iter().enumerate() {
            let mut fields = FIELDS.iter();
            let known = fields.find(|(known, _, _)| name.eq_ignore_ascii_case(known));
            let Some((_, usual, field)) = known else {
                return Err(format!(
                    "not supported: field {name:?} of ps: there are pid, ppid, user, group, stat, \
                     comm, args, tty, time, etime, start, rss, vsz, %cpu, %mem and their like"
                ));
            };
            let own = heading.filter(|_| index + 1 == names.len());
            columns.push((own.unwrap_or(usual).to_owned(), *field));
        }
    }
    Ok(())
}

/// The processes of a container at one moment.
#[derive(Debug)]
pub struct Processes {
    /// Each of them.
    pub list: Vec<ProcessInfo>,
    /// Ids in the container, by those in the guest's root namespace.
    ids: HashMap<u32, u32>,
    /// Memory of the machine, bytes.
    memory: u64,
    /// Unix time in seconds.
    now: u64,
}

impl Processes {
    /// Asks for those of a container that runs.
    ///
    /// # Errors
    /// It does not run.
    pub fn of(container: &Any) -> Result<Self> {
        let request = Request::Processes {
            container: container.id().to_owned(),
        };
        let list = match container.connect()?.ask(&request, &[])?.message {
            Reply::Processes(processes) => processes,
            other => return Err(unexpected(&other)),
        };
        if list.len() > MOST {
            return Err(Error::new(format!(
                "container {}: its guest lists {} processes, more than {MOST}",
                container.id(),
                list.len()
            )));
        }
        Ok(Self {
            ids: ids(&list),
            list,
            memory: match container {
                Any::Own(own) => own.record.details.memory,
                Any::Engine(_) => 0,
            },
            now: u64::try_from(time::now() / 1_000_000_000).unwrap_or(0),
        })
    }

    /// The id of a process's parent as seen in the container. Parents have ids of the guest's root
    /// namespace; the parent's row has both.
    pub fn parent_of(&self, process: &ProcessInfo) -> u32 {
        self.ids.get(&process.parent_pid).copied().unwrap_or(0)
    }

    fn text(&self, process: &ProcessInfo, field: Field) -> String {
        let seconds = process.cpu_time_us / 1_000_000;
        let elapsed = self.now.saturating_sub(process.started_at);
        // Tenths of a per cent.
        let busy = process.cpu_time_us / 1000 / elapsed.max(1);
        let tenths = |number: u64| format!("{}.{}", number / 10, number % 10);
        match field {
            Field::Pid => process.container_pid.to_string(),
            Field::Ppid => self.parent_of(process).to_string(),
            Field::User => process.uid.to_string(),
            Field::Group => process.gid.to_string(),
            Field::State => process.state.clone(),
            Field::Name => process.name.clone(),
            Field::Command => process.command.clone(),
            Field::Terminal => match process.terminal.as_str() {
                "" => "?".to_owned(),
                terminal => terminal.to_owned(),
            },
            Field::ProcessorTime => hours(seconds),
            Field::Elapsed => {
                let (days, rest) = (elapsed / 86_400, elapsed % 86_400);
                match (days, rest / 3600) {
                    (0, 0) => hours(rest)[3..].to_owned(),
                    (0, _) => hours(rest),
                    _ => format!("{days}-{}", hours(rest)),
                }
            }
            Field::ElapsedSeconds => elapsed.to_string(),
            Field::Start => clock(process.started_at),
            Field::LongStart => moment(process.started_at)[..19].replace('T', " "),
            Field::Resident => (process.resident_bytes >> 10).to_string(),
            Field::Virtual => (process.virtual_bytes >> 10).to_string(),
            Field::ProcessorShare => (busy / 10).to_string(),
            Field::ProcessorPercent => tenths(busy),
            Field::MemoryPercent => match self.memory {
                0 => "?".to_owned(),
                memory => tenths(process.resident_bytes.saturating_mul(1000) / memory),
            },
        }
    }
}

fn ids(list: &[ProcessInfo]) -> HashMap<u32, u32> {
    let pairs = list.iter().map(|one| (one.pid, one.container_pid));
    pairs.collect()
}

/// `HH:MM:SS`.
pub fn hours(seconds: u64) -> String {
    let (hours, minutes) = (seconds / 3600, seconds / 60 % 60);
    format!("{hours:02}:{minutes:02}:{:02}", seconds % 60)
}

/// Hours and minutes in UTC.
pub fn clock(seconds: u64) -> String {
    moment(seconds)[11..16].to_owned()
}

/// A time in UTC, as `YYYY-MM-DDTHH:MM:SS…`: the guest chooses the number.
fn moment(seconds: u64) -> String {
    const YEAR_9999: u64 = 253_402_300_799;
    time::format_rfc3339(i128::from(seconds.min(YEAR_9999)) * 1_000_000_000)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn processes() -> Processes {
        let shell = ProcessInfo {
            pid: 40,
            container_pid: 1,
            parent_pid: 2,
            uid: 1000,
            gid: 100,
            state: "S".to_owned(),
            cpu_time_us: 2_500_000,
            resident_bytes: 4 << 20,
            virtual_bytes: 8 << 20,
            started_at: 1_700_000_000,
            terminal: "pts/0".to_owned(),
            name: "sh".to_owned(),
            command: "/bin/sh -c wait".to_owned(),
        };
        let child = ProcessInfo {
            pid: 41,
            container_pid: 7,
            parent_pid: 40,
            terminal: String::new(),
            // Of a guest that lies.
            started_at: u64::MAX,
            ..shell.clone()
        };
        let list = vec![shell, child];
        Processes {
            ids: ids(&list),
            list,
            memory: 64 << 20,
            now: 1_700_000_010,
        }
    }

    fn table(words: &[&str]) -> String {
        let columns = Columns::parse(words).unwrap();
        let mut lines = vec![columns.headings().join(" ")];
        lines.extend(columns.rows(&processes()).iter().map(|row| row.join(" ")));
        lines.join("\n")
    }

    #[test]
    fn options_of_ps_choose_columns() {
        let full = "UID PID PPID C STIME TTY TIME CMD\n\
                    1000 1 0 25 22:13 pts/0 00:00:02 /bin/sh -c wait";
        for words in [&[][..], &["-ef"], &["-e", "-f"], &["ef"]] {
            assert!(table(words).starts_with(full), "{}", table(words));
        }
        let users = "USER PID %CPU %MEM VSZ RSS TTY STAT START TIME COMMAND\n\
                     1000 1 25.0 6.2 8192 4096 pts/0 S 22:13 00:00:02 /bin/sh -c wait";
        for words in ["aux", "-aux", "axuww"] {
            assert!(table(&[words]).starts_with(users), "{}", table(&[words]));
        }
        let own = "PID PPID COMMAND\n1 0 sh\n7 1 sh";
        for words in [
            &["-o", "pid,ppid,comm"][..],
            &["-eopid,ppid,comm"],
            &["axo", "pid ppid comm"],
            &["-o", "pid", "-o", "ppid,comm"],
            &["--format=pid,ppid,comm"],
            &["pid", "PPID", "comm"],
        ] {
            assert_eq!(table(words), own, "{words:?}");
        }
        assert_eq!(table(&["-o", "pid=A,comm="]).lines().next(), Some("A "));
        assert_eq!(
            table(&["-o", "pid,args=WHAT"]).lines().next(),
            Some("PID WHAT")
        );
        assert_eq!(
            table(&["-o", "etime,etimes,tty"]).lines().nth(1),
            Some("00:10 10 pts/0")
        );
        assert_eq!(
            table(&["-o", "lstart"]).lines().nth(1),
            Some("2023-11-14 22:13:20")
        );
    }

    #[test]
    fn what_ps_has_and_hull_has_not_is_named() {
        for (words, part) in [
            (&["-o", "pid,wchan"][..], "\"wchan\""),
            (&["-o"], "no fields"),
            (&["--forest"], "--forest"),
            (&["-Z"], "-Z"),
            (&["nonsense"], "\"nonsense\""),
        ] {
            let error = Columns::parse(words).unwrap_err();
            assert!(error.contains(part), "{error}");
        }
    }
}
