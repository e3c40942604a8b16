//! Backups, in.

use block::copy::{PointInTime, SyncMode};
use qapi::types;

use super::on_error;
use crate::transaction::{BackupOptions, BackupPerf, BackupTarget, FileTarget, TargetMode};

/// `drive-backup`.
pub(in crate::commands) fn drive_backup(wire: types::DriveBackup) -> BackupOptions {
    let types::DriveBackup {
        job_id,
        device,
        sync,
        speed,
        compress,
        on_source_error,
        on_target_error,
        auto_finalize,
        auto_dismiss,
        filter_node_name,
        x_perf,
        target,
        format,
        mode,
    } = wire;
    let mode = match mode {
        None | Some(types::NewImageMode::AbsolutePaths) => TargetMode::AbsolutePaths,
        Some(types::NewImageMode::Existing) => TargetMode::Existing,
    };
    let common = types::BackupCommon {
        job_id,
        device,
        sync,
        speed,
        compress,
        on_source_error,
        on_target_error,
        auto_finalize,
        auto_dismiss,
        filter_node_name,
        x_perf,
    };
    options(
        common,
        BackupTarget::File(FileTarget::new(target, format, mode)),
    )
}

/// `blockdev-backup`.
pub(in crate::commands) fn blockdev_backup(wire: types::BlockdevBackup) -> BackupOptions {
    let types::BlockdevBackup {
        job_id,
        device,
        sync,
        speed,
        compress,
        on_source_error,
        on_target_error,
        auto_finalize,
        auto_dismiss,
        filter_node_name,
        x_perf,
        target,
    } = wire;
    let common = types::BackupCommon {
        job_id,
        device,
        sync,
        speed,
        compress,
        on_source_error,
        on_target_error,
        auto_finalize,
        auto_dismiss,
        filter_node_name,
        x_perf,
    };
    options(common, BackupTarget::Node(target))
}

fn options(common: types::BackupCommon, target: BackupTarget) -> BackupOptions {
    let types::BackupCommon {
        job_id,
        device,
        sync,
        speed,
        compress,
        on_source_error,
        on_target_error,
        auto_finalize,
        auto_dismiss,
        filter_node_name,
        x_perf,
    } = common;
    BackupOptions {
        device,
        target,
        sync: match sync {
            types::MirrorSyncMode::Full => SyncMode::Full,
            types::MirrorSyncMode::Top => SyncMode::Top,
            types::MirrorSyncMode::None => SyncMode::None,
        },
        job_id,
        speed: speed.unwrap_or(0),
        compress: compress.unwrap_or(false),
        on_source_error: on_error(on_source_error),
        on_target_error: on_error(on_target_error),
        auto_finalize: auto_finalize.unwrap_or(true),
        auto_dismiss: auto_dismiss.unwrap_or(true),
        filter_node_name,
        perf: x_perf.map(perf).unwrap_or_default(),
    }
}

fn perf(wire: types::BackupPerf) -> BackupPerf {
    let types::BackupPerf {
        use_copy_range,
        max_workers,
        max_chunk,
        min_cluster_size,
        x_point_in_time,
    } = wire;
    BackupPerf {
        max_workers,
        max_chunk: max_chunk.unwrap_or(0),
        min_cluster_size: min_cluster_size.unwrap_or(0),
        point_in_time: match x_point_in_time {
            None | Some(types::BackupPointInTime::Auto) => PointInTime::Auto,
            Some(types::BackupPointInTime::CopyBeforeWrite) => PointInTime::CopyBeforeWrite,
            Some(types::BackupPointInTime::InternalSnapshot) => PointInTime::InternalSnapshot,
        },
        use_copy_range,
    }
}
