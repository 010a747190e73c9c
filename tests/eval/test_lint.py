"""`codec-eval lint` on a good folder, and on the same folder with one fault planted at a time."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, VQModel
from safetensors.torch import load_file, save_file

from codec import images, model_folder, tables
from codec.latent_model import decoder_id, latent_model, load_network
from codec.pixels import to_float
from codec.statistics import LatentStatistics
from eval.cli import main
from eval.lint_findings import CODES
from tests.conftest import photo

WEIGHTS = "diffusion_pytorch_model.safetensors"
Fault = Callable[[Path], object]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for seed in range(2):
        (folder / f"{seed}.png").write_bytes(images.save_png(photo(64, 50 + 5 * seed, seed)))
    return folder


def small_kl(**more: Any) -> AutoencoderKL:
    how: dict[str, Any] = {"latent_channels": 4, "norm_num_groups": 2, "sample_size": 256, "force_upcast": False} | more
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        **how,
    )


def hand_made() -> AutoencoderKL:
    """A network that averages 2 x 2 pixels and repeats them, without training.

    A value v travels as the pair (v, -v): SiLU(v) - SiLU(-v) = v. Every group of a norm holds two pairs, moved by +32
    and -32: then neither its mean nor its deviation depends on the image, and the norm's own weight and bias undo both.
    """
    network: Any = small_kl()
    anchor = torch.tensor([32.0, 32.0, -32.0, -32.0] * 2)
    with torch.no_grad():
        for name, module in network.named_modules():
            if name.endswith((".conv2", ".to_out.0")):  # blocks and attention add nothing
                module.weight.zero_()
                module.bias.zero_()
        for part in (network.encoder, network.decoder):
            last = part.mid_block if part is network.encoder else part.up_blocks[-1]
            last.resnets[-1].conv2.bias.copy_(anchor)
            part.conv_norm_out.weight.fill_(32.0)
            part.conv_norm_out.bias.copy_(-anchor)
        into, out = torch.zeros(8, 4), torch.zeros(4, 8)  # values to pairs and back
        for value in range(4):
            into[2 * value, value], into[2 * value + 1, value] = 1, -1
            out[value, 2 * value], out[value, 2 * value + 1] = 1, -1
        colours = torch.tensor([[1.0, 0, 0], [0, -1, 0], [0, 0, 1], [0.5, -0.5, 0]])  # the last one is not decoded
        _set(network.encoder.conv_in, into @ colours)
        _set(network.encoder.down_blocks[0].downsamplers[0].conv, torch.eye(8) / 4, slice(0, 2))
        _set(network.encoder.conv_out, torch.cat([out, torch.zeros(4, 8)]))
        network.encoder.conv_out.bias[4:] = -8
        _set(network.quant_conv, torch.eye(8), slice(0, 1))
        _set(network.post_quant_conv, torch.eye(4), slice(0, 1))
        _set(network.decoder.conv_in, into)
        _set(network.decoder.up_blocks[0].upsamplers[0].conv, torch.eye(8))
        _set(network.decoder.conv_out, colours[:3].T @ out[:3])
    made: AutoencoderKL = network.eval().requires_grad_(False)
    return made


def _set(conv: Any, matrix: torch.Tensor, taps: slice = slice(1, 2)) -> None:
    """Make a convolution a matrix over channels, at these rows and columns of its kernel."""
    conv.weight.zero_()
    conv.weight[:, :, taps, taps] = matrix[..., None, None]
    conv.bias.zero_()


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """A folder with nothing to find: a network that works, measured factors, codec.json, a model card."""
    folder = tmp_path_factory.mktemp("model") / "good"
    torch.manual_seed(0)
    network = hand_made()
    # Moved by 5, and back again before the decoder: a mean that only shift_factor can take away.
    network.quant_conv.bias[:4] += 5
    network.post_quant_conv.bias -= network.post_quant_conv.weight[:, :, 0, 0] @ torch.full((4,), 5.0)
    statistics, grids = LatentStatistics(4), []
    with torch.no_grad():
        for path in sorted(data.iterdir()):
            image = images.load(path)
            posterior = latent_model(network).encode(to_float(image[:, : image.shape[1] // 2 * 2])[None])
            statistics.update(posterior)
            grids.append(posterior.mean[0].numpy())
    summary = statistics.summary()
    network.register_to_config(scaling_factor=1 / summary.global_std, shift_factor=summary.global_mean)
    network.save_pretrained(folder)
    info = {
        "name": "good",
        "family": "kl",
        "f": 2,
        "latent_channels": 4,
        "receptive_field": None,
        "decoder_id": decoder_id(network),
        "scaling_factor": 1 / summary.global_std,
        "shift_factor": summary.global_mean,
        "statistics": summary.to_json(),
    }
    step = np.ones(4, np.float32)
    sets = [tables.fit(grids, summary.mean.astype(np.float32), step)]
    model_folder.write(folder, info=info, mean=summary.mean.astype(np.float32), step=step, table_sets=sets)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# good\n")
    return folder


def config(**changes: Any) -> Fault:
    """Change fields of config.json; ... removes one."""

    def plant(folder: Path) -> None:
        document = json.loads((folder / "config.json").read_text()) | changes
        kept = {name: value for name, value in document.items() if value is not ...}
        (folder / "config.json").write_text(json.dumps(kept))

    return plant


def weights(change: Callable[[dict[str, torch.Tensor]], object], *, sealed: bool = True) -> Fault:
    """Change tensors; sealed: and state the decoder id that they have now."""

    def plant(folder: Path) -> None:
        state = load_file(folder / WEIGHTS)
        change(state)
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / WEIGHTS)
        if sealed:
            codec_json(decoder_id=decoder_id(load_network(folder)))(folder)

    return plant


def codec_json(**changes: Any) -> Fault:
    def plant(folder: Path) -> None:
        path = folder / "codec.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return plant


def scaled(name: str, factor: float) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda state: state.update({name: state[name] * factor})


def old_attention(state: dict[str, torch.Tensor]) -> None:
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for name in [name for name in state if ".attentions." in name]:
        for new_part, old_part in old.items():
            if f".{new_part}." in name:
                state[name.replace(new_part, old_part)] = state.pop(name)


def original_names(state: dict[str, torch.Tensor]) -> None:
    for name in list(state):
        state[name.replace("down_blocks.", "down.").replace("resnets.", "block.")] = state.pop(name)


def only_bin(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "diffusion_pytorch_model.bin")
    (folder / WEIGHTS).unlink()


def four_channels(folder: Path) -> None:
    torch.manual_seed(0)
    changes = json.loads((folder / "config.json").read_text())
    network = small_kl(in_channels=4, **{name: changes[name] for name in ("scaling_factor", "shift_factor")})
    for name in ("codec.json", "codec.safetensors"):
        (folder / name).unlink()
    network.save_pretrained(folder)


def lists(folder: Path, **changes: Any) -> None:
    summary = json.loads((folder / "codec.json").read_text())["statistics"]
    fields = {
        "latents_mean": summary["mean"],
        "latents_std": summary["std"],
        "scaling_factor": 1.0,
        "shift_factor": 0.0,
    }
    config(**(fields | changes))(folder)
    codec_json(scaling_factor=1.0, shift_factor=0.0)(folder)


FAULTS: dict[str, tuple[str, Fault]] = {
    "scaling of another model": ("scaling", config(scaling_factor=0.013)),
    "no scaling": ("scaling-missing", config(scaling_factor=...)),
    "a word for scaling": ("scaling-missing", config(scaling_factor="auto")),
    "no shift": ("shift", config(shift_factor=...)),
    "shift null": ("shift", config(shift_factor=None)),
    "tiles of 32": ("sample-size", config(sample_size=32)),
    "no tile size": ("sample-size", config(sample_size=...)),
    "tile size as a list": ("sample-size", config(sample_size=[256, 256])),
    "tiles of one latent": ("sample-size", config(sample_size=2)),
    "tile size that f does not divide": ("sample-size", config(sample_size=255)),
    "EMA field": ("ema-field", config(use_ema=True)),
    "misspelt field": ("unknown-field", config(scale_factor=1.0)),
    "a text for a number": ("field-type", config(latent_channels="4")),
    "upcast not stated": ("upcast-missing", config(force_upcast=...)),
    "upcast for nothing": ("upcast-needless", config(force_upcast=True)),
    "latents_mean too short": ("latents-length", lambda folder: lists(folder, latents_mean=[5.0, 5.0])),
    "latents_std alone": ("latents-pair", lambda folder: lists(folder, latents_mean=None)),
    "latents_mean of another model": ("latents-value", lambda folder: lists(folder, latents_mean=[0.0] * 4)),
    "0.18215 beside latents_std": ("stale-scaling", lambda folder: lists(folder, scaling_factor=0.18215)),
    "groups": ("norm-groups", config(norm_num_groups=3)),
    "unknown block": ("block-types", config(up_block_types=["UpDecoderBlock2D", "UpBlock3D"])),
    "too few blocks": ("block-types", config(down_block_types=["DownEncoderBlock2D"])),
    "unknown activation": ("load", config(act_fn="step")),
    "no class": ("class", config(_class_name=...)),
    "another class": ("class", config(_class_name="AutoencoderDC")),
    "four channels": ("image-channels", four_channels),
    "quant_conv denied": ("quant-conv", config(use_quant_conv=False)),
    "wrong latent_channels": ("latent-channels", config(latent_channels=8)),
    "wrong widths": ("shapes", config(block_out_channels=[8, 16])),
    "more layers": ("keys-missing", config(layers_per_block=2)),
    "a tensor missing": ("keys-missing", weights(lambda state: state.pop("decoder.conv_out.bias"), sealed=False)),
    "a tensor too many": ("keys-unexpected", weights(lambda state: state.update(z=torch.ones(1)), sealed=False)),
    "EMA keys": ("ema-keys", weights(lambda state: state.update({"model_ema.decay": torch.ones(1)}), sealed=False)),
    "loss keys": ("training-keys", weights(lambda state: state.update({"loss.logvar": torch.ones(1)}), sealed=False)),
    "old attention": ("attention-names", weights(old_attention)),
    "original names": ("original-keys", weights(original_names, sealed=False)),
    "half": ("weights-half", weights(lambda state: state.update({name: x.half() for name, x in state.items()}))),
    "NaN weight": (
        "weights-nonfinite",
        weights(lambda state: state["encoder.conv_in.bias"].fill_(float("nan")), sealed=False),
    ),
    "pickle only": ("weights-unsafe", only_bin),
    "variant only": ("weights-variant", lambda at: (at / WEIGHTS).rename(at / WEIGHTS.replace(".", ".fp16.", 1))),
    "another name": ("weights-missing", lambda folder: (folder / WEIGHTS).rename(folder / "model.safetensors")),
    "cut short": ("weights-damaged", lambda at: (at / WEIGHTS).write_bytes((at / WEIGHTS).read_bytes()[:3000])),
    "beyond float16": ("fp16", weights(scaled("decoder.mid_block.resnets.0.conv1.weight", 1e7))),
    "beyond float32": ("nonfinite", weights(scaled("encoder.conv_in.weight", 1e38))),
    "latents in another order": (
        "psnr",
        weights(
            lambda state: state.update({"quant_conv.weight": state["quant_conv.weight"][[1, 2, 3, 0, 4, 5, 6, 7]]})
        ),
    ),
    "collapsed": ("collapsed", weights(scaled("quant_conv.weight", 0.0))),
    "too bright": ("colour-shift", weights(lambda state: state["decoder.conv_out.bias"].add_(0.06))),
    "stale decoder id": ("decoder-id", codec_json(decoder_id="0123456789abcdef")),
    "decoder trained on": ("decoder-id", weights(scaled("decoder.conv_out.weight", 1.01), sealed=False)),
    "another f": ("codec-fields", codec_json(f=8)),
    "another receptive field": ("codec-fields", codec_json(receptive_field=40)),
    "another scaling in codec.json": ("codec-fields", codec_json(scaling_factor=3.0)),
    "no stream ids": ("codec-json", codec_json(stream_ids=[])),
    "no card": ("card-missing", lambda folder: (folder / "README.md").unlink()),
    "no licence": (
        "card-licence",
        lambda at: (at / "README.md").write_text("# good\n- data: mine; licence: not stated"),
    ),
    "broken JSON": ("config-unreadable", lambda folder: (folder / "config.json").write_text("{")),
    "JSON list": ("config-unreadable", lambda folder: (folder / "config.json").write_text("[]")),
}


def codes(out: str) -> list[str]:
    return [line.split()[1] for line in out.splitlines()]


def test_a_good_folder_has_no_findings(good: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lint", str(good), "--data", str(data)]) == 0
    assert capsys.readouterr().out == ""
    assert main(["lint", str(good)]) == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "built-in pictures, which is rough" in captured.err


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found_by_its_own_code_alone(
    fault: str, good: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, plant = FAULTS[fault]
    folder = shutil.copytree(good, tmp_path / "model")
    plant(folder)
    assert main(["lint", str(folder), "--data", str(data), "--limit", "2"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert {line.split()[1] for line in lines} == {code}, lines
    assert all("; mend: " in line and line.split()[0] in ("error", "warning") for line in lines)


def test_a_finding_that_is_meant_can_be_ignored(
    good: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(good, tmp_path / "model")
    config(sample_size=32, use_ema=True)(folder)
    arguments = ["lint", str(folder), "--data", str(data), "--limit", "2", "--ignore", "sample-size"]
    assert main(arguments) == 1
    assert codes(capsys.readouterr().out) == ["ema-field"]
    assert main([*arguments, "--ignore", "ema-field"]) == 0
    assert capsys.readouterr().out == ""


def test_a_shift_that_was_forgotten_says_what_to_write(
    good: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(good, tmp_path / "model")
    right = json.loads((folder / "config.json").read_text())
    config(shift_factor=None, scaling_factor=right["scaling_factor"] * 10)(folder)
    assert main(["lint", str(folder), "--data", str(data)]) == 1
    lines = {line.split()[1]: line for line in capsys.readouterr().out.splitlines()}
    assert set(lines) == {"shift", "scaling"}
    for code in lines:
        assert float(lines[code].split("mend: write ")[1]) == pytest.approx(right[f"{code}_factor"], rel=1e-3)
    assert "deviation of 10 (measured on 2 images)" in lines["scaling"]
    # A factor of 10 shows on the built-in pictures too.
    assert main(["lint", str(folder)]) == 1
    assert {"shift", "scaling"} == set(codes(capsys.readouterr().out))


def test_several_faults_are_all_found_in_one_run(
    good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`load_network` stops at the first of them."""
    vae = shutil.copytree(good, tmp_path / "pipeline" / "vae")
    weights(lambda state: state.pop("decoder.conv_out.bias"), sealed=False)(vae)
    config(sample_size=30, use_ema=True, scaling_factor=..., in_channels=4)(vae)
    (vae / "README.md").rename(tmp_path / "pipeline" / "README.md")
    assert main(["lint", str(tmp_path / "pipeline")]) == 1
    expected = {"sample-size", "ema-field", "scaling-missing", "image-channels", "keys-missing", "shapes"}
    assert set(codes(capsys.readouterr().out)) == expected | {"card-missing"}  # nothing says it is a pipeline
    (tmp_path / "pipeline" / "model_index.json").write_text("{}")
    assert main(["lint", str(tmp_path / "pipeline")]) == 1
    assert set(codes(capsys.readouterr().out)) == expected


def test_other_families_and_sizes(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    vq = {"block_out_channels": (8, 8), "norm_num_groups": 4, "num_vq_embeddings": 64}
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    tiny = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    networks = {
        "kl16": small_kl(latent_channels=16),
        "vq": VQModel(**vq, **blocks),
        "tiny": AutoencoderTiny(**tiny, num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1)),
        "uneven": AutoencoderTiny(**tiny, num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1)),
        "filter": AutoencoderTiny(**tiny, num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1)),
        "codebook": VQModel(**vq, **blocks),
    }
    networks["vq"].quantize.embedding.weight.data[1:] = 100.0  # out of the latents' reach
    for name, network in networks.items():
        network.save_pretrained(tmp_path / name)
        (tmp_path / name / "README.md").write_text("MIT license")
    config(num_decoder_blocks=[1, 1, 1], decoder_block_out_channels=[8, 8, 8])(tmp_path / "uneven")
    config(upsample_fn="fractal")(tmp_path / "filter")
    config(num_vq_embeddings=32)(tmp_path / "codebook")
    found: dict[str, set[str]] = {name: set() for name in networks}
    assert main(["lint", *(str(tmp_path / name) for name in networks), "--data", str(data)]) == 1
    for line in capsys.readouterr().out.splitlines():
        folder, rest = line.split(": ", 1)
        found[Path(folder).name].add(rest.split()[1])
    assert found["kl16"] <= {"psnr", "scaling", "shift"}  # random weights
    assert "psnr" in found["kl16"]
    assert {"psnr", "codebook-usage"} <= found["vq"] <= {"psnr", "codebook-usage", "scaling"}
    assert found["tiny"] <= {"psnr", "scaling", "shift"}
    assert "factor" in found["uneven"]
    assert found["filter"] == {"run"}
    assert "codebook" in found["codebook"]
    tested = {code for code, _ in FAULTS.values()} | set().union(*found.values())
    assert set(CODES) - tested == {"odd-size"}  # no network of these classes does that


def test_json_says_what_was_measured(
    good: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(good, tmp_path / "model")
    config(sample_size=32)(folder)
    assert main(["lint", str(folder), str(good), "--data", str(data), "--json"]) == 1
    document = json.loads(capsys.readouterr().out)
    assert document["kind"] == "lint"
    assert document["command"].startswith(f"codec-eval lint {folder} {good} --data={data}")
    bad, fine = document["models"]
    (finding,) = bad["findings"]
    assert (finding["code"], finding["field"], finding["level"]) == ("sample-size", "sample_size", "error")
    assert fine["findings"] == []
    assert fine["measured"]["psnr_db"] > 20
    assert 0 < fine["measured"]["largest_activation"] < 65504
    assert fine["measured"]["latents"]["n_images"] == 2


def test_what_cannot_be_linted(good: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    for folder in ("nowhere", "empty"):
        assert main(["lint", str(tmp_path / folder)]) == 3
        assert f"{tmp_path / folder}: no " in capsys.readouterr().err
    assert main(["lint", str(tmp_path / "nowhere"), str(good), "--data", str(data)]) == 1
    assert main(["lint"]) == 2
    assert main(["lint", str(good), "--ignore", "sample-sizes"]) == 2
    assert "the nearest is sample-size" in capsys.readouterr().err
    assert main(["lint", str(good), "--data", str(tmp_path / "empty")]) == 2
    mixed = shutil.copytree(data, tmp_path / "mixed")
    (mixed / "bad.png").write_bytes(b"no image")
    assert main(["lint", str(good), "--data", str(mixed)]) == 1
    captured = capsys.readouterr()
    assert "bad.png" in captured.err
    assert captured.out == ""
    assert main(["lint", "--codes"]) == 0
    assert capsys.readouterr().out.count("\n") == len(CODES)
