//! `hull volume`: volumes with names.

use hull_engine::names;
use hull_engine::values;
use hull_engine::volumes::store::{self, Filter, StoredVolume};
use hull_engine::volumes::volume_name;

use super::{agreed, config_for_root, exists, for_each};
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
        /// Set an option: size=SIZE, or type=none, o=bind and device=PATH for one of the host's
        /// directories
        #[arg(short, long = "opt", value_name = "KEY=VALUE", value_parser = values::label)]
        options: Vec<(String, String)>,
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
        /// Do not ask
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

/// Manages volumes.
pub fn execute(args: Args) -> Result<u8> {
    let paths = config_for_root()?.paths();
    match args.command {
        Command::Create {
            label,
            options,
            name,
            ..
        } => {
            let wanted = store::Wanted {
                labels: label.into_iter().collect(),
                options: options.into_iter().collect(),
                anonymous: name.is_none(),
            };
            let name = name.map_or_else(names::new_id, Ok)?;
            let volume = store::create(&paths, &name, wanted)?;
            output::print(format!("{}\n", volume.name))?;
        }
        Command::Ls {
            filters,
            quiet,
            json,
            format,
        } => {
            let (volumes, wrong) = store::select(&paths, &filters)?;
            for error in wrong {
                output::note(format!("warning: {error}"));
            }
            let rows = || volumes.iter().map(row).collect();
            if format::print_list(format.as_ref(), quiet, &HEADINGS, rows)? {
                return Ok(0);
            }
            match (quiet, json) {
                (true, _) => {
                    let names = volumes.iter().map(|volume| format!("{}\n", volume.name));
                    output::print(names.collect::<String>())?;
                }
                (_, true) => output::print_json(
                    &volumes.iter().map(StoredVolume::object).collect::<Vec<_>>(),
                )?,
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
                Ok(store::find(&paths, name)?.object())
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
