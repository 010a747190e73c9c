"""What a command wants to know before anything else is imported: a limit of the format, the default model's name."""

MAX_CODES = 1 << 20
"""Vectors of a codebook whose indices a file can hold (FORMAT.md section 8)."""
DEFAULT_MODEL = "kl-f8"
"""The name of the model where none is named."""
