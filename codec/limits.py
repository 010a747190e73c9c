"""Limits of the file format (FORMAT.md section 8) that a command wants to know before anything else is imported."""

MAX_CODES = 1 << 20
"""Vectors of a codebook whose indices a file can hold."""
