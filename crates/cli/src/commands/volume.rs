//! `hull volume`: volumes with names.

use std::collections::BTreeMap;

use hull_engine::Paths;
use hull_engine::names;
use hull_engine::time;
use hull_engine::values;
use hull_engine::volumes::store::{self, StoredVolume};
use hull_engine::volumes::volume_name;
use serde_json::{Value, json};

use super::{agreed, config_for_root, exists, for_each, from_ns};
use crate::error::{Error, ErrorKind, Result};
use crate::format::{self, ListFormat, ObjectFormat, Row};
use crate::output::{self, Table};

/// Arguments of `volume`.
#[derive(Debug, clap::Args)]
#[command(subcommand_required = true, arg_required_else_help = true)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Create a volume, unless it is there, and print its name
    Create {
        /// Set a label
        #[arg(short, long, value_name = "KEY[=VALUE]", value_parser = values::label)]
        label: Vec<(String, String)>,
        /// What keeps its content: local, a directory of hull's
        #[arg(short, long, value_name = "NAME", default_value = "local", value_parser = driver)]
        driver: String,
        /// Its name; made up when absent
        #[arg(value_name = "NAME", value_parser = volume_name)]
        name: Option<String>,
    },
    /// List volumes
    #[command(visible_alias = "list")]
    Ls {
        /// Show only volumes that match; may be given several times
        #[arg(short, long = "filter", value_name = "KEY=VALUE", value_parser = Filter::parse)]
        filters: Vec<Filter>,
        /// Show names only
        #[arg(short, long)]
        quiet: bool,
        /// Print JSON
        #[arg(long, conflicts_with = "quiet")]
        json: bool,
        /// Print with a template of Go's, "json", or "table TEMPLATE"
        #[arg(long, value_name = "FORMAT", value_parser = ListFormat::parse, conflicts_with = "json")]
        format: Option<ListFormat>,
    },
    /// Tell by the exit status whether there is a volume: 0 or 1
    Exists {
        /// Its name
        #[arg(value_name = "VOLUME")]
        volume: String,
    },
    /// Show all that is known of volumes, as JSON
    Inspect {
        /// All volumes
        #[arg(short, long, conflicts_with = "volumes")]
        all: bool,
        /// Print a line for each with a template of Go's, or "json"
        #[arg(short, long, value_name = "FORMAT", value_parser = ObjectFormat::parse)]
        format: Option<ObjectFormat>,
        /// Names
        #[arg(value_name = "VOLUME", required_unless_present = "all")]
        volumes: Vec<String>,
    },
    /// Remove volumes that no container uses, with their content
    #[command(visible_alias = "remove")]
    Rm {
        /// One that does not exist is no error
        #[arg(short, long)]
        force: bool,
        /// Names
        #[arg(value_name = "VOLUME", required = true)]
        volumes: Vec<String>,
    },
    /// Remove volumes without a name of their own that no container uses
    Prune {
        /// Remove volumes that people named, too
        #[arg(short, long)]
        all: bool,
        /// Do not ask on a terminal
        #[arg(short, long)]
        force: bool,
        /// Remove only volumes that match
        #[arg(long = "filter", value_name = "KEY=VALUE", value_parser = Filter::parse)]
        filters: Vec<Filter>,
    },
}

fn driver(text: &str) -> std::result::Result<String, String> {
    match text {
        "" | "local" => Ok("local".to_owned()),
        _ => Err(format!(
            "not supported: volume driver {text:?}: volumes are directories"
        )),
    }
}

/// One condition of `--filter`.
#[derive(Clone, Debug)]
enum Filter {
    Name(String),
    Label(String, Option<String>),
    Dangling(bool),
}

impl Filter {
    fn parse(text: &str) -> std::result::Result<Self, String> {
        let wrong = |why: &str| format!("invalid filter {text:?}: {why}");
        match text.split_once('=') {
            Some(("name", name)) => Ok(Self::Name(name.to_owned())),
            Some(("label", label)) => Ok(match label.split_once('=') {
                Some((key, value)) => Self::Label(key.to_owned(), Some(value.to_owned())),
                None => Self::Label(label.to_owned(), None),
            }),
            Some(("dangling", "true" | "1")) => Ok(Self::Dangling(true)),
            Some(("dangling", "false" | "0")) => Ok(Self::Dangling(false)),
            Some(("dangling", _)) => Err(wrong("dangling is true or false")),
            _ => Err(wrong("give name=…, label=… or dangling=true|false")),
        }
    }

    fn matches(&self, volume: &StoredVolume, is_used: bool) -> bool {
        match self {
            Self::Name(name) => volume.name.contains(name.as_str()),
            Self::Label(key, value) => volume
                .record
                .labels
                .get(key)
                .is_some_and(|has| value.as_ref().is_none_or(|value| has == value)),
            Self::Dangling(wanted) => *wanted != is_used,
        }
    }
}

/// Manages volumes.
pub fn execute(args: Args) -> Result<u8> {
    let paths = config_for_root()?.paths();
    match args.command {
        Command::Create { label, name, .. } => {
            let anonymous = name.is_none();
            let name = name.map_or_else(names::new_id, Ok)?;
            let volume = store::create(&paths, &name, label.into_iter().collect(), anonymous)?;
            output::print(format!("{}\n", volume.name))?;
        }
        Command::Ls {
            filters,
            quiet,
            json,
            format,
        } => {
            let users = match filters
                .iter()
                .any(|filter| matches!(filter, Filter::Dangling(_)))
            {
                true => store::users(&paths)?,
                false => BTreeMap::new(),
            };
            let mut volumes = Vec::new();
            for volume in store::list(&paths)? {
                match volume {
                    Ok(volume) => volumes.push(volume),
                    Err((name, error)) => {
                        output::note(format!("warning: volume {name}: {error}"));
                    }
                }
            }
            volumes.retain(|volume| {
                let is_used = users.contains_key(&volume.name);
                filters.iter().all(|filter| filter.matches(volume, is_used))
            });
            let rows = || volumes.iter().map(row).collect();
            if format::print_list(format.as_ref(), quiet, &HEADINGS, rows)? {
                return Ok(0);
            }
            match (quiet, json) {
                (true, _) => {
                    let names = volumes.iter().map(|volume| format!("{}\n", volume.name));
                    output::print(names.collect::<String>())?;
                }
                (_, true) => output::print_json(&volumes.iter().map(object).collect::<Vec<_>>())?,
                _ => table(&volumes).print()?,
            }
        }
        Command::Exists { volume } => return exists(store::find(&paths, &volume)),
        Command::Inspect {
            all,
            format,
            mut volumes,
        } => {
            if all {
                let known = store::list(&paths)?.into_iter();
                volumes.extend(known.map(|volume| match volume {
                    Ok(volume) => volume.name,
                    Err((name, _)) => name,
                }));
            }
            return super::inspect::print_each(&volumes, format.as_ref(), |name| {
                inspect_object(&paths, name)
            });
        }
        Command::Rm { force, volumes } => {
            return for_each(&volumes, |name| match store::remove(&paths, name) {
                Err(error) if force && error.kind == ErrorKind::NotFound => Ok(()),
                removed => removed.and_then(|()| output::print(format!("{name}\n"))),
            });
        }
        Command::Prune {
            all,
            force,
            filters,
        } => {
            if filters
                .iter()
                .any(|filter| !matches!(filter, Filter::Label(..)))
            {
                return Err(Error::invalid("--filter: prune knows label=… only"));
            }
            let what = match all {
                true => "all volumes that no container uses, with their content",
                false => "all volumes without a name of their own that no container uses",
            };
            if !force && !agreed(what)? {
                return Ok(0);
            }
            let matches =
                |volume: &StoredVolume| filters.iter().all(|filter| filter.matches(volume, false));
            let removed = store::prune(&paths, all, matches)?;
            output::print(
                removed
                    .iter()
                    .map(|name| format!("{name}\n"))
                    .collect::<String>(),
            )?;
        }
    }
    Ok(0)
}

fn table(volumes: &[StoredVolume]) -> Table {
    let mut table = Table::new(&["DRIVER", "VOLUME NAME"]);
    for volume in volumes {
        table.row(["local".to_owned(), volume.name.clone()]);
    }
    table
}

/// The fields of `volume ls --format`, with the headings of a table.
const HEADINGS: [(&str, &str); 9] = [
    ("Name", "VOLUME NAME"),
    ("Driver", "DRIVER"),
    ("Mountpoint", "MOUNTPOINT"),
    ("Scope", "SCOPE"),
    ("Labels", "LABELS"),
    ("Links", "LINKS"),
    ("Size", "SIZE"),
    ("Availability", "AVAILABILITY"),
    ("Status", "STATUS"),
];

fn row(volume: &StoredVolume) -> Row {
    Row::new()
        .field("Name", volume.name.as_str())
        .field("Driver", "local")
        .field("Mountpoint", volume.content.display().to_string())
        .field("Scope", "local")
        .field("Links", "N/A")
        .field("Size", "N/A")
        .field("Availability", "N/A")
        .field("Status", "N/A")
        .labels(&volume.record.labels)
}

/// Details of a volume.
pub fn inspect_object(paths: &Paths, name: &str) -> Result<Value> {
    Ok(object(&store::find(paths, name)?))
}

/// In Docker's words.
fn object(volume: &StoredVolume) -> Value {
    json!({
        "Name": volume.name,
        "Driver": "local",
        "Mountpoint": volume.content,
        "CreatedAt": time::format_rfc3339(from_ns(volume.record.created_ns)),
        "Labels": volume.record.labels,
        "Anonymous": volume.record.anonymous,
        "Scope": "local",
        "Options": {},
    })
}
