"""The plane of alignment and uniformity: a path per run, with its numbers on hover and in words."""

import html

import ipywidgets as widgets
import jscatter
import numpy as np
import pandas as pd

from fcse import plots
from fcse.widgets.pictures import SliderNames, labelled


class TrajectoryPlane:
    """Each run's way through training; lines of equal alignment + weight * uniformity behind it.

    weight: the control: how much uniformity counts in the sum. scatter: the `jscatter.Scatter`."""

    def __init__(self, path: pd.DataFrame) -> None:
        """Build the plane of the table of `study.embedded.trajectories`."""
        self._path = path.reset_index(drop=True)
        names = list(dict.fromkeys(path["name"]))
        colours = {name: plots.style(name).colour for name in names}
        table = self._path.assign(
            loss=pd.Categorical(self._path["name"], names),
            **{"Lee: Spearman × 100": self._path["score"].round(2)},
        )
        # Room around the points, for the lines to be seen.
        self._x, self._y = (_padded(path[column]) for column in ("uniformity", "alignment"))
        area = {"x_scale": self._x, "y_scale": self._y, "height": 460}
        points = {"data": table, "size": 9, "opacity": 1, "opacity_by": None}
        self.scatter = jscatter.Scatter("uniformity", "alignment", **area, **points)
        self.scatter.color(by="loss", map=colours)
        self.scatter.connect(by="loss", order="step", straight=True)
        self.scatter.connection_color(by="loss", map=list(colours.values()))
        self.scatter.connection_opacity(0.7).connection_size(3)
        labels = ["uniformity (lower is better)", "alignment (lower is better)"]
        self.scatter.axes(labels=labels, grid=False).legend(True, size="medium")
        shown = ["color", "step", "Lee: Spearman × 100", "x", "y"]
        self.scatter.tooltip(True, properties=shown, histograms=False, size="medium")
        look = labelled("weight of uniformity w", "12em", "32em")
        self.weight = widgets.FloatSlider(1.0, min=0, max=2, step=0.05, **look)
        self._facts = widgets.HTML()
        self.weight.observe(lambda _: self.redraw(), names="value")
        self.redraw()
        said = widgets.HTML(html.escape(plots.describe_plane(self._path)))
        shown = [self.weight, self._facts, self.scatter.widget, said, SliderNames()]
        self.widget = widgets.VBox(shown)

    def redraw(self) -> None:
        """Bring lines and text in line with the weight."""
        weight = self.weight.value
        corners = [y + weight * x for x in self._x for y in self._y]
        lines = []
        for level in np.linspace(min(corners), max(corners), 12)[1:-1]:
            ends = [(x, level - weight * x) for x in self._x]
            lines.append(jscatter.Line(ends, line_color="#00000033", line_width=1))
        self.scatter.annotations(lines)
        total = self._path["alignment"] + weight * self._path["uniformity"]
        best = self._path.loc[total.idxmin()]
        self._facts.value = (
            f"On a grey line alignment + {weight:.2f} · uniformity is the same. <b>Lowest</b>: "
            f"{total.min():.3f}, {best['name']} after step {best['step']:.0f}."
        )


def _padded(values: pd.Series) -> tuple[float, float]:
    margin = max(0.12 * (values.max() - values.min()), 0.01)
    return float(values.min() - margin), float(values.max() + margin)
