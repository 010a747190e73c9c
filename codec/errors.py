"""The errors that a user can cause. Each message is one line: what is wrong, where, and what was expected."""


class ImageError(ValueError):
    """An image file that cannot be read; the message is "<path>: <reason>"."""


class FormatError(ValueError):
    """Bytes that are not a valid compressed file: wrong magic, unknown version, truncated, damaged."""


class ModelError(ValueError):
    """A model folder that is missing, incomplete, or not the one that a compressed file was made with."""


class UsageError(ValueError):
    """A request that cannot be carried out as given: missing or empty source, unwritable output, bad options."""


def ran_out_of_memory(exception: BaseException) -> bool:
    """Whether an error says that memory ran out: Python's, torch's on a GPU, torch's on a CPU."""
    kind, text = type(exception).__name__, str(exception).lower()
    return kind in ("MemoryError", "OutOfMemoryError") or "allocate memory" in text or "worker (pid" in text


class NonFiniteError(ArithmeticError):
    """A network's values are not finite in the number format that it runs in; a wider format may help."""
