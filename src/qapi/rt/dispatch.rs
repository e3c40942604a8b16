//! The shape of the generated command table.

use std::future::Future;
use std::pin::Pin;

use super::error::QmpError;
use super::{Object, Value};

/// A command on its way.
pub type CallFuture<'a> = Pin<Box<dyn Future<Output = Result<Value, QmpError>> + Send + 'a>>;

/// What the schema says of a command besides its types.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct CommandFlags {
    /// May be run with `exec-oob`.
    pub allow_oob: bool,
    /// May be run before capabilities negotiation has ended and the daemon is ready.
    pub allow_preconfig: bool,
    /// Nothing is sent when it succeeds.
    pub no_success_response: bool,
}

/// How a command is run. Arguments are checked before the future is made: a bad request has no side effect.
pub enum Call<Cx: 'static> {
    /// On the control loop, one at a time.
    InBand(for<'a> fn(&'a Cx, Object) -> Result<CallFuture<'a>, QmpError>),
    /// Out of band (and in band too): never waits.
    OutOfBand(fn(&Cx, Object) -> Result<Value, QmpError>),
}

/// A row of the command table.
pub struct Entry<Cx: 'static> {
    /// The wire name.
    pub name: &'static str,
    /// Flags of the schema.
    pub flags: CommandFlags,
    /// Names of its features (`deprecated`, `unstable`, ...).
    pub features: &'static [&'static str],
    /// The marshaller.
    pub call: Call<Cx>,
}

/// The row of a command, by binary search: the table is sorted by name.
pub fn find<'t, Cx>(table: &'t [Entry<Cx>], name: &str) -> Option<&'t Entry<Cx>> {
    table
        .binary_search_by(|entry| entry.name.cmp(name))
        .ok()
        .map(|at| &table[at])
}

/// Whether names are sorted and all different, by bytes. For assertions at compile time.
pub const fn is_sorted(names: &[&str]) -> bool {
    let mut at = 1;
    while at < names.len() {
        if !is_less(names[at - 1].as_bytes(), names[at].as_bytes()) {
            return false;
        }
        at += 1;
    }
    true
}

const fn is_less(left: &[u8], right: &[u8]) -> bool {
    let mut at = 0;
    while at < left.len() && at < right.len() {
        if left[at] != right[at] {
            return left[at] < right[at];
        }
        at += 1;
    }
    left.len() < right.len()
}

#[cfg(test)]
mod tests {
    use super::is_sorted;

    #[test]
    fn sorted_means_strictly_rising() {
        assert!(is_sorted(&[]));
        assert!(is_sorted(&["a"]));
        assert!(is_sorted(&["a", "aa", "b", "block-a", "block_a"]));
        assert!(!is_sorted(&["a", "a"]));
        assert!(!is_sorted(&["aa", "a"]));
        assert!(!is_sorted(&["b", "a"]));
    }
}
