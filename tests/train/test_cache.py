"""codec-train cache: what is in it, refreshed, interrupted, refused, on many processes; all through the command."""

import errno
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from codec import Codec, images, model_folder
from codec.coding import Settings
from codec.engine import Engine, EngineConfig
from codec.shards import read_index, read_sample
from codec.tables import Mode
from tests.conftest import photo
from train.cache import index as cache_index
from train.cache import model as cache_model
from train.cache import plan as cache_plan
from train.cache import writer as cache_writer
from train.cache.build import write_cache
from train.cache.plan import CacheConfig
from train.cache.reader import CacheReader
from train.cli import main

SIZE = 32


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five images in a shard of the cache, so that twelve make three."""
    monkeypatch.setattr(cache_plan, "_MOST_IMAGES", 5)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Takes how many pieces went through the network, call by call."""
    counts: list[int] = []
    encode = cache_model.Encoder.__call__

    def counted(self: cache_model.Encoder, pieces: Sequence[np.ndarray]) -> Any:
        counts.append(len(pieces))
        return encode(self, pieces)

    monkeypatch.setattr(cache_model.Encoder, "__call__", counted)
    return counts


def command(shards: Path, model: Path, out: Path, *more: str) -> list[str]:
    where = ["cache", str(shards), "-m", str(model), "-o", str(out)]
    return [*where, "--size", str(SIZE), "--dtype", "float32", "--jobs", "1", *more]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def header(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "cache.json").read_text())


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    """What was said, but for the progress bar."""
    (message,) = (line for line in capsys.readouterr().err.splitlines() if not line.startswith("encoding "))
    assert message.startswith("error: ")
    return message


def set_of(folder: Path, seeds: Sequence[int]) -> Path:
    """Pack one photograph for each seed; the name says the seed's place, not the seed."""
    for n, seed in enumerate(seeds):
        path = folder / "photos" / f"{n:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(images.save_png(photo(40, 44, seed=seed)))
    assert main(["shards", str(folder / "photos"), "-o", str(folder / "shards"), "--jobs", "1"]) == 0
    return folder / "shards"


def foreign_shard(folder: Path, members: dict[str, bytes]) -> Path:
    """Write somebody else's tar; return its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(folder / "data-0.tar", "w") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return folder


def png(seed: int, size: tuple[int, int] = (40, 44)) -> bytes:
    return images.save_png(photo(*size, seed=seed))


def middle(data: bytes) -> np.ndarray:
    """The centre crop, in few words."""
    image = Image.fromarray(images.load(data))
    short = min(image.size)
    left, top = (image.width - short) // 2, (image.height - short) // 2
    return resized(image, (left, top, left + short, top + short))


def resized(image: Image.Image, box: tuple[int, int, int, int]) -> np.ndarray:
    return np.asarray(image.resize((SIZE, SIZE), Image.Resampling.LANCZOS, box=box, reducing_gap=3.0))


def direct(model: Path) -> Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Return what encodes one image into (mean, std), without anything of the cache."""
    engine = Engine.load(model, EngineConfig(device="cpu", dtype="float32"))

    def encode(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        posterior = engine.posterior(image)
        assert posterior.logvar is not None
        return posterior.mean[0].numpy(), torch.exp(0.5 * posterior.logvar[0]).numpy()

    return encode


def test_a_cache_holds_what_direct_encoding_gives(
    shards: Path, model_dir: Path, tmp_path: Path, small_shards: None, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "c"
    assert main(command(shards, model_dir, out)) == 0
    assert "12 samples of 12 images in 3 shards" in capsys.readouterr().out
    reader, refs, encode = CacheReader(out), read_index(shards), direct(model_dir)
    assert len(reader) == len(refs) == header(out)["n_samples"] == 12
    means = []
    for n, ref in enumerate(refs):
        piece = middle(read_sample(ref))
        for mirrored, image in ((False, piece), (True, np.ascontiguousarray(piece[:, ::-1]))):
            moments, facts = reader.read(n, mirrored)
            mean, std = encode(image)
            np.testing.assert_array_equal(moments.mean, mean.astype(np.float16))
            np.testing.assert_array_equal(moments.std, std.astype(np.float16))
            means.append(moments.mean)
        assert not np.array_equal(means[-1], means[-2][..., ::-1])  # a latent cannot be flipped
        short, wide = min(ref.width, ref.height), max(ref.width, ref.height)
        spare = (wide - short) // 2
        box = [spare, 0, spare + short, short] if ref.width > ref.height else [0, spare, short, spare + short]
        expected = {"key": ref.key, "class": ref.label, "original_size": [ref.height, ref.width], "crop_box": box}
        assert facts.items() >= {**expected, "sha256": ref.sha256, "caption": "", "crop": 0}.items()
    stacked = np.stack(means).astype(np.float64)
    statistics = header(out)["statistics"]
    np.testing.assert_allclose(statistics["mean"], stacked.mean(axis=(0, 2, 3)), rtol=1e-9)
    np.testing.assert_allclose(statistics["std"], stacked.std(axis=(0, 2, 3)), rtol=1e-6)
    assert statistics["snr_db"] > 60


def test_formats_and_their_errors(model_dir: Path, tmp_path: Path) -> None:
    more = {"int8": [], "bf16": [], "lcx": ["-q", "70"], "target": ["--latent-psnr", "38"]}
    shards, readers = set_of(tmp_path, range(4)), {}
    for name, options in {"fp16": [], **more}.items():
        form = "lcx" if name == "target" else name
        assert main(command(shards, model_dir, tmp_path / name, "--format", form, *options)) == 0
        readers[name] = CacheReader(tmp_path / name)
    statistics = {name: reader.header["statistics"] for name, reader in readers.items()}
    for n in range(4):
        for mirrored in (False, True):
            exact, _ = readers["fp16"].read(n, mirrored)
            assert exact.std is not None
            int8, _ = readers["int8"].read(n, mirrored)
            step = (exact.mean.max(axis=(1, 2)) - exact.mean.min(axis=(1, 2))) / 255
            assert (np.abs(int8.mean - exact.mean).max(axis=(1, 2)) <= 0.52 * step + 1e-3).all()
            np.testing.assert_allclose(int8.std, exact.std, rtol=0.02)
            bf16, _ = readers["bf16"].read(n, mirrored)
            np.testing.assert_allclose(bf16.mean, exact.mean, rtol=2**-7, atol=1e-5)
            coded, facts = readers["target"].read(n, mirrored)
            error = float(np.mean((coded.mean - exact.mean) ** 2))
            peak = 6 * readers["target"].header["settings"]["tables"]["deviation"]
            assert 38 <= 10 * np.log10(peak**2 / error) <= 38.6  # reached, and not by too much
            assert len(facts["quality"]) == 2
            means = [one.read(n, mirrored)[0].mean for one in (readers["lcx"], readers["fp16"])]
            assert np.mean((means[0] - means[1]) ** 2) == pytest.approx(statistics["lcx"]["mse"], rel=3)
    snr = [statistics[name]["snr_db"] for name in ("fp16", "bf16", "int8", "lcx")]
    assert snr == sorted(snr, reverse=True)
    sizes = {name: reader.header["payload_bytes"] for name, reader in readers.items()}
    assert sizes["bf16"] == sizes["fp16"] > 1.6 * sizes["int8"]
    assert sizes["lcx"] < sizes["fp16"] / 4


@pytest.mark.parametrize("contexts", [False, True])
def test_coded_latents_are_compressed_files(contexts: bool, model_dir: Path, tmp_path: Path) -> None:
    out, shards = tmp_path / "c", set_of(tmp_path, range(2))
    more = ["--contexts"] if contexts else []
    assert main(command(shards, model_dir, out, "--format", "lcx", "-q", "70", *more)) == 0
    codec = Codec.load(model_dir, "cpu", dtype="float32")
    (tar,) = out.glob("*.tar")
    with tarfile.open(tar) as members:
        names = [member.name for member in members]
        data = {name: members.extractfile(name).read() for name in names[:3]}  # type: ignore[union-attr]
    assert [name.partition(".")[2] for name in names[:3]] == ["json", "lcx", "mirror.lcx"]
    piece = middle(read_sample(read_index(shards)[0]))
    how = Settings(quality=70, effort=0, modes=tuple(Mode) if contexts else (Mode.RAW, Mode.STATIC))
    for name, image in ((names[1], piece), (names[2], piece[:, ::-1])):
        assert data[name] == codec.encode(np.ascontiguousarray(image), settings=how)
    assert model_folder.read(out / "tables").stream_id == codec.stream_id  # readers need no model folder


def test_the_posteriors_deviation_of_coded_latents_is_the_models(shards: Path, model_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    for path in model_dir.iterdir():
        folder.mkdir(exist_ok=True)
        (folder / path.name).write_bytes(path.read_bytes())
    info = json.loads((folder / "codec.json").read_text())
    info["statistics"] = {"posterior_std": [0.1, 0.2, 0.3, 0.4], "global_std": 1.0}
    (folder / "codec.json").write_text(json.dumps(info))
    assert main(command(shards, folder, tmp_path / "c", "--format", "lcx")) == 0
    moments, _ = CacheReader(tmp_path / "c").read(3)
    np.testing.assert_allclose(moments.std[:, 0, 0], [0.1, 0.2, 0.3, 0.4], rtol=1e-6)
    np.testing.assert_allclose(header(tmp_path / "c")["statistics"]["posterior_std"], [0.1, 0.2, 0.3, 0.4], rtol=1e-6)


def test_a_refresh_encodes_only_what_changed(
    model_dir: Path, tmp_path: Path, small_shards: None, seen: list[int]
) -> None:
    old, new = list(range(12)), [0, 1, 2, 50, 4, 5, 7, 8, 9, 10, 11, 51]  # 3 edited, 6 removed, one added
    out = tmp_path / "c"
    assert main(command(set_of(tmp_path / "old", old), model_dir, out)) == 0
    assert sum(seen) == 12
    shards = set_of(tmp_path / "new", new)
    seen.clear()
    assert main(command(shards, model_dir, out)) == 0
    assert sum(seen) == 2
    seen.clear()
    assert main(command(shards, model_dir, tmp_path / "fresh")) == 0
    assert sum(seen) == 12
    assert contents(out) == contents(tmp_path / "fresh")


def test_a_second_run_changes_nothing(
    shards: Path, model_dir: Path, tmp_path: Path, seen: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "c"
    assert main(command(shards, model_dir, out)) == 0
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    seen.clear()
    capsys.readouterr()
    assert main(command(shards, model_dir, out)) == 0
    assert not seen
    assert "nothing to do" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*")}


def test_new_captions_and_classes_cost_no_encoding(model_dir: Path, tmp_path: Path, seen: list[int]) -> None:
    out, images_ = tmp_path / "c", {f"{n}.png": png(n) for n in range(3)}
    words = {"0.txt": b"a dog", "1.json": b'{"caption": ["one", "two"], "class": 7}', "2.json": b'{"width": 1}'}
    assert main(command(foreign_shard(tmp_path / "s", {**images_, **words}), model_dir, out)) == 0
    facts = [CacheReader(out).read(n)[1] for n in range(3)]
    assert [one["caption"] for one in facts] == ["a dog", ["one", "two"], ""]
    assert [one["class"] for one in facts] == [None, "7", None]
    assert facts[0]["key"] == "data-0/0"
    seen.clear()
    for change in ({"0.txt": b"two dogs"}, {"2.cls": b"3"}):
        words |= change
        assert main(command(foreign_shard(tmp_path / "s", {**images_, **words}), model_dir, out)) == 0
        assert CacheReader(out).read(0)[1]["caption"] == "two dogs"
    assert not seen
    reader = CacheReader(out)
    assert reader.classes == [None, "7", "3"]
    assert reader.header["classes"] == ["3", "7"]


def test_jobs_and_batches_change_no_byte_and_a_batch_holds_what_it_says(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = set()
    moments = cache_model._moments

    def noted(engine: Engine, stacked: np.ndarray) -> Any:
        sizes.add(len(stacked))
        return moments(engine, stacked)

    monkeypatch.setattr(cache_model, "_moments", noted)
    first, second = set_of(tmp_path / "1", range(7)), set_of(tmp_path / "2", [0, 20, 2, 21, 22, 5, 6])
    assert main(command(first, model_dir, tmp_path / "one")) == 0
    assert main(command(first, model_dir, tmp_path / "three", "--jobs", "3")) == 0
    assert contents(tmp_path / "one") == contents(tmp_path / "three")
    assert sizes == {1}
    sizes.clear()
    for out, sources in (("b", [first, second]), ("fresh", [second])):  # other images fill the same batches
        for shards in sources:
            assert main(command(shards, model_dir, tmp_path / out, "--batch", "4")) == 0
    assert contents(tmp_path / "b") == contents(tmp_path / "fresh")
    assert sizes == {4}
    one, four = CacheReader(tmp_path / "one"), CacheReader(tmp_path / "b")
    np.testing.assert_allclose(one.read(6)[0].mean, four.read(6)[0].mean, rtol=2e-3, atol=1e-3)


def test_random_crops_are_samples_of_their_own_and_the_same_each_time(model_dir: Path, tmp_path: Path) -> None:
    shards = foreign_shard(
        tmp_path / "s", {"a.png": png(0, (80, 120)), "b.png": png(1, (33, 90)), "c.png": png(2, (20, 30))}
    )
    for out in ("c", "again"):
        assert main(command(shards, model_dir, tmp_path / out, "--crop", "random:3")) == 0
    assert contents(tmp_path / "c") == contents(tmp_path / "again")
    reader, encode = CacheReader(tmp_path / "c"), direct(model_dir)
    assert len(reader) == 9
    facts = [reader.read(n)[1] for n in range(9)]
    assert [one["crop"] for one in facts] == [0, 1, 2] * 3
    assert len({tuple(one["crop_box"]) for one in facts[:3]}) == 3
    for n, (ref, one) in enumerate(zip([ref for ref in read_index(shards) for _ in range(3)], facts, strict=True)):
        left, top, right, bottom = one["crop_box"]
        assert 0 <= left < right <= ref.width
        assert 0 <= top < bottom <= ref.height
        assert right - left == bottom - top >= min(SIZE, ref.width, ref.height)
        piece = resized(Image.fromarray(images.load(read_sample(ref))), (left, top, right, bottom))
        np.testing.assert_array_equal(reader.read(n)[0].mean, encode(piece)[0].astype(np.float16))


class Ranks:
    """Processes of a launch as threads of this one."""

    def __init__(self, count: int) -> None:
        self.count, self._barrier, self._values = count, threading.Barrier(count, timeout=60), [None] * count

    def write(self, config: CacheConfig) -> None:
        failures: list[BaseException] = []

        def rank(index: int) -> None:
            try:
                write_cache(config, _Rank(self, index))  # type: ignore[arg-type]
            except BaseException as exception:
                failures.append(exception)
                self._barrier.abort()

        threads = [threading.Thread(target=rank, args=(index,)) for index in range(self.count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures

    def gather(self, index: int, value: Any) -> list[Any]:
        self._values[index] = value
        self._barrier.wait()
        values = list(self._values)
        self._barrier.wait()
        return values


class _Rank:
    def __init__(self, ranks: Ranks, index: int) -> None:
        self._ranks, self.index, self.count, self.local = ranks, index, ranks.count, 0

    def share(self, items: Sequence[Any]) -> Sequence[Any]:
        return items[self.index :: self.count]

    def gather(self, value: Any) -> list[Any]:
        return self._ranks.gather(self.index, value)


def test_any_number_of_ranks_gives_the_same_bytes(
    model_dir: Path, tmp_path: Path, small_shards: None, seen: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = set_of(tmp_path / "1", range(12)), set_of(tmp_path / "2", [*range(5), 30, *range(6, 11)])
    written: list[str] = []
    write = cache_writer.write_shard
    monkeypatch.setattr(cache_writer, "write_shard", lambda tar, *rest: (written.append(str(tar)), write(tar, *rest)))
    for count in (1, 2, 5):
        for shards in (first, second):
            out = tmp_path / f"of-{count}"
            config = CacheConfig(
                shards=shards, model=model_dir, out=out, size=SIZE, jobs=1, device="cpu", dtype="float32"
            )
            Ranks(count).write(config)
    assert sum(seen) == 3 * (12 + 1)  # nobody's work is done twice
    assert len(written) == len(set(written))
    assert contents(tmp_path / "of-1") == contents(tmp_path / "of-2") == contents(tmp_path / "of-5")


@pytest.mark.slow
@pytest.mark.parametrize("form", ["fp16", "lcx"])
def test_two_real_processes_give_the_bytes_of_one(shards: Path, model_dir: Path, tmp_path: Path, form: str) -> None:
    script = (
        "import sys; from train import cli; from train.cache import plan; plan._MOST_IMAGES = 5; sys.exit(cli.main())"
    )
    (tmp_path / "small.py").write_text(script)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    for start, name in ([sys.executable], "one"), (launcher, "two"):
        done = subprocess.run(
            [*start, str(tmp_path / "small.py"), *command(shards, model_dir, tmp_path / name, "--format", form)],
            capture_output=True, text=True, timeout=300, env=environment,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("12 samples of 12 images in 3 shards") == 1
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


@pytest.mark.slow
def test_a_killed_run_is_finished_by_the_same_command(shards: Path, model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "killed.py").write_text(
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from train import cli\nfrom train.cache import plan\n"
        "plan._MOST_IMAGES, replace = 5, Path.replace\n"
        "def kill_at_the_second_tar(self, target):\n"
        "    if str(target).endswith('.tar') and list(Path(target).parent.glob('*.tar')):\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return replace(self, target)\n"
        "Path.replace = kill_at_the_second_tar\n"
        "sys.exit(cli.main())\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    start = [sys.executable, str(tmp_path / "killed.py")]
    done = subprocess.run([*start, *command(shards, model_dir, tmp_path / "c")], env=environment, timeout=300)
    assert done.returncode == -signal.SIGKILL
    assert len(list((tmp_path / "c").glob("*.tar"))) == 1
    assert len(list((tmp_path / "c").glob(".*.tmp"))) == 1  # half a shard
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache_plan, "_MOST_IMAGES", 5)
        for out in ("c", "whole"):
            assert main(command(shards, model_dir, tmp_path / out)) == 0
    assert contents(tmp_path / "c") == contents(tmp_path / "whole")


@pytest.mark.slow
def test_a_ray_cluster_gives_the_same_bytes(
    shards: Path, model_dir: Path, tmp_path: Path, small_shards: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = pytest.importorskip("ray.data") and pytest.importorskip("ray")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    assert main(command(shards, model_dir, tmp_path / "here")) == 0
    ray.init(num_cpus=2, include_dashboard=False)
    try:
        assert main(command(shards, model_dir, tmp_path / "ray", "--engine", "ray")) == 0
        assert ray.is_initialized()  # the caller's cluster is the caller's
    finally:
        ray.shutdown()
    assert contents(tmp_path / "here") == contents(tmp_path / "ray")


def interrupted_at(monkeypatch: pytest.MonkeyPatch, number: int, exception: BaseException) -> None:
    """Let the file number `number` that the cache writes fail."""
    write, count = cache_index.write_atomic, iter(range(100))

    def failing(path: Path, data: bytes) -> None:
        if next(count) == number:
            raise exception
        write(path, data)

    monkeypatch.setattr(cache_index, "write_atomic", failing)


FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(  # number: of the file, tar or index in turn, that cannot be written
    ("number", "exception", "code", "message"),
    [(0, FULL, 2, "No space left"), (2, KeyboardInterrupt(), 130, "interrupted"), (3, FULL, 2, "No space left")],
)
def test_what_was_interrupted_is_recognised_and_finished(
    number: int, exception: BaseException, code: int, message: str, model_dir: Path, tmp_path: Path, small_shards: None,
    seen: list[int], capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    shards, out = set_of(tmp_path, range(8)), tmp_path / "c"
    assert main(command(shards, model_dir, tmp_path / "whole")) == 0
    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patch:
        interrupted_at(patch, number, exception)
        assert main(command(shards, model_dir, out)) == code
    assert message in one_line(capsys)
    with pytest.raises(ValueError, match=r"c: the cache is incomplete; finish it with the command that began it"):
        CacheReader(out)
    seen.clear()
    assert main(command(shards, model_dir, out)) == 0
    assert sum(seen) == (3 if number >= 2 else 8)  # of two shards, with 5 and 3 images; a tar without index is none
    assert contents(out) == contents(tmp_path / "whole")


def test_an_interrupted_refresh_leaves_the_old_cache_readable(
    model_dir: Path, tmp_path: Path, small_shards: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "c"
    assert main(command(set_of(tmp_path / "old", range(12)), model_dir, out)) == 0
    before = [CacheReader(out).members(n) for n in range(12)]
    shards = set_of(tmp_path / "new", [40, *range(1, 11), 41])
    with pytest.MonkeyPatch.context() as patch:
        interrupted_at(patch, 2, KeyboardInterrupt())
        assert main(command(shards, model_dir, out)) == 130
    reader = CacheReader(out)
    assert [reader.members(n) for n in range(12)] == before
    assert main(command(shards, model_dir, out)) == 0
    assert main(command(shards, model_dir, tmp_path / "fresh")) == 0
    assert contents(out) == contents(tmp_path / "fresh")


def test_another_model_and_other_settings_are_refused(
    shards: Path, model_dir: Path, new_model: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "c"
    assert main(command(shards, model_dir, out)) == 0
    before = contents(out)
    other = new_model("other", seed=1)
    capsys.readouterr()
    assert main(command(shards, other, out)) == 3
    ids = [cache_model.CacheModel.of(folder)[0].encoder_id for folder in (model_dir, other)]
    assert f"made with encoder {ids[0]} (model tiny), not with {ids[1]} (other)" in one_line(capsys)
    for more, message in (
        (["--size", "64"], "made with size 32, not 64"),
        (["--crop", "random:2"], "made with crop centre, not random:2"),
        (["--format", "int8"], "made with format fp16, not int8"),
        (["--dtype", "bfloat16"], "made with dtype float32, not bfloat16"),
        (["--batch", "2"], "made with batch 1, not 2"),
    ):
        assert main(command(shards, model_dir, out, *more)) == 2
        assert message in one_line(capsys)
    assert main(command(foreign_shard(tmp_path / "s", {"a.png": png(90)}), model_dir, out)) == 2
    assert "none of the 12 samples of this cache is of an image in" in one_line(capsys)
    assert contents(out) == before


def test_a_decoder_trained_further_keeps_the_cache(
    shards: Path, model_dir: Path, tmp_path: Path, seen: list[int]
) -> None:
    from diffusers import AutoencoderKL

    out = tmp_path / "c"
    assert main(command(shards, model_dir, out)) == 0
    network = AutoencoderKL.from_pretrained(model_dir)
    with torch.no_grad():
        network.decoder.conv_out.bias += 1
    network.save_pretrained(tmp_path / "tuned")  # a plain diffusers folder, too
    seen.clear()
    assert main(command(shards, tmp_path / "tuned", out)) == 0
    assert not seen


def test_bad_images_are_listed_counted_and_left_out(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = foreign_shard(tmp_path / "s", {"a.png": png(0), "b.png": png(1)[:-200], "c.png": png(2)})
    out = tmp_path / "c"
    for again in (False, True):
        capsys.readouterr()
        assert main(command(shards, model_dir, out)) == 1
        stdout, stderr = capsys.readouterr()
        assert "data-0.tar/data-0/b.png: truncated" in stderr
        assert "2 samples of 2 images" in stdout
        assert "1 images bad" in stdout
        assert ("nothing to do" in stdout) is again
    (line,) = (out / "bad_images.jsonl").read_text().splitlines()
    assert json.loads(line)["key"] == "data-0/b"
    assert [CacheReader(out).read(n)[1]["key"] for n in range(2)] == ["data-0/a", "data-0/c"]


def test_where_all_is_bad_nothing_is_left(model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards, out = foreign_shard(tmp_path / "s", {"b.png": png(1)[:-200]}), tmp_path / "c"
    for form in ("fp16", "lcx"):
        assert main(command(shards, model_dir, out, "--format", form)) == 2
        assert "none of the 1 images can be encoded; the first: data-0/b: " in one_line(capsys)
        assert contents(out) == {}


def test_latents_beyond_a_format_are_bad_images(
    shards: Path, model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from diffusers import AutoencoderKL

    network = AutoencoderKL.from_pretrained(model_dir)
    with torch.no_grad():
        network.encoder.conv_out.bias[0] = 1e6
    network.save_pretrained(tmp_path / "m")
    assert main(command(shards, tmp_path / "m", tmp_path / "c")) == 2
    assert "latents beyond float16" in capsys.readouterr().err
    assert main(command(shards, tmp_path / "m", tmp_path / "b", "--format", "bf16")) == 0


def test_mistakes_are_one_line(
    shards: Path, model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("dear")
    (tmp_path / "empty").mkdir()
    plain = tmp_path / "plain"
    Engine.load(model_dir, EngineConfig(dtype="float32")).model.network.save_pretrained(plain)
    out = tmp_path / "c"
    for argv, code, message in (
        (command(tmp_path / "empty", model_dir, out), 2, "no shards here"),
        (command(tmp_path / "nowhere", model_dir, out), 2, "no such folder"),
        (command(shards, tmp_path / "nowhere", out), 3, "no model of that name"),
        (command(shards, model_dir, tmp_path / "home"), 2, "not a latent cache"),
        (command(shards, model_dir, tmp_path / "home/letter.txt"), 2, "cannot write here"),
        (command(shards, model_dir, out, "--size", "33"), 2, "expected a multiple of 2"),
        (command(shards, model_dir, out, "--crop", "random:0"), 2, "expected centre or random:N"),
        (command(shards, model_dir, out, "--format", "zip"), 2, "expected one of fp16 bf16 int8 lcx"),
        (command(shards, model_dir, out, "-q", "5"), 2, "are for --format lcx"),
        (command(shards, model_dir, out, "--format", "lcx", "-q", "5", "--latent-psnr", "40"), 2, "one of them"),
        (command(shards, model_dir, out, "--format", "lcx", "--latent-psnr", "nan"), 2, "expected dB above 0"),
        (command(shards, model_dir, out, "--batch", "3"), 2, "1 or an even number"),
        (command(shards, model_dir, out, "--engine", "spark"), 2, "expected local or ray"),
        (command(shards, plain, out, "--format", "lcx"), 3, "no entropy tables"),
        (["cache-bench", str(tmp_path / "empty")], 2, "no latent cache here"),
    ):
        assert main(argv) == code, argv
        assert message in one_line(capsys)
        assert not list(out.glob("*"))  # nothing that a corrected command would stumble over


def test_a_disk_that_fails_is_no_bad_image(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shards, out = foreign_shard(tmp_path / "s", {"a.png": png(0), "b.png": png(1)}), tmp_path / "c"

    def failing(ref: Any) -> bytes:
        from codec.errors import ImageError

        raise ImageError(f"{ref.name}: Input/output error") from OSError(errno.EIO, "Input/output error")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache_writer, "read_sample", failing)
        assert main(command(shards, model_dir, out)) == 2
    assert "Input/output error (the same command goes on)" in capsys.readouterr().err
    assert main(command(shards, model_dir, out)) == 0


def test_the_bench_tells_sizes_and_ratios(
    shards: Path, model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for form in ("fp16", "lcx"):
        assert main(command(shards, model_dir, tmp_path / form, "--format", form)) == 0
    capsys.readouterr()
    caches = [str(tmp_path / form) for form in ("fp16", "lcx")]
    assert main(["cache-bench", *caches, "--repeats", "1", "-o", str(tmp_path / "b.json")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[3:6]] == ["fp16", "lcx", ".npy"]
    result = json.loads((tmp_path / "b.json").read_text())
    fp16, lcx, npy = result["rows"]
    latents = 4 * 16 * 16
    assert result["fp16_means_bytes"] == 2 * 2 * latents
    assert 4 * 2 * latents < fp16["payload_bytes"] < 4 * 2 * latents + 500
    assert fp16["of_fp16_means"] == pytest.approx(2, rel=0.1)
    assert lcx["of_fp16_means"] == pytest.approx(header(tmp_path / "lcx")["payload_bytes"] / 12 / (4 * latents))
    assert npy["payload_bytes"] == 4 * 2 * latents + 128
    assert fp16["over_npy"]["read"] == pytest.approx(fp16["read"] / fp16["npy"]["read"])


@pytest.fixture(autouse=True)
def _no_leftover_threads() -> Iterator[None]:
    yield
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("cache")]
