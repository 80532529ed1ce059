//! Images for commands: opens the store, obtains an image by reference, shows a pull's progress. Bars when a person
//! watches standard error, one line for each layer otherwise.

use std::collections::HashMap;
use std::io::IsTerminal;
use std::sync::Mutex;

use hull_image::{Credentials, Event, Image, LayerState, Progress, Reference, Store};
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

use crate::config::Config;
use crate::error::Result;
use crate::values::Pull;

/// Opens the store of images.
pub fn store(config: &Config) -> Result<Store> {
    Ok(Store::open(config.data_dir.join("images"))?)
}

/// Makes the image of a reference usable.
pub fn obtain(config: &Config, reference: &Reference, pull: Pull, quiet: bool) -> Result<Image> {
    let pull = match pull {
        Pull::Always => hull_image::Pull::Always,
        Pull::Missing => hull_image::Pull::Missing,
        Pull::Never => hull_image::Pull::Never,
    };
    let credentials = Credentials::docker();
    let store = store(config)?;
    if quiet {
        return Ok(store.resolve(reference, pull, &credentials, &())?);
    }
    let shown = Shown::default();
    Ok(store.resolve(reference, pull, &credentials, &shown)?)
}

/// Shows the progress of a pull on standard error.
#[derive(Default)]
struct Shown {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    bars: Option<MultiProgress>,
    layers: HashMap<String, Layer>,
}

struct Layer {
    state: LayerState,
    bar: Option<ProgressBar>,
}

impl Progress for Shown {
    fn event(&self, event: Event<'_>) {
        // A thread that panicked while it held the lock has left nothing half done that matters here.
        let mut state = self
            .state
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        match event {
            Event::Started { reference, layers } => {
                crate::output::note(format!("pulling {reference} ({layers} layers)"));
                if std::io::stderr().is_terminal() {
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
                state.bars = None;
            }
        }
    }
}

impl State {
    fn layer(&mut self, name: String, now: LayerState) {
        let bars = self.bars.as_ref();
        let layer = self.layers.entry(name.clone()).or_insert_with(|| Layer {
            // Differs from every state that is reported first.
            state: LayerState::Done,
            bar: bars.map(|bars| bars.add(new_bar(&name))),
        });
        let news = std::mem::discriminant(&layer.state) != std::mem::discriminant(&now);
        layer.state = now;
        let what = match now {
            LayerState::Present => "already here",
            LayerState::Waiting => "waiting for another pull",
            LayerState::Downloading { .. } => "downloading",
            LayerState::Unpacking { .. } => "unpacking",
            LayerState::Done => "done",
        };
        match &layer.bar {
            Some(bar) => {
                bar.set_message(what);
                match now {
                    LayerState::Downloading { done, total }
                    | LayerState::Unpacking { done, total } => {
                        bar.set_length(total.max(done));
                        bar.set_position(done);
                    }
                    LayerState::Present | LayerState::Done => bar.finish(),
                    LayerState::Waiting => {}
                }
            }
            None if news => crate::output::note(format!("{name}: {what}")),
            None => {}
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
