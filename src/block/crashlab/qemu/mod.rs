//! QEMU's tools as another oracle: they repair a state, read every layer of it, and write.

pub mod daemon;
pub mod write_log;

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::audit::Audit;
use super::base::BASE_FILE;
use super::content::{Content, stamp};
use super::run::{Problem, World};
use super::script::{Case, DATA_FILE};
use crate::driver::Requests;
use crate::protocols::memory::Memory;

/// Folders of one process are told apart by a number.
static NEXT: AtomicU64 = AtomicU64::new(0);

/// A folder for image files, and the tools. The folder goes when this is dropped.
#[derive(Debug)]
pub struct Qemu {
    dir: PathBuf,
}

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

impl Qemu {
    /// The tools, if they are installed.
    pub fn find() -> Option<Qemu> {
        for tool in ["qemu-img", "qemu-io"] {
            Command::new(tool).arg("--version").output().ok()?;
        }
        // In memory where that exists: the images are small and many.
        let shm = Path::new("/dev/shm");
        let parent = match shm.is_dir() {
            true => shm.to_owned(),
            false => std::env::temp_dir(),
        };
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let dir = parent.join(format!("crashlab-{}-{number}", std::process::id()));
        std::fs::create_dir(&dir).ok()?;
        Some(Qemu { dir })
    }

    /// A path in the folder.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// Runs a tool where it finds the data file of an image: names of those count from where it runs.
    fn run(&self, tool: &str, args: &[&str], good: &[i32]) -> Result<Output, Problem> {
        run_in(&self.dir, tool, args, good)
    }

    /// Repairs a copy of an image, reads all its layers, writes to it and reads again.
    pub fn verify(
        &mut self,
        (bytes, data): (&[u8], Option<&Arc<Memory>>),
        world: &World,
        case: &Case,
        random: &mut fastrand::Rng,
    ) -> Result<(), Problem> {
        let path = self.path("state.qcow2");
        std::fs::write(&path, bytes).map_err(|error| error.to_string())?;
        if let Some(data) = data {
            save_sparse(data, &self.path(DATA_FILE)).map_err(|error| error.to_string())?;
        }
        if let Some(base) = &case.base {
            let path = self.path(BASE_FILE);
            save_sparse(base.disk(), &path).map_err(|error| error.to_string())?;
        }
        let file = path.to_string_lossy().into_owned();
        match case.bitmaps {
            false => {
                let repair = ["check", "-q", "-f", "qcow2", "-r", "all", &file];
                self.run("qemu-img", &repair, &[0])?;
            }
            // It would lose the snapshots of an image with bitmaps (10.0.2 does). An open repairs what is dirty.
            true => drop(qemu_io(&file, &["flush".to_owned()])?),
        }
        self.compare(&file, world, case)?;
        let mut world = world.clone();
        let mut commands = Vec::new();
        for window in &case.windows {
            let end = window.end.min(world.active.size());
            if window.start >= end {
                continue;
            }
            let at = random.u64(window.start..end) & !511;
            let len = (random.u64(1..=end - at))
                .next_multiple_of(512)
                .min(end - at);
            let number = random.u32(1 << 30..);
            let data = self.path("data");
            std::fs::write(&data, stamp(at, len, number)).map_err(|error| error.to_string())?;
            commands.push(format!("write -s {} {at} {len}", data.display()));
            let active = std::sync::Arc::make_mut(&mut world.active);
            active.write(at, &stamp(at, len, number));
            qemu_io(&file, &commands)?;
            commands.clear();
        }
        self.compare(&file, &world, case)
            .map_err(|problem| format!("after writes: {problem}"))?;
        // Counters behind the end of the file have become leaks where it has grown. What was not dirty was not repaired with bitmaps.
        let good: &[i32] = if case.bitmaps { &[0, 2, 3] } else { &[0, 3] };
        let check = ["check", "-q", "-f", "qcow2", &file];
        self.run("qemu-img", &check, good).map(|_| ())
    }

    /// Compares all layers as qemu-img and as the auditor read them.
    pub fn compare(&self, file: &str, world: &World, case: &Case) -> Result<(), Problem> {
        let bytes = std::fs::read(file).map_err(|error| error.to_string())?;
        let data = match Audit::new(&bytes)?.has_data_file() {
            true => Some(std::fs::read(self.path(DATA_FILE)).map_err(|error| error.to_string())?),
            false => None,
        };
        let data = data.map(|data| Memory::with_content(&data));
        let audit = case.audit(&bytes, data.as_ref())?;
        let active = audit.active()?;
        audit.check_raw(&active)?;
        let difference = world.active.difference(&active);
        difference.map_or(Ok(()), Err)?;
        let size = world.active.size();
        self.compare_layer(file, None, &world.active, size)?;
        for (snapshot, is) in world.snapshots.iter().zip(audit.snapshots()) {
            let difference = snapshot.content.difference(&audit.content(is)?);
            difference.map_or(Ok(()), |problem| {
                Err(format!("snapshot {}: {problem}", snapshot.name))
            })?;
            self.compare_layer(file, Some(&snapshot.id), &snapshot.content, size)?;
        }
        match audit.snapshots().len() == world.snapshots.len() {
            true => Ok(()),
            false => Err(format!("{} snapshots", audit.snapshots().len())),
        }
    }

    fn compare_layer(
        &self,
        file: &str,
        snapshot: Option<&str>,
        wanted: &Content,
        active_size: u64,
    ) -> Result<(), Problem> {
        let raw = self.path("layer.raw");
        let raw = raw.to_string_lossy().into_owned();
        let selector = snapshot.map(|id| format!("snapshot.id={id}"));
        let mut args = vec!["convert", "-f", "qcow2", "-O", "raw"];
        if let Some(selector) = &selector {
            args.extend(["-l", selector]);
        }
        args.extend([file, &raw]);
        self.run("qemu-img", &args, &[0])?;
        // qemu-img gives every snapshot the size of the active layer.
        let mut wanted = wanted.clone();
        wanted.resize(wanted.size().min(active_size));
        let is = std::fs::File::open(&raw).map_err(|error| error.to_string())?;
        let content = read_sparse(&is, wanted.size()).map_err(|error| error.to_string())?;
        match wanted.difference(&content) {
            Some(problem) => Err(format!("qemu-img reads of {selector:?}: {problem}")),
            None => Ok(()),
        }
    }
}

/// Writes a disk to a file, with holes where it is zero.
fn save_sparse(disk: &Memory, path: &Path) -> std::io::Result<()> {
    use std::os::unix::fs::FileExt;
    const PIECE: u64 = 64 << 10;
    let file = std::fs::File::create(path)?;
    let size = disk.size();
    file.set_len(size)?;
    for at in (0..size).step_by(PIECE as usize) {
        let piece = disk.peek(at, PIECE.min(size - at));
        if !piece.is_known_zero() {
            file.write_all_at(&piece.to_bytes(), at)?;
        }
    }
    Ok(())
}

/// The content of a raw file, cut or filled up to `size`.
fn read_sparse(file: &std::fs::File, size: u64) -> std::io::Result<Content> {
    use std::os::unix::fs::FileExt;
    let mut content = Content::new(size);
    let mut at = 0;
    let end = file.metadata()?.len().min(size);
    while let Ok(data) = rustix::fs::seek(file, rustix::fs::SeekFrom::Data(at)) {
        let hole = rustix::fs::seek(file, rustix::fs::SeekFrom::Hole(data)).unwrap_or(end);
        let (from, to) = (data.min(end), hole.min(end));
        let mut bytes = vec![0; (to - from) as usize];
        file.read_exact_at(&mut bytes, from)?;
        content.write(from, &bytes);
        at = hole;
        if at >= end {
            break;
        }
    }
    Ok(content)
}

/// Runs qemu-io's commands on a qcow2 image.
pub fn qemu_io(file: &str, commands: &[String]) -> Result<String, Problem> {
    let mut args = vec!["-f", "qcow2"];
    for command in commands {
        args.extend(["-c", command.as_str()]);
    }
    args.push(file);
    let dir = Path::new(file).parent().unwrap_or(Path::new("."));
    let output = run_in(dir, "qemu-io", &args, &[0])?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    match text.contains("failed") {
        true => Err(text),
        false => Ok(text),
    }
}

/// Runs a tool; other exit codes than `good` are problems.
pub fn run(tool: &str, args: &[&str], good: &[i32]) -> Result<Output, Problem> {
    run_in(Path::new("."), tool, args, good)
}

fn run_in(dir: &Path, tool: &str, args: &[&str], good: &[i32]) -> Result<Output, Problem> {
    let output = Command::new(tool)
        .args(args)
        .current_dir(dir)
        .output()
        .map_err(|error| format!("{tool}: {error}"))?;
    match output
        .status
        .code()
        .is_some_and(|code| good.contains(&code))
    {
        true => Ok(output),
        false => Err(format!(
            "{tool} {}: {}{}",
            args.join(" "),
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        )),
    }
}
