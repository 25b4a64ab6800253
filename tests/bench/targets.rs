//! Weft's targets, and where a run stands to them.
//!
//! Why a list apart from the table: a figure that nobody compares with anything is decoration. Each line says what must
//! be, what is aimed at, and by how much it is missed; a line without figures was not measured and is not shown.

use serde::Serialize;

use crate::{
    load::{Kind, Load},
    peers::Peer,
    report::Report,
};

/// One line: the smaller the better.
#[derive(Serialize)]
pub(crate) struct Target {
    pub(crate) what: String,
    pub(crate) value: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) must: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) goal: Option<f64>,
}

impl Target {
    /// Where the value stands.
    pub(crate) fn verdict(&self) -> String {
        let over = |bound: f64| format!("by {:.0} %", (self.value / bound - 1.0) * 100.0);
        match (self.must, self.goal) {
            (Some(must), _) if self.value > must => format!("MISSED {}", over(must)),
            (_, Some(goal)) if self.value > goal => format!("goal missed {}", over(goal)),
            (_, Some(_)) => "goal reached".to_owned(),
            _ => "reached".to_owned(),
        }
    }
}

/// CPU of the same work, against Envoy and against the relay.
const CPU: (f64, f64, f64) = (0.55, 1.25, 1.0);
const CPU_OF_A_STREAM: (f64, f64) = (0.75, 1.0);
/// At 1,000 requests a second, added p99 against Envoy's and the relay's.
const ADDED_P99: (f64, f64) = (0.7, 1.0);
/// MiB of a sidecar that does nothing.
const IDLE_MIB: (f64, f64) = (12.0, 8.0);
/// KiB of a connection that rests: without TLS on the caller's side, with it on the other.
const PLAIN_KIB: (f64, f64) = (24.0, 16.0);
const MTLS_KIB: (f64, f64) = (48.0, 32.0);
/// Ten services used: in a cluster of ten thousand against one of ten.
const CLUSTER: (f64, f64) = (1.05, 1.0);
const READY_MS: (f64, f64) = (60.0, 25.0);

pub(crate) fn targets(report: &Report) -> Vec<Target> {
    let mut list = List(Vec::new());
    for row in report.rows.iter().filter(|row| row.pair == Peer::Weft) {
        let load = row.load;
        if matches!(load, Load::Handshakes | Load::Rules) {
            // What else goes on is not a cost of requests: there latency is what is looked at.
            continue;
        }
        match load.kind() {
            Kind::Saturated | Kind::Paced => of_requests(&mut list, report, load),
            Kind::Bulk => {
                list.add(format!("{load}: CPU × envoy"), row.to_envoy, Some(CPU_OF_A_STREAM.0), None);
                list.add(format!("{load}: CPU × relay"), row.to_relay, None, Some(CPU_OF_A_STREAM.1));
            }
            Kind::Opened => {}
            Kind::Resting { .. } if load.is_plain() => {
                let what = format!("{load}: KiB each, client's sidecar");
                list.add(what, row.resting_kib_client, Some(PLAIN_KIB.0), Some(PLAIN_KIB.1));
            }
            Kind::Resting { .. } => {
                let what = format!("{load}: KiB each, server's sidecar");
                list.add(what, row.resting_kib_server, Some(MTLS_KIB.0), Some(MTLS_KIB.1));
            }
        }
    }
    let added = |pair| report.row(Load::Rate1000, pair).and_then(|row| row.added_p99_ms);
    let against = |pair| Some(added(Peer::Weft)? / added(pair).filter(|ms| *ms > 0.0)?);
    let what = "added p99 at 1,000/s";
    list.add(format!("{what} × envoy"), against(Peer::Envoy), Some(ADDED_P99.0), None);
    list.add(format!("{what} × relay"), against(Peer::Relay), None, Some(ADDED_P99.1));
    if let Some(weft) = report.memory.iter().find(|row| row.pair == Peer::Weft) {
        let (must, goal) = IDLE_MIB;
        list.add("idle memory of a sidecar, MiB".to_owned(), Some(weft.idle_mib), Some(must), Some(goal));
        let (must, goal) = READY_MS;
        let what = "start to first answer, ms".to_owned();
        list.add(what, Some(weft.first_answer_ms), Some(must), Some(goal));
    }
    let smallest = report.raw.clusters.iter().min_by_key(|cluster| cluster.services);
    let largest = report.raw.clusters.iter().max_by_key(|cluster| cluster.services);
    if let (Some(small), Some(large)) = (smallest, largest)
        && small.services < large.services
    {
        let what = format!("memory at {} services × at {}, client's sidecar", large.services, small.services);
        let (must, goal) = CLUSTER;
        list.add(what, Some(large.client as f64 / small.client as f64), Some(must), Some(goal));
    }
    list.0
}

fn of_requests(list: &mut List, report: &Report, load: Load) {
    let Some(row) = report.row(load, Peer::Weft) else { return };
    let (to_envoy, to_relay, goal) = CPU;
    match report.judged_by_the_relay(load) {
        Some(expected) => {
            let stricter = row.to_relay.map(|measured| measured * expected);
            list.add(format!("{load}: CPU × envoy, by the relay"), stricter, Some(to_envoy), None);
        }
        None => list.add(format!("{load}: CPU × envoy"), row.to_envoy, Some(to_envoy), None),
    }
    list.add(format!("{load}: CPU × relay"), row.to_relay, Some(to_relay), Some(goal));
}

struct List(Vec<Target>);

impl List {
    fn add(&mut self, what: String, value: Option<f64>, must: Option<f64>, goal: Option<f64>) {
        self.0.extend(value.map(|value| Target { what, value, must, goal }));
    }
}
