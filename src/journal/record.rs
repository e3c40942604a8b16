//! The lines of a journal.

use std::fs::{self, Metadata};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

use block::io::FileIdentity;
use block::open::Overwritten;
use serde::{Deserialize, Serialize};

use super::report::Report;
use super::sparse::Sparse;

/// Which file it is, whatever its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// As [`FileIdentity::device`].
    pub device: u64,
    /// As [`FileIdentity::inode`].
    pub inode: u64,
}

impl From<FileIdentity> for Identity {
    fn from(FileIdentity { device, inode }: FileIdentity) -> Self {
        Identity { device, inode }
    }
}

impl Identity {
    /// Of the file with this metadata.
    pub fn of(metadata: &Metadata) -> Self {
        FileIdentity::of(metadata).into()
    }
}

/// Seconds since 1970, and nanoseconds.
pub(super) type Time = (i64, i64);

/// When a file was changed last. `None` for a device, which does not tell.
pub(super) fn modified(metadata: &Metadata) -> Option<Time> {
    metadata
        .is_file()
        .then(|| (metadata.mtime(), metadata.mtime_nsec()))
}

/// A time that files of these paths were not changed behind: now, or later where their clock is ahead of ours.
pub(super) fn last_change(paths: &[PathBuf]) -> Time {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    let since = since.unwrap_or_default();
    let now = (since.as_secs() as i64, i64::from(since.subsec_nanos()));
    let files = paths.iter().filter_map(|path| fs::metadata(path).ok());
    let times = files.filter_map(|metadata| modified(&metadata));
    times.fold(now, Time::max)
}

/// An image that a transaction will change.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StagedImage {
    /// Its path, from the root.
    pub path: PathBuf,
    /// Which file that is.
    pub file: Identity,
    /// Where the image begins in the file, in bytes.
    pub offset: u64,
}

/// The write that switches an image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageSwitch {
    /// The image.
    pub image: StagedImage,
    /// When its file is changed by this transaction for the last time. What is changed later is changed by somebody else. `None` for
    /// a device, which does not tell.
    pub until: Option<Time>,
    /// Its first sector as it is.
    #[serde(with = "hex")]
    pub before: Vec<u8>,
    /// Where it differs then, in bytes from its beginning.
    pub at: usize,
    /// What is there then.
    #[serde(with = "hex")]
    pub bytes: Vec<u8>,
}

impl ImageSwitch {
    /// Its first sector as it will be. `None` where the parts do not fit together.
    pub(super) fn after(&self) -> Option<Vec<u8>> {
        let mut after = self.before.clone();
        let end = self.at.checked_add(self.bytes.len())?;
        after.get_mut(self.at..end)?.copy_from_slice(&self.bytes);
        Some(after)
    }
}

/// An action of a transaction, as the client has given it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct JournaledAction {
    /// What it does.
    pub kind: ActionKind,
    /// The disk, as the client calls it.
    pub device: String,
    /// The image that the disk is before the action: its path, from the root.
    pub image: Option<PathBuf>,
    /// Which file that is, unless an action before makes it.
    pub image_file: Option<Identity>,
    /// The overlay or target that it makes or opens: its path, from the root.
    pub filename: Option<PathBuf>,
    /// The node that the client wants to have, or has given.
    pub node_name: Option<String>,
    /// The internal snapshot, by its name, or its id where there is no name.
    pub snapshot: Option<String>,
    /// The job that the client has named.
    pub job_id: Option<String>,
}

/// What an action does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ActionKind {
    /// Puts a node on a disk.
    OverlayNode,
    /// Puts an image file on a disk.
    OverlayFile,
    /// Takes an internal snapshot.
    Create,
    /// Deletes an internal snapshot.
    Delete,
    /// Makes a disk what an internal snapshot has.
    Revert,
    /// Begins a backup to a file.
    BackupToFile,
    /// Begins a backup to a node.
    BackupToNode,
}

impl JournaledAction {
    /// An action on a disk, of which nothing else is known.
    pub fn new(kind: ActionKind, device: String) -> Self {
        JournaledAction {
            kind,
            device,
            image: None,
            image_file: None,
            filename: None,
            node_name: None,
            snapshot: None,
            job_id: None,
        }
    }
}

/// A file that a transaction makes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Creation {
    /// Its path, from the root.
    pub path: PathBuf,
    /// What was there before, if anything was.
    pub former: Option<Identity>,
    /// It was an empty file: the new content is put into it.
    pub was_empty: bool,
    /// Where what was there is kept meanwhile, or what takes its place is made.
    pub beside: Option<PathBuf>,
    /// Of a device, what it holds in front, and is to hold there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub overwritten: Option<Front>,
}

/// The front of a device, which an image is made over.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Front {
    before: Sparse,
    after: Sparse,
}

impl Front {
    pub(super) fn new(overwritten: &Overwritten) -> Self {
        Front {
            before: Sparse::new(&overwritten.before),
            after: Sparse::new(&overwritten.after),
        }
    }

    /// `None` where the parts do not fit together.
    pub(super) fn overwritten(&self) -> Option<Overwritten> {
        let (before, after) = (self.before.bytes()?, self.after.bytes()?);
        (before.len() == after.len()).then_some(Overwritten { before, after })
    }
}

/// A line.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "record", rename_all = "kebab-case")]
pub(super) enum Record {
    /// The first.
    Begin {
        /// Of this form of the journal.
        version: u32,
        uuid: String,
        /// Seconds since 1970.
        time: u64,
        /// What it consists of.
        actions: Vec<JournaledAction>,
    },
    /// These images will be changed: what a crash leaves in them is to be looked for.
    Stages { images: Vec<StagedImage> },
    /// A file is about to be made.
    Creates(Creation),
    /// It is made.
    Created { path: PathBuf, file: Identity },
    /// From here on everything is to happen.
    Commit { switches: Vec<ImageSwitch> },
    /// From here on nothing is.
    Abort,
    /// All has been taken back but these images. These files stay. The others go, unless they were written to after this time:
    /// somebody uses them.
    Leaves {
        images: Vec<PathBuf>,
        files: Vec<PathBuf>,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        time: Option<Time>,
    },
    /// Nothing is left to do.
    Done,
    /// A start has done what was to be done. What it has failed to do the next one tries again, but not where somebody has written
    /// after this time.
    Recovered {
        report: Report,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        time: Option<Time>,
    },
}

/// The present form.
pub(super) const VERSION: u32 = 1;

impl Record {
    /// The line.
    pub(super) fn encode(&self) -> Vec<u8> {
        // Cannot fail: all keys are texts, and paths were checked to be.
        let json = serde_json::to_string(self).unwrap_or_default();
        format!("{:08x} {json}\n", crc32(json.as_bytes())).into_bytes()
    }

    /// The lines up to the first that is not whole, and how many bytes they take.
    pub(super) fn decode_all(bytes: &[u8]) -> (Vec<Record>, usize) {
        let mut records = Vec::new();
        let mut end = 0;
        for line in bytes.split_inclusive(|byte| *byte == b'\n') {
            let Some(record) = Record::decode(line) else {
                break;
            };
            records.push(record);
            end += line.len();
        }
        (records, end)
    }

    fn decode(line: &[u8]) -> Option<Record> {
        let text = std::str::from_utf8(line.strip_suffix(b"\n")?).ok()?;
        let (crc, json) = text.split_once(' ')?;
        if u32::from_str_radix(crc, 16).ok()? != crc32(json.as_bytes()) {
            return None;
        }
        serde_json::from_str(json).ok()
    }
}

/// The CRC of Ethernet and zip.
fn crc32(bytes: &[u8]) -> u32 {
    let step = |crc: u32, byte: &u8| (crc >> 8) ^ CRC_OF_BYTE[usize::from(crc as u8 ^ byte)];
    !bytes.iter().fold(!0, step)
}

const CRC_OF_BYTE: [u32; 256] = {
    let mut table = [0; 256];
    let mut byte = 0;
    while byte < 256 {
        let mut crc = byte as u32;
        let mut bit = 0;
        while bit < 8 {
            crc = (crc >> 1) ^ (0xedb8_8320 & 0_u32.wrapping_sub(crc & 1));
            bit += 1;
        }
        table[byte] = crc;
        byte += 1;
    }
    table
};

/// Bytes as text.
pub(super) mod hex {
    use serde::de::Error as _;
    use serde::{Deserialize as _, Deserializer, Serializer};

    pub(in crate::journal) fn serialize<S: Serializer>(
        bytes: &[u8],
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        let digit = |value: u8| char::from(b"0123456789abcdef"[usize::from(value & 15)]);
        let digits = bytes
            .iter()
            .flat_map(|byte| [digit(byte >> 4), digit(*byte)]);
        serializer.serialize_str(&digits.collect::<String>())
    }

    pub(in crate::journal) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Vec<u8>, D::Error> {
        let text = String::deserialize(deserializer)?;
        let pair = |at: usize| {
            let digits = text.get(at..at + 2)?;
            u8::from_str_radix(digits, 16).ok()
        };
        let bytes: Option<Vec<u8>> = (0..text.len()).step_by(2).map(pair).collect();
        bytes.ok_or_else(|| D::Error::custom("not hexadecimal"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_crc_is_the_usual_one() {
        assert_eq!(crc32(b"123456789"), 0xcbf4_3926);
    }

    #[test]
    fn a_record_of_an_older_daemon_has_no_time() {
        let json = r#"{"record":"leaves","images":[],"files":["/a"]}"#;
        let line = format!("{:08x} {json}\n", crc32(json.as_bytes()));
        let leaves = Record::Leaves {
            images: Vec::new(),
            files: vec!["/a".into()],
            time: None,
        };
        assert_eq!(leaves.encode(), line.as_bytes());
        assert_eq!(Record::decode_all(line.as_bytes()).0, [leaves]);
    }

    #[test]
    fn a_torn_line_and_what_follows_it_do_not_count() {
        let records = [
            Record::Begin {
                version: VERSION,
                uuid: "u".to_owned(),
                time: 1,
                actions: vec![JournaledAction::new(ActionKind::Create, "d".to_owned())],
            },
            Record::Commit {
                switches: vec![ImageSwitch {
                    image: StagedImage {
                        path: "/a \"b\"\n.qcow2".into(),
                        file: Identity {
                            device: 1,
                            inode: u64::MAX,
                        },
                        offset: 0,
                    },
                    until: Some((-1, 5)),
                    before: vec![0, 1, 0xab, 0xff],
                    at: 2,
                    bytes: vec![0; 2],
                }],
            },
            Record::Abort,
        ];
        let bytes: Vec<u8> = records.iter().flat_map(Record::encode).collect();
        assert_eq!(Record::decode_all(&bytes), (records.to_vec(), bytes.len()));
        let ends: Vec<usize> = records
            .iter()
            .scan(0, |at, record| {
                *at += record.encode().len();
                Some(*at)
            })
            .collect();
        for len in 0..bytes.len() {
            let whole = ends.iter().filter(|end| **end <= len).count();
            // As a crash leaves it in space that was written before.
            let mut torn = bytes[..len].to_vec();
            torn.resize(bytes.len() + 100, 0);
            assert_eq!(Record::decode_all(&torn).0, records[..whole], "{len}");
        }
        for at in 0..bytes.len() {
            let mut wrong = bytes.clone();
            wrong[at] ^= 1;
            let whole = ends.iter().filter(|end| **end <= at).count();
            assert_eq!(Record::decode_all(&wrong).0, records[..whole], "{at}");
        }
    }
}
