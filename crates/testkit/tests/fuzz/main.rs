//! The fuzz targets, in one process so that they run beside each other: `files` for the readers of
//! files, `text` for the parsers of text.
//!
//! To add one: a test named `fuzz_*` in one of the modules, with a corpus of small valid inputs.

mod files;
mod text;
