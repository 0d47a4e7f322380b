//! The oracle: runs graph and tile programs on the CPU, slowly and obviously.
