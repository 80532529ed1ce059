//! `hull build`.

use std::ffi::OsString;
use std::fs;
use std::path::PathBuf;

use clap::ValueEnum;
use hull_engine::build::{self, Build};
use hull_engine::images::image_name;
use hull_image::{Progress, RegistryReference};

use super::config_for_root;
use crate::error::{Context, Result};
use crate::images::Shown;
use crate::output;

/// Arguments of `build`.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "buildah (of the distribution) reads the recipe and keeps layers for the next build; each RUN \
                  step runs in a machine of its own. Prints the image's id."
)]
pub struct Args {
    /// Name of the image
    #[arg(short, long, value_name = "NAME[:TAG]", value_parser = name)]
    tag: Vec<RegistryReference>,
    /// The recipe, in place of Containerfile or Dockerfile in the context; - for standard input
    #[arg(short, long, value_name = "FILE")]
    file: Option<PathBuf>,
    /// Set an ARG of the recipe
    #[arg(long, value_name = "NAME[=VALUE]")]
    build_arg: Vec<OsString>,
    /// Another directory or image that the recipe copies from
    #[arg(long, value_name = "NAME=SOURCE")]
    build_context: Vec<OsString>,
    /// Build up to this stage
    #[arg(long, value_name = "STAGE")]
    target: Option<OsString>,
    /// Execute all steps, also those of an earlier build
    #[arg(long)]
    no_cache: bool,
    /// Ask the registry for newer base images
    #[arg(long)]
    pull: bool,
    /// Make all layers of the build one
    #[arg(long)]
    squash: bool,
    /// Set a label of the image
    #[arg(long, value_name = "KEY=VALUE")]
    label: Vec<OsString>,
    /// Show a file to RUN steps that ask for it, and keep it out of the image
    #[arg(long, value_name = "id=NAME,src=FILE")]
    secret: Vec<OsString>,
    /// Let RUN steps that ask for it reach an SSH agent
    #[arg(long, value_name = "NAME[=SOCKET|KEY]")]
    ssh: Vec<OsString>,
    /// Network of RUN steps
    #[arg(long, value_name = "NETWORK")]
    network: Option<Network>,
    /// Give an address a name in RUN steps
    #[arg(long, value_name = "NAME:ADDRESS")]
    add_host: Vec<OsString>,
    /// Memory limit of a RUN step, like 512m
    #[arg(short, long, value_name = "SIZE")]
    memory: Option<OsString>,
    /// Size of /dev/shm in RUN steps
    #[arg(long, value_name = "SIZE")]
    shm_size: Option<OsString>,
    /// Set a resource limit of processes in RUN steps, like nofile=1024:4096
    #[arg(long, value_name = "NAME=SOFT[:HARD]")]
    ulimit: Vec<OsString>,
    /// Write the image's id to a file
    #[arg(long, value_name = "FILE")]
    iidfile: Option<PathBuf>,
    /// Show no steps
    #[arg(short, long)]
    quiet: bool,
    /// How Docker shows steps; without effect
    #[arg(long, value_name = "TYPE", hide = true)]
    progress: Option<String>,
    /// Docker's word for what is always so: the image is among hull's images afterwards
    #[arg(long, hide = true)]
    load: bool,
    /// Docker's word for what is always so: no containers are left
    #[arg(long, alias = "force-rm", hide = true)]
    rm: bool,
    /// Directory or URL with the files that the recipe copies; - for standard input: an archive of
    /// such a directory, or the recipe alone
    #[arg(value_name = "CONTEXT")]
    context: OsString,
}

#[derive(Clone, Copy, Debug, PartialEq, ValueEnum)]
enum Network {
    /// One of their own, with a way out.
    Default,
    /// None.
    None,
}

fn name(text: &str) -> std::result::Result<RegistryReference, String> {
    let name = image_name(text).map_err(|error| error.message)?;
    match name.digest() {
        None => Ok(name),
        Some(_) => Err("an image is given a name and a tag".to_owned()),
    }
}

/// Builds an image and prints its id.
pub fn execute(args: Args) -> Result<u8> {
    let config = config_for_root()?;
    let build = Build {
        options: args.options(),
        file: args.file,
        context: args.context,
        names: args.tag,
        quiet: args.quiet,
        output: None,
        accounts: None,
    };
    let shown = Shown::new("loading");
    let progress: &dyn Progress = if args.quiet { &() } else { &shown };
    let id = build::build(&config, &build, progress)?;
    if let Some(path) = args.iidfile {
        fs::write(&path, &id).context(|| format!("write {}", path.display()))?;
    }
    output::print(format!("{id}\n"))?;
    Ok(0)
}

impl Args {
    /// The options in buildah's words.
    fn options(&self) -> Vec<OsString> {
        let mut options = Vec::new();
        let mut all = |option: &str, values: &[OsString]| {
            for value in values {
                options.extend([option.into(), value.clone()]);
            }
        };
        all("--build-arg", &self.build_arg);
        all("--build-context", &self.build_context);
        all("--label", &self.label);
        all("--secret", &self.secret);
        all("--ssh", &self.ssh);
        all("--add-host", &self.add_host);
        all("--ulimit", &self.ulimit);
        all("--target", self.target.as_slice());
        all("--memory", self.memory.as_slice());
        all("--shm-size", self.shm_size.as_slice());
        if self.network == Some(Network::None) {
            all("--network", &["none".into()]);
        }
        // buildah asks the registry at each build, if it is not told otherwise.
        options.push(format!("--pull={}", self.pull).into());
        if self.no_cache {
            options.push("--no-cache".into());
        }
        if self.squash {
            options.push("--squash".into());
        }
        options
    }
}
