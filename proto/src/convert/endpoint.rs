//! `Endpoint`: one pod's port.
//!
//! Why the service's namespace comes along: most endpoints live where their service does, and a name that
//! is the same ten thousand times is left out.

use std::{collections::BTreeMap, net::SocketAddr};

use weft_core::{
    identity::SpiffeId,
    policy::{Endpoint, EndpointHealth, Tunnel},
};

use super::{
    Invalid, Problem,
    common::{At, MAX_LABEL, address, in_range, port, some_text, text, to_address, trust_domain, uid},
    decode,
};
use crate::pb::v1::{self, endpoint::Health, endpoint::Tunnel as PbTunnel};

/// Labels of an endpoint.
const MAX_LABELS: usize = 8;
/// Weight of an endpoint: sums of ten thousand stay in 64 bits, and a billionth is no share.
const MAX_WEIGHT: u32 = 1_000_000;

/// Reads an endpoint of a service in `namespace`.
///
/// # Errors
/// The first field that cannot be taken.
pub fn parse(body: &[u8], namespace: &str) -> Result<Endpoint, Invalid> {
    convert(&At::root("Endpoint"), &decode("Endpoint", body)?, namespace)
}

/// Converts an endpoint of a service in `namespace`.
///
/// # Errors
/// The first field that cannot be taken.
pub fn from_pb(endpoint: &v1::Endpoint, namespace: &str) -> Result<Endpoint, Invalid> {
    convert(&At::root("Endpoint"), endpoint, namespace)
}

pub(super) fn convert(at: &At<'_>, pb: &v1::Endpoint, namespace: &str) -> Result<Endpoint, Invalid> {
    let tunnel = match PbTunnel::try_from(pb.tunnel) {
        Ok(PbTunnel::None) => Tunnel::None,
        Ok(PbTunnel::Weft) => Tunnel::Weft,
        Ok(PbTunnel::Unspecified) => {
            return Err(at.field("tunnel").bad(Problem::Unspecified("TUNNEL_NONE or TUNNEL_WEFT")));
        }
        Err(_) => return Err(at.field("tunnel").bad(Problem::UnknownValue(pb.tunnel))),
    };
    let health = match Health::try_from(pb.health) {
        Ok(Health::Unspecified | Health::Healthy) => EndpointHealth::Healthy,
        Ok(Health::Draining) => EndpointHealth::Draining,
        Ok(Health::Unhealthy) => EndpointHealth::Unhealthy,
        Err(_) => return Err(at.field("health").bad(Problem::UnknownValue(pb.health))),
    };
    let identity = if pb.service_account.is_empty() {
        if tunnel == Tunnel::Weft {
            return Err(at.field("service_account").bad(Problem::NoIdentity));
        }
        None
    } else {
        let domain = trust_domain(&at.field("trust_domain"), &pb.trust_domain)?;
        let namespace = if pb.namespace.is_empty() { namespace } else { &pb.namespace };
        let id = SpiffeId::new(&domain, namespace, &pb.service_account);
        Some(id.map_err(|e| at.field("service_account").bad(e))?)
    };
    let weight = pb.weight.unwrap_or(1);
    in_range(&at.field("weight"), weight.into(), 0..=MAX_WEIGHT.into())?;
    if pb.labels.len() > MAX_LABELS {
        let problem = Problem::TooMany { count: pb.labels.len(), max: MAX_LABELS };
        return Err(at.field("labels").bad(problem));
    }
    let mut labels = BTreeMap::new();
    for (key, value) in &pb.labels {
        let at = at.field("labels");
        labels.insert(some_text(&at, key, MAX_LABEL)?, text(&at, value, MAX_LABEL)?);
    }
    let zone = pb.locality.as_ref().map_or("", |locality| &locality.zone);
    Ok(Endpoint {
        uid: uid(&at.field("uid"), &pb.uid)?,
        address: SocketAddr::new(
            address(&at.field("address"), &pb.address)?,
            port(&at.field("port"), pb.port)?,
        ),
        weight,
        health,
        identity,
        tunnel,
        zone: text(&at.field("locality").field("zone"), zone, MAX_LABEL)?,
        node: text(&at.field("node"), &pb.node, MAX_LABEL)?,
        labels,
    })
}

/// Writes an endpoint. The namespace is always written: the encoding does not depend on the service.
pub fn to_pb(endpoint: &Endpoint) -> v1::Endpoint {
    let health = match endpoint.health {
        EndpointHealth::Healthy => Health::Healthy,
        EndpointHealth::Draining => Health::Draining,
        EndpointHealth::Unhealthy => Health::Unhealthy,
    };
    let tunnel = match endpoint.tunnel {
        Tunnel::None => PbTunnel::None,
        Tunnel::Weft => PbTunnel::Weft,
    };
    let identity = endpoint.identity.as_ref();
    let part = |of: fn(&SpiffeId) -> &str| identity.map(of).unwrap_or_default().to_owned();
    v1::Endpoint {
        address: to_address(endpoint.address.ip()),
        port: endpoint.address.port().into(),
        weight: Some(endpoint.weight.min(MAX_WEIGHT)),
        health: health.into(),
        service_account: part(SpiffeId::service_account),
        trust_domain: part(SpiffeId::trust_domain),
        namespace: part(SpiffeId::namespace),
        tunnel: tunnel.into(),
        locality: (!endpoint.zone.is_empty())
            .then(|| v1::Locality { region: String::new(), zone: endpoint.zone.to_string() }),
        node: endpoint.node.to_string(),
        labels: endpoint
            .labels
            .iter()
            .take(MAX_LABELS)
            .map(|(key, value)| (key.to_string(), value.to_string()))
            .collect(),
        uid: endpoint.uid.to_string(),
    }
}
