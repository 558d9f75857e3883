"""Interactive panels over the same functions that the notebooks call."""

import io
import time

import ipywidgets as widgets
import matplotlib.pyplot as plt
import numpy as np
from torch import Tensor

from fcse import analysis, plots
from fcse.losses import focal_info_nce, info_nce

_POINTS = 201


class AblationPanel:
    """Sliders for temperature and m, a choice of modulation; curves and a real batch redraw.

    Three linked views: the logit of a negative over its similarity, the pull on it, and the share
    of a real batch's pull that falls on each decile of similarity. InfoNCE at the same temperature
    stands beside as the reference.

    Attributes:
        widget: what a notebook displays.
        temperature, m, modulate: the controls; setting `.value` redraws.
        seconds: how long the last redraw took.
    """

    def __init__(self, sim: Tensor) -> None:
        """Build the panel.

        Args:
            sim: (N, N) float, a real batch's similarity matrix, positives on the diagonal.
        """
        self.sim = sim
        self.seconds = 0.0
        label = {"style": {"description_width": "7em"}, "layout": {"width": "24em"}}
        self.temperature = widgets.FloatLogSlider(
            0.05, base=10, min=-2, max=0, step=0.05, description="temperature τ", **label
        )
        self.m = widgets.FloatSlider(0.3, min=-0.5, max=1.0, step=0.05, description="m", **label)
        self.modulate = widgets.ToggleButtons(
            options=["both", "positive", "negative", "none"], description="modulate", **label
        )
        self._facts = widgets.HTML()
        self._picture = widgets.Image(format="png", layout={"max_width": "100%"})
        self._draw_once()
        for control in (self.temperature, self.m, self.modulate):
            control.observe(lambda _: self.redraw(), names="value")
        self.redraw()
        controls = widgets.HBox([self.temperature, self.m], layout={"flex_flow": "row wrap"})
        self.widget = widgets.VBox([controls, self.modulate, self._facts, self._picture])

    def _draw_once(self) -> None:
        with plt.rc_context(plots.STYLE | {"figure.dpi": 72}):
            self._figure, (self._logit, self._slope, self._share) = plt.subplots(
                1, 3, figsize=(13, 3.6)
            )
        plt.close(self._figure)
        self._figure.subplots_adjust(left=0.06, right=0.99, bottom=0.17, top=0.9, wspace=0.28)
        self._lines = {}
        for key in ("info_nce", "focal_info_nce"):
            style = {"color": plots.COLOURS[key], "label": plots.NAMES[key], "lw": 2}
            (logit,) = self._logit.plot([], [], **style)
            (slope,) = self._slope.plot([], [], **style)
            shift = -0.2 if key == "info_nce" else 0.2
            bars = self._share.bar(
                np.arange(1, 11) + shift, np.zeros(10), 0.38, **style | {"lw": 0}
            )
            self._lines[key] = (logit, slope, bars)
        self._rest = self._slope.axvline(0, color="black", lw=1, ls=":")
        self._slope.axhline(0, color="black", lw=0.8)
        self._logit.set(xlabel="similarity s of a negative", ylabel="logit", xlim=(-1, 1))
        self._slope.set(
            xlabel="similarity s of a negative", ylabel="slope, d logit / d s", xlim=(-1, 1)
        )
        self._share.set(
            xlabel="decile of similarity (10 = hardest)",
            ylabel="share of the pull [%]",
            xticks=range(1, 11),
            ylim=(0, 100),
        )
        self._logit.legend(loc="upper left")

    def redraw(self) -> None:
        """Bring all views in line with the controls."""
        started = time.perf_counter()
        temperature, m, modulate = self.temperature.value, self.m.value, self.modulate.value
        s = np.linspace(-1, 1, _POINTS)
        modulated = modulate in ("both", "negative")
        deciles = analysis.pull_by_decile(self.sim, temperature, m, modulate)
        for key, (logit, slope, bars) in self._lines.items():
            moved = modulated and key == "focal_info_nce"
            logit.set_data(s, (s * (s + m) if moved else s) / temperature)
            slope.set_data(s, (2 * s + m if moved else np.ones_like(s)) / temperature)
            share = deciles.loc[deciles["objective"] == key, "share"]
            for bar, height in zip(bars, 100 * share, strict=True):
                bar.set_height(height)
        for axes in (self._logit, self._slope):
            axes.relim()
            axes.autoscale_view(scalex=False)
        self._rest.set_xdata([-m / 2, -m / 2])
        self._rest.set_visible(modulated)
        focal = focal_info_nce(self.sim, temperature, m, modulate).item()
        plain = info_nce(self.sim, temperature).item()
        self._facts.value = (
            f"<b>loss of this batch</b> [nats]: InfoNCE {plain:.4f}, modulated {focal:.4f}"
            + (f" &nbsp; <b>resting point</b> s = −m/2 = {-m / 2:.3f}" if modulated else "")
        )
        buffer = io.BytesIO()
        self._figure.savefig(buffer, format="png")
        self._picture.value = buffer.getvalue()
        self.seconds = time.perf_counter() - started

    def _repr_mimebundle_(self, **options: object) -> dict[str, object]:
        return self.widget._repr_mimebundle_(**options)

    @property
    def png(self) -> bytes:
        """The present picture, for readers without a running kernel."""
        return self._picture.value
