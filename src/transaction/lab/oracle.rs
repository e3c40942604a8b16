//! What must hold in a state that a crash has left: behind the recovery, and behind more writes.

use std::collections::HashSet;
use std::fs;
use std::process::Command;
use std::sync::Arc;

use block::crashlab::audit::{Audit, bitmaps_differ};
use block::crashlab::content::{Content, Versions};
use block::crashlab::states::{Effort, Epoch, State, epochs, whole_sectors};
use block::io::IoContext;
use block::protocols::memory::{Memory, Record};

use super::Problem;
use super::guests::{self, Back, Written};
use super::run::{Moment, Place, Runner};
use super::script::{Act, DISK_BYTES, DISKS, Disk, Image, Op, Other, Script, Snapshot, World};
use super::state::{Forgotten, Recording, clear, renamings, restore};
use super::tape::{Fault, Tape};
use crate::journal::{self, Journal, Outcome, Report};

/// Snapshots of this prefix are of backups that were cut off.
const TEMPORARY: &str = "x-qblockd-temporary:";

/// What a start asks of the host, at most, but for few.
const LONGEST_RECOVERY: u64 = 40;

/// Starts that fail, one behind the other.
const FAILING_STARTS: usize = 3;

/// Figures of what was tried.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Figures {
    pub(super) scripts: u64,
    pub(super) records: u64,
    /// States that were verified, all different.
    pub(super) states: u64,
    /// Of these, those in which a transaction was finished or taken back.
    pub(super) finished: u64,
    pub(super) taken_back: u64,
    /// Of a crash while another was recovered from.
    pub(super) second: u64,
    /// Starts in which something has failed.
    pub(super) failed: u64,
    /// Those that were written to, and looked at again.
    pub(super) written: u64,
    /// Those that QEMU has looked at too.
    pub(super) by_qemu: u64,
}

impl Figures {
    /// Adds those of another script.
    pub(super) fn add(&mut self, other: &Figures) {
        self.scripts += other.scripts;
        self.records += other.records;
        self.states += other.states;
        self.finished += other.finished;
        self.taken_back += other.taken_back;
        self.second += other.second;
        self.failed += other.failed;
        self.written += other.written;
        self.by_qemu += other.by_qemu;
    }
}

/// How much is done: 1 of so many states; none for 0.
#[derive(Debug, Clone, Copy)]
pub(super) struct Samples {
    pub(super) per_epoch: usize,
    pub(super) second: u32,
    pub(super) written: u32,
    pub(super) qemu: u32,
    /// Of the starts behind a crash, this many percent fail, and another one follows.
    pub(super) failing: u8,
}

pub(super) struct Oracle<'p> {
    pub(super) place: &'p Place,
    pub(super) samples: Samples,
    pub(super) random: fastrand::Rng,
    pub(super) figures: Figures,
    /// As if the daemon did not flush these.
    pub(super) forgotten: Option<Forgotten>,
}

impl Oracle<'_> {
    /// Runs a script, and tries the states that a crash may leave at any moment of it.
    pub(super) async fn try_script(&mut self, script: &Script) -> Result<(), Problem> {
        let place = self.place;
        for folder in [&place.images, &place.state, &place.cellar] {
            clear(folder);
        }
        let tape = Tape::new(&place.images, &place.state, script.seed | 1);
        let mut runner = Runner::create(place, &tape, script).await?;
        runner.start();
        for op in &script.ops {
            runner.step(op).await?;
        }
        let (moments, next) = (std::mem::take(&mut runner.moments), runner.next());
        let guests = std::mem::take(&mut runner.guests);
        let backs = std::mem::take(&mut runner.backs);
        let ended = runner.end().await;
        // A file that has failed to become durable fails to close, too.
        if !matches!(script.ops.last(), Some(Op::Failing(..))) {
            ended?;
        }
        let mut recording = Recording::of(&tape, moments, next);
        (recording.guests, recording.backs) = (guests, backs);
        if let Some(forgotten) = self.forgotten {
            recording.forget(forgotten);
        }
        self.figures.scripts += 1;
        self.figures.records += recording.log.len() as u64;
        let log = whole_sectors(&recording.base, &recording.log).map_err(text)?;
        let mut seen = HashSet::new();
        let effort = Effort {
            all_subsets: 4,
            random_subsets: 8,
            per_epoch: self.samples.per_epoch,
        };
        for epoch in epochs(&recording.base, &log).map_err(text)? {
            for choice in epoch.choices(effort, &mut self.random) {
                let state = epoch.state(&choice).map_err(text)?;
                let (durable, begun) = between(&recording.moments, &state);
                if seen.insert((state.disk.digest(), durable, begun)) {
                    let tried = self.verify(&recording, &state).await;
                    tried.map_err(|problem| describe(&recording, &state, &problem))?;
                }
            }
        }
        Ok(())
    }

    async fn verify(&mut self, recording: &Recording, state: &State) -> Result<(), Problem> {
        self.figures.states += 1;
        if state.is_kill && is_one_of(&mut self.random, self.samples.second.div_ceil(4)) {
            self.try_killed(recording, state).await?;
        }
        restore(self.place, recording, &state.disk);
        let second = is_one_of(&mut self.random, self.samples.second);
        let seed = self.random.u64(1..);
        let tape = Tape::new(&self.place.images, &self.place.state, seed);
        let cellar = self.place.cellar.with_extension("second");
        if second {
            let _ = fs::remove_dir_all(&cellar);
            fs::create_dir(&cellar).unwrap();
            tape.start(&cellar);
            self.recover_and_fail(&tape).await;
        }
        for report in recover_reporting(self.place, &tape).await? {
            match report.outcome {
                Outcome::RolledForward => self.figures.finished += 1,
                Outcome::Removed => self.figures.taken_back += 1,
                Outcome::Degraded => return Err(format!("the recovery says: {report:?}")),
            }
        }
        let (world, what) = observe(self.place, recording, state)?;
        if is_one_of(&mut self.random, self.samples.qemu) {
            self.ask_qemu(&world)?;
        }
        if second {
            let log = Recording::of(&tape, Vec::new(), recording.next);
            self.try_second(recording, state, &log).await?;
        }
        if is_one_of(&mut self.random, self.samples.written) {
            self.figures.written += 1;
            let written = self.go_on(world, recording.next).await;
            written.map_err(|problem| format!("{what}, and written to then: {problem}"))?;
        }
        Ok(())
    }

    /// Perhaps starts in which something fails that they ask of the host: the next one puts all right.
    async fn recover_and_fail(&mut self, tape: &Arc<Tape>) {
        for _ in 0..FAILING_STARTS {
            if self.random.u8(..100) >= self.samples.failing {
                break;
            }
            self.figures.failed += 1;
            let fault = [Fault::Io, Fault::NoSpace][self.random.usize(..2)];
            tape.fail(self.random.u64(..LONGEST_RECOVERY), fault);
            let _ = recover(self.place, tape).await;
            tape.no_fault();
        }
    }

    /// A process was killed; a power cut comes while the next one recovers. What the first one had not flushed is in the page cache alone
    /// until then.
    async fn try_killed(&mut self, recording: &Recording, state: &State) -> Result<(), Problem> {
        restore(self.place, recording, &state.disk);
        let tape = Tape::new(&self.place.images, &self.place.state, 0);
        let done = [0, 1].map(|folder| renamings(state.disk.numbered(folder)));
        tape.go_on(recording, done);
        self.recover_and_fail(&tape).await;
        recover(self.place, &tape).await?;
        let killed = recording.continued(state, &tape);
        let log = whole_sectors(&killed.base, &killed.log).map_err(text)?;
        let is_later = |epoch: &Epoch<'_>| epoch.ends_behind(state.completed);
        for again in self.draw_again(&killed, &log, is_later)? {
            let tried = self.recover_again(&killed, &again, (&killed, &again)).await;
            tried.map_err(|problem| {
                let problem = format!("a kill, and a power cut behind it: {problem}");
                describe(&killed, &again, &problem)
            })?;
        }
        Ok(())
    }

    /// Crashes while a state is recovered from.
    async fn try_second(
        &mut self,
        recording: &Recording,
        state: &State,
        second: &Recording,
    ) -> Result<(), Problem> {
        let log = whole_sectors(&second.base, &second.log).map_err(text)?;
        for again in self.draw_again(second, &log, |_| true)? {
            let tried = self.recover_again(second, &again, (recording, state)).await;
            let at = |problem| format!("a second crash, {}: {problem}", again.what);
            tried.map_err(at)?;
        }
        // As the first recovery has left it.
        let end = states_end(second, &log)?;
        restore(self.place, second, &end);
        Ok(())
    }

    /// A few of the states that a crash in a recovery, with this log, can leave.
    fn draw_again(
        &mut self,
        recovery: &Recording,
        log: &[Record],
        is_wanted: impl Fn(&Epoch<'_>) -> bool,
    ) -> Result<Vec<State>, Problem> {
        const STATES: usize = 8;
        let mut states = Vec::new();
        for epoch in epochs(&recovery.base, log).map_err(text)? {
            if !is_wanted(&epoch) {
                continue;
            }
            let choices = epoch.choices(Effort::default(), &mut self.random);
            for choice in choices.iter().take(STATES) {
                states.push(epoch.state(choice).map_err(text)?);
            }
        }
        self.random.shuffle(&mut states);
        states.truncate(STATES);
        Ok(states)
    }

    /// Starts once more behind a crash in a recovery; what is there then has to be right for a crash at `crash`.
    async fn recover_again(
        &mut self,
        recovery: &Recording,
        again: &State,
        crash: (&Recording, &State),
    ) -> Result<(), Problem> {
        self.figures.second += 1;
        restore(self.place, recovery, &again.disk);
        let tape = Tape::new(&self.place.images, &self.place.state, 0);
        self.recover_and_fail(&tape).await;
        recover(self.place, &tape).await?;
        observe(self.place, crash.0, crash.1).map(drop)
    }

    fn ask_qemu(&mut self, world: &World) -> Result<(), Problem> {
        for disk in &world.disks {
            for image in &disk.chain {
                let path = self.place.images.join(&image.file);
                // A sound image that is dirty, or has leaks, is repaired.
                let mut check = Command::new("qemu-img");
                check.args(["check", "-q", "-U", "-f", "qcow2", "--output=json"]);
                let Ok(output) = check.arg(&path).output() else {
                    return Ok(());
                };
                let text = String::from_utf8_lossy(&output.stdout).into_owned();
                if text.contains("\"corruptions\"") && !is_dirty(&fs::read(&path).unwrap()) {
                    return Err(format!("qemu-img check of {}: {text}", image.file));
                }
            }
        }
        self.figures.by_qemu += 1;
        Ok(())
    }

    /// A daemon opens what is there, guests write on, snapshots are taken, and everything is looked at again.
    async fn go_on(&mut self, world: World, next: u32) -> Result<(), Problem> {
        let seed = self.random.u64(1..);
        let tape = Tape::new(&self.place.images, &self.place.state, seed);
        let mut runner = Runner::resume(self.place, &tape, world, next).await?;
        for disk in 0..DISKS {
            let (_, is) = guests::split(runner.read(disk).await?)?;
            let wanted = &runner.world.disks[disk].top().content;
            if let Some(difference) = wanted.difference(&is) {
                return Err(format!("disk {disk} reads otherwise: {difference}"));
            }
        }
        let random = &mut self.random;
        for round in 0..2 {
            for disk in 0..DISKS {
                let at = 512 * random.u64(..DISK_BYTES / 512 - 40);
                let len = 512 * random.u64(1..40);
                runner.step(&Op::Write { disk, at, len }).await?;
            }
            if round == 0 {
                let acts = (0..DISKS).map(Act::Create).collect();
                runner.step(&Op::Transaction(acts)).await?;
            }
        }
        let world = runner.world.clone();
        runner.end().await?;
        for (number, disk) in world.disks.iter().enumerate() {
            let wanted = |level: usize| Versions::new([&*disk.chain[level].content]);
            look_at(self.place, number, disk, &wanted)?;
        }
        Ok(())
    }
}

/// The disks behind all of a log.
fn states_end(recording: &Recording, log: &[Record]) -> Result<Arc<Memory>, Problem> {
    let disk = recording.base.fork();
    for record in log {
        let done = disk.numbered(record.disk).apply(&record.change);
        done.map_err(text)?;
    }
    Ok(disk)
}

fn is_one_of(random: &mut fastrand::Rng, count: u32) -> bool {
    count > 0 && random.u32(..count) == 0
}

fn is_dirty(bytes: &[u8]) -> bool {
    Audit::new(bytes).is_ok_and(|audit| audit.is_dirty())
}

/// A start of the daemon, as far as transactions are concerned: how each has ended.
pub(super) async fn recover(place: &Place, tape: &Arc<Tape>) -> Result<Vec<Outcome>, Problem> {
    let reports = recover_reporting(place, tape).await?;
    Ok(reports.into_iter().map(|report| report.outcome).collect())
}

/// The same, with all that is reported.
async fn recover_reporting(place: &Place, tape: &Arc<Tape>) -> Result<Vec<Report>, Problem> {
    let io = IoContext::witnessed(tape.clone());
    let journal = Journal::open(&place.state, &io).map_err(|error| error.to_string())?;
    let recovered = journal::recover(&journal, &io).await;
    let mut reports = Vec::new();
    for recovered in recovered.map_err(|error| error.to_string())? {
        reports.push(recovered.report.clone());
        recovered.seen();
    }
    Ok(reports)
}

/// The last moment that had been answered, and the last that can have left a trace.
fn between(moments: &[Moment], state: &State) -> (usize, usize) {
    let answered = |moment: &Moment| moment.answered <= state.completed;
    let last = moments.iter().rposition(answered).unwrap_or(0);
    let begun = |moment: &Moment| moment.begun < state.reached;
    let begun = moments.iter().rposition(begun).unwrap_or(0);
    (last, begun.max(last))
}

/// What the folders hold, if it is something that they may hold.
fn observe(
    place: &Place,
    recording: &Recording,
    state: &State,
) -> Result<(World, String), Problem> {
    let moments = &recording.moments;
    let (last, begun) = between(moments, state);
    let mut problems = Vec::new();
    for candidate in (last..=begun).flat_map(|nth| candidates(moments, nth, last)) {
        let what = candidate.what;
        let observed = observe_as(place, &candidate.moments, last);
        let observed = observed.and_then(|(world, shown)| {
            let nth = candidate.moments.len() - 1;
            for (disk, (written, shown)) in recording.guests.iter().zip(shown).enumerate() {
                let back = recording.back(disk, nth, candidate.is_decided);
                check_guest(written, shown, (state, back))
                    .map_err(|problem| format!("disk {disk}: {problem}"))?;
            }
            Ok(world)
        });
        match observed {
            Ok(world) => return Ok((world, what)),
            Err(problem) => problems.push(format!("{what}: {problem}")),
        }
    }
    Err(problems.join("\n  or "))
}

/// What may have been last, with what was before it.
struct Candidate {
    what: String,
    moments: Vec<Moment>,
    /// It is what was decided, and then taken back.
    is_decided: bool,
}

/// A moment as what may have been last, and where that was not answered (`last` was), what it was in between.
fn candidates(moments: &[Moment], nth: usize, last: usize) -> Vec<Candidate> {
    let what = &moments[nth].what;
    let mut candidates = vec![Candidate {
        what: format!("behind {what}"),
        moments: moments[..=nth].to_vec(),
        is_decided: false,
    }];
    if let Some(passing) = moments[nth].passing.clone().filter(|_| nth > last) {
        let mut decided = moments[..=nth].to_vec();
        decided[nth].after = passing;
        candidates.push(Candidate {
            what: format!("decided: {what}"),
            moments: decided,
            is_decided: true,
        });
    }
    candidates
}

/// What the folders hold, if that is what the last of the moments leaves. Up to `answered` they had been answered.
///
/// Answers with it the byte of each disk's guest.
fn observe_as(
    place: &Place,
    moments: &[Moment],
    answered: usize,
) -> Result<(World, Vec<u8>), Problem> {
    let mut guests = Vec::new();
    let Some(last) = moments.last() else {
        return Err("no moment".to_owned());
    };
    let mut wanted = last.after.clone();
    let mut names: Vec<String> = fs::read_dir(&place.images)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    if names != wanted.names() {
        let wanted = wanted.names();
        return Err(format!("files {names:?} instead of {wanted:?}"));
    }
    if fs::read_dir(&place.state).unwrap().next().is_some() {
        return Err("a journal is left".to_owned());
    }
    for (number, disk) in wanted.disks.iter_mut().enumerate() {
        // What a guest wrote and did not flush may be there or not.
        let is_durable = |nth: &usize| {
            let moment = &moments[*nth];
            moment.at_once[number] || moment.durable[number] && *nth <= answered
        };
        let since = (0..moments.len()).rev().find(is_durable).unwrap_or(0);
        let versions = |level: usize| {
            let contents = moments[since..].iter().filter_map(|moment| {
                let disk = &moment.after.disks[number];
                Some(&*disk.chain.get(level).unwrap_or(disk.chain.last()?).content)
            });
            Versions::new(contents)
        };
        let shown;
        (*disk, shown) = look_at(place, number, disk, &versions)?;
        guests.push(shown);
    }
    for (name, other) in &wanted.others {
        let bytes = fs::read(place.images.join(name)).unwrap();
        match other {
            Other::Bytes(wanted) if bytes != *wanted => {
                return Err(format!("{name} is not what it was"));
            }
            Other::Target {
                content: Some(content),
            } => {
                let is = Audit::new(&bytes).and_then(|audit| audit.active());
                let is = is.and_then(|is| Ok(guests::split(is)?.1));
                let is = is.map_err(|problem| format!("{name}: {problem}"))?;
                if let Some(difference) = content.difference(&is) {
                    return Err(format!("the backup {name}: {difference}"));
                }
            }
            Other::Empty => {
                let is_empty = looks_empty(&bytes);
                is_empty.map_err(|problem| format!("{name}: {problem}"))?;
            }
            Other::Bytes(_) | Other::Target { content: None } => {}
        }
    }
    Ok((wanted, guests))
}

/// Whether a disk shows what its guest may find: all that a flush had covered since it has last gone back, or what a snapshot had.
fn check_guest(
    written: &[Written],
    shown: u8,
    (state, back): (&State, Option<&Back>),
) -> Result<(), Problem> {
    let (before, may, must) = back.map_or((0, 0, 0), |back| (back.before, back.may, back.must));
    let is_flushed = |write: &&Written| write.flushed.is_some_and(|at| at <= state.completed);
    let flushed = written.iter().skip(must).rfind(is_flushed);
    let flushed = flushed.map_or(0, |write| write.byte);
    let sent = written.iter().rfind(|write| write.begun < state.reached);
    let sent = sent.map_or(0, |write| write.byte);
    // The first write is that of a 1.
    let is_since = usize::from(shown) > may || usize::from(shown) <= before;
    match (flushed..=sent).contains(&shown) && is_since {
        true => Ok(()),
        false => Err(format!(
            "its guest finds {shown}, had {flushed} durable, and had sent {sent}"
        )),
    }
}

/// Whether an image is sound, shows nothing of its own and has no snapshots.
fn looks_empty(bytes: &[u8]) -> Result<(), Problem> {
    let audit = Audit::new(bytes)?;
    let dangers = audit.verdict()?.dangers;
    if !dangers.is_empty() || !audit.snapshots().is_empty() {
        let names = audit.snapshots().len();
        return Err(format!("{names} snapshots, {}", dangers.join(", ")));
    }
    let nothing = Content::new(DISK_BYTES);
    nothing.difference(&audit.active()?).map_or(Ok(()), Err)
}

/// Looks at all images of a disk: they are sound, and hold what they must. Answers what exactly they hold, and the byte of the disk's
/// guest. `versions` says what an image of the chain may show.
fn look_at(
    place: &Place,
    number: usize,
    disk: &Disk,
    versions: &dyn Fn(usize) -> Versions,
) -> Result<(Disk, u8), Problem> {
    let mut chain: Vec<Image> = Vec::new();
    let (mut below, mut guest) = (None, 0);
    for (level, image) in disk.chain.iter().enumerate() {
        let at = |problem: Problem| format!("disk {number}, {}: {problem}", image.file);
        let bytes = fs::read(place.images.join(&image.file)).unwrap();
        let audit = Audit::new(&bytes).map_err(at)?.over(below.as_ref());
        let verdict = audit.verdict().map_err(at)?;
        if !verdict.dangers.is_empty() {
            return Err(at(verdict.dangers.join("\n  ")));
        }
        let snapshots = snapshots(&audit, &image.snapshots).map_err(at)?;
        let whole = audit.active().map_err(at)?;
        let content;
        (guest, content) = guests::split(whole.clone()).map_err(at)?;
        if let Some(violation) = versions(level).violation(&content) {
            return Err(at(violation));
        }
        let empty = Content::new(DISK_BYTES);
        bitmaps_differ(&image.bitmaps, &empty, &audit, &whole).map_err(at)?;
        chain.push(Image {
            file: image.file.clone(),
            snapshots,
            content: Arc::new(content),
            bitmaps: image.bitmaps.clone(),
        });
        below = Some(whole);
    }
    Ok((Disk { chain }, guest))
}

/// Whether an image has the snapshots that it must have, in their order.
fn snapshots(audit: &Audit<'_>, wanted: &[Snapshot]) -> Result<Vec<Snapshot>, Problem> {
    let mut found = Vec::new();
    for snapshot in audit.snapshots() {
        if !snapshot.name.starts_with(TEMPORARY) {
            let (_, content) = guests::split(audit.content(snapshot)?)?;
            found.push(Snapshot {
                name: snapshot.name.clone(),
                content: Arc::new(content),
            });
        }
    }
    let names = |list: &[Snapshot]| -> Vec<String> {
        list.iter().map(|snapshot| snapshot.name.clone()).collect()
    };
    if names(&found) != names(wanted) {
        let (found, wanted) = (names(&found), names(wanted));
        return Err(format!("snapshots {found:?} instead of {wanted:?}"));
    }
    for (wanted, is) in wanted.iter().zip(&found) {
        if let Some(difference) = wanted.content.difference(&is.content) {
            return Err(format!("snapshot {}: {difference}", wanted.name));
        }
    }
    Ok(found)
}

fn describe(recording: &Recording, state: &State, problem: &str) -> Problem {
    let (last, begun) = between(&recording.moments, state);
    let what = |nth: usize| recording.moments[nth].what.clone();
    let (last, begun) = (what(last), what(begun));
    let mut records = String::new();
    for (number, record) in recording.log.iter().enumerate() {
        records.push_str(&format!("\n  {number}: {}", recording.explain(record)));
    }
    format!(
        "{}\n  {problem}\n  behind {last}, at the latest in {begun}{records}",
        state.what
    )
}

fn text(error: block::error::Error) -> Problem {
    error.to_string()
}
