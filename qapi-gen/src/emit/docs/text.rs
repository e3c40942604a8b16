//! Pieces of pages: tables, cells, paragraphs.

use crate::emit::rustdoc::{blocks, escape};
use crate::ir::{DocBlock, EnumValue, Feature};

pub(super) fn value_table(values: &[EnumValue]) -> String {
    let rows: Vec<String> = values
        .iter()
        .map(|value| {
            let features = feature_words(&value.features);
            format!("| `{}` | {}{features} |", value.name, cell(&value.doc))
        })
        .collect();
    format!("| Value | |\n|---|---|\n{}", rows.join("\n"))
}

/// The features of a member or value, behind its description.
pub(super) fn feature_words(features: &[Feature]) -> String {
    features
        .iter()
        .map(|feature| {
            let doc = cell(&feature.doc);
            if doc.is_empty() {
                format!(" *{}*", feature.name)
            } else {
                format!(" *{}*: {doc}", feature.name)
            }
        })
        .collect()
}

pub(super) fn feature_list(features: &[Feature]) -> String {
    let items: Vec<String> = features
        .iter()
        .map(|feature| format!("- *{}*: {}", feature.name, cell(&feature.doc)))
        .collect();
    items.join("\n")
}

/// Text blocks with their headings as the page's.
pub(super) fn with_headings(doc: &[DocBlock]) -> String {
    let mut text = String::new();
    for block in doc {
        match block {
            DocBlock::Heading(level, title) => {
                let marks = "#".repeat(usize::from(*level));
                push(&mut text, &format!("{marks} {}", escape(title)));
            }
            other => push(&mut text, &blocks(std::slice::from_ref(other))),
        }
    }
    text
}

/// Everything but the examples, which come last.
pub(super) fn prose(doc: &[DocBlock]) -> String {
    let prose: Vec<DocBlock> = doc
        .iter()
        .filter(|block| !matches!(block, DocBlock::Example(_)))
        .cloned()
        .collect();
    blocks(&prose)
}

pub(super) fn examples(doc: &[DocBlock]) -> String {
    let mut text = String::new();
    for block in doc {
        if let DocBlock::Example(example) = block {
            let title = example
                .title
                .as_deref()
                .map(|title| format!(": {}", escape(title)));
            push(
                &mut text,
                &format!("**Example**{}", title.unwrap_or_default()),
            );
            push(&mut text, &blocks(std::slice::from_ref(block)));
        }
    }
    text
}

/// Blocks in one line, for a table.
pub(super) fn cell(doc: &[DocBlock]) -> String {
    let text = prose(doc).replace("\n\n", "<br>").replace("\n- ", "<br>- ");
    text.replace('\n', " ").replace('|', "\\|")
}

/// Appends a block and an empty line; nothing for an empty block.
pub(super) fn push(text: &mut String, block: &str) {
    let block = block.trim_end();
    if !block.is_empty() {
        text.push_str(block);
        text.push_str("\n\n");
    }
}

/// The text with one end of line at its end.
pub(super) fn ended(mut text: String) -> String {
    text.truncate(text.trim_end().len());
    text.push('\n');
    text
}
