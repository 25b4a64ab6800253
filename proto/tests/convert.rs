//! Every valid core value survives the wire, and everything else is refused by name.
//!
//! Why by re-encoding: rules hold compiled patterns and have no equality of their own; two values that
//! encode to the same bytes are enforced alike.

#![allow(clippy::unwrap_used)]

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderName, HeaderValue, Method};
use proptest::{
    collection::{btree_map, vec},
    option,
    prelude::*,
    string::string_regex,
};
use prost::Message;
use weft_core::{
    identity::{PodUid, SpiffeId, TrustDomain},
    policy::*,
};
use weft_proto::{
    convert::{
        Invalid, authz, endpoint, route,
        route::RouteResource,
        service, trust,
        trust::TrustResource,
        workload,
        workload::{PortResource, WorkloadResource},
    },
    names::Name,
    pb::v1,
};

fn text(pattern: &str) -> BoxedStrategy<Arc<str>> {
    string_regex(pattern).unwrap().prop_map(Into::into).boxed()
}

fn segment() -> BoxedStrategy<Arc<str>> {
    text("[a-z][a-z0-9-]{0,8}[a-z0-9]")
}

fn uid() -> impl Strategy<Value = PodUid> {
    string_regex("[a-z0-9-]{1,20}").unwrap().prop_map(|s| PodUid::new(&s).unwrap())
}

fn domain() -> impl Strategy<Value = TrustDomain> {
    string_regex("[a-z0-9._-]{1,20}").unwrap().prop_map(|s| TrustDomain::new(&s).unwrap())
}

fn identity() -> impl Strategy<Value = SpiffeId> {
    (domain(), segment(), segment()).prop_map(|(td, ns, sa)| SpiffeId::new(&td, &ns, &sa).unwrap())
}

fn ip() -> impl Strategy<Value = IpAddr> {
    prop_oneof![
        any::<[u8; 3]>().prop_map(|[b, c, d]| IpAddr::from([10, b, c, d])),
        any::<[u8; 15]>().prop_map(|rest| {
            let mut bytes = [0xfd; 16];
            bytes[1..].copy_from_slice(&rest);
            IpAddr::from(bytes)
        }),
    ]
}

fn port() -> impl Strategy<Value = u16> {
    1..=u16::MAX
}

fn ms() -> impl Strategy<Value = Duration> {
    (1..1_000_000_u64).prop_map(Duration::from_millis)
}

fn share() -> impl Strategy<Value = f64> {
    (0..=1_000_000_u32).prop_map(|ppm| f64::from(ppm) / 1e6)
}

fn service_name() -> impl Strategy<Value = ServiceName> {
    (segment(), segment(), port()).prop_map(|(namespace, name, port)| ServiceName { namespace, name, port })
}

fn object() -> impl Strategy<Value = ObjectRef> {
    (text("[A-Za-z]{1,12}"), text("[a-z]{0,8}"), segment()).prop_map(|(kind, namespace, name)| ObjectRef {
        kind,
        namespace,
        name,
    })
}

fn protocol() -> impl Strategy<Value = Protocol> {
    prop::sample::select(vec![
        Protocol::Detect,
        Protocol::Opaque,
        Protocol::Http1,
        Protocol::Http2,
        Protocol::Grpc,
        Protocol::Tls,
    ])
}

fn backoff() -> impl Strategy<Value = Backoff> {
    (1..1_000_u64, 0..10_000_u64, share()).prop_map(|(min, more, jitter)| {
        Backoff::try_new(Duration::from_millis(min), Duration::from_millis(min + more), jitter).unwrap()
    })
}

fn timeouts() -> impl Strategy<Value = Timeouts> {
    (option::of(ms()), option::of(ms()), option::of(ms())).prop_map(|(request, per_try, connect)| Timeouts {
        request,
        per_try,
        connect,
    })
}

fn retry() -> impl Strategy<Value = RetryPolicy> {
    let status = (100..=599_u16).prop_flat_map(|first| (first..=599).prop_map(move |last| first..=last));
    let budget = (share(), 0..1_000_u32, 1..600_000_u64).prop_map(|(ratio, min_per_second, window)| {
        BudgetParams { ratio, min_per_second, window: Duration::from_millis(window) }
    });
    let counts = (0..=10_u32, 0..1_000_000_usize);
    (vec(status, 0..3), vec(1..=16_u16, 0..3), any::<[bool; 2]>(), counts, backoff(), budget).prop_map(
        |(statuses, grpc_codes, [on_reset, any_method], (max_retries, max_body), backoff, budget)| {
            RetryPolicy { statuses, grpc_codes, on_reset, max_retries, any_method, max_body, backoff, budget }
        },
    )
}

fn place() -> impl Strategy<Value = Place> {
    (text("[a-z0-9-]{0,10}"), text("[a-z0-9-]{0,10}")).prop_map(|(node, zone)| Place { node, zone })
}

fn endpoint_value() -> impl Strategy<Value = Endpoint> {
    let who = prop_oneof![
        Just((None, Tunnel::None)),
        identity().prop_map(|id| (Some(id), Tunnel::None)),
        identity().prop_map(|id| (Some(id), Tunnel::Weft)),
    ];
    let health = prop::sample::select(vec![
        EndpointHealth::Healthy,
        EndpointHealth::Draining,
        EndpointHealth::Unhealthy,
    ]);
    let labels = btree_map(text("[a-z]{1,8}"), text("[ -~]{0,8}"), 0..=8);
    (uid(), ip(), port(), 0..1_000_u32, health, who, place(), labels).prop_map(
        |(uid, ip, port, weight, health, (identity, tunnel), Place { node, zone }, labels)| Endpoint {
            uid,
            address: SocketAddr::new(ip, port),
            weight,
            health,
            identity,
            tunnel,
            zone,
            node,
            labels,
        },
    )
}

fn health_policy() -> impl Strategy<Value = HealthPolicy> {
    let rate = (share(), 1..3_600_000_u64, any::<u32>()).prop_map(|(threshold, window, min_requests)| {
        SuccessRate { threshold, window: Duration::from_millis(window), min_requests }
    });
    (any::<u32>(), option::of(rate), backoff(), 0..=100_u8).prop_map(
        |(consecutive_failures, success_rate, backoff, max_ejection_percent)| HealthPolicy {
            consecutive_failures,
            success_rate,
            backoff,
            max_ejection_percent,
        },
    )
}

fn service_value() -> impl Strategy<Value = Service> {
    let algorithm = prop::sample::select(vec![
        Algorithm::PeakEwma,
        Algorithm::LeastRequest,
        Algorithm::RoundRobin,
        Algorithm::Random,
    ]);
    let lb = (algorithm, ms(), ms(), any::<bool>()).prop_map(
        |(algorithm, ewma_decay, ewma_initial, by_client)| LoadBalancing {
            algorithm,
            ewma_decay,
            ewma_initial,
            by_client,
        },
    );
    let reach =
        prop::sample::select(vec![Reach::Anywhere, Reach::Node, Reach::PreferNode, Reach::PreferZone]);
    let limits =
        (1..u32::MAX, 1..u32::MAX, 0..100_000_u64).prop_map(|(max_requests, max_connections, wait)| {
            ServiceLimits { max_requests, max_connections, queue_wait: Duration::from_millis(wait) }
        });
    let names = (
        option::of(service_name().prop_map(|name| Arc::from(Name::Route(name).to_string()))),
        option::of(service_name().prop_map(|name| Arc::from(Name::Collection(name).to_string()))),
    );
    let first =
        (service_name(), vec(ip(), 0..4), protocol(), ms(), names, option::of(endpoint_value()), reach);
    let second = (lb, health_policy(), limits, vec(identity(), 0..3), any::<bool>(), timeouts(), retry());
    (first, second).prop_map(
        |(
            (name, vips, protocol, detect_timeout, (route, endpoints), pod, reach),
            (load_balancing, health, limits, accepted_identities, mtls_required, timeouts, retry),
        )| Service {
            name,
            vips,
            protocol,
            detect_timeout,
            route,
            endpoints,
            reach,
            pod: pod.map(Arc::new),
            load_balancing,
            health,
            limits,
            accepted_identities,
            mtls_required,
            timeouts,
            retry,
        },
    )
}

fn text_match() -> impl Strategy<Value = TextMatch> {
    prop_oneof![
        text("[ -~]{0,12}").prop_map(TextMatch::Exact),
        "[a-z]{1,4}(\\.\\*|\\[0-9\\]\\+)?".prop_map(|s| TextMatch::Regex(Pattern::new(&s).unwrap())),
    ]
}

fn header() -> impl Strategy<Value = HeaderName> {
    "[a-z][a-z0-9-]{0,10}".prop_map(|s| HeaderName::from_bytes(s.as_bytes()).unwrap())
}

fn method() -> impl Strategy<Value = Method> {
    prop::sample::select(vec![Method::GET, Method::POST, Method::from_bytes(b"PURGE").unwrap()])
}

fn rule_match() -> impl Strategy<Value = Match> {
    let path = prop_oneof![
        text("/[a-z/]{0,12}").prop_map(PathMatch::Exact),
        text("/([a-z]{1,5}(/[a-z]{1,5})?)?").prop_map(PathMatch::Prefix),
        "/[a-z]{1,5}\\.\\*".prop_map(|s| PathMatch::Regex(Pattern::new(&s).unwrap())),
        (option::of(text_match()), option::of(text_match()))
            .prop_map(|(service, method)| PathMatch::Grpc { service, method }),
    ];
    let headers = (header(), text_match()).prop_map(|(name, value)| HeaderMatch { name, value });
    let query = (text("[a-zA-Z]{1,8}"), text_match()).prop_map(|(name, value)| QueryMatch { name, value });
    (option::of(path), option::of(method()), vec(headers, 0..3), vec(query, 0..3))
        .prop_map(|(path, method, headers, query)| Match { path, method, headers, query })
}

fn filter() -> impl Strategy<Value = Filter> {
    let value = || "[ -~]{0,10}".prop_map(|s: String| HeaderValue::from_str(s.trim()).unwrap());
    let edit = (vec((header(), value()), 0..3), vec((header(), value()), 0..3), vec(header(), 0..3))
        .prop_map(|(set, add, remove)| HeaderEdit { set, add, remove })
        .boxed();
    let path = prop_oneof![
        text("/[a-z/]{0,8}").prop_map(PathEdit::Full),
        text("(/[a-z]{0,8})?").prop_map(PathEdit::Prefix),
    ]
    .boxed();
    let host = option::of(text("[a-z]{1,8}(\\.[a-z]{1,5})?(:80)?")).boxed();
    let scheme = option::of(prop::sample::select(vec!["http", "https"]).prop_map(Arc::<str>::from));
    let status = prop::sample::select(vec![301_u16, 302, 303, 307, 308]);
    prop_oneof![
        edit.clone().prop_map(Filter::RequestHeaders),
        edit.prop_map(Filter::ResponseHeaders),
        (scheme, host.clone(), option::of(path.clone()), option::of(port()), status).prop_map(
            |(scheme, host, path, port, status)| Filter::Redirect(Redirect {
                scheme,
                host,
                path,
                port,
                status
            })
        ),
        (host, option::of(path)).prop_map(|(host, path)| Filter::Rewrite(Rewrite { host, path })),
        text("[ -~]{0,20}").prop_map(|reason| Filter::Invalid { reason }),
    ]
}

fn rules() -> impl Strategy<Value = RouteResource> {
    let backend = (service_name(), 0..=1_000_000_u32, vec(filter(), 0..2))
        .prop_map(|(service, weight, filters)| BackendRef { service, backend: 0, weight, filters });
    let hosts = vec(text("(\\*\\.)?[a-z]{1,8}\\.[a-z]{1,4}"), 0..3);
    let what = (vec(rule_match(), 0..3), vec(filter(), 0..3), vec(backend, 0..3));
    let rule = (object(), text("[a-z0-9-]{1,8}"), hosts, what, timeouts(), retry(), any::<u64>()).prop_map(
        |(object, name, hosts, (matches, filters, backends), timeouts, retry, created)| Rule {
            label: format!("{object}/{name}").into(),
            object,
            name,
            hosts,
            matches,
            filters,
            backends,
            timeouts,
            retry,
            created,
        },
    );
    vec(rule, 0..4).prop_map(|mut rules| {
        let mut backends: Vec<ServiceName> = Vec::new();
        for backend in rules.iter_mut().flat_map(|rule| &mut rule.backends) {
            backend.backend = backends.iter().position(|b| *b == backend.service).unwrap_or_else(|| {
                backends.push(backend.service.clone());
                backends.len() - 1
            });
        }
        RouteResource { rules, backends }
    })
}

fn string_match() -> impl Strategy<Value = StringMatch> {
    prop_oneof![
        text("[ -~]{0,12}").prop_map(StringMatch::Exact),
        text("[ -~]{1,12}").prop_map(StringMatch::Prefix),
        text("[ -~]{1,12}").prop_map(StringMatch::Suffix),
        Just(StringMatch::Present),
    ]
}

fn action() -> impl Strategy<Value = Action> {
    prop::sample::select(vec![Action::Allow, Action::Deny])
}

fn cidr() -> impl Strategy<Value = ipnet::IpNet> {
    (ip(), 0..=32_u8).prop_map(|(ip, prefix)| ipnet::IpNet::new(ip, prefix).unwrap())
}

fn authorization() -> impl Strategy<Value = Authorization> {
    let one = || option::of(string_match());
    let source =
        (identity(), one(), one(), option::of(cidr()), vec(string_match(), 0..2), vec(string_match(), 0..2))
            .prop_map(|(id, namespace, trust_domain, cidr, not_identities, not_namespaces)| SourceMatch {
                identity: Some(StringMatch::Exact(id.as_str().into())),
                namespace,
                trust_domain,
                cidr,
                not_identities,
                not_namespaces,
            });
    let rule = (object(), action(), vec(source, 0..3), vec(http(), 0..3))
        .prop_map(|(object, action, sources, http)| AuthzRule { object, action, sources, http });
    (action(), vec(rule, 0..4), any::<u64>()).prop_map(|(default, rules, generation)| Authorization {
        default,
        rules: rules.into(),
        generation,
    })
}

fn http() -> impl Strategy<Value = HttpMatch> {
    let headers = vec((header(), string_match()), 0..2);
    (vec(method(), 0..2), vec(string_match(), 0..2), vec(string_match(), 0..2), headers)
        .prop_map(|(methods, paths, hosts, headers)| HttpMatch { methods, paths, hosts, headers })
}

fn rate_limit() -> impl Strategy<Value = RateLimit> {
    let rate = (1u32..=1_000_000, 100u64..=3_600_000, 1u32..=1_000_000).prop_map(|(requests, per, burst)| {
        Rate::try_new(requests, Duration::from_millis(per), Some(burst)).unwrap()
    });
    let by = (any::<bool>(), vec(header(), 0..3)).prop_map(|(identity, headers)| By { identity, headers });
    (object(), "[0-9]{1,3}", rate, vec(http(), 0..3), by)
        .prop_map(|(object, name, rate, http, by)| RateLimit { object, name: name.into(), rate, http, by })
}

fn workload_value() -> impl Strategy<Value = WorkloadResource> {
    let mode = prop::sample::select(vec![MtlsMode::Permissive, MtlsMode::Strict]);
    let probe =
        prop_oneof!["/[a-z?=/]{0,9}".prop_map(|path| Probe::Get(path.into())), Just(Probe::GrpcHealth)];
    let port_value = (protocol(), ms(), mode, uid(), any::<u16>(), vec(probe, 0..3), vec(rate_limit(), 0..3))
        .prop_map(|(protocol, detect_timeout, mtls, uid, port, probes, rate_limits)| PortResource {
            protocol,
            detect_timeout,
            mtls,
            authorization: Name::Authorization(uid, port).to_string().into(),
            probes,
            rate_limits,
        })
        .boxed();
    let egress = prop::sample::select(vec![Egress::Allow, Egress::Deny]);
    let ports = btree_map(port(), port_value.clone(), 0..4);
    (identity(), ports, port_value, vec(cidr(), 0..4), egress, vec(domain(), 0..3), place()).prop_map(
        |(identity, ports, default_port, mesh_ranges, egress, trust_domains, place)| WorkloadResource {
            identity,
            ports,
            default_port,
            mesh_ranges,
            egress,
            trust_domains,
            place,
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn endpoints_survive_the_wire(value in endpoint_value()) {
        let body = endpoint::to_pb(&value).encode_to_vec();
        prop_assert_eq!(endpoint::parse(&body, "elsewhere").unwrap(), value);
    }

    #[test]
    fn services_survive_the_wire(value in service_value()) {
        let body = v1::Service::from(&value).encode_to_vec();
        prop_assert_eq!(service::parse(&body).unwrap(), value);
    }

    #[test]
    fn routes_survive_the_wire(value in rules()) {
        let pb = v1::Route::from(&value);
        let back = route::parse(&pb.encode_to_vec()).unwrap();
        prop_assert_eq!(&back.backends, &value.backends);
        for (back, rule) in back.rules.iter().zip(&value.rules) {
            prop_assert_eq!(&back.label, &rule.label);
            prop_assert_eq!(&back.backends, &rule.backends);
        }
        prop_assert_eq!(v1::Route::from(&back), pb);
    }

    #[test]
    fn authorizations_survive_the_wire(value in authorization()) {
        let pb = v1::Authorization::from(&value);
        let back = authz::parse(&pb.encode_to_vec()).unwrap();
        prop_assert_eq!(v1::Authorization::from(&back), pb);
    }

    #[test]
    fn workloads_survive_the_wire(value in workload_value()) {
        let body = v1::WorkloadConfig::from(&value).encode_to_vec();
        prop_assert_eq!(workload::parse(&body).unwrap(), value);
    }

    #[test]
    fn bundles_survive_the_wire(roots in vec(vec(any::<u8>(), 0..20), 1..4), sequence: u64, hint in 0..100_000_u64) {
        let der = |tail: Vec<u8>| [vec![0x30], tail].concat().into();
        let roots: Vec<Bytes> = roots.into_iter().map(der).collect();
        let refresh_hint = Duration::from_secs(hint);
        let value = TrustResource { crls: roots.clone(), roots, sequence, refresh_hint };
        let body = v1::TrustBundle::from(&value).encode_to_vec();
        prop_assert_eq!(trust::parse(&body).unwrap(), value);
    }

    /// Two replicas that see one object make the same bytes of it.
    #[test]
    fn encoding_is_canonical(value in endpoint_value()) {
        let body = endpoint::to_pb(&value).encode_to_vec();
        let again = endpoint::to_pb(&endpoint::parse(&body, "").unwrap()).encode_to_vec();
        prop_assert_eq!(body, again);
    }

    #[test]
    fn nothing_that_arrives_panics(bytes in vec(any::<u8>(), 0..200)) {
        parse_all(&bytes);
    }

    #[test]
    fn nothing_that_was_nearly_right_panics(value in rules(), policy in authorization(), at: prop::sample::Index, to: u8) {
        for mut body in [v1::Route::from(&value).encode_to_vec(), v1::Authorization::from(&policy).encode_to_vec()] {
            if !body.is_empty() {
                let at = at.index(body.len());
                body[at] = to;
            }
            parse_all(&body);
        }
    }
}

fn parse_all(bytes: &[u8]) {
    let _ = service::parse(bytes);
    let _ = endpoint::parse(bytes, "ns");
    let _ = route::parse(bytes);
    let _ = authz::parse(bytes);
    let _ = workload::parse(bytes);
    let _ = trust::parse(bytes);
    let _ = std::str::from_utf8(bytes).map(str::parse::<Name>);
}

/// Converts what `change` made of a message, and says which field was refused and why.
fn refused<M: Message + Clone, T: std::fmt::Debug>(
    good: &M,
    parse: impl Fn(&[u8]) -> Result<T, Invalid>,
    change: impl FnOnce(&mut M),
) -> String {
    parse(&good.encode_to_vec()).unwrap();
    let mut bad = good.clone();
    change(&mut bad);
    parse(&bad.encode_to_vec()).unwrap_err().to_string()
}

fn good_endpoint() -> v1::Endpoint {
    v1::Endpoint {
        address: Bytes::from_static(&[10, 0, 0, 1]),
        port: 8080,
        service_account: "cart".to_owned(),
        trust_domain: "cluster.local".to_owned(),
        tunnel: v1::endpoint::Tunnel::Weft.into(),
        uid: "6f1c".to_owned(),
        ..v1::Endpoint::default()
    }
}

fn good_service() -> v1::Service {
    v1::Service { namespace: "shop".to_owned(), name: "cart".to_owned(), port: 80, ..v1::Service::default() }
}

fn good_object() -> Option<v1::ObjectRef> {
    Some(v1::ObjectRef { kind: "HTTPRoute".into(), namespace: "shop".into(), name: "cart".into() })
}

fn good_route() -> v1::Route {
    use v1::route as pb;
    v1::Route {
        rules: vec![pb::Rule {
            name: "0".to_owned(),
            object: good_object(),
            matches: vec![pb::Match::default()],
            backends: vec![pb::Backend { service: "svc/shop/cart:80".into(), weight: 1, filters: vec![] }],
            ..pb::Rule::default()
        }],
        requires: vec!["route/v1".to_owned()],
    }
}

fn good_authorization() -> v1::Authorization {
    use v1::authorization as pb;
    v1::Authorization {
        default: pb::Action::Deny.into(),
        rules: vec![pb::Rule {
            object: good_object(),
            action: pb::Action::Allow.into(),
            sources: vec![pb::Source { cidr: "10.0.0.0/8".to_owned(), ..pb::Source::default() }],
            http: vec![],
        }],
        generation: 1,
        requires: vec![],
    }
}

fn good_workload() -> v1::WorkloadConfig {
    let port = |port| v1::InboundPort {
        port,
        mtls: v1::inbound_port::MtlsMode::Strict.into(),
        authz: "authz/6f1c/0".to_owned(),
        ..v1::InboundPort::default()
    };
    v1::WorkloadConfig {
        identity: "spiffe://cluster.local/ns/shop/sa/cart".to_owned(),
        ports: vec![port(80)],
        default_port: Some(port(0)),
        egress: v1::workload_config::Egress::Allow.into(),
        ..v1::WorkloadConfig::default()
    }
}

fn good_rate_limit() -> v1::RateLimit {
    v1::RateLimit { object: good_object(), name: "0".to_owned(), ..v1::RateLimit::default() }
}

#[test]
fn an_endpoint_names_the_field_that_is_wrong() {
    let check = |change: fn(&mut v1::Endpoint), want: &str| {
        let got = refused(&good_endpoint(), |body| endpoint::parse(body, "shop"), change);
        assert_eq!(got, want);
    };
    check(|e| e.tunnel = 0, "Endpoint.tunnel: is unspecified; say TUNNEL_NONE or TUNNEL_WEFT");
    check(
        |e| e.tunnel = 9,
        "Endpoint.tunnel: 9 is not a value that this build knows; upgrade the reader first",
    );
    check(
        |e| e.health = -1,
        "Endpoint.health: -1 is not a value that this build knows; upgrade the reader first",
    );
    check(|e| e.port = 0, "Endpoint.port: is 0; it must be 1 to 65535");
    check(|e| e.port = 65_536, "Endpoint.port: is 65536; it must be 1 to 65535");
    check(|e| e.address = Bytes::new(), "Endpoint.address: has 0 bytes; an address has 4 or 16");
    check(
        |e| e.address = Bytes::from_static(&[0; 4]),
        "Endpoint.address: 0.0.0.0 is not the address of one host",
    );
    check(
        |e| e.service_account = String::new(),
        "Endpoint.service_account: is empty on an endpoint that speaks mTLS; name the workload's",
    );
    check(
        |e| e.trust_domain = String::new(),
        "Endpoint.trust_domain: trust domain \"\" must be lower-case letters, digits, '.', '-' or '_', and not empty",
    );
    check(
        |e| e.uid = "A".to_owned(),
        "Endpoint.uid: \"A\" is not a pod uid: 1 to 63 lower-case letters, digits and '-'",
    );
    check(
        |e| e.labels = (0..9).map(|n| (n.to_string(), String::new())).collect(),
        "Endpoint.labels: has 9 items; at most 8 are taken",
    );
}

#[test]
fn an_endpoint_is_of_its_service_unless_it_says_otherwise() {
    let mut pb = good_endpoint();
    let id = |pb: &v1::Endpoint| endpoint::from_pb(pb, "shop").unwrap().identity.unwrap().to_string();
    assert_eq!(id(&pb), "spiffe://cluster.local/ns/shop/sa/cart");
    pb.namespace = "other".to_owned();
    assert_eq!(id(&pb), "spiffe://cluster.local/ns/other/sa/cart");
}

#[test]
fn a_service_names_the_field_that_is_wrong() {
    let check = |change: fn(&mut v1::Service), want: &str| {
        assert_eq!(refused(&good_service(), service::parse, change), want);
    };
    check(
        |s| s.requires = vec!["teleport/v1".to_owned()],
        "Service.requires[0]: names feature \"teleport/v1\", which this build cannot enforce; upgrade the reader first",
    );
    check(
        |s| s.name = "a/b".to_owned(),
        "Service.name: \"a/b\" must be lower-case letters, digits, '-' and '.'",
    );
    check(
        |s| s.route = "svc/shop/cart:80".to_owned(),
        "Service.route: \"svc/shop/cart:80\" names another kind of resource; it must start with route/",
    );
    check(
        |s| s.pod = Some(v1::Endpoint { tunnel: 0, ..good_endpoint() }),
        "Service.pod.tunnel: is unspecified; say TUNNEL_NONE or TUNNEL_WEFT",
    );
    check(
        |s| s.timeouts = Some(v1::Timeouts { request_ms: Some(0), ..v1::Timeouts::default() }),
        "Service.timeouts.request_ms: is 0; it must be 1 to 4294967295",
    );
    check(
        |s| {
            let range = v1::retry::StatusRange { first: 503, last: 500 };
            s.retry = Some(v1::Retry { statuses: vec![range], ..v1::Retry::default() });
        },
        "Service.retry.statuses[0].last: is 500; it must be 503 to 599",
    );
    check(
        |s| s.health = Some(v1::HealthPolicy { max_ejection_percent: Some(101), ..Default::default() }),
        "Service.health.max_ejection_percent: is 101; it must be 0 to 100",
    );
    check(
        |s| s.limits = Some(v1::Limits { max_requests: Some(0), ..Default::default() }),
        "Service.limits.max_requests: is 0; it must be 1 to 4294967295",
    );
    check(
        |s| s.vips = vec![Bytes::from_static(&[1; 5])],
        "Service.vips[0]: has 5 bytes; an address has 4 or 16",
    );
    let backoff = refused(&good_service(), service::parse, |s| {
        let backoff = Some(v1::Backoff { min_ms: 10, max_ms: 1, jitter_ppm: 0 });
        s.retry = Some(v1::Retry { backoff, ..v1::Retry::default() });
    });
    assert!(backoff.starts_with("Service.retry.backoff: is not a usable schedule: "), "{backoff}");
}

#[test]
fn what_a_service_leaves_out_is_the_default() {
    let service = Service::try_from(&good_service()).unwrap();
    assert_eq!(service.load_balancing, LoadBalancing::default());
    assert_eq!(service.health, HealthPolicy::default());
    assert_eq!(service.limits, ServiceLimits::default());
    assert_eq!(service.retry, RetryPolicy::default());
    assert_eq!(service.timeouts, Timeouts::default());
    assert_eq!(service.detect_timeout, DETECT_TIMEOUT);
    assert_eq!((service.route, service.endpoints, service.protocol), (None, None, Protocol::Detect));
}

#[test]
fn a_route_names_the_field_that_is_wrong() {
    use v1::route as pb;
    let check = |change: fn(&mut v1::Route), want: &str| {
        let got = refused(&good_route(), route::parse, change);
        assert!(got.starts_with(want), "{got}");
    };
    fn path(route: &mut v1::Route, kind: pb::path_match::Kind) {
        route.rules[0].matches[0].path = Some(pb::PathMatch { kind: Some(kind) });
    }
    fn filter(route: &mut v1::Route, kind: pb::filter::Kind) {
        route.rules[0].filters = vec![pb::Filter { kind: Some(kind) }];
    }
    use pb::{filter::Kind as Filter, path_match::Kind as Path};
    check(|r| r.requires = vec!["route/v2".into()], "Route.requires[0]: names feature \"route/v2\"");
    check(|r| r.rules[0].object = None, "Route.rules[0].object: is missing");
    check(
        |r| r.rules[0].matches[0].path = Some(pb::PathMatch { kind: None }),
        "Route.rules[0].matches[0].path: is unspecified",
    );
    check(|r| path(r, Path::Exact("x".into())), "Route.rules[0].matches[0].path.exact: \"x\" has");
    check(|r| path(r, Path::Prefix("/x/".into())), "Route.rules[0].matches[0].path.prefix: \"/x/\" has");
    check(
        |r| path(r, Path::Regex("(".into())),
        "Route.rules[0].matches[0].path.regex: \"(\" is not a usable regular expression",
    );
    check(
        |r| path(r, Path::Regex("(a{1000}){1000}".into())),
        "Route.rules[0].matches[0].path.regex: \"(a{1000}){1000}\" is not a usable regular expression",
    );
    check(
        |r| r.rules[0].matches[0].headers = vec![pb::HeaderMatch { name: "x".into(), value: None }],
        "Route.rules[0].matches[0].headers[0].value: is unspecified",
    );
    check(
        |r| r.rules[0].matches[0].method = "G T".into(),
        "Route.rules[0].matches[0].method: \"G T\" is not",
    );
    check(
        |r| r.rules[0].backends[0].service = "shop/cart:80".into(),
        "Route.rules[0].backends[0].service: \"shop/cart:80\" is not a resource name",
    );
    check(
        |r| r.rules[0].backends[0].weight = 1_000_001,
        "Route.rules[0].backends[0].weight: is 1000001; it must be 0 to 1000000",
    );
    check(
        |r| r.rules[0].filters = vec![pb::Filter { kind: None }],
        "Route.rules[0].filters[0]: is unspecified",
    );
    check(
        |r| filter(r, Filter::Redirect(pb::Redirect { status: 200, ..Default::default() })),
        "Route.rules[0].filters[0].redirect.status: is 200",
    );
    check(
        |r| {
            let host = Some("evil\r\nx: y".to_owned());
            filter(r, Filter::Rewrite(pb::Rewrite { host, path: None }));
        },
        "Route.rules[0].filters[0].rewrite.host: \"evil",
    );
    check(
        |r| {
            let set = vec![pb::Header { name: "x".into(), value: Bytes::from_static(b"a\nb") }];
            filter(r, Filter::RequestHeaders(pb::HeaderEdit { set, ..Default::default() }));
        },
        "Route.rules[0].filters[0].request_headers.set[0].value: is not a header value",
    );
    check(|r| r.rules[0].hosts = vec!["a.*.b".into()], "Route.rules[0].hosts[0]: \"a.*.b\" has");
    check(|r| r.rules[0].name = "a\nb".into(), "Route.rules[0].name: \"a\\nb\" has characters");
    check(
        |r| {
            let rule = r.rules[0].clone();
            r.rules = vec![rule; 5_000];
        },
        "Route.rules: has 5000 items; at most 4096 are taken",
    );
}

#[test]
fn the_patterns_of_a_route_are_bounded_in_all() {
    use v1::route as pb;
    let mut route = good_route();
    let value = pb::TextMatch { kind: Some(pb::text_match::Kind::Regex("a".into())) };
    let header = pb::HeaderMatch { name: "x".into(), value: Some(value) };
    route.rules[0].matches[0].headers = vec![header; 1_000];
    let rule = route.rules[0].clone();
    route.rules.push(rule);
    let error = RouteResource::try_from(&route).unwrap_err().to_string();
    assert_eq!(
        error,
        "Route.rules[1].matches[0].headers[24].value.regex: has 1025 items; at most 1024 are taken"
    );
}

#[test]
fn an_authorization_names_the_field_that_is_wrong() {
    use v1::{authorization as pb, string_match::Kind};
    let check = |change: fn(&mut v1::Authorization), want: &str| {
        assert_eq!(refused(&good_authorization(), authz::parse, change), want);
    };
    check(|a| a.default = 0, "Authorization.default: is unspecified; say ACTION_ALLOW or ACTION_DENY");
    check(
        |a| a.rules[0].action = 0,
        "Authorization.rules[0].action: is unspecified; say ACTION_ALLOW or ACTION_DENY",
    );
    check(
        |a| a.rules[0].action = 7,
        "Authorization.rules[0].action: 7 is not a value that this build knows; upgrade the reader first",
    );
    check(
        |a| a.rules[0].sources[0] = pb::Source::default(),
        "Authorization.rules[0].sources[0]: has no condition; leave the list empty to mean all",
    );
    check(
        |a| a.rules[0].sources[0].cidr = "10/8".into(),
        "Authorization.rules[0].sources[0].cidr: \"10/8\" is not an address range such as 10.0.0.0/8",
    );
    check(
        |a| a.rules[0].sources[0].identity = Some(v1::StringMatch { kind: None }),
        "Authorization.rules[0].sources[0].identity: is unspecified; say exact, prefix, suffix or present",
    );
    check(
        |a| {
            let kind = Some(Kind::Prefix(String::new()));
            a.rules[0].sources[0].namespace = Some(v1::StringMatch { kind });
        },
        "Authorization.rules[0].sources[0].namespace.prefix: is missing; set it",
    );
    check(
        |a| {
            let headers = vec![pb::HeaderMatch { name: "x".into(), value: None }];
            a.rules[0].http = vec![pb::Http { headers, ..Default::default() }];
        },
        "Authorization.rules[0].http[0].headers[0].value: is missing; set it",
    );
    check(
        |a| a.requires = vec!["authz/v9".into()],
        "Authorization.requires[0]: names feature \"authz/v9\", which this build cannot enforce; upgrade the reader first",
    );
}

/// A source without a condition makes the list mean "anyone": the wire has one way to say that.
#[test]
fn anyone_is_written_as_no_sources() {
    let mut policy = authz::parse(&good_authorization().encode_to_vec()).unwrap();
    let mut rules = policy.rules.to_vec();
    rules[0].sources.push(SourceMatch::default());
    policy.rules = rules.into();
    let back = authz::parse(&v1::Authorization::from(&policy).encode_to_vec()).unwrap();
    assert!(back.rules[0].sources.is_empty());
}

#[test]
fn a_workload_names_the_field_that_is_wrong() {
    let check = |change: fn(&mut v1::WorkloadConfig), want: &str| {
        assert_eq!(refused(&good_workload(), workload::parse, change), want);
    };
    check(|w| w.egress = 0, "WorkloadConfig.egress: is unspecified; say EGRESS_ALLOW or EGRESS_DENY");
    check(
        |w| {
            let kind = Some(v1::inbound_port::probe::Kind::Get("live".to_owned()));
            w.ports[0].probes = vec![v1::inbound_port::Probe { kind }];
        },
        "WorkloadConfig.ports[0].probes[0].get: \"live\" has characters that may not be there; start it with /, \
         without spaces and fragments",
    );
    check(
        |w| w.ports[0].probes = vec![v1::inbound_port::Probe { kind: None }],
        "WorkloadConfig.ports[0].probes[0]: is missing; set it",
    );
    check(
        |w| w.ports[0].mtls = 0,
        "WorkloadConfig.ports[0].mtls: is unspecified; say MTLS_MODE_PERMISSIVE or MTLS_MODE_STRICT",
    );
    check(|w| w.ports[0].authz = String::new(), "WorkloadConfig.ports[0].authz: is missing; set it");
    check(
        |w| w.ports[0].authz = "self/6f1c".into(),
        "WorkloadConfig.ports[0].authz: \"self/6f1c\" names another kind of resource; it must start with authz/",
    );
    check(
        |w| w.ports.push(w.ports[0].clone()),
        "WorkloadConfig.ports[1].port: 80 is there twice; say it once",
    );
    check(
        |w| w.ports[0].rate_limits = vec![v1::RateLimit { per_ms: 1_000, ..good_rate_limit() }],
        "WorkloadConfig.ports[0].rate_limits[0]: is not a rate that can be kept: a rate is 1 to 1000000 requests",
    );
    check(|w| w.default_port = None, "WorkloadConfig.default_port: is missing; set it");
    check(
        |w| w.identity = "spiffe://x".into(),
        "WorkloadConfig.identity: identity path must be /ns/<namespace>/sa/<service-account>",
    );
    check(
        |w| w.mesh_ranges = vec!["all".into()],
        "WorkloadConfig.mesh_ranges[0]: \"all\" is not an address range such as 10.0.0.0/8",
    );
}

#[test]
fn a_bundle_is_never_empty_and_never_pem() {
    let good = v1::TrustBundle { roots_der: vec![Bytes::from_static(&[0x30, 0])], ..Default::default() };
    assert_eq!(
        refused(&good, trust::parse, |b| b.roots_der.clear()),
        "TrustBundle.roots_der: is missing; set it"
    );
    assert_eq!(
        refused(&good, trust::parse, |b| b.roots_der.push(Bytes::from_static(b"-----BEGIN"))),
        "TrustBundle.roots_der[1]: is not DER; send the certificate or CRL as DER, not PEM"
    );
}

#[test]
fn a_workload_and_its_authorizations_come_apart_and_together() {
    let authorization = Arc::new(authz::parse(&good_authorization().encode_to_vec()).unwrap());
    let resource = workload::parse(&good_workload().encode_to_vec()).unwrap();
    assert!(resource.join(|_| None).is_none());
    let policy = resource.join(|_| Some(Arc::clone(&authorization))).unwrap();
    let (again, authorizations) = workload::split(&policy, &PodUid::new("6f1c").unwrap());
    let names: BTreeMap<_, _> = authorizations.into_iter().collect();
    assert_eq!(names.keys().collect::<Vec<_>>(), ["authz/6f1c/0", "authz/6f1c/80"]);
    assert_eq!(again.authorizations().len(), 2);
    assert_eq!(again.identity, resource.identity);
    assert!(again.join(|name| names.get(name).cloned()).is_some());
}

#[test]
fn a_message_that_is_none_says_so() {
    let error = service::parse(&[0xff]).unwrap_err().to_string();
    assert!(error.starts_with("Service: cannot be decoded ("), "{error}");
    let error = service::parse(&vec![0; 2 * 1024 * 1024]).unwrap_err().to_string();
    assert_eq!(error, "Service: has 2097152 bytes; at most 1048576 are taken");
}
