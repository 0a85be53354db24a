"""Pictures: one figure a file, each drawn from plain data onto a figure that it is given."""
