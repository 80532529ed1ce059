//! Connections: HTTP on sockets of the host, one thread for all of them, and a thread for each
//! request that is carried out.

use std::convert::Infallible;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use hyper::header::{CONNECTION, CONTENT_TYPE, HeaderName, HeaderValue, UPGRADE};
use hyper::service::service_fn;
use hyper::upgrade::OnUpgrade;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Semaphore, mpsc, oneshot};

use crate::Shared;
use crate::call::{Answer, BodyReader, Call, Head, JSON, Query, decode};
use crate::router;

/// Connections at a time; further ones wait to be accepted. Each has a request at a time, with a
/// thread that may follow something for hours.
const MOST_CONNECTIONS: usize = 4096;

/// How often it is looked whether there is anything to do.
const LOOK: Duration = Duration::from_secs(1);

/// Serves until a signal comes, or until nobody has asked for anything for `idle`.
pub async fn serve(
    listener: UnixListener,
    state: Shared,
    idle: Option<Duration>,
) -> io::Result<()> {
    let connections = Arc::new(Semaphore::new(MOST_CONNECTIONS));
    let mut last = Instant::now();
    loop {
        let accepted = tokio::time::timeout(LOOK, async {
            let place = connections.clone().acquire_owned().await;
            (place, listener.accept().await)
        });
        let Ok((place, accepted)) = accepted.await else {
            if state.busy.is_any() {
                last = Instant::now();
            }
            if idle.is_some_and(|idle| last.elapsed() > idle) {
                return Ok(());
            }
            continue;
        };
        last = Instant::now();
        let stream = match accepted {
            Ok((stream, _)) => stream,
            // No descriptors are left, or the caller has gone.
            Err(error) => {
                tracing::warn!("accept a connection: {error}");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let (state, counted) = (state.clone(), state.busy.count());
        tokio::spawn(async move {
            let service = service_fn(|request| answer(state.clone(), request));
            let connection = hyper::server::conn::http1::Builder::new()
                .serve_connection(TokioIo::new(stream), service)
                .with_upgrades();
            // The caller has gone, or does not speak HTTP.
            if let Err(error) = connection.await {
                tracing::debug!("a connection ended: {error}");
            }
            drop((place, counted));
        });
    }
}

/// Has one request carried out, and returns its answer.
async fn answer(
    state: Shared,
    mut request: Request<Incoming>,
) -> Result<Response<AnswerBody>, Infallible> {
    let upgrade = hyper::upgrade::on(&mut request);
    let (parts, body) = request.into_parts();
    let (sender, head) = oneshot::channel();
    let (version, path) = router::path(parts.uri.path());
    let path = path.into_iter().map(|part| decode(part, false));
    let call = Call {
        version,
        path: path.collect(),
        query: Query::parse(parts.uri.query().unwrap_or_default()),
        method: parts.method,
        headers: parts.headers,
        body: feed(body),
        answer: Some(Answer::new(sender)),
    };
    tracing::debug!("{} {}", call.method, parts.uri);
    let runtime = tokio::runtime::Handle::current();
    let started = std::thread::Builder::new()
        .name("request".to_owned())
        .spawn(move || {
            // Tasks that watch the caller belong to it.
            let _entered = runtime.enter();
            let _counted = state.busy.count();
            router::carry_out(&state, call);
        });
    let head = match started {
        Ok(_) => head.await.ok(),
        Err(error) => {
            tracing::warn!("start a thread: {error}");
            None
        }
    };
    let response = match head {
        Some(head) => response(head, upgrade),
        None => {
            let failure = serde_json::json!({"message": "the request was not carried out"});
            with_kind(JSON, StatusCode::INTERNAL_SERVER_ERROR, Vec::new(), {
                AnswerBody::Whole(Some(format!("{failure}\n").into()))
            })
        }
    };
    Ok(response)
}

/// Passes a request's body on as fast as it is read.
fn feed(mut body: Incoming) -> BodyReader {
    let (sender, pieces) = mpsc::channel(4);
    tokio::spawn(async move {
        while let Some(frame) = body.frame().await {
            let piece = match frame {
                Ok(frame) => match frame.into_data() {
                    Ok(data) => Ok(data),
                    Err(_) => continue,
                },
                Err(error) => Err(io::Error::other(error)),
            };
            if sender.send(piece).await.is_err() {
                return;
            }
        }
    });
    BodyReader::new(pieces)
}

fn with_kind(
    kind: &'static str,
    status: StatusCode,
    headers: Vec<(&'static str, String)>,
    body: AnswerBody,
) -> Response<AnswerBody> {
    let mut response = Response::new(body);
    *response.status_mut() = status;
    let own = response.headers_mut();
    if !matches!(status, StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED) {
        own.insert(CONTENT_TYPE, HeaderValue::from_static(kind));
    }
    for (name, value) in router::HEADERS {
        own.insert(
            HeaderName::from_static(name),
            HeaderValue::from_static(value),
        );
    }
    for (name, value) in headers {
        if let Ok(value) = HeaderValue::from_str(&value) {
            own.insert(HeaderName::from_static(name), value);
        }
    }
    response
}

fn response(head: Head, upgrade: OnUpgrade) -> Response<AnswerBody> {
    match head {
        Head::Whole {
            status,
            kind,
            headers,
            body,
        } => with_kind(kind, status, headers, AnswerBody::Whole(Some(body))),
        Head::Stream {
            kind,
            headers,
            pieces,
            whole,
        } => with_kind(
            kind,
            StatusCode::OK,
            headers,
            AnswerBody::Stream(pieces, whole),
        ),
        Head::Upgrade { kind, connection } => {
            tokio::spawn(async move {
                let taken = take_over(upgrade).await;
                match taken {
                    // Fails if the handler has gone.
                    Ok(taken) => drop(connection.send(taken)),
                    Err(error) => tracing::debug!("take over a connection: {error}"),
                }
            });
            let body = AnswerBody::Whole(None);
            let mut response = with_kind(kind, StatusCode::SWITCHING_PROTOCOLS, Vec::new(), body);
            let own = response.headers_mut();
            own.insert(CONNECTION, HeaderValue::from_static("Upgrade"));
            own.insert(UPGRADE, HeaderValue::from_static("tcp"));
            response
        }
    }
}

async fn take_over(upgrade: OnUpgrade) -> io::Result<(std::os::unix::net::UnixStream, Bytes)> {
    let upgraded = upgrade.await.map_err(io::Error::other)?;
    let parts = upgraded
        .downcast::<TokioIo<UnixStream>>()
        .map_err(|_| io::Error::other("it is none of ours"))?;
    let stream = parts.io.into_inner().into_std()?;
    stream.set_nonblocking(false)?;
    Ok((stream, parts.read_buf))
}

/// The body of an answer.
#[derive(Debug)]
pub enum AnswerBody {
    Whole(Option<Bytes>),
    Stream(mpsc::Receiver<Bytes>, Arc<AtomicBool>),
}

impl Body for AnswerBody {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<io::Result<Frame<Bytes>>>> {
        match self.get_mut() {
            Self::Whole(body) => {
                let body = body.take().filter(|body| !body.is_empty());
                Poll::Ready(body.map(|body| Ok(Frame::data(body))))
            }
            Self::Stream(pieces, whole) => pieces.poll_recv(context).map(|piece| match piece {
                Some(piece) => Some(Ok(Frame::data(piece))),
                None if whole.load(Ordering::Acquire) => None,
                // The connection is broken off: the caller is not to take what came for all.
                None => Some(Err(io::Error::other("the answer breaks off"))),
            }),
        }
    }

    fn is_end_stream(&self) -> bool {
        matches!(self, Self::Whole(body) if body.as_ref().is_none_or(Bytes::is_empty))
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Whole(body) => {
                SizeHint::with_exact(body.as_ref().map_or(0, |body| body.len() as u64))
            }
            Self::Stream(..) => SizeHint::default(),
        }
    }
}
