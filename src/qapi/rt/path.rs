//! Where a value stands in a request, for error texts: `actions[1].data.device`.

use std::fmt;

use super::error::QmpError;

/// How deep arguments may nest.
///
/// A decoder recurses once for each level, and the stack of a thread is small. Real requests stay
/// under ten levels plus one for each image of a backing chain that is written out.
pub const MAX_NESTING: usize = 200;

/// How leaves are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Syntax {
    /// JSON: every leaf has its own kind.
    Json,
    /// `key=value,...` of the command line: every leaf is a string, and becomes what its type
    /// says.
    Keyval,
}

/// The place of a value. Lives on the stack of the decoders, one link for each level.
#[derive(Debug, Clone, Copy)]
pub struct Path<'a> {
    syntax: Syntax,
    depth: usize,
    parent: Option<&'a Path<'a>>,
    step: Step<'a>,
}

/// The last step to a value.
#[derive(Debug, Clone, Copy)]
enum Step<'a> {
    Root,
    Member(&'a str),
    Element(usize),
}

impl Path<'_> {
    /// The root of JSON arguments.
    pub const fn json() -> Path<'static> {
        Path::root(Syntax::Json)
    }

    /// The root of an option of the command line in `key=value` form.
    pub const fn keyval() -> Path<'static> {
        Path::root(Syntax::Keyval)
    }

    /// A root of either kind.
    pub const fn root(syntax: Syntax) -> Path<'static> {
        Path {
            syntax,
            depth: 0,
            parent: None,
            step: Step::Root,
        }
    }

    /// A member of the object that stands here.
    pub fn member<'b>(&'b self, name: &'b str) -> Path<'b> {
        self.child(Step::Member(name))
    }

    /// An element of the list that stands here.
    pub fn element(&self, index: usize) -> Path<'_> {
        self.child(Step::Element(index))
    }

    fn child<'b>(&'b self, step: Step<'b>) -> Path<'b> {
        Path {
            syntax: self.syntax,
            depth: self.depth + 1,
            parent: Some(self),
            step,
        }
    }

    /// How leaves are written.
    pub fn syntax(&self) -> Syntax {
        self.syntax
    }

    /// Refuses to go deeper than [`MAX_NESTING`].
    pub(super) fn check_depth(&self) -> Result<(), QmpError> {
        if self.depth > MAX_NESTING {
            // The path itself would be as long as the request.
            return Err(QmpError::generic(format!(
                "Parameters are nested more than {MAX_NESTING} levels deep"
            )));
        }
        Ok(())
    }

    /// `Invalid parameter type for 'x', expected: integer`; `expected` may also be an alternate.
    pub fn wrong_type(&self, expected: &str) -> QmpError {
        QmpError::generic(format!(
            "Invalid parameter type for '{self}', expected: {expected}"
        ))
    }

    /// `Parameter 'x' expects uint8_t`: the kind is right and the value is not.
    pub fn wrong_value(&self, expected: &str) -> QmpError {
        QmpError::generic(format!("Parameter '{self}' expects {expected}"))
    }

    /// `Parameter 'x' does not accept value 'v'`.
    pub fn unknown_name(&self, value: &str) -> QmpError {
        QmpError::generic(format!(
            "Parameter '{self}' does not accept value '{value}'"
        ))
    }

    /// `Parameter 'x' is missing`.
    pub fn missing(&self) -> QmpError {
        QmpError::generic(format!("Parameter '{self}' is missing"))
    }

    /// `Parameter 'x' is unexpected`.
    pub fn unexpected(&self) -> QmpError {
        QmpError::generic(format!("Parameter '{self}' is unexpected"))
    }

    /// `Parameters 'x.*' are unexpected`: members of what is a plain value (command line only).
    pub fn unexpected_members(&self) -> QmpError {
        QmpError::generic(format!("Parameters '{self}.*' are unexpected"))
    }
}

impl fmt::Display for Path<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(parent) = self.parent else {
            return f.write_str("<anonymous>");
        };
        let top = parent.parent.is_none();
        if !top {
            write!(f, "{parent}")?;
        }
        match (self.step, self.syntax) {
            (Step::Root, _) => Ok(()),
            (Step::Member(name), _) if top => f.write_str(name),
            (Step::Member(name), _) => write!(f, ".{name}"),
            (Step::Element(index), Syntax::Json) => write!(f, "[{index}]"),
            (Step::Element(index), Syntax::Keyval) => write!(f, ".{index}"),
        }
    }
}
