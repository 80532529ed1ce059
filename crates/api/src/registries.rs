//! What registries have.

use hull_engine::error::of_image;
use hull_engine::images::image_name;
use hull_engine::search::SearchFilter;
use hull_image::SEARCH_RESULTS;
use serde_json::{Value, json};

use crate::call::{Call, Reply};
use crate::failure::{Failure, Result};
use crate::images::no_such;
use crate::transfer::credentials;

/// Docker's number of results if a client does not say.
const USUAL_RESULTS: usize = 25;

/// Searches a registry.
pub fn search(call: &Call) -> Result<Reply> {
    let term = call.query.get("term").unwrap_or_default();
    let limit = match call.query.get("limit").filter(|text| !text.is_empty()) {
        None => USUAL_RESULTS,
        Some(text) => match text.parse() {
            // Clients send 0 where they want the usual number.
            Ok(0) => USUAL_RESULTS,
            Ok(number @ 1..=SEARCH_RESULTS) => number,
            _ => {
                return Err(Failure::bad(format!(
                    "limit {text}: give a number from 1 to {SEARCH_RESULTS}"
                )));
            }
        },
    };
    let filters = call.query.filters_as(SearchFilter::parse)?;
    let found = hull_image::search(term, limit, &credentials(call)?).map_err(of_image)?;
    let selected = found
        .iter()
        .filter(|result| filters.iter().all(|filter| filter.selects(result)));
    let objects = selected.map(|result| {
        json!({
            "name": result.name,
            "description": result.description,
            "star_count": result.stars,
            "is_official": result.official,
            "is_automated": result.automated,
        })
    });
    Ok(Reply::ok(objects.collect()))
}

/// What a registry says of an image without a pull.
pub fn describe(call: &Call, name: &str) -> Result<Reply> {
    let reference = image_name(name)?;
    let image = hull_image::remote_image(&reference, &credentials(call)?);
    let image = image.map_err(|error| no_such(error, name))?;
    let platforms = image.platforms.iter().map(|platform| {
        let mut object = json!({
            "architecture": platform.architecture,
            "os": platform.os,
        });
        if let Some(variant) = &platform.variant {
            object["variant"] = json!(variant);
        }
        object
    });
    Ok(Reply::ok(json!({
        "Descriptor": {
            "mediaType": image.media_type,
            "digest": image.digest.to_string(),
            "size": image.size,
        },
        "Platforms": platforms.collect::<Value>(),
    })))
}
