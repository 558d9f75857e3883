"""A row of a study's table made again, and whether it came out the same."""

import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
import torch

from fcse.config import TrainConfig
from fcse.data import is_file
from fcse.errors import InputError
from fcse.study.grid import TASKS
from fcse.study.tables import config_of, corpus_sha256, read_rows, results, what_it_is
from fcse.study.workers import run_one

NEAR = 0.2
"""How far a score may move and be the same up to rounding, in standard deviations of the seeds.
Processors of different kinds round differently, and training carries that on."""


@dataclass(frozen=True)
class Repeat:
    """What came of it.

    scores: one row a task: "task", "then", "now", "difference", and "sd" over the seeds of the same
    contestant in the table, NaN where there is no other. then, now: hardware and versions."""

    scores: pd.DataFrame
    then: str
    now: str

    @property
    def same(self) -> bool:
        """Whether no score moved by more than `NEAR` sd, or NEAR points where no sd is known."""
        return bool((self.scores["difference"].abs() <= NEAR * self.scores["sd"].fillna(1)).all())

    @property
    def verdict(self) -> str:
        """In words, with how far the scores moved."""
        moved = self.scores["difference"].abs()
        if not moved.any():
            return "the same, to the last digit"
        said = "the same up to rounding" if self.same else "not the same"
        share = (moved / self.scores["sd"]).max()
        of_sd = "" if pd.isna(share) else f", {share:.2f} of the seeds' standard deviation"
        return f"{said}: the scores differ by at most {moved.max():.3f}{of_sd}"


def repeat(table: Path, run: str, corpus: Path | None = None) -> Repeat:
    """Train and score a row of a table again, in a folder that is removed.

    table: a CSV of a study. run: the row, by its column "run". corpus: the file, for a row that was
    trained on one; by default it is looked for here.

    On a processor torch takes as many threads as then. InputError: no such row, no such corpus or
    another one, or as in `workers.run_one`."""
    rows = read_rows(table).to_dict("records")
    row = next((row for row in rows if row["run"] == run), None)
    if row is None:
        raise InputError(f"{table} has no run {run!r}: its column run names them")
    tasks = [task for task in TASKS if row.get(task)]
    with tempfile.TemporaryDirectory() as folder, _threads_of(row):
        config = replace(_with_corpus(row, corpus), output=f"{folder}/runs/{run}")
        run_one(config, tasks, keep_model=False)
        (made,) = results(Path(folder)).to_dict("records")
    but_seed, version = _without_seed(row)
    seeds = [each for each in rows if _without_seed(each) == (but_seed, version)]
    scores = pd.DataFrame(
        {
            "task": task,
            "then": float(row[task]),
            "now": float(made[task]),
            "difference": float(made[task]) - float(row[task]),
            "sd": pd.Series([float(each[task]) for each in seeds if each[task]]).std(),
        }
        for task in tasks
    )
    then, now = (f"{x['device']}; {x['versions']}" for x in (row, made))
    return Repeat(scores, then, now)


def _without_seed(row: Mapping[str, str]) -> tuple[TrainConfig, str]:
    config, version = what_it_is(row)
    return replace(config, seed=0), version


def _with_corpus(row: Mapping[str, str], corpus: Path | None) -> TrainConfig:
    """The row's config, with a corpus of the same sentences."""
    config, name = config_of(row), row["corpus"]
    if corpus is not None:
        config = replace(config, corpus=corpus)
    elif not (name in ("wiki-mini", "wiki1m") or ":" in name or is_file(name)):
        raise InputError(f"{row['run']} was trained on the file {name}: name it with --corpus")
    if (found := corpus_sha256(config.corpus)) != row["corpus_sha256"]:
        raise InputError(
            f"corpus {config.corpus} holds other sentences (SHA-256 {found[:12]}) than those of "
            f"{row['run']} ({row['corpus_sha256'][:12]}): name that one with --corpus"
        )
    return config


@contextmanager
def _threads_of(row: Mapping[str, str]) -> Iterator[None]:
    before = torch.get_num_threads()
    if said := re.search(r"(\d+) threads?$", row["device"]):
        torch.set_num_threads(int(said[1]))
    try:
        yield
    finally:
        torch.set_num_threads(before)
