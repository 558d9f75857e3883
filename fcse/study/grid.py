"""A grid of runs from one TOML file: what it asks for, and what of it there is."""

import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd

from fcse import methods
from fcse.config import PARAMETERS, TrainConfig, configured, flattened
from fcse.data import STS_TASKS, is_file
from fcse.errors import InputError
from fcse.recipes import recipe
from fcse.study.tables import current_rows, finished, joined, not_in, results

TASKS = ("Lee", *STS_TASKS, "STSBenchmark-dev", "SICKRelatedness-dev")
"""What the runs of a grid can be scored on."""

_NOT_IN_TABLES = ("recipe", "seed", "output", "methods")
_FIELDS = [f.name for f in fields(TrainConfig) if f.name not in _NOT_IN_TABLES]
_TOP = ("recipe", "tasks", "seeds", "runs")


@dataclass(frozen=True)
class Grid:
    """What a file asks for.

    runs: distinct, each with its own folder as `output`, in the order in which they are run: all
    settings with the first seed, then with the next. tasks: names from `TASKS`, scored once a run
    is trained. folder: holds results.csv, and the runs' folders under runs/. table: a CSV whose
    rows count as done, wherever they were made."""

    runs: tuple[TrainConfig, ...]
    tasks: tuple[str, ...]
    folder: Path
    table: Path | None = None

    def to_run(self) -> list[TrainConfig]:
        """The runs that are not yet trained and scored on every task, with these versions.

        InputError: a folder that is a file, a record in it that cannot be read, or a table that is
        none of a study."""
        if is_file(self.folder):
            raise InputError(f"output {self.folder} is a file: name a folder")
        done = {run: finished(run.folder) for run in self.runs}
        left = [run for run, x in done.items() if x is None or not x[1].keys() >= {*self.tasks}]
        return not_in(current_rows(self.table), left, self.tasks)

    def rows(self) -> pd.DataFrame:
        """The rows of the folder's runs and of the table, as text; one a run.

        InputError: as in `to_run`."""
        return joined([results(self.folder), current_rows(self.table)])


def read_grid(path: Path, folder: Path) -> Grid:
    """The grid that a TOML file describes, to be written to a folder.

    Settings at the top, by their flat names, are common to all runs; each [[runs]] table adds its
    own. Where a value is a list, each of its values is taken with each of the others'. `recipe`
    gives what is not named (minilm-wiki), `seeds` is a list or a count (1), `tasks` a list of names
    from `TASKS` (Lee). Runs that come to the same are one; a run that has a row in NAME.csv beside
    the file NAME.toml counts as done. InputError: no such file, bad TOML, an unknown key, a value
    of the wrong type or out of range, or no run at all."""
    try:
        with path.open("rb") as file:
            content = tomllib.load(file)
        settings, seeds, tasks = _parse(content)
    except OSError as error:
        raise InputError(f"study {path} cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"study {path} is no valid TOML: {error}") from None
    except InputError as error:
        raise InputError(f"study {path}: {error}") from None
    # What "auto" means here holds for all runs, on whatever machine each of them is made.
    settings = [replace(run, **run.precisions) for run in settings]
    runs = dict.fromkeys(replace(run, seed=seed) for seed in seeds for run in settings)
    named = tuple(replace(run, output=str(folder / "runs" / run.run_name)) for run in runs)
    return Grid(named, tuple(tasks), folder, path.with_suffix(".csv"))


def _parse(content: Mapping[str, Any]) -> tuple[list[TrainConfig], list[int], list[str]]:
    """The distinct settings (with seed 0), the seeds and the tasks of a file."""
    common = {name: value for name, value in content.items() if name not in _TOP}
    _check_keys(common, "")
    start = content.get("recipe", "minilm-wiki")
    if not isinstance(start, str):
        raise InputError(f"recipe must be a string, got {start!r}")
    base = recipe(start)

    tasks = content.get("tasks", ["Lee"])
    for task in tasks if isinstance(tasks, list) and tasks else [tasks]:
        if task not in TASKS:
            raise InputError(f"unknown task {task!r} in tasks: choose from {', '.join(TASKS)}")

    seeds = content.get("seeds", 1)
    if type(seeds) is int:
        seeds = list(range(seeds))
    if not isinstance(seeds, list) or any(type(seed) is not int for seed in seeds):
        raise InputError(f"seeds must be a list of whole numbers or a count, got {seeds!r}")
    if not seeds:
        raise InputError("an empty grid: seeds names none")
    for seed in seeds:
        replace(base, seed=seed)  # says what is wrong with it

    tables = content.get("runs", [])
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise InputError("runs must be tables: write [[runs]] above each")
    if not tables:
        raise InputError("an empty grid: add a [[runs]] table, see the README")
    settings: list[TrainConfig] = []
    for number, table in enumerate(tables, start=1):
        _check_keys(table, f" in [[runs]] table {number}")
        settings += _crossed(base, flattened(common) | flattened(table))
    return list(dict.fromkeys(settings)), list(dict.fromkeys(seeds)), list(dict.fromkeys(tasks))


def _check_keys(table: Mapping[str, Any], where: str) -> None:
    known = [*_FIELDS, *PARAMETERS, *methods.names()]
    for key in table:
        if key in known:
            continue
        if key in _TOP:
            raise InputError(f"{key}{where}: it belongs at the top of the file")
        near = get_close_matches(key, [*known, *_TOP], n=1)
        hint = f"did you mean {near[0]}?" if near else f"choose from {', '.join(known)}"
        raise InputError(f"unknown key {key!r}{where}: {hint}")


def _crossed(base: TrainConfig, table: Mapping[str, Any]) -> Iterator[TrainConfig]:
    choices = [value if isinstance(value, list) else [value] for value in table.values()]
    if [] in choices:
        name = list(table)[choices.index([])]
        raise InputError(f"an empty grid: {name} is an empty list")
    for chosen in product(*choices):
        given = dict(zip(table, chosen, strict=True))
        if not isinstance(given.get("objective", ""), str):
            raise InputError(f"objective must be a string, got {given['objective']!r}")
        yield configured(base, given)


def plan(runs: Sequence[TrainConfig]) -> pd.DataFrame:
    """What a grid's runs differ in.

    Returns: One row a setting: "contestant" (the name of the loss), the other settings that vary
    among the runs, as text, and "seeds"."""
    table = pd.DataFrame([{"contestant": run.name, **run.settings} for run in runs], dtype=object)
    table = table.where(table.notna(), "").astype(str)
    shown = ["contestant", *(f for f in _FIELDS if f != "objective" and table[f].nunique() > 1)]
    return table.groupby(shown, sort=False)["seed"].agg(" ".join).rename("seeds").reset_index()
