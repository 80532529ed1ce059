//! Volumes.

use std::collections::BTreeMap;

use hull_engine::error::ErrorKind;
use hull_engine::names;
use hull_engine::volumes::store::{self, Filter, StoredVolume};
use hull_engine::volumes::volume_name;
use hyper::StatusCode;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::Shared;
use crate::call::{Call, Reply};
use crate::failure::{Failure, Result};

fn filters(call: &Call) -> Result<Vec<Filter>> {
    call.query.filters_as(Filter::parse)
}

/// Lists volumes.
pub fn list(state: &Shared, call: &Call) -> Result<Reply> {
    let (volumes, wrong) = store::select(&state.config.paths(), &filters(call)?)?;
    let objects: Vec<Value> = volumes.iter().map(StoredVolume::object).collect();
    let warnings: Vec<String> = wrong.into_iter().map(|error| error.message).collect();
    Ok(Reply::ok(json!({"Volumes": objects, "Warnings": warnings})))
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
struct Asked {
    name: String,
    driver: String,
    driver_opts: BTreeMap<String, String>,
    labels: BTreeMap<String, String>,
}

/// Creates a volume, unless it is there.
pub fn create(state: &Shared, call: &mut Call) -> Result<Reply> {
    let asked: Asked = call.json()?;
    if !matches!(asked.driver.as_str(), "" | "local") {
        return Err(Failure::unsupported(format_args!(
            "volume driver {:?}: volumes are directories",
            asked.driver
        )));
    }
    let anonymous = asked.name.is_empty();
    let name = match anonymous {
        true => names::new_id()?,
        false => volume_name(&asked.name).map_err(Failure::bad)?,
    };
    let wanted = store::Wanted {
        labels: asked.labels,
        options: asked.driver_opts,
        anonymous,
    };
    let volume = store::create(&state.config.paths(), &name, wanted)?;
    Ok(Reply::Json(StatusCode::CREATED, volume.object()))
}

/// What is known of a volume.
pub fn inspect(state: &Shared, name: &str) -> Result<Reply> {
    Ok(Reply::ok(
        store::find(&state.config.paths(), name)?.object(),
    ))
}

/// Removes a volume.
pub fn remove(state: &Shared, call: &Call, name: &str) -> Result<Reply> {
    match store::remove(&state.config.paths(), name) {
        Err(error) if error.kind == ErrorKind::NotFound && call.query.flag("force") => {}
        removed => removed?,
    }
    Ok(Reply::done())
}

/// Removes volumes that no container uses.
pub fn prune(state: &Shared, call: &Call) -> Result<Reply> {
    // Since 1.42 those with names stay, unless they are asked for.
    let mut all = call.version.is_some_and(|version| version < (1, 42));
    let mut filters = Vec::new();
    for text in call.query.filters()? {
        match text.as_str() {
            "all=true" | "all=1" => all = true,
            "all=false" | "all=0" => {}
            text => match Filter::parse(text).map_err(Failure::bad)? {
                label @ Filter::Label(..) => filters.push(label),
                _ => {
                    return Err(Failure::unsupported(format_args!(
                        "prune with the filter {text}"
                    )));
                }
            },
        }
    }
    let paths = state.config.paths();
    let sizes = std::cell::RefCell::new(BTreeMap::new());
    let matches = |volume: &StoredVolume| {
        let wanted = filters.iter().all(|filter| filter.matches(volume, false));
        if wanted {
            let size = volume.size();
            sizes.borrow_mut().insert(volume.name.clone(), size);
        }
        wanted
    };
    let removed = store::prune(&paths, all, matches)?;
    let sizes = sizes.into_inner();
    let removed_sizes = removed.iter().filter_map(|name| sizes.get(name));
    let bytes = removed_sizes.fold(0u64, |sum, size| sum.saturating_add(*size));
    Ok(Reply::ok(
        json!({"VolumesDeleted": removed, "SpaceReclaimed": bytes}),
    ))
}
