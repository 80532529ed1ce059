//! `hull top`.

use hull_engine::container;
use hull_engine::top::{Columns, Processes, clock, hours};

use super::config_for_existing;
use crate::error::{Error, Result};
use crate::output::{self, Table};

/// Arguments of `top`.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Options of ps are -ef, aux, and -o with names of fields: pid, ppid, user, group, stat, comm, args, tty, time, etime, start, rss, vsz, %cpu, %mem."
)]
pub struct Args {
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// Name or id
    #[arg(value_name = "CONTAINER")]
    container: String,
    /// Columns, as options of ps
    #[arg(
        value_name = "PS-OPTIONS",
        trailing_var_arg = true,
        allow_hyphen_values = true,
        conflicts_with = "json"
    )]
    columns: Vec<String>,
}

/// Lists the processes of a container, with process ids as seen in the container.
pub fn execute(args: Args) -> Result<u8> {
    let columns = match args.columns.is_empty() {
        true => None,
        false => Some(Columns::parse(&args.columns).map_err(Error::invalid)?),
    };
    let paths = config_for_existing()?.paths();
    let container = container::find_any(&paths, &args.container)?;
    let processes = Processes::of(&container)?;
    if args.json {
        output::print_json(&processes.list)?;
        return Ok(0);
    }
    if let Some(columns) = columns {
        let headings = columns.headings();
        // As ps, which has no line of headings if all are empty.
        let mut table = match headings.iter().all(String::is_empty) {
            true => Table::default(),
            false => Table::of(headings),
        };
        for row in columns.rows(&processes) {
            table.push(row);
        }
        table.print()?;
        return Ok(0);
    }
    let mut table = Table::new(&[
        "PID", "PPID", "UID", "GID", "STATE", "RSS", "STARTED", "TTY", "TIME", "COMMAND",
    ]);
    for process in &processes.list {
        table.row([
            process.container_pid.to_string(),
            processes.parent_of(process).to_string(),
            process.uid.to_string(),
            process.gid.to_string(),
            process.state.clone(),
            output::binary_size(process.resident_bytes),
            clock(process.started_at),
            if process.terminal.is_empty() {
                "?"
            } else {
                &process.terminal
            }
            .to_owned(),
            hours(process.cpu_time_us / 1_000_000),
            process.command.clone(),
        ]);
    }
    table.print()?;
    Ok(0)
}
