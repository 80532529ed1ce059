//! `hull image push`: sends images to a registry.

use hull_engine::config::Config;
use hull_engine::error::of_image;
use hull_engine::images::{image_name, of_local};
use hull_image::{Credentials, Progress, Reference, RegistryReference};

use crate::error::{Error, Result};
use crate::images::{self, Shown};
use crate::output;

/// Arguments of `image push`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Send all tags of the repository that are here
    #[arg(short, long)]
    all_tags: bool,
    /// Print nothing but the image's name
    #[arg(short, long)]
    quiet: bool,
    /// Name of a local image: its registry is in the name
    image: String,
}

/// Sends an image, or all tags of a repository.
pub fn execute(config: &Config, args: &Args) -> Result<()> {
    let store = images::store(config)?;
    let name = image_name(&args.image)?;
    let names = match args.all_tags {
        false => vec![name.clone()],
        true if !name.is_name_only() => {
            return Err(
                Error::invalid(format!("--all-tags with the tag of {}", args.image))
                    .hint("give the name without a tag"),
            );
        }
        true => tags(&store, &name)?,
    };
    if !args.quiet {
        output::print(format!("The push refers to repository [{}]\n", name.name()))?;
    }
    let credentials = Credentials::docker();
    for name in names {
        let shown = Shown::new("pushing");
        let progress: &dyn Progress = if args.quiet { &() } else { &shown };
        let pushed = store
            .push(&name, &credentials, progress)
            .map_err(of_local)?;
        output::print(match args.quiet {
            true => format!("{name}\n"),
            false => format!(
                "{}: digest: {} size: {}\n",
                pushed.tag, pushed.digest, pushed.size
            ),
        })?;
    }
    Ok(())
}

fn tags(store: &hull_image::Store, name: &RegistryReference) -> Result<Vec<RegistryReference>> {
    let tags = store.tags(name).map_err(of_image)?;
    let tags: Vec<RegistryReference> = tags
        .into_iter()
        .filter_map(|tag| match tag {
            Reference::Registry(tag) => Some(tag),
            _ => None,
        })
        .collect();
    match tags.is_empty() {
        true => Err(
            Error::not_found(format!("no image of repository {} is here", name.name()))
                .hint("hull image ls, hull image tag"),
        ),
        false => Ok(tags),
    }
}
