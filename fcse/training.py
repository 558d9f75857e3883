"""TrainConfig and one readable loop: two dropout views, one similarity matrix, one loss."""

import copy
import hashlib
import json
import math
import os
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from accelerate.utils import gather_object, set_seed
from safetensors.torch import load_file
from torch import Tensor
from tqdm.auto import tqdm

from fcse import losses, micro_batches, processes, speed
from fcse.corpora import TokenizedCorpus, row_batches
from fcse.data import (
    SentencePairs,
    corpus_reader,
    is_file,
    is_folder,
    load_lee,
    load_sts,
    sha256,
)
from fcse.encoder import SentenceEncoder
from fcse.errors import InputError, first_line
from fcse.evaluation import judge
from fcse.pooling import Pooling
from fcse.runs import RunFolder, State, versions, weights_hash

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
    """Sentences a step over all processes, N >= 2; each meets N - 1 negatives."""
    micro_batch_size: int | None = None
    """Sentences whose graph is held at a time, >= 1: less memory, one more pass; else all."""
    mask_duplicates: bool = True
    """Leave out negatives that are the anchor's own sentence again; the authors do not."""
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
            ("micro_batch_size", 1),
            ("steps", 1),
            ("max_length", 3),
            ("seed", 0),
            ("eval_steps", 1),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise InputError(f"{name} must be at least {least}, got {value}")
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
        """A folder name that is the same for equal identities only.

        Fields at their defaults have no part in it, so that a field added later renames no run.
        """
        identity = self.identity
        set_ = {k: v for k, v in identity["config"].items() if v != getattr(TrainConfig, k)}
        named = json.dumps(identity | {"config": set_}, sort_keys=True).encode()
        digest = hashlib.sha256(named).hexdigest()[:8]
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


def run_folder(config: TrainConfig) -> RunFolder:
    """The folder of a run, there or not."""
    return RunFolder(config.folder, config.identity, asdict(TrainConfig()))


def train(
    config: TrainConfig, callback: Callable[[int, SentenceEncoder], None] | None = None
) -> TrainResult:
    """Train an encoder, or load the run if this very one is in its folder already.

    AdamW without weight decay, linear decay to 0, gradients clipped at norm 1.0, two dropout
    views in one forward pass: SimCSE's recipe (Gao et al. 2021, appendix A).
    The same config on the same machine gives the same losses to the last bit, also where a run
    was killed on its way: it goes on from the last scoring whose state is whole.
    Under `accelerate launch` every process calls it: negatives are shared, the first one writes.

    Args:
        config: what to run.
        callback: called after every step with the step's number and the encoder; never called for
            a run that is loaded.

    Raises:
        InputError: a corpus or encoder that cannot be loaded, a corpus smaller than a batch, an
            output folder that holds something else or cannot be written, or a loss or gradient
            that is not finite.
    """
    folder = run_folder(config)
    if folder.record() is None:
        _train(config, folder, callback)
    folder.drop_states()
    return load_run(config)


def load_run(config: TrainConfig) -> TrainResult:
    """A finished run from its folder.

    Raises:
        InputError: the run is not there, not finished, another, or damaged.
    """
    folder = run_folder(config)
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
    return _read(folder, None, record)


def _read(folder: RunFolder, config: TrainConfig | None, record: dict[str, Any]) -> TrainResult:
    try:
        config = config or TrainConfig(**record["config"], output=str(folder.path))
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
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise InputError(
            f"run {folder.path} is damaged ({first_line(error)}): delete it and train it again"
        ) from None


@dataclass
class _Progress:
    """What a run remembers from step to step beside its tensors."""

    processes: int
    step: int = 0
    best: float = -math.inf
    kept_step: int = 0
    kept_scores: dict[str, float] = field(default_factory=dict)
    masked_pairs: int = 0
    wall_time_s: float = 0.0


def _train(
    config: TrainConfig,
    folder: RunFolder,
    callback: Callable[[int, SentenceEncoder], None] | None,
) -> None:
    started = time.perf_counter()
    world = processes.world()
    first = world.is_main_process
    if config.batch_size % world.num_processes:
        raise InputError(
            f"batch_size {config.batch_size} cannot be shared evenly by "
            f"{world.num_processes} processes"
        )
    device = world.device
    precision = resolve_precision(config.precision, device)
    _make_deterministic((config.seed + world.process_index) % 2**32, device)

    corpus_reader(config.corpus)  # refuses what is not there before an encoder is fetched
    encoder = SentenceEncoder.from_pretrained(config.encoder, config.pooling, config.seed)
    corpus = TokenizedCorpus.load(
        config.corpus, encoder, config.max_length, least=config.batch_size
    )
    judged = judged_pairs(config.metric)
    first_weights = weights_hash(encoder.backbone)
    encoder.to(device)
    parameters = list(encoder.parameters())
    optimizer = torch.optim.AdamW(parameters, config.learning_rate, weight_decay=0.0, fused=True)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")

    def views(token_ids: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        with autocast, speed.cheap_dropout_in(encoder.backbone):
            return encoder(token_ids)

    world.wait_for_everyone()
    state = folder.start() if first else None
    world.wait_for_everyone()
    state = state if first else folder.last_state()
    progress = _Progress(world.num_processes)
    if state is not None:
        progress = _restore(state, folder, encoder, optimizer)
    else:
        scores = score(encoder, judged)
        if first:
            folder.log(step=0, **scores)
    before_s = progress.wall_time_s
    encoder.train()
    batches = tqdm(
        row_batches(len(corpus), config.batch_size, config.steps, config.seed, progress.step),
        config.name,
        config.steps,
        initial=progress.step,
        unit="step",
        disable=not first,
    )
    for step, rows in enumerate(batches, start=progress.step + 1):
        sentences, token_ids = corpus.batch(rows)
        sentence_ids, masked = _duplicates(token_ids) if config.mask_duplicates else (None, 0)
        learning_rate = config.learning_rate * (1 - (step - 1) / config.steps)
        optimizer.param_groups[0]["lr"] = learning_rate

        optimizer.zero_grad()
        loss = micro_batches.backward(
            views,
            processes.share(token_ids),
            config.micro_batch_size or config.batch_size,
            partial(_loss, config, sentence_ids),
        )
        loss = processes.mean(loss).item()
        processes.average_gradients(parameters)
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0).item()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            path = folder.keep_batch(step, sentences)
            raise InputError(
                f"at step {step} the loss is {loss} and the gradient's norm {norm}: lower the "
                f"learning rate; its sentences are in {path}, the last good state is that of step "
                f"{next(iter(folder.states()), 0)}"
            )
        optimizer.step()
        if first:
            folder.log(step=step, loss=loss, learning_rate=learning_rate)
        batches.set_postfix(loss=f"{loss:.4f}", refresh=False)

        progress.step = step
        progress.masked_pairs += masked
        progress.wall_time_s = before_s + time.perf_counter() - started
        if step % config.eval_steps == 0 or step == config.steps:
            scores = score(encoder, judged)
            value = scores.get(config.metric, math.nan)
            value = -math.inf if math.isnan(value) else value
            keep = step == config.steps if config.metric == "last" else value >= progress.best
            if keep:
                progress.best, progress.kept_step, progress.kept_scores = value, step, scores
            states = gather_object([micro_batches.random_state()])
            if first:
                folder.log(step=step, **scores)
                if keep:
                    folder.keep(encoder)
                if config.checkpoints and step < config.steps:
                    folder.keep_checkpoint(step, encoder)
                if step < config.steps:
                    folder.keep_state(_state(progress, encoder, optimizer, states))
        if callback is not None:
            callback(step, encoder)

    if first:
        folder.finish(
            device=str(device),
            precision=precision,
            processes=progress.processes,
            wall_time_s=round(progress.wall_time_s, 1),
            kept_step=progress.kept_step,
            scores=progress.kept_scores,
            corpus={"sentences": len(corpus), "sha256": corpus.sha256},
            masked_pairs=progress.masked_pairs,
            weights={"first": first_weights, "last": weights_hash(encoder.backbone)},
        )
    world.wait_for_everyone()


def _loss(config: TrainConfig, sentence_ids: Tensor | None, u: Tensor, v: Tensor) -> Tensor:
    """The loss of this process' anchors against the candidates of all."""
    v = processes.gather_rows(v)
    if sentence_ids is not None:
        sentence_ids = processes.own_first(sentence_ids.to(v.device))
    return losses.chunked_loss(
        u,
        v,
        config.objective,
        config.temperature,
        config.m,
        config.modulate,
        config.stop_gradient,
        config.alpha,
        sentence_ids,
    )


def _duplicates(token_ids: Sequence[Sequence[int]]) -> tuple[Tensor | None, int]:
    """A number for each distinct sentence of a batch, (N,) int64, and how many pairs share one.

    Sentences are the same where the encoder cannot tell them apart; None where all are distinct.
    """
    numbers: dict[tuple[int, ...], int] = {}
    ids = torch.tensor([numbers.setdefault(tuple(ids), len(numbers)) for ids in token_ids])
    if len(numbers) == len(ids):
        return None, 0
    return ids, int((ids.bincount() ** 2).sum()) - len(ids)


def _state(
    progress: _Progress,
    encoder: SentenceEncoder,
    optimizer: torch.optim.Optimizer,
    random_states: list[dict[str, Tensor]],
) -> State:
    """Everything that decides how a run goes on: weights, moments, generators, progress."""
    tensors = {f"weights/{name}": x for name, x in encoder.state_dict().items()}
    for i, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer/{i}/{name}": x for name, x in moments.items()}
    for process, random_state in enumerate(random_states):
        tensors |= {f"random/{process}/{kind}": x for kind, x in random_state.items()}
    tensors = {name: x.detach().cpu().contiguous() for name, x in tensors.items()}
    return State(progress.step, tensors, asdict(progress))


def _restore(
    state: State, folder: RunFolder, encoder: SentenceEncoder, optimizer: torch.optim.Optimizer
) -> _Progress:
    """Take encoder, optimiser and this process' generators to a `_state`."""
    progress = _Progress(**{f.name: state.facts[f.name] for f in fields(_Progress)})
    now = processes.world()
    if progress.processes != now.num_processes:
        raise InputError(
            f"run {folder.path} was begun by {progress.processes} processes, not "
            f"{now.num_processes}: go on with as many, or delete it"
        )
    moments: dict[int, dict[str, Tensor]] = defaultdict(dict)
    weights, random_state = {}, {}
    for path, x in state.tensors.items():
        match path.split("/"):
            case ["weights", name]:
                weights[name] = x
            case ["optimizer", i, name]:
                moments[int(i)][name] = x
            case ["random", process, kind] if int(process) == now.process_index:
                random_state[kind] = x
    encoder.load_state_dict(weights)
    optimizer.load_state_dict(optimizer.state_dict() | {"state": dict(moments)})
    micro_batches.set_random_state(random_state)
    return progress


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
