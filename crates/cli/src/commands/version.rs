//! `hull version`.

use serde_json::json;

use crate::error::Result;
use crate::format::ObjectFormat;
use crate::output;
use hull_engine::config::Config;
use hull_engine::guest_files::GuestFiles;

/// Arguments of `version`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// Print with a template of Go's, such as '{{.Server.Version}}', or "json"
    #[arg(short, long, value_name = "FORMAT", value_parser = ObjectFormat::parse, conflicts_with = "json")]
    format: Option<ObjectFormat>,
}

/// Prints the versions of hull and of the installed guest kernels.
pub fn execute(args: Args) -> Result<u8> {
    // What is wrong in it is not what is asked for.
    let (config, _) = Config::load_for_existing()?;
    let guest = GuestFiles::locate(&config)?;
    let host = rustix::system::uname();
    let mut kernels = Vec::new();
    for (architecture, kinds) in hull_machine::kernels() {
        let Some(kind) = kinds.first() else { continue };
        let path = guest.kernel_path(*kind);
        let version = match path.is_file() {
            true => GuestFiles::information(&path)?.version,
            false => "not installed".to_owned(),
        };
        kernels.push((architecture, version));
    }
    let version = env!("CARGO_PKG_VERSION");
    let (os, architecture) = (std::env::consts::OS, std::env::consts::ARCH);
    if args.json || args.format.is_some() {
        let kernels: serde_json::Map<_, _> = kernels
            .into_iter()
            .map(|(name, version)| (name.to_owned(), json!(version)))
            .collect();
        let mut object = json!({
            "version": version,
            "os": os,
            "architecture": architecture,
            "host_kernel": host.release().to_string_lossy(),
            "guest_kernels": kernels,
        });
        let Some(format) = &args.format else {
            output::print_json(&object)?;
            return Ok(0);
        };
        // There is no server: the command is both.
        let mut part = json!({
            "Version": version,
            "Os": os,
            "Arch": hull_image::Platform::host().architecture,
        });
        object["Client"] = part.clone();
        part["KernelVersion"] = object["host_kernel"].clone();
        part["GuestKernels"] = object["guest_kernels"].clone();
        object["Server"] = part;
        output::print(format.line(&object)?)?;
        return Ok(0);
    }
    let mut text = format!(
        "hull {version} ({}, host kernel {})\n",
        std::env::consts::ARCH,
        host.release().to_string_lossy()
    );
    for (name, version) in kernels {
        text.push_str(&format!("guest kernel {name}: {version}\n"));
    }
    output::print(text)?;
    Ok(0)
}
