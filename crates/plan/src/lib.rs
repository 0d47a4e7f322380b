//! Plans: ordered kernels over one arena with symbolic sizes.
