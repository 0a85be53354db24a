"""Detectors of harm on different inputs: which is best, how sure that is, and what it is worth."""
