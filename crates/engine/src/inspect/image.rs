//! An image in Docker's words.

use hull_image::{Image, Listed, Reference};
use serde_json::{Value, json};

use super::{list, set};

/// The names that an image has.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Names {
    /// `NAME:TAG`, short.
    pub tags: Vec<String>,
    /// `NAME@DIGEST`.
    pub digests: Vec<String>,
}

impl Names {
    /// Those of the image with this id, among all.
    pub fn of(id: &str, all: &[Listed]) -> Self {
        let mut names = Self::default();
        for listed in all.iter().filter(|listed| listed.id.to_string() == id) {
            let Some(Ok(reference)) = listed.reference.as_deref().map(str::parse::<Reference>)
            else {
                continue;
            };
            let familiar = reference.familiar();
            let repository = match familiar.split_once('@') {
                Some((repository, _)) => repository.to_owned(),
                None => {
                    names.tags.push(familiar.clone());
                    match familiar.rsplit_once(':') {
                        Some((repository, tag)) if !tag.contains('/') => repository.to_owned(),
                        _ => familiar,
                    }
                }
            };
            let digest = format!("{repository}@{}", listed.repo_digest);
            // An image that came from a file has no digest in a registry.
            let is_remote = matches!(reference, Reference::Registry(_));
            if is_remote && !names.digests.contains(&digest) {
                names.digests.push(digest);
            }
        }
        names
    }
}

/// The object of `docker image inspect`. `document` is the image's configuration as it is stored;
/// `null` for a plain directory.
pub fn image(image: &Image, names: &Names, document: &Value) -> Value {
    let config = &image.config;
    let text = |key: &str| document[key].as_str().unwrap_or_default();
    let comment = document["history"]
        .as_array()
        .and_then(|history| history.last())
        .and_then(|last| last["comment"].as_str());
    let layers: Vec<String> = image
        .layers
        .iter()
        .map(|layer| layer.display().to_string())
        .collect();
    json!({
        "Id": image.id,
        "RepoTags": names.tags,
        "RepoDigests": names.digests,
        "Parent": "",
        "Comment": comment.unwrap_or_default(),
        "Created": image.created.clone().unwrap_or_default(),
        "DockerVersion": text("docker_version"),
        "Author": text("author"),
        "Architecture": config.architecture,
        "Variant": config.variant.clone().unwrap_or_default(),
        "Os": config.os,
        "Size": image.size,
        "VirtualSize": image.size,
        "GraphDriver": {
            "Name": "overlayfs",
            "Data": {"LowerDir": layers.join(":")},
        },
        "RootFS": {
            "Type": "layers",
            "Layers": document["rootfs"]["diff_ids"],
        },
        "Config": {
            "Hostname": "",
            "Domainname": "",
            "User": config.user,
            "ExposedPorts": set(config.exposed_ports.iter().cloned()),
            "Tty": false,
            "OpenStdin": false,
            "Env": list(config.env.iter().cloned()),
            "Cmd": list(config.cmd.iter().cloned()),
            "Volumes": set(config.volumes.iter().cloned()),
            "WorkingDir": config.workdir,
            "Entrypoint": list(config.entrypoint.iter().cloned()),
            "OnBuild": null,
            "Labels": config.labels,
            "StopSignal": config.stop_signal.clone().unwrap_or_default(),
            "Shell": document["config"]["Shell"],
            "Healthcheck": config.health,
        },
    })
}
