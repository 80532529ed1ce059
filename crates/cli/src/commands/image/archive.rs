//! `hull image save` and `load`: images in one archive, for other tools and other hosts.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufWriter, IsTerminal, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use hull_engine::config::Config;
use hull_engine::error::of_image;
use hull_engine::images::of_local;
use hull_image::{Progress, Reference};

use crate::error::{Context, Error, Result};
use crate::images::{self, Shown};
use crate::output;

/// Arguments of `image save`.
#[derive(Debug, clap::Args)]
pub struct SaveArgs {
    /// Write to a file instead of standard output
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Show no progress
    #[arg(short, long)]
    quiet: bool,
    /// Names or ids; a name without a tag means all its tags
    #[arg(value_name = "IMAGE", required = true)]
    images: Vec<String>,
}

/// Arguments of `image load`.
#[derive(Debug, clap::Args)]
pub struct LoadArgs {
    /// Read from a file instead of standard input
    #[arg(short, long, value_name = "FILE")]
    input: Option<PathBuf>,
    /// Show no progress
    #[arg(short, long)]
    quiet: bool,
}

/// Saves images.
pub fn save(config: &Config, args: &SaveArgs) -> Result<()> {
    let references = args
        .images
        .iter()
        .map(|image| image.parse().map_err(of_image))
        .collect::<Result<Vec<Reference>>>()?;
    let store = images::store(config)?;
    let shown = Shown::new("saving");
    let progress: &dyn Progress = if args.quiet { &() } else { &shown };
    let write = |output: &mut dyn Write, path: &Path| {
        let output = BufWriter::with_capacity(256 * 1024, output);
        store
            .save(&references, output, path, progress)
            .map_err(of_local)
    };
    match &args.output {
        Some(path) => replace_file(path, write),
        None if io::stdout().is_terminal() => {
            Err(Error::invalid("an archive is not written to a terminal")
                .hint("hull image save -o FILE IMAGE, or hull image save IMAGE | …"))
        }
        None => write(&mut output::Stdout, Path::new("standard output")),
    }
}

/// Writes a file that is there only when it is complete. What is no regular file (a device, a pipe)
/// is written as it is.
fn replace_file(
    path: &Path,
    write: impl FnOnce(&mut dyn Write, &Path) -> Result<()>,
) -> Result<()> {
    let failed = || format!("write {}", path.display());
    if fs::metadata(path).is_ok_and(|found| !found.is_file()) {
        let mut file = OpenOptions::new().write(true).open(path).context(failed)?;
        return write(&mut file, path);
    }
    let Some(name) = path.file_name() else {
        return Err(Error::invalid(format!(
            "{} is no name of a file",
            path.display()
        )));
    };
    let mut temporary = std::ffi::OsString::from(".");
    temporary.push(name);
    temporary.push(format!(".{}.tmp", std::process::id()));
    let temporary = path.with_file_name(temporary);
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&temporary)
        .context(failed)?;
    let written =
        write(&mut file, path).and_then(|()| fs::rename(&temporary, path).context(failed));
    if written.is_err() {
        // The first error matters more.
        let _ = fs::remove_file(&temporary);
    }
    written
}

/// Takes in images.
pub fn load(config: &Config, args: &LoadArgs) -> Result<()> {
    let (what, file) = match &args.input {
        Some(path) => {
            let file = File::open(path).context(|| format!("read {}", path.display()))?;
            (path.display().to_string(), file)
        }
        None if io::stdin().is_terminal() => {
            return Err(Error::invalid("an archive is not read from a terminal")
                .hint("hull image load -i FILE, or hull image load <FILE"));
        }
        None => {
            let stdin = io::stdin().as_fd().try_clone_to_owned();
            let stdin = stdin.context(|| "read standard input")?;
            ("standard input".to_owned(), stdin.into())
        }
    };
    let shown = Shown::new("loading");
    let progress: &dyn Progress = if args.quiet { &() } else { &shown };
    let loaded = images::store(config)?
        .load(&what, file, progress)
        .map_err(of_image)?;
    let mut lines = String::new();
    for image in loaded {
        for name in &image.names {
            lines.push_str(&format!("Loaded image: {}\n", name.familiar()));
        }
        if image.names.is_empty() {
            lines.push_str(&format!("Loaded image ID: {}\n", image.id));
        }
    }
    output::print(lines)
}
