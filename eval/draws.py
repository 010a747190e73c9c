"""Random numbers that depend on nothing but their name: not on the rank, the order of work or other images."""

import hashlib

import numpy as np


def generator(seed: int, key: str, purpose: str) -> np.random.Generator:
    """Return a fresh generator.

    Args:
        seed: of the whole run.
        key: of the image (its name), "" where no image is concerned.
        purpose: what is drawn, so that two uses for one image are independent.
    """
    digest = hashlib.sha256(f"{seed}\0{key}\0{purpose}".encode(errors="surrogateescape")).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "little"))
