//! The rules of the exchange, one test each, from messages built by hand: the server's against what any
//! Delta client may send, the client's against what any Delta server may send.
//!
//! Why by hand: client and server of one author agree on each other's mistakes.

#![allow(clippy::unwrap_used)]

use std::{
    cell::RefCell,
    collections::BTreeMap,
    time::{Duration, Instant},
};

use bytes::Bytes;
use prost::Message;
use weft_core::identity::PodUid;
use weft_proto::{
    Any,
    ads::{
        COLLECTION_HEAD_TYPE_URL, Change, Client, Collection, MAX_MESSAGE_LEN, MAX_RESOURCE_LEN, Priority,
        REJECTED_TYPE_URL, ResourceType, Source, Stream, Versioned,
        server::{
            ACK_TIMEOUT, HEAD_INTERVAL, MAX_BATCH, MAX_BATCH_LEN, MAX_NAMES, Nack, ProtocolError, Reply,
        },
    },
    pb::{
        ads::{DeltaDiscoveryRequest, DeltaDiscoveryResponse, Node, Resource, Status},
        v1::{CollectionHead, RejectedResource},
    },
};

use ResourceType::{Endpoint, Route, Service};

const CART: &str = "ep/shop/cart:80/*";

#[derive(Default)]
struct World {
    resources: RefCell<BTreeMap<(ResourceType, String), Versioned>>,
    collections: RefCell<BTreeMap<String, Collection>>,
}

impl World {
    fn set(&self, ty: ResourceType, name: &str, version: &str) {
        let body = Bytes::from(format!("{name}@{version}"));
        let versioned = Versioned { version: version.into(), body };
        self.resources.borrow_mut().insert((ty, name.to_owned()), versioned);
    }

    fn unset(&self, ty: ResourceType, name: &str) {
        self.resources.borrow_mut().remove(&(ty, name.to_owned()));
    }

    fn collection(&self, epoch: &str) -> Collection {
        let collection = Collection::new(epoch);
        self.collections.borrow_mut().insert(CART.to_owned(), collection.clone());
        collection
    }
}

impl Source for World {
    fn lookup(&self, ty: ResourceType, name: &str) -> Option<Versioned> {
        self.resources.borrow().get(&(ty, name.to_owned())).cloned()
    }

    fn collection(&self, name: &str) -> Option<Collection> {
        self.collections.borrow().get(name).cloned()
    }
}

fn uid(n: usize) -> PodUid {
    PodUid::new(&format!("pod-{n:05}")).unwrap()
}

fn put(collection: &Collection, n: usize, body: &str) {
    collection.publish(&uid(n), Bytes::from(body.to_owned()), Priority::Normal);
}

fn request(ty: ResourceType) -> DeltaDiscoveryRequest {
    DeltaDiscoveryRequest { type_url: ty.type_url().to_owned(), ..Default::default() }
}

fn subscribe(ty: ResourceType, names: &[&str]) -> DeltaDiscoveryRequest {
    let names = names.iter().map(|name| (*name).to_owned()).collect();
    DeltaDiscoveryRequest { resource_names_subscribe: names, ..request(ty) }
}

fn unsubscribe(ty: ResourceType, names: &[&str]) -> DeltaDiscoveryRequest {
    let names = names.iter().map(|name| (*name).to_owned()).collect();
    DeltaDiscoveryRequest { resource_names_unsubscribe: names, ..request(ty) }
}

fn resume(ty: ResourceType, held: &[(&str, &str)]) -> DeltaDiscoveryRequest {
    let names: Vec<_> = held.iter().map(|(name, _)| *name).collect();
    let versions = held.iter().map(|(name, version)| ((*name).to_owned(), (*version).to_owned()));
    DeltaDiscoveryRequest { initial_resource_versions: versions.collect(), ..subscribe(ty, &names) }
}

fn ack(response: &DeltaDiscoveryResponse) -> DeltaDiscoveryRequest {
    DeltaDiscoveryRequest {
        type_url: response.type_url.clone(),
        response_nonce: response.nonce.clone(),
        ..Default::default()
    }
}

fn nack(response: &DeltaDiscoveryResponse) -> DeltaDiscoveryRequest {
    let error = Status { code: 3, message: "no".to_owned(), details: vec![] };
    DeltaDiscoveryRequest { error_detail: Some(error), ..ack(response) }
}

/// `name@version` of what a response has, then `-name` of what it removes; heads as flags.
fn says(response: &DeltaDiscoveryResponse) -> Vec<String> {
    let told = response.resources.iter().map(|resource| {
        let any = resource.resource.as_ref().unwrap();
        if any.type_url == COLLECTION_HEAD_TYPE_URL {
            let head = CollectionHead::decode(any.value.clone()).unwrap();
            let begin = if head.begin { " begin" } else { "" };
            let complete = if head.complete { " complete" } else { "" };
            return format!("head {}{begin}{complete}", head.count);
        }
        assert_eq!(any.type_url, response.type_url);
        let name = resource.name.rsplit('/').next().unwrap();
        match ResourceType::from_type_url(&response.type_url) {
            Some(Endpoint) => format!("{name}={}", String::from_utf8_lossy(&any.value)),
            _ => format!("{}@{}", resource.name, resource.version),
        }
    });
    told.chain(response.removed_resources.iter().map(|name| format!("-{name}"))).collect()
}

/// Everything that the stream has to say, each response ACKed.
fn drain(stream: &mut Stream, world: &World, now: Instant) -> Vec<Vec<String>> {
    let mut all = Vec::new();
    while let Some(response) = stream.next(world, now) {
        all.push(says(&response));
        stream.receive(ack(&response)).unwrap();
    }
    all
}

mod server {
    use super::*;

    #[test]
    fn an_ack_triggers_nothing() {
        let (world, now) = (World::default(), Instant::now());
        world.set(Service, "a", "1");
        let mut stream = Stream::new(1);
        stream.receive(subscribe(Service, &["a"])).unwrap();
        let response = stream.next(&world, now).unwrap();
        assert_eq!(says(&response), ["a@1"]);
        assert_eq!(stream.receive(ack(&response)).unwrap().reply, Reply::Ack);
        assert_eq!(stream.next(&world, now), None);
        assert_eq!(stream.told(Service, "a"), Some("1"));
    }

    #[test]
    fn what_takes_a_place_is_told_before_what_it_replaces_is_taken_away() {
        let (world, now) = (World::default(), Instant::now());
        world.set(Service, "old", "1");
        world.set(Route, "r", "1");
        put(&world.collection("e"), 1, "x");
        let mut stream = Stream::new(1);
        for (ty, name) in [(Service, "old"), (Route, "r"), (Endpoint, CART)] {
            stream.receive(subscribe(ty, &[name])).unwrap();
        }
        drain(&mut stream, &world, now);
        // One change of the mesh: the route moves on, and what it named is gone.
        world.set(Route, "r", "2");
        world.set(Service, "new", "1");
        world.unset(Service, "old");
        world.collections.borrow_mut().clear();
        stream.receive(subscribe(Service, &["new"])).unwrap();
        let told = drain(&mut stream, &world, now);
        assert_eq!(told, [vec!["new@1"], vec!["r@2"], vec!["-ep/shop/cart:80/*"], vec!["-old"]]);
    }

    #[test]
    fn a_removal_waits_for_what_is_new_and_has_to_wait_itself() {
        let (world, now) = (World::default(), Instant::now());
        world.set(Service, "old", "1");
        world.set(Route, "r", "1");
        let mut stream = Stream::new(1);
        stream.receive(subscribe(Service, &["old"])).unwrap();
        stream.receive(subscribe(Route, &["r"])).unwrap();
        drain(&mut stream, &world, now);
        world.set(Route, "r", "2");
        let unanswered = stream.next(&world, now).unwrap();
        world.set(Route, "r", "3");
        world.unset(Service, "old");
        assert_eq!(stream.next(&world, now), None, "the route is still to come");
        stream.receive(ack(&unanswered)).unwrap();
        assert_eq!(says(&stream.next(&world, now).unwrap()), ["r@3"]);
        // On its way before it is enough: only what cannot be sent is waited for.
        assert_eq!(says(&stream.next(&world, now).unwrap()), ["-old"]);
    }

    #[test]
    fn a_nonce_is_of_one_stream_and_of_one_response() {
        let (world, now) = (World::default(), Instant::now());
        let mut nonces = Vec::new();
        for id in [1, 2] {
            world.set(Service, "a", "1");
            let mut stream = Stream::new(id);
            stream.receive(subscribe(Service, &["a"])).unwrap();
            for _ in 0..2 {
                // The same version twice: the nonce does not follow from it.
                let response = stream.next(&world, now).unwrap();
                stream.receive(ack(&response)).unwrap();
                stream.receive(subscribe(Service, &["a"])).unwrap();
                nonces.push(response.nonce);
            }
        }
        nonces.sort();
        nonces.dedup();
        assert_eq!(nonces.len(), 4);
    }

    #[test]
    fn a_stale_nonce_is_no_ack() {
        let (world, now) = (World::default(), Instant::now());
        world.set(Service, "a", "1");
        let mut stream = Stream::new(1);
        stream.receive(subscribe(Service, &["a"])).unwrap();
        let first = stream.next(&world, now).unwrap();
        stream.receive(ack(&first)).unwrap();
        world.set(Service, "a", "2");
        stream.next(&world, now).unwrap();
        assert_eq!(stream.receive(ack(&first)).unwrap().reply, Reply::Stale);
        assert_eq!(stream.receive(nack(&first)).unwrap().reply, Reply::Stale);
        assert!(stream.is_waiting(Service));
    }

    #[test]
    fn a_spontaneous_change_carries_no_nonce_and_is_honoured_even_on_a_stale_one() {
        let (world, now) = (World::default(), Instant::now());
        world.set(Service, "a", "1");
        world.set(Service, "b", "1");
        let mut stream = Stream::new(1);
        stream.receive(subscribe(Service, &["a"])).unwrap();
        let first = stream.next(&world, now).unwrap();
        let received = stream.receive(subscribe(Service, &["b"])).unwrap();
        assert_eq!(received.reply, Reply::None);
        assert!(stream.is_waiting(Service), "a change of subscription is no ACK");
        stream.receive(ack(&first)).unwrap();
        assert_eq!(drain(&mut stream, &world, now), [["b@1"]]);

        let mut stale = unsubscribe(Service, &["a"]);
        stale.resource_names_subscribe = vec!["c".to_owned()];
        stale.response_nonce = "from-another-stream".to_owned();
        let received = stream.receive(stale).unwrap();
        assert_eq!(received.reply, Reply::Stale);
        assert_eq!((&*received.subscribed[0], &*received.unsubscribed[0]), ("c", "a"));
        assert_eq!(drain(&mut stream, &world, now), [["-c"]]);
        assert!(!stream.is_subscribed(Service, "a"));
    }

    #[test]
    fn only_error_detail_makes_a_nack() {
        let (world, now) = (World::default(), Instant::now());
        world.set(Service, "a", "1");
        let mut stream = Stream::new(1);
        stream.receive(subscribe(Service, &["a"])).unwrap();
        let response = stream.next(&world, now).unwrap();
        let rejected = RejectedResource { name: "a".into(), version: "1".into(), reason: "bad".into() };
        let value = rejected.encode_to_vec().into();
        let mut request = nack(&response);
        request.error_detail.as_mut().unwrap().details = vec![
            Any { type_url: "type.googleapis.com/other".into(), value: Bytes::new() },
            Any { type_url: REJECTED_TYPE_URL.into(), value },
        ];
        let reply = stream.receive(request).unwrap().reply;
        assert_eq!(reply, Reply::Nack(Nack { message: "no".to_owned(), rejected: vec![rejected] }));
    }

    #[test]
    fn after_a_nack_that_version_is_not_sent_again_and_the_next_is() {
        let (world, now) = (World::default(), Instant::now());
        world.set(Service, "a", "1");
        let mut stream = Stream::new(1);
        stream.receive(subscribe(Service, &["a"])).unwrap();
        let response = stream.next(&world, now).unwrap();
        stream.receive(nack(&response)).unwrap();
        assert_eq!(stream.next(&world, now), None);
        world.set(Service, "a", "2");
        assert_eq!(drain(&mut stream, &world, now), [["a@2"]]);
    }

    #[test]
    fn a_first_request_without_names_asks_for_everything_and_a_later_one_does_not() {
        let (world, now) = (World::default(), Instant::now());
        world.set(Service, "a", "1");
        let mut stream = Stream::new(1);
        // Nothing of Weft has an everything: it is answered as missing, and nobody waits.
        assert_eq!(&*stream.receive(request(Service)).unwrap().subscribed[0], "*");
        assert_eq!(drain(&mut stream, &world, now), [["-*"]]);

        let mut stream = Stream::new(2);
        stream.receive(subscribe(Service, &["a"])).unwrap();
        drain(&mut stream, &world, now);
        stream.receive(unsubscribe(Service, &["a"])).unwrap();
        assert_eq!(stream.receive(request(Service)).unwrap().subscribed, []);
        world.set(Service, "a", "2");
        assert_eq!(stream.next(&world, now), None);

        // "Subscribe to nothing": the star comes and goes in the first request.
        let mut stream = Stream::new(3);
        let mut nothing = unsubscribe(Service, &["*"]);
        nothing.resource_names_subscribe = vec!["*".to_owned()];
        stream.receive(nothing).unwrap();
        assert_eq!(stream.next(&world, now), None);
        assert_eq!(stream.subscribed().count(), 0);
    }

    #[test]
    fn a_resubscription_is_answered_although_nothing_changed() {
        let (world, now) = (World::default(), Instant::now());
        world.set(Service, "a", "1");
        let mut stream = Stream::new(1);
        stream.receive(subscribe(Service, &["a", "gone"])).unwrap();
        assert_eq!(drain(&mut stream, &world, now), [["a@1", "-gone"]]);
        assert_eq!(stream.receive(subscribe(Service, &["a", "gone"])).unwrap().subscribed, []);
        assert_eq!(drain(&mut stream, &world, now), [["a@1", "-gone"]]);
    }

    #[test]
    fn a_missing_name_is_answered_at_once_remembered_and_sent_when_it_appears() {
        let (world, now) = (World::default(), Instant::now());
        let mut stream = Stream::new(1);
        stream.receive(subscribe(Service, &["a"])).unwrap();
        assert_eq!(drain(&mut stream, &world, now), [["-a"]]);
        assert_eq!(stream.next(&world, now), None);
        world.set(Service, "a", "1");
        assert_eq!(drain(&mut stream, &world, now), [["a@1"]]);
        world.unset(Service, "a");
        assert_eq!(drain(&mut stream, &world, now), [["-a"]]);
    }

    #[test]
    fn a_reconnecting_client_hears_what_changed_and_what_is_gone_and_nothing_else() {
        let (world, now) = (World::default(), Instant::now());
        world.set(Service, "same", "1");
        world.set(Service, "newer", "2");
        world.set(Service, "unheld", "1");
        let mut stream = Stream::new(1);
        let mut first = resume(Service, &[("same", "1"), ("newer", "1"), ("gone", "1")]);
        first.resource_names_subscribe.push("unheld".to_owned());
        stream.receive(first).unwrap();
        assert_eq!(drain(&mut stream, &world, now), [vec!["newer@2", "unheld@1"], vec!["-gone"]]);
    }

    #[test]
    fn versions_count_only_in_the_first_request_of_a_type() {
        let (world, now) = (World::default(), Instant::now());
        world.set(Service, "a", "1");
        world.set(Service, "b", "1");
        let mut stream = Stream::new(1);
        stream.receive(subscribe(Service, &["a"])).unwrap();
        drain(&mut stream, &world, now);
        stream.receive(resume(Service, &[("b", "1")])).unwrap();
        assert_eq!(drain(&mut stream, &world, now), [["b@1"]]);
    }

    #[test]
    fn the_node_is_only_in_the_first_message() {
        let mut stream = Stream::new(1);
        let node = |id: &str| Some(Node { id: id.to_owned(), ..Node::default() });
        stream.receive(DeltaDiscoveryRequest { node: node("one"), ..subscribe(Service, &["a"]) }).unwrap();
        stream.receive(subscribe(Route, &["a"])).unwrap();
        stream.receive(DeltaDiscoveryRequest { node: node("two"), ..subscribe(Route, &["b"]) }).unwrap();
        assert_eq!(stream.node().unwrap().id, "one");
    }

    #[test]
    fn an_unknown_type_does_not_end_the_stream() {
        let (world, now) = (World::default(), Instant::now());
        world.set(Service, "a", "1");
        let mut stream = Stream::new(1);
        let mut unknown = subscribe(Service, &["a"]);
        unknown.type_url = "type.googleapis.com/weft.v7.Hologram".to_owned();
        let received = stream.receive(unknown).unwrap();
        assert_eq!((received.ty, received.reply), (None, Reply::None));
        assert_eq!(stream.next(&world, now), None);
        stream.receive(subscribe(Service, &["a"])).unwrap();
        assert_eq!(drain(&mut stream, &world, now), [["a@1"]]);
    }

    #[test]
    fn one_response_of_a_type_is_un_acked_and_other_types_do_not_wait() {
        let (world, now) = (World::default(), Instant::now());
        world.set(Service, "a", "1");
        world.set(Route, "a", "1");
        let mut stream = Stream::new(1);
        stream.receive(subscribe(Service, &["a"])).unwrap();
        let first = stream.next(&world, now).unwrap();
        world.set(Service, "a", "2");
        assert_eq!(stream.next(&world, now), None);
        stream.receive(subscribe(Route, &["a"])).unwrap();
        assert_eq!(says(&stream.next(&world, now).unwrap()), ["a@1"]);
        stream.receive(ack(&first)).unwrap();
        assert_eq!(says(&stream.next(&world, now).unwrap()), ["a@2"]);
    }

    #[test]
    fn what_changes_many_times_between_two_sends_is_sent_once() {
        let (world, now) = (World::default(), Instant::now());
        let cart = world.collection("e");
        put(&cart, 1, "a");
        world.set(Service, "a", "1");
        let mut stream = Stream::new(1);
        stream.receive(subscribe(Service, &["a"])).unwrap();
        stream.receive(subscribe(Endpoint, &[CART])).unwrap();
        drain(&mut stream, &world, now);
        for n in 2..1_000 {
            world.set(Service, "a", &n.to_string());
            put(&cart, 1, &n.to_string());
        }
        assert_eq!(drain(&mut stream, &world, now), [["pod-00001=999"], ["a@999"]]);
    }

    #[test]
    fn removals_come_after_updates_and_batches_are_bounded() {
        let (world, now) = (World::default(), Instant::now());
        let names: Vec<String> = (0..1_000).map(|n| format!("n{n:04}")).collect();
        let refs: Vec<&str> = names.iter().map(|name| &**name).collect();
        for name in &names {
            world.set(Service, name, "1");
        }
        let mut stream = Stream::new(1);
        stream.receive(subscribe(Service, &refs)).unwrap();
        let all = drain(&mut stream, &world, now);
        assert_eq!(all.iter().map(Vec::len).collect::<Vec<_>>(), [MAX_BATCH, MAX_BATCH, MAX_BATCH, 232]);
        for name in &names {
            world.set(Service, name, "2");
        }
        world.unset(Service, "n0999");
        assert_eq!(drain(&mut stream, &world, now).last().unwrap(), &["-n0999"]);

        let mut stream = Stream::new(2);
        let large = Versioned { version: "1".into(), body: vec![0; MAX_BATCH_LEN / 2].into() };
        for name in ["x", "y", "z"] {
            world.resources.borrow_mut().insert((Service, name.to_owned()), large.clone());
        }
        stream.receive(subscribe(Service, &["x", "y", "z"])).unwrap();
        let all = drain(&mut stream, &world, now);
        assert_eq!(all, [vec!["x@1", "y@1"], vec!["z@1"]]);
    }

    #[test]
    fn a_name_that_always_changes_starves_no_other() {
        let (world, now) = (World::default(), Instant::now());
        let large = |version: u32| Versioned {
            version: version.to_string().into(),
            body: vec![0; MAX_BATCH_LEN].into(),
        };
        for name in ["a", "b", "c"] {
            world.resources.borrow_mut().insert((Service, name.to_owned()), large(0));
        }
        let mut stream = Stream::new(1);
        stream.receive(subscribe(Service, &["a", "b", "c"])).unwrap();
        let mut order = Vec::new();
        for version in 1..=4 {
            let response = stream.next(&world, now).unwrap();
            stream.receive(ack(&response)).unwrap();
            order.push(response.resources[0].name.clone());
            world.resources.borrow_mut().insert((Service, "a".to_owned()), large(version));
        }
        assert_eq!(order, ["a", "b", "c", "a"]);
    }

    #[test]
    fn a_response_without_ack_is_overdue_after_thirty_seconds() {
        let (world, now) = (World::default(), Instant::now());
        world.set(Service, "a", "1");
        let mut stream = Stream::new(1);
        assert_eq!(stream.wake_at(), None);
        stream.receive(subscribe(Service, &["a"])).unwrap();
        let response = stream.next(&world, now).unwrap();
        assert_eq!(stream.wake_at(), Some(now + ACK_TIMEOUT));
        assert!(!stream.overdue(now + ACK_TIMEOUT - Duration::from_millis(1)));
        assert!(stream.overdue(now + ACK_TIMEOUT));
        stream.receive(ack(&response)).unwrap();
        assert!(!stream.overdue(now + ACK_TIMEOUT));
    }

    #[test]
    fn what_a_client_may_make_a_stream_keep_is_bounded() {
        let mut stream = Stream::new(1);
        let names: Vec<String> = (0..=MAX_NAMES).map(|n| n.to_string()).collect();
        let request = DeltaDiscoveryRequest { resource_names_subscribe: names, ..request(Service) };
        assert_eq!(stream.receive(request), Err(ProtocolError::TooManyNames));
        let long: Vec<String> = (0..6_000).map(|n| format!("{n:0>700}")).collect();
        let long: Vec<&str> = long.iter().map(String::as_str).collect();
        assert_eq!(Stream::new(1).receive(subscribe(Service, &long)), Err(ProtocolError::TooManyNames));
        let long = "n".repeat(1_000);
        assert_eq!(
            Stream::new(1).receive(subscribe(Route, &[&long])),
            Err(ProtocolError::NameTooLong(1_000))
        );
        let node = Some(Node { id: "x".repeat(10_000), ..Node::default() });
        let request = DeltaDiscoveryRequest { node, ..subscribe(Route, &["a"]) };
        assert_eq!(Stream::new(1).receive(request), Err(ProtocolError::NodeTooLong(10_003)));
    }

    #[test]
    fn a_collection_begins_completes_and_then_tells_one_change_at_a_time() {
        let (world, now) = (World::default(), Instant::now());
        let cart = world.collection("e");
        put(&cart, 1, "a");
        put(&cart, 2, "b");
        let mut stream = Stream::new(1);
        stream.receive(subscribe(Endpoint, &[CART])).unwrap();
        assert_eq!(
            drain(&mut stream, &world, now),
            [["pod-00001=a", "pod-00002=b", "head 2 begin complete"]]
        );
        put(&cart, 3, "c");
        assert_eq!(drain(&mut stream, &world, now), [["pod-00003=c"]]);
        cart.remove(&uid(1), now);
        assert_eq!(drain(&mut stream, &world, now), [["-ep/shop/cart:80/pod-00001"]]);
        assert_eq!(stream.next(&world, now), None);
    }

    #[test]
    fn an_empty_collection_is_a_state_and_a_missing_one_a_removal() {
        let (world, now) = (World::default(), Instant::now());
        let mut stream = Stream::new(1);
        stream.receive(subscribe(Endpoint, &[CART])).unwrap();
        assert_eq!(drain(&mut stream, &world, now), [["-ep/shop/cart:80/*"]]);
        assert_eq!(stream.next(&world, now), None);
        let cart = world.collection("e");
        assert_eq!(drain(&mut stream, &world, now), [["head 0 begin complete"]]);
        put(&cart, 1, "a");
        assert_eq!(drain(&mut stream, &world, now), [["pod-00001=a"]]);
        // The same name, another service: what was told of the old one does not count.
        let again = world.collection("e2");
        put(&again, 2, "b");
        assert_eq!(drain(&mut stream, &world, now), [["pod-00002=b", "head 1 begin complete"]]);
        world.collections.borrow_mut().clear();
        assert_eq!(drain(&mut stream, &world, now), [["-ep/shop/cart:80/*"]]);
    }

    #[test]
    fn removals_and_draining_members_overtake_additions() {
        let (world, now) = (World::default(), Instant::now());
        let cart = world.collection("e");
        for n in 0..10 {
            put(&cart, n, "old");
        }
        let mut stream = Stream::new(1);
        stream.receive(subscribe(Endpoint, &[CART])).unwrap();
        drain(&mut stream, &world, now);
        for n in 10..1_000 {
            put(&cart, n, "new");
        }
        cart.remove(&uid(3), now);
        cart.publish(&uid(4), Bytes::from_static(b"drains"), Priority::Urgent);
        let all = drain(&mut stream, &world, now);
        assert_eq!(all.len(), 4);
        assert!(all[0].contains(&"-ep/shop/cart:80/pod-00003".to_owned()));
        assert_eq!(all[0][0], "pod-00004=drains");
        assert_eq!(all.concat().len(), 992, "nothing is told twice");
    }

    #[test]
    fn a_full_send_in_parts_survives_changes_under_way() {
        let (world, now) = (World::default(), Instant::now());
        let cart = world.collection("e");
        for n in 0..600 {
            put(&cart, n, "x");
        }
        cart.remove(&uid(599), now);
        let mut stream = Stream::new(1);
        stream.receive(subscribe(Endpoint, &[CART])).unwrap();
        let first = stream.next(&world, now).unwrap();
        let said = says(&first);
        assert_eq!((said.len(), said.last().unwrap().as_str()), (MAX_BATCH + 1, "head 599 begin"));
        assert!(first.removed_resources.is_empty(), "who was gone before is never mentioned");
        cart.remove(&uid(0), now);
        stream.receive(ack(&first)).unwrap();
        let rest = drain(&mut stream, &world, now).concat();
        assert!(rest.contains(&"-ep/shop/cart:80/pod-00000".to_owned()));
        assert_eq!(
            rest.iter().filter(|said| said.starts_with("head")).collect::<Vec<_>>(),
            ["head 598 complete"]
        );
    }

    /// A source in which the cart changes while the response is being made: when the other collection is
    /// looked at, the cart's urgent lane has been read and its normal lane has not.
    struct Racing<'a>(&'a World, Collection);

    impl Source for Racing<'_> {
        fn lookup(&self, ty: ResourceType, name: &str) -> Option<Versioned> {
            self.0.lookup(ty, name)
        }

        fn collection(&self, name: &str) -> Option<Collection> {
            if name != CART {
                put(&self.1, 1, "healthy again");
                put(&self.1, 2, "also");
            }
            Source::collection(self.0, name)
        }
    }

    #[test]
    fn what_changes_while_a_response_is_made_waits_for_the_next() {
        let (world, now) = (World::default(), Instant::now());
        let cart = world.collection("e");
        put(&cart, 2, "b");
        cart.publish(&uid(1), Bytes::from_static(b"drains"), Priority::Urgent);
        let pay = "ep/shop/pay:80/*";
        world.collections.borrow_mut().insert(pay.to_owned(), Collection::new("p"));
        let mut stream = Stream::new(1);
        stream.receive(subscribe(Endpoint, &[CART, pay])).unwrap();
        let first = stream.next(&Racing(&world, cart), now).unwrap();
        assert_eq!(says(&first), ["pod-00001=drains", "head 2 begin", "head 0 begin complete"]);
        stream.receive(ack(&first)).unwrap();
        assert_eq!(
            drain(&mut stream, &world, now),
            [["pod-00001=healthy again", "pod-00002=also", "head 2 complete"]]
        );
    }

    #[test]
    fn a_cursor_of_the_same_log_is_told_what_happened_since() {
        let (world, now) = (World::default(), Instant::now());
        let cart = world.collection("e");
        put(&cart, 1, "a");
        put(&cart, 2, "b");
        let cursor = format!("e/{}/{:016x}", cart.seq(), cart.set_hash());
        cart.remove(&uid(1), now);
        put(&cart, 3, "c");
        let mut stream = Stream::new(1);
        stream.receive(resume(Endpoint, &[(CART, &cursor)])).unwrap();
        assert_eq!(drain(&mut stream, &world, now), [["pod-00003=c", "-ep/shop/cart:80/pod-00001"]]);
    }

    #[test]
    fn an_equal_set_on_another_replica_is_nothing_to_send() {
        let (world, now) = (World::default(), Instant::now());
        let (here, there) = (world.collection("e"), Collection::new("other"));
        put(&there, 2, "b");
        put(&there, 1, "a");
        put(&here, 1, "a");
        put(&here, 2, "b");
        let cursor = format!("other/{}/{:016x}", there.seq(), there.set_hash());
        let mut stream = Stream::new(1);
        stream.receive(resume(Endpoint, &[(CART, &cursor)])).unwrap();
        assert_eq!(stream.next(&world, now), None);
        put(&here, 3, "c");
        assert_eq!(drain(&mut stream, &world, now), [["pod-00003=c"]]);

        let mut stream = Stream::new(2);
        stream.receive(resume(Endpoint, &[(CART, &cursor)])).unwrap();
        let all = drain(&mut stream, &world, now).concat();
        assert_eq!(all.last().unwrap(), "head 3 begin complete", "an unequal one is sent in full");
    }

    #[test]
    fn a_cursor_older_than_the_tombstones_is_sent_in_full() {
        let (world, now) = (World::default(), Instant::now());
        let cart = world.collection("e");
        put(&cart, 1, "a");
        put(&cart, 2, "b");
        let cursor = format!("e/{}/{:016x}", cart.seq(), cart.set_hash());
        cart.remove(&uid(1), now);
        cart.prune(now + Collection::TOMBSTONE_AGE * 2);
        let mut stream = Stream::new(1);
        stream.receive(resume(Endpoint, &[(CART, &cursor)])).unwrap();
        assert_eq!(drain(&mut stream, &world, now), [["pod-00002=b", "head 1 begin complete"]]);
    }

    #[test]
    fn a_stream_that_lagged_behind_the_tombstones_is_sent_in_full() {
        let (world, now) = (World::default(), Instant::now());
        let cart = world.collection("e");
        put(&cart, 1, "a");
        put(&cart, 2, "b");
        let mut stream = Stream::new(1);
        stream.receive(subscribe(Endpoint, &[CART])).unwrap();
        drain(&mut stream, &world, now);
        cart.remove(&uid(1), now);
        cart.prune(now + Collection::TOMBSTONE_AGE * 2);
        assert_eq!(drain(&mut stream, &world, now), [["pod-00002=b", "head 1 begin complete"]]);
    }

    #[test]
    fn a_reader_is_told_every_minute_what_it_should_hold() {
        let (world, now) = (World::default(), Instant::now());
        let cart = world.collection("e");
        put(&cart, 1, "a");
        let mut stream = Stream::new(1);
        stream.receive(subscribe(Endpoint, &[CART])).unwrap();
        drain(&mut stream, &world, now);
        let due = stream.wake_at().unwrap();
        assert!(due <= now + HEAD_INTERVAL);
        assert_eq!(stream.next(&world, due - Duration::from_millis(1)), None);
        assert_eq!(drain(&mut stream, &world, due), [["head 1"]]);
        assert_eq!(stream.wake_at(), Some(due + HEAD_INTERVAL));
    }

    #[test]
    fn a_resubscribed_collection_is_sent_in_full() {
        let (world, now) = (World::default(), Instant::now());
        put(&world.collection("e"), 1, "a");
        let mut stream = Stream::new(1);
        for _ in 0..2 {
            stream.receive(subscribe(Endpoint, &[CART])).unwrap();
            assert_eq!(drain(&mut stream, &world, now), [["pod-00001=a", "head 1 begin complete"]]);
        }
    }

    #[test]
    fn a_gone_collection_of_a_reconnecting_client_is_removed() {
        let (world, now) = (World::default(), Instant::now());
        let mut stream = Stream::new(1);
        stream.receive(resume(Endpoint, &[(CART, "e/1/0000000000000001")])).unwrap();
        assert_eq!(drain(&mut stream, &world, now), [["-ep/shop/cart:80/*"]]);
    }

    #[test]
    fn a_member_by_itself_cannot_be_subscribed() {
        let mut stream = Stream::new(1);
        let received = stream.receive(subscribe(Endpoint, &["ep/shop/cart:80/pod-1", CART])).unwrap();
        assert_eq!(received.subscribed, [CART.into()]);
    }
}

mod client {
    use super::*;

    fn new(subscribed: &[(ResourceType, &str)]) -> Client {
        let mut client = Client::new(Node { id: "me".to_owned(), ..Node::default() });
        for (ty, name) in subscribed {
            client.subscribe(*ty, name);
        }
        client.connected();
        client
    }

    fn requests(client: &mut Client) -> Vec<DeltaDiscoveryRequest> {
        std::iter::from_fn(|| client.next_request()).collect()
    }

    fn resource(name: &str, version: &str) -> Resource {
        let resource = Some(Any { type_url: Service.type_url().to_owned(), value: Bytes::from_static(b"x") });
        Resource { name: name.to_owned(), version: version.to_owned(), resource, aliases: vec![] }
    }

    fn response(nonce: &str, resources: Vec<Resource>) -> DeltaDiscoveryResponse {
        let type_url = Service.type_url().to_owned();
        DeltaDiscoveryResponse { type_url, nonce: nonce.to_owned(), resources, ..Default::default() }
    }

    fn removal(nonce: &str, names: &[&str]) -> DeltaDiscoveryResponse {
        let removed_resources = names.iter().map(|name| (*name).to_owned()).collect();
        DeltaDiscoveryResponse { removed_resources, ..response(nonce, vec![]) }
    }

    fn member(uid: &str, body: &str) -> Resource {
        let value = Bytes::from(body.to_owned());
        Resource {
            name: format!("ep/shop/cart:80/{uid}"),
            version: body.to_owned(),
            resource: Some(Any { type_url: Endpoint.type_url().to_owned(), value }),
            aliases: vec![],
        }
    }

    fn head(of: &Collection, begin: bool, complete: bool) -> Resource {
        let head = CollectionHead {
            epoch: of.epoch().to_string(),
            seq: of.seq(),
            count: of.len() as u32,
            complete,
            set_hash: of.set_hash(),
            begin,
        };
        let value = head.encode_to_vec().into();
        Resource {
            name: "ep/shop/cart:80/$head".to_owned(),
            version: head.seq.to_string(),
            resource: Some(Any { type_url: COLLECTION_HEAD_TYPE_URL.to_owned(), value }),
            aliases: vec![],
        }
    }

    fn members(nonce: &str, resources: Vec<Resource>) -> DeltaDiscoveryResponse {
        let type_url = Endpoint.type_url().to_owned();
        DeltaDiscoveryResponse { type_url, ..response(nonce, resources) }
    }

    fn set(members: &[(&str, &str)]) -> Collection {
        let collection = Collection::new("e");
        for (uid, body) in members {
            let uid = PodUid::new(uid).unwrap();
            collection.publish(&uid, Bytes::from((*body).to_owned()), Priority::Normal);
        }
        collection
    }

    /// Takes a response; returns what the callback was told.
    fn take(client: &mut Client, response: DeltaDiscoveryResponse) -> Vec<String> {
        let mut told = Vec::new();
        client.receive(response, &mut |change| {
            told.push(match change {
                Change::Update { name, version, .. } => format!("{name}@{version}"),
                Change::Removed { name, .. } => format!("-{name}"),
                Change::CollectionComplete { collection } => format!("={collection}"),
            });
            Ok(())
        });
        told
    }

    fn only_reply(client: &mut Client) -> DeltaDiscoveryRequest {
        let mut requests = requests(client);
        assert_eq!(requests.len(), 1, "{requests:?}");
        requests.remove(0)
    }

    #[test]
    fn the_node_is_only_in_the_first_message_of_a_stream() {
        let mut client = new(&[(Service, "a"), (Route, "a")]);
        for _ in 0..2 {
            let nodes: Vec<bool> = requests(&mut client).iter().map(|r| r.node.is_some()).collect();
            assert_eq!(nodes, [true, false]);
            client.disconnected();
            assert_eq!(client.next_request(), None);
            client.connected();
        }
    }

    #[test]
    fn a_type_never_begins_with_an_empty_request() {
        let mut client = new(&[]);
        client.subscribe(Service, "a");
        client.unsubscribe(Service, "a");
        assert_eq!(requests(&mut client), []);
        // Nor with a reply to something that was never asked for.
        assert_eq!(take(&mut client, response("1", vec![resource("a", "1")])), [""; 0]);
        assert_eq!(requests(&mut client), []);
    }

    #[test]
    fn subscriptions_are_spontaneous_and_carry_no_nonce() {
        let mut client = new(&[(Service, "a")]);
        requests(&mut client);
        take(&mut client, response("n1", vec![resource("a", "1")]));
        client.subscribe(Service, "b");
        let requests = requests(&mut client);
        assert_eq!(requests.len(), 2);
        assert_eq!(requests[0].response_nonce, "n1");
        assert!(requests[0].resource_names_subscribe.is_empty());
        assert_eq!(requests[1].resource_names_subscribe, ["b"]);
        assert_eq!(requests[1].response_nonce, "");
    }

    #[test]
    fn every_response_gets_exactly_one_reply() {
        let mut client = new(&[(Service, "a")]);
        requests(&mut client);
        take(&mut client, response("n1", vec![resource("a", "1")]));
        take(&mut client, response("n2", vec![]));
        let replies = requests(&mut client);
        assert_eq!(replies.iter().map(|r| &*r.response_nonce).collect::<Vec<_>>(), ["n1", "n2"]);
        assert!(replies.iter().all(|r| r.error_detail.is_none()));
    }

    #[test]
    fn the_version_of_every_update_is_recorded_and_a_reconnect_says_all() {
        let mut client = new(&[(Service, "a"), (Service, "b"), (Service, "c")]);
        requests(&mut client);
        take(&mut client, response("1", vec![resource("a", "1"), resource("b", "1")]));
        take(&mut client, response("2", vec![resource("b", "2")]));
        take(&mut client, removal("3", &["c"]));
        requests(&mut client);
        client.disconnected();
        client.subscribe(Service, "d");
        client.connected();
        let first = only_reply(&mut client);
        assert_eq!(first.resource_names_subscribe, ["a", "b", "c", "d"]);
        assert_eq!(first.response_nonce, "", "no nonce survives its stream");
        let versions: Vec<_> = first.initial_resource_versions.iter().map(|(n, v)| (&**n, &**v)).collect();
        assert_eq!(versions, [("a", "1"), ("b", "2")]);
        let held: Vec<_> = client.held(Service).map(|(name, v)| format!("{name}@{v}")).collect();
        assert_eq!(held, ["a@1", "b@2"]);
    }

    #[test]
    fn a_rejected_resource_is_not_held_and_the_others_are() {
        let mut client = new(&[(Service, "a"), (Service, "b")]);
        requests(&mut client);
        take(&mut client, response("1", vec![resource("a", "1")]));
        requests(&mut client);
        let receipt = client.receive(response("2", vec![resource("a", "2"), resource("b", "1")]), &mut |c| {
            if matches!(c, Change::Update { name: "a", .. }) {
                Err("rules[0]: no".to_owned())
            } else {
                Ok(())
            }
        });
        let want = RejectedResource { name: "a".into(), version: "2".into(), reason: "rules[0]: no".into() };
        assert_eq!(receipt.rejected, std::slice::from_ref(&want));
        let reply = only_reply(&mut client);
        let error = reply.error_detail.unwrap();
        assert_eq!((error.code, reply.response_nonce.as_str()), (3, "2"));
        assert_eq!(error.message, "1 resources rejected; first a: rules[0]: no");
        assert_eq!(RejectedResource::decode(error.details[0].value.clone()).unwrap(), want);
        assert_eq!(client.version(Service, "a").map(|v| &**v), Some("1"));
        assert_eq!(client.version(Service, "b").map(|v| &**v), Some("1"));
        assert_eq!((client.stats().nacks, client.stats().rejected), (1, 1));
    }

    #[test]
    fn a_message_that_names_a_resource_twice_is_refused_whole() {
        let mut client = new(&[(Service, "a")]);
        requests(&mut client);
        let mut both = response("2", vec![resource("a", "3")]);
        both.removed_resources = vec!["a".to_owned()];
        for twice in [response("1", vec![resource("a", "1"), resource("a", "2")]), both] {
            assert_eq!(take(&mut client, twice), [""; 0]);
            let error = only_reply(&mut client).error_detail.unwrap();
            assert_eq!(error.message, "\"a\" is there twice; a message names a resource once");
            assert_eq!(client.version(Service, "a"), None);
        }
    }

    #[test]
    fn what_is_too_large_is_refused() {
        let mut client = new(&[(Service, "a"), (Service, "b")]);
        requests(&mut client);
        let sized = |name: &str, len: usize| {
            let mut resource = resource(name, "1");
            resource.resource.as_mut().unwrap().value = vec![0; len].into();
            resource
        };
        let told = take(&mut client, response("1", vec![sized("a", MAX_RESOURCE_LEN + 1), sized("b", 1)]));
        assert_eq!(told, ["b@1"], "one resource");
        let error = only_reply(&mut client).error_detail.unwrap();
        assert_eq!(error.details.len(), 1);
        let told = take(&mut client, response("2", vec![sized("a", 1), sized("c", MAX_MESSAGE_LEN)]));
        assert_eq!(told, [""; 0], "the message");
        assert!(only_reply(&mut client).error_detail.unwrap().message.starts_with("the message has 4"));
        let told = take(&mut client, response("3", vec![resource(&"n".repeat(2_000), "1")]));
        assert_eq!(told, [""; 0], "a name");
        assert!(only_reply(&mut client).error_detail.is_some());
    }

    #[test]
    fn a_resource_of_another_type_or_without_a_body_is_refused() {
        let mut client = new(&[(Service, "a"), (Service, "b")]);
        requests(&mut client);
        let mut other = resource("a", "1");
        other.resource.as_mut().unwrap().type_url = Route.type_url().to_owned();
        let empty = Resource { resource: None, ..resource("b", "1") };
        assert_eq!(take(&mut client, response("1", vec![other, empty])), [""; 0]);
        assert_eq!(only_reply(&mut client).error_detail.unwrap().details.len(), 2);
    }

    #[test]
    fn a_stale_response_after_an_unsubscription_is_dropped() {
        let mut client = new(&[(Service, "a"), (Service, "b")]);
        requests(&mut client);
        client.unsubscribe(Service, "a");
        assert_eq!(take(&mut client, response("1", vec![resource("a", "1"), resource("b", "1")])), ["b@1"]);
        assert_eq!(client.version(Service, "a"), None);
        assert_eq!(client.stats().unwanted, 1);
        let requests = requests(&mut client);
        assert!(requests[0].error_detail.is_none());
        assert_eq!(requests[1].resource_names_unsubscribe, ["a"]);
    }

    #[test]
    fn what_is_dropped_and_wanted_again_is_asked_for_again() {
        let mut client = new(&[(Service, "a")]);
        requests(&mut client);
        take(&mut client, response("1", vec![resource("a", "1")]));
        requests(&mut client);
        client.unsubscribe(Service, "a");
        client.subscribe(Service, "a");
        let request = only_reply(&mut client);
        assert_eq!(request.resource_names_subscribe, ["a"]);
        assert!(request.initial_resource_versions.is_empty());
        assert_eq!(client.version(Service, "a"), None);
    }

    #[test]
    fn a_removal_is_told_and_may_come_before_anything_was_there() {
        let mut client = new(&[(Service, "a")]);
        requests(&mut client);
        assert_eq!(take(&mut client, removal("1", &["a"])), ["-a"]);
        assert_eq!(take(&mut client, response("2", vec![resource("a", "1")])), ["a@1"]);
        assert_eq!(take(&mut client, removal("3", &["a"])), ["-a"]);
        assert_eq!(take(&mut client, removal("4", &["never-asked"])), [""; 0]);
        assert_eq!(client.held(Service).count(), 0);
    }

    #[test]
    fn an_unknown_type_is_ignored() {
        let mut client = new(&[(Service, "a")]);
        requests(&mut client);
        let type_url = "type.googleapis.com/weft.v7.Hologram".to_owned();
        let receipt =
            client.receive(DeltaDiscoveryResponse { type_url, ..response("1", vec![]) }, &mut |_| Ok(()));
        assert_eq!(receipt.ty, None);
        assert_eq!(requests(&mut client), []);
    }

    #[test]
    fn a_reconnect_with_many_names_is_several_requests() {
        let mut client = Client::new(Node::default());
        for n in 0..10_000 {
            client.subscribe(Service, &format!("svc/{}/{n:06}:80", "n".repeat(200)));
        }
        client.connected();
        let requests = requests(&mut client);
        assert!(requests.len() > 1);
        assert!(requests.iter().all(|request| request.encoded_len() < MAX_MESSAGE_LEN / 2));
        assert_eq!(requests.iter().map(|r| r.resource_names_subscribe.len()).sum::<usize>(), 10_000);
    }

    #[test]
    fn a_full_send_drops_what_it_does_not_tell() {
        let mut client = new(&[(Endpoint, CART)]);
        requests(&mut client);
        let old = set(&[("a", "1"), ("b", "1")]);
        let told =
            take(&mut client, members("1", vec![member("a", "1"), member("b", "1"), head(&old, true, true)]));
        let complete = "=ep/shop/cart:80/*";
        assert_eq!(told, ["ep/shop/cart:80/a@1", "ep/shop/cart:80/b@1", complete]);
        assert!(client.is_complete(CART));
        // In two parts: nothing is dropped before the end.
        let new = set(&[("b", "1"), ("c", "1")]);
        assert_eq!(take(&mut client, members("2", vec![member("b", "1"), head(&new, true, false)])), [""; 0]);
        assert!(client.version(Endpoint, "ep/shop/cart:80/a").is_some());
        assert_eq!(client.cursor(CART), None, "half a set is nothing to resume from");
        let told = take(&mut client, members("3", vec![member("c", "1"), head(&new, false, true)]));
        assert_eq!(told, ["ep/shop/cart:80/c@1", "-ep/shop/cart:80/a", complete]);
        assert_eq!(client.cursor(CART).unwrap(), format!("e/{}/{:016x}", new.seq(), new.set_hash()));
        assert_eq!(client.stats().mismatches, 0);
    }

    #[test]
    fn a_head_that_differs_makes_the_client_ask_again() {
        let mut client = new(&[(Endpoint, CART)]);
        requests(&mut client);
        let have = set(&[("a", "1")]);
        take(&mut client, members("1", vec![member("a", "1"), head(&have, true, true)]));
        take(&mut client, members("2", vec![head(&have, false, false)]));
        assert_eq!(client.stats().mismatches, 0);
        requests(&mut client);
        take(&mut client, members("3", vec![head(&set(&[("a", "1"), ("b", "1")]), false, false)]));
        assert_eq!(client.stats().mismatches, 1);
        let requests = requests(&mut client);
        assert_eq!(requests[1].resource_names_subscribe, [CART]);
        assert!(client.is_complete(CART), "what is held keeps serving");
    }

    #[test]
    fn a_rejected_member_is_asked_for_after_a_reconnect_and_not_before() {
        let mut client = new(&[(Endpoint, CART)]);
        requests(&mut client);
        let have = set(&[("a", "1"), ("b", "bad")]);
        let message = members("1", vec![member("a", "1"), member("b", "bad"), head(&have, true, true)]);
        let receipt = client.receive(message, &mut |c| match c {
            Change::Update { version: "bad", .. } => Err("no".to_owned()),
            Change::Update { .. } | Change::Removed { .. } | Change::CollectionComplete { .. } => Ok(()),
        });
        assert_eq!(receipt.rejected.len(), 1);
        assert_eq!(client.version(Endpoint, "ep/shop/cart:80/b"), None);
        take(&mut client, members("2", vec![head(&have, false, false)]));
        assert_eq!(client.stats().mismatches, 0, "it was told, so nothing is missing");
        assert_eq!(client.cursor(CART), None, "but the next stream starts from nothing");
        requests(&mut client);
        take(&mut client, members("3", vec![member("b", "good")]));
        assert_eq!(client.version(Endpoint, "ep/shop/cart:80/b").map(|v| &**v), Some("good"));
        let now = set(&[("a", "1"), ("b", "good")]);
        assert_eq!(
            client.cursor(CART).unwrap().rsplit('/').next().unwrap(),
            format!("{:016x}", now.set_hash())
        );
    }

    #[test]
    fn the_end_of_an_earlier_full_send_completes_nothing() {
        let mut client = new(&[(Endpoint, CART)]);
        requests(&mut client);
        let all = set(&[("a", "1"), ("b", "1")]);
        take(&mut client, members("1", vec![member("a", "1"), head(&all, true, false)]));
        client.unsubscribe(Endpoint, CART);
        client.subscribe(Endpoint, CART);
        // This was under way: half of the set, and its end.
        let told = take(&mut client, members("2", vec![member("b", "1"), head(&all, false, true)]));
        assert_eq!(told, ["ep/shop/cart:80/b@1"]);
        assert!(!client.is_complete(CART));
    }

    #[test]
    fn a_removed_collection_takes_its_members_along() {
        let mut client = new(&[(Endpoint, CART)]);
        requests(&mut client);
        let have = set(&[("a", "1")]);
        take(&mut client, members("1", vec![member("a", "1"), head(&have, true, true)]));
        let gone =
            DeltaDiscoveryResponse { removed_resources: vec![CART.to_owned()], ..members("2", vec![]) };
        assert_eq!(take(&mut client, gone), [format!("-{CART}")]);
        assert_eq!(client.held(Endpoint).count(), 0);
        assert!(!client.is_complete(CART));
    }

    #[test]
    fn no_member_of_a_collection_that_is_not_wanted_is_taken() {
        let mut client = new(&[(Endpoint, CART)]);
        requests(&mut client);
        let mut stranger = member("a", "1");
        stranger.name = "ep/shop/pay:80/a".to_owned();
        let mut odd = member("a", "1");
        odd.name = CART.replace('*', "");
        assert_eq!(take(&mut client, members("1", vec![stranger, odd, member("*", "1")])), [""; 0]);
    }
}
