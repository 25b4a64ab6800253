//! Files that are there whole or not at all, also after a loss of power.
//!
//! Why every file of the state folder is written so: half a key is an authority lost, half a list of objects a mesh
//! that forgets half of its services at the next start.

use std::{
    fs,
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    path::Path,
};

/// Writes a file whole or not at all; what it said so survives a loss of power.
pub(crate) fn write(path: &Path, bytes: &[u8], mode: u32) -> io::Result<()> {
    let temporary = path.with_extension(format!("{}.tmp", std::process::id()));
    let _ = fs::remove_file(&temporary);
    let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(mode).open(&temporary)?;
    file.write_all(bytes).and_then(|()| file.sync_all())?;
    fs::rename(&temporary, path)?;
    let folder = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    fs::File::open(folder.unwrap_or(Path::new("."))).and_then(|folder| folder.sync_all())
}

/// Writes a private file that is not there yet, whole or not at all. False: somebody else was first.
pub(crate) fn write_first(path: &Path, bytes: &[u8]) -> io::Result<bool> {
    let own = path.with_extension(format!("new-{}", std::process::id()));
    write(&own, bytes, 0o600)?;
    let linked = fs::hard_link(&own, path);
    fs::remove_file(&own)?;
    match linked {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(false),
        Err(error) => Err(error),
    }
}
