"""One readable loop: two dropout views, one similarity matrix, one loss."""

import copy
import math
import os
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object, set_seed
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from fcse import losses, micro_batches, processes, speed
from fcse.config import Metric, Precision, TrainConfig
from fcse.corpora import TokenizedCorpus, row_batches
from fcse.data import (
    SentencePairs,
    corpus_reader,
    is_folder,
    load_lee,
    load_sts,
)
from fcse.encoder import SentenceEncoder
from fcse.errors import InputError, first_line
from fcse.evaluation import judge
from fcse.neighbours.batches import Batch, Batches, Item
from fcse.neighbours.detection import Detection, MaskedLM, Unigrams
from fcse.runs import RunFolder, State, weights_hash


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
    A run that another process is training is waited for.

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
    try:
        if folder.record() is None:
            _train(config, folder, callback)
    finally:
        folder.release()
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
    batches = Batches(config, encoder, corpus)
    detection = _detection(config, encoder, corpus)
    trained = nn.ModuleDict({"encoder": encoder} | ({"detection": detection} if detection else {}))
    parameters = list(trained.parameters())
    optimizer = torch.optim.AdamW(parameters, config.learning_rate, weight_decay=0.0, fused=True)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")

    def views(items: Sequence[Item]) -> tuple[Tensor, ...]:
        token_ids, second, retrieved = zip(*items, strict=True)
        with autocast, speed.cheap_dropout_in(encoder.backbone):
            made = encoder(token_ids, second if second[0] else None, config.option("layers"))
            return (*made, encoder.view(retrieved)) if retrieved[0] else made

    def loss_of(batch: Batch, u: Tensor, v: Tensor, *others: Tensor) -> Tensor:
        value = _loss(config, batch, u, v, *others)
        if detection is None:
            return value
        token_ids = [item.token_ids for item in processes.share(batch.items)]
        with autocast:
            found, *_ = detection(torch.cat([u, v]), [*token_ids, *token_ids])
        return value + config.option("detection") * found

    if first:
        folder.claim()
    world.wait_for_everyone()
    if folder.record() is not None:
        return  # by whom we waited for
    world.wait_for_everyone()
    state = folder.start() if first else None
    world.wait_for_everyone()
    state = state if first else folder.last_state()
    progress = _Progress(world.num_processes)
    if state is not None:
        progress = _restore(state, folder, trained, optimizer, batches)
    else:
        scores = score(encoder, judged)
        if first:
            folder.log(step=0, **scores)
    before_s = progress.wall_time_s
    trained.train()
    bar = tqdm(
        row_batches(len(corpus), config.batch_size, config.steps, config.seed, progress.step),
        config.name,
        config.steps,
        initial=progress.step,
        unit="step",
        disable=not first,
    )
    for step, rows in enumerate(bar, start=progress.step + 1):
        batches.cluster(step, encoder)
        batch = batches.at(step, rows)
        learning_rate = config.learning_rate * (1 - (step - 1) / config.steps)
        optimizer.param_groups[0]["lr"] = learning_rate

        optimizer.zero_grad()
        loss = micro_batches.backward(
            views,
            processes.share(batch.items),
            config.micro_batch_size or config.batch_size,
            partial(loss_of, batch),
        )
        loss = processes.mean(loss).item()
        processes.average_gradients(parameters)
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0).item()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            path = folder.keep_batch(step, batch.sentences)
            raise InputError(
                f"at step {step} the loss is {loss} and the gradient's norm {norm}: lower the "
                f"learning rate; its sentences are in {path}, the last good state is that of step "
                f"{next(iter(folder.states()), 0)}"
            )
        optimizer.step()
        if first:
            folder.log(step=step, loss=loss, learning_rate=learning_rate)
        bar.set_postfix(loss=f"{loss:.4f}", refresh=False)

        progress.step = step
        progress.masked_pairs += batch.masked_pairs
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
                    folder.keep_state(_state(progress, trained, optimizer, states, batches))
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


def _loss(config: TrainConfig, batch: Batch, u: Tensor, v: Tensor, *others: Tensor) -> Tensor:
    """The loss of this process' anchors against the candidates of all.

    With lower layers it is the mean of the loss without and with their vectors among the negatives
    (SSCL, Chen et al. 2023).
    """
    rest = list(others)
    lower = rest.pop(0) if config.option("layers") else None
    columns = torch.cat([processes.gather_rows(x) for x in (v, *rest)])
    ids, teacher = (
        None if x is None else _own_first(x.to(v.device), config.batch_size)
        for x in (None if batch.sentence_ids is None else batch.sentence_ids.T, batch.teacher)
    )
    arguments = {
        "objective": config.base,
        "temperature": config.temperature,
        "m": config.m,
        "modulate": config.modulate,
        "stop_gradient": config.stop_gradient,
        "alpha": config.alpha,
        "margin": config.option("margin"),
        "focal_weight": config.option("focal_weight"),
    }
    if batch.mixing is not None:
        arguments |= {name: x.to(v.device) for name, x in vars(batch.mixing).items()}

    def loss(columns: Tensor, ids: Tensor | None, teacher: Tensor | None) -> Tensor:
        given = {
            "sentence_ids": None if ids is None else ids.T,
            "teacher": None if teacher is None else (teacher[: len(u)], teacher),
        }
        of = losses.chunked_loss if batch.mixing is None else losses.core_tuning
        return of(u, columns, **arguments, **given)

    value = loss(columns, ids, teacher)
    if lower is None:
        return value
    below = processes.gather_rows(lower)
    columns = torch.cat([columns, below.flatten(0, 1)])
    if ids is not None:  # vectors of a lower layer are nobody's repeats
        own = -1 - len(ids) - torch.arange(below.shape[0] * below.shape[1], device=ids.device)
        ids = torch.cat([ids, own[:, None].expand(-1, ids.shape[1])])
    if teacher is not None:
        repeated = teacher[: config.batch_size].repeat_interleave(below.shape[1], dim=0)
        teacher = torch.cat([teacher, repeated])
    return (value + loss(columns, ids, teacher)) / 2


def _detection(
    config: TrainConfig, encoder: SentenceEncoder, corpus: TokenizedCorpus
) -> Detection | None:
    """The second task beside the loss, where one is asked for (DiffCSE)."""
    if not config.option("detection"):
        return None
    if config.generator is not None:
        token_generator = MaskedLM(config.generator, encoder.tokenizer)
    else:
        parts = corpus.dataset.iter(batch_size=1000)
        tokens = chain.from_iterable(part["token_ids"] for part in parts)
        token_generator = Unigrams(tokens, encoder.tokenizer.all_special_ids)
    return Detection(encoder, token_generator, seed=config.seed).to(encoder.device)


def _own_first(x: Tensor, batch_size: int) -> Tensor:
    """Columns (C, ...) of a global batch, `batch_size` at a time turned as by `gather_rows`."""
    return torch.cat([processes.own_first(part) for part in x.split(batch_size)])


def _state(
    progress: _Progress,
    trained: nn.Module,
    optimizer: torch.optim.Optimizer,
    random_states: list[dict[str, Tensor]],
    batches: Batches,
) -> State:
    """Everything that decides how a run goes on: weights, moments, generators, labels, progress."""
    tensors = {f"weights/{name}": x for name, x in trained.state_dict().items()}
    for i, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer/{i}/{name}": x for name, x in moments.items()}
    for process, random_state in enumerate(random_states):
        tensors |= {f"random/{process}/{kind}": x for kind, x in random_state.items()}
    if batches.labels is not None:
        tensors["labels"] = torch.from_numpy(batches.labels)
    tensors = {name: x.detach().cpu().contiguous() for name, x in tensors.items()}
    return State(progress.step, tensors, asdict(progress))


def _restore(
    state: State,
    folder: RunFolder,
    trained: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Batches,
) -> _Progress:
    """Take weights, optimiser, labels and this process' generators to a `_state`."""
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
            case ["labels"]:
                batches.labels = x.numpy()
    trained.load_state_dict(weights)
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
