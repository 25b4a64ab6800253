//! `weft routes`: how every route does, with its whole latency distribution as a picture.
//!
//! Why a picture beside the percentiles: a p99 hides whether the slow ones are a second peak (one bad endpoint)
//! or a long tail (queueing); in twenty characters both are seen at a glance. All rows share one scale, so that
//! routes can be compared by looking down the column.

use std::{process::ExitCode, time::Duration};

use anyhow::{Result, ensure};
use clap::{Args, ValueEnum};

use super::{
    client::{Api, Asking, encode},
    output::{
        Cell, Column, Live, Output, Screen, Table, Tone, bars, json, micros, per_second, percent,
        success_tone, text, width,
    },
};
use crate::{
    api::types::Routes,
    resources::values::GatewayDuration,
    telemetry::view::{Bucket, Quantiles, RouteRow},
};

#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  weft routes --watch\n  weft routes shop/api --window 5m\n  weft routes -o json | jq '.rows[] | {route, p99: .duration.p99_ms}'"
)]
pub(super) struct RoutesArgs {
    /// Only routes to this service: NAMESPACE/NAME or NAMESPACE/NAME:PORT
    service: Option<String>,
    /// How far back: 10s to 1h
    #[arg(long, default_value = "30s", value_parser = window)]
    window: Duration,
    /// Show it again every second
    #[arg(short, long)]
    watch: bool,
    /// Whose view: of the callers, or of the called pods
    #[arg(long, value_enum, default_value_t = Direction::Outbound)]
    direction: Direction,
    /// Latency until the first byte of the response, or until its last
    #[arg(long, value_enum, default_value_t = Until::Full)]
    latency: Until,
    #[command(flatten)]
    asking: Asking,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Direction {
    /// As callers see it
    Outbound,
    /// As the called pods see it
    Inbound,
    /// Both
    All,
}

/// Which latency a view shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Until {
    /// The first byte of the response
    FirstByte,
    /// Its last
    Full,
}

pub(super) async fn main(args: &RoutesArgs) -> Result<ExitCode> {
    let api = Api::find(&args.asking).await?;
    let mut path = format!("/api/v1/routes?window={}s", args.window.as_secs());
    if let Some(service) = &args.service {
        ensure!(
            service.split('/').count() == 2 && !service.starts_with('/'),
            "{service:?} is not a service: write NAMESPACE/NAME or NAMESPACE/NAME:PORT, for instance shop/api"
        );
        path.push_str(&format!("&service={}", encode(service)));
    }
    if args.direction != Direction::All {
        let direction = if args.direction == Direction::Outbound { "outbound" } else { "inbound" };
        path.push_str(&format!("&direction={direction}"));
    }
    let ask = async || -> Result<Routes> {
        let mut routes: Routes = api.get(&path).await?;
        routes.rows.retain(|row| match args.direction {
            Direction::Outbound => row.direction == "outbound",
            Direction::Inbound => row.direction == "inbound",
            Direction::All => true,
        });
        Ok(routes)
    };
    if !args.watch {
        let routes = ask().await?;
        match args.asking.format.output {
            Output::Json => json(&routes)?,
            Output::Text => {
                text(&lines(&routes.rows, args.latency, &Screen::stdout()))?;
                if routes.rows.is_empty() {
                    let of = args.service.as_deref().unwrap_or("any service");
                    eprintln!(
                        "no requests to {of} in the last {}s: are callers meshed? `weft status` lists sidecars",
                        args.window.as_secs()
                    );
                }
            }
        }
        return Ok(ExitCode::SUCCESS);
    }
    let mut live = Live::new(Screen::stdout());
    let mut failures = 0;
    loop {
        match ask().await {
            Ok(routes) if args.asking.format.output == Output::Json => {
                super::output::write(&(serde_json::to_string(&routes)? + "\n"))?;
            }
            Ok(routes) => {
                let screen = live.screen();
                let mut shown = lines(&routes.rows, args.latency, &screen);
                if !screen.terminal {
                    shown.push(String::new());
                }
                live.draw(&shown)?;
            }
            // A controller that restarts is no reason to stop watching; one that was never there is.
            Err(error) => {
                failures += 1;
                ensure!(failures < 60 && live.started(), error);
                let screen = live.screen();
                live.draw(&[screen.paint(Tone::Warn, &format!("waiting: {}", first_line(&error)))])?;
            }
        }
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
}

/// The routes as a table that fits.
pub(crate) fn lines(rows: &[RouteRow], until: Until, screen: &Screen) -> Vec<String> {
    // A coarse picture says more than none.
    let fine = table(rows, until, screen, &Scale::of(rows, 1));
    if rows.is_empty() || fine.iter().any(|line| line.contains('▕')) {
        return fine;
    }
    table(rows, until, screen, &Scale::of(rows, 2))
}

fn table(rows: &[RouteRow], until: Until, screen: &Screen, scale: &Scale) -> Vec<String> {
    let columns = vec![
        Column::text("SERVICE").cut(8),
        Column::text("ROUTE").cut(6),
        Column::text("BACKEND").drop(3),
        Column::text("CALLER").drop(7),
        Column::text("PROTO").drop(6),
        Column::number("SUCCESS"),
        Column::number("RATE/s"),
        Column::number("RETRIES").drop(9),
        Column::number("P50"),
        Column::number("P90").drop(8),
        Column::number("P99"),
        Column::number("P99.9").drop(4),
        Column::number("MAX").drop(5),
        Column::text("").drop(2),
    ];
    let mut table = Table::new(columns);
    let mut rows: Vec<&RouteRow> = rows.iter().collect();
    rows.sort_by(|a, b| {
        let key = |row: &RouteRow| {
            (
                row.direction.clone(),
                row.parent.clone(),
                row.route.clone(),
                row.backend.clone(),
                row.workload.clone(),
                row.protocol.clone(),
            )
        };
        key(b).0.cmp(&key(a).0).then_with(|| key(a).cmp(&key(b)))
    });
    for row in rows {
        let quantiles = match until {
            Until::Full => &row.duration,
            Until::FirstByte => &row.first_byte,
        };
        let has_latency = quantiles.max_ms > 0.0;
        let latency = |of: fn(&Quantiles) -> f64| {
            if has_latency { Cell::from(ms(of(quantiles))) } else { Cell::toned(Tone::Dim, "-") }
        };
        let quiet = row.count == 0;
        let (service, namespace) = service(row);
        table.row(vec![
            service.into(),
            short_route(&row.route, &namespace).into(),
            short_backend(row, &namespace).into(),
            Cell::toned(Tone::Dim, short(&row.workload, &namespace)),
            Cell::toned(Tone::Dim, &row.protocol),
            match quiet {
                true => Cell::toned(Tone::Dim, "-"),
                false => Cell::toned(success_tone(row.success_rate), percent(row.success_rate)),
            },
            per_second(row.rate).into(),
            if row.retries == 0 { Cell::toned(Tone::Dim, "-") } else { row.retries.to_string().into() },
            latency(|q| q.p50_ms),
            latency(|q| q.p90_ms),
            latency(|q| q.p99_ms),
            latency(|q| q.p999_ms),
            latency(|q| q.max_ms),
            Cell::toned(Tone::Accent, format!("▕{}▏", scale.picture(&row.buckets))),
        ]);
    }
    let mut lines = table.lines(screen);
    // The scale stands over the pictures, where the heading would be.
    if let (Some(heading), Some(first)) = (lines.first().cloned(), lines.get(1)) {
        let plain = strip(first);
        if let Some(start) = plain.chars().position(|c| c == '▕') {
            let pad = " ".repeat(start.saturating_sub(width(&strip(&heading))));
            lines[0] = format!("{heading}{pad}{}", screen.paint(Tone::Dim, &scale.heading()));
        }
    }
    lines
}

/// The latency axis that all rows share: half octaves, or whole ones where there is little room, and it spans
/// what was seen.
struct Scale {
    first: i32,
    columns: usize,
    /// Half octaves in a column.
    step: i32,
}

impl Scale {
    fn of(rows: &[RouteRow], step: i32) -> Self {
        let seen = rows.iter().flat_map(|row| &row.buckets).filter(|bucket| bucket.count > 0);
        let (mut first, mut last) = (i32::MAX, i32::MIN);
        for bucket in seen {
            first = first.min(column(bucket));
            last = last.max(column(bucket));
        }
        if first > last {
            (first, last) = (0, 0);
        }
        let least = MIN_COLUMNS / usize::try_from(step).unwrap_or(1);
        let columns = usize::try_from((last - first) / step + 1).unwrap_or(1).clamp(least, MAX_COLUMNS);
        Self { first, columns, step }
    }

    /// What lies beyond the last column is counted there.
    fn picture(&self, buckets: &[Bucket]) -> String {
        let mut counts = vec![0_u64; self.columns];
        for bucket in buckets {
            let at = (column(bucket) - self.first) / self.step;
            let at = usize::try_from(at).unwrap_or(0).min(self.columns - 1);
            counts[at] = counts[at].saturating_add(bucket.count);
        }
        bars(&counts)
    }

    /// The lowest and highest latency on the axis, over its ends; the highest alone where both have no room.
    fn heading(&self) -> String {
        let last = self.first + self.step * i32::try_from(self.columns).unwrap_or(0);
        let (low, high) = (axis(self.first), axis(last));
        let room = (self.columns + 2).saturating_sub(width(&low) + width(&high));
        match room {
            0 => format!("{}{high}", "─".repeat((self.columns + 2).saturating_sub(width(&high)))),
            room => format!("{low}{}{high}", "─".repeat(room)),
        }
    }
}

/// Half octaves above 64 µs.
fn column(bucket: &Bucket) -> i32 {
    let octaves = (bucket.up_to_ms.max(0.001) / 0.064).log2();
    // Bounds are powers by construction, up to rounding.
    ((octaves * 2.0 - 0.01).ceil() as i32).clamp(-12, 60)
}

/// The lower end of a column.
fn axis(column: i32) -> String {
    let us = 64.0 * 2.0_f64.powf((f64::from(column) - 1.0) / 2.0);
    match us {
        us if us < 1_000.0 => format!("{us:.0}µs"),
        us if us < 10_000.0 => format!("{:.1}ms", us / 1e3),
        us if us < 1_000_000.0 => format!("{:.0}ms", us / 1e3),
        us => format!("{:.1}s", us / 1e6),
    }
}

fn ms(ms: f64) -> String {
    micros((ms.max(0.0) * 1_000.0).round() as u64)
}

/// The called service and its namespace.
fn service(row: &RouteRow) -> (String, String) {
    let of = if row.direction == "inbound" { &row.workload } else { &row.parent };
    let namespace = of.split_once('/').map(|(namespace, _)| namespace.to_owned()).unwrap_or_default();
    if row.direction == "inbound" {
        return (format!("→{}:{}", row.workload, row.parent), namespace);
    }
    (row.parent.clone(), namespace)
}

/// `HTTPRoute/shop/web/checkout` is `web/checkout` where the namespace is known.
fn short_route(route: &str, namespace: &str) -> String {
    let parts: Vec<_> = route.splitn(4, '/').collect();
    match parts.as_slice() {
        [_, of, name, rule] if *of == namespace => format!("{name}/{rule}"),
        [_, of, name, rule] => format!("{of}/{name}/{rule}"),
        _ => route.to_owned(),
    }
}

fn short_backend(row: &RouteRow, namespace: &str) -> String {
    if row.backend == row.parent || row.backend.is_empty() {
        return String::new();
    }
    short(&row.backend, namespace)
}

fn short(name: &str, namespace: &str) -> String {
    name.strip_prefix(namespace).and_then(|rest| rest.strip_prefix('/')).unwrap_or(name).to_owned()
}

/// Text without colours.
fn strip(line: &str) -> String {
    let mut plain = String::new();
    let mut chars = line.chars();
    while let Some(c) = chars.next() {
        if c == '\x1b' {
            chars.by_ref().find(|c| *c == 'm');
        } else {
            plain.push(c);
        }
    }
    plain
}

fn first_line(error: &anyhow::Error) -> String {
    error.to_string().lines().next().unwrap_or_default().to_owned()
}

fn window(text: &str) -> Result<Duration, String> {
    let GatewayDuration(window) =
        text.parse().map_err(|_| "write a duration such as 30s or 5m".to_owned())?;
    match window {
        w if w < Duration::from_secs(10) => Err("the shortest window is 10s".to_owned()),
        w if w > Duration::from_secs(3_600) => Err("history goes back 1h".to_owned()),
        w => Ok(w),
    }
}

const MIN_COLUMNS: usize = 16;
/// 64 µs to 4 minutes.
const MAX_COLUMNS: usize = 44;

#[cfg(test)]
mod tests {
    use super::*;

    fn row(parent: &str, route: &str, backend: &str, buckets: &[(f64, u64)]) -> RouteRow {
        let quantiles = Quantiles { p50_ms: 3.2, p90_ms: 4.0, p99_ms: 81.5, p999_ms: 90.0, max_ms: 1_200.0 };
        RouteRow {
            workload: "shop/web".into(),
            direction: "outbound".into(),
            parent: parent.into(),
            route: route.into(),
            backend: backend.into(),
            protocol: "http1".into(),
            count: 100,
            rate: 10.0,
            success_rate: 0.999,
            first_byte: quantiles,
            duration: quantiles,
            buckets: buckets
                .iter()
                .map(|(up_to_ms, count)| Bucket { up_to_ms: *up_to_ms, count: *count })
                .collect(),
            ..RouteRow::default()
        }
    }

    fn rows() -> Vec<RouteRow> {
        vec![
            row("shop/api:80", "HTTPRoute/shop/api/items", "shop/api-v2:80", &[(1.024, 10), (65.536, 1)]),
            row("shop/api:80", "HTTPRoute/shop/api/items", "shop/api-v1:80", &[(0.128, 4), (1.024, 100)]),
            row("shop/db:3306", "default", "shop/db:3306", &[]),
        ]
    }

    #[test]
    fn all_rows_share_one_axis_and_the_scale_stands_over_it() {
        let lines = lines(&rows(), Until::Full, &Screen::plain(usize::MAX));
        assert_eq!(lines.len(), 4);
        let at = |line: &str, c: char| line.chars().position(|x| x == c);
        let starts: Vec<_> = lines[1..].iter().map(|line| at(line, '▕')).collect();
        assert!(starts[0].is_some() && starts.iter().all(|start| *start == starts[0]), "{lines:#?}");
        let ends: Vec<_> = lines[1..].iter().map(|line| at(line, '▏')).collect();
        assert!(ends.iter().all(|end| *end == ends[0]));
        assert_eq!(width(&lines[0]), ends[0].unwrap() + 1, "{lines:#?}");
        // Sorted, shortened: v1 before v2, and the fast one's peak is at the same column in both.
        assert!(lines[1].contains("api/items  api-v1:80"), "{lines:#?}");
        assert_eq!(at(&lines[1], '█'), lines[2].chars().position(|c| c == '█'));
    }

    #[test]
    fn every_width_fits() {
        for columns in 20..200 {
            for line in lines(&rows(), Until::FirstByte, &Screen::plain(columns)) {
                assert!(width(&line) <= columns, "{columns}: {} {line:?}", width(&line));
            }
        }
        let coarse = lines(&rows(), Until::Full, &Screen::plain(80));
        assert!(coarse[1].contains('▕') && coarse[0].contains('─'), "{coarse:#?}");
        // Two rows of one route are told apart before rare latencies are told.
        let told = lines(&rows(), Until::Full, &Screen::plain(100));
        assert!(told[1].contains("api-v1") && told[2].contains("api-v2"), "{told:#?}");
        // What matters most stays the longest.
        let narrow = lines(&rows(), Until::Full, &Screen::plain(60)).join("\n");
        assert!(narrow.contains("SUCCESS") && narrow.contains("P99"), "{narrow}");
    }

    #[test]
    fn octaves_make_two_columns() {
        let bucket = |up_to_ms| Bucket { up_to_ms, count: 1 };
        assert_eq!(column(&bucket(0.064)), 0);
        assert_eq!(column(&bucket(0.064 * 2.0_f64.powf(0.25))), 1);
        assert_eq!(column(&bucket(0.064 * 2.0_f64.powf(0.5))), 1);
        assert_eq!(column(&bucket(0.128)), 2);
        assert_eq!(column(&bucket(f64::MAX)), 60);
        assert_eq!(column(&bucket(-1.0)), -12);
    }

    #[test]
    fn a_window_is_10s_to_1h_with_its_unit() {
        assert_eq!(window("30s"), Ok(Duration::from_secs(30)));
        assert_eq!(window("1h"), Ok(Duration::from_secs(3_600)));
        for bad in ["", "30", "1s", "2h", "x"] {
            assert!(window(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn names_are_short_where_nothing_is_lost() {
        assert_eq!(short_route("HTTPRoute/shop/web/checkout", "shop"), "web/checkout");
        assert_eq!(short_route("HTTPRoute/shop/web/checkout", "other"), "shop/web/checkout");
        assert_eq!(short_route("default", "shop"), "default");
    }
}
