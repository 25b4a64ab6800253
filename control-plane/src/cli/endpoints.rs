//! `weft endpoints`: every endpoint as its callers see it.
//!
//! Why per caller: balancing and ejection are each sidecar's own judgement. One caller that sees an endpoint as
//! slow while the others do not is a finding about the network between the two.

use std::process::ExitCode;

use anyhow::Result;
use clap::Args;

use super::{
    client::{Api, Asking, encode},
    output::{Cell, Column, Output, Screen, Table, Tone, json, micros, span, text},
};
use crate::api::types::Endpoints;

#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  weft endpoints shop/api-v1\n  weft endpoints -o json | jq '.rows[] | select(.state != \"healthy\")'"
)]
pub(super) struct EndpointsArgs {
    /// Only those of this service: NAMESPACE/NAME or NAMESPACE/NAME:PORT
    service: Option<String>,
    #[command(flatten)]
    asking: Asking,
}

pub(super) async fn main(args: &EndpointsArgs) -> Result<ExitCode> {
    let api = Api::find(&args.asking).await?;
    let query =
        args.service.as_deref().map(|service| format!("?service={}", encode(service))).unwrap_or_default();
    let endpoints: Endpoints = api.get(&format!("/api/v1/endpoints{query}")).await?;
    match args.asking.format.output {
        Output::Json => json(&endpoints)?,
        Output::Text => {
            text(&lines(&endpoints, &Screen::stdout()))?;
            if endpoints.rows.is_empty() {
                eprintln!("no sidecar has called {} lately", args.service.as_deref().unwrap_or("anything"));
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

pub(super) fn lines(endpoints: &Endpoints, screen: &Screen) -> Vec<String> {
    let mut table = Table::new(vec![
        Column::text("BACKEND").cut(8),
        Column::text("POD").cut(8),
        Column::text("ADDRESS").drop(3),
        Column::text("SEEN BY").drop(2),
        Column::text("STATE"),
        Column::number("COST"),
        Column::number("IN FLIGHT").drop(4),
        Column::text("BECAUSE").drop(1),
    ]);
    for row in &endpoints.rows {
        let tone = match row.state.as_str() {
            "healthy" => Tone::Good,
            "ejected" => Tone::Bad,
            _ => Tone::Warn,
        };
        let state = match row.ejected_for_ms {
            0 => row.state.clone(),
            ms => format!("{} {}", row.state, span(ms.div_ceil(1_000))),
        };
        let pod = |uid: &str| endpoints.pods.get(uid).cloned().unwrap_or_else(|| uid.to_owned());
        table.row(vec![
            row.backend.as_str().into(),
            pod(&row.uid).into(),
            Cell::toned(Tone::Dim, &row.address),
            Cell::toned(Tone::Dim, pod(&row.seen_by)),
            Cell::toned(tone, state),
            micros((row.cost_ms.max(0.0) * 1_000.0).round() as u64).into(),
            row.in_flight.to_string().into(),
            row.reason.as_str().into(),
        ]);
    }
    table.lines(screen)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::telemetry::view::EndpointRow;

    #[test]
    fn pods_are_named_where_known() {
        let row = EndpointRow {
            backend: "shop/api:80".into(),
            uid: "u1".into(),
            seen_by: "u2".into(),
            state: "ejected".into(),
            ejected_for_ms: 1_500,
            cost_ms: 0.85,
            ..EndpointRow::default()
        };
        let pods = [("u1".to_owned(), "shop/api-1".to_owned())].into();
        let lines = lines(&Endpoints { rows: vec![row], pods }, &Screen::plain(usize::MAX));
        assert!(lines[1].contains("shop/api-1") && lines[1].contains("u2"), "{lines:?}");
        assert!(lines[1].contains("ejected 2s") && lines[1].contains("850µs"), "{lines:?}");
    }
}
