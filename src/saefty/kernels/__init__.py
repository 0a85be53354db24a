"""Sparse arithmetic: choose the latents that fire, decode them, and their gradients."""
