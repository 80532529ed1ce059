//! Images that come and go: pulled, imported, loaded, saved, pushed.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::fs::File;
use std::io::{self, Read};
use std::path::Path;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::alphabet;
use base64::engine::general_purpose::STANDARD;
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

/// What a client knows of an account at a registry.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Login {
    username: String,
    password: String,
    auth: String,
    identitytoken: String,
    registrytoken: String,
}

/// JSON in a header.
fn header<T: serde::de::DeserializeOwned>(call: &Call, name: &str) -> Result<Option<T>> {
    let Some(text) = call.headers.get(name) else {
        return Ok(None);
    };
    let wrong = || Failure::bad(format!("invalid {name}"));
    let text = HEADER.decode(text.as_bytes()).map_err(|_| wrong())?;
    if text.iter().all(u8::is_ascii_whitespace) || text == b"null" {
        return Ok(None);
    }
    serde_json::from_slice(&text).map(Some).map_err(|_| wrong())
}

impl Login {
    /// User and password, if there are any.
    fn account(&self) -> Result<Option<(String, String)>> {
        if !self.identitytoken.is_empty() || !self.registrytoken.is_empty() {
            return Err(Failure::unsupported(
                "tokens in place of a registry's password: docker login with a password",
            ));
        }
        if !self.username.is_empty() {
            return Ok(Some((self.username.clone(), self.password.clone())));
        }
        let decoded = STANDARD.decode(&self.auth).unwrap_or_default();
        let text = String::from_utf8_lossy(&decoded);
        let pair = text.split_once(':').filter(|(user, _)| !user.is_empty());
        Ok(pair.map(|(user, password)| (user.to_owned(), password.to_owned())))
    }
}

/// The credentials that a request carries. Those of the user who serves are not for others.
pub fn credentials(call: &Call) -> Result<Credentials> {
    let login: Option<Login> = header(call, "x-registry-auth")?;
    let account = login.map(|login| login.account()).transpose()?.flatten();
    Ok(match account {
        Some((user, password)) => Credentials::basic(user, password),
        None => Credentials::anonymous(),
    })
}

/// Accounts at registries that a build may use, as the file of `docker login` has them.
pub fn accounts(call: &Call) -> Result<Option<Value>> {
    let logins: Option<BTreeMap<String, Login>> = header(call, "x-registry-config")?;
    let mut auths = serde_json::Map::new();
    for (registry, login) in logins.unwrap_or_default() {
        if let Some((user, password)) = login.account()? {
            let auth = STANDARD.encode(format!("{user}:{password}"));
            auths.insert(registry, json!({"auth": auth}));
        }
    }
    Ok((!auths.is_empty()).then(|| json!({"auths": auths})))
}

/// How often a layer's progress is told.
const TOLD_EVERY: Duration = Duration::from_millis(100);

/// Progress in Docker's lines. They come where nothing may block, and a caller that does not read
/// must not keep a pull, so lines about bytes are left out when they cannot be sent at once; the
/// others wait.
struct Told {
    stream: StreamWriter,
    pulls: bool,
    state: Mutex<ToldState>,
}

#[derive(Default)]
struct ToldState {
    /// When each layer's progress was told last.
    last: HashMap<String, Instant>,
    /// Lines that could not be sent at once.
    late: VecDeque<Value>,
}

impl Told {
    fn new(stream: StreamWriter, pulls: bool) -> Self {
        Self {
            stream,
            pulls,
            state: Mutex::default(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, ToldState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends what waits, as far as that goes at once; whether nothing waits any more.
    fn flush(&self, state: &mut ToldState) -> bool {
        while let Some(line) = state.late.front() {
            if !self.stream.offer(line) {
                return false;
            }
            state.late.pop_front();
        }
        true
    }

    /// Sends the last lines, and ends the answer. The caller may have gone.
    fn end(mut self, lines: &[Value]) {
        let state = self.state.get_mut().unwrap_or_else(PoisonError::into_inner);
        let late = std::mem::take(&mut state.late);
        let sent = late
            .iter()
            .chain(lines)
            .try_for_each(|line| self.stream.line(line));
        if sent.is_ok() {
            self.stream.finish();
        }
    }

    /// The same with what went wrong.
    fn fail(self, error: &Error) {
        let message = Failure::from(error.clone()).message;
        self.end(&[json!({"errorDetail": {"message": message}, "error": message})]);
    }
}

impl Progress for Told {
    fn event(&self, event: Event<'_>) {
        let Event::Layer {
            digest,
            state: layer,
        } = event
        else {
            return;
        };
        let id: String = digest.hex().chars().take(12).collect();
        let (status, moved) = match layer {
            LayerState::Present if self.pulls => ("Already exists", None),
            LayerState::Present => ("Layer already exists", None),
            LayerState::Waiting => ("Waiting", None),
            LayerState::Downloading { done, total } => ("Downloading", Some((done, total))),
            LayerState::Unpacking { done, total } => ("Extracting", Some((done, total))),
            LayerState::Packing { done, total } => ("Preparing", Some((done, total))),
            LayerState::Uploading { done, total } => ("Pushing", Some((done, total))),
            LayerState::Done if self.pulls => ("Pull complete", None),
            LayerState::Done => ("Pushed", None),
        };
        let detail = match moved {
            Some((done, total)) => json!({"current": done, "total": total}),
            None => json!({}),
        };
        let line = json!({"status": status, "progressDetail": detail, "id": id});
        let mut state = self.lock();
        let is_free = self.flush(&mut state);
        if moved.is_none() {
            if !is_free || !self.stream.offer(&line) {
                state.late.push_back(line);
            }
            return;
        }
        let now = Instant::now();
        let last = state.last.get(&id);
        if is_free
            && last.is_none_or(|last| now.duration_since(*last) >= TOLD_EVERY)
            && self.stream.offer(&line)
        {
            state.last.insert(id, now);
        }
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
    let late = Late::new(call);
    let pulled = store.resolve(&reference, Pull::Always, &credentials, &late);
    let told = late.into_told();
    match pulled {
        Ok(image) => {
            let told = match told {
                Some(told) => told,
                None => Told::new(call.stream(JSON)?, true),
            };
            let digest = image.digest.map(|digest| format!("Digest: {digest}"));
            let done = format!("Status: Image is up to date for {}", reference.familiar());
            let lines: Vec<Value> = digest
                .into_iter()
                .chain([done])
                .map(|status| json!({"status": status}))
                .collect();
            told.end(&lines);
        }
        Err(error) => match told {
            Some(told) => told.fail(&of_image(error)),
            None => return Err(no_such(error, &name)),
        },
    }
    Ok(Reply::Taken)
}

/// Progress whose answer begins with its first line.
struct Late<'a> {
    call: Mutex<&'a mut Call>,
    told: OnceLock<Told>,
}

impl<'a> Late<'a> {
    fn new(call: &'a mut Call) -> Self {
        Self {
            call: Mutex::new(call),
            told: OnceLock::new(),
        }
    }

    fn into_told(self) -> Option<Told> {
        self.told.into_inner()
    }

    fn begin(&self) -> Result<&Told> {
        let mut call = self.call.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(told) = self.told.get() {
            return Ok(told);
        }
        let stream = call.stream(JSON)?;
        Ok(self.told.get_or_init(|| Told::new(stream, true)))
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
    if stream.line(&json!({"status": image.id})).is_ok() {
        stream.finish();
    }
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
    stream.finish();
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
    let sent = output.into_inner().map_err(io::IntoInnerError::into_error);
    sent.context(|| "send the archive")?.finish();
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
    let mut stream = call.stream(JSON)?;
    let head = format!("The push refers to repository [{}]", target.name());
    // The caller may have gone.
    let _ = stream.line(&json!({"status": head}));
    let told = Told::new(stream, false);
    match store.push(&target, &credentials, &told) {
        Ok(pushed) => {
            let line = format!(
                "{}: digest: {} size: {}",
                pushed.tag, pushed.digest, pushed.size
            );
            told.end(&[
                json!({"status": line}),
                json!({
                    "progressDetail": {},
                    "aux": {
                        "Tag": pushed.tag,
                        "Digest": pushed.digest.to_string(),
                        "Size": pushed.size,
                    },
                }),
            ]);
        }
        Err(error) => told.fail(&of_local(error)),
    }
    Ok(Reply::Taken)
}

/// An archive that may be compressed.
pub fn decompressed<'a>(body: &'a mut BodyReader) -> Result<Box<dyn Read + 'a>> {
    hull_image::unpack::uncompress(io::BufReader::new(body))
        .map_err(|error| Failure::bad(error.to_string()))
}
