//! Images made by jobs, and the errors of those that cannot be made.

use std::path::Path;
use std::time::Duration;

use block::driver::Requests;
use block::graph::Opened;
use block::open::open;
use serde_json::json;

use super::*;
use crate::daemon::testing;
use crate::jobs::Status;
use crate::transaction::lab::tape::{Fault, Tape};

const SIZE: u64 = 1 << 20;

/// Runs a job to its end: its error.
async fn create(cx: &Cx, options: serde_json::Value) -> Option<String> {
    let options = BlockdevCreateOptions::decode(options, &qapi::rt::Path::json()).unwrap();
    let job_id = "job0".to_owned();
    Handlers::blockdev_create(cx, BlockdevCreate { job_id, options })
        .await
        .unwrap();
    loop {
        let concluded = cx
            .commit(|control| {
                let info = control.jobs.list().pop().unwrap();
                if info.status != Status::Concluded {
                    return Ok(None);
                }
                assert_eq!((info.progress.offset, info.progress.len), (1, 1));
                let key = control.jobs.find("job0").unwrap();
                control.jobs.dismiss(key).unwrap();
                Ok(Some(info.error))
            })
            .await
            .unwrap();
        match concluded {
            Some(error) => return error,
            None => tokio::time::sleep(Duration::from_millis(2)).await,
        }
    }
}

/// Adds a node.
async fn node(cx: &Cx, options: serde_json::Value) {
    let options = qapi::types::BlockdevOptions::decode(options, &qapi::rt::Path::json()).unwrap();
    super::super::nodes::add(cx, options).await.unwrap();
}

fn empty(folder: &Path, name: &str) -> String {
    let path = folder.join(name);
    std::fs::File::create(&path).unwrap();
    path.to_str().unwrap().to_owned()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_file_then_an_image_in_it_then_a_node_on_it() {
    let (cx, folder) = (testing::running(), tempfile::tempdir().unwrap());
    let path = folder.path().join("a.qcow2");
    let path = path.to_str().unwrap();
    let file = json!({"driver": "file", "filename": path, "size": 0});
    assert_eq!(create(&cx, file).await, None);
    node(
        &cx,
        json!({"driver": "file", "node-name": "f", "filename": path}),
    )
    .await;
    let image = json!({"driver": "qcow2", "file": "f", "size": SIZE, "cluster-size": 4096});
    assert_eq!(create(&cx, image).await, None);
    node(
        &cx,
        json!({"driver": "qcow2", "node-name": "q", "file": "f"}),
    )
    .await;
    let (size, info) = cx
        .commit(|control| {
            let node = control.graph.lookup(None, Some("q")).unwrap();
            Ok((node.size(), node.driver().info()))
        })
        .await
        .unwrap();
    assert_eq!((size, info.cluster_size), (SIZE, Some(4096)));
    // The job has let go of the node, and an image that is in use is not made anew.
    let again = json!({"driver": "qcow2", "file": "f", "size": SIZE});
    let error = create(&cx, again).await.unwrap();
    assert!(
        error.starts_with("Permission conflict on node 'f'"),
        "{error}"
    );
    let deleted = cx.commit(|control| {
        Ok(control.graph.remove("q").is_ok() && control.graph.remove("f").is_ok())
    });
    assert!(deleted.await.unwrap());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_wrong_is_the_jobs_error_and_leaves_nothing() {
    let (cx, folder) = (testing::running(), tempfile::tempdir().unwrap());
    let path = empty(folder.path(), "f");
    node(
        &cx,
        json!({"driver": "file", "node-name": "f", "filename": path}),
    )
    .await;
    let qcow2 = |more: serde_json::Value| {
        let mut options = json!({"driver": "qcow2", "file": "f", "size": SIZE});
        let members = more.as_object().unwrap().clone();
        options.as_object_mut().unwrap().extend(members);
        options
    };
    let missing = folder.path().join("missing");
    let cases = [
        (
            json!({"driver": "file", "filename": missing, "size": 1, "preallocation": "metadata"}),
            "Unsupported preallocation mode: metadata",
        ),
        (
            qcow2(json!({"file": "nope"})),
            "Cannot find device='nope' nor node-name='nope'",
        ),
        (
            qcow2(json!({"data-file": "nope"})),
            "Cannot find device='nope' nor node-name='nope'",
        ),
        (
            qcow2(json!({"size": SIZE + 1})),
            "Image size must be a multiple of 512 bytes",
        ),
        (
            qcow2(json!({"cluster-size": 1000})),
            "Cluster size must be a power of two between 512 and 2048k",
        ),
        (
            qcow2(json!({"refcount-bits": 3})),
            "Refcount width must be a power of two and may not exceed 64 bits",
        ),
        (
            qcow2(json!({"refcount-bits": -16})),
            "Refcount width must be a power of two and may not exceed 64 bits",
        ),
        (
            qcow2(json!({"backing-fmt": "qcow2"})),
            "Backing format cannot be used without backing file",
        ),
        (
            qcow2(json!({"data-file-raw": true})),
            "data-file-raw requires data-file",
        ),
        (
            qcow2(
                json!({"file": {"driver": "file", "filename": path, "read-only": true, "locking": "off"}}),
            ),
            "Block node is read-only",
        ),
    ];
    for (options, expected) in cases {
        assert_eq!(create(&cx, options).await.as_deref(), Some(expected));
    }
    assert_eq!(std::fs::metadata(&path).unwrap().len(), 0);
    assert!(!missing.exists());
    let unused = cx.commit(|control| Ok(control.graph.remove("f").is_ok()));
    assert!(unused.await.unwrap());
    let raw = json!({"driver": "raw"});
    let options = BlockdevCreateOptions::decode(raw, &qapi::rt::Path::json()).unwrap();
    let error = Handlers::blockdev_create(
        &cx,
        BlockdevCreate {
            job_id: "j".to_owned(),
            options,
        },
    );
    assert_eq!(
        error.await.unwrap_err().desc,
        "Driver does not support blockdev-create"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_device_is_as_it_was_where_its_formatting_fails() {
    let (cx, folder) = (testing::running(), tempfile::tempdir().unwrap());
    let folder = std::fs::canonicalize(folder.path()).unwrap();
    let path = folder.join("device");
    let content = b"somebody's".repeat(100_000);
    std::fs::write(&path, &content).unwrap();
    let tape = Tape::new(&folder, &folder, 0);
    let io = block::io::IoContext::witnessed(tape.clone());
    let witnessed = cx.commit(move |control| {
        control.io = io;
        Ok(())
    });
    witnessed.await.unwrap();
    // Opened for the job: a file that could not be made durable says so for as long as it is open.
    let file = json!({"driver": "file", "filename": path.to_str().unwrap()});
    let image = json!({"driver": "qcow2", "file": file, "size": SIZE});
    let mut failed = 0;
    tape.fail(failed, Fault::Short);
    while let Some(error) = create(&cx, image.clone()).await {
        assert!(
            std::fs::read(&path).unwrap() == content,
            "{failed}: {error}"
        );
        failed += 1;
        assert!(failed < 100, "{error}");
        tape.fail(failed, Fault::Short);
    }
    tape.no_fault();
    assert!(failed > 3, "{failed}");
    assert!(std::fs::read(&path).unwrap().starts_with(b"QFI\xfb"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_option_gets_into_the_image() {
    let (cx, folder) = (testing::running(), tempfile::tempdir().unwrap());
    let (path, data) = (empty(folder.path(), "f"), empty(folder.path(), "d"));
    let options = json!({
        "driver": "qcow2",
        "file": {"driver": "file", "filename": path},
        "data-file": {"driver": "file", "filename": data},
        "size": SIZE, "version": "v3", "cluster-size": 16384, "extended-l2": true, "lazy-refcounts": true,
        "refcount-bits": 32, "compression-type": "zstd", "preallocation": "full",
    });
    assert_eq!(create(&cx, options).await, None);
    assert_eq!(std::fs::metadata(&data).unwrap().len(), SIZE);
    let reopened = json!({
        "driver": "qcow2", "node-name": "q", "file": {"driver": "file", "filename": path},
        "data-file": {"driver": "file", "filename": data},
    });
    let options = qapi::types::BlockdevOptions::decode(reopened, &qapi::rt::Path::json()).unwrap();
    let options = convert::node_options(options).unwrap();
    let opener = cx.commit(|control| Ok(Opener::new(&control.io, &control.graph)));
    let opened: Opened = open(&opener.await.unwrap(), &options).await.unwrap();
    let info = opened.root().unwrap().driver().info();
    assert_eq!(info.cluster_size, Some(16384));
    let block::driver::FormatSpecific::Qcow2 {
        compat,
        lazy_refcounts,
        refcount_bits,
        extended_l2,
        compression_type,
        data_file,
        data_file_raw,
        ..
    } = info.specific
    else {
        panic!("no qcow2");
    };
    assert_eq!(
        (compat, refcount_bits, compression_type),
        ("1.1", 32, "zstd")
    );
    assert_eq!((lazy_refcounts, extended_l2), (Some(true), Some(true)));
    assert_eq!((data_file, data_file_raw), (Some(data), Some(false)));
}
