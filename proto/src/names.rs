//! Resource names, typed: `<kind>/<namespace>/<name>[:port]` and its few variations.
//!
//! Why one type: a name is built on one side and taken apart on the other, and what may be asked for is
//! decided by it. There is exactly one spelling of each name; a text that parses but would be written
//! differently (`+80`, an expanded v6 address) is refused, so that two names never mean one resource.

use std::{fmt, net::SocketAddr, str::FromStr, sync::Arc};

use weft_core::{
    identity::{PodUid, TrustDomain},
    policy::ServiceName,
};

use crate::ads::ResourceType;

/// The longest name of a resource, in bytes: two Kubernetes names, a port, a uid, and room.
pub const MAX_NAME_LEN: usize = 768;
/// Kubernetes names (DNS labels and subdomains) end here.
const MAX_SEGMENT_LEN: usize = 253;

/// The name of one resource or collection.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Name {
    /// `svc/<ns>/<name>:<port>`: a `Service`.
    Service(ServiceName),
    /// `ip/<addr>:<port>` (v6 in brackets): the `Service` at that address. Build it by [`Name::address`].
    Address(SocketAddr),
    /// `host/<authority>`: the `Service` of that authority.
    Host(Arc<str>),
    /// `route/<ns>/<name>:<port>`: a `Route`.
    Route(ServiceName),
    /// `ep/<ns>/<name>:<port>/*`: all `Endpoint`s of a service.
    Collection(ServiceName),
    /// `ep/<ns>/<name>:<port>/<pod-uid>`: one `Endpoint`.
    Endpoint(ServiceName, PodUid),
    /// `ep/<ns>/<name>:<port>/$head`: the `CollectionHead`.
    Head(ServiceName),
    /// `authz/<workload-uid>/<port>`: an `Authorization`; port 0 is every other port.
    Authorization(PodUid, u16),
    /// `trust/<trust-domain>`: a `TrustBundle`.
    TrustBundle(TrustDomain),
    /// `self/<workload-uid>`: a `WorkloadConfig`.
    Workload(PodUid),
}

/// Why a text is not the name of a resource.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{name:?} is not a resource name: {reason}")]
pub struct NameError {
    /// The text, cut to a length that a log can bear.
    pub name: String,
    /// What is wrong and what it should be.
    pub reason: &'static str,
}

impl Name {
    /// The name of whatever is at `address`; a v4 address in v6 clothing is the v4 address.
    pub fn address(address: SocketAddr) -> Self {
        Self::Address(canonical(address))
    }

    /// The type of the resource that has this name.
    pub fn resource_type(&self) -> ResourceType {
        match self {
            Self::Service(_) | Self::Address(_) | Self::Host(_) => ResourceType::Service,
            Self::Route(_) => ResourceType::Route,
            Self::Collection(_) | Self::Endpoint(..) | Self::Head(_) => ResourceType::Endpoint,
            Self::Authorization(..) => ResourceType::Authorization,
            Self::TrustBundle(_) => ResourceType::TrustBundle,
            Self::Workload(_) => ResourceType::WorkloadConfig,
        }
    }

    fn parse(text: &str) -> Result<Self, &'static str> {
        if text.len() > MAX_NAME_LEN {
            return Err("it is too long");
        }
        let (kind, rest) = text.split_once('/').ok_or("it must be <kind>/<what>")?;
        let name = match kind {
            "svc" => Self::Service(service(rest)?),
            "route" => Self::Route(service(rest)?),
            "ip" => {
                let address: SocketAddr = rest.parse().map_err(|_| "it must be ip/<address>:<port>")?;
                if address.port() == 0 {
                    return Err("port 0 is no destination");
                }
                // Without the zone of a link-local address, and with v4 as v4.
                if canonical(address) != address {
                    return Err("write a v4 address as v4, and no zone");
                }
                Self::Address(address)
            }
            "host" => {
                let ok = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b".-_:[]".contains(&b);
                if rest.is_empty() || rest.len() > MAX_SEGMENT_LEN + 6 || !rest.bytes().all(ok) {
                    return Err("it must be host/<authority> in lower case");
                }
                Self::Host(rest.into())
            }
            "ep" => {
                let (of, member) =
                    rest.rsplit_once('/').ok_or("it must be ep/<ns>/<name>:<port>/<member>")?;
                let of = service(of)?;
                match member {
                    "*" => Self::Collection(of),
                    "$head" => Self::Head(of),
                    uid => Self::Endpoint(of, pod(uid)?),
                }
            }
            "authz" => {
                let (uid, port) = rest.split_once('/').ok_or("it must be authz/<uid>/<port>")?;
                Self::Authorization(pod(uid)?, port.parse().map_err(|_| "the port must be 0 to 65535")?)
            }
            "trust" => {
                Self::TrustBundle(TrustDomain::new(rest).map_err(|_| "it must end in a trust domain")?)
            }
            "self" => Self::Workload(pod(rest)?),
            _ => return Err("its kind must be svc, ip, host, route, ep, authz, trust or self"),
        };
        if name.to_string() != text {
            return Err("it is not in its one canonical spelling");
        }
        Ok(name)
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Service(name) => write!(f, "svc/{name}"),
            Self::Address(address) => write!(f, "ip/{address}"),
            Self::Host(authority) => write!(f, "host/{authority}"),
            Self::Route(name) => write!(f, "route/{name}"),
            Self::Collection(name) => write!(f, "ep/{name}/*"),
            Self::Endpoint(name, uid) => write!(f, "ep/{name}/{uid}"),
            Self::Head(name) => write!(f, "ep/{name}/$head"),
            Self::Authorization(uid, port) => write!(f, "authz/{uid}/{port}"),
            Self::TrustBundle(domain) => write!(f, "trust/{domain}"),
            Self::Workload(uid) => write!(f, "self/{uid}"),
        }
    }
}

impl FromStr for Name {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        Self::parse(text).map_err(|reason| NameError { name: text.chars().take(100).collect(), reason })
    }
}

/// Checks a namespace, a service or a service port the way Kubernetes does, so that a name has no
/// character that means something in it (`/`, `:`, `*`, `$`).
pub(crate) fn is_segment(text: &str) -> bool {
    let ok = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-' || b == b'.';
    !text.is_empty() && text.len() <= MAX_SEGMENT_LEN && text.bytes().all(ok)
}

fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

fn service(text: &str) -> Result<ServiceName, &'static str> {
    let name: ServiceName = text.parse().map_err(|_| "it must name <namespace>/<service>:<port>")?;
    if !is_segment(&name.namespace) || !is_segment(&name.name) {
        return Err("namespace and service must be lower-case letters, digits, '-' and '.'");
    }
    if name.port == 0 {
        return Err("a service has no port 0");
    }
    Ok(name)
}

fn pod(text: &str) -> Result<PodUid, &'static str> {
    PodUid::new(text).map_err(|_| "a uid is 1 to 63 lower-case letters, digits and '-'")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_is_written_as_it_is_read() {
        for text in [
            "svc/shop/cart:80",
            "ip/10.1.2.3:443",
            "ip/[fd00::1]:443",
            "host/api.example.com:443",
            "route/shop/cart:80",
            "ep/shop/cart:80/*",
            "ep/shop/cart:80/$head",
            "ep/shop/cart:80/6f1c-22",
            "authz/6f1c-22/0",
            "trust/cluster.local",
            "self/6f1c-22",
        ] {
            assert_eq!(text.parse::<Name>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn there_is_no_second_spelling() {
        for text in [
            "",
            "svc",
            "svc/shop/cart",
            "svc/shop/cart:0",
            "svc/shop/cart:+80",
            "svc/shop/cart:080",
            "svc/Shop/cart:80",
            "svc/shop/ca*rt:80",
            "svc/shop/a/cart:80",
            "ip/10.1.2.3",
            "ip/10.1.2.3:0",
            "ip/[::ffff:10.1.2.3]:80",
            "ip/[0:0::1]:80",
            "ip/[fe80::1%3]:80",
            "host/",
            "host/API",
            "ep/shop/cart:80",
            "ep/shop/cart:80/",
            "ep/shop/cart:80/UID",
            "authz/6f1c/65536",
            "authz/6f1c",
            "trust/",
            "self/a/b",
            "other/x",
        ] {
            assert!(text.parse::<Name>().is_err(), "{text:?} was taken");
        }
        assert!(format!("host/{}", "a".repeat(1_000)).parse::<Name>().is_err());
    }

    #[test]
    fn mapped_v4_is_v4() {
        let mapped = "[::ffff:10.0.0.1]:80".parse().unwrap();
        assert_eq!(Name::address(mapped).to_string(), "ip/10.0.0.1:80");
    }
}
