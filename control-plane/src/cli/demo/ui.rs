//! The demo's voice: text that stays, above a view that is drawn again and again.

use anyhow::Result;

use crate::cli::output::{Live, Screen, Tone, width};

/// Where the demo writes.
pub(super) struct Ui {
    screen: Screen,
    /// `None`: no view, only text (a script listens, or wants no terminal tricks).
    live: Option<Live>,
    /// Standard output belongs to the JSON result.
    quiet: bool,
}

impl Ui {
    pub(super) fn new(tty: bool, json: bool) -> Self {
        let screen = Screen::stdout();
        let live = (tty && !json && screen.terminal).then(|| Live::new(screen));
        let screen = if json { Screen::plain(100) } else { screen };
        Self { screen, live, quiet: json }
    }

    /// Whether there is a live view.
    pub(super) fn is_live(&self) -> bool {
        self.live.is_some()
    }

    /// The screen as it is now.
    pub(super) fn screen(&mut self) -> Screen {
        self.screen = match &mut self.live {
            Some(live) => live.screen(),
            None => self.screen,
        };
        self.screen
    }

    /// Draws the view anew.
    pub(super) fn view(&mut self, lines: &[String]) -> Result<()> {
        if let Some(live) = &mut self.live {
            live.draw(lines)?;
        }
        Ok(())
    }

    /// Removes the view.
    pub(super) fn clear(&mut self) -> Result<()> {
        if let Some(live) = &mut self.live {
            live.clear()?;
        }
        Ok(())
    }

    /// Lines as they are.
    pub(super) fn lines(&mut self, lines: &[String]) -> Result<()> {
        for line in lines {
            self.line(line)?;
        }
        Ok(())
    }

    /// A paragraph, wrapped, with something before its first line.
    pub(super) fn say(&mut self, tone: Tone, mark: &str, text: &str) -> Result<()> {
        let room = self.screen().width.min(110).saturating_sub(width(mark)).max(20);
        for (i, line) in wrapped(text, room).iter().enumerate() {
            let before = if i == 0 { mark.to_owned() } else { " ".repeat(width(mark)) };
            let line = self.screen.paint(tone, &format!("{before}{line}"));
            self.line(&line)?;
        }
        Ok(())
    }

    /// A heading over a step.
    pub(super) fn heading(&mut self, text: &str) -> Result<()> {
        let room = self.screen().width.min(110).saturating_sub(width(text) + 4);
        let line = self.screen.paint(Tone::Bold, &format!("── {text} {}", "─".repeat(room)));
        self.line("")?;
        self.line(&line)
    }

    fn line(&mut self, line: &str) -> Result<()> {
        match &mut self.live {
            Some(live) => live.print(line)?,
            None if self.quiet => eprintln!("{line}"),
            None => crate::cli::output::write(&format!("{line}\n"))?,
        }
        Ok(())
    }
}

fn wrapped(text: &str, room: usize) -> Vec<String> {
    let mut lines = vec![String::new()];
    for word in text.split(' ') {
        let last = lines.len() - 1;
        if !lines[last].is_empty() && width(&lines[last]) + 1 + width(word) > room {
            lines.push(word.to_owned());
        } else {
            if !lines[last].is_empty() {
                lines[last].push(' ');
            }
            lines[last].push_str(word);
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paragraphs_wrap_at_words() {
        assert_eq!(wrapped("one two three", 7), ["one two", "three"]);
        assert_eq!(wrapped("incomprehensibility is", 4), ["incomprehensibility", "is"]);
        assert_eq!(wrapped("", 4), [""]);
    }
}
