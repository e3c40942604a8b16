//! New images over nothing, over empty files and over others' content, kept and not kept.

use super::*;

const SIZE: u64 = 1 << 20;

fn image(path: &Path, content: NewContent) -> NewImage {
    NewImage {
        filename: path.to_str().unwrap().to_owned(),
        content,
    }
}

fn qcow2() -> NewContent {
    NewContent::of_format("qcow2", SIZE, BackingFile::default()).unwrap()
}

fn raw() -> NewContent {
    NewContent::of_format("raw", SIZE, BackingFile::default()).unwrap()
}

async fn make(path: &Path, content: NewContent) -> Result<Created> {
    create_image(&IoContext::new(), &image(path, content), Existing::Replace).await
}

/// The names in a folder, and what is in them.
fn files(folder: &Path) -> Vec<(String, Vec<u8>)> {
    let mut files: Vec<_> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .map(|path| {
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            (name, fs::read(path).unwrap())
        })
        .collect();
    files.sort();
    files
}

#[tokio::test]
async fn what_is_not_kept_leaves_no_trace() {
    for former in [None, Some(""), Some("former content")] {
        for content in [qcow2(), raw()] {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("a.img");
            if let Some(former) = former {
                fs::write(&path, former).unwrap();
            }
            let before = files(folder.path());
            let created = make(&path, content).await.unwrap();
            assert!(created.is_new());
            assert_ne!(files(folder.path()), before);
            drop(created);
            assert_eq!(files(folder.path()), before, "{former:?}");
        }
    }
}

#[tokio::test]
async fn what_is_kept_is_all_that_is_left() {
    for former in [None, Some(""), Some("former content")] {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.img");
        if let Some(former) = former {
            fs::write(&path, former).unwrap();
        }
        make(&path, qcow2()).await.unwrap().keep();
        let files = files(folder.path());
        let [(name, content)] = &files[..] else {
            panic!("{files:?}");
        };
        assert_eq!((name.as_str(), &content[..4]), ("a.img", &b"QFI\xfb"[..]));
    }
}

#[tokio::test]
async fn errors_change_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.img");
    let message = |result: Result<Created>| result.unwrap_err().message().to_owned();
    let odd = NewContent::of_format("qcow2", SIZE + 1, BackingFile::default()).unwrap();
    assert_eq!(
        message(make(&path, odd).await),
        "Image size must be a multiple of 512 bytes"
    );
    let huge = NewContent::Raw {
        size: u64::MAX,
        preallocation: Preallocation::Off,
    };
    let text = message(make(&path, huge.clone()).await);
    assert!(text.starts_with("Could not resize '"), "{text}");
    assert!(text.ends_with("File too large"), "{text}");
    assert_eq!(files(folder.path()), []);
    fs::write(&path, "content").unwrap();
    assert!(make(&path, huge).await.is_err());
    let elsewhere = folder.path().join("missing/a.img");
    assert_eq!(
        message(make(&elsewhere, qcow2()).await),
        format!(
            "Could not create '{}': No such file or directory",
            elsewhere.display()
        )
    );
    assert!(make(folder.path(), qcow2()).await.is_err());
    let content = b"content".to_vec();
    assert_eq!(files(folder.path()), [("a.img".to_owned(), content)]);
}

#[tokio::test]
async fn an_image_that_somebody_uses_is_not_replaced() {
    for former in ["", "content"] {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.img");
        fs::write(&path, former).unwrap();
        let user = open_file(&IoContext::new(), &path).await.unwrap();
        let error = make(&path, qcow2()).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InUse, "{error}");
        assert_eq!(
            files(folder.path()),
            [("a.img".to_owned(), former.as_bytes().to_vec())]
        );
        user.close().await.unwrap();
    }
}

#[tokio::test]
async fn a_link_stays_one_and_permissions_stay() {
    use std::os::unix::fs::PermissionsExt;
    let folder = tempfile::tempdir().unwrap();
    let (path, link) = (folder.path().join("a.img"), folder.path().join("link"));
    fs::write(&path, "content").unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
    std::os::unix::fs::symlink(&path, &link).unwrap();
    let created = make(&link, raw()).await.unwrap();
    let target = path.canonicalize().unwrap();
    assert_eq!(created.path(), target);
    assert_eq!(fs::read(created.former().unwrap()).unwrap(), b"content");
    created.keep();
    assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
    let metadata = fs::metadata(&path).unwrap();
    assert_eq!(metadata.len(), SIZE);
    assert_eq!(metadata.permissions().mode() & 0o777, 0o640);
}

#[tokio::test]
async fn an_image_that_is_there_can_stay() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.img");
    fs::write(&path, "content").unwrap();
    let image = image(&path, qcow2());
    let created = create_image(&IoContext::new(), &image, Existing::Keep)
        .await
        .unwrap();
    assert!(!created.is_new());
    drop(created);
    assert_eq!(fs::read(&path).unwrap(), b"content");
}

#[test]
fn formats_have_qemus_names() {
    let backing = BackingFile {
        name: Some("base".to_owned()),
        format: None,
    };
    let message = |format, backing| {
        let content = NewContent::of_format(format, SIZE, backing);
        content.unwrap_err().message().to_owned()
    };
    assert_eq!(
        message("vmdk", BackingFile::default()),
        "Unknown file format 'vmdk'"
    );
    assert_eq!(
        message("raw", backing),
        "Backing file not supported for file format 'raw'"
    );
}

#[tokio::test]
async fn what_a_killed_process_has_left_beside_is_in_nobodys_way() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path().canonicalize().unwrap();
    for name in ["a.img".to_owned(), "\u{e4}".repeat(127)] {
        let path = folder.join(&name);
        fs::write(&path, "content").unwrap();
        let left = beside(&path);
        fs::write(&left, "left").unwrap();
        make(&path, raw()).await.unwrap().keep();
        assert_eq!(fs::metadata(&path).unwrap().len(), SIZE);
        assert_eq!(fs::read(left).unwrap(), b"left");
        assert_ne!(beside(&path), path);
    }
}
