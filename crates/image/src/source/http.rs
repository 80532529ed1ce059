//! Requests to one registry, with bounds.
//!
//! Called by the registry source, its downloads and uploads, and by `login`; with `upload` the only
//! code that sends anything. The policy:
//!
//! - Redirects are followed here and not by the HTTP library, at most [`REDIRECTS`] of them, for
//!   documents and blobs, which registries keep elsewhere (CDNs, mirrors). From a registry
//!   spoken to by https they lead to https only.
//! - `Authorization` goes to the registry's own scheme, host and port, and is not sent any more
//!   once a redirect has led elsewhere.
//! - Token services are chosen by `realm`, and their redirects are not followed at all.
//! - Bodies are read up to a limit, whatever length they announce: tokens 1 MiB, errors 64 KiB,
//!   manifests and configurations [`MAX_DOCUMENT`]; blobs up to their size in the manifest.
//! - Connecting and each read have a timeout, and documents one for all of it.

use std::time::Duration;

use reqwest::header::{ACCEPT, AUTHORIZATION, HeaderValue, LINK, LOCATION, RANGE};
use reqwest::redirect::Policy;
use reqwest::{Method, Response, StatusCode, Url};
use serde::Deserialize;

use super::token::Tokens;
use crate::credentials::Auth;
use crate::digest::Digest;
use crate::limits::{ERROR_BODY, REDIRECTS};
use crate::manifest::{ACCEPTED, MAX_DOCUMENT};
use crate::reference::{DEFAULT_REGISTRY, RegistryReference};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Timeout while a registry sends nothing.
pub(super) const READ_TIMEOUT: Duration = Duration::from_secs(60);
/// Timeout of a whole document: 4 MiB at 35 KiB/s.
const DOCUMENT_TIMEOUT: Duration = Duration::from_secs(120);
const USER_AGENT: &str = concat!("hull/", env!("CARGO_PKG_VERSION"));

/// Why a request failed.
#[derive(Debug)]
pub(super) enum Failure {
    /// No connection, no answer in time, or it broke off.
    Transport(reqwest::Error),
    /// The whole request took too long.
    Slow,
    /// The registry answered with another status than success.
    Status { status: u16, message: String },
    /// More bytes than a document may have.
    TooLarge,
    /// The registry reports another digest of the content.
    Announced { expected: Digest, actual: Digest },
    /// The answer breaks a rule of this module, or of `token`.
    Refused(String),
}

impl From<reqwest::Error> for Failure {
    fn from(error: reqwest::Error) -> Self {
        Self::Transport(error)
    }
}

pub(super) use super::upload::Upload;

/// What requests are for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Access {
    /// Reading a repository.
    Pull,
    /// Reading and writing a repository.
    Push,
    /// Nothing but finding out whether the registry takes the credentials.
    Login,
    /// Finding repositories.
    Search,
}

impl Access {
    /// The scope of a token.
    fn scope(self, repository: &str) -> Option<String> {
        match self {
            Self::Pull => Some(format!("repository:{repository}:pull")),
            Self::Push => Some(format!("repository:{repository}:pull,push")),
            Self::Login => None,
            // Distribution's scope of the list of repositories.
            Self::Search => Some("registry:catalog:*".to_owned()),
        }
    }
}

/// Sends requests to one registry.
pub(super) struct Http {
    client: reqwest::Client,
    /// `https://HOST:PORT/`
    registry: Url,
    repository: String,
    tokens: Tokens,
}

impl Http {
    pub(super) fn new(
        name: &RegistryReference,
        auth: Auth,
        access: Access,
    ) -> Result<Self, String> {
        let local = name.is_local();
        let mut builder = reqwest::Client::builder()
            .connect_timeout(CONNECT_TIMEOUT)
            .redirect(Policy::none())
            .user_agent(USER_AGENT);
        // It would end an upload, too, which has a timeout of its own.
        if access != Access::Push {
            builder = builder.read_timeout(READ_TIMEOUT);
        }
        if local {
            // This machine is not behind a proxy, whatever the environment says.
            builder = builder.no_proxy();
        }
        let client = builder.build().map_err(|error| error.to_string())?;
        let scheme = if local { "http" } else { "https" };
        let host = match (name.registry.as_str(), access) {
            (DEFAULT_REGISTRY, Access::Search) => "index.docker.io",
            (DEFAULT_REGISTRY, _) => "registry-1.docker.io",
            (host, _) => host,
        };
        let registry = Url::parse(&format!("{scheme}://{host}/"))
            .map_err(|error| format!("\"{host}\" is no host: {error}"))?;
        Ok(Self {
            client,
            registry,
            repository: name.repository.clone(),
            tokens: Tokens::new(auth, access.scope(&name.repository)),
        })
    }

    /// The token service that did not get the credentials, if there is one.
    pub(super) async fn withheld(&self) -> Option<String> {
        self.tokens.withheld().await
    }

    /// The bytes of a manifest, by tag or digest.
    pub(super) async fn manifest(&self, version: &str) -> Result<Vec<u8>, Failure> {
        let request = async {
            let accept = ACCEPTED.join(", ");
            let response = self
                .get(
                    &format!("manifests/{version}"),
                    &[(ACCEPT.as_str(), &accept)],
                )
                .await?;
            let announced: Option<Digest> = response
                .headers()
                .get("Docker-Content-Digest")
                .and_then(|value| value.to_str().ok()?.parse().ok());
            let body = read(response, MAX_DOCUMENT)
                .await?
                .ok_or(Failure::TooLarge)?;
            let actual = Digest::of(&body);
            match announced {
                Some(expected) if expected != actual => {
                    Err(Failure::Announced { expected, actual })
                }
                _ => Ok(body),
            }
        };
        whole(request).await
    }

    /// A document of the registry, and where the next part of it is, on the same registry.
    pub(super) async fn page(&self, url: Url) -> Result<(Vec<u8>, Option<Url>), Failure> {
        let request = async {
            let response = self.request_at(Method::GET, url.clone(), &[]).await?;
            let next = response.headers().get(LINK);
            let next = next.and_then(|value| next_page(value.to_str().ok()?));
            let next = match next.map(|next| url.join(next)) {
                None => None,
                Some(Ok(next)) if next.origin() == self.registry.origin() => Some(next),
                Some(_) => {
                    let reason = "the next part of its list is elsewhere";
                    return Err(Failure::Refused(reason.to_owned()));
                }
            };
            let body = read(response, MAX_DOCUMENT).await?;
            Ok((body.ok_or(Failure::TooLarge)?, next))
        };
        whole(request).await
    }

    /// A document of the registry: asked for without credentials, then with them after a 401.
    pub(super) async fn open_document(
        &self,
        path: &str,
        query: &[(&str, &str)],
    ) -> Result<Vec<u8>, Failure> {
        let mut url = self.join(path)?;
        url.query_pairs_mut().extend_pairs(query);
        let request = async {
            let response = self.follow(&Method::GET, url.clone(), &[], None).await?;
            let response = match response.status() {
                StatusCode::UNAUTHORIZED => self.request_at(Method::GET, url, &[]).await?,
                _ => successful(response).await?,
            };
            read(response, MAX_DOCUMENT).await?.ok_or(Failure::TooLarge)
        };
        whole(request).await
    }

    /// The first `size` bytes of a small blob, and one more if it has more.
    pub(super) async fn small_blob(&self, digest: &Digest, size: u64) -> Result<Vec<u8>, Failure> {
        let request = async {
            let mut response = self.get(&format!("blobs/{digest}"), &[]).await?;
            let mut bytes = Vec::new();
            while let Some(chunk) = response.chunk().await? {
                bytes.extend_from_slice(&chunk);
                if bytes.len() as u64 > size {
                    break;
                }
            }
            Ok(bytes)
        };
        whole(request).await
    }

    /// The answer to a request for a blob from an offset. Its status is 206, or 200 if the registry
    /// sends all of the blob.
    pub(super) async fn blob(&self, digest: &Digest, offset: u64) -> Result<Response, Failure> {
        let range = format!("bytes={offset}-");
        self.get(&format!("blobs/{digest}"), &[(RANGE.as_str(), &range)])
            .await
    }

    /// Requests something of the repository; any status but success is a failure.
    async fn get(&self, path: &str, headers: &[(&str, &str)]) -> Result<Response, Failure> {
        self.request(Method::GET, path, headers).await
    }

    /// The URL of something of the repository.
    pub(super) fn url(&self, path: &str) -> Result<Url, Failure> {
        self.join(&format!("v2/{}/{path}", self.repository))
    }

    pub(super) fn join(&self, path: &str) -> Result<Url, Failure> {
        let url = self.registry.join(path);
        url.map_err(|error| Failure::Refused(format!("no URL: {error}")))
    }

    /// The header for a request to the registry, and whether it is a token of an earlier request.
    pub(super) async fn authorization(&self) -> Result<(Option<HeaderValue>, bool), Failure> {
        self.tokens.authorization(self).await
    }

    /// Makes a request without a body; any status but success is a failure.
    pub(super) async fn request(
        &self,
        method: Method,
        path: &str,
        headers: &[(&str, &str)],
    ) -> Result<Response, Failure> {
        self.request_at(method, self.url(path)?, headers).await
    }

    /// Whether the registry takes the credentials: any status but success is a failure.
    pub(super) async fn check(&self) -> Result<(), Failure> {
        let url = self.join("v2/")?;
        whole(self.request_at(Method::GET, url, &[]))
            .await
            .map(drop)
    }

    async fn request_at(
        &self,
        method: Method,
        url: Url,
        headers: &[(&str, &str)],
    ) -> Result<Response, Failure> {
        let (authorization, remembered) = whole(self.authorization()).await?;
        let response = self
            .follow(&method, url.clone(), headers, authorization)
            .await?;
        let response = match response.status() {
            // Its token has ended before its time.
            StatusCode::UNAUTHORIZED if remembered => {
                self.tokens.forget().await;
                let (authorization, _) = whole(self.authorization()).await?;
                self.follow(&method, url, headers, authorization).await?
            }
            _ => response,
        };
        successful(response).await
    }

    pub(super) fn client(&self) -> &reqwest::Client {
        &self.client
    }

    pub(super) fn registry(&self) -> &Url {
        &self.registry
    }

    /// The answer of `/v2/`, which tells how to authenticate.
    pub(super) async fn ping(&self) -> Result<Response, Failure> {
        let url = self.join("v2/")?;
        self.follow(&Method::GET, url, &[], None).await
    }

    /// A request of its own, whose redirects are not followed.
    pub(super) async fn once(
        &self,
        url: Url,
        authorization: Option<HeaderValue>,
    ) -> Result<Response, Failure> {
        let mut request = self.client.get(url);
        if let Some(authorization) = authorization {
            request = request.header(AUTHORIZATION, authorization);
        }
        Ok(request.send().await?)
    }

    async fn follow(
        &self,
        method: &Method,
        mut url: Url,
        headers: &[(&str, &str)],
        mut authorization: Option<HeaderValue>,
    ) -> Result<Response, Failure> {
        for _ in 0..=REDIRECTS {
            if url.origin() != self.registry.origin() {
                authorization = None;
            }
            let mut request = self.client.request(method.clone(), url.clone());
            for (name, value) in headers {
                request = request.header(*name, *value);
            }
            if let Some(authorization) = &authorization {
                request = request.header(AUTHORIZATION, authorization.clone());
            }
            let response = request.send().await?;
            // What changes something is not sent elsewhere.
            let Some(next) = redirect(&url, &response)?.filter(|_| method.is_safe()) else {
                return Ok(response);
            };
            check_scheme(&self.registry, &next)?;
            url = next;
        }
        Err(Failure::Refused(format!(
            "it redirects more than {REDIRECTS} times"
        )))
    }
}

/// The address in a header `Link: <ADDRESS>; rel="next"`.
fn next_page(link: &str) -> Option<&str> {
    let (address, parameters) = link.trim().strip_prefix('<')?.split_once('>')?;
    parameters.contains("next").then_some(address)
}

/// Where a response redirects to.
fn redirect(from: &Url, response: &Response) -> Result<Option<Url>, Failure> {
    if !matches!(response.status().as_u16(), 301 | 302 | 303 | 307 | 308) {
        return Ok(None);
    }
    let refused = || Failure::Refused("it redirects to nowhere".to_owned());
    let location = response.headers().get(LOCATION).ok_or_else(refused)?;
    let location = location.to_str().map_err(|_| refused())?;
    from.join(location).map(Some).map_err(|_| refused())
}

/// Checks that a redirect does not lead from https to a connection that others can change.
pub(super) fn check_scheme(registry: &Url, next: &Url) -> Result<(), Failure> {
    match (registry.scheme(), next.scheme()) {
        (_, "https") | ("http", "http") => Ok(()),
        (from, to) => Err(Failure::Refused(format!(
            "it redirects from {from} to {to}://{}",
            next.host_str().unwrap_or_default()
        ))),
    }
}

/// Limits the time of a request for a document.
pub(super) async fn whole<T>(
    request: impl Future<Output = Result<T, Failure>>,
) -> Result<T, Failure> {
    match tokio::time::timeout(DOCUMENT_TIMEOUT, request).await {
        Ok(result) => result,
        Err(_) => Err(Failure::Slow),
    }
}

/// Reads the whole body, regardless of the announced length. `None` if it is longer than `limit`.
pub(super) async fn read(mut response: Response, limit: u64) -> Result<Option<Vec<u8>>, Failure> {
    let mut body = Vec::new();
    while let Some(chunk) = response.chunk().await? {
        if (body.len() + chunk.len()) as u64 > limit {
            return Ok(None);
        }
        body.extend_from_slice(&chunk);
    }
    Ok(Some(body))
}

/// The response, if it is one of success.
async fn successful(response: Response) -> Result<Response, Failure> {
    match response.status() {
        status if status.is_success() => Ok(response),
        status => Err(refusal(status, response).await),
    }
}

/// The failure of an answer without success. Its body is read only as far as an error goes; that it
/// is longer, or breaks off, does not matter.
pub(super) async fn refusal(status: StatusCode, response: Response) -> Failure {
    #[derive(Deserialize)]
    struct Envelope {
        errors: Vec<Item>,
    }
    #[derive(Deserialize)]
    struct Item {
        #[serde(default)]
        code: String,
        #[serde(default)]
        message: String,
    }
    let body = match tokio::time::timeout(READ_TIMEOUT, read(response, ERROR_BODY)).await {
        Ok(Ok(Some(body))) => body,
        _ => Vec::new(),
    };
    let mut status = status.as_u16();
    let message = match serde_json::from_slice::<Envelope>(&body) {
        Ok(Envelope { errors }) => errors.into_iter().next().map(|error| {
            // Some registries answer 400 or 401 and mean these.
            match error.code.as_str() {
                "MANIFEST_UNKNOWN"
                | "NAME_UNKNOWN"
                | "BLOB_UNKNOWN"
                | "NOT_FOUND"
                | "MANIFEST_BLOB_UNKNOWN"
                    if (400..500).contains(&status) =>
                {
                    status = 404;
                }
                "UNAUTHORIZED" if (400..500).contains(&status) => status = 401,
                "DENIED" if (400..500).contains(&status) => status = 403,
                _ => {}
            }
            match error.message.as_str() {
                "" => error.code,
                message => message.to_owned(),
            }
        }),
        Err(_) => None,
    };
    Failure::Status {
        status,
        message: message.unwrap_or_else(|| String::from_utf8_lossy(&body).into_owned()),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn next_pages() {
        for (link, next) in [
            (
                r#"</v2/a/tags/list?n=2&last=b>; rel="next""#,
                Some("/v2/a/tags/list?n=2&last=b"),
            ),
            ("</x>; rel=next", Some("/x")),
            ("</x>; rel=prev", None),
            ("/x", None),
        ] {
            assert_eq!(next_page(link), next, "{link}");
        }
    }

    #[test]
    fn redirects_stay_with_https() {
        let check = |registry: &str, next: &str| {
            check_scheme(&registry.parse().unwrap(), &next.parse().unwrap()).is_ok()
        };
        assert!(check("https://a/", "https://b/"));
        assert!(check("http://localhost/", "https://b/"));
        assert!(check("http://localhost/", "http://b/"));
        assert!(!check("https://a/", "http://a/"));
        assert!(!check("https://a/", "file:///etc/passwd"));
        assert!(!check("http://localhost/", "ftp://b/"));
    }
}
