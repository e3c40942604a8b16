//! The builtin enum `QType`: the kinds of values.

use super::Value;

/// The kinds of values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum QType {
    /// No value.
    None,
    /// `null`.
    Null,
    /// A number.
    Num,
    /// A string.
    String,
    /// An object.
    Dict,
    /// A list.
    List,
    /// A boolean.
    Bool,
}

impl QType {
    /// Every kind.
    pub const ALL: &'static [QType] = &[
        QType::None,
        QType::Null,
        QType::Num,
        QType::String,
        QType::Dict,
        QType::List,
        QType::Bool,
    ];

    /// The wire name.
    pub fn as_str(self) -> &'static str {
        match self {
            QType::None => "none",
            QType::Null => "qnull",
            QType::Num => "qnum",
            QType::String => "qstring",
            QType::Dict => "qdict",
            QType::List => "qlist",
            QType::Bool => "qbool",
        }
    }

    /// The kind of a wire name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|kind| kind.as_str() == name)
    }

    /// The wire form.
    pub fn into_value(self) -> Value {
        Value::from(self.as_str())
    }
}
