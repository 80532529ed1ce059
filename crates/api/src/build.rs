//! `POST /build`: an image from a recipe, by buildah.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::{Component, Path};

use hull_engine::build::{self, Build, Context as Files};
use hull_engine::error::{Context, Error};
use hull_engine::images::image_name;
use hull_image::Reference;
use serde_json::json;

use crate::Shared;
use crate::call::{Call, JSON, Query, Reply, StreamWriter};
use crate::failure::{Failure, Result};

/// Longest line of output that is passed on as one, bytes.
const LONGEST_LINE: u64 = 1 << 16;

/// Builds an image of the archive in the request.
pub fn build(state: &Shared, call: &mut Call) -> Result<Reply> {
    let query = &call.query;
    if query.get("version") == Some("2") {
        return Err(Failure::unsupported(
            "builds by BuildKit's protocol: DOCKER_BUILDKIT=0, or hull build",
        ));
    }
    if query.get("remote").is_some() {
        return Err(Failure::unsupported(
            "a remote context: hull build takes its address",
        ));
    }
    let mut names = Vec::new();
    for name in query.all("t").filter(|name| !name.is_empty()) {
        names.push(image_name(name)?);
    }
    let options = options(query)?;
    let recipe = query.get("dockerfile").unwrap_or("Dockerfile").to_owned();
    let is_inside = Path::new(&recipe)
        .components()
        .all(|part| !matches!(part, Component::ParentDir));
    if !is_inside {
        return Err(Failure::bad(format!(
            "the recipe {recipe} is outside of its context"
        )));
    }
    let quiet = query.flag("q");
    for name in ["cpuperiod", "cpuquota", "cpushares", "memswap"] {
        if query.number::<i64>(name)?.is_some_and(|number| number != 0) {
            return Err(Failure::unsupported(format_args!("{name} of a build")));
        }
    }
    for name in ["cpusetcpus", "cgroupparent", "ulimits"] {
        if query
            .get(name)
            .is_some_and(|value| !matches!(value, "null" | "[]"))
        {
            return Err(Failure::unsupported(format_args!("{name} of a build")));
        }
    }
    let accounts = crate::transfer::accounts(call)?;
    let archive = crate::transfer::decompressed(&mut call.body)?;
    let files = Files::unpack(&state.config, archive)?;
    let build = Build {
        context: files.path().into(),
        file: Some(files.path().join(recipe.trim_start_matches('/'))),
        names,
        options,
        quiet,
        output: None,
        accounts,
    };
    let mut stream = call.stream(JSON)?;
    let built = with_output(state, build, &mut stream);
    // The caller may have gone.
    let sent = match built {
        Ok((id, names)) => {
            let _ = stream.line(&json!({"aux": {"ID": id}}));
            let short: String = id.trim_start_matches("sha256:").chars().take(12).collect();
            if quiet {
                let _ = stream.line(&json!({"stream": format!("{id}\n")}));
            } else {
                let line = format!("Successfully built {short}\n");
                let _ = stream.line(&json!({"stream": line}));
            }
            names.iter().try_for_each(|name| {
                let familiar = Reference::Registry(name.clone()).familiar();
                let line = format!("Successfully tagged {familiar}\n");
                stream.line(&json!({"stream": line}))
            })
        }
        Err(error) => {
            let message = Failure::from(error).message;
            stream.line(&json!({"errorDetail": {"message": message}, "error": message}))
        }
    };
    if sent.is_ok() {
        stream.finish();
    }
    Ok(Reply::Taken)
}

type Built = (String, Vec<hull_image::RegistryReference>);

/// Builds, and passes on what the steps say.
fn with_output(
    state: &Shared,
    mut build: Build,
    stream: &mut StreamWriter,
) -> Result<Built, Error> {
    let (reader, writer) =
        rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).context(|| "create a pipe")?;
    build.output = Some(File::from(writer));
    std::thread::scope(|scope| {
        let building = scope.spawn(move || {
            let id = build::build(&state.config, &build, &())?;
            Ok((id, build.names))
        });
        let mut lines = BufReader::new(File::from(reader));
        loop {
            let mut line = Vec::new();
            let length = (&mut lines).take(LONGEST_LINE).read_until(b'\n', &mut line);
            match length {
                Ok(1..) => {
                    // A caller that has gone does not end what was begun.
                    let _ = stream.line(&json!({"stream": String::from_utf8_lossy(&line)}));
                }
                _ => break,
            }
        }
        let built = building.join();
        built.map_err(|_| Error::new("a thread ended early"))?
    })
}

fn pairs(query: &Query, name: &str) -> Result<BTreeMap<String, Option<String>>> {
    match query.get(name) {
        None => Ok(BTreeMap::new()),
        Some(text) => serde_json::from_str(text)
            .map_err(|error| Failure::bad(format!("invalid {name}: {error}"))),
    }
}

/// In buildah's words.
fn options(query: &Query) -> Result<Vec<OsString>> {
    let mut options: Vec<OsString> = Vec::new();
    let mut add = |option: &str, value: String| options.extend([option.into(), value.into()]);
    for (key, value) in pairs(query, "buildargs")? {
        // Without a value it is the environment of who serves, which nobody means.
        if let Some(value) = value {
            add("--build-arg", format!("{key}={value}"));
        }
    }
    for (key, value) in pairs(query, "labels")? {
        add("--label", format!("{key}={}", value.unwrap_or_default()));
    }
    for host in query.all("extrahosts").flat_map(|hosts| hosts.split(',')) {
        if !host.is_empty() {
            add("--add-host", host.to_owned());
        }
    }
    for (name, option) in [("target", "--target"), ("platform", "--platform")] {
        if let Some(value) = query.get(name) {
            add(option, value.to_owned());
        }
    }
    for (name, option) in [("memory", "--memory"), ("shmsize", "--shm-size")] {
        if let Some(bytes @ 1..) = query.number::<u64>(name)? {
            add(option, format!("{bytes}b"));
        }
    }
    match query.get("networkmode") {
        None | Some("default" | "bridge") => {}
        Some("none") => add("--network", "none".to_owned()),
        Some(other) => {
            return Err(Failure::unsupported(format_args!(
                "network {other:?} in a build"
            )));
        }
    }
    options.push(format!("--pull={}", query.flag("pull")).into());
    if query.flag("nocache") {
        options.push("--no-cache".into());
    }
    if query.flag("squash") {
        options.push("--squash".into());
    }
    Ok(options)
}

/// There is no cache of hull's: layers that buildah keeps are buildah's.
pub fn prune() -> Result<Reply> {
    Ok(Reply::ok(json!({"CachesDeleted": [], "SpaceReclaimed": 0})))
}
