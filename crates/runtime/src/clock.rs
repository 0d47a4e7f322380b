//! [`Watch`]: how long a step takes. With one thread that is the thread's time on a processor, so that a profile
//! of one thread also holds on a machine that others use; with more threads it is wall time.

use std::time::{Duration, Instant};

/// Runs from when it is made.
pub(crate) enum Watch {
    /// Processor time of this thread at the start.
    Processor(Duration),
    Wall(Instant),
}

impl Watch {
    /// For work on so many threads, the caller's included.
    pub(crate) fn start(threads: usize) -> Watch {
        match processor_time() {
            Some(time) if threads == 1 => Watch::Processor(time),
            _ => Watch::Wall(Instant::now()),
        }
    }

    /// Time since the start.
    pub(crate) fn elapsed(&self) -> Duration {
        match self {
            Watch::Wall(start) => start.elapsed(),
            Watch::Processor(start) => processor_time().unwrap_or_default().saturating_sub(*start),
        }
    }
}

/// Time that the calling thread has run, where the system says.
#[cfg(all(target_os = "linux", target_pointer_width = "64"))]
fn processor_time() -> Option<Duration> {
    use std::ffi::{c_int, c_long};
    #[repr(C)]
    struct Timespec {
        seconds: c_long,
        nanoseconds: c_long,
    }
    unsafe extern "C" {
        fn clock_gettime(clock: c_int, time: *mut Timespec) -> c_int;
    }
    const THREAD_PROCESSOR_TIME: c_int = 3;
    let mut time = Timespec { seconds: 0, nanoseconds: 0 };
    // SAFETY: the C library's function writes one `timespec`, which on 64-bit Linux is two words.
    let failed = unsafe { clock_gettime(THREAD_PROCESSOR_TIME, &mut time) };
    let (seconds, nanoseconds) = (u64::try_from(time.seconds), u32::try_from(time.nanoseconds));
    (failed == 0).then(|| Some(Duration::new(seconds.ok()?, nanoseconds.ok()?)))?
}

/// As above: other systems are not asked.
#[cfg(not(all(target_os = "linux", target_pointer_width = "64")))]
fn processor_time() -> Option<Duration> {
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sleeping_takes_wall_time_only() {
        let (one, two) = (Watch::start(1), Watch::start(2));
        std::thread::sleep(Duration::from_millis(20));
        assert!(two.elapsed() >= Duration::from_millis(20));
        if matches!(one, Watch::Processor(_)) {
            assert!(one.elapsed() < Duration::from_millis(15), "{:?}", one.elapsed());
        }
    }
}
