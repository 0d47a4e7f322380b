//! Graph rewrites, one file each, and the pass manager that verifies and times them.
