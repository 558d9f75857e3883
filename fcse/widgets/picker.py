"""What a notebook looks at: runs or encoders, chosen in a widget or set in its parameter cell."""

import html
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ipywidgets as widgets
import pandas as pd

from fcse.data import runs_folder
from fcse.errors import InputError
from fcse.objectives import VARIANTS
from fcse.objectives import name as name_of
from fcse.recipes import recipe
from fcse.study import report
from fcse.study.embedded import SHORT, pick_runs, train_objectives
from fcse.training import TrainResult
from fcse.widgets.pictures import labelled


class _Picker:
    """A choice from a list, a field for what is not in it, and a line that says what happened.

    Fresh runs are trained once `runs` is read; everything else is loaded when it is picked. What
    cannot be loaded is said in the widget, and what was picked before stays picked.

    choice, name: the controls; `name` acts on Enter. source: what is picked; `runs` is what that
    gives."""

    def __init__(
        self, source: str, options: Mapping[str, str], named: str, field: str, placeholder: str
    ) -> None:
        """Build the picker with `source` picked.

        options: label -> source; the first one stands for fresh runs. named: label of what the
        field holds. field, placeholder: its own label, and what it says while it is empty."""
        self.source = source
        self._fresh = next(iter(options.values()))
        self._runs: Any = None
        known = source in options.values()
        look = {"value": source if known else "", **labelled("look at", "7em", "36em")}
        self.choice = widgets.Dropdown(options={**options, named: ""}, **look)
        look = {"value": "" if known else source, **labelled(field, "7em", "36em")}
        self.name = widgets.Text(placeholder=placeholder, continuous_update=False, **look)
        self._said = widgets.HTML()
        self._say(f"{source} is picked.")
        self.choice.observe(lambda _: self.choice.value and self.pick(self.choice.value), "value")
        self.name.observe(lambda _: self._by_name(), "value")
        self.widget = widgets.VBox([self.choice, self.name, self._said])

    @property
    def message(self) -> str:
        """What the widget says, as text."""
        return html.unescape(self._said.value)

    @property
    def runs(self) -> Any:
        """What is picked, trained or loaded; InputError: it cannot be."""
        if self._runs is None:
            self._runs = self._load(self.source)
        return self._runs

    def pick(self, source: str) -> None:
        """Load a source, or keep in mind that fresh runs are wanted."""
        self._say(f"loading {source} …")
        try:
            runs = None if source == self._fresh else self._load(source)
        except InputError as error:
            self._say(f"{error}. {self.source} stays picked.")
            return
        self.source, self._runs = source, runs
        self._say(f"{source} is picked: run the cells below again.")

    def _load(self, source: str) -> Any:
        raise NotImplementedError

    def _by_name(self) -> None:
        if self.name.value.strip():
            self.choice.value = ""
            self.pick(self.name.value.strip())

    def _say(self, text: str) -> None:
        self._said.value = html.escape(text)


class RunPicker(_Picker):
    """A choice among fresh short runs, the run folders that are there, and any encoder.

    `name` takes a hub name or a folder; `source` and `runs` are those of `pick_runs`."""

    def __init__(self, source: str | Path = SHORT) -> None:
        """Build the picker, with what is picked at first."""
        records = sorted(runs_folder().glob("*/run.json"))
        found = {path.parent.name: str(path.parent) for path in records}
        super().__init__(
            str(source),
            {"fresh short runs of both losses": SHORT} | found,
            "an encoder by its name:",
            "encoder",
            "minilm, a folder, or a hub name; then Enter",
        )

    def _load(self, source: str) -> dict[str, TrainResult]:
        return pick_runs(source)


class SeedsPicker(_Picker):
    """A choice between fresh runs of both losses for a few seeds, and a folder that holds such.

    `source` is a recipe's name for fresh runs, or a folder; `runs` are those of both losses with
    these seeds, as of `report.load_runs`, of several settings those with the most seeds."""

    def __init__(
        self, folder: str | Path | None = None, recipe: str = SHORT, seeds: Sequence[int] = (0,)
    ) -> None:
        """Build the picker with a folder picked, or fresh runs.

        recipe: runs that started from this one count, and fresh ones do. seeds: of each loss."""
        self._recipe, self._seeds = recipe, list(seeds)
        self._named = ", ".join(map(str, seeds))
        super().__init__(
            recipe if folder is None else str(folder),
            {f"fresh runs of {recipe}, seeds {self._named}": recipe},
            "a folder of runs:",
            "folder",
            "where runs lie side by side; then Enter",
        )

    def _load(self, source: str) -> pd.DataFrame:
        folder = Path(source)
        if source == self._fresh:
            for seed in self._seeds:
                trained = train_objectives(replace(recipe(self._recipe), seed=seed))
            folder = next(iter(trained.values())).folder.parent
        both = [name_of(objective) for objective in VARIANTS[:2]]
        runs = report.load_runs(folder, self._recipe)
        runs = runs[runs["name"].isin(both) & runs["seed"].isin(self._seeds)]
        paired = runs.groupby(["settings", "seed"])["name"].nunique() == len(both)
        seeds = paired.groupby("settings").sum()
        if seeds.max() < 2 or seeds.empty:
            raise InputError(
                f"{folder} holds no two of the seeds {self._named} that both losses were trained "
                f"with from {self._recipe}"
            )
        # A folder may hold trials with other settings beside them.
        return runs[runs["settings"] == seeds.idxmax()]
