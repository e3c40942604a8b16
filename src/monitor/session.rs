//! One client's conversation: what it has negotiated.

use std::fmt;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use qapi::rt::{ErrorClass, QmpError};

use super::descriptors::Descriptors;

/// A protocol capability that the server may offer and the client may enable.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Capability {
    /// Commands may be run out of band.
    Oob,
}

impl Capability {
    /// The wire name.
    pub fn as_str(self) -> &'static str {
        match self {
            Capability::Oob => "oob",
        }
    }
}

/// A number that tells sessions apart in log lines and in fair queues; never used twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SessionId(u64);

impl fmt::Display for SessionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// A handle on one client's conversation. Clones name the same session.
///
/// It lives as long as the connection; a reconnecting client gets a new one.
#[derive(Debug, Clone)]
pub struct Session {
    state: Arc<State>,
}

#[derive(Debug)]
struct State {
    id: SessionId,
    offered: Vec<Capability>,
    descriptors: Descriptors,
    oob: AtomicBool,
    negotiated: AtomicBool,
    holds_events: AtomicBool,
}

impl Session {
    /// A session in negotiation that offers the client these capabilities.
    pub fn new(offered: &[Capability]) -> Session {
        Session::with_descriptors(offered, Descriptors::default())
    }

    /// A session whose client may send file descriptors.
    pub(super) fn with_descriptors(offered: &[Capability], descriptors: Descriptors) -> Session {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        Session {
            state: Arc::new(State {
                id: SessionId(NEXT.fetch_add(1, Ordering::Relaxed)),
                offered: offered.to_vec(),
                descriptors,
                oob: AtomicBool::new(false),
                negotiated: AtomicBool::new(false),
                holds_events: AtomicBool::new(false),
            }),
        }
    }

    /// The number of the session.
    pub fn id(&self) -> SessionId {
        self.state.id
    }

    /// Takes the file descriptor that came with the request (SCM_RIGHTS), for `getfd` and
    /// `add-fd`. `None` if there was none: `No file descriptor supplied via SCM_RIGHTS`.
    pub fn take_descriptor(&self) -> Option<OwnedFd> {
        self.state.descriptors.take()
    }

    /// Has events that are emitted from now on wait for the answer to the command that runs, which shows what is so now.
    pub fn hold_events(&self) {
        self.state.holds_events.store(true, Ordering::Release);
    }

    pub(super) fn holds_events(&self) -> bool {
        self.state.holds_events.load(Ordering::Acquire)
    }

    pub(super) fn release_events(&self) {
        self.state.holds_events.store(false, Ordering::Release);
    }

    /// What the greeting offered.
    pub fn offered(&self) -> &[Capability] {
        &self.state.offered
    }

    /// Whether negotiation has ended: commands are accepted, events are delivered.
    pub fn is_negotiated(&self) -> bool {
        self.state.negotiated.load(Ordering::Acquire)
    }

    /// Whether the client has enabled a capability.
    pub fn is_enabled(&self, capability: Capability) -> bool {
        match capability {
            Capability::Oob => self.state.oob.load(Ordering::Acquire),
        }
    }

    /// Enables capabilities and ends negotiation: what `qmp_capabilities` does.
    ///
    /// Fails with CommandNotFound after negotiation, and with GenericError if a capability was not
    /// offered; the session is then as it was.
    pub fn negotiate(&self, enable: &[Capability]) -> Result<(), QmpError> {
        if self.is_negotiated() {
            return Err(QmpError::new(
                ErrorClass::CommandNotFound,
                "Capabilities negotiation is already complete, command ignored",
            ));
        }
        let missing: Vec<&str> = enable
            .iter()
            .filter(|capability| !self.state.offered.contains(capability))
            .map(|capability| capability.as_str())
            .collect();
        if !missing.is_empty() {
            let names = missing.join(", ");
            return Err(QmpError::generic(format!(
                "Capability {names} not available"
            )));
        }
        if enable.contains(&Capability::Oob) {
            self.state.oob.store(true, Ordering::Release);
        }
        self.state.negotiated.store(true, Ordering::Release);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn negotiation_ends_once() {
        let session = Session::new(&[Capability::Oob]);
        assert!(!session.is_negotiated());
        session.negotiate(&[Capability::Oob]).unwrap();
        assert!(session.is_negotiated() && session.is_enabled(Capability::Oob));
        let again = session.negotiate(&[]).unwrap_err();
        assert_eq!(again.class, ErrorClass::CommandNotFound);
        assert_eq!(
            again.desc,
            "Capabilities negotiation is already complete, command ignored"
        );
    }

    #[test]
    fn a_capability_that_was_not_offered_leaves_the_session_in_negotiation() {
        let session = Session::new(&[]);
        let refused = session.negotiate(&[Capability::Oob]).unwrap_err();
        assert_eq!(refused.class, ErrorClass::GenericError);
        assert_eq!(refused.desc, "Capability oob not available");
        assert!(!session.is_negotiated() && !session.is_enabled(Capability::Oob));
        session.negotiate(&[]).unwrap();
        assert!(session.is_negotiated() && !session.is_enabled(Capability::Oob));
    }
}
