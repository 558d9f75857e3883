"""Scores: of encoders, over seeds, over settings, along training, beside what was published."""

from collections.abc import Iterable, Mapping

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from fcse.plots.style import STYLE, STYLES, Picture, by, ends, line, new_axes, point, style


@plt.rc_context(STYLE)
def scores(table: pd.DataFrame) -> Picture:
    """Score of each encoder on each judged task.

    table: columns "encoder" (untrained, or the name of a loss), "task", "score" (100 x Spearman).
    """
    tasks = by(table, "task")
    figure, axes = new_axes(len(tasks), width=max(3.4, 0.9 * table["encoder"].nunique()))
    figure.alt = "Spearman × 100 with human judgements."
    for axis, (task, rows) in zip(axes, tasks, strict=True):
        scored = list(zip(rows["encoder"], rows["score"], strict=True))
        for x, (name, y) in enumerate(scored):
            axis.plot(x, y, ls="", markersize=10, **point(name))
            axis.annotate(f"{y:.1f}", (x, y), (0, 9), textcoords="offset points", ha="center")
        axis.set_xticks(range(len(rows)), list(rows["encoder"]), rotation=30, ha="right")
        axis.set(title=task, ylabel="Spearman × 100")
        axis.margins(x=0.25, y=0.25)
        figure.alt += f" {task}: {', '.join(f'{name} {y:.1f}' for name, y in scored)}."
    return figure


@plt.rc_context(STYLE)
def over_seeds(scores: pd.DataFrame, summary: pd.DataFrame) -> Picture:
    """Every seed's score as a point, the mean of each loss with its interval beside.

    scores, summary: as of `report.score_runs` and `report.over_seeds`, of one group of settings."""
    tasks, names = by(scores, "task"), list(scores["name"].unique())
    figure, axes = new_axes(len(tasks), width=max(3.6, 1.3 * len(names)))
    figure.alt = "Spearman × 100 of every seed, the mean and its interval."
    for axis, (task, rows) in zip(axes, tasks, strict=True):
        by_seed = rows.pivot_table(index="seed", columns="name", values="score")
        axis.plot(by_seed.reindex(columns=names).T.to_numpy(), color="0.8", lw=0.8, zorder=1)
        for name, points in by(rows, "name"):
            y = points["score"]
            axis.scatter([names.index(name)] * len(y), y, s=28, alpha=0.6, lw=0, **point(name))
            span = f"{y.min():.1f} to {y.max():.1f} over {len(y)} seeds"
            figure.alt += f" {task}, {name}: {span}, mean {y.mean():.1f}."
        for row in summary[summary["task"] == task].itertuples():
            bar = None if np.isnan(row.low) else [[row.mean - row.low], [row.high - row.mean]]
            x = names.index(row.name) + 0.2
            axis.errorbar(x, row.mean, bar, markersize=9, capsize=4, **point(row.name))
        axis.set_xticks(range(len(names)), names)
        axis.set_xlim(-0.5, len(names) - 0.3)
        axis.set(title=task, ylabel="Spearman × 100")
    figure.suptitle("small: one seed (lines join equal seeds); large: mean, 95 % interval", size=10)
    return figure


@plt.rc_context(STYLE)
def beside_published(points: pd.DataFrame, noise: Mapping[str, Mapping[str, float]]) -> Picture:
    """Published averages and runs beside the spread that 50 seeds of SimCSE have.

    points: as of `report.beside_published`. noise: backbone -> "mean", "sd", "min", "max"."""
    backbones = by(points, "backbone")
    figure, (axes,) = new_axes(width=8, height=1.2 + 0.6 * len(backbones))
    figure.alt = "Mean Spearman × 100 over the seven STS tasks, a row a backbone."
    for y, (backbone, rows) in enumerate(backbones):
        seeds = noise.get(backbone)
        if seeds:
            axes.plot([seeds["min"], seeds["max"]], [y, y], color="0.6", lw=1.5, zorder=1)
            span = [seeds["mean"] - seeds["sd"], seeds["mean"] + seeds["sd"]]
            axes.plot(span, [y, y], color="0.75", lw=9, solid_capstyle="butt", zorder=1)
            axes.plot(seeds["mean"], y, "|", color="black", markersize=12, zorder=2)
        for row in rows.itertuples():
            drawn = {"markersize": 9} | point(row.name)
            if row.source != "published":
                drawn |= {"markersize": 7, "markerfacecolor": "white"}
            axes.plot(row.avg, y + 0.22 * (row.source != "published"), ls="", **drawn)
        said = ", ".join(f"{row.name} {row.avg:.1f} ({row.source})" for row in rows.itertuples())
        form = "; 50 seeds of InfoNCE: {mean:.1f} ± {sd:.1f}, {min:.1f} to {max:.1f}"
        figure.alt += f" {backbone}: {said}{form.format(**seeds) if seeds else ''}."
    axes.set_yticks(range(len(backbones)), [backbone for backbone, _ in backbones])
    axes.set_ylim(len(backbones) - 0.4, -0.6)
    axes.set(xlabel="mean Spearman × 100 over the seven STS tasks", ylabel="backbone")
    legend = [{"ls": "", "label": f"{k}, published"} | point(k) for k in points["name"].unique()]
    legend.append({"color": "0.75", "lw": 9, "label": "InfoNCE, 50 seeds: mean ± sd"})
    legend.append({"color": "0.6", "lw": 1.5, "label": "their range"})
    if (points["source"] != "published").any():
        run = {"marker": "o", "color": "black", "mfc": "white", "label": "a run (open)"}
        legend.append({"ls": ""} | run)
    handles = [Line2D([], [], **drawn) for drawn in legend]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=9)
    return figure


@plt.rc_context(STYLE)
def training(losses: pd.DataFrame, evaluations: pd.DataFrame) -> Picture:
    """Loss and score over the steps of each run, from the tables of `study.embedded.histories`."""
    figure, (left, right) = new_axes(2)
    figure.alt = "Loss (left) and Spearman × 100 on Lee's documents (right) over the steps."
    for name, rows in by(losses, "name"):
        left.plot(rows["step"], rows["loss"], **line(name))
        figure.alt += f" {name}: loss from {ends(rows['loss'], '.2g')} over {len(rows)} steps."
    left.set(xlabel="step", ylabel="loss [nats]", yscale="log")
    for name, rows in by(evaluations, "name"):
        right.plot(rows["step"], rows["lee"], marker=style(name).marker, **line(name))
        figure.alt += f" {name}: Lee from {ends(rows['lee'], '.1f')}."
    right.set(xlabel="step", ylabel="Lee: Spearman × 100")
    left.legend()
    return figure


@plt.rc_context(STYLE)
def gains(table: pd.DataFrame, title: str) -> Picture:
    """Paired differences over seeds with their intervals, one line a pair.

    A line has the style of the loss; an objective with other parameters than its own is hollow.
    table: as of `findings.contrasts`. title: what was run."""
    scores, corpora = by(table, "score"), list(table["corpus"].unique())
    shades = dict(zip(corpora, np.linspace(1, 0.45, len(corpora)), strict=True))
    pairs = list(dict.fromkeys(zip(table["contestant"], table["baseline"], strict=True)))
    height = 1.2 + 0.42 * len(pairs) * len(corpora) ** 0.5
    figure, axes = new_axes(len(scores), width=5.6, height=height)
    figure.suptitle(title, size=10)
    figure.alt = f"{title}."
    for axis, (score, rows) in zip(axes, scores, strict=True):
        axis.axvline(0, color="0.4", lw=1)
        for row in rows.itertuples():
            shift = corpora.index(row.corpus) - (len(corpora) - 1) / 2
            y = pairs.index((row.contestant, row.baseline)) + 0.28 * shift
            bar = [[row.difference - row.low], [row.high - row.difference]]
            other = row.contestant not in STYLES and " + " not in row.contestant
            drawn = point(row.contestant) | ({"markerfacecolor": "white"} if other else {})
            drawn |= {"markersize": 8, "capsize": 4, "alpha": shades[row.corpus]}
            axis.errorbar(row.difference, y, xerr=bar, linestyle="-", **drawn)
        axis.set_yticks(range(len(pairs)), [f"{a} − {b}" for a, b in pairs])
        axis.set_ylim(len(pairs) - 0.5, -0.5)
        what = "mean of the seven STS tasks" if score == "avg" else score
        axis.set(title=what, xlabel="difference in Spearman × 100")
    for axis in axes[1:]:
        axis.set_yticklabels([])
    if len(corpora) > 1:
        lines = [Line2D([], [], color="black", alpha=shades[corpus]) for corpus in corpora]
        figure.legend(lines, corpora, title="trained on", loc="outside right center")
    for row in table.itertuples():
        figure.alt += (
            f" {row.score}, {row.corpus}, {row.contestant} minus {row.baseline}: "
            f"{row.difference:+.2f}, interval {row.low:+.2f} to {row.high:+.2f}."
        )
    return figure


@plt.rc_context(STYLE)
def surface(table: pd.DataFrame, title: str) -> Picture:
    """Score over m and temperature: Focal-InfoNCE as a map, and its rows beside InfoNCE's curve.

    table: as of `findings.means` of "temperature" and "m", by "objective". title: what was run."""
    focal = table[table["objective"] == "focal_info_nce"]
    plain = table[table["objective"] == "info_nce"].sort_values("temperature")
    grid = focal.pivot_table(index="m", columns="temperature", values="score")
    figure, (left, right) = new_axes(2, width=5.4, height=4)
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
        right.plot(grid.columns, rows, marker=".", alpha=shade, color=style("Focal-InfoNCE").colour)
        end = (grid.columns[-1], rows.iloc[-1])
        right.annotate(f"m = {m:g}", end, (4, 0), size=8, textcoords="offset points", va="center")
    right.plot(plain["temperature"], plain["score"], marker="o", **line("InfoNCE"))
    right.plot([], [], color=style("Focal-InfoNCE").colour, label="Focal-InfoNCE")
    ticks: list[float] = []
    for temperature in sorted({*plain["temperature"], *grid.columns}):
        if not ticks or temperature > 1.9 * ticks[-1]:  # room for a label
            ticks.append(temperature)
    _log_axis(right, ticks)
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


def _log_axis(axis: Axes, values: Iterable[float]) -> None:
    ticks = sorted(set(values))
    axis.set_xscale("log")
    axis.set_xticks(ticks, [f"{x:g}" for x in ticks])
    axis.minorticks_off()


@plt.rc_context(STYLE)
def by_setting(table: pd.DataFrame, setting: str, xlabel: str, title: str) -> Picture:
    """Score against one setting on a logarithmic axis, a line a loss, with the span of the seeds.

    table: as of `findings.means` of the setting. xlabel: what to call it, with its unit. title:
    what was run."""
    figure, (axes,) = new_axes(width=7.5)
    figure.alt = f"{title}."
    for name, rows in by(table, "contestant"):
        x, y, colour = rows[setting], rows["score"], style(name).colour
        axes.plot(x, y, marker=style(name).marker, **line(name))
        axes.fill_between(x, rows["low"], rows["high"], color=colour, alpha=0.12, lw=0)
        said = ", ".join(f"{score:.1f} at {at:g}" for at, score in zip(x, y, strict=True))
        figure.alt += f" {name}: {said}."
    _log_axis(axes, table[setting])
    axes.set(xlabel=xlabel, ylabel="Spearman × 100", title=title)
    axes.title.set_size(10)
    figure.legend(loc="outside right center")
    return figure


@plt.rc_context(STYLE)
def differences(
    table: pd.DataFrame, setting: str, xlabel: str, title: str, best: pd.DataFrame | None = None
) -> Picture:
    """Paired differences over seeds against a setting, with intervals: a line a pair and score.

    table: as of `findings.contrasts` by that setting. setting: on a logarithmic axis. xlabel: what
    to call it, with its unit. title: what was run. best: columns `setting`, "contestant",
    "temperature": drawn beside."""
    scores = by(table, "score")
    figure, axes = new_axes(len(scores) + (best is not None), width=4.4, height=4)
    figure.suptitle(title, size=10)
    figure.alt = f"{title}."
    pairs = list(dict.fromkeys(zip(table["contestant"], table["baseline"], strict=True)))
    for axis, (score, rows) in zip(axes, scores, strict=False):
        axis.axhline(0, color="0.4", lw=1)
        for number, (loss, baseline) in enumerate(pairs):
            each = rows[(rows["contestant"] == loss) & (rows["baseline"] == baseline)]
            x = each[setting] * 1.04 ** (number - (len(pairs) - 1) / 2)  # else bars hide each other
            bars = [each["difference"] - each["low"], each["high"] - each["difference"]]
            other = baseline != pairs[0][1]
            drawn = point(loss) | {"linestyle": ":" if other else "-", "capsize": 3}
            drawn |= {"markerfacecolor": "white"} if other else {}
            axis.errorbar(x, each["difference"], bars, label=f"{loss} − {baseline}", **drawn)
            said = ", ".join(
                f"{row.difference:+.2f} ({row.low:+.2f} to {row.high:+.2f}) at {at:g}"
                for row, at in zip(each.itertuples(), each[setting], strict=True)
            )
            figure.alt += f" {score}, {loss} minus {baseline}: {said}."
        what = "mean of the seven STS tasks" if score == "avg" else score
        axis.set(title=what, ylabel="difference in Spearman × 100")
    if best is not None:
        for name, rows in by(best, "contestant"):
            axes[-1].plot(rows[setting], rows["temperature"], **line(name) | point(name))
            at = zip(rows["temperature"], rows[setting], strict=True)
            said = ", ".join(f"{tau:g} at {x:g}" for tau, x in at)
            figure.alt += f" Best temperature, {name}: {said}."
        axes[-1].set(title="best temperature, STS-B dev", ylabel="temperature τ")
        axes[-1].set_ylim(bottom=0)
        axes[-1].legend(fontsize=9)
    for axis in axes:
        _log_axis(axis, table[setting])
        axis.set_xlabel(xlabel)
    handles = axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=2, fontsize=9)
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
    """What each loss does to the batches of `findings.along_training`: a line a seed."""
    figure, axes = new_axes(len(ALONG), width=3.5, height=3.4)
    figure.alt = "Mean over seeds, from the first state to the last."
    for axis, (column, label) in zip(axes, ALONG.items(), strict=True):
        factor = 100 if "%" in label else 1
        for name, rows in by(table, "contestant"):
            by_step = factor * rows.pivot_table(index="step", columns="seed", values=column)
            axis.plot(by_step, lw=1, alpha=0.5, **line(name) | {"label": None})
            mean = by_step.mean(axis=1)
            axis.plot(mean, lw=2, marker=style(name).marker, **line(name))
            figure.alt += f" {label}, {name}: {ends(mean, '.3g')}."
        axis.set(xlabel="training step", ylabel=label)
        axis.set_ylim(bottom=0)
    axes[0].legend()
    return figure
