//! `hull system df`.

use hull_engine::listing::{Life, in_words};
use hull_engine::time;
use hull_engine::usage::{self, ContainerUsage, ImageUsage, Usage, VolumeUsage};
use hull_engine::volumes::Source;
use hull_sandbox::store::State;

use crate::commands::image::ls::{age, id, name_and_tag};
use crate::commands::{config_for_existing, from_ns};
use crate::error::Result;
use crate::format::{self, ListFormat};
use crate::images;
use crate::output::{self, Table, decimal_size};

/// Arguments of `system df`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Show each image, container and volume
    #[arg(short, long)]
    verbose: bool,
    /// Print with a template of Go's, "json", or "table TEMPLATE"
    #[arg(
        long,
        value_name = "FORMAT",
        value_parser = ListFormat::parse,
        conflicts_with = "verbose"
    )]
    format: Option<ListFormat>,
}

/// The fields, with the headings of a table.
const HEADINGS: [(&str, &str); 5] = [
    ("Type", "TYPE"),
    ("TotalCount", "TOTAL"),
    ("Active", "ACTIVE"),
    ("Size", "SIZE"),
    ("Reclaimable", "RECLAIMABLE"),
];

/// Prints what is taken of the disk.
pub fn execute(args: &Args) -> Result<u8> {
    let config = config_for_existing()?;
    let usage = usage::all(&config.paths(), &images::store(&config)?)?;
    if args.verbose {
        output::print(format!(
            "Images space usage:\n\n{}\nContainers space usage:\n\n{}\n\
             Local Volumes space usage:\n\n{}",
            images_table(&usage.images).render(),
            containers_table(&usage.containers).render(),
            volumes_table(&usage.volumes).render(),
        ))?;
        return Ok(0);
    }
    let rows = rows(&usage);
    let fields = || {
        let texts = |row: &[String; 5]| HEADINGS.into_iter().zip(row.clone()).collect::<Vec<_>>();
        rows.iter()
            .map(|row| {
                texts(row)
                    .into_iter()
                    .fold(format::Row::new(), |row, ((name, _), text)| {
                        row.field(name, text)
                    })
            })
            .collect()
    };
    if !format::print_list(args.format.as_ref(), false, &HEADINGS, fields)? {
        let mut table = Table::new(&HEADINGS.map(|(_, heading)| heading));
        for row in rows {
            table.row(row);
        }
        table.print()?;
    }
    Ok(0)
}

fn is_up(usage: &ContainerUsage) -> bool {
    let state = usage.container.status.state;
    matches!(state, State::Running | State::Paused)
}

/// Type, count, active ones, size and what can be had back.
fn rows(usage: &Usage) -> [[String; 5]; 3] {
    let (image_bytes, unused_bytes) = usage.image_bytes();
    let used = usage.images.iter().filter(|image| image.containers > 0);
    let up = usage.containers.iter().filter(|container| is_up(container));
    let sum = |bytes: &mut dyn Iterator<Item = u64>| bytes.sum::<u64>();
    let container_bytes = sum(&mut usage.containers.iter().map(|container| container.bytes));
    let up_bytes = sum(&mut up.clone().map(|container| container.bytes));
    let in_use = usage.volumes.iter().filter(|volume| volume.containers > 0);
    let volume_bytes = sum(&mut usage.volumes.iter().map(|volume| volume.bytes));
    let in_use_bytes = sum(&mut in_use.clone().map(|volume| volume.bytes));
    [
        row(
            "Images",
            (usage.images.len(), used.count()),
            image_bytes,
            unused_bytes,
        ),
        row(
            "Containers",
            (usage.containers.len(), up.count()),
            container_bytes,
            container_bytes - up_bytes,
        ),
        row(
            "Local Volumes",
            (usage.volumes.len(), in_use.count()),
            volume_bytes,
            volume_bytes - in_use_bytes,
        ),
    ]
}

fn row(kind: &str, (all, active): (usize, usize), bytes: u64, reclaimable: u64) -> [String; 5] {
    let share = match bytes {
        0 => String::new(),
        bytes => format!(" ({}%)", u128::from(reclaimable) * 100 / u128::from(bytes)),
    };
    [
        kind.to_owned(),
        all.to_string(),
        active.to_string(),
        decimal_size(bytes),
        format!("{}{share}", decimal_size(reclaimable)),
    ]
}

fn images_table(images: &[ImageUsage]) -> Table {
    let mut table = Table::new(&[
        "REPOSITORY",
        "TAG",
        "IMAGE ID",
        "CREATED",
        "SIZE",
        "SHARED SIZE",
        "UNIQUE SIZE",
        "CONTAINERS",
    ]);
    for image in images {
        let is_shared = |layer: &String| {
            let mut others = images.iter().filter(|other| !std::ptr::eq(*other, image));
            others.any(|other| other.layers.iter().any(|(name, _)| name == layer))
        };
        let shared = image.layers.iter().filter(|(name, _)| is_shared(name));
        let shared: u64 = shared.map(|(_, bytes)| bytes).sum();
        for listed in &image.listed {
            let (name, tag) = name_and_tag(listed.reference.as_deref());
            table.row([
                name,
                tag,
                id(listed, false),
                age(listed),
                decimal_size(image.bytes()),
                decimal_size(shared),
                decimal_size(image.bytes() - shared),
                image.containers.to_string(),
            ]);
        }
    }
    table
}

fn containers_table(containers: &[ContainerUsage]) -> Table {
    let mut table = Table::new(&[
        "CONTAINER ID",
        "IMAGE",
        "COMMAND",
        "LOCAL VOLUMES",
        "SIZE",
        "CREATED",
        "STATUS",
        "NAMES",
    ]);
    for ContainerUsage { container, bytes } in containers {
        let record = &container.record;
        let volumes = record.details.options.iter();
        let volumes = volumes.flat_map(|options| &options.volumes);
        let volumes = volumes.filter(|volume| !matches!(volume.source, Source::Host(_)));
        let command = output::shorten(&record.command.join(" "), 20);
        table.row([
            record.id.get(..12).unwrap_or(&record.id).to_owned(),
            record.details.image.clone(),
            format!("\"{command}\""),
            volumes.count().to_string(),
            decimal_size(*bytes),
            format!("{} ago", time::human_age(from_ns(record.created_ns))),
            in_words(&container.status, record.created_ns, Life::of(container)),
            record.details.name.clone(),
        ]);
    }
    table
}

fn volumes_table(volumes: &[VolumeUsage]) -> Table {
    let mut table = Table::new(&["VOLUME NAME", "LINKS", "SIZE"]);
    for usage in volumes {
        table.row([
            usage.volume.name.clone(),
            usage.containers.to_string(),
            decimal_size(usage.bytes),
        ]);
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_layer_counts_once_and_is_reclaimable_when_no_container_needs_it() {
        let image = |containers, layers: &[(&str, u64)]| ImageUsage {
            listed: Vec::new(),
            containers,
            layers: layers
                .iter()
                .map(|(name, bytes)| ((*name).to_owned(), *bytes))
                .collect(),
        };
        let usage = Usage {
            images: vec![
                image(1, &[("base", 1000), ("app", 500)]),
                image(0, &[("base", 1000), ("other", 1500)]),
            ],
            containers: Vec::new(),
            volumes: Vec::new(),
        };
        let rows = rows(&usage);
        assert_eq!(rows[0], ["Images", "2", "1", "3kB", "1.5kB (50%)"]);
        assert_eq!(rows[1], ["Containers", "0", "0", "0B", "0B"]);
        assert_eq!(rows[2][0], "Local Volumes");
    }
}
