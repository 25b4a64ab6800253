//! The controller against an API server, in this process: what it hears, what it keeps, what it writes.

use std::{net::Ipv4Addr, path::PathBuf, sync::Arc, time::Duration};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD as BASE64};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::{
    fake::{Fake, POLICIES, ROLES, ROUTES},
    token::Reviewer,
};
use weft_core::identity::PodUid;

use crate::{
    Controller,
    api::types::{Routes, Status},
    ca::{RootKeeper as _, RotateRoot, TokenCheck as _, TokenError},
    config::{Cluster, Config, Source},
};

async fn controller(fake: &Fake) -> Controller {
    replica(fake, "weft-controller-1").await
}

async fn replica(fake: &Fake, pod: &str) -> Controller {
    Controller::start(config(fake, pod)).await.unwrap()
}

fn config(fake: &Fake, pod: &str) -> Config {
    let mut config = Config::loopback(PathBuf::new(), PathBuf::new()).unwrap();
    config.source = Source::Kubernetes(Box::new(Cluster {
        server: Some(fake.uri()),
        issuer_secret: "weft-issuer".to_owned(),
        cluster_role: Some(ROLE.to_owned()),
        pod: pod.to_owned(),
        webhook: (Ipv4Addr::LOCALHOST, 0).into(),
        values: Arc::default(),
    }));
    config
}

/// The chart's own, which owns what is made.
const ROLE: &str = "weft-controller";

/// Waits until something holds; what it waits for is named by the caller's line.
#[track_caller]
fn eventually(mut holds: impl FnMut() -> bool) -> impl Future<Output = ()> {
    let at = std::panic::Location::caller();
    async move {
        let deadline = tokio::time::Instant::now() + Duration::from_secs(20);
        while !holds() {
            assert!(tokio::time::Instant::now() < deadline, "not within 20 s: {at}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

fn shop(fake: &Fake) {
    fake.apply(
        "/api/v1/namespaces",
        json!({"metadata": {"name": "shop", "labels": {"weft.dev/inject": "enabled"}}}),
    );
    fake.apply("/api/v1/namespaces", json!({"metadata": {"name": "other"}}));
    fake.apply(
        "/api/v1/nodes",
        json!({"metadata": {"name": "n1", "labels": {"topology.kubernetes.io/zone": "a"}}}),
    );
    fake.apply("/api/v1/services", service("cart", "10.96.0.10"));
    fake.apply(
        "/api/v1/pods",
        json!({
            "metadata": {"name": "cart-1", "namespace": "shop", "uid": "cart-1-uid", "labels": {"app": "cart"},
                "annotations": {"weft.dev/injected": "true"}},
            "spec": {"nodeName": "n1", "serviceAccountName": "cart", "initContainers": [{"name": "weft-proxy"}],
                "containers": [{"name": "app", "image": "x",
                "ports": [{"name": "web", "containerPort": 8080}]}]},
            "status": {"phase": "Running", "podIP": "10.0.0.1", "podIPs": [{"ip": "10.0.0.1"}],
                "conditions": [{"type": "Ready", "status": "True"}]},
        }),
    );
    fake.apply(
        "/apis/discovery.k8s.io/v1/endpointslices",
        json!({
            "metadata": {"name": "cart-x", "namespace": "shop", "labels": {"kubernetes.io/service-name": "cart"}},
            "addressType": "IPv4", "ports": [{"name": "http", "port": 8080}],
            "endpoints": [{"addresses": ["10.0.0.1"], "conditions": {"ready": true},
                "targetRef": {"kind": "Pod", "name": "cart-1", "namespace": "shop", "uid": "cart-1-uid"}}],
        }),
    );
}

fn service(name: &str, ip: &str) -> Value {
    json!({
        "metadata": {"name": name, "namespace": "shop"},
        "spec": {"clusterIP": ip, "clusterIPs": [ip], "selector": {"app": name},
            "ports": [{"name": "http", "port": 80, "targetPort": "web"}]},
    })
}

fn route(name: &str) -> Value {
    json!({
        "metadata": {"name": name, "namespace": "shop", "generation": 1},
        "spec": {"parentRefs": [{"group": "", "kind": "Service", "name": "cart", "port": 80}],
            "rules": [{"backendRefs": [{"name": "cart", "port": 80}]}]},
    })
}

#[tokio::test]
async fn a_cluster_is_served_and_custom_kinds_may_come_later() {
    let fake = Fake::start().await;
    shop(&fake);
    let controller = controller(&fake).await;
    controller.synced().await;
    let has = |name: &str| controller.published.resource(name).is_some();
    assert!(has("svc/shop/cart:80") && has("ip/10.96.0.10:80") && has("self/cart-1-uid"));
    assert!(controller.published.workload(&PodUid::new("cart-1-uid").unwrap()).is_some());
    assert!(!has("route/shop/cart:80"));
    // Whoever only says that it has a sidecar has none.
    let mut liar = fake.get("/api/v1/pods", "shop", "cart-1").unwrap();
    liar["metadata"]["name"] = json!("liar");
    liar["metadata"]["uid"] = json!("liar-uid");
    liar["spec"]["initContainers"] = json!([]);
    fake.apply("/api/v1/pods", liar);
    eventually(|| controller.published.workload(&PodUid::new("liar-uid").unwrap()).is_some()).await;
    let status: Status = ask(&controller, "/api/v1/status").await;
    let sidecars: Vec<_> = status.sidecars.iter().map(|sidecar| &*sidecar.pod).collect();
    assert_eq!(sidecars, ["shop/cart-1"]);
    fake.install(&ROUTES);
    fake.apply(ROUTES[0], route("r"));
    eventually(|| has("route/shop/cart:80")).await;
    fake.delete(ROUTES[0], "shop", "r");
    eventually(|| !has("route/shop/cart:80")).await;
    controller.stop().await;
}

#[tokio::test]
async fn connections_of_one_pod_that_say_nothing_keep_no_kubelet_from_its_answer() {
    let fake = Fake::start().await;
    let mut config = config(&fake, "one");
    let free = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = free.local_addr().unwrap();
    drop(free);
    config.probes = Some(address);
    let controller = Controller::start(config).await.unwrap();
    let mut silent = Vec::new();
    for _ in 0..100 {
        let socket = tokio::net::TcpSocket::new_v4().unwrap();
        socket.bind("127.0.0.2:0".parse().unwrap()).unwrap();
        silent.push(socket.connect(address).await.unwrap());
    }
    // The last is hung up on at once, while the first may still say what it wants.
    let ended = silent.last_mut().unwrap().read(&mut [0]).await;
    assert!(matches!(ended, Ok(0) | Err(_)), "{ended:?}");
    let mut kubelet = tokio::net::TcpStream::connect(address).await.unwrap();
    kubelet.write_all(b"GET /live HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").await.unwrap();
    let mut answer = String::new();
    kubelet.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    let first = silent[0].try_read(&mut [0]).unwrap_err();
    assert_eq!(first.kind(), std::io::ErrorKind::WouldBlock, "it has its share");
    controller.stop().await;
}

#[tokio::test]
async fn an_api_server_that_is_away_stops_nothing() {
    let mut fake = Fake::start().await;
    shop(&fake);
    let controller = controller(&fake).await;
    controller.synced().await;
    let has = |name: &str| controller.published.resource(name).is_some();
    fake.go_away().await;
    // Unseen: one service comes and one goes.
    fake.apply("/api/v1/services", service("pay", "10.96.0.11"));
    fake.delete("/api/v1/services", "shop", "cart");
    assert!(has("svc/shop/cart:80"));
    fake.come_back().await;
    eventually(|| has("svc/shop/pay:80")).await;
    eventually(|| !has("svc/shop/cart:80")).await;
    assert!(has("self/cart-1-uid"), "the rest is as it was");
    controller.stop().await;
}

#[tokio::test]
async fn replicas_have_one_authority_and_its_anchors_are_where_sidecars_are() {
    let fake = Fake::start().await;
    shop(&fake);
    let (one, two) = tokio::join!(controller(&fake), controller(&fake));
    let bundle = |controller: &Controller| controller.ca().bundle().borrow().clone();
    assert_eq!(bundle(&one), bundle(&two), "whoever came first made it");
    let anchors =
        || fake.get("/api/v1/configmaps", "shop", "weft-trust").map(|map| map["data"]["roots.pem"].clone());
    eventually(|| anchors() == Some(json!(one.ca().anchors()))).await;
    assert!(fake.get("/api/v1/configmaps", "other", "weft-trust").is_none());
    // A step on one is a step on the other.
    let authority = one.cluster_roots().unwrap().clone();
    authority.rotate(one.ca(), Some(RotateRoot::Add)).await.unwrap();
    assert_eq!(bundle(&one).roots.len(), 2);
    eventually(|| bundle(&two) == bundle(&one)).await;
    eventually(|| anchors() == Some(json!(two.ca().anchors()))).await;
    let refused = two.cluster_roots().unwrap().rotate(two.ca(), Some(RotateRoot::Add)).await.unwrap_err();
    assert!(refused.to_string().contains("under way"), "{refused}");
    // A replica that starts later reads the same.
    let three = controller(&fake).await;
    assert_eq!(bundle(&three), bundle(&one));
}

#[tokio::test]
async fn what_no_cluster_is_without_is_never_believed_to_be_absent() {
    let fake = Fake::start().await;
    shop(&fake);
    let controller = controller(&fake).await;
    controller.synced().await;
    fake.uninstall("/api/v1/services");
    let problems = async || ask::<Status>(&controller, "/api/v1/status").await.problems;
    let deadline = tokio::time::Instant::now() + Duration::from_secs(20);
    while !problems().await.iter().any(|problem| problem.reason.contains("Service objects cannot be watched"))
    {
        assert!(tokio::time::Instant::now() < deadline, "{:?}", problems().await);
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert!(controller.published.resource("svc/shop/cart:80").is_some());
    controller.stop().await;
}

#[tokio::test]
async fn two_installations_do_not_fight_over_a_namespace() {
    let fake = Fake::start().await;
    shop(&fake);
    let foreign = json!({"metadata": {"name": "weft-trust", "namespace": "shop",
        "annotations": {"weft.dev/controller-namespace": "other-weft"}}, "data": {"roots.pem": "theirs"}});
    fake.apply("/api/v1/configmaps", foreign);
    let controller = controller(&fake).await;
    let events = || fake.writes().iter().filter(|write| write.ends_with("/namespaces/shop/events")).count();
    eventually(|| events() == 1).await;
    let (authority, ca) = (controller.cluster_roots().unwrap(), controller.ca());
    authority.ensure(ca, "shop", None).await;
    let map = |namespace| fake.get("/api/v1/configmaps", namespace, "weft-trust");
    assert_eq!(map("shop").unwrap()["data"]["roots.pem"], "theirs", "whoever was there first stays");
    assert_eq!(events(), 1, "said once");
    // The other one is uninstalled: the cluster removes what was its own.
    fake.delete("/api/v1/configmaps", "shop", "weft-trust");
    authority.ensure(ca, "shop", None).await;
    assert_eq!(map("shop").unwrap()["data"]["roots.pem"], json!(ca.anchors()));
    // The first pod of a namespace that nobody has labelled: they are there before it is.
    authority.ensure(ca, "new", Some(Duration::from_secs(3_600))).await;
    assert_eq!(map("new").unwrap()["metadata"]["annotations"]["weft.dev/controller-namespace"], "weft");
    let before = fake.writes().len();
    authority.ensure(ca, "new", Some(Duration::from_secs(3_600))).await;
    assert_eq!(fake.writes().len(), before, "the second one costs nothing");
    // A namespace that is made anew has none.
    fake.delete("/api/v1/configmaps", "new", "weft-trust");
    authority.ensure(ca, "new", Some(Duration::ZERO)).await;
    assert!(map("new").is_some());
    controller.stop().await;
}

#[tokio::test]
async fn what_the_controller_makes_goes_with_the_installation_that_made_it() {
    let fake = Fake::start().await;
    shop(&fake);
    const LEASES: &str = "/apis/coordination.k8s.io/v1/leases";
    let made = [
        ("/api/v1/secrets", "weft", "weft-issuer"),
        ("/api/v1/secrets", "weft", "weft-webhook"),
        ("/api/v1/configmaps", "shop", "weft-trust"),
        (LEASES, "weft", "weft-controller"),
    ];
    let owners = || {
        made.map(|(kind, namespace, name)| {
            let owners = fake.get(kind, namespace, name)?["metadata"]["ownerReferences"].as_array()?.clone();
            assert!(owners.len() == 1 && owners[0]["kind"] == "ClusterRole", "{owners:?}");
            owners[0]["uid"].as_str().map(ToOwned::to_owned)
        })
    };
    // The second installation finds what the first one left, and what the cluster is about to remove.
    for uid in ["first", "second"] {
        fake.apply(ROLES, json!({"metadata": {"name": ROLE, "uid": uid}}));
        fake.delete(LEASES, "weft", "weft-controller");
        let issuer = fake.get("/api/v1/secrets", "weft", "weft-issuer").map(|secret| secret["data"].clone());
        let controller = controller(&fake).await;
        eventually(|| owners().iter().all(|owner| owner.as_deref() == Some(uid))).await;
        let kept = fake.get("/api/v1/secrets", "weft", "weft-issuer").unwrap()["data"].clone();
        assert!(issuer.is_none_or(|issuer| issuer == kept), "the authority is the same");
        controller.stop().await;
    }
    // What somebody supplied is theirs.
    let mut supplied = fake.get("/api/v1/secrets", "weft", "weft-issuer").unwrap();
    supplied["metadata"] = json!({"name": "weft-issuer", "namespace": "weft"});
    fake.delete("/api/v1/secrets", "weft", "weft-issuer");
    fake.apply("/api/v1/secrets", supplied);
    controller(&fake).await.stop().await;
    let supplied = fake.get("/api/v1/secrets", "weft", "weft-issuer").unwrap();
    assert!(supplied["metadata"]["ownerReferences"].is_null(), "{supplied}");
}

#[tokio::test]
async fn an_authority_outlives_the_role_that_owned_its_secret() {
    let fake = Fake::start().await;
    shop(&fake);
    const SECRETS: &str = "/api/v1/secrets";
    fake.apply(ROLES, json!({"metadata": {"name": ROLE, "uid": "first"}}));
    let controller = controller(&fake).await;
    let of = |kind, namespace, name| fake.get(kind, namespace, name).unwrap_or_default();
    let owner = |object: Value| object["metadata"]["ownerReferences"][0]["uid"].clone();
    let anchors = || of("/api/v1/configmaps", "shop", "weft-trust");
    let made = of(SECRETS, "weft", "weft-issuer");
    assert_eq!(owner(made.clone()), "first");
    eventually(|| owner(anchors()) == "first").await;
    // `kubectl replace --force` of the role: another uid, and the cluster removes what the old one owned.
    fake.apply(ROLES, json!({"metadata": {"name": ROLE, "uid": "second"}}));
    fake.delete(SECRETS, "weft", "weft-issuer");
    eventually(|| fake.get(SECRETS, "weft", "weft-issuer").is_some()).await;
    let back = of(SECRETS, "weft", "weft-issuer");
    assert_eq!(back["data"], made["data"], "the same authority");
    assert_eq!(owner(back), "second");
    eventually(|| owner(anchors()) == "second").await;
    controller.stop().await;
}

#[tokio::test]
async fn the_api_server_says_whose_a_token_is() {
    let mut fake = Fake::start().await;
    let token = |aud: &str, exp: u64| {
        format!("e30.{}.c2ln", BASE64.encode(json!({"aud": [aud], "exp": exp}).to_string()))
    };
    let good = token("weft", u64::MAX);
    fake.token(
        &good,
        json!({"authenticated": true, "audiences": ["weft"], "user": {
            "username": "system:serviceaccount:shop:cart",
            "extra": {"authentication.kubernetes.io/pod-uid": ["u-1"],
                "authentication.kubernetes.io/pod-name": ["cart-1"]}}}),
    );
    let client = super::client_of(kube::Config::new(fake.uri())).unwrap();
    let reviewer = Reviewer::new(client);
    let claims = reviewer.check(&format!("{good}\n")).await.unwrap();
    assert_eq!((&*claims.ns, &*claims.sa, &*claims.uid), ("shop", "cart", "u-1"));
    let asked = fake.writes().len();
    assert_eq!(reviewer.check(&token("api", u64::MAX)).await, Err(TokenError::Unknown));
    assert_eq!(reviewer.check(&token("weft", 1)).await, Err(TokenError::Expired));
    assert_eq!(reviewer.check("no token").await, Err(TokenError::Syntax));
    assert_eq!(fake.writes().len(), asked, "nobody was asked about these");
    assert_eq!(reviewer.check(&token("weft", u64::MAX - 1)).await, Err(TokenError::Unknown));
    fake.go_away().await;
    assert_eq!(reviewer.check(&good).await, Err(TokenError::Unavailable), "not the workload's fault");
}

#[tokio::test]
async fn authors_read_on_their_objects_what_became_of_them() {
    let fake = Fake::start().await;
    shop(&fake);
    fake.install(&ROUTES);
    fake.install(&POLICIES);
    let foreign =
        json!({"parentRef": {"name": "gw"}, "controllerName": "example.com/gateway", "conditions": []});
    let mut good = route("good");
    good["status"] = json!({"parents": [foreign]});
    fake.apply(ROUTES[0], good);
    let mut lost = route("lost");
    lost["spec"]["parentRefs"][0]["name"] = json!("nowhere");
    fake.apply(ROUTES[0], lost);
    let policy = |name: &str, request: &str| {
        json!({
            "metadata": {"name": name, "namespace": "shop", "generation": 2},
            "spec": {"targetRefs": [{"kind": "Service", "name": "cart"}], "timeouts": {"request": request}},
        })
    };
    fake.apply(POLICIES[0], policy("good", "1s"));
    fake.apply(POLICIES[0], policy("bad", "soon"));
    let controller = controller(&fake).await;
    controller.synced().await;
    let parents = |name: &str| {
        let found = fake.get(ROUTES[0], "shop", name).unwrap();
        found["status"]["parents"].as_array().cloned().unwrap_or_default()
    };
    eventually(|| parents("good").len() == 2 && parents("lost").len() == 1).await;
    assert_eq!(parents("good")[0], foreign, "somebody else's word stays");
    let ours = parents("good")[1].clone();
    assert_eq!(ours["controllerName"], "weft.dev/mesh-controller");
    assert_eq!(
        (&ours["conditions"][0]["type"], &ours["conditions"][0]["status"]),
        (&json!("Accepted"), &json!("True"))
    );
    assert_eq!(ours["conditions"][0]["observedGeneration"], 1);
    assert_eq!(parents("lost")[0]["conditions"][0]["reason"], "NoMatchingParent");
    let status = |name: &str| fake.get(POLICIES[0], "shop", name).unwrap()["status"].clone();
    eventually(|| !status("good").is_null() && !status("bad").is_null()).await;
    assert_eq!(status("good")["conditions"][0]["status"], "True");
    assert!(status("good")["applied"].as_str().unwrap().starts_with("0/0 @ "), "{}", status("good"));
    let message = status("bad")["conditions"][0]["message"].to_string();
    assert!(message.contains("spec.timeouts.request") && message.contains("soon"), "{message}");
    let events = || fake.writes().iter().filter(|write| write.ends_with("/namespaces/shop/events")).count();
    eventually(|| events() == 1).await;
    // What stands there is not written again, whatever else changes.
    let before = fake.writes().len();
    let mut found = fake.get(ROUTES[0], "shop", "good").unwrap();
    found["metadata"]["labels"] = json!({"team": "a"});
    fake.apply(ROUTES[0], found);
    fake.delete(ROUTES[0], "shop", "lost");
    let mut again = route("again");
    again["spec"]["parentRefs"][0]["name"] = json!("nowhere");
    fake.apply(ROUTES[0], again);
    eventually(|| parents("again").len() == 1).await;
    let written: Vec<_> =
        fake.writes()[before..].iter().filter(|write| write.ends_with("/status")).cloned().collect();
    assert!(written.iter().all(|write| write.contains("/again/")), "{written:?}");
    controller.stop().await;
}

#[tokio::test]
async fn an_api_server_that_says_nothing_is_not_waited_for() {
    // It accepts, as the kernel of a machine does whose program hangs.
    let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let uri = format!("http://{}", silent.local_addr().unwrap()).parse().unwrap();
    let client = super::bounded(kube::Config::new(uri), Duration::from_millis(100)).unwrap();
    let secrets: kube::Api<k8s_openapi::api::core::v1::Secret> = kube::Api::namespaced(client, "weft");
    assert!(secrets.get("weft-issuer").await.is_err());
    assert!(secrets.watch(&kube::api::WatchParams::default(), "0").await.is_err());
}

#[tokio::test]
async fn an_object_whose_status_is_refused_keeps_no_others_from_theirs() {
    let fake = Fake::start().await;
    shop(&fake);
    fake.install(&ROUTES);
    // In the order of their names.
    fake.apply(ROUTES[0], route("a-refused"));
    fake.apply(ROUTES[0], route("good"));
    fake.spoil("a-refused");
    let controller = controller(&fake).await;
    eventually(|| fake.get(ROUTES[0], "shop", "good").is_some_and(|good| !good["status"].is_null())).await;
    let tries = fake.writes().iter().filter(|write| write.contains("/a-refused/")).count();
    assert_eq!(tries, 1, "and is not asked for again at once");
    controller.stop().await;
}

#[tokio::test]
async fn a_question_to_one_replica_is_answered_by_all() {
    let fake = Fake::start().await;
    shop(&fake);
    fake.apply(
        "/api/v1/services",
        json!({"metadata": {"name": "weft-controller", "namespace": "weft"}, "spec": {"clusterIP": "10.96.0.2",
            "selector": {"app": "weft-controller"}, "ports": [{"name": "discovery", "port": 14010}]}}),
    );
    let (one, two) = tokio::join!(replica(&fake, "one"), replica(&fake, "two"));
    for (name, port) in [("one", one.discovery().port()), ("two", two.discovery().port()), ("three", 1)] {
        fake.apply(
            "/api/v1/pods",
            json!({"metadata": {"name": name, "namespace": "weft", "uid": format!("{name}-uid")},
                "spec": {"containers": []}, "status": {"podIP": "127.0.0.1", "podIPs": [{"ip": "127.0.0.1"}]}}),
        );
        fake.apply(
            "/apis/discovery.k8s.io/v1/endpointslices",
            json!({"metadata": {"name": name, "namespace": "weft",
                    "labels": {"kubernetes.io/service-name": "weft-controller"}},
                "addressType": "IPv4", "ports": [{"name": "discovery", "port": port}],
                "endpoints": [{"addresses": ["127.0.0.1"],
                    "targetRef": {"kind": "Pod", "name": name, "namespace": "weft", "uid": format!("{name}-uid")}}]}),
        );
    }
    one.synced().await;
    two.synced().await;
    let mut answered = Vec::new();
    let deadline = tokio::time::Instant::now() + Duration::from_secs(20);
    while answered.len() < 2 && tokio::time::Instant::now() < deadline {
        let status: Status = ask(&one, "/api/v1/status").await;
        assert!(status.synced);
        answered = status.replicas.into_iter().map(|replica| (replica.name, replica.answered)).collect();
    }
    answered.sort();
    assert_eq!(answered, [("three".to_owned(), false), ("two".to_owned(), true)], "who is silent is named");
    let routes: Routes = ask(&one, "/api/v1/routes?window=1m").await;
    assert_eq!(routes.window_s, 60);
    tokio::join!(one.stop(), two.stop());
}

async fn ask<T: serde::de::DeserializeOwned>(controller: &Controller, path: &str) -> T {
    let mut stream = tokio::net::TcpStream::connect(controller.api()).await.unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nHost: weft\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    serde_json::from_str(answer.split_once("\r\n\r\n").unwrap().1).unwrap()
}
