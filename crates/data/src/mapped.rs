//! [`MappedFile`]: a file as bytes in memory, without reading it. The only place that maps files.

use memmap2::Mmap;
use std::fs::File;
use std::ops::{Deref, Range};
use std::path::Path;
use std::sync::Arc;
use tilewright_base::{Error, Result};

/// A file mapped into memory, read-only.
#[derive(Debug)]
pub struct MappedFile(Mmap);

impl MappedFile {
    /// Maps a regular file.
    pub fn open(path: &Path) -> Result<Arc<MappedFile>> {
        let cannot = |e| Error::user(format!("cannot read `{}`: {e}", path.display()));
        let file = File::open(path).map_err(cannot)?;
        if !file.metadata().map_err(cannot)?.is_file() {
            return Err(Error::user(format!("`{}` is not a file", path.display())));
        }
        // SAFETY: the map is read-only and every byte pattern is a valid byte. If another process
        // shortens or rewrites the file meanwhile, reads see other bytes or the process gets a bus
        // error: that is the one promise that no reader of mapped weights can check, and the accepted
        // price of not copying them.
        let map = unsafe { Mmap::map(&file) }.map_err(cannot)?;
        Ok(Arc::new(MappedFile(map)))
    }

    /// Says that these bytes will not be read for now: the system may take their memory, and gets them from the
    /// file again when they are. Bytes beyond the file's end are nobody's.
    pub(crate) fn let_go(&self, range: Range<usize>) {
        let end = range.end.min(self.0.len());
        let Some(len) = end.checked_sub(range.start).filter(|len| *len > 0) else { return };
        #[cfg(target_os = "linux")]
        {
            // SAFETY: the map is of a file and read-only, so its pages hold nothing that the file does not: a
            // page that goes comes back as it was. The range lies inside the map.
            let advised = unsafe {
                self.0.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, range.start, len)
            };
            // It may refuse, and nothing depends on it.
            let _ = advised;
        }
        #[cfg(not(target_os = "linux"))]
        let _ = len;
    }
}

impl Deref for MappedFile {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_mapped_and_folders_are_not() {
        let path = std::env::temp_dir().join(format!("tilewright-mapped-{}", std::process::id()));
        std::fs::write(&path, b"some bytes").unwrap();
        assert_eq!(&**MappedFile::open(&path).unwrap(), b"some bytes");
        std::fs::remove_file(&path).unwrap();
        assert_eq!(MappedFile::open(&path).unwrap_err().exit_code(), 2);
        let error = MappedFile::open(&std::env::temp_dir()).unwrap_err();
        assert!(error.message().ends_with("is not a file"), "{error}");
    }
}
