//! Exits and OOM kills for the host, in order, in a ring of bounded length.
//!
//! `processes` adds events, `rpc::service` answers the host's `Events` calls from here. The host
//! names the last event that it has, so a broken connection loses nothing, and sequence numbers
//! show when the ring has lost events that it has not seen.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};

use hull_protocol::EVENTS_KEPT;
use hull_protocol::agent::event::What;
use hull_protocol::agent::{Event, EventsResponse};
use tokio::sync::Notify;
use ttrpc::Code;

use crate::rpc::status::{Failure, Result};

/// Most events in one answer.
const MAX_ANSWERED: usize = 256;

/// All events of this guest.
#[derive(Default)]
pub struct Events {
    ring: Mutex<Ring>,
    added: Notify,
}

#[derive(Default)]
struct Ring {
    kept: VecDeque<Event>,
    /// Sequence number of the newest event; 0 before the first one.
    newest: u64,
}

impl Ring {
    fn oldest(&self) -> u64 {
        // Lengths fit, and there are never more events kept than were counted.
        self.newest + 1 - self.kept.len() as u64
    }

    fn after(&self, after: u64) -> Result<EventsResponse> {
        if after > self.newest {
            return Err(Failure::new(
                Code::OUT_OF_RANGE,
                format!(
                    "there is no event {after}: the newest one is {}",
                    self.newest
                ),
            ));
        }
        let oldest = self.oldest();
        let skipped = usize::try_from((after + 1).saturating_sub(oldest)).unwrap_or(usize::MAX);
        let mut response = EventsResponse::new();
        response.first_kept = oldest;
        response.events = self
            .kept
            .iter()
            .skip(skipped)
            .take(MAX_ANSWERED)
            .cloned()
            .collect();
        Ok(response)
    }
}

impl Events {
    /// Adds an event with its time.
    pub fn add(&self, time_ns: u64, what: What) {
        {
            let mut ring = self.lock();
            ring.newest += 1;
            let event = Event {
                sequence: ring.newest,
                time_ns,
                what: Some(what),
                ..Default::default()
            };
            if ring.kept.len() == EVENTS_KEPT {
                ring.kept.pop_front();
            }
            ring.kept.push_back(event);
        }
        self.added.notify_waiters();
    }

    /// Waits for events after the one of this number.
    ///
    /// # Errors
    /// `OUT_OF_RANGE` if that event has not happened.
    pub async fn after(&self, after: u64) -> Result<EventsResponse> {
        loop {
            // Created before the ring is read, so that no event is missed in between.
            let added = self.added.notified();
            let response = self.lock().after(after)?;
            if !response.events.is_empty() {
                return Ok(response);
            }
            added.await;
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Ring> {
        // Nothing panics while the lock is held; and a panic ends the machine anyway.
        self.ring.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use hull_protocol::agent::OomKill;

    use super::*;

    fn run<T>(test: impl Future<Output = T>) -> T {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(async {
            tokio::time::timeout(std::time::Duration::from_secs(20), test)
                .await
                .unwrap()
        })
    }

    fn add(events: &Events, time_ns: u64) {
        events.add(time_ns, What::Oom(OomKill::new()));
    }

    fn sequences(response: &EventsResponse) -> Vec<u64> {
        response.events.iter().map(|event| event.sequence).collect()
    }

    #[test]
    fn events_come_in_order_from_where_the_host_is() {
        run(async {
            let events = Events::default();
            for time in 1..=3 {
                add(&events, time);
            }
            let all = events.after(0).await.unwrap();
            assert_eq!((sequences(&all), all.first_kept), (vec![1, 2, 3], 1));
            assert_eq!(sequences(&events.after(2).await.unwrap()), [3]);
            assert_eq!(all.events[2].time_ns, 3);
            assert_eq!(events.after(4).await.unwrap_err().code, Code::OUT_OF_RANGE);
        });
    }

    #[test]
    fn a_host_that_has_all_waits_for_the_next_one() {
        run(async {
            let events = std::sync::Arc::new(Events::default());
            let waiting = events.clone();
            let waiter = tokio::spawn(async move { waiting.after(0).await });
            tokio::task::yield_now().await;
            assert!(!waiter.is_finished());
            add(&events, 7);
            assert_eq!(sequences(&waiter.await.unwrap().unwrap()), [1]);
        });
    }

    #[test]
    fn a_gap_shows_and_answers_are_bounded() {
        run(async {
            let events = Events::default();
            for time in 0..EVENTS_KEPT as u64 + 10 {
                add(&events, time);
            }
            let response = events.after(5).await.unwrap();
            assert_eq!(response.first_kept, 11);
            assert_eq!(response.events[0].sequence, 11);
            assert_eq!(response.events.len(), MAX_ANSWERED);
            let next = events.after(10 + MAX_ANSWERED as u64).await.unwrap();
            assert_eq!(next.events[0].sequence, 11 + MAX_ANSWERED as u64);
        });
    }
}
