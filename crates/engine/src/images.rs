//! The images that are here, as commands and the API ask for them.

use hull_image::{
    Digest, Image, Listed, Pattern, Platform, Reference, RegistryReference, Removed, Store,
};
use serde_json::{Value, json};

use crate::config::Config;
use crate::error::{Context, Error, ErrorKind, Result, of_image};
use crate::listing::PruneFilter;
use crate::paths::Paths;
use crate::time::{self, UnixNanos};
use crate::{inspect, unpacker};

/// One condition on images. Several patterns are alternatives; the others must all hold.
#[derive(Clone, Debug)]
pub enum Filter {
    /// Whether it has no name.
    Dangling(bool),
    /// A pattern of its name.
    Reference(Pattern),
    /// A label, with this value.
    Label(String, Option<String>),
    /// Created before another image.
    Before(String),
    /// Created after another image.
    Since(String),
}

impl Filter {
    /// Reads `KEY=VALUE`.
    pub fn parse(text: &str) -> Result<Self, String> {
        let wrong = |why: &str| format!("invalid filter {text:?}: {why}");
        match text.split_once('=') {
            Some(("dangling", "true" | "1")) => Ok(Self::Dangling(true)),
            Some(("dangling", "false" | "0")) => Ok(Self::Dangling(false)),
            Some(("dangling", _)) => Err(wrong("dangling is true or false")),
            Some(("reference", pattern)) => Pattern::parse(pattern)
                .map(Self::Reference)
                .map_err(|why| wrong(&why)),
            Some(("label", label)) => Ok(match label.split_once('=') {
                Some((key, value)) => Self::Label(key.to_owned(), Some(value.to_owned())),
                None => Self::Label(label.to_owned(), None),
            }),
            Some(("before", image)) => Ok(Self::Before(image.to_owned())),
            Some(("since", image)) => Ok(Self::Since(image.to_owned())),
            _ => Err(wrong(
                "give dangling=true|false, reference=…, label=…, before=… or since=…",
            )),
        }
    }
}

/// The conditions, with the times of the images that they name.
struct Conditions<'a> {
    filters: &'a [Filter],
    name: Option<&'a Pattern>,
    before: Vec<UnixNanos>,
    since: Vec<UnixNanos>,
}

impl Conditions<'_> {
    fn new<'a>(
        store: &Store,
        filters: &'a [Filter],
        name: Option<&'a Pattern>,
    ) -> Result<Conditions<'a>> {
        let (mut before, mut since) = (Vec::new(), Vec::new());
        for filter in filters {
            let (times, image) = match filter {
                Filter::Before(image) => (&mut before, image),
                Filter::Since(image) => (&mut since, image),
                _ => continue,
            };
            let reference: Reference = image.parse().map_err(of_image)?;
            let image = store.inspect(&reference).map_err(of_local)?;
            times.push(created(image.created.as_deref()));
        }
        Ok(Conditions {
            filters,
            name,
            before,
            since,
        })
    }

    fn hold(&self, image: &Listed) -> bool {
        let name = image.reference.as_deref();
        let name: Option<Reference> = name.and_then(|name| name.parse().ok());
        let fits = |pattern: &Pattern| name.as_ref().is_some_and(|name| pattern.matches(name));
        let mut patterns = self.filters.iter().filter_map(|filter| match filter {
            Filter::Reference(pattern) => Some(pattern),
            _ => None,
        });
        let any_pattern = patterns.clone().next().is_none() || patterns.any(fits);
        let created = created(image.created.as_deref());
        any_pattern
            && self.name.is_none_or(fits)
            && self.before.iter().all(|other| created < *other)
            && self.since.iter().all(|other| created > *other)
            && self.filters.iter().all(|filter| match filter {
                Filter::Dangling(wanted) => image.reference.is_none() == *wanted,
                Filter::Label(key, value) => image
                    .labels
                    .get(key)
                    .is_some_and(|has| value.as_ref().is_none_or(|value| has == value)),
                Filter::Reference(_) | Filter::Before(_) | Filter::Since(_) => true,
            })
    }
}

/// An image without a time is as old as any.
fn created(text: Option<&str>) -> UnixNanos {
    text.and_then(time::parse_rfc3339).unwrap_or(0)
}

/// The images that all conditions select, newest first as Docker has them, and what is wrong with
/// others.
///
/// # Errors
/// The store cannot be read; a filter names an image that there is not.
pub fn select(
    store: &Store,
    filters: &[Filter],
    name: Option<&Pattern>,
) -> Result<(Vec<Listed>, Vec<Error>)> {
    let conditions = Conditions::new(store, filters, name)?;
    let (mut list, damages) = store.list_with_damages().map_err(of_image)?;
    list.retain(|image| conditions.hold(image));
    list.sort_by_key(|image| std::cmp::Reverse(created(image.created.as_deref())));
    Ok((list, damages.into_iter().map(of_image).collect()))
}

/// Removes images that no container uses, and that conditions select: those without a name, with
/// `all` also those with one.
///
/// # Errors
/// The store cannot be read or changed.
pub fn prune(paths: &Paths, store: &Store, all: bool, filters: &[PruneFilter]) -> Result<Removed> {
    let list = match filters.is_empty() {
        true => Vec::new(),
        false => store.list().map_err(of_image)?,
    };
    let selects = |manifest: &Digest| {
        let image = list.iter().find(|image| image.digest == *manifest);
        let selected = image.is_some_and(|image| {
            let created = u64::try_from(created(image.created.as_deref())).unwrap_or(0);
            PruneFilter::all_select(filters, created, &image.labels)
        });
        filters.is_empty() || selected
    };
    let container_exists = |id: &str| paths.container(id).exists();
    store
        .prune_some(all, &container_exists, &selects)
        .map_err(of_image)
}

/// The error of a command about a local image: as in Docker, one that is not here exits with 1.
pub fn of_local(error: hull_image::Error) -> Error {
    match error.is_not_found() {
        true => of_image(error).kind(ErrorKind::NotFound),
        false => of_image(error),
    }
}

/// A name to be given to an image.
///
/// # Errors
/// It is a place or an id, or nothing of the kind.
pub fn image_name(text: &str) -> Result<RegistryReference> {
    match text.parse().map_err(of_image)? {
        Reference::Registry(name) => Ok(name),
        other => Err(Error::new(format!(
            "cannot name an image {other}: that is a place or an id"
        ))),
    }
}

/// The platform that a container is asked to be of, which this host's is: `OS/ARCH[/VARIANT]`, or
/// nothing.
///
/// # Errors
/// That is no platform, or not this host's.
pub fn own_platform(text: &str) -> Result<Option<Platform>> {
    if text.is_empty() {
        return Ok(None);
    }
    let asked: Platform = text
        .parse()
        .map_err(|why| Error::invalid(format!("--platform: {why}")))?;
    let host = Platform::host();
    match (&asked.os, &asked.architecture) == (&host.os, &host.architecture) {
        true => Ok(Some(asked)),
        false => Err(Error::unsupported(format_args!(
            "--platform {text}: a machine has the processor of this host, {host}"
        ))),
    }
}

/// All that is known of an image: hull's own keys and Docker's; `None` if there is none of this
/// name.
///
/// # Errors
/// It is damaged.
pub fn inspect_object(config: &Config, name: &str) -> Result<Option<Value>> {
    let Some((image, document, mut docker)) = known(config, name)? else {
        return Ok(None);
    };
    let mut object = json!({
        "id": image.id,
        "reference": image.reference,
        "digest": image.digest.map(|digest| digest.to_string()),
        "created": image.created,
        "size": image.size,
        "config": image.config,
        "layers": image.layers,
    });
    if !document.is_null() {
        object["document"] = document;
    }
    docker[inspect::OWN] = object;
    Ok(Some(docker))
}

/// The same with Docker's keys only.
///
/// # Errors
/// It is damaged.
pub fn docker_object(config: &Config, name: &str) -> Result<Option<Value>> {
    Ok(known(config, name)?.map(|(_, _, docker)| docker))
}

/// An image, its configuration as it is stored, and what Docker says of it.
fn known(config: &Config, name: &str) -> Result<Option<(Image, Value, Value)>> {
    let Ok(reference) = name.parse::<Reference>() else {
        return Ok(None);
    };
    let store = unpacker::store(config)?;
    let image = match store.inspect(&reference) {
        Ok(image) => image,
        Err(error) if error.is_not_found() => return Ok(None),
        Err(error) => return Err(of_image(error)),
    };
    // A plain directory has no configuration.
    let document = match store.raw_config(&image) {
        Ok(document) => serde_json::from_slice(&document)
            .context(|| format!("read the configuration of image {name}"))?,
        Err(_) => Value::Null,
    };
    let names = inspect::Names::of(&image.id, &store.list().map_err(of_image)?);
    let docker = inspect::image(&image, &names, &document);
    Ok(Some((image, document, docker)))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::collections::BTreeMap;

    use super::*;

    #[test]
    fn filters() {
        let digest = format!("sha256:{}", "0".repeat(64)).parse().unwrap();
        let image = |name: Option<&str>| Listed {
            reference: name.map(str::to_owned),
            id: digest,
            digest,
            repo_digest: digest,
            created: Some("2024-01-01T00:00:00Z".to_owned()),
            size: 0,
            labels: BTreeMap::from([("a".to_owned(), "b".to_owned())]),
        };
        let named = image(Some("docker.io/library/busybox:1"));
        let holds = |filters: &[&str], image: &Listed| {
            let filters: Vec<Filter> = filters.iter().map(|f| Filter::parse(f).unwrap()).collect();
            let conditions = Conditions {
                filters: &filters,
                name: None,
                before: Vec::new(),
                since: Vec::new(),
            };
            conditions.hold(image)
        };
        for (filters, expected) in [
            (&[][..], true),
            (&["dangling=true"], false),
            (&["dangling=false", "label=a"], true),
            (&["label=a=b"], true),
            (&["label=a", "label=c"], false),
            (&["reference=x", "reference=busy*"], true),
            (&["reference=x"], false),
        ] {
            assert_eq!(holds(filters, &named), expected, "{filters:?}");
        }
        assert!(holds(&["dangling=true"], &image(None)));
        assert!(!holds(&["reference=*"], &image(None)));
        for bad in ["x", "x=y", "dangling=maybe", "reference=["] {
            assert!(Filter::parse(bad).is_err(), "{bad}");
        }
    }
}
