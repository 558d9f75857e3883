"""What a loss does: its curves, and its pull on a batch."""

from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from numpy.typing import ArrayLike

from fcse.plots.style import STYLE, Picture, by, line, new_axes, style


def _label(axis: Axes, column: str) -> None:
    kind = "positive" if "positive" in column else "negative"
    what = "slope, d logit / d s" if "slope" in column else "logit"
    axis.set(xlabel=f"similarity s of a {kind}", ylabel=what)
    axis.axhline(0, color="black", linewidth=0.8)


def _at_0_and_1(curve: pd.DataFrame, column: str = "slope") -> str:
    at = np.interp([0, 1], curve["similarity"], curve[column])
    return f"{at[0]:.3g} to {at[1]:.3g}"


@plt.rc_context(STYLE)
def pull_curves(table: pd.DataFrame, rest: float = -0.15) -> Picture:
    """What one similarity does to its logit, and the slope by which the loss pulls on it.

    table: as of `analysis.curves`. rest: the resting point to mark, -m/2 of Focal-InfoNCE."""
    figure, axes = new_axes(4, width=3.7)
    columns = ("logit", "slope", "positive_logit", "positive_slope")
    for axis, column in zip(axes, columns, strict=True):
        for name, rows in by(table, "name"):
            axis.plot(rows["similarity"], rows[column], **line(name))
        _label(axis, column)
    axes[1].axvline(rest, color="black", linewidth=1, linestyle=":")
    said = f"resting point\n−m/2 = {rest:.2f}"
    axes[1].annotate(said, (rest, 0), (6, -32), textcoords="offset points")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(3, len(labels)))
    slopes = "; ".join(
        f"{name} of a negative {_at_0_and_1(rows)}, "
        f"of a positive {_at_0_and_1(rows, 'positive_slope')}"
        for name, rows in by(table, "name")
    )
    figure.alt = (
        f"Logit and slope over the similarity, a resting point at {rest:g}. "
        f"Slopes from similarity 0 to 1: {slopes}."
    )
    return figure


@plt.rc_context(STYLE)
def curve_families(families: Mapping[str, Mapping[float, pd.DataFrame]]) -> Picture:
    """Logit and slope of a negative while one parameter moves.

    families: parameter name -> its value -> columns "similarity", "logit", "slope"."""
    figure, axes = new_axes(2 * len(families), width=3.7)
    figure.alt = "Logit and slope of a negative over its similarity."
    for i, (name, tables) in enumerate(families.items()):
        pair = axes[2 * i : 2 * i + 2]
        colours = sns.color_palette("viridis", len(tables))
        for axis, column in zip(pair, ("logit", "slope"), strict=True):
            for (value, table), colour in zip(tables.items(), colours, strict=True):
                axis.plot(table["similarity"], table[column], color=colour, label=f"{value:g}")
            _label(axis, column)
        pair[0].legend(title=name)
        slopes = "; ".join(f"{value:g}: {_at_0_and_1(table)}" for value, table in tables.items())
        figure.alt += f" Slope from similarity 0 to 1 for {name} {slopes}."
    return figure


@plt.rc_context(STYLE)
def pull_by_decile(table: pd.DataFrame) -> Picture:
    """Share of the pull on negatives by decile of similarity, as of `analysis.pull_by_decile`."""
    figure, (axes,) = new_axes(width=6)
    losses = by(table, "name")
    for i, (name, rows) in enumerate(losses):
        x = rows["decile"] + 0.38 * (i - (len(losses) - 1) / 2)
        axes.bar(x, 100 * rows["share"], 0.36, color=style(name).colour, label=name)
    axes.set_xticks(range(1, 11))
    what = "decile of similarity among the negatives (10 = hardest)"
    axes.set(xlabel=what, ylabel="share of the pull [%]")
    axes.legend()
    hardest = table[table["decile"] == 10]
    shares = zip(hardest["name"], hardest["share"], strict=True)
    figure.alt = (
        "Share of the pull on negatives by decile of similarity. The hardest tenth gets "
        f"{', '.join(f'{100 * share:.0f} % under {name}' for name, share in shares)}."
    )
    return figure


@plt.rc_context(STYLE)
def similarity_heatmap(matrices: Mapping[str, np.ndarray], label: str) -> Picture:
    """Matrices side by side on one colour scale.

    matrices: title -> (N, N) float; NaN is left blank. label: what a cell holds, with its unit."""
    figure, axes = new_axes(len(matrices), width=4.4, height=4.0)
    low = min(np.nanmin(x) for x in matrices.values())
    high = max(np.nanmax(x) for x in matrices.values())
    scale = {"vmin": low, "vmax": high, "cmap": "cividis", "cbar_kws": {"label": label}}
    figure.alt = f"{label[0].upper()}{label[1:]} of each anchor and candidate."
    for axis, (title, matrix) in zip(axes, matrices.items(), strict=True):
        last = axis is axes[-1]
        sns.heatmap(matrix, ax=axis, square=True, xticklabels=8, yticklabels=8, cbar=last, **scale)
        axis.set(title=title, xlabel="candidate j", ylabel="anchor i")
        axis.grid(visible=False)
        others = matrix[~np.eye(len(matrix), dtype=bool)]
        blank = np.isnan(matrix).sum()
        figure.alt += (
            f" {title[0].upper()}{title[1:]}: mean {matrix.diagonal().mean():.2g} on the diagonal, "
            f"elsewhere {np.nanmean(others):.2g}, at most {np.nanmax(others):.2g}"
            f"{f', {blank} cells left blank' if blank else ''}."
        )
    return figure


@plt.rc_context(STYLE)
def joined(
    loss: str,
    plain: Mapping[str, ArrayLike],
    new: Mapping[str, ArrayLike],
    xlabel: str = "cosine similarity",
) -> Picture:
    """Densities of the similarities in a batch, and of those that another loss makes of it.

    plain, new: name -> (n,) float, at most two of each; the loss of that name colours `new`."""
    figure, (axes,) = new_axes(width=7.5)
    figure.alt = f"{loss}: density of the {xlabel}."
    for groups, colour in ((plain, "0.35"), (new, style(loss).colour)):
        for (name, values), dash in zip(groups.items(), ("-", ":"), strict=False):
            x = np.asarray(values)
            sns.kdeplot(x, ax=axes, color=colour, linestyle=dash, label=name, cut=0)
            figure.alt += f" {name}: mean {x.mean():.2f}, from {x.min():.2f} to {x.max():.2f}."
    axes.set(xlabel=xlabel, ylabel="density", title=loss)
    figure.legend(loc="outside lower center", ncols=4)
    return figure


@plt.rc_context(STYLE)
def against(loss: str, x: ArrayLike, y: ArrayLike, xlabel: str, ylabel: str) -> Picture:
    """One point a pair or a row of a batch, under the loss of that name.

    x, y: (n,) float each; their labels say what they are, with units."""
    figure, (axes,) = new_axes(width=7.5)
    x, y = np.asarray(x), np.asarray(y)
    axes.scatter(x, y, s=14, alpha=0.6, lw=0, color=style(loss).colour, rasterized=True)
    axes.set(xlabel=xlabel, ylabel=ylabel, title=loss)
    figure.alt = (
        f"{loss}: {ylabel} over {xlabel}, {len(x)} points. Their rank correlation is "
        f"{pd.Series(x).corr(pd.Series(y), method='spearman'):+.2f}."
    )
    return figure
