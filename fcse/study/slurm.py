"""The runs of a grid as jobs of a Slurm cluster, whose machines share the grid's folder."""

import io
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm.auto import tqdm

from fcse.config import TrainConfig
from fcse.errors import InputError, first_line
from fcse.study.grid import Grid
from fcse.study.workers import Local, check_workers, log_of, run_one
from fcse.training import run_folder

if TYPE_CHECKING:
    from submitit import SlurmJob

_ENDED = {
    *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL"),
    *("OUT_OF_MEMORY", "PREEMPTED", "TIMEOUT", "UNKNOWN"),
}
"""Slurm's words for a job that has ended, and ours for one that it has forgotten."""
_MOST = 3
"""How many jobs of a run may end one after another without a new state to go on from."""


@dataclass
class _Run:
    call: tuple[TrainConfig, Sequence[str], bool]
    job: "SlurmJob[str]"
    step: int
    ends: int = 0


class Slurm(Local):
    """A cluster: jobs that it ends are put in again, and go on from their last state."""

    def __init__(self, asked: Mapping[str, str | int], workers: int | None = None) -> None:
        """asked: of the cluster for a run, by sbatch's names. workers: by default all at a time.

        InputError: workers below 1, a time that is none, no submitit or no Slurm here."""
        if not re.fullmatch(r"(\d+-)?\d+(:\d+){0,2}", str(asked.get("time", 1))):
            raise InputError(f"time {asked['time']!r}: write minutes, 4:00:00 or 2-00:00:00")
        try:
            import submitit
        except ImportError:
            raise InputError("--executor slurm needs a package: pip install submitit") from None
        for command in ("sbatch", "squeue", "scancel", "srun"):
            if not shutil.which(command):
                raise InputError(f"--executor slurm needs Slurm: there is no {command} here")
        self.workers = check_workers(workers) or sys.maxsize
        self._asked, self._submitit = dict(asked), submitit
        self._running: dict[TrainConfig, _Run] = {}
        self._begun: set[Path] = set()
        self._states: dict[str, str] = {}
        self._looked = float("-inf")

    def start(self, config: TrainConfig, tasks: Sequence[str], keep_models: bool) -> None:
        """Put a run in, or take over its job from a command that was killed.

        InputError: the cluster refuses it."""
        call = config, tasks, keep_models
        ids = [path.name.partition("_")[0] for path in _folder(config).glob("*_submitted.pkl")]
        there = [self._submitit.SlurmJob(_folder(config), i) for i in ids if not self._end(i)]
        job = there[0] if there else self._submit(call)
        self._running[config] = _Run(call, job, _last_state(config))
        self._begun.add(config.folder.parent)

    def ended(self, config: TrainConfig) -> str | None:
        """None while a run goes on; why it failed, in one line, or nothing once it has ended."""
        run = self._running[config]
        end = self._end(run.job.job_id)
        if not end:
            return None
        if run.job.paths.result_pickle.exists():
            reason = "its job could not begin"
            with suppress(RuntimeError):  # of submitit, whose own part of the job failed
                reason = run.job.result()
        elif end == "CANCELLED":
            reason = "its job was cancelled"
        else:
            step, before = _last_state(config), run.step
            run.step, run.ends = step, 1 if step > before else run.ends + 1
            if run.ends < _MOST:
                was, run.job = run.job, self._submit(run.call)
                said = f"job {was.job_id} ended ({end}), job {run.job.job_id} goes on"
                tqdm.write(f"{config.folder.name}: {said} from step {step}", file=sys.stderr)
                return None
            reason = f"{_MOST} jobs ended ({end}) and did not get any further"
        del self._running[config]
        if reason and run.job.paths.stdout.exists():
            run.job.paths.stdout.replace(log_of(config))
        shutil.rmtree(_folder(config), ignore_errors=True)
        return reason

    def stop(self) -> None:
        """Cancel all jobs that go on, and clear away what is left of the others.

        Some of those ended while no command looked on."""
        if self._running:
            ids = [run.job.job_id for run in self._running.values()]
            subprocess.run(["scancel", *ids], check=False)
        for left in (path for runs in self._begun for path in runs.glob("*.job")):
            shutil.rmtree(left, ignore_errors=True)

    def _submit(self, call: tuple[TrainConfig, Sequence[str], bool]) -> "SlurmJob[str]":
        executor = self._submitit.SlurmExecutor(_folder(call[0]))
        executor.update_parameters(
            job_name=call[0].folder.name,
            time=None,  # the cluster's own: submitit would say five minutes
            stderr_to_stdout=True,
            use_srun=False,  # a step of the job need not get the cores that the job has
            additional_parameters=self._asked,
        )
        try:
            with redirect_stderr(io.StringIO()):  # what is raised says it too
                job = executor.submit(_in_job, *call)
        except RuntimeError as error:
            raise InputError(f"the cluster refuses a job: {first_line(error)}") from None
        self._states[job.job_id] = "PENDING"
        return job

    def _end(self, job: str) -> str:
        """How a job ended, nothing while it waits or runs; seconds old at most."""
        if time.monotonic() - self._looked > 3:
            command = ["squeue", "--me", "--noheader", "--states=all", "--format=%A %T"]
            said = subprocess.run(command, capture_output=True, text=True)
            if said.returncode == 0:  # else the cluster does not answer for a while
                self._states = dict(line.split() for line in said.stdout.splitlines())
            self._looked = time.monotonic()
        state = self._states.get(job, "UNKNOWN")
        return state if state in _ENDED else ""


def _in_job(config: TrainConfig, tasks: Sequence[str], keep_models: bool) -> str:
    """`run_one`. Returns: why it failed, in one line, or nothing."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # submitit would outlive a job that is requeued
    try:
        if Grid((config,), tuple(tasks), config.folder).to_run():  # else requeued at its very end
            run_one(config, tasks, keep_models)
    except InputError as error:
        return str(error)
    except Exception as error:
        traceback.print_exc()
        return traceback.format_exception_only(error)[-1].strip()
    return ""


def _folder(config: TrainConfig) -> Path:
    """For what submitit and the cluster write about a run that goes on."""
    return config.folder.with_name(f"{config.folder.name}.job")


def _last_state(config: TrainConfig) -> int:
    """The step that a run goes on from."""
    return next(iter(run_folder(config).states()), 0)
