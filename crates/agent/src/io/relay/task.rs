//! A state with a task that works on it, which can be stopped to change the state. Called by
//! `input` and `output`.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::{Mutex as AsyncMutex, OwnedMutexGuard};
use tokio::task::JoinHandle;

/// A state, and the task that holds its lock while it works on it.
pub struct Task<S> {
    state: Arc<AsyncMutex<S>>,
    handle: Mutex<Option<JoinHandle<()>>>,
}

impl<S: Send + 'static> Task<S> {
    /// A state that nothing works on yet.
    pub fn new(state: S) -> Self {
        Self {
            state: Arc::new(AsyncMutex::new(state)),
            handle: Mutex::default(),
        }
    }

    /// The state, when no task works on it.
    pub fn idle(&self) -> Option<OwnedMutexGuard<S>> {
        self.state.clone().try_lock_owned().ok()
    }

    /// Works on the state.
    pub fn start(&self, work: impl Future<Output = ()> + Send + 'static) {
        *self.handle() = Some(tokio::spawn(work));
    }

    /// Stops the task at the place where it waits, and returns the state.
    pub async fn stop(&self) -> OwnedMutexGuard<S> {
        if let Some(handle) = self.handle().take() {
            handle.abort();
        }
        // The event loop drops the task, and with it its lock.
        self.state.clone().lock_owned().await
    }

    fn handle(&self) -> MutexGuard<'_, Option<JoinHandle<()>>> {
        // Nothing panics while the lock is held; and a panic ends the machine anyway.
        self.handle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
