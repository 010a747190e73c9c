import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny

from codec import memory
from codec.errors import ModelError
from codec.latent_model import LatentModel, latent_model

GIB = 2**30


def kl(channels: tuple[int, ...], layers: int, attention: bool) -> LatentModel:
    with torch.device("meta"):  # sizes only
        network = AutoencoderKL(
            block_out_channels=channels,
            down_block_types=("DownEncoderBlock2D",) * len(channels),
            up_block_types=("UpDecoderBlock2D",) * len(channels),
            layers_per_block=layers,
            mid_block_add_attention=attention,
        )
    return latent_model(network.to(torch.bfloat16))


def write(root: Path, name: str, text: str) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_the_targets_of_tiled_coding() -> None:
    small, large = kl((32, 64, 128, 128), 1, False), kl((128, 256, 512, 512), 2, True)
    for what in ("encode", "decode"):
        assert 8 * GIB < memory.estimate(small, 8192, 8192, what, True) < 10 * GIB
        assert memory.estimate(large, 2048, 2048, what, True) < 5 * GIB
        assert memory.estimate(small, 8192, 8192, what, False) > 16 * GIB


def test_a_budget_is_kept_as_far_as_possible() -> None:
    model = kl((32, 64, 128, 128), 2, False)
    for what in ("encode", "decode"):
        free = memory.estimate(model, 8192, 8192, what, True)
        tight = memory.estimate(model, 8192, 8192, what, True, budget_bytes=7 * GIB)
        assert tight <= 7 * GIB < free
        assert memory.estimate(model, 8192, 8192, what, True, budget_bytes=free) == free
        assert memory.estimate(model, 8192, 8192, what, True, dtype=torch.float32) > 1.8 * free


def test_tiny_models_do_not_need_memory_for_every_row() -> None:
    model = latent_model(AutoencoderTiny().to(torch.float32))
    small, large = (memory.estimate(model, height, 16384, "decode", True) for height in (8192, 16384))
    assert large < 4 * GIB
    assert large - small < 1.1 * GIB  # the pixels themselves
    assert memory.estimate(model, 4096, 4096, "decode", False) > 12 * GIB


def test_a_network_that_cannot_be_tiled_has_an_estimate_untiled() -> None:
    model = latent_model(AutoencoderKL(down_block_types=("AttnDownEncoderBlock2D",)))
    assert memory.estimate(model, 512, 512, "encode", False) > 8 * 64 * 512 * 512 * 4
    with pytest.raises(ModelError, match="AttnDownEncoderBlock2D"):
        memory.estimate(model, 512, 512, "encode", True)


def test_limits_of_control_groups_count(tmp_path: Path) -> None:
    write(tmp_path, "proc/meminfo", f"MemTotal: {8 * 2**20} kB\nMemFree: 5 kB\nMemAvailable: {6 * 2**20} kB\n")
    assert (memory.available("cpu", tmp_path), memory.total("cpu", tmp_path)) == (6 * GIB, 8 * GIB)
    write(tmp_path, "proc/self/cgroup", "0::/user/job\n")
    group = "sys/fs/cgroup/user"
    write(tmp_path, f"{group}/memory.max", str(4 * GIB))
    write(tmp_path, f"{group}/memory.current", str(3 * GIB))
    write(tmp_path, f"{group}/memory.stat", f"anon 1\ninactive_file {1 * GIB}\n")
    write(tmp_path, f"{group}/job/memory.max", "max\n")
    write(tmp_path, f"{group}/job/memory.current", "1")
    write(tmp_path, f"{group}/job/memory.stat", "")
    assert (memory.available("cpu", tmp_path), memory.total("cpu", tmp_path)) == (2 * GIB, 4 * GIB)


def test_limits_of_old_control_groups_count(tmp_path: Path) -> None:
    write(tmp_path, "proc/meminfo", f"MemTotal: {8 * 2**20} kB\nMemAvailable: {6 * 2**20} kB\n")
    write(tmp_path, "proc/self/cgroup", "5:cpuset:/\n4:cpuacct,memory:/not/seen/here\n")
    group = "sys/fs/cgroup/memory"
    write(tmp_path, f"{group}/memory.limit_in_bytes", str(3 * GIB))
    write(tmp_path, f"{group}/memory.usage_in_bytes", str(2 * GIB))
    write(tmp_path, f"{group}/memory.stat", f"inactive_file 7\ntotal_inactive_file {GIB // 2}\n")
    assert (memory.available("cpu", tmp_path), memory.total("cpu", tmp_path)) == (3 * GIB // 2, 3 * GIB)
    write(tmp_path, f"{group}/memory.limit_in_bytes", "9223372036854771712")
    assert memory.total("cpu", tmp_path) == 8 * GIB


def test_this_machine_has_memory() -> None:
    assert 2**26 < memory.available() <= memory.total()


@pytest.mark.gpu
def test_a_gpu_has_memory() -> None:
    assert 2**26 < memory.available("cuda") <= memory.total("cuda")


MEASURE = """
import resource, sys
import numpy as np, torch
from diffusers import AutoencoderKL, AutoencoderTiny
from codec import memory, tiled
from codec.latent_model import latent_model
family, side, budget = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]) or None
blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
kl = dict(block_out_channels=(32, 64, 128, 128), mid_block_add_attention=False, **blocks)
network = AutoencoderTiny() if family == "tiny" else AutoencoderKL(**kl)
model = latent_model(network.eval().requires_grad_(False))
z = np.random.default_rng(0).standard_normal((4, side // 8, side // 8), np.float32)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before, how = peak(), {"budget_bytes": budget, "dtype": torch.bfloat16}
tiled.decode(model, z, side, side, **how)
print(peak() - before, memory.estimate(model, side, side, "decode", True, **how))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss has another unit")
@pytest.mark.parametrize(
    ("family", "side", "budget_bytes"),
    [("kl", 3072, 0), ("kl", 3072, 5 * GIB // 4), ("tiny", 2048, 0), ("tiny", 4096, 0)],
)
def test_the_estimate_is_the_peak(family: str, side: int, budget_bytes: int) -> None:
    command = [sys.executable, "-c", MEASURE, family, str(side), str(budget_bytes)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    peak, estimate = map(int, done.stdout.split())
    assert 0.5 * estimate < peak < 1.2 * estimate, f"peak {peak / GIB:.2f} GiB, estimate {estimate / GIB:.2f} GiB"
    assert budget_bytes == 0 or estimate <= budget_bytes
