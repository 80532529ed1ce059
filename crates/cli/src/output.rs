//! Output for users and programs: tables, sizes, JSON, colours. Used by every command that prints.
//! Colours only on terminals; characters of a guest or a registry that control a terminal, or hide
//! or reorder text, are never printed.

use std::io::{self, IsTerminal, Write};

pub use hull_machine::printable;
use serde::Serialize;

use crate::error::{Context, Error, Result};

/// A table with a heading; columns are as wide as their widest cell.
#[derive(Debug, Default)]
pub struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A table with this heading.
    pub fn new(heading: &[&str]) -> Table {
        Table {
            rows: vec![heading.iter().map(|&cell| cell.to_owned()).collect()],
        }
    }

    /// A table with this first row.
    pub fn of(cells: Vec<String>) -> Table {
        let mut table = Table { rows: Vec::new() };
        table.push(cells);
        table
    }

    /// Adds a row with as many cells as the heading.
    pub fn row<const N: usize>(&mut self, cells: [String; N]) {
        self.push(cells.into());
    }

    /// Adds a row.
    pub fn push(&mut self, cells: Vec<String>) {
        self.rows
            .push(cells.iter().map(|cell| printable(cell)).collect());
    }

    /// The table as text.
    pub fn render(&self) -> String {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let widths: Vec<usize> = (0..columns)
            .map(|column| {
                let cells = self.rows.iter().filter_map(|row| row.get(column));
                cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
            })
            .collect();
        let mut text = String::new();
        for row in &self.rows {
            let mut line = String::new();
            for (cell, width) in row.iter().zip(&widths) {
                line.push_str(&format!("{cell:width$}   "));
            }
            text.push_str(line.trim_end());
            text.push('\n');
        }
        text
    }

    /// Prints the table on standard output.
    pub fn print(&self) -> Result<()> {
        print(self.render())
    }
}

/// Writes to standard output and flushes. A closed pipe ends the process without a message, as
/// SIGPIPE would.
pub fn print(text: impl AsRef<[u8]>) -> Result<()> {
    let mut stdout = io::stdout().lock();
    stdout
        .write_all(text.as_ref())
        .and_then(|()| stdout.flush())
        .or_else(closed_pipe_ends)
        .context(|| "write to standard output")
}

/// Standard output, for what is too long to be in memory. A closed pipe ends the process, as with
/// [`print()`].
#[derive(Debug)]
pub struct Stdout;

impl Write for Stdout {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        io::stdout().lock().write(bytes).or_else(|error| {
            closed_pipe_ends(error)?;
            Ok(0)
        })
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stdout().lock().flush().or_else(closed_pipe_ends)
    }
}

/// Standard output for a stream of bytes. A closed pipe ends the process without a message.
#[derive(Debug)]
pub struct Stream;

impl Write for Stream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = io::stdout().lock().write(bytes);
        if let Err(error) = &written
            && error.kind() == io::ErrorKind::BrokenPipe
        {
            closed_pipe_ends(error.kind().into())?;
        }
        written
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stdout().lock().flush().or_else(closed_pipe_ends)
    }
}

/// Exits if `error` is a closed pipe.
fn closed_pipe_ends(error: io::Error) -> io::Result<()> {
    if error.kind() == io::ErrorKind::BrokenPipe {
        // The status that a shell reports after SIGPIPE.
        std::process::exit(141);
    }
    Err(error)
}

/// Writes a line for the user to standard error. Errors are ignored.
pub fn note(text: impl AsRef<str>) {
    let line = format!("{}\n", text.as_ref());
    let _ = io::stderr().lock().write_all(line.as_bytes());
}

/// Prints one value as indented JSON.
pub fn print_json(value: &impl Serialize) -> Result<()> {
    let mut text = serde_json::to_string_pretty(value)
        .map_err(|error| Error::new(format!("cannot write JSON: {error}")))?;
    text.push('\n');
    print(text)
}

/// At most `length` characters of `text`; the last one marks truncation.
pub fn shorten(text: &str, length: usize) -> String {
    if text.chars().count() <= length {
        return text.to_owned();
    }
    let mut short: String = text.chars().take(length.saturating_sub(1)).collect();
    short.push('…');
    short
}

/// A size in powers of 1000, three digits: `4.27MB`. Docker's format for images.
pub fn decimal_size(bytes: u64) -> String {
    size(bytes, 1000.0, &["B", "kB", "MB", "GB", "TB", "PB", "EB"], 3)
}

/// A size in powers of 1024, four digits: `15.62MiB`. Docker's format for memory.
pub fn binary_size(bytes: u64) -> String {
    size(
        bytes,
        1024.0,
        &["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"],
        4,
    )
}

fn size(bytes: u64, base: f64, units: &[&str], digits: usize) -> String {
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= base && unit + 1 < units.len() {
        value /= base;
        unit += 1;
    }
    let whole = (value.max(1.0).log10().floor() as usize) + 1;
    let mut text = format!("{value:.*}", digits.saturating_sub(whole));
    if text.contains('.') {
        text.truncate(text.trim_end_matches('0').trim_end_matches('.').len());
    }
    format!("{text}{}", units[unit])
}

/// A percentage: `12.50%`.
pub fn percent(part: f64, whole: f64) -> String {
    let share = if whole > 0.0 {
        part / whole * 100.0
    } else {
        0.0
    };
    format!("{share:.2}%")
}

/// Colours for text; none if standard output is not a terminal.
#[derive(Clone, Copy, Debug)]
pub struct Colours(bool);

impl Colours {
    /// Colours, if standard output supports them.
    pub fn for_stdout() -> Colours {
        Colours(io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none())
    }

    /// Success.
    pub fn good(self, text: &str) -> String {
        self.paint("32", text)
    }

    /// Warning.
    pub fn warning(self, text: &str) -> String {
        self.paint("33", text)
    }

    /// Error.
    pub fn bad(self, text: &str) -> String {
        self.paint("1;31", text)
    }

    fn paint(self, code: &str, text: &str) -> String {
        if self.0 {
            format!("\x1b[{code}m{text}\x1b[0m")
        } else {
            text.to_owned()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up() {
        let mut table = Table::new(&["NAME", "STATUS"]);
        table.row(["a-long-name".into(), "Up".into()]);
        table.row(["b".into(), "Exited\x1b\u{202e}[31m".into()]);
        assert_eq!(
            table.render(),
            "NAME          STATUS\na-long-name   Up\nb             Exited\u{fffd}\u{fffd}[31m\n"
        );
    }

    #[test]
    fn sizes() {
        for (bytes, decimal, binary) in [
            (0, "0B", "0B"),
            (999, "999B", "999B"),
            (1000, "1kB", "1000B"),
            (4_270_000, "4.27MB", "4.072MiB"),
            (16_384_000, "16.4MB", "15.62MiB"),
            (536_870_912, "537MB", "512MiB"),
            (u64::MAX, "18.4EB", "16EiB"),
        ] {
            assert_eq!(decimal_size(bytes), decimal);
            assert_eq!(binary_size(bytes), binary);
        }
    }

    #[test]
    fn shortened() {
        assert_eq!(shorten("short", 5), "short");
        assert_eq!(shorten("a longer text", 5), "a lo…");
    }

    #[test]
    fn no_colours_without_terminal() {
        assert_eq!(Colours(false).bad("x"), "x");
        assert_eq!(Colours(true).good("x"), "\x1b[32mx\x1b[0m");
    }
}
