"""Scores: of encoders, over seeds, over settings, along training, beside what was published."""

from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.lines import Line2D

from fcse.plots.style import STYLE, STYLES, Picture, by, ends, line, new_axes, style


@plt.rc_context(STYLE)
def scores(table: pd.DataFrame) -> Picture:
    """Score of each encoder on each judged task.

    Args:
        table: columns "encoder" (untrained, or the name of a loss), "task", "score" (100 x
            Spearman).
    """
    tasks = list(dict.fromkeys(table["task"]))
    figure, axes = new_axes(len(tasks), width=max(3.4, 0.9 * table["encoder"].nunique()))
    for axis, task in zip(axes, tasks, strict=True):
        rows = table[table["task"] == task]
        for x, (encoder, score) in enumerate(zip(rows["encoder"], rows["score"], strict=True)):
            axis.plot(x, score, style(encoder).marker, color=style(encoder).colour, markersize=10)
            axis.annotate(
                f"{score:.1f}", (x, score), (0, 9), textcoords="offset points", ha="center"
            )
        axis.set_xticks(range(len(rows)), list(rows["encoder"]), rotation=20, ha="right")
        axis.set(title=task, ylabel="Spearman × 100")
        axis.margins(x=0.25, y=0.25)
    figure.alt = "Spearman × 100 with human judgements. " + " ".join(
        f"{task}: " + ", ".join(f"{row.encoder} {row.score:.1f}" for row in rows.itertuples()) + "."
        for task, rows in by(table, "task")
    )
    return figure


@plt.rc_context(STYLE)
def over_seeds(scores: pd.DataFrame, summary: pd.DataFrame) -> Picture:
    """Every seed's score as a point, the mean of each loss with its interval beside.

    Args:
        scores: columns "task", "name" of the loss, "seed", "score" (100 x Spearman).
        summary: columns "task", "name", "mean", "low", "high" (NaN draws no bar).
    """
    tasks = list(dict.fromkeys(scores["task"]))
    names = list(dict.fromkeys(scores["name"]))
    figure, axes = new_axes(len(tasks), width=max(3.6, 1.3 * len(names)))
    for axis, task in zip(axes, tasks, strict=True):
        rows, means = (table[table["task"] == task] for table in (scores, summary))
        by_seed = rows.pivot_table(index="seed", columns="name", values="score")
        axis.plot(by_seed.reindex(columns=names).T.to_numpy(), color="0.8", lw=0.8, zorder=1)
        for x, name in enumerate(names):
            drawn = {"color": style(name).colour, "marker": style(name).marker}
            points = rows.loc[rows["name"] == name, "score"]
            axis.scatter([x] * len(points), points, s=28, alpha=0.6, lw=0, **drawn)
            for mean in means[means["name"] == name].itertuples():
                bar = [[mean.mean - mean.low], [mean.high - mean.mean]]
                bar = None if np.isnan(bar).any() else bar
                axis.errorbar(x + 0.2, mean.mean, bar, markersize=9, capsize=4, **drawn)
        axis.set_xticks(range(len(names)), names)
        axis.set_xlim(-0.5, len(names) - 0.3)
        axis.set(title=task, ylabel="Spearman × 100")
    figure.suptitle("small: one seed (lines join equal seeds); large: mean, 95 % interval", size=10)
    said = []
    for (task, name), rows in scores.groupby(["task", "name"], sort=False):
        points = rows["score"]
        span = f"{points.min():.1f} to {points.max():.1f} over {len(points)} seeds"
        said.append(f"{task}, {name}: {span}, mean {points.mean():.1f}.")
    figure.alt = "Spearman × 100 of every seed, the mean and its interval. " + " ".join(said)
    return figure


@plt.rc_context(STYLE)
def beside_published(points: pd.DataFrame, noise: Mapping[str, Mapping[str, float]]) -> Picture:
    """Published averages and runs beside the spread that 50 seeds of SimCSE have.

    Args:
        points: columns "backbone", "name" of the loss, "source" ("published" or a
            run), "avg" (100 x Spearman, mean of the seven STS tasks).
        noise: backbone -> "mean", "sd", "min", "max" of the seeds.
    """
    backbones = list(dict.fromkeys(points["backbone"]))
    figure, (axes,) = new_axes(width=8, height=1.2 + 0.6 * len(backbones))
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
                style(row.name).marker,
                color=style(row.name).colour,
                markerfacecolor=style(row.name).colour if published else "white",
                markersize=9 if published else 7,
            )
    axes.set_yticks(range(len(backbones)), backbones)
    axes.set(
        xlabel="mean Spearman × 100 over the seven STS tasks",
        ylabel="backbone",
        ylim=(len(backbones) - 0.4, -0.6),
    )
    keys = list(dict.fromkeys(points["name"]))
    handles = [
        Line2D(
            [], [], ls="", marker=style(k).marker, color=style(k).colour, label=f"{k}, published"
        )
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
        + ", ".join(f"{row.name} {row.avg:.1f} ({row.source})" for row in rows.itertuples())
        + (
            "; 50 seeds of InfoNCE: {mean:.1f} ± {sd:.1f}, {min:.1f} to {max:.1f}.".format(
                **noise[backbone]
            )
            if backbone in noise
            else "."
        )
        for backbone, rows in by(points, "backbone")
    )
    return figure


@plt.rc_context(STYLE)
def training(losses: pd.DataFrame, evaluations: pd.DataFrame) -> Picture:
    """Loss and score over the steps of each run.

    Args:
        losses: columns "name" of the loss, "step", "loss".
        evaluations: columns "name", "step", "lee" (100 x Spearman).
    """
    figure, (left, right) = new_axes(2)
    for name, rows in losses.groupby("name", sort=False):
        left.plot(rows["step"], rows["loss"], **line(name))
    left.set(xlabel="step", ylabel="loss [nats]", yscale="log")
    for name, rows in evaluations.groupby("name", sort=False):
        right.plot(rows["step"], rows["lee"], marker=style(name).marker, **line(name))
    right.set(xlabel="step", ylabel="Lee: Spearman × 100")
    left.legend()
    figure.alt = "Loss (left) and Spearman × 100 on Lee's documents (right) over the steps. " + (
        " ".join(
            f"{name}: loss from {ends(rows['loss'], '.2g')} over {len(rows)} steps."
            for name, rows in by(losses, "name")
        )
        + " "
        + " ".join(
            f"{name}: Lee from {ends(rows['lee'], '.1f')}."
            for name, rows in by(evaluations, "name")
        )
    )
    return figure


@plt.rc_context(STYLE)
def gains(table: pd.DataFrame, title: str) -> Picture:
    """Paired differences over seeds with their intervals, one line a pair.

    A line has the style of the loss; an objective with other parameters than its own is hollow.

    Args:
        table: columns "score", "corpus", "baseline", "name", "difference", "low", "high", as of
            `findings.contrasts`.
        title: what was run.
    """
    scores = list(dict.fromkeys(table["score"]))
    corpora = list(dict.fromkeys(table["corpus"]))
    shades = dict(zip(corpora, np.linspace(1, 0.45, len(corpora)), strict=True))
    pairs = list(dict.fromkeys(zip(table["name"], table["baseline"], strict=True)))
    figure, axes = new_axes(
        len(scores), width=5.6, height=1.2 + 0.42 * len(pairs) * len(corpora) ** 0.5
    )
    for axis, score in zip(axes, scores, strict=True):
        axis.axvline(0, color="0.4", lw=1)
        for row in table[table["score"] == score].itertuples():
            shift = corpora.index(row.corpus) - (len(corpora) - 1) / 2
            other = row.name not in STYLES and " + " not in row.name
            hollow = {"markerfacecolor": "white"} if other else {}
            axis.errorbar(
                row.difference,
                pairs.index((row.name, row.baseline)) + 0.28 * shift,
                xerr=[[row.difference - row.low], [row.high - row.difference]],
                color=style(row.name).colour,
                marker=style(row.name).marker,
                markersize=8,
                capsize=4,
                linestyle="-",
                alpha=shades[row.corpus],
                **hollow,
            )
        axis.set_yticks(range(len(pairs)), [f"{a} − {b}" for a, b in pairs])
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
        f"{row.score}, {row.corpus}, {row.name} minus {row.baseline}: "
        f"{row.difference:+.2f}, interval {row.low:+.2f} to {row.high:+.2f}."
        for row in table.itertuples()
    )
    return figure


@plt.rc_context(STYLE)
def surface(table: pd.DataFrame, title: str) -> Picture:
    """Score over m and temperature: Focal-InfoNCE as a map, and its rows beside InfoNCE's curve.

    Args:
        table: columns "objective" (info_nce, focal_info_nce), "temperature", "m" (NaN for InfoNCE),
            "score", as of `findings.means`.
        title: what was run.
    """
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
        right.annotate(
            f"m = {m:g}", (grid.columns[-1], rows.iloc[-1]), (4, 0), size=8,
            textcoords="offset points", va="center",
        )  # fmt: skip
    right.plot(plain["temperature"], plain["score"], marker="o", **line("InfoNCE"))
    right.plot([], [], color=style("Focal-InfoNCE").colour, label="Focal-InfoNCE")
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
    """Score against one setting, a line a loss, with the span of the seeds.

    Args:
        table: columns "name" of the loss, the setting, "score", "low", "high", as of
            `findings.means`.
        setting: the column; its axis is logarithmic.
        xlabel: what to call it, with its unit.
        title: what was run.
    """
    figure, (axes,) = new_axes(width=7.5)
    for name, rows in by(table, "name"):
        axes.plot(rows[setting], rows["score"], marker=style(name).marker, **line(name))
        axes.fill_between(
            rows[setting], rows["low"], rows["high"], color=style(name).colour, alpha=0.12, lw=0
        )
    axes.set_xscale("log")
    ticks = sorted(table[setting].unique())
    axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
    axes.minorticks_off()
    axes.set(xlabel=xlabel, ylabel="Spearman × 100", title=title)
    axes.title.set_size(10)
    figure.legend(loc="outside right center")
    figure.alt = f"{title}. " + " ".join(
        f"{name}: "
        + ", ".join(f"{y:.1f} at {x:g}" for x, y in zip(rows[setting], rows["score"], strict=True))
        + "."
        for name, rows in by(table, "name")
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
    figure, axes = new_axes(len(ALONG), width=3.5, height=3.4)
    said = []
    for axis, (column, label) in zip(axes, ALONG.items(), strict=True):
        factor = 100 if "%" in label else 1
        for name, rows in by(table, "name"):
            by_step = factor * rows.pivot_table(index="step", columns="seed", values=column)
            drawn = {k: v for k, v in line(name).items() if k != "label"}
            axis.plot(by_step, lw=1, alpha=0.5, **drawn)
            mean = by_step.mean(axis=1)
            axis.plot(mean, lw=2, marker=style(name).marker, label=name, **drawn)
            said.append(f"{label}, {name}: {ends(mean, '.3g')}.")
        axis.set(xlabel="training step", ylabel=label)
        axis.set_ylim(bottom=0)
    axes[0].legend()
    figure.alt = "Mean over seeds, from the first state to the last. " + " ".join(said)
    return figure
