//! Machines as data: what a CPU has, and the ceilings measured on it.
//!
//! [`Cpu::detect`] reads the machine; `tw machine` measures the ceilings once and caches the whole
//! as JSON. Everything that decides (fusion, schedules, roofline reports) reads this struct and
//! nothing else. This crate knows no kernels.

mod cpu;
mod gpu;

pub use cpu::{Ceilings, Cpu, Precision};
pub use gpu::{Gpu, GpuModel};
