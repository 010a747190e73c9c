"""The errors that a user can cause. Each message is one line: what is wrong, where, and what was expected."""


class ImageError(ValueError):
    """An image file that cannot be read; the message is "<path>: <reason>"."""


class FormatError(ValueError):
    """Bytes that are not a valid compressed file: wrong magic, unknown version, truncated, damaged."""


class ModelError(ValueError):
    """A model folder that is missing, incomplete, or not the one that a compressed file was made with."""


class UsageError(ValueError):
    """A request that cannot be carried out as given: missing or empty source, unwritable output, bad options."""
