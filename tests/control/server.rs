//! What a controller must do, asked by a client that is not ours.

use std::time::Duration;

use bytes::Bytes;
use tokio::time::timeout;

use crate::{
    raw::{DELTA, LONG, Request, STATE_OF_THE_WORLD, frame},
    world::{World, pod, route, service, versioned},
};

const SVC: &str = "Service";
const A: &str = "svc/shop/a:80";
const B: &str = "svc/shop/b:80";

#[tokio::test]
async fn a_nonce_belongs_to_one_stream_and_does_not_follow_from_the_version() {
    let world = World::start("nonce", &versioned("a", 1)).await;
    let mut nonces = Vec::new();
    let mut versions = Vec::new();
    for _ in 0..2 {
        let mut stream = world.stream().await;
        for _ in 0..2 {
            stream.send(&Request::subscribe(SVC, &[A])).await;
            let response = stream.take().await;
            versions.push(response.version(A).to_owned());
            nonces.push(response.nonce);
        }
    }
    versions.dedup();
    assert_eq!(versions.len(), 1, "one version, four responses");
    nonces.sort();
    nonces.dedup();
    assert_eq!(nonces.len(), 4);
    // The nonce of another stream is no answer on this one.
    let mut stream = world.stream().await;
    stream.send(&Request::subscribe(SVC, &[A])).await;
    let mine = stream.next().await;
    stream.send(&Request { nonce: nonces[0].clone(), ..Request::of(SVC) }).await;
    world.write(&versioned("a", 2));
    assert!(stream.is_quiet().await, "still one response without an answer");
    stream.send(&Request::ack(&mine)).await;
    assert_eq!(stream.next().await.says(), [A]);
}

#[tokio::test]
async fn a_subscription_that_rides_a_stale_nonce_is_honoured() {
    let world = World::start("stale", &(versioned("a", 1) + &versioned("b", 1))).await;
    let mut stream = world.stream().await;
    stream.send(&Request::subscribe(SVC, &[A])).await;
    let first = stream.take().await;
    stream.send(&Request { nonce: "of-yesterday".to_owned(), ..Request::subscribe(SVC, &[B]) }).await;
    assert_eq!(stream.take().await.says(), [B]);
    // The same of an unsubscription, and of one that carries no nonce at all.
    stream.send(&Request { nonce: first.nonce, ..Request::unsubscribe(SVC, &[A]) }).await;
    world.write(&(versioned("a", 2) + &versioned("b", 2)));
    assert_eq!(stream.take().await.says(), [B]);
    stream.send(&Request::unsubscribe(SVC, &[B])).await;
    world.write(&(versioned("a", 3) + &versioned("b", 3)));
    assert!(stream.is_quiet().await);
}

#[tokio::test]
async fn a_change_of_subscriptions_is_no_acknowledgement() {
    let world = World::start("spontaneous", &(versioned("a", 1) + &versioned("b", 1))).await;
    let mut stream = world.stream().await;
    stream.send(&Request::subscribe(SVC, &[A])).await;
    let first = stream.next().await;
    stream.send(&Request::subscribe(SVC, &[B])).await;
    assert!(stream.is_quiet().await, "one response of a type at a time");
    stream.send(&Request::ack(&first)).await;
    assert_eq!(stream.next().await.says(), [B]);
}

#[tokio::test]
async fn error_detail_alone_makes_a_refusal() {
    let world = World::start("nack", &versioned("a", 1)).await;
    let mut stream = world.stream().await;
    stream.send(&Request::subscribe(SVC, &[A])).await;
    let first = stream.next().await;
    // Versions in an answer mean nothing: this is an acknowledgement.
    stream.send(&Request::ack(&first).holding(&[(A, "another")])).await;
    assert!(stream.is_quiet().await);
    assert_eq!(world.metric("nacks_total").await, 0);
    stream.send(&Request::subscribe(SVC, &[A])).await;
    let second = stream.next().await;
    // An empty error is one, too.
    stream.send(&Request { error: Some(String::new()), ..Request::ack(&second) }).await;
    world.until("nacks_total", 1).await;
}

#[tokio::test]
async fn a_refused_version_is_not_sent_again_and_the_next_one_is() {
    let world = World::start("refused", &(versioned("a", 1) + &versioned("b", 1))).await;
    let mut stream = world.stream().await;
    stream.send(&Request::subscribe(SVC, &[A, B])).await;
    let first = stream.next().await;
    let named = (A.to_owned(), first.version(A).to_owned());
    stream.send(&Request { rejected: vec![named], ..Request::nack(&first) }).await;
    world.until("nacks_total", 1).await;
    assert!(stream.is_quiet().await, "no hot loop");
    // Something else changes: the refused one does not ride along.
    world.write(&(versioned("a", 1) + &versioned("b", 2)));
    assert_eq!(stream.take().await.says(), [B]);
    world.write(&(versioned("a", 2) + &versioned("b", 2)));
    assert_eq!(stream.next().await.says(), [A]);
}

#[tokio::test]
async fn an_acknowledgement_triggers_nothing() {
    let world = World::start("ack", &versioned("a", 1)).await;
    let mut stream = world.stream().await;
    stream.send(&Request::subscribe(SVC, &[A])).await;
    let first = stream.take().await;
    assert!(stream.is_quiet().await);
    // Nor does one that comes twice.
    stream.send(&Request::ack(&first)).await;
    assert!(stream.is_quiet().await);
}

#[tokio::test]
async fn a_first_request_without_names_asks_for_everything_and_a_later_one_for_nothing() {
    let world = World::start("wildcard", &versioned("a", 1)).await;
    let mut stream = world.stream().await;
    // Weft has no everything: whoever asks for it is told so, and does not wait.
    stream.send(&Request::of(SVC)).await;
    assert_eq!(stream.take().await.says(), ["-*"]);
    stream.send(&Request::subscribe("Route", &["*"])).await;
    assert_eq!(stream.take().await.says(), ["-*"]);
    let mut stream = world.stream().await;
    stream.send(&Request::subscribe(SVC, &[A])).await;
    stream.take().await;
    stream.send(&Request::unsubscribe(SVC, &[A])).await;
    stream.send(&Request::of(SVC)).await;
    world.write(&versioned("a", 2));
    assert!(stream.is_quiet().await, "nothing is subscribed");
    // "Subscribe to nothing", as ztunnel says it.
    let mut stream = world.stream().await;
    let nothing = Request { subscribe: vec!["*".to_owned()], ..Request::unsubscribe(SVC, &["*"]) };
    stream.send(&nothing).await;
    assert!(stream.is_quiet().await);
}

#[tokio::test]
async fn an_unsubscribed_name_that_everything_would_cover_stays_unsubscribed() {
    let world = World::start("covered", &versioned("a", 1)).await;
    let mut stream = world.stream().await;
    stream.send(&Request::subscribe(SVC, &["*", A])).await;
    assert_eq!(stream.take().await.says(), [A, "-*"]);
    // "*" covers nothing here, so there is nothing to answer, and nothing comes later.
    stream.send(&Request::unsubscribe(SVC, &[A])).await;
    world.write(&versioned("a", 2));
    assert!(stream.is_quiet().await);
}

#[tokio::test]
async fn a_name_that_is_subscribed_again_is_answered_although_unchanged() {
    let world = World::start("again", &(service("a", 8080) + &pod("a-1", "a", [10, 0, 0, 1]))).await;
    let mut stream = world.stream().await;
    stream.send(&Request::subscribe(SVC, &[A, "svc/shop/none:80"])).await;
    let first = stream.take().await;
    stream.send(&Request::subscribe(SVC, &[A, "svc/shop/none:80"])).await;
    let again = stream.take().await;
    assert_eq!((again.says(), again.version(A)), (first.says(), first.version(A)));
    // A collection: whole once more, begun and completed.
    stream.send(&Request::subscribe("Endpoint", &["ep/shop/a:80/*"])).await;
    let whole = stream.take().await;
    assert_eq!(whole.says(), ["ep/shop/a:80/a-1-uid", "ep/shop/a:80/$head"]);
    stream.send(&Request::subscribe("Endpoint", &["ep/shop/a:80/*"])).await;
    assert_eq!(stream.take().await.says(), whole.says());
}

#[tokio::test]
async fn a_missing_name_is_answered_at_once_remembered_and_sent_when_it_appears() {
    let world = World::start("missing", &versioned("a", 1)).await;
    let mut stream = world.stream().await;
    let names =
        [(SVC, B), ("Endpoint", "ep/shop/b:80/*"), ("Route", "route/shop/b:80"), (SVC, "ip/10.96.9.9:80")];
    for (ty, name) in names {
        stream.send(&Request::subscribe(ty, &[name])).await;
        assert_eq!(stream.take().await.says(), [format!("-{name}")]);
    }
    assert!(stream.is_quiet().await, "told once");
    world.write(
        &(versioned("a", 1) + &service("b", 8080) + &pod("b-1", "b", [10, 0, 0, 2]) + &route("b", "a")),
    );
    // Nothing that has a selector only: an address is given below.
    let mut seen = Vec::new();
    while seen.len() < 2 {
        let response = stream.take().await;
        seen.extend(response.says().into_iter().filter(|name| name.ends_with("b:80")));
    }
    seen.sort();
    assert_eq!(seen, ["route/shop/b:80", B]);
}

#[tokio::test]
async fn what_is_gone_is_removed_whatever_its_type() {
    let all = service("a", 8080)
        + &pod("a-1", "a", [10, 0, 0, 1])
        + &pod("a-2", "a", [10, 0, 0, 2])
        + &route("a", "a");
    let world = World::start("removed", &all).await;
    let mut stream = world.stream().await;
    for (ty, name) in [
        (SVC, A),
        (SVC, "ip/10.0.0.2:1234"),
        (SVC, "host/a.shop.svc.cluster.local"),
        ("Route", "route/shop/a:80"),
        ("Endpoint", "ep/shop/a:80/*"),
    ] {
        stream.send(&Request::subscribe(ty, &[name])).await;
        let response = stream.take().await;
        assert!(response.removed.is_empty(), "{response:?}");
    }
    // A pod goes: its address, and one member of the collection.
    world.write(&(service("a", 8080) + &pod("a-1", "a", [10, 0, 0, 1]) + &route("a", "a")));
    let mut gone = [stream.take().await.removed, stream.take().await.removed].concat();
    gone.sort();
    assert_eq!(gone, ["ep/shop/a:80/a-2-uid", "ip/10.0.0.2:1234"]);
    // Then everything.
    world.write(&versioned("other", 1));
    let mut gone = Vec::new();
    while gone.len() < 4 {
        gone.extend(stream.take().await.removed);
    }
    gone.sort();
    assert_eq!(gone, ["ep/shop/a:80/*", "host/a.shop.svc.cluster.local", "route/shop/a:80", A]);
}

#[tokio::test]
async fn what_takes_a_place_is_told_before_what_it_replaces_is_removed() {
    let old = service("old", 8080) + &pod("old-1", "old", [10, 0, 0, 1]);
    let new = service("new", 8080) + &pod("new-1", "new", [10, 0, 0, 2]);
    let world = World::start("make", &(service("a", 8080) + &old + &route("a", "old"))).await;
    let mut stream = world.stream().await;
    for (ty, name) in
        [("Route", "route/shop/a:80"), (SVC, "svc/shop/old:80"), ("Endpoint", "ep/shop/old:80/*")]
    {
        stream.send(&Request::subscribe(ty, &[name])).await;
        assert!(stream.take().await.removed.is_empty());
    }
    world.write(&(service("a", 8080) + &new + &route("a", "new")));
    let mut told = Vec::new();
    while told.len() < 3 {
        told.extend(stream.take().await.says());
    }
    assert_eq!(told[0], "route/shop/a:80");
    told[1..].sort();
    assert_eq!(told[1..], ["-ep/shop/old:80/*", "-svc/shop/old:80"]);
}

#[tokio::test]
async fn a_reconnecting_client_hears_of_what_is_gone_and_of_what_changed_and_nothing_else() {
    let world = World::start("resume", &(versioned("a", 1) + &versioned("b", 1))).await;
    let mut stream = world.stream().await;
    stream.send(&Request::subscribe(SVC, &[A, B])).await;
    let first = stream.take().await;
    drop(stream);
    world.write(&(versioned("a", 1) + &versioned("b", 2)));
    world.until("source_batches_total", 2).await;
    let mut stream = world.stream().await;
    let held =
        [(A, first.version(A)), (B, first.version(B)), ("svc/shop/gone:80", "1"), ("svc/shop/gone2:80", "1")];
    // A name that it holds and does not ask for any more is not its business.
    let names = [A, B, "svc/shop/gone:80"];
    stream.send(&Request::subscribe(SVC, &names).holding(&held)).await;
    assert_eq!(stream.take().await.says(), [B]);
    assert_eq!(stream.take().await.says(), ["-svc/shop/gone:80"]);
    // Versions say nothing later than in the first request of a type.
    stream.send(&Request::unsubscribe(SVC, &[A])).await;
    stream.send(&Request::subscribe(SVC, &[A]).holding(&[(A, first.version(A))])).await;
    assert_eq!(stream.take().await.says(), [A]);
}

#[tokio::test]
async fn a_collection_is_resumed_where_it_was() {
    let pods = |n: u8| (1..=n).map(|i| pod(&format!("a-{i}"), "a", [10, 0, 0, i])).collect::<String>();
    let mut world = World::start("cursor", &(service("a", 8080) + &pods(3))).await;
    let collection = ["ep/shop/a:80/*"];
    let mut stream = world.stream().await;
    stream.send(&Request::subscribe("Endpoint", &collection)).await;
    let whole = stream.take().await;
    assert_eq!(whole.resources.len(), 4);
    let head = whole.resources.iter().find(|resource| resource.name.ends_with("$head")).unwrap();
    let head = crate::raw::fields(&head.body.as_ref().unwrap().1);
    let number = |field: u64| head.iter().find(|(n, ..)| *n == field).map_or(0, |(_, value, _)| *value);
    let epoch = String::from_utf8(head.iter().find(|(n, ..)| *n == 1).unwrap().2.clone()).unwrap();
    assert_eq!((number(3), number(4), number(6)), (3, 1, 1), "count, complete, begin");
    let cursor = format!("{epoch}/{}/{:016x}", number(2), number(5));
    drop(stream);
    // Nothing happened: nothing to say. One pod more: one member to say.
    let resume = Request::subscribe("Endpoint", &collection).holding(&[(collection[0], &cursor)]);
    let mut stream = world.stream().await;
    stream.send(&resume).await;
    assert!(stream.is_quiet().await);
    world.write(&(service("a", 8080) + &pods(4)));
    assert_eq!(stream.take().await.says(), ["ep/shop/a:80/a-4-uid"]);
    let mut stream = world.stream().await;
    stream.send(&resume).await;
    assert_eq!(stream.take().await.says(), ["ep/shop/a:80/a-4-uid"]);
    // Another run has another log; an equal set is nothing to say to it either.
    world.write(&(service("a", 8080) + &pods(3)));
    assert_eq!(stream.take().await.says(), ["-ep/shop/a:80/a-4-uid"]);
    world.restart().await;
    let mut stream = world.stream().await;
    stream.send(&resume).await;
    assert!(stream.is_quiet().await);
    let mut stream = world.stream().await;
    let nonsense = Request::subscribe("Endpoint", &collection).holding(&[(collection[0], "what?")]);
    stream.send(&nonsense).await;
    assert_eq!(stream.take().await.resources.len(), 4, "from the beginning");
}

#[tokio::test]
async fn a_controller_that_starts_on_a_broken_file_keeps_the_last_good_and_names_what_broke() {
    let good = service("b", 8080) + &pod("b-1", "b", [10, 0, 0, 2]) + &versioned("a", 1);
    let world = World::start("cold", &good).await;
    let names = [(SVC, A), (SVC, B), ("Endpoint", "ep/shop/b:80/*")];
    let mut stream = world.stream().await;
    let mut held = Vec::new();
    for (ty, name) in names {
        stream.send(&Request::subscribe(ty, &[name])).await;
        held.push(stream.take().await.says());
    }
    // On disk before it dies: the disk is not waited for when a change is told.
    let kept = world.folder.0.join("state/last-good-objects.jsonl");
    let on_disk = || std::fs::read_to_string(&kept).is_ok_and(|text| text.contains("b-1-uid"));
    timeout(LONG, async {
        while !on_disk() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await
    .unwrap();
    // One field of one object, and a syntax error behind which nobody knows what it was.
    let broken = versioned("a", 1).replace("port: 80", "port: eighty") + "---\nkind: [\n";
    let world = world.crash_and_find(&broken).await;
    let mut stream = world.stream().await;
    for ((ty, name), held) in names.into_iter().zip(held) {
        stream.send(&Request::subscribe(ty, &[name])).await;
        assert_eq!(stream.take().await.says(), held, "callers see nothing of it");
    }
    let (_, status) = world.http("/api/v1/status").await;
    for said in ["mesh.yaml", "spec.ports[0].port", "\"kept_last_good\":true"] {
        assert!(status.contains(said), "{said} in {status}");
    }
    // Mended, the folder counts again, and what it no longer has is gone.
    world.write(&versioned("a", 2));
    let mut told = Vec::new();
    while told.len() < 3 {
        told.extend(stream.take().await.says());
    }
    told.sort();
    assert_eq!(told, ["-ep/shop/b:80/*", "-svc/shop/b:80", A]);
}

#[tokio::test]
async fn the_node_may_stand_in_the_first_message_only_or_nowhere() {
    let world = World::start("node", &versioned("a", 1)).await;
    let mut stream = world.stream().await;
    stream.send(&Request { node: Some("web-1".to_owned()), ..Request::subscribe(SVC, &[A]) }).await;
    assert_eq!(stream.take().await.says(), [A]);
    stream.send(&Request::subscribe(SVC, &[B])).await;
    assert_eq!(stream.take().await.says(), [format!("-{B}")]);
    let mut stream = world.stream().await;
    stream.send(&Request::subscribe(SVC, &[A])).await;
    assert_eq!(stream.take().await.says(), [A]);
    // A node is nobody's identity.
    stream
        .send(&Request {
            node: Some("cart-1-uid".to_owned()),
            ..Request::subscribe("WorkloadConfig", &["self/a-1-uid"])
        })
        .await;
    assert_eq!(stream.take().await.says(), ["-self/a-1-uid"]);
}

#[tokio::test]
async fn an_unknown_type_does_not_end_the_stream() {
    let world = World::start("unknown", &versioned("a", 1)).await;
    let mut stream = world.stream().await;
    for ty in
        ["type.googleapis.com/envoy.config.cluster.v3.Cluster", "type.googleapis.com/weft.v9.New", "", "?"]
    {
        let request = Request { ty: ty.to_owned(), ..Request::subscribe(SVC, &["x"]) };
        stream.send(&request).await;
    }
    stream.send(&Request::subscribe(SVC, &[A])).await;
    assert_eq!(stream.take().await.says(), [A]);
}

#[tokio::test]
async fn a_response_names_a_resource_once() {
    let world = World::start("once", &(service("a", 8080) + &pod("a-1", "a", [10, 0, 0, 1]))).await;
    let mut stream = world.stream().await;
    stream.send(&Request::subscribe(SVC, &[A, A, B, B])).await;
    assert_eq!(stream.take().await.says(), [A.to_owned(), format!("-{B}")]);
    // A member of a collection by itself would stand beside its collection.
    stream
        .send(&Request::subscribe("Endpoint", &["ep/shop/a:80/a-1-uid", "ep/shop/a:80/*", "ep/shop/a:80/*"]))
        .await;
    assert_eq!(stream.take().await.says(), ["ep/shop/a:80/a-1-uid", "ep/shop/a:80/$head"]);
}

#[tokio::test]
async fn a_reader_that_stalls_delays_nobody_and_hears_the_last_word_only() {
    let world = World::start("stalled", &versioned("a", 1)).await;
    let mut stalled = world.stream().await;
    stalled.send(&Request::subscribe(SVC, &[A])).await;
    let unanswered = stalled.next().await;
    let mut lively = world.stream().await;
    lively.send(&Request::subscribe(SVC, &[A])).await;
    lively.take().await;
    let mut last = String::new();
    for version in 2..=12 {
        world.write(&versioned("a", version));
        last = lively.take().await.version(A).to_owned();
    }
    assert!(stalled.is_quiet().await);
    stalled.send(&Request::ack(&unanswered)).await;
    let caught_up = stalled.take().await;
    assert_eq!((caught_up.says(), caught_up.version(A)), (vec![A.to_owned()], &*last));
    assert!(stalled.is_quiet().await, "ten changes were one");
}

#[tokio::test]
async fn large_answers_come_in_parts_removals_first() {
    let many = |n: u16| (0..n).map(|i| versioned(&format!("s{i}"), 1)).collect::<String>();
    let world = World::start("batch", &many(400)).await;
    let mut stream = world.stream().await;
    let names: Vec<_> = (0..410).map(|i| format!("svc/shop/s{i}:80")).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    stream.send(&Request::subscribe(SVC, &names)).await;
    let (mut there, mut gone, mut parts) = (0, 0, 0);
    while there < 400 {
        let response = stream.take().await;
        assert!(response.resources.len() + response.removed.len() <= 256);
        gone += response.removed.len();
        assert!(parts > 0 || gone == 10, "who waits for a name that is not there hears it first");
        there += response.resources.len();
        parts += 1;
    }
    assert!((there, gone) == (400, 10) && parts >= 2, "{there} {gone} {parts}");
}

#[tokio::test]
async fn frames_may_be_cut_anywhere() {
    let world = World::start("frames", &(versioned("a", 1) + &versioned("b", 1))).await;
    let mut stream = world.stream().await;
    // Two messages in one DATA frame, then one message byte by byte.
    let (one, two) =
        (Request::subscribe(SVC, &[A]).encode(), Request::subscribe("Route", &["route/shop/a:80"]).encode());
    stream.raw([frame(&one), frame(&two)].concat().into()).await;
    let mut said = [stream.take().await.says(), stream.take().await.says()].concat();
    said.sort();
    assert_eq!(said, ["-route/shop/a:80", A]);
    for byte in frame(&Request::subscribe(SVC, &[B]).encode()) {
        stream.raw(Bytes::from(vec![byte])).await;
    }
    assert_eq!(stream.take().await.says(), [B]);
}

#[tokio::test]
async fn fields_that_are_unknown_are_skipped() {
    let world = World::start("fields", &versioned("a", 1)).await;
    let mut stream = world.stream().await;
    let mut request = Request::subscribe(SVC, &[A]).encode();
    // Envoy's `resource_locators_subscribe`, and numbers that nobody has given out.
    request.extend(crate::raw::Message::default().text(8, "x").uint(1_000, 7).text(1_001, "y").done());
    stream.raw(frame(&request)).await;
    assert_eq!(stream.take().await.says(), [A]);
}

#[tokio::test]
async fn what_is_no_message_ends_its_stream_and_no_other() {
    let world = World::start("garbage", &versioned("a", 1)).await;
    let connection = world.connect("web", "web-1-uid").await;
    let mut good = connection.call(DELTA);
    good.send(&Request::subscribe(SVC, &[A])).await;
    good.take().await;
    let huge = [&[0][..], &u32::MAX.to_be_bytes()].concat();
    for garbage in [frame(&[0xff; 20]), vec![1, 0, 0, 0, 1, 0].into(), huge.into(), vec![9; 40].into()] {
        let mut bad = connection.call(DELTA);
        bad.send(&Request::subscribe(SVC, &[A])).await;
        bad.next().await;
        bad.raw(garbage).await;
        bad.ended().await;
    }
    // More names than a stream may have: the sidecar is told which bound it was.
    let mut greedy = connection.call(DELTA);
    let names: Vec<String> = (0..20_001).map(|i| format!("svc/shop/n{i}:80")).collect();
    greedy.send(&Request { subscribe: names, ..Request::of(SVC) }).await;
    assert_eq!(greedy.ended().await, Some(8), "RESOURCE_EXHAUSTED");
    world.until("protocol_errors_total", 1).await;
    world.write(&versioned("a", 2));
    assert_eq!(good.take().await.says(), [A]);
}

#[tokio::test]
async fn the_state_of_the_world_variant_is_not_spoken() {
    // The rules of that variant (a stale request is ignored; services are deleted by absence) have nobody to hold.
    let world = World::start("sotw", &versioned("a", 1)).await;
    let mut stream = world.connect("web", "web-1-uid").await.call(STATE_OF_THE_WORLD);
    stream.send(&Request::subscribe(SVC, &[A])).await;
    assert_eq!(stream.ended().await, Some(12), "UNIMPLEMENTED");
}
