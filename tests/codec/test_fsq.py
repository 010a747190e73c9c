"""Finite scalar quantisation: cells, their numbers and their vectors belong together."""

from pathlib import Path

import pytest
import torch
from diffusers import VQModel

from codec import fsq
from codec.adapters import CodebookModel
from codec.errors import ModelError
from codec.latent_model import load_latent_model

LEVELS = (4, 3, 5)


def small_vq(levels: tuple[int, ...] | None, k: int) -> VQModel:
    torch.manual_seed(0)
    network = VQModel(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=2, latent_channels=4, num_vq_embeddings=k,
        vq_embed_dim=3, mid_block_add_attention=False,
    )  # fmt: skip
    if levels:
        network.register_to_config(fsq_levels=list(levels))
        network.quantize.embedding.weight.data = fsq.codebook(levels)
    return network.eval()


def test_every_cell_is_reached_and_its_vector_is_the_rounded_latent() -> None:
    z = 4 * torch.randn(64, 3, 20, 20, generator=torch.Generator().manual_seed(1))
    index = fsq.to_index(fsq.cells(z, LEVELS), LEVELS)
    assert index.unique().tolist() == list(range(60))
    halves = torch.tensor([level // 2 for level in LEVELS]).reshape(1, 3, 1, 1)
    assert torch.equal(fsq.codebook(LEVELS)[index].movedim(-1, 1), fsq.bounded(z, LEVELS).round() / halves)


def test_excess_begins_in_the_middle_of_the_outermost_cells() -> None:
    z = torch.linspace(-6, 6, 2401).repeat(3, 1)[None, :, :, None]
    cells, beyond = fsq.cells(z, LEVELS)[0, :, :, 0], fsq.excess(z, LEVELS)[0, :, :, 0]
    for channel, level in enumerate(LEVELS):
        outermost = (cells[channel] == 0) | (cells[channel] == level - 1)
        assert bool((beyond[channel][~outermost] == 0).all())
        assert 0 < int((outermost & (beyond[channel] == 0)).sum()) < int(outermost.sum())
    bounded = fsq.bounded(z, (4, 4, 4))[0, 0, :, 0]
    inside = fsq.excess(z, (4, 4, 4))[0, 0, :, 0] == 0
    assert bounded[inside].min().item() == pytest.approx(-1.75, abs=0.01)  # cells -2, -1, 0, 1 end at -2 and at 1
    assert bounded[inside].max().item() == pytest.approx(0.75, abs=0.01)


@pytest.mark.parametrize("level", [3, 8, 1001, 1024, 2001])
def test_the_outermost_latents_lie_in_the_outermost_cells(level: int) -> None:
    z = torch.tensor([-1e4, 1e4]).reshape(1, 1, 2)
    assert fsq.cells(z, [level]).flatten().tolist() == [0, level - 1]


def test_a_folder_with_levels_is_read_as_such_and_decodes_what_its_indices_say(tmp_path: Path) -> None:
    network = small_vq(LEVELS, 60)
    network.save_pretrained(tmp_path)
    text = (tmp_path / "config.json").read_text()
    assert "fsq_levels" in text
    model = load_latent_model(tmp_path)
    assert isinstance(model, CodebookModel)
    assert model.fsq_levels == LEVELS
    x = torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        z = 3 * model.encode(x).mean
        indices = model.quantise(z)
        assert torch.equal(indices, fsq.to_index(fsq.cells(z, LEVELS), LEVELS))
        assert torch.equal(model.decode(z), model.decode_indices(indices))


def test_the_nearest_vector_counts_without_levels() -> None:
    network = small_vq(None, 60)
    model = CodebookModel(network)
    z = torch.randn(2, 3, 4, 4) / 60
    nearest = torch.cdist(z.movedim(1, -1).reshape(-1, 3), network.quantize.embedding.weight).argmin(1)
    assert torch.equal(model.quantise(z).reshape(-1), nearest)
    with torch.no_grad():
        assert torch.allclose(model.decode(z), network.decode(z).sample, atol=1e-6)


def test_levels_that_do_not_fit_are_refused() -> None:
    network = small_vq(None, 60)
    network.register_to_config(fsq_levels=[4, 3])
    with pytest.raises(ModelError, match="fsq_levels"):
        CodebookModel(network)
