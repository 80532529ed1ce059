//! Images that come and go: pulled, imported, loaded, saved, pushed.

use std::fs::File;
use std::io::{self, Read, Write};
use std::path::Path;
use std::sync::Mutex;

use base64::Engine as _;
use base64::alphabet;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use hull_engine::error::{Context, Error, of_image};
use hull_engine::images::{image_name, of_local};
use hull_engine::unpacker;
use hull_image::{Credentials, Event, Import, ImportSource, LayerState, Progress, Pull, Reference};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::Shared;
use crate::call::{BodyReader, Call, JSON, Reply, StreamWriter};
use crate::failure::{Failure, Result};
use crate::images::{no_such, referred};

/// Base64 as clients write it in headers: for addresses, with padding or without.
const HEADER: GeneralPurpose = GeneralPurpose::new(
    &alphabet::URL_SAFE,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

#[derive(Default, Deserialize)]
#[serde(default)]
struct Login {
    username: String,
    password: String,
}

/// The credentials that a request carries, or those of the user who serves.
fn credentials(call: &Call) -> Result<Credentials> {
    let Some(header) = call.headers.get("x-registry-auth") else {
        return Ok(Credentials::docker());
    };
    let wrong = || Failure::bad("invalid X-Registry-Auth");
    let text = HEADER.decode(header.as_bytes()).map_err(|_| wrong())?;
    if text.iter().all(u8::is_ascii_whitespace) {
        return Ok(Credentials::docker());
    }
    let login: Value = serde_json::from_slice(&text).map_err(|_| wrong())?;
    let login: Login = match login {
        Value::Object(_) => serde_json::from_value(login).map_err(|_| wrong())?,
        _ => Login::default(),
    };
    Ok(match login.username.is_empty() {
        true => Credentials::docker(),
        false => Credentials::basic(login.username, login.password),
    })
}

/// Progress in Docker's lines.
struct Told {
    stream: Mutex<StreamWriter>,
    pulls: bool,
}

impl Told {
    fn line(&self, value: &Value) {
        let mut stream = self
            .stream
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        // The caller may have gone; what was begun is brought to an end.
        let _ = stream.line(value);
    }

    /// The last line of what went wrong.
    fn failed(&self, error: &Error) {
        let failure = Failure::from(error.clone());
        self.line(&json!({
            "errorDetail": {"message": failure.message},
            "error": failure.message,
        }));
    }
}

impl Progress for Told {
    fn event(&self, event: Event<'_>) {
        let Event::Layer { digest, state } = event else {
            return;
        };
        let id: String = digest.hex().chars().take(12).collect();
        let moving = |status: &str, done: u64, total: u64| {
            json!({
                "status": status,
                "progressDetail": {"current": done, "total": total},
                "id": id,
            })
        };
        let resting = |status: &str| json!({"status": status, "progressDetail": {}, "id": id});
        self.line(&match state {
            LayerState::Present if self.pulls => resting("Already exists"),
            LayerState::Present => resting("Layer already exists"),
            LayerState::Waiting => resting("Waiting"),
            LayerState::Downloading { done, total } => moving("Downloading", done, total),
            LayerState::Unpacking { done, total } => moving("Extracting", done, total),
            LayerState::Packing { done, total } => moving("Preparing", done, total),
            LayerState::Uploading { done, total } => moving("Pushing", done, total),
            LayerState::Done if self.pulls => resting("Pull complete"),
            LayerState::Done => resting("Pushed"),
        });
    }
}

/// Pulls an image, or imports an archive.
pub fn create(state: &Shared, call: &mut Call) -> Result<Reply> {
    match call.query.get("fromSrc") {
        Some(source) => {
            let source = source.to_owned();
            import(state, call, &source)
        }
        None => pull(state, call),
    }
}

fn pull(state: &Shared, call: &mut Call) -> Result<Reply> {
    let query = &call.query;
    let name = query.get("fromImage");
    let name = name.ok_or_else(|| Failure::bad("fromImage or fromSrc: one is needed"))?;
    let name = match query.get("tag") {
        Some(digest) if digest.contains(':') => format!("{name}@{digest}"),
        Some(tag) => format!("{name}:{tag}"),
        None => name.to_owned(),
    };
    let reference = match name.parse().map_err(of_image)? {
        Reference::Registry(name) => Reference::Registry(name),
        _ => {
            return Err(Failure::bad(format!(
                "{name} is no name of a registry's image"
            )));
        }
    };
    let credentials = credentials(call)?;
    let mut store = unpacker::store(&state.config)?;
    if let Some(platform) = query.get("platform") {
        store = store.with_platform(platform.parse().map_err(Failure::bad)?);
    }
    // What a registry refuses at once is an answer of its own, as with Docker: its head is sent
    // with the first line of progress.
    let told = Late::new(call);
    let pulled = store.resolve(&reference, Pull::Always, &credentials, &told);
    match pulled {
        Ok(image) => {
            let told = told.begin()?;
            if let Some(digest) = image.digest {
                told.line(&json!({"status": format!("Digest: {digest}")}));
            }
            let familiar = reference.familiar();
            told.line(&json!({"status": format!("Status: Image is up to date for {familiar}")}));
        }
        Err(error) => {
            let error = of_image(error);
            match told.begun() {
                Some(told) => told.failed(&error),
                None => return Err(error.into()),
            }
        }
    }
    Ok(Reply::Taken)
}

/// Progress whose answer begins with its first line.
struct Late<'a> {
    call: Mutex<&'a mut Call>,
    told: std::sync::OnceLock<Told>,
}

impl<'a> Late<'a> {
    fn new(call: &'a mut Call) -> Self {
        Self {
            call: Mutex::new(call),
            told: std::sync::OnceLock::new(),
        }
    }

    fn begin(&self) -> Result<&Told> {
        let mut call = self
            .call
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        if let Some(told) = self.told.get() {
            return Ok(told);
        }
        let stream = Mutex::new(call.stream(JSON)?);
        Ok(self.told.get_or_init(|| Told {
            stream,
            pulls: true,
        }))
    }

    fn begun(&self) -> Option<&Told> {
        self.told.get()
    }
}

impl Progress for Late<'_> {
    fn event(&self, event: Event<'_>) {
        match self.begin() {
            Ok(told) => told.event(event),
            Err(failure) => tracing::debug!("progress: {}", failure.message),
        }
    }
}

fn import(state: &Shared, call: &mut Call, source: &str) -> Result<Reply> {
    if source != "-" {
        return Err(Failure::unsupported(
            "import from an address: send the archive",
        ));
    }
    let name = match call.query.get("repo") {
        Some(_) => Some(image_name(&crate::images::asked_name(call)?)?),
        None => None,
    };
    let import = Import {
        name,
        changes: call.query.all("changes").map(str::to_owned).collect(),
        message: call.query.get("message").map(str::to_owned),
        author: None,
        created: None,
    };
    let store = unpacker::store(&state.config)?;
    let image = store
        .import(
            "the request",
            ImportSource::Archive(Box::new(&mut call.body)),
            &import,
            &(),
        )
        .map_err(of_image)?;
    let mut stream = call.stream(JSON)?;
    // The caller may have gone.
    let _ = stream.line(&json!({"status": image.id}));
    Ok(Reply::Taken)
}

/// What comes with a request as a file, for who cannot read anything else. `take` works with it.
fn as_file<T: Send>(body: &mut BodyReader, take: impl FnOnce(File) -> T + Send) -> Result<T> {
    let (reader, writer) =
        rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).context(|| "create a pipe")?;
    std::thread::scope(|scope| {
        let taking = scope.spawn(move || take(File::from(reader)));
        let mut writer = File::from(writer);
        // If nobody reads on, the reason comes from there.
        if let Err(error) = io::copy(body, &mut writer) {
            tracing::debug!("pass on a request: {error}");
        }
        drop(writer);
        let taken = taking.join();
        taken.map_err(|_| Failure::from(Error::new("a thread ended early")))
    })
}

/// Takes in the images of an archive.
pub fn load(state: &Shared, call: &mut Call) -> Result<Reply> {
    let store = unpacker::store(&state.config)?;
    let loaded = as_file(&mut call.body, |file| store.load("the request", file, &()))?;
    let loaded = loaded.map_err(of_image)?;
    let mut stream = call.stream(JSON)?;
    for image in loaded {
        let lines: Vec<String> = match image.names.is_empty() {
            true => vec![format!("Loaded image ID: {}\n", image.id)],
            false => {
                let names = image.names.iter();
                names
                    .map(|name| format!("Loaded image: {}\n", name.familiar()))
                    .collect()
            }
        };
        for line in lines {
            // The caller may have gone.
            let _ = stream.line(&json!({"stream": line}));
        }
    }
    Ok(Reply::Taken)
}

/// Sends images as one archive.
pub fn save(state: &Shared, call: &mut Call, name: Option<String>) -> Result<Reply> {
    let names: Vec<String> = match name {
        Some(name) => vec![name],
        None => {
            let all = call.query.all("names");
            all.flat_map(|names| names.split(','))
                .map(str::to_owned)
                .collect()
        }
    };
    let store = unpacker::store(&state.config)?;
    let mut references = Vec::new();
    for name in &names {
        let reference: Reference = name.parse().map_err(of_image)?;
        store
            .inspect(&reference)
            .map_err(|error| no_such(error, name))?;
        references.push(reference);
    }
    if references.is_empty() {
        return Err(Failure::bad("names: one is needed"));
    }
    let stream = call.stream("application/x-tar")?;
    let mut output = io::BufWriter::with_capacity(256 * 1024, stream);
    store
        .save(&references, &mut output, Path::new("the answer"), &())
        .map_err(of_local)?;
    output.flush().context(|| "send the archive")?;
    Ok(Reply::Taken)
}

/// Sends an image to its registry.
pub fn push(state: &Shared, call: &mut Call, name: &str) -> Result<Reply> {
    let full = match call.query.get("tag") {
        Some(tag) => format!("{name}:{tag}"),
        None => name.to_owned(),
    };
    let (store, reference) = referred(state, &full)?;
    store
        .inspect(&reference)
        .map_err(|error| no_such(error, &full))?;
    let target = image_name(&full)?;
    let credentials = credentials(call)?;
    let told = Told {
        stream: Mutex::new(call.stream(JSON)?),
        pulls: false,
    };
    told.line(&json!({
        "status": format!("The push refers to repository [{}]", target.name()),
    }));
    match store.push(&target, &credentials, &told) {
        Ok(pushed) => {
            let line = format!(
                "{}: digest: {} size: {}",
                pushed.tag, pushed.digest, pushed.size
            );
            told.line(&json!({"status": line}));
            told.line(&json!({
                "progressDetail": {},
                "aux": {
                    "Tag": pushed.tag,
                    "Digest": pushed.digest.to_string(),
                    "Size": pushed.size,
                },
            }));
        }
        Err(error) => told.failed(&of_local(error)),
    }
    Ok(Reply::Taken)
}

/// An archive that may be compressed.
pub fn decompressed<'a>(body: &'a mut BodyReader) -> Result<Box<dyn Read + 'a>> {
    hull_image::unpack::uncompress(io::BufReader::new(body))
        .map_err(|error| Failure::bad(error.to_string()))
}
