//! Snapshots taken, deleted, reverted to and read while the guest writes, and what is known of each when the server ends.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use serde_json::{Value, json};

use super::super::harness::Qmp;
use super::load::{self, Clock, NEVER, Shared, Window, lock};

/// Snapshots that are kept at a time.
const KEPT: usize = 4;

/// A snapshot whose creation was asked for.
#[derive(Debug, Clone)]
pub(super) struct Snapshot {
    /// When it was taken.
    pub(super) window: Window,
    pub(super) deletion_answered: bool,
    /// Its content, once it has been seen.
    pub(super) content: Option<Vec<u8>>,
    /// Its content was compared with what it may be.
    pub(super) is_checked: bool,
}

pub(super) type Snapshots = BTreeMap<String, Snapshot>;

/// What one command does, all of it or nothing.
#[derive(Debug, Clone, Default)]
pub(super) struct Asked {
    pub(super) created: Option<String>,
    pub(super) deleted: Option<String>,
    /// The time at which it was sent.
    pub(super) reverted: Option<u64>,
}

/// A client that works on the snapshots of the drive `disk`.
pub(super) struct Churn<'a> {
    pub(super) qmp: Qmp,
    pub(super) socket: PathBuf,
    pub(super) clock: &'a Clock,
    pub(super) stop: &'a AtomicBool,
    pub(super) random: fastrand::Rng,
    pub(super) histories: &'a [Shared],
    pub(super) snapshots: &'a mut Snapshots,
    /// The command whose answer has not come.
    pub(super) asked: &'a mut Option<Asked>,
    pub(super) done: Done,
}

/// What was answered.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Done {
    pub(super) operations: usize,
    /// Snapshots that were read while the disk was written.
    pub(super) views: usize,
}

impl Churn<'_> {
    /// Runs until the server ends or it is told to; answers what was acknowledged.
    pub(super) fn run(mut self) -> Done {
        while !self.stop.load(Ordering::Relaxed) && self.step().is_some() {
            std::thread::sleep(Duration::from_millis(self.random.u64(0..10)));
        }
        self.done
    }

    /// One command; nothing if the server ended before it answered.
    fn step(&mut self) -> Option<()> {
        let kept = self.snapshots.iter();
        let kept = kept.filter(|(_, snapshot)| !snapshot.deletion_answered);
        let kept: Vec<String> = kept.map(|(name, _)| name.clone()).collect();
        let Some(some) = self.random.choice(&kept).cloned() else {
            return self.operate(true, None, None);
        };
        match self.random.u8(..8) {
            _ if kept.len() >= KEPT => {
                let replace = self.random.bool();
                self.operate(replace, Some(some), None)
            }
            0 => self.operate(false, None, Some(some)),
            1 => self.operate(true, None, Some(some)),
            2 => self.operate(true, Some(some.clone()), Some(some)),
            3 => self.see(&some).map(drop),
            _ => self.operate(true, None, None),
        }
    }

    /// Takes a snapshot, reverts, and deletes one, in this order and as far as asked for.
    fn operate(
        &mut self,
        create: bool,
        delete: Option<String>,
        revert: Option<String>,
    ) -> Option<()> {
        // What a revert leads to must be known: that of earlier rounds is.
        let content = match &revert {
            None => None,
            Some(name) => match self.snapshots[name].content.clone() {
                None => Some(self.see(name)?),
                seen => seen,
            },
        };
        let asked = self.clock.tick();
        let mut actions = Vec::new();
        let created = create.then(|| format!("s{asked}"));
        if let Some(name) = &created {
            actions.push(action("blockdev-snapshot-internal-sync", name));
        }
        let sent = content.map(|content| self.send_revert(&content));
        actions.extend(revert.map(|name| action("x-blockdev-snapshot-revert", &name)));
        if let Some(name) = &delete {
            actions.push(action("x-blockdev-snapshot-delete-internal-sync", name));
        }
        if let Some(name) = &created {
            let window = Window {
                from: asked,
                to: NEVER,
                before: sent,
            };
            let snapshot = Snapshot {
                window,
                deletion_answered: false,
                content: None,
                is_checked: false,
            };
            self.snapshots.insert(name.clone(), snapshot);
        }
        *self.asked = Some(Asked {
            created: created.clone(),
            deleted: delete.clone(),
            reverted: sent,
        });
        let count = actions.len();
        let done = self.command(actions)?;
        let now = self.clock.tick();
        *self.asked = None;
        self.done.operations += if done { count } else { 0 };
        for history in sent.iter().flat_map(|_| self.histories) {
            let sent = sent.unwrap_or_default();
            match done {
                true => lock(history).reverted(sent, now),
                false => lock(history).not_reverted(sent),
            }
        }
        if let Some(name) = created {
            match done {
                true => self.snapshots.get_mut(&name)?.window.to = now,
                false => drop(self.snapshots.remove(&name)),
            }
        }
        if let Some(name) = delete.filter(|_| done) {
            // Kept until it is seen that it is gone.
            self.snapshots.get_mut(&name)?.deletion_answered = true;
        }
        Some(())
    }

    /// Runs actions as one: whether they were done.
    fn command(&mut self, mut actions: Vec<Value>) -> Option<bool> {
        if actions.len() > 1 || self.random.bool() {
            return self.execute("transaction", json!({"actions": actions}));
        }
        let action = actions.remove(0);
        let command = action["type"].as_str().expect("an action's type");
        let command = match command {
            "x-blockdev-snapshot-delete-internal-sync" => "blockdev-snapshot-delete-internal-sync",
            same => same,
        };
        self.execute(command, action["data"].clone())
    }

    /// Reads a snapshot over NBD through a node of its own, which keeps it from being deleted.
    fn see(&mut self, name: &str) -> Option<Vec<u8>> {
        let node =
            json!({"driver": "qcow2", "node-name": "view", "x-snapshot": name, "file": "disk"});
        let export = json!({"type": "nbd", "id": "view", "node-name": "view"});
        self.must("blockdev-add", node)?;
        self.must("block-export-add", export)?;
        let content = match load::read(&self.socket, "view") {
            Ok(content) => content,
            Err(error) => {
                let reply = self.qmp.try_execute("query-status", json!({}));
                let is_end = reply.is_none_or(|reply| is_end(&reply));
                assert!(is_end, "reading {name}: {error}");
                return None;
            }
        };
        if self.random.bool() {
            self.is_not_deleted(name)?;
        }
        self.must("block-export-del", json!({"id": "view", "mode": "hard"}))?;
        self.remove_view()?;
        self.done.views += 1;
        let snapshot = self.snapshots.get_mut(name)?;
        if let Some(seen) = &snapshot.content {
            assert!(*seen == content, "{name} has changed");
        }
        if !snapshot.is_checked {
            let parts = content.chunks(content.len() / self.histories.len());
            for (history, part) in self.histories.iter().zip(parts) {
                let checked = lock(history).check(part, snapshot.window);
                checked.unwrap_or_else(|complaint| panic!("{name}: {complaint}"));
            }
        }
        snapshot.is_checked = true;
        snapshot.content = Some(content.clone());
        Some(content)
    }

    /// A snapshot that is shown stays.
    fn is_not_deleted(&mut self, name: &str) -> Option<()> {
        let which = json!({"device": "disk", "name": name});
        let command = "blockdev-snapshot-delete-internal-sync";
        let reply = self.qmp.try_execute(command, which)?;
        let text = reply["error"]["desc"].as_str().unwrap_or_default();
        let is_shown = text.ends_with("node 'view' shows it");
        assert!(is_shown || is_end(&reply), "{reply}");
        is_shown.then_some(())
    }

    /// Removes the node, as soon as its export is gone.
    fn remove_view(&mut self) -> Option<()> {
        loop {
            let which = json!({"node-name": "view"});
            let reply = self.qmp.try_execute("blockdev-del", which)?;
            match reply["error"]["desc"].as_str() {
                None => return Some(()),
                Some(text) if text.contains("in use") => {
                    std::thread::sleep(Duration::from_millis(1));
                }
                Some(_) => {
                    assert!(is_end(&reply), "{reply}");
                    return None;
                }
            }
        }
    }

    /// Writes down that a revert to this content is sent, and when.
    fn send_revert(&mut self, content: &[u8]) -> u64 {
        let sent = self.clock.tick();
        let parts = content.chunks(content.len() / self.histories.len());
        for (history, part) in self.histories.iter().zip(parts) {
            lock(history).revert(part, sent);
        }
        sent
    }

    /// Whether a command has been carried out; it is refused at the end only.
    fn execute(&mut self, command: &str, arguments: Value) -> Option<bool> {
        let reply = self.qmp.try_execute(command, arguments)?;
        let done = reply.get("return").is_some();
        assert!(done || is_end(&reply), "{command}: {reply}");
        Some(done)
    }

    /// Carries out a command; nothing if the end came first.
    fn must(&mut self, command: &str, arguments: Value) -> Option<()> {
        self.execute(command, arguments)?.then_some(())
    }
}

fn action(kind: &str, name: &str) -> Value {
    json!({"type": kind, "data": {"device": "disk", "name": name}})
}

fn is_end(reply: &Value) -> bool {
    reply["error"]["desc"] == "The daemon is shutting down"
}
