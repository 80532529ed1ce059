//! Requests a manifest from a registry, reading no more than a manifest's maximum size.
//!
//! Called by the registry source. The registry client reads manifests of any length into memory, so
//! the request is sent here; the client is only used to authenticate.

use oci_client::errors::OciDistributionError;
use oci_client::secrets::RegistryAuth;
use oci_client::{Reference, RegistryOperation};
use reqwest::{RequestBuilder, Response, StatusCode};
use tokio::sync::OnceCell;

use super::registry::{CONNECT_TIMEOUT, READ_TIMEOUT, USER_AGENT};
use crate::digest::Digest;
use crate::manifest::{ACCEPTED, MAX_DOCUMENT};

/// Why a manifest could not be fetched.
pub(super) enum Failure {
    /// An error in the registry client's terms.
    Client(OciDistributionError),
    /// More than [`MAX_DOCUMENT`] bytes.
    TooLarge,
    /// The registry reports another digest of the content.
    Announced { expected: Digest, actual: Digest },
}

impl From<reqwest::Error> for Failure {
    fn from(error: reqwest::Error) -> Self {
        Self::Client(error.into())
    }
}

/// Sends requests to one registry.
pub(super) struct Manifests {
    http: reqwest::Client,
    local: bool,
    /// The registry's token, if it issues one; requested once.
    token: OnceCell<Option<String>>,
}

impl Manifests {
    /// `local` is whether the registry runs on this machine.
    pub fn new(local: bool) -> reqwest::Result<Self> {
        let mut builder = reqwest::Client::builder()
            .connect_timeout(CONNECT_TIMEOUT)
            .read_timeout(READ_TIMEOUT)
            .user_agent(USER_AGENT);
        if local {
            builder = builder.no_proxy();
        }
        Ok(Self {
            http: builder.build()?,
            local,
            token: OnceCell::new(),
        })
    }

    /// The bytes of a manifest.
    pub async fn get(
        &self,
        client: &oci_client::Client,
        reference: &Reference,
        auth: &RegistryAuth,
    ) -> Result<Vec<u8>, Failure> {
        let scheme = if self.local { "http" } else { "https" };
        let version = reference.digest().or(reference.tag()).unwrap_or("latest");
        let (registry, repository) = (reference.resolve_registry(), reference.repository());
        let url = format!("{scheme}://{registry}/v2/{repository}/manifests/{version}");
        let request = self.http.get(&url).header("Accept", ACCEPTED.join(", "));
        let request = self.authenticate(request, client, reference, auth).await;
        let response = request.send().await?;
        let status = response.status();
        let announced: Option<Digest> = response
            .headers()
            .get("Docker-Content-Digest")
            .and_then(|value| value.to_str().ok()?.parse().ok());
        let body = read(response).await?;
        if status != StatusCode::OK {
            return Err(Failure::Client(refusal(status, &body, url)));
        }
        let actual = Digest::of(&body);
        match announced {
            Some(expected) if expected != actual => Err(Failure::Announced { expected, actual }),
            _ => Ok(body),
        }
    }

    async fn authenticate(
        &self,
        request: RequestBuilder,
        client: &oci_client::Client,
        reference: &Reference,
        auth: &RegistryAuth,
    ) -> RequestBuilder {
        // Without a token the request itself fails, with a better reason.
        let ask = || async {
            let answer = client.auth(reference, auth, RegistryOperation::Pull).await;
            answer.ok().flatten()
        };
        match (self.token.get_or_init(ask).await, auth) {
            (Some(token), _) => request.bearer_auth(token),
            (None, RegistryAuth::Basic(user, password)) => request.basic_auth(user, Some(password)),
            (None, _) => request,
        }
    }
}

/// Reads the whole body, regardless of the announced length.
async fn read(mut response: Response) -> Result<Vec<u8>, Failure> {
    let mut body = Vec::new();
    while let Some(chunk) = response.chunk().await? {
        if (body.len() + chunk.len()) as u64 > MAX_DOCUMENT {
            return Err(Failure::TooLarge);
        }
        body.extend_from_slice(&chunk);
    }
    Ok(body)
}

/// Maps a status other than 200 to an error.
fn refusal(status: StatusCode, body: &[u8], url: String) -> OciDistributionError {
    if status == StatusCode::UNAUTHORIZED {
        return OciDistributionError::UnauthorizedError { url };
    }
    if status.is_client_error()
        && let Ok(envelope) = serde_json::from_slice(body)
    {
        return OciDistributionError::RegistryError { envelope, url };
    }
    OciDistributionError::ServerError {
        code: status.as_u16(),
        url,
        message: String::from_utf8_lossy(body).into_owned(),
    }
}
