//! Images that are here.

use std::collections::BTreeMap;

use hull_engine::error::of_image;
use hull_engine::images::{self, Filter, image_name, of_local};
use hull_engine::listing::PruneFilter;
use hull_engine::{time, unpacker};
use hull_image::{Listed, Pattern, Reference, Removed, Store};
use hyper::StatusCode;
use serde_json::{Value, json};

use crate::Shared;
use crate::call::{Call, Reply};
use crate::failure::{Failure, Result};

/// An image's store and reference.
pub fn referred(state: &Shared, name: &str) -> Result<(Store, Reference)> {
    let reference = name.parse().map_err(of_image)?;
    Ok((unpacker::store(&state.config)?, reference))
}

/// Says as Docker that there is no such image: some clients look for these words.
pub fn no_such(error: hull_image::Error, name: &str) -> Failure {
    let missing = error.is_not_found();
    let mut failure = Failure::from(of_local(error));
    if missing {
        failure.message = format!("No such image: {name}");
    }
    failure
}

/// Seconds since 1970.
pub fn seconds(created: Option<&str>) -> i128 {
    created.and_then(time::parse_rfc3339).unwrap_or(0) / 1_000_000_000
}

/// Names, and names with digests, of the image of one id.
fn names(images: &[&Listed]) -> (Vec<String>, Vec<String>) {
    let (mut tags, mut digests) = (Vec::new(), Vec::new());
    for image in images {
        let Some(Ok(reference)) = image.reference.as_deref().map(str::parse::<Reference>) else {
            continue;
        };
        let familiar = reference.familiar();
        match familiar.split_once('@') {
            Some(_) => digests.push(familiar),
            None => {
                if let Some((name, _)) = familiar.rsplit_once(':') {
                    digests.push(format!("{name}@{}", image.repo_digest));
                }
                tags.push(familiar);
            }
        }
    }
    digests.dedup();
    (tags, digests)
}

/// Lists images.
pub fn list(state: &Shared, call: &Call) -> Result<Reply> {
    let filters = call.query.filters_as(Filter::parse)?;
    // Of old clients.
    let name = call.query.get("filter").map(Pattern::parse);
    let name = name.transpose().map_err(Failure::bad)?;
    let store = unpacker::store(&state.config)?;
    let (list, wrong) = images::select(&store, &filters, name.as_ref())?;
    for error in wrong {
        tracing::warn!("{error}");
    }
    let mut containers: BTreeMap<String, i64> = BTreeMap::new();
    for container in hull_engine::container::list(&state.config.paths())?
        .iter()
        .flatten()
    {
        let id = container.record.details.image_id.clone();
        *containers.entry(id).or_default() += 1;
    }
    // One object for each image, whatever its names.
    let mut ids: Vec<String> = Vec::new();
    let mut of_id: BTreeMap<String, Vec<&Listed>> = BTreeMap::new();
    for image in &list {
        let id = image.id.to_string();
        if !of_id.contains_key(&id) {
            ids.push(id.clone());
        }
        of_id.entry(id).or_default().push(image);
    }
    let objects = ids.iter().map(|id| {
        let images = &of_id[id];
        let (tags, digests) = names(images);
        json!({
            "Id": id,
            "ParentId": "",
            "RepoTags": tags,
            "RepoDigests": digests,
            "Created": seconds(images[0].created.as_deref()),
            "Size": images[0].size,
            "SharedSize": -1,
            "VirtualSize": images[0].size,
            "Labels": images[0].labels,
            "Containers": containers.get(id).copied().unwrap_or(0),
        })
    });
    Ok(Reply::ok(objects.collect()))
}

/// All that is known of an image.
pub fn inspect(state: &Shared, name: &str) -> Result<Reply> {
    let missing = || Failure::missing(format!("No such image: {name}"));
    let object = images::docker_object(&state.config, name)?.ok_or_else(missing)?;
    Ok(Reply::ok(object))
}

/// The steps that an image was made by.
pub fn history(state: &Shared, name: &str) -> Result<Reply> {
    let (store, reference) = referred(state, name)?;
    let image = store
        .inspect(&reference)
        .map_err(|error| no_such(error, name))?;
    let history = store.history(&image).map_err(of_image)?;
    let tags: Vec<Listed> = store.list().map_err(of_image)?;
    let own: Vec<&Listed> = tags
        .iter()
        .filter(|listed| listed.id.to_string() == image.id)
        .collect();
    let (tags, _) = names(&own);
    // The ids of the other steps are known only to the engine that built the image.
    let ids = std::iter::once(image.id.as_str()).chain(std::iter::repeat("<missing>"));
    let steps = ids.zip(&history).enumerate().map(|(index, (id, step))| {
        json!({
            "Id": id,
            "Created": seconds(step.created.as_deref()),
            "CreatedBy": step.created_by,
            "Tags": if index == 0 { json!(tags) } else { Value::Null },
            "Size": step.size,
            "Comment": step.comment,
        })
    });
    Ok(Reply::ok(steps.collect()))
}

/// A name of the query's parts.
pub fn asked_name(call: &Call) -> Result<String> {
    let repository = call.query.get("repo");
    let repository = repository.ok_or_else(|| Failure::bad("repo: it is needed"))?;
    Ok(match call.query.get("tag") {
        Some(tag) => format!("{repository}:{tag}"),
        None => repository.to_owned(),
    })
}

/// Gives an image one more name.
pub fn tag(state: &Shared, call: &Call, name: &str) -> Result<Reply> {
    let (store, reference) = referred(state, name)?;
    let target = image_name(&asked_name(call)?)?;
    store
        .tag(&reference, &target)
        .map_err(|error| no_such(error, name))?;
    Ok(Reply::Empty(StatusCode::CREATED))
}

fn removed_object(removed: &Removed) -> Value {
    let untagged = removed.untagged.iter().map(|name| {
        let familiar = name.parse::<Reference>().map(|name| name.familiar());
        json!({"Untagged": familiar.unwrap_or_else(|_| name.to_string())})
    });
    let deleted = removed.images.iter().map(|id| json!({"Deleted": id}));
    untagged.chain(deleted).collect()
}

/// Removes an image, or one of its names.
pub fn remove(state: &Shared, call: &Call, name: &str) -> Result<Reply> {
    let (store, reference) = referred(state, name)?;
    let paths = state.config.paths();
    let container_exists = |id: &str| paths.container(id).exists();
    let removed = store.remove(&reference, call.query.flag("force"), &container_exists);
    let removed = removed.map_err(|error| match error.is_not_found() {
        true => no_such(error, name),
        // A container uses it, or it has several names.
        false => Failure {
            status: StatusCode::CONFLICT,
            message: Failure::from(of_image(error)).message,
        },
    })?;
    Ok(Reply::ok(removed_object(&removed)))
}

/// Removes images that nobody uses.
pub fn prune(state: &Shared, call: &Call) -> Result<Reply> {
    let mut all = false;
    let mut filters = Vec::new();
    for filter in call.query.filters()? {
        match filter.as_str() {
            "dangling=false" | "dangling=0" => all = true,
            "dangling=true" | "dangling=1" => {}
            filter => filters.push(PruneFilter::parse(filter).map_err(Failure::bad)?),
        }
    }
    let store = unpacker::store(&state.config)?;
    let removed = images::prune(&state.config.paths(), &store, all, &filters)?;
    Ok(Reply::ok(json!({
        "ImagesDeleted": removed_object(&removed),
        "SpaceReclaimed": removed.bytes,
    })))
}
