//! What must hold in a state that a crash has left: before recovery, behind it, and after more guest writes.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use super::audit::{Audit, Bitmap, Verdict, bitmaps_differ};
use super::content::{Content, SECTOR, Versions};
use super::qemu::Qemu;
use super::run::{Kind, Moment, Problem, Runner, Snapshot, World, open, snapshots_differ};
use super::script::{BackingName, Case, Script, Storage};
use super::states::{Effort, State, epochs, whole_sectors};
use crate::driver::BoxFuture;
use crate::formats::qcow2::check::{CheckReport, check};
use crate::formats::qcow2::create::Compat;
use crate::protocols::memory::{Memory, Record};

/// A run whose crash states are tried.
#[derive(Debug)]
pub struct Recording {
    /// The image.
    pub case: Case,
    /// The disk before the first record.
    pub base: Arc<Memory>,
    /// What changed it.
    pub log: Vec<Record>,
    /// What had been answered when.
    pub moments: Vec<Moment>,
    /// Stamps from here on are new.
    pub next_stamp: u32,
}

impl Recording {
    /// The log as its storage may lose parts of it.
    fn volatile_log(&self) -> Result<Vec<Record>, Problem> {
        match self.case.storage {
            Storage::Sectors => whole_sectors(&self.base, &self.log).map_err(text),
            Storage::Requests => Ok(self.log.clone()),
        }
    }
}

/// Figures of what was tried.
#[derive(Debug, Clone, Copy, Default)]
pub struct Figures {
    /// States that were verified, all different.
    pub states: u64,
    /// States that were the same as others.
    pub duplicates: u64,
    /// Of the states, those that said that their refcounts are wrong, and were repaired.
    pub dirty: u64,
    /// Of the states, those that leaked clusters.
    pub leaking: u64,
    /// Of the states, those with COPIED flags that disagreed with refcounts, without danger.
    pub stale_flags: u64,
    /// Of the states, those of a crash while the image recovered from another.
    pub second: u64,
    /// Of the states, those that QEMU has repaired and read as well.
    pub by_qemu: u64,
}

impl Figures {
    /// Adds the figures of another run.
    pub fn add(&mut self, other: &Figures) {
        self.states += other.states;
        self.duplicates += other.duplicates;
        self.dirty += other.dirty;
        self.leaking += other.leaking;
        self.stale_flags += other.stale_flags;
        self.second += other.second;
        self.by_qemu += other.by_qemu;
    }
}

/// What may be there after a crash between two moments.
struct Candidate {
    snapshots: Vec<Snapshot>,
    active: Versions,
}

/// Which share of the states gets the dearer checks: 1 of this many, none for 0.
#[derive(Debug, Clone, Copy)]
pub struct Samples {
    /// Crashes while recovering.
    pub second: u32,
    /// Repair and reading by QEMU.
    pub qemu: u32,
}

/// Verifies states.
pub struct Oracle {
    samples: Samples,
    qemu: Option<Qemu>,
    random: fastrand::Rng,
    /// What has been done.
    pub figures: Figures,
}

/// The candidates of a recording by (last durable moment, last begun moment), and the states seen.
#[derive(Default)]
pub(super) struct Known {
    candidates: HashMap<(usize, usize), Vec<Candidate>>,
    seen: HashSet<(u64, usize, usize)>,
    /// The image before the first record: its bitmaps, and what the disk held.
    base: (Vec<Bitmap>, Content),
}

impl Known {
    fn of(recording: &Recording) -> Result<Known, Problem> {
        let bytes = recording.base.content();
        let audit = recording.case.audit(&bytes, recording.base.second())?;
        Ok(Known {
            base: (audit.bitmaps().to_vec(), audit.active()?),
            ..Known::default()
        })
    }

    /// The bitmaps of a state whose disk holds `active`.
    fn check_bitmaps(&self, bytes: &[u8], active: &Content) -> Result<(), Problem> {
        let (bitmaps, before) = &self.base;
        bitmaps_differ(bitmaps, before, &Audit::new(bytes)?, active)
    }

    fn candidates(&mut self, recording: &Recording, state: &State) -> &[Candidate] {
        let (durable, begun) = between(&recording.moments, state);
        self.candidates
            .entry((durable, begun))
            .or_insert_with(|| candidates(&recording.moments, durable, begun))
    }
}

/// What a state holds before anybody opens it, if that is something that it may hold.
pub(super) fn observe_state(
    bytes: &[u8],
    recording: &Recording,
    known: &mut Known,
    state: &State,
) -> Result<World, Problem> {
    observe(
        &recording.case,
        (bytes, state.disk.second()),
        known.candidates(recording, state),
    )
    .map(|(world, _)| world)
}

impl Oracle {
    /// An oracle whose choices come from `random`. Without `qemu` nothing is asked of QEMU's tools.
    pub fn new(samples: Samples, qemu: Option<Qemu>, random: fastrand::Rng) -> Self {
        Oracle {
            samples,
            qemu,
            random,
            figures: Figures::default(),
        }
    }

    /// Tries the states of a recording, as many as `effort` says.
    pub async fn try_states(
        &mut self,
        recording: &Recording,
        effort: Effort,
    ) -> Result<(), Problem> {
        let mut known = Known::of(recording)?;
        let log = recording.volatile_log()?;
        for epoch in epochs(&recording.base, &log).map_err(text)? {
            for choice in epoch.choices(effort, &mut self.random) {
                let state = epoch.state(&choice).map_err(text)?;
                self.verify(recording, &mut known, &state, 2).await?;
            }
        }
        Ok(())
    }

    /// Verifies one state, unless it has been before.
    async fn verify(
        &mut self,
        recording: &Recording,
        known: &mut Known,
        state: &State,
        depth: u32,
    ) -> Result<(), Problem> {
        let (durable, begun) = between(&recording.moments, state);
        if !known.seen.insert((state.disk.digest(), durable, begun)) {
            self.figures.duplicates += 1;
            return Ok(());
        }
        let bytes = state.disk.content();
        self.figures.states += 1;
        self.figures.second += u64::from(depth < 2);
        let (case, second) = (&recording.case, state.disk.second());
        let result = match observe(case, (&bytes, second), known.candidates(recording, state)) {
            Ok((_, observed)) if observed.stale_flag(case).is_some() => {
                Err(observed.verdict.stale_flag.unwrap_or_default())
            }
            Ok((_, observed)) if !observed.verdict.dangers.is_empty() => {
                Err(observed.verdict.dangers.join("\n  "))
            }
            Ok((world, observed)) => match known
                .check_bitmaps(&bytes, &world.active)
                .and_then(|()| has_forced(&recording.moments, state, &world.active))
            {
                Ok(()) => {
                    self.note(&observed);
                    let seen = (world, observed);
                    self.recover(recording, state, &bytes, seen, depth).await
                }
                Err(problem) => Err(problem),
            },
            Err(problem) => Err(problem),
        };
        result.map_err(|problem| {
            let op = |at: usize| recording.moments[at].op.clone();
            format!(
                "{}\n  {problem}\n  behind {}, at the latest in {}",
                state.what,
                op(durable),
                op(begun)
            )
        })
    }

    fn note(&mut self, verdict: &Observed) {
        self.figures.dirty += u64::from(verdict.dirty);
        self.figures.leaking += u64::from(!verdict.dirty && verdict.verdict.leaks > 0);
        self.figures.stale_flags += u64::from(!verdict.dirty && verdict.verdict.stale_flags > 0);
    }

    /// Opens the state, compares, lets a guest go on, and compares again.
    async fn recover(
        &mut self,
        recording: &Recording,
        state: &State,
        bytes: &[u8],
        (world, observed): (World, Observed),
        depth: u32,
    ) -> Result<(), Problem> {
        if !observed.dirty {
            let report = check(&state.disk.child()).await.map_err(text)?;
            agree(&report, &observed.verdict)?;
        }
        let case = &recording.case;
        let disk = state.disk.fork();
        let second = depth > 1 && self.is_sampled(self.samples.second);
        if second {
            disk.start_log();
        }
        let stamp = recording.next_stamp;
        let mut runner = Runner::resume(&disk, case, world.clone(), stamp).await?;
        let verdict = recovered(case, &state.disk, &disk, &world, &observed).await?;
        if self.random.u8(..8) == 0 {
            is_idempotent(&disk, case).await?;
        }
        compare_windows(&runner, &world.active).await?;
        if self.is_sampled(self.samples.qemu)
            && let Some(qemu) = &mut self.qemu
        {
            qemu.verify((bytes, state.disk.second()), &world, case, &mut self.random)
                .map_err(|problem| format!("QEMU: {problem}"))?;
            self.figures.by_qemu += 1;
        }
        if second {
            runner.moments = vec![Moment::start(&world)];
        }
        for op in Script::aftermath(&mut self.random, case) {
            runner.step(&op).await?;
        }
        runner.close().await?;
        settled(
            case,
            &disk,
            &runner.world,
            verdict.leaks + verdict.leaks_beyond,
        )
        .await
        .and_then(|()| {
            let (before, after) = (Audit::new(bytes)?, disk.content());
            let bitmaps = before.bitmaps();
            let after = Audit::new(&after)?;
            bitmaps_differ(bitmaps, &world.active, &after, &runner.world.active)
        })
        .map_err(|problem| format!("after the recovery and {}: {problem}", ops(&runner)))?;
        if state.is_kill && self.is_sampled(self.samples.second.div_ceil(4)) && depth > 1 {
            self.try_killed(recording, state, &world).await?;
        }
        if second {
            let recording = Recording {
                case: case.clone(),
                base: state.disk.fork(),
                log: disk.log(),
                next_stamp: runner.next_stamp(),
                moments: std::mem::take(&mut runner.moments),
            };
            self.try_second(&recording, 0).await?;
        }
        Ok(())
    }

    /// Tries some states of a crash that comes while an image recovers from another, or soon after: behind the record `from`.
    fn try_second<'a>(
        &'a mut self,
        recording: &'a Recording,
        from: usize,
    ) -> BoxFuture<'a, Result<(), Problem>> {
        const STATES: usize = 12;
        Box::pin(async move {
            let mut known = Known::of(recording)?;
            let effort = Effort {
                per_epoch: STATES / 2,
                ..Effort::default()
            };
            let mut states = Vec::new();
            let log = recording.volatile_log()?;
            for epoch in epochs(&recording.base, &log).map_err(text)? {
                if !epoch.ends_behind(from) {
                    continue;
                }
                for choice in epoch.choices(effort, &mut self.random) {
                    states.push(epoch.state(&choice).map_err(text)?);
                }
            }
            self.random.shuffle(&mut states);
            for state in states.iter().take(STATES) {
                self.verify(recording, &mut known, state, 1)
                    .await
                    .map_err(|problem| format!("second crash: {problem}"))?;
            }
            Ok(())
        })
    }

    /// A process was killed; a power cut comes while the next one opens the image, or soon after. What the first one had not flushed is in
    /// the page cache alone until then.
    async fn try_killed(
        &mut self,
        killed: &Recording,
        state: &State,
        world: &World,
    ) -> Result<(), Problem> {
        let disk = state.disk.fork();
        disk.start_log();
        let runner = Runner::resume(&disk, &killed.case, world.clone(), killed.next_stamp).await?;
        runner.close().await?;
        let mut log = killed.log[..state.completed].to_vec();
        let now = log.iter().map(|record| record.completed).max();
        let later = now.unwrap_or(0) + 1;
        let mut moments = killed.moments.clone();
        moments.retain(|moment| moment.begun < log.len());
        for moment in moments.iter_mut() {
            let is_answered = moment.answered <= log.len();
            moment.answered = if is_answered {
                moment.answered
            } else {
                usize::MAX
            };
            moment.forced.retain(|write| write.answered <= log.len());
        }
        moments.push(Moment {
            op: "the next start".to_owned(),
            begun: log.len(),
            answered: usize::MAX,
            durable: false,
            ..Moment::start(world)
        });
        log.extend(disk.log().into_iter().map(|record| Record {
            issued: record.issued + later,
            completed: record.completed + later,
            ..record
        }));
        let recording = Recording {
            case: killed.case.clone(),
            base: killed.base.clone(),
            log,
            next_stamp: killed.next_stamp,
            moments,
        };
        self.try_second(&recording, state.completed).await
    }

    fn is_sampled(&mut self, one_of: u32) -> bool {
        one_of > 0 && self.random.u32(..one_of) == 0
    }
}

impl Moment {
    /// The beginning of a log.
    pub fn start(world: &World) -> Moment {
        Moment {
            op: "start".to_owned(),
            begun: 0,
            answered: 0,
            durable: true,
            kind: Kind::Sectors,
            after: world.clone(),
            passing: None,
            through: Vec::new(),
            forced: Vec::new(),
        }
    }
}

/// What the auditor has seen of a state.
struct Observed {
    dirty: bool,
    verdict: Verdict,
}

impl Observed {
    /// A flag that differs from its count in an image that takes snapshots under the dirty bit: no danger, but an error to others.
    fn stale_flag(&self, case: &Case) -> Option<&String> {
        let counts_behind = case.compat != Compat::V0_10 && case.refcount_bits >= 16;
        let flag = self.verdict.stale_flag.as_ref();
        flag.filter(|_| counts_behind && !self.dirty)
    }
}

/// The last moment that is durable in a state, and the last that can have left a trace in it.
fn between(moments: &[Moment], state: &State) -> (usize, usize) {
    let durable = moments
        .iter()
        .rposition(|moment| moment.durable && moment.answered <= state.completed)
        .unwrap_or(0);
    let begun = moments
        .iter()
        .rposition(|moment| moment.begun < state.reached)
        .unwrap_or(0);
    (durable, begun.max(durable))
}

/// A write that was answered as durable is there, among others that were not answered yet: what was before it is gone.
fn has_forced(moments: &[Moment], state: &State, active: &Content) -> Result<(), Problem> {
    let (durable, begun) = between(moments, state);
    for nth in durable + 1..=begun {
        // What a revert brings back may be anything.
        if moments[nth..=begun]
            .iter()
            .any(|m| m.kind == Kind::Everything)
        {
            continue;
        }
        let before = &moments[nth - 1].after.active;
        let answered = moments[nth].forced.iter();
        for write in answered.filter(|write| write.answered <= state.completed) {
            let mut sectors = write.at / SECTOR..(write.at + write.len) / SECTOR;
            let is_old = |number: u64| {
                let old = before.sector(number);
                // Zeroes come back with every discard.
                old != &[0; SECTOR as usize] && old == active.sector(number)
            };
            if let Some(number) = sectors.find(|number| is_old(*number)) {
                return Err(format!("sector {number} has lost a write that was durable"));
            }
        }
    }
    Ok(())
}

fn candidates(moments: &[Moment], durable: usize, begun: usize) -> Vec<Candidate> {
    let span = &moments[durable..=begun];
    // Operations on the whole image follow each other: at most one has been sent and is not durable yet.
    let changes = span[1..].iter().find(|moment| moment.kind != Kind::Sectors);
    let held: Vec<&Content> = span
        .iter()
        .filter(|moment| changes.is_none_or(|change| !std::ptr::eq(*moment, change)))
        .flat_map(|moment| moment.through.iter().chain([&moment.after.active]))
        .map(|content| &**content)
        .collect();
    let mut candidates = vec![Candidate {
        snapshots: moments[durable].after.snapshots.clone(),
        active: Versions::new(held.iter().copied()),
    }];
    let Some(change) = changes else {
        return candidates;
    };
    for (world, goes_back) in worlds(change) {
        let mut contents = vec![(*world.active).clone()];
        // What guests wrote stays theirs, unless the disk goes back to a snapshot.
        if !goes_back {
            contents.extend(held.iter().map(|content| {
                let mut content = (*content).clone();
                content.resize(world.active.size());
                content
            }));
        }
        candidates.push(Candidate {
            snapshots: world.snapshots.clone(),
            active: Versions::new(&contents),
        });
    }
    candidates
}

/// The worlds that a change leads to, and whether it makes the disk something else there.
fn worlds(change: &Moment) -> Vec<(&World, bool)> {
    let goes_back = change.kind == Kind::Everything;
    match &change.passing {
        // It ends where it began.
        Some(passing) => vec![(passing, goes_back), (&change.after, false)],
        None => vec![(&change.after, goes_back)],
    }
}

/// Finds which candidate a state is, and what exactly it holds.
fn observe(
    case: &Case,
    (bytes, data): (&[u8], Option<&Arc<Memory>>),
    candidates: &[Candidate],
) -> Result<(World, Observed), Problem> {
    let audit = case.audit(bytes, data)?;
    let verdict = audit.verdict()?;
    if case.base.is_some() {
        let (name, format) = audit.backing_name()?;
        // The program that has left bitmaps has left no format.
        let knows_format = case.bitmaps || format.as_deref() == Some("raw");
        if !BackingName::is_one(&name) || !knows_format {
            return Err(format!(
                "the backing file is '{name}', of format {format:?}"
            ));
        }
    }
    let world = World::of(&audit)?;
    audit.check_raw(&world.active)?;
    let mut problems = Vec::new();
    for candidate in candidates {
        let problem = snapshots_differ(&candidate.snapshots, &world.snapshots)
            .or_else(|| candidate.active.violation(&world.active));
        match problem {
            Some(problem) => problems.push(problem),
            None => {
                let dirty = audit.is_dirty();
                return Ok((world, Observed { dirty, verdict }));
            }
        }
    }
    Err(problems.join("\n  or: "))
}

/// Behind the open: an image that was dirty is as if newly made, any other has not been touched.
async fn recovered(
    case: &Case,
    before: &Memory,
    disk: &Arc<Memory>,
    world: &World,
    observed: &Observed,
) -> Result<Verdict, Problem> {
    if !observed.dirty {
        return match disk.digest() == before.digest() {
            true => Ok(observed.verdict.clone()),
            false => Err("opening has changed an image that was not dirty".to_owned()),
        };
    }
    let bytes = disk.content();
    let audit = case.audit(&bytes, disk.second())?;
    let verdict = audit.verdict()?;
    if audit.is_dirty() || verdict != Verdict::default() {
        return Err(format!("repaired, dirty {}: {verdict:?}", audit.is_dirty()));
    }
    if let Some(problem) = world.difference(&World::of(&audit)?) {
        return Err(format!("repaired: {problem}"));
    }
    let report = check(&disk.child()).await.map_err(text)?;
    match report.is_clean() {
        true => Ok(verdict),
        false => Err(format!("repaired: {:?}", report.findings)),
    }
}

/// A recovered image has nothing to recover.
async fn is_idempotent(disk: &Arc<Memory>, case: &Case) -> Result<(), Problem> {
    let again = disk.fork();
    drop(open(&again, case).await.map_err(text)?);
    match again.digest() == disk.digest() {
        true => Ok(()),
        false => Err("a second recovery has changed the image again".to_owned()),
    }
}

/// Our checker finds what the auditor finds.
fn agree(report: &CheckReport, verdict: &Verdict) -> Result<(), Problem> {
    let known = report.overlaps + report.check_errors == 0
        && report.corruptions <= verdict.stale_flags
        && report.leaks == verdict.leaks;
    match known {
        true => Ok(()),
        false => Err(format!(
            "check finds {:?}, the audit {verdict:?}",
            report.findings
        )),
    }
}

/// A closed image: exactly what it must hold, nothing dangerous, and no leaks but those from before.
async fn settled(
    case: &Case,
    disk: &Arc<Memory>,
    world: &World,
    leaks: u64,
) -> Result<(), Problem> {
    let bytes = disk.content();
    let audit = case.audit(&bytes, disk.second())?;
    let verdict = audit.verdict()?;
    audit.check_raw(&world.active)?;
    if audit.is_dirty()
        || !verdict.dangers.is_empty()
        || verdict.leaks + verdict.leaks_beyond > leaks
    {
        return Err(format!(
            "closed, dirty {}: {verdict:?}, leaks before {leaks}",
            audit.is_dirty()
        ));
    }
    if let Some(problem) = world.difference(&World::of(&audit)?) {
        return Err(problem);
    }
    let report = check(&disk.child()).await.map_err(text)?;
    agree(&report, &verdict)
}

async fn compare_windows(runner: &Runner, active: &Content) -> Result<(), Problem> {
    for (at, bytes) in runner.read_windows().await? {
        if active.bytes(at, bytes.len() as u64) != bytes {
            let mut is = active.clone();
            is.write(at, &bytes);
            let difference = active.difference(&is).unwrap_or_default();
            return Err(format!("the driver reads otherwise: {difference}"));
        }
    }
    Ok(())
}

fn ops(runner: &Runner) -> String {
    let ops: Vec<&str> = runner.moments.iter().map(|m| m.op.as_str()).collect();
    ops.join("; ")
}

fn text(error: crate::error::Error) -> Problem {
    error.to_string()
}
