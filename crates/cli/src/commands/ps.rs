//! `hull ps`.

mod columns;

use std::collections::BTreeMap;
use std::net::IpAddr;

use hull_engine::container;
use hull_engine::listing::{self, Filter, Row, Selection, Size, in_words};
use hull_engine::time;
use hull_network::cni::PortMapping;
use hull_sandbox::store::Exit;
use serde::Serialize;

use super::{config_for_existing, from_ns};
use crate::error::Result;
use crate::format::{self, ListFormat};
use crate::images;
use crate::output;

/// Arguments of `ps`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Show stopped containers too
    #[arg(short, long)]
    all: bool,
    /// Show only containers that match; may be given several times
    #[arg(short, long = "filter", value_name = "KEY=VALUE", value_parser = Filter::parse)]
    filters: Vec<Filter>,
    /// Show containers of podman, Docker and other engines that run with hull, too
    #[arg(long)]
    all_engines: bool,
    /// Show ids only
    #[arg(short, long)]
    quiet: bool,
    /// Do not shorten ids and commands
    #[arg(long)]
    no_trunc: bool,
    /// Show only the container that was created last, whatever state it is in
    #[arg(short, long, conflicts_with = "last")]
    latest: bool,
    /// Show only so many containers that were created last, whatever state they are in
    #[arg(
        short = 'n',
        long,
        value_name = "NUMBER",
        default_value_t = -1,
        hide_default_value = true,
        allow_negative_numbers = true
    )]
    last: i64,
    /// Show how much containers have written to their root file systems
    #[arg(short, long)]
    size: bool,
    /// Print JSON
    #[arg(long, conflicts_with = "quiet")]
    json: bool,
    /// Print with a template of Go's, "json", or "table TEMPLATE"
    #[arg(long, value_name = "FORMAT", value_parser = ListFormat::parse, conflicts_with = "json")]
    format: Option<ListFormat>,
}

/// A container in `ps --json`.
#[derive(Serialize)]
struct Listed<'a> {
    id: &'a str,
    name: &'a str,
    engine: &'a str,
    image: &'a str,
    command: &'a [String],
    created: String,
    state: &'static str,
    status: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    exit: Option<&'a Exit>,
    machine: &'a str,
    labels: &'a BTreeMap<String, String>,
    volumes: &'a [String],
    network: String,
    addresses: &'a [IpAddr],
    ports: &'a [PortMapping],
    #[serde(skip_serializing_if = "Option::is_none")]
    size: Option<Size>,
}

/// Lists containers, newest first.
pub fn execute(args: Args) -> Result<u8> {
    let config = config_for_existing()?;
    let paths = config.paths();
    container::sweep(&paths);
    let last = match args.latest {
        true => Some(1),
        false => usize::try_from(args.last).ok().filter(|last| *last > 0),
    };
    let template = args.format.as_ref().and_then(ListFormat::template);
    let with_size = args.size || template.is_some_and(|template| template.names("Size"));
    let selection = Selection {
        all: args.all,
        engines: args.all_engines,
        last,
        filters: args.filters,
    };
    let (mut rows, wrong) = listing::list(&paths, selection)?;
    for error in wrong {
        output::note(format!("warning: {error}"));
    }
    if with_size {
        listing::measure(&mut rows, &images::store(&config)?)?;
    }
    let fields = || {
        rows.iter()
            .map(|row| columns::fields(row, args.no_trunc))
            .collect()
    };
    if format::print_list(args.format.as_ref(), args.quiet, &columns::HEADINGS, fields)? {
        return Ok(0);
    }
    if args.quiet {
        let ids = rows.iter().map(|row| row.shown_id(args.no_trunc) + "\n");
        output::print(ids.collect::<String>())?;
    } else if args.json {
        let listed: Vec<Listed<'_>> = rows.iter().map(listed).collect();
        output::print_json(&listed)?;
    } else {
        columns::table(&rows, args.no_trunc, args.all_engines, args.size).print()?;
    }
    Ok(0)
}

fn listed(row: &Row) -> Listed<'_> {
    Listed {
        id: &row.id,
        name: &row.name,
        engine: &row.engine,
        image: &row.image,
        command: &row.command,
        created: time::format_rfc3339(from_ns(row.created_ns)),
        state: row.state(),
        status: in_words(&row.status, row.created_ns, row.life),
        exit: row.status.exit.as_ref(),
        machine: &row.machine,
        labels: &row.labels,
        volumes: &row.volumes,
        network: row.networks.join(","),
        addresses: &row.status.addresses,
        ports: &row.ports,
        size: row.size,
    }
}
