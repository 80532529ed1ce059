//! The tags of a repository in a registry.
//!
//! Called by `hull image pull --all-tags`.

use serde::Deserialize;

use super::http::Access;
use super::registry::Session;
use crate::credentials::Credentials;
use crate::error::{Error, Result};
use crate::limits::{TAG_PAGES, TAGS};
use crate::reference::RegistryReference;

/// All tags that the registry of `name` has of its repository, as names in order.
///
/// # Errors
/// `NotInRegistry`, `Unauthorized`, `Unreachable` and `Registry` for what the registry answers.
pub fn remote_tags(
    name: &RegistryReference,
    credentials: &Credentials,
) -> Result<Vec<RegistryReference>> {
    #[derive(Deserialize)]
    struct Page {
        /// Some registries write `null` for none.
        #[serde(default)]
        tags: Option<Vec<String>>,
    }
    const WHAT: &str = "list of tags";
    let found = credentials.find(&name.registry)?;
    let session = Session::new(name, found, Access::Pull, "")?;
    let invalid = |reason: String| Error::Invalid {
        reference: name.written().to_owned(),
        what: WHAT,
        reason,
    };
    session.runtime()?.block_on(async {
        let mut next = match session.http.url("tags/list") {
            Ok(url) => Some(url),
            Err(failure) => return Err(session.error(WHAT, failure).await),
        };
        let mut tags: Vec<RegistryReference> = Vec::new();
        for _ in 0..TAG_PAGES {
            let Some(url) = next else {
                tags.sort_by_key(ToString::to_string);
                return Ok(tags);
            };
            let (body, after) = match session.http.page(url).await {
                Ok(page) => page,
                Err(failure) => return Err(session.error(WHAT, failure).await),
            };
            let page: Page =
                serde_json::from_slice(&body).map_err(|error| invalid(error.to_string()))?;
            for tag in page.tags.unwrap_or_default() {
                tags.push(name.with_tag(&tag)?);
            }
            if tags.len() > TAGS {
                return Err(invalid(format!("it has more than {TAGS} tags")));
            }
            next = after;
        }
        Err(invalid(format!("it comes in more than {TAG_PAGES} parts")))
    })
}
