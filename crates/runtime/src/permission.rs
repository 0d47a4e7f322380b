//! Permission to use AMX tiles. Their state is 8 KiB per thread, and Linux gives a process room for it
//! only when asked; without, the first tile instruction ends the process.

/// Asks the system for tile state, for all threads of this process. False when it refuses, or knows no
/// such thing; asking again does no harm.
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
pub fn request_tiles() -> bool {
    use std::ffi::c_long;
    unsafe extern "C" {
        fn syscall(number: c_long, ...) -> c_long;
    }
    const ARCH_PRCTL: c_long = 158;
    const ARCH_REQ_XCOMP_PERM: c_long = 0x1023;
    const TILE_DATA: c_long = 18;
    // SAFETY: the C library's `syscall`, with a request that takes one number and reads or writes no
    // memory of ours; a kernel that does not know it answers with an error.
    unsafe { syscall(ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, TILE_DATA) == 0 }
}

/// As above: other systems give no tiles.
#[cfg(not(all(target_os = "linux", target_arch = "x86_64")))]
pub fn request_tiles() -> bool {
    false
}

#[cfg(all(test, target_os = "linux", target_arch = "x86_64"))]
mod tests {
    /// The system says yes exactly where it lists the feature.
    #[test]
    fn the_answer_fits_the_processor() {
        let info = std::fs::read_to_string("/proc/cpuinfo").unwrap();
        let listed = info.split_whitespace().any(|w| w == "amx_tile");
        assert_eq!(super::request_tiles(), listed);
    }
}
