"""Datasets: one file each, all giving `Example`s."""
