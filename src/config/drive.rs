//! `--drive`: QEMU's -drive, without the parts that belong to a machine.

use block::graph::{ErrorPolicy, OnError};
use block::open::{Aio, CacheMode, DetectZeroes, DiscardMode};
use qapi::rt::decode::{Decoded, Members, boolean, name, size, string};
use qapi::rt::{Path, Value};

use super::flat;

/// A drive: a name that clients call `device`, and the image behind it.
#[derive(Debug, Clone, PartialEq)]
pub struct DriveOptions {
    /// The name; the daemon counts `drive0`, `drive1`, ... where none is given.
    pub id: Option<String>,
    /// The image; without one the drive is empty.
    pub file: Option<String>,
    /// Its format. Guessed from the image only when the user says so: a guest writes those bytes.
    pub format: DriveFormat,
    /// Create the image with this many bytes if there is none.
    pub size: Option<u64>,
    /// The host's page cache and flushes.
    pub cache: CacheMode,
    /// How requests that would block are run.
    pub aio: Aio,
    /// Refuse writes.
    pub read_only: bool,
    /// What happens to guest discards.
    pub discard: DiscardMode,
    /// What happens to written zeroes.
    pub detect_zeroes: DetectZeroes,
    /// What is to happen when requests fail.
    pub policy: ErrorPolicy,
}

/// The format of a drive's image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DriveFormat {
    /// Nothing is said: qcow2.
    #[default]
    Unsaid,
    /// qcow2.
    Qcow2,
    /// The bytes as they are.
    Raw,
    /// qcow2 if the image begins as one, else raw; backing files without a named format alike.
    Auto,
}

const KEYS: &[&str] = &[
    "id",
    "file",
    "format",
    "size",
    "cache",
    "aio",
    "readonly",
    "read-only",
    "discard",
    "detect-zeroes",
    "werror",
    "rerror",
    "if",
    "media",
    "index",
];

impl DriveOptions {
    /// Reads `id=,file=,format=,...`.
    pub(super) fn parse(text: &str) -> Result<DriveOptions, String> {
        let options = flat::parse(text, None, KEYS)?;
        let at = Path::keyval();
        Members::open(Value::Object(options), &at)
            .and_then(|mut members| decode(&mut members))
            .map_err(|error| error.desc)
    }
}

fn decode(members: &mut Members<'_>) -> Decoded<DriveOptions> {
    let usual = ErrorPolicy::default();
    // `if`, `media` and `index` place a drive in a machine; there is none here, so they stay unread.
    Ok(DriveOptions {
        id: members.optional("id", string)?,
        file: members.optional("file", string)?,
        format: enumerated(members, "format", drive_format)?.unwrap_or_default(),
        size: members.optional("size", size)?,
        cache: enumerated(members, "cache", cache_mode)?.unwrap_or_default(),
        aio: enumerated(members, "aio", aio)?.unwrap_or_default(),
        read_only: members.optional("readonly", boolean)?.unwrap_or(false)
            || members.optional("read-only", boolean)?.unwrap_or(false),
        discard: enumerated(members, "discard", discard)?.unwrap_or_default(),
        detect_zeroes: enumerated(members, "detect-zeroes", detect_zeroes)?.unwrap_or_default(),
        policy: ErrorPolicy {
            write: enumerated(members, "werror", write_error)?.unwrap_or(usual.write),
            read: enumerated(members, "rerror", read_error)?.unwrap_or(usual.read),
        },
    })
}

/// A member that is one of a few words.
fn enumerated<T>(
    members: &mut Members<'_>,
    key: &'static str,
    find: fn(&str) -> Option<T>,
) -> Decoded<Option<T>> {
    let at = Path::keyval();
    let at = at.member(key);
    members
        .optional(key, string)?
        .map(|word| name(Value::String(word), &at, find))
        .transpose()
}

fn drive_format(word: &str) -> Option<DriveFormat> {
    match word {
        "qcow2" => Some(DriveFormat::Qcow2),
        "raw" => Some(DriveFormat::Raw),
        "auto" => Some(DriveFormat::Auto),
        _ => None,
    }
}

fn cache_mode(word: &str) -> Option<CacheMode> {
    let (direct, no_flush, writethrough) = match word {
        "none" | "off" => (true, false, false),
        "writeback" => (false, false, false),
        "writethrough" => (false, false, true),
        "directsync" => (true, false, true),
        "unsafe" => (false, true, false),
        _ => return None,
    };
    Some(CacheMode {
        direct,
        no_flush,
        writethrough,
    })
}

fn aio(word: &str) -> Option<Aio> {
    match word {
        "threads" => Some(Aio::Threads),
        // Linux' older interface for the same purpose; io_uring does all it did.
        "native" | "io_uring" => Some(Aio::IoUring),
        _ => None,
    }
}

fn discard(word: &str) -> Option<DiscardMode> {
    match word {
        "ignore" | "off" => Some(DiscardMode::Ignore),
        "unmap" | "on" => Some(DiscardMode::Unmap),
        _ => None,
    }
}

fn detect_zeroes(word: &str) -> Option<DetectZeroes> {
    match word {
        "off" => Some(DetectZeroes::Off),
        "on" => Some(DetectZeroes::On),
        "unmap" => Some(DetectZeroes::Unmap),
        _ => None,
    }
}

fn write_error(word: &str) -> Option<OnError> {
    match word {
        "enospc" => Some(OnError::Enospc),
        _ => read_error(word),
    }
}

fn read_error(word: &str) -> Option<OnError> {
    match word {
        "report" => Some(OnError::Report),
        "ignore" => Some(OnError::Ignore),
        "stop" => Some(OnError::Stop),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_drive_of_qemus_command_line_is_read() {
        let drive = DriveOptions::parse(
            "file=a,,b.img,format=raw,if=virtio,index=3,media=disk,id=hd0,cache=none,aio=native,readonly=on,\
             discard=unmap,detect-zeroes=on,werror=stop,rerror=report,size=1.5G",
        )
        .unwrap();
        assert_eq!(
            drive,
            DriveOptions {
                id: Some("hd0".to_owned()),
                file: Some("a,b.img".to_owned()),
                format: DriveFormat::Raw,
                size: Some(3 << 29),
                cache: CacheMode {
                    direct: true,
                    no_flush: false,
                    writethrough: false
                },
                aio: Aio::IoUring,
                read_only: true,
                discard: DiscardMode::Unmap,
                detect_zeroes: DetectZeroes::On,
                policy: ErrorPolicy {
                    write: OnError::Stop,
                    read: OnError::Report,
                },
            }
        );
    }

    #[test]
    fn formats_are_probed_only_by_word() {
        let format = |text| DriveOptions::parse(text).unwrap().format;
        assert_eq!(format("file=a"), DriveFormat::Unsaid);
        assert_eq!(format("file=a,format=qcow2"), DriveFormat::Qcow2);
        assert_eq!(format("file=a,format=auto"), DriveFormat::Auto);
    }

    #[test]
    fn bad_drives_are_named() {
        let cases = [
            ("id=a,bogus=1", "Invalid parameter 'bogus'"),
            (
                "id=a,format=vmdk",
                "Parameter 'format' does not accept value 'vmdk'",
            ),
            (
                "id=a,cache=often",
                "Parameter 'cache' does not accept value 'often'",
            ),
            (
                "id=a,readonly=perhaps",
                "Parameter 'readonly' expects 'on' or 'off'",
            ),
            (
                "id=a,rerror=enospc",
                "Parameter 'rerror' does not accept value 'enospc'",
            ),
            ("id=a,size=big", "Parameter 'size' expects size"),
        ];
        for (text, expected) in cases {
            assert_eq!(
                DriveOptions::parse(text),
                Err(expected.to_owned()),
                "{text}"
            );
        }
    }
}
