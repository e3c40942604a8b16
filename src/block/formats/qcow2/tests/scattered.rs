//! Clusters that lie apart on the disk and side by side in the file.

use super::*;
use crate::driver::Compat;
use crate::protocols::memory::{Fault, OpKind};

const MIB: u64 = 1 << 20;
const CLUSTER: u64 = 64 << 10;

/// A cluster at each of these places, with a byte that tells it.
fn clusters(places: impl IntoIterator<Item = u64>) -> Vec<(u64, Data)> {
    let cluster = |at: u64| vec![(at / CLUSTER) as u8 | 1; CLUSTER as usize];
    let piece = |at| (at, Data::from(cluster(at)));
    places.into_iter().map(piece).collect()
}

fn apply(model: &mut [u8], pieces: &[(u64, Data)]) {
    for (at, data) in pieces {
        let at = *at as usize;
        model[at..at + data.len() as usize].copy_from_slice(&data.to_bytes());
    }
}

#[tokio::test]
async fn pieces_are_written_and_read_at_once() {
    let disk = new_image(&CreateOptions::new(16 * MIB)).await;
    let image = open(&disk).await;
    let mut model = vec![0; 16 << 20];
    // What the first write makes besides its data: a table and counters.
    write(&image, 15 * MIB, vec![5; CLUSTER as usize])
        .await
        .unwrap();
    model[15 << 20..(15 << 20) + CLUSTER as usize].fill(5);
    let pieces = clusters((0..8).map(|nth| nth * MIB));
    apply(&mut model, &pieces);
    let before = disk.count(OpKind::Write);
    image.write_pieces(pieces).await.unwrap();
    assert_eq!(disk.count(OpKind::Write) - before, 1);
    let before = disk.count(OpKind::Read);
    let all = image.read(0, 8 * MIB).await.unwrap();
    assert_eq!(disk.count(OpKind::Read) - before, 1);
    assert_same(&all.to_bytes(), &model[..8 << 20]);
    assert!(all.slice(CLUSTER, MIB - CLUSTER).is_known_zero());
    verify(&disk, image, &model).await;
}

#[tokio::test]
async fn pieces_of_all_kinds_come_out_where_they_belong() {
    for extended_l2 in [false, true] {
        let options = CreateOptions {
            compat: Compat::V1_1,
            extended_l2,
            ..CreateOptions::new(1024 * MIB)
        };
        let disk = new_image(&options).await;
        let image = open(&disk).await;
        let place = |at: u64| at..at + CLUSTER;
        // Clusters that exist, are zero with a place in the file, and lie in another table.
        write(&image, MIB, vec![9; CLUSTER as usize]).await.unwrap();
        write(&image, 3 * MIB, vec![9; CLUSTER as usize])
            .await
            .unwrap();
        let keep = ZeroFlags::default();
        image.write_zeroes(3 * MIB, CLUSTER, keep).await.unwrap();
        let mut pieces = clusters([0, MIB, 2 * MIB, 3 * MIB, 600 * MIB, 700 * MIB]);
        pieces.push((5 * MIB + 100, Data::from(vec![77; 300])));
        pieces.push((4 * MIB, Data::from(vec![78; 2 * CLUSTER as usize])));
        pieces.push((4 * MIB + 2 * CLUSTER, Data::new()));
        image.write_pieces(pieces.clone()).await.unwrap();
        for (at, data) in &pieces {
            let is = read(&image, *at, data.len()).await;
            assert_same(&is, &data.to_bytes());
        }
        let around = place(5 * MIB).end - 400;
        assert_eq!(read(&image, 5 * MIB, 100).await, [0; 100]);
        assert_eq!(read(&image, around, 400).await, [0; 400]);
        image.close().await.unwrap();
        let scratch = Scratch::new();
        assert_qemu_clean(&scratch.save("image.qcow2", &disk));
    }
}

#[tokio::test]
async fn what_cannot_be_written_leaves_nothing_behind() {
    let disk = new_image(&CreateOptions::new(16 * MIB)).await;
    let image = open(&disk).await;
    write(&image, 0, vec![5; CLUSTER as usize]).await.unwrap();
    let mut model = vec![0; 16 << 20];
    model[..CLUSTER as usize].fill(5);
    let pieces = clusters([MIB, 2 * MIB, 3 * MIB]);
    disk.fail_once(OpKind::Write, 0, Fault::Io);
    assert!(image.write_pieces(pieces.clone()).await.is_err());
    assert_same(&read(&image, 0, 16 * MIB).await, &model);
    let length = disk.size();
    image.write_pieces(pieces.clone()).await.unwrap();
    apply(&mut model, &pieces);
    assert!(disk.size() <= length + 3 * CLUSTER, "they are used again");
    verify(&disk, image, &model).await;
}
