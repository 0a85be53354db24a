"""Annotate a file of prompts and responses with the features that fire on them."""
