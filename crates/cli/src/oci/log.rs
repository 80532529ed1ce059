//! The log of `hull-oci`: the file that the engine names, in the format that it parses, and
//! standard error.

use std::fs::File;
use std::io::{IsTerminal, Write};
use std::sync::OnceLock;

use hull_sandbox::error::{Context, Error, Result};

use super::arguments::{Global, LogFormat};

struct Log {
    file: Option<File>,
    format: LogFormat,
    debug: bool,
}

static LOG: OnceLock<Log> = OnceLock::new();

/// Opens the log. Before that, and without a log file, messages go to standard error.
pub fn open(global: &Global) -> Result<()> {
    let file = match &global.log {
        None => None,
        Some(path) => Some(
            File::options()
                .create(true)
                .append(true)
                .open(path)
                .context(|| format!("open the log {}", path.display()))?,
        ),
    };
    // Called once.
    let _ = LOG.set(Log {
        file,
        format: global.log_format,
        debug: global.debug,
    });
    Ok(())
}

/// Logs with `--debug` only.
pub fn debug(message: impl FnOnce() -> String) {
    if LOG.get().is_some_and(|log| log.debug) {
        write("debug", &message());
    }
}

/// Logs a warning.
pub fn warn(message: &str) {
    write("warning", message);
}

/// Logs why the command failed, always on standard error as well.
pub fn fatal(failure: &Error) {
    let message = failure.message.trim_end().replace('\n', " ");
    let logged = LOG.get().is_some_and(|log| log.file.is_some());
    if logged {
        if !failure.console.is_empty() {
            write(
                "warning",
                &format!("the guest's console: {}", failure.console.join(" | ")),
            );
        }
        write("error", &message);
    }
    let mut text = format!("error: {message}\n");
    if !logged || std::io::stderr().is_terminal() {
        if let Some(hint) = &failure.hint {
            text.push_str(&format!("hint: {hint}\n"));
        }
        for line in &failure.console {
            text.push_str(&format!("  {line}\n"));
        }
    }
    // If standard error is closed, there is nowhere to report to.
    let _ = std::io::stderr().lock().write_all(text.as_bytes());
}

fn write(level: &str, message: &str) {
    let time = hull_engine::time::format_rfc3339(hull_engine::time::now());
    let log = LOG.get();
    let line = match log.map(|log| log.format) {
        Some(LogFormat::Json) => {
            let line = serde_json::json!({"level": level, "msg": message, "time": time});
            format!("{line}\n")
        }
        _ => format!("time={time:?} level={level} msg={message:?}\n"),
    };
    // A single write, so that lines of concurrent commands do not mix. A full disk does not make
    // the command fail.
    let _ = match log.and_then(|log| log.file.as_ref()) {
        Some(mut file) => file.write_all(line.as_bytes()),
        None => std::io::stderr().lock().write_all(line.as_bytes()),
    };
}
