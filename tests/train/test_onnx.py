"""ONNX files: run by onnxruntime, at sizes that they were not made with, against diffusers."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, VQModel

from train import onnx_export
from train.cli import main

onnxruntime = pytest.importorskip("onnxruntime")
onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")


def kl() -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        scaling_factor=0.7,
        shift_factor=0.1,
    ).eval()  # with attention in the middle


def tiny() -> AutoencoderTiny:
    torch.manual_seed(0)
    return AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8), decoder_block_out_channels=(8, 8, 8), num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(1, 1, 1), latent_channels=5,
    ).eval()  # fmt: skip


def run(path: Path, given: torch.Tensor) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: given.numpy()})


def check(vae: Any, folder: Path, f: int, wanted: Any) -> None:
    """Compare both files with the network at two sizes that neither the export nor its own check used."""
    for n, (h, w) in ((2, (7, 11)), (1, (24, 6))):
        x = torch.rand(n, 3, h * f, w * f, generator=torch.Generator().manual_seed(h)) * 2 - 1
        with torch.no_grad():
            expected = wanted(x)
            z = expected[0]
            x_hat = vae.decode(z).sample
        for found, there in zip(run(folder / "encoder.onnx", x), expected, strict=True):
            assert np.abs(found - there.numpy()).max() < 1e-4
        (image,) = run(folder / "decoder.onnx", z)
        assert image.shape == (n, 3, h * f, w * f)
        assert np.abs(image - x_hat.numpy()).max() < 1e-4
        assert x_hat.std() > 1e-3


@pytest.mark.slow
def test_an_autoencoder_kl_as_onnx(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, vae = tmp_path / "small", kl()
    vae.save_pretrained(folder)
    assert main(["export", str(folder), "--onnx", "--device", "cpu"]) == 0
    streams = capsys.readouterr()
    assert json.loads(streams.out)["files"] == ["onnx/decoder.onnx", "onnx/encoder.onnx", "small_ldm.safetensors"]
    assert streams.err == ""  # nothing of the exporter's own

    def moments(x: torch.Tensor) -> list[torch.Tensor]:
        posterior = vae.encode(x).latent_dist
        return [posterior.mean, posterior.logvar]

    check(vae, folder / "onnx", 2, moments)
    proto = onnx.load(folder / "onnx" / "decoder.onnx")
    stated = {prop.key: prop.value for prop in proto.metadata_props}
    assert (float(stated["scaling_factor"]), float(stated["shift_factor"])) == (0.7, 0.1)
    assert (stated["latent_space"], stated["image_range"], stated["f"]) == ("raw", "-1 to 1", "2")
    sizes = [axis.dim_param or axis.dim_value for axis in proto.graph.input[0].type.tensor_type.shape.dim]
    assert sizes == ["batch", 4, "height", "width"]
    sizes = [axis.dim_param for axis in proto.graph.output[0].type.tensor_type.shape.dim]
    assert sizes == ["batch", "", "2*height", "2*width"]
    card = (folder / "README.md").read_text()
    assert "| ONNX | yes | `onnx/encoder.onnx`, `onnx/decoder.onnx`, opset 18" in card
    assert "| onnx/decoder.onnx |" in card


def test_an_autoencoder_tiny_as_onnx(tmp_path: Path) -> None:
    folder, vae = tmp_path / "small", tiny()
    vae.save_pretrained(folder)
    assert main(["export", str(folder), "--onnx", "--device", "cpu"]) == 0
    check(vae, folder / "onnx", 4, lambda x: [vae.encode(x).latents])


def test_a_file_that_differs_is_refused_and_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "small"
    kl().save_pretrained(folder)

    def other(module: torch.nn.Module, path: Path, example: torch.Tensor, *_: Any) -> None:
        # A file that gives its input scaled by two, whatever it should have given.
        free = ["n", None, "h", "w"]
        value = [onnx.helper.make_tensor_value_info(name, 1, free) for name in ("x", "y", "z")]
        two = onnx.helper.make_tensor("two", 1, [], [2.0])
        nodes = [onnx.helper.make_node("Mul", ["x", "two"], [name]) for name in ("y", "z")]
        graph = onnx.helper.make_graph(nodes, "g", value[:1], value[1:], [two])
        proto = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=8)
        onnx.save(proto, path)

    monkeypatch.setattr(onnx_export, "_write", other)
    assert main(["export", str(folder), "--onnx", "--device", "cpu"]) == 3
    assert "ONNX: encoder.onnx gives (1, 3, 10, 18), torch (1, 4, 5, 9)" in capsys.readouterr().err
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "diffusion_pytorch_model.safetensors"]

    session = onnxruntime.InferenceSession
    with monkeypatch.context() as patch:  # the right shape, other values
        patch.setattr(onnx_export, "_write", lambda *_: None)
        patch.setattr(onnxruntime, "InferenceSession", lambda path, *_, **__: Slightly(path))
        assert main(["export", str(folder), "--onnx", "--device", "cpu"]) == 3
    error = capsys.readouterr().err
    assert "ONNX: decoder.onnx differs from torch by 0.0002 at 1 x 4 x 5 x 9, expected below 0.0001" in error
    assert onnxruntime.InferenceSession is session


class Slightly:
    """A session that gives what the network gives, the decoder's image off by more than is allowed."""

    def __init__(self, path: str) -> None:
        self._vae, self._decodes = kl(), path.endswith("decoder.onnx")

    def get_inputs(self) -> list[Any]:
        return [type("Input", (), {"name": "given"})]

    def run(self, _: None, given: dict[str, np.ndarray]) -> list[np.ndarray]:
        tensor = torch.from_numpy(given["given"])
        with torch.no_grad():
            if self._decodes:
                return [self._vae.decode(tensor).sample.numpy() + np.float32(2e-4)]
            posterior = self._vae.encode(tensor).latent_dist
            return [posterior.mean.numpy(), posterior.logvar.numpy()]


def test_what_cannot_be_had_is_said_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    VQModel(block_out_channels=(8,), norm_num_groups=4, num_vq_embeddings=16).save_pretrained(tmp_path / "vq")
    assert main(["export", str(tmp_path / "vq"), "--onnx"]) == 3
    assert (
        "ONNX: a VQModel; only AutoencoderKL and AutoencoderTiny are exported: its decoder" in capsys.readouterr().err
    )

    kl().save_pretrained(tmp_path / "small")
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxscript" else found(name))
    assert main(["export", str(tmp_path / "small"), "--onnx"]) == 2
    assert capsys.readouterr().err == "error: ONNX: no onnxscript here: pip install 'latent-codec[onnx]'\n"
