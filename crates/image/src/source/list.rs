//! Lists that a registry gives in parts, each of which names the next.
//!
//! Called by the list of tags and by searches. Bounded by [`LISTED`] and [`LIST_PAGES`].

use reqwest::Url;
use serde::de::DeserializeOwned;

use super::http::Failure;
use super::registry::Session;
use crate::error::{Error, Result};
use crate::limits::{LIST_PAGES, LISTED};

/// Reads one list of a registry.
pub(super) struct Lister<'a> {
    pub session: &'a Session<'a>,
    /// What it is, for messages.
    pub what: &'static str,
}

impl Lister<'_> {
    /// All items, in the registry's order; `items` takes them from one part.
    pub(super) async fn parts<Part: DeserializeOwned>(
        &self,
        first: Result<Url, Failure>,
        items: impl Fn(Part) -> Vec<String>,
    ) -> Result<Vec<String>> {
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
            ));
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
