//! `query-blockstats` counts what guests do, neither more nor less: against what is known to have been done, and against fio.

use std::process::Command;
use std::thread;
use std::time::Duration;

use serde_json::{Value, json};

use super::durability::full::SmallDisk;
use super::guest::{Guest, Request};
use super::harness::{self, Daemon, Program, Qmp};

const CLUSTER: u64 = 65536;

fn drive(qmp: &mut Qmp) -> Value {
    qmp.ok("query-blockstats", json!({}))[0].clone()
}

/// Counters by their names.
fn counters<const N: usize>(stats: &Value, names: [&str; N]) -> [u64; N] {
    names.map(|name| stats["stats"][name].as_u64().unwrap())
}

const OPERATIONS: [&str; 4] = [
    "rd_operations",
    "wr_operations",
    "flush_operations",
    "unmap_operations",
];
const BYTES: [&str; 3] = ["rd_bytes", "wr_bytes", "unmap_bytes"];

fn write(guest: &mut Guest, cluster: u64) -> u32 {
    let (offset, data) = (cluster * CLUSTER, vec![7; CLUSTER as usize]);
    guest.run(&Request::Write { offset, data }).unwrap()
}

#[test]
fn each_layer_of_a_disk_counts_what_comes_to_it() {
    let Some(()) = harness::need(&["qemu-img", "qemu-io"]) else {
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let make = "qemu-img create -q -f qcow2 base.qcow2 16M && qemu-io -f qcow2 -c 'write -q 0 4M' base.qcow2 && \
        qemu-img create -q -f qcow2 -b base.qcow2 -F qcow2 top.qcow2";
    harness::tool(folder.path(), make);
    let arguments = [
        "--drive",
        "id=d,file=top.qcow2,format=qcow2,discard=unmap",
        "--nbd-server",
        "unix:nbd.sock",
    ];
    let mut daemon = Daemon::start_in(Program::Qblockd, folder.path(), &arguments);
    let mut qmp = daemon.qmp();
    assert_eq!(
        drive(&mut qmp)["stats"].get("idle_time_ns"),
        None,
        "nothing has been done"
    );
    let mut guest = Guest::connect(&folder.path().join("nbd.sock"), "d").unwrap();
    // Of the base, of nobody (which the base is asked for), and of the top.
    for cluster in 0..16 {
        guest.read(cluster * CLUSTER, CLUSTER as u32).unwrap();
    }
    for cluster in 128..132 {
        guest.read(cluster * CLUSTER, CLUSTER as u32).unwrap();
    }
    for cluster in 0..8 {
        assert_eq!(write(&mut guest, cluster), 0);
    }
    for cluster in 0..8 {
        guest.read(cluster * CLUSTER, 512).unwrap();
    }
    let zero = Request::Zero {
        offset: 4 * CLUSTER,
        length: 2 * CLUSTER as u32,
    };
    assert_eq!(guest.run(&zero).unwrap(), 0);
    for _ in 0..3 {
        assert_eq!(guest.run(&Request::Flush).unwrap(), 0);
    }
    let stats = drive(&mut qmp);
    let read = 20 * CLUSTER + 8 * 512;
    assert_eq!(counters(&stats, OPERATIONS), [28, 9, 3, 0]);
    assert_eq!(counters(&stats, BYTES), [read, 10 * CLUSTER, 0]);
    let failed = [
        "failed_rd_operations",
        "failed_wr_operations",
        "failed_flush_operations",
        "invalid_rd_operations",
        "invalid_wr_operations",
        "rd_merged",
        "wr_merged",
    ];
    assert_eq!(counters(&stats, failed), [0; 7]);
    let times = counters(
        &stats,
        [
            "rd_total_time_ns",
            "wr_total_time_ns",
            "flush_total_time_ns",
        ],
    );
    assert!(
        times.iter().all(|time| (1..60_000_000_000).contains(time)),
        "{times:?}"
    );
    assert_eq!(counters(&stats, ["wr_highest_offset"]), [8 * CLUSTER]);
    // The images count the same way, and the base only what the top did not have.
    let nodes = qmp.ok("query-blockstats", json!({"query-nodes": true}));
    let top_name = &stats["node-name"];
    let top = nodes
        .as_array()
        .unwrap()
        .iter()
        .find(|node| node["node-name"] == *top_name)
        .unwrap();
    assert_eq!(counters(top, OPERATIONS), [28, 9, 3, 0]);
    assert_eq!(counters(top, BYTES), [read, 10 * CLUSTER, 0]);
    let base = &stats["backing"];
    assert_eq!(counters(base, OPERATIONS), [20, 0, 0, 0]);
    assert_eq!(counters(base, BYTES), [20 * CLUSTER, 0, 0]);
    let file = counters(&stats["parent"], ["wr_bytes", "rd_bytes"]);
    assert!(file[0] >= 8 * CLUSTER && file[1] >= 8 * 512, "{file:?}");
    // Idle since the flush.
    thread::sleep(Duration::from_millis(60));
    let [idle] = counters(&drive(&mut qmp), ["idle_time_ns"]);
    assert!((60_000_000..60_000_000_000).contains(&idle), "{idle}");
    drop(guest);
    assert!(daemon.terminate().success());
}

#[test]
fn requests_that_fail_are_counted_as_such_and_not_as_done() {
    let Some(()) = harness::need(&["mount", "df"]) else {
        return;
    };
    let Some(disk) = SmallDisk::mount() else {
        return;
    };
    let arguments = [
        "--drive",
        "id=d,file=d.raw,format=raw,size=16M,werror=report",
        "--nbd-server",
        "unix:nbd.sock",
    ];
    let mut daemon = Daemon::start_in(Program::Qblockd, disk.path(), &arguments);
    let mut qmp = daemon.qmp();
    let mut guest = Guest::connect(&disk.path().join("nbd.sock"), "d").unwrap();
    assert_eq!(write(&mut guest, 0), 0);
    disk.leave(0);
    for cluster in 1..4 {
        assert_eq!(write(&mut guest, cluster), 28);
    }
    guest.read(0, 4096).unwrap();
    let stats = drive(&mut qmp);
    assert_eq!(counters(&stats, OPERATIONS), [1, 1, 0, 0]);
    assert_eq!(counters(&stats, BYTES), [4096, CLUSTER, 0]);
    assert_eq!(
        counters(&stats, ["failed_wr_operations", "failed_rd_operations"]),
        [3, 0]
    );
    drop((guest, qmp));
    assert!(daemon.terminate().success());
}

#[test]
fn the_counters_are_those_of_fio() {
    let Some(()) = harness::need(&["fio"]) else {
        return;
    };
    let arguments = [
        "--drive",
        "id=d,file=d.qcow2,size=32M",
        "--nbd-server",
        "unix:nbd.sock",
    ];
    let mut daemon = Daemon::start(Program::Qblockd, &arguments);
    let mut qmp = daemon.qmp();
    let mut fio = Command::new("fio");
    fio.args([
        "--name=mix",
        "--ioengine=nbd",
        "--rw=randrw",
        "--bsrange=4k-64k",
        "--iodepth=8",
        "--size=32m",
        "--io_size=24m",
        "--fsync=16",
        "--randseed=7",
        "--output-format=json",
    ]);
    let uri = format!(
        "--uri=nbd+unix:///d?socket={}",
        daemon.path("nbd.sock").display()
    );
    let output = fio.arg(uri).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    if !output.status.success() {
        // Debian's has the engine, others' may not.
        assert!(!text.contains("\"jobs\""), "{text}");
        eprintln!("fio has no nbd engine: nothing is tested");
        return;
    }
    let report: Value = serde_json::from_str(&text[text.find('{').unwrap()..]).unwrap();
    let job = &report["jobs"][0];
    let said = |kind: &str, what: &str| job[kind][what].as_u64().unwrap();
    let stats = drive(&mut qmp);
    assert_eq!(
        counters(&stats, ["rd_operations", "rd_bytes"]),
        [said("read", "total_ios"), said("read", "io_bytes")]
    );
    assert_eq!(
        counters(&stats, ["wr_operations", "wr_bytes"]),
        [said("write", "total_ios"), said("write", "io_bytes")]
    );
    let [flushes] = counters(&stats, ["flush_operations"]);
    assert_eq!(flushes, said("sync", "total_ios"));
    // Here a request takes a part of what its client waits for it.
    for (kind, name) in [("read", "rd_total_time_ns"), ("write", "wr_total_time_ns")] {
        let [time] = counters(&stats, [name]);
        let waited = job[kind]["lat_ns"]["mean"].as_f64().unwrap() * said(kind, "total_ios") as f64;
        assert!(
            time > 0 && (time as f64) < waited,
            "{kind}: {time} of {waited}"
        );
    }
    assert!(daemon.terminate().success());
}
