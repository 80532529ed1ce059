//! `hull image`: pulls, imports, lists, removes and inspects images, and gives them on.

mod archive;
mod history;
pub mod ls;
mod push;
mod search;

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::path::Path;

use hull_engine::config::Config;
use hull_engine::error::of_image;
use hull_engine::images::{image_name, inspect_object, of_local, prune};
use hull_engine::listing::PruneFilter;
use hull_engine::values::Pull;
use hull_image::{Credentials, Import, ImportSource, Platform, Reference, Removed};

use crate::commands::{agreed, config_for_root, for_each};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::format::ObjectFormat;
use crate::images;
use crate::output;

/// Arguments of `image`.
#[derive(Debug, clap::Args)]
#[command(subcommand_required = true, arg_required_else_help = true)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Fetch an image from a registry, an OCI layout or an archive
    #[command(
        after_help = "An image is NAME[:TAG|@DIGEST], oci:DIR[:TAG], docker-archive:FILE or rootfs:DIR."
    )]
    Pull {
        /// Fetch all tags of the repository
        #[arg(short, long)]
        all_tags: bool,
        /// Fetch the image for another platform than this host's
        #[arg(long, value_name = "OS/ARCH[/VARIANT]")]
        platform: Option<Platform>,
        /// Print nothing but the image's name
        #[arg(short, long)]
        quiet: bool,
        /// Which image
        image: String,
    },
    /// Make an image of an archive or directory of a root file system, or take in a complete one
    Import {
        /// Apply an instruction of a Dockerfile: CMD, ENTRYPOINT, ENV, EXPOSE, LABEL, STOPSIGNAL,
        /// USER, VOLUME, WORKDIR
        #[arg(short, long, value_name = "INSTRUCTION")]
        change: Vec<String>,
        /// A comment for the image's history
        #[arg(short, long, value_name = "TEXT")]
        message: Option<String>,
        /// Archive (plain, gzip, zstd; - for standard input), directory, `oci:DIR` or
        /// `docker-archive:FILE`
        source: OsString,
        /// Name for the image
        name: Option<String>,
    },
    /// Give an image one more name
    Tag {
        /// Name or id of the image
        #[arg(value_name = "IMAGE")]
        source: String,
        /// The new name: a name and a tag
        target: String,
    },
    /// Send an image to a registry
    Push(push::Args),
    /// Write images to one archive, which docker, podman and skopeo read too
    #[command(
        after_help = "The archive is that of docker save: an OCI layout with Docker's manifest.json in it."
    )]
    Save(archive::SaveArgs),
    /// Take in the images of an archive of docker save, podman save or skopeo
    #[command(
        after_help = "The archive is plain or compressed with gzip or zstd. All its images are taken in, with their names."
    )]
    Load(archive::LoadArgs),
    /// Show the steps that an image was made by
    History(history::Args),
    /// Search a registry for images
    Search(search::Args),
    /// List images
    #[command(visible_alias = "list")]
    Ls(ls::Args),
    /// Remove images
    Rm {
        /// Remove all names of an image, also one that containers use
        #[arg(short, long)]
        force: bool,
        /// Names or ids
        #[arg(value_name = "IMAGE", required = true)]
        images: Vec<String>,
    },
    /// Tell by the exit status whether there is an image: 0 or 1
    Exists {
        /// Name or id
        #[arg(value_name = "IMAGE")]
        image: String,
    },
    /// Show all that is known of images, as JSON
    Inspect {
        /// Print a line for each with a template of Go's, or "json"
        #[arg(short, long, value_name = "FORMAT", value_parser = ObjectFormat::parse)]
        format: Option<ObjectFormat>,
        /// Names or ids
        #[arg(value_name = "IMAGE", required = true)]
        images: Vec<String>,
    },
    /// Remove images without a name that no container uses, and what interrupted pulls left
    Prune {
        /// Remove images with a name too
        #[arg(short, long)]
        all: bool,
        /// Remove only images that match: until=TIME, label=KEY[=VALUE], label!=KEY[=VALUE]
        #[arg(long = "filter", value_name = "KEY=VALUE", value_parser = PruneFilter::parse)]
        filters: Vec<PruneFilter>,
        /// Do not ask before images with a name are removed
        #[arg(short, long)]
        force: bool,
    },
}

/// Manages images.
pub fn execute(args: Args) -> Result<u8> {
    let config = config_for_root()?;
    let paths = config.paths();
    let container_exists = |id: &str| paths.container(id).exists();
    match args.command {
        Command::Pull {
            all_tags: true,
            platform,
            quiet,
            image,
        } => {
            let name = image_name(&image)?;
            if !name.is_name_only() {
                return Err(
                    Error::invalid(format!("--all-tags with the tag of {image}"))
                        .hint("give the name without a tag"),
                );
            }
            let tags = hull_image::remote_tags(&name, &Credentials::docker()).map_err(of_image)?;
            let tags: Vec<String> = tags.iter().map(ToString::to_string).collect();
            return for_each(&tags, |tag| pull(&config, tag, platform.as_ref(), quiet));
        }
        Command::Pull {
            platform,
            quiet,
            image,
            ..
        } => pull(&config, &image, platform.as_ref(), quiet)?,
        Command::Import {
            change,
            message,
            source,
            name,
        } => import(&config, &source, name.as_deref(), change, message)?,
        Command::Tag { source, target } => {
            let name = image_name(&target)?;
            let source: Reference = source.parse().map_err(of_image)?;
            images::store(&config)?
                .tag(&source, &name)
                .map_err(of_local)?;
        }
        Command::Push(args) => push::execute(&config, &args)?,
        Command::Save(args) => archive::save(&config, &args)?,
        Command::Load(args) => archive::load(&config, &args)?,
        Command::History(args) => history::execute(&config, &args)?,
        Command::Search(args) => search::execute(&args)?,
        Command::Ls(args) => ls::execute(&config, &args)?,
        Command::Rm {
            force,
            images: names,
        } => {
            let store = images::store(&config)?;
            return for_each(&names, |name| {
                // As in Docker, any reason that prevents an image's removal exits with 1.
                let wrong = |error| of_image(error).kind(ErrorKind::WrongState);
                let reference = name.parse().map_err(of_image)?;
                match store.remove(&reference, force, &container_exists) {
                    // As Docker: it is as it was to be.
                    Err(error) if force && error.is_not_found() => {
                        output::note(wrong(error).message);
                        Ok(())
                    }
                    removed => report(&removed.map_err(wrong)?),
                }
            });
        }
        Command::Exists { image } => {
            return Ok(inspect_object(&config, &image)?.is_none().into());
        }
        Command::Inspect {
            format,
            images: names,
        } => {
            return super::inspect::print_each(&names, format.as_ref(), |name| {
                inspect_object(&config, name)?.ok_or_else(|| {
                    Error::not_found(format!("no such image: {name}")).hint("hull image ls")
                })
            });
        }
        Command::Prune {
            all,
            filters,
            force,
        } => {
            let store = images::store(&config)?;
            let what = "all images that no container uses, also those with a name";
            if all && !force && !agreed(what)? {
                return Ok(0);
            }
            let removed = prune(&paths, &store, all, &filters)?;
            report(&removed)?;
            let note = if removed.layers_kept {
                "; more when the running pulls have ended"
            } else {
                ""
            };
            output::print(format!(
                "Total reclaimed space: {}{note}\n",
                output::decimal_size(removed.bytes)
            ))?;
        }
    }
    Ok(0)
}

fn pull(config: &Config, image: &str, platform: Option<&Platform>, quiet: bool) -> Result<()> {
    let reference = image.parse().map_err(of_image)?;
    let image = images::obtain_for(config, &reference, Pull::Always, platform, quiet)?;
    if !quiet && let Some(digest) = image.digest {
        output::note(format!("digest: {digest}"));
    }
    output::print(format!("{}\n", image.reference))
}

fn import(
    config: &Config,
    source: &OsStr,
    name: Option<&str>,
    changes: Vec<String>,
    message: Option<String>,
) -> Result<()> {
    let name = name.map(image_name).transpose()?;
    let text = source.to_string_lossy();
    let is_image = text.starts_with("oci:") || text.starts_with("docker-archive:");
    if is_image {
        if !changes.is_empty() || message.is_some() {
            return Err(
                Error::new(format!("cannot change {text}: it is a complete image")).hint(
                    "--change and --message are for archives and directories of a root file system",
                ),
            );
        }
        let reference: Reference = text.parse().map_err(of_image)?;
        let image = images::obtain(config, &reference, Pull::Missing, false)?;
        if let Some(name) = name {
            images::store(config)?
                .tag(&reference, &name)
                .map_err(of_image)?;
        }
        return output::print(format!("{}\n", image.id));
    }
    let path = text
        .strip_prefix("rootfs:")
        .map_or(Path::new(source), Path::new);
    let files = if source == "-" {
        ImportSource::Archive(Box::new(std::io::stdin().lock()))
    } else if path.is_dir() {
        ImportSource::Directory(path.to_owned())
    } else {
        let file = File::open(path).context(|| format!("import {}", path.display()))?;
        ImportSource::Archive(Box::new(file))
    };
    let import = Import {
        name,
        changes,
        message,
        author: None,
        created: None,
    };
    let image = images::store(config)?
        .import(&text, files, &import, &())
        .map_err(of_image)?;
    output::print(format!("{}\n", image.id))
}

pub fn report(removed: &Removed) -> Result<()> {
    let untagged = removed
        .untagged
        .iter()
        .map(|name| format!("Untagged: {name}\n"));
    let deleted = removed.images.iter().map(|id| format!("Deleted: {id}\n"));
    output::print(untagged.chain(deleted).collect::<String>())
}

/// The first twelve digits of an id.
fn short_id(id: &str) -> String {
    id.trim_start_matches("sha256:").chars().take(12).collect()
}
