//! Comparison with tolerances, random programs and a minimiser, for tests.

pub mod fuzz;
