//! The schema's documentation as rustdoc text.
//!
//! What rustdoc would take for markup or warn about (brackets, angle brackets, bare addresses) is
//! escaped; `@name` references become code.

use proc_macro2::TokenStream;
use quote::quote;

use super::plan::Plan;
use crate::ir::{Alternative, DefId, DocBlock, EnumValue, ExampleLine, Feature, Member};

/// A documentation comment of the given text.
pub(super) fn text(text: &str) -> TokenStream {
    let lines = text.lines().map(|line| {
        if line.is_empty() {
            String::new()
        } else {
            format!(" {line}")
        }
    });
    quote!(#(#[doc = #lines])*)
}

/// The documentation of a type or event.
pub(super) fn definition(plan: &Plan<'_>, id: DefId) -> TokenStream {
    let def = plan.schema.def(id);
    let parts = vec![body_or(&def.doc.body, &format!("`{}`.", def.name))];
    end(plan, id, parts)
}

/// The documentation of a handler.
pub(super) fn command(plan: &Plan<'_>, id: DefId) -> TokenStream {
    let def = plan.schema.def(id);
    let name = &def.name;
    let mut parts = vec![body_or(&def.doc.body, &format!("`{name}`."))];
    let sections = [("Returns", &def.doc.returns), ("Errors", &def.doc.errors)];
    for (title, section) in sections {
        if !section.is_empty() {
            parts.push(format!("# {title}\n{}", blocks(section)));
        }
    }
    end(plan, id, parts)
}

/// What every definition's documentation ends with: its features, its age and its place in the schema.
fn end(plan: &Plan<'_>, id: DefId, mut parts: Vec<String>) -> TokenStream {
    let def = plan.schema.def(id);
    parts.extend(features(&def.features));
    let since = def.doc.since.as_ref();
    parts.extend(since.map(|since| format!("Since {}.", escape(since))));
    parts.push(format!("`{}`, {}.", def.name, plan.location(id)));
    text(&parts.join("\n\n"))
}

/// The documentation of a field.
pub(super) fn member(member: &Member) -> TokenStream {
    let mut parts = vec![body_or(&member.doc, &format!("`{}`.", member.name))];
    parts.extend(features(&member.features));
    text(&parts.join("\n\n"))
}

/// The documentation of a variant of an enum.
pub(super) fn value(value: &EnumValue) -> TokenStream {
    let mut parts = vec![body_or(&value.doc, &format!("`{}`.", value.name))];
    parts.extend(features(&value.features));
    text(&parts.join("\n\n"))
}

/// The documentation of a variant of an alternate.
pub(super) fn alternative(branch: &Alternative) -> TokenStream {
    text(&body_or(&branch.doc, &format!("`{}`.", branch.name)))
}

fn body_or(doc: &[DocBlock], fallback: &str) -> String {
    let body = blocks(doc);
    if body.is_empty() {
        fallback.to_owned()
    } else {
        body
    }
}

fn features(features: &[Feature]) -> Vec<String> {
    features
        .iter()
        .map(|feature| format!("**{}**: {}", feature.name, blocks(&feature.doc)))
        .collect()
}

/// Blocks as Markdown.
pub(super) fn blocks(doc: &[DocBlock]) -> String {
    let parts: Vec<String> = doc.iter().map(block).collect();
    parts.join("\n\n").trim_end().to_owned()
}

fn block(block: &DocBlock) -> String {
    match block {
        DocBlock::Heading(_, title) => format!("**{}**", escape(title)),
        DocBlock::Paragraph(text) => escape(text),
        DocBlock::List(items) => items
            .iter()
            .map(|item| format!("- {}", blocks(item).replace('\n', "\n  ")))
            .collect::<Vec<_>>()
            .join("\n"),
        DocBlock::Literal(text) => fenced(text),
        DocBlock::Admonition(kind, content) => {
            format!("**{}**: {}", escape(kind), blocks(content))
        }
        DocBlock::Example(example) => {
            let lines: Vec<String> = example
                .lines
                .iter()
                .map(|line| match line {
                    ExampleLine::Sent(text, _) => message("->", text),
                    ExampleLine::Received(text, _) => message("<-", text),
                    ExampleLine::Prose(text) => text.clone(),
                })
                .collect();
            fenced(&lines.join("\n"))
        }
    }
}

/// A message with its further lines where the first one's text begins.
fn message(arrow: &str, text: &str) -> String {
    format!("{arrow} {}", text.replace('\n', "\n   "))
}

/// A block that rustdoc neither reads as markup nor runs. The fence is longer than any in it.
fn fenced(text: &str) -> String {
    let longest = text
        .lines()
        .map(|line| line.len() - line.trim_start_matches('`').len())
        .max();
    let fence = "`".repeat(longest.unwrap_or(0).max(2) + 1);
    format!("{fence}text\n{text}\n{fence}")
}

/// Running text without markup that was not meant.
pub(super) fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for (at, line) in text.lines().enumerate() {
        if at > 0 {
            escaped.push('\n');
        }
        escape_line(line.trim(), &mut escaped);
    }
    escaped
}

fn escape_line(line: &str, escaped: &mut String) {
    // At the start of a line these begin headings, lists, quotes and tables.
    if line.starts_with(['#', '+', '-', '|', '=']) {
        escaped.push('\\');
    }
    let mut rest = line;
    while let Some(c) = rest.chars().next() {
        if let Some(code) = rest
            .strip_prefix("``")
            .and_then(|code| code.split_once("``"))
        {
            let (code, after) = code;
            escaped.push_str(&format!("`{}`", code.replace('`', "'")));
            rest = after;
            continue;
        }
        if let Some(name) = reference(rest) {
            escaped.push_str(&format!("`{name}`"));
            rest = &rest[name.len() + 1..];
            continue;
        }
        if rest.starts_with("http://") || rest.starts_with("https://") {
            let end = rest.find(|c: char| c.is_whitespace() || ")>,".contains(c));
            let (address, after) = rest.split_at(end.unwrap_or(rest.len()));
            escaped.push_str(&format!("<{address}>"));
            rest = after;
            continue;
        }
        if "[]<>*_`\\".contains(c) {
            escaped.push('\\');
        }
        escaped.push(c);
        rest = &rest[c.len_utf8()..];
    }
}

/// The name of an `@name` reference that the text begins with.
fn reference(text: &str) -> Option<&str> {
    let name = text.strip_prefix('@')?;
    let end = name
        .find(|c: char| !c.is_ascii_alphanumeric() && c != '-' && c != '_')
        .unwrap_or(name.len());
    let name = name[..end].trim_end_matches('-');
    (!name.is_empty()).then_some(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn markup_that_was_not_meant_is_escaped() {
        for (text, expected) in [
            ("a [list] of <T>", r"a \[list\] of \<T\>"),
            ("see @node-name, @x-", "see `node-name`, `x`-"),
            ("@id", "`id`"),
            ("mail a@b", "mail a`b`"),
            ("``a b``.", "`a b`."),
            ("https://a.b/c, or", "<https://a.b/c>, or"),
            ("a */ b", r"a \*/ b"),
            ("x\n   - y", "x\n\\- y"),
            ("# title", r"\# title"),
            ("@", "@"),
        ] {
            assert_eq!(escape(text), expected);
        }
    }

    #[test]
    fn fences_are_longer_than_what_they_hold() {
        assert_eq!(fenced("a"), "```text\na\n```");
        assert_eq!(fenced("````\na"), "`````text\n````\na\n`````");
    }
}
