//! Tile IR: the program of one block of a grid.
