//! The disk in memory does what the tests of everything above rely on.

use super::*;

fn bytes(value: u8, len: usize) -> Data {
    Data::from(vec![value; len])
}

#[tokio::test]
async fn it_matches_a_plain_vector() {
    let mut random = fastrand::Rng::with_seed(7);
    let memory = Memory::new(0);
    let mut model: Vec<u8> = Vec::new();
    for step in 0..2000u32 {
        let offset = random.usize(..60_000);
        let len = random.usize(1..9_000);
        let grow = |model: &mut Vec<u8>| {
            if model.len() < offset + len {
                model.resize(offset + len, 0);
            }
        };
        match random.u8(..5) {
            0 | 1 => {
                memory
                    .write(offset as u64, bytes(step as u8, len), WriteFlags::default())
                    .await
                    .unwrap();
                grow(&mut model);
                model[offset..offset + len].fill(step as u8);
            }
            2 => {
                memory
                    .write_zeroes(offset as u64, len as u64, ZeroFlags::default())
                    .await
                    .unwrap();
                grow(&mut model);
                model[offset..offset + len].fill(0);
            }
            3 if random.u8(..10) == 0 => {
                memory
                    .resize(offset as u64, Preallocation::Off)
                    .await
                    .unwrap();
                model.resize(offset, 0);
            }
            _ => {
                let read = memory.read(offset as u64, len as u64).await.unwrap();
                let mut want = model.get(offset..).unwrap_or_default().to_vec();
                want.resize(len, 0);
                assert_eq!(&read.to_bytes()[..], &want[..], "step {step}");
            }
        }
        assert_eq!(memory.size(), model.len() as u64);
    }
    assert_eq!(memory.content(), model);
    assert_eq!(Memory::with_content(&model).content(), model);
}

#[tokio::test]
async fn the_chosen_request_fails_and_only_that() {
    let memory = Memory::new(PAGE);
    memory.fail_once(OpKind::Write, 1, Fault::Io);
    let write = || memory.write(0, bytes(1, 10), WriteFlags::default());
    assert!(write().await.is_ok());
    assert_eq!(write().await.unwrap_err().kind(), ErrorKind::Io);
    assert!(write().await.is_ok());
    assert_eq!(memory.count(OpKind::Write), 3);
}

#[tokio::test]
async fn a_torn_write_leaves_its_front() {
    let memory = Memory::new(8);
    memory.fail_once(OpKind::Write, 0, Fault::Torn(3));
    memory
        .write(0, bytes(1, 8), WriteFlags::default())
        .await
        .unwrap_err();
    assert_eq!(memory.content(), [1, 1, 1, 0, 0, 0, 0, 0]);
}

#[tokio::test]
async fn space_runs_out_at_the_limit_and_overwriting_still_works() {
    let memory = Memory::new(0);
    memory.set_space_limit(Some(2 * PAGE));
    let full = memory
        .write(0, bytes(1, 3 * PAGE as usize), WriteFlags::default())
        .await
        .unwrap_err();
    assert_eq!(full.kind(), ErrorKind::NoSpace);
    assert_eq!(memory.allocated(), 2 * PAGE);
    memory
        .write(0, bytes(2, 2 * PAGE as usize), WriteFlags::default())
        .await
        .unwrap();
    memory.discard(0, PAGE).await.unwrap();
    assert_eq!(memory.allocated(), PAGE);
}

#[tokio::test]
async fn a_held_write_happens_after_its_future_is_dropped() {
    let memory = Memory::new(4);
    memory.hold(OpKind::Write);
    let task = tokio::spawn({
        let memory = memory.clone();
        async move { memory.write(0, bytes(9, 4), WriteFlags::default()).await }
    });
    memory.wait_held(1).await;
    task.abort();
    assert!(task.await.unwrap_err().is_cancelled());
    assert_eq!(memory.content(), [0; 4]);
    memory.release_all();
    assert_eq!(memory.content(), [9; 4]);
}

#[tokio::test]
async fn the_log_rebuilds_the_disk_on_a_fork() {
    let memory = Memory::with_content(&[7; 100]);
    let before = memory.fork();
    memory.start_log();
    memory
        .write(50, bytes(1, 100), WriteFlags::fua(true))
        .await
        .unwrap();
    memory.flush().await.unwrap();
    memory.discard(0, 10).await.unwrap();
    let log = memory.log();
    assert!(matches!(log[1].change, Change::Flush));
    assert!(log[0].completed < log[1].issued && log[1].completed < log[2].issued);
    assert_eq!(before.content(), [7; 100]);
    for record in &log {
        before.apply(&record.change).unwrap();
    }
    assert_eq!(before.content(), memory.content());
}

#[tokio::test]
async fn written_and_untouched_areas_are_told_apart() {
    let memory = Memory::new(4 * PAGE);
    memory
        .write(PAGE, bytes(1, 1), WriteFlags::default())
        .await
        .unwrap();
    let status = memory.block_status(10, 4 * PAGE - 10).await.unwrap();
    assert!(status.zero && status.len == PAGE - 10);
    let status = memory.block_status(PAGE, 3 * PAGE).await.unwrap();
    assert!(!status.zero && status.len == PAGE);
}
