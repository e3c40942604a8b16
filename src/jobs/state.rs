//! The states of a job, the verbs that a client has, and which goes with which.
//!
//! ```text
//!                    ┌─> paused ─┐    ┌─> standby ─┐
//!   created ──> running <────────┘    │            │
//!      │           ├───────────────> ready <───────┘
//!      │           │                   │
//!      │           ├───────────────────┴──> waiting ──> pending ──> concluded ──> null
//!      └───────────┴──> aborting <─────────────┴───────────┘            ^
//!                          └────────────────────────────────────────────┘
//! ```

/// Where a job is in its life. Names and meaning are QEMU's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Status {
    /// Made, and not started.
    Created,
    /// At work.
    Running,
    /// Held by the user or by an error.
    Paused,
    /// All is done that can be done without the user's word, and kept so.
    Ready,
    /// As paused, for one that was ready.
    Standby,
    /// Done; others of its group are not.
    Waiting,
    /// All of its group are done; the last steps may need the user's word.
    Pending,
    /// It has failed or was cancelled, and takes back what it can.
    Aborting,
    /// Over, for clients to look at.
    Concluded,
    /// Gone.
    Null,
}

/// What a client may do with a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Verb {
    /// End it.
    Cancel,
    /// Hold it.
    Pause,
    /// Let it go on.
    Resume,
    /// Change how fast it may be.
    SetSpeed,
    /// Make a ready job do its last step.
    Complete,
    /// Let a pending job conclude.
    Finalize,
    /// Forget a concluded job.
    Dismiss,
}

impl Status {
    /// All of them.
    pub const ALL: [Status; 10] = [
        Status::Created,
        Status::Running,
        Status::Paused,
        Status::Ready,
        Status::Standby,
        Status::Waiting,
        Status::Pending,
        Status::Aborting,
        Status::Concluded,
        Status::Null,
    ];

    /// The name that users see.
    pub fn name(self) -> &'static str {
        match self {
            Status::Created => "created",
            Status::Running => "running",
            Status::Paused => "paused",
            Status::Ready => "ready",
            Status::Standby => "standby",
            Status::Waiting => "waiting",
            Status::Pending => "pending",
            Status::Aborting => "aborting",
            Status::Concluded => "concluded",
            Status::Null => "null",
        }
    }

    /// Whether a job may go from here to there. One that aborts may be told again to.
    pub fn may_become(self, next: Status) -> bool {
        use Status::{
            Aborting, Concluded, Created, Null, Paused, Pending, Ready, Running, Standby, Waiting,
        };
        let nexts: &[Status] = match self {
            Created => &[Running, Aborting, Null],
            Running => &[Paused, Ready, Waiting, Aborting],
            Paused => &[Running],
            Ready => &[Standby, Waiting, Aborting],
            Standby => &[Ready],
            Waiting => &[Pending, Aborting],
            Pending => &[Aborting, Concluded],
            Aborting => &[Aborting, Concluded],
            Concluded => &[Null],
            Null => &[],
        };
        nexts.contains(&next)
    }

    /// Whether a job in this state takes the verb.
    pub fn accepts(self, verb: Verb) -> bool {
        use Status::{Concluded, Created, Paused, Pending, Ready, Running, Standby, Waiting};
        let is_alive = matches!(self, Created | Running | Paused | Ready | Standby);
        match verb {
            Verb::Cancel => is_alive || matches!(self, Waiting | Pending),
            Verb::Pause | Verb::Resume | Verb::SetSpeed => is_alive,
            Verb::Complete => matches!(self, Ready | Standby),
            Verb::Finalize => self == Pending,
            Verb::Dismiss => self == Concluded,
        }
    }

    /// Whether its work is over, in whatever way.
    pub fn is_over(self) -> bool {
        use Status::{Aborting, Concluded, Null, Pending, Waiting};
        matches!(self, Waiting | Pending | Aborting | Concluded | Null)
    }
}

impl Verb {
    /// All of them.
    pub const ALL: [Verb; 7] = [
        Verb::Cancel,
        Verb::Pause,
        Verb::Resume,
        Verb::SetSpeed,
        Verb::Complete,
        Verb::Finalize,
        Verb::Dismiss,
    ];

    /// The name that users see.
    pub fn name(self) -> &'static str {
        match self {
            Verb::Cancel => "cancel",
            Verb::Pause => "pause",
            Verb::Resume => "resume",
            Verb::SetSpeed => "set-speed",
            Verb::Complete => "complete",
            Verb::Finalize => "finalize",
            Verb::Dismiss => "dismiss",
        }
    }
}
