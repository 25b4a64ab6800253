//! Snapshots out of resources: what a destination needs, what there is of it, and when that is published.
//!
//! Why joining is done here and not by the sender's order: a snapshot becomes live only when the service,
//! its route and the endpoints of every backend that the route names have all arrived, in whatever order.
//! The old snapshot serves meanwhile. If something stays missing, the new one is published after 15 s with
//! what is there, its unresolved backends marked; where an old one serves, so much later that a stream which died
//! without a word is found out first.
//!
//! Why a snapshot that lost a backend waits a moment, too: when one change switches a route to another backend
//! and deletes the old one, or takes back what an earlier one deleted, nothing says in which order that arrives,
//! and in between nobody could be served. Two seconds later a backend that is not there answers so.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    sync::{Arc, LazyLock, atomic::Ordering},
    time::Duration,
};

use tokio::time::Instant;
use tracing::{debug, info, warn};
use weft_core::policy::{
    Action, Authorization, BackendPolicy, Endpoint, OutboundPolicy, Place, Reach, RouteTable, Service,
    ServiceName,
};
use weft_proto::names::Name;

use super::{Answer, Built, Destination, MadeOf, Routes, State, User, Value, Watched};

impl State {
    /// Joins one destination, and publishes it if it is whole, or if it has warmed for long enough.
    pub(super) fn join(&mut self, address: SocketAddr) {
        let Some(mut destination) = self.destinations.remove(&address) else { return };
        let user = User::Destination(address);
        // Each round may reveal a need that is held already; a policy is three levels deep.
        let joined = loop {
            let earlier = destination.made_of.as_ref().map(|made_of| made_of.route.clone());
            // That there was no route is no last good one: it says nothing about what this one keeps away.
            let earlier = earlier.filter(|route| matches!(route, Routes::Known(_)));
            let joined = self.gather(address, earlier.unwrap_or(Routes::Unusable));
            let fresh = joined.needs.difference(&destination.needs).next().is_some();
            if !fresh {
                break joined;
            }
            let union = destination.needs.union(&joined.needs).cloned().collect();
            self.need(user, &destination.needs, &union);
            destination.needs = union;
        };
        match joined.found {
            Found::Pending => {}
            Found::Nothing => {
                self.shrink(user, &mut destination, joined.needs);
                destination.warming = None;
                destination.absent = None;
                destination.made_of = None;
                self.know(address, Some(Answer::Unknown(Arc::clone(&destination.used))));
                if let Some(watched) = destination.watched.as_ref().filter(|watched| !watched.removed()) {
                    info!(%address, service = %watched.policy().service.name, "destination is gone");
                    watched.remove();
                }
            }
            Found::Policy { made_of, mut missing, absent } => {
                let now = Instant::now();
                let since = *destination.warming.get_or_insert(now);
                // Without a stream nothing can arrive: what serves is better than what is half there.
                let waited =
                    |since: Instant| self.connected.map_or(Duration::ZERO, |up| since.max(up).elapsed());
                let lost: BTreeSet<Name> = absent.difference(&destination.lacks).cloned().collect();
                if destination.made_of.is_none() || lost.is_empty() {
                    destination.absent = None;
                } else if destination.absent.as_ref().is_none_or(|(names, _)| *names != lost) {
                    destination.absent = Some((lost, now));
                }
                let hopes = destination.absent.as_ref().is_some_and(|(_, since)| waited(*since) < HOPE);
                let whole = missing.is_subset(&destination.lacks);
                let patience = match destination.made_of {
                    Some(_) => self.warm + self.silence,
                    None => self.warm,
                };
                if (whole && !hopes) || waited(since) >= patience {
                    if !whole {
                        warn!(%address, service = %made_of.service.name, ?missing, "published although not whole");
                    }
                    destination.warming = None;
                    destination.absent = None;
                    missing.extend(absent);
                    destination.lacks = missing;
                    self.shrink(user, &mut destination, joined.needs);
                    self.publish(address, &mut destination, made_of);
                }
            }
        }
        self.destinations.insert(address, destination);
    }

    /// Drops needs of an older version, and notes which versions are live.
    fn shrink(&mut self, user: User, destination: &mut Destination, needs: BTreeSet<Name>) {
        self.need(user, &destination.needs, &needs);
        destination.needs = needs;
        destination.live = self.versions(&destination.needs);
        // What came in an earlier turn may only now be live.
        self.news.extend(destination.needs.iter().cloned());
    }

    fn versions(&self, needs: &BTreeSet<Name>) -> BTreeMap<Name, String> {
        let held = needs.iter().filter_map(|name| Some((name, self.held.get(name)?)));
        let answered = held.filter(|(_, held)| !matches!(held.value, Value::Pending));
        answered.map(|(name, held)| (name.clone(), held.version.clone())).collect()
    }

    fn publish(&mut self, address: SocketAddr, destination: &mut Destination, made_of: MadeOf) {
        let same = destination.made_of.as_ref().is_some_and(|old| old.is(&made_of));
        let table = match &made_of.route {
            Routes::None => RouteTable::to_service(&made_of.service),
            Routes::Unusable => RouteTable::unusable(),
            Routes::Known(route) => match &route.table {
                Some(table) => table.clone(),
                None => RouteTable::to_service(&made_of.service),
            },
        };
        let policy = || {
            Arc::new(OutboundPolicy {
                service: Arc::clone(&made_of.service),
                routes: table,
                backends: made_of.backends.clone(),
            })
        };
        match &destination.watched {
            Some(watched) if same && !watched.removed() => {}
            Some(watched) => watched.publish(policy()),
            None => {
                let used = destination.used.load(Ordering::Relaxed);
                destination.watched = Some(Arc::new(Watched::new(policy(), used)));
            }
        }
        destination.made_of = Some(made_of);
        if let Some(watched) = &destination.watched {
            self.know(address, Some(Answer::Service(Arc::clone(watched))));
        }
    }

    /// What a destination needs, and what there is of it. `earlier` is the route in force: it stays until its
    /// successor is known.
    fn gather(&mut self, address: SocketAddr, earlier: Routes) -> Joined {
        let root = Name::address(address);
        let mut needs = BTreeSet::from([root.clone()]);
        let service = match self.held.get(&root).map(|held| &held.value) {
            Some(Value::Service(service)) => Arc::clone(service),
            Some(Value::Removed) => return Joined { needs, found: Found::Nothing },
            _ => return Joined { needs, found: Found::Pending },
        };
        let (mut missing, mut absent) = (BTreeSet::new(), BTreeSet::new());
        let mut route = Routes::None;
        // A pod by its own address has no routes and no balancing.
        if let Some(name) = service.route.as_ref().filter(|_| service.pod.is_none()) {
            match name.parse::<Name>() {
                Ok(name) => {
                    route = match self.held.get(&name).map(|held| &held.value) {
                        Some(Value::Route(found)) => Routes::Known(Arc::clone(found)),
                        // On its way; one that is gone will come back, or the service will name it no more. One
                        // that was refused is not waited for.
                        _ => {
                            if !self.refused.contains(&name) {
                                missing.insert(name.clone());
                            }
                            earlier
                        }
                    };
                    needs.insert(name);
                }
                Err(error) => {
                    warn!(%error, "the name of no route: refusing");
                    route = Routes::Unusable;
                }
            }
        }
        let own = [service.name.clone()];
        let names = match &route {
            Routes::Known(route) if route.table.is_some() => &route.backends[..],
            Routes::Known(_) | Routes::None | Routes::Unusable => &own,
        };
        let mut backends = Vec::with_capacity(names.len());
        for name in names {
            backends.push(self.backend(name, &service, &mut needs, &mut missing, &mut absent));
        }
        Joined {
            needs,
            found: Found::Policy { made_of: MadeOf { service, route, backends }, missing, absent },
        }
    }

    /// The newest policy of a backend.
    fn backend(
        &mut self,
        name: &ServiceName,
        parent: &Arc<Service>,
        needs: &mut BTreeSet<Name>,
        missing: &mut BTreeSet<Name>,
        absent: &mut BTreeSet<Name>,
    ) -> Arc<BackendPolicy> {
        let (service, resolved) = if *name == parent.name {
            (Arc::clone(parent), true)
        } else {
            let key = Name::Service(name.clone());
            let found = match self.held.get(&key).map(|held| &held.value) {
                Some(Value::Service(service)) if service.name == *name => (Arc::clone(service), true),
                Some(Value::Removed | Value::Service(_)) => {
                    absent.insert(key.clone());
                    (nothing(name), false)
                }
                _ => {
                    if !self.refused.contains(&key) {
                        missing.insert(key.clone());
                    }
                    (nothing(name), false)
                }
            };
            needs.insert(key);
            found
        };
        let mut endpoints: Arc<[Arc<Endpoint>]> = Arc::default();
        let mut version = 0;
        if let Some(pod) = &service.pod {
            endpoints = Arc::new([Arc::clone(pod)]);
        } else if let Some(collection) = &service.endpoints {
            match collection.parse::<Name>() {
                Ok(key @ Name::Collection(_)) => {
                    match self.held.get_mut(&key).map(|held| &mut held.value) {
                        Some(Value::Endpoints(members)) => {
                            if !members.complete {
                                missing.insert(key.clone());
                            }
                            endpoints = members.list();
                            version = members.generation;
                        }
                        Some(Value::Removed) => drop(absent.insert(key.clone())),
                        _ => drop(missing.insert(key.clone())),
                    }
                    needs.insert(key);
                }
                Ok(_) | Err(_) => warn!(%collection, "not the name of a collection"),
            }
        }
        let mut from = Place::default();
        if service.reach != Reach::Anywhere {
            let own = Name::Workload(self.uid.clone());
            match self.held.get(&own).map(|held| &held.value) {
                Some(Value::Workload(workload)) => from = workload.place.clone(),
                _ => drop(missing.insert(own.clone())),
            }
            needs.insert(own);
        }
        let key = service.key();
        if let Some(built) = self.backends.get(&key) {
            let policy = &built.policy;
            let same = Arc::ptr_eq(&policy.service, &service) || policy.service == service;
            if same && policy.resolved == resolved && built.endpoints == version && built.from == from {
                return Arc::clone(policy);
            }
        }
        self.generation += 1;
        let policy = Arc::new(BackendPolicy {
            endpoints: service.reach.of(&endpoints, &from),
            service,
            generation: self.generation,
            resolved,
            client: weft_core::balance::client(&self.uid),
        });
        self.backends.insert(key, Built { policy: Arc::clone(&policy), endpoints: version, from });
        policy
    }

    /// Joins this workload's own policy. A port whose authorization was refused, or does not come, denies.
    pub(super) fn join_own(&mut self) {
        let root = Name::Workload(self.uid.clone());
        let mut needs = BTreeSet::from([root.clone(), Name::TrustBundle(self.trust_domain.clone())]);
        let workload = match self.held.get(&root).map(|held| &held.value) {
            Some(Value::Workload(workload)) => Some(Arc::clone(workload)),
            _ => None,
        };
        if let Some(workload) = &workload {
            needs.extend(workload.trust_domains.iter().cloned().map(Name::TrustBundle));
            needs.extend(workload.authorizations().iter().filter_map(|name| name.parse::<Name>().ok()));
        }
        let before = std::mem::replace(&mut self.own.needs, needs.clone());
        self.need(User::Own, &before, &needs);
        // A bundle is live as soon as it is taken.
        for name in needs.iter().filter(|name| matches!(name, Name::TrustBundle(_))) {
            if let Some(held) = self.held.get(name).filter(|held| !matches!(held.value, Value::Pending)) {
                self.own.live.insert(name.clone(), held.version.clone());
            }
        }
        let Some(workload) = workload else { return };

        let since = *self.own.warming.get_or_insert_with(Instant::now);
        let waited = self.connected.map_or(Duration::ZERO, |up| since.max(up).elapsed());
        let patient = waited < self.warm;
        let joined = workload.join(|text| {
            let name: Name = text.parse().ok()?;
            match self.held.get(&name).map(|held| &held.value) {
                Some(Value::Authorization(policy)) => Some(Arc::clone(policy)),
                Some(Value::Pending) | None if patient && !self.refused.contains(&name) => None,
                _ => {
                    warn!(policy = text, "no usable authorization: the port denies");
                    Some(Arc::clone(&DENY))
                }
            }
        });
        let Some(policy) = joined else { return };
        self.own.warming = None;
        self.own.live = self.versions(&needs);
        self.news.extend(needs);
        let mut made_of = vec![Arc::as_ptr(&workload).addr()];
        let ports = policy.ports.values().chain([&policy.default_port]);
        made_of.extend(ports.map(|port| Arc::as_ptr(&port.authorization).addr()));
        // What the published policy was made of is alive in it: an address is not taken twice.
        let changed = self.own.made_of.as_ref().is_none_or(|(_, old)| *old != made_of);
        self.own.made_of = Some((Arc::clone(&workload), made_of));
        if changed {
            debug!(ports = policy.ports.len(), "own policy published");
            self.inbound.send_replace(Some(Arc::new(policy)));
        }
    }
}

/// What came of looking at all that a destination needs.
struct Joined {
    needs: BTreeSet<Name>,
    found: Found,
}

enum Found {
    /// Not answered yet.
    Pending,
    /// The control plane said no.
    Nothing,
    /// A policy, what of it has not been answered yet, and what is said not to be there.
    Policy { made_of: MadeOf, missing: BTreeSet<Name>, absent: BTreeSet<Name> },
}

impl MadeOf {
    fn is(&self, other: &Self) -> bool {
        let route = match (&self.route, &other.route) {
            (Routes::Known(a), Routes::Known(b)) => Arc::ptr_eq(a, b),
            (Routes::None, Routes::None) | (Routes::Unusable, Routes::Unusable) => true,
            (Routes::Known(_) | Routes::None | Routes::Unusable, _) => false,
        };
        route
            && Arc::ptr_eq(&self.service, &other.service)
            && self.backends.len() == other.backends.len()
            && self.backends.iter().zip(&other.backends).all(|(a, b)| Arc::ptr_eq(a, b))
    }
}

/// A service that does not exist: its share of requests is answered with 500.
pub(super) fn nothing(name: &ServiceName) -> Arc<Service> {
    Arc::new(Service { mtls_required: true, ..Service::new(name.clone()) })
}

/// What holds where no authorization can be used.
static DENY: LazyLock<Arc<Authorization>> = LazyLock::new(|| {
    Arc::new(Authorization { default: Action::Deny, rules: Vec::new().into(), generation: 0 })
});
/// How long the snapshot before it serves instead of one that lost something: what takes its place may be on
/// its way.
pub(super) const HOPE: Duration = Duration::from_secs(2);
