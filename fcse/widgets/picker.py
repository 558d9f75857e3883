"""Which encoder a notebook looks at: fresh short runs, a run that is there, or any by its name."""

import html
import os
from pathlib import Path

import ipywidgets as widgets

from fcse.errors import InputError
from fcse.study import SHORT, pick_runs
from fcse.training import TrainResult

_NAMED = "an encoder by its name:"


class RunPicker:
    """A choice among fresh short runs, the run folders that are there, and any encoder.

    What cannot be loaded is said in the widget, and what was picked before stays picked.

    Attributes:
        widget: what a notebook displays.
        choice, name: the controls; `name` takes a hub name or a folder, and acts on Enter.
        source: what is picked, as `study.pick_runs` takes it.
        message: what the widget says.
    """

    def __init__(self, source: str | Path = SHORT) -> None:
        """Build the picker.

        Args:
            source: what is picked at first.
        """
        self.source = str(source)
        self._runs: dict[str, TrainResult] | None = None
        folder = Path(os.environ.get("FCSE_RUNS", "runs"))
        found = {path.parent.name: str(path.parent) for path in sorted(folder.glob("*/run.json"))}
        options = {"fresh short runs of both losses": SHORT} | found | {_NAMED: ""}
        label = {"style": {"description_width": "7em"}, "layout": {"width": "36em"}}
        known = self.source in options.values()
        self.choice = widgets.Dropdown(
            options=options, value=self.source if known else "", description="look at", **label
        )
        self.name = widgets.Text(
            value="" if known else self.source,
            placeholder="minilm, a folder, or a hub name; then Enter",
            description="encoder",
            continuous_update=False,
            **label,
        )
        self._said = widgets.HTML()
        self._say(f"{self.source} is picked.")
        self.choice.observe(lambda _: self.choice.value and self.pick(self.choice.value), "value")
        self.name.observe(lambda _: self._by_name(), "value")
        self.widget = widgets.VBox([self.choice, self.name, self._said])

    @property
    def message(self) -> str:
        """What the widget says, as text."""
        return html.unescape(self._said.value)

    @property
    def runs(self) -> dict[str, TrainResult]:
        """What is picked, trained or loaded: see `study.pick_runs`, also for its errors."""
        if self._runs is None:
            self._runs = pick_runs(self.source)
        return self._runs

    def pick(self, source: str) -> None:
        """Load a run folder or an encoder; fresh runs are trained once `runs` is read."""
        self._say(f"loading {source} …")
        try:
            runs = None if source == SHORT else pick_runs(source)
        except InputError as error:
            self._say(f"{error}. {self.source} stays picked.")
            return
        self.source, self._runs = source, runs
        self._say(f"{source} is picked: run the cells below again.")

    def _by_name(self) -> None:
        if self.name.value.strip():
            self.choice.value = ""
            self.pick(self.name.value.strip())

    def _say(self, text: str) -> None:
        self._said.value = html.escape(text)
