fn main() {
    let args: Vec<String> = std::env::args().collect();
    if args.get(1).map(String::as_str) == Some("device-process") {
        let get = |n: &str| {
            args.iter()
                .position(|a| a == n)
                .map(|i| args[i + 1].parse::<i32>().unwrap())
        };
        let r =
            hull_devices::device_process::run(hull_devices::device_process::DeviceProcessOptions {
                control_fd: get("--control-fd").unwrap(),
                fs_fd: get("--fs-fd"),
                vsock_fd: get("--vsock-fd"),
                entropy_fd: get("--entropy-fd"),
                disks: vec![],
            });
        eprintln!("device process: {r:?}");
        return;
    }
    use hull_sandbox::*;
    let paths = Paths::new("/run/hulltry", "/var/lib/hulltry");
    if args.get(1).map(String::as_str) == Some("sandbox-process") {
        let fd = {
            use std::os::fd::AsFd;
            std::io::stdin().as_fd().try_clone_to_owned().unwrap()
        };
        let id = &args[args.iter().position(|a| a == "--id").unwrap() + 1];
        let r = process::run(&paths, id, fd.into());
        eprintln!("sandbox: {r:?}");
        return;
    }
    let began_ns = timings::now_ns();
    let id = names::new_id().unwrap();
    let name = format!("try{}", &id[..8]);
    names::claim(&paths, &name, &id).unwrap();
    let options = spec::ContainerOptions {
        command: args[1..].iter().map(Into::into).collect(),
        hostname: id[..12].into(),
        shm_size: 64 << 20,
        ..Default::default()
    };
    let built = spec::build(&options, &Default::default()).unwrap();
    let kernel = std::env::var("KERNEL").unwrap();
    let request = RunRequest {
        id: id.clone(),
        name,
        image: "x".into(),
        image_id: "y".into(),
        layers: vec!["/tmp/bbroot".into()],
        spec: built.spec,
        raw_args: vec![],
        raw_env: vec![],
        volumes: vec![],
        machine: hull_machine::Choice {
            kind: hull_machine::Kind::Uml,
            hardware: false,
            kernel: kernel.into(),
            why: String::new(),
        },
        initramfs: "/tmp/initramfs".into(),
        memory: 512 << 20,
        cpus: 1,
        auto_remove: true,
        stdin: false,
        stop_signal: "TERM".into(),
        network: "none".into(),
        labels: Default::default(),
        log_size: 1 << 20,
        began_ns,
    };
    let s = client::launch(
        &paths,
        &request,
        &wire::Request::Attach {
            stdin: false,
            size: None,
        },
    )
    .unwrap();
    match client::read_reply(&s) {
        Ok(wire::Reply::Started(t)) => {
            for s in t.steps {
                eprintln!("{:>8} {:>8} {}", s.begin_us, s.took_us, s.name)
            }
        }
        Ok(o) => println!("{o:?}"),
        Err(f) => {
            eprintln!("{f:?}");
            for l in f.console {
                eprintln!("| {l}");
            }
            for s in f.timings.unwrap_or_default().steps {
                eprintln!("{:>8} {:>8} {}", s.begin_us, s.took_us, s.name)
            }
            return;
        }
    }
    let mut p = vec![];
    while let Ok(Some(k)) = wire::read_frame(&s, &mut p) {
        eprintln!(
            "{:>8} {k:?} {}",
            (timings::now_ns() - began_ns) / 1000,
            String::from_utf8_lossy(&p)
        );
    }
}
