"""Sparse autoencoders: one architecture a file, and the native folder they are saved in."""
