//! The machine whose disks the drives are: stopped and continued by users, and stopped by requests that fail.
//!
//! Requests stop it on their own (`block::graph::Machine`); here users are told, errors first. Every change that users make begins with
//! that, so that events come in the order in which things have happened.

use block::graph::{ErrorAction, GuestError, IoStatus, RunState};
use qapi::events;
use qapi::types::{BlockErrorAction, IoOperationType};

use super::control::Control;

impl Control {
    /// Stops the machine: no request of a guest enters a node from now on. Answers whether it has run.
    pub fn stop_machine(&mut self) -> bool {
        let machine = self.graph.machine();
        let stops = machine.state() == RunState::Running;
        machine.stop(RunState::Paused);
        self.tell_of_machine();
        stops
    }

    /// Lets the machine go on. What has stopped it is forgotten.
    pub fn continue_machine(&mut self) {
        self.tell_of_machine();
        for drive in self.graph.drives() {
            drive.reset_io_status();
        }
        self.jobs.reset_io_status();
        if self.graph.machine().go_on() {
            self.emit(events::Resume {});
        }
    }

    /// Tells users what they do not know yet.
    pub(super) fn tell_of_machine(&self) {
        for drive in self.graph.drives() {
            for error in drive.take_untold_errors() {
                self.emit(io_error(&drive.id, drive.io_status(), error));
            }
        }
        if self.graph.machine().untold_stop() {
            self.emit(events::Stop {});
        }
    }
}

fn io_error(drive: &str, status: Option<IoStatus>, error: GuestError) -> events::BlockIoError {
    let GuestError {
        is_read,
        action,
        node,
        no_space,
        reason,
    } = error;
    events::BlockIoError {
        // What QEMU would call a device with this id. Users tell drives apart by it, and so does the limit on events.
        qom_path: format!("/machine/peripheral/{drive}"),
        device: drive.to_owned(),
        node_name: node,
        operation: match is_read {
            true => IoOperationType::Read,
            false => IoOperationType::Write,
        },
        action: match action {
            ErrorAction::Report => BlockErrorAction::Report,
            ErrorAction::Ignore => BlockErrorAction::Ignore,
            ErrorAction::Stop => BlockErrorAction::Stop,
        },
        nospace: status.is_some().then_some(no_space),
        reason,
    }
}
