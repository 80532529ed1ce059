//! What the reference of Docker's command line shows by examples, in the order of its pages, with
//! other names: `hull` in place of `docker` prints what is documented.
//!
//! A script is one of `sh` in a directory of its own, with its standard error in its output. In
//! what is expected, `…` stands for any text, also of several lines, and may be nothing. `@` is a
//! number and `SUBNET` the beginning of a subnet that no other test has.

use std::process::{Command, Stdio};

use hull_tests::{Hull, executable};

/// What is tried, the script, and what it prints.
type Example = (&'static str, &'static str, &'static str);

/// Runs examples, one after another, with containers that have a network or not.
fn run(page: &str, networked: bool, examples: &[Example]) {
    let hull = match networked {
        true => Hull::networked("uml"),
        false => Hull::new(),
    };
    let directory = hull.scratch();
    // Names and subnets of networks are the host's.
    let number = hull_tests::network::number();
    let subnet = format!("10.{}.{}", 200 + number / 256, number % 256);
    let own = |text: &str| {
        text.replace('@', &number.to_string())
            .replace("SUBNET", &subnet)
    };
    let mut wrong = Vec::new();
    for (what, script, expected) in examples {
        let (script, expected) = (own(script), own(expected));
        let prelude = "set -f; docker() { timeout 60 \"$HULL\" \"$@\"; }; exec 2>&1\n";
        let output = Command::new("sh")
            .args(["-c", &format!("{prelude}{script}")])
            .env("HULL", executable())
            .env("HULL_CONFIG", hull.path("config.toml"))
            .current_dir(&directory)
            .stdin(Stdio::null())
            .output()
            .unwrap();
        let output = String::from_utf8_lossy(&output.stdout);
        let output = output.trim_end().replace('\r', "");
        if !fits(&output, &expected) {
            wrong.push(format!(
                "--- {page}: {what}\n{script}\n--- expected\n{expected}\n--- printed\n{output}\n"
            ));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    hull.hull(["rm", "-f", "-v"]).args(hull.names()).run();
    hull.assert_clean();
}

/// Whether a text is what is expected, with `…` for anything.
fn fits(text: &str, expected: &str) -> bool {
    let mut parts = expected.split('…');
    let first = parts.next().unwrap_or_default();
    let Some(mut rest) = text.strip_prefix(first) else {
        return false;
    };
    let mut last_part = None;
    for part in parts {
        if let Some(part) = last_part.replace(part) {
            match rest.find(part) {
                Some(at) => rest = &rest[at + part.len()..],
                None => return false,
            }
        }
    }
    match last_part {
        None => rest.is_empty(),
        Some(part) => rest.ends_with(part),
    }
}

#[test]
fn the_pattern_of_what_is_expected() {
    for (text, expected, is) in [
        ("a", "a", true),
        ("ab", "a", false),
        ("ab", "a…", true),
        ("", "…", true),
        ("axbyc", "a…b…c", true),
        ("axbyc", "a…d…c", false),
        ("axby", "a…b", false),
    ] {
        assert_eq!(fits(text, expected), is, "{text:?} {expected:?}");
    }
}

#[test]
fn examples_of_docker_run() {
    run(
        "run",
        false,
        &[
            (
                "the exit status is the container's",
                "docker run -i --name test busybox sh -c 'exit 13'; echo $?; \
                 docker ps -a --filter name=test --format '{{.Status}}'; docker rm test",
                "13\nExited (13) … ago\ntest",
            ),
            (
                "--cidfile",
                "docker run --cidfile cid busybox echo test; docker rm $(cat cid) | wc -c; \
                 docker run --cidfile cid busybox true; echo $?; rm cid",
                "test\n65\nerror: …cid…\n125",
            ),
            (
                "--privileged: only then something can be mounted",
                "docker run --rm busybox mount -t tmpfs none /tmp; \
                 docker run --rm --privileged busybox sh -c 'mount -t tmpfs none /tmp; df -h | grep -c /tmp'",
                "mount: permission denied (are you root?)\n1",
            ),
            (
                "-w",
                "docker run --rm -w /path/to/dir/ busybox pwd",
                "/path/to/dir",
            ),
            (
                "--tmpfs",
                "docker run --rm --tmpfs /run:rw,noexec,nosuid,size=65536k busybox \
                 sh -c 'grep \" /run \" /proc/mounts'",
                "tmpfs /run tmpfs rw,nosuid,…noexec,…size=65536k…",
            ),
            (
                "-v with -w",
                "docker run --rm -v $(pwd):$(pwd) -w $(pwd) -i busybox pwd | sed \"s,$(pwd),here,\"",
                "here",
            ),
            (
                "a relative path of a volume",
                "mkdir content; echo x >content/file; \
                 docker run --rm -v ./content:/content busybox cat /content/file",
                "x",
            ),
            (
                "--read-only with a volume",
                "docker run --rm --read-only -v /icanwrite busybox touch /icanwrite/here; echo $?; \
                 docker run --rm --read-only busybox touch /here; echo $?",
                "0\ntouch: /here: Read-only file system\n1",
            ),
            (
                "--mount",
                "docker run --rm --read-only --mount type=volume,target=/icanwrite busybox \
                 touch /icanwrite/here; echo $?; \
                 docker run --rm --mount type=bind,src=$(pwd)/content,dst=/data busybox ls /data",
                "0\nfile",
            ),
            (
                "-e, --env and --env-file",
                "export VAR1=value1 VAR2=value2; printf '# comment\\nVAR3=from file\\nVAR1\\n' >env.list; \
                 docker run --rm -e VAR1 --env VAR2=given --env-file env.list busybox env | grep VAR | sort",
                "VAR1=value1\nVAR2=given\nVAR3=from file",
            ),
            (
                "-l, --label and --label-file",
                "printf 'com.example.label1=\"label1\"\\n# comment\\nmy-label2\\n' >labels; \
                 docker run --name labeled -l my-label --label com.example.foo=bar --label-file labels \
                 busybox true; docker inspect -f '{{json .Config.Labels}}' labeled; docker rm labeled",
                "{\"com.example.foo\":\"bar\",\"com.example.label1\":\"\\\"label1\\\"\",\"my-label\":\"\",\"my-label2\":\"\"}\nlabeled",
            ),
            (
                "--volumes-from several",
                "docker create --name one -v /one busybox >/dev/null; \
                 docker create --name two -v /two busybox >/dev/null; \
                 docker run --rm --volumes-from one --volumes-from two:ro busybox \
                 sh -c 'touch /one/x; touch /two/x; ls -d /one /two'; docker rm -v one two",
                "touch: /two/x: Read-only file system\n/one\n/two\none\ntwo",
            ),
            (
                "-a of some streams",
                "echo test | docker run --rm -i -a stdin busybox cat - | wc -c; \
                 docker run --rm -a stderr busybox echo test; \
                 echo shown | docker run --rm -i -a stdin -a stdout busybox cat",
                "65\nshown",
            ),
            (
                "--restart always",
                "docker run -d --restart=always --name redis busybox sh -c 'echo x; sleep 0.2' >/dev/null; \
                 until [ $(docker inspect -f '{{.RestartCount}}' redis) -ge 2 ]; do sleep 0.1; done; \
                 docker inspect -f '{{.HostConfig.RestartPolicy.Name}}' redis; docker rm -f redis",
                "always\nredis",
            ),
            (
                "--restart on-failure:2 gives up",
                "docker run -d --restart=on-failure:2 --name flop busybox sh -c 'exit 1' >/dev/null; \
                 until [ $(docker inspect -f '{{.RestartCount}} {{.State.Status}}' flop | tr -d ' ') = 2exited ]; \
                 do sleep 0.1; done; docker wait flop; docker rm flop",
                "1\nflop",
            ),
            (
                "--ulimit",
                "docker run --rm --ulimit nofile=1024:1024 busybox sh -c 'ulimit -n'",
                "1024",
            ),
            (
                "--sysctl",
                "docker run --rm --sysctl net.ipv4.ip_forward=1 busybox \
                 cat /proc/sys/net/ipv4/ip_forward",
                "1",
            ),
            (
                "-h, --user, --entrypoint and --group-add",
                "docker run --rm -h web busybox hostname; \
                 docker run --rm --user 1000:50 --group-add 7 busybox id; \
                 docker run --rm --entrypoint /bin/echo busybox hello",
                "web\nuid=1000 gid=50… groups=7,50…\nhello",
            ),
            (
                "--init",
                "docker run --rm --init busybox ps -o pid,comm | head -n 2 | tr -s ' '",
                "PID COMMAND\n 1 …init…",
            ),
            (
                "-m and --cpus",
                "docker run --rm -m 300M busybox cat /sys/fs/cgroup/memory.max; \
                 docker run --rm --cpus 0.5 busybox cat /sys/fs/cgroup/cpu.max",
                "314572800\n50000 100000",
            ),
            (
                "--pull never and an image that is not there",
                "docker run --pull never localhost:1/nobody true; echo $?",
                "error: …localhost:1/nobody…\n125",
            ),
            (
                "commands that are not there, or no programs",
                "docker run --rm busybox foo; echo $?; docker run --rm busybox /etc; echo $?; \
                 docker run --foo busybox; echo $?",
                "error: …foo…\n127\nerror: …/etc…\n126\nerror: …--foo…\n125",
            ),
            (
                "-d with --rm and --name",
                "docker run -d --rm --name short busybox sleep 1000 | wc -c; docker stop -t 0 short; \
                 docker ps -aq -f name=short",
                "65\nshort",
            ),
            (
                "--stop-signal and --stop-timeout",
                "docker run -d --stop-signal USR1 --stop-timeout 5 --name sig busybox \
                 sh -c 'trap \"echo got; exit 3\" USR1; while :; do sleep 0.1; done' >/dev/null; sleep 0.5; \
                 docker stop sig; docker logs sig; docker wait sig; docker rm sig",
                "sig\ngot\n3\nsig",
            ),
        ],
    );
}

#[test]
fn examples_of_docker_run_with_networks() {
    run(
        "run",
        true,
        &[
            (
                "-p and --expose",
                "docker run -d --name web -p 127.0.0.1:0:8080/tcp --expose 90 busybox sleep 1000 >/dev/null; \
                 docker port web; docker inspect -f '{{range $p, $conf := .NetworkSettings.Ports}} {{$p}}{{end}}' web; \
                 docker rm -f web",
                "8080/tcp -> 127.0.0.1:…\n 8080/tcp 90/tcp\nweb",
            ),
            (
                "-P publishes what is exposed",
                "docker run -d --name web -P --expose 81 busybox sleep 1000 >/dev/null; \
                 docker port web 81; docker rm -f web",
                "0.0.0.0:…\nweb",
            ),
            (
                "--add-host",
                "docker run --rm --add-host docker:93.184.216.34 --add-host my=10.0.0.7 busybox \
                 grep -E 'docker|my' /etc/hosts; \
                 docker run --rm --add-host host.docker.internal=host-gateway busybox \
                 grep -c host.docker.internal /etc/hosts",
                "93.184.216.34\tdocker\n10.0.0.7\tmy\n1",
            ),
            (
                "--network with --ip, and the network of another container",
                "docker network create --subnet SUBNET.0/24 my-net@ >/dev/null; \
                 docker run -d --name first --network my-net@ --ip SUBNET.75 busybox sleep 1000 >/dev/null; \
                 docker run --rm --network container:first busybox hostname -i; \
                 docker inspect -f '{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}' first; \
                 docker rm -f first; docker network rm my-net@",
                "SUBNET.75…\nSUBNET.75\nfirst\nmy-net@",
            ),
            (
                "--network none",
                "docker run --rm --network none busybox ip -o link | wc -l",
                "1",
            ),
            (
                "--dns",
                "docker run --rm --dns 9.9.9.9 --dns-search example.com --dns-option ndots:2 busybox \
                 cat /etc/resolv.conf",
                "…nameserver 9.9.9.9\nsearch example.com\noptions ndots:2",
            ),
        ],
    );
}

#[test]
fn examples_of_docker_exec() {
    run(
        "exec",
        false,
        &[
            (
                "a container, and a command in it",
                "docker run --name mycontainer -d -i -t busybox sh >/dev/null; \
                 docker exec -d mycontainer touch /tmp/execWorks; sleep 0.5; \
                 docker exec mycontainer ls /tmp",
                "execWorks",
            ),
            (
                "-e is set in that process only",
                "docker exec -e VAR_A=1 -e VAR_B=2 mycontainer env | grep VAR; \
                 docker exec mycontainer env | grep -c VAR",
                "VAR_A=1\nVAR_B=2\n0",
            ),
            (
                "--env-file",
                "echo VAR_C=3 >list; docker exec --env-file list mycontainer env | grep VAR",
                "VAR_C=3",
            ),
            (
                "-w",
                "docker exec mycontainer pwd; docker exec -w /root mycontainer pwd",
                "/\n/root",
            ),
            (
                "several commands need a shell",
                "docker exec mycontainer sh -c 'echo a && echo b'; docker exec mycontainer 'echo a'; echo $?",
                "a\nb\nerror: …\n127",
            ),
            (
                "-u and --privileged",
                "docker exec -u 1000 mycontainer id -u; \
                 docker exec mycontainer grep CapEff /proc/self/status; \
                 docker exec --privileged mycontainer grep CapEff /proc/self/status",
                "1000\nCapEff:\t00000000a80425fb\nCapEff:\t000001ffffffffff",
            ),
            ("-i", "echo given | docker exec -i mycontainer cat", "given"),
            (
                "a paused container",
                "docker pause mycontainer; docker exec mycontainer sh; echo $?; docker unpause mycontainer",
                "mycontainer\nerror: …paused…\n1\nmycontainer",
            ),
            (
                "one that does not run",
                "docker stop -t 0 mycontainer; docker exec mycontainer true; echo $?",
                "mycontainer\nerror: …not running…\n1",
            ),
        ],
    );
}

#[test]
fn examples_of_docker_ps() {
    run(
        "ps",
        true,
        &[
            (
                "the table",
                "docker run -d --name web --label color=blue --label shape busybox sleep 1000 >/dev/null; \
                 docker run --name done --label color=red busybox sh -c 'exit 3'; \
                 docker ps; docker ps -a -q | wc -l",
                "CONTAINER ID   IMAGE…COMMAND…CREATED…STATUS…PORTS…NAMES\n…busybox…\"sleep 1000\"…Up …web\n2",
            ),
            (
                "--no-trunc",
                "docker ps --no-trunc -q | head -n 1 | wc -c",
                "65",
            ),
            (
                "--size",
                "docker exec web sh -c 'head -c 5000 /dev/zero >/x'; docker ps -s",
                "…SIZE\n…B (virtual …B)",
            ),
            (
                "filters: label",
                "docker ps -a -f label=color --format '{{.Names}}' | sort; \
                 docker ps -a -f label=color=blue --format '{{.Names}}'; docker ps -f label=nothing -q",
                "done\nweb\nweb",
            ),
            (
                "filters: name, by a pattern",
                "docker ps -a -f name=on --format '{{.Names}}'; docker ps -a -f name=^web$ --format '{{.Names}}'",
                "done\nweb",
            ),
            (
                "filters: exited and status",
                "docker ps -a -f exited=3 --format '{{.Names}}'; docker ps -a -f exited=0 -q; \
                 docker ps -f status=running --format '{{.Names}}'; docker ps -f status=paused -q; \
                 docker ps -f status=exited --format '{{.Names}}'",
                "done\nweb\ndone",
            ),
            (
                "filters: ancestor",
                "docker ps -a -f ancestor=busybox --format '{{.Names}}' | sort; docker ps -f ancestor=other -q; \
                 docker ps -f ancestor=busybox:latest --format '{{.Names}}'; \
                 docker ps -f ancestor=$(docker images -q busybox) --format '{{.Names}}'",
                "done\nweb\nweb\nweb",
            ),
            (
                "filters: before and since",
                "docker ps -a -f before=done --format '{{.Names}}'; docker ps -a -f since=web --format '{{.Names}}'",
                "web\ndone",
            ),
            (
                "filters: volume, network, publish and expose",
                "docker volume create remote-volume >/dev/null; \
                 docker run -d --name vol --volume remote-volume:/remote -p 127.0.0.1:0:80 busybox sleep 1000 >/dev/null; \
                 docker ps -f volume=remote-volume --format '{{.Mounts}}'; \
                 docker ps -f volume=/remote --format '{{.Names}}'; \
                 docker ps -f network=none -q; docker ps -f network=bridge --format '{{.Names}}' | sort; \
                 docker ps -f expose=80/tcp --format '{{.Names}}'; docker ps -f publish=1 -q; \
                 docker ps -f id=$(docker ps -q -f name=vol) --format '{{.Names}}'",
                "remote-volume\nvol\nvol\nweb\nvol\nvol",
            ),
            (
                "--last and --latest",
                "docker ps -l --format '{{.Names}}'; docker ps -n 2 --format '{{.Names}}'",
                "vol\nvol\ndone",
            ),
            (
                "--format",
                "docker ps -f name=web --format '{{.ID}}: {{.Command}}'; \
                 docker ps -f name=web --format 'table {{.Names}}\\t{{.Labels}}'; \
                 docker ps -f name=web --format '{{.Label \"color\"}} {{.State}} {{.Networks}} {{.Image}}'; \
                 docker ps -f name=web --format json",
                "…: \"sleep 1000\"\nNAMES …LABELS\nweb …color=blue,shape=\nblue running default busybox\n{…\"Names\":\"web\"…}",
            ),
            (
                "a filter that there is not",
                "docker ps -f colour=red; echo $?",
                "error: …colour…\n125",
            ),
        ],
    );
}

#[test]
fn examples_of_docker_logs() {
    run(
        "logs",
        false,
        &[
            (
                "-f with --until",
                "docker run --name test -d busybox sh -c 'while true; do date; sleep 0.2; done' >/dev/null; \
                 sleep 1.5; docker logs -f --until=1s test | head -n 1 | wc -l; docker rm -f test",
                "1\ntest",
            ),
            (
                "--tail, -n, and both streams",
                "docker run --name test busybox sh -c 'echo 1; echo 2; echo 3 >&2'; \
                 docker logs test 2>/dev/null; docker logs --tail 1 test; docker logs -n 2 test; docker logs --tail all test 2>&1 | wc -l",
                "1\n2\n3\n1\n2\n3\n2\n3\n3",
            ),
            (
                "-t and --since",
                "docker logs -t -n 1 test 2>&1 | grep -cE '^20[0-9-]+T[0-9:.]+Z 3$'; docker logs --since 1h test 2>&1 | wc -l; \
                 docker logs --since 2999-01-01T00:00:00 test; docker logs --since 1s --until 1h test",
                "1\n3",
            ),
            (
                "without options",
                "docker run --name dd busybox echo x; \
                 docker logs dd; docker rm dd test",
                "x\nx\ndd\ntest",
            ),
            (
                "--log-driver none",
                "docker run --name quiet --log-driver none busybox echo x; docker logs quiet; echo $?",
                "x\nerror: …log…\n1",
            ),
        ],
    );
}

#[test]
fn examples_of_docker_cp() {
    run(
        "cp",
        false,
        &[
            (
                "into a container, and out of it",
                "docker create --name cc busybox sh -c 'cat /work' >/dev/null; echo data >some_file; \
                 docker cp ./some_file cc:/work; docker start -a cc; docker cp cc:/work copy; cat copy",
                "…data\n…data",
            ),
            (
                "directories, and their content",
                "mkdir -p src/sub; echo x >src/sub/y; docker cp src cc:/opt; docker cp src/. cc:/opt; \
                 docker cp cc:/opt/ out; find out | sort",
                "out\nout/sub\nout/sub/y",
            ),
            (
                "as an archive",
                "docker cp cc:/work - | tar x -O; tar c some_file | docker cp - cc:/opt; \
                 docker cp cc:/opt/some_file - | tar x -O",
                "data\n…data",
            ),
            (
                "what there is not",
                "docker cp cc:/nothing .; echo $?; docker cp nobody:/x .; echo $?; docker cp some_file cc:/no/where; echo $?",
                "error: …/nothing…\n1\nerror: …nobody…\n1\nerror: …/no…\n1",
            ),
        ],
    );
}

#[test]
fn examples_of_docker_inspect() {
    run(
        "inspect",
        true,
        &[
            (
                "addresses",
                "docker run -d --name cc -p 127.0.0.1:0:8787 busybox sleep 1000 >/dev/null; \
                 docker inspect --format='{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}' cc; \
                 docker inspect --format='{{range .NetworkSettings.Networks}}{{.MacAddress}}{{end}}' cc",
                "10.…\n…:…:…:…:…:…",
            ),
            (
                "log and image",
                "docker inspect --format='{{.LogPath}}' cc; docker inspect --format='{{.Config.Image}}' cc",
                "/…log\nbusybox",
            ),
            (
                "ports",
                "docker inspect --format='{{range $p, $conf := .NetworkSettings.Ports}} {{$p}} -> {{(index $conf 0).HostPort}} {{end}}' cc; \
                 docker inspect --format='{{(index (index .NetworkSettings.Ports \"8787/tcp\") 0).HostPort}}' cc",
                " 8787/tcp -> … \n…",
            ),
            (
                "a part as JSON",
                "docker inspect --format='{{json .Config}}' cc; docker inspect -f '{{json .State.Running}}' cc",
                "{…\"Cmd\":[\"sleep\",\"1000\"]…}\ntrue",
            ),
            (
                "several, and of other types",
                "docker inspect --type=image busybox -f '{{.Os}}'; docker inspect --type=network bridge -f '{{.Driver}}'; \
                 docker inspect -f '{{.Name}}' cc cc; docker inspect -s -f '{{.SizeRw}}' cc",
                "linux\nbridge\n/cc\n/cc\n…",
            ),
            (
                "one that there is not",
                "docker inspect nobody; echo $?",
                "[]\nerror: …nobody…\n1",
            ),
        ],
    );
}

#[test]
fn examples_of_docker_volume() {
    run(
        "volume",
        false,
        &[
            (
                "create and use",
                "docker volume create hello; docker run --rm -v hello:/world busybox ls /world; \
                 docker run --rm -v hello:/world busybox sh -c 'echo x >/world/y'; \
                 docker run --rm -v hello:/other busybox ls /other",
                "hello\ny",
            ),
            (
                "filters of ls",
                "docker volume create rosemary >/dev/null; docker volume create --label is-timelord=yes doctor >/dev/null; \
                 docker volume ls -q; docker volume ls -f name=rose; docker volume ls -q -f label=is-timelord; \
                 docker volume ls -q -f label=is-timelord=no; docker volume ls -q -f driver=local | wc -l; \
                 docker create --name user -v hello:/x busybox >/dev/null; docker volume ls -q -f dangling=true",
                "doctor\nhello\nrosemary\nDRIVER   VOLUME NAME\nlocal    rosemary\ndoctor\n3\ndoctor\nrosemary",
            ),
            (
                "--format of ls",
                "docker volume ls --format '{{.Name}}: {{.Driver}}'; docker volume ls -f name=doctor --format json",
                "doctor: local\nhello: local\nrosemary: local\n{…\"Name\":\"doctor\"…}",
            ),
            (
                "inspect",
                "docker volume inspect -f '{{ .Mountpoint }}' hello; docker volume inspect hello",
                "/…/hello/_data\n[\n…\"Name\": \"hello\",…\"Driver\": \"local\",…\"CreatedAt\": \"…\",…]",
            ),
            (
                "rm of one that is used, and of others",
                "docker volume rm hello; echo $?; docker volume rm doctor rosemary; docker rm user; docker volume rm hello; \
                 docker volume rm hello; echo $?; docker volume rm -f hello; echo $?",
                "error: …hello…user…\n1\ndoctor\nrosemary\nuser\nhello\nerror: …hello…\n1\n…0",
            ),
            (
                "prune",
                "docker volume create >/dev/null; docker volume create named >/dev/null; \
                 docker volume prune -f; docker volume prune -a -f; docker volume ls -q",
                "…named…",
            ),
        ],
    );
}

#[test]
fn examples_of_docker_network() {
    run(
        "network",
        true,
        &[
            (
                "create",
                "docker network create -d bridge my-bridge@ | wc -c; \
                 docker network create --driver=bridge --ipv6=false --subnet=SUBNET.0/24 --ip-range=SUBNET.128/25 --gateway=SUBNET.254 br@ >/dev/null; \
                 docker network inspect -f '{{range .IPAM.Config}}{{.Subnet}} {{.Gateway}} {{.IPRange}}{{end}}' br@; \
                 docker run --rm --network br@ busybox ip -o -4 route; \
                 docker run --rm --network br@ --ip SUBNET.7 busybox ip -o -4 route | grep -c SUBNET.7; \
                 docker network rm br@",
                "65\nSUBNET.0/24 SUBNET.254 SUBNET.128/25\ndefault via SUBNET.254 dev eth0 \nSUBNET.0/24 …src SUBNET.128 \n1\nbr@",
            ),
            (
                "connect a running container, with an address and with aliases",
                "docker network create --subnet SUBNET.0/24 multi@ >/dev/null; \
                 docker run -itd --name container1 busybox >/dev/null; \
                 docker network connect --ip SUBNET.122 --alias db --alias mysql multi@ container1; \
                 docker run --rm --network multi@ busybox ping -4 -c 1 -W 5 db | grep -c SUBNET.122; \
                 docker network inspect -f '{{range .Containers}}{{.Name}} {{.IPv4Address}}{{end}}' multi@; \
                 docker network disconnect multi@ container1; \
                 docker inspect -f '{{range $name, $n := .NetworkSettings.Networks}}{{$name}} {{end}}' container1",
                "2\ncontainer1 SUBNET.122/24\ndefault",
            ),
            (
                "start a container in a network, and connect by links",
                "docker run -itd --network=multi@ --name container2 busybox >/dev/null; \
                 docker network connect --link container2:c2 multi@ container1; \
                 docker exec container1 ping -c 1 -W 5 c2 | grep -c '1 packets received'",
                "1",
            ),
            (
                "ls, with filters",
                "docker network ls -f name=multi@; docker network ls -f type=custom --format '{{.Name}}: {{.Driver}}' | sort; \
                 docker network ls --no-trunc --format '{{.ID}}' -f name=multi@ | wc -c; docker network ls -f driver=bridge -q | wc -l; \
                 docker network ls -f id=$(docker network ls --format '{{.ID}}' -f name=multi@) --format '{{.Name}}'",
                "NETWORK ID …NAME …DRIVER …SCOPE…\n… multi@ …bridge …local…\nmulti@: bridge\nmy-bridge@: bridge\n65\n3\nmulti@",
            ),
            (
                "rm",
                "docker network rm multi@; echo $?; docker rm -f container1 container2; docker network rm my-bridge@ multi@",
                "error: …multi@…container…\n1\ncontainer1\ncontainer2\nmy-bridge@\nmulti@",
            ),
            (
                "prune",
                "docker network create one@ >/dev/null; docker network create two@ >/dev/null; docker network prune -f",
                "…one@\ntwo@…",
            ),
        ],
    );
}

#[test]
fn examples_of_docker_image() {
    run(
        "image",
        false,
        &[
            (
                "ls",
                "docker image tag busybox fedora/httpd:version1.0; docker image ls; docker images -q | sort -u | wc -l",
                "REPOSITORY …TAG …IMAGE ID …CREATED …SIZE\n…fedora/httpd …version1.0 …\n…busybox …latest …\n1",
            ),
            (
                "ls by names, tags and patterns",
                "docker images busybox --format '{{.Repository}}:{{.Tag}}'; docker images fedora/httpd:version1.0 -q | wc -l; \
                 docker images nothing; docker images -f reference='fed*/*' --format '{{.Repository}}'; \
                 docker images --no-trunc -q busybox; docker images --digests | head -n 1",
                "busybox:latest\n1\nREPOSITORY …SIZE\nfedora/httpd\nsha256:…\nREPOSITORY …DIGEST …SIZE",
            ),
            (
                "filters: dangling, label, before and since",
                "docker run --name cc busybox touch /x; docker commit -c 'LABEL com.example.version=1' cc app >/dev/null; \
                 docker images -f label=com.example.version --format '{{.Repository}}'; \
                 docker images -f since=busybox --format '{{.Repository}}'; \
                 docker images -f before=app --format '{{.Repository}}' | sort; docker commit cc app >/dev/null; \
                 docker images -f dangling=true --format '{{.Repository}}:{{.Tag}}'; docker images -f dangling=true -q | wc -l",
                "app\napp\nbusybox\nfedora/httpd\n<none>:<none>\n1",
            ),
            (
                "history",
                "docker history app; docker history --no-trunc -q app | wc -l",
                "IMAGE …CREATED …CREATED BY …SIZE …COMMENT\n…\n…",
            ),
            (
                "save and load",
                "docker save -o app.tar app busybox; docker rm cc >/dev/null; docker rmi app >/dev/null; docker load -i app.tar; \
                 docker load -q <app.tar; docker run --rm app ls /x",
                "…app:latest…\n…busybox:latest…\n/x",
            ),
            (
                "rm by name untags",
                "docker rmi fedora/httpd:version1.0; docker image prune -f | head -n 1; docker rmi nobody; echo $?",
                "Untagged: …fedora/httpd:version1.0\n…\nerror: …nobody…\n1",
            ),
            (
                "rm of one that a container uses",
                "docker create --name user app >/dev/null; docker rmi app; echo $?; docker rm user; docker rmi app | head -n 1",
                "error: …app…\n1\nuser\nUntagged: …app:latest",
            ),
            (
                "import",
                "docker create --name cc busybox >/dev/null; docker export cc | docker import -c 'CMD [\"echo\",\"hi\"]' - flat:new | cut -c 1-7; \
                 docker run --rm flat:new; docker rm cc",
                "sha256:\nhi\ncc",
            ),
            (
                "inspect",
                "docker image inspect -f '{{.Architecture}} {{index .RepoTags 0}}' busybox; docker image inspect nobody; echo $?",
                "amd64 busybox:latest\n[]\nerror: …nobody…\n1",
            ),
        ],
    );
}
