//! `hull top`.

use std::time::Duration;

use hull_engine::{container, time};
use hull_sandbox::control::client::unexpected;
use hull_sandbox::control::protocol::{Reply, Request};

use super::config_for_existing;
use crate::error::Result;
use crate::output::{self, Table};

/// Arguments of `top`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// Name or id
    #[arg(value_name = "CONTAINER")]
    container: String,
}

/// Lists the processes of a container, with process ids as seen in the container.
pub fn execute(args: Args) -> Result<u8> {
    let paths = config_for_existing()?.paths();
    let container = container::find_any(&paths, &args.container)?;
    let request = Request::Processes {
        container: container.id().to_owned(),
    };
    let processes = match container.connect()?.ask(&request, &[])?.message {
        Reply::Processes(processes) => processes,
        other => return Err(unexpected(&other)),
    };
    if args.json {
        output::print_json(&processes)?;
        return Ok(0);
    }
    // Parents have process ids of the guest's root namespace; the parent's row has its id in the
    // container.
    let inside = |pid: u32| {
        let parent = processes.iter().find(|process| process.pid == pid);
        parent.map_or(0, |process| process.container_pid)
    };
    let mut table = Table::new(&[
        "PID", "PPID", "UID", "GID", "STATE", "RSS", "STARTED", "TTY", "TIME", "COMMAND",
    ]);
    for process in &processes {
        table.row([
            process.container_pid.to_string(),
            inside(process.parent_pid).to_string(),
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
            processor_time(Duration::from_micros(process.cpu_time_us)),
            process.command.clone(),
        ]);
    }
    table.print()?;
    Ok(0)
}

/// Hours and minutes in UTC.
fn clock(seconds: u64) -> String {
    time::format_rfc3339(i128::from(seconds) * 1_000_000_000)
        .get(11..16)
        .unwrap_or_default()
        .to_owned()
}

fn processor_time(time: Duration) -> String {
    let seconds = time.as_secs();
    format!(
        "{:02}:{:02}:{:02}",
        seconds / 3600,
        seconds / 60 % 60,
        seconds % 60
    )
}
