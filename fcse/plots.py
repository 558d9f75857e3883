"""One function a figure: numbers in, Picture out; an objective has the same colour everywhere."""

import base64
import html
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import ArrayLike

from fcse.errors import writing


class _Styles(dict[str, str]):
    """What is not in it is several losses at once, joined by "+"."""

    def __init__(self, several: Any, **known: Any) -> None:
        super().__init__(known)
        self.several = several

    def __missing__(self, key: str) -> Any:
        return self.several(self, key) if callable(self.several) else self.several


# Okabe & Ito's palette, and Tol's muted one for the neighbours: distinct for every common kind of
# colour blindness.
COLOURS = _Styles(
    "#000000",
    untrained="#7F7F7F",
    encoder="#000000",
    info_nce="#0072B2",
    focal_info_nce="#D55E00",
    positive="#009E73",
    negative="#CC79A7",
    stop_gradient="#56B4E9",
    hardness_info_nce="#E69F00",
    sscl="#332288",
    cards="#117733",
    diffcse="#882255",
    adap_acse="#999933",
    ifnd="#AA4499",
    core_tuning="#661100",
)
NAMES = _Styles(
    lambda names, key: " + ".join(names[part] for part in key.split("+")),
    untrained="untrained",
    encoder="chosen encoder",
    info_nce="InfoNCE",
    focal_info_nce="Focal-InfoNCE",
    positive="positives only",
    negative="negatives only",
    stop_gradient="stop-gradient",
    hardness_info_nce="hardness-weighted",
    sscl="SSCL",
    cards="CARDS",
    diffcse="DiffCSE",
    adap_acse="AdapACSE",
    ifnd="IFND",
    core_tuning="Core-tuning",
)
# Marker and dash repeat what the colour says, for print in grey.
_MARKERS = _Styles(
    "H",
    untrained="s",
    encoder="*",
    info_nce="o",
    focal_info_nce="D",
    positive="^",
    negative="v",
    stop_gradient="P",
    hardness_info_nce="X",
    sscl="<",
    cards=">",
    diffcse="p",
    adap_acse="d",
    ifnd="h",
    core_tuning="8",
)
_DASHES = _Styles(
    (0, (6, 2)),
    untrained=":",
    encoder=":",
    info_nce="--",
    focal_info_nce="-",
    positive="-.",
    negative="-.",
    stop_gradient=(0, (5, 1, 1, 1, 1, 1)),
    hardness_info_nce=(0, (1, 1)),
)

STYLE = {
    "figure.dpi": 110,
    "savefig.dpi": 160,
    "savefig.bbox": "tight",
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "svg.hashsalt": "fcse",
}


class Picture(Figure):
    """A figure that says in words what it shows, in a notebook too.

    Attributes:
        alt: the text alternative.
    """

    alt = ""

    @plt.rc_context(STYLE)
    def _ipython_display_(self) -> None:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi="figure")
        show(buffer.getvalue(), self.alt)


def show(png: bytes, alt: str) -> None:
    """Display a PNG with its text alternative in a notebook.

    JupyterLab's own element for a PNG takes no text alternative, so HTML goes with it; the PNG as
    such is for converters to print.
    """
    from IPython.display import display

    data = {"text/plain": "<Picture>", "text/html": image(png, alt)}
    data["image/png"] = base64.b64encode(png).decode()
    display(data, metadata={"image/png": {"alt": alt}}, raw=True)


def image(png: bytes, alt: str) -> str:
    """An HTML image that holds its own bytes and says in words what it shows."""
    data = base64.b64encode(png).decode()
    return (
        f'<img style="max-width: 100%; height: auto" alt="{html.escape(alt)}" '
        f'src="data:image/png;base64,{data}">'
    )


def _by(table: pd.DataFrame, column: str) -> Iterable[tuple[Any, pd.DataFrame]]:
    return table.groupby(column, sort=False)


def _ends(values: pd.Series, form: str) -> str:
    return f"{values.iloc[0]:{form}} to {values.iloc[-1]:{form}}"


def _at_0_and_1(curve: pd.DataFrame, column: str) -> str:
    at = np.interp([0, 1], curve["similarity"], curve[column])
    return f"{at[0]:.3g} to {at[1]:.3g}"


def _axes(columns: int = 1, width: float = 5.0, height: float = 3.6) -> tuple[Picture, list[Axes]]:
    figure, axes = plt.subplots(
        1,
        columns,
        figsize=(width * columns, height),
        layout="constrained",
        squeeze=False,
        FigureClass=Picture,
    )
    plt.close(figure)  # shown once, where it is returned, not a second time by the notebook
    return figure, list(axes[0])


def _line(key: str) -> dict[str, Any]:
    return {"color": COLOURS[key], "label": NAMES[key], "linestyle": _DASHES[key]}


def named(contestant: str) -> str:
    """What figures and tables call a contestant: a key of `NAMES`, " tuned" behind it or not."""
    key, _, rest = contestant.partition(" ")
    return f"{NAMES[key]}, {rest}" if rest else NAMES[key]


def make_folder(folder: Path) -> None:
    """Make the folder that figures go to.

    Raises:
        InputError: it cannot be made.
    """
    with writing(f"figures folder {folder}"):
        folder.mkdir(parents=True, exist_ok=True)


@plt.rc_context(STYLE)
def save(figure: Picture, table: pd.DataFrame, path: Path) -> None:
    """Write a figure as PNG and SVG, and the numbers behind it as CSV, under one name.

    Both pictures carry the text alternative: PNG as its description, SVG as its title, which a
    browser reads out.

    Args:
        figure: what to write.
        table: the numbers, written with six significant digits.
        path: folder and name without suffix.

    Raises:
        InputError: they cannot be written.
    """
    make_folder(path.parent)
    with writing(f"figure {path}"):
        figure.savefig(path.with_suffix(".png"), metadata={"Description": figure.alt})
        figure.savefig(path.with_suffix(".svg"), metadata={"Date": None, "Title": figure.alt})
        table.to_csv(path.with_suffix(".csv"), index=False, float_format="%.6g")


@plt.rc_context(STYLE)
def scores(table: pd.DataFrame) -> Picture:
    """Score of each encoder on each judged task.

    Args:
        table: columns "encoder" (a key of `NAMES`), "task", "score" (100 x Spearman).
    """
    tasks = list(dict.fromkeys(table["task"]))
    figure, axes = _axes(len(tasks), width=max(3.4, 0.9 * table["encoder"].nunique()))
    for axis, task in zip(axes, tasks, strict=True):
        rows = table[table["task"] == task]
        for x, (encoder, score) in enumerate(zip(rows["encoder"], rows["score"], strict=True)):
            axis.plot(x, score, _MARKERS[encoder], color=COLOURS[encoder], markersize=10)
            axis.annotate(
                f"{score:.1f}", (x, score), (0, 9), textcoords="offset points", ha="center"
            )
        axis.set_xticks(
            range(len(rows)), [NAMES[key] for key in rows["encoder"]], rotation=20, ha="right"
        )
        axis.set(title=task, ylabel="Spearman × 100")
        axis.margins(x=0.25, y=0.25)
    figure.alt = "Spearman × 100 with human judgements. " + " ".join(
        f"{task}: "
        + ", ".join(f"{NAMES[row.encoder]} {row.score:.1f}" for row in rows.itertuples())
        + "."
        for task, rows in _by(table, "task")
    )
    return figure


@plt.rc_context(STYLE)
def over_seeds(scores: pd.DataFrame, summary: pd.DataFrame) -> Picture:
    """Every seed's score as a point, the mean of each objective with its interval beside.

    Args:
        scores: columns "task", "objective" (a key of `NAMES`), "seed", "score" (100 x Spearman).
        summary: columns "task", "objective", "mean", "low", "high" (NaN draws no bar).
    """
    tasks = list(dict.fromkeys(scores["task"]))
    objectives = list(dict.fromkeys(scores["objective"]))
    figure, axes = _axes(len(tasks), width=max(3.6, 1.3 * len(objectives)))
    for axis, task in zip(axes, tasks, strict=True):
        rows, means = (table[table["task"] == task] for table in (scores, summary))
        by_seed = rows.pivot_table(index="seed", columns="objective", values="score")
        axis.plot(by_seed.reindex(columns=objectives).T.to_numpy(), color="0.8", lw=0.8, zorder=1)
        for x, objective in enumerate(objectives):
            style = {"color": COLOURS[objective], "marker": _MARKERS[objective]}
            points = rows.loc[rows["objective"] == objective, "score"]
            axis.scatter([x] * len(points), points, s=28, alpha=0.6, lw=0, **style)
            for mean in means[means["objective"] == objective].itertuples():
                bar = [[mean.mean - mean.low], [mean.high - mean.mean]]
                bar = None if np.isnan(bar).any() else bar
                axis.errorbar(x + 0.2, mean.mean, bar, markersize=9, capsize=4, **style)
        axis.set_xticks(range(len(objectives)), [NAMES[key] for key in objectives])
        axis.set_xlim(-0.5, len(objectives) - 0.3)
        axis.set(title=task, ylabel="Spearman × 100")
    figure.suptitle("small: one seed (lines join equal seeds); large: mean, 95 % interval", size=10)
    said = []
    for (task, objective), rows in scores.groupby(["task", "objective"], sort=False):
        points = rows["score"]
        span = f"{points.min():.1f} to {points.max():.1f} over {len(points)} seeds"
        said.append(f"{task}, {NAMES[objective]}: {span}, mean {points.mean():.1f}.")
    figure.alt = "Spearman × 100 of every seed, the mean and its interval. " + " ".join(said)
    return figure


@plt.rc_context(STYLE)
def beside_published(points: pd.DataFrame, noise: Mapping[str, Mapping[str, float]]) -> Picture:
    """Published averages and runs beside the spread that 50 seeds of SimCSE have.

    Args:
        points: columns "backbone", "objective" (a key of `NAMES`), "source" ("published" or a
            run), "avg" (100 x Spearman, mean of the seven STS tasks).
        noise: backbone -> "mean", "sd", "min", "max" of the seeds.
    """
    backbones = list(dict.fromkeys(points["backbone"]))
    figure, (axes,) = _axes(width=8, height=1.2 + 0.6 * len(backbones))
    for y, backbone in enumerate(backbones):
        if backbone in noise:
            seeds = noise[backbone]
            axes.plot([seeds["min"], seeds["max"]], [y, y], color="0.6", lw=1.5, zorder=1)
            span = [seeds["mean"] - seeds["sd"], seeds["mean"] + seeds["sd"]]
            axes.plot(span, [y, y], color="0.75", lw=9, solid_capstyle="butt", zorder=1)
            axes.plot(seeds["mean"], y, "|", color="black", markersize=12, zorder=2)
        for row in points[points["backbone"] == backbone].itertuples():
            published = row.source == "published"
            axes.plot(
                row.avg,
                y if published else y + 0.22,
                _MARKERS[row.objective],
                color=COLOURS[row.objective],
                markerfacecolor=COLOURS[row.objective] if published else "white",
                markersize=9 if published else 7,
            )
    axes.set_yticks(range(len(backbones)), backbones)
    axes.set(
        xlabel="mean Spearman × 100 over the seven STS tasks",
        ylabel="backbone",
        ylim=(len(backbones) - 0.4, -0.6),
    )
    keys = list(dict.fromkeys(points["objective"]))
    handles = [
        Line2D([], [], ls="", marker=_MARKERS[k], color=COLOURS[k], label=f"{NAMES[k]}, published")
        for k in keys
    ]
    handles.append(Line2D([], [], color="0.75", lw=9, label="InfoNCE, 50 seeds: mean ± sd"))
    handles.append(Line2D([], [], color="0.6", lw=1.5, label="their range"))
    if (points["source"] != "published").any():
        handles.append(
            Line2D([], [], ls="", marker="o", color="black", mfc="white", label="a run (open)")
        )
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=9)
    figure.alt = "Mean Spearman × 100 over the seven STS tasks, a row a backbone. " + " ".join(
        f"{backbone}: "
        + ", ".join(
            f"{NAMES[row.objective]} {row.avg:.1f} ({row.source})" for row in rows.itertuples()
        )
        + (
            "; 50 seeds of InfoNCE: {mean:.1f} ± {sd:.1f}, {min:.1f} to {max:.1f}.".format(
                **noise[backbone]
            )
            if backbone in noise
            else "."
        )
        for backbone, rows in _by(points, "backbone")
    )
    return figure


@plt.rc_context(STYLE)
def training(losses: pd.DataFrame, evaluations: pd.DataFrame) -> Picture:
    """Loss and score over the steps of each run.

    Args:
        losses: columns "run" (a key of `NAMES`), "step", "loss".
        evaluations: columns "run", "step", "lee" (100 x Spearman).
    """
    figure, (left, right) = _axes(2)
    for run, rows in losses.groupby("run", sort=False):
        left.plot(rows["step"], rows["loss"], **_line(run))
    left.set(xlabel="step", ylabel="loss [nats]", yscale="log")
    for run, rows in evaluations.groupby("run", sort=False):
        right.plot(rows["step"], rows["lee"], marker=_MARKERS[run], **_line(run))
    right.set(xlabel="step", ylabel="Lee: Spearman × 100")
    left.legend()
    figure.alt = "Loss (left) and Spearman × 100 on Lee's documents (right) over the steps. " + (
        " ".join(
            f"{NAMES[run]}: loss from {_ends(rows['loss'], '.2g')} over {len(rows)} steps."
            for run, rows in _by(losses, "run")
        )
        + " "
        + " ".join(
            f"{NAMES[run]}: Lee from {_ends(rows['lee'], '.1f')}."
            for run, rows in _by(evaluations, "run")
        )
    )
    return figure


@plt.rc_context(STYLE)
def pull_curves(table: pd.DataFrame, temperature: float, m: float) -> Picture:
    """What one similarity does to its logit, and the slope by which the loss pulls on it.

    Args:
        table: what `analysis.curves` returns.
        temperature, m: named in the title; s = -m/2 is marked.
    """
    figure, axes = _axes(4, width=3.7)
    columns = ("logit", "slope", "positive_logit", "positive_slope")
    for objective, rows in table.groupby("objective", sort=False):
        for axis, column in zip(axes, columns, strict=True):
            axis.plot(rows["similarity"], rows[column], **_line(objective))
    for axis, column in zip(axes, columns, strict=True):
        kind = "positive" if "positive" in column else "negative"
        what = "slope, d logit / d s" if "slope" in column else "logit"
        axis.set(xlabel=f"similarity s of a {kind}", ylabel=what)
        axis.axhline(0, color="black", linewidth=0.8)
    axes[1].axvline(-m / 2, color="black", linewidth=1, linestyle=":")
    axes[1].annotate(
        f"resting point\n−m/2 = {-m / 2:.2f}", (-m / 2, 0), (6, -32), textcoords="offset points"
    )
    figure.suptitle(f"temperature {temperature:g}, m {m:g}")
    figure.legend(
        *axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(NAMES)
    )
    figure.alt = (
        f"Logit and slope over the similarity at temperature {temperature:g} and m {m:g}. Slopes "
        "from similarity 0 to 1: "
        + "; ".join(
            f"{NAMES[objective]} of a negative {_at_0_and_1(rows, 'slope')}, of a positive "
            f"{_at_0_and_1(rows, 'positive_slope')}"
            for objective, rows in _by(table, "objective")
        )
        + "."
    )
    return figure


@plt.rc_context(STYLE)
def curve_families(families: Mapping[str, Mapping[float, pd.DataFrame]]) -> Picture:
    """Logit and slope of a negative while one parameter moves.

    Args:
        families: parameter name -> value of the parameter -> columns "similarity", "logit",
            "slope".
    """
    figure, axes = _axes(2 * len(families), width=3.7)
    for i, (name, tables) in enumerate(families.items()):
        pair = axes[2 * i : 2 * i + 2]
        colours = sns.color_palette("viridis", len(tables))
        for (value, table), colour in zip(tables.items(), colours, strict=True):
            for axis, column in zip(pair, ("logit", "slope"), strict=True):
                axis.plot(table["similarity"], table[column], color=colour, label=f"{value:g}")
        for axis, what in zip(pair, ("logit", "slope, d logit / d s"), strict=True):
            axis.set(xlabel="similarity s of a negative", ylabel=what)
            axis.axhline(0, color="black", linewidth=0.8)
        pair[0].legend(title=name)
    figure.alt = "Logit and slope of a negative over its similarity. " + " ".join(
        f"Slope from similarity 0 to 1 for {name} "
        + "; ".join(f"{value:g}: {_at_0_and_1(table, 'slope')}" for value, table in tables.items())
        + "."
        for name, tables in families.items()
    )
    return figure


@plt.rc_context(STYLE)
def pull_by_decile(table: pd.DataFrame) -> Picture:
    """Share of the pull on negatives that falls on each decile of similarity.

    Args:
        table: columns "objective", "decile" (1 = least similar tenth, 10 = hardest), "share"
            (of the absolute pull on all negatives, 0 to 1).
    """
    figure, (axes,) = _axes(width=6)
    objectives = list(dict.fromkeys(table["objective"]))
    for i, objective in enumerate(objectives):
        rows = table[table["objective"] == objective]
        x = rows["decile"] + 0.38 * (i - (len(objectives) - 1) / 2)
        axes.bar(x, 100 * rows["share"], 0.36, color=COLOURS[objective], label=NAMES[objective])
    axes.set_xticks(range(1, 11))
    axes.set(
        xlabel="decile of similarity among the negatives (10 = hardest)",
        ylabel="share of the pull [%]",
    )
    axes.legend()
    figure.alt = (
        "Share of the pull on negatives by decile of similarity. The hardest tenth gets "
        + ", ".join(
            f"{100 * rows.set_index('decile')['share'][10]:.0f} % under {NAMES[objective]}"
            for objective, rows in _by(table, "objective")
        )
        + "."
    )
    return figure


def describe_plane(table: pd.DataFrame) -> str:
    """What `plane` shows, in words."""
    return "Uniformity across, alignment up, lower is better for both. " + " ".join(
        f"{NAMES[run]}: uniformity from {_ends(rows['uniformity'], '.2f')}, alignment from "
        f"{_ends(rows['alignment'], '.2f')} over {rows['step'].iloc[-1]:.0f} steps."
        for run, rows in _by(table, "run")
    )


@plt.rc_context(STYLE)
def plane(table: pd.DataFrame) -> Picture:
    """Alignment against uniformity: a path per run, from an open marker to a filled one.

    Grey lines join points of equal alignment + uniformity, the sum that Wang & Isola 2020 minimise.

    Args:
        table: columns "run" (a key of `NAMES`), "step", "alignment", "uniformity".
    """
    figure, (axes,) = _axes(width=6, height=4.2)
    for run, rows in table.groupby("run", sort=False):
        axes.plot(rows["uniformity"], rows["alignment"], marker=".", **_line(run))
        first, last = rows.iloc[0], rows.iloc[-1]
        style = {"marker": _MARKERS[run], "markersize": 9, "color": COLOURS[run]}
        axes.plot(first["uniformity"], first["alignment"], markerfacecolor="white", **style)
        axes.plot(last["uniformity"], last["alignment"], **style)
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
def similarity_heatmap(matrices: Mapping[str, np.ndarray], label: str) -> Picture:
    """Matrices side by side on one colour scale.

    Args:
        matrices: title -> (N, N) float; NaN is left blank.
        label: what a cell holds, with its unit.
    """
    figure, axes = _axes(len(matrices), width=4.4, height=4.0)
    low = min(np.nanmin(x) for x in matrices.values())
    high = max(np.nanmax(x) for x in matrices.values())
    for axis, (title, matrix) in zip(axes, matrices.items(), strict=True):
        sns.heatmap(
            matrix,
            ax=axis,
            cmap="cividis",
            vmin=low,
            vmax=high,
            square=True,
            xticklabels=8,
            yticklabels=8,
            cbar=axis is axes[-1],
            cbar_kws={"label": label},
        )
        axis.set(title=title, xlabel="candidate j", ylabel="anchor i")
        axis.grid(visible=False)
    said = []
    for title, matrix in matrices.items():
        others = matrix[~np.eye(len(matrix), dtype=bool)]
        blank = np.isnan(matrix).sum()
        said.append(
            f"{title[0].upper()}{title[1:]}: mean {matrix.diagonal().mean():.2g} on the diagonal, "
            f"elsewhere {np.nanmean(others):.2g}, at most {np.nanmax(others):.2g}"
            + (f", {blank} cells left blank." if blank else ".")
        )
    figure.alt = f"{label[0].upper()}{label[1:]} of each anchor and candidate. " + " ".join(said)
    return figure


@plt.rc_context(STYLE)
def joined(
    key: str,
    plain: Mapping[str, ArrayLike],
    new: Mapping[str, ArrayLike],
    xlabel: str = "cosine similarity",
) -> Picture:
    """Densities of the similarities in a batch, and of those that another loss makes of it.

    Args:
        key: that loss, a key of `NAMES`; its colour marks `new`.
        plain, new: name -> (n,) float, at most two of each.
    """
    figure, (axes,) = _axes(width=7.5)
    said = []
    for groups, colour in ((plain, "0.35"), (new, COLOURS[key])):
        for (name, values), line in zip(groups.items(), ("-", ":"), strict=False):
            x = np.asarray(values)
            sns.kdeplot(x, ax=axes, color=colour, linestyle=line, label=name, cut=0)
            said.append(f"{name}: mean {x.mean():.2f}, from {x.min():.2f} to {x.max():.2f}.")
    axes.set(xlabel=xlabel, ylabel="density", title=NAMES[key])
    figure.legend(loc="outside lower center", ncols=4)
    figure.alt = f"{NAMES[key]}: density of the {xlabel}. " + " ".join(said)
    return figure


@plt.rc_context(STYLE)
def against(key: str, x: ArrayLike, y: ArrayLike, xlabel: str, ylabel: str) -> Picture:
    """One point a pair or a row of a batch, under a loss.

    Args:
        key: the loss, a key of `NAMES`.
        x, y: (n,) float each.
        xlabel, ylabel: what they are, with units.
    """
    figure, (axes,) = _axes(width=7.5)
    x, y = np.asarray(x), np.asarray(y)
    axes.scatter(x, y, s=14, alpha=0.6, lw=0, color=COLOURS[key], rasterized=True)
    axes.set(xlabel=xlabel, ylabel=ylabel, title=NAMES[key])
    figure.alt = (
        f"{NAMES[key]}: {ylabel} over {xlabel}, {len(x)} points. Their rank correlation is "
        f"{pd.Series(x).corr(pd.Series(y), method='spearman'):+.2f}."
    )
    return figure


@plt.rc_context(STYLE)
def similarity_distribution(table: pd.DataFrame) -> Picture:
    """Density of cosine similarities, one curve per encoder, one panel per kind of pair.

    Args:
        table: columns "encoder" (a key of `NAMES`), "kind", "similarity".
    """
    kinds = list(dict.fromkeys(table["kind"]))
    figure, axes = _axes(len(kinds))
    for axis, kind in zip(axes, kinds, strict=True):
        for encoder, rows in table[table["kind"] == kind].groupby("encoder", sort=False):
            sns.kdeplot(rows["similarity"], ax=axis, clip=(-1, 1), **_line(encoder))
        axis.set(title=kind, xlabel="cosine similarity", ylabel="density", xlim=(-0.5, 1))
    axes[0].legend()
    figure.alt = "Density of cosine similarities; medians. " + " ".join(
        f"{kind[0].upper()}{kind[1:]}: "
        + ", ".join(
            f"{NAMES[encoder]} {part['similarity'].median():.2f}"
            for encoder, part in _by(rows, "encoder")
        )
        + "."
        for kind, rows in _by(table, "kind")
    )
    return figure


OTHERS = "other articles"


def group_colours(groups: Sequence[str]) -> dict[str, str]:
    """A colour for each of at most eight groups, and grey for `OTHERS`, which comes first."""
    colours = sns.color_palette("colorblind", 10).as_hex()
    del colours[7]  # its own grey
    return {OTHERS: "#C8C8C8"} | dict(zip(groups, colours[:8], strict=False))


def describe_maps(table: pd.DataFrame, groups: Sequence[str]) -> str:
    """What `maps` shows, in words: how closely each group keeps together on each map."""
    said = []
    for title, rows in _by(table, "encoder"):
        near = [
            f"{group} {_spread(part) / _spread(rows):.2f}"
            for group, part in _by(rows[rows["group"].isin(groups)], "group")
        ]
        said.append(f"{title}: {', '.join(near)}.")
    return (
        f"Maps of the same {len(table) // table['encoder'].nunique()} sentences, a point each. "
        "How widely each coloured group is spread, as a part of the spread of all: "
        + " ".join(said)
    )


def _spread(points: pd.DataFrame) -> float:
    return float(np.sqrt(points[["x", "y"]].var(ddof=0).sum()))


@plt.rc_context(STYLE)
def maps(table: pd.DataFrame, groups: Sequence[str]) -> Picture:
    """Two-dimensional maps of the same sentences, one panel per encoder, coloured by group.

    Args:
        table: columns "encoder" (a title), "x", "y", "group".
        groups: at most eight groups, in the order of the legend; all others are small and grey.
    """
    titles = list(dict.fromkeys(table["encoder"]))
    figure, axes = _axes(len(titles), width=4.0, height=4.2)
    colours = group_colours(groups)
    for axis, title in zip(axes, titles, strict=True):
        rows = table[table["encoder"] == title]
        others = rows[~rows["group"].isin(groups)]
        if len(others):
            axis.scatter(others["x"], others["y"], s=2, color=colours[OTHERS], label=OTHERS, lw=0)
        for group, shape in zip(groups, "osD^vPX*", strict=False):
            part = rows[rows["group"] == group]
            axis.scatter(
                part["x"], part["y"], s=9, color=colours[group], marker=shape, label=group, lw=0
            )
        axis.set(title=title, xlabel="UMAP 1", xticks=[], yticks=[])
    axes[0].set_ylabel("UMAP 2")
    figure.legend(
        *axes[0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=min(4, len(groups)),
        markerscale=2.5,
    )
    figure.alt = describe_maps(table, groups)
    return figure


@plt.rc_context(STYLE)
def gains(table: pd.DataFrame, title: str) -> Picture:
    """Paired differences over seeds with their intervals, one line a pair of contestants.

    A line has the colour of the contestant, or of what the contestant adds to its baseline.

    Args:
        table: columns "score", "corpus", "baseline", "contestant" (a key of `NAMES`, " tuned"
            behind it or not), "difference", "low", "high", as of `findings.contrasts`.
        title: what was run.
    """
    scores = list(dict.fromkeys(table["score"]))
    corpora = list(dict.fromkeys(table["corpus"]))
    shades = dict(zip(corpora, np.linspace(1, 0.45, len(corpora)), strict=True))
    pairs = list(dict.fromkeys(zip(table["contestant"], table["baseline"], strict=True)))
    figure, axes = _axes(
        len(scores), width=5.6, height=1.2 + 0.42 * len(pairs) * len(corpora) ** 0.5
    )
    for axis, score in zip(axes, scores, strict=True):
        axis.axvline(0, color="0.4", lw=1)
        for row in table[table["score"] == score].itertuples():
            shift = corpora.index(row.corpus) - (len(corpora) - 1) / 2
            key, tuned, _ = row.contestant.partition(" ")
            key = key.removeprefix(f"{row.baseline}+")
            hollow = {"markerfacecolor": "white"} if tuned else {}
            axis.errorbar(
                row.difference,
                pairs.index((row.contestant, row.baseline)) + 0.28 * shift,
                xerr=[[row.difference - row.low], [row.high - row.difference]],
                color=COLOURS[key],
                marker=_MARKERS[key],
                markersize=8,
                capsize=4,
                linestyle="-",
                alpha=shades[row.corpus],
                **hollow,
            )
        axis.set_yticks(range(len(pairs)), [f"{named(a)} − {named(b)}" for a, b in pairs])
        axis.set_ylim(len(pairs) - 0.5, -0.5)
        title_of_axis = "mean of the seven STS tasks" if score == "avg" else score
        axis.set(title=title_of_axis, xlabel="difference in Spearman × 100")
    for axis in axes[1:]:
        axis.set_yticklabels([])
    if len(corpora) > 1:
        lines = [Line2D([], [], color="black", alpha=shades[corpus]) for corpus in corpora]
        figure.legend(lines, corpora, title="trained on", loc="outside right center")
    figure.suptitle(title, size=10)
    figure.alt = f"{title}. " + " ".join(
        f"{row.score}, {row.corpus}, {named(row.contestant)} minus {named(row.baseline)}: "
        f"{row.difference:+.2f}, interval {row.low:+.2f} to {row.high:+.2f}."
        for row in table.itertuples()
    )
    return figure


@plt.rc_context(STYLE)
def surface(table: pd.DataFrame, title: str) -> Picture:
    """Score over m and temperature: Focal-InfoNCE as a map, and its rows beside InfoNCE's curve.

    Args:
        table: columns "variant" (info_nce, focal_info_nce), "temperature", "m" (NaN for InfoNCE),
            "score", as of `findings.means`.
        title: what was run.
    """
    focal = table[table["variant"] == "focal_info_nce"]
    plain = table[table["variant"] == "info_nce"].sort_values("temperature")
    grid = focal.pivot_table(index="m", columns="temperature", values="score")
    figure, (left, right) = _axes(2, width=5.4, height=4)
    image = left.imshow(grid, cmap="cividis", aspect="auto", origin="lower")
    dark = (grid.max(axis=None) + grid.min(axis=None)) / 2
    for (y, x), value in np.ndenumerate(grid.to_numpy()):
        colour = "white" if value < dark else "black"
        left.text(x, y, f"{value:.1f}", ha="center", va="center", color=colour, size=9)
    left.grid(visible=False)
    left.set_xticks(range(len(grid.columns)), [f"{t:g}" for t in grid.columns])
    left.set_yticks(range(len(grid.index)), [f"{m:g}" for m in grid.index])
    left.set(xlabel="temperature τ", ylabel="m", title="Focal-InfoNCE")
    figure.colorbar(image, ax=left, label="Spearman × 100")
    for (m, rows), shade in zip(grid.iterrows(), np.linspace(0.35, 1, len(grid)), strict=True):
        right.plot(grid.columns, rows, marker=".", alpha=shade, color=COLOURS["focal_info_nce"])
        right.annotate(
            f"m = {m:g}", (grid.columns[-1], rows.iloc[-1]), (4, 0), size=8,
            textcoords="offset points", va="center",
        )  # fmt: skip
    right.plot(plain["temperature"], plain["score"], marker="o", **_line("info_nce"))
    right.plot([], [], color=COLOURS["focal_info_nce"], label=NAMES["focal_info_nce"])
    right.set_xscale("log")
    ticks: list[float] = []
    for temperature in sorted({*plain["temperature"], *grid.columns}):
        if not ticks or temperature > 1.9 * ticks[-1]:  # room for a label
            ticks.append(temperature)
    right.set_xticks(ticks, [f"{t:g}" for t in ticks])
    right.minorticks_off()
    right.set(xlabel="temperature τ (log scale)", ylabel="Spearman × 100")
    right.legend()
    figure.suptitle(title, size=10)
    best, top = (rows.loc[rows["score"].idxmax()] for rows in (focal, plain))
    figure.alt = (
        f"{title}. Focal-InfoNCE scores {focal['score'].min():.1f} to {best['score']:.1f}, best at "
        f"temperature {best['temperature']:g} and m {best['m']:g}. InfoNCE scores "
        f"{plain['score'].min():.1f} to {top['score']:.1f}, best at temperature "
        f"{top['temperature']:g}."
    )
    return figure


@plt.rc_context(STYLE)
def by_setting(table: pd.DataFrame, setting: str, xlabel: str, title: str) -> Picture:
    """Score against one setting, a line a variant, with the span of the seeds.

    Args:
        table: columns "variant" (a key of `NAMES`), the setting, "score", "low", "high", as of
            `findings.means`.
        setting: the column; its axis is logarithmic.
        xlabel: what to call it, with its unit.
        title: what was run.
    """
    figure, (axes,) = _axes(width=7.5)
    for variant, rows in _by(table, "variant"):
        axes.plot(rows[setting], rows["score"], marker=_MARKERS[variant], **_line(variant))
        axes.fill_between(
            rows[setting], rows["low"], rows["high"], color=COLOURS[variant], alpha=0.12, lw=0
        )
    axes.set_xscale("log")
    ticks = sorted(table[setting].unique())
    axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
    axes.minorticks_off()
    axes.set(xlabel=xlabel, ylabel="Spearman × 100", title=title)
    axes.title.set_size(10)
    figure.legend(loc="outside right center")
    figure.alt = f"{title}. " + " ".join(
        f"{NAMES[variant]}: "
        + ", ".join(f"{y:.1f} at {x:g}" for x, y in zip(rows[setting], rows["score"], strict=True))
        + "."
        for variant, rows in _by(table, "variant")
    )
    return figure


ALONG = {
    "effective_temperature": "effective temperature",
    "hardest": "pull on the hardest tenth [%]",
    "towards": "pull that draws closer [%]",
    "same_article_pull": "pull on the same article [%]",
}
"""Columns of `findings.along_training` that `along_training` draws -> their labels."""


@plt.rc_context(STYLE)
def along_training(table: pd.DataFrame) -> Picture:
    """What each loss does to the same batches as training goes on: a line a seed.

    Args:
        table: as of `findings.along_training`, for several runs.
    """
    figure, axes = _axes(len(ALONG), width=3.5, height=3.4)
    said = []
    for axis, (column, label) in zip(axes, ALONG.items(), strict=True):
        factor = 100 if "%" in label else 1
        for contestant, rows in _by(table, "contestant"):
            by_step = factor * rows.pivot_table(index="step", columns="seed", values=column)
            style = _line(contestant)
            name = style.pop("label")
            axis.plot(by_step, lw=1, alpha=0.5, **style)
            mean = by_step.mean(axis=1)
            axis.plot(mean, lw=2, marker=_MARKERS[contestant], label=name, **style)
            said.append(f"{label}, {name}: {_ends(mean, '.3g')}.")
        axis.set(xlabel="training step", ylabel=label)
        axis.set_ylim(bottom=0)
    axes[0].legend()
    figure.alt = "Mean over seeds, from the first state to the last. " + " ".join(said)
    return figure
