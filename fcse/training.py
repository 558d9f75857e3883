"""TrainConfig and one readable loop: two dropout views, one similarity matrix, one loss."""

import copy
import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from safetensors.torch import load_file
from tqdm.auto import tqdm

from fcse import losses, speed
from fcse.data import (
    SentencePairs,
    first_line,
    is_file,
    is_folder,
    load_corpus,
    load_lee,
    load_sts,
    sha256,
    text_hash,
)
from fcse.encoder import SentenceEncoder
from fcse.errors import InputError
from fcse.evaluation import judge
from fcse.pooling import Pooling
from fcse.runs import RunFolder, versions, weights_hash

Metric = Literal["last", "lee", "stsb_dev"]
Precision = Literal["auto", "bf16", "float32"]


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a run; two runs with equal fields and versions are the same run.

    Raises:
        InputError: a field is out of its range.
    """

    recipe: str | None = None
    """Name of the recipe the other fields started from; a label, see `fcse.recipes`."""
    objective: losses.Objective = "focal_info_nce"
    """The loss: info_nce (SimCSE), focal_info_nce (Hou & Li 2023) or hardness_info_nce (Lan et al.
    2025)."""
    encoder: str | Path = "minilm"
    """Where to start: minilm (packaged), a model folder, or a hub name."""
    corpus: str | Path = "wiki-mini"
    """What to train on: wiki-mini (packaged), wiki1m (hub), a text file, or DATASET:COLUMN."""
    temperature: float = 0.05
    """tau > 0, the divisor of the logits."""
    m: float = 0.3
    """Shift of the negatives' modulation s * (s + m); used by focal_info_nce only."""
    modulate: losses.Modulate = "both"
    """Which logits focal_info_nce modulates: both, positive, negative or none."""
    stop_gradient: bool = False
    """Take focal_info_nce's modulating factors as constants; the authors do not."""
    alpha: float = losses.ALPHA
    """Hardness weight >= 0 of hardness_info_nce."""
    pooling: Pooling = "cls"
    """How tokens become a sentence vector: cls, mean, mean_first_last or mean_top2."""
    batch_size: int = 64
    """Sentences a step, N >= 2; each meets N - 1 negatives."""
    steps: int = 100
    """Optimiser steps, >= 1; the corpus is reshuffled each time it runs out."""
    learning_rate: float = 3e-5
    """Peak of AdamW's learning rate, > 0, decaying linearly to 0."""
    max_length: int = 32
    """Tokens kept of each training sentence, >= 3; evaluation does not cut."""
    seed: int = 0
    """Seed of head, data order and dropout, 0 to 2**32 - 1."""
    precision: Precision = "auto"
    """bf16 (autocast), float32, or auto: bf16 where the hardware has bf16 matrix units."""
    eval_steps: int = 25
    """Score every so many steps, >= 1."""
    metric: Metric = "last"
    """Which weights to keep: those of the last step, or of the best lee or stsb_dev score."""
    checkpoints: bool = False
    """Keep the weights of every scoring along the way too, in half precision."""
    output: str | Path | None = None
    """Folder of the run; by default a folder of its own under FCSE_RUNS, else under runs/."""

    def __post_init__(self) -> None:
        for name, choices in (
            ("objective", losses.Objective),
            ("pooling", Pooling),
            ("precision", Precision),
            ("metric", Metric),
        ):
            if getattr(self, name) not in get_args(choices):
                raise InputError(
                    f"unknown {name} {getattr(self, name)!r}: "
                    f"choose from {', '.join(get_args(choices))}"
                )
        try:
            losses.check_parameters(self.temperature, self.m, self.modulate, self.alpha)
        except ValueError as error:
            raise InputError(str(error)) from None
        for name, least in (
            ("batch_size", 2),
            ("steps", 1),
            ("max_length", 3),
            ("seed", 0),
            ("eval_steps", 1),
        ):
            if getattr(self, name) < least:
                raise InputError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.seed >= 2**32:
            raise InputError(f"seed must be below 2**32, got {self.seed}")
        if not 0 < self.learning_rate < 1:
            raise InputError(f"learning_rate must lie between 0 and 1, got {self.learning_rate}")

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the result: the fields but the folder, local files' bytes, versions."""
        fields = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(self).items()}
        del fields["output"]
        patterns = ("*.safetensors", "*.bin", "*/model.safetensors")
        folder = Path(self.encoder)
        found = [p for glob in patterns for p in folder.glob(glob)] if is_folder(folder) else []
        files = (Path(self.corpus), *sorted(found))
        return {
            "config": fields,
            "files": {str(path): sha256(path) for path in files if is_file(path)},
            "versions": versions(),
        }

    @property
    def name(self) -> str:
        """A folder name that is the same for equal identities only."""
        identity = json.dumps(self.identity, sort_keys=True).encode()
        digest = hashlib.sha256(identity).hexdigest()[:8]
        return f"{self.key}-seed{self.seed}-{digest}"

    @property
    def key(self) -> str:
        """What figures and tables call this loss: a key of `analysis.VARIANTS`."""
        modulate = losses.effective_modulation(self.objective, self.modulate)
        if self.objective != "focal_info_nce" or modulate == "none":
            return "info_nce" if self.objective == "focal_info_nce" else self.objective
        if self.stop_gradient:
            return "stop_gradient"
        return "focal_info_nce" if modulate == "both" else modulate

    @property
    def folder(self) -> Path:
        """Where the run is written."""
        return Path(self.output or Path(os.environ.get("FCSE_RUNS", "runs")) / self.name)


@dataclass(frozen=True)
class TrainResult:
    """A finished run.

    config: what was run. folder: holds run.json, metrics.jsonl and model/. encoder: the kept
    weights, in evaluation mode on the CPU. losses: one float a step. evaluations: one dict each
    time the run was scored, the first before training, see `score`. record: what run.json holds.
    checkpoints: step -> file of the weights along the way, see `encoder_at`.
    """

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
        """The encoder as it was after a step of `steps`.

        Raises:
            InputError: no weights of that step, or the encoder it started from is gone.
        """
        if step == self.record["kept_step"]:
            return self.encoder
        if step == 0:
            config = self.config
            return SentenceEncoder.from_pretrained(config.encoder, config.pooling, config.seed)
        if step not in self.checkpoints:
            raise InputError(f"{self.folder} has weights of the steps {self.steps}, not of {step}")
        encoder = copy.deepcopy(self.encoder)
        encoder.load_state_dict(load_file(self.checkpoints[step]))
        return encoder


def train(
    config: TrainConfig, callback: Callable[[int, SentenceEncoder], None] | None = None
) -> TrainResult:
    """Train an encoder, or load the run if this very one is in its folder already.

    AdamW without weight decay, linear decay to 0, gradients clipped at norm 1.0, two dropout
    views in one forward pass: SimCSE's recipe (Gao et al. 2021, appendix A).
    The same config on the same machine gives the same losses to the last bit.

    Args:
        config: what to run.
        callback: called after every step with the step's number and the encoder; never called for
            a run that is loaded.

    Raises:
        InputError: a corpus or encoder that cannot be loaded, a corpus smaller than a batch, an
            output folder that holds something else, or a loss that is not finite.
    """
    folder = RunFolder(config.folder, config.identity)
    if folder.record() is None:
        _train(config, folder, callback)
    return load_run(config)


def load_run(config: TrainConfig) -> TrainResult:
    """A finished run from its folder.

    Raises:
        InputError: the run is not there, not finished, or another.
    """
    folder = RunFolder(config.folder, config.identity)
    record = folder.record()
    if record is None:
        raise InputError(f"{folder.path} holds no finished run: train it first")
    return _read(folder, config, record)


def read_run(path: str | Path) -> TrainResult:
    """A finished run by its folder alone, whatever versions it was trained with.

    Raises:
        InputError: no run, not finished, or damaged.
    """
    folder = RunFolder(Path(path), {})
    record = folder.record() if is_folder(path) else None
    if record is None:
        raise InputError(f"{path} holds no finished run")
    try:
        config = TrainConfig(**record["config"], output=str(path))
        return _read(folder, config, {"kept_step": config.steps} | record)
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise InputError(f"run {path} is damaged ({first_line(error)}): train it again") from None


def _read(folder: RunFolder, config: TrainConfig, record: dict[str, Any]) -> TrainResult:
    steps, evaluations = folder.metrics()
    return TrainResult(
        config=config,
        folder=folder.path,
        encoder=SentenceEncoder.from_pretrained(folder.model, config.pooling),
        losses=steps,
        evaluations=evaluations,
        record=record,
        checkpoints=folder.checkpoints(),
    )


def _train(
    config: TrainConfig,
    folder: RunFolder,
    callback: Callable[[int, SentenceEncoder], None] | None,
) -> None:
    started = time.perf_counter()
    accelerator = Accelerator()
    device = accelerator.device
    precision = resolve_precision(config.precision, device)
    _make_deterministic(config.seed, device)

    sentences = load_corpus(config.corpus)
    if len(sentences) < config.batch_size:
        raise InputError(
            f"corpus {config.corpus!r} has {len(sentences)} sentences, fewer than one batch of "
            f"{config.batch_size}: lower batch_size or give more text"
        )
    judged = judged_pairs(config.metric)
    encoder = SentenceEncoder.from_pretrained(config.encoder, config.pooling, config.seed)
    first_weights = weights_hash(encoder.backbone)
    optimizer = torch.optim.AdamW(
        encoder.parameters(), config.learning_rate, weight_decay=0.0, fused=True
    )
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, config.steps)
    encoder, optimizer, schedule = accelerator.prepare(encoder, optimizer, schedule)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")

    folder.start()
    folder.log(step=0, **score(encoder, judged))
    best = -math.inf
    kept_step, kept_scores = 0, {}
    encoder.train()
    batches = tqdm(_batches(sentences, config), config.name, config.steps, unit="step")
    for step, batch in enumerate(batches, start=1):
        with autocast, speed.cheap_dropout_in(encoder.backbone):
            u, v = encoder(encoder.tokenize(batch, config.max_length))
        sim = losses.similarity_matrix(u, v)
        loss = losses.loss(
            sim,
            config.objective,
            config.temperature,
            config.m,
            config.modulate,
            config.stop_gradient,
            config.alpha,
        )
        if not loss.isfinite():
            raise InputError(f"the loss is {loss.item()} at step {step}: lower the learning rate")

        optimizer.zero_grad()
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(encoder.parameters(), 1.0)
        optimizer.step()
        folder.log(step=step, loss=loss.item(), learning_rate=schedule.get_last_lr()[0])
        schedule.step()
        batches.set_postfix(loss=f"{loss.item():.4f}", refresh=False)

        if step % config.eval_steps == 0 or step == config.steps:
            scores = score(encoder, judged)
            folder.log(step=step, **scores)
            value = scores.get(config.metric, math.nan)
            value = -math.inf if math.isnan(value) else value
            keep = step == config.steps if config.metric == "last" else value >= best
            if keep:
                best, kept_step, kept_scores = value, step, scores
                folder.keep(encoder)
            if config.checkpoints and step < config.steps:
                folder.keep_checkpoint(step, encoder)
        if callback is not None:
            callback(step, encoder)

    folder.finish(
        device=str(device),
        precision=precision,
        wall_time_s=round(time.perf_counter() - started, 1),
        kept_step=kept_step,
        scores=kept_scores,
        corpus={"sentences": len(sentences), "sha256": text_hash(sentences)},
        weights={"first": first_weights, "last": weights_hash(encoder.backbone)},
    )


def score(encoder: SentenceEncoder, judged: dict[str, SentencePairs]) -> dict[str, float]:
    """Spearman x 100 on each set of pairs under its name, `_alignment` and `_uniformity` beside."""
    scores = {}
    for name, pairs in judged.items():
        result = judge(encoder, pairs)
        scores[name] = result["spearman"]
        scores[f"{name}_alignment"] = result["alignment"]
        scores[f"{name}_uniformity"] = result["uniformity"]
    return scores


def judged_pairs(metric: Metric = "last") -> dict[str, SentencePairs]:
    """What a run is scored on as it goes: Lee, and the STS-B dev split where it is the metric."""
    judged = {"lee": load_lee()}
    if metric == "stsb_dev":
        judged["stsb_dev"] = load_sts("STSBenchmark", "dev")
    return judged


def resolve_precision(precision: Precision, device: torch.device) -> Precision:
    """What "auto" means here: bf16 where matrix units for it exist, else float32.

    On a CPU without them bf16 is emulated, and slower than float32 by far.
    """
    if precision != "auto":
        return precision
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = device.type == "cpu" and torch.cpu._is_amx_tile_supported()
    return "bf16" if native else "float32"


def _make_deterministic(seed: int, device: torch.device) -> None:
    set_seed(seed)
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)


def _batches(sentences: list[str], config: TrainConfig) -> Iterator[list[str]]:
    order = np.random.default_rng(config.seed)
    rows: list[int] = []
    for _ in range(config.steps):
        if len(rows) < config.batch_size:
            rows = order.permutation(len(sentences)).tolist()
        batch, rows = rows[: config.batch_size], rows[config.batch_size :]
        yield [sentences[i] for i in batch]
