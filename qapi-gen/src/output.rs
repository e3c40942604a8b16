//! Writing what the emitters made: the other rim of the generator.

use std::path::Path;
use std::{fs, io};

use crate::emit::OutputFile;

/// Writes `files` below `folder`. A file that already has its text is left alone, so that nothing
/// is built again for it.
///
/// # Errors
/// The path that could not be written, and why.
pub fn write(folder: &Path, files: &[OutputFile]) -> io::Result<()> {
    for file in files {
        let path = folder.join(&file.path);
        write_if_changed(&path, &file.text).map_err(|error| {
            io::Error::new(
                error.kind(),
                format!("can't write '{}': {error}", path.display()),
            )
        })?;
    }
    Ok(())
}

fn write_if_changed(path: &Path, text: &str) -> io::Result<()> {
    if fs::read_to_string(path).is_ok_and(|old| old == text) {
        return Ok(());
    }
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder)?;
    }
    fs::write(path, text)
}
