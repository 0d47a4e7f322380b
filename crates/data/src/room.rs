//! Whether memory can be had at all.

use tilewright_base::{Error, Result};

/// Requests below this are not checked: asking the system takes longer than getting them.
const UNCHECKED_BYTES: usize = 256 << 20;

/// Errors when `bytes` do not fit the memory that is left. The system grants more than it has and
/// ends the process when it is used, so large requests ask first.
pub fn check_memory(bytes: usize, what: &str) -> Result<()> {
    let enough = bytes < UNCHECKED_BYTES || available_bytes().is_none_or(|left| bytes <= left);
    if enough { Ok(()) } else { Err(out_of_memory(bytes, what)) }
}

/// The error when `bytes` for `what` cannot be had.
pub fn out_of_memory(bytes: usize, what: &str) -> Error {
    Error::user(format!("out of memory: {what} takes {bytes} bytes"))
        .with_hint("use smaller sizes, or a machine with more memory")
}

/// What the system, or the control group that this process lives in, has left; `None` when neither
/// says.
fn available_bytes() -> Option<usize> {
    let read = |file: &str| std::fs::read_to_string(file).ok();
    let number = |file: &str| read(file)?.trim().parse::<usize>().ok();
    let system = read("/proc/meminfo").and_then(|text| {
        let line = text.lines().find(|l| l.starts_with("MemAvailable:"))?;
        line.split_ascii_whitespace().nth(1)?.parse::<usize>().ok()?.checked_mul(1024)
    });
    let group = number("/sys/fs/cgroup/memory.max")
        .zip(number("/sys/fs/cgroup/memory.current"))
        .map(|(max, current)| {
            // Cached files count as used, but give way.
            let stat = read("/sys/fs/cgroup/memory.stat").unwrap_or_default();
            let file = stat.lines().find_map(|l| l.strip_prefix("file ")?.parse::<usize>().ok());
            max.saturating_sub(current.saturating_sub(file.unwrap_or(0)))
        });
    match (system, group) {
        (Some(a), Some(b)) => Some(a.min(b)),
        (a, b) => a.or(b),
    }
}
