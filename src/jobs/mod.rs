//! Jobs: work that goes on behind the command which began it.
//!
//! ```text
//!   commands ── verbs ──> Jobs ──> machine: states, groups, verbs (no clocks, no tasks)
//!                          │  <── what to tell, what to do
//!                          ├── events ──> clients
//!                          └── orders, instructions ──> task of the job: JobDriver + JobContext
//!   control loop <── reports ── task
//! ```
//!
//! All transitions happen on the control loop: a job's task reports, and does what it is told. Nothing here knows the wire.
//!
//! * [`state`]: states, verbs, and which goes with which
//! * [`machine`]: the jobs of the process as plain state; what happens makes effects
//! * `registry`: [`Jobs`], the machine with the tasks that carry out its effects
//! * [`context`]: what a running job is given: pause points, speed, progress, errors
//! * [`driver`]: what a kind of job implements
//! * [`backup`]: copying disks
//! * [`create`]: the job that makes an image
//! * [`graph`]: how a job reaches the graph

pub mod backup;
pub mod context;
pub mod create;
pub mod driver;
pub mod graph;
pub mod machine;
mod meter;
mod registry;
pub mod state;
mod task;

pub use context::{JobContext, Operation};
pub use driver::JobDriver;
pub use graph::{GraphAccess, GraphChange};
pub use machine::{Audience, Cancel, GroupKey, JobKey, JobKind, JobSpec, Notice};
pub use registry::{JobEvent, JobInfo, JobReport, Jobs, Progress};
pub use state::{Status, Verb};
