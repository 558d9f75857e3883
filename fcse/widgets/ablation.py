"""The loss under your hands: sliders, and what they do to the curves and to a real batch."""

import html
import textwrap
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import ipywidgets as widgets
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from fcse import analysis, losses, plots
from fcse.config import TrainConfig
from fcse.losses import Columns
from fcse.methods.adap_acse import AdapACSE, turn
from fcse.methods.core_tuning import CoreTuning, FocalWeight
from fcse.objectives import FocalInfoNCE, HardnessInfoNCE, InfoNCE, named
from fcse.objectives import name as name_of
from fcse.recipes import recipe
from fcse.widgets.pictures import beside, encode, labelled, panel, table

_PLAIN = dict(positives=False, negatives=False, alpha=0.0, margin=0.0, focal_weight=False)
_FOCAL = dict(positives=True, negatives=True, stop_gradient=False, m=FocalInfoNCE.m)
PRESETS: dict[str, dict[str, Any]] = {
    "info_nce": _PLAIN,
    "focal_info_nce": _PLAIN | _FOCAL,
    "hardness_info_nce": _PLAIN | {"alpha": HardnessInfoNCE.alpha},
}
"""Objective -> what its button sets; the temperature stays."""

_SYMBOLS = (
    "<i>s</i>: cosine similarity of anchor and candidate; <i>τ</i>: temperature; <i>m</i>: shift "
    "of the negatives’ modulation; <i>α</i>: hardness weight; sg(·): taken as a constant, no "
    "gradient flows through it; pull: the loss’s derivative by <i>s</i>, slope times softmax "
    "probability. Controls in grey do not act on the loss chosen."
)
_MARGIN = (
    "<br><b>margin</b>: in the logit of a negative <i>s</i> gives way to cos(arccos <i>s</i> − "
    "(1 − <i>t</i>) · margin) where arccos <i>s</i> exceeds the margin; <i>t</i>: the teacher’s "
    "similarity of the two sentences, 0 in the curves and for the resting point"
)
_FOCAL_WEIGHT = (
    "<br><b>focal weight</b>: the loss of a row, −log <i>p</i>, is weighed by 1 − <i>p</i>, with "
    "<i>p</i> the probability of its positive"
)
_TOP = 8


class AblationPanel:
    """Controls of the loss; its curves, its pull on a real batch and one row's softmax redraw.

    Logit and slope (the strength of the pull) over the similarity with the resting point, the share
    of the pull on negatives by decile of similarity, and one anchor's candidates with their
    probabilities; InfoNCE at the same temperature stands beside. The axes stay where they are, so
    that a steeper curve looks steeper, and a redraw is cheap: only what moves is drawn.

    The modulation and the hardness weight exclude each other: with a part of the modulation on,
    the loss is Focal-InfoNCE and alpha rests; else alpha above 0 makes it the hardness-weighted
    softmax, and alpha 0 InfoNCE. The margin (AdapACSE) and the focal weight (Core-tuning) go with
    each of them. A reader's own objective has a button, and its parameters as they were given.

    Attributes:
        temperature, m, alpha, margin, positives, negatives, stop_gradient, focal_weight, anchor:
            the controls.
        presets: objective -> its button: those of `PRESETS`, and own ones by their names.
        png, alt: the present picture, for readers without a running kernel, and what it shows.
        table: the present candidates, see `analysis.candidates`.
        seconds: how long the last redraw took."""

    def __init__(
        self,
        sim: Tensor,
        sentences: Sequence[str],
        teacher: Tensor | None = None,
        own: Sequence[Any] = (),
    ) -> None:
        """Build the panel; ValueError: `sim` is not square, or has not one row a sentence.

        Args:
            sim: (N, N) float, a real batch's similarity matrix, positives on the diagonal.
            sentences: the batch, N sentences.
            teacher: (N, N) float, a teacher's similarities of them, such as
                `analysis.readout_similarities`; without one the margin rests.
            own: objectives of the reader's, values."""
        if sim.shape != (len(sentences), len(sentences)):
            raise ValueError(
                f"sim must be (N, N) for N sentences, got {tuple(sim.shape)} for {len(sentences)}"
            )
        # At the lowest temperatures every negative's probability underflows in float32.
        self.sim = sim.double()
        self._teacher = teacher
        self._own = {name_of(named(objective)): objective for objective in own}
        self._chosen: Any = None
        self.sentences = list(sentences)
        self._setting = False
        self._make_controls()
        self._facts, self._picture, self._candidates = (widgets.HTML() for _ in range(3))
        self._draw_background()
        self.redraw()
        shown = (self._facts, self._picture, self.anchor, self._candidates)
        buttons = beside(widgets.Label("set to"), *self.presets.values())
        self.widget = panel(buttons, beside(*self._sliders), beside(*self._toggles), *shown)

    def _make_controls(self) -> None:
        def slider(value: float, label: str, **span: float) -> widgets.FloatSlider:
            return widgets.FloatSlider(value, **labelled(label, "8em", "26em"), **span)

        def toggle(value: bool, description: str) -> widgets.Checkbox:
            look = {"indent": False, "layout": {"width": "16em"}}
            return widgets.Checkbox(value, description=description, **look)

        self.temperature = slider(0.05, "temperature τ", min=0.01, max=0.5, step=0.01)
        self.m = slider(0.3, "m", min=-0.5, max=1.0, step=0.05)
        self.alpha = slider(0.0, "hardness α", min=0.0, max=20.0, step=0.5)
        self.margin = slider(0.0, "margin [rad]", min=0.0, max=0.5, step=0.05)
        self.margin.disabled = self._teacher is None
        self.positives = toggle(True, "modulate positives")
        self.negatives = toggle(True, "modulate negatives")
        self.stop_gradient = toggle(False, "stop-gradient")
        self.focal_weight = toggle(False, "focal weight")
        short = [textwrap.shorten(text, 90, placeholder=" …") for text in self.sentences]
        options = [(f"{i}: {text}", i) for i, text in enumerate(short)]
        look = labelled("anchor", "4em", "min(60em, 98%)")
        self.anchor = widgets.Dropdown(options=options, **look)
        self._sliders = (self.temperature, self.m, self.alpha, self.margin)
        self._toggles = (self.positives, self.negatives, self.stop_gradient, self.focal_weight)
        for control in (*self._sliders, *self._toggles, self.anchor):
            control.observe(self._change, names="value")
        self.presets = {}
        for key in (*PRESETS, *self._own):
            label = key if key in self._own else name_of(named(key))
            button = widgets.Button(description=label, layout={"width": "14em"})
            button.on_click(lambda _, key=key: self.set_to(key))
            self.presets[key] = button

    def _change(self, change: dict[str, Any]) -> None:
        kept = (self.anchor, self.margin, self.focal_weight)
        if not self._setting and change["owner"] not in kept:
            self._chosen = None  # a control of the kit's objectives
        self.redraw()

    @property
    def objective(self) -> Any:
        """The objective chosen, with the parameters that act on it."""
        if self._chosen is not None:
            return self._chosen
        # A browser may send 0.30000000000000004, which would be another run.
        temperature, m, alpha, _ = (round(slider.value, 6) for slider in self._sliders)
        positives, negatives = self.positives.value, self.negatives.value
        if positives or negatives:
            one = "positive" if positives else "negative"
            modulate = "both" if positives and negatives else one
            return FocalInfoNCE(temperature, m, modulate, self.stop_gradient.value).canonical()
        return HardnessInfoNCE(temperature, alpha) if alpha else InfoNCE(temperature)

    @property
    def methods(self) -> tuple[AdapACSE | CoreTuning, ...]:
        """The margin and the focal weight, where they are on."""
        margin = 0.0 if self.margin.disabled else round(self.margin.value, 6)
        weight = CoreTuning(focal_weight=self.focal_weight.value, mixing=False)
        return tuple(method for method in (AdapACSE(margin), weight) if method.on)

    @property
    def seen(self) -> tuple[Any, Columns]:
        """Objective and columns by which the loss sees the batch, as `losses.loss` takes them."""
        objective, turns = self.objective, []
        for method in self.methods:
            if isinstance(method, AdapACSE):
                turns.append(turn(method.margin, self._teacher))
            else:
                objective = FocalWeight(objective)
        return objective, Columns(turns=tuple(turns))

    @property
    def config(self) -> TrainConfig:
        """The short run that trains this very loss."""
        return replace(recipe("minilm-short"), objective=self.objective, methods=self.methods)

    def set_to(self, objective: str) -> None:
        """Set the controls to an objective of `presets`, in one redraw."""
        self._setting = True
        self._chosen = self._own.get(objective)
        for name, value in PRESETS.get(objective, {}).items():
            getattr(self, name).value = value
        self._setting = False
        self.redraw()

    @plt.rc_context(plots.STYLE)
    def _draw_background(self) -> None:
        figure = Figure(figsize=(13, 4.2), dpi=90, layout="constrained")
        logit, slope, share = figure.subplots(1, 3)
        self._canvas = FigureCanvasAgg(figure)
        # Wide and pale below, narrow and full above: both show where they coincide, and in grey.
        reference = {"color": plots.style("InfoNCE").colour, "alpha": 0.45}
        chosen = {"color": plots.style("Focal-InfoNCE").colour}
        self._lines = {}
        for axes, column in ((logit, "logit"), (slope, "slope")):
            looks = (
                {"lw": 6, "label": "InfoNCE", **reference},
                {"lw": 2, "ls": "--", "label": "chosen loss, a positive", **chosen},
                {"lw": 2.5, "label": "chosen loss, a negative", **chosen},
            )
            self._lines[column] = [axes.plot([], [], animated=True, **each)[0] for each in looks]
            axes.set(xlabel="similarity s", xlim=(-1, 1), xticks=(-1, -0.5, 0, 0.5, 1))
            axes.axhline(0, color="black", lw=0.8)
        self._bars = [
            share.bar(np.arange(1, 11) + side, np.zeros(10), 0.4, animated=True, **style)
            for side, style in ((-0.2, reference), (0.2, chosen))
        ]
        dotted = {"color": "black", "lw": 1.5, "ls": ":", "label": "resting point of a negative"}
        self._rest = slope.axvline(0, animated=True, **dotted)
        logit.set(ylabel="logit", ylim=(-25, 30))
        slope.set(ylabel="slope, d logit / d s", ylim=(-50, 60))
        share.set(ylabel="share of the pull on negatives [%]", ylim=(0, 100))
        share.set(xlabel="decile of similarity (10 = hardest)", xticks=range(1, 11))
        lines = [*self._lines["slope"], self._rest]
        figure.legend(handles=lines, loc="outside upper left", ncols=4)
        self._canvas.draw()
        self._background = self._canvas.copy_from_bbox(figure.bbox)

    def redraw(self) -> None:
        """Bring all views in line with the controls."""
        if self._setting:
            return
        started = time.perf_counter()
        objective, columns = self.seen
        reference = analysis.plain(self.objective)
        modulated = self.positives.value or self.negatives.value
        self.m.disabled = not self.negatives.value
        self.stop_gradient.disabled = not modulated
        self.alpha.disabled = modulated
        both = [(reference,), (objective, columns)]
        shares = [analysis.decile_shares(self.sim, *each) for each in both]
        values = [losses.loss(self.sim, *each).item() for each in both]
        unrelated = replace(columns, turns=tuple(turn(self.margin.value) for _ in columns.turns))
        rest = analysis.resting_point(objective, unrelated)
        plain = analysis.curve(reference, points=101)
        self._draw(plain, analysis.curve(objective, unrelated, points=101), shares, rest)
        name, anchor = self.config.name, self.anchor.value
        self._facts.value = _describe(name, self.objective, self.methods, rest, values)
        self.table = analysis.candidates(self.sim, self.sentences, anchor, objective, columns)
        self._candidates.value = _candidates_html(self.table, anchor)
        self.png = encode(self._canvas)
        self.alt = (
            f"Logit, slope and share of the pull by decile: {name} beside InfoNCE at temperature "
            f"{reference.temperature:g}. The hardest tenth of the negatives gets "
            f"{100 * shares[1][-1]:.0f} % of the pull, under InfoNCE {100 * shares[0][-1]:.0f} %."
        )
        self._picture.value = plots.image(self.png, self.alt)
        self.seconds = time.perf_counter() - started

    def _draw(
        self, reference: pd.DataFrame, chosen: pd.DataFrame, shares: Any, rest: float | None
    ) -> None:
        self._canvas.restore_region(self._background)
        for column, lines in self._lines.items():
            values = (reference[column], chosen[f"positive_{column}"], chosen[column])
            for line, y in zip(lines, values, strict=True):
                line.set_data(reference["similarity"], y)
                line.axes.draw_artist(line)
        for bars, share in zip(self._bars, shares, strict=True):
            for bar, height in zip(bars, share, strict=True):
                bar.set_height(100 * height)
                bar.axes.draw_artist(bar)
        if rest is not None:
            self._rest.set_xdata([rest, rest])
            self._rest.axes.draw_artist(self._rest)


def _describe(
    name: str, objective: Any, methods: Sequence[Any], rest: float | None, values: Sequence[float]
) -> str:
    """The loss in words and formulas, its value beside InfoNCE's, its resting point, as HTML."""
    on = {method.key for method in methods}
    margin = "adap_acse" in on
    positive, negative = _formulas(objective)
    modulated = isinstance(objective, FocalInfoNCE) and objective.modulate != "positive"
    point = "none: the negatives are not modulated"
    if modulated and margin:
        point = "none: no negative is turned to it"
    if rest is not None:
        point = f"<i>s</i> = {rest + 0:.3f}"
        if isinstance(objective, FocalInfoNCE):
            formula = "−<i>m</i>" if objective.stop_gradient else "−<i>m</i>/2"
            formula = f"cos(arccos({formula}) + margin)" if margin else formula
            point = f"<i>s</i> = {formula} = {rest + 0:.3f}"
        point = point.replace("-", "−")
    plain, chosen = values
    return (
        '<div style="max-width: 75em">'
        f"<b>{html.escape(name)}</b>: logit of a positive {positive}, of a negative {negative}; "
        f"<b>resting point</b> {point}<br>"
        f"<b>loss of this batch</b> [nats]: InfoNCE {plain:.4f}, chosen {chosen:.4f}<br>"
        f"{_SYMBOLS}{_MARGIN if margin else ''}"
        f"{_FOCAL_WEIGHT if 'core_tuning' in on else ''}</div>"
    )


def _formulas(objective: Any) -> tuple[str, str]:
    """The logits of a positive and of a negative, as HTML."""
    plain = "<i>s</i>/<i>τ</i>"
    if isinstance(objective, FocalInfoNCE):
        factor = "sg(<i>s</i>)" if objective.stop_gradient else "<i>s</i>"
        positive = f"<i>s</i> · {factor}/<i>τ</i>" if objective.modulate != "negative" else plain
        turned = f"<i>s</i> · ({factor} + <i>m</i>)/<i>τ</i>"
        return positive, turned if objective.modulate != "positive" else plain
    if isinstance(objective, HardnessInfoNCE):
        return plain, f"{plain} + <i>α</i> · sg(<i>s</i>)"
    return (plain, plain) if isinstance(objective, InfoNCE) else ("as it is defined",) * 2


def _candidates_html(found: pd.DataFrame, anchor: int) -> str:
    """The most similar candidates of an anchor, its positive always among them, as HTML."""
    top = found.head(_TOP)
    if anchor not in set(top["candidate"]):
        top = pd.concat([top.head(_TOP - 1), found[found["candidate"] == anchor]])
    cell = '<td class="number">'
    rows = []
    for row in top.itertuples():
        own = row.candidate == anchor
        kind, weight = ("positive", "bold") if own else ("negative", "normal")
        rows.append(
            f'<tr style="font-weight: {weight}"><td>{kind}</td>{cell}{row.similarity:.3f}</td>'
            f"{cell}{100 * row.plain:.2f}</td>{cell}{100 * row.chosen:.2f}</td>"
            f"<td>{html.escape(row.sentence)}</td></tr>"
        )
    return table(
        f"Row softmax of the anchor: probability of its {len(top)} most similar candidates of "
        f"{len(found)}",
        ("kind", "similarity s", "InfoNCE [%]", "chosen loss [%]", "candidate"),
        rows,
    )
