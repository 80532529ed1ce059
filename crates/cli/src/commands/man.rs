//! `hull man`: run once by `make install`.

use std::path::{Path, PathBuf};

use clap::{Command, CommandFactory};
use clap_mangen::Man;

use crate::cli::Hull;
use crate::error::{Context, Result};
use crate::oci;

/// Arguments of `man`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Directory that the pages are written to
    directory: PathBuf,
}

/// What each page of `hull` ends with.
const COMMON: &str = r#".SH "EXIT STATUS"
.TP
0
success
.TP
1
the container or image does not exist or is in the wrong state; of \fBexists\fR, the answer no
.TP
125
hull itself failed, or was called wrongly
.PP
\fBhull run\fR and \fBhull exec\fR exit with the status of the container's process, 128 + n if signal n
ended it, 126 if the command cannot be executed, and 127 if it was not found; \fBhull run\fR with 125
if anything else failed before the container ran.
.SH ENVIRONMENT
.TP
\fBHULL_CONFIG\fR
a configuration file in place of those below
.TP
\fBNO_COLOR\fR
if set, output has no colours
.TP
\fBXDG_CONFIG_HOME\fR, \fBXDG_DATA_HOME\fR, \fBXDG_RUNTIME_DIR\fR
where the directories of users without root are
.SH FILES
.TP
/etc/hull/config.toml
the configuration; \fBhull config --default\fR lists all keys
.TP
/var/lib/hull
images, containers with their writable layers and logs
.TP
/run/hull
what runs
.TP
~/.docker/config.json
credentials for registries, as stored by hull login, docker login or podman login
.TP
/etc/cni/net.d
networks for \fB--network\fR
.PP
Users without root have ~/.config/hull/config.toml, ~/.local/share/hull and
$XDG_RUNTIME_DIR/hull.
"#;

/// Examples of a page.
fn examples(command: &str) -> &'static [(&'static str, &'static str)] {
    match command {
        "hull run" => &[
            (
                "hull run --rm busybox echo hello",
                "runs a command and removes the container",
            ),
            ("hull run -it --rm busybox", "with a terminal"),
            (
                "hull run -d --name web -p 8080:80 -v /srv:/www:ro busybox httpd -f -h /www",
                "in the background",
            ),
        ],
        "hull exec" => &[("hull exec -it web sh", "a shell in a running container")],
        "hull ps" => &[
            ("hull ps -a -f status=exited", "containers that have ended"),
            (
                "hull ps -q -f name=^web$",
                "the id of a container, if it runs",
            ),
        ],
        "hull logs" => &[(
            "hull logs -f --since 10m web",
            "output of the last ten minutes and what follows",
        )],
        "hull cp" => &[
            (
                "hull cp job:/root/result .",
                "out of a container, which may have ended",
            ),
            ("hull cp job:/ - | tar -t", "all files of a container"),
        ],
        "hull image" | "hull image pull" => &[(
            "hull image pull docker-archive:FILE",
            "what docker save wrote",
        )],
        "hull build" => &[("hull build -t app .", "an image of the Dockerfile here")],
        "hull create" | "hull start" => &[
            (
                "hull create --name job busybox date",
                "a container that does not run yet",
            ),
            ("hull start -a job", "runs it, as often as one likes"),
        ],
        "hull image save" | "hull image load" => &[(
            "hull image save app | ssh host hull image load",
            "an image goes to another host",
        )],
        "hull network" | "hull network create" => &[(
            "hull network create front; hull run -d --name db --network front IMAGE",
            "others of that network find it by the name db",
        )],
        "hull volume" | "hull volume create" => &[(
            "hull run -v data:/data IMAGE",
            "creates the volume data, unless it is there",
        )],
        "hull image import" => &[(
            "hull image import --change 'CMD [\"sh\"]' rootfs.tar small",
            "an image of an archive",
        )],
        _ => &[],
    }
}

/// Writes manual pages for hull, hull-oci, and each of their commands.
pub fn execute(args: Args) -> Result<u8> {
    let directory = &args.directory;
    std::fs::create_dir_all(directory).context(|| format!("create {}", directory.display()))?;
    let mut hull = Hull::command();
    hull.build();
    // It is for packages, and people look for it.
    hull = hull.mut_subcommand("completions", |command| command.hide(false));
    write_pages(&hull, "hull", directory)?;
    clap_mangen::generate_to(oci::grammar(), directory)
        .context(|| format!("write manual pages to {}", directory.display()))?;
    Ok(0)
}

/// The page of a command, and those of its commands.
fn write_pages(command: &Command, name: &str, directory: &Path) -> Result<()> {
    let file = directory.join(format!("{}.1", name.replace(' ', "-")));
    let text = page(command, name).context(|| format!("write {}", file.display()))?;
    std::fs::write(&file, text).context(|| format!("write {}", file.display()))?;
    for inner in command
        .get_subcommands()
        .filter(|inner| !inner.is_hide_set())
    {
        write_pages(inner, &format!("{name} {}", inner.get_name()), directory)?;
    }
    Ok(())
}

fn page(command: &Command, name: &str) -> std::io::Result<Vec<u8>> {
    let page_name = name.replace(' ', "-");
    let named = command.clone().display_name(page_name.clone());
    let man = Man::new(named).title(page_name);
    let mut text = Vec::new();
    man.render_title(&mut text)?;
    man.render_name_section(&mut text)?;
    man.render_synopsis_section(&mut text)?;
    man.render_description_section(&mut text)?;
    man.render_options_section(&mut text)?;
    if command.get_subcommands().any(|inner| !inner.is_hide_set()) {
        man.render_subcommands_section(&mut text)?;
    }
    let mut rest = String::new();
    if let Some(more) = command.get_after_help() {
        rest.push_str(&format!(".PP\n{}\n", escaped(&more.to_string())));
    }
    rest.push_str(COMMON);
    let examples = examples(name);
    if !examples.is_empty() {
        rest.push_str(".SH EXAMPLES\n");
        for (line, what) in examples {
            rest.push_str(&format!(
                ".TP\n\\fB{}\\fR\n{}\n",
                escaped(line),
                escaped(what)
            ));
        }
    }
    rest.push_str(".SH \"SEE ALSO\"\n");
    rest.push_str(match name {
        "hull" => "\\fBhull-oci\\fR(1), \\fBhull-run\\fR(1), the book in /usr/share/doc/hull\n",
        _ => "\\fBhull\\fR(1), \\fBhull-run\\fR(1), \\fBhull-ps\\fR(1)\n",
    });
    text.extend_from_slice(rest.as_bytes());
    Ok(text)
}

/// Text in which nothing is a request or an escape of roff.
fn escaped(text: &str) -> String {
    text.replace('\\', "\\\\")
        .replace('-', "\\-")
        .lines()
        .map(|line| match line.starts_with(['.', '\'']) {
            true => format!("\\&{line}\n"),
            false => format!("{line}\n"),
        })
        .collect::<String>()
        .trim_end()
        .to_owned()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn each_page_says_how_a_command_ends_and_where_files_are() {
        let directory = tempfile::tempdir().unwrap();
        let args = Args {
            directory: directory.path().to_owned(),
        };
        execute(args).unwrap();
        let read = |name: &str| std::fs::read_to_string(directory.path().join(name)).unwrap();
        for page in [
            "hull.1",
            "hull-run.1",
            "hull-image-pull.1",
            "hull-completions.1",
        ] {
            for section in [
                "EXIT STATUS",
                "ENVIRONMENT",
                "FILES",
                "SEE ALSO",
                "SYNOPSIS",
            ] {
                assert!(read(page).contains(section), "{page}: {section}");
            }
        }
        assert!(read("hull-run.1").contains("EXAMPLES"));
        assert!(
            read("hull-run.1").contains("hull run [OPTIONS] IMAGE")
                || read("hull-run.1").contains("IMAGE")
        );
        assert!(directory.path().join("hull-oci.1").exists());
    }
}
