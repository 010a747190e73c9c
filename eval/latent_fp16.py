"""Whether a network can run in float16: the largest activation of each block, against the largest float16.

Measured in float32 on the plain diffusers network, by a hook on every module: sums of residuals and what comes out of
each convolution count, the scores inside an attention do not.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

LARGEST = 65504.0
"""The largest finite float16."""
RISKY_SHARE = 0.25
RULE = (
    f"overflows: an activation or a weight of at least {LARGEST:.0f}; at risk: above {RISKY_SHARE} of that, which "
    "other images or latents may reach; safe: the rest; not measured: none of the first images could be run"
)


def block_of(name: str) -> str:
    """Return the block that a module belongs to: "decoder.up_blocks.1" for "decoder.up_blocks.1.resnets.0.conv1"."""
    parts = name.split(".")
    return ".".join(parts[:3] if len(parts) > 2 and parts[2].isdigit() else parts[:2])


@contextmanager
def recording(network: torch.nn.Module, name_of: Callable[[str], str] = block_of) -> Iterator[dict[str, float]]:
    """Record the largest |activation| while the context lasts: {name: largest}; inf for NaN too.

    Args:
        network: of diffusers.
        name_of: module's name -> the name under which what it gives counts.
    """
    largest: dict[str, float] = {}

    def hook(name: str) -> Any:
        def record(_module: torch.nn.Module, _inputs: Any, output: Any) -> None:
            if isinstance(output, torch.Tensor) and output.is_floating_point():
                value = float(output.detach().abs().max())
                largest[name] = max(largest.get(name, 0.0), value if math.isfinite(value) else math.inf)

        return record

    handles = [
        module.register_forward_hook(hook(name_of(name)))
        for name, module in network.named_modules()
        if "." in name or not any(module.children())  # not the whole network, encoder or decoder
    ]
    try:
        yield largest
    finally:
        for handle in handles:
            handle.remove()


def largest_weight(network: torch.nn.Module) -> float:
    """Return the largest |parameter|."""
    return max((float(p.detach().abs().max()) for p in network.parameters() if p.numel()), default=0.0)


def judge(blocks: Mapping[str, float], weight: float) -> dict[str, Any]:
    """Return the verdict by RULE and what it rests on.

    Args:
        blocks: of `recording`; none = no image was run, and only the weights can say something.
        weight: of `largest_weight`.
    """
    worst = max(blocks, key=lambda name: blocks[name]) if blocks else None
    largest = blocks[worst] if worst else 0.0
    share = max(largest, weight) / LARGEST
    verdict = "overflows" if share >= 1 else "at risk" if share > RISKY_SHARE else "safe" if blocks else "not measured"
    return {
        "verdict": verdict,
        "rule": RULE,
        "largest": largest,
        "largest_share": largest / LARGEST,
        "worst_block": worst,
        "largest_weight": weight,
        "blocks": [{"block": name, "largest": value, "share": value / LARGEST} for name, value in blocks.items()],
    }
