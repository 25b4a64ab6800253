//! `weft status`: is every object right, and is it live?
//!
//! Why both in one view: "accepted" and "in force everywhere" are two questions, and somebody who has just changed
//! a route has both. `applied 12/12` counts sidecars in which everything that an object says is live; whoever is
//! missing is named.

use std::process::ExitCode;

use anyhow::{Result, bail};
use clap::Args;

use super::{
    client::{Api, Asking},
    output::{Cell, Column, Output, Screen, Table, Tone, json, span, text, unix_now},
};
use crate::api::types::{ObjectStatus, ProblemStatus, SidecarStatus, Status};

#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  weft status\n  weft status HTTPRoute/shop/web\n  weft status -o json | jq '.problems'\n\nExit code: 0 when all is well, 1 when something shown has a problem."
)]
pub(super) struct StatusArgs {
    /// Only this: KIND, KIND/NAME or KIND/NAMESPACE/NAME (`sidecar/NAMESPACE/NAME` for one sidecar)
    #[arg(value_name = "KIND/NAMESPACE/NAME")]
    object: Option<String>,
    /// Services and pods too, which are rarely what one looks for
    #[arg(short, long)]
    all: bool,
    #[command(flatten)]
    asking: Asking,
}

pub(super) async fn main(args: &StatusArgs) -> Result<ExitCode> {
    let api = Api::find(&args.asking).await?;
    let mut status: Status = api.get("/api/v1/status").await?;
    if let Some(wanted) = &args.object {
        let wanted = Wanted::parse(wanted);
        status.objects.retain(|object| wanted.is(&object.kind, &object.namespace, &object.name));
        status.problems.retain(|problem| {
            let mut parts = problem.object.splitn(3, '/');
            let (kind, namespace) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
            match parts.next() {
                Some(name) => wanted.is(kind, namespace, name),
                None => wanted.is(kind, "", namespace),
            }
        });
        status.sidecars.retain(|sidecar| {
            let (namespace, name) = sidecar.pod.split_once('/').unwrap_or(("", &sidecar.pod));
            wanted.is("Sidecar", namespace, name)
        });
        if status.objects.is_empty() && status.problems.is_empty() && status.sidecars.is_empty() {
            bail!(
                "there is no {}: `weft status --all` lists what there is",
                args.object.as_deref().unwrap_or_default()
            );
        }
    }
    let details = args.object.is_some();
    match args.asking.format.output {
        Output::Json => json(&status)?,
        Output::Text => text(&lines(&status, args.all || details, details, &Screen::stdout()))?,
    }
    let well = status.problems.is_empty()
        && status.objects.iter().all(|object| wrong(object).is_none())
        && status.sidecars.iter().all(|sidecar| sidecar.report.nacked == 0);
    Ok(if well { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// What the user asked for; kinds in any case, with Kubernetes' short names.
pub(super) struct Wanted {
    kind: String,
    namespace: Option<String>,
    name: Option<String>,
}

impl Wanted {
    pub(super) fn parse(text: &str) -> Self {
        let mut parts = text.splitn(3, '/').map(str::to_owned);
        let kind = parts.next().unwrap_or_default().to_ascii_lowercase();
        let kind = match kind.as_str() {
            "svc" | "services" => "service".to_owned(),
            "po" | "pods" => "pod".to_owned(),
            "tp" => "trafficpolicy".to_owned(),
            "ap" => "authorizationpolicy".to_owned(),
            _ => kind,
        };
        let (first, second) = (parts.next(), parts.next());
        match (first, second) {
            (namespace, Some(name)) => Self { kind, namespace, name: Some(name) },
            (name, None) => Self { kind, namespace: None, name },
        }
    }

    pub(super) fn is(&self, kind: &str, namespace: &str, name: &str) -> bool {
        self.kind == kind.to_ascii_lowercase()
            && self.namespace.as_deref().is_none_or(|wanted| wanted == namespace)
            && self.name.as_deref().is_none_or(|wanted| wanted == name)
    }
}

fn lines(status: &Status, all: bool, details: bool, screen: &Screen) -> Vec<String> {
    let mut lines = Vec::new();
    let heading = |text: &str| screen.paint(Tone::Bold, text);
    if !status.problems.is_empty() {
        lines.push(screen.paint(Tone::Bad, "What could not be used:"));
        lines.extend(status.problems.iter().map(|problem| format!("  {}", problem_line(problem))));
        lines.push(String::new());
    }
    let shown: Vec<_> = status
        .objects
        .iter()
        .filter(|object| {
            all || wrong(object).is_some() || !["Pod", "Service", "EndpointSlice"].contains(&&*object.kind)
        })
        .collect();
    if !shown.is_empty() {
        lines.extend(objects(&shown, &status.problems).lines(screen));
        lines.push(String::new());
    }
    if details {
        for object in &shown {
            lines.extend(about(object, screen));
        }
    }
    let hidden = status.objects.len() - shown.len();
    if hidden > 0 {
        lines.push(
            screen.paint(Tone::Dim, &format!("and {hidden} Services, Pods and EndpointSlices (--all)")),
        );
        lines.push(String::new());
    }
    if !status.sidecars.is_empty() {
        lines.extend(sidecars(&status.sidecars).lines(screen));
        lines.push(String::new());
    }
    if !details {
        let connected = status.sidecars.iter().filter(|sidecar| sidecar.connected).count();
        lines.push(heading(&format!(
            "controller {}: {} objects from {}, {connected}/{} sidecars connected{}",
            status.version,
            status.objects.len(),
            status.source,
            status.sidecars.len(),
            if status.synced { "" } else { "; NOT synced yet" },
        )));
    }
    while lines.last().is_some_and(String::is_empty) {
        lines.pop();
    }
    lines
}

fn objects(objects: &[&ObjectStatus], problems: &[ProblemStatus]) -> Table {
    let mut table = Table::new(vec![
        Column::text("OBJECT").cut(12),
        Column::text("STATE"),
        Column::number("APPLIED"),
        Column::number("AFTER").drop(2),
        Column::text("VERSION").drop(3),
        Column::text("FILE").drop(1),
        Column::text("BECAUSE").drop(4),
    ]);
    for object in objects {
        let (state, because) = match wrong(object) {
            Some((reason, message)) => (Cell::toned(Tone::Bad, reason), message),
            None if problems.iter().any(|problem| problem.object == object.key()) => (
                Cell::toned(Tone::Warn, "last good"),
                "its newest text could not be used: see above".to_owned(),
            ),
            None => (Cell::toned(Tone::Good, "ok"), behind(object)),
        };
        let tone = if object.applied < object.of { Tone::Warn } else { Tone::Plain };
        table.row(vec![
            object.key().into(),
            state,
            if object.of == 0 {
                Cell::toned(Tone::Dim, "-")
            } else {
                Cell::toned(tone, format!("{}/{}", object.applied, object.of))
            },
            object
                .applied_after_ms
                .map_or_else(|| Cell::toned(Tone::Dim, "-"), |ms| format!("{ms}ms").into()),
            Cell::toned(Tone::Dim, &object.version),
            Cell::toned(Tone::Dim, place(&object.file, object.line)),
            because.into(),
        ]);
    }
    table
}

fn sidecars(sidecars: &[SidecarStatus]) -> Table {
    let mut table = Table::new(vec![
        Column::text("SIDECAR").cut(12),
        Column::text("STATE"),
        Column::number("LIVE").drop(5),
        Column::number("BEHIND").drop(4),
        Column::number("REFUSED"),
        Column::number("RSS").drop(3),
        Column::number("CONNS").drop(6),
        Column::number("CERT ENDS IN").drop(2),
        Column::number("HEARD").drop(7),
        Column::text("VERSION").drop(8),
    ]);
    let now = unix_now();
    for sidecar in sidecars {
        let report = &sidecar.report;
        let left = u64::try_from(report.certificate_not_after - now).unwrap_or(0);
        table.row(vec![
            sidecar.pod.as_str().into(),
            match sidecar.connected {
                true => Cell::toned(Tone::Good, "connected"),
                false => Cell::toned(Tone::Bad, "away"),
            },
            report.applied.to_string().into(),
            Cell::toned(if sidecar.behind > 0 { Tone::Warn } else { Tone::Dim }, sidecar.behind.to_string()),
            Cell::toned(if report.nacked > 0 { Tone::Bad } else { Tone::Dim }, report.nacked.to_string()),
            format!("{:.1}MiB", report.rss_bytes as f64 / 1_048_576.0).into(),
            report.connections.to_string().into(),
            match report.certificate_not_after {
                0 => Cell::toned(Tone::Dim, "-"),
                _ => Cell::toned(if left < 3_600 { Tone::Warn } else { Tone::Plain }, span(left)),
            },
            match report.version.is_empty() && !sidecar.connected {
                true => Cell::toned(Tone::Bad, "never"),
                false => format!("{} ago", span(report.last_seen_s)).into(),
            },
            Cell::toned(Tone::Dim, &report.version),
        ]);
    }
    table
}

/// Everything that is known of one object.
fn about(object: &ObjectStatus, screen: &Screen) -> Vec<String> {
    let mut lines = vec![screen.paint(Tone::Bold, &object.key())];
    for condition in &object.conditions {
        let good = condition.status != (condition.kind == "PartiallyInvalid");
        let mark = screen.paint(if good { Tone::Good } else { Tone::Bad }, if good { "✓" } else { "✗" });
        let parent =
            if condition.parent.is_empty() { String::new() } else { format!(" for {}", condition.parent) };
        let said =
            if condition.message.is_empty() { String::new() } else { format!(": {}", condition.message) };
        lines.push(format!("  {mark} {}{parent}: {}{said}", condition.kind, condition.reason));
    }
    for laggard in &object.laggards {
        let why = if laggard.reason.is_empty() { "not live yet" } else { &laggard.reason };
        lines.push(format!(
            "  {} {} lacks {}: {why}",
            screen.paint(Tone::Warn, "…"),
            laggard.pod,
            laggard.resource
        ));
    }
    lines.push(String::new());
    lines
}

/// Reason and message of the first thing that is wrong with an object.
fn wrong(object: &ObjectStatus) -> Option<(String, String)> {
    let bad = object.conditions.iter().find(|c| c.status == (c.kind == "PartiallyInvalid"))?;
    let message = if bad.message.is_empty() { bad.parent.clone() } else { bad.message.clone() };
    Some((bad.reason.clone(), message))
}

fn behind(object: &ObjectStatus) -> String {
    match object.laggards.as_slice() {
        [] => String::new(),
        [one] => format!("{} is behind{}", one.pod, because(&one.reason)),
        [one, rest @ ..] => format!("{} and {} more are behind{}", one.pod, rest.len(), because(&one.reason)),
    }
}

fn because(reason: &str) -> String {
    if reason.is_empty() { String::new() } else { format!(": {reason}") }
}

pub(super) fn problem_line(problem: &ProblemStatus) -> String {
    let mut line = format!("{}: ", place(&problem.file, problem.line));
    if !problem.object.is_empty() {
        line.push_str(&format!("{}: ", problem.object));
    }
    if !problem.field.is_empty() {
        line.push_str(&format!("{}: ", problem.field));
    }
    line.push_str(&problem.reason);
    if problem.kept_last_good {
        line.push_str(" (its last good version stays in force)");
    }
    // Text from a file must not steer the terminal.
    line.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

fn place(file: &str, line: u32) -> String {
    if line == 0 { file.to_owned() } else { format!("{file}:{line}") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        api::types::{ConditionStatus, Laggard},
        cli::output::width,
    };

    fn status() -> Status {
        let good = ConditionStatus { kind: "Accepted".into(), status: true, ..ConditionStatus::default() };
        let bad = ConditionStatus {
            kind: "ResolvedRefs".into(),
            reason: "BackendNotFound".into(),
            message: "there is no Service shop/api-v3:80".into(),
            ..ConditionStatus::default()
        };
        let object = |kind: &str, name: &str, conditions: Vec<ConditionStatus>| ObjectStatus {
            kind: kind.into(),
            namespace: "shop".into(),
            name: name.into(),
            file: "routes.yaml".into(),
            line: 12,
            version: "3f2a".into(),
            conditions,
            applied: 1,
            of: 2,
            laggards: vec![Laggard { pod: "shop/web-1".into(), ..Laggard::default() }],
            ..ObjectStatus::default()
        };
        Status {
            version: "0.1.0".into(),
            synced: true,
            source: "dir /mesh".into(),
            objects: vec![
                object("HTTPRoute", "web", vec![good.clone()]),
                object("HTTPRoute", "api", vec![good, bad]),
                object("Pod", "web-1", vec![]),
            ],
            problems: vec![ProblemStatus {
                object: "TrafficPolicy/shop/api".into(),
                file: "policy.yaml".into(),
                line: 4,
                field: "spec.retries.maxRetries".into(),
                reason: "must be at most 10".into(),
                kept_last_good: true,
            }],
            sidecars: vec![SidecarStatus {
                pod: "shop/web-1".into(),
                connected: true,
                ..SidecarStatus::default()
            }],
            foreign: 0,
            replicas: Vec::new(),
        }
    }

    #[test]
    fn says_where_what_and_who_is_missing() {
        let text = lines(&status(), false, false, &Screen::plain(usize::MAX)).join("\n");
        for part in [
            "policy.yaml:4: TrafficPolicy/shop/api: spec.retries.maxRetries: must be at most 10 (its last good",
            "HTTPRoute/shop/web",
            "1/2",
            "shop/web-1 is behind",
            "BackendNotFound",
            "there is no Service shop/api-v3:80",
            "and 1 Services, Pods",
            "1/1 sidecars connected",
        ] {
            assert!(text.contains(part), "{part}\n{text}");
        }
    }

    #[test]
    fn tables_fit_every_width() {
        let status = status();
        let shown: Vec<_> = status.objects.iter().collect();
        for columns in 30..200 {
            let screen = Screen::plain(columns);
            for line in objects(&shown, &status.problems)
                .lines(&screen)
                .iter()
                .chain(&sidecars(&status.sidecars).lines(&screen))
            {
                assert!(width(line) <= columns, "{columns}: {line}");
            }
        }
    }

    #[test]
    fn kinds_are_found_in_any_case_and_by_short_name() {
        let web = Wanted::parse("httproute/shop/web");
        assert!(web.is("HTTPRoute", "shop", "web") && !web.is("HTTPRoute", "shop", "api"));
        assert!(Wanted::parse("svc/api").is("Service", "any", "api"));
        assert!(Wanted::parse("Pod").is("Pod", "x", "y"));
        assert!(!Wanted::parse("Pod").is("Service", "x", "y"));
    }
}
