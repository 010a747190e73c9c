"""The VQ model of two levels: network, adapter, its maps of indices."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from codec.engine import Engine, EngineConfig
from codec.errors import ModelError
from codec.index_maps import IndexMap, planes, to_grids, to_planes
from codec.latent_model import CodebookModel, TwoLevelModel, decoder_id, latent_model, load_latent_model
from codec.pixels import to_float, to_uint8
from codec.two_level import TwoLevelVQModel
from tests.codec.two_level_models import two_level_network
from tests.conftest import photo


def picture(height: int = 16, width: int = 24) -> torch.Tensor:
    return torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1


def model_of(network: TwoLevelVQModel) -> TwoLevelModel:
    model = latent_model(network)
    assert isinstance(model, TwoLevelModel)
    return model


def distances(z: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    return (z.movedim(1, -1)[..., None, :] - codebook).square().sum(-1)  # (B, h, w, K)


@torch.no_grad()
def test_an_image_becomes_two_maps_and_these_the_reconstruction_of_the_network_to_the_bit() -> None:
    network = two_level_network()
    model, x = model_of(network), picture()
    assert (model.family, model.f, model.channels, model.scaling_factor, model.shift_factor) == ("vq", 4, 15, 0.5, 0.0)
    assert model.maps == (IndexMap(20, 1), IndexMap(32, 2))
    assert [tuple(each.shape) for each in model.codebooks] == [(20, 3), (32, 3)]
    z, indices = model.encode(x), model.indices(x)
    assert (z.mean.shape, z.logvar) == ((2, 15, 4, 6), None)
    assert (indices.shape, indices.dtype) == ((2, 5, 4, 6), torch.int64)
    coarse, fine = model.unpack(z.mean)
    assert torch.equal(model.pack([coarse, fine]), z.mean)
    grids = [to_grids(each.numpy(), model.maps) for each in indices]
    for n, (level, codebook) in enumerate(zip((coarse, fine), model.codebooks, strict=True)):
        found = torch.from_numpy(np.stack([grid[n] for grid in grids]))
        assert torch.equal(found, distances(level, codebook).argmin(-1))
        assert len(found.unique()) > 3
    # The fine latents are those that follow from the quantised coarse ones.
    z_q = model.codebooks[0][indices[:, 0]].movedim(-1, 1)
    assert torch.allclose(fine, network.fine_latents(network.features(x), z_q), atol=1e-6)
    assert not torch.allclose(fine, network.fine_latents(network.features(x), coarse), atol=1e-2)
    x_hat = network(x).sample
    assert x_hat.shape == x.shape
    assert torch.equal(model.decode_indices(indices), x_hat)
    assert torch.equal(model.decode(z.mean), x_hat)
    assert torch.equal(model.decode_vectors(model.vectors(indices)), x_hat)
    assert torch.equal(model.quantise(model.vectors(indices)), indices)
    assert all(torch.equal(torch.from_numpy(grids[1][n]), model.grids(indices)[n][1]) for n in range(2))


def test_both_levels_reach_the_image_and_somebody_elses_quantiser_sees_them_in_order() -> None:
    network = two_level_network()
    model, seen = model_of(network), []

    def pass_on(number: int, z: torch.Tensor) -> torch.Tensor:
        seen.append((number, tuple(z.shape)))
        return z

    levels = model.quantised(picture(), pass_on)
    assert seen == [(0, (2, 3, 4, 6)), (1, (2, 3, 8, 12))]
    model.decode_vectors(model.pack(levels)).square().mean().backward()
    silent = [name for name, p in network.named_parameters() if "quantize" not in name and not p.grad.any()]
    assert not silent


def test_a_folder_of_it_loads_and_gives_the_same(tmp_path: Path) -> None:
    network = two_level_network()
    network.save_pretrained(tmp_path)
    model = load_latent_model(tmp_path)
    assert isinstance(model, TwoLevelModel)
    assert isinstance(model, CodebookModel)
    with torch.inference_mode():
        assert torch.equal(model.indices(picture()), model_of(network).indices(picture()))
        torch.testing.assert_close(model.decode(model.encode(picture()).mean), network(picture()).sample)
    assert decoder_id(model.network) == decoder_id(network)
    image = photo(30, 41)
    engine = Engine.load(tmp_path, EngineConfig(device="cpu", dtype="float32"))
    indices = engine.encode_for_coder(image)
    assert (indices.shape, indices.dtype) == ((5, 8, 11), np.int32)
    padded = to_float(np.pad(image, ((0, 2), (0, 3), (0, 0)), mode="edge"))[None]
    with torch.inference_mode():
        expected = to_uint8(network(padded).sample[0])[:30, :41]
    assert np.mean(engine.decode(indices, 30, 41) != expected) < 0.01
    assert np.array_equal(engine.decode(indices, 30, 41, (3, 5, 20, 11)), engine.decode(indices, 30, 41)[5:16, 3:23])


def test_the_decoder_id_covers_what_decoding_uses_alone() -> None:
    network = two_level_network()
    base = decoder_id(network)
    decodes = {"decoder", "post_quant_conv", "quantize", "coarse_quantize", "coarse_upsample"}
    with torch.no_grad():
        for name, part in network.named_children():
            next(part.parameters()).add_(1)
            assert (decoder_id(network) != base) == (name in decodes), name
            next(part.parameters()).sub_(1)
    ids = {decoder_id(two_level_network(**more)) for more in ({}, {"act_fn": "relu"}, {"layers_per_block": 2})}
    assert len(ids) == 3


def test_what_does_not_fit_is_refused() -> None:
    network = two_level_network()
    model = model_of(network)
    with pytest.raises(ValueError, match="18 x 24 pixels, expected multiples of f = 4"):
        model.encode(picture(18, 24))
    with pytest.raises(ValueError, match=r"indices of shape \(1, 4, 2, 2\), expected \(B, 5, h, w\)"):
        model.vectors(torch.zeros(1, 4, 2, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"latents of shape \(1, 14, 2, 2\), expected \(B, 15, h, w\)"):
        model.quantise(torch.zeros(1, 14, 2, 2))
    for one in ("codebook", "codebook_size"):
        with pytest.raises(ModelError, match="a TwoLevelVQModel has 2 codebooks; this works with one alone"):
            getattr(model, one)
    with pytest.raises(ModelError, match=r"block_out_channels \[8\], expected one for each of two levels"):
        TwoLevelVQModel(block_out_channels=(8,), norm_num_groups=4)


def test_maps_are_cut_into_planes_and_put_together() -> None:
    maps = (IndexMap(9, 1), IndexMap(40, 2))
    coarse, fine = np.arange(6, dtype=np.int32).reshape(2, 3), np.arange(24, dtype=np.int32).reshape(4, 6)
    cut = to_planes([coarse, fine])
    assert (planes(maps), cut.shape, cut.dtype) == (5, (5, 2, 3), np.int32)
    assert np.array_equal(cut[0], coarse)
    for n, (dy, dx) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)], start=1):
        assert np.array_equal(cut[n], fine[dy::2, dx::2])
    back = to_grids(cut, maps)
    assert np.array_equal(back[0], coarse)
    assert np.array_equal(back[1], fine)
    assert all(grid.flags.c_contiguous for grid in back)
    with pytest.raises(ValueError, match=r"expected \(5, h, w\)"):
        to_grids(cut[:4], maps)
    with pytest.raises(ValueError, match="expected the same multiple of both"):
        to_planes([coarse, fine[:3]])
    code = "import sys, codec.index_maps; assert not {'torch', 'diffusers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
