//! [`FloatMode`]: what subnormal numbers are while a kernel runs.
//!
//! Kernels that multiply and add (products, convolutions, attention) count subnormal operands and results as zero. On many
//! processors each instruction that meets one takes a hundred times as long, and a product reads an operand hundreds of
//! times. All other kernels keep them. Every kernel runs in the default mode otherwise, whatever mode the calling thread
//! is in, so that results depend neither on the thread nor on who called; that thread's mode is put back afterwards.

use tilewright_base::DType;
use tilewright_tile::Kernel;

/// How the processor treats floating-point numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FloatMode {
    /// IEEE 754: to nearest, with subnormal numbers.
    Default,
    /// The same, but subnormal operands and results are zero.
    Flushing,
}

impl FloatMode {
    /// The mode in which a kernel runs. Sums of products in f64 keep subnormal numbers.
    pub(crate) fn of(kernel: &Kernel) -> FloatMode {
        match kernel.multiplies_and_adds(DType::F32) {
            true => FloatMode::Flushing,
            false => FloatMode::Default,
        }
    }

    /// Puts this thread into the mode until what it returns is dropped.
    #[cfg(target_arch = "x86_64")]
    pub(crate) fn enter(self) -> Entered {
        let before = control();
        let wanted = match self {
            FloatMode::Default => DEFAULT,
            FloatMode::Flushing => DEFAULT | FLUSH_RESULTS | FLUSH_OPERANDS,
        };
        if before & !FLAGS != wanted {
            set_control(wanted);
        }
        Entered { before }
    }

    /// As above: other processors stay as they are.
    #[cfg(not(target_arch = "x86_64"))]
    pub(crate) fn enter(self) -> Entered {
        Entered {}
    }
}

/// The thread is in the mode of a kernel.
pub(crate) struct Entered {
    #[cfg(target_arch = "x86_64")]
    before: u32,
}

#[cfg(target_arch = "x86_64")]
impl Drop for Entered {
    fn drop(&mut self) {
        if control() & !FLAGS != self.before & !FLAGS {
            set_control(self.before);
        }
    }
}

/// All exceptions masked, rounding to nearest: what a process begins with.
#[cfg(target_arch = "x86_64")]
const DEFAULT: u32 = 0x1f80;
#[cfg(target_arch = "x86_64")]
const FLUSH_RESULTS: u32 = 1 << 15;
#[cfg(target_arch = "x86_64")]
const FLUSH_OPERANDS: u32 = 1 << 6;
/// Exceptions that have happened.
#[cfg(target_arch = "x86_64")]
const FLAGS: u32 = 0x3f;

/// This thread's MXCSR.
#[cfg(target_arch = "x86_64")]
fn control() -> u32 {
    let mut word = 0u32;
    // SAFETY: the instruction writes four bytes at the address, which are `word`'s.
    unsafe {
        std::arch::asm!("stmxcsr [{}]", in(reg) &raw mut word, options(nostack, preserves_flags))
    };
    word
}

/// Sets this thread's MXCSR. Between two calls no Rust code computes with floating-point numbers: [`FloatMode::enter`]
/// is for the time of a compiled kernel.
#[cfg(target_arch = "x86_64")]
fn set_control(word: u32) {
    // SAFETY: the instruction reads four bytes at the address, which are `word`'s. No bit is set that the processor
    // reserves: the word was read from the register, or has bits of x86-64's baseline (flushing operands has been part
    // of every processor with 64 bits). Exceptions stay masked, unless the thread had unmasked them itself.
    unsafe {
        std::arch::asm!("ldmxcsr [{}]", in(reg) &raw const word, options(nostack, preserves_flags, readonly))
    };
}

#[cfg(all(test, target_arch = "x86_64"))]
mod tests {
    use super::*;
    use std::hint::black_box;

    /// Half the smallest normal number.
    fn halved() -> f32 {
        black_box(f32::MIN_POSITIVE) * black_box(0.5)
    }

    /// Post-condition: inside, results are flushed or not whatever the thread's own mode is; afterwards its mode is back.
    #[test]
    fn the_thread_gets_its_mode_back() {
        std::thread::spawn(|| {
            for own in [DEFAULT, DEFAULT | FLUSH_RESULTS | FLUSH_OPERANDS, DEFAULT | 0x6000] {
                set_control(own);
                for (mode, flushed) in [(FloatMode::Default, false), (FloatMode::Flushing, true)] {
                    let entered = mode.enter();
                    assert_eq!(halved() == 0.0, flushed, "{mode:?} in a thread in mode {own:#x}");
                    drop(entered);
                    assert_eq!(control() & !FLAGS, own);
                }
            }
            set_control(DEFAULT);
        })
        .join()
        .unwrap();
    }
}
