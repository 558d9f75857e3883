"""The runs of a grid, each in a process of its own, some at a time."""

import io
import math
import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import redirect_stderr, suppress
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path

import pandas as pd
import torch
from filelock import FileLock, Timeout
from tqdm.auto import tqdm

from fcse import processes
from fcse.config import TrainConfig
from fcse.data import SentencePairs, is_folder, load_lee, load_sts
from fcse.encoder.precision import bf16_units
from fcse.encoder.sentence_encoder import SentenceEncoder
from fcse.errors import InputError, replacing
from fcse.evaluation import judged_pairs, score
from fcse.study.grid import Grid
from fcse.study.report import judged
from fcse.study.tables import SCORES, results
from fcse.training import apart, run_folder, train


def load_tasks(names: Sequence[str]) -> list[SentencePairs]:
    """The judged pairs of each task, under the name from `TASKS`; errors of `data.load_sts`."""
    tasks = []
    for name in names:
        task, _, split = name.partition("-")
        pairs = load_lee() if name == "Lee" else load_sts(task, split or "test")
        tasks.append(replace(pairs, name=name))
    return tasks


def run_one(config: TrainConfig, tasks: Sequence[str], keep_model: bool) -> None:
    """Train a run and score it; what of it is there already is reused.

    The scores on `tasks`, names from `TASKS`, are kept in the folder's scores.json; the weights are
    removed then, unless `keep_model`. InputError: as in `training.train`, `load_tasks`."""
    pairs = load_tasks(tasks)
    device = processes.world().device
    if "bf16" in (config.precision, config.score_precision) and not bf16_units(device):
        raise InputError(
            "this study is planned in bf16, and this machine has no units for it: run it where "
            "there are some, or with precision float32"
        )
    folder = run_folder(config)
    if not is_folder(folder.model) and folder.record() is not None:
        folder.start()  # a task more than before, and the weights were removed: train them again
    encoder = train(config).encoder.to(device)
    judged(encoder, pairs, folder.path / SCORES, config.score_precision)
    if not keep_model:
        folder.drop_models()


class Local:
    """Where the runs of a grid are made: in processes of this machine, over its GPUs in turn."""

    def __init__(self, workers: int | None = None) -> None:
        """workers: runs at a time; by default one a GPU, else one. InputError: below 1."""
        self.workers = check_workers(workers) or len(_gpus()) or 1
        self._free = list(range(self.workers))
        self._running: dict[TrainConfig, tuple[BaseProcess, int]] = {}

    def start(self, config: TrainConfig, tasks: Sequence[str], keep_models: bool) -> None:
        """Begin `run_one`, apart from this process; it ends with it."""
        slot = self._free.pop()
        call = run_one, config, tasks, keep_models
        process = apart.start(*call, output=log_of(config), environment=_share(slot, self.workers))
        self._running[config] = process, slot

    def ended(self, config: TrainConfig) -> str | None:
        """None while a run goes on; why it failed, in one line, or nothing once it has ended.

        The output of one that failed stays as `log_of` it."""
        process, slot = self._running[config]
        if process.is_alive():
            return None
        del self._running[config]
        self._free.append(slot)
        code, log = process.exitcode, log_of(config)
        if code == 0:
            log.unlink()
            return ""
        if code < 0:
            return f"ended by {signal.Signals(-code).name}"
        said = log.read_text(errors="replace").strip() if log.exists() else ""
        return (said or f"exit code {code}").splitlines()[-1].strip().removeprefix("fcse: ")

    def stop(self) -> None:
        """End all that goes on."""
        for process, _ in self._running.values():
            process.terminate()
        for process, _ in self._running.values():
            process.join()


def run_grid(grid: Grid, where: Local | None = None, keep_models: bool = False) -> pd.DataFrame:
    """Train and score what is left of a grid, each run in a process of its own.

    results.csv is renewed after every run. A run that fails is said in one line, its output is
    kept beside its folder as NAME.log, and the others go on. What ends with this call goes on from
    its last state with the next.

    where: the runs are made; by default `Local`. keep_models: keep the weights of the runs made
    now.

    Returns: `results` of the grid's folder. InputError: data of a task that is missing, a folder
    that another study works in or that cannot be written, or, after all others are done, runs that
    failed."""
    if processes.world().num_processes > 1:
        raise InputError("a study starts its own processes: call it without accelerate launch")
    load_tasks(grid.tasks)  # better missed now than after the first training
    try:
        (grid.folder / "runs").mkdir(parents=True, exist_ok=True)
        with FileLock(grid.folder / ".lock", timeout=0):
            failed = _run_all(grid, where or Local(), keep_models)
    except Timeout:
        raise InputError(
            f"another study works in {grid.folder}: wait for it, or name another output"
        ) from None
    except OSError as error:
        raise InputError(f"study in {grid.folder} stopped: {error.strerror or error}") from None
    if failed:
        raise InputError(
            f"{len(failed)} of {len(grid.runs)} runs failed, and the same command tries them "
            f"again: {', '.join(failed)}"
        )
    return results(grid.folder)


def _run_all(grid: Grid, where: Local, keep_models: bool) -> list[str]:
    """Names of the runs that failed."""
    waiting = grid.to_run()
    running: list[TrainConfig] = []
    failed: list[str] = []
    _write_results(grid)
    total = len(grid.runs)
    bar = tqdm(total=total, initial=total - len(waiting), unit="run", smoothing=0)
    try:
        while waiting or running:
            while waiting and len(running) < where.workers:
                running.append(waiting.pop(0))
                where.start(running[-1], grid.tasks, keep_models)
            time.sleep(0.1)
            for config in [*running]:
                reason = where.ended(config)
                if reason is None:
                    continue
                running.remove(config)
                if reason:
                    failed.append(config.folder.name)
                    said = f"failed: {failed[-1]}: {reason} (see {log_of(config)})"
                    bar.write(said, file=sys.stderr)
                else:
                    _write_results(grid)
                bar.update()
    finally:
        bar.close()
        where.stop()
    return failed


def _share(slot: int, workers: int) -> dict[str, str]:
    """The environment that gives a worker its GPU, or its part of the cores."""
    if gpus := _gpus():
        return {"CUDA_VISIBLE_DEVICES": gpus[slot % len(gpus)]}
    if workers > 1:
        return {"OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // workers))}
    return {}


def log_of(config: TrainConfig) -> Path:
    """Where the output of a run goes, beside its folder."""
    return config.folder.with_name(f"{config.folder.name}.log")


def _gpus() -> list[str]:
    """The GPUs there are, as CUDA_VISIBLE_DEVICES names them."""
    count = torch.cuda.device_count()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",")[:count] if visible else [str(i) for i in range(count)]


def check_workers(workers: int | None) -> int | None:
    """How many runs go on at a time, as asked. InputError: below 1."""
    if workers is not None and workers < 1:
        raise InputError(f"workers must be at least 1, got {workers}")
    return workers


def _write_results(grid: Grid) -> None:
    table = grid.rows()
    if len(table):
        with replacing(grid.folder / "results.csv") as path:
            table.to_csv(path, index=False)


def estimate(grid: Grid, runs: Sequence[TrainConfig]) -> tuple[float, str]:
    """How long it takes to train some runs of a grid, without the scoring of the tasks after it.

    By each encoder: the time of the finished runs in the grid's folder on a device of the same
    kind, scaled by steps x batch size; without one, two steps of the first run are timed here.
    Returns: Seconds, one run after another; and in words where they come from. InputError: as in
    `training.train`, `results`."""
    device = processes.world().device.type
    known = results(grid.folder)
    seconds, sources = 0.0, []
    for encoder in dict.fromkeys(run.encoder for run in runs):
        same = [run for run in runs if run.encoder == encoder]
        done = known
        if len(known):
            here = known["device"].str.partition(":")[0] == device
            done = known[here & (known["encoder"] == encoder)]
        if len(done):
            rate = done["wall_time_s"].sum() / (done["steps"] * done["batch_size"]).sum()
            source = f"{len(done)} finished run{'s'[: len(done) > 1]} of {encoder}"
        else:
            rate = _seconds(same[0]) / (same[0].steps * same[0].batch_size)
            source = f"2 steps of {encoder} timed"
        sources.append(f"from {source} on {device}")
        seconds += rate * sum(run.steps * run.batch_size for run in same)
    return seconds, ", ".join(sources)


class _Timed(Exception):
    """The steps to time are done."""


def _seconds(config: TrainConfig) -> float:
    """Seconds a whole run takes: its start, steps and scorings, from a few of them."""
    times: list[float] = []

    def clock(step: int, encoder: SentenceEncoder) -> None:
        times.append(time.perf_counter())
        if step == 3:
            score(encoder, judged_pairs(config.metric))
            times.append(time.perf_counter())
            raise _Timed

    steps = max(config.steps, 4)
    with tempfile.TemporaryDirectory() as folder:
        output = f"{folder}/{config.run_name}"
        short = replace(config, steps=steps, eval_steps=steps, output=output)
        begun = time.perf_counter()
        with suppress(_Timed), redirect_stderr(io.StringIO()):
            train(short, clock)
    first, _, third, scored = times
    scorings = math.ceil(config.steps / config.eval_steps)
    step_s, score_s = (third - first) / 2, scored - third
    return first - begun + (config.steps - 1) * step_s + scorings * score_s
