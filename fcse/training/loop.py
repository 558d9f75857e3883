"""One readable loop: two dropout views, one similarity matrix, one loss."""

import math
import os
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from accelerate.utils import gather_object, set_seed
from torch import Tensor, nn
from tqdm.auto import tqdm

from fcse import losses, processes
from fcse.config import TrainConfig
from fcse.data import corpus_reader
from fcse.encoder import speed
from fcse.encoder.precision import Precision, hardware, resolve_precision
from fcse.encoder.sentence_encoder import SentenceEncoder, weights_hash
from fcse.errors import InputError
from fcse.evaluation import judged_pairs, score
from fcse.methods import Batch, Moments, Start
from fcse.training import micro_batches
from fcse.training.batches import compare, items, loss_of, make_batch, views
from fcse.training.corpora import TokenizedCorpus, row_batches
from fcse.training.folder import RunFolder
from fcse.training.result import TrainResult, load_run, run_folder
from fcse.training.state import Progress, pack, unpack

Callback = Callable[[int, SentenceEncoder], None]


def train(config: TrainConfig, callback: Callback | None = None) -> TrainResult:
    """Train an encoder, or load the run if this very one is in its folder already.

    AdamW without weight decay, linear decay to 0, gradients clipped at norm 1.0, two dropout
    views in one forward pass: SimCSE's recipe (Gao et al. 2021, appendix A).
    The same config on the same machine gives the same losses to the last bit, also where a run
    was killed on its way: it goes on from the last scoring whose state is whole.
    Under `accelerate launch` every process calls it: negatives are shared, the first one writes.
    A run that another process is training is waited for.

    `callback` gets each step's number and the encoder; it is never called for a run that is loaded.
    InputError: a corpus or encoder that cannot be loaded, a corpus smaller than a batch, an
    objective whose rows depend on each other, an output folder that holds something else or cannot
    be written, or a loss or gradient that is not finite."""
    folder = run_folder(config)
    try:
        if folder.record() is None and not any(
            method.whole(config, train, folder, callback, partial(_scores, config))
            for method in config.methods
        ):
            low = resolve_precision(config.precision) == "bf16"
            with speed.freed_memory_kept() if low else nullcontext():
                _train(config, folder, callback)
    finally:
        folder.release()
    folder.drop_states()
    return load_run(config)


@dataclass(frozen=True)
class _Run:
    """What a run is made of: what is trained, and what stays as it is."""

    precision: Precision
    encoder: SentenceEncoder
    corpus: TokenizedCorpus
    first_weights: str
    acting: dict[str, Moments]

    @property
    def trained(self) -> nn.ModuleDict:
        """The encoder, and what methods train with it."""
        modules = {key: m.module for key, m in self.acting.items() if m.module is not None}
        return nn.ModuleDict({"encoder": self.encoder} | modules)


def _train(config: TrainConfig, folder: RunFolder, callback: Callback | None) -> None:
    started = time.perf_counter()
    world = processes.world()
    first = world.is_main_process
    run = _prepare(config)
    judged = judged_pairs(config.metric)
    trained, acting = run.trained, list(run.acting.values())
    parameters = list(trained.parameters())
    optimizer = torch.optim.AdamW(parameters, config.learning_rate, weight_decay=0.0, fused=True)
    autocast = torch.autocast(world.device.type, torch.bfloat16, enabled=run.precision == "bf16")
    layers = max((method.layers for method in acting), default=0)
    embed = partial(views, run.encoder, layers, run.precision)

    def whole_loss(batch: Batch, *vectors: Tensor) -> Tensor:
        return loss_of(config.objective, acting, autocast, compare(batch, layers, *vectors))

    if first:
        folder.claim()
    world.wait_for_everyone()
    if folder.record() is not None:
        return  # by whom we waited for
    world.wait_for_everyone()
    state = folder.start() if first else None
    world.wait_for_everyone()
    state = state if first else folder.last_state()
    progress = Progress(world.num_processes)
    if state is not None:
        progress = unpack(state, folder, trained, optimizer, run.acting)
    else:
        _log(folder, first, step=0, **score(run.encoder, judged, config.score_precision))
    begun, before_s = progress.step, progress.wall_time_s
    unread: list[_Reading] = []
    trained.train()
    drawn = row_batches(len(run.corpus), config.batch_size, config.steps, config.seed, begun)
    shown = {"initial": begun, "unit": "step", "disable": not first}
    bar = tqdm(drawn, config.run_name, config.steps, **shown)
    for step, rows in enumerate(bar, start=begun + 1):
        for method in acting:
            method.before_step(step)
        batch = make_batch(config, run.corpus, run.acting, step, rows)
        learning_rate = config.learning_rate * (1 - (step - 1) / config.steps)
        optimizer.param_groups[0]["lr"] = learning_rate
        optimizer.zero_grad()
        micro = config.micro_batch_size or config.batch_size
        mine, loss_of_batch = processes.share(items(batch)), partial(whole_loss, batch)
        loss = processes.mean(micro_batches.backward(embed, mine, micro, loss_of_batch))
        processes.average_gradients(parameters)
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        said = {"learning_rate": learning_rate} | {
            f"{key}.{name}": value
            for key, method in run.acting.items()
            for name, value in method.counted(batch).items()
        }
        unread.append(_Reading(batch, loss, norm, said))
        scored = step % config.eval_steps == 0 or step == config.steps
        # A GPU goes on with this step while the numbers of the one before are read.
        while len(unread) > (world.device.type == "cuda" and not scored):
            numbers = unread.pop(0).numbers(folder)
            _log(folder, first, **numbers)
            bar.set_postfix(loss=f"{numbers['loss']:.4f}", refresh=False)
        optimizer.step()
        for method in acting:
            method.after_step(step)

        progress.step = step
        progress.masked_pairs += batch.masked_pairs
        progress.wall_time_s = before_s + time.perf_counter() - started
        if scored:
            scores = score(run.encoder, judged, config.score_precision)
            keep = progress.judge(step, scores, config)
            random_states = gather_object([micro_batches.random_state()])
            _log(folder, first, step=step, **scores)
            if first and keep:
                folder.keep(run.encoder)
            if first and step < config.steps:
                if config.checkpoints:
                    folder.keep_checkpoint(step, run.encoder)
                folder.keep_state(pack(progress, trained, optimizer, random_states, run.acting))
        if callback is not None:
            callback(step, run.encoder)
    if first:
        remarks = [remark for method in acting if (remark := method.remark())]
        folder.finish(
            device=str(run.encoder.device),
            hardware=hardware(run.encoder.device),
            precision=run.precision,
            processes=progress.processes,
            wall_time_s=round(progress.wall_time_s, 1),
            kept_step=progress.kept_step,
            scores=progress.kept_scores,
            corpus={"sentences": len(run.corpus), "sha256": run.corpus.sha256},
            masked_pairs=progress.masked_pairs,
            remarks=remarks,
            weights={"first": run.first_weights, "last": weights_hash(run.encoder.backbone)},
        )
        for remark in remarks:
            tqdm.write(f"{config.run_name}: {remark}", file=sys.stderr)
    world.wait_for_everyone()


class _Reading:
    """A step's loss and gradient norm on their way from the device."""

    def __init__(self, batch: Batch, loss: Tensor, norm: Tensor, said: dict[str, float]) -> None:
        self.batch, self.said = batch, said
        self.values = torch.stack([loss, norm]).to("cpu", non_blocking=True)
        self.arrived = torch.cuda.Event() if loss.is_cuda else None
        if self.arrived is not None:
            self.arrived.record()

    def numbers(self, folder: RunFolder) -> dict[str, float]:
        """What is logged of the step; InputError: its loss or gradient is not finite."""
        if self.arrived is not None:
            self.arrived.synchronize()
        step, (loss, norm) = self.batch.step, self.values.tolist()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            path = folder.keep_batch(step, self.batch.sentences.texts[: self.batch.size])
            raise InputError(
                f"at step {step} the loss is {loss} and the gradient's norm {norm}: lower the "
                f"learning rate; its sentences are in {path}, the last good state is that of step "
                f"{next(iter(folder.states()), 0)}"
            )
        return {"step": step, "loss": loss} | self.said


def _prepare(config: TrainConfig) -> _Run:
    """Everything there is before the first step; what cannot be is refused before much is done."""
    world = processes.world()
    if config.batch_size % world.num_processes:
        said = f"batch_size {config.batch_size} cannot be shared evenly by"
        raise InputError(f"{said} {world.num_processes} processes")
    precision = resolve_precision(config.precision, world.device)
    losses.require_sound(config.objective)
    set_seed((config.seed + world.process_index) % 2**32)
    if world.device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
    corpus_reader(config.corpus)  # refuses what is not there before an encoder is fetched
    encoder = SentenceEncoder.from_pretrained(config.encoder, config.pooling, config.seed)
    corpus = TokenizedCorpus.load(
        config.corpus, encoder, config.max_length, least=config.batch_size
    )
    first_weights = weights_hash(encoder.backbone)
    start = Start(config, encoder.to(world.device), corpus, train)
    drawn = micro_batches.random_state()
    acting = {method.key: method.begin(start) for method in config.methods}
    micro_batches.set_random_state(drawn)  # a run that had to come first has drawn from it, or not
    return _Run(precision, encoder, corpus, first_weights, acting)


def _scores(config: TrainConfig, encoder: SentenceEncoder) -> dict[str, float]:
    return score(encoder, judged_pairs(config.metric), config.score_precision)


def _log(folder: RunFolder, first: bool, **numbers: float) -> None:
    if first:
        folder.log(**numbers)
