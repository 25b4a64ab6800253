//! The chart: for each load a bar a pair, CPU for the same work, the relay's being 1.
//!
//! Why ratios to the relay and not microseconds: loads differ by a factor of twenty, and only ratios of one run compare.

use std::path::Path;

use anyhow::{Result, anyhow};
use plotters::prelude::*;

use crate::{
    load::Load,
    peers::Peer,
    report::{Report, Row},
};

/// Writes it as SVG.
pub(crate) fn write(report: &Report, path: &Path) -> Result<()> {
    let shown = |row: &&Row| row.to_relay.is_some();
    let mut loads: Vec<Load> = report.rows.iter().filter(shown).map(|row| row.load).collect();
    loads.dedup();
    if loads.is_empty() {
        return Ok(());
    }
    draw(report, &loads, path).map_err(|e| anyhow!("cannot draw {}: {e}", path.display()))
}

fn draw(report: &Report, loads: &[Load], path: &Path) -> Result<(), Box<dyn std::error::Error>> {
    let bars = |load| {
        let rows = report.rows.iter().filter(move |row| row.load == load);
        rows.filter_map(|row| Some((row.pair, row.to_relay?)))
    };
    let lines: usize = loads.iter().map(|&load| bars(load).count() + 1).sum();
    let area = SVGBackend::new(path, (WIDTH, 90 + LINE * lines as u32)).into_drawing_area();
    area.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&area)
        .caption("CPU of both proxies for the same work; the bare relay is 1", ("sans-serif", 17))
        .margin(12)
        .x_label_area_size(28)
        .y_label_area_size(LABELS)
        .build_cartesian_2d(0.0..MOST, lines as f64..0.0)?;
    chart.configure_mesh().disable_y_mesh().y_labels(0).light_line_style(WHITE).draw()?;
    let font = ("sans-serif", 12);
    let mut top = 0.0;
    for &load in loads {
        let (_, pixel) = chart.backend_coord(&(0.0, top + 0.6));
        area.draw(&Text::new(load.to_string(), (14, pixel), font))?;
        for (pair, ratio) in bars(load) {
            let bar = [(0.0, top + 0.1), (ratio.min(MOST), top + 0.9)];
            chart.draw_series([Rectangle::new(bar, color(pair).filled())])?;
            let (x, y) = chart.backend_coord(&(ratio.min(MOST * 0.9), top + 0.2));
            area.draw(&Text::new(format!("{pair} {ratio:.2}"), (x + 4, y), font))?;
            top += 1.0;
        }
        top += 1.0;
    }
    chart.draw_series([PathElement::new([(1.0, 0.0), (1.0, lines as f64)], BLACK)])?;
    area.present()?;
    Ok(())
}

fn color(pair: Peer) -> RGBColor {
    match pair {
        Peer::Weft => RGBColor(31, 119, 180),
        Peer::Envoy => RGBColor(214, 100, 90),
        Peer::Relay => RGBColor(120, 120, 120),
        Peer::Haproxy => RGBColor(230, 170, 80),
        Peer::Nginx => RGBColor(110, 170, 110),
        Peer::Direct => BLACK,
    }
}

const WIDTH: u32 = 960;
const LINE: u32 = 16;
const LABELS: u32 = 300;
/// Longer bars are cut; the figure stands beside them.
const MOST: f64 = 4.0;
