//! How the `weft` command writes: tables that fit, numbers that can be compared at a glance, colour where a
//! person looks.
//!
//! Why no terminal library: a table and a few escape sequences are all there is, and what goes to a file or a
//! pipe must be plain text anyway. Every renderer here returns lines and takes the width, so that tests and the
//! demo's live view draw exactly what a terminal would show.

use std::io::{IsTerminal as _, Write as _};

use anyhow::Result;
use clap::{Args, ValueEnum};
use serde::Serialize;

/// How to write.
#[derive(Clone, Copy, Debug, Args)]
pub(crate) struct Format {
    /// Format of the answer
    #[arg(short, long, value_enum, default_value_t = Output::Text, value_name = "FORMAT")]
    pub(crate) output: Output,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Output {
    /// For people
    Text,
    /// For scripts
    Json,
}

/// Where output goes and what it can show.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Screen {
    /// A person looks, and lines can be drawn over.
    pub(crate) terminal: bool,
    /// Whether colours are welcome.
    pub(crate) colour: bool,
    /// Columns.
    pub(crate) width: usize,
    /// Lines.
    pub(crate) height: usize,
}

/// How a piece of text looks where there is colour.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Tone {
    /// As it is.
    #[default]
    Plain,
    /// A heading.
    Bold,
    /// Less important.
    Dim,
    /// As it should be.
    Good,
    /// Worth a look.
    Warn,
    /// Wrong.
    Bad,
    /// A drawing.
    Accent,
}

/// One cell of a [`Table`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Cell {
    text: String,
    tone: Tone,
}

/// One column of a [`Table`].
#[derive(Clone, Copy, Debug)]
pub(crate) struct Column {
    /// Heading.
    pub(crate) title: &'static str,
    /// Numbers stand at the right.
    pub(crate) right: bool,
    /// Columns are left out on narrow screens, the largest number first; 0 never.
    pub(crate) drop: u8,
    /// Text is cut to so much when all columns that can go are gone; 0 never.
    pub(crate) cut: usize,
}

/// Rows under headings.
#[derive(Clone, Debug)]
pub(crate) struct Table {
    columns: Vec<Column>,
    rows: Vec<Vec<Cell>>,
}

/// A part of the terminal that is drawn again and again, with other text scrolling above it.
#[derive(Debug)]
pub(crate) struct Live {
    screen: Screen,
    drawn: usize,
    started: bool,
}

impl Screen {
    /// What standard output is.
    pub(crate) fn stdout() -> Self {
        let terminal = std::io::stdout().is_terminal();
        let dumb = std::env::var_os("TERM").is_none_or(|term| term == "dumb");
        let refused = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
        let (width, height) = if terminal { size() } else { (usize::MAX, usize::MAX) };
        Self { terminal: terminal && !dumb, colour: terminal && !dumb && !refused, width, height }
    }

    /// Plain text of this width.
    pub(crate) const fn plain(width: usize) -> Self {
        Self { terminal: false, colour: false, width, height: usize::MAX }
    }

    /// The same with the size as it is now: windows are resized.
    pub(crate) fn again(self) -> Self {
        if !self.terminal {
            return self;
        }
        let (width, height) = size();
        Self { width, height, ..self }
    }

    /// Text in a tone.
    pub(crate) fn paint(&self, tone: Tone, text: &str) -> String {
        let code = match tone {
            Tone::Plain => return text.to_owned(),
            Tone::Bold => "1",
            Tone::Dim => "2",
            Tone::Good => "32",
            Tone::Warn => "33",
            Tone::Bad => "31",
            Tone::Accent => "36",
        };
        if self.colour && !text.is_empty() { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }
}

impl Cell {
    /// A cell in a tone.
    pub(crate) fn toned(tone: Tone, text: impl Into<String>) -> Self {
        // A name is somebody else's text: nothing in it may steer the terminal.
        Self { text: text.into().chars().map(|c| if c.is_control() { '�' } else { c }).collect(), tone }
    }
}

impl<T: Into<String>> From<T> for Cell {
    fn from(text: T) -> Self {
        Self::toned(Tone::Plain, text)
    }
}

impl Column {
    /// Text that always stays.
    pub(crate) const fn text(title: &'static str) -> Self {
        Self { title, right: false, drop: 0, cut: 0 }
    }

    /// A number that always stays.
    pub(crate) const fn number(title: &'static str) -> Self {
        Self { title, right: true, drop: 0, cut: 0 }
    }

    /// Goes on narrow screens, before those with a smaller number.
    pub(crate) const fn drop(mut self, order: u8) -> Self {
        self.drop = order;
        self
    }

    /// Is cut to so many characters when nothing else helps.
    pub(crate) const fn cut(mut self, to: usize) -> Self {
        self.cut = to;
        self
    }
}

impl Table {
    /// An empty table.
    pub(crate) fn new(columns: Vec<Column>) -> Self {
        Self { columns, rows: Vec::new() }
    }

    /// One more row; cells beyond the last column are not shown.
    pub(crate) fn row(&mut self, cells: Vec<Cell>) {
        self.rows.push(cells);
    }

    /// The lines, none wider than the screen.
    pub(crate) fn lines(&self, screen: &Screen) -> Vec<String> {
        let mut widths: Vec<usize> = (0..self.columns.len())
            .map(|i| {
                let cells = self.rows.iter().filter_map(|row| row.get(i)).map(|cell| width(&cell.text));
                cells.max().unwrap_or(0).max(width(self.columns[i].title))
            })
            .collect();
        let mut shown = vec![true; self.columns.len()];
        let total = |widths: &[usize], shown: &[bool]| {
            let kept: Vec<_> =
                widths.iter().zip(shown).filter(|(_, shown)| **shown).map(|(w, _)| *w).collect();
            kept.iter().sum::<usize>() + GAP.len() * kept.len().saturating_sub(1)
        };
        while total(&widths, &shown) > screen.width {
            let next = (0..self.columns.len())
                .filter(|&i| shown[i] && self.columns[i].drop > 0)
                .max_by_key(|&i| self.columns[i].drop);
            let Some(next) = next else { break };
            shown[next] = false;
        }
        for (i, column) in self.columns.iter().enumerate() {
            let over = total(&widths, &shown).saturating_sub(screen.width);
            if over > 0 && shown[i] && column.cut > 0 {
                widths[i] = widths[i].saturating_sub(over).max(column.cut);
            }
        }
        let line = |cells: &dyn Fn(usize) -> (Tone, String)| {
            let last = shown.iter().rposition(|shown| *shown);
            let mut line = String::new();
            let mut used = 0;
            for i in (0..self.columns.len()).filter(|&i| shown[i]) {
                let (tone, text) = cells(i);
                let text = cut(&text, widths[i].min(screen.width.saturating_sub(used)));
                let pad = " ".repeat(widths[i].min(screen.width.saturating_sub(used)) - width(&text));
                used += widths[i] + GAP.len();
                let painted = screen.paint(tone, &text);
                match (self.columns[i].right, Some(i) == last) {
                    (true, _) => line.extend([pad.as_str(), &painted]),
                    (false, false) => line.extend([painted.as_str(), &pad]),
                    (false, true) => line.push_str(&painted),
                }
                if Some(i) != last && used <= screen.width {
                    line.push_str(GAP);
                }
            }
            line.truncate(line.trim_end_matches(' ').len());
            line
        };
        let mut lines = vec![line(&|i| (Tone::Bold, self.columns[i].title.to_owned()))];
        lines.extend(self.rows.iter().map(|row| {
            line(&|i| row.get(i).map_or((Tone::Plain, String::new()), |cell| (cell.tone, cell.text.clone())))
        }));
        lines
    }
}

impl Live {
    /// Nothing drawn yet.
    pub(crate) fn new(screen: Screen) -> Self {
        Self { screen, drawn: 0, started: false }
    }

    /// The screen as it is now.
    pub(crate) fn screen(&mut self) -> Screen {
        self.screen = self.screen.again();
        self.screen
    }

    /// Draws these lines where the last ones were. What does not fit on the screen is left out: a line that
    /// scrolled away cannot be drawn over.
    pub(crate) fn draw(&mut self, lines: &[String]) -> std::io::Result<()> {
        let room =
            if self.screen.terminal { self.screen.height.saturating_sub(1).max(1) } else { usize::MAX };
        let mut text = self.erasing();
        for line in lines.iter().take(room) {
            text.push_str(line);
            text.push('\n');
        }
        self.drawn = lines.len().min(room);
        self.started = true;
        write(&text)
    }

    /// Prints a line that stays, above what is drawn (which must be drawn again).
    pub(crate) fn print(&mut self, line: &str) -> std::io::Result<()> {
        let text = self.erasing() + line + "\n";
        self.drawn = 0;
        write(&text)
    }

    /// Whether anything was ever drawn.
    pub(crate) fn started(&self) -> bool {
        self.started
    }

    /// Removes what is drawn.
    pub(crate) fn clear(&mut self) -> std::io::Result<()> {
        let text = self.erasing();
        self.drawn = 0;
        write(&text)
    }

    fn erasing(&self) -> String {
        match self.drawn {
            n if n > 0 && self.screen.terminal => format!("\x1b[{n}A\r\x1b[J"),
            _ => String::new(),
        }
    }
}

/// Writes to standard output as a whole. A reader that went away (`| head`) is an error to stop on.
pub(crate) fn write(text: &str) -> std::io::Result<()> {
    let mut stdout = std::io::stdout().lock();
    stdout.write_all(text.as_bytes())?;
    stdout.flush()
}

/// Prints a value as JSON.
pub(crate) fn json(value: &impl Serialize) -> Result<()> {
    Ok(write(&(serde_json::to_string_pretty(value)? + "\n"))?)
}

/// Prints lines.
pub(crate) fn text(lines: &[String]) -> Result<()> {
    let mut text = lines.join("\n");
    text.push('\n');
    Ok(write(&text)?)
}

/// Seconds since 1970: what ages and ends are counted from.
pub(crate) fn unix_now() -> i64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_secs()).unwrap_or(i64::MAX)
}

/// A duration in three digits.
pub(crate) fn micros(us: u64) -> String {
    let (value, unit) = match us {
        0..1_000 => return format!("{us}µs"),
        1_000..1_000_000 => (us as f64 / 1e3, "ms"),
        1_000_000..600_000_000 => (us as f64 / 1e6, "s"),
        _ => return format!("{:.0}min", us as f64 / 60e6),
    };
    let digits = match value {
        v if v < 9.995 => 2,
        v if v < 99.95 => 1,
        _ => 0,
    };
    format!("{value:.digits$}{unit}")
}

/// A rate per second.
pub(crate) fn per_second(rate: f64) -> String {
    match rate {
        r if r <= 0.0 => "-".to_owned(),
        r if r < 0.1 => "<0.1".to_owned(),
        r if r < 99.95 => format!("{r:.1}"),
        r if r < 99_950.0 => format!("{r:.0}"),
        r => format!("{:.0}k", r / 1e3),
    }
}

/// A share of 1 in percent. Never rounded up to 100: one failure in a million is not none.
pub(crate) fn percent(share: f64) -> String {
    if share >= 1.0 {
        return "100%".to_owned();
    }
    let floored = (share * 10_000.0).floor() / 100.0;
    if floored >= 99.0 { format!("{floored:.2}%") } else { format!("{:.1}%", share * 100.0) }
}

/// The tone of a success rate.
pub(crate) fn success_tone(share: f64) -> Tone {
    match share {
        s if s >= 0.999 => Tone::Good,
        s if s >= 0.95 => Tone::Warn,
        _ => Tone::Bad,
    }
}

/// How long ago or until when, in two units at most.
pub(crate) fn span(seconds: u64) -> String {
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3_600 => format!("{}m{:02}s", seconds / 60, seconds % 60),
        3_600..86_400 => format!("{}h{:02}m", seconds / 3_600, seconds % 3_600 / 60),
        _ => format!("{}d{:02}h", seconds / 86_400, seconds % 86_400 / 3_600),
    }
}

/// Cuts text to a width; what was cut is marked.
pub(crate) fn cut(text: &str, to: usize) -> String {
    if width(text) <= to {
        return text.to_owned();
    }
    match to {
        0 => String::new(),
        _ => text.chars().take(to - 1).chain(std::iter::once('…')).collect(),
    }
}

/// Characters: everything that is printed here is one column wide.
pub(crate) fn width(text: &str) -> usize {
    text.chars().count()
}

/// Bars of eighths, scaled to the largest. What is not empty is seen, however small it is.
pub(crate) fn bars(counts: &[u64]) -> String {
    let most = counts.iter().copied().max().unwrap_or(0).max(1);
    let bar = |&count: &u64| match count {
        0 => ' ',
        // u128: counts are somebody else's numbers.
        count => {
            let eighths = (u128::from(count) * 8).div_ceil(u128::from(most));
            BLOCKS[usize::try_from(eighths).unwrap_or(8).clamp(1, 8) - 1]
        }
    };
    counts.iter().map(bar).collect()
}

fn size() -> (usize, usize) {
    match terminal_size::terminal_size() {
        Some((terminal_size::Width(width), terminal_size::Height(height))) if width > 0 && height > 0 => {
            (width.into(), height.into())
        }
        // A serial line, for instance, does not know.
        _ => (80, 24),
    }
}

const GAP: &str = "  ";
const BLOCKS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];

#[cfg(test)]
mod tests {
    use super::*;

    fn table() -> Table {
        let mut table = Table::new(vec![
            Column::text("ROUTE").cut(8),
            Column::number("RATE"),
            Column::number("P99").drop(1),
            Column::text("HISTOGRAM").drop(2),
        ]);
        table.row(vec!["shop/web:80/checkout".into(), "12.0".into(), "3.10ms".into(), "▁▂█".into()]);
        table.row(vec!["shop/api:80".into(), "120".into(), "100ms".into()]);
        table
    }

    #[test]
    fn numbers_stand_at_the_right() {
        let lines = table().lines(&Screen::plain(usize::MAX));
        assert_eq!(lines[0], "ROUTE                 RATE     P99  HISTOGRAM");
        assert_eq!(lines[1], "shop/web:80/checkout  12.0  3.10ms  ▁▂█");
        assert_eq!(lines[2], "shop/api:80            120   100ms");
    }

    #[test]
    fn narrow_screens_lose_columns_then_characters_and_never_wrap() {
        let table = table();
        assert_eq!(table.lines(&Screen::plain(40))[1], "shop/web:80/checkout  12.0  3.10ms");
        assert_eq!(table.lines(&Screen::plain(28))[1], "shop/web:80/checkout  12.0");
        assert_eq!(table.lines(&Screen::plain(20))[1], "shop/web:80/c…  12.0");
        for columns in 0..60 {
            for line in table.lines(&Screen::plain(columns)) {
                assert!(width(&line) <= columns, "{columns}: {line:?}");
            }
        }
    }

    #[test]
    fn colour_changes_no_width() {
        let plain = table().lines(&Screen::plain(60));
        let coloured = table().lines(&Screen { colour: true, ..Screen::plain(60) });
        assert!(coloured[0].contains("\x1b[1m"));
        let stripped = coloured[0].replace("\x1b[1m", "").replace("\x1b[0m", "");
        assert_eq!(stripped, plain[0]);
    }

    #[test]
    fn names_cannot_steer_the_terminal() {
        let cell = Cell::from("a\x1b[2Jb\n");
        assert!(!cell.text.contains('\x1b') && !cell.text.contains('\n'));
    }

    #[test]
    fn durations_have_three_digits() {
        let shown: Vec<_> =
            [0, 999, 1_000, 9_994, 9_996, 99_960, 123_456, 1_500_000, 59_000_000, 7_200_000_000]
                .map(micros)
                .into();
        assert_eq!(
            shown,
            ["0µs", "999µs", "1.00ms", "9.99ms", "10.0ms", "100ms", "123ms", "1.50s", "59.0s", "120min"]
        );
    }

    #[test]
    fn a_single_failure_is_not_a_hundred_percent() {
        assert_eq!(percent(1.0), "100%");
        assert_eq!(percent(0.999_999), "99.99%");
        assert_eq!(percent(0.5), "50.0%");
        assert_eq!(percent(0.0), "0.0%");
    }

    #[test]
    fn bars_show_what_is_small() {
        assert_eq!(bars(&[0, 1, 1_000_000, 500_000]), " ▁█▄");
        assert_eq!(bars(&[]), "");
        assert_eq!(bars(&[0, 0]), "  ");
        assert_eq!(bars(&[u64::MAX, 1]), "█▁");
    }

    #[test]
    fn a_span_shows_its_two_largest_units() {
        assert_eq!([59, 61, 3_700, 90_000].map(span), ["59s", "1m01s", "1h01m", "1d01h"]);
    }
}
