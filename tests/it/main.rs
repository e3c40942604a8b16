//! The integration tests: one binary, because every further one is another link.
// A panic is how a test fails, in its helpers too.
#![allow(clippy::expect_used, clippy::unwrap_used)]

mod amend;
mod backup;
mod beside;
mod chains;
mod check;
mod clients;
mod consistency;
mod create;
mod daemon;
mod devices;
mod differential;
mod durability;
mod ending;
mod examples;
mod external;
mod flows;
mod guest;
mod harness;
mod hostile;
mod interop;
mod locks;
mod machine;
mod monitor;
mod nbd;
mod qmp;
mod readme;
mod session;
mod sharing;
mod soak;
mod stats;
mod swap;
mod tidy;
