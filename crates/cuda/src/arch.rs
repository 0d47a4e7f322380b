//! [`Arch`]: what machine code is compiled for, and which devices run it.

use std::fmt;
use std::str::FromStr;

/// An architecture by its CUDA name: `sm_80`, `sm_89`, `sm_90a`. Prints and parses as that.
///
/// The letter matters: `sm_90a` has the instructions of Hopper that no other device has (warpgroup
/// products, register reallocation), and its code runs on compute capability 9.0 only.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Arch {
    /// Ten times the major plus the minor number of the compute capability.
    number: u16,
    feature: Feature,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Feature {
    /// Runs on later minor versions of the same major one.
    None,
    /// `f`: the family, later minor versions included.
    Family,
    /// `a`: exactly this one.
    Exact,
}

impl Arch {
    /// Ampere (A100).
    pub const SM_80: Arch = Arch { number: 80, feature: Feature::None };
    /// Ada (RTX 40, L4, L40).
    pub const SM_89: Arch = Arch { number: 89, feature: Feature::None };
    /// Hopper (H100, H200), with the instructions only it has.
    pub const SM_90A: Arch = Arch { number: 90, feature: Feature::Exact };
    /// Blackwell for data centres (B200), with the instructions only it has.
    pub const SM_100A: Arch = Arch { number: 100, feature: Feature::Exact };

    /// The best name for a device: with the letter `a` from Hopper on.
    pub fn of_device(major: u32, minor: u32) -> Arch {
        let number = u16::try_from(major.saturating_mul(10).saturating_add(minor));
        let feature = if major >= 9 { Feature::Exact } else { Feature::None };
        Arch { number: number.unwrap_or(u16::MAX), feature }
    }

    /// Major number of the compute capability: 9 of `sm_90a`.
    pub fn major(self) -> u32 {
        u32::from(self.number / 10)
    }

    /// Minor number of the compute capability: 0 of `sm_90a`.
    pub fn minor(self) -> u32 {
        u32::from(self.number % 10)
    }

    /// Whether machine code for this runs on a device of that compute capability.
    pub fn runs_on(self, major: u32, minor: u32) -> bool {
        match self.feature {
            Feature::Exact => (self.major(), self.minor()) == (major, minor),
            Feature::None | Feature::Family => self.major() == major && self.minor() <= minor,
        }
    }

    /// Whether a driver can translate assembly text (PTX) for this to a device of that compute capability: that one or a later
    /// one; what has a letter stays where it is (CUDA C++ Programming Guide, "PTX compatibility").
    pub fn translates_to(self, major: u32, minor: u32) -> bool {
        match self.feature {
            Feature::None => (self.major(), self.minor()) <= (major, minor),
            Feature::Family | Feature::Exact => false,
        }
    }

    /// The architecture that a cubin says it is for, without its letter: `sm_90` of an `sm_90a` one.
    /// `None` when the bytes are not a cubin, or not a whole one.
    pub(crate) fn of_cubin(bytes: &[u8]) -> Option<Arch> {
        const EM_CUDA: u64 = 190;
        let magic = bytes.starts_with(b"\x7fELF\x02\x01");
        if !magic || number(bytes, 18, 2)? != EM_CUDA || !sections_fit(bytes)? {
            return None;
        }
        // Version 8 of the format (CUDA 13) moved the number up by one byte.
        let number = if bytes[8] >= 8 { bytes[49] } else { bytes[48] };
        (number >= 20).then_some(Arch { number: u16::from(number), feature: Feature::None })
    }
}

/// A little-endian number of an ELF file; `None` past its end.
fn number(bytes: &[u8], at: usize, len: usize) -> Option<u64> {
    let part = bytes.get(at..at.checked_add(len)?)?;
    Some(part.iter().rev().fold(0, |n, byte| n << 8 | u64::from(*byte)))
}

/// Whether every section of an ELF file lies inside it. The driver gets an address without a length,
/// so nobody else looks.
fn sections_fit(bytes: &[u8]) -> Option<bool> {
    const NO_BITS: u64 = 8;
    let table = usize::try_from(number(bytes, 0x28, 8)?).ok()?;
    let (entry, count) = (number(bytes, 0x3a, 2)? as usize, number(bytes, 0x3c, 2)? as usize);
    for i in 0..count {
        let row = table.checked_add(i * entry)?;
        let (kind, start, len) = (
            number(bytes, row + 4, 4)?,
            number(bytes, row + 0x18, 8)?,
            number(bytes, row + 0x20, 8)?,
        );
        if kind != NO_BITS && start.checked_add(len)? > bytes.len() as u64 {
            return Some(false);
        }
    }
    // The table of segments; what they hold are sections.
    let (table, entry) = (number(bytes, 0x20, 8)?, number(bytes, 0x36, 2)?);
    let end = table.checked_add(entry * number(bytes, 0x38, 2)?)?;
    Some(count > 0 && end <= bytes.len() as u64)
}

impl fmt::Display for Arch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let letter = match self.feature {
            Feature::None => "",
            Feature::Family => "f",
            Feature::Exact => "a",
        };
        write!(f, "sm_{}{letter}", self.number)
    }
}

impl FromStr for Arch {
    type Err = String;
    fn from_str(s: &str) -> Result<Self, String> {
        let bad = || format!("`{s}` is not an architecture: sm_80, sm_89, sm_90a");
        let rest = s.strip_prefix("sm_").ok_or_else(bad)?;
        let (digits, feature) = match rest.strip_suffix('a') {
            Some(digits) => (digits, Feature::Exact),
            None => match rest.strip_suffix('f') {
                Some(digits) => (digits, Feature::Family),
                None => (rest, Feature::None),
            },
        };
        if !(2..=3).contains(&digits.len()) || !digits.bytes().all(|b| b.is_ascii_digit()) {
            return Err(bad());
        }
        Ok(Arch { number: digits.parse().map_err(|_| bad())?, feature })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_print_as_they_parse() {
        for name in ["sm_80", "sm_89", "sm_90", "sm_90a", "sm_100a", "sm_103f", "sm_120a"] {
            assert_eq!(name.parse::<Arch>().unwrap().to_string(), name);
        }
        for name in ["", "sm_", "sm_9", "sm_9x", "90a", "sm_90aa", "sm_+90", "sm_1000"] {
            assert!(name.parse::<Arch>().is_err(), "{name}");
        }
        assert_eq!("sm_90a".parse(), Ok(Arch::SM_90A));
    }

    #[test]
    fn code_runs_on_its_own_major_version() {
        let plain: Arch = "sm_90".parse().unwrap();
        let family: Arch = "sm_100f".parse().unwrap();
        assert!(Arch::SM_90A.runs_on(9, 0) && plain.runs_on(9, 0));
        assert!(!Arch::SM_90A.runs_on(10, 0) && !plain.runs_on(10, 0));
        assert!(Arch::SM_80.runs_on(8, 9) && !Arch::SM_89.runs_on(8, 0));
        assert!(family.runs_on(10, 3) && !Arch::SM_100A.runs_on(10, 3));
        assert!(Arch::SM_80.translates_to(9, 0) && plain.translates_to(10, 0));
        assert!(!Arch::SM_89.translates_to(8, 0) && !Arch::SM_90A.translates_to(10, 0));
        assert_eq!(Arch::of_device(9, 0), Arch::SM_90A);
        assert_eq!(Arch::of_device(8, 9), Arch::SM_89);
    }

    #[test]
    fn other_files_are_no_cubins() {
        assert_eq!(Arch::of_cubin(b""), None);
        assert_eq!(Arch::of_cubin(&[0; 64]), None);
    }
}
