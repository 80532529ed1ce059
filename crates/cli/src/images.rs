//! Images for commands: opens the store, obtains an image by reference, shows the progress of a
//! pull: bars if standard error is a terminal, otherwise one line at the end.

use std::collections::HashMap;
use std::io::IsTerminal;
use std::sync::Mutex;

use hull_image::{Credentials, Event, Image, LayerState, Progress, Reference};
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

use hull_engine::config::Config;
use hull_engine::error::of_image;
pub use hull_engine::unpacker::store;

use crate::error::Result;
use hull_engine::values::Pull;

/// Makes the referenced image available, pulling it according to `pull`.
pub fn obtain(config: &Config, reference: &Reference, pull: Pull, quiet: bool) -> Result<Image> {
    let pull = match pull {
        Pull::Always => hull_image::Pull::Always,
        Pull::Missing => hull_image::Pull::Missing,
        Pull::Never => hull_image::Pull::Never,
    };
    let credentials = Credentials::docker();
    let store = store(config)?;
    if quiet {
        return store
            .resolve(reference, pull, &credentials, &())
            .map_err(of_image);
    }
    let shown = Shown::default();
    store
        .resolve(reference, pull, &credentials, &shown)
        .map_err(of_image)
}

/// Shows the progress of a pull on standard error.
#[derive(Default)]
struct Shown {
    state: Mutex<State>,
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
                    crate::output::note(format!("pulling {reference} ({layers} layers)"));
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
                if state.bars.take().is_none() && fetched {
                    crate::output::note(format!("pulled {}", state.reference));
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
            LayerState::Present => "already here",
            LayerState::Waiting => "waiting for another pull",
            LayerState::Downloading { .. } => "downloading",
            LayerState::Unpacking { .. } => "unpacking",
            LayerState::Done => "done",
        });
        match now {
            LayerState::Downloading { done, total } | LayerState::Unpacking { done, total } => {
                bar.set_length(total.max(done));
                bar.set_position(done);
            }
            LayerState::Present | LayerState::Done => bar.finish(),
            LayerState::Waiting => {}
        }
    }
}

fn new_bar(name: &str) -> ProgressBar {
    let bar = ProgressBar::new(0);
    let style = ProgressStyle::with_template(
        "{prefix}: {msg:<24} [{bar:30}] {binary_bytes}/{binary_total_bytes}",
    );
    if let Ok(style) = style {
        bar.set_style(style.progress_chars("=> "));
    }
    bar.set_prefix(name.to_owned());
    bar
}
