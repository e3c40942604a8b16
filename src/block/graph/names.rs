//! Names of nodes: given by users, or made up.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::error::{Error, ErrorKind, Result};
use crate::limits::MAX_NODE_NAME;

/// A node's name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeName {
    text: String,
    given: bool,
}

impl NodeName {
    /// A name that a user gave: a letter, then letters, digits, `-`, `.` and `_`; at most 31 bytes.
    pub fn given(text: &str) -> Result<Self> {
        if !is_well_formed(text) {
            return Err(invalid(format!("Invalid node-name: '{text}'")));
        }
        if text.len() > MAX_NODE_NAME {
            return Err(invalid("Node name too long".to_owned()));
        }
        Ok(NodeName {
            text: text.to_owned(),
            given: true,
        })
    }

    /// The name.
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// Whether a user gave it.
    pub fn is_given(&self) -> bool {
        self.given
    }
}

/// Makes up names (`#block17`), none twice. The `#` keeps them apart from what users may choose.
#[derive(Debug, Clone, Default)]
pub struct NameSource(Arc<AtomicU64>);

impl NameSource {
    /// The next name.
    pub fn next(&self) -> NodeName {
        let number = self.0.fetch_add(1, Ordering::Relaxed);
        NodeName {
            text: format!("#block{number}"),
            given: false,
        }
    }
}

/// QEMU's rule for ids of all kinds.
pub fn is_well_formed(id: &str) -> bool {
    id.starts_with(|c: char| c.is_ascii_alphabetic())
        && id
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || "-._".contains(c))
}

fn invalid(message: String) -> Error {
    Error::new(ErrorKind::InvalidInput, message)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_follow_the_rule_for_ids() {
        for good in ["a", "drive0-file", "A.b_c-1", &"x".repeat(31)] {
            assert_eq!(NodeName::given(good).unwrap().as_str(), good);
        }
        for (bad, message) in [
            ("", "Invalid node-name: ''"),
            ("0a", "Invalid node-name: '0a'"),
            ("#block1", "Invalid node-name: '#block1'"),
            ("a b", "Invalid node-name: 'a b'"),
            ("ä", "Invalid node-name: 'ä'"),
            (&"x".repeat(32), "Node name too long"),
        ] {
            assert_eq!(NodeName::given(bad).unwrap_err().message(), message);
        }
    }

    #[test]
    fn made_up_names_differ() {
        let names = NameSource::default();
        assert_ne!(names.clone().next(), names.next());
    }
}
