"""A training run at the press of a button: its curves as it goes, and what came of it."""

import hashlib
import html
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import ipywidgets as widgets
import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from fcse import plots
from fcse.config import TrainConfig
from fcse.data import load_corpus
from fcse.errors import InputError
from fcse.training import apart, run_folder, train
from fcse.training.folder import RunFolder
from fcse.widgets.pictures import beside, encode, labelled, panel

_POLL = 0.5
"""Seconds between two looks at a run's folder."""

_NOTE = (
    "Lee: 100 × Spearman against human judgements of news documents. One seed is no evidence for a "
    "loss: a difference between single runs may be the seed’s. Train several seeds and compare "
    "them with <code>fcse report</code>."
)


@dataclass(frozen=True)
class Progress:
    """A run as far as it is: the loss of each step so far, the scores of each scoring."""

    config: TrainConfig
    folder: Path
    losses: list[float]
    evaluations: list[dict[str, float]]


class TrainingPanel:
    """A button that trains what a config says, in a process of its own, and shows it live.

    The kernel stays free and its random state untouched; the process ends with the kernel. A run
    whose settings and versions are there already is loaded. Finished runs join a table, each
    numbered as its curves are.

    Attributes:
        encoder, corpus, upload, seed, steps: the fields that complete the config.
        train_button, stop_button: "train this" and "stop".
        message: what the panel says at present, or what the process complained of.
        live: the run that is training or was broken off, as far as it is; else None.
        finished: the runs of the table, in the order they joined.
        png, alt: the present picture, and what it shows in words."""

    def __init__(self, config: Callable[[], TrainConfig]) -> None:
        """Build the panel.

        `config` gives what to train when the button is pressed, such as the config of an
        `AblationPanel`; the panel's fields replace encoder, corpus, seed and steps in it."""
        self._base = config
        self._thread: threading.Thread | None = None
        self._stopping = threading.Event()
        self.live: Progress | None = None
        self.finished: list[Progress] = []
        self._make_controls(config())
        self._message, self._picture, self._table = (widgets.HTML() for _ in range(3))
        self._say("Nothing trained yet.")
        self._draw()
        fields = beside(self.encoder, self.corpus, self.upload)
        buttons = beside(self.seed, self.steps, self.train_button, self.stop_button)
        self.widget = panel(fields, buttons, self._message, self._picture, self._table)

    def _make_controls(self, config: TrainConfig) -> None:
        named = "minilm (packaged), a model folder, or a hub name"
        look = labelled("encoder", "5em", "26em")
        self.encoder = widgets.Text(str(config.encoder), tooltip=named, **look)
        named = "wiki-mini (packaged), a text file with one sentence a line, or DATASET:COLUMN"
        look = labelled("corpus", "5em", "26em")
        self.corpus = widgets.Text(str(config.corpus), tooltip=named, **look)
        text = {"accept": ".txt,text/plain", "tooltip": "UTF-8, one sentence a line"}
        narrow = {"layout": {"width": "13em"}}
        self.upload = widgets.FileUpload(description="upload a text file", **text, **narrow)
        seeds = {"min": 0, "max": 2**32 - 1, **labelled("seed", "5em", "13em")}
        self.seed = widgets.BoundedIntText(config.seed, **seeds)
        steps = {"min": 1, "max": 10**6, **labelled("steps", "5em", "13em")}
        self.steps = widgets.BoundedIntText(config.steps, **steps)
        train = {"description": "train this", "button_style": "primary"}
        self.train_button = widgets.Button(**train, **narrow)
        self.stop_button = widgets.Button(description="stop", disabled=True, **narrow)
        self.upload.observe(lambda change: self._receive(change["new"]), names="value")
        self.train_button.on_click(lambda _: self.start())
        self.stop_button.on_click(lambda _: self.stop())

    @property
    def config(self) -> TrainConfig:
        """What the button trains; InputError: a field is out of its range."""
        return replace(
            self._base(),
            encoder=self.encoder.value.strip(),
            corpus=self.corpus.value.strip(),
            seed=self.seed.value,
            steps=self.steps.value,
        )

    @property
    def running(self) -> bool:
        """Whether a run is training."""
        return self._thread is not None and self._thread.is_alive()

    def start(self) -> None:
        """Train, or load the run where it is there; nothing while a run is training."""
        if self.running:
            return
        try:
            config = self.config
            folder = run_folder(config)
            if folder.record() is not None:
                run = Progress(config, folder.path, *folder.metrics())
                if not run.evaluations:
                    raise InputError(f"{folder.path} holds no scores: delete it and train again")
                self._join(run)
                self._say("This run was there already: it is in the table.")
                return
            if folder.path.exists():
                folder.start()  # else the curves of an interrupted try would show as this one's
        except (InputError, OSError, ValueError) as error:
            self._say(str(error), wrong=True)
            return
        self._stopping.clear()
        self.live = Progress(config, folder.path, [], [])
        self.train_button.disabled, self.stop_button.disabled = True, False
        self._say("Starting: the encoder and the corpus are loaded.")
        self._thread = threading.Thread(target=self._watch, args=(config, folder), daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the run that is training; harmless where none is."""
        self._stopping.set()

    def wait(self, timeout: float | None = None) -> None:
        """Return when no run is training any more, or after so many seconds."""
        if self._thread is not None:
            self._thread.join(timeout)

    def close(self) -> None:
        """End the run that is training and take the panel away."""
        self.stop()
        self.wait()
        for child in (*self.widget.children, self.widget):
            child.close()

    def _watch(self, config: TrainConfig, folder: RunFolder) -> None:
        """Train in a process and show the run until that has ended; runs in a thread."""
        try:
            config_here = replace(config, output=folder.path)
            with tempfile.TemporaryDirectory() as temporary:
                complaints = Path(temporary, "complaints")
                process = apart.start(train, config_here, output=complaints)
                while process.is_alive() and not self._stopping.wait(_POLL):
                    self._look(config, folder)
                _end(process)
                self._look(config, folder)
                if process.exitcode == 0:
                    self._join(self.live)
                    self._say("Trained: it is in the table.")
                elif self._stopping.is_set():
                    self._say(f"Stopped after {_steps(len(self.live.losses))}.")
                else:
                    said = complaints.read_bytes() if complaints.exists() else b""
                    self._say(_complaint(said, process.exitcode), wrong=True)
        except (InputError, OSError) as error:
            self._say(f"Training could not be started: {error}", wrong=True)
        finally:
            self.train_button.disabled, self.stop_button.disabled = False, True

    def _look(self, config: TrainConfig, folder: RunFolder) -> None:
        """Show what the run has written since the last look."""
        try:
            run = Progress(config, folder.path, *folder.metrics())
        except (FileNotFoundError, ValueError):  # not begun, or in the middle of a line
            return
        if run != self.live:
            self.live = run
            loss = f", loss {run.losses[-1]:.4f} nats" if run.losses else ""
            step = f"step {len(run.losses)} of {config.steps}"
            self._say(f"Training {run.config.name}: {step}{loss}.")
            self._draw()

    def _join(self, run: Progress) -> None:
        self.live = None
        if run.folder not in [each.folder for each in self.finished]:
            self.finished.append(run)
        with pd.option_context("display.max_colwidth", None):  # names of losses are not cut
            table = comparison(self.finished).to_html(index=False, border=0, float_format="%.1f")
        self._table.value = f"{table}<p>{_NOTE}</p>"
        self._draw()

    def _draw(self) -> None:
        self.png, self.alt = draw_curves(self.finished, self.live)
        self._picture.value = plots.image(self.png, self.alt)

    def _say(self, message: str, wrong: bool = False) -> None:
        self.message = message
        style = "color: #B00020; font-weight: bold" if wrong else ""
        role = "alert" if wrong else "status"
        self._message.value = f'<div role="{role}" style="{style}">{html.escape(message)}</div>'

    def _receive(self, files: tuple[Any, ...]) -> None:
        """Keep an uploaded file beside the runs, one file a text, where it can be a corpus."""
        for file in files:
            content = bytes(file["content"])
            name = Path(file["name"])
            digest = hashlib.sha256(content).hexdigest()[:8]
            try:
                path = self.config.folder.parent / "corpora" / f"{name.stem}-{digest}.txt"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
                try:
                    load_corpus(path)
                except InputError:
                    path.unlink()
                    raise
            except (InputError, OSError) as error:
                self._say(f"{name.name} cannot be the corpus: {error}", wrong=True)
            else:
                self.corpus.value = str(path)
                self._say(f"{name.name} is the corpus now.")


def _end(process: BaseProcess) -> None:
    """Terminate a process, and kill it where that takes more than five seconds."""
    process.terminate()
    process.join(5)
    process.kill()
    process.join()


def _complaint(output: bytes, code: int) -> str:
    """What a process that failed says to its user, else how it ended."""
    lines = [line.strip() for line in output.decode(errors="replace").splitlines()]
    said = [line for line in lines if line.startswith("fcse: ")]
    if said:
        return said[-1].removeprefix("fcse: ")
    last = next((line for line in reversed(lines) if line), "nothing")
    return f"Training ended with exit code {code}; its last words: {last}"


def _steps(count: int) -> str:
    return f"{count} step{'s'[: count != 1]}"


def draw_curves(finished: Sequence[Progress], live: Progress | None = None) -> tuple[bytes, str]:
    """Loss and Lee score over the steps as PNG, and in words; the live run wide, others numbered.

    Any thread may call it: it uses neither pyplot nor mathtext, which hold state of the process."""
    figure = Figure(figsize=(11, 3.4), dpi=100, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    losses, scores = figure.subplots(1, 2)
    runs = [(f"{i} · {run.config.name}", run, 1.5) for i, run in enumerate(finished, start=1)]
    if live is not None:
        runs.append((f"now · {live.config.name}", live, 3.5))
    for label, run, width in runs:
        style = {"color": plots.style(run.config.name).colour, "lw": width, "label": label}
        losses.plot(range(1, len(run.losses) + 1), run.losses, **style)
        steps = [scored["step"] for scored in run.evaluations]
        scores.plot(steps, [scored["lee"] for scored in run.evaluations], marker="o", **style)
    losses.set(xlabel="step", ylabel="loss [nats]")
    values = [value for _, run, _ in runs for value in run.losses]
    if values and max(values) > 10 * min(values) > 0:
        losses.set_yscale("log")
        losses.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        losses.yaxis.set_minor_locator(NullLocator())
        losses.yaxis.set_major_formatter("{x:g}")
    scores.set(xlabel="step", ylabel="Lee: Spearman × 100")
    for axes in (losses, scores):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if runs:
            axes.set_xlim(0, 1.02 * max(run.config.steps for _, run, _ in runs))
    if runs:
        handles = losses.get_legend_handles_labels()
        figure.legend(*handles, loc="outside right upper", frameon=False)
    canvas.draw()
    alt = "Loss and Lee score over the steps."
    for label, run, _ in runs:
        loss = f", loss {run.losses[-1]:.4f}" if run.losses else ""
        lee = f", Lee {run.evaluations[-1]['lee']:.1f}" if run.evaluations else ""
        alt += f" {label}: {_steps(len(run.losses))}{loss}{lee}."
    return encode(canvas), alt


def comparison(runs: Sequence[Progress]) -> pd.DataFrame:
    """Finished runs side by side.

    Returns: One row a run: "run" (its number), "loss" (its name), "encoder", "corpus", "seed",
    "steps", "Lee before", "Lee after" (100 x Spearman)."""
    rows = []
    for number, run in enumerate(runs, start=1):
        config, before, after = run.config, run.evaluations[0], run.evaluations[-1]
        names = config.name, Path(config.encoder).name, Path(config.corpus).name
        rows.append((number, *names, config.seed, config.steps, before["lee"], after["lee"]))
    columns = ["run", "loss", "encoder", "corpus", "seed", "steps", "Lee before", "Lee after"]
    return pd.DataFrame(rows, columns=columns)
