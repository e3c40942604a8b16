//! The actions that begin a backup: `drive-backup` and `blockdev-backup`.
//!
//! ```text
//!   resolve   the source, the target of blockdev-backup, all that is known of them
//!   prepare   make and open the target of drive-backup
//!   enter     make the filter and the job
//!   stage     this is the point in time
//!   commit    the filter goes above the source
//!   start     the job starts
//! ```

mod target;

use std::sync::Arc;

use block::copy::{Copier, CopyOptions, PointInTime, Source, SyncMode, TargetContent};
use block::driver::{BoxFuture, Claim, Driver, Need, Requests, SnapshotSource};
use block::error::Error;
use block::filters::copy_before_write::CopyBeforeWrite;
use block::graph::{
    Access, Behaviour, Drive, Graph, Link, Node, NodeName, OnError, Opened, User, is_well_formed,
};
use block::open::{final_path, whole_sectors};
use qapi::rt::QmpError;

use super::{Action, Concerns, Effect, Held, Plan, Preparing, Stays, WayBack};
use crate::daemon::lookup::{self, from_engine};
use crate::daemon::{Control, Cx, internal_error};
use crate::jobs::backup::{Backup, BackupEnd};
use crate::jobs::{JobKey, JobKind, JobSpec};
use crate::journal::{ActionKind, JournaledAction};

pub(crate) use target::{FileTarget, TargetMode};

/// What the client wants of a backup.
#[derive(Debug, Clone)]
pub(crate) struct BackupOptions {
    /// The drive or node that is copied.
    pub(crate) device: String,
    /// Where to.
    pub(crate) target: BackupTarget,
    /// What is copied.
    pub(crate) sync: SyncMode,
    /// The id of the job.
    pub(crate) job_id: Option<String>,
    /// Bytes per second; 0 for no limit.
    pub(crate) speed: i64,
    /// Write compressed clusters.
    pub(crate) compress: bool,
    /// About reads.
    pub(crate) on_source_error: OnError,
    /// About writes.
    pub(crate) on_target_error: OnError,
    /// Whether the job concludes by itself.
    pub(crate) auto_finalize: bool,
    /// Whether the job is forgotten by itself.
    pub(crate) auto_dismiss: bool,
    /// The name of the filter.
    pub(crate) filter_node_name: Option<String>,
    /// How the copy is made.
    pub(crate) perf: BackupPerf,
}

/// Where a backup goes.
#[derive(Debug, Clone)]
pub(crate) enum BackupTarget {
    /// A node or drive.
    Node(String),
    /// A file that is opened for it.
    File(FileTarget),
}

/// `x-perf`: how a copy is made.
#[derive(Debug, Clone, Default)]
pub(crate) struct BackupPerf {
    /// Requests at once.
    pub(crate) max_workers: Option<i64>,
    /// Most bytes of a request; 0 for the default.
    pub(crate) max_chunk: i64,
    /// The least cluster size of the copy; 0 for the default.
    pub(crate) min_cluster_size: u64,
    /// How the point in time is kept.
    pub(crate) point_in_time: PointInTime,
    /// Whether the target may share the source's bytes.
    pub(crate) use_copy_range: Option<bool>,
}

/// A backup that is being begun.
pub(crate) struct BackupAction {
    options: BackupOptions,
    source: Option<Arc<Node>>,
    target: Option<Arc<Node>>,
    /// What was opened for the target, until it is in the graph.
    opened: Option<Opened>,
    /// What the target holds before it is written.
    target_content: TargetContent,
    /// Its image was made for this.
    is_target_new: bool,
    /// By the name of its drive, unless the client said otherwise.
    job_id: String,
    job: Option<JobKey>,
    /// That of the filter, once it is in the graph.
    filter_name: Option<String>,
    copier: Option<Copier>,
    end: Option<BackupEnd>,
    /// What is to be read and written, until the graph knows of it.
    claim: Claim,
    /// The filter could not be put above the source.
    is_void: bool,
}

impl BackupAction {
    pub(crate) fn new(options: BackupOptions) -> Self {
        BackupAction {
            options,
            source: None,
            target: None,
            opened: None,
            target_content: TargetContent::Unknown,
            is_target_new: false,
            job_id: String::new(),
            job: None,
            filter_name: None,
            copier: None,
            end: None,
            claim: Claim::none(),
            is_void: false,
        }
    }

    /// The checks that need no I/O, in QEMU's order.
    fn check(&self, source: &Arc<Node>, drive: Option<&Drive>) -> Result<(), QmpError> {
        let BackupOptions {
            on_source_error,
            speed,
            perf,
            ..
        } = &self.options;
        let stops = matches!(on_source_error, OnError::Stop | OnError::Enospc);
        if stops && drive.is_some_and(|drive| drive.io_status().is_none()) {
            return Err(QmpError::generic("Invalid parameter 'on-source-error'"));
        }
        let workers = perf.max_workers.unwrap_or(1);
        if !(1..=i64::from(i32::MAX)).contains(&workers) {
            return Err(QmpError::generic(
                "max-workers must be between 1 and 2147483647",
            ));
        }
        if perf.max_chunk < 0 {
            return Err(QmpError::generic(
                "max-chunk must be zero (which means no limit) or positive",
            ));
        }
        if *speed < 0 {
            return Err(QmpError::generic(
                "Parameter 'speed' expects a non-negative value",
            ));
        }
        if let Some(target) = &self.target {
            self.check_target(source, target)?;
        }
        Ok(())
    }

    /// Whether a target can be written with a disk.
    fn check_target(&self, source: &Arc<Node>, target: &Arc<Node>) -> Result<(), QmpError> {
        if Arc::ptr_eq(source, target) || Arc::ptr_eq(&source.below_filters(), target) {
            return Err(same());
        }
        if self.options.compress && target.driver().info().driver != "qcow2" {
            let name = match &self.options.target {
                BackupTarget::Node(name) => name,
                BackupTarget::File(file) => file.filename(),
            };
            let text = format!("Compression is not supported for this drive {name}");
            return Err(QmpError::generic(text));
        }
        // A new image has whole sectors.
        let is_new = self.is_target_new && target.size() == whole_sectors(source.size());
        if source.size() != target.size() && !is_new {
            return Err(QmpError::generic(
                "Source and target image have different sizes",
            ));
        }
        if target.behaviour().read_only {
            return Err(QmpError::generic(
                "Could not create node: Block node is read-only",
            ));
        }
        Ok(())
    }

    /// Makes the copy and the filter, with nothing in the graph yet.
    fn make(&self, source: &Arc<Node>, target: &Arc<Node>) -> Result<(Copier, Filter), QmpError> {
        let read_only = source.behaviour().read_only;
        let file = Access {
            writes: !read_only,
            shares_writes: false,
        };
        let file = Link::new("file", source, file);
        let exclusive = Access {
            writes: true,
            shares_writes: false,
        };
        let target_link = Link::new("target", target, exclusive);
        let perf = &self.options.perf;
        let snapshots: Arc<dyn SnapshotSource> = source.below_filters();
        let from = Source {
            // By way of the filter, which goes on to what comes into the source's place.
            disk: Arc::new(file.edge.clone()),
            snapshots,
        };
        let to: Arc<dyn Requests> = Arc::new(target_link.edge.clone());
        let defaults = CopyOptions::default();
        let options = CopyOptions {
            sync: self.sync(source),
            target_cluster: target.driver().info().cluster_size,
            min_cluster_size: perf.min_cluster_size,
            target_content: self.target_content,
            compress: self.options.compress,
            max_workers: match perf.max_workers {
                Some(workers) => u32::try_from(workers).unwrap_or(u32::MAX),
                None => defaults.max_workers,
            },
            max_chunk: match u64::try_from(perf.max_chunk) {
                Ok(0) | Err(_) => defaults.max_chunk,
                Ok(most) => most,
            },
            point_in_time: perf.point_in_time,
            share: perf.use_copy_range.unwrap_or(defaults.share),
            label: self.job_id.clone(),
            ..defaults
        };
        let copier = Copier::new(from, to, options).map_err(|error| {
            let text = format!("Could not create node: Cannot create block-copy-state: {error}");
            QmpError::generic(text)
        })?;
        let cluster = copier.cluster_size();
        if perf.max_chunk > 0 && perf.max_chunk.unsigned_abs() < cluster {
            return Err(QmpError::generic(format!(
                "Required max-chunk ({}) is less than backup cluster size ({cluster})",
                perf.max_chunk
            )));
        }
        let filter = Filter {
            driver: Arc::new(CopyBeforeWrite::new(
                file.child(),
                target_link.child(),
                copier.before_change(),
                source.driver().info().filename,
            )),
            links: vec![file, target_link],
            behaviour: Behaviour {
                read_only,
                // What guests discard goes on to the source, which knows what to do with it.
                discard: block::open::DiscardMode::Unmap,
                ..Behaviour::default()
            },
        };
        Ok((copier, filter))
    }

    /// What is copied. A new file has no backing where the disk has none, so all of the disk goes there. A node keeps what the
    /// topmost image does not have: it may have a backing of its own.
    fn sync(&self, source: &Node) -> SyncMode {
        match (self.options.sync, &self.options.target) {
            (SyncMode::Top, BackupTarget::File(_)) if source.link("backing").is_none() => {
                SyncMode::Full
            }
            (sync, _) => sync,
        }
    }

    /// Puts all that was made into the graph, with nobody using it, and makes the job. All of it or nothing.
    async fn enter_graph(
        &mut self,
        with: &Preparing,
        opened: Option<Opened>,
        filter: Filter,
    ) -> Result<Arc<Node>, QmpError> {
        let spec = JobSpec {
            id: self.job_id.clone(),
            kind: JobKind::Backup,
            speed: self.options.speed.unsigned_abs(),
            len: self
                .copier
                .as_ref()
                .map_or(0, |copier| copier.progress().total),
            auto_finalize: self.options.auto_finalize,
            auto_dismiss: self.options.auto_dismiss,
        };
        let name = self.options.filter_node_name.clone();
        let user = User::Job(self.job_id.clone());
        let source = self.source.clone();
        let enter = move |control: &mut Control| {
            let failed = |error: Error| {
                QmpError::generic(format!("Could not create node: {}", error.message()))
            };
            let source = source.ok_or_else(internal_error)?;
            let name = match name {
                Some(name) => NodeName::given(&name).map_err(failed)?,
                None => control.graph.names().next(),
            };
            let filter = Node::new(name, filter.driver, filter.behaviour, filter.links);
            let mut opened = opened.unwrap_or_else(|| Vec::new().into());
            opened.nodes.push(filter);
            let graph = &mut control.graph;
            let filter = graph.insert_filter(opened, &source).map_err(failed)?;
            Ok(BackupEnd {
                user: graph.add_user(&filter, user, WATCHES).ok(),
                filter,
                graph: control.jobs.graph(),
            })
        };
        let end = with.cx.commit(enter).await?;
        let filter = end.filter.clone();
        self.end = Some(end);
        self.filter_name = Some(filter.name().to_owned());
        let (group, audience) = (with.group, with.audience);
        let create = move |control: &mut Control| {
            let job = control.jobs.create(spec, group, audience);
            job.map_err(from_engine)
        };
        self.job = Some(with.cx.commit(create).await?);
        Ok(filter)
    }

    /// Makes and opens the target, if it is a file. Has both ends held ready.
    async fn open(&mut self, with: &Preparing) -> Result<(), QmpError> {
        let source = self.source.clone().ok_or_else(internal_error)?;
        if let BackupTarget::File(file) = &self.options.target {
            let file = file.open(with, &source, self.options.sync).await?;
            (self.target_content, self.is_target_new) = (file.content, file.is_new);
            let target = file.nodes.root().cloned().ok_or_else(internal_error)?;
            self.opened = Some(file.nodes);
            self.check_target(&source, &target)?;
            self.target = Some(target);
        }
        let target = self.target.clone().ok_or_else(internal_error)?;
        for (node, need) in [(&source, Need::Reads), (&target, Need::Writes)] {
            let claimed = lookup::claim(&with.cx, node, need).await;
            self.claim.add(claimed.map_err(from_engine)?);
        }
        Ok(())
    }

    async fn begin(&mut self, with: &Preparing, plan: &mut Plan) -> Result<(), QmpError> {
        let (Some(source), Some(target)) = (self.source.clone(), self.target.clone()) else {
            return Err(internal_error());
        };
        let (copier, filter) = self.make(&source, &target)?;
        self.copier = Some(copier);
        let opened = self.opened.take();
        let filter = self.enter_graph(with, opened, filter).await?;
        self.claim = Claim::none();
        plan.lead(&source, &filter, self.way_back(with, &target));
        Ok(())
    }

    /// Whether guests of the source may go on before it is decided that there is a backup. Where what they overwrite goes to the target
    /// at once, that is changed by them: it must be one that goes, should there be none.
    fn way_back(&self, with: &Preparing, target: &Arc<Node>) -> WayBack {
        let goes = self.is_target_new && !with.is_on_new_device(target);
        match self.options.sync {
            SyncMode::None if !goes => WayBack::Closed,
            SyncMode::None | SyncMode::Full | SyncMode::Top => WayBack::Open,
        }
    }

    /// Takes out what was put in, and closes it. Who uses the filter by now goes on to the source.
    async fn take_back(&mut self, cx: &Cx) {
        // First: of many jobs that are taken back at the same time clients are told in their order.
        if let Some(job) = self.job.take() {
            let abandoned = cx.commit(move |control| {
                control.jobs.abandon(job);
                Ok(())
            });
            // Without an answer the daemon ends, and its jobs with it.
            let _ = abandoned.await;
        }
        self.claim = Claim::none();
        self.opened = None;
        if let BackupTarget::File(_) = self.options.target {
            // Closed before the file goes.
            self.target = None;
        }
        if let Some(copier) = self.copier.take()
            && let Err(error) = copier.close().await
        {
            log::error!("a backup that was not begun: {error}");
        }
        if let Some(end) = self.end.take() {
            let held = vec![end.filter.quiesce().await];
            let removed = cx.commit(move |control| Ok(end.take_out(&mut control.graph, &held)));
            for removed in removed.await.unwrap_or_default() {
                let _ = removed.close().await;
            }
        }
    }
}

/// What a job does to its filter: it keeps it.
const WATCHES: Access = Access {
    writes: false,
    shares_writes: true,
};

/// A filter that is not a node yet.
struct Filter {
    driver: Arc<dyn Driver>,
    links: Vec<Link>,
    behaviour: Behaviour,
}

impl Action for BackupAction {
    fn resolve(&mut self, control: &mut Control, plan: &mut Plan) -> Result<(), QmpError> {
        let graph = &control.graph;
        let source = plan.device(graph, &self.options.device)?;
        match &mut self.options.target {
            BackupTarget::Node(name) => self.target = Some(lookup::device(graph, name)?),
            BackupTarget::File(file) => file.resolve()?,
        }
        graph.check_no_target(&source).map_err(from_engine)?;
        self.check(&source, graph.drive(&self.options.device))?;
        if let Some(target) = &self.target {
            graph.check_no_block_job(target).map_err(from_engine)?;
        }
        self.job_id = match &self.options.job_id {
            Some(id) => id.clone(),
            None => device_of(graph, &self.options.device, &source),
        };
        if !is_well_formed(&self.job_id) {
            let text = format!("Invalid job ID '{}'", self.job_id);
            return Err(QmpError::generic(text));
        }
        plan.hold(&source);
        self.source = Some(source);
        Ok(())
    }

    fn concerns(&self) -> Concerns {
        let BackupOptions {
            device,
            target,
            job_id,
            filter_node_name,
            ..
        } = &self.options;
        let (mut files, mut images) = (Vec::new(), Vec::new());
        let target = match target {
            BackupTarget::Node(name) => Some(name),
            BackupTarget::File(file) => {
                match file.may_refer_to_others() {
                    true => images.push(file.filename().to_owned()),
                    false => files.push(file.filename().to_owned()),
                }
                None
            }
        };
        let others = [target, job_id.as_ref(), filter_node_name.as_ref()];
        let names = std::iter::once(device).chain(others.into_iter().flatten());
        Concerns::These {
            names: names.cloned().collect(),
            files,
            images,
        }
    }

    fn begins_job(&self) -> bool {
        true
    }

    fn prepare<'a>(&'a mut self, with: &'a Preparing) -> BoxFuture<'a, Result<(), QmpError>> {
        Box::pin(self.open(with))
    }

    fn enter<'a>(
        &'a mut self,
        with: &'a Preparing,
        plan: &'a mut Plan,
    ) -> BoxFuture<'a, Result<(), QmpError>> {
        Box::pin(self.begin(with, plan))
    }

    fn stage<'a>(&'a mut self, held: &'a mut Held) -> BoxFuture<'a, Result<(), QmpError>> {
        Box::pin(async {
            let (Some(copier), Some(source)) = (&self.copier, &self.source) else {
                return Err(internal_error());
            };
            // A revert before this in the same transaction, or a resize since it was prepared.
            if held.size(source) != source.size() {
                return Err(QmpError::generic(format!(
                    "The size of '{}' is changed by the same transaction",
                    self.options.device
                )));
            }
            if held.quiesced(source).is_some() {
                copier.activate().map_err(from_engine)?;
            }
            Ok(())
        })
    }

    fn check(&self, control: &Control) -> Result<(), QmpError> {
        let (Some(source), Some(end)) = (&self.source, &self.end) else {
            return Err(internal_error());
        };
        let checked = control.graph.check_replace(source, &end.filter);
        checked.map_err(from_engine)
    }

    fn commit(&mut self, control: &mut Control, held: &Held) {
        let (Some(source), Some(end)) = (&self.source, &self.end) else {
            return;
        };
        let inserted = match held.quiesced(source) {
            Some(quiesced) => control.graph.insert_above(source, &end.filter, quiesced),
            None => Err(Error::new(
                block::error::ErrorKind::InvalidInput,
                "The disk is not held",
            )),
        };
        if let Err(error) = inserted {
            log::error!(
                "a backup of '{}' cannot begin: {error}",
                self.options.device
            );
            self.is_void = true;
        }
    }

    fn start<'a>(&'a mut self, cx: &'a Cx) -> BoxFuture<'a, ()> {
        Box::pin(async {
            if self.is_void {
                // Without the filter the target would not show one moment.
                self.take_back(cx).await;
                return;
            }
            let (Some(job), Some(copier), Some(end)) =
                (self.job.take(), self.copier.take(), self.end.take())
            else {
                return;
            };
            let BackupOptions {
                sync,
                on_source_error,
                on_target_error,
                ..
            } = self.options;
            let started = cx.commit(move |control| {
                let backup = Backup {
                    copier,
                    sync,
                    end,
                    on_source_error,
                    on_target_error,
                    threads: control.jobs.threads(),
                };
                control.jobs.start(job, Box::new(backup));
                Ok(())
            });
            // Without an answer the daemon ends, and its jobs with it.
            let _ = started.await;
        })
    }

    fn abort<'a>(&'a mut self, cx: &'a Cx) -> BoxFuture<'a, Option<Stays>> {
        Box::pin(async {
            self.take_back(cx).await;
            None
        })
    }

    fn journaled(&self) -> Option<JournaledAction> {
        let BackupOptions { device, job_id, .. } = &self.options;
        let (kind, filename, node_name) = match &self.options.target {
            BackupTarget::Node(name) => (ActionKind::BackupToNode, None, Some(name.clone())),
            BackupTarget::File(file) => {
                let path = final_path(file.filename()).ok();
                (ActionKind::BackupToFile, path, None)
            }
        };
        Some(JournaledAction {
            filename,
            node_name,
            job_id: job_id.clone(),
            ..JournaledAction::new(kind, device.clone())
        })
    }

    fn effect(&self) -> Effect {
        let filename = match &self.options.target {
            BackupTarget::Node(_) => None,
            BackupTarget::File(file) => Some(file.filename().to_owned()),
        };
        Effect {
            filename,
            node_name: self.filter_name.clone(),
            job_id: Some(self.job_id.clone()).filter(|id| !id.is_empty()),
            ..Effect::default()
        }
    }
}

/// The refusal of a target that is the source.
fn same() -> QmpError {
    QmpError::generic("Source and target cannot be the same")
}

/// The name of the drive that a source belongs to, if it belongs to one.
fn device_of(graph: &Graph, device: &str, source: &Arc<Node>) -> String {
    if graph.drive(device).is_some() {
        return device.to_owned();
    }
    let mut drives = graph.drives().iter();
    let is_root = |drive: &&Drive| drive.node().is_some_and(|root| Arc::ptr_eq(&root, source));
    drives
        .find(is_root)
        .map(|drive| drive.id.clone())
        .unwrap_or_default()
}
