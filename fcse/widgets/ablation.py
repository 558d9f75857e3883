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

from fcse import analysis, plots
from fcse.config import TrainConfig
from fcse.losses import Modulate
from fcse.losses import loss as batch_loss
from fcse.recipes import recipe
from fcse.widgets.pictures import encode, panel

_PLAIN = {
    "positives": False,
    "negatives": False,
    "alpha": 0.0,
    "margin": 0.0,
    "focal_weight": False,
}
PRESETS: dict[str, dict[str, Any]] = {
    "info_nce": _PLAIN,
    "focal_info_nce": _PLAIN
    | {"positives": True, "negatives": True, "stop_gradient": False, "m": 0.3},
    "hardness_info_nce": _PLAIN | {"alpha": analysis.ALPHA},
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

    Linked views: the logit over the similarity, its slope (the strength of the pull) with the
    resting point, the share of the batch's pull on negatives that falls on each decile of
    similarity, and the candidates of one anchor with their probabilities. InfoNCE at the same
    temperature stands beside as the reference. The axes stay where they are, so that a steeper
    curve looks steeper, and a redraw is cheap: only what moves is drawn.

    The modulation and the hardness weight exclude each other: with a part of the modulation on,
    the loss is Focal-InfoNCE and alpha rests; else alpha above 0 makes it the hardness-weighted
    softmax, and alpha 0 InfoNCE. The margin (AdapACSE) and the focal weight (Core-tuning) go with
    each of them.

    Attributes:
        widget: what a notebook displays.
        temperature, m, alpha, margin, positives, negatives, stop_gradient, focal_weight, anchor:
            the controls; setting `.value` redraws.
        presets: objective -> its button, see `PRESETS`.
        png, alt: the present picture, for readers without a running kernel, and what it shows.
        table: the present candidates, see `analysis.candidates`.
        seconds: how long the last redraw took.
    """

    def __init__(
        self, sim: Tensor, sentences: Sequence[str], teacher: Tensor | None = None
    ) -> None:
        """Build the panel.

        Args:
            sim: (N, N) float, a real batch's similarity matrix, positives on the diagonal.
            sentences: the batch, N sentences.
            teacher: (N, N) float, a teacher's similarities of them, such as
                `analysis.readout_similarities`; without one the margin rests.

        Raises:
            ValueError: `sim` is not square, or has not one row a sentence.
        """
        if sim.shape != (len(sentences), len(sentences)):
            raise ValueError(
                f"sim must be (N, N) for N sentences, got {tuple(sim.shape)} for {len(sentences)}"
            )
        # At the lowest temperatures every negative's probability underflows in float32.
        self.sim = sim.double()
        self._teacher = teacher
        self.sentences = list(sentences)
        self._setting = False
        self._make_controls()
        self._facts = widgets.HTML()
        self._picture = widgets.HTML()
        self._candidates = widgets.HTML()
        self._draw_background()
        self.redraw()
        self.widget = panel(
            [
                [widgets.Label("set to"), *self.presets.values()],
                [self.temperature, self.m, self.alpha, self.margin],
                [self.positives, self.negatives, self.stop_gradient, self.focal_weight],
                self._facts,
                self._picture,
                self.anchor,
                self._candidates,
            ]
        )

    def _make_controls(self) -> None:
        def slider(value: float, description: str, **span: float) -> widgets.FloatSlider:
            return widgets.FloatSlider(
                value,
                description=description,
                style={"description_width": "8em"},
                layout={"width": "26em"},
                **span,
            )

        def toggle(value: bool, description: str) -> widgets.Checkbox:
            return widgets.Checkbox(
                value, description=description, indent=False, layout={"width": "16em"}
            )

        self.temperature = slider(0.05, "temperature τ", min=0.01, max=0.5, step=0.01)
        self.m = slider(0.3, "m", min=-0.5, max=1.0, step=0.05)
        self.alpha = slider(0.0, "hardness α", min=0.0, max=20.0, step=0.5)
        self.margin = slider(0.0, "margin [rad]", min=0.0, max=0.5, step=0.05)
        self.margin.disabled = self._teacher is None
        self.positives = toggle(True, "modulate positives")
        self.negatives = toggle(True, "modulate negatives")
        self.stop_gradient = toggle(False, "stop-gradient")
        self.focal_weight = toggle(False, "focal weight")
        self.anchor = widgets.Dropdown(
            options=[
                (f"{i}: {textwrap.shorten(sentence, 90, placeholder=' …')}", i)
                for i, sentence in enumerate(self.sentences)
            ],
            description="anchor",
            style={"description_width": "4em"},
            layout={"width": "min(60em, 98%)"},
        )
        sliders = (self.temperature, self.m, self.alpha, self.margin)
        toggles = (self.positives, self.negatives, self.stop_gradient, self.focal_weight)
        for control in (*sliders, *toggles, self.anchor):
            control.observe(lambda _: self.redraw(), names="value")
        self.presets = {}
        for key in PRESETS:
            button = widgets.Button(description=plots.NAMES[key], layout={"width": "14em"})
            button.on_click(lambda _, key=key: self.set_to(key))
            self.presets[key] = button

    @property
    def loss(self) -> dict[str, Any]:
        """The loss chosen, as arguments of `losses.gradient_weights`: those that act on it.

        A margin's teacher is not among them.
        """
        # A browser may send 0.30000000000000004, which would be another run.
        m, alpha = round(self.m.value, 6), round(self.alpha.value, 6)
        loss: dict[str, Any] = {"temperature": round(self.temperature.value, 6)}
        if self.margin.value and not self.margin.disabled:
            loss["margin"] = round(self.margin.value, 6)
        if self.focal_weight.value:
            loss["focal_weight"] = True
        modulate = self._modulate
        if modulate == "none":
            if alpha == 0:
                return loss | {"objective": "info_nce"}
            return loss | {"objective": "hardness_info_nce", "alpha": alpha}
        loss |= {"objective": "focal_info_nce", "modulate": modulate}
        if self.negatives.value:
            loss["m"] = m
        return loss | {"stop_gradient": self.stop_gradient.value}

    @property
    def config(self) -> TrainConfig:
        """The short run that trains this very loss."""
        return replace(recipe("minilm-short"), **self.loss)

    @property
    def _modulate(self) -> Modulate:
        if self.positives.value:
            return "both" if self.negatives.value else "positive"
        return "negative" if self.negatives.value else "none"

    def set_to(self, objective: str) -> None:
        """Set the controls to an objective of `PRESETS`, in one redraw."""
        self._setting = True
        for name, value in PRESETS[objective].items():
            getattr(self, name).value = value
        self._setting = False
        self.redraw()

    @plt.rc_context(plots.STYLE)
    def _draw_background(self) -> None:
        figure = Figure(figsize=(13, 4.2), dpi=90, layout="constrained")
        logit, slope, share = figure.subplots(1, 3)
        self._canvas = FigureCanvasAgg(figure)
        # Wide and pale below, narrow and full above: both show where they coincide, and in grey.
        reference = {"color": plots.COLOURS["info_nce"], "alpha": 0.45}
        chosen = {"color": plots.COLOURS["focal_info_nce"]}
        self._lines = {}
        for axes, column in ((logit, "logit"), (slope, "slope")):
            (plain,) = axes.plot([], [], lw=6, label="InfoNCE", animated=True, **reference)
            (negative,) = axes.plot(
                [], [], lw=2.5, label="chosen loss, a negative", animated=True, **chosen
            )
            (positive,) = axes.plot(
                [], [], lw=2, ls="--", label="chosen loss, a positive", animated=True, **chosen
            )
            self._lines[column] = plain, positive, negative
            axes.set(xlabel="similarity s", xlim=(-1, 1), xticks=(-1, -0.5, 0, 0.5, 1))
            axes.axhline(0, color="black", lw=0.8)
        self._bars = [
            share.bar(np.arange(1, 11) + side, np.zeros(10), 0.4, animated=True, **style)
            for side, style in ((-0.2, reference), (0.2, chosen))
        ]
        self._rest = slope.axvline(
            0, color="black", lw=1.5, ls=":", animated=True, label="resting point of a negative"
        )
        logit.set(ylabel="logit", ylim=(-25, 30))
        slope.set(ylabel="slope, d logit / d s", ylim=(-50, 60))
        share.set(
            xlabel="decile of similarity (10 = hardest)",
            ylabel="share of the pull on negatives [%]",
            xticks=range(1, 11),
            ylim=(0, 100),
        )
        figure.legend(
            handles=[*self._lines["slope"], self._rest], loc="outside upper left", ncols=4
        )
        self._canvas.draw()
        self._background = self._canvas.copy_from_bbox(figure.bbox)

    def redraw(self) -> None:
        """Bring all views in line with the controls."""
        if self._setting:
            return
        started = time.perf_counter()
        loss = self.loss
        reference = {"objective": "info_nce", "temperature": loss["temperature"]}
        self.m.disabled = not self.negatives.value
        self.stop_gradient.disabled = self._modulate == "none"
        self.alpha.disabled = not self.stop_gradient.disabled
        of_batch = loss | {"teacher": self._teacher}
        shares = [analysis.decile_shares(self.sim, **each) for each in (reference, of_batch)]
        rest = analysis.resting_point(**loss)
        self._draw(analysis.curve(101, **reference), analysis.curve(101, **loss), shares, rest)
        plain, chosen = (batch_loss(self.sim, **each).item() for each in (reference, of_batch))
        name, variant = plots.NAMES[loss["objective"]], plots.NAMES[self.config.key]
        name = variant if name in variant else f"{name} ({variant})"
        self._facts.value = _describe(name, loss, rest, plain, chosen)
        self.table = analysis.candidates(self.sim, self.sentences, self.anchor.value, **of_batch)
        self._candidates.value = _candidates_html(self.table, self.anchor.value)
        self.png = encode(self._canvas)
        self.alt = (
            f"Logit, slope and share of the pull by decile: {name} at temperature "
            f"{loss['temperature']:g} beside InfoNCE. The hardest tenth of the negatives gets "
            f"{100 * shares[1][-1]:.0f} % of the pull, under InfoNCE {100 * shares[0][-1]:.0f} %."
        )
        self._picture.value = plots.image(self.png, self.alt)
        self.seconds = time.perf_counter() - started

    def _draw(
        self,
        reference: pd.DataFrame,
        chosen: pd.DataFrame,
        shares: Sequence[np.ndarray],
        rest: float | None,
    ) -> None:
        self._canvas.restore_region(self._background)
        for column, (plain, positive, negative) in self._lines.items():
            plain.set_data(reference["similarity"], reference[column])
            positive.set_data(chosen["similarity"], chosen[f"positive_{column}"])
            negative.set_data(chosen["similarity"], chosen[column])
            for line in (plain, positive, negative):
                line.axes.draw_artist(line)
        for bars, share in zip(self._bars, shares, strict=True):
            for bar, height in zip(bars, share, strict=True):
                bar.set_height(100 * height)
                bar.axes.draw_artist(bar)
        if rest is not None:
            self._rest.set_xdata([rest, rest])
            self._rest.axes.draw_artist(self._rest)


def _describe(
    name: str, loss: dict[str, Any], rest: float | None, plain: float, chosen: float
) -> str:
    """The loss in words and formulas, its value and its resting point, as HTML."""
    arguments = analysis.logit_arguments(**loss)
    modulate, alpha = arguments["modulate"], arguments["alpha"]
    factor = "sg(<i>s</i>)" if loss.get("stop_gradient") else "<i>s</i>"
    positive, negative = "<i>s</i>/<i>τ</i>", "<i>s</i>/<i>τ</i>"
    if modulate in ("both", "positive"):
        positive = f"<i>s</i> · {factor}/<i>τ</i>"
    if modulate in ("both", "negative"):
        negative = f"<i>s</i> · ({factor} + <i>m</i>)/<i>τ</i>"
    if alpha:
        negative += " + <i>α</i> · sg(<i>s</i>)"
    point = "none: " + (
        "the negatives are not modulated"
        if modulate in ("none", "positive")
        else "no negative is turned to it"
    )
    if rest is not None:
        formula = "−<i>m</i>" if loss["stop_gradient"] else "−<i>m</i>/2"
        if loss.get("margin"):
            formula = f"cos(arccos({formula}) + margin)"
        point = f"<i>s</i> = {formula} = {rest + 0:.3f}".replace("-", "−")
    return (
        '<div style="max-width: 75em">'
        f"<b>{html.escape(name)}</b>: logit of a positive {positive}, of a negative {negative}; "
        f"<b>resting point</b> {point}<br>"
        f"<b>loss of this batch</b> [nats]: InfoNCE {plain:.4f}, chosen {chosen:.4f}<br>"
        f"{_SYMBOLS}{_MARGIN if loss.get('margin') else ''}"
        f"{_FOCAL_WEIGHT if loss.get('focal_weight') else ''}</div>"
    )


def _candidates_html(table: pd.DataFrame, anchor: int) -> str:
    """The most similar candidates of an anchor, its positive always among them, as HTML."""
    top = table.head(_TOP)
    if anchor not in set(top["candidate"]):
        own = table[table["candidate"] == anchor]
        top = pd.concat([top.head(_TOP - 1), own])
    cell = '<td class="number">'
    rows = []
    for row in top.itertuples():
        kind = "positive" if row.candidate == anchor else "negative"
        weight = "bold" if row.candidate == anchor else "normal"
        rows.append(
            f'<tr style="font-weight: {weight}"><td>{kind}</td>{cell}{row.similarity:.3f}</td>'
            f"{cell}{100 * row.info_nce:.2f}</td>{cell}{100 * row.chosen:.2f}</td>"
            f"<td>{html.escape(row.sentence)}</td></tr>"
        )
    heads = ("kind", "similarity s", "InfoNCE [%]", "chosen loss [%]", "candidate")
    head = "".join(f'<th scope="col">{each}</th>' for each in heads)
    return (
        f"<table><caption>Row softmax of the anchor: probability of its {len(top)} most similar "
        f"candidates of {len(table)}</caption><thead><tr>{head}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table>"
    )
