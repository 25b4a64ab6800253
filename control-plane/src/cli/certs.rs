//! `weft certs`: what the mesh's trust stands on, and when it ends.
//!
//! Why the first line is a date: the commonest total outage of a mesh is a certificate that nobody renewed.

use std::process::ExitCode;

use anyhow::Result;
use clap::{Args, ValueEnum};

use super::{
    client::{Api, Asking},
    output::{Cell, Column, Output, Screen, Table, Tone, json, span, text, unix_now},
};
use crate::api::types::{Certs, Rotated, WorkloadCertificate};

#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  weft certs\n  weft certs --rotate leaves\n  weft certs --rotate add          a new root; then `activate` and `retire`, each when all have followed\n  weft certs -o json | jq '.workloads[] | {pod, serial, not_after}'"
)]
pub(super) struct CertsArgs {
    /// Replace certificates: all workloads' at once (leaves), or the root in three steps, each refused until
    /// connected sidecars have followed the one before
    #[arg(long, value_enum, value_name = "STEP")]
    rotate: Option<Step>,
    /// Take a root's step though connected sidecars have not followed the one before: those that do not trust the new
    /// root believe nobody who has renewed (activate), those known by the old one are believed by nobody (retire)
    #[arg(long, requires = "rotate")]
    force: bool,
    #[command(flatten)]
    asking: Asking,
}

/// See [`CertsArgs::rotate`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Step {
    /// Every workload renews
    Leaves,
    /// A new root is trusted beside the old one
    Add,
    /// The new root signs, and every workload renews; refused while a connected sidecar does not trust it
    Activate,
    /// The old root is trusted no longer; refused while a connected sidecar's certificate is of it
    Retire,
}

impl Step {
    fn path(self, force: bool) -> String {
        let root = match self {
            Self::Leaves => return "/api/v1/certs/rotate".to_owned(),
            Self::Add => "add",
            Self::Activate => "activate",
            Self::Retire => "retire",
        };
        format!("/api/v1/certs/rotate?root={root}{}", if force { "&force=true" } else { "" })
    }
}

pub(super) async fn main(args: &CertsArgs) -> Result<ExitCode> {
    let api = Api::find(&args.asking).await?;
    if let Some(step) = args.rotate {
        let _: Rotated = api.post(&step.path(args.force)).await?;
    }
    let certs: Certs = api.get("/api/v1/certs").await?;
    match args.asking.format.output {
        Output::Json => json(&certs)?,
        Output::Text => text(&lines(&certs, unix_now(), &Screen::stdout()))?,
    }
    Ok(ExitCode::SUCCESS)
}

fn lines(certs: &Certs, now: i64, screen: &Screen) -> Vec<String> {
    let ends = certs.anchors.iter().map(|anchor| anchor.not_after).max();
    let first = certs.workloads.iter().map(|certificate| certificate.not_after).min();
    let mut lines = vec![
        screen.paint(Tone::Bold, &format!("trust domain {}, bundle {}", certs.trust_domain, certs.sequence)),
    ];
    if let Some(end) = ends {
        lines.push(format!("without a new trust anchor the mesh stops in {}", left(end, now)));
    }
    if let Some(first) = first {
        lines.push(format!(
            "the next workload certificate ends in {}, and is renewed from half of its life",
            left(first, now)
        ));
    }
    lines.push(String::new());
    let mut anchors = Table::new(vec![
        Column::text("TRUST ANCHOR").cut(16),
        Column::number("ENDS IN"),
        Column::text("SIGNS"),
    ]);
    for anchor in &certs.anchors {
        anchors.row(vec![
            anchor.serial.as_str().into(),
            left(anchor.not_after, now).into(),
            if anchor.signing { Cell::toned(Tone::Good, "yes") } else { Cell::toned(Tone::Dim, "no") },
        ]);
    }
    lines.extend(anchors.lines(screen));
    lines.push(String::new());
    let mut workloads = Table::new(vec![
        Column::text("POD").cut(12),
        Column::text("IDENTITY").drop(1),
        Column::text("SERIAL").drop(2),
        Column::text("TRUST ANCHOR").cut(16).drop(4),
        Column::number("BUNDLE").drop(5),
        Column::number("AGE").drop(3),
        Column::number("ENDS IN"),
    ]);
    let signs = |serial: &str| certs.anchors.iter().any(|anchor| anchor.signing && anchor.serial == serial);
    for certificate in &certs.workloads {
        let anchor = if signs(&certificate.anchor) { Tone::Dim } else { Tone::Warn };
        let soon = certificate.not_after - now < 3_600;
        workloads.row(vec![
            certificate.pod.as_str().into(),
            Cell::toned(Tone::Dim, &certificate.identity),
            Cell::toned(Tone::Dim, &certificate.serial),
            Cell::toned(anchor, &certificate.anchor),
            in_force(certificate, certs.sequence),
            left(now, certificate.not_before).into(),
            Cell::toned(if soon { Tone::Warn } else { Tone::Plain }, left(certificate.not_after, now)),
        ]);
    }
    lines.extend(workloads.lines(screen));
    lines
}

/// Which bundle a sidecar trusts by, if it is connected.
fn in_force(certificate: &WorkloadCertificate, newest: u64) -> Cell {
    match (certificate.connected, certificate.bundle) {
        (false, _) => Cell::toned(Tone::Dim, "-"),
        (true, 0) => Cell::toned(Tone::Warn, "?"),
        (true, bundle) if bundle < newest => Cell::toned(Tone::Warn, bundle.to_string()),
        (true, bundle) => Cell::toned(Tone::Dim, bundle.to_string()),
    }
}

fn left(end: i64, now: i64) -> String {
    match u64::try_from(end - now) {
        Ok(seconds) => span(seconds),
        Err(_) => "the past".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::types::Anchor;

    #[test]
    fn the_first_end_is_the_first_thing_said() {
        let certs = Certs {
            trust_domain: "cluster.local".into(),
            sequence: 3,
            anchors: vec![Anchor {
                serial: "0a".into(),
                not_after: 100_000,
                signing: true,
                ..Anchor::default()
            }],
            workloads: vec![
                WorkloadCertificate {
                    pod: "shop/web-1".into(),
                    not_after: 8_000,
                    ..WorkloadCertificate::default()
                },
                WorkloadCertificate {
                    pod: "shop/web-2".into(),
                    not_after: 900,
                    ..WorkloadCertificate::default()
                },
            ],
        };
        let text = lines(&certs, 1_000, &Screen::plain(usize::MAX)).join("\n");
        assert!(text.contains("the mesh stops in 1d03h"), "{text}");
        assert!(text.contains("certificate ends in the past"), "{text}");
    }
}
