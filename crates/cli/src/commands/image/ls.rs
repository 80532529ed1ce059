//! `hull image ls`: the images that are here.

use hull_engine::config::Config;
use hull_engine::error::of_image;
use hull_engine::time::{self, UnixNanos};
use hull_image::{Listed, Pattern, Reference, Store};
use serde_json::{Value, json};
use std::collections::HashSet;

use crate::error::Result;
use crate::format::{self, ListFormat, Row};
use crate::images;
use crate::output::{self, Table};

/// Arguments of `image ls`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Accepted for Docker's sake: all images are shown
    #[arg(short, long)]
    all: bool,
    /// Show digests of manifests
    #[arg(long)]
    digests: bool,
    /// Show only images that match: dangling=true, reference=PATTERN, label=KEY[=VALUE],
    /// before=IMAGE, since=IMAGE; may be given several times
    #[arg(short, long = "filter", value_name = "KEY=VALUE", value_parser = Filter::parse)]
    filters: Vec<Filter>,
    /// Show ids only
    #[arg(short, long)]
    quiet: bool,
    /// Do not shorten ids
    #[arg(long)]
    no_trunc: bool,
    /// Print JSON
    #[arg(long, conflicts_with = "quiet")]
    json: bool,
    /// Print with a template of Go's, "json", or "table TEMPLATE"
    #[arg(long, value_name = "FORMAT", value_parser = ListFormat::parse, conflicts_with = "json")]
    format: Option<ListFormat>,
    /// Show only images of this name, with or without a tag; a pattern like reference=
    #[arg(value_name = "NAME", value_parser = Pattern::parse)]
    name: Option<Pattern>,
}

/// One condition of `--filter`. Several patterns are alternatives; the others must all hold.
#[derive(Clone, Debug)]
enum Filter {
    Dangling(bool),
    Reference(Pattern),
    Label(String, Option<String>),
    Before(String),
    Since(String),
}

impl Filter {
    fn parse(text: &str) -> std::result::Result<Self, String> {
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
    fn new<'a>(store: &Store, args: &'a Args) -> Result<Conditions<'a>> {
        let (mut before, mut since) = (Vec::new(), Vec::new());
        for filter in &args.filters {
            let (times, image) = match filter {
                Filter::Before(image) => (&mut before, image),
                Filter::Since(image) => (&mut since, image),
                _ => continue,
            };
            let reference: Reference = image.parse().map_err(of_image)?;
            let image = store.inspect(&reference).map_err(super::of_local)?;
            times.push(created(image.created.as_deref()));
        }
        Ok(Conditions {
            filters: &args.filters,
            name: args.name.as_ref(),
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

/// Lists images.
pub fn execute(config: &Config, args: &Args) -> Result<()> {
    let store = images::store(config)?;
    let conditions = Conditions::new(&store, args)?;
    let (mut list, damages) = store.list_with_damages().map_err(of_image)?;
    for error in damages {
        output::note(format!("warning: {error}"));
    }
    list.retain(|image| conditions.hold(image));
    // Docker's order: newest first.
    list.sort_by_key(|image| std::cmp::Reverse(created(image.created.as_deref())));
    let rows = || list.iter().map(|image| row(image, args.no_trunc)).collect();
    if format::print_list(args.format.as_ref(), args.quiet, &HEADINGS, rows)? {
        return Ok(());
    }
    if args.quiet {
        let mut seen = HashSet::new();
        let ids = list.iter().map(|image| id(image, args.no_trunc) + "\n");
        output::print(ids.filter(|id| seen.insert(id.clone())).collect::<String>())
    } else if args.json {
        let objects: Vec<Value> = list.iter().map(listed_object).collect();
        output::print_json(&objects)
    } else {
        table(&list, args).print()
    }
}

pub fn id(image: &Listed, whole: bool) -> String {
    match whole {
        true => image.id.to_string(),
        false => image.id.short(),
    }
}

fn listed_object(image: &Listed) -> Value {
    json!({
        "reference": image.reference,
        "id": image.id.to_string(),
        "digest": image.digest.to_string(),
        "created": image.created,
        "size": image.size,
        "labels": image.labels,
    })
}

/// Name and tag in the familiar form: without the default registry.
pub fn name_and_tag(reference: Option<&str>) -> (String, String) {
    let none = || "<none>".to_owned();
    let Some(reference) = reference else {
        return (none(), none());
    };
    let familiar = reference
        .parse::<Reference>()
        .map_or_else(|_| reference.to_owned(), |reference| reference.familiar());
    if let Some((name, _)) = familiar.split_once('@') {
        return (name.to_owned(), none());
    }
    match familiar.rsplit_once(':') {
        Some((name, tag)) if !tag.contains('/') => (name.to_owned(), tag.to_owned()),
        _ => (familiar, none()),
    }
}

/// The fields of `image ls --format`, with the headings of a table.
const HEADINGS: [(&str, &str); 10] = [
    ("ID", "IMAGE ID"),
    ("Repository", "REPOSITORY"),
    ("Tag", "TAG"),
    ("Digest", "DIGEST"),
    ("CreatedSince", "CREATED"),
    ("CreatedAt", "CREATED AT"),
    ("Size", "SIZE"),
    ("VirtualSize", "SIZE"),
    ("Containers", "CONTAINERS"),
    ("Labels", "LABELS"),
];

fn row(image: &Listed, no_trunc: bool) -> Row {
    let (name, tag) = name_and_tag(image.reference.as_deref());
    let created = image.created.as_deref().and_then(time::parse_rfc3339);
    let size = output::decimal_size(image.size);
    Row::new()
        .field("ID", id(image, no_trunc))
        .field("Repository", name)
        .field("Tag", tag)
        .field("Digest", image.digest.to_string())
        .field("CreatedSince", age(image))
        .field(
            "CreatedAt",
            created.map_or_else(|| "N/A".to_owned(), time::format_list),
        )
        .field("Size", size.as_str())
        .field("VirtualSize", size)
        .field("Containers", "N/A")
        .labels(&image.labels)
}

/// How long ago an image was created.
pub fn age(image: &Listed) -> String {
    let created = image.created.as_deref().and_then(time::parse_rfc3339);
    created.map_or_else(
        || "N/A".to_owned(),
        |created| format!("{} ago", time::human_age(created)),
    )
}

fn table(list: &[Listed], args: &Args) -> Table {
    let mut table = match args.digests {
        true => Table::new(&["REPOSITORY", "TAG", "DIGEST", "IMAGE ID", "CREATED", "SIZE"]),
        false => Table::new(&["REPOSITORY", "TAG", "IMAGE ID", "CREATED", "SIZE"]),
    };
    for image in list {
        let (name, tag) = name_and_tag(image.reference.as_deref());
        let created = age(image);
        let (id, size) = (id(image, args.no_trunc), output::decimal_size(image.size));
        match args.digests {
            true => table.row([name, tag, image.digest.to_string(), id, created, size]),
            false => table.row([name, tag, id, created, size]),
        }
    }
    table
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::collections::BTreeMap;

    use super::*;

    #[test]
    fn names_and_tags() {
        for (reference, name, tag) in [
            (Some("docker.io/library/busybox:1.36"), "busybox", "1.36"),
            (Some("localhost:5000/a/b:v1"), "localhost:5000/a/b", "v1"),
            (None, "<none>", "<none>"),
        ] {
            assert_eq!(
                name_and_tag(reference),
                (name.to_owned(), tag.to_owned()),
                "{reference:?}"
            );
        }
    }

    #[test]
    fn filters() {
        let digest = format!("sha256:{}", "0".repeat(64)).parse().unwrap();
        let image = |name: Option<&str>| Listed {
            reference: name.map(str::to_owned),
            id: digest,
            digest,
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
