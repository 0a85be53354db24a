"""Programs for a GPU, in Triton's language; a file here is imported only where Triton is."""
