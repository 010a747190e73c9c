"""What `codec-eval lint` can find: the codes, and a finding as a line of text. Imports neither torch nor diffusers."""

import difflib
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

from codec.errors import UsageError

Level = Literal["error", "warning"]

CODES: dict[str, tuple[Level, str]] = {
    # config.json
    "config-unreadable": ("error", "config.json is no JSON object"),
    "class": ("error", "_class_name is missing, or of a class that lint does not know"),
    "field-type": ("error", "a field has a value of the wrong type"),
    "unknown-field": ("warning", "a field that the class does not read"),
    "ema-field": ("warning", "a training setting (EMA) that was left in config.json"),
    "block-types": ("error", "block types unknown, or not as many as block_out_channels"),
    "norm-groups": ("error", "norm_num_groups does not divide the channels"),
    "factor": ("error", "encoder, decoder and block_out_channels disagree about f"),
    "image-channels": ("error", "in_channels or out_channels is not 3"),
    "sample-size": ("error", "sample_size makes tiles that cannot work"),
    "upcast-missing": ("warning", "force_upcast is not stated"),
    "upcast-needless": ("warning", "force_upcast is set for a network that float16 can hold"),
    # normalisation
    "scaling-missing": ("error", "scaling_factor is missing or no positive number"),
    "scaling": ("error", "scaling_factor is far from 1 / the latents' standard deviation"),
    "shift": ("error", "shift_factor is missing or far from the latents' mean"),
    "latents-length": ("error", "latents_mean or latents_std is not one number for each channel"),
    "latents-pair": ("error", "one of latents_mean and latents_std without the other"),
    "latents-value": ("error", "latents_mean or latents_std is far from the latents"),
    "stale-scaling": ("error", "a global scaling_factor or shift_factor stands beside latents_mean and latents_std"),
    # weights
    "weights-missing": ("error", "no weights"),
    "weights-variant": ("error", "weights under a variant's name only"),
    "weights-unsafe": ("warning", "weights in a pickle only"),
    "weights-half": ("warning", "weights in 16 bits or fewer only"),
    "weights-damaged": ("error", "a weights file cannot be read"),
    "weights-nonfinite": ("error", "a weight is NaN or infinite"),
    "ema-keys": ("error", "tensors of an EMA lie among the weights"),
    "training-keys": ("error", "tensors of a loss, a discriminator or an optimizer lie among the weights"),
    "original-keys": ("error", "tensors have the names of the original latent-diffusion code"),
    "attention-names": ("warning", "attention has the names of older diffusers"),
    "keys-missing": ("error", "tensors that config.json asks for are missing"),
    "keys-unexpected": ("error", "tensors that config.json has no place for"),
    "quant-conv": ("error", "use_quant_conv or use_post_quant_conv does not fit the weights"),
    "latent-channels": ("error", "latent_channels does not fit the weights"),
    "codebook": ("error", "num_vq_embeddings or vq_embed_dim does not fit the weights"),
    "shapes": ("error", "tensors of other shapes than config.json asks for"),
    "load": ("error", "diffusers cannot build the network, for a reason that no other code names"),
    # what the network does
    "run": ("error", "the network fails"),
    "nonfinite": ("error", "latents or images are not finite in float32"),
    "fp16": ("error", "activations or weights do not fit into float16"),
    "odd-size": ("error", "an image of odd size comes back in another"),
    "collapsed": ("error", "the latents do not vary"),
    "psnr": ("error", "the reconstruction is too far from the image"),
    "colour-shift": ("warning", "reconstructions are brighter, darker or tinted on average"),
    "codebook-usage": ("warning", "few codebook vectors are used"),
    # beside the network
    "codec-json": ("error", "codec.json or codec.safetensors is damaged"),
    "codec-fields": ("error", "codec.json disagrees with the network"),
    "decoder-id": ("error", "the decoder id in codec.json is not that of the weights"),
    "card-missing": ("warning", "no model card"),
    "card-licence": ("warning", "the model card states no licence"),
}
"""code -> usual level, what it means."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that is wrong with a folder.

    Attributes:
        level: "error" or "warning".
        code: one of `CODES`.
        field: of config.json, or the file or tensor that is meant.
        what: what is wrong, with what was measured.
        mend: what to do.
    """

    level: Level
    code: str
    field: str
    what: str
    mend: str

    def line(self) -> str:
        """Return the finding as one line."""
        text = f"{self.level} {self.code} {self.field}: {self.what}; mend: {self.mend}"
        return " ".join(text.split())  # what diffusers says about a failure has lines of its own

    def to_json(self) -> dict[str, str]:
        """Return plain values."""
        return asdict(self)


class Findings:
    """The findings of one folder, in the order in which they were made."""

    def __init__(self, ignore: Collection[str] = ()) -> None:
        """Start empty; codes to ignore are found and left out."""
        self._ignore = frozenset(ignore)
        self._all: list[Finding] = []

    def add(self, code: str, field: str, what: str, mend: str, level: Level | None = None) -> None:
        """Add a finding; level None = the code's usual one."""
        usual, _ = CODES[code]
        self._all.append(Finding(level=level or usual, code=code, field=field, what=what, mend=mend))

    def __iter__(self) -> Iterator[Finding]:
        return (finding for finding in self._all if finding.code not in self._ignore)

    def has(self, *codes: str) -> bool:
        """Whether one of the codes was found, ignored or not."""
        return any(finding.code in codes for finding in self._all)

    def to_json(self) -> list[dict[str, Any]]:
        """Return plain values."""
        return [finding.to_json() for finding in self]


def check_codes(codes: Collection[str]) -> None:
    """Raise UsageError, with the nearest name, for a code that does not exist."""
    for code in codes:
        if code not in CODES:
            near = difflib.get_close_matches(code, CODES, n=1, cutoff=0.0)[0]
            raise UsageError(f"--ignore: no code {code!r}; the nearest is {near}")
