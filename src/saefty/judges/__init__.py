"""Judges of replies: a score from 0 to 1 for each."""
