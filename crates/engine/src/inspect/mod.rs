//! What is known of containers and images in Docker's words: the objects of `docker inspect`, for
//! programs and templates that read these. Called by the commands that inspect. Keys that have no
//! meaning for a container in a machine of its own are there with the value that Docker gives when
//! nothing is asked for.

mod container;
mod host_config;
mod image;
mod network;
mod networks;
#[cfg(test)]
mod tests;

use hull_sandbox::store::State;
use serde_json::{Map, Value, json};

use crate::config::Config;
use crate::container::Any;
use crate::error::{Result, of_image};
use crate::{unpacker, usage};

pub use container::container;
pub(crate) use container::writable_layer;
pub use image::{Names, image};
pub use network::networks_of;
pub use networks::{NetworkFilter, network, networks, select_networks};

/// Adds the bytes that a container has written, and those that it has with its image.
///
/// # Errors
/// The images cannot be read.
pub fn add_size(config: &Config, container: &Any, object: &mut Value) -> Result<()> {
    let Any::Own(own) = container else {
        return Ok(());
    };
    let images = unpacker::store(config)?.list().map_err(of_image)?;
    let image_id = &own.record.details.image_id;
    let mut images = images.into_iter();
    let image = images.find(|image| image.id.to_string() == *image_id);
    let written = usage::of_container(own.directory.path());
    object["SizeRw"] = json!(written);
    object["SizeRootFs"] = json!(image.map_or(0, |image| image.size).saturating_add(written));
    Ok(())
}

/// The key in Docker's objects below which hull's own are. Beside Docker's they would be read for
/// those by programs that take keys in any case, as Go's and PowerShell's.
pub const OWN: &str = "Hull";

/// Docker's time of what has not happened.
const NEVER: &str = "0001-01-01T00:00:00Z";

/// Docker's name for the state of a container that waits to be started again.
pub const RESTARTING: &str = "restarting";

/// Docker's name for a state.
pub fn state_name(state: State) -> &'static str {
    match state {
        State::Creating | State::Created => "created",
        State::Running => "running",
        State::Paused => "paused",
        State::Stopped => "exited",
    }
}

/// The list, or `null` when it is empty, as Go writes a list that nobody has made.
fn list<T: Into<Value>>(items: impl IntoIterator<Item = T>) -> Value {
    let items: Vec<Value> = items.into_iter().map(Into::into).collect();
    match items.is_empty() {
        true => Value::Null,
        false => Value::Array(items),
    }
}

/// The set of these keys, as Docker writes it: `{}` for each.
fn set(keys: impl IntoIterator<Item = String>) -> Value {
    let keys: Map<String, Value> = keys.into_iter().map(|key| (key, json!({}))).collect();
    match keys.is_empty() {
        true => Value::Null,
        false => Value::Object(keys),
    }
}

/// Adds the keys of another object.
fn extend(object: &mut Value, more: Value) {
    if let (Some(object), Value::Object(more)) = (object.as_object_mut(), more) {
        object.extend(more);
    }
}
