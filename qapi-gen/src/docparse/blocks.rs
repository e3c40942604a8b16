//! The text of documentation: the part of reStructuredText that schemas use.
//!
//! Paragraphs, headings (`= Title`), lists, literal blocks, admonitions and `.. qmp-example::`.
//! Other directives are kept as they are.

use super::Line;
use crate::example;
use crate::ir::{DocBlock, Example};
use crate::limits::MAX_NESTING;

/// Parses lines of text.
pub(super) fn parse(lines: &[Line<'_>]) -> Vec<DocBlock> {
    let mut out = Vec::new();
    parse_into(lines, 0, &mut out);
    out
}

fn parse_into(lines: &[Line<'_>], depth: usize, out: &mut Vec<DocBlock>) {
    if depth >= MAX_NESTING {
        let text: Vec<&str> = lines.iter().map(|line| line.text.trim()).collect();
        out.push(DocBlock::Paragraph(text.join("\n")));
        return;
    }
    let mut at = 0;
    while let Some(line) = lines.get(at) {
        if line.is_blank() {
            at += 1;
        } else if line.indent() > 0 {
            let end = extent(lines, at, 1);
            let inner = dedent(&lines[at..end], line.indent());
            parse_into(&inner, depth + 1, out);
            at = end;
        } else if let Some(heading) = heading(line.text) {
            out.push(heading);
            at += 1;
        } else if line.text.starts_with(".. ") {
            let end = extent(lines, at + 1, 1);
            out.push(directive(&lines[at..end], depth));
            at = end;
        } else if marker(line.text).is_some() {
            let (items, end) = list(lines, at, depth);
            out.push(DocBlock::List(items));
            at = end;
        } else {
            at = paragraph(lines, at, out);
        }
    }
}

/// The end of the run of lines from `at` that are blank or indented by at least `indent`, without
/// trailing blanks.
fn extent(lines: &[Line<'_>], at: usize, indent: usize) -> usize {
    let mut end = at;
    for (index, line) in lines.iter().enumerate().skip(at) {
        if line.is_blank() {
            continue;
        }
        if line.indent() < indent {
            break;
        }
        end = index + 1;
    }
    end
}

fn dedent<'a>(lines: &[Line<'a>], count: usize) -> Vec<Line<'a>> {
    lines.iter().map(|line| line.dedent(count)).collect()
}

fn heading(text: &str) -> Option<DocBlock> {
    let title = text.trim_start_matches('=');
    let level = u8::try_from(text.len() - title.len()).ok()?;
    let title = title.strip_prefix(' ')?;
    (level > 0).then(|| DocBlock::Heading(level, title.trim().to_owned()))
}

/// The length of the list marker that a line begins with: `- `, `* `, `1. `, `#. `.
fn marker(text: &str) -> Option<usize> {
    let rest = if let Some(rest) = text.strip_prefix(['-', '*', '+']) {
        rest
    } else {
        let digits = text.trim_start_matches(|c: char| c.is_ascii_digit() || c == '#');
        if digits.len() == text.len() || text.len() - digits.len() > 3 {
            return None;
        }
        digits.strip_prefix(['.', ')'])?
    };
    let body = rest.trim_start_matches(' ');
    (rest.is_empty() || body.len() < rest.len()).then_some(text.len() - body.len())
}

fn list(lines: &[Line<'_>], start: usize, depth: usize) -> (Vec<Vec<DocBlock>>, usize) {
    let mut items = Vec::new();
    let mut at = start;
    let mut end = start;
    while let Some(line) = lines.get(at) {
        if line.is_blank() {
            at += 1;
            continue;
        }
        let Some(width) = marker(line.text) else {
            break;
        };
        end = extent(lines, at + 1, 1).max(at + 1);
        let mut inner = vec![Line {
            text: &line.text[width..],
            at: line.at + width,
            ..*line
        }];
        inner.extend(dedent(&lines[at + 1..end], width));
        let mut item = Vec::new();
        parse_into(&inner, depth + 1, &mut item);
        items.push(item);
        at = end;
    }
    (items, end)
}

/// A paragraph, and the literal block that a `::` at its end announces.
fn paragraph(lines: &[Line<'_>], start: usize, out: &mut Vec<DocBlock>) -> usize {
    let rest = lines.iter().skip(start);
    let count = rest.take_while(|line| !line.is_blank()).count();
    let end = start + count;
    let words: Vec<&str> = lines[start..end]
        .iter()
        .map(|line| line.text.trim())
        .collect();
    let text = words.join("\n");
    let Some(introduction) = text.strip_suffix("::") else {
        out.push(DocBlock::Paragraph(text));
        return end;
    };
    if !introduction.trim().is_empty() {
        out.push(DocBlock::Paragraph(format!("{}:", introduction.trim_end())));
    }
    let stop = extent(lines, end, 1);
    if stop > end {
        out.push(DocBlock::Literal(literal(&lines[end..stop])));
    }
    stop
}

/// The lines as they are, without what all of them are indented by and without blank lines around
/// them.
fn literal(lines: &[Line<'_>]) -> String {
    let texts = lines.iter().filter(|line| !line.is_blank());
    let indent = texts.map(Line::indent).min().unwrap_or(0);
    let body: Vec<&str> = lines
        .iter()
        .skip_while(|line| line.is_blank())
        .map(|line| line.dedent(indent).text)
        .collect();
    body.join("\n").trim_end().to_owned()
}

fn directive(lines: &[Line<'_>], depth: usize) -> DocBlock {
    const ADMONITIONS: [&str; 11] = [
        "attention",
        "caution",
        "danger",
        "error",
        "hint",
        "important",
        "note",
        "seealso",
        "tip",
        "todo",
        "warning",
    ];
    let (first, rest) = match lines {
        [first, rest @ ..] => (*first, rest),
        [] => return DocBlock::Literal(String::new()),
    };
    let head = first.text.trim_start_matches(".. ");
    let Some((name, argument)) = head.split_once("::") else {
        return DocBlock::Literal(literal(lines));
    };
    let argument = argument.trim();
    let indent = rest
        .iter()
        .filter(|line| !line.is_blank())
        .map(Line::indent)
        .min();
    let body = dedent(rest, indent.unwrap_or(0));
    if name == "qmp-example" {
        return DocBlock::Example(qmp_example(&body));
    }
    let is_titled = name == "admonition" && !argument.is_empty();
    if !is_titled && !ADMONITIONS.contains(&name) {
        return DocBlock::Literal(literal(lines));
    }
    let mut content = Vec::new();
    if is_titled {
        parse_into(&body, depth + 1, &mut content);
        return DocBlock::Admonition(argument.to_owned(), content);
    }
    let mut all = Vec::with_capacity(body.len() + 1);
    if !argument.is_empty() {
        let at = first.at + first.text.len() - argument.len();
        all.push(Line {
            text: argument,
            at,
            ..first
        });
    }
    all.extend(body);
    parse_into(&all, depth + 1, &mut content);
    DocBlock::Admonition(name.to_owned(), content)
}

/// The options (`:title:`, `:annotated:`) and messages of an example.
fn qmp_example(lines: &[Line<'_>]) -> Example {
    let mut example = Example {
        title: None,
        annotated: false,
        lines: Vec::new(),
    };
    let mut at = 0;
    while let Some(line) = lines.get(at).filter(|line| line.text.starts_with(':')) {
        if let Some(title) = line.text.strip_prefix(":title:") {
            let mut words = vec![title.trim()];
            // A long title goes on in indented lines.
            while let Some(more) = lines
                .get(at + 1)
                .filter(|l| l.indent() > 0 && !l.is_blank())
            {
                words.push(more.text.trim());
                at += 1;
            }
            example.title = Some(words.join(" "));
        } else if line.text.starts_with(":annotated:") {
            example.annotated = true;
        }
        at += 1;
    }
    let body = lines.get(at..).unwrap_or_default();
    example.lines = example::extract(body.iter().map(|line| (line.text, line.number)));
    example
}
