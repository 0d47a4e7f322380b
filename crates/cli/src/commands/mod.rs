//! One file per command. Each has `run(args, output)`.

pub(crate) mod expr;
pub(crate) mod machine;
