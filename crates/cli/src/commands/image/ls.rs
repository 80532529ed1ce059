//! `hull image ls`: the images that are here.

use hull_engine::config::Config;
use hull_engine::images::{Filter, select};
use hull_engine::time;
use hull_image::{Listed, Pattern, Reference};
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

/// Lists images.
pub fn execute(config: &Config, args: &Args) -> Result<()> {
    let store = images::store(config)?;
    let (list, damages) = select(&store, &args.filters, args.name.as_ref())?;
    for error in damages {
        output::note(format!("warning: {error}"));
    }
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
        "digest": image.repo_digest.to_string(),
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
        .field("Digest", image.repo_digest.to_string())
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
            true => table.row([name, tag, image.repo_digest.to_string(), id, created, size]),
            false => table.row([name, tag, id, created, size]),
        }
    }
    table
}

#[cfg(test)]
mod tests {
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
}
