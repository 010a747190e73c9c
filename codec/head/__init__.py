"""The conditional head: a CVAE on a frozen codec's normalized latents, which draws images of a class.

    from codec.head import Head
    head = Head.load("runs/head")
    images = head.images(head.sample(["hat"] * 8, guidance=2.0, seed=0), "runs/first/model")

Importing this loads no torch: `Head` comes lazily.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from codec.head.head import Head

__all__ = ["Head"]


def __getattr__(name: str) -> Any:
    if name == "Head":
        from codec.head.head import Head

        return Head
    raise AttributeError(f"module 'codec.head' has no attribute {name!r}")
