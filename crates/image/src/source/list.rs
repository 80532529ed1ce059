//! Lists that a registry gives in parts, each of which names the next.
//!
//! Called by the list of tags and by searches. Bounded by [`LISTED`], [`LIST_PAGES`]
//! and [`LIST_TIMEOUT`].

use reqwest::Url;
use serde::de::DeserializeOwned;

use super::http::Failure;
use super::registry::Session;
use crate::error::{Error, Result};
use crate::limits::{LIST_PAGES, LIST_TIMEOUT, LISTED};

/// Reads one list of a registry.
pub(super) struct Lister<'a> {
    pub session: &'a Session<'a>,
    /// What it is, for messages.
    pub what: &'static str,
}

impl Lister<'_> {
    /// All items, in the registry's order. `items` takes those that are wanted from one part, and
    /// checks them: it sees to it that each is of bounded size.
    pub(super) async fn parts<Part: DeserializeOwned, Item>(
        &self,
        first: Result<Url, Failure>,
        items: impl Fn(Part) -> Result<Vec<Item>>,
    ) -> Result<Vec<Item>> {
        let parts = tokio::time::timeout(LIST_TIMEOUT, self.read(first, items));
        match parts.await {
            Ok(read) => read,
            Err(_) => Err(self.session.error(self.what, Failure::Slow).await),
        }
    }

    async fn read<Part: DeserializeOwned, Item>(
        &self,
        first: Result<Url, Failure>,
        items: impl Fn(Part) -> Result<Vec<Item>>,
    ) -> Result<Vec<Item>> {
        let mut next = match first {
            Ok(url) => Some(url),
            Err(failure) => return Err(self.session.error(self.what, failure).await),
        };
        let mut all = Vec::new();
        for _ in 0..LIST_PAGES {
            let Some(url) = next else {
                return Ok(all);
            };
            let (body, after) = match self.session.http.page(url).await {
                Ok(page) => page,
                Err(failure) => return Err(self.session.error(self.what, failure).await),
            };
            let part = serde_json::from_slice(&body);
            all.extend(items(
                part.map_err(|error| self.invalid(error.to_string()))?,
            )?);
            if all.len() > LISTED {
                return Err(self.invalid(format!("it has more than {LISTED} entries")));
            }
            next = after;
        }
        Err(self.invalid(format!("it comes in more than {LIST_PAGES} parts")))
    }

    pub(super) fn invalid(&self, reason: String) -> Error {
        Error::Invalid {
            reference: self.session.name.written().to_owned(),
            what: self.what,
            reason,
        }
    }
}
