//! The mesh of the scale bench: its objects, in a folder or at a stand-in for the API server, and changes to them.
//!
//! Every simulated sidecar is a pod of one of the services, ten a service, each with its own address. The first
//! service is the one that everyone uses: it has a hundred pods, of which the first ten are sidecars, so that the
//! others can be restarted without ending anybody's stream.

use std::{fs, net::Ipv4Addr, path::PathBuf};

use anyhow::{Context as _, Result};
use serde_json::{Value, json};

use super::api::Api;

/// Pods of a service, each of which may be a sidecar.
pub(crate) const PODS: usize = 10;
/// Pods of the service that everyone uses.
pub(crate) const PODS_OF_ALL: usize = 100;
/// The service that everyone uses.
pub(crate) const OF_ALL: usize = 0;
/// Where all pods are: `ip route add local` makes them ours.
pub(crate) const POD_RANGE: &str = "10.128.0.0/12";
pub(crate) const PORT: u16 = 8080;

const SERVICE_RANGE: &str = "10.96.0.0/16";
const NAMESPACES: usize = 20;
/// As Kubernetes does it.
const MAX_SLICE: usize = 100;

/// Where the controller reads the objects.
pub(crate) enum Place {
    Folder(PathBuf),
    Kubernetes(Api),
}

pub(crate) struct Mesh {
    place: Place,
    services: Vec<Vec<Pod>>,
    /// Pods ever made: the source of addresses and uids.
    made: u32,
}

#[derive(Clone)]
pub(crate) struct Pod {
    pub(crate) uid: String,
    pub(crate) ip: Ipv4Addr,
    ready: bool,
}

impl Mesh {
    /// Writes all objects.
    pub(crate) fn new(place: Place, services: usize) -> Result<Mesh> {
        if let Place::Folder(folder) = &place {
            fs::create_dir_all(folder)?;
        }
        let mut mesh = Mesh { place, services: Vec::new(), made: 0 };
        for index in 0..services {
            let count = if index == OF_ALL { PODS_OF_ALL } else { PODS };
            let pods = (0..count).map(|_| mesh.pod()).collect();
            mesh.services.push(pods);
        }
        let mut common = vec![json!({
            "apiVersion": "weft.dev/v1alpha1",
            "kind": "MeshConfig",
            "metadata": {"name": "mesh"},
            "spec": {"meshRanges": [POD_RANGE, SERVICE_RANGE]},
        })];
        common.extend((0..NAMESPACES).map(|index| {
            json!({
                "apiVersion": "weft.dev/v1alpha1",
                "kind": "AuthorizationPolicy",
                "metadata": {"name": "callers", "namespace": namespace(index)},
                "spec": {"action": "Allow", "rules": [{"from": [{"namespaces": ["ns-*"]}]}]},
            })
        }));
        if let Place::Kubernetes(_) = &mesh.place {
            common.extend((0..NAMESPACES).map(|index| {
                json!({
                    "apiVersion": "v1",
                    "kind": "Namespace",
                    "metadata": {"name": namespace(index), "labels": {"weft.dev/inject": "enabled"}},
                })
            }));
        }
        mesh.write("common", common)?;
        for index in 0..services {
            mesh.write_service(index)?;
        }
        Ok(mesh)
    }

    pub(crate) fn len(&self) -> usize {
        self.services.len()
    }

    pub(crate) fn pods(&self, service: usize) -> &[Pod] {
        &self.services[service]
    }

    /// The resource that [`Mesh::flip`] changes.
    pub(crate) fn flipped(&self, service: usize, pod: usize) -> String {
        endpoint(service, &self.services[service][pod].uid)
    }

    /// Marks a pod ready or not, by turns.
    pub(crate) fn flip(&mut self, service: usize, pod: usize) -> Result<()> {
        let changed = &mut self.services[service][pod];
        changed.ready = !changed.ready;
        self.write_service(service)
    }

    /// The resources of the pods from position `first` on.
    pub(crate) fn pods_from(&self, service: usize, first: usize) -> Vec<String> {
        self.services[service].iter().skip(first).map(|pod| endpoint(service, &pod.uid)).collect()
    }

    /// Adds pods; returns their resources' names.
    pub(crate) fn add(&mut self, service: usize, count: usize) -> Result<Vec<String>> {
        let new: Vec<Pod> = (0..count).map(|_| self.pod()).collect();
        let names = new.iter().map(|pod| endpoint(service, &pod.uid)).collect();
        self.services[service].extend(new);
        self.write_service(service)?;
        Ok(names)
    }

    /// Removes the pods from position `first` on, `count` of them; returns their resources' names.
    pub(crate) fn remove(&mut self, service: usize, first: usize, count: usize) -> Result<Vec<String>> {
        let gone: Vec<Pod> = self.services[service].drain(first..first + count).collect();
        self.write_service(service)?;
        Ok(gone.iter().map(|pod| endpoint(service, &pod.uid)).collect())
    }

    fn pod(&mut self) -> Pod {
        self.made += 1;
        let ip = Ipv4Addr::from_bits(Ipv4Addr::new(10, 128, 0, 0).to_bits() + self.made);
        Pod { uid: format!("5ca1e000-0000-4000-8000-{:012x}", self.made), ip, ready: true }
    }

    fn write_service(&self, service: usize) -> Result<()> {
        // Pods first: an endpoint without its pod is nobody's.
        let pods = self.services[service].iter().map(|pod| pod.object(service)).collect();
        self.write(&format!("pods-{service:05}"), pods)?;
        self.write(&format!("service-{service:05}"), self.objects(service))
    }

    fn objects(&self, service: usize) -> Vec<Value> {
        let (name, namespace) = (name(service), namespace(service));
        let mut objects = vec![json!({
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": name, "namespace": namespace},
            "spec": {
                "clusterIP": vip(service),
                "selector": {"app": name},
                "ports": [{"name": "http", "port": PORT, "targetPort": PORT, "appProtocol": "http"}],
            },
        })];
        objects.extend(self.services[service].chunks(MAX_SLICE).enumerate().map(|(slice, pods)| {
            let endpoints: Vec<Value> = pods
                .iter()
                .map(|pod| {
                    json!({
                        "addresses": [pod.ip],
                        "conditions": {"ready": pod.ready},
                        "targetRef": {"kind": "Pod", "name": pod.name(service), "namespace": namespace, "uid": pod.uid},
                    })
                })
                .collect();
            json!({
                "apiVersion": "discovery.k8s.io/v1",
                "kind": "EndpointSlice",
                "metadata": {
                    "name": format!("{name}-{slice}"),
                    "namespace": namespace,
                    "labels": {"kubernetes.io/service-name": name},
                },
                "addressType": "IPv4",
                "ports": [{"name": "http", "port": PORT}],
                "endpoints": endpoints,
            })
        }));
        if service.is_multiple_of(10) {
            objects.push(json!({
                "apiVersion": "gateway.networking.k8s.io/v1",
                "kind": "HTTPRoute",
                "metadata": {"name": name, "namespace": namespace},
                "spec": {
                    "parentRefs": [{"group": "", "kind": "Service", "name": name, "port": PORT}],
                    "rules": [{
                        "matches": [{"path": {"type": "PathPrefix", "value": "/"}}],
                        "backendRefs": [{"name": name, "port": PORT}],
                    }],
                },
            }));
        }
        objects
    }

    /// A file by a rename: nobody reads half of it.
    fn write(&self, name: &str, items: Vec<Value>) -> Result<()> {
        match &self.place {
            Place::Kubernetes(api) => api.apply(name, items),
            Place::Folder(folder) => {
                let list = json!({"apiVersion": "v1", "kind": "List", "items": items});
                let (new, path) = (folder.join(".new"), folder.join(format!("{name}.json")));
                fs::write(&new, serde_json::to_vec(&list)?)?;
                fs::rename(&new, &path).with_context(|| format!("cannot write {}", path.display()))?;
            }
        }
        Ok(())
    }
}

impl Pod {
    fn name(&self, service: usize) -> String {
        let (_, number) = self.uid.rsplit_once('-').unwrap_or_default();
        format!("{}-{number}", name(service))
    }

    fn object(&self, service: usize) -> Value {
        let ready = if self.ready { "True" } else { "False" };
        json!({
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {
                "name": self.name(service),
                "namespace": namespace(service),
                "uid": self.uid,
                "labels": {"app": name(service)},
                "annotations": {"weft.dev/injected": "true"},
            },
            "spec": {"serviceAccountName": name(service), "containers": [{"name": "app"}]},
            "status": {
                "phase": "Running",
                "podIP": self.ip,
                "podIPs": [{"ip": self.ip}],
                "conditions": [{"type": "Ready", "status": ready}],
            },
        })
    }
}

pub(crate) fn name(service: usize) -> String {
    format!("service-{service:05}")
}

pub(crate) fn namespace(service: usize) -> String {
    format!("ns-{:02}", service % NAMESPACES)
}

pub(crate) fn vip(service: usize) -> Ipv4Addr {
    // A /16 has room for more services than there are.
    Ipv4Addr::from_bits(Ipv4Addr::new(10, 96, 0, 0).to_bits() + 1 + u32::try_from(service).unwrap_or(0))
}

pub(crate) fn backend(service: usize) -> String {
    format!("{}/{}:{PORT}", namespace(service), name(service))
}

fn endpoint(service: usize, uid: &str) -> String {
    format!("ep/{}/{uid}", backend(service))
}
