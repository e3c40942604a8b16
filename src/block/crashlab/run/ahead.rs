//! Changes of snapshots that go ahead: a guest goes on with the disk of before until behind the switch.

use std::sync::Arc;

use super::{Kind, Moment, Problem, Runner, World, text};
use crate::crashlab::content::Content;
use crate::crashlab::script::{End, Op, Step};
use crate::driver::{Requests as _, SnapshotChange, Snapshots as _};

impl Runner {
    /// Stages a change and switches the header while a guest goes on: what it does until the disk follows is gone where the steps revert,
    /// and all there where the change is taken back. The operations of the guest are moments of their own as long as they show.
    pub(super) async fn ahead(
        &mut self,
        steps: &[Step],
        ops: &[Op],
        end: End,
    ) -> Result<(), Problem> {
        let driver = self.driver.clone();
        let mut change = match driver.change().await {
            Ok(change) => change,
            Err(error) => return self.refused(&error).map(drop),
        };
        if !change.go_ahead().await.map_err(text)? {
            drop(change);
            return self.step(&Op::Change(steps.to_vec(), end)).await;
        }
        let (early, late) = ops.split_at(ops.len().div_ceil(2));
        let (earliest, early) = early.split_at(early.len() / 2);
        let (mut world, kind) = self.stage(&mut *change, steps).await?;
        for op in earliest {
            self.step(op).await?;
        }
        change.prepare().await.map_err(text)?;
        let mut since = vec![self.world.active.clone()];
        for op in early {
            self.step(op).await?;
            since.push(self.world.active.clone());
        }
        if end == End::Drop {
            drop(change);
            return self.compare_list();
        }
        self.switch(&mut *change, &world, (kind, since)).await?;
        for op in late {
            match kind {
                // It shows when the change is taken back, if at all.
                Kind::Everything => drop(self.execute(op).await?),
                _ => self.step_behind(op, &world).await?,
            }
        }
        if kind != Kind::Everything {
            world.active = self.world.active.clone();
        }
        if end == End::RollBack {
            return self
                .take_back(change, kind, ops.len().is_multiple_of(2))
                .await;
        }
        change.hold().await.map_err(text)?;
        drop(change.finish());
        self.world = world;
        self.compare_list()
    }

    /// The switch: from then on a crash leaves the new world, with one of these contents where that reverts nothing.
    async fn switch(
        &mut self,
        change: &mut dyn SnapshotChange,
        world: &World,
        (kind, since): (Kind, Vec<Arc<Content>>),
    ) -> Result<(), Problem> {
        let begun = self.disk.log_len();
        change.switch().await.map_err(text)?;
        change.commit().await.map_err(text)?;
        let (active, through) = match kind {
            Kind::Everything => (world.active.clone(), Vec::new()),
            _ => (self.world.active.clone(), since),
        };
        self.moments.push(Moment {
            op: "the switch of a change that goes ahead".to_owned(),
            begun,
            answered: self.disk.log_len(),
            durable: true,
            kind,
            after: World {
                active,
                ..world.clone()
            },
            passing: None,
            through,
            forced: Vec::new(),
        });
        Ok(())
    }

    /// An operation of the guest that shows behind the switch.
    async fn step_behind(&mut self, op: &Op, world: &World) -> Result<(), Problem> {
        self.step(op).await?;
        if let Some(last) = self.moments.last_mut() {
            last.after.snapshots.clone_from(&world.snapshots);
        }
        Ok(())
    }

    /// Takes the change back: there is the world of before, with all that the guest has done.
    async fn take_back(
        &mut self,
        mut change: Box<dyn SnapshotChange>,
        kind: Kind,
        holds: bool,
    ) -> Result<(), Problem> {
        self.driver.flush().await.map_err(text)?;
        if holds {
            change.hold().await.map_err(text)?;
        }
        let begun = self.disk.log_len();
        change.roll_back().await.map_err(text)?;
        drop(change);
        self.moments.push(Moment {
            op: "taking it back".to_owned(),
            begun,
            answered: self.disk.log_len(),
            durable: true,
            kind,
            after: self.world.clone(),
            passing: None,
            through: Vec::new(),
            forced: Vec::new(),
        });
        self.compare_list()
    }
}
