"""The loss under your hands: sliders, and what they do to the curves and to a real batch."""

import io
import time

import ipywidgets as widgets
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image
from torch import Tensor

from fcse import analysis, plots
from fcse.losses import focal_info_nce, info_nce


class AblationPanel:
    """Sliders for temperature and m, a choice of modulation; curves and a real batch redraw.

    Three linked views: the logit of a negative over its similarity, its slope (the strength of
    the pull), and the share of a real batch's pull that falls on each decile of similarity.
    InfoNCE at the same temperature stands beside as the reference. The axes stay where they are,
    so that a steeper curve looks steeper, and a redraw is cheap: only what moves is drawn.

    Attributes:
        widget: what a notebook displays.
        temperature, m, modulate: the controls; setting `.value` redraws.
        png: the present picture, for readers without a running kernel.
        seconds: how long the last redraw took.
    """

    def __init__(self, sim: Tensor) -> None:
        """Build the panel.

        Args:
            sim: (N, N) float, a real batch's similarity matrix, positives on the diagonal.
        """
        self.sim = sim
        label = {"style": {"description_width": "9em"}, "layout": {"width": "26em"}}
        self.temperature = widgets.FloatSlider(
            0.05, min=0.01, max=0.5, step=0.01, description="temperature τ", **label
        )
        self.m = widgets.FloatSlider(0.3, min=-0.5, max=1.0, step=0.05, description="m", **label)
        self.modulate = widgets.ToggleButtons(
            options=["both", "positive", "negative", "none"],
            description="modulate",
            style={"description_width": "9em", "button_width": "6em"},
        )
        self._facts = widgets.HTML()
        self._picture = widgets.Image(format="png", layout={"max_width": "100%"})
        self._draw_background()
        for control in (self.temperature, self.m, self.modulate):
            control.observe(lambda _: self.redraw(), names="value")
        self.redraw()
        sliders = widgets.HBox([self.temperature, self.m], layout={"flex_flow": "row wrap"})
        self.widget = widgets.VBox([sliders, self.modulate, self._facts, self._picture])

    @property
    def png(self) -> bytes:
        """The present picture, for readers without a running kernel."""
        return bytes(self._picture.value)

    def _draw_background(self) -> None:
        with plt.rc_context(plots.STYLE | {"figure.dpi": 80}):
            figure, (logit, slope, share) = plt.subplots(
                1, 3, figsize=(13, 3.8), layout="constrained"
            )
        plt.close(figure)
        self._canvas = FigureCanvasAgg(figure)
        self._curves = {}
        for key, side in (("info_nce", -0.2), ("focal_info_nce", 0.2)):
            line = {"color": plots.COLOURS[key], "lw": 2.5, "animated": True}
            line["label"] = "InfoNCE" if key == "info_nce" else "with the modulation chosen"
            (of_logit,) = logit.plot([], [], **line)
            (of_slope,) = slope.plot([], [], **line)
            bars = share.bar(
                np.arange(1, 11) + side, np.zeros(10), 0.38, color=line["color"], animated=True
            )
            self._curves[key] = of_logit, of_slope, bars
        self._rest = slope.axvline(0, color="black", lw=1.2, ls=":", animated=True)
        slope.axhline(0, color="black", lw=0.8)
        logit.set(xlabel="similarity s of a negative", ylabel="logit", ylim=(-25, 30))
        slope.set(xlabel="similarity s of a negative", ylabel="slope d logit / d s", ylim=(-50, 60))
        for axes in (logit, slope):
            axes.set(xlim=(-1, 1), xticks=(-1, -0.5, 0, 0.5, 1))
        share.set(
            xlabel="decile of similarity (10 = hardest)",
            ylabel="share of the pull [%]",
            xticks=range(1, 11),
            ylim=(0, 100),
        )
        logit.legend(loc="upper left")
        self._canvas.draw()
        self._background = self._canvas.copy_from_bbox(figure.bbox)

    def redraw(self) -> None:
        """Bring all views in line with the controls."""
        started = time.perf_counter()
        temperature, m, modulate = self.temperature.value, self.m.value, self.modulate.value
        negatives = modulate in ("both", "negative")
        s = np.linspace(-1, 1, 201)
        shares = {
            "info_nce": analysis.decile_shares(
                self.sim, objective="info_nce", temperature=temperature
            ),
            "focal_info_nce": analysis.decile_shares(
                self.sim, temperature=temperature, m=m, modulate=modulate
            ),
        }
        self._canvas.restore_region(self._background)
        for key, (of_logit, of_slope, bars) in self._curves.items():
            modulated = negatives and key == "focal_info_nce"
            of_logit.set_data(s, (s * (s + m) if modulated else s) / temperature)
            of_slope.set_data(s, (2 * s + m if modulated else np.ones_like(s)) / temperature)
            for bar, share in zip(bars, shares[key], strict=True):
                bar.set_height(100 * share)
            for artist in (of_logit, of_slope, *bars):
                artist.axes.draw_artist(artist)
        if negatives:
            self._rest.set_xdata([-m / 2, -m / 2])
            self._rest.axes.draw_artist(self._rest)
        self._picture.value = self._encode()
        plain = info_nce(self.sim, temperature).item()
        chosen = focal_info_nce(self.sim, temperature, m, modulate).item()
        rest = f"; <b>resting point</b> s = −m/2 = {-m / 2:.3f}" if negatives else ""
        self._facts.value = (
            f"<b>loss of this batch</b> [nats]: InfoNCE {plain:.4f}, modulated {chosen:.4f}{rest}"
        )
        self.seconds = time.perf_counter() - started

    def _encode(self) -> bytes:
        buffer = io.BytesIO()
        picture = Image.fromarray(np.asarray(self._canvas.buffer_rgba())).convert("RGB")
        picture.save(buffer, "png", compress_level=1)
        return buffer.getvalue()
