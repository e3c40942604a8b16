//! Options in, nodes out: on files, on nodes that exist, and on chains that qemu-img made.

use super::*;
use crate::driver::{Requests, WriteFlags};
use crate::io::Data;

fn image(size: u64) -> (tempfile::TempDir, String) {
    let dir = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
    let path = dir.path().join("image");
    std::fs::File::create(&path).unwrap().set_len(size).unwrap();
    let path = path.to_str().unwrap().to_owned();
    (dir, path)
}

fn file(filename: &str) -> NodeOptions {
    NodeOptions::new(DriverOptions::File(FileOptions {
        filename: filename.to_owned(),
        aio: Aio::Threads,
        locking: Locking::Auto,
    }))
}

fn null(size: u64) -> NodeOptions {
    NodeOptions::new(DriverOptions::Null(NullOptions {
        size,
        read_zeroes: true,
        latency_ns: 0,
    }))
}

fn raw(below: NodeRef) -> NodeOptions {
    NodeOptions::new(DriverOptions::Raw(RawOptions {
        file: below,
        offset: None,
        size: None,
    }))
}

fn named(name: &str, options: NodeOptions) -> NodeOptions {
    NodeOptions {
        node_name: Some(name.to_owned()),
        ..options
    }
}

fn inline(options: NodeOptions) -> NodeRef {
    NodeRef::Inline(Arc::new(options))
}

async fn add(graph: &mut Graph, options: &NodeOptions) -> Result<Arc<Node>> {
    let opener = Opener::new(&IoContext::new(), graph);
    let opened = open(&opener, options).await?;
    graph.insert(opened)
}

#[tokio::test]
async fn a_tree_of_options_becomes_nodes_that_work() {
    let (_dir, path) = image(1 << 20);
    let mut graph = Graph::new();
    let options = named("disk", raw(inline(file(&path))));
    let disk = add(&mut graph, &options).await.unwrap();
    assert_eq!(disk.size(), 1 << 20);
    let data = Data::from(vec![7; 100]);
    disk.write(50, data.clone(), WriteFlags::default())
        .await
        .unwrap();
    assert_eq!(
        disk.read(50, 100).await.unwrap().to_bytes(),
        data.to_bytes()
    );
    let below = disk.link("file").unwrap();
    assert!(below.name().starts_with("#block"));
    assert_eq!(below.driver().info().filename, path);
    assert_eq!(disk.driver().info().filename, path);
    graph.remove("disk").unwrap().close().await.unwrap();
    assert_eq!(graph.nodes().count(), 0);
    assert_eq!(std::fs::read(&path).unwrap()[50..150], [7; 100]);
}

#[tokio::test]
async fn a_layer_below_can_be_one_that_exists() {
    let mut graph = Graph::new();
    add(&mut graph, &named("n", null(1000))).await.unwrap();
    let upper = named("r", raw(NodeRef::Name("n".to_owned())));
    let upper = add(&mut graph, &upper).await.unwrap();
    assert!(Arc::ptr_eq(
        &upper.link("file").unwrap(),
        graph.node("n").unwrap()
    ));
    let missing = raw(NodeRef::Name("none".to_owned()));
    let error = add(&mut graph, &missing).await.unwrap_err();
    assert_eq!(
        error.message(),
        "Cannot find device='none' nor node-name='none'"
    );
}

#[tokio::test]
async fn a_taken_name_is_refused_before_anything_is_opened() {
    let mut graph = Graph::new();
    add(&mut graph, &named("n", null(1000))).await.unwrap();
    let options = named("n", file("/does/not/exist"));
    let error = add(&mut graph, &options).await.unwrap_err();
    assert_eq!(error.message(), "Duplicate nodes with node-name='n'");
    let twice = named("x", raw(inline(named("x", null(1)))));
    let error = add(&mut graph, &twice).await.unwrap_err();
    assert_eq!(error.message(), "Duplicate nodes with node-name='x'");
}

#[tokio::test]
async fn a_node_deleted_while_another_was_opened_on_it_is_missed() {
    let mut graph = Graph::new();
    add(&mut graph, &named("n", null(1000))).await.unwrap();
    let opener = Opener::new(&IoContext::new(), &graph);
    let opened = open(&opener, &raw(NodeRef::Name("n".to_owned()))).await;
    graph.remove("n").unwrap().close().await.unwrap();
    let error = graph.insert(opened.unwrap()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
}

#[tokio::test]
async fn read_only_goes_down_and_a_writable_node_on_a_read_only_one_is_refused() {
    let (_dir, path) = image(512);
    let mut graph = Graph::new();
    let read_only = NodeOptions {
        read_only: true,
        ..named("ro", raw(inline(file(&path))))
    };
    let node = add(&mut graph, &read_only).await.unwrap();
    assert!(node.link("file").unwrap().behaviour().read_only);
    let upper = raw(NodeRef::Name("ro".to_owned()));
    let error = add(&mut graph, &upper).await.unwrap_err();
    assert_eq!(error.message(), "Block node is read-only");
    let lenient = NodeOptions {
        auto_read_only: true,
        ..upper
    };
    let node = add(&mut graph, &lenient).await.unwrap();
    assert!(node.behaviour().read_only);
}

#[tokio::test]
async fn a_second_writer_of_the_same_file_is_refused_by_its_lock() {
    let (_dir, path) = image(512);
    let mut graph = Graph::new();
    let first = add(&mut graph, &named("a", file(&path))).await.unwrap();
    let second = add(&mut graph, &named("b", file(&path))).await.unwrap();
    let held = claim(&first, Need::Writes).await.unwrap();
    let error = claim(&second, Need::Writes).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InUse);
    drop(held);
    drop(claim(&second, Need::Writes).await.unwrap());
    let _held = claim(&first, Need::Reads).await.unwrap();
    let _both = claim(&second, Need::Reads).await.unwrap();
    claim(&first, Need::Writes).await.unwrap_err();
    // Deleting the first frees the file at once.
    graph.remove("a").unwrap().close().await.unwrap();
    let _held = claim(&second, Need::Writes).await.unwrap();
}

#[tokio::test]
async fn a_null_disk_that_never_answers_is_refused() {
    let mut options = null(512);
    let DriverOptions::Null(null) = &mut options.driver else {
        unreachable!("made above");
    };
    null.latency_ns = u64::MAX;
    let error = add(&mut Graph::new(), &options).await.unwrap_err();
    assert!(error.message().contains("A delay of"), "{error}");
}

#[tokio::test]
async fn too_many_layers_are_refused() {
    let mut options = null(512);
    for _ in 0..=MAX_CHAIN_DEPTH {
        options = raw(inline(options));
    }
    let error = add(&mut Graph::new(), &options).await.unwrap_err();
    assert!(error.message().contains("layers are refused"), "{error}");
}

#[tokio::test]
async fn unmapping_detected_zeroes_needs_discards() {
    let options = NodeOptions {
        detect_zeroes: DetectZeroes::Unmap,
        ..null(512)
    };
    let error = add(&mut Graph::new(), &options).await.unwrap_err();
    assert!(error.message().contains("detect-zeroes"), "{error}");
}

#[tokio::test]
async fn direct_io_takes_any_request_on_a_file_of_odd_size() {
    let (_dir, path) = image(1000);
    let options = NodeOptions {
        cache: CacheMode {
            direct: true,
            ..CacheMode::default()
        },
        ..named("direct", file(&path))
    };
    let mut graph = Graph::new();
    let node = add(&mut graph, &options).await.unwrap();
    let data = Data::from(vec![3; 20]);
    node.write(985, data.clone(), WriteFlags::default())
        .await
        .unwrap();
    let read = node.read(980, 30).await.unwrap().to_bytes();
    assert_eq!(read[..5], [0; 5]);
    assert_eq!(read[5..25], [3; 20]);
    assert_eq!(read[25..], [0; 5]);
    graph.remove("direct").unwrap().close().await.unwrap();
    assert_eq!(std::fs::read(&path).unwrap()[985..1005], [3; 20]);
}

fn qcow2(below: NodeRef, backing: BackingOption) -> NodeOptions {
    NodeOptions::new(DriverOptions::Qcow2(Qcow2Options {
        backing,
        ..Qcow2Options::new(below)
    }))
}

/// Runs qemu-img in a folder; `None` where it is not installed.
fn qemu_img(folder: &std::path::Path, line: &str) -> Option<()> {
    let mut command = std::process::Command::new("qemu-img");
    command.args(line.split(' ')).current_dir(folder);
    let output = command.output().ok()?;
    assert!(output.status.success(), "{line}: {output:?}");
    Some(())
}

/// base.qcow2 <- middle.qcow2 <- top.qcow2, 1 MiB each, relative names.
fn chain(folder: &std::path::Path) -> Option<()> {
    qemu_img(folder, "create -q -f qcow2 base.qcow2 1M")?;
    qemu_img(
        folder,
        "create -q -f qcow2 -b base.qcow2 -F qcow2 middle.qcow2",
    )?;
    qemu_img(
        folder,
        "create -q -f qcow2 -b middle.qcow2 -F qcow2 top.qcow2",
    )
}

fn path_in(folder: &tempfile::TempDir, name: &str) -> String {
    folder.path().join(name).to_str().unwrap().to_owned()
}

fn image_of(folder: &tempfile::TempDir, name: &str) -> NodeOptions {
    let below = inline(file(&path_in(folder, name)));
    named(
        "image",
        qcow2(below, BackingOption::FromImage(UnnamedFormat::Refused)),
    )
}

#[tokio::test]
async fn a_chain_is_opened_as_the_headers_say_and_read_through() {
    let dir = tempfile::tempdir().unwrap();
    if chain(dir.path()).is_none() {
        eprintln!("skipped: qemu-img is not installed");
        return;
    }
    let mut graph = Graph::new();
    let base = image_of(&dir, "base.qcow2");
    let base = add(&mut graph, &base).await.unwrap();
    let data = Data::from(vec![9; 4096]);
    base.write(70_000, data, WriteFlags::default())
        .await
        .unwrap();
    graph.remove("image").unwrap().close().await.unwrap();
    let top = add(&mut graph, &image_of(&dir, "top.qcow2")).await.unwrap();
    assert_eq!(graph.nodes().count(), 6);
    let middle = top.link("backing").unwrap();
    let base = middle.link("backing").unwrap();
    assert!(middle.behaviour().read_only && base.behaviour().read_only);
    assert_eq!(
        top.read(70_000, 4096).await.unwrap().to_bytes(),
        [9; 4096][..]
    );
    top.write(70_000, Data::from(vec![1; 10]), WriteFlags::default())
        .await
        .unwrap();
    assert_eq!(base.read(70_000, 10).await.unwrap().to_bytes(), [9; 10][..]);
    graph.remove("image").unwrap().close().await.unwrap();
    assert_eq!(graph.nodes().count(), 0);
    qemu_img(dir.path(), "check -q top.qcow2").unwrap();
}

#[tokio::test]
async fn two_formats_never_write_to_one_node() {
    let dir = tempfile::tempdir().unwrap();
    if chain(dir.path()).is_none() {
        eprintln!("skipped: qemu-img is not installed");
        return;
    }
    let mut graph = Graph::new();
    let below = named("f", file(&path_in(&dir, "base.qcow2")));
    add(&mut graph, &below).await.unwrap();
    let on_it = |name| {
        let below = NodeRef::Name("f".to_owned());
        named(name, qcow2(below, BackingOption::Detached))
    };
    add(&mut graph, &on_it("first")).await.unwrap();
    let error = add(&mut graph, &on_it("second")).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InUse);
    assert!(
        error
            .message()
            .starts_with("Permission conflict on node 'f'")
    );
}

#[tokio::test]
async fn a_backing_that_cannot_be_trusted_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    if chain(dir.path()).is_none() {
        eprintln!("skipped: qemu-img is not installed");
        return;
    }
    let rebase = |line: &str| qemu_img(dir.path(), &format!("rebase -u {line}")).unwrap();
    let refuse = async |reason: &str| {
        let error = add(&mut Graph::new(), &image_of(&dir, "top.qcow2"))
            .await
            .unwrap_err();
        assert!(error.message().contains(reason), "{error}");
        assert!(error.message().starts_with("Could not open backing file: "));
    };
    rebase("-b missing.qcow2 -F qcow2 top.qcow2");
    refuse("No such file or directory").await;
    rebase("-b top.qcow2 -F qcow2 top.qcow2");
    refuse("its own backing file").await;
    rebase("-b middle.qcow2 -F qcow2 top.qcow2");
    rebase("-b top.qcow2 -F qcow2 middle.qcow2");
    refuse("its own backing file").await;
    rebase("-b nbd://localhost/x -F raw top.qcow2");
    refuse("only plain files").await;
    // Whatever the header says: the user's word counts.
    let below = inline(file(&path_in(&dir, "top.qcow2")));
    let detached = qcow2(below, BackingOption::Detached);
    add(&mut Graph::new(), &detached).await.unwrap();
}

fn probed(path: &str) -> NodeOptions {
    named(
        "image",
        NodeOptions::new(DriverOptions::Probed(inline(file(path)))),
    )
}

#[tokio::test]
async fn formats_are_found_by_a_look_only_for_who_asks() {
    let dir = tempfile::tempdir().unwrap();
    if qemu_img(dir.path(), "create -q -f qcow2 base.qcow2 1M").is_none() {
        eprintln!("skipped: qemu-img is not installed");
        return;
    }
    std::fs::write(dir.path().join("base.raw"), vec![5; 1 << 20]).unwrap();
    // middle names no format of base, top none of middle: as images of before 2010 do.
    for (base, top) in [("base.qcow2", "a"), ("base.raw", "b")] {
        let middle = format!("create -q -f qcow2 -b {base} -F raw {top}-middle 1M");
        qemu_img(dir.path(), &middle).unwrap();
        forget_backing_format(&dir.path().join(format!("{top}-middle")));
        let above = format!("create -q -f qcow2 -b {top}-middle -F qcow2 {top} 1M");
        qemu_img(dir.path(), &above).unwrap();
    }
    let mut graph = Graph::new();
    for top in ["a", "b"] {
        let error = add(&mut graph, &image_of(&dir, top)).await.unwrap_err();
        assert!(
            error.message().contains("does not name its format"),
            "{error}"
        );
        assert!(error.message().contains("format=auto"), "{error}");
        assert_eq!(graph.nodes().count(), 0);
    }
    for (top, depth, driver) in [("a", 6, "qcow2"), ("b", 6, "raw")] {
        let node = add(&mut graph, &probed(&path_in(&dir, top))).await.unwrap();
        assert_eq!(graph.nodes().count(), depth);
        let base = node.link("backing").unwrap().link("backing").unwrap();
        assert_eq!(base.driver().info().driver, driver);
        let expected = if driver == "raw" { 5 } else { 0 };
        assert_eq!(node.read(0, 1).await.unwrap().to_bytes()[0], expected);
        graph.remove("image").unwrap().close().await.unwrap();
    }
}

/// Turns the header extension with the backing format into one that nobody knows.
fn forget_backing_format(path: &std::path::Path) {
    let mut bytes = std::fs::read(path).unwrap();
    let extension = 0xe279_2aca_u32.to_be_bytes();
    let at = bytes[..4096].windows(4).position(|four| four == extension);
    bytes[at.unwrap()] = 0;
    std::fs::write(path, bytes).unwrap();
}

#[tokio::test]
async fn a_disk_found_to_be_raw_stays_raw() {
    let (_dir, path) = image(1 << 20);
    let mut graph = Graph::new();
    let node = add(&mut graph, &probed(&path)).await.unwrap();
    assert_eq!(node.driver().info().driver, "raw");
    let header = Data::from(b"QFI\xfb\0\0\0\x03".to_vec());
    let write = node.write(0, header.clone(), WriteFlags::default()).await;
    assert_eq!(write.unwrap_err().kind(), ErrorKind::PermissionDenied);
    node.write(4096, header.clone(), WriteFlags::default())
        .await
        .unwrap();
    graph.remove("image").unwrap().close().await.unwrap();
    // Who says raw may write what they like, and it stays raw.
    for _ in 0..2 {
        let said = named("image", raw(inline(file(&path))));
        let node = add(&mut graph, &said).await.unwrap();
        assert_eq!(node.driver().info().driver, "raw");
        node.write(0, header.clone(), WriteFlags::default())
            .await
            .unwrap();
        graph.remove("image").unwrap().close().await.unwrap();
    }
}

/// A qcow2 node on `image.qcow2` of a folder, with this data file.
fn with_data_file(dir: &tempfile::TempDir, data_file: Option<NodeRef>) -> NodeOptions {
    let image = inline(file(&path_in(dir, "image.qcow2")));
    named(
        "d",
        NodeOptions::new(DriverOptions::Qcow2(Qcow2Options {
            data_file,
            ..Qcow2Options::new(image)
        })),
    )
}

#[tokio::test]
async fn a_data_file_is_the_one_of_the_options_and_never_that_of_the_header() {
    let dir = tempfile::tempdir().unwrap();
    let make = "create -q -f qcow2 -o data_file=named.raw image.qcow2 1M";
    if qemu_img(dir.path(), make).is_none() {
        eprintln!("skipped: qemu-img is not installed");
        return;
    }
    std::fs::copy(path_in(&dir, "named.raw"), path_in(&dir, "given.raw")).unwrap();
    let mut graph = Graph::new();
    let error = add(&mut graph, &with_data_file(&dir, None))
        .await
        .unwrap_err();
    assert!(
        error
            .message()
            .contains("the image names 'named.raw', which is not opened for that"),
        "{error}"
    );
    let probed = NodeOptions::new(DriverOptions::Probed(inline(file(&path_in(
        &dir,
        "image.qcow2",
    )))));
    let error = add(&mut graph, &probed).await.unwrap_err();
    assert!(
        error.message().contains("'data-file' is required"),
        "{error}"
    );
    assert_eq!(graph.nodes().count(), 0);

    let given = inline(file(&path_in(&dir, "given.raw")));
    let node = add(&mut graph, &with_data_file(&dir, Some(given)))
        .await
        .unwrap();
    let bytes = Data::from(vec![9; 4096]);
    node.write(70_000, bytes, WriteFlags::default())
        .await
        .unwrap();
    let data = node.link("data-file").unwrap();
    assert_eq!(data.driver().info().filename, path_in(&dir, "given.raw"));
    graph.remove("d").unwrap().close().await.unwrap();
    assert_eq!(graph.nodes().count(), 0);
    let written = |name| std::fs::read(path_in(&dir, name)).unwrap()[70_000];
    assert_eq!((written("given.raw"), written("named.raw")), (9, 0));
}

#[tokio::test]
async fn a_data_file_has_one_writer_and_is_not_the_image_itself() {
    let dir = tempfile::tempdir().unwrap();
    let make = "create -q -f qcow2 -o data_file=data.raw image.qcow2 1M";
    if qemu_img(dir.path(), make).is_none() {
        eprintln!("skipped: qemu-img is not installed");
        return;
    }
    let mut graph = Graph::new();
    let same_file = inline(file(&path_in(&dir, "image.qcow2")));
    let error = add(&mut graph, &with_data_file(&dir, Some(same_file)))
        .await
        .unwrap_err();
    assert!(error.message().contains("lock"), "{error}");
    add(&mut graph, &named("f", file(&path_in(&dir, "image.qcow2"))))
        .await
        .unwrap();
    let same_node = NodeOptions::new(DriverOptions::Qcow2(Qcow2Options {
        data_file: Some(NodeRef::Name("f".to_owned())),
        ..Qcow2Options::new(NodeRef::Name("f".to_owned()))
    }));
    let error = add(&mut graph, &same_node).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InUse, "{error}");
    graph.remove("f").unwrap().close().await.unwrap();

    let data = named("data", file(&path_in(&dir, "data.raw")));
    add(&mut graph, &data).await.unwrap();
    let named_data = Some(NodeRef::Name("data".to_owned()));
    add(&mut graph, &with_data_file(&dir, named_data.clone()))
        .await
        .unwrap();
    let other = named("other", raw(NodeRef::Name("data".to_owned())));
    let error = add(&mut graph, &other).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InUse, "{error}");
    graph.remove("d").unwrap().close().await.unwrap();
    graph.remove("data").unwrap().close().await.unwrap();

    let read_only = NodeOptions {
        read_only: true,
        ..named("data", file(&path_in(&dir, "data.raw")))
    };
    add(&mut graph, &read_only).await.unwrap();
    let error = add(&mut graph, &with_data_file(&dir, named_data.clone()))
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ReadOnly, "{error}");
    let read_only = NodeOptions {
        read_only: true,
        ..with_data_file(&dir, named_data)
    };
    let node = add(&mut graph, &read_only).await.unwrap();
    assert_eq!(node.read(0, 3).await.unwrap().to_bytes(), [0; 3][..]);
}
