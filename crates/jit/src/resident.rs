//! The memory that LLVM's own code takes, given back when no kernel is to be compiled for now.
//!
//! LLVM is a shared library of over a hundred megabytes. What starting it touches stays resident, some 35 MB, even
//! where every kernel comes out of the cache; weights are packed and results computed after that.

/// Gives back the memory of LLVM's machine code. It is read from the library's file again when LLVM runs again. Does
/// nothing where LLVM is linked statically, and on systems other than Linux.
pub fn let_go_of_compiler() {
    #[cfg(target_os = "linux")]
    if let Ok(maps) = std::fs::read_to_string("/proc/self/maps") {
        code_of(&maps, "libLLVM").into_iter().for_each(let_go);
    }
}

/// Address ranges of a library's machine code in the text of `/proc/self/maps`: not writable, executable, private.
#[cfg(target_os = "linux")]
fn code_of(maps: &str, library: &str) -> Vec<(usize, usize)> {
    let range = |line: &str| {
        let mut words = line.split_whitespace();
        let (range, permissions) = (words.next()?, words.next()?);
        let file = words.nth(3)?.rsplit('/').next()?;
        let (start, end) = range.split_once('-')?;
        let number = |digits: &str| usize::from_str_radix(digits, 16).ok();
        let found = permissions == "r-xp" && file.starts_with(library);
        found.then_some((number(start)?, number(end)?))
    };
    maps.lines().filter_map(range).collect()
}

#[cfg(target_os = "linux")]
fn let_go((start, end): (usize, usize)) {
    use std::ffi::{c_int, c_void};
    unsafe extern "C" {
        fn madvise(address: *mut c_void, length: usize, advice: c_int) -> c_int;
    }
    const MADV_DONTNEED: c_int = 4;
    // SAFETY: the range is a whole private mapping of a file's code that cannot be written, so its pages hold what the
    // file holds (code of shared libraries is not relocated), and one that is gone is read from there when it is used
    // next, by whichever thread. The system may refuse, and nothing depends on it.
    let _ = unsafe { madvise(start as *mut c_void, end.saturating_sub(start), MADV_DONTNEED) };
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[test]
    fn code_is_found_by_the_librarys_name() {
        let maps = "7f10-7f20 r--p 00000000 fe:00 12  /lib/libLLVM.so.22.1\n\
                    7f20-7f90 r-xp 00010000 fe:00 12  /lib/libLLVM.so.22.1\n\
                    7f90-7fa0 rw-p 00080000 fe:00 12  /lib/libLLVM.so.22.1\n\
                    7fb0-7fc0 r-xp 00000000 fe:00 13  /lib/libc.so.6\n\
                    7fd0-7fe0 rwxp 00000000 00:00 0\n";
        assert_eq!(code_of(maps, "libLLVM"), [(0x7f20, 0x7f90)]);
    }

    /// Code that was given back still runs.
    #[test]
    fn the_compiler_works_afterwards() {
        let source = crate::Source {
            symbol: "nothing".into(),
            text: "define void @nothing(ptr %0) {\n  ret void\n}\n".into(),
        };
        for _ in 0..2 {
            let jit = crate::Jit::new(crate::Options::default()).unwrap();
            let build = jit.build(std::slice::from_ref(&source)).unwrap();
            assert!(!build.library.address(0).is_null());
            let_go_of_compiler();
        }
    }
}
