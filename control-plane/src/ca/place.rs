//! Where the authority's files are: a folder, or memory that somebody else keeps.
//!
//! Why one type for both: in a cluster the same files are the entries of a Secret, and an authority that moves from one
//! to the other must stay the same authority. Who works with roots does not ask where they are.

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
};

use zeroize::Zeroizing;

use super::CaError;
use crate::disk;

/// Where the files are.
#[derive(Clone)]
pub enum Place {
    /// A folder.
    Folder(PathBuf),
    /// Memory; somebody else keeps it (the entries of a Secret).
    Memory(Files),
}

/// Files by name.
pub type Files = BTreeMap<String, Zeroizing<Vec<u8>>>;

impl Place {
    pub(super) fn path(&self, name: &str) -> PathBuf {
        match self {
            Self::Folder(folder) => folder.join(name),
            Self::Memory(_) => Path::new("secret").join(name),
        }
    }

    pub(super) fn read(&self, name: &str) -> std::io::Result<Zeroizing<Vec<u8>>> {
        match self {
            Self::Folder(folder) => fs::read(folder.join(name)).map(Zeroizing::new),
            Self::Memory(files) => files.get(name).cloned().ok_or(std::io::ErrorKind::NotFound.into()),
        }
    }

    pub(super) fn write(&mut self, name: &str, bytes: &[u8], mode: u32) -> Result<(), CaError> {
        match self {
            Self::Folder(folder) => {
                let path = folder.join(name);
                disk::write(&path, bytes, mode).map_err(|error| CaError::File { path, error })
            }
            Self::Memory(files) => {
                files.insert(name.to_owned(), Zeroizing::new(bytes.to_vec()));
                Ok(())
            }
        }
    }

    pub(super) fn has(&self, name: &str) -> bool {
        match self {
            Self::Folder(folder) => folder.join(name).exists(),
            Self::Memory(files) => files.contains_key(name),
        }
    }
}

impl std::fmt::Debug for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Folder(folder) => folder.fmt(f),
            Self::Memory(_) => f.write_str("memory"),
        }
    }
}

/// Makes the state folder. Others may enter it: sidecars read the anchors there; keys are 0600 each.
pub(super) fn make_folder(state: &Path) -> Result<(), CaError> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o755)
        .create(state)
        .map_err(|error| CaError::File { path: state.to_owned(), error })
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) struct StateDir(pub(crate) PathBuf);

    impl StateDir {
        pub(crate) fn new(name: &str) -> Self {
            let path = std::env::temp_dir().join(format!("weft-state-{name}-{}", std::process::id()));
            let _ = fs::remove_dir_all(&path);
            fs::create_dir_all(&path).unwrap();
            Self(path)
        }
    }

    impl Drop for StateDir {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }
}
