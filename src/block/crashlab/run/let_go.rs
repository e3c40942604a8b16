//! Changes of snapshots whose guest goes on in their middle.

use std::sync::Arc;

use futures_util::future::join;
use tokio::sync::oneshot;

use super::{Done, Forced, Kind, Moment, Problem, Runner, World, text};
use crate::crashlab::content::{Content, SECTOR};
use crate::crashlab::script::{End, Op, Step};
use crate::driver::{SnapshotChange, Snapshots};

/// What a guest has done since it was let go.
#[derive(Default)]
struct Meanwhile {
    through: Vec<Arc<Content>>,
    /// Writes that are durable; none of sectors that were written again.
    forced: Vec<Forced>,
    /// Writes that are not.
    unforced: Vec<(u64, u64)>,
}

impl Runner {
    /// Stages a change, lets the guest go and does what it does then; some of that at once, the rest when all is prepared. It is
    /// durable when the guest has asked for that, whatever becomes of the change.
    pub(super) async fn let_go(
        &mut self,
        steps: &[Step],
        ops: &[Op],
        end: End,
    ) -> Result<Done, Problem> {
        let (driver, begun) = (self.driver.clone(), self.disk.log_len());
        let mut change = match driver.change().await {
            Ok(change) => change,
            Err(error) => return self.refused(&error),
        };
        let (mut world, _) = self.stage(&mut *change, steps).await?;
        let before = self.world.active.clone();
        let mut meanwhile = Meanwhile::default();
        let (early, late) = ops.split_at(ops.len().div_ceil(2));
        let let_go = self.go_at_once(&mut *change, early, &mut meanwhile).await?;
        let late = match let_go {
            Ok(true) => late,
            Ok(false) => &[],
            Err(error) => {
                drop(change);
                return self.refused(&error);
            }
        };
        let moment = |world: World, passing, answered| Moment {
            op: "a change whose guest goes on".to_owned(),
            begun,
            answered,
            durable: true,
            kind: Kind::Structure,
            after: World {
                active: before.clone(),
                ..world
            },
            passing,
            through: Vec::new(),
            forced: Vec::new(),
        };
        if end == End::Drop {
            drop(change);
        } else {
            if let Err(error) = change.prepare().await {
                drop(change);
                return self.refused(&error);
            }
            self.go_on(late, &mut meanwhile).await?;
            change.commit().await.map_err(text)?;
            world.active = before.clone();
            if end == End::Finish {
                drop(change.finish());
                self.world.snapshots.clone_from(&world.snapshots);
                self.moments.push(moment(world, None, self.disk.log_len()));
            } else {
                change.roll_back().await.map_err(text)?;
                let after = self.world.clone();
                self.moments
                    .push(moment(after, Some(world), self.disk.log_len()));
            }
        }
        self.compare_list()?;
        Ok(Done {
            through: meanwhile.through,
            forced: meanwhile.forced,
            ..Done::sectors(false)
        })
    }

    /// Lets the guest go, who is there at once, before the image is marked.
    async fn go_at_once(
        &mut self,
        change: &mut dyn SnapshotChange,
        early: &[Op],
        meanwhile: &mut Meanwhile,
    ) -> Result<crate::error::Result<bool>, Problem> {
        let (gone, is_gone) = oneshot::channel();
        let guest = async {
            match is_gone.await {
                Ok(()) => self.go_on(early, meanwhile).await,
                Err(_) => Ok(()),
            }
        };
        let then = Box::new(|held| {
            drop(held);
            gone.send(()).unwrap_or_default();
        });
        let (let_go, went_on) = join(change.let_go(then), guest).await;
        went_on.map(|()| let_go)
    }

    async fn go_on(&mut self, ops: &[Op], meanwhile: &mut Meanwhile) -> Result<(), Problem> {
        for op in ops {
            let done = Box::pin(self.execute(op)).await?;
            let answered = self.disk.log_len();
            meanwhile.through.push(self.world.active.clone());
            if let Op::Write { at, len, .. } | Op::Zero { at, len, .. } | Op::Discard { at, len } =
                *op
            {
                let (at, len) = self.cut(at, len);
                meanwhile.forget(at, len);
                if matches!(op, Op::Write { .. }) && at % SECTOR == 0 && len % SECTOR == 0 {
                    meanwhile.unforced.push((at, len));
                }
            } else if matches!(op, Op::Compress { .. }) {
                meanwhile.forget(0, u64::MAX);
            }
            if done.durable {
                let forced = meanwhile.unforced.drain(..);
                let forced = forced.map(|(at, len)| Forced { at, len, answered });
                meanwhile.forced.extend(forced);
            }
        }
        Ok(())
    }
}

impl Meanwhile {
    /// Something else is written there.
    fn forget(&mut self, at: u64, len: u64) {
        let apart = |other: u64, size: u64| other + size <= at || at.saturating_add(len) <= other;
        self.forced.retain(|write| apart(write.at, write.len));
        self.unforced.retain(|(other, size)| apart(*other, *size));
    }
}
