//! What people type who know Docker's or podman's command line: other names of commands, values of
//! flags, and what hull does not have, with what there is instead.

use std::ffi::{OsStr, OsString};

use clap::{Arg, ArgAction, Command, CommandFactory};

use crate::cli::Hull;
use crate::error::Error;

/// Commands that are elsewhere here.
const ALIASES: [(&[&str], &[&str]); 21] = [
    (&["images"], &["image", "ls"]),
    (&["pull"], &["image", "pull"]),
    (&["rmi"], &["image", "rm"]),
    (&["import"], &["image", "import"]),
    (&["tag"], &["image", "tag"]),
    (&["history"], &["image", "history"]),
    (&["push"], &["image", "push"]),
    (&["search"], &["image", "search"]),
    (&["save"], &["image", "save"]),
    (&["load"], &["image", "load"]),
    (&["image", "build"], &["build"]),
    (&["buildx", "build"], &["build"]),
    (&["builder", "build"], &["build"]),
    (&["ls"], &["ps"]),
    (&["list"], &["ps"]),
    (&["container", "ls"], &["ps"]),
    (&["container", "list"], &["ps"]),
    (&["container", "ps"], &["ps"]),
    (
        &["container", "inspect"],
        &["inspect", "--type", "container"],
    ),
    (&["image", "remove"], &["image", "rm"]),
    (&["-v"], &["--version"]),
];

/// Commands that are not here, and what can be done instead.
const COMMANDS: [(&str, &str); 18] = [
    ("buildx", "hull build builds an image from a Dockerfile"),
    (
        "builder",
        "buildah keeps the layers of builds: buildah rmi --prune",
    ),
    (
        "compose",
        "hull api, and docker compose with DOCKER_HOST=unix:///run/hull/api.sock; or podman-compose \
         --podman-path /usr/bin/hull",
    ),
    ("prune", "hull system prune removes what nothing uses"),
    ("context", "hull works on this host only"),
    ("plugin", "there are no plugins"),
    ("swarm", "hull works on this host only"),
    ("node", "hull works on this host only"),
    ("service", "hull works on this host only"),
    ("stack", "hull works on this host only"),
    ("secret", "hull run -v /FILE:/run/secrets/NAME:ro"),
    ("manifest", "hull image inspect shows an image's document"),
    (
        "pod",
        "hull run --network container:NAME puts a container into the machine of another one",
    ),
    (
        "kube",
        "hull-oci is a runtime for podman: hull install podman",
    ),
    (
        "mount",
        "hull cp copies from running and stopped containers",
    ),
    (
        "unmount",
        "hull cp copies from running and stopped containers",
    ),
    ("healthcheck", "hull exec runs a check in a container"),
    ("checkpoint", "hull pause stops a container for a while"),
];

/// Options of `run` that are not here, and what can be done instead.
const OPTIONS: [(&str, &str); 24] = [
    (
        "--volume-driver",
        "-v HOST:CONTAINER shows directories of the host",
    ),
    (
        "--gpus",
        "devices of the host are not passed on to machines",
    ),
    (
        "--device",
        "devices of the host are not passed on to machines",
    ),
    (
        "--device-cgroup-rule",
        "devices of the host are not passed on to machines",
    ),
    (
        "--ipc",
        "a container has a kernel of its own; --network container:NAME shares a machine",
    ),
    (
        "--pid",
        "a container has a kernel of its own; --network container:NAME shares a machine",
    ),
    (
        "--uts",
        "a container has a kernel of its own; --hostname NAME",
    ),
    (
        "--userns",
        "a container has a kernel of its own, whose users are not the host's",
    ),
    ("--cgroupns", "a container has control groups of its own"),
    ("--cgroup-parent", "cgroup_parent in hull's configuration"),
    (
        "--pidfile",
        "hull inspect shows the processes of a container's machine",
    ),
    ("--domainname", "--hostname NAME.DOMAIN"),
    (
        "--memory-swappiness",
        "machines have no swap: --memory is the limit",
    ),
    ("--memory-reservation", "--memory is the limit"),
    ("--kernel-memory", "--memory is the limit"),
    ("--oom-kill-disable", "--memory is the limit"),
    ("--cpu-quota", "--cpus NUMBER"),
    ("--cpu-period", "--cpus NUMBER"),
    ("--cpuset-mems", "--cpus NUMBER"),
    (
        "--blkio-weight",
        "--storage-opt size=SIZE limits what is written",
    ),
    ("--runtime", "--machine KIND"),
    ("--isolation", "--machine KIND"),
    ("--disable-content-trust", "give a digest: NAME@sha256:…"),
    ("--systemd", "the container's command is process 1"),
];

/// The arguments in hull's own words.
pub fn rewrite(mut arguments: Vec<OsString>) -> Vec<OsString> {
    let is = |index: usize, word: &str| arguments.get(index).is_some_and(|given| given == word);
    if is(1, "help") {
        arguments.remove(1);
        arguments.push("--help".into());
        return arguments;
    }
    let alias = ALIASES.iter().find(|(typed, _)| {
        let mut typed = typed.iter().enumerate();
        typed.all(|(index, word)| is(index + 1, word))
    });
    if let Some((typed, meant)) = alias {
        arguments.splice(1..=typed.len(), meant.iter().map(OsString::from));
    } else if is(1, "container") && arguments.len() > 2 && !is(2, "prune") && !is(2, "exists") {
        arguments.remove(1);
    }
    match arguments
        .iter()
        .any(|argument| flag_value(argument).is_some())
    {
        true => rewrite_flags(arguments),
        false => arguments,
    }
}

/// `--flag=VALUE` or `-f=VALUE` with a value that means yes or no: the flag, and which.
fn flag_value(argument: &OsStr) -> Option<(&str, bool)> {
    let (flag, value) = argument.to_str()?.split_once('=')?;
    if !flag.starts_with('-') || flag.len() < 2 {
        return None;
    }
    match value {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Some((flag, true)),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Some((flag, false)),
        _ => None,
    }
}

/// Flags that are given a value, as Docker takes them: with `true` they are given, with `false`
/// they are not, also when they were before.
fn rewrite_flags(arguments: Vec<OsString>) -> Vec<OsString> {
    let hull = Hull::command();
    let mut command = &hull;
    let mut rewritten: Vec<OsString> = Vec::with_capacity(arguments.len());
    let mut arguments = arguments.into_iter();
    rewritten.extend(arguments.next());
    while let Some(argument) = arguments.next() {
        let text = argument.to_str().unwrap_or_default();
        if text == "--" {
            rewritten.push(argument);
            break;
        }
        if !text.starts_with('-') || text == "-" {
            let inner = command.find_subcommand(text);
            let is_last =
                inner.is_none() && command.get_positionals().any(Arg::is_trailing_var_arg_set);
            rewritten.push(argument);
            if is_last {
                break;
            }
            command = inner.unwrap_or(command);
            continue;
        }
        match flag_value(&argument) {
            Some((flags, value)) => match given(command, flags, value) {
                Some(given) if value => rewritten.extend(given),
                // All but the last letter are given.
                Some(mut given) => {
                    let last = given.pop();
                    rewritten.extend(given);
                    rewritten.retain(|before| Some(before) != last.as_ref());
                }
                None => rewritten.push(argument),
            },
            None => {
                let has_value = takes_value(command, text);
                rewritten.push(argument);
                if has_value {
                    rewritten.extend(arguments.next());
                }
            }
        }
    }
    rewritten.extend(arguments);
    rewritten
}

/// The flags of `--flag` or `-abc` one by one, when all of them are flags of the command.
fn given(command: &Command, flags: &str, _value: bool) -> Option<Vec<OsString>> {
    let is_flag = |arg: &Arg| matches!(arg.get_action(), ArgAction::SetTrue);
    if let Some(long) = flags.strip_prefix("--") {
        let arg = command.get_arguments().find(|arg| has_long(arg, long))?;
        return is_flag(arg).then(|| vec![flags.into()]);
    }
    flags
        .chars()
        .skip(1)
        .map(|letter| {
            let mut all = command.get_arguments();
            let arg = all.find(|arg| arg.get_short() == Some(letter))?;
            is_flag(arg).then(|| OsString::from(format!("-{letter}")))
        })
        .collect()
}

fn has_long(arg: &Arg, long: &str) -> bool {
    arg.get_long() == Some(long)
        || arg
            .get_all_aliases()
            .is_some_and(|aliases| aliases.contains(&long))
}

/// Whether the next argument is the value of this one.
fn takes_value(command: &Command, text: &str) -> bool {
    if text.contains('=') {
        return false;
    }
    let mut all = command.get_arguments();
    if let Some(long) = text.strip_prefix("--") {
        return all
            .find(|arg| has_long(arg, long))
            .is_some_and(|arg| arg.get_action().takes_values());
    }
    let letters: Vec<char> = text.chars().skip(1).collect();
    for (index, letter) in letters.iter().enumerate() {
        let mut all = command.get_arguments();
        match all.find(|arg| arg.get_short() == Some(*letter)) {
            Some(arg) if arg.get_action().takes_values() => return index + 1 == letters.len(),
            Some(_) => {}
            None => return false,
        }
    }
    false
}

/// What to say of a command that is not here, if it is known elsewhere.
pub fn missing_command(word: &str, arguments: &[OsString]) -> Option<Error> {
    let (_, instead) = COMMANDS.iter().find(|(name, _)| *name == word)?;
    let before = arguments.iter().skip(1).take_while(|given| *given != word);
    let before: String = before
        .map(|given| format!("{} ", given.to_string_lossy()))
        .collect();
    Some(Error::unsupported(format_args!("hull {before}{word}")).hint(*instead))
}

/// What to say of an option of `hull run` that is not here, if it is known elsewhere.
pub fn missing_option(option: &str) -> Option<Error> {
    let (_, instead) = OPTIONS.iter().find(|(name, _)| *name == option)?;
    Some(Error::unsupported(option).hint(*instead))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rewritten(line: &str) -> String {
        let words = rewrite(line.split(' ').map(OsString::from).collect());
        words.join(OsStr::new(" ")).to_string_lossy().into_owned()
    }

    #[test]
    fn dockers_names_of_commands_work() {
        for (typed, meant) in [
            ("hull pull x", "hull image pull x"),
            ("hull images -q", "hull image ls -q"),
            ("hull rmi -f x", "hull image rm -f x"),
            ("hull tag a b", "hull image tag a b"),
            ("hull history a", "hull image history a"),
            ("hull save -o f a", "hull image save -o f a"),
            ("hull push -q a", "hull image push -q a"),
            ("hull load -i f", "hull image load -i f"),
            ("hull buildx build .", "hull build ."),
            ("hull container ls -a", "hull ps -a"),
            ("hull container rm -f x", "hull rm -f x"),
            (
                "hull container inspect x",
                "hull inspect --type container x",
            ),
            ("hull container", "hull container"),
            ("hull help", "hull --help"),
            ("hull help image pull", "hull image pull --help"),
            ("hull -v", "hull --version"),
            ("hull run pull images", "hull run pull images"),
        ] {
            assert_eq!(rewritten(typed), meant, "{typed}");
        }
    }

    #[test]
    fn flags_take_yes_and_no_as_dockers_do() {
        for (typed, meant) in [
            ("hull run --rm=true i", "hull run --rm i"),
            ("hull run --rm=false i", "hull run i"),
            ("hull run --rm --rm=0 i", "hull run i"),
            ("hull run -it=false i", "hull run -i i"),
            ("hull run -it=true i", "hull run -i -t i"),
            (
                "hull run --init=1 --name --rm=true i",
                "hull run --init --name --rm=true i",
            ),
            ("hull run i --rm=true", "hull run i --rm=true"),
            (
                "hull run -e A=true --rm=t i --x=true",
                "hull run -e A=true --rm i --x=true",
            ),
            (
                "hull run --label=true --rm=true i",
                "hull run --label=true --rm i",
            ),
            ("hull logs x -f=false", "hull logs x"),
            (
                "hull rm --force=true -- --force=true",
                "hull rm --force -- --force=true",
            ),
            ("hull image rm -f=true x", "hull image rm -f x"),
        ] {
            assert_eq!(rewritten(typed), meant, "{typed}");
        }
    }

    #[test]
    fn nothing_is_said_to_be_missing_that_is_there() {
        let hull = Hull::command();
        for (name, _) in COMMANDS {
            assert!(hull.find_subcommand(name).is_none(), "{name}");
        }
        let run = hull.find_subcommand("run");
        for (name, _) in OPTIONS {
            let long = name.trim_start_matches('-');
            let there = run.is_some_and(|run| {
                run.get_arguments().any(|arg| {
                    has_long(arg, long)
                        || arg.get_short().map(String::from).as_deref() == Some(long)
                })
            });
            assert!(!there, "{name}");
        }
    }
}
