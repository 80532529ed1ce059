//! Images of a registry whose names contain a term.
//!
//! Called by `hull image search` and the API. Docker Hub and most registries with web pages have
//! the search of Docker's first registry protocol, `GET /v1/search`, which needs no account; what
//! has none of it lists its repositories (`GET /v2/_catalog`, distribution specification), among
//! which the term is looked for here.

use serde::Deserialize;
use serde_json::Value;

use super::http::{Access, Failure};
use super::list::Lister;
use super::registry::Session;
use crate::credentials::Credentials;
use crate::error::Result;
use crate::limits::SEARCH_TEXT;
use crate::reference::{DEFAULT_REGISTRY, MAX_NAME, RegistryReference};

/// An image that a search found. Its text is a registry's: bounded, and free of control characters.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SearchResult {
    /// A name that can be pulled.
    pub name: String,
    /// One line, or nothing.
    pub description: String,
    /// How many people like it.
    pub stars: u64,
    /// Whether the registry vouches for it.
    pub official: bool,
    /// Whether the registry built it.
    pub automated: bool,
}

/// The answer of `/v1/search`.
#[derive(Deserialize)]
struct Answer {
    /// Looked at one by one: what makes no sense is left out.
    results: Vec<Value>,
}

/// Some registries write `null` for what they do not know.
#[derive(Deserialize)]
struct Item {
    name: String,
    description: Option<String>,
    star_count: Option<i64>,
    is_official: Option<bool>,
    is_automated: Option<bool>,
}

/// Searches a registry: `term` is `[REGISTRY/]TEXT`, of Docker Hub without a registry. At most
/// `limit` results, in the registry's order, or in the order of their names where it has no search.
///
/// # Errors
/// `InvalidReference` for an empty term, `Unauthorized`, `Unreachable`, `Registry` and `Invalid`
/// for what the registry answers.
pub fn search(term: &str, limit: usize, credentials: &Credentials) -> Result<Vec<SearchResult>> {
    let registry = RegistryReference::of_search(term)?;
    let found = credentials.find(&registry.registry)?;
    let session = Session::new(&registry, found, Access::Search, "")?;
    session.runtime()?.block_on(async {
        let mut results = match by_search(&session, limit).await? {
            Some(results) => results,
            None => by_list(&session).await?,
        };
        results.truncate(limit);
        Ok(results)
    })
}

/// What the registry's own search finds. `None` if it has none.
async fn by_search(session: &Session<'_>, limit: usize) -> Result<Option<Vec<SearchResult>>> {
    const WHAT: &str = "search";
    let name = session.name;
    let list = Lister {
        session,
        what: WHAT,
    };
    let query = [("q", name.repository.as_str()), ("n", &limit.to_string())];
    let answer = session.http.open_document("v1/search", &query);
    let body = match answer.await {
        Ok(body) => body,
        // Registries without it answer all kinds of things to an unknown path, as a page or a
        // demand for an account.
        Err(Failure::Status { status, .. })
            if name.registry != DEFAULT_REGISTRY && is_unknown_path(status) =>
        {
            return Ok(None);
        }
        Err(failure) => return Err(session.error(WHAT, failure).await),
    };
    let answer: Answer = match serde_json::from_slice(&body) {
        Ok(answer) => answer,
        Err(_) if name.registry != DEFAULT_REGISTRY => return Ok(None),
        Err(error) => return Err(list.invalid(error.to_string())),
    };
    let items = answer.results.into_iter();
    let items = items.filter_map(|item| serde_json::from_value::<Item>(item).ok());
    let results = items.take(limit).map(|item| SearchResult {
        name: full_name(&name.registry, &plain(&item.name)),
        description: plain(&item.description.unwrap_or_default()),
        stars: item.star_count.unwrap_or(0).max(0).unsigned_abs(),
        official: item.is_official == Some(true),
        automated: item.is_automated == Some(true),
    });
    Ok(Some(results.collect()))
}

/// Whether a registry answers so to a path that it does not know. Some demand an account for it,
/// which has been tried then, or take the first part of the path for a method of theirs.
fn is_unknown_path(status: u16) -> bool {
    matches!(status, 400 | 401 | 403 | 404 | 405 | 406 | 410)
}

/// The repositories of the registry whose names contain the term.
async fn by_list(session: &Session<'_>) -> Result<Vec<SearchResult>> {
    #[derive(Deserialize)]
    struct Part {
        #[serde(default)]
        repositories: Option<Vec<String>>,
    }
    let list = Lister {
        session,
        what: "list of repositories",
    };
    let name = session.name;
    // As names of repositories are.
    let term = name.repository.to_ascii_lowercase();
    let wanted = |repository: &String| repository.len() <= MAX_NAME && repository.contains(&term);
    let found = list.parts(session.http.join("v2/_catalog"), |part: Part| {
        let mut repositories = part.repositories.unwrap_or_default();
        repositories.retain(wanted);
        Ok(repositories)
    });
    let mut found: Vec<String> = found.await?;
    found.sort();
    let results = found.iter().map(|repository| SearchResult {
        name: full_name(&name.registry, &plain(repository)),
        description: String::new(),
        stars: 0,
        official: false,
        automated: false,
    });
    Ok(results.collect())
}

fn full_name(registry: &str, repository: &str) -> String {
    match registry {
        DEFAULT_REGISTRY => repository.to_owned(),
        registry => format!("{registry}/{repository}"),
    }
}

/// One line of bounded length.
fn plain(text: &str) -> String {
    let characters = text.chars().take(SEARCH_TEXT);
    let line = characters.map(|character| match character.is_control() {
        true => ' ',
        false => character,
    });
    line.collect::<String>().trim().to_owned()
}
