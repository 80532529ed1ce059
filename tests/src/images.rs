//! Handmade images, valid and invalid: archives, layers, OCI layouts.

use std::fs;
use std::io::Write;
use std::path::Path;

use serde_json::{Value, json};
use sha2::{Digest, Sha256};

/// `sha256:…` of some bytes.
pub fn digest(bytes: &[u8]) -> String {
    let hash = Sha256::digest(bytes);
    let hex: String = hash.iter().map(|byte| format!("{byte:02x}")).collect();
    format!("sha256:{hex}")
}

/// Compresses bytes.
pub fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// A tar archive, entry by entry. Paths are written unchecked.
pub struct Archive(tar::Builder<Vec<u8>>);

impl Archive {
    /// An empty one.
    pub fn new() -> Archive {
        Archive(tar::Builder::new(Vec::new()))
    }

    fn entry(
        mut self,
        path: &str,
        kind: tar::EntryType,
        mode: u32,
        link: &str,
        content: &[u8],
    ) -> Archive {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(kind);
        header.set_mode(mode);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(1);
        header.set_size(content.len() as u64);
        let old = header.as_old_mut();
        old.name[..path.len()].copy_from_slice(path.as_bytes());
        old.linkname[..link.len()].copy_from_slice(link.as_bytes());
        header.set_cksum();
        self.0.append(&header, content).unwrap();
        self
    }

    /// A file.
    pub fn file(self, path: &str, content: impl AsRef<[u8]>) -> Archive {
        self.entry(path, tar::EntryType::Regular, 0o644, "", content.as_ref())
    }

    /// An executable file.
    pub fn program(self, path: &str, content: impl AsRef<[u8]>) -> Archive {
        self.entry(path, tar::EntryType::Regular, 0o755, "", content.as_ref())
    }

    /// A directory.
    pub fn directory(self, path: &str) -> Archive {
        self.entry(path, tar::EntryType::Directory, 0o755, "", b"")
    }

    /// A symbolic link.
    pub fn symlink(self, path: &str, target: &str) -> Archive {
        self.entry(path, tar::EntryType::Symlink, 0o777, target, b"")
    }

    /// A hard link.
    pub fn hard_link(self, path: &str, target: &str) -> Archive {
        self.entry(path, tar::EntryType::Link, 0o644, target, b"")
    }

    /// An empty file of this user and group.
    pub fn owned(mut self, path: &str, id: u32) -> Archive {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(tar::EntryType::Regular);
        header.set_mode(0o640);
        header.set_uid(id.into());
        header.set_gid(id.into());
        header.set_size(0);
        header.as_old_mut().name[..path.len()].copy_from_slice(path.as_bytes());
        header.set_cksum();
        self.0.append(&header, &b""[..]).unwrap();
        self
    }

    /// The block device 8:0, a disk.
    pub fn device(self, path: &str) -> Archive {
        self.node(path, tar::EntryType::Block, 8, 0)
    }

    /// The character device 1:3, `/dev/null`.
    pub fn null(self, path: &str) -> Archive {
        self.node(path, tar::EntryType::Char, 1, 3)
    }

    fn node(mut self, path: &str, kind: tar::EntryType, major: u32, minor: u32) -> Archive {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(kind);
        header.set_mode(0o666);
        header.set_size(0);
        header.set_device_major(major).unwrap();
        header.set_device_minor(minor).unwrap();
        header.as_old_mut().name[..path.len()].copy_from_slice(path.as_bytes());
        header.set_cksum();
        self.0.append(&header, &b""[..]).unwrap();
        self
    }

    /// The archive's bytes.
    pub fn bytes(self) -> Vec<u8> {
        self.0.into_inner().unwrap()
    }
}

impl Default for Archive {
    fn default() -> Self {
        Self::new()
    }
}

/// An image as a registry has it: manifest, configuration and layers.
#[derive(Clone)]
pub struct Image {
    /// Manifest, JSON.
    pub manifest: Vec<u8>,
    /// Configuration, JSON.
    pub config: Vec<u8>,
    /// Layers, compressed.
    pub layers: Vec<Vec<u8>>,
}

pub const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
pub const INDEX: &str = "application/vnd.oci.image.index.v1+json";
const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const LAYER: &str = "application/vnd.oci.image.layer.v1.tar+gzip";

impl Image {
    /// An image for this machine's architecture.
    pub fn new(layers: &[Vec<u8>]) -> Image {
        Image::for_architecture(architecture(), layers)
    }

    /// An image for an architecture, by its Go name. Layers are archives.
    pub fn for_architecture(architecture: &str, layers: &[Vec<u8>]) -> Image {
        let uncompressed: Vec<String> = layers.iter().map(|layer| digest(layer)).collect();
        let config = json!({
            "architecture": architecture,
            "os": "linux",
            "config": {"Cmd": ["sh"], "Env": ["PATH=/bin", "FROM_IMAGE=yes"], "WorkingDir": "/tmp"},
            "rootfs": {"type": "layers", "diff_ids": uncompressed},
        });
        let layers = layers.iter().map(|layer| gzip(layer)).collect();
        Image {
            manifest: Vec::new(),
            config: config.to_string().into_bytes(),
            layers,
        }
        .described()
    }

    /// Modifies the configuration.
    pub fn with_config(mut self, change: impl FnOnce(&mut Value)) -> Image {
        let mut config: Value = serde_json::from_slice(&self.config).unwrap();
        change(&mut config);
        self.config = config.to_string().into_bytes();
        self.described()
    }

    fn described(mut self) -> Image {
        let layers: Vec<Value> = self
            .layers
            .iter()
            .map(|layer| descriptor(LAYER, layer))
            .collect();
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": descriptor(CONFIG, &self.config),
            "layers": layers,
        });
        self.manifest = manifest.to_string().into_bytes();
        self
    }

    /// Configuration and layers.
    pub fn blobs(&self) -> impl Iterator<Item = &Vec<u8>> {
        self.layers.iter().chain([&self.config])
    }
}

/// A descriptor of a blob.
pub fn descriptor(media_type: &str, content: &[u8]) -> Value {
    json!({"mediaType": media_type, "digest": digest(content), "size": content.len()})
}

/// This machine's architecture, by its Go name.
pub fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

/// An OCI image layout.
pub struct Layout;

impl Layout {
    /// Writes images under their tags.
    pub fn write(directory: &Path, images: &[(&str, &Image)]) {
        fs::create_dir_all(directory.join("blobs/sha256")).unwrap();
        let mut manifests = Vec::new();
        for (tag, image) in images {
            for blob in image.blobs().chain([&image.manifest]) {
                fs::write(Layout::blob(directory, &digest(blob)), blob).unwrap();
            }
            let mut entry = descriptor(MANIFEST, &image.manifest);
            entry["annotations"] = json!({"org.opencontainers.image.ref.name": tag});
            manifests.push(entry);
        }
        let index = json!({"schemaVersion": 2, "mediaType": INDEX, "manifests": manifests});
        fs::write(directory.join("index.json"), index.to_string()).unwrap();
        fs::write(
            directory.join("oci-layout"),
            r#"{"imageLayoutVersion":"1.0.0"}"#,
        )
        .unwrap();
    }

    /// The path of a blob in a layout.
    pub fn blob(directory: &Path, digest: &str) -> std::path::PathBuf {
        directory.join("blobs").join(digest.replace(':', "/"))
    }
}
