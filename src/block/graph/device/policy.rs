//! What happens when a guest's request fails: QEMU's `werror` and `rerror`.

use crate::error::Error;

/// What happens when a guest request fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnError {
    /// The guest sees the error.
    Report,
    /// The guest sees success.
    Ignore,
    /// The machine stops when space is short; other errors are reported.
    Enospc,
    /// The machine stops.
    Stop,
}

/// What is done about a request that has failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorAction {
    /// The guest is told.
    Report,
    /// The guest is told that it succeeded.
    Ignore,
    /// The machine stops, and the request is sent again when it goes on.
    Stop,
}

impl OnError {
    /// What is done about this error.
    pub fn action(self, error: &Error) -> ErrorAction {
        match self {
            OnError::Report => ErrorAction::Report,
            OnError::Ignore => ErrorAction::Ignore,
            OnError::Enospc if !is_short_of_space(error) => ErrorAction::Report,
            OnError::Enospc | OnError::Stop => ErrorAction::Stop,
        }
    }

    fn can_stop(self) -> bool {
        matches!(self, OnError::Enospc | OnError::Stop)
    }
}

/// What happens when the requests of a drive fail.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ErrorPolicy {
    /// Reads (`rerror`).
    pub read: OnError,
    /// Everything that changes the disk, flushes among it (`werror`).
    pub write: OnError,
}

impl Default for ErrorPolicy {
    fn default() -> Self {
        ErrorPolicy {
            read: OnError::Report,
            write: OnError::Enospc,
        }
    }
}

impl ErrorPolicy {
    /// Whether any error stops the machine. Only then has a drive an I/O status.
    pub fn can_stop(self) -> bool {
        self.read.can_stop() || self.write.can_stop()
    }
}

/// How a drive's last requests went: [`IoStatus::Ok`] until one has stopped the machine, and again when it goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum IoStatus {
    /// None has stopped the machine.
    #[default]
    Ok,
    /// One has, for another reason than space.
    Failed,
    /// One has, because space was short.
    NoSpace,
}

/// QEMU's idea of it: a quota that is used up does not count.
pub(super) fn is_short_of_space(error: &Error) -> bool {
    error.errno() == libc::ENOSPC
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;

    #[test]
    fn actions_are_qemus() {
        let full = Error::new(ErrorKind::NoSpace, "full");
        let broken = Error::new(ErrorKind::Io, "broken");
        let quota = Error::io("w", &std::io::Error::from_raw_os_error(libc::EDQUOT));
        use ErrorAction::{Ignore, Report, Stop};
        for (policy, on_full, on_broken) in [
            (OnError::Report, Report, Report),
            (OnError::Ignore, Ignore, Ignore),
            (OnError::Enospc, Stop, Report),
            (OnError::Stop, Stop, Stop),
        ] {
            assert_eq!(policy.action(&full), on_full);
            assert_eq!(policy.action(&broken), on_broken);
            assert_eq!(policy.action(&quota), on_broken);
        }
    }

    #[test]
    fn a_drive_has_a_status_if_something_can_stop_the_machine() {
        let policy = |read, write| ErrorPolicy { read, write };
        assert!(ErrorPolicy::default().can_stop());
        assert!(policy(OnError::Stop, OnError::Report).can_stop());
        assert!(policy(OnError::Report, OnError::Stop).can_stop());
        assert!(!policy(OnError::Report, OnError::Ignore).can_stop());
    }
}
