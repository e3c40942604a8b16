//! New options for open nodes, compared with those that they were opened with.
//!
//! Options that are left out go back to their defaults. What cannot be changed while a node is open must be as it was. Layers that
//! are given by options are changed with the node if they came along with it.

use std::sync::Arc;

use super::options::{
    Aio, BackingOption, DriverOptions, FileOptions, NodeOptions, NodeRef, NullOptions,
    Qcow2Options, RawOptions,
};
use super::{behaviour, caches, inherited, invalid};
use crate::driver::DriverSettings;
use crate::error::{Error, ErrorKind, Result};
use crate::graph::{Graph, Node, NodeChange};
use crate::open::DiscardMode;

/// What is to become of the nodes that these options are for.
///
/// Refused is what cannot be changed, with QEMU's sentences; what others do to the nodes is looked at by [`Graph::reopen`].
pub fn changes(graph: &Graph, wanted: &[NodeOptions]) -> Result<Vec<NodeChange>> {
    let mut nodes = Vec::with_capacity(wanted.len());
    for options in wanted {
        let Some(name) = &options.node_name else {
            return Err(invalid("node-name not specified".to_owned()));
        };
        let node = graph.node(name).cloned();
        nodes.push(node.ok_or_else(|| {
            Error::new(
                ErrorKind::NotFound,
                format!("Failed to find node with node-name='{name}'"),
            )
        })?);
    }
    let mut plan = Plan {
        graph,
        changes: Vec::new(),
    };
    for (node, options) in nodes.iter().zip(wanted) {
        plan.node(node, &Arc::new(options.clone()), None)?;
    }
    Ok(plan.changes)
}

struct Plan<'a> {
    graph: &'a Graph,
    changes: Vec<NodeChange>,
}

impl Plan<'_> {
    /// Adds what becomes of a node, and of what came along with it. `parent` is what it inherits from.
    fn node(
        &mut self,
        node: &Arc<Node>,
        wanted: &Arc<NodeOptions>,
        parent: Option<&NodeOptions>,
    ) -> Result<()> {
        let Some(old) = node.options() else {
            return Err(Error::new(
                ErrorKind::Unsupported,
                format!(
                    "Block format '{}' used by node '{}' does not support reopening files",
                    node.driver().info().driver,
                    node.name()
                ),
            ));
        };
        if wanted
            .node_name
            .as_ref()
            .is_some_and(|name| name != node.name())
        {
            return Err(changed("node-name"));
        }
        check_driver(node, &wanted.driver)?;
        let effective = match parent {
            Some(parent) => inherited(wanted, parent),
            None => NodeOptions::clone(wanted),
        };
        let mut change = NodeChange {
            settings: None,
            options: Some(wanted.clone()),
            ..NodeChange::read_only(node, read_only(node, &effective))
        };
        let writethrough = change.behaviour.cache.writethrough;
        change.behaviour = behaviour(&effective, change.behaviour.read_only)?;
        change.behaviour.cache.writethrough = writethrough;
        match (&old.driver, &wanted.driver) {
            (
                DriverOptions::File(old) | DriverOptions::HostDevice(old),
                DriverOptions::File(new) | DriverOptions::HostDevice(new),
            ) => {
                check_file(old, new)?;
                change.settings = Some(DriverSettings::File {
                    auto_read_only: effective.auto_read_only,
                });
            }
            (DriverOptions::Null(old), DriverOptions::Null(new)) => check_null(old, new)?,
            (_, DriverOptions::Raw(raw)) => self.raw(raw, &old, &effective, &mut change)?,
            (_, DriverOptions::Qcow2(qcow2)) => self.qcow2(qcow2, &old, &effective, &mut change)?,
            // A disk whose format is probed is asked for on the command line only.
            (_, _) => return Err(changed("driver")),
        }
        let is_given = |other: &NodeChange| Arc::ptr_eq(&other.node, node);
        if self.changes.iter().any(is_given) {
            return Err(invalid(format!(
                "Node '{}' is given more than once",
                node.name()
            )));
        }
        self.changes.push(change);
        Ok(())
    }

    fn raw(
        &mut self,
        raw: &RawOptions,
        old: &NodeOptions,
        effective: &NodeOptions,
        change: &mut NodeChange,
    ) -> Result<()> {
        let RawOptions { file, offset, size } = raw;
        self.layer("file", file, effective, change)?;
        let before = match &old.driver {
            DriverOptions::Raw(old) => (old.offset.unwrap_or(0), old.size),
            _ => (0, None),
        };
        let (offset, size) = (offset.unwrap_or(0), *size);
        if (offset, size) != before {
            change.settings = Some(DriverSettings::Raw { offset, size });
        }
        Ok(())
    }

    fn qcow2(
        &mut self,
        qcow2: &Qcow2Options,
        old: &NodeOptions,
        effective: &NodeOptions,
        change: &mut NodeChange,
    ) -> Result<()> {
        let before = match &old.driver {
            DriverOptions::Qcow2(old) => Some(old),
            _ => None,
        };
        let shown = |options: &Qcow2Options| options.snapshot.clone();
        if shown(qcow2) != before.and_then(shown) {
            return Err(match qcow2.snapshot {
                None => left_out("x-snapshot"),
                Some(_) => changed("x-snapshot"),
            });
        }
        if qcow2.snapshot.is_some() {
            return match before == Some(qcow2) {
                true => Ok(()),
                false => Err(invalid(format!(
                    "Node '{}' shows a snapshot: its layers and its driver's options stay as they are",
                    change.node.name()
                ))),
            };
        }
        self.layer("file", &qcow2.file, effective, change)?;
        self.data_file(qcow2.data_file.as_ref(), effective, &change.node)?;
        self.backing(&qcow2.backing, effective, change)?;
        let cluster_size = change.node.driver().info().cluster_size;
        caches::check_entry(qcow2.cache.l2_entry, cluster_size.unwrap_or(0))?;
        let settings = settings(qcow2, effective.discard)?;
        let unmaps = change.node.behaviour().discard;
        if before.map(|old| settings_of(old, unmaps)) != Some(Some(settings)) {
            change.settings = Some(settings);
        }
        Ok(())
    }

    fn backing(
        &mut self,
        backing: &BackingOption,
        effective: &NodeOptions,
        change: &mut NodeChange,
    ) -> Result<()> {
        let node = change.node.clone();
        let present = node.link("backing");
        match backing {
            BackingOption::FromImage(_) => {
                if present.is_none() && node.driver().info().backing_filename.is_none() {
                    return Ok(());
                }
                Err(invalid(format!("backing is missing for '{}'", node.name())))
            }
            BackingOption::Detached => {
                if present.is_some() {
                    self.check_no_views(&node)?;
                    change.layers.push(("backing", None));
                }
                Ok(())
            }
            BackingOption::Node(below) | BackingOption::Written(below) => {
                if present.is_none() {
                    node.driver().check_backing()?;
                }
                // A backing is read, whatever is done to what stands on it.
                let effective = NodeOptions {
                    read_only: true,
                    auto_read_only: false,
                    ..effective.clone()
                };
                self.layer("backing", below, &effective, change)
            }
        }
    }

    /// A snapshot that is shown keeps what it shows, the backing of its image included.
    fn check_no_views(&self, node: &Arc<Node>) -> Result<()> {
        let mut views = self.graph.views(node);
        match views.next() {
            None => Ok(()),
            Some(view) => Err(Error::new(
                ErrorKind::InUse,
                format!(
                    "Node '{}' shows a snapshot of '{}', which needs the backing",
                    view.name(),
                    node.name()
                ),
            )),
        }
    }

    fn data_file(
        &mut self,
        wanted: Option<&NodeRef>,
        effective: &NodeOptions,
        node: &Arc<Node>,
    ) -> Result<()> {
        let present = node.link("data-file");
        match (wanted, present) {
            (None, _) => Ok(()),
            (Some(NodeRef::Name(name)), Some(present)) if present.name() == name => Ok(()),
            (Some(NodeRef::Inline(options)), Some(present)) if self.came_along(&present) => {
                self.node(&present, options, Some(effective))
            }
            (Some(_), _) => Err(changed("data-file")),
        }
    }

    /// A layer by name takes the place of the present one; one by options is that with other options.
    fn layer(
        &mut self,
        role: &'static str,
        wanted: &NodeRef,
        effective: &NodeOptions,
        change: &mut NodeChange,
    ) -> Result<()> {
        let present = change.node.link(role);
        match wanted {
            NodeRef::Name(name) => {
                let drive = || self.graph.drive(name).and_then(|drive| drive.node());
                let below = self.graph.node(name).cloned().or_else(drive);
                let below = below.ok_or_else(|| {
                    Error::new(
                        ErrorKind::NotFound,
                        format!("Cannot find device='' nor node-name='{name}'"),
                    )
                })?;
                let is_new = present.is_none_or(|present| !Arc::ptr_eq(&present, &below));
                if is_new {
                    change.layers.push((role, Some(below)));
                }
                Ok(())
            }
            NodeRef::Inline(options) => match present {
                Some(present) if self.came_along(&present) => {
                    self.node(&present, options, Some(effective))
                }
                _ => Err(changed(&format!("{role}.driver"))),
            },
        }
    }

    fn came_along(&self, node: &Arc<Node>) -> bool {
        !self.graph.is_owned(node)
    }
}

/// As asked, or as it is where the user leaves it to the node.
fn read_only(node: &Node, options: &NodeOptions) -> bool {
    let may_stay = options.auto_read_only && node.behaviour().read_only;
    options.read_only || may_stay
}

fn settings(qcow2: &Qcow2Options, discard: DiscardMode) -> Result<DriverSettings> {
    let cache = caches::share(&qcow2.cache)?;
    let unmaps = discard == DiscardMode::Unmap;
    Ok(DriverSettings::Qcow2 {
        pass_discard: qcow2.pass_discard_request.unwrap_or(unmaps),
        pass_discard_snapshot: qcow2.pass_discard_snapshot.unwrap_or(unmaps),
        l2_cache_bytes: cache.l2_bytes,
        refcount_cache_bytes: cache.refcount_bytes,
    })
}

fn settings_of(old: &Qcow2Options, discard: DiscardMode) -> Option<DriverSettings> {
    settings(old, discard).ok()
}

fn check_driver(node: &Node, wanted: &DriverOptions) -> Result<()> {
    let present = node.driver().info().driver;
    let same = match wanted {
        // 'file' opens devices too.
        DriverOptions::File(_) => matches!(present, "file" | "host_device"),
        DriverOptions::HostDevice(_) => present == "host_device",
        DriverOptions::Null(_) => present == "null-co",
        DriverOptions::Raw(_) => present == "raw",
        DriverOptions::Qcow2(_) => present == "qcow2",
        DriverOptions::Probed(_) => false,
    };
    match same {
        true => Ok(()),
        false => Err(changed("driver")),
    }
}

fn check_file(old: &FileOptions, new: &FileOptions) -> Result<()> {
    if old.filename != new.filename {
        return Err(changed("filename"));
    }
    if old.locking != new.locking {
        return Err(changed("locking"));
    }
    match (old.aio, new.aio) {
        (old, new) if old == new => Ok(()),
        (_, new) if new == Aio::default() => Err(left_out("aio")),
        _ => Err(changed("aio")),
    }
}

fn check_null(old: &NullOptions, new: &NullOptions) -> Result<()> {
    let default = NullOptions::default();
    let same = |name, is_same: bool, is_default: bool| match (is_same, is_default) {
        (true, _) => Ok(()),
        (false, true) => Err(left_out(name)),
        (false, false) => Err(changed(name)),
    };
    let NullOptions {
        size,
        latency_ns,
        read_zeroes,
    } = *new;
    same("size", size == old.size, size == default.size)?;
    let is_default = latency_ns == default.latency_ns;
    same("latency-ns", latency_ns == old.latency_ns, is_default)?;
    let is_default = read_zeroes == default.read_zeroes;
    same("read-zeroes", read_zeroes == old.read_zeroes, is_default)
}

fn changed(option: &str) -> Error {
    invalid(format!("Cannot change the option '{option}'"))
}

/// An option that is not given goes back to its default, if it can change at all.
fn left_out(option: &str) -> Error {
    invalid(format!(
        "Option '{option}' cannot be reset to its default value"
    ))
}
