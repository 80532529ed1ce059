//! The guest's kernel: what programs in containers find there.

use std::fs;
use std::os::unix::fs::symlink;
use std::time::Duration;

use hull_tests::{
    Hull, Invocation, Output, installed, left_out, older_host_program, on_every_machine,
};

on_every_machine!(
    no_network_interface_is_there_that_nobody_asked_for,
    the_kernel_has_what_container_engines_ask_for,
    programs_that_show_processes_and_processors_work,
    computing_is_user_time,
    each_volume_has_a_device_number_of_its_own,
    epoll_refuses_regular_files,
);

/// `hull run` with this machine's `/usr`, and a root that is otherwise empty.
fn with_usr(hull: &Hull, options: &[&str], command: &[&str]) -> Output {
    let root = hull.path("root");
    if !root.exists() {
        for directory in [
            "usr", "proc", "sys", "dev", "tmp", "etc", "run", "root", "var",
        ] {
            fs::create_dir_all(root.join(directory)).unwrap();
        }
        for name in ["bin", "sbin", "lib", "lib64"] {
            symlink(format!("usr/{name}"), root.join(name)).unwrap();
        }
        for name in ["protocols", "services", "ethertypes", "alternatives"] {
            let from = format!("/etc/{name}");
            let to = root.join("etc").join(name);
            if fs::metadata(&from).is_ok_and(|metadata| metadata.is_file()) {
                fs::copy(from, to).unwrap();
            }
        }
    }
    let reference = format!("rootfs:{}", root.display());
    hull.hull(["run", "--rm", "-v", "/usr:/usr:ro"])
        .args(options)
        .arg(reference)
        .args(command)
        // Emulated machines are slow.
        .limit(Duration::from_secs(100))
        .run()
}

/// Runs each line as a command; the answer is the lines that failed, with why.
fn failing(hull: &Hull, options: &[&str], lines: &[String]) -> String {
    let script = hull.path("lines");
    fs::write(&script, lines.join("\n") + "\n").unwrap();
    let mount = format!("{}:/lines:ro", script.display());
    let every = "while read -r line; do sh -c \"$line\" >/dev/null 2>/tmp/error || \
                 echo \"$line: $(head -n 1 /tmp/error)\"; done </lines";
    let options = [options, &["-v", &mount]].concat();
    with_usr(hull, &options, &["sh", "-c", every]).ok().text()
}

/// What service meshes, engines, kube-proxy and firewalls use.
const RULES: &[&str] = &[
    "-t nat -A OUTPUT -p tcp -m owner --uid-owner 1337 -j RETURN",
    "-t nat -A OUTPUT -m owner ! --gid-owner 1337 -j RETURN",
    "-t nat -A PREROUTING -p tcp -j REDIRECT --to-ports 15001",
    "-t nat -A PREROUTING -p tcp --dport 80 -j DNAT --to-destination 10.1.1.1:80",
    "-t nat -A POSTROUTING -s 10.9.0.0/16 -j SNAT --to-source 10.1.1.2",
    "-t nat -A POSTROUTING -s 10.9.0.0/16 ! -o lo -j MASQUERADE --random-fully",
    "-t nat -A PREROUTING -m addrtype --dst-type LOCAL -j RETURN",
    "-t nat -A PREROUTING -d 10.3.0.0/24 -j NETMAP --to 10.4.0.0/24",
    "-A INPUT -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT",
    "-A INPUT -m state --state INVALID -j DROP",
    "-A INPUT -p tcp -m multiport --dports 80,443 -j ACCEPT",
    "-A INPUT -m comment --comment text -j ACCEPT",
    "-A INPUT -m iprange --src-range 10.0.0.1-10.0.0.9 -j ACCEPT",
    "-A INPUT -m statistic --mode random --probability 0.5 -j ACCEPT",
    "-A INPUT -m limit --limit 5/min -j LOG --log-prefix x",
    "-A INPUT -p tcp -m hashlimit --hashlimit-upto 5/min --hashlimit-name n -j ACCEPT",
    "-A INPUT -m connlimit --connlimit-above 9 -j DROP",
    "-A INPUT -m recent --set",
    "-A INPUT -m string --algo bm --string x -j DROP",
    "-A INPUT -m mac --mac-source 02:00:00:00:00:01 -j ACCEPT",
    "-A INPUT -m pkttype --pkt-type broadcast -j DROP",
    "-A INPUT -m length --length 0:100 -j ACCEPT",
    "-A INPUT -m ttl --ttl-gt 1 -j ACCEPT",
    "-A INPUT -m time --timestart 01:00 -j ACCEPT",
    "-A INPUT -m u32 --u32 '0>>22&0x3C@0=1' -j DROP",
    "-A INPUT -m cgroup --cgroup 1 -j ACCEPT",
    "-A INPUT -p tcp -j REJECT --reject-with tcp-reset",
    "-A INPUT -j NFLOG --nflog-group 1",
    "-A FORWARD -j NFQUEUE --queue-num 1",
    "-A FORWARD -m physdev --physdev-is-bridged -j ACCEPT",
    "-A FORWARD -m policy --dir in --pol none -j ACCEPT",
    "-t mangle -A PREROUTING -m mark --mark 1 -j MARK --set-mark 2",
    "-t mangle -A PREROUTING -m connmark --mark 1 -j CONNMARK --save-mark",
    "-t mangle -A PREROUTING -p tcp -m socket --transparent -j MARK --set-mark 1",
    "-t mangle -A PREROUTING -p tcp -j TPROXY --on-port 15006 --tproxy-mark 1",
    "-t mangle -A FORWARD -p tcp --tcp-flags SYN,RST SYN -j TCPMSS --clamp-mss-to-pmtu",
    "-t mangle -A POSTROUTING -j CLASSIFY --set-class 1:1",
    "-t mangle -A POSTROUTING -j DSCP --set-dscp 1",
    "-t mangle -A POSTROUTING -j TTL --ttl-inc 1",
    "-t mangle -A POSTROUTING -p udp --dport 68 -j CHECKSUM --checksum-fill",
    "-t raw -A PREROUTING -p udp --dport 53 -j CT --zone 1",
    "-t raw -A PREROUTING -p udp -j CT --notrack",
    "-t raw -A PREROUTING -m rpfilter --invert -j DROP",
    "-t security -L -n",
];

/// Those that are spelled otherwise, or have no meaning, for IPv6.
fn of_ipv6(rule: &str) -> Option<String> {
    if rule.contains("u32") {
        return None;
    }
    let words = [
        ("10.1.1.1:80", "[fd00::1]:80"),
        ("10.1.1.2", "fd00::2"),
        ("10.9.0.0/16", "fd09::/16"),
        ("10.3.0.0/24", "fd03::/64"),
        ("10.4.0.0/24", "fd04::/64"),
        ("10.0.0.1-10.0.0.9", "fd00::1-fd00::9"),
        ("-m ttl --ttl-gt", "-m hl --hl-gt"),
        ("TTL --ttl-inc", "HL --hl-inc"),
    ];
    let rule = words
        .iter()
        .fold(rule.to_owned(), |rule, (from, to)| rule.replace(from, to));
    Some(rule)
}

// Three minutes with `qemu`, emulated; the options of its kernel are compared below.
#[test]
fn rules_of_iptables_are_accepted() {
    let hull = Hull::new();
    let mut lines = Vec::new();
    for kind in ["nft", "legacy"] {
        for rule in RULES {
            lines.push(format!("iptables-{kind} {rule}"));
            if let Some(rule) = of_ipv6(rule) {
                lines.push(format!("ip6tables-{kind} {rule}"));
            }
        }
    }
    let failed = failing(&hull, &["--cap-add", "NET_ADMIN"], &lines);
    assert_eq!(failed, "");
}

#[test]
fn sets_links_tunnels_and_traffic_control_work() {
    let hull = Hull::new();
    let mut lines = Vec::new();
    if installed("nft") {
        for line in [
            "add table inet t",
            "add chain inet t c { type filter hook output priority 0; }",
            "add rule inet t c meta skuid 1337 counter accept",
            "add rule inet t c ct state new limit rate 5/second log reject",
            "add rule inet t c numgen random mod 2 vmap { 0 : accept, 1 : drop }",
            "add rule inet t c socket transparent 1 accept",
            "add rule inet t c fib daddr type local queue num 1",
            "add rule inet t c quota over 10 mbytes drop",
            "add set inet t s { type ipv4_addr . inet_service; flags interval; }",
            "add flowtable inet t f { hook ingress priority 0; devices = { lo }; }",
            "add table netdev n",
            "add chain netdev n c { type filter hook ingress device lo priority 0; }",
            "add table bridge b",
            "add chain bridge b c { type filter hook forward priority 0; }",
            "add table ip n",
            "add chain ip n c { type nat hook prerouting priority -100; }",
            "add rule ip n c tcp dport 80 dnat to 10.1.1.1",
            "add rule ip n c tcp dport 81 redirect to :8080",
        ] {
            lines.push(format!("nft '{line}'"));
        }
    } else {
        left_out("nft is not installed");
    }
    if installed("ipset") {
        for (number, kind) in [
            "bitmap:ip range 10.0.0.0/24",
            "bitmap:ip,mac range 10.0.0.0/24",
            "bitmap:port range 1-100",
            "hash:ip",
            "hash:ip,mark",
            "hash:ip,port",
            "hash:ip,port,ip",
            "hash:ip,port,net",
            "hash:ip,mac",
            "hash:mac",
            "hash:net",
            "hash:net,net",
            "hash:net,port",
            "hash:net,port,net",
            "hash:net,iface",
            "list:set",
        ]
        .into_iter()
        .enumerate()
        {
            lines.push(format!("ipset create set{number} {kind}"));
        }
        for kind in ["nft", "legacy"] {
            lines.push(format!(
                "iptables-{kind} -A INPUT -m set --match-set set3 src -j SET --add-set set3 dst"
            ));
        }
    } else {
        left_out("ipset is not installed");
    }
    for (number, kind) in [
        "dummy",
        "veth peer name peer",
        "bridge vlan_filtering 1",
        "wireguard",
        "vxlan id 7 dstport 4789 dev d0",
        "geneve id 7 remote 10.0.0.1",
        "vrf table 7",
        "ipip remote 10.0.0.1 local 10.0.0.2",
        "gre remote 10.0.0.1 local 10.0.0.2",
        "gretap remote 10.0.0.1 local 10.0.0.2",
        "sit remote 10.0.0.1 local 10.0.0.2",
        "ip6tnl remote fd00::1 local fd00::2",
        "ip6gre remote fd00::1 local fd00::2",
        "xfrm if_id 7",
    ]
    .into_iter()
    .enumerate()
    {
        lines.push(format!("ip link add d{number} type {kind}"));
    }
    for kind in [
        "vlan id 7",
        "macvlan mode bridge",
        "macvtap mode bridge",
        "ipvlan mode l2",
    ] {
        let name = kind.split(' ').next().unwrap_or_default();
        // A device has macvlan or ipvlan devices, not both.
        let below = if name == "ipvlan" { "peer" } else { "d0" };
        lines.push(format!("ip link add link {below} name {name}0 type {kind}"));
    }
    lines.push("ip link set d0 up".into());
    let disciplines = [
        "netem delay 10ms loss 1%",
        "tbf rate 1mbit burst 10k latency 50ms",
        "fq",
        "fq_codel",
        "cake",
        "sfq",
        "prio",
        "hfsc default 1",
        "htb default 1",
    ];
    let each = disciplines.map(|one| format!("tc qdisc add dev d0 root handle 1: {one}"));
    // The last one stays, for what is below it.
    lines.push(each.join(" && tc qdisc del dev d0 root && "));
    for line in [
        "class add dev d0 parent 1: classid 1:1 htb rate 1mbit",
        "filter add dev d0 parent 1: protocol ip prio 1 u32 match ip dst 10.0.0.1 flowid 1:1",
        "filter add dev d0 parent 1: protocol ip prio 2 flower dst_ip 10.0.0.2 flowid 1:1",
        "filter add dev d0 parent 1: protocol ip prio 3 handle 7 fw flowid 1:1",
        "qdisc add dev d0 ingress",
        "filter add dev d0 parent ffff: matchall action mirred egress redirect dev lo",
        "filter add dev d0 parent ffff: protocol ip u32 match u32 0 0 police rate 1mbit burst 9k \
         drop",
        "qdisc add dev peer clsact",
        "filter add dev peer ingress matchall action skbedit mark 7",
    ] {
        lines.push(format!("tc {line}"));
    }
    assert_eq!(failing(&hull, &["--cap-add", "NET_ADMIN"], &lines), "");
}

fn no_network_interface_is_there_that_nobody_asked_for(machine: &'static str) {
    let hull = Hull::on(machine);
    let output = hull.run(&[], &["sh", "-c", "echo /sys/class/net/*"]).ok();
    assert_eq!(output.text(), "/sys/class/net/lo");
}

/// Of the list that moby's `check-config.sh` publishes, with what kubelet's checks and kube-proxy
/// add. Not there: huge pages and perf on user-mode Linux, swap, SELinux, AppArmor, btrfs, zfs.
const OPTIONS: &str = "
    NAMESPACES NET_NS PID_NS IPC_NS UTS_NS USER_NS TIME_NS CGROUPS CGROUP_CPUACCT CGROUP_DEVICE
    CGROUP_FREEZER CGROUP_SCHED CGROUP_PIDS CGROUP_BPF CPUSETS MEMCG BLK_CGROUP
    BLK_DEV_THROTTLING CFS_BANDWIDTH FAIR_GROUP_SCHED KEYS POSIX_MQUEUE SECCOMP SECCOMP_FILTER
    VETH BRIDGE BRIDGE_NETFILTER BRIDGE_VLAN_FILTERING VLAN_8021Q VXLAN IPVLAN MACVLAN DUMMY
    CGROUP_NET_PRIO NET_CLS_CGROUP INET XFRM XFRM_USER XFRM_ALGO INET_ESP CRYPTO CRYPTO_AEAD
    CRYPTO_GCM CRYPTO_SEQIV
    IP_NF_FILTER IP_NF_MANGLE IP_NF_NAT IP_NF_RAW IP6_NF_FILTER IP6_NF_MANGLE IP6_NF_NAT IP6_NF_RAW
    NF_NAT NF_TABLES NETFILTER_XT_MATCH_ADDRTYPE NETFILTER_XT_MATCH_BPF NETFILTER_XT_MATCH_COMMENT
    NETFILTER_XT_MATCH_CONNTRACK NETFILTER_XT_MATCH_IPVS NETFILTER_XT_MARK
    NETFILTER_XT_TARGET_CHECKSUM NETFILTER_XT_TARGET_REDIRECT NETFILTER_XT_TARGET_MASQUERADE
    NETFILTER_XT_SET IP_SET IP_VS IP_VS_NFCT IP_VS_PROTO_TCP IP_VS_PROTO_UDP IP_VS_RR IP_VS_SH
    NF_CONNTRACK_FTP NF_NAT_FTP NF_CONNTRACK_TFTP NF_NAT_TFTP NF_CT_NETLINK
    EXT4_FS EXT4_FS_POSIX_ACL EXT4_FS_SECURITY OVERLAY_FS FUSE_FS BLK_DEV_LOOP BLK_DEV_DM";

fn the_kernel_has_what_container_engines_ask_for(machine: &'static str) {
    let hull = Hull::on(machine);
    let configuration = hull.run(&[], &["zcat", "/proc/config.gz"]).ok().text();
    let missing: Vec<&str> = OPTIONS
        .split_whitespace()
        .filter(|option| {
            let line = format!("CONFIG_{option}=y");
            !configuration.lines().any(|other| other == line)
        })
        .collect();
    assert_eq!(missing, Vec::<&str>::new());
}

fn programs_that_show_processes_and_processors_work(machine: &'static str) {
    let hull = Hull::on(machine);
    for program in ["ps", "vmstat", "lscpu"] {
        if !installed(program) {
            left_out(&format!("{program} is not installed"));
            return;
        }
    }
    let lines = [
        "ps aux | grep -q [g]rep",
        "ps -ef | grep -q [g]rep",
        "ps -eo pid,lstart,etime,time,pcpu,psr | grep -q 20",
        "test $(vmstat | wc -l) = 3",
        "vmstat -s | grep -q 'boot time'",
        "free -h | grep -q ^Mem:",
        "uptime | grep -q 'load average'",
        "TERM=dumb top -b -n 1 | grep -q Cpu",
        "test $(nproc) = 1",
        "lscpu | grep -Eq '^CPU.s.: +1$'",
        "lscpu | grep -Eq '^Core.s. per socket: +1$'",
        "grep -Eq '^model name.*[a-zA-Z]' /proc/cpuinfo",
    ]
    .map(str::to_owned);
    assert_eq!(failing(&hull, &[], &lines), "");
}

fn computing_is_user_time(machine: &'static str) {
    let hull = Hull::on(machine);
    // Until the kernel says that enough has been computed, however fast that is.
    let script = "
        import os, resource, signal, time
        fired = []
        for kind, name in ((signal.ITIMER_VIRTUAL, signal.SIGVTALRM), (signal.ITIMER_PROF, signal.SIGPROF)):
            signal.signal(name, lambda *_: fired.append(1))
            signal.setitimer(kind, 0.2)
        before = resource.getrusage(resource.RUSAGE_SELF)
        end = time.process_time() + 1
        while time.process_time() < end: sum(range(1000))
        used = resource.getrusage(resource.RUSAGE_SELF)
        user, system = used.ru_utime - before.ru_utime, used.ru_stime - before.ru_stime
        print(len(fired), user > 0.7, system < 0.3, user + system < 1.5)
        user, nice, system = open('/proc/stat').readline().split()[1:4]
        print(int(user) + int(nice) > 70)
        group = dict(line.split() for line in open('/sys/fs/cgroup/cpu.stat'))
        print(int(group['user_usec']) > 700000)";
    let indent = "\n        ";
    let script = script.replace(indent, "\n");
    let output = with_usr(&hull, &[], &["/usr/bin/python3", "-c", &script]).ok();
    assert_eq!(output.text(), "2 True True True\nTrue\nTrue");
}

fn each_volume_has_a_device_number_of_its_own(machine: &'static str) {
    let hull = Hull::on(machine);
    let (one, two) = (hull.scratch().join("one"), hull.scratch().join("two"));
    for directory in [&one, &two] {
        fs::create_dir_all(directory.join("below")).unwrap();
        fs::write(directory.join("below/file"), "text").unwrap();
    }
    let script = "
        [ $(stat -c %d / /one /two | sort -u | wc -l) = 3 ] || stat -c '%n %d' / /one /two
        [ $(stat -c %d /one /one/below /one/below/file | sort -u | wc -l) = 1 ] || echo inner
        echo new >/one/new; mkdir /one/made; mv /one/new /one/made
        [ $(stat -c %d /one /one/made/new | sort -u | wc -l) = 1 ] || echo new
        find / -xdev | grep -q below && echo found
        find /one -xdev -name file
        for where in / /one /two; do
            listed=$(awk -v where=$where '$5 == where { print $3 }' /proc/self/mountinfo)
            [ \"$(printf %d:%d 0 $(stat -c %d $where))\" = $listed ] || echo $where $listed
        done
        df | grep -Ec ' (/|/one|/two)$'";
    let mount = |path: &std::path::Path, to: &str| format!("{}:{to}", path.display());
    let (one_at, two_at) = (mount(&one, "/one"), mount(&two, "/two"));
    let output = hull
        .run(&["-v", &one_at, "-v", &two_at], &["sh", "-c", script])
        .ok();
    assert_eq!(output.text(), "/one/below/file\n3");
}

fn epoll_refuses_regular_files(machine: &'static str) {
    let hull = Hull::on(machine);
    let volume = format!("{}:/volume", hull.scratch().display());
    let script = "
import select
def one(path):
    with open(path, 'w') as file:
        try:
            select.epoll().register(file.fileno(), select.EPOLLIN)
            refused = False
        except PermissionError:
            refused = True
        return refused, select.select([file], [file], [], 0) == ([file], [file], [])
print(one('/tmp/f'), one('/volume/f'), one('/dev/shm/f'))";
    let output = with_usr(&hull, &["-v", &volume], &["/usr/bin/python3", "-c", script]).ok();
    assert_eq!(output.text(), "(True, True) (True, True) (True, True)");
}

#[test]
fn hardware_watchpoints_of_a_debugger_stop() {
    let hull = Hull::new();
    if !installed("gdb") || !installed("gcc") {
        left_out("gdb or gcc is not installed");
        return;
    }
    let volume = hull.scratch();
    let source = "#include <stdio.h>\nint x;\nint main(void) { for (int i = 0; i < 3; i++) \
                  { x += i; printf(\"%d\\n\", x); } return 0; }\n";
    fs::write(volume.join("watched.c"), source).unwrap();
    Invocation::new("gcc")
        .args(["-g", "-O0", "-o"])
        .args([volume.join("watched"), volume.join("watched.c")])
        .run()
        .ok();
    let mount = format!("{}:/volume", volume.display());
    let options = ["--cap-add", "SYS_PTRACE", "-m", "512m", "-v", &mount];
    let debug = "gdb -nx -batch -ex 'break main' -ex run -ex 'watch x' -ex continue -ex continue \
                 /volume/watched | grep -E '^(Old|New|Hardware watchpoint)' | tr '\\n' ' '";
    let text = with_usr(&hull, &options, &["sh", "-c", debug]).ok().text();
    for part in [
        "Hardware watchpoint 2: x",
        "Old value = 0 New value = 1",
        "Old value = 1 New value = 3",
    ] {
        assert!(text.contains(part), "{text}");
    }
}

#[test]
fn a_host_before_linux_6_3_starts_machines() {
    let hull = Hull::new();
    let older = older_host_program();
    let output = hull
        .hull(["run", "--rm", "busybox", "echo", "works"])
        .under(&[older.to_str().unwrap()])
        .run()
        .ok();
    assert_eq!(output.text(), "works");
}

#[test]
fn databases_find_enough_mappings() {
    let hull = Hull::new();
    let output = hull.run(&[], &["cat", "/proc/sys/vm/max_map_count"]).ok();
    assert!(output.text().parse::<u64>().unwrap() >= 262_144);
}
