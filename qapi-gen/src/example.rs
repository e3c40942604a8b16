//! Example sessions: `->` and `<-` messages and the prose between them, in schema documentation and
//! in .hx documents.
//!
//! Examples are written by people and are often no valid JSON. A message ends where its brackets
//! balance, else before the next arrow, else at the end of the text: with this rule every message
//! that is valid JSON is found whole. Lines behind it that can only belong to it (a bracket closed
//! too early) stay with it, so that the mistake is seen.

use crate::ir::ExampleLine;

/// Splits lines (text and 1-based line number) into messages and prose.
pub(crate) fn extract<'a>(lines: impl IntoIterator<Item = (&'a str, usize)>) -> Vec<ExampleLine> {
    let mut out = Vec::new();
    let mut prose: Vec<&str> = Vec::new();
    let mut open: Option<Message<'a>> = None;
    for (text, number) in lines {
        let trimmed = text.trim_start();
        let arrow = trimmed.get(..2).filter(|head| ["->", "<-"].contains(head));
        if let Some(arrow) = arrow {
            out.extend(open.take().map(Message::finish));
            flush(&mut prose, &mut out);
            let body = trimmed[2..].trim_start();
            let column = text.len() - body.len();
            let mut message = Message::new(arrow == "->", column, number);
            message.push(body);
            open = Some(message);
        } else if let Some(message) = open.take_if(|message| !message.goes_on_with(text)) {
            out.push(message.finish());
            prose.push(text);
        } else if let Some(message) = &mut open {
            message.push(text);
        } else {
            prose.push(text);
        }
    }
    out.extend(open.map(Message::finish));
    flush(&mut prose, &mut out);
    out
}

fn flush(prose: &mut Vec<&str>, out: &mut Vec<ExampleLine>) {
    let text = prose.join("\n");
    prose.clear();
    let text = text.trim_matches('\n').trim_end();
    if !text.trim().is_empty() {
        out.push(ExampleLine::Prose(text.to_owned()));
    }
}

/// A message that is being read.
struct Message<'a> {
    sent: bool,
    /// The column of the text behind the arrow: later lines lose as many blanks.
    column: usize,
    number: usize,
    lines: Vec<&'a str>,
    depth: usize,
    started: bool,
}

impl<'a> Message<'a> {
    fn new(sent: bool, column: usize, number: usize) -> Message<'a> {
        Message {
            sent,
            column,
            number,
            lines: Vec::new(),
            depth: 0,
            started: false,
        }
    }

    fn push(&mut self, line: &'a str) {
        let indent = line.len() - line.trim_start_matches(' ').len();
        self.lines.push(line[indent.min(self.column)..].trim_end());
        let (mut in_string, mut escaped) = (false, false);
        for c in line.chars() {
            match c {
                _ if escaped => escaped = false,
                '\\' if in_string => escaped = true,
                '"' => in_string = !in_string,
                _ if in_string => {}
                '{' | '[' => self.depth += 1,
                '}' | ']' => self.depth = self.depth.saturating_sub(1),
                _ => {}
            }
            self.started |= !c.is_whitespace();
        }
    }

    /// Whether a line that is no arrow belongs to the message: its brackets are not balanced, or it
    /// has no text yet (`->` alone on its line), or the line is more of the same.
    fn goes_on_with(&self, line: &str) -> bool {
        let text = line.trim_start();
        let is_part =
            line.len() - text.len() >= self.column && text.starts_with(['"', '}', ']', ',']);
        self.depth > 0 || !self.started || is_part
    }

    fn finish(self) -> ExampleLine {
        let text = self.lines.join("\n").trim().to_owned();
        match self.sent {
            true => ExampleLine::Sent(text, self.number),
            false => ExampleLine::Received(text, self.number),
        }
    }
}
