//! Jobs: `block-job-*` and `job-*` are two views of one thing, the machine of `jobs`.

use qapi::commands::{
    BlockJobCancel, BlockJobComplete, BlockJobDismiss, BlockJobFinalize, BlockJobPause,
    BlockJobResume, BlockJobSetSpeed, JobCancel, JobComplete, JobDismiss, JobFinalize, JobPause,
    JobResume,
};
use qapi::handlers::{BlockJob, Job};
use qapi::rt::QmpError;
use qapi::types::{
    BlockJobInfo, BlockdevBackup, BlockdevBackupWrapper, DriveBackup, DriveBackupWrapper, JobInfo,
    TransactionActionBranch,
};

use super::{Handlers, convert, transactions};
use crate::daemon::Cx;
use crate::jobs::{Cancel, JobKey, Jobs};

/// Does something with a job.
async fn with_job<F>(cx: &Cx, id: String, verb: F) -> Result<(), QmpError>
where
    F: FnOnce(&mut Jobs, JobKey) -> block::error::Result<()> + Send + 'static,
{
    cx.commit(move |control| {
        let key = control.jobs.find(&id).map_err(convert::from_engine)?;
        verb(&mut control.jobs, key).map_err(convert::from_engine)
    })
    .await
}

/// As [`with_job`], for those who know block jobs only.
async fn with_block_job<F>(cx: &Cx, id: String, verb: F) -> Result<(), QmpError>
where
    F: FnOnce(&mut Jobs, JobKey) -> block::error::Result<()> + Send + 'static,
{
    cx.commit(move |control| {
        let key = control.jobs.find_block_job(&id);
        let key = key.map_err(convert::no_block_job)?;
        verb(&mut control.jobs, key).map_err(convert::from_engine)
    })
    .await
}

impl Job<Cx> for Handlers {
    async fn job_pause(cx: &Cx, args: JobPause) -> Result<(), QmpError> {
        let JobPause { id } = args;
        with_job(cx, id, Jobs::pause).await
    }

    async fn job_resume(cx: &Cx, args: JobResume) -> Result<(), QmpError> {
        let JobResume { id } = args;
        with_job(cx, id, Jobs::resume).await
    }

    async fn job_cancel(cx: &Cx, args: JobCancel) -> Result<(), QmpError> {
        let JobCancel { id } = args;
        with_job(cx, id, |jobs, key| jobs.cancel(key, Cancel::Force)).await
    }

    async fn job_complete(cx: &Cx, args: JobComplete) -> Result<(), QmpError> {
        let JobComplete { id } = args;
        with_job(cx, id, Jobs::complete).await
    }

    async fn job_dismiss(cx: &Cx, args: JobDismiss) -> Result<(), QmpError> {
        let JobDismiss { id } = args;
        with_job(cx, id, Jobs::dismiss).await
    }

    async fn job_finalize(cx: &Cx, args: JobFinalize) -> Result<(), QmpError> {
        let JobFinalize { id } = args;
        with_job(cx, id, Jobs::finalize).await
    }

    async fn query_jobs(cx: &Cx) -> Result<Vec<JobInfo>, QmpError> {
        let jobs = cx.look(|control| control.jobs.list()).await?;
        Ok(jobs.into_iter().map(convert::job_info).collect())
    }
}

impl BlockJob<Cx> for Handlers {
    async fn block_job_set_speed(cx: &Cx, args: BlockJobSetSpeed) -> Result<(), QmpError> {
        let BlockJobSetSpeed { device, speed } = args;
        with_block_job(cx, device, move |jobs, key| jobs.set_speed(key, speed)).await
    }

    async fn block_job_cancel(cx: &Cx, args: BlockJobCancel) -> Result<(), QmpError> {
        let BlockJobCancel { device, force } = args;
        let how = match force {
            Some(true) => Cancel::Force,
            None | Some(false) => Cancel::Soft,
        };
        let name = device.clone();
        with_block_job(cx, device, move |jobs, key| {
            if how == Cancel::Soft && jobs.is_held(key) {
                return Err(block::error::Error::new(
                    block::error::ErrorKind::InvalidInput,
                    format!("The block job for device '{name}' is currently paused"),
                ));
            }
            jobs.cancel(key, how)
        })
        .await
    }

    async fn block_job_pause(cx: &Cx, args: BlockJobPause) -> Result<(), QmpError> {
        let BlockJobPause { device } = args;
        with_block_job(cx, device, Jobs::pause).await
    }

    async fn block_job_resume(cx: &Cx, args: BlockJobResume) -> Result<(), QmpError> {
        let BlockJobResume { device } = args;
        with_block_job(cx, device, Jobs::resume).await
    }

    async fn block_job_complete(cx: &Cx, args: BlockJobComplete) -> Result<(), QmpError> {
        let BlockJobComplete { device } = args;
        with_block_job(cx, device, Jobs::complete).await
    }

    async fn block_job_dismiss(cx: &Cx, args: BlockJobDismiss) -> Result<(), QmpError> {
        let BlockJobDismiss { id } = args;
        with_block_job(cx, id, Jobs::dismiss).await
    }

    async fn block_job_finalize(cx: &Cx, args: BlockJobFinalize) -> Result<(), QmpError> {
        let BlockJobFinalize { id } = args;
        with_block_job(cx, id, Jobs::finalize).await
    }

    async fn query_block_jobs(cx: &Cx) -> Result<Vec<BlockJobInfo>, QmpError> {
        let jobs = cx.look(|control| control.jobs.list()).await?;
        let block_jobs = jobs.into_iter().filter(|job| job.spec.kind.is_block_job());
        Ok(block_jobs.map(convert::block_job_info).collect())
    }

    async fn drive_backup(cx: &Cx, args: DriveBackup) -> Result<(), QmpError> {
        let action = DriveBackupWrapper { data: args };
        let action = TransactionActionBranch::DriveBackup(action);
        transactions::run_one(cx, action).await.map(|_| ())
    }

    async fn blockdev_backup(cx: &Cx, args: BlockdevBackup) -> Result<(), QmpError> {
        let action = BlockdevBackupWrapper { data: args };
        let action = TransactionActionBranch::BlockdevBackup(action);
        transactions::run_one(cx, action).await.map(|_| ())
    }
}
