//! `hull network`: networks in which containers find each other by their names.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use hull_engine::endpoint::{self, Endpoint};
use hull_engine::inspect::NetworkFilter;
use hull_engine::listing::PruneFilter;
use hull_engine::networks::{self, NetworkRequest};
use hull_engine::{inspect, publish, values};
use hull_network::cni::{Address, CONFIGURATION_DIRECTORY};
use serde_json::Value;

use super::{agreed, config_for_root, exists, for_each};
use crate::error::{ErrorKind, Result};
use crate::format::{self, ListFormat, ObjectFormat, Row};
use crate::output::{self, Table};

/// Arguments of `network`.
#[derive(Debug, clap::Args)]
#[command(subcommand_required = true, arg_required_else_help = true)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Create a network and print its id
    Create {
        /// Subnet, like 10.20.0.0/24; also one of IPv6
        #[arg(long, value_name = "SUBNET", value_parser = subnet)]
        subnet: Vec<Address>,
        /// The host's address in a subnet; the first one when absent
        #[arg(long, value_name = "ADDRESS")]
        gateway: Vec<IpAddr>,
        /// The part of a subnet that containers get addresses of, like 10.20.0.128/25
        #[arg(long, value_name = "SUBNET", value_parser = subnet)]
        ip_range: Vec<Address>,
        /// Containers reach each other and the host, and nothing outside
        #[arg(long)]
        internal: bool,
        /// Without IPv6: true or false
        #[arg(long, value_name = "YES", default_value_t = true, action = clap::ArgAction::Set,
              num_args = 0..=1, default_missing_value = "true", require_equals = true)]
        ipv6: bool,
        /// What makes it: bridge
        #[arg(short, long, value_name = "NAME", default_value = "bridge", value_parser = driver)]
        driver: String,
        /// Set a label
        #[arg(long, value_name = "KEY[=VALUE]", value_parser = values::label)]
        label: Vec<(String, String)>,
        /// Its name
        #[arg(value_name = "NAME")]
        name: String,
    },
    /// List networks
    #[command(visible_alias = "list")]
    Ls {
        /// Show only networks that match; may be given several times
        #[arg(short, long = "filter", value_name = "KEY=VALUE", value_parser = NetworkFilter::parse)]
        filters: Vec<NetworkFilter>,
        /// Show names only
        #[arg(short, long)]
        quiet: bool,
        /// Do not shorten ids
        #[arg(long)]
        no_trunc: bool,
        /// Print JSON
        #[arg(long, conflicts_with = "quiet")]
        json: bool,
        /// Print with a template of Go's, "json", or "table TEMPLATE"
        #[arg(long, value_name = "FORMAT", value_parser = ListFormat::parse, conflicts_with = "json")]
        format: Option<ListFormat>,
    },
    /// Tell by the exit status whether there is a network: 0 or 1
    Exists {
        /// Name or id
        #[arg(value_name = "NETWORK")]
        network: String,
    },
    /// Show all that is known of networks, as JSON
    Inspect {
        /// Print a line for each with a template of Go's, or "json"
        #[arg(short, long, value_name = "FORMAT", value_parser = ObjectFormat::parse)]
        format: Option<ObjectFormat>,
        /// Names or ids
        #[arg(value_name = "NETWORK", required = true)]
        networks: Vec<String>,
    },
    /// Put a container into one more network, at once if it runs
    Connect {
        /// Another name of the container in the network
        #[arg(long, value_name = "NAME", value_parser = values::hostname)]
        alias: Vec<String>,
        /// Another name for another container, for this one alone
        #[arg(long, value_name = "CONTAINER[:NAME]", value_parser = endpoint::link)]
        link: Vec<(String, String)>,
        /// Address in the network
        #[arg(long, value_name = "ADDRESS", value_parser = publish::ip)]
        ip: Option<Ipv4Addr>,
        /// IPv6 address in the network
        #[arg(long, value_name = "ADDRESS", value_parser = publish::ip6)]
        ip6: Option<Ipv6Addr>,
        /// Name or id of the network
        #[arg(value_name = "NETWORK")]
        network: String,
        /// Name or id of the container
        #[arg(value_name = "CONTAINER")]
        container: String,
    },
    /// Take a container out of a network, at once if it runs
    Disconnect {
        /// Accepted for Docker's sake
        #[arg(short, long, hide = true)]
        force: bool,
        /// Name or id of the network
        #[arg(value_name = "NETWORK")]
        network: String,
        /// Name or id of the container
        #[arg(value_name = "CONTAINER")]
        container: String,
    },
    /// Remove networks that no container is in
    #[command(visible_alias = "remove")]
    Rm {
        /// One that does not exist is no error
        #[arg(short, long)]
        force: bool,
        /// Names or ids
        #[arg(value_name = "NETWORK", required = true)]
        networks: Vec<String>,
    },
    /// Remove all networks that no container is in
    Prune {
        /// Remove only networks that match: until=TIME, label=KEY[=VALUE], label!=KEY[=VALUE]
        #[arg(long = "filter", value_name = "KEY=VALUE", value_parser = PruneFilter::parse)]
        filters: Vec<PruneFilter>,
        /// Do not ask
        #[arg(short, long)]
        force: bool,
    },
}

fn subnet(text: &str) -> std::result::Result<Address, String> {
    match text.parse::<Address>() {
        Ok(address) if address.prefix.is_some() => Ok(address),
        _ => Err(format!(
            "invalid subnet {text:?}: give ADDRESS/BITS, like 10.20.0.0/24"
        )),
    }
}

fn driver(text: &str) -> std::result::Result<String, String> {
    match text {
        "" | "bridge" => Ok("bridge".to_owned()),
        _ => Err(format!(
            "not supported: network driver {text:?}: networks of the host's CNI plugins are files \
             in {CONFIGURATION_DIRECTORY}"
        )),
    }
}

/// Manages networks.
pub fn execute(args: Args) -> Result<u8> {
    let config = config_for_root()?;
    let paths = config.paths();
    if !matches!(args.command, Command::Ls { .. }) {
        networks::need_root(&config)?;
    }
    match args.command {
        Command::Create {
            subnet,
            gateway,
            ip_range,
            internal,
            ipv6,
            label,
            name,
            ..
        } => {
            let created = networks::create(
                &paths,
                NetworkRequest {
                    name,
                    subnets: subnet,
                    gateways: gateway,
                    ranges: ip_range,
                    internal,
                    without_ipv6: !ipv6,
                    labels: label.into_iter().collect(),
                },
            )?;
            output::print(format!("{}\n", created.id))?;
        }
        Command::Ls {
            filters,
            quiet,
            no_trunc,
            json,
            format,
        } => {
            let rows = inspect::select_networks(&paths, &filters)?;
            let fields = || rows.iter().map(|row| fields(row, no_trunc)).collect();
            if !format::print_list(format.as_ref(), quiet, &HEADINGS, fields)? {
                print(&rows, quiet, json)?;
            }
        }
        Command::Exists { network } => return exists(inspect::network(&paths, &network)),
        Command::Inspect { format, networks } => {
            return super::inspect::print_each(&networks, format.as_ref(), |name| {
                inspect::network(&paths, name)
            });
        }
        Command::Connect {
            alias,
            link,
            ip,
            ip6,
            network,
            container,
        } => {
            let endpoint = Endpoint {
                aliases: alias,
                links: link,
                ip,
                ip6,
                ..Endpoint::default()
            };
            endpoint::connect(&config, &network, &container, endpoint)?;
        }
        Command::Disconnect {
            network, container, ..
        } => endpoint::disconnect(&config, &network, &container)?,
        Command::Rm {
            force,
            networks: names,
        } => {
            return for_each(&names, |name| match networks::remove(&paths, name) {
                Err(error) if force && error.kind == ErrorKind::NotFound => Ok(()),
                removed => removed.and_then(|()| output::print(format!("{name}\n"))),
            });
        }
        Command::Prune { filters, force } => {
            if !force && !agreed("all networks that no container is in")? {
                return Ok(0);
            }
            let removed = networks::prune(&paths, &filters)?;
            output::print(
                removed
                    .iter()
                    .map(|name| format!("{name}\n"))
                    .collect::<String>(),
            )?;
        }
    }
    Ok(0)
}

/// The fields of `network ls --format`, with the headings of a table.
const HEADINGS: [(&str, &str); 8] = [
    ("ID", "NETWORK ID"),
    ("Name", "NAME"),
    ("Driver", "DRIVER"),
    ("Scope", "SCOPE"),
    ("IPv6", "IPV6"),
    ("Internal", "INTERNAL"),
    ("Labels", "LABELS"),
    ("CreatedAt", "CREATED AT"),
];

fn fields(network: &Value, no_trunc: bool) -> Row {
    let text = |key: &str| network[key].as_str().unwrap_or_default();
    let flag = |key: &str| network[key].as_bool().unwrap_or_default().to_string();
    let labels = network["Labels"].as_object().into_iter().flatten();
    let labels: BTreeMap<String, String> = labels
        .filter_map(|(key, value)| Some((key.clone(), value.as_str()?.to_owned())))
        .collect();
    Row::new()
        .field("ID", id(network, no_trunc))
        .field("Name", text("Name"))
        .field("Driver", text("Driver"))
        .field("Scope", text("Scope"))
        .field("IPv6", flag("EnableIPv6"))
        .field("Internal", flag("Internal"))
        .labels(&labels)
        .field("CreatedAt", text("Created"))
}

/// The id of a network; the name of one that is always there.
fn id(network: &Value, no_trunc: bool) -> &str {
    let name = network["Name"].as_str().unwrap_or_default();
    let id = network["Id"].as_str().unwrap_or(name);
    match no_trunc {
        true => id,
        false => id.get(..12).unwrap_or(id),
    }
}

fn print(rows: &[Value], quiet: bool, json: bool) -> Result<()> {
    let text = |row: &Value, key: &str| row[key].as_str().unwrap_or_default().to_owned();
    if quiet {
        let names = rows.iter().map(|row| text(row, "Name") + "\n");
        return output::print(names.collect::<String>());
    }
    if json {
        return output::print_json(&rows);
    }
    let headings = [
        "NETWORK ID",
        "NAME",
        "DRIVER",
        "SCOPE",
        "SUBNETS",
        "INTERNAL",
    ];
    let mut table = Table::new(&headings);
    for row in rows {
        let subnets = row["Subnets"].as_array().into_iter().flatten();
        let subnets: Vec<_> = subnets.filter_map(Value::as_str).collect();
        table.row([
            id(row, false).to_owned(),
            text(row, "Name"),
            text(row, "Driver"),
            text(row, "Scope"),
            subnets.join(", "),
            match row["Internal"].as_bool() {
                Some(true) => "yes".to_owned(),
                _ => String::new(),
            },
        ]);
    }
    table.print()
}
