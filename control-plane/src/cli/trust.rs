//! `weft trust`: who still speaks plaintext to whom, which is what stands in the way of strict mTLS.
//!
//! Why from what was seen: whether strict would break a caller is no matter of configuration but of who called. A
//! workload that nobody called lately is not listed, so look before a quiet hour and after it.

use std::process::ExitCode;

use anyhow::Result;
use clap::Args;

use super::{
    client::{Api, Asking},
    output::{Column, Output, Screen, Table, json, span, text},
};
use crate::telemetry::view::EdgeRow;

#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  weft trust                every plaintext edge of the mesh\n  weft trust shop           those to the workloads of one namespace\n  weft trust -o json | jq '.[] | {caller, callee, count}'\n\nExit code: 0 when nothing stands in the way of strict, 1 when something does."
)]
pub(super) struct TrustArgs {
    /// Only those to workloads of this namespace
    namespace: Option<String>,
    #[command(flatten)]
    asking: Asking,
}

pub(super) async fn main(args: &TrustArgs) -> Result<ExitCode> {
    let api = Api::find(&args.asking).await?;
    let edges: Vec<EdgeRow> = api.get("/api/v1/edges").await?;
    let found = plaintext(edges, args.namespace.as_deref());
    match args.asking.format.output {
        Output::Json => json(&found)?,
        Output::Text => {
            let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
            text(&lines(&found, u64::try_from(now.as_millis()).unwrap_or(u64::MAX), &Screen::stdout()))?;
        }
    }
    Ok(if found.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Edges without an identity at the caller's end, the busiest first.
fn plaintext(edges: Vec<EdgeRow>, namespace: Option<&str>) -> Vec<EdgeRow> {
    let of = |edge: &EdgeRow| {
        namespace.is_none_or(|wanted| workload(&edge.callee).starts_with(&format!("{wanted}/")))
    };
    let mut found: Vec<_> = edges.into_iter().filter(|edge| !edge.mtls && of(edge)).collect();
    found.sort_by(|a, b| (b.count, &a.callee, &a.service).cmp(&(a.count, &b.callee, &b.service)));
    found
}

/// `<ns>/<service account>` of an identity.
fn workload(identity: &str) -> String {
    let mut parts = identity.rsplit('/');
    match (parts.next(), parts.next(), parts.next()) {
        (Some(account), Some("sa"), Some(namespace)) => format!("{namespace}/{account}"),
        _ => identity.to_owned(),
    }
}

fn lines(found: &[EdgeRow], now_ms: u64, screen: &Screen) -> Vec<String> {
    if found.is_empty() {
        return vec!["no plaintext was seen: strict mTLS would refuse nobody who called lately".to_owned()];
    }
    let mut table = Table::new(vec![
        Column::text("WORKLOAD").cut(8),
        Column::text("SERVICE OR PORT").cut(8),
        Column::text("CALLER"),
        Column::number("CALLS"),
        Column::number("LAST SEEN"),
    ]);
    for edge in found {
        let caller = if edge.caller.is_empty() { "outside the mesh" } else { &edge.caller };
        table.row(vec![
            workload(&edge.callee).into(),
            edge.service.as_str().into(),
            caller.into(),
            edge.count.to_string().into(),
            format!("{} ago", span(now_ms.saturating_sub(edge.last_seen_ms) / 1_000)).into(),
        ]);
    }
    let mut lines = table.lines(screen);
    lines.push(String::new());
    lines.push("give these callers a sidecar, or keep the port permissive, before `mtls: Strict`".to_owned());
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_plaintext_stands_in_the_way() {
        let edge = |callee: &str, mtls, count| EdgeRow {
            callee: format!("spiffe://cluster.local/ns/{callee}"),
            service: "8080".to_owned(),
            mtls,
            count,
            ..EdgeRow::default()
        };
        let edges = || {
            vec![edge("shop/sa/cart", true, 9), edge("shop/sa/pay", false, 1), edge("db/sa/sql", false, 5)]
        };
        let found = plaintext(edges(), None);
        assert_eq!(
            found.iter().map(|edge| workload(&edge.callee)).collect::<Vec<_>>(),
            ["db/sql", "shop/pay"]
        );
        let text = lines(&found, 2_000, &Screen::plain(200)).join("\n");
        assert!(
            text.contains("shop/pay") && text.contains("outside the mesh") && text.contains("2s ago"),
            "{text}"
        );
        assert!(plaintext(edges(), Some("web")).is_empty());
        assert!(lines(&[], 0, &Screen::plain(80))[0].contains("refuse nobody"));
    }
}
