"""What a command wants to know before anything else is imported: a limit of the format (FORMAT.md section 8), a name."""

MAX_CODES = 1 << 20
"""Vectors of a codebook whose indices a file can hold."""
DEFAULT_MODEL = "kl-f8"
"""The name of the model where none is named."""
