//! Jobs, out.

use block::error::Error;
use block::graph::{ErrorAction, OnError};
use qapi::events;
use qapi::rt::{ErrorClass, QmpError};
use qapi::types;

use super::signed;
use crate::jobs::{JobEvent, JobInfo, JobKind, JobSpec, Notice, Operation, Progress, Status};

/// What clients are told of a job. None for what only block jobs tell.
pub fn job_event(event: JobEvent) -> Option<qapi::Event> {
    let JobEvent {
        id,
        kind,
        notice,
        progress: Progress { offset, len, speed },
    } = event;
    if let Notice::Status(status) = notice {
        let status = job_status(status);
        return Some(events::JobStatusChange { id, status }.into());
    }
    if !kind.is_block_job() {
        return None;
    }
    let (r#type, device) = (job_type(kind), id);
    let (len, offset, speed) = (signed(len), signed(offset), signed(speed));
    Some(match notice {
        Notice::Status(_) => return None,
        Notice::Ready => events::BlockJobReady {
            r#type,
            device,
            len,
            offset,
            speed,
        }
        .into(),
        Notice::Pending => events::BlockJobPending { r#type, id: device }.into(),
        Notice::Completed(error) => events::BlockJobCompleted {
            r#type,
            device,
            len,
            offset,
            speed,
            error,
        }
        .into(),
        Notice::Cancelled => events::BlockJobCancelled {
            r#type,
            device,
            len,
            offset,
            speed,
        }
        .into(),
        Notice::Error(operation, action) => events::BlockJobError {
            device,
            operation: match operation {
                Operation::Read => types::IoOperationType::Read,
                Operation::Write => types::IoOperationType::Write,
            },
            action: match action {
                ErrorAction::Report => types::BlockErrorAction::Report,
                ErrorAction::Ignore => types::BlockErrorAction::Ignore,
                ErrorAction::Stop => types::BlockErrorAction::Stop,
            },
        }
        .into(),
    })
}

/// A job, as `query-jobs` shows it.
pub(in crate::commands) fn job_info(info: JobInfo) -> types::JobInfo {
    let JobInfo {
        spec,
        status,
        progress: Progress {
            offset,
            len,
            speed: _,
        },
        busy: _,
        paused: _,
        io_status: _,
        error,
        started_at,
        rate,
        time_left,
    } = info;
    types::JobInfo {
        id: spec.id,
        r#type: job_type(spec.kind),
        status: job_status(status),
        current_progress: signed(offset),
        total_progress: signed(len),
        error,
        started_at: Some(signed(started_at)),
        rate: Some(signed(rate)),
        time_left: time_left.map(signed),
    }
}

/// A job, as `query-block-jobs` shows it.
pub(in crate::commands) fn block_job_info(info: JobInfo) -> types::BlockJobInfo {
    let JobInfo {
        spec:
            JobSpec {
                id,
                kind,
                speed: _,
                len: _,
                auto_finalize,
                auto_dismiss,
            },
        status,
        progress: Progress { offset, len, speed },
        busy,
        paused,
        io_status,
        error,
        started_at,
        rate,
        time_left,
    } = info;
    types::BlockJobInfo {
        r#type: job_type(kind),
        device: id,
        len: signed(len),
        offset: signed(offset),
        busy,
        paused,
        speed: signed(speed),
        io_status: super::io_status(io_status),
        ready: matches!(status, Status::Ready | Status::Standby),
        status: job_status(status),
        auto_finalize,
        auto_dismiss,
        error,
        started_at: Some(signed(started_at)),
        rate: Some(signed(rate)),
        time_left: time_left.map(signed),
    }
}

/// That there is no such block job, with the class that the clients of 2013 look for.
#[allow(clippy::needless_pass_by_value)]
pub(in crate::commands) fn no_block_job(error: Error) -> QmpError {
    QmpError::new(ErrorClass::DeviceNotActive, error.message())
}

/// What a job does about an error.
pub(in crate::commands) fn on_error(policy: Option<types::BlockdevOnError>) -> OnError {
    match policy {
        None | Some(types::BlockdevOnError::Report) => OnError::Report,
        Some(types::BlockdevOnError::Ignore) => OnError::Ignore,
        Some(types::BlockdevOnError::Enospc | types::BlockdevOnError::Auto) => OnError::Enospc,
        Some(types::BlockdevOnError::Stop) => OnError::Stop,
    }
}

fn job_type(kind: JobKind) -> types::JobType {
    match kind {
        JobKind::Backup => types::JobType::Backup,
        JobKind::Create => types::JobType::Create,
    }
}

fn job_status(status: Status) -> types::JobStatus {
    match status {
        Status::Created => types::JobStatus::Created,
        Status::Running => types::JobStatus::Running,
        Status::Paused => types::JobStatus::Paused,
        Status::Ready => types::JobStatus::Ready,
        Status::Standby => types::JobStatus::Standby,
        Status::Waiting => types::JobStatus::Waiting,
        Status::Pending => types::JobStatus::Pending,
        Status::Aborting => types::JobStatus::Aborting,
        Status::Concluded => types::JobStatus::Concluded,
        Status::Null => types::JobStatus::Null,
    }
}

#[cfg(test)]
mod tests {
    use qapi::rt::Value;
    use serde_json::json;

    use super::*;

    /// The wire form of what a job of this type tells, without its time.
    fn wire(kind: JobKind, notice: Notice) -> Option<Value> {
        let event = job_event(JobEvent {
            id: "job0".to_owned(),
            kind,
            notice,
            progress: Progress {
                offset: 512,
                len: 1024,
                speed: 4096,
            },
        })?;
        Some(json!({"event": event.name(), "data": event.into_data()}))
    }

    #[test]
    fn every_event_of_a_block_job_has_all_of_its_fields() {
        let progress =
            json!({"type": "backup", "device": "job0", "len": 1024, "offset": 512, "speed": 4096});
        let mut failed = progress.clone();
        failed["error"] = json!("No space left on device");
        let error =
            |operation, action| json!({"device": "job0", "operation": operation, "action": action});
        let cases = [
            (Notice::Ready, "BLOCK_JOB_READY", progress.clone()),
            (
                Notice::Completed(None),
                "BLOCK_JOB_COMPLETED",
                progress.clone(),
            ),
            (
                Notice::Completed(Some("No space left on device".to_owned())),
                "BLOCK_JOB_COMPLETED",
                failed,
            ),
            (Notice::Cancelled, "BLOCK_JOB_CANCELLED", progress),
            (
                Notice::Pending,
                "BLOCK_JOB_PENDING",
                json!({"type": "backup", "id": "job0"}),
            ),
            (
                Notice::Error(Operation::Read, ErrorAction::Report),
                "BLOCK_JOB_ERROR",
                error("read", "report"),
            ),
            (
                Notice::Error(Operation::Write, ErrorAction::Ignore),
                "BLOCK_JOB_ERROR",
                error("write", "ignore"),
            ),
            (
                Notice::Error(Operation::Write, ErrorAction::Stop),
                "BLOCK_JOB_ERROR",
                error("write", "stop"),
            ),
        ];
        for (notice, event, data) in cases {
            let expected = json!({"event": event, "data": data});
            assert_eq!(wire(JobKind::Backup, notice.clone()), Some(expected));
            // Of other jobs nothing but the state is told.
            assert_eq!(wire(JobKind::Create, notice), None);
        }
    }

    #[test]
    fn every_state_of_a_job_is_told() {
        let states = [
            (Status::Created, "created"),
            (Status::Running, "running"),
            (Status::Paused, "paused"),
            (Status::Ready, "ready"),
            (Status::Standby, "standby"),
            (Status::Waiting, "waiting"),
            (Status::Pending, "pending"),
            (Status::Aborting, "aborting"),
            (Status::Concluded, "concluded"),
            (Status::Null, "null"),
        ];
        for kind in [JobKind::Backup, JobKind::Create] {
            for (status, name) in states {
                let expected =
                    json!({"event": "JOB_STATUS_CHANGE", "data": {"id": "job0", "status": name}});
                assert_eq!(wire(kind, Notice::Status(status)), Some(expected));
            }
        }
    }
}
