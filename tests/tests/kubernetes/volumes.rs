//! Volumes of pods, each kind that the node has itself.

use std::os::unix::net::UnixListener;
use std::path::Path;
use std::time::Duration;

use hull_tests::kubernetes::{Cluster, container, pod, with};
use hull_tests::{LoopDevice, eventually};
use serde_json::{Value, json};

/// A pod that sleeps, with a volume at /v.
fn with_volume(name: &str, volume: Value) -> Value {
    let mut named = volume;
    named["name"] = json!("v");
    with(
        pod(name, "exec sleep 1000"),
        &[
            ("/spec/volumes", json!([named])),
            (
                "/spec/containers/0/volumeMounts",
                json!([{"name": "v", "mountPath": "/v"}]),
            ),
        ],
    )
}

fn host_path(path: &Path, kind: &str) -> Value {
    json!({"hostPath": {"path": path, "type": kind}})
}

#[test]
fn an_empty_directory_is_shared_by_the_containers_and_survives_their_restart() {
    let cluster = Cluster::new();
    let two = with(
        with_volume("two", json!({"emptyDir": {}})),
        &[(
            "/spec/containers/1",
            with(
                container(
                    "other",
                    "until [ -e /v/end ]; do sleep 0.1; done; rm /v/end; exit 1",
                ),
                &[("/volumeMounts", json!([{"name": "v", "mountPath": "/v"}]))],
            ),
        )],
    );
    cluster.run(&two);
    cluster.sh("two/main", "echo kept >/v/file; touch /v/end");
    cluster.until("the other was restarted", "pod", "two", |pod| {
        pod["status"]["containerStatuses"][1]["restartCount"] == 1
    });
    cluster.ready("two");
    assert_eq!(cluster.sh("two/other", "cat /v/file"), "kept");
}

#[test]
fn an_empty_directory_in_memory_is_a_tmpfs_of_its_size() {
    let cluster = Cluster::new();
    let memory = json!({"emptyDir": {"medium": "Memory", "sizeLimit": "8Mi"}});
    cluster.run(&with_volume("one", memory));
    assert!(
        cluster
            .sh("one", "grep ' /v ' /proc/mounts")
            .contains("tmpfs")
    );
    cluster.sh("one", "head -c 4000000 /dev/zero >/v/fits");
    let more = cluster.try_sh("one", "head -c 9000000 /dev/zero >/v/too-much");
    assert_ne!(more.status, 0);
    // It is the guest's: the node has nothing of it.
    let uid = cluster.get("pod", "one")["metadata"]["uid"].clone();
    let directory = format!(
        "/var/lib/kubelet/pods/{}/volumes/kubernetes.io~empty-dir/v",
        uid.as_str().unwrap()
    );
    assert_eq!(std::fs::read_dir(directory).unwrap().count(), 0);
}

#[test]
fn a_volume_in_memory_and_parts_of_it_last_from_the_init_containers_on() {
    let cluster = Cluster::new();
    let mount = json!({"name": "v", "mountPath": "/v"});
    let one = with(
        with_volume("one", json!({"emptyDir": {"medium": "Memory"}})),
        &[
            (
                "/spec/securityContext",
                json!({"runAsUser": 1000, "runAsGroup": 1000, "fsGroup": 2000}),
            ),
            (
                "/spec/initContainers",
                json!([with(
                    container(
                        "init",
                        "mkdir /v/a; echo kept >/v/a/file; echo f >/v/single"
                    ),
                    &[("/volumeMounts", json!([mount]))],
                )]),
            ),
            (
                "/spec/containers/0/volumeMounts/1",
                json!({"name": "v", "mountPath": "/part", "subPath": "a"}),
            ),
            (
                "/spec/containers/0/volumeMounts/2",
                json!({"name": "v", "mountPath": "/new", "subPath": "b/c"}),
            ),
            (
                "/spec/containers/1",
                with(
                    container("other", "exec sleep 1000"),
                    &[("/volumeMounts", json!([mount]))],
                ),
            ),
        ],
    );
    cluster.run(&one);
    assert_eq!(
        cluster.sh("one/main", "cat /v/a/file /part/file"),
        "kept\nkept"
    );
    cluster.sh(
        "one/main",
        "echo new >/new/file; echo '#!/bin/sh' >/v/run; chmod +x /v/run",
    );
    assert_eq!(cluster.sh("one/other", "cat /v/b/c/file; /v/run"), "new");
}

#[test]
fn changes_of_config_maps_secrets_and_labels_reach_the_guest() {
    let cluster = Cluster::new();
    let map = |value: &str| {
        json!({
            "apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "settings"},
            "data": {"colour": value},
        })
    };
    let secret = |value: &str| {
        json!({
            "apiVersion": "v1", "kind": "Secret", "metadata": {"name": "key"},
            "stringData": {"password": value},
        })
    };
    cluster.apply(&map("blue"));
    cluster.apply(&secret("first"));
    let projected = json!({"projected": {"sources": [
        {"configMap": {"name": "settings"}},
        {"secret": {"name": "key"}},
        {"downwardAPI": {"items": [
            {"path": "labels", "fieldRef": {"fieldPath": "metadata.labels"}},
        ]}},
        {"serviceAccountToken": {"path": "token", "expirationSeconds": 600}},
    ]}});
    let one = with(
        with_volume("one", projected),
        &[
            (
                "/spec/volumes/1",
                json!({"name": "map", "configMap": {"name": "settings", "defaultMode": 0o400}}),
            ),
            (
                "/spec/volumes/2",
                json!({"name": "secret", "secret": {"secretName": "key"}}),
            ),
            (
                "/spec/containers/0/volumeMounts/1",
                json!({"name": "map", "mountPath": "/map"}),
            ),
            (
                "/spec/containers/0/volumeMounts/2",
                json!({"name": "secret", "mountPath": "/secret"}),
            ),
            (
                "/spec/containers/0/env",
                json!([
                    {"name": "COLOUR", "valueFrom": {"configMapKeyRef": {"name": "settings", "key": "colour"}}},
                    {"name": "NODE", "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}},
                ]),
            ),
        ],
    );
    cluster.run(&one);
    assert_eq!(cluster.sh("one", "echo $COLOUR $NODE"), "blue node");
    assert_eq!(
        cluster.sh(
            "one",
            "cat /v/colour /v/password /map/colour /secret/password"
        ),
        "bluefirstbluefirst"
    );
    assert_eq!(cluster.sh("one", "stat -L -c %a /map/colour"), "400");
    assert_eq!(cluster.sh("one", "cat /v/labels"), "app=\"one\"");
    assert_eq!(cluster.sh("one", "cut -d . -f 2 /v/token | wc -l"), "1");
    assert_ne!(cluster.try_sh("one", "echo x >/map/colour").status, 0);
    cluster.apply(&map("green"));
    cluster.apply(&secret("second"));
    cluster
        .kubectl(["label", "pod", "one", "--overwrite", "app=two"])
        .run()
        .ok();
    // The kubelet writes them when it looks at the pod again.
    eventually("the new values", Duration::from_secs(100), || {
        let read = "cat /v/colour /v/password /map/colour /secret/password /v/labels";
        cluster.try_sh("one", read).text() == "greensecondgreensecondapp=\"two\""
    });
}

#[test]
fn directories_files_and_sockets_of_the_node_are_what_they_are() {
    let cluster = Cluster::new();
    let directory = cluster.path("directory");
    std::fs::create_dir(&directory).unwrap();
    std::fs::write(directory.join("file"), "on the node").unwrap();
    let listener = UnixListener::bind(cluster.path("socket")).unwrap();
    cluster.run(&with_volume(
        "directory",
        host_path(&directory, "Directory"),
    ));
    assert_eq!(
        cluster.sh("directory", "cat /v/file; echo from the guest >/v/new"),
        "on the node"
    );
    assert_eq!(
        std::fs::read_to_string(directory.join("new")).unwrap(),
        "from the guest\n"
    );
    cluster.run(&with_volume(
        "file",
        host_path(&directory.join("file"), "File"),
    ));
    assert_eq!(cluster.sh("file", "cat /v"), "on the node");
    cluster.run(&with_volume(
        "made",
        host_path(&cluster.path("made"), "DirectoryOrCreate"),
    ));
    cluster.sh("made", "touch /v/there");
    assert!(cluster.path("made/there").exists());
    let socket = with_volume("socket", host_path(&cluster.path("socket"), "Socket"));
    cluster.run(&socket);
    cluster.sh("socket", "test -S /v");
    drop(listener);
}

#[test]
fn a_character_device_of_the_node_is_refused_by_name() {
    let cluster = Cluster::new();
    cluster.apply(&with_volume(
        "device",
        host_path(Path::new("/dev/tty0"), ""),
    ));
    cluster.until("it says why", "pod", "device", |_| {
        cluster
            .events("device")
            .contains("/dev/tty0: the guest has no such device")
    });
}

#[test]
fn a_part_of_a_volume_is_mounted_by_sub_path() {
    let cluster = Cluster::new();
    let one = with(
        with_volume("one", json!({"emptyDir": {}})),
        &[
            (
                "/spec/initContainers",
                json!([with(
                    container(
                        "init",
                        "mkdir /v/a; echo in a >/v/a/file; echo single >/v/single"
                    ),
                    &[("/volumeMounts", json!([{"name": "v", "mountPath": "/v"}]))],
                )]),
            ),
            (
                "/spec/containers/0/env",
                json!([{"name": "PART", "value": "a"}]),
            ),
            (
                "/spec/containers/0/volumeMounts/1",
                json!({"name": "v", "mountPath": "/part", "subPath": "a"}),
            ),
            (
                "/spec/containers/0/volumeMounts/2",
                json!({"name": "v", "mountPath": "/etc/single", "subPath": "single", "readOnly": true}),
            ),
            (
                "/spec/containers/0/volumeMounts/3",
                json!({"name": "v", "mountPath": "/expr", "subPathExpr": "$(PART)"}),
            ),
        ],
    );
    cluster.run(&one);
    assert_eq!(
        cluster.sh("one", "cat /part/file /etc/single /expr/file"),
        "in a\nsingle\nin a"
    );
    assert_ne!(cluster.try_sh("one", "echo x >/etc/single").status, 0);
    assert_eq!(
        cluster.sh("one", "echo more >>/part/file; cat /v/a/file"),
        "in a\nmore"
    );
}

#[test]
fn files_of_a_volume_belong_to_the_group_of_the_pod() {
    let cluster = Cluster::new();
    let one = with(
        with_volume("one", json!({"emptyDir": {}})),
        &[(
            "/spec/securityContext",
            json!({"runAsUser": 1000, "runAsGroup": 2000, "fsGroup": 3000, "supplementalGroups": [4000]}),
        )],
    );
    cluster.run(&one);
    assert_eq!(
        cluster.sh("one", "id -u; id -g; id -G"),
        "1000\n2000\n2000 3000 4000"
    );
    assert_eq!(
        cluster.sh("one", "touch /v/file; stat -c %u:%g /v/file"),
        "1000:3000"
    );
}

#[test]
fn a_block_device_of_the_node_is_one_in_the_guest() {
    let cluster = Cluster::new();
    let Some(device) = LoopDevice::new(&vec![0; 16 << 20]) else {
        return;
    };
    let name = format!("{}-disk", cluster.namespace());
    cluster.apply(&json!({
        "apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": name},
        "spec": {
            "capacity": {"storage": "16Mi"}, "accessModes": ["ReadWriteOnce"], "volumeMode": "Block",
            "storageClassName": name, "persistentVolumeReclaimPolicy": "Retain",
            "local": {"path": device.path},
            "nodeAffinity": {"required": {"nodeSelectorTerms": [{"matchExpressions": [
                {"key": "kubernetes.io/hostname", "operator": "In", "values": ["node"]},
            ]}]}},
        },
    }));
    cluster.apply(&json!({
        "apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": "disk"},
        "spec": {
            "accessModes": ["ReadWriteOnce"], "volumeMode": "Block", "storageClassName": name,
            "resources": {"requests": {"storage": "16Mi"}},
        },
    }));
    let one = with(
        pod("one", "exec sleep 1000"),
        &[
            (
                "/spec/volumes",
                json!([{"name": "d", "persistentVolumeClaim": {"claimName": "disk"}}]),
            ),
            (
                "/spec/containers/0/volumeDevices",
                json!([{"name": "d", "devicePath": "/dev/xdb"}]),
            ),
        ],
    );
    cluster.run(&one);
    assert_eq!(
        cluster.sh("one", "blockdev --getsize64 /dev/xdb"),
        (16 << 20).to_string()
    );
    cluster.sh(
        "one",
        "echo on the disk | dd of=/dev/xdb conv=fsync 2>/dev/null",
    );
    let start = std::fs::read(device.file()).unwrap();
    assert!(start.starts_with(b"on the disk\n"));
    cluster.delete("pod", "one");
    cluster.delete("pvc", "disk");
    cluster.delete("pv", &name);
}
