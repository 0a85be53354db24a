"""Guards: detectors of harm that were fitted once, saved in a folder, and score texts anywhere."""
