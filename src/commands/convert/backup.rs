//! Backups, in.

use block::copy::{PointInTime, SyncMode};
use qapi::types;

use super::on_error;
use crate::transaction::{BackupOptions, BackupPerf, BackupTarget, FileTarget, TargetMode};

/// What both commands have, taken out of the structure of one of them; the rest of its members make the target.
macro_rules! options {
    ($wire:expr, $command:ident { $($own:ident),+ }, $target:expr) => {{
        let types::$command {
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
            $($own),+
        } = $wire;
        BackupOptions {
            device,
            target: $target,
            sync: sync_mode(sync),
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
    }};
}

/// `drive-backup`.
pub(in crate::commands) fn drive_backup(wire: types::DriveBackup) -> BackupOptions {
    options!(
        wire,
        DriveBackup {
            target,
            format,
            mode
        },
        {
            let mode = match mode {
                None | Some(types::NewImageMode::AbsolutePaths) => TargetMode::AbsolutePaths,
                Some(types::NewImageMode::Existing) => TargetMode::Existing,
            };
            BackupTarget::File(FileTarget::new(target, format, mode))
        }
    )
}

/// `blockdev-backup`.
pub(in crate::commands) fn blockdev_backup(wire: types::BlockdevBackup) -> BackupOptions {
    options!(wire, BlockdevBackup { target }, BackupTarget::Node(target))
}

fn sync_mode(wire: types::MirrorSyncMode) -> SyncMode {
    match wire {
        types::MirrorSyncMode::Full => SyncMode::Full,
        types::MirrorSyncMode::Top => SyncMode::Top,
        types::MirrorSyncMode::None => SyncMode::None,
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
