//! The grammar of the command line: names, meanings and short forms as in Docker. Each command's
//! arguments are in its file under `commands`.

use clap::{Parser, Subcommand};

use crate::commands::*;
use crate::error::Result;

/// Containers, each in its own small virtual machine with its own Linux kernel.
#[derive(Debug, Parser)]
#[command(
    name = "hull",
    version,
    args_override_self = true,
    disable_help_subcommand = true,
    subcommand_required = true,
    arg_required_else_help = true,
    max_term_width = 100
)]
pub struct Hull {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run a command in a new container
    Run(Box<run::Args>),
    /// Create a container, to be started later
    Create(Box<create::Args>),
    /// Start containers that were created, or that have ended
    Start(start::Args),
    /// Stop containers and start them again
    Restart(restart::Args),
    /// Run a command in a running container
    Exec(exec::Args),
    /// List containers
    Ps(ps::Args),
    /// Show the output of a container
    Logs(logs::Args),
    /// Attach input and output to a running container
    Attach(attach::Args),
    /// Wait until containers stop, then print their exit codes
    Wait(wait::Args),
    /// Stop running containers
    Stop(stop::Args),
    /// Send a signal to running containers
    Kill(kill::Args),
    /// Freeze all processes of containers
    Pause(pause::Args),
    /// Let all processes of paused containers go on
    Unpause(pause::Args),
    /// Remove containers
    Rm(rm::Args),
    /// Give a container another name
    Rename(rename::Args),
    /// Change limits of containers, and whether they are started again
    Update(update::Args),
    /// Show which ports of the host lead to a container
    Port(port::Args),
    /// Show all that is known of containers or images, as JSON
    Inspect(inspect::Args),
    /// Show what containers use and what their machines cost the host
    Stats(stats::Args),
    /// Show what happens to containers, of all engines on this host
    Events(events::Args),
    /// Show the processes of a container
    Top(top::Args),
    /// Copy files between a container and the host
    Cp(cp::Args),
    /// List what a container has changed of its image's files
    Diff(diff::Args),
    /// Write the files of a container as an archive
    Export(export::Args),
    /// Make an image of a container
    Commit(commit::Args),
    /// Build an image from a Dockerfile
    Build(Box<build::Args>),
    /// Manage images
    Image(image::Args),
    /// Store a user name and a password for a registry, where docker and podman find them too
    Login(login::Args),
    /// Remove what `login` stored
    Logout(login::LogoutArgs),
    /// Manage volumes: directories that outlive containers
    Volume(volume::Args),
    /// Manage networks, in which containers find each other by their names
    Network(network::Args),
    /// Remove all containers that do not run, or ask for one
    Container(container::Args),
    /// Show what there is on this host: containers, images, machines
    Info(info::Args),
    /// Show what is taken of the disk, and remove what nothing uses
    System(system::Args),
    /// Serve Docker's Engine API, for the docker command line, docker compose and other clients
    Api(api::Args),
    /// Check whether this host can run containers, and say what is missing
    Check(check::Args),
    /// Show the guest kernels
    Kernel(kernel::Args),
    /// Show the configuration in force and where each value comes from
    Config(config::Args),
    /// Tell a container engine, or systemd, about hull: podman, docker, crio, containerd, systemd
    Install(install::Args),
    /// Take back what `install` told an engine
    Uninstall(install::UninstallArgs),
    /// Write units of systemd for containers
    Generate(generate::Args),
    /// Show the version
    Version(version::Args),
    /// Print the completion script of a shell
    #[command(hide = true)]
    Completions(completions::Args),
    /// Write the manual pages
    #[command(hide = true)]
    Man(man::Args),
}

impl Command {
    /// Executes the command and returns the exit status. `began_ns`: when this process started,
    /// CLOCK_MONOTONIC.
    pub fn execute(self, began_ns: u64) -> Result<u8> {
        match self {
            Command::Run(args) => run::execute(*args, began_ns),
            Command::Create(args) => create::execute(*args, began_ns),
            Command::Start(args) => start::execute(args, began_ns),
            Command::Restart(args) => restart::execute(args, began_ns),
            Command::Exec(args) => exec::execute(args),
            Command::Ps(args) => ps::execute(args),
            Command::Logs(args) => logs::execute(args),
            Command::Attach(args) => attach::execute(args),
            Command::Wait(args) => wait::execute(args),
            Command::Stop(args) => stop::execute(args),
            Command::Kill(args) => kill::execute(args),
            Command::Pause(args) => pause::execute(args, true),
            Command::Unpause(args) => pause::execute(args, false),
            Command::Rm(args) => rm::execute(args),
            Command::Inspect(args) => inspect::execute(args),
            Command::Stats(args) => stats::execute(args),
            Command::Events(args) => events::execute(args),
            Command::Top(args) => top::execute(args),
            Command::Cp(args) => cp::execute(args),
            Command::Rename(args) => rename::execute(args),
            Command::Update(args) => update::execute(args),
            Command::Diff(args) => diff::execute(args),
            Command::Export(args) => export::execute(args),
            Command::Commit(args) => commit::execute(args),
            Command::Port(args) => port::execute(args),
            Command::Network(args) => network::execute(args),
            Command::Volume(args) => volume::execute(args),
            Command::Container(args) => container::execute(args),
            Command::Build(args) => build::execute(*args),
            Command::Image(args) => image::execute(args),
            Command::Info(args) => info::execute(args),
            Command::System(args) => system::execute(args),
            Command::Login(args) => login::execute(args),
            Command::Logout(args) => login::logout(args),
            Command::Api(args) => api::execute(args),
            Command::Check(args) => check::execute(args),
            Command::Kernel(args) => kernel::execute(args),
            Command::Config(args) => config::execute(args),
            Command::Generate(args) => generate::execute(args),
            Command::Install(args) => install::execute(args),
            Command::Uninstall(args) => install::uninstall(args),
            Command::Version(args) => version::execute(args),
            Command::Completions(args) => completions::execute(args),
            Command::Man(args) => man::execute(args),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::ffi::OsString;
    use std::os::unix::ffi::OsStringExt;

    use clap::CommandFactory;

    use super::*;

    fn parse(line: &str) -> std::result::Result<Command, clap::Error> {
        Hull::try_parse_from(line.split_whitespace()).map(|hull| hull.command)
    }

    /// The parsed arguments, formatted for comparison with a few expected parts.
    fn shown(line: &str) -> String {
        format!(
            "{:?}",
            parse(line).unwrap_or_else(|error| panic!("{line}: {error}"))
        )
    }

    #[test]
    fn the_grammar_is_consistent() {
        Hull::command().debug_assert();
    }

    #[test]
    fn options_end_at_the_image_or_container() {
        for (line, words) in [
            ("hull run image", r#"words: ["image"]"#),
            (
                "hull run image --rm -it",
                r#"words: ["image", "--rm", "-it"]"#,
            ),
            (
                "hull run -it image sh -c x",
                r#"words: ["image", "sh", "-c", "x"]"#,
            ),
            (
                "hull run --rm image -- ls -l",
                r#"words: ["image", "--", "ls", "-l"]"#,
            ),
            ("hull run -- image --rm", r#"words: ["image", "--rm"]"#),
            (
                "hull run image sh --help",
                r#"words: ["image", "sh", "--help"]"#,
            ),
            ("hull run image -h", r#"words: ["image", "-h"]"#),
            (
                "hull exec -it c sh -c -- x",
                r#"words: ["c", "sh", "-c", "--", "x"]"#,
            ),
            ("hull exec c ls --help", r#"words: ["c", "ls", "--help"]"#),
            ("hull exec c --version", r#"words: ["c", "--version"]"#),
        ] {
            let shown = shown(line);
            assert!(shown.contains(words), "{line}: {shown}");
        }
        assert!(shown("hull run image --rm").contains(" rm: false"));
        assert!(shown("hull run --rm image").contains(" rm: true"));
    }

    #[test]
    fn dockers_options_and_short_forms() {
        for (line, part) in [
            ("hull run -it i", "interactive: true, tty: true"),
            (
                "hull run -dit i",
                "detach: true, timings: false, attach: [], sig_proxy: true, detach_keys: None, container: ContainerArgs { interactive: true, tty: true",
            ),
            ("hull run -e A=1 --env B=2 i", r#"env: ["A=1", "B=2"]"#),
            ("hull run -eA=1 i", r#"env: ["A=1"]"#),
            ("hull run -v /a:/b:ro i", "read_only: true"),
            ("hull run -w /x i", r#"workdir: Some("/x")"#),
            ("hull run -u 1:2 i", r#"user: Some("1:2")"#),
            ("hull run -h web i", r#"hostname: Some("web")"#),
            ("hull run --hostname=web i", r#"hostname: Some("web")"#),
            ("hull run -m 512m i", "memory: Some(536870912)"),
            ("hull run -m512m i", "memory: Some(536870912)"),
            ("hull run --cpus 1.5 i", "cpus: Some(1500)"),
            ("hull run --pids-limit -1 i", "pids_limit: Some(-1)"),
            ("hull run --shm-size 1g i", "shm_size: Some(1073741824)"),
            (
                "hull run --storage-opt size=1g i",
                "storage_opt: Some(1073741824)",
            ),
            ("hull run --network none i", "network: [(None, Endpoint {"),
            (
                "hull run --network container:x i",
                "network: [(Container(\"x\"), Endpoint {",
            ),
            (
                "hull run --net mine i",
                r#"network: [(Named("mine"), Endpoint {"#,
            ),
            (
                "hull run --network bridge i",
                r#"network: [(Named("default"), Endpoint {"#,
            ),
            ("hull run -p 8080:80 i", "host_port: One(8080)"),
            ("hull run -p80 -p 81:81/udp i", "protocol: Udp"),
            (
                "hull run --dns 10.0.0.1 --dns-opt ndots:2 i",
                r#"dns_option: ["ndots:2"]"#,
            ),
            ("hull run --machine qemu i", "machine: Some(Qemu)"),
            ("hull run --pull never i", "pull: Some(Never)"),
            (
                "hull run -l a=b --label c i",
                r#"label: [("a", "b"), ("c", "")]"#,
            ),
            ("hull run --sysctl a.b=1 i", r#"sysctl: [("a.b", "1")]"#),
            ("hull run --ulimit nofile=1:2 i", "soft: 1, hard: 2"),
            (
                "hull run --cap-add NET_ADMIN --cap-drop ALL i",
                r#"cap_add: ["NET_ADMIN"], cap_drop: ["ALL"]"#,
            ),
            ("hull run --tmpfs /run:size=1m i", r#"options: ["size=1m"]"#),
            (
                "hull run --stop-signal SIGINT i",
                r#"stop_signal: Some("SIGINT")"#,
            ),
            ("hull run --name a1 --name b2 i", r#"name: Some("b2")"#),
            ("hull run --entrypoint= i", r#"entrypoint: Some("")"#),
            (
                "hull run --detach-keys ctrl-a i",
                "detach_keys: Some(DetachKeys([1]))",
            ),
            ("hull exec -d -e A -u 0 -w / c true", "detach: true"),
            ("hull ps -aq --no-trunc -f name=x", "all: true"),
            ("hull ps -lq", "latest: true"),
            ("hull ps -n 3 -s", "last: 3, size: true"),
            ("hull ps -n -1", "last: -1"),
            ("hull ps --format {{.ID}}", "format: Some(Lines("),
            (
                "hull inspect -f {{.Id}} --type image x",
                "kind: Some(Image)",
            ),
            ("hull system prune -af --volumes", "all: true, force: true"),
            (
                "hull logs -f --tail 5 -t --since 10m c",
                "tail: Tail(Some(5))",
            ),
            ("hull logs -n all c", "tail: Tail(None)"),
            ("hull stop -t 5 a b", "time: Some(5), all: false"),
            ("hull stop a b", r#"containers: ["a", "b"]"#),
            ("hull stop -a", "all: true"),
            ("hull stop -t -1 a", "time: Some(-1)"),
            ("hull kill a", "signal: 9"),
            ("hull kill -s HUP a", "signal: 1"),
            ("hull rm -f a", "force: true"),
            (
                "hull stats --no-stream --json",
                "no_stream: true, json: true",
            ),
            ("hull attach --no-stdin --detach-keys a c", "no_stdin: true"),
            ("hull cp -L c:/x -", r#"source: "c:/x", destination: "-""#),
            ("hull cp - c:/x", r#"source: "-", destination: "c:/x""#),
            ("hull image pull x", "Pull"),
            ("hull image import oci:d name", "Import"),
            (
                "hull image pull -a --platform linux/arm64 x",
                r#"all_tags: true, platform: Some(Platform { os: "linux", architecture: "arm64""#,
            ),
            (
                "hull image ls -a --digests -f dangling=true",
                "digests: true, filters: [Dangling(true)]",
            ),
            ("hull image prune -a", "all: true"),
            ("hull image tag a b:1", r#"source: "a", target: "b:1""#),
            (
                "hull image save -qo f a b",
                r#"output: Some("f"), quiet: true, images: ["a", "b"]"#,
            ),
            (
                "hull login -u me --password-stdin x.org",
                r#"username: Some("me"), password: None, password_stdin: true"#,
            ),
            ("hull logout x.org", r#"registry: Some("x.org")"#),
            ("hull image push -qa a", "all_tags: true, quiet: true"),
            ("hull image load -q -i f", r#"input: Some("f")"#),
            ("hull image history --no-trunc a", "no_trunc: true"),
            ("hull check --json", "json: true"),
            ("hull kernel info --machine uml", "Some(Uml)"),
            ("hull kernel list", "Ls"),
            ("hull config --default", "default: true"),
            (
                "hull install docker --default",
                "engine: Docker, default: true",
            ),
            ("hull uninstall crio --dry-run", "engine: Crio"),
            (
                "hull run --security-opt seccomp=unconfined i",
                "[Unconfined]",
            ),
            ("hull run --security-opt seccomp=/f i", r#"[Seccomp("/f")]"#),
            (
                "hull run --security-opt no-new-privileges i",
                "[NoNewPrivileges(true)]",
            ),
        ] {
            let shown = shown(line);
            assert!(shown.contains(part), "{line}: {shown}");
        }
    }

    #[test]
    fn every_bad_value_is_one_line_that_names_it() {
        for (line, message) in [
            (
                "hull run",
                "the following required arguments were not provided: <IMAGE>",
            ),
            ("hull run --bogus i", "unexpected argument '--bogus' found"),
            ("hull run -m x i", "--memory: invalid size \"x\""),
            (
                "hull run -m 1m i",
                "--memory: memory limit 1m is too small: at least 6m",
            ),
            (
                "hull run --cpus many i",
                "--cpus: invalid number of CPUs \"many\"",
            ),
            (
                "hull run --name a/b i",
                "--name: invalid container name \"a/b\"",
            ),
            ("hull run -v a:/b i", "--volume: invalid volume \"a:/b\""),
            (
                "hull run -w x i",
                "--workdir: invalid working directory \"x\"",
            ),
            (
                "hull run --network host i",
                "--network: not supported: host: the host's network",
            ),
            (
                "hull run --network container: i",
                "--network: invalid network \"container:\"",
            ),
            (
                "hull run --network a/b i",
                "--network: invalid network \"a/b\"",
            ),
            ("hull run -p x i", "--publish: invalid published port \"x\""),
            (
                "hull run --machine xen i",
                "invalid value 'xen' for '--machine <KIND>'",
            ),
            (
                "hull run --ulimit x=1 i",
                "--ulimit: invalid ulimit \"x=1\"",
            ),
            (
                "hull run --stop-signal NOPE i",
                "--stop-signal: unknown signal \"NOPE\"",
            ),
            (
                "hull run --memory",
                "a value is required for '--memory <SIZE>' but none was supplied",
            ),
            ("hull kill -s NOPE c", "--signal: unknown signal \"NOPE\""),
            (
                "hull stop -t x c",
                "--time: invalid number of seconds \"x\"",
            ),
            ("hull logs --since x c", "--since: \"x\" is no time"),
            (
                "hull image pull --platform a/b/c/d i",
                "--platform: \"a/b/c/d\" is no platform",
            ),
            ("hull image ls -f x", "--filter: invalid filter \"x\""),
            ("hull ps -f x", "--filter: invalid filter \"x\""),
            (
                "hull ps --format {{.ID",
                "--format: template, column 1: {{ has no end",
            ),
            (
                "hull inspect -f {{nope}} c",
                "--format: template, column 3: function \"nope\" is not defined",
            ),
            (
                "hull exec",
                "the following required arguments were not provided: <CONTAINER>",
            ),
            (
                "hull run --security-opt label=x i",
                "--security-opt: invalid security option \"label=x\"",
            ),
            (
                "hull install runc",
                "invalid value 'runc' for '<ENGINE>' [possible values: podman, docker, crio, containerd, systemd]",
            ),
            ("hull run -m -1 i", "--memory: invalid size \"-1\""),
            (
                "hull run --cpus -1 i",
                "--cpus: invalid number of CPUs \"-1\"",
            ),
            ("hull kill -s -9 c", "--signal: unknown signal \"-9\""),
            ("hull swarm c", "not supported: hull swarm"),
            ("hull run --gpus all i", "not supported: --gpus"),
            (
                "hull run --mount type=x i",
                "--mount: invalid mount \"type=x\"",
            ),
            ("hull rename c a/b", "invalid container name \"a/b\""),
            (
                "hull volume create -d nfs v",
                "--driver: not supported: volume driver \"nfs\"",
            ),
            ("hull frobnicate", "unrecognized subcommand 'frobnicate'"),
        ] {
            let words: Vec<OsString> = line.split_whitespace().map(OsString::from).collect();
            let error = crate::error::from_usage(&parse(line).unwrap_err(), &words);
            assert!(
                error.message.starts_with(message),
                "{line}: {}",
                error.message
            );
            assert!(!error.message.contains('\n'), "{line}");
            assert_eq!(crate::error::codes(error.kind).hull, 125, "{line}");
            assert!(error.hint.is_some(), "{line}");
        }
    }

    #[test]
    fn hints_are_near_and_never_destructive() {
        for (line, hint) in [
            ("hull stat", "did you mean hull stats?"),
            ("hull lgos c", "did you mean hull logs?"),
            ("hull psuh x", "hull --help"),
            ("hull kil c", "hull --help"),
            ("hull image pul x", "did you mean hull image pull?"),
            ("hull buildx ls", "hull build builds"),
            (
                "hull run --memroy 1g i",
                "did you mean --memory? hull run --help",
            ),
            ("hull run --whatever 1g i", "hull run --help"),
            (
                "hull run --ipc host i",
                "a container has a kernel of its own",
            ),
        ] {
            let words: Vec<OsString> = line.split_whitespace().map(OsString::from).collect();
            let error = crate::error::from_usage(&parse(line).unwrap_err(), &words);
            let told = error.hint.unwrap_or_default();
            assert!(told.starts_with(hint), "{line}: {told}");
        }
    }

    #[test]
    fn arguments_may_be_any_bytes() {
        let odd = OsString::from_vec(vec![b'x', 0xff]);
        let line = ["hull", "run", "-e"].map(OsString::from);
        let arguments = line.into_iter().chain([odd.clone(), "i".into(), odd]);
        let shown = format!("{:?}", Hull::try_parse_from(arguments).unwrap());
        assert_eq!(shown.matches(r#""x\xFF""#).count(), 2, "{shown}");
    }

    #[test]
    fn no_option_has_an_unexplained_line() {
        fn explained(command: &clap::Command) {
            for argument in command.get_arguments() {
                assert!(
                    argument.get_help().is_some(),
                    "{} {}",
                    command.get_name(),
                    argument.get_id()
                );
            }
            command.get_subcommands().for_each(explained);
        }
        explained(&Hull::command());
    }
}
