"""The embedded default: a small world whose ground truth is known, and the models of it.

Everything here is generated and trained by the package's own code; nothing is downloaded.
"""
