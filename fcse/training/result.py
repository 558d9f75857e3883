"""A finished run, read from its folder."""

import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from fcse.config import TrainConfig, recorded
from fcse.data import is_folder
from fcse.encoder.sentence_encoder import SentenceEncoder
from fcse.errors import InputError, first_line
from fcse.training.folder import RunFolder


@dataclass(frozen=True)
class TrainResult:
    """A finished run.

    config: what was run. folder: holds run.json, metrics.jsonl and model/. encoder: the kept
    weights, in evaluation mode on the CPU. losses: one float a step. evaluations: one dict each
    time the run was scored, the first before training, see `score`. record: what run.json holds.
    checkpoints: step -> file of the weights along the way, see `encoder_at`."""

    config: TrainConfig
    folder: Path
    encoder: SentenceEncoder
    losses: list[float]
    evaluations: list[dict[str, float]]
    record: dict[str, Any]
    checkpoints: dict[int, Path]

    @property
    def steps(self) -> list[int]:
        """The steps whose weights there are: before training, the checkpoints, the kept ones."""
        return sorted({0, *self.checkpoints, self.record["kept_step"]})

    def encoder_at(self, step: int) -> SentenceEncoder:
        """The encoder as it was after a step of `steps`; InputError where there are no weights."""
        if step == self.record["kept_step"]:
            return self.encoder
        if step == 0:
            start = self.config
            return SentenceEncoder.from_pretrained(start.encoder, start.pooling, start.seed)
        if step not in self.checkpoints:
            raise InputError(f"{self.folder} has weights of the steps {self.steps}, not of {step}")
        encoder = copy.deepcopy(self.encoder)
        encoder.load_state_dict(load_file(self.checkpoints[step]))
        return encoder


def run_folder(config: TrainConfig) -> RunFolder:
    """The folder of a run, there or not."""
    return RunFolder(config.folder, config.identity)


def load_run(config: TrainConfig) -> TrainResult:
    """A finished run from its folder; InputError where it is not there, another, or damaged."""
    folder = run_folder(config)
    record = folder.record()
    if record is None:
        raise InputError(f"{folder.path} holds no finished run: train it first")
    return _read(folder, config, record)


def read_run(path: str | Path) -> TrainResult:
    """A finished run by its folder alone, whatever versions it is of; else InputError."""
    folder = RunFolder(Path(path), {})
    record = folder.record() if is_folder(path) else None
    if record is None:
        raise InputError(f"{path} holds no finished run")
    return _read(folder, None, record)


def _read(folder: RunFolder, config: TrainConfig | None, record: dict[str, Any]) -> TrainResult:
    try:
        config = config or replace(recorded(record["config"]), output=str(folder.path))
        steps, evaluations = folder.metrics()
        if len(steps) != config.steps or not evaluations:
            raise ValueError(f"{len(steps)} of {config.steps} steps are written down")
        return TrainResult(
            config=config,
            folder=folder.path,
            encoder=SentenceEncoder.from_pretrained(folder.model, config.pooling),
            losses=steps,
            evaluations=evaluations,
            record={"kept_step": config.steps} | record,
            checkpoints=folder.checkpoints(),
        )
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise InputError(
            f"run {folder.path} is damaged ({first_line(error)}): delete it and train it again"
        ) from None
