//! podman with hull as its runtime: pods, `kube play`, builds.

use std::time::Duration;

use hull_tests::{Podman, eventually, left_out};

const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

fn pod(podman: &Podman) -> String {
    let name = podman.unique("pod");
    podman
        .podman(["pod", "create", "--network", "none", "--name", &name])
        .run()
        .ok();
    name
}

#[test]
fn podman_containers_of_a_pod_share_one_machine() {
    let podman = Podman::new();
    let pod = pod(&podman);
    let one = podman.sleeper(&["--pod", &pod]);
    let two = podman.sleeper(&["--pod", &pod]);
    let alone = podman.sleeper(&[]);
    let machine = |name: &str| podman.exec(name, &["cat", BOOT_ID]).ok().text();
    assert_eq!(machine(&one), machine(&two));
    if !podman.runtime.is_hull() {
        return left_out("containers of this runtime share the host's kernel");
    }
    assert_ne!(machine(&one), machine(&alone));
    let host = std::fs::read_to_string(BOOT_ID).unwrap();
    for name in [&one, &alone] {
        assert_ne!(machine(name), host.trim());
    }
}

#[test]
fn podman_containers_of_a_pod_talk_over_localhost_and_share_a_host_name() {
    let podman = Podman::new();
    let pod = pod(&podman);
    let server = podman.ready(
        &["--pod", &pod],
        "echo ready; while :; do echo hello | nc -l -p 4321 127.0.0.1; done",
    );
    let client = podman.sleeper(&["--pod", &pod]);
    eventually("an answer", Duration::from_secs(20), || {
        podman
            .exec_sh(&client, "nc 127.0.0.1 4321 </dev/null")
            .text()
            == "hello"
    });
    let hostname = |name: &str| podman.exec(name, &["hostname"]).ok().text();
    assert_eq!(hostname(&server), hostname(&client));
}

#[test]
fn podman_containers_of_a_pod_have_files_and_processes_of_their_own() {
    let podman = Podman::new();
    let pod = pod(&podman);
    let one = podman.ready(&["--pod", &pod], "echo ready; sleep 1234 & wait");
    let two = podman.sleeper(&["--pod", &pod]);
    podman.exec_sh(&one, "echo mine >/root/file").ok();
    podman.exec(&two, &["test", "-e", "/root/file"]).ends(1);
    let processes = podman.exec(&two, &["ps", "-o", "args"]).ok().text();
    assert!(!processes.contains("sleep 1234"), "{processes}");
}

#[test]
fn podman_containers_of_a_pod_share_memory() {
    let podman = Podman::new();
    let pod = pod(&podman);
    let one = podman.sleeper(&["--pod", &pod]);
    let two = podman.sleeper(&["--pod", &pod]);
    let alone = podman.sleeper(&[]);
    podman.exec_sh(&one, "echo seen >/dev/shm/file").ok();
    let seen = podman.exec_sh(&two, "cat /dev/shm/file").ok();
    assert_eq!(seen.text(), "seen");
    podman.exec_sh(&alone, "test ! -e /dev/shm/file").ok();
}

#[test]
fn podman_ipc_of_another_container_is_its_memory_too() {
    let podman = Podman::new();
    let one = podman.sleeper(&["--shm-size", "2m"]);
    let two = podman.sleeper(&["--ipc", &format!("container:{one}")]);
    podman.exec_sh(&one, "echo seen >/dev/shm/file").ok();
    let seen = podman.exec_sh(&two, "cat /dev/shm/file").ok();
    assert_eq!(seen.text(), "seen");
    let full = "dd if=/dev/zero of=/dev/shm/full bs=1M count=3";
    let full = podman.exec_sh(&two, full);
    assert!(full.error().contains("No space left"), "{}", full.error());
    // podman removes them in this order only.
    podman.podman(["rm", "-f", "-t", "0", &two]).run().ok();
}

#[test]
fn podman_containers_of_a_pod_end_alone_and_the_pod_as_a_whole() {
    let podman = Podman::new();
    let pod = pod(&podman);
    let one = podman.sleeper(&["--pod", &pod]);
    let two = podman.sleeper(&["--pod", &pod]);
    podman.does("stop", &one).ok();
    podman.does("rm", &one).ok();
    podman.exec(&two, &["true"]).ok();
    // A later container is in the same machine.
    let three = podman.sleeper(&["--pod", &pod]);
    let machine = |name: &str| podman.exec(name, &["cat", BOOT_ID]).ok().text();
    assert_eq!(machine(&two), machine(&three));
    podman.podman(["pod", "stop", "-t", "2", &pod]).run().ok();
    assert_eq!(podman.state(&two), "exited");
    podman.podman(["pod", "start", &pod]).run().ok();
    podman.exec(&two, &["true"]).ok();
    podman.podman(["pod", "rm", "-f", &pod]).run().ok();
    podman.assert_clean();
}

#[test]
fn podman_kube_play_runs_a_small_pod() {
    let podman = Podman::new();
    let file = podman.scratch().join("pod.yaml");
    let yaml = "
apiVersion: v1
kind: Pod
metadata:
  name: small
spec:
  restartPolicy: Never
  volumes:
  - name: shared
    emptyDir: {}
  containers:
  - name: writer
    image: localhost/busybox:latest
    imagePullPolicy: Never
    command: [sh, -c, 'echo $GREETING >/shared/file; trap \"exit 0\" TERM; sleep 1000 & wait']
    env:
    - name: GREETING
      value: hello
    resources:
      limits:
        memory: 64Mi
    volumeMounts:
    - name: shared
      mountPath: /shared
  - name: reader
    image: localhost/busybox:latest
    imagePullPolicy: Never
    command: [sh, -c, 'until [ -s /shared/file ]; do sleep 0.05; done; cat /shared/file; trap \"exit 0\" TERM; sleep 1000 & wait']
    volumeMounts:
    - name: shared
      mountPath: /shared
";
    std::fs::write(&file, yaml).unwrap();
    podman
        .podman(["kube", "play", "--network", "none"])
        .arg(&file)
        .run()
        .ok();
    eventually("what the other one wrote", Duration::from_secs(20), || {
        podman.logs("small-reader") == "hello"
    });
    let machine = |name: &str| podman.exec(name, &["cat", BOOT_ID]).ok().text();
    assert_eq!(machine("small-reader"), machine("small-writer"));
    podman.podman(["kube", "down"]).arg(&file).run().ok();
    let left = podman.podman(["ps", "-a", "-q"]).run().ok().text();
    assert_eq!(left, "");
}

#[test]
fn podman_build_runs_its_steps_in_the_runtime() {
    let podman = Podman::new();
    let directory = podman.scratch().join("context");
    std::fs::create_dir_all(&directory).unwrap();
    std::fs::write(directory.join("file"), "content\n").unwrap();
    let recipe = "FROM localhost/busybox\n\
                  ENV A=b\n\
                  COPY file /file\n\
                  RUN echo $A >/made && cat /file >>/made && uname -r >/kernel\n\
                  USER nobody\n\
                  RUN id -u >/tmp/user\n\
                  CMD [\"cat\", \"/made\"]\n";
    std::fs::write(directory.join("Containerfile"), recipe).unwrap();
    podman
        .podman(["build", "--network", "none", "--isolation", "oci"])
        .args(["--ulimit", "nofile=1024:4096", "-t", "built"])
        .arg(&directory)
        .run()
        .ok();
    let run = |command: &[&str]| {
        podman
            .podman(["run", "--rm", "--network", "none", "built"])
            .args(command)
            .run()
            .ok()
            .text()
    };
    assert_eq!(run(&[]), "b\ncontent");
    assert_eq!(run(&["cat", "/tmp/user"]), "65534");
    if podman.runtime.is_hull() {
        let kernel = run(&["cat", "/kernel"]);
        assert!(kernel.ends_with("-hull"), "{kernel}");
    }
}

#[test]
fn podman_build_fails_with_the_step_that_fails() {
    let podman = Podman::new();
    let directory = podman.scratch().join("context");
    std::fs::create_dir_all(&directory).unwrap();
    let recipe = "FROM localhost/busybox\nRUN echo before && exit 42\n";
    std::fs::write(directory.join("Containerfile"), recipe).unwrap();
    let output = podman
        .podman(["build", "--network", "none", "--isolation", "oci"])
        .args(["--ulimit", "nofile=1024:4096", "-t", "built"])
        .arg(&directory)
        .run();
    assert_ne!(output.status, 0);
    assert!(output.error().contains("42"), "{}", output.error());
}

#[test]
fn buildah_run_uses_the_runtime() {
    let podman = Podman::new();
    let buildah = |arguments: &[&str]| podman.buildah(arguments).run().ok().text();
    let name = buildah(&["from", "--pull-never", "localhost/busybox"]);
    let runtime = podman.runtime.path.display().to_string();
    let run = [
        "run",
        "--isolation",
        "oci",
        "--network",
        "none",
        "--runtime",
    ];
    let in_it = |script: &str| {
        podman
            .buildah(&run)
            .args([&runtime, &name, "--", "sh", "-c", script])
            .run()
    };
    in_it("echo made >/made").ok();
    assert_eq!(in_it("cat /made").ok().text(), "made");
    in_it("exit 3").ends(3);
    if podman.runtime.is_hull() {
        let kernel = in_it("uname -r").ok().text();
        assert!(kernel.ends_with("-hull"), "{kernel}");
    }
    buildah(&["rm", &name]);
}

#[test]
fn podman_containers_of_a_pod_that_share_nothing_start_with_networks_of_their_own() {
    let podman = Podman::with_networks();
    let pod = podman.unique("pod");
    let create = ["pod", "create", "--infra=false", "--name", &pod];
    podman.podman(create).run().ok();
    let options = ["--pod", &pod, "--network", "podman"];
    let one = podman.sleeper(&options);
    let two = podman.sleeper(&options);
    let address = |name: &str| podman.exec_sh(name, "ip -o -4 addr show dev eth0").ok();
    assert_ne!(address(&one).text(), address(&two).text());
}
