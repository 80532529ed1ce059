//! From method and path to a handler.

use hyper::{Method, StatusCode};

use crate::Shared;
use crate::attach;
use crate::build;
use crate::call::{Call, Reply};
use crate::containers::{self, archive, changes, create, lifecycle, logs, stats};
use crate::exec;
use crate::failure::{Failure, Result};
use crate::images;
use crate::networks;
use crate::registries;
use crate::system;
use crate::transfer;
use crate::volumes;

/// The version of the API that is served, and the oldest that clients may ask for: answers are the
/// same for all of them.
pub const API_VERSION: &str = "1.51";

/// See [`API_VERSION`].
pub const OLDEST_API_VERSION: &str = "1.24";

/// Headers of every answer, from which clients learn what they talk to.
pub const HEADERS: [(&str, &str); 4] = [
    ("api-version", API_VERSION),
    ("docker-experimental", "false"),
    ("ostype", "linux"),
    ("server", "hull"),
];

/// A version of the API: the two numbers of `1.51`.
pub type Version = (u32, u32);

/// The version that a path asks for, and the parts after it.
pub fn path(path: &str) -> (Option<Version>, Vec<&str>) {
    let mut parts: Vec<&str> = path.split('/').filter(|part| !part.is_empty()).collect();
    let version = parts.first().and_then(|part| {
        let (major, minor) = part.strip_prefix('v')?.split_once('.')?;
        Some((major.parse().ok()?, minor.parse().ok()?))
    });
    if version.is_some() {
        parts.remove(0);
    }
    (version, parts)
}

/// Carries out a request and answers it.
pub fn carry_out(state: &Shared, mut call: Call) {
    let reply = dispatch(state, &mut call);
    let Some(answer) = call.answer.take() else {
        if let Err(failure) = reply {
            tracing::debug!("after the answer had begun: {}", failure.message);
        }
        return;
    };
    call.body.drain();
    match reply {
        Ok(Reply::Json(status, value)) => answer.json(status, &value),
        Ok(Reply::Empty(status)) => answer.empty(status),
        Ok(Reply::Taken) => {}
        Err(failure) => answer.failure(&failure),
    }
}

fn dispatch(state: &Shared, call: &mut Call) -> Result<Reply> {
    let path = std::mem::take(&mut call.path);
    let parts: Vec<&str> = path.iter().map(String::as_str).collect();
    let method = match call.method.clone() {
        Method::HEAD if parts != ["_ping"] && parts.last() != Some(&"archive") => Method::GET,
        method => method,
    };
    match (method.as_str(), &parts[..]) {
        ("GET" | "HEAD", ["_ping"]) => system::ping(call),
        ("GET", ["version"]) => system::version(state),
        ("GET", ["info"]) => system::info(state),
        ("GET", ["events"]) => system::events(state, call),
        ("GET", ["system", "df"]) => system::usage(state, call),
        ("POST", ["auth"]) => system::login(call),

        ("GET", ["containers", "json"]) => containers::list(state, call),
        ("POST", ["containers", "create"]) => create::create(state, call),
        ("POST", ["containers", "prune"]) => containers::prune(state, call),
        (_, ["containers", id]) if method == Method::DELETE => containers::remove(state, call, id),
        ("GET", ["containers", id, "json"]) => containers::inspect(state, call, id),
        ("GET", ["containers", id, "top"]) => containers::top(state, call, id),
        ("GET", ["containers", id, "logs"]) => logs::logs(state, call, id),
        ("GET", ["containers", id, "stats"]) => stats::stats(state, call, id),
        ("GET", ["containers", id, "changes"]) => changes::diff(state, id),
        ("GET", ["containers", id, "export"]) => changes::export(state, call, id),
        ("HEAD", ["containers", id, "archive"]) => archive::stat(state, call, id),
        ("GET", ["containers", id, "archive"]) => archive::get(state, call, id),
        ("PUT", ["containers", id, "archive"]) => archive::put(state, call, id),
        ("POST", ["containers", id, "start"]) => lifecycle::start(state, call, id),
        ("POST", ["containers", id, "stop"]) => lifecycle::stop(state, call, id),
        ("POST", ["containers", id, "restart"]) => lifecycle::restart(state, call, id),
        ("POST", ["containers", id, "kill"]) => lifecycle::kill(state, call, id),
        ("POST", ["containers", id, "pause"]) => lifecycle::freeze(state, id, true),
        ("POST", ["containers", id, "unpause"]) => lifecycle::freeze(state, id, false),
        ("POST", ["containers", id, "rename"]) => lifecycle::rename(state, call, id),
        ("POST", ["containers", id, "update"]) => lifecycle::update(state, call, id),
        ("POST", ["containers", id, "wait"]) => lifecycle::wait(state, call, id),
        ("POST", ["containers", id, "attach"]) => attach::attach(state, call, id),
        ("POST", ["containers", id, "resize"]) => attach::resize(state, call, id),
        ("POST", ["containers", id, "exec"]) => exec::create(state, call, id),
        ("POST", ["exec", id, "start"]) => exec::start(state, call, id),
        ("POST", ["exec", id, "resize"]) => exec::resize(state, call, id),
        ("GET", ["exec", id, "json"]) => exec::inspect(state, id),
        ("POST", ["commit"]) => changes::commit(state, call),

        ("GET", ["images", "json"]) => images::list(state, call),
        ("GET", ["images", "search"]) => registries::search(call),
        ("GET", ["distribution", name @ .., "json"]) => registries::describe(call, &name.join("/")),
        ("POST", ["images", "create"]) => transfer::create(state, call),
        ("POST", ["images", "load"]) => transfer::load(state, call),
        ("GET", ["images", "get"]) => transfer::save(state, call, None),
        ("POST", ["images", "prune"]) => images::prune(state, call),
        ("GET", ["images", name @ .., "get"]) => transfer::save(state, call, Some(name.join("/"))),
        ("GET", ["images", name @ .., "json"]) => images::inspect(state, &name.join("/")),
        ("GET", ["images", name @ .., "history"]) => images::history(state, &name.join("/")),
        ("POST", ["images", name @ .., "tag"]) => images::tag(state, call, &name.join("/")),
        ("POST", ["images", name @ .., "push"]) => transfer::push(state, call, &name.join("/")),
        ("DELETE", ["images", name @ ..]) => images::remove(state, call, &name.join("/")),
        ("POST", ["build"]) => build::build(state, call),
        ("POST", ["build", "prune"]) => build::prune(),

        ("GET", ["volumes"]) => volumes::list(state, call),
        ("POST", ["volumes", "create"]) => volumes::create(state, call),
        ("POST", ["volumes", "prune"]) => volumes::prune(state, call),
        ("GET", ["volumes", name]) => volumes::inspect(state, name),
        ("DELETE", ["volumes", name]) => volumes::remove(state, call, name),

        ("GET", ["networks"]) => networks::list(state, call),
        ("POST" | "DELETE", ["networks", ..]) if state.config.without_root => {
            networks::refuse(state)
        }
        ("POST", ["networks", "create"]) => networks::create(state, call),
        ("POST", ["networks", "prune"]) => networks::prune(state, call),
        ("GET", ["networks", name]) => networks::inspect(state, name),
        ("DELETE", ["networks", name]) => networks::remove(state, name),
        ("POST", ["networks", name, "connect"]) => networks::connect(state, call, name),
        ("POST", ["networks", name, "disconnect"]) => networks::disconnect(state, call, name),

        (_, ["swarm", "init" | "join"]) => Err(Failure::unsupported("swarms")),
        (
            _,
            [
                "swarm" | "nodes" | "services" | "tasks" | "secrets" | "configs",
                ..,
            ],
        ) => {
            Err(Failure {
                // As Docker's of a host that is in none.
                status: StatusCode::SERVICE_UNAVAILABLE,
                message: "This node is not a swarm manager: hull has no swarms".to_owned(),
            })
        }
        (_, ["plugins" | "session" | "grpc", ..]) => Err(Failure::unsupported(format_args!(
            "{} of Docker's API",
            parts.join("/")
        ))),
        _ => Err(Failure::missing(format!(
            "page not found: {} /{}",
            call.method,
            parts.join("/")
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_left_out_of_paths() {
        for (text, version, parts) in [
            (
                "/v1.51/containers/json",
                Some((1, 51)),
                &["containers", "json"][..],
            ),
            ("/_ping", None, &["_ping"]),
            (
                "/v1.24/images/a/b:1/json",
                Some((1, 24)),
                &["images", "a", "b:1", "json"],
            ),
            ("/volumes/v1", None, &["volumes", "v1"]),
            ("/vx.y/info", None, &["vx.y", "info"]),
        ] {
            assert_eq!(path(text), (version, parts.to_vec()), "{text}");
        }
    }
}
