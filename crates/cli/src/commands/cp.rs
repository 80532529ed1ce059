//! `hull cp`: determines which side is the container, and targets by Docker's rules. `copy` handles
//! the archives.

use std::ffi::{OsStr, OsString};
use std::io::IsTerminal;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use hull_engine::Paths;
use hull_engine::container::{self, Container};
use hull_engine::copy::{self, ArchiveReader, ArchiveWriter, EntryKind};

use super::config_for_existing;
use crate::error::{self, Context, Error, Result, WRONG_CONTAINER};
use crate::output;

/// Arguments of `cp`.
#[derive(Debug, clap::Args)]
#[command(
    override_usage = "hull cp [OPTIONS] CONTAINER:PATH DEST|-\n       hull cp [OPTIONS] SOURCE|- CONTAINER:PATH",
    after_help = "- stands for a tar archive on standard input or output."
)]
pub struct Args {
    /// Copy what a symbolic link leads to, not the link
    #[arg(short = 'L', long)]
    follow_link: bool,
    /// Keep owners as they are
    #[arg(short, long)]
    archive: bool,
    /// Accepted for compatibility: nothing is printed
    #[arg(short, long, hide = true)]
    quiet: bool,
    /// From
    #[arg(allow_hyphen_values = true)]
    source: OsString,
    /// To
    #[arg(allow_hyphen_values = true)]
    destination: OsString,
}

/// One side of a copy.
#[derive(Debug, PartialEq, Eq)]
enum Side {
    /// `-`
    Stream,
    Host(PathBuf),
    Container(String, Vec<u8>),
}

impl Side {
    /// Docker's syntax: `NAME:PATH`, unless it starts like a path.
    fn parse(text: &OsStr) -> Side {
        let bytes = text.as_bytes();
        if bytes == b"-" {
            return Side::Stream;
        }
        let colon = bytes.iter().position(|byte| *byte == b':');
        match colon {
            Some(colon) if !bytes.starts_with(b"/") && !bytes.starts_with(b".") && colon > 0 => {
                let (name, path) = bytes.split_at(colon);
                let path = &path[1..];
                let mut absolute = Vec::with_capacity(path.len() + 1);
                if !path.starts_with(b"/") {
                    absolute.push(b'/');
                }
                absolute.extend_from_slice(path);
                Side::Container(String::from_utf8_lossy(name).into_owned(), absolute)
            }
            _ => Side::Host(PathBuf::from(text)),
        }
    }
}

/// Copies.
pub fn execute(args: Args) -> Result<u8> {
    let paths = config_for_existing()?.paths();
    let outcome = match (Side::parse(&args.source), Side::parse(&args.destination)) {
        (Side::Container(name, from), to @ (Side::Host(_) | Side::Stream)) => {
            container::find(&paths, &name)
                .and_then(|container| copy_out(&paths, &container, &from, &to, &args))
        }
        (from @ (Side::Host(_) | Side::Stream), Side::Container(name, to)) => {
            container::find(&paths, &name)
                .and_then(|container| copy_in(&paths, &container, &from, &to, &args))
        }
        (Side::Container(..), Side::Container(..)) => {
            return Err(Error::unsupported("a copy from one container to another")
                .hint("hull cp CONTAINER:PATH - | hull cp - CONTAINER:DIRECTORY"));
        }
        _ => {
            return Err(Error::invalid("neither side of the copy is in a container")
                .hint("hull cp CONTAINER:PATH DEST, or hull cp SOURCE CONTAINER:PATH"));
        }
    };
    // As in Docker, all errors exit with 1: the usual exit codes do not apply.
    Ok(match outcome {
        Ok(()) => 0,
        Err(error) => {
            error::print(&error);
            WRONG_CONTAINER
        }
    })
}

/// Whether `path` means the contents of a directory instead of the directory: it ends in `/.`.
fn names_contents(path: &[u8]) -> bool {
    path.ends_with(b"/.") || path == b"."
}

/// `path` without a suffix that has a meaning for Docker.
fn plain(path: &[u8]) -> &[u8] {
    let mut path = path;
    loop {
        path = match path {
            [rest @ .., b'/'] if !rest.is_empty() => rest,
            [rest @ .., b'/', b'.'] => match rest {
                [] => b"/",
                rest => rest,
            },
            path => return path,
        };
    }
}

/// The name of what a path of the container leads to, without a look at the container; none for the
/// root directory.
fn last_name(path: &[u8]) -> Option<OsString> {
    let mut names: Vec<&[u8]> = Vec::new();
    for part in path.split(|byte| *byte == b'/') {
        match part {
            b"" | b"." => {}
            b".." => drop(names.pop()),
            name => names.push(name),
        }
    }
    names.pop().map(|name| OsString::from_vec(name.to_vec()))
}

/// A path of the container's, which travels as text.
fn utf8(path: &[u8]) -> Result<String> {
    String::from_utf8(path.to_vec()).map_err(|_| {
        let shown = String::from_utf8_lossy(path);
        Error::unsupported(format_args!("the path {shown:?} is not UTF-8"))
    })
}

fn ask_for_archive(
    paths: &Paths,
    container: &Container,
    path: &[u8],
    follow: bool,
) -> Result<ArchiveReader> {
    ArchiveReader::ask(paths, container, utf8(path)?, follow)
}

fn copy_out(
    paths: &Paths,
    container: &Container,
    from: &[u8],
    to: &Side,
    args: &Args,
) -> Result<()> {
    let shown = String::from_utf8_lossy(from).into_owned();
    let what = || {
        format!(
            "cannot copy {shown} from container {}",
            container.record.details.name
        )
    };
    let mut archive = ask_for_archive(paths, container, plain(from), args.follow_link)?;
    let Side::Host(to) = to else {
        let stdout = std::io::stdout();
        if stdout.is_terminal() {
            return Err(Error::new("an archive is not written to a terminal")
                .hint("hull cp CONTAINER:PATH - >FILE"));
        }
        return archive
            .copy_to(&mut stdout.lock())
            .map_err(|error| error.while_doing(what()));
    };
    let ends_as_directory = to.as_os_str().as_bytes().ends_with(b"/");
    // The name is the one that was asked for, whatever the guest calls it.
    let name = last_name(from).filter(|_| !names_contents(from));
    let place = |kind: EntryKind| -> std::result::Result<PathBuf, String> {
        let is_directory = kind == EntryKind::Directory;
        match (std::fs::metadata(to), &name) {
            (Ok(there), Some(name)) if there.is_dir() => Ok(to.join(name)),
            (Ok(there), None) if there.is_dir() && is_directory => Ok(to.clone()),
            (Ok(there), None) if there.is_dir() => Err(format!("{shown} is not a directory")),
            (Ok(_), _) if is_directory => Err(format!("{} is not a directory", to.display())),
            (Ok(_), _) => Ok(to.clone()),
            (Err(_), _) if ends_as_directory && !is_directory => {
                Err(format!("the directory {} does not exist", to.display()))
            }
            (Err(_), _) => Ok(to.clone()),
        }
    };
    let left_out =
        copy::unpack(archive, &place, args.archive).map_err(|error| error.while_doing(what()))?;
    for name in left_out {
        let name = output::printable(&name);
        output::note(format!(
            "note: {name} is left out: it is a device or of an unknown type"
        ));
    }
    Ok(())
}

fn copy_in(
    paths: &Paths,
    container: &Container,
    from: &Side,
    to: &[u8],
    args: &Args,
) -> Result<()> {
    let shown = String::from_utf8_lossy(to).into_owned();
    let open = |directory: &[u8]| -> Result<ArchiveWriter> {
        ArchiveWriter::ask(paths, container, utf8(directory)?)
    };
    let what = || {
        format!(
            "cannot copy to {shown} in container {}",
            container.record.details.name
        )
    };
    let Side::Host(from) = from else {
        let mut writer = open(plain(to))?;
        writer
            .copy_from(&mut std::io::stdin().lock())
            .map_err(|error| error.while_doing(what()))?;
        return writer.finish().map_err(|error| error.while_doing(what()));
    };
    let metadata = match args.follow_link || names_contents(from.as_os_str().as_bytes()) {
        true => std::fs::metadata(from),
        false => std::fs::symlink_metadata(from),
    };
    let metadata = metadata.context(|| format!("copy {}", from.display()))?;
    let contents = metadata.is_dir() && names_contents(from.as_os_str().as_bytes());
    let own_name = Path::new(OsStr::from_bytes(plain(from.as_os_str().as_bytes())))
        .canonicalize()
        .ok()
        .filter(|_| metadata.is_dir())
        .or_else(|| Some(from.clone()))
        .and_then(|path| path.file_name().map(OsStr::to_owned))
        .unwrap_or_else(|| OsString::from("."));
    // The target's type decides where the copy goes: request it as an archive and read only its
    // beginning.
    let there = ask_for_archive(paths, container, plain(to), true)?
        .first()
        .map(|entry| entry.kind)
        .ok();
    let wants_directory = to.ends_with(b"/") || names_contents(to);
    let (directory, name) = match there {
        Some(EntryKind::Directory) if contents => (plain(to).to_vec(), OsString::from(".")),
        Some(EntryKind::Directory) => (plain(to).to_vec(), own_name),
        Some(_) if metadata.is_dir() => {
            return Err(Error::new(format!(
                "{}: {shown} is not a directory",
                what()
            )));
        }
        None if wants_directory && !metadata.is_dir() => {
            return Err(Error::new(format!(
                "{}: the directory {shown} does not exist",
                what()
            )));
        }
        // A file to replace, or a new name in its parent directory.
        _ => split(plain(to)),
    };
    let mut writer = open(&directory)?;
    copy::pack(&mut writer, from, &name, args.follow_link, args.archive)
        .map_err(|error| error.while_doing(what()))?;
    writer.finish().map_err(|error| error.while_doing(what()))
}

/// Parent and last component of an absolute path.
fn split(path: &[u8]) -> (Vec<u8>, OsString) {
    let slash = path.iter().rposition(|byte| *byte == b'/').unwrap_or(0);
    let parent = if slash == 0 { b"/" } else { &path[..slash] };
    let name = OsString::from_vec(path.get(slash + 1..).unwrap_or_default().to_vec());
    (parent.to_vec(), name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sides() {
        let container = |name: &str, path: &[u8]| Side::Container(name.to_owned(), path.to_vec());
        for (text, side) in [
            ("-", Side::Stream),
            ("web:/etc", container("web", b"/etc")),
            ("web:etc", container("web", b"/etc")),
            ("web:", container("web", b"/")),
            ("/a:b", Side::Host("/a:b".into())),
            ("./a:b", Side::Host("./a:b".into())),
            ("file", Side::Host("file".into())),
            (":x", Side::Host(":x".into())),
        ] {
            assert_eq!(Side::parse(OsStr::new(text)), side, "{text}");
        }
    }

    #[test]
    fn names_of_what_is_copied() {
        for (path, name) in [
            ("/log.txt", Some("log.txt")),
            ("/var/log/", Some("log")),
            ("/var/log/.", Some("log")),
            ("/var/log/../spool", Some("spool")),
            ("/var/log/..", Some("var")),
            ("/", None),
            ("/.", None),
            ("/../..", None),
        ] {
            let name = name.map(OsString::from);
            assert_eq!(last_name(path.as_bytes()), name, "{path}");
        }
    }

    #[test]
    fn ends_of_paths() {
        for (path, without) in [
            ("/etc", "/etc"),
            ("/etc/", "/etc"),
            ("/etc/.", "/etc"),
            ("/etc/./", "/etc"),
            ("/", "/"),
            ("/.", "/"),
        ] {
            assert_eq!(plain(path.as_bytes()), without.as_bytes(), "{path}");
        }
        assert!(names_contents(b"/etc/."));
        assert!(!names_contents(b"/etc/a."));
        assert_eq!(split(b"/a/b"), (b"/a".to_vec(), OsString::from("b")));
        assert_eq!(split(b"/a"), (b"/".to_vec(), OsString::from("a")));
    }
}
