"""Fast inference of diffusers' autoencoders, in place: `accelerate(pipe.vae)`.

    network.encoder, network.decoder -> Fast... classes, the same modules, parameters and names
        CPU: stripes (`codec.kernels`)          GPU, other networks: a copy in dtype, channels last [, compiled]

What goes in and comes out keeps the dtype that it has in diffusers (the parameters'); `dtype` is only what is computed
in between. So `network.dtype`, `state_dict()`, `save_pretrained` and the decoder id stay as they were, pipelines need
no change, and sub-modules can still be called one by one. Works with `enable_tiling` and `enable_slicing`. Imports
torch and diffusers.
"""

import copy
from typing import Any

import torch
from diffusers.models.autoencoders import autoencoder_dc
from diffusers.models.autoencoders.vae import Decoder, DecoderTiny, Encoder, EncoderTiny, MaskConditionDecoder

from codec.striped import Striped, pays, stripable
from codec.striped_tiny import StripedTiny

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def best_dtype(device: str | torch.device = "cpu") -> torch.dtype:
    """Return bfloat16 where the hardware multiplies it, else float32.

    That is AVX512-BF16 or AMX on a CPU, compute capability 8.0 (Ampere) on a GPU.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float32
    if device.type == "cpu":
        checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # torch has no public ones
        if any(getattr(torch.cpu, check, lambda: False)() for check in checks):
            return torch.bfloat16
    return torch.float32


def accelerate(network: torch.nn.Module, dtype: torch.dtype | None = None, *, compile: bool = False) -> torch.nn.Module:
    """Make a diffusers autoencoder fast for inference, in place; call it again to change the dtype.

    Its parameters stop requiring gradients. In training mode, and while a gradient of the input is asked for, the
    network computes as before, at its old speed. It holds its weights a second time, in the order that its way to
    compute needs; new weights (`load_state_dict`, `to`) count from the next call on.

    Args:
        network: of a class in `codec.adapters`, or another one with the same encoders and decoders; eval mode.
        dtype: what is computed in; None = `best_dtype` of the device. float16 on a GPU only.
        compile: torch.compile what is not computed in stripes (all on a GPU), in the first call with a size of images.

    Returns:
        network.

    Raises:
        ValueError: another class of encoder or decoder, training mode, or a dtype that is not for this device.
    """
    parts = [getattr(network, name, None) for name in ("encoder", "decoder")]
    for name, part in zip(("encoder", "decoder"), parts, strict=True):
        if type(part) not in _KINDS and not isinstance(part, _Fast):
            kinds = ", ".join(kind.__name__ for kind in _KINDS)
            raise ValueError(f"{type(network).__name__}.{name} is {type(part).__name__}, expected one of {kinds}")
    if network.training:
        raise ValueError(f"{type(network).__name__} is in training mode: call network.eval() first")
    device = next(network.parameters()).device
    dtype = dtype or best_dtype(device)
    if dtype not in DTYPES or (dtype == torch.float16 and device.type == "cpu"):
        allowed = "float32 or bfloat16" + ("" if device.type == "cpu" else " or float16")
        raise ValueError(f"dtype {dtype} on {device.type}, expected {allowed}")
    network.requires_grad_(False)
    for part in parts:
        assert part is not None
        if not isinstance(part, _Fast):
            part.__class__ = _KINDS[type(part)]
        part._runner = _Runner(dtype, compile)
    return network


def restore(network: torch.nn.Module) -> torch.nn.Module:
    """Undo `accelerate` and free what it holds; parameters still require no gradients. Returns network."""
    for part in (getattr(network, "encoder", None), getattr(network, "decoder", None)):
        if isinstance(part, _Fast):
            del part._runner
            kind: Any = type(part)
            part.__class__ = kind.__mro__[2]
    return network


def plain(network: torch.nn.Module) -> torch.nn.Module:
    """Return a copy of a network as it was before `accelerate`; this one stays as it is."""
    parts = (getattr(network, name, None) for name in ("encoder", "decoder"))
    kept = {id(part._runner): part._runner for part in parts if isinstance(part, _Fast)}  # not copied, but dropped
    return restore(copy.deepcopy(network, kept))


def compute_dtype(network: torch.nn.Module) -> torch.dtype | None:
    """Return what an accelerated network computes in; None for a plain one."""
    decoder = getattr(network, "decoder", None)
    return decoder._runner.dtype if isinstance(decoder, _Fast) else None


class _Runner:
    """How one encoder or decoder computes: settings, and what was derived from its weights as they were last."""

    def __init__(self, dtype: torch.dtype, compile: bool) -> None:
        self.dtype = dtype
        self.compile = compile
        self._derived: dict[str, Any] = {}
        self._signature: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_derived": {}, "_signature": None}  # copies derive their own

    def run(self, module: torch.nn.Module, plain: type[torch.nn.Module], x: torch.Tensor, rest: Any) -> torch.Tensor:
        """Compute what `plain.forward` does."""
        parameter = next(module.parameters())
        signature = [_state(parameter) for parameter in module.parameters()]
        if signature != self._signature:
            self._derived, self._signature = {}, signature
        way = self._way(module, x, parameter.device)
        if way not in self._derived:
            self._derived[way] = self._derive(way, module, plain)
        derived = self._derived[way]
        y: torch.Tensor
        with torch.autocast(parameter.device.type, enabled=False):  # the caller's would change dtypes in here
            if way == "twin":
                rest = [part.to(self.dtype) if isinstance(part, torch.Tensor) else part for part in rest]
                y = derived(x.to(self.dtype, memory_format=torch.channels_last), *rest)
            else:
                y = derived.run(x)
        return y.to(parameter.dtype, memory_format=torch.contiguous_format)

    def _way(self, module: torch.nn.Module, x: torch.Tensor, device: torch.device) -> str:
        if device.type != "cpu" or not isinstance(module, _WALKED) or not stripable(module):
            return "twin"
        if self.dtype == torch.bfloat16 and isinstance(module, EncoderTiny | DecoderTiny):
            return "tiny"
        return "striped" if pays(module, x, self.dtype) else "twin"

    def _derive(self, way: str, module: torch.nn.Module, plain: type[torch.nn.Module]) -> Any:
        if way == "striped":
            return Striped(module, self.dtype)
        if way == "tiny":
            return StripedTiny(module, self.dtype)
        twin = copy.deepcopy(module)
        twin.__class__ = plain
        twin = twin.to(self.dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
        return torch.compile(twin) if self.compile else twin


def _state(parameter: torch.Tensor) -> tuple[Any, ...]:
    version = 0 if parameter.is_inference() else parameter._version
    return parameter.data_ptr(), version, parameter.dtype, parameter.device


class _Fast:
    """What the fast classes add to diffusers' own."""

    _runner: _Runner

    def forward(self, sample: torch.Tensor, *rest: Any) -> torch.Tensor:
        """See the diffusers class."""
        module: Any = self
        plain: Any = type(self).__mro__[2]
        if module.training or (torch.is_grad_enabled() and sample.requires_grad):
            y: torch.Tensor = plain.forward(self, sample, *rest)
            return y
        return self._runner.run(module, plain, sample, rest)


class FastEncoder(_Fast, Encoder):  # type: ignore[misc]
    """Encoder of AutoencoderKL, AutoencoderKLFlux2, AsymmetricAutoencoderKL and VQModel."""


class FastDecoder(_Fast, Decoder):  # type: ignore[misc]
    """Decoder of AutoencoderKL, AutoencoderKLFlux2 and VQModel."""


class FastMaskDecoder(_Fast, MaskConditionDecoder):  # type: ignore[misc]
    """Decoder of AsymmetricAutoencoderKL."""


class FastEncoderDC(_Fast, autoencoder_dc.Encoder):  # type: ignore[misc]
    """Encoder of AutoencoderDC."""


class FastDecoderDC(_Fast, autoencoder_dc.Decoder):  # type: ignore[misc]
    """Decoder of AutoencoderDC."""


class FastEncoderTiny(_Fast, EncoderTiny):  # type: ignore[misc]
    """Encoder of AutoencoderTiny."""


class FastDecoderTiny(_Fast, DecoderTiny):  # type: ignore[misc]
    """Decoder of AutoencoderTiny."""


_KINDS: dict[type[torch.nn.Module], type[torch.nn.Module]] = {
    Encoder: FastEncoder,
    Decoder: FastDecoder,
    MaskConditionDecoder: FastMaskDecoder,
    autoencoder_dc.Encoder: FastEncoderDC,
    autoencoder_dc.Decoder: FastDecoderDC,
    EncoderTiny: FastEncoderTiny,
    DecoderTiny: FastDecoderTiny,
}
"""diffusers class -> ours."""

_WALKED = (Encoder, Decoder, EncoderTiny, DecoderTiny)
"""What `codec.striped` knows; the others run as a twin."""
