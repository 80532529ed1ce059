//! What a container has changed: listed, exported, made an image.

use hull_engine::changes::{self, ChangeKind};
use hull_engine::images::image_name;
use hull_image::Import;
use hyper::StatusCode;
use serde_json::{Value, json};

use super::find;
use crate::Shared;
use crate::call::{Call, Reply};
use crate::failure::Result;

/// Lists what has changed in the root file system.
pub fn diff(state: &Shared, id: &str) -> Result<Reply> {
    let container = find(state, id)?;
    let changes = changes::diff(&state.config.paths(), &container.record.id)?;
    let objects: Vec<Value> = changes
        .iter()
        .map(|change| {
            let kind = match change.kind {
                ChangeKind::Changed => 0,
                ChangeKind::Added => 1,
                ChangeKind::Deleted => 2,
            };
            json!({"Path": change.path.to_string_lossy(), "Kind": kind})
        })
        .collect();
    Ok(Reply::ok(match objects.is_empty() {
        true => Value::Null,
        false => Value::Array(objects),
    }))
}

/// Sends the root file system.
pub fn export(state: &Shared, call: &mut Call, id: &str) -> Result<Reply> {
    let container = find(state, id)?;
    let mut stream = call.stream("application/octet-stream")?;
    changes::export(&state.config.paths(), &container.record.id, &mut stream)?;
    stream.finish();
    Ok(Reply::Taken)
}

/// Makes an image of a container.
pub fn commit(state: &Shared, call: &mut Call) -> Result<Reply> {
    let query = &call.query;
    let id = query.get("container").unwrap_or_default();
    let container = find(state, id)?;
    let name = match (query.get("repo"), query.get("tag")) {
        (None, _) => None,
        (Some(name), None) => Some(name.to_owned()),
        (Some(name), Some(tag)) => Some(format!("{name}:{tag}")),
    };
    let changes: Vec<String> = query
        .all("changes")
        .flat_map(str::lines)
        .filter(|line| !line.trim().is_empty())
        .map(str::to_owned)
        .collect();
    let import = Import {
        name: name.as_deref().map(image_name).transpose()?,
        changes,
        message: query.get("comment").map(str::to_owned),
        author: query.get("author").map(str::to_owned),
        created: None,
    };
    let pause = query.flag_or("pause", true);
    let image = changes::commit(&state.config, &container.record.id, &import, pause)?;
    Ok(Reply::Json(StatusCode::CREATED, json!({"Id": image.id})))
}
