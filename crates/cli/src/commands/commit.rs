//! `hull commit`.

use hull_engine::changes;
use hull_engine::images::image_name;
use hull_image::Import;

use super::config_for_root;
use crate::error::Result;
use crate::output;

/// Arguments of `commit`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Apply an instruction of a Dockerfile: CMD, ENTRYPOINT, ENV, EXPOSE, LABEL, STOPSIGNAL, USER,
    /// VOLUME, WORKDIR
    #[arg(short, long, value_name = "INSTRUCTION")]
    change: Vec<String>,
    /// A comment for the image's history
    #[arg(short, long, value_name = "TEXT")]
    message: Option<String>,
    /// Who made it
    #[arg(short, long, value_name = "NAME")]
    author: Option<String>,
    /// Freeze a container that runs meanwhile
    #[arg(short, long, value_name = "YES", default_value_t = true, action = clap::ArgAction::Set,
          num_args = 0..=1, default_missing_value = "true", require_equals = true)]
    pause: bool,
    /// Name or id
    #[arg(value_name = "CONTAINER")]
    container: String,
    /// Name of the image
    #[arg(value_name = "NAME[:TAG]")]
    name: Option<String>,
}

/// Makes an image of a container and prints its id.
pub fn execute(args: Args) -> Result<u8> {
    let config = config_for_root()?;
    let name = args.name.as_deref().map(image_name).transpose()?;
    let import = Import {
        name,
        changes: args.change,
        message: args.message,
        author: args.author,
        created: None,
    };
    let image = changes::commit(&config, &args.container, &import, args.pause)?;
    output::print(format!("{}\n", image.id))?;
    Ok(0)
}
