"""Where a run's batches come from, whatever the mode: positions in, batches out."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from codec.errors import UsageError
from codec.shards import SampleRef
from train.bad_samples import BadSamples
from train.config import Config
from train.data import SampleSequence, batches, describe_data, is_final
from train.memory import MemoryImages
from train.streaming import check_stream, stream_batches


class Feed:
    """The batches of one rank.

    Attributes:
        bad: what could not be read; counted when a batch is trained on.
    """

    def __init__(
        self,
        config: Config,
        samples: Sequence[SampleRef],
        f: int,
        rank: int,
        n_ranks: int,
        classes: Sequence[str] = (),
        device: torch.device | None = None,
    ) -> None:
        """Lay out the data; a stream is opened once, to see that it gives anything.

        Args:
            config: the recipe.
            samples: of the training (indexed mode).
            f: the network's downsampling factor.
            rank: this rank.
            n_ranks: how many there are. Data are divided among them here, and nowhere else.
            classes: names of the labels 0, 1, ..., where batches have to have labels.
            device: that `data.memory` holds the images on; None = the CPU.

        Raises:
            UsageError: the stream's shards cannot be read.
        """
        self._config = config
        self._rank, self._n_ranks = rank, n_ranks
        self.bad = BadSamples(Path(config.run.out) / "bad_samples.jsonl", config.data.max_bad_share)
        self._sequence: SampleSequence | None = None
        self._memory: MemoryImages | None = None
        if config.data.mode == "indexed":
            self._sequence = SampleSequence(
                samples,
                config.data,
                config.run.seed,
                batch_size=config.optim.batch_size,
                multiple=f,
                channels=config.model.image_channels,
                classes=classes,
            )
            self._text = describe_data(self._sequence, n_ranks)
            if config.data.memory == "device":
                self._memory = MemoryImages(self._sequence, device or torch.device("cpu"))
                self._text += f"; {self._memory.size_bytes / 1e9:.2f} GB of images in memory, without workers"
        else:
            self._text = check_stream(config.data, n_ranks)

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """All (height, width) of batches, pixels."""
        data = self._config.data
        if self._sequence is not None:
            final = self._sequence.stage(1.0)
            return [*self._sequence.shapes, *final.shapes]
        return [(side, side) for side in data.sides]

    def describe(self) -> str:
        """Return one line on shards, samples, ranks and workers."""
        return self._text

    def stage(self, share: float) -> bool:
        """Return what batches to read when `share` (0..1) of the run is done; read anew where it changes."""
        return is_final(self._config.data, share)

    def batches(self, share: float, start: int) -> Iterator[dict[str, Any]]:
        """Yield this rank's batches, without end.

        Args:
            share: of the run that is done, 0..1.
            start: images seen, over all ranks.

        Raises:
            UsageError: nothing can be read any more.
        """
        data, size = self._config.data, self._config.optim.batch_size
        where = {"rank": self._rank, "n_ranks": self._n_ranks, "start": start}
        try:
            if self._memory is not None and self._sequence is not None:
                yield from self._memory.batches(self._sequence.stage(share), size, **where)
            elif self._sequence is not None:
                yield from batches(self._sequence.stage(share), size, data.workers, **where)
            else:
                yield from stream_batches(data, size, self._config.run.seed, **where, final=is_final(data, share))
        except UsageError as exception:  # out of a worker process it comes with that process's traceback in front
            reason = str(exception).strip().splitlines()[-1]
            raise UsageError(reason.removeprefix("codec.errors.UsageError: ")) from exception
