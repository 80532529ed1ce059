//! Terminals of callers that are attached to containers: their sizes come by requests of their own.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use hull_engine::attach::Window;
use hull_engine::error::Result;

/// One for each container that anybody is attached to.
#[derive(Debug, Default)]
pub struct Windows(Mutex<HashMap<String, Weak<Window>>>);

impl Windows {
    /// That of a container, for as long as anybody has it.
    ///
    /// # Errors
    /// No descriptors are left.
    pub fn of(&self, id: &str) -> Result<Arc<Window>> {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = all.get(id).and_then(Weak::upgrade) {
            return Ok(known);
        }
        all.retain(|_, window| window.strong_count() > 0);
        let window = Window::new(None)?;
        all.insert(id.to_owned(), Arc::downgrade(&window));
        Ok(window)
    }
}
