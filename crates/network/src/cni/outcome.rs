//! Results of plugins: parsed, and as the plugin wrote them.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::attachment::{Address, Dns};
use super::list::Version;

/// The result of an attachment. Stored and passed back to plugins as they wrote it, including
/// fields unknown to hull.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "Value", into = "Value")]
pub struct CniResult {
    raw: Value,
    /// Interfaces in the namespace, and their counterparts on the host.
    pub interfaces: Vec<Interface>,
    /// Addresses of these interfaces.
    pub ips: Vec<AssignedIp>,
    /// Routes in the namespace.
    pub routes: Vec<Route>,
    /// Name resolution; often empty.
    pub dns: Dns,
}

/// An interface that a plugin created.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Interface {
    /// Its name.
    pub name: String,
    /// Its hardware address, if that has six bytes.
    pub mac: Option<[u8; 6]>,
    /// Its MTU, if reported (since 1.1.0).
    pub mtu: Option<u32>,
    /// The network namespace's path; `None` for interfaces of the host.
    pub sandbox: Option<String>,
}

/// An address that a plugin assigned.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AssignedIp {
    /// Address with the prefix of its network.
    pub address: Address,
    /// Gateway for a default route.
    pub gateway: Option<IpAddr>,
    /// Index of the interface, if reported.
    pub interface: Option<usize>,
}

/// A route that a plugin set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Route {
    /// Destination.
    pub destination: Address,
    /// Next hop; `None` is the gateway of the address of the same family.
    pub gateway: Option<IpAddr>,
    /// MTU of the route (since 1.1.0).
    pub mtu: Option<u32>,
    /// Metric (since 1.1.0).
    pub priority: Option<u32>,
}

impl CniResult {
    /// Parses a plugin's output, and converts it to the list's version.
    pub(super) fn read(output: &[u8], version: Version) -> Result<CniResult, String> {
        if output.trim_ascii().is_empty() {
            return Err("it is empty".to_owned());
        }
        let raw: Value =
            serde_json::from_slice(output).map_err(|error| format!("no JSON: {error}"))?;
        let mut result = CniResult::try_from(raw)?;
        result.convert(version)?;
        Ok(result)
    }

    /// [`Self::read`] for the fuzz targets, for the list's version of this name.
    ///
    /// # Errors
    /// No result, or no version.
    #[cfg(fuzzing)]
    pub fn read_for_fuzzing(output: &[u8], version: &str) -> Result<CniResult, String> {
        Self::read(output, Version::read(version)?)
    }

    /// The plugin's JSON, with the list's version.
    pub fn as_json(&self) -> &Value {
        &self.raw
    }

    /// The interface with this name in the namespace.
    pub fn interface(&self, ifname: &str) -> Option<&Interface> {
        self.interfaces
            .iter()
            .find(|interface| interface.name == ifname && interface.sandbox.is_some())
    }

    /// Addresses of the interface with this name in the namespace, including those without a
    /// reported interface.
    pub fn addresses(&self, ifname: &str) -> impl Iterator<Item = &AssignedIp> {
        self.ips.iter().filter(move |ip| {
            match ip.interface.and_then(|index| self.interfaces.get(index)) {
                Some(interface) => interface.name == ifname && interface.sandbox.is_some(),
                None => true,
            }
        })
    }

    /// Converts a result that a plugin wrote in another version than requested. The supported
    /// versions differ in one field, which older ones require, and in fields that older ones
    /// ignore.
    fn convert(&mut self, version: Version) -> Result<(), String> {
        match self.raw.get("cniVersion") {
            None => {}
            Some(Value::String(text)) if text.is_empty() => {}
            Some(Value::String(text)) => drop(Version::read(text)?),
            Some(other) => return Err(format!("cniVersion is {other}")),
        }
        self.raw["cniVersion"] = json!(version.name());
        if version >= Version::V1_0_0 {
            return Ok(());
        }
        let ips = self
            .raw
            .get_mut("ips")
            .and_then(Value::as_array_mut)
            .into_iter()
            .flatten();
        for (raw, ip) in ips.zip(&self.ips) {
            if raw.get("version").is_none() {
                raw["version"] = json!(if ip.address.ip.is_ipv4() { "4" } else { "6" });
            }
        }
        Ok(())
    }
}

impl TryFrom<Value> for CniResult {
    type Error = String;

    fn try_from(raw: Value) -> Result<CniResult, String> {
        let object = raw.as_object().ok_or("it is no JSON object")?;
        let dns = match object.get("dns") {
            None | Some(Value::Null) => Dns::default(),
            Some(dns) => Dns::deserialize(dns).map_err(|error| format!("dns: {error}"))?,
        };
        let interfaces = each(object, "interfaces", interface)?;
        let ips = each(object, "ips", assigned_ip)?;
        let routes = each(object, "routes", route)?;
        Ok(CniResult {
            raw,
            interfaces,
            ips,
            routes,
            dns,
        })
    }
}

impl From<CniResult> for Value {
    fn from(result: CniResult) -> Value {
        result.raw
    }
}

fn each<T>(
    object: &Map<String, Value>,
    key: &str,
    read: impl Fn(&Value) -> Result<T, String>,
) -> Result<Vec<T>, String> {
    match object.get(key) {
        None | Some(Value::Null) => Ok(Vec::new()),
        Some(Value::Array(values)) => values
            .iter()
            .map(|value| read(value).map_err(|why| format!("{key}: {why}")))
            .collect(),
        Some(_) => Err(format!("{key} is no list")),
    }
}

/// A string; absent, null and empty are all `None`, as in the plugins' own library.
fn text<'a>(value: &'a Value, key: &str) -> Result<Option<&'a str>, String> {
    match value.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) => Ok(Some(text.as_str()).filter(|text| !text.is_empty())),
        Some(other) => Err(format!("{key} is {other}")),
    }
}

fn number(value: &Value, key: &str) -> Option<u32> {
    value
        .get(key)
        .and_then(Value::as_u64)
        .and_then(|number| number.try_into().ok())
        .filter(|number| *number != 0)
}

fn ip(value: &Value, key: &str) -> Result<Option<IpAddr>, String> {
    text(value, key)?
        .map(|text| {
            text.parse()
                .map_err(|_| format!("{key} {text:?} is no address"))
        })
        .transpose()
}

fn address(value: &Value, key: &str) -> Result<Address, String> {
    text(value, key)?
        .ok_or_else(|| format!("no {key}"))?
        .parse()
}

fn interface(value: &Value) -> Result<Interface, String> {
    Ok(Interface {
        name: text(value, "name")?.unwrap_or_default().to_owned(),
        mac: text(value, "mac")?.and_then(mac),
        mtu: number(value, "mtu"),
        sandbox: text(value, "sandbox")?.map(str::to_owned),
    })
}

fn assigned_ip(value: &Value) -> Result<AssignedIp, String> {
    Ok(AssignedIp {
        address: address(value, "address")?,
        gateway: ip(value, "gateway")?,
        // Some plugins write -1 for no interface.
        interface: value
            .get("interface")
            .and_then(Value::as_u64)
            .and_then(|index| index.try_into().ok()),
    })
}

fn route(value: &Value) -> Result<Route, String> {
    Ok(Route {
        destination: address(value, "dst")?,
        gateway: ip(value, "gw")?,
        mtu: number(value, "mtu"),
        priority: number(value, "priority"),
    })
}

fn mac(text: &str) -> Option<[u8; 6]> {
    let mut bytes = [0; 6];
    let mut parts = text.split(':');
    for byte in &mut bytes {
        *byte = parts
            .next()
            .filter(|part| part.len() == 2)
            .and_then(|part| u8::from_str_radix(part, 16).ok())?;
    }
    parts.next().is_none().then_some(bytes)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    const BRIDGE: &str = r#"{
        "cniVersion": "1.0.0",
        "interfaces": [
            {"name": "hull0", "mac": "a2:00:00:00:00:01"},
            {"name": "veth1", "mac": "a2:00:00:00:00:02"},
            {"name": "eth0", "mac": "a2:00:00:00:00:03", "sandbox": "/run/netns/a", "mtu": 1400}
        ],
        "ips": [
            {"interface": 2, "address": "10.87.0.2/16", "gateway": "10.87.0.1"},
            {"interface": 2, "address": "fd00::2/64", "gateway": ""},
            {"interface": 0, "address": "10.87.0.1/16"},
            {"interface": -1, "address": "10.87.0.3/16"}
        ],
        "routes": [{"dst": "0.0.0.0/0"}, {"dst": "10.1.0.0/24", "gw": "10.87.0.9", "priority": 5}],
        "dns": {"nameservers": ["10.87.0.1"]},
        "unknown": [1]
    }"#;

    #[test]
    fn numbers_that_are_kept_stay_the_same() {
        let text = BRIDGE.replace(
            "[1]",
            "[16666666666666666666666666666666666666666666666666]",
        );
        let result = CniResult::read(text.as_bytes(), Version::V1_0_0).unwrap();
        let kept = result.as_json().to_string();
        let again = CniResult::read(kept.as_bytes(), Version::V1_0_0).unwrap();
        assert_eq!(again, result);
    }

    #[test]
    fn a_result_is_read_and_kept() {
        let result = CniResult::read(BRIDGE.as_bytes(), Version::V1_0_0).unwrap();
        let interface = result.interface("eth0").unwrap();
        assert_eq!(interface.mac, Some([0xa2, 0, 0, 0, 0, 3]));
        assert_eq!(interface.mtu, Some(1400));
        assert_eq!(
            result.interface("veth1"),
            None,
            "the host's end is none of the container's"
        );
        let addresses: Vec<String> = result
            .addresses("eth0")
            .map(|ip| ip.address.to_string())
            .collect();
        assert_eq!(addresses, ["10.87.0.2/16", "fd00::2/64", "10.87.0.3/16"]);
        assert_eq!(result.ips[0].gateway, Some("10.87.0.1".parse().unwrap()));
        assert_eq!(result.ips[1].gateway, None);
        assert_eq!(result.routes[1].priority, Some(5));
        assert_eq!(result.dns.nameservers, ["10.87.0.1"]);
        assert_eq!(
            result.as_json(),
            &serde_json::from_str::<Value>(BRIDGE).unwrap()
        );
        let kept = serde_json::to_string(&result).unwrap();
        assert_eq!(serde_json::from_str::<CniResult>(&kept).unwrap(), result);
    }

    #[test]
    fn a_result_becomes_one_of_the_lists_version() {
        let result = CniResult::read(BRIDGE.as_bytes(), Version::V0_4_0).unwrap();
        assert_eq!(result.as_json()["cniVersion"], "0.4.0");
        assert_eq!(result.as_json()["ips"][1]["version"], "6");
        let result = CniResult::read(b"{}", Version::V1_1_0).unwrap();
        assert_eq!(result.as_json(), &json!({ "cniVersion": "1.1.0" }));
    }

    #[test]
    fn what_is_no_result() {
        for (output, why) in [
            ("", "it is empty"),
            (" \n", "it is empty"),
            ("hello", "no JSON"),
            ("[]", "no JSON object"),
            (r#"{"cniVersion": "0.2.0"}"#, "0.2.0"),
            (r#"{"cniVersion": 1}"#, "cniVersion is 1"),
            (
                r#"{"ips": [{"address": "10.0.0.256/8"}]}"#,
                "ips: invalid address",
            ),
            (r#"{"ips": {}}"#, "ips is no list"),
            (r#"{"routes": [{}]}"#, "routes: no dst"),
            (r#"{"dns": 7}"#, "dns: "),
        ] {
            let error = CniResult::read(output.as_bytes(), Version::V1_0_0).unwrap_err();
            assert!(error.contains(why), "{output}: {error}");
        }
    }

    #[test]
    fn hardware_addresses() {
        assert_eq!(
            mac("00:11:22:33:44:ff"),
            Some([0, 0x11, 0x22, 0x33, 0x44, 0xff])
        );
        for text in [
            "",
            "00:11:22:33:44",
            "00:11:22:33:44:55:66",
            "0:1:2:3:4:5",
            "zz:11:22:33:44:55",
        ] {
            assert_eq!(mac(text), None, "{text}");
        }
    }
}
