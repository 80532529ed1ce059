//! Asks a registry for a manifest and reads no more of the answer than a manifest may have.
//!
//! Called by the registry source. The registry client reads a manifest of any length into memory,
//! so this request is made here; the client only says how to authenticate.

use oci_client::errors::OciDistributionError;
use oci_client::secrets::RegistryAuth;
use oci_client::{Reference, RegistryOperation};
use reqwest::{RequestBuilder, Response, StatusCode};
use tokio::sync::OnceCell;

use super::registry::{CONNECT_TIMEOUT, READ_TIMEOUT, USER_AGENT};
use crate::digest::Digest;
use crate::manifest::{ACCEPTED, MAX_DOCUMENT};

/// Why there is no manifest.
pub(super) enum Failure {
    /// As the registry client would say it.
    Client(OciDistributionError),
    /// More bytes than [`MAX_DOCUMENT`].
    TooLarge,
    /// The registry says itself that the content has another digest.
    Announced { expected: Digest, actual: Digest },
}

impl From<reqwest::Error> for Failure {
    fn from(error: reqwest::Error) -> Self {
        Self::Client(error.into())
    }
}

/// Requests to one registry.
pub(super) struct Manifests {
    http: reqwest::Client,
    local: bool,
    /// The registry's token, if it gives one; asked for once.
    token: OnceCell<Option<String>>,
}

impl Manifests {
    /// For a registry on this machine (`local`), or another one.
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
        // A registry that gives no token will answer the request itself as it likes, with a better
        // reason.
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

/// The whole body, whatever length is announced.
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

/// What another status than 200 means.
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
