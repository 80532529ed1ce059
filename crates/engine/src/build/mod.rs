//! Images from recipes (Dockerfiles). buildah reads the recipe and keeps layers for the next build;
//! each RUN step is a container of `hull-oci`, in a machine of its own. The result is taken into
//! the image store, with the id that buildah gave it.
//!
//! Called by `hull build`. Trusts buildah as it trusts the person who calls it: both run with the
//! same rights.

use std::collections::BTreeMap;
use std::env::{self, var_os};
use std::ffi::OsString;
use std::fs::{self, DirBuilder, File};
use std::io::{self, Read, Seek};
use std::os::fd::AsFd;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};

use hull_image::unpack::uncompress;
use hull_image::{Credentials, Progress, Pull, Reference, RegistryReference, Store};
use hull_sandbox::store::{ProcessId, remove_all};

mod recipe;

use crate::config::Config;
use crate::error::{Context as _, Error, Result, of_image};
use crate::{install, names, unpacker};

/// Reads recipes.
const BUILDAH: &str = "buildah";

/// Where short names lead that nobody has configured: containers-registries.conf(5).
const SEARCH: &str = "unqualified-search-registries";

/// A person's and the host's configuration of registries; the first one that exists counts.
const REGISTRIES: [(&str, &str); 2] = [
    ("HOME", ".config/containers/registries.conf"),
    ("", "/etc/containers/registries.conf"),
];

/// What is to be built.
#[derive(Debug, Default)]
pub struct Build {
    /// Directory or URL with what the recipe copies; `-` for what is on standard input: an archive
    /// of such a directory, or the recipe alone.
    pub context: OsString,
    /// The recipe, in place of the one in the context; in an archive, by its path there.
    pub file: Option<PathBuf>,
    /// Names of the image.
    pub names: Vec<RegistryReference>,
    /// Further options of `buildah build`, which have Docker's names.
    pub options: Vec<OsString>,
    /// Do not show the steps.
    pub quiet: bool,
    /// Where the steps are shown; on standard error without it.
    pub output: Option<File>,
    /// Accounts at registries, in place of the user's own: as `docker login` keeps them.
    pub accounts: Option<serde_json::Value>,
}

/// The files of a recipe that came as an archive; removed when this is dropped.
#[derive(Debug)]
pub struct Context(PathBuf);

impl Context {
    /// Unpacks an archive, with the rights of this process. Who it belongs to is not kept, as in
    /// Docker.
    ///
    /// # Errors
    /// It is damaged, or there is no room for it.
    pub fn unpack(config: &Config, archive: impl Read) -> Result<Self> {
        let path = config.paths().staging(ProcessId::own());
        let created = DirBuilder::new().recursive(true).mode(0o700).create(&path);
        created.context(|| format!("create {}", path.display()))?;
        let context = Self(path);
        let mut archive = tar::Archive::new(archive);
        archive.set_preserve_permissions(true);
        archive
            .unpack(&context.0)
            .map_err(|error| Error::from_chain(&error))?;
        Ok(context)
    }

    /// Where they are.
    pub fn path(&self) -> &Path {
        &self.0
    }
}

/// What came on standard input.
enum Input {
    /// A recipe, which is a file now.
    Recipe(PathBuf),
    /// A directory with files and a recipe.
    Archive(Context),
}

impl Input {
    /// Longest recipe, bytes.
    const LONGEST_RECIPE: u64 = 4 << 20;

    fn read(config: &Config, mut input: impl Read, work: &Work) -> Result<Self> {
        let doing = || "read standard input";
        let mut head = Vec::new();
        let mut limited = (&mut input).take(BLOCK);
        limited.read_to_end(&mut head).context(doing)?;
        if is_archive(&head) {
            let archive = io::BufReader::new(head.chain(input));
            let archive = uncompress(archive).map_err(|error| Error::from_chain(&error))?;
            return Context::unpack(config, archive).map(Self::Archive);
        }
        Self::recipe(head, input, work).map(Self::Recipe)
    }

    /// Makes a file of a recipe.
    fn recipe(mut text: Vec<u8>, input: impl Read, work: &Work) -> Result<PathBuf> {
        let recipe = work.0.join("Dockerfile");
        let mut rest = input.take(Self::LONGEST_RECIPE);
        rest.read_to_end(&mut text)
            .context(|| "read standard input")?;
        fs::write(&recipe, &text).context(|| format!("write {}", recipe.display()))?;
        Ok(recipe)
    }
}

/// Bytes of a header of an archive: tar(5).
const BLOCK: u64 = 512;

/// Whether something that begins so is an archive: compressed, or by its magic.
fn is_archive(head: &[u8]) -> bool {
    const MAGIC: std::ops::Range<usize> = 257..262;
    let compressed = [
        &[0x1f, 0x8b][..],
        &[0x28, 0xb5, 0x2f, 0xfd],
        b"BZh",
        &[0xfd, b'7', b'z'],
    ];
    compressed.iter().any(|magic| head.starts_with(magic)) || head.get(MAGIC) == Some(b"ustar")
}

impl Drop for Context {
    fn drop(&mut self) {
        // If it fails, what is left goes with that of killed commands.
        let _ = remove_all(&self.0);
    }
}

/// Builds an image and returns its id.
///
/// # Errors
/// `Unsupported` without buildah or root; a step fails; what the image store returns.
pub fn build(config: &Config, build: &Build, progress: &dyn Progress) -> Result<String> {
    if config.without_root {
        return Err(Error::unsupported(
            "build without root: steps are executed by hull-oci, which needs it",
        )
        .hint("podman build, then: podman save IMAGE | hull image load"));
    }
    // Its directories are there then, and what is wrong with it is told before the work is done.
    let store = unpacker::store(config)?;
    let work = Work::create(&config.run_dir)?;
    let id_file = work.0.join("id");
    let mut command = buildah("build");
    command.args(["--format", "docker", "--layers", "--force-rm"]);
    command.args(["--isolation", "oci"]);
    command.arg("--runtime").arg(install::runtime()?);
    command.arg("--iidfile").arg(&id_file);
    if build.quiet {
        command.arg("--quiet");
    }
    for name in &build.names {
        command.arg("--tag").arg(name.to_string());
    }
    let mut files = None;
    let (context, file) = if build.context == "-" {
        match Input::read(config, io::stdin().lock(), &work)? {
            Input::Recipe(_) if build.file.is_some() => {
                return Err(Error::invalid(
                    "the recipe is --file or standard input, not both",
                ));
            }
            Input::Recipe(recipe) => {
                let empty = work.0.join("context");
                fs::create_dir(&empty).context(|| format!("create {}", empty.display()))?;
                (empty, Some(recipe))
            }
            Input::Archive(archive) => {
                let file = build.file.as_ref().map(|file| archive.path().join(file));
                let context = archive.path().to_owned();
                files = Some(archive);
                (context, file)
            }
        }
    } else {
        let file = match &build.file {
            Some(file) if file.as_os_str() == "-" => {
                Some(Input::recipe(Vec::new(), io::stdin().lock(), &work)?)
            }
            file => file.clone(),
        };
        (PathBuf::from(&build.context), file)
    };
    command.args(&build.options);
    if let Some(file) = &file {
        command.arg("--file").arg(file);
    }
    if let Some(accounts) = &build.accounts {
        let file = work.0.join("auth.json");
        // The directory is nobody else's.
        fs::write(&file, accounts.to_string()).context(|| format!("write {}", file.display()))?;
        command.arg("--authfile").arg(file);
    }
    command.arg("--").arg(&context);
    if let Some(file) = search_registries(&work.0)? {
        command.env("CONTAINERS_REGISTRIES_CONF", file);
    }
    let shown = || match &build.output {
        Some(output) => output.as_fd().try_clone_to_owned(),
        None => io::stderr().as_fd().try_clone_to_owned(),
    };
    let doing = || "pass on what the steps say";
    command.stdout(match build.quiet {
        true => Stdio::null(),
        false => shown().context(doing)?.into(),
    });
    command.stderr(shown().context(doing)?);
    command.stdin(Stdio::null());
    offer_local_images(&store, build, &context, file.as_deref())?;
    succeeded(run(&mut command)?, "the build failed")?;
    // All of them are read.
    drop(files);
    let id = fs::read_to_string(&id_file)
        .context(|| format!("read {}, the id of the image", id_file.display()))?;
    let id = id.trim();

    let archive = store.temporary_file().map_err(of_image)?;
    let output = archive.try_clone().context(|| "pass on a file")?;
    let mut command = buildah("push");
    command.args(["--quiet", id, "docker-archive:/proc/self/fd/1"]);
    let status = run(command.stdin(Stdio::null()).stdout(output))?;
    succeeded(
        status,
        "the image is built and cannot be taken from buildah",
    )?;
    take_in(&store, archive, &build.names, progress)
}

/// Gives buildah the images that a recipe takes from and that are here: it has a store of its own.
/// A recipe that is elsewhere is not known.
fn offer_local_images(
    store: &Store,
    build: &Build,
    context: &Path,
    file: Option<&Path>,
) -> Result<()> {
    let recipe = recipe_of(context, file).unwrap_or_default();
    for name in recipe::images(&recipe, &arguments(build)) {
        let Ok(reference) = name.parse::<Reference>() else {
            continue;
        };
        let Reference::Registry(named) = &reference else {
            continue;
        };
        let image = match store.inspect(&reference) {
            Ok(image) => image,
            // Over plain HTTP, as all commands of hull ask registries of this machine.
            Err(error) if error.is_not_found() && named.is_local() => {
                let credentials = match build.accounts {
                    Some(_) => Credentials::anonymous(),
                    None => Credentials::docker(),
                };
                let pulled = store.resolve(&reference, Pull::Missing, &credentials, &());
                pulled.map_err(of_image)?
            }
            // One that is not here is buildah's to find.
            Err(_) => continue,
        };
        let full = reference.to_string();
        let mut known = buildah("images");
        known
            .args(["--quiet", "--no-trunc", &full])
            .stderr(Stdio::null());
        let known = executed(known.stdin(Stdio::null()).output())?;
        if String::from_utf8_lossy(&known.stdout).trim() == image.id {
            continue;
        }
        let archive = store.temporary_file().map_err(of_image)?;
        let mut output = archive.try_clone().context(|| "pass on a file")?;
        store
            .save(
                &[reference],
                &mut output,
                Path::new("an archive for buildah"),
                &(),
            )
            .map_err(of_image)?;
        let mut command = buildah("pull");
        // By its name in buildah's process: it has no other one.
        command.args(["--quiet", "docker-archive:/proc/self/fd/0"]);
        let status = run(command.stdin(archive).stdout(Stdio::null()))?;
        succeeded(status, &format!("image {name} cannot be given to buildah"))?;
    }
    Ok(())
}

/// The text of the recipe, if it is a file of this host.
fn recipe_of(context: &Path, file: Option<&Path>) -> Option<String> {
    if let Some(file) = file {
        return fs::read_to_string(file).ok();
    }
    let names = ["Containerfile", "Dockerfile"];
    let mut texts = names
        .iter()
        .map(|name| fs::read_to_string(context.join(name)));
    texts.find_map(Result::ok)
}

/// The arguments that are given to the recipe.
fn arguments(build: &Build) -> BTreeMap<String, String> {
    let pairs = build
        .options
        .windows(2)
        .filter(|pair| pair[0] == "--build-arg");
    pairs
        .filter_map(|pair| {
            let (name, value) = pair[1].to_str()?.split_once('=')?;
            Some((name.to_owned(), value.to_owned()))
        })
        .collect()
}

/// Takes the one image of an archive into the store and names it.
fn take_in(
    store: &Store,
    mut archive: File,
    names: &[RegistryReference],
    progress: &dyn Progress,
) -> Result<String> {
    archive.rewind().context(|| "read what buildah wrote")?;
    let loaded = store
        .load("what buildah wrote", archive, progress)
        .map_err(of_image)?;
    let [image] = &loaded[..] else {
        return Err(Error::new(format!(
            "buildah wrote {} images instead of one",
            loaded.len()
        )));
    };
    let reference = image.id.parse().map_err(of_image)?;
    for name in names {
        store.tag(&reference, name).map_err(of_image)?;
    }
    Ok(image.id.clone())
}

fn buildah(command: &str) -> Command {
    let mut buildah = Command::new(BUILDAH);
    buildah.arg(command);
    // buildah wants the file to be there, where other programs take a directory without it.
    let accounts =
        env::var_os("DOCKER_CONFIG").map(|directory| PathBuf::from(directory).join("config.json"));
    if accounts.is_some_and(|file| !file.exists()) {
        buildah.env_remove("DOCKER_CONFIG");
    }
    buildah
}

fn run(command: &mut Command) -> Result<ExitStatus> {
    executed(command.status())
}

fn executed<T>(result: io::Result<T>) -> Result<T> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Err(Error::unsupported(
            "build without buildah, which is not installed",
        )
        .hint(
            "apt-get install buildah; or build elsewhere, save the image to a file, then: hull \
             image load -i FILE",
        )),
        result => result.context(|| format!("execute {BUILDAH}")),
    }
}

fn succeeded(status: ExitStatus, what: &str) -> Result<()> {
    match status.success() {
        true => Ok(()),
        // It has said why.
        false => Err(Error::new(format!("{what}: {BUILDAH}: {status}"))),
    }
}

/// A directory for files of one build, in the run directory; removed with this.
struct Work(PathBuf);

impl Work {
    fn create(run_dir: &Path) -> Result<Self> {
        let path = run_dir.join("builds").join(names::new_id()?);
        let created = DirBuilder::new().recursive(true).mode(0o700).create(&path);
        created.context(|| format!("create {}", path.display()))?;
        Ok(Self(path))
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        // What is left in the run directory is gone with the next boot.
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// A configuration of registries in which short names are Docker's, as in hull's other commands; it
/// is the one in force with one line more. `None` if that has such a line already.
fn search_registries(work: &Path) -> Result<Option<PathBuf>> {
    if env::var_os("CONTAINERS_REGISTRIES_CONF").is_some() {
        return Ok(None);
    }
    let mut known = String::new();
    for (variable, path) in REGISTRIES {
        let base = var_os(variable).map(PathBuf::from).unwrap_or_default();
        match fs::read_to_string(base.join(path)) {
            Ok(text) => {
                known = text;
                break;
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            // buildah says what is wrong with it.
            Err(_) => return Ok(None),
        }
    }
    let Some(text) = with_search(&known) else {
        return Ok(None);
    };
    let path = work.join("registries.conf");
    fs::write(&path, text).context(|| format!("write {}", path.display()))?;
    Ok(Some(path))
}

fn with_search(known: &str) -> Option<String> {
    let table: toml::Table = known.parse().ok()?;
    // `registries` is the first version of the format, which has no such line.
    let has = table.contains_key(SEARCH) || table.contains_key("registries");
    (!has).then(|| format!("{SEARCH} = [\"docker.io\"]\n{known}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_names_are_dockers_where_nobody_said_something_else() {
        let added = "unqualified-search-registries = [\"docker.io\"]\n";
        assert_eq!(with_search("").as_deref(), Some(added));
        let mirror = "[[registry]]\nlocation = \"a\"\n";
        assert_eq!(
            with_search(mirror).as_deref(),
            Some(&*format!("{added}{mirror}"))
        );
        for own in [
            "unqualified-search-registries = [\"quay.io\"]",
            "unqualified-search-registries = []",
            "[registries.search]\nregistries = [\"quay.io\"]",
            "no toml",
        ] {
            assert_eq!(with_search(own), None, "{own}");
        }
    }
}
