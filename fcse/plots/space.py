"""What training did to a space: the plane, densities of similarities, maps."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.lines import Line2D

from fcse.plots.style import STYLE, Picture, by, ends, line, new_axes, point, style


def describe_plane(table: pd.DataFrame) -> str:
    """What `plane` shows, in words."""
    return "Uniformity across, alignment up, lower is better for both. " + " ".join(
        f"{name}: uniformity from {ends(rows['uniformity'], '.2f')}, alignment from "
        f"{ends(rows['alignment'], '.2f')} over {rows['step'].iloc[-1]:.0f} steps."
        for name, rows in by(table, "name")
    )


@plt.rc_context(STYLE)
def plane(table: pd.DataFrame) -> Picture:
    """Alignment against uniformity: a path per run, from an open marker to a filled one.

    Grey lines join points of equal alignment + uniformity, the sum that Wang & Isola 2020 minimise.

    table: columns "name" of the loss, "step", "alignment", "uniformity"."""
    figure, (axes,) = new_axes(width=6, height=4.2)
    for name, rows in by(table, "name"):
        x, y = rows["uniformity"], rows["alignment"]
        axes.plot(x, y, marker=".", **line(name))
        drawn = {"markersize": 9} | point(name)
        axes.plot(x.iloc[0], y.iloc[0], markerfacecolor="white", **drawn)
        axes.plot(x.iloc[-1], y.iloc[-1], **drawn)
    axes.margins(0.12)
    axes.autoscale_view()
    x, y = np.meshgrid(*(np.linspace(*ends, 50) for ends in (axes.get_xlim(), axes.get_ylim())))
    contours = axes.contour(x, y, x + y, levels=6, colors="0.75", linewidths=1, zorder=0)
    contours.set_linestyle("solid")
    axes.clabel(contours, fmt="%.2f", fontsize=8, colors="0.45")
    axes.set(
        xlabel="uniformity, log E exp(−2‖x−y‖²) (lower is better)",
        ylabel="alignment, E‖x−y‖² (lower is better)",
    )
    lines, names = axes.get_legend_handles_labels()
    lines.append(Line2D([], [], color="0.75", lw=1))
    axes.legend(lines, [*names, "equal alignment + uniformity"], frameon=True, edgecolor="none")
    figure.alt = describe_plane(table)
    return figure


@plt.rc_context(STYLE)
def lines(table: pd.DataFrame, x: str, panels: Mapping[str, str], xlabel: str) -> Picture:
    """Several measures against one number, a panel each, a line a run.

    table: columns "name" (of a loss, or of what was done to it), x, and those of the panels.
    panels: column -> what it is, with its unit."""
    figure, axes = new_axes(len(panels), width=8.5 / len(panels) + 1.0)
    figure.alt = f"Against the {xlabel}."
    for axis, (column, label) in zip(axes, panels.items(), strict=True):
        figure.alt += f" {label[0].upper()}{label[1:]}:"
        for name, rows in by(table.dropna(subset=column), "name"):
            look = line(name) | ({} if axis is axes[0] else {"label": None})
            axis.plot(rows[x], rows[column], marker=style(name).marker, **look)
            figure.alt += f" {name} from {ends(rows[column], '.3g')},"
        axis.set(xlabel=xlabel, ylabel=label)
        figure.alt = figure.alt.rstrip(",") + "."
    figure.legend(loc="outside lower center", ncols=4)
    return figure


@plt.rc_context(STYLE)
def similarity_distribution(table: pd.DataFrame) -> Picture:
    """Density of cosine similarities, one curve per encoder, one panel per kind of pair.

    table: columns "encoder" (untrained, or the name of a loss), "kind", "similarity"."""
    kinds = by(table, "kind")
    figure, axes = new_axes(len(kinds))
    figure.alt = "Density of cosine similarities; medians."
    for axis, (kind, rows) in zip(axes, kinds, strict=True):
        medians = []
        for encoder, part in by(rows, "encoder"):
            sns.kdeplot(part["similarity"], ax=axis, clip=(-1, 1), **line(encoder))
            medians.append(f"{encoder} {part['similarity'].median():.2f}")
        axis.set(title=kind, xlabel="cosine similarity", ylabel="density", xlim=(-0.5, 1))
        figure.alt += f" {kind[0].upper()}{kind[1:]}: {', '.join(medians)}."
    axes[0].legend()
    return figure


OTHERS = "other articles"


def group_colours(groups: Sequence[str]) -> dict[str, str]:
    """A colour for each of at most eight groups, and grey for `OTHERS`, which comes first."""
    colours = sns.color_palette("colorblind", 10).as_hex()
    del colours[7]  # its own grey
    return {OTHERS: "#C8C8C8"} | dict(zip(groups, colours[:8], strict=False))


def describe_maps(table: pd.DataFrame, groups: Sequence[str]) -> str:
    """What `maps` shows, in words: how closely each group keeps together on each map."""
    said = (
        f"Maps of the same {len(table) // table['encoder'].nunique()} sentences, a point each. "
        "How widely each coloured group is spread, as a part of the spread of all:"
    )
    for title, rows in by(table, "encoder"):
        coloured = by(rows[rows["group"].isin(groups)], "group")
        near = [f"{group} {_spread(part) / _spread(rows):.2f}" for group, part in coloured]
        said += f" {title}: {', '.join(near)}."
    return said


def _spread(points: pd.DataFrame) -> float:
    return float(np.sqrt(points[["x", "y"]].var(ddof=0).sum()))


@plt.rc_context(STYLE)
def maps(table: pd.DataFrame, groups: Sequence[str]) -> Picture:
    """Two-dimensional maps of the same sentences, one panel per encoder, coloured by group.

    table: columns "encoder" (a title), "x", "y", "group". groups: at most eight, in the order of
    the legend; all others are small and grey."""
    encoders = by(table, "encoder")
    figure, axes = new_axes(len(encoders), width=4.0, height=4.2)
    colours = group_colours(groups)
    for axis, (title, rows) in zip(axes, encoders, strict=True):
        others = rows[~rows["group"].isin(groups)]
        if len(others):
            axis.scatter(others["x"], others["y"], s=2, color=colours[OTHERS], label=OTHERS, lw=0)
        for group, shape in zip(groups, "osD^vPX*", strict=False):
            part = rows[rows["group"] == group]
            drawn = {"color": colours[group], "marker": shape, "label": group}
            axis.scatter(part["x"], part["y"], s=9, lw=0, **drawn)
        axis.set(title=title, xlabel="UMAP 1", xticks=[], yticks=[])
    axes[0].set_ylabel("UMAP 2")
    look = {"ncols": min(4, len(groups)), "markerscale": 2.5}
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", **look)
    figure.alt = describe_maps(table, groups)
    return figure
