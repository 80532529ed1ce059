//! Images for commands: opens the store, obtains an image by reference, shows progress: bars if
//! standard error is a terminal, otherwise one line at the end of a pull.

use std::collections::HashMap;
use std::io::IsTerminal;
use std::sync::Mutex;

use hull_image::{Credentials, Event, Image, LayerState, Platform, Progress, Reference};
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

use hull_engine::config::Config;
use hull_engine::error::of_image;
pub use hull_engine::unpacker::store;

use crate::error::Result;
use hull_engine::values::Pull;

/// Makes the referenced image available, pulling it according to `pull`.
pub fn obtain(config: &Config, reference: &Reference, pull: Pull, quiet: bool) -> Result<Image> {
    obtain_for(config, reference, pull, None, quiet)
}

/// The same for a platform: this host's, if none is given.
pub fn obtain_for(
    config: &Config,
    reference: &Reference,
    pull: Pull,
    platform: Option<&Platform>,
    quiet: bool,
) -> Result<Image> {
    let pull = match pull {
        Pull::Always => hull_image::Pull::Always,
        Pull::Missing => hull_image::Pull::Missing,
        Pull::Never => hull_image::Pull::Never,
    };
    let credentials = Credentials::docker();
    let mut store = store(config)?;
    if let Some(platform) = platform {
        store = store.with_platform(platform.clone());
    }
    if quiet {
        return store
            .resolve(reference, pull, &credentials, &())
            .map_err(of_image);
    }
    let shown = Shown::new("pulling").then("pulled");
    store
        .resolve(reference, pull, &credentials, &shown)
        .map_err(of_image)
}

/// Shows progress on standard error.
pub struct Shown {
    /// What is done: `pulling`.
    doing: &'static str,
    /// What was done, for a line at the end where there are no bars.
    done: Option<&'static str>,
    state: Mutex<State>,
}

impl Shown {
    /// Shows bars on a terminal, and nothing elsewhere.
    pub fn new(doing: &'static str) -> Self {
        Self {
            doing,
            done: None,
            state: Mutex::default(),
        }
    }

    /// Shows a line at the end where there are no bars.
    fn then(self, done: &'static str) -> Self {
        Self {
            done: Some(done),
            ..self
        }
    }
}

#[derive(Default)]
struct State {
    reference: String,
    bars: Option<MultiProgress>,
    layers: HashMap<String, ProgressBar>,
}

impl Progress for Shown {
    fn event(&self, event: Event<'_>) {
        // A thread that panicked with the lock held leaves the state usable.
        let mut state = self
            .state
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        match event {
            Event::Started { reference, layers } => {
                state.reference = reference.to_owned();
                if std::io::stderr().is_terminal() {
                    let doing = self.doing;
                    crate::output::note(format!("{doing} {reference} ({layers} layers)"));
                    state.bars = Some(MultiProgress::new());
                }
            }
            Event::Layer {
                digest,
                state: layer,
            } => {
                let name: String = digest.hex().chars().take(12).collect();
                state.layer(name, layer);
            }
            Event::Finished => {
                state.layers.clear();
                // Reading a local file is not reported.
                let fetched = !["oci:", "docker-archive:"]
                    .iter()
                    .any(|local| state.reference.starts_with(local));
                if state.bars.take().is_none()
                    && fetched
                    && let Some(done) = self.done
                {
                    crate::output::note(format!("{done} {}", state.reference));
                }
            }
        }
    }
}

impl State {
    fn layer(&mut self, name: String, now: LayerState) {
        let Some(bars) = &self.bars else {
            return;
        };
        let bar = self
            .layers
            .entry(name)
            .or_insert_with_key(|name| bars.add(new_bar(name)));
        bar.set_message(match now {
            LayerState::Present => "already there",
            LayerState::Waiting => "waiting for another pull",
            LayerState::Downloading { .. } => "downloading",
            LayerState::Unpacking { .. } => "unpacking",
            LayerState::Packing { .. } => "packing",
            LayerState::Uploading { .. } => "uploading",
            LayerState::Done => "done",
        });
        match now {
            LayerState::Downloading { done, total }
            | LayerState::Unpacking { done, total }
            | LayerState::Packing { done, total }
            | LayerState::Uploading { done, total } => {
                if bar.length() == Some(0) {
                    restyle(bar, MOVING);
                }
                bar.set_length(total.max(done));
                bar.set_position(done);
            }
            LayerState::Present | LayerState::Done => {
                restyle(bar, RESTING);
                bar.finish();
            }
            LayerState::Waiting => {}
        }
    }
}

/// A layer that bytes move of: as wide as the terminal.
const MOVING: &str = "{prefix} {msg:<11} [{wide_bar}] {binary_bytes:>10} of {binary_total_bytes:<10} \
                      {binary_bytes_per_sec:>12} {eta:>4}";

/// One of which nothing is to be shown but its state.
const RESTING: &str = "{prefix} {msg}";

fn new_bar(name: &str) -> ProgressBar {
    let bar = ProgressBar::new(0);
    bar.set_prefix(name.to_owned());
    restyle(&bar, RESTING);
    bar
}

fn restyle(bar: &ProgressBar, template: &str) {
    // They are ours, and right.
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style.progress_chars("=> "));
    }
}
