//! Real rules, real kernel: what a capture does is shown by who answers a connection.
//!
//! Each pod gets a fake sidecar and an app. Whoever accepts a connection says so in one line, with the
//! original destination that the kernel reports (`SO_ORIGINAL_DST`) or, for the app, with the address it
//! was called from. Sockets carry their owner's uid because they are made by threads with that
//! file-system uid: it is what the `owner` match reads.

use std::io::{self, BufRead as _, BufReader, Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6, TcpStream};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use socket2::{Domain, SockAddr, SockRef, Socket, Type};
use weft_control_plane::cli::demo::mesh::wait;
use weft_core::ports;
use weft_harness::netns::{Pod, Process, World, world_or_skip};
use weft_iptables::apply::{self, Action, Backend};
use weft_iptables::config::{Config, Families, Options};

const APP: u32 = 1000;
const PROXY: u32 = ports::PROXY_UID;
const PORT: u16 = 8080;
const BACKENDS: [Backend; 2] = [Backend::Nft, Backend::Legacy];

/// Answers every connection with one line, until dropped.
struct Answering(Socket);

impl Answering {
    fn start(pod: &Pod, uid: u32, port: u16, who: &'static str) -> Result<Self> {
        let socket = pod.enter_as(uid, uid, || -> io::Result<Socket> {
            let socket = Socket::new(Domain::IPV6, Type::STREAM, None)?;
            socket.set_only_v6(false)?;
            socket.set_reuse_address(true)?;
            socket.bind(&SockAddr::from(SocketAddr::from((Ipv6Addr::UNSPECIFIED, port))))?;
            socket.listen(64)?;
            Ok(socket)
        })??;
        let accepting = socket.try_clone()?;
        std::thread::spawn(move || {
            while let Ok((stream, peer)) = accepting.accept() {
                let mut stream = TcpStream::from(stream);
                let line = match (who, peer.as_socket()) {
                    ("app", Some(peer)) => format!("app from {}", peer.ip().to_canonical()),
                    _ => match original(&stream) {
                        Ok(address) => format!("{who} for {address}"),
                        Err(error) => format!("{who} without original destination: {error}"),
                    },
                };
                let _ = stream.write_all(line.as_bytes());
            }
        });
        Ok(Self(socket))
    }
}

impl Drop for Answering {
    fn drop(&mut self) {
        // Wakes the accepting thread with an error.
        let _ = self.0.shutdown(std::net::Shutdown::Both);
    }
}

/// What the proxy asks of the kernel; the family is that of the packets, not of the listener.
fn original(stream: &TcpStream) -> Result<SocketAddr> {
    let socket = SockRef::from(stream);
    let address = match stream.local_addr()?.ip().to_canonical() {
        IpAddr::V4(_) => socket.original_dst_v4()?,
        IpAddr::V6(_) => socket.original_dst_v6()?,
    };
    let mut address = address.as_socket().context("not an IP address")?;
    if let SocketAddr::V6(v6) = &mut address {
        v6.set_scope_id(0); // not part of what is compared
    }
    Ok(address)
}

/// A pod with all listeners of a sidecar, and an app on [`PORT`].
struct Meshed {
    pod: Pod,
    _listeners: Vec<Answering>,
}

fn meshed(world: &World, name: &str) -> Result<Meshed> {
    let pod = world.pod(name)?;
    let listeners = vec![
        Answering::start(&pod, PROXY, ports::INBOUND, "inbound")?,
        Answering::start(&pod, PROXY, ports::OUTBOUND, "outbound")?,
        Answering::start(&pod, PROXY, ports::ADMIN, "admin")?,
        Answering::start(&pod, APP, PORT, "app")?,
    ];
    Ok(Meshed { pod, _listeners: listeners })
}

fn plain(world: &World, name: &str, listen: &[u16]) -> Result<Meshed> {
    let pod = world.pod(name)?;
    let listeners =
        listen.iter().map(|&port| Answering::start(&pod, APP, port, "app")).collect::<Result<_>>()?;
    Ok(Meshed { pod, _listeners: listeners })
}

/// Connects from the pod as this user, from this source if one is named, and returns who answered.
fn dial(pod: &Pod, uid: u32, source: Option<IpAddr>, to: SocketAddr) -> Result<String> {
    dial_as(pod, (uid, uid), source, to, Duration::from_secs(3))
}

fn dial_as(
    pod: &Pod,
    (uid, gid): (u32, u32),
    source: Option<IpAddr>,
    to: SocketAddr,
    patience: Duration,
) -> Result<String> {
    pod.enter_as(uid, gid, || {
        let socket = Socket::new(Domain::for_address(to), Type::STREAM, None)?;
        if let Some(source) = source {
            socket.bind(&SocketAddr::new(source, 0).into())?;
        }
        socket.connect_timeout(&to.into(), patience).with_context(|| format!("connecting to {to}"))?;
        socket.set_read_timeout(Some(patience))?;
        let mut line = String::new();
        TcpStream::from(socket).read_to_string(&mut line)?;
        Ok(line)
    })?
}

fn config(options: &Options) -> Config {
    options.validate().expect("options that can be enforced")
}

fn install(pod: &Pod, options: &Options, backend: Option<Backend>) -> Result<Vec<Action>> {
    let config = config(options);
    let reports = pod.enter(|| apply::install(&config, backend))??;
    Ok(reports.iter().map(|report| report.action).collect())
}

fn cleanup(pod: &Pod) -> Result<Vec<Action>> {
    let reports = pod.enter(|| apply::cleanup(Families::Dual, None))??;
    Ok(reports.iter().map(|report| report.action).collect())
}

/// Every table of both families and backends, without comments and counters.
fn tables(pod: &Pod) -> Result<String> {
    let mut all = String::new();
    for program in
        ["iptables-nft-save", "ip6tables-nft-save", "iptables-legacy-save", "ip6tables-legacy-save"]
    {
        let Ok(output) = pod.command(program).output() else { continue };
        all.push_str(&format!("== {program}\n"));
        for line in String::from_utf8_lossy(&output.stdout).lines().filter(|line| !line.starts_with('#')) {
            all.push_str(line.split(" [").next().unwrap_or(line));
            all.push('\n');
        }
    }
    Ok(all)
}

/// The backends that this kernel has, for both families; says which it has not.
fn backends(test: &str, pod: &Pod) -> Result<Vec<Backend>> {
    let mut found = Vec::new();
    for backend in BACKENDS {
        let works = |base: &str| {
            pod.command(format!("{base}-{backend}-save"))
                .args(["-t", "nat"])
                .output()
                .is_ok_and(|output| output.status.success())
        };
        if works("iptables") && works("ip6tables") {
            found.push(backend);
        } else {
            let _ = writeln!(
                io::stderr(),
                "{test}: SKIPPED for {backend}: iptables-{backend} does not work here"
            );
        }
    }
    ensure!(!found.is_empty(), "no iptables works here: install the Debian package iptables");
    Ok(found)
}

fn list(values: &[&str]) -> Vec<String> {
    values.iter().map(|value| (*value).to_owned()).collect()
}

/// A pod's addresses of the families that this kernel has.
fn addresses(world: &World, pod: &Pod) -> Vec<IpAddr> {
    if world.has_ipv6() { pod.addresses().to_vec() } else { vec![pod.ip.into()] }
}

fn loopback(like: IpAddr) -> IpAddr {
    if like.is_ipv4() { Ipv4Addr::LOCALHOST.into() } else { Ipv6Addr::LOCALHOST.into() }
}

/// The sources that inbound may bind for its last hop, by family.
fn last_hop_sources(like: IpAddr) -> Vec<IpAddr> {
    if like.is_ipv4() {
        vec![Ipv4Addr::new(127, 0, 0, 6).into()]
    } else {
        vec![Ipv6Addr::LOCALHOST.into(), Ipv6Addr::new(0, 0, 0, 0, 0, 0, 0, 6).into()]
    }
}

#[test]
fn every_way_in_and_out_goes_where_it_should() -> Result<()> {
    const TEST: &str = "every_way_in_and_out_goes_where_it_should";
    let Some(world) = world_or_skip(TEST) else { return Ok(()) };
    let outside = plain(&world, "outside", &[PORT])?;
    let probe = world.pod("probe")?;
    for backend in backends(TEST, &probe)? {
        let a = meshed(&world, &format!("a-{backend}"))?;
        if world.has_ipv6() {
            // `::6` is there in pods that were given it; others use `::1`.
            let added = a.pod.command("ip").args(["-6", "addr", "add", "::6/128", "dev", "lo"]).status()?;
            ensure!(added.success(), "adding ::6");
        }
        install(&a.pod, &Options::default(), Some(backend))?;
        let pairs = addresses(&world, &a.pod).into_iter().zip(addresses(&world, &outside.pod));
        for (own, other) in pairs {
            let at = |port| SocketAddr::new(own, port);
            let there = SocketAddr::new(other, PORT);
            let ctx = format!("{backend} {own}");

            // In: captured, with the address that the caller dialled. Closed ports too: the proxy answers for all.
            assert_eq!(
                dial(&outside.pod, APP, None, at(PORT))?,
                format!("inbound for {}", at(PORT)),
                "{ctx}"
            );
            assert_eq!(dial(&outside.pod, APP, None, at(1))?, format!("inbound for {}", at(1)), "{ctx}");
            // The admin port is reached as it is; a capture port shows itself as its own destination.
            assert_eq!(
                dial(&outside.pod, APP, None, at(ports::ADMIN))?,
                format!("admin for {}", at(ports::ADMIN)),
                "{ctx}"
            );
            assert_eq!(
                dial(&outside.pod, APP, None, at(ports::INBOUND))?,
                format!("inbound for {}", at(ports::INBOUND)),
                "{ctx}"
            );

            // Out: captured, whether the destination exists (a pod) or not (a virtual address).
            assert_eq!(dial(&a.pod, APP, None, there)?, format!("outbound for {there}"), "{ctx}");
            let virtual_ip: SocketAddr =
                if own.is_ipv4() { "10.96.0.10:80".parse()? } else { "[fd00:96::a]:80".parse()? };
            assert_eq!(dial(&a.pod, APP, None, virtual_ip)?, format!("outbound for {virtual_ip}"), "{ctx}");
            assert_eq!(dial(&a.pod, 0, None, there)?, format!("outbound for {there}"), "{ctx}: root");

            // The proxy's own way out is free.
            assert_eq!(dial(&a.pod, PROXY, None, there)?, format!("app from {own}"), "{ctx}");

            // Inside the pod, an app finds itself, as without a mesh.
            let lo = loopback(own);
            assert_eq!(
                dial(&a.pod, APP, None, SocketAddr::new(lo, PORT))?,
                format!("app from {lo}"),
                "{ctx}"
            );
            assert_eq!(
                dial(&a.pod, PROXY, None, SocketAddr::new(lo, PORT))?,
                format!("app from {lo}"),
                "{ctx}"
            );
            assert_eq!(dial(&a.pod, APP, None, at(PORT))?, format!("app from {own}"), "{ctx}");

            // The self-call: outbound dials its own pod and meets inbound, as from outside.
            assert_eq!(dial(&a.pod, PROXY, None, at(PORT))?, format!("inbound for {}", at(PORT)), "{ctx}");
            // But not on ports that no capture covers.
            assert_eq!(
                dial(&a.pod, PROXY, None, at(ports::ADMIN))?,
                format!("admin for {}", at(ports::ADMIN)),
                "{ctx}"
            );

            // The last hop: inbound dials the app at its original address and is not captured again.
            for source in last_hop_sources(own) {
                assert_eq!(
                    dial(&a.pod, PROXY, Some(source), at(PORT))?,
                    format!("app from {source}"),
                    "{ctx}"
                );
            }
            // An app that binds such a source finds itself, as it does without, and no way out.
            for source in last_hop_sources(own) {
                assert_eq!(dial(&a.pod, APP, Some(source), at(PORT))?, format!("app from {source}"), "{ctx}");
                let out = dial(&a.pod, APP, Some(source), there);
                assert!(out.as_ref().map_or(true, |who| who.starts_with("outbound for")), "{ctx}: {out:?}");
            }
        }
        world.remove(&a.pod);
    }
    Ok(())
}

#[test]
fn a_group_can_tell_the_proxy_apart() -> Result<()> {
    let Some(world) = world_or_skip("a_group_can_tell_the_proxy_apart") else { return Ok(()) };
    let outside = plain(&world, "outside", &[PORT])?;
    let a = meshed(&world, "a")?;
    install(&a.pod, &Options { proxy_gids: vec![4242], ..Options::default() }, None)?;
    let there = SocketAddr::new(outside.pod.ip.into(), PORT);
    let own = SocketAddr::new(a.pod.ip.into(), PORT);
    let by = |uid, gid, to| dial_as(&a.pod, (uid, gid), None, to, Duration::from_secs(3));
    assert_eq!(by(APP, 4242, there)?, format!("app from {}", a.pod.ip));
    assert_eq!(by(APP, 4242, own)?, format!("inbound for {own}"));
    assert_eq!(by(APP, 4243, there)?, format!("outbound for {there}"));
    Ok(())
}

#[test]
fn exclusions_and_only_lists_hold_in_both_families() -> Result<()> {
    const TEST: &str = "exclusions_and_only_lists_hold_in_both_families";
    let Some(world) = world_or_skip(TEST) else { return Ok(()) };
    let ports = [PORT, 9000, 9001, 9005, 9009];
    let outside = plain(&world, "outside", &ports)?;
    let free = plain(&world, "free", &[PORT])?;
    let probe = world.pod("probe")?;
    for backend in backends(TEST, &probe)? {
        let a = meshed(&world, &format!("a-{backend}"))?;
        let _more: Vec<Answering> = ports[1..]
            .iter()
            .map(|&port| Answering::start(&a.pod, APP, port, "app"))
            .collect::<Result<_>>()?;
        let cidrs: Vec<String> = addresses(&world, &free.pod).iter().map(ToString::to_string).collect();

        let excluding = Options {
            exclude_inbound_ports: list(&["9000", "9002-9005"]),
            exclude_outbound_ports: list(&["9001", "9005-9008"]),
            exclude_outbound_cidrs: cidrs.clone(),
            ..Options::default()
        };
        install(&a.pod, &excluding, Some(backend))?;
        for (own, (other, free)) in addresses(&world, &a.pod)
            .into_iter()
            .zip(addresses(&world, &outside.pod).into_iter().zip(addresses(&world, &free.pod)))
        {
            let reaches = |to: SocketAddr| dial(&outside.pod, APP, None, to);
            let leaves = |to: SocketAddr| dial(&a.pod, APP, None, to);
            let direct = |from: IpAddr| format!("app from {from}");
            for port in ports {
                let to = SocketAddr::new(own, port);
                let excluded = [9000, 9005].contains(&port);
                let expected = if excluded { direct(other) } else { format!("inbound for {to}") };
                assert_eq!(reaches(to)?, expected, "{backend} in {to}");
                // A call to one's own pod is under the same exclusions.
                let expected = if excluded { direct(own) } else { format!("inbound for {to}") };
                assert_eq!(dial(&a.pod, PROXY, None, to)?, expected, "{backend} self {to}");

                let to = SocketAddr::new(other, port);
                let excluded = [9001, 9005].contains(&port);
                let expected = if excluded { direct(own) } else { format!("outbound for {to}") };
                assert_eq!(leaves(to)?, expected, "{backend} out {to}");
            }
            assert_eq!(leaves(SocketAddr::new(free, PORT))?, direct(own), "{backend} out {free}");
        }

        let only = Options {
            only_inbound_ports: list(&["9000-9001"]),
            only_outbound_ports: list(&["8080", "9009"]),
            exclude_outbound_ports: list(&["9009"]),
            only_outbound_cidrs: addresses(&world, &outside.pod).iter().map(ToString::to_string).collect(),
            ..Options::default()
        };
        install(&a.pod, &only, Some(backend))?;
        for (own, (other, free)) in addresses(&world, &a.pod)
            .into_iter()
            .zip(addresses(&world, &outside.pod).into_iter().zip(addresses(&world, &free.pod)))
        {
            for port in ports {
                let to = SocketAddr::new(own, port);
                let captured = [9000, 9001].contains(&port);
                let expected =
                    if captured { format!("inbound for {to}") } else { format!("app from {other}") };
                assert_eq!(dial(&outside.pod, APP, None, to)?, expected, "{backend} only in {to}");
                let to = SocketAddr::new(other, port);
                let expected =
                    if port == PORT { format!("outbound for {to}") } else { format!("app from {own}") };
                assert_eq!(dial(&a.pod, APP, None, to)?, expected, "{backend} only out {to}");
            }
            let to = SocketAddr::new(free, PORT);
            assert_eq!(dial(&a.pod, APP, None, to)?, format!("app from {own}"), "{backend} only out {to}");
        }

        let interface = Options { exclude_interfaces: list(&["eth0"]), ..Options::default() };
        install(&a.pod, &interface, Some(backend))?;
        for (own, other) in addresses(&world, &a.pod).into_iter().zip(addresses(&world, &outside.pod)) {
            let (here, there) = (SocketAddr::new(own, PORT), SocketAddr::new(other, PORT));
            assert_eq!(dial(&outside.pod, APP, None, here)?, format!("app from {other}"), "{backend}");
            assert_eq!(dial(&a.pod, APP, None, there)?, format!("app from {own}"), "{backend}");
        }
        world.remove(&a.pod);
    }
    Ok(())
}

/// Link-local addresses: nothing reaches the app by that door, and the app's own use of it works.
#[test]
fn link_local_is_captured_on_the_way_in_and_left_alone_on_the_way_out() -> Result<()> {
    const TEST: &str = "link_local_is_captured_on_the_way_in_and_left_alone_on_the_way_out";
    let Some(world) = world_or_skip(TEST) else { return Ok(()) };
    if !world.has_ipv6() {
        let _ = writeln!(io::stderr(), "{TEST}: SKIPPED: the kernel has no IPv6");
        return Ok(());
    }
    let outside = plain(&world, "outside", &[PORT])?;
    let a = meshed(&world, "a")?;
    install(&a.pod, &Options::default(), None)?;
    let (to_a, to_outside) = (link_local(&a.pod)?, link_local(&outside.pod)?);
    let scoped = |ip, from: &(Ipv6Addr, u32)| SocketAddr::V6(SocketAddrV6::new(ip, PORT, 0, from.1));
    let into = dial(&outside.pod, APP, None, scoped(to_a.0, &to_outside))?;
    assert_eq!(into, format!("inbound for {}", SocketAddr::new(to_a.0.into(), PORT)));
    let out = dial(&a.pod, APP, None, scoped(to_outside.0, &to_a))?;
    assert_eq!(out, format!("app from {}", to_a.0));
    Ok(())
}

/// The pod's link-local address and the index of its interface.
fn link_local(pod: &Pod) -> Result<(Ipv6Addr, u32)> {
    let lines = pod.enter(|| std::fs::read_to_string("/proc/thread-self/net/if_inet6"))??;
    let line = lines.lines().find(|line| line.starts_with("fe80")).context("no link-local address")?;
    let mut words = line.split_whitespace();
    let address = u128::from_str_radix(words.next().unwrap_or_default(), 16)?;
    let index = u32::from_str_radix(words.next().unwrap_or_default(), 16)?;
    Ok((Ipv6Addr::from(address), index))
}

/// A neighbour that sends a packet for somebody else to this pod must not make a relay of its sidecar.
#[test]
fn what_is_not_addressed_to_the_pod_is_not_inbound() -> Result<()> {
    let Some(world) = world_or_skip("what_is_not_addressed_to_the_pod_is_not_inbound") else { return Ok(()) };
    let neighbour = world.pod("neighbour")?;
    let a = meshed(&world, "a")?;
    install(&a.pod, &Options::default(), None)?;
    let routed = neighbour
        .command("ip")
        .args(["route", "add", "192.0.2.1/32", "via", &a.pod.ip.to_string()])
        .status()?;
    ensure!(routed.success(), "routing through the pod");
    let forged = SocketAddr::from(([192, 0, 2, 1], PORT));
    let answer = dial_as(&neighbour, (APP, APP), None, forged, Duration::from_millis(500));
    assert!(answer.is_err(), "relayed: {answer:?}");
    Ok(())
}

#[test]
fn two_runs_and_a_crash_between_end_in_the_same_rules() -> Result<()> {
    const TEST: &str = "two_runs_and_a_crash_between_end_in_the_same_rules";
    let Some(world) = world_or_skip(TEST) else { return Ok(()) };
    let probe = world.pod("probe")?;
    for backend in backends(TEST, &probe)? {
        let pod = world.pod(&format!("a-{backend}"))?;
        let options = Options { exclude_outbound_ports: list(&["25"]), ..Options::default() };
        let other = Options { exclude_outbound_ports: list(&["26"]), ..Options::default() };
        install(&pod, &options, Some(backend))?;
        let wanted = tables(&pod)?;
        assert!(wanted.contains("-A OUTPUT -p tcp -j WEFT_OUTBOUND"), "{wanted}");

        // Again.
        let again = install(&pod, &options, Some(backend))?;
        assert!(again.iter().all(|action| *action == Action::Unchanged), "{again:?}");
        assert_eq!(tables(&pod)?, wanted);
        // Without naming the backend, the one that holds rules is found.
        install(&pod, &options, None)?;
        assert_eq!(tables(&pod)?, wanted);
        // Over other settings.
        install(&pod, &other, Some(backend))?;
        assert_ne!(tables(&pod)?, wanted);
        install(&pod, &options, Some(backend))?;
        assert_eq!(tables(&pod)?, wanted);

        // A crash leaves one family done: each family is one transaction.
        cleanup(&pod)?;
        install(&pod, &Options { families: Families::Ipv4, ..options.clone() }, Some(backend))?;
        install(&pod, &options, Some(backend))?;
        assert_eq!(tables(&pod)?, wanted);

        // Debris that no run of ours leaves: half of the rules gone, a jump doubled, an older version's chain.
        for damage in [
            &["-F", "WEFT_PROXY"][..],
            &["-D", "OUTPUT", "1"],
            &["-A", "PREROUTING", "-p", "tcp", "-j", "WEFT_INBOUND"],
            &["-N", "WEFT_OLD"],
        ] {
            let status =
                pod.command(format!("iptables-{backend}")).args(["-t", "nat"]).args(damage).status()?;
            ensure!(status.success(), "damaging the rules: {damage:?}");
            assert_ne!(tables(&pod)?, wanted, "{damage:?}");
            install(&pod, &options, Some(backend))?;
            assert_eq!(tables(&pod)?, wanted, "{damage:?}");
        }

        // Two at once.
        let config = config(&options);
        cleanup(&pod)?;
        std::thread::scope(|scope| -> Result<()> {
            let runs: Vec<_> = (0..4)
                .map(|_| scope.spawn(|| pod.enter(|| apply::install(&config, Some(backend)))))
                .collect();
            for run in runs {
                run.join().expect("a run that does not panic")??;
            }
            Ok(())
        })?;
        assert_eq!(tables(&pod)?, wanted);
    }
    Ok(())
}

#[test]
fn cleanup_removes_exactly_ours() -> Result<()> {
    const TEST: &str = "cleanup_removes_exactly_ours";
    let Some(world) = world_or_skip(TEST) else { return Ok(()) };
    let probe = world.pod("probe")?;
    for backend in backends(TEST, &probe)? {
        let pod = world.pod(&format!("a-{backend}"))?;
        // Empty tables, once and again.
        for _ in 0..2 {
            assert!(cleanup(&pod)?.iter().all(|action| *action == Action::NothingToRemove));
        }
        for base in ["iptables", "ip6tables"] {
            for rule in [
                &[
                    "-t",
                    "nat",
                    "-A",
                    "OUTPUT",
                    "-p",
                    "udp",
                    "--dport",
                    "53",
                    "-j",
                    "REDIRECT",
                    "--to-ports",
                    "5353",
                ][..],
                &["-t", "nat", "-N", "MINE"],
                &["-t", "nat", "-A", "PREROUTING", "-j", "MINE"],
                &["-t", "filter", "-A", "INPUT", "-p", "tcp", "--dport", "23", "-j", "DROP"],
            ] {
                let status = pod.command(format!("{base}-{backend}")).args(rule).status()?;
                ensure!(status.success(), "{base}-{backend} {rule:?}");
            }
        }
        let before = tables(&pod)?;
        // The backend is found by whose rules are there.
        let reports = pod.enter(|| apply::install(&config(&Options::default()), None))??;
        assert!(reports.iter().all(|report| report.backend == Some(backend)), "{reports:?}");
        assert_ne!(tables(&pod)?, before);
        let removed = cleanup(&pod)?;
        assert!(removed.iter().all(|action| *action == Action::Removed), "{removed:?}");
        assert_eq!(tables(&pod)?, before);
    }
    Ok(())
}

#[test]
fn rules_move_when_the_backend_does() -> Result<()> {
    const TEST: &str = "rules_move_when_the_backend_does";
    let Some(world) = world_or_skip(TEST) else { return Ok(()) };
    let pod = world.pod("a")?;
    if backends(TEST, &pod)?.len() < 2 {
        return Ok(());
    }
    install(&pod, &Options::default(), Some(Backend::Legacy))?;
    install(&pod, &Options::default(), Some(Backend::Nft))?;
    let jumps = tables(&pod)?.matches("-A OUTPUT -p tcp -j WEFT_OUTBOUND").count();
    assert_eq!(jumps, 2, "one for each family, in one backend");
    Ok(())
}

/// The program itself, in a pod.
#[test]
fn the_program_shows_applies_and_removes() -> Result<()> {
    let Some(world) = world_or_skip("the_program_shows_applies_and_removes") else { return Ok(()) };
    let program = program("weft-iptables")?;
    let a = meshed(&world, "a")?;
    let outside = plain(&world, "outside", &[PORT])?;
    let run = |args: &[&str]| -> Result<String> {
        let output = a.pod.command(&program).args(args).output()?;
        ensure!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
        Ok(String::from_utf8(output.stdout)?)
    };
    let empty = tables(&a.pod)?;
    let shown = run(&["--dry-run"])?;
    assert!(shown.contains("--to-ports 14006"), "{shown}");
    assert_eq!(tables(&a.pod)?, empty, "a dry run changes nothing");

    let applied: serde_json::Value = serde_json::from_str(&run(&["-o", "json"])?)?;
    assert_eq!(applied["families"][0]["action"], "installed");
    let to = SocketAddr::new(a.pod.ip.into(), PORT);
    assert_eq!(dial(&outside.pod, APP, None, to)?, format!("inbound for {to}"));

    let standing = tables(&a.pod)?;
    assert!(run(&["--cleanup", "--dry-run"])?.contains("-X WEFT_INBOUND"));
    assert_eq!(tables(&a.pod)?, standing, "a dry run of the cleanup changes nothing");
    run(&["--cleanup"])?;
    assert_eq!(dial(&outside.pod, APP, None, to)?, format!("app from {}", outside.pod.ip));
    assert!(run(&["--cleanup"])?.contains("nothing to remove"));
    Ok(())
}

/// What a container runtime does with a pod, and what the pod's own init container sees of it.
#[test]
fn a_cni_plugin_captures_from_outside_and_the_pod_can_tell() -> Result<()> {
    let Some(world) = world_or_skip("a_cni_plugin_captures_from_outside_and_the_pod_can_tell") else {
        return Ok(());
    };
    let program = program("weft-iptables")?;
    let pod = world.pod("a")?;
    let nobody = 65_532;
    let check = || pod.command_as(nobody, nobody, &program).arg("check").output();
    let before = check()?;
    let said = String::from_utf8_lossy(&before.stderr);
    assert!(!before.status.success() && said.contains("captured"), "{said}");

    // What holds the pod enters it first: until it has become the program that was asked for, it is still outside.
    let holder = Process::spawn(pod.command("sleep").arg("60"))?;
    let inside = || Ok(std::fs::read_to_string(format!("/proc/{}/comm", holder.id()))?.trim() == "sleep");
    wait(Duration::from_secs(10), inside)?;
    let mut plugin = Command::new(&program)
        .envs([("CNI_COMMAND", "ADD"), ("CNI_CONTAINERID", "c"), ("CNI_IFNAME", "eth0")])
        .env("CNI_NETNS", format!("/proc/{}/ns/net", holder.id()))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    let request = serde_json::json!({
        "cniVersion": "1.0.0", "name": "net", "type": "weft-cni",
        "runtimeConfig": { "io.kubernetes.cri.pod-annotations": {
            "weft.dev/injected": "true", "weft.dev/skip-outbound-ports": "25" } },
        "prevResult": { "cniVersion": "1.0.0", "ips": [] },
    });
    plugin.stdin.take().context("no input")?.write_all(request.to_string().as_bytes())?;
    let output = plugin.wait_with_output()?;
    let answer: serde_json::Value = serde_json::from_slice(&output.stdout)?;
    assert!(output.status.success(), "{answer}");
    assert_eq!(answer, request["prevResult"], "what the plugin before it made is handed on");
    assert!(tables(&pod)?.contains("--dport 25 -j RETURN"), "{}", tables(&pod)?);
    let after = check()?;
    assert!(after.status.success(), "{}", String::from_utf8_lossy(&after.stderr));
    Ok(())
}

#[test]
fn wrong_options_are_all_named_and_no_rule_is_made() -> Result<()> {
    let Some(world) = world_or_skip("wrong_options_are_all_named_and_no_rule_is_made") else { return Ok(()) };
    let pod = world.pod("a")?;
    let empty = tables(&pod)?;
    let wrong = [
        ["--exclude-inbound-ports", "0", "0"],
        ["--exclude-outbound-ports", "20-30,25", "25"],
        ["--exclude-outbound-cidrs", "fd00::/8", "fd00::/8"],
        ["--only-inbound-ports", "14006", "14006"],
    ];
    let mut command = pod.command(program("weft-iptables")?);
    command.args(["--families", "ipv4"]);
    for [option, value, _] in wrong {
        command.args([option, value]);
    }
    let output = command.output()?;
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success(), "{said}");
    for [option, _, part] in wrong {
        assert!(
            said.lines().any(|line| line.contains(option) && line.contains(part)),
            "{option} {part}: {said}"
        );
    }
    assert_eq!(tables(&pod)?, empty);
    Ok(())
}

/// A pod without IPv6 is told so and captured all the same.
#[test]
fn without_ipv6_the_rest_is_captured() -> Result<()> {
    let Some(world) = world_or_skip("without_ipv6_the_rest_is_captured") else { return Ok(()) };
    let pod = world.pod("a")?;
    pod.enter(|| std::fs::write("/proc/sys/net/ipv6/conf/all/disable_ipv6", "1"))?.ok();
    let reports = pod.enter(|| apply::install(&config(&Options::default()), None))??;
    assert_eq!(reports[0].action, Action::Installed);
    assert_eq!(reports[1].action, Action::Unavailable, "{:?}", reports[1]);
    assert!(reports[1].reason.as_deref().is_some_and(|reason| reason.contains("IPv6")), "{:?}", reports[1]);
    Ok(())
}

/// A pod of an IPv4-only cluster whose kernel captures no IPv6: its link-local address is no side door.
#[test]
fn ipv6_that_cannot_be_captured_is_switched_off_or_the_pod_does_not_start() -> Result<()> {
    const TEST: &str = "ipv6_that_cannot_be_captured_is_switched_off_or_the_pod_does_not_start";
    let Some(world) = world_or_skip(TEST) else { return Ok(()) };
    if !world.has_ipv6() {
        let _ = writeln!(io::stderr(), "{TEST}: SKIPPED: this kernel has no IPv6");
        return Ok(());
    }
    let neighbour = world.pod("neighbour")?;
    let pod = world.pod("a")?;
    let flushed =
        pod.command("ip").args(["-6", "addr", "flush", "dev", "eth0", "scope", "global"]).status()?;
    ensure!(flushed.success(), "taking the global address away");
    let _app = Answering::start(&pod, APP, PORT, "app")?;
    let through = link_local(&neighbour)?;
    let door = SocketAddr::V6(SocketAddrV6::new(link_local(&pod)?.0, PORT, 0, through.1));
    assert_eq!(dial(&neighbour, APP, None, door)?, format!("app from {}", through.0));

    // No ip6tables is to be found, and settings can only be read, as in an init container.
    let tools = std::env::temp_dir().join(format!("weft-ipv4-tools-{}", std::process::id()));
    let _ = std::fs::remove_dir_all(&tools);
    std::fs::create_dir_all(&tools)?;
    for name in ["iptables-nft", "iptables-legacy", "iptables"] {
        for verb in ["save", "restore"] {
            let tool = format!("{name}-{verb}");
            let found = ["/usr/sbin", "/sbin", "/usr/local/sbin"].map(|folder| Path::new(folder).join(&tool));
            if let Some(found) = found.iter().find(|path| path.exists()) {
                std::os::unix::fs::symlink(found, tools.join(&tool))?;
            }
        }
    }
    let run = |before: &str, args: &str| -> Result<(bool, String)> {
        let script =
            format!("{before} PATH={} exec {} {args}", tools.display(), program("weft-iptables")?.display());
        let output = pod.command("unshare").args(["--mount", "sh", "-c", &script]).output()?;
        Ok((output.status.success(), String::from_utf8_lossy(&output.stderr).into_owned()))
    };
    let read_only = "mount --bind /proc/sys /proc/sys && mount -o remount,ro,bind /proc/sys &&";
    let (done, said) = run(read_only, "")?;
    assert!(!done && said.contains("link-local address") && said.contains("WEFT_FAMILIES"), "{said}");
    let (done, said) = run(read_only, "--families ipv4")?;
    assert!(done, "whoever says so lives with it: {said}");
    let (done, said) = run("", "")?;
    assert!(done, "{said}");
    assert!(dial(&neighbour, APP, None, door).is_err(), "past the sidecar");
    let addresses = pod.enter(|| std::fs::read_to_string("/proc/thread-self/net/if_inet6"))??;
    assert!(addresses.lines().all(|line| line.ends_with(" lo")), "loopback keeps it: {addresses}");
    std::fs::remove_dir_all(&tools)?;
    Ok(())
}

/// The ground that all of this stands on: a world leaves nothing, and a pod is not the host.
#[test]
fn a_world_leaves_nothing_behind() -> Result<()> {
    let Some(world) = world_or_skip("a_world_leaves_nothing_behind") else { return Ok(()) };
    let host_links = || std::fs::read_to_string("/proc/net/dev");
    let names = |text: &str| {
        text.lines().filter_map(|l| Some(l.split_once(':')?.0.trim().to_owned())).collect::<Vec<_>>()
    };
    let before = names(&host_links()?);
    let a = world.pod("a")?;
    let b = world.pod_at("b", Ipv4Addr::new(198, 51, 100, 7), "2001:db8::7".parse()?)?;
    assert_eq!(names(&host_links()?), before, "the host has no interface of ours");
    assert_eq!(names(&a.enter(|| std::fs::read_to_string("/proc/thread-self/net/dev"))??), ["lo", "eth0"]);

    // A host outside of the pods' range is reached through the bridge, both ways.
    let _b = Answering::start(&b, APP, PORT, "app")?;
    for (from, to) in addresses(&world, &a).into_iter().zip(addresses(&world, &b)) {
        assert_eq!(dial(&a, APP, None, SocketAddr::new(to, PORT))?, format!("app from {from}"));
    }
    // An address that is free again is taken over at once.
    let old = Answering::start(&a, APP, PORT, "app")?;
    let to = SocketAddr::new(a.ip.into(), PORT);
    assert_eq!(dial(&b, APP, None, to)?, format!("app from {}", b.ip));
    drop(old);
    world.remove(&a);
    let c = world.pod_at("c", a.ip, a.ip6)?;
    let _c = Answering::start(&c, APP, PORT, "app")?;
    assert_eq!(dial(&b, APP, None, to)?, format!("app from {}", b.ip));
    // A cut cable answers nothing; mended, it does again.
    world.connect(&c, false)?;
    assert!(dial_as(&b, (APP, APP), None, to, Duration::from_millis(300)).is_err());
    world.connect(&c, true)?;
    assert_eq!(dial(&b, APP, None, to)?, format!("app from {}", b.ip));

    let mut sleeper = c.command_as(APP, APP, "sleep").arg("600").spawn()?;
    while c.processes().is_empty() {
        std::thread::sleep(Duration::from_millis(5));
    }
    let named = [b.ns, c.ns, world.bridge().ns.clone()];
    drop(world);
    assert!(!sleeper.wait()?.success(), "killed with its pod");
    let left = Command::new("ip").args(["netns", "list"]).output()?;
    let left = String::from_utf8_lossy(&left.stdout).into_owned();
    assert!(named.iter().all(|ns| !left.contains(ns.as_str())), "{left}");
    Ok(())
}

/// The same when the maker has no chance to clean up: a child of this very test binary is killed outright.
#[test]
fn a_killed_maker_leaves_nothing_behind() -> Result<()> {
    const TEST: &str = "a_killed_maker_leaves_nothing_behind";
    let Some(world) = world_or_skip(TEST) else { return Ok(()) };
    if std::env::var_os("WEFT_TEST_MAKER").is_some() {
        let pod = world.pod("a")?;
        let _sleeper = pod.command("sleep").arg("600").spawn()?;
        writeln!(io::stderr(), "{}", pod.ns)?;
        std::thread::sleep(Duration::from_secs(600));
        return Ok(());
    }
    let mut maker = Command::new(std::env::current_exe()?)
        .args(["--exact", TEST])
        .env("WEFT_TEST_MAKER", "1")
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()?;
    let mut ns = String::new();
    BufReader::new(maker.stderr.take().context("its pipe")?).read_line(&mut ns)?;
    let ns = ns.trim().to_owned();
    let made = Path::new("/run/netns").join(&ns);
    ensure!(ns.starts_with("weft-test-") && made.exists(), "made {ns:?}");
    maker.kill()?;
    maker.wait()?;
    let deadline = Instant::now() + Duration::from_secs(10);
    while made.exists() {
        ensure!(Instant::now() < deadline, "{ns} is still there");
        std::thread::sleep(Duration::from_millis(10));
    }

    // And if what cleans up is killed too: the next world of that kind sweeps, but never what is alive.
    let dead = format!("weft-swept-{}.1.0-a", std::process::id());
    ensure!(Command::new("ip").args(["netns", "add", &dead]).status()?.success(), "adding {dead}");
    assert_eq!(World::sweep("swept")?, [dead]);
    assert!(World::sweep("test")?.iter().all(|swept| !world.bridge().ns.starts_with(swept)));
    Ok(())
}

/// A program of this workspace, built beside this test.
fn program(name: &str) -> Result<std::path::PathBuf> {
    let test = std::env::current_exe()?;
    let folder = test.parent().and_then(|deps| deps.parent()).context("no target folder")?;
    let program = folder.join(name);
    ensure!(program.exists(), "{} is not built: cargo build --workspace", program.display());
    Ok(program)
}
