//! What is sent to a registry: blobs and manifests. The rules of `http` hold here, too; the answers
//! to what is sent are not followed elsewhere.
//!
//! Called by `push`.

use std::fs::File;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use reqwest::header::{AUTHORIZATION, CONTENT_LENGTH, CONTENT_TYPE, LOCATION};
use reqwest::{Method, Response, StatusCode, Url};

use super::http::{Failure, Http, READ_TIMEOUT, check_scheme, refusal, whole};
use crate::digest::Digest;

/// Bytes of a file that are sent at once.
const PIECE: usize = 64 << 10;

/// Timeout while nothing is sent. A registry that has all of a large blob computes its digest
/// before it answers.
const STUCK_TIMEOUT: Duration = Duration::from_secs(5 * READ_TIMEOUT.as_secs());

/// A blob to be sent.
pub(super) struct Upload {
    /// At its start.
    pub file: File,
    pub size: u64,
    /// Counts what is sent.
    pub sent: Arc<AtomicU64>,
}

impl Body for Upload {
    type Data = Bytes;
    type Error = std::io::Error;

    /// Reads without waiting: it is a local file, and nothing else runs on this thread.
    fn poll_frame(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<std::io::Result<Frame<Bytes>>>> {
        let left = self.size - self.sent.load(Ordering::Relaxed).min(self.size);
        if left == 0 {
            return Poll::Ready(None);
        }
        let mut piece = vec![0; left.min(PIECE as u64) as usize];
        let read = match rustix::io::retry_on_intr(|| rustix::io::read(&self.file, &mut piece[..]))
        {
            Ok(0) => return Poll::Ready(Some(Err(std::io::ErrorKind::UnexpectedEof.into()))),
            Ok(read) => read,
            Err(errno) => return Poll::Ready(Some(Err(errno.into()))),
        };
        piece.truncate(read);
        self.sent.fetch_add(read as u64, Ordering::Relaxed);
        Poll::Ready(Some(Ok(Frame::data(piece.into()))))
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.size - self.sent.load(Ordering::Relaxed).min(self.size))
    }
}

impl Http {
    /// The size of a blob, `Some(None)` if the registry has it and does not say; `None` if it does
    /// not have it.
    pub(super) async fn blob_size(&self, digest: &Digest) -> Result<Option<Option<u64>>, Failure> {
        let path = format!("blobs/{digest}");
        match whole(self.request(Method::HEAD, &path, &[])).await {
            Ok(response) => {
                let length = response.headers().get(CONTENT_LENGTH);
                Ok(Some(
                    length.and_then(|text| text.to_str().ok()?.parse().ok()),
                ))
            }
            Err(Failure::Status { status: 404, .. }) => Ok(None),
            Err(failure) => Err(failure),
        }
    }

    /// Sends a blob in one piece.
    pub(super) async fn upload(&self, digest: &Digest, upload: Upload) -> Result<(), Failure> {
        let response = whole(self.request(
            Method::POST,
            "blobs/uploads/",
            // Some registries refuse a request without it.
            &[(CONTENT_LENGTH.as_str(), "0")],
        ))
        .await?;
        let mut url = self.upload_url(&response)?;
        url.query_pairs_mut()
            .append_pair("digest", &digest.to_string());
        let (sent, size) = (upload.sent.clone(), upload.size);
        let mut request = self
            .client()
            .put(url.clone())
            .header(CONTENT_TYPE, "application/octet-stream")
            .header(CONTENT_LENGTH, size)
            .body(reqwest::Body::wrap(upload));
        if url.origin() == self.registry().origin() {
            let (authorization, _) = whole(self.authorization()).await?;
            if let Some(authorization) = authorization {
                request = request.header(AUTHORIZATION, authorization);
            }
        }
        let response = unless_stuck(request.send(), &sent).await?;
        match response.status() {
            StatusCode::CREATED | StatusCode::NO_CONTENT | StatusCode::OK => Ok(()),
            status => Err(refusal(status, response).await),
        }
    }

    /// Where an upload goes, from the answer that permits it.
    fn upload_url(&self, response: &Response) -> Result<Url, Failure> {
        let refused = || Failure::Refused("it does not say where an upload goes".to_owned());
        let location = response.headers().get(LOCATION).ok_or_else(refused)?;
        let location = location.to_str().map_err(|_| refused())?;
        let url = response.url().join(location).map_err(|_| refused())?;
        check_scheme(self.registry(), &url)?;
        Ok(url)
    }

    /// Sends a manifest.
    pub(super) async fn put_manifest(
        &self,
        tag: &str,
        media_type: &str,
        bytes: &[u8],
    ) -> Result<(), Failure> {
        let put = async {
            let url = self.url(&format!("manifests/{tag}"))?;
            let mut request = self
                .client()
                .put(url)
                .header(CONTENT_TYPE, media_type)
                .body(bytes.to_vec());
            if let (Some(authorization), _) = self.authorization().await? {
                request = request.header(AUTHORIZATION, authorization);
            }
            let response = request.send().await?;
            match response.status() {
                status if status.is_success() => Ok(response),
                status => Err(refusal(status, response).await),
            }
        };
        let response = whole(put).await?;
        let announced = response.headers().get("Docker-Content-Digest");
        let announced = announced.and_then(|value| value.to_str().ok()?.parse::<Digest>().ok());
        let expected = Digest::of(bytes);
        match announced {
            Some(actual) if actual != expected => Err(Failure::Announced { expected, actual }),
            _ => Ok(()),
        }
    }
}

/// Waits for an answer as long as something is sent.
async fn unless_stuck(
    request: impl Future<Output = reqwest::Result<Response>>,
    sent: &AtomicU64,
) -> Result<Response, Failure> {
    tokio::pin!(request);
    let mut before = sent.load(Ordering::Relaxed);
    loop {
        match tokio::time::timeout(STUCK_TIMEOUT, &mut request).await {
            Ok(response) => return Ok(response?),
            Err(_) => {
                let now = sent.load(Ordering::Relaxed);
                if now == before {
                    return Err(Failure::Slow);
                }
                before = now;
            }
        }
    }
}
