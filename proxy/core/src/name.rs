//! What policy calls things by: a port of a service, and an object of the API.
//!
//! Why so many `Arc<str>`: a name is told once, with policy, and then stands in every metric, log line and key.

use std::{fmt, str::FromStr, sync::Arc};

/// One port of one service: `<namespace>/<name>:<port>`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ServiceName {
    /// The service's namespace.
    pub namespace: Arc<str>,
    /// The service's name.
    pub name: Arc<str>,
    /// The service's port (not the pod's).
    pub port: u16,
}

/// The object that a rule came from, for metrics, logs and explanations.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ObjectRef {
    /// Kind, such as `HTTPRoute`.
    pub kind: Arc<str>,
    /// Namespace.
    pub namespace: Arc<str>,
    /// Name.
    pub name: Arc<str>,
}

/// A service name that is not `<namespace>/<name>:<port>`.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not <namespace>/<name>:<port>")]
pub struct NameError(String);

impl fmt::Display for ServiceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}:{}", self.namespace, self.name, self.port)
    }
}

impl FromStr for ServiceName {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        let parts = || {
            let (namespace, rest) = text.split_once('/')?;
            let (name, port) = rest.split_once(':')?;
            let port = port.parse().ok()?;
            let ok = !namespace.is_empty() && !name.is_empty() && !name.contains('/');
            ok.then(|| Self { namespace: namespace.into(), name: name.into(), port })
        };
        parts().ok_or_else(|| NameError(text.to_owned()))
    }
}

impl fmt::Display for ObjectRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}/{}", self.kind, self.namespace, self.name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn service_names() {
        let name: ServiceName = "shop/web:80".parse().unwrap();
        assert_eq!(name.to_string(), "shop/web:80");
        for bad in ["", "shop", "shop/web", "shop/web:x", "/web:80", "shop/:80", "a/b/c:80", "a/b:70000"] {
            assert!(bad.parse::<ServiceName>().is_err(), "{bad:?}");
        }
    }
}
