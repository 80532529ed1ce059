//! The tags of a repository in a registry.
//!
//! Called by `hull image pull --all-tags`.

use serde::Deserialize;

use super::http::Access;
use super::list::Lister;
use super::registry::Session;
use crate::credentials::Credentials;
use crate::error::Result;
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
    let found = credentials.find(&name.registry)?;
    let session = Session::new(name, found, Access::Pull, "")?;
    let list = Lister {
        session: &session,
        what: "list of tags",
    };
    session.runtime()?.block_on(async {
        let url = session.http.url("tags/list");
        let names = list.parts(url, |page: Page| {
            let tags = page.tags.unwrap_or_default();
            tags.iter().map(|tag| name.with_tag(tag)).collect()
        });
        let mut names: Vec<RegistryReference> = names.await?;
        names.sort_by_key(ToString::to_string);
        Ok(names)
    })
}
