//! Terminals of callers that are attached to containers: their sizes come by requests of their own.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use hull_engine::attach::Window;
use hull_engine::error::Result;
use hull_sandbox::config::TerminalSize;

/// Sizes that are remembered for containers that nobody is attached to yet.
const MOST_EXPECTED: usize = 4096;

/// One for each container that anybody is attached to.
#[derive(Debug, Default)]
pub struct Windows(Mutex<Known>);

#[derive(Debug, Default)]
struct Known {
    windows: HashMap<String, Weak<Window>>,
    /// What a container was created with.
    expected: HashMap<String, TerminalSize>,
}

impl Windows {
    /// That of a container, for as long as anybody has it.
    ///
    /// # Errors
    /// No descriptors are left.
    pub fn of(&self, id: &str) -> Result<Arc<Window>> {
        let mut all = self.lock();
        if let Some(known) = all.windows.get(id).and_then(Weak::upgrade) {
            return Ok(known);
        }
        all.windows.retain(|_, window| window.strong_count() > 0);
        let window = Window::new(all.expected.remove(id))?;
        all.windows.insert(id.to_owned(), Arc::downgrade(&window));
        Ok(window)
    }

    /// The size that the terminal of who attaches to a container will have.
    pub fn expect(&self, id: &str, size: TerminalSize) {
        let mut all = self.lock();
        if all.expected.len() < MOST_EXPECTED {
            all.expected.insert(id.to_owned(), size);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Known> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
