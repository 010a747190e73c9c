"""Puts a run together: config -> shards -> task -> trainer. What a user can get wrong is checked before training."""

from pathlib import Path
from typing import Any

import torch

from codec.errors import UsageError
from codec.shards import read_index
from train.autoencoder import AutoencoderTask
from train.config import Config
from train.data import SampleSequence, split
from train.trainer import Trainer, check_run_folder


def run(config: Config) -> dict[str, Any]:
    """Train and export; see `Trainer.run`.

    Raises:
        UsageError: no shards, too few images, missing perceptual features, an unusable run folder.
    """
    if not config.data.shards:
        raise UsageError("trained on what? Set data.shards=FOLDER (codec-train shards writes one)")
    training, validation = split(read_index(Path(config.data.shards)), config.data.n_validation)
    check_run_folder(config.run.out)
    torch.manual_seed(config.run.seed)
    task = AutoencoderTask(config, training, validation)
    return Trainer(config, task, SampleSequence(training, config.data, config.run.seed)).run()
