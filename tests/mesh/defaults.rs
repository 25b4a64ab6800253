//! What a mesh does without being asked.

use std::{
    collections::BTreeSet,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::{Duration, Instant},
};

use weft_control_plane::cli::demo::mesh::{Meshed, Workload, wait};
use weft_harness::{
    apps::{curl, mesh_or_skip, service},
    wire::{Message, Wire, answer_all, ok},
};

use crate::{ECHO, ECHO_ADDRESS, pair, policy, scripted};

#[test]
fn nothing_is_retried_by_status_and_no_request_has_a_time_limit() {
    let asked = Arc::new(AtomicU32::new(0));
    let count = asked.clone();
    let Some(world) = scripted("no_retries", move |mut wire, _| {
        answer_all(&mut wire, |request| {
            count.fetch_add(1, Ordering::Relaxed);
            if request.head.contains(" /slow ") {
                // Longer than the connect timeout, the queue wait and the time for a head to begin with.
                std::thread::sleep(Duration::from_millis(4_000));
                return ok("slow");
            }
            "HTTP/1.1 503 Busy\r\nContent-Length: 4\r\n\r\nbusy".to_owned()
        })
    }) else {
        return;
    };
    let mut client = Wire::dial(&world.client.pod, ECHO_ADDRESS).unwrap();
    for method in ["GET", "POST"] {
        asked.store(0, Ordering::Relaxed);
        let answer =
            client.ask(format!("{method} / HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n")).unwrap();
        assert_eq!((answer.status(), answer.text().as_str()), (503, "busy"));
        assert_eq!((asked.load(Ordering::Relaxed), answer.header("weft-reason")), (1, None), "{method}");
    }
    assert_eq!(client.ask("GET /slow HTTP/1.1\r\nHost: a\r\n\r\n").unwrap().text(), "slow");
    assert_eq!(world.client.metric("weft_retries_total", &[]).unwrap(), 0.0);
}

#[test]
fn what_was_not_sent_goes_elsewhere_whatever_its_method() {
    let Some(pair) = pair("redispatch", &[]) else { return };
    policy(&pair.mesh, "echo", serde_json::json!({"loadBalancing": {"algorithm": "RoundRobin"}}));
    // A second endpoint whose app is not there yet.
    let _absent = pair.mesh.workload(Workload::new("shop", "echo-2")).unwrap();
    let mut sent = 0;
    wait(Duration::from_secs(15), || {
        for method in ["GET", "POST", "PATCH", "DELETE"] {
            let status = curl(
                &pair.client.pod,
                &["-X", method, "-d", "once", "-o", "/dev/null", "-w", "%{http_code}", ECHO],
            )?;
            anyhow::ensure!(status == "200", "{method}: {status}");
            sent += 1;
        }
        Ok(pair.client.metric("weft_redispatched_total", &[])? >= 4.0)
    })
    .unwrap();
    println!("figure: one of two apps refuses: {sent} requests of any method, 0 failed");
}

#[test]
fn three_endpoints_get_a_second_each_to_accept() {
    let Some(mesh) = mesh_or_skip("connect_timeouts") else { return };
    service(&mesh, "shop", "echo", "10.96.0.1", &[("web", 80, 8080)]).unwrap();
    let pods: Vec<_> =
        (1..=4).map(|n| mesh.plain(&Workload::new("shop", &format!("echo-{n}"))).unwrap()).collect();
    let client = mesh.workload(Workload::new("shop", "client")).unwrap();
    let mut app = Wire::dial(&client.pod, ECHO_ADDRESS).unwrap();
    let post = "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\n\r\nonce";
    for pod in &pods {
        mesh.world.connect(pod, false).unwrap();
    }
    let began = Instant::now();
    let answer = app.ask(post).unwrap();
    let took = began.elapsed();
    let tried = client.metric("weft_connects_total", &["result=\"timeout\""]).unwrap();
    println!(
        "figure: four endpoints, none answers: {tried} tried, told after {} ms (bound 5000)",
        took.as_millis()
    );
    assert_eq!(
        (answer.status(), answer.header("weft-reason")),
        (504, Some("outbound;connect_timeout")),
        "{}",
        answer.head
    );
    assert!(
        tried == 3.0 && (Duration::from_secs(3)..Duration::from_secs(5)).contains(&took),
        "{tried} {took:?}"
    );
}

/// Waits for the log line about one request.
fn logged(meshed: &Meshed, code: &str, id: &str) -> serde_json::Value {
    let mut found = None;
    wait(Duration::from_secs(5), || {
        let log = std::fs::read_to_string(&meshed.log)?;
        let mut lines = log.lines().filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
        found = lines.find(|line| {
            let line = line.to_string();
            line.contains(&format!("\"code\":\"{code}\"")) && line.contains(id)
        });
        Ok(found.is_some())
    })
    .unwrap_or_else(|_| panic!("no line about {code} with {id} in {}", meshed.log.display()));
    found.unwrap_or_default()
}

#[test]
fn each_answer_that_a_sidecar_made_says_so_and_is_logged_with_its_request() {
    let Some(pair) = pair("reasons", &[]) else { return };
    let mesh = &pair.mesh;
    let ports = [("web", 80, 8080), ("refusing", 81, 8081)];
    service(mesh, "shop", "echo", "10.96.0.1", &ports).unwrap();
    service(mesh, "shop", "nobody", "10.96.0.9", &[("web", 80, 8080)]).unwrap();
    let outsider = mesh.plain(&Workload::new("shop", "legacy-1")).unwrap();
    let objects = [
        (
            "authz",
            serde_json::json!({
                "apiVersion": "weft.dev/v1alpha1", "kind": "AuthorizationPolicy",
                "metadata": {"namespace": "shop", "name": "echo"},
                "spec": {"selector": {"matchLabels": {"app": "echo"}}, "action": "Deny",
                         "rules": [{"to": [{"paths": ["/secret"]}]}]},
            }),
        ),
        (
            "route",
            serde_json::json!({
                "apiVersion": "gateway.networking.k8s.io/v1", "kind": "HTTPRoute",
                "metadata": {"namespace": "shop", "name": "echo"},
                "spec": {"parentRefs": [{"group": "", "kind": "Service", "name": "echo", "port": 80}], "rules": [
                    {"matches": [{"path": {"type": "PathPrefix", "value": "/missing"}}], "backendRefs": [{"name": "missing", "port": 80}]},
                    {"matches": [{"path": {"type": "PathPrefix", "value": "/nowhere"}}], "backendRefs": []},
                    {"matches": [{"path": {"type": "PathPrefix", "value": "/late"}}], "timeouts": {"request": "100ms"},
                     "backendRefs": [{"name": "echo", "port": 80}]},
                    {"matches": [{"path": {"type": "PathPrefix", "value": "/secret"}}], "backendRefs": [{"name": "echo", "port": 80}]},
                    {"matches": [{"path": {"type": "PathPrefix", "value": "/head"}}], "backendRefs": [{"name": "echo", "port": 80}]}
                ]},
            }),
        ),
    ];
    for (file, object) in objects {
        mesh.write(&format!("{file}.yaml"), &format!("{object:#}\n")).unwrap();
    }
    let ask = |pod, address: &str, path: &str, id: &str| -> Message {
        let mut wire = Wire::dial(pod, address).unwrap();
        let (method, path) = path.split_once(' ').unwrap_or(("GET", path));
        wire.ask(format!("{method} {path} HTTP/1.1\r\nHost: a\r\nX-Request-Id: {id}\r\n\r\n")).unwrap()
    };
    let client = &pair.client.pod;
    let told =
        |path: &str| ask(client, ECHO_ADDRESS, path, "warming-up").header("weft-reason").map(str::to_owned);
    wait(Duration::from_secs(10), || {
        Ok(told("/other").is_some() && told("/secret").is_some_and(|reason| reason == "inbound;denied"))
    })
    .unwrap();
    let direct = format!("{}:8080", pair.server.sidecar.pod.ip);
    let cases: [(_, &str, &str, &str, u16, &str); 9] = [
        (client, ECHO_ADDRESS, "/other", "no-route", 404, "outbound;no_route"),
        (client, ECHO_ADDRESS, "/missing", "missing", 500, "outbound;backend_unresolved"),
        (client, ECHO_ADDRESS, "/nowhere", "nowhere", 500, "outbound;no_backend"),
        (client, "10.96.0.9:80", "/", "nobody", 503, "outbound;no_endpoint"),
        (client, "10.96.0.1:81", "/", "refusing", 503, "inbound;connect_refused"),
        (client, ECHO_ADDRESS, "/secret", "denied", 403, "inbound;denied"),
        (&outsider, &direct, "/secret", "outside", 403, "inbound;denied"),
        (client, ECHO_ADDRESS, "CONNECT a:1", "connect", 405, "outbound;connect_not_allowed"),
        (client, ECHO_ADDRESS, "GET //a\\b", "target", 404, "outbound;no_route"),
    ];
    let mut seen = BTreeSet::new();
    for (pod, address, path, id, status, reason) in cases {
        let answer = ask(pod, address, path, id);
        assert_eq!(
            (answer.status(), answer.header("weft-reason")),
            (status, Some(reason)),
            "{path}: {}",
            answer.head
        );
        let (component, code) = reason.split_once(';').unwrap();
        let sidecar = if component == "inbound" { &pair.server.sidecar } else { &pair.client };
        // CONNECT was refused before its headers were looked at.
        let line = logged(sidecar, code, if code == "connect_not_allowed" { "" } else { id });
        assert!(line.to_string().contains(component), "{line}");
        seen.insert(code.to_owned());
    }
    println!(
        "figure: answers made by a sidecar: {} codes, each with weft-reason and a line with its request id",
        seen.len()
    );
    let own = ask(client, ECHO_ADDRESS, "/head", "own");
    assert_eq!((own.status(), own.header("weft-reason")), (200, None));
}

#[test]
fn request_ids_and_traceparents_are_made_when_missing_and_kept_when_there() {
    let Some(pair) = pair("ids", &[]) else { return };
    let outsider = pair.mesh.plain(&Workload::new("shop", "legacy-1")).unwrap();
    let direct = format!("{}:8080", pair.server.sidecar.pod.ip);
    let mut made = BTreeSet::new();
    for (pod, address) in [(&pair.client.pod, ECHO_ADDRESS), (&outsider, &*direct)] {
        let mut client = Wire::dial(pod, address).unwrap();
        let mut seen = |headers: &str| {
            let answer = client.ask(format!("GET /head HTTP/1.1\r\nHost: a\r\n{headers}\r\n")).unwrap();
            let text = answer.text();
            let of = |name: &str| {
                let mut lines = text.lines().filter_map(|line| line.strip_prefix(&format!("{name}: ")));
                (lines.next().unwrap_or_default().to_owned(), lines.next())
            };
            let ((id, again), (trace, twice)) = (of("x-request-id"), of("traceparent"));
            assert!(again.is_none() && twice.is_none(), "{text}");
            (id, trace)
        };
        for _ in 0..3 {
            let (id, trace) = seen("");
            // W3C Trace Context: version, 16 bytes of trace, 8 of parent, flags; not sampled.
            let parts: Vec<_> = trace.split('-').collect();
            assert_eq!(parts.iter().map(|part| part.len()).collect::<Vec<_>>(), [2, 32, 16, 2], "{trace}");
            assert!(
                trace.bytes().all(|b| b == b'-' || b.is_ascii_hexdigit())
                    && parts[0] == "00"
                    && parts[3] == "00"
            );
            assert_eq!(id, parts[1], "the id finds the trace");
            assert!(made.insert(id), "each has its own");
        }
        let trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
        let kept = seen(&format!("X-Request-Id: mine\r\nTraceparent: {trace}\r\n"));
        assert_eq!(kept, ("mine".to_owned(), trace.to_owned()));
        let (id, trace) = seen("X-Request-Id: mine\r\n");
        assert!(id == "mine" && trace.starts_with("00-"), "{trace}");
    }
}

#[test]
fn an_attempt_counter_travels_with_each_attempt() {
    let Some(world) = scripted("attempts", |mut wire, _| {
        answer_all(&mut wire, |request| match request.header("weft-attempt") {
            None => "HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n".to_owned(),
            Some(attempt) => ok(attempt),
        })
    }) else {
        return;
    };
    policy(&world.mesh, "echo", serde_json::json!({"retries": {"statuses": ["503"], "maxRetries": 2}}));
    let mut client = Wire::dial(&world.client.pod, ECHO_ADDRESS).unwrap();
    let mut last = Message::default();
    // A client cannot set it.
    let get = "GET / HTTP/1.1\r\nHost: a\r\nWeft-Attempt: 7\r\n\r\n";
    wait(Duration::from_secs(10), || {
        last = client.ask(get)?;
        Ok(last.status() == 200)
    })
    .unwrap();
    assert_eq!(last.text(), "2");
}
