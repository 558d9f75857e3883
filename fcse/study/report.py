"""Runs side by side: their scores, over seeds, and beside the published numbers."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from fcse.config import PARAMETERS, TrainConfig, recorded
from fcse.data import STS_TASKS, SentencePairs
from fcse.encoder.precision import Precision
from fcse.errors import InputError, replacing
from fcse.objectives import rank
from fcse.statistics import compare_seeds, summarise_seeds
from fcse.study import published
from fcse.study.tables import SCORES

if TYPE_CHECKING:
    from fcse.encoder.sentence_encoder import SentenceEncoder

_SAID = ("recipe", "objective", "seed", *PARAMETERS)
"""Settings that the name of a loss, or a column of its own, says already."""


def load_runs(folder: str | Path, recipe: str | None = None) -> pd.DataFrame:
    """The finished runs of a folder, or the one run that the folder itself is.

    Args:
        folder: where runs lie side by side; FCSE_RUNS of the training.
        recipe: keep the runs that started from this one only.

    Returns: One row a run: "folder" (Path), "name" (of the loss, see `TrainConfig.name`; where one
    name stands for several classes, with a digest of what each does), "encoder", "seed", "settings"
    (every other setting that is not the same in all of them, "" where all are). InputError: no such
    folder, no finished run in it, or a run.json that cannot be read."""
    configs, folder = {}, Path(folder)
    if not folder.is_dir():
        raise InputError(f"no folder of runs at {folder}: train with fcse train, or name another")
    for path in sorted([*folder.glob("run.json"), *folder.glob("*/run.json")]):
        try:
            record = json.loads(path.read_text())
            if record["finished"] and recipe in (None, record["config"]["recipe"]):
                configs[path.parent] = recorded(record["config"])
        except (ValueError, KeyError, TypeError, AttributeError):
            said = f"{path} is no record of a run that this version reads"
            raise InputError(f"{said}: delete that folder") from None
    if not configs:
        raise InputError(f"{folder} holds no finished run: train with fcse train, or name another")
    rows = [config.settings for config in configs.values()]
    table = pd.DataFrame(rows, dtype=object)  # None is a value like any other
    settings = [name for name in table if name not in _SAID and "." not in name]
    varying = [name for name in settings if table[name].map(str).nunique() > 1]
    names = _told_apart(list(configs.values()))
    said = [", ".join(f"{name} {row[name]}" for name in varying) for row in rows]
    runs = table.assign(folder=list(configs), name=names, settings=said, order=names.map(rank))
    runs = runs.sort_values(["settings", "order", "name", "seed"], ignore_index=True)
    return runs[["folder", "name", "encoder", "seed", "settings"]]


def _told_apart(configs: Sequence[TrainConfig]) -> pd.Series:
    """The names of losses, with what their classes do where one name stands for several."""
    settings = (config.settings.items() for config in configs)
    code = [", ".join(str(v) for k, v in each if k.endswith(".code")) for each in settings]
    table = pd.DataFrame({"name": [config.name for config in configs], "code": code})
    several = table.groupby("name")["code"].transform("nunique") > 1
    return table["name"].mask(several, table["name"] + " [code " + table["code"] + "]")


def score_runs(runs: pd.DataFrame, tasks: Sequence[SentencePairs]) -> pd.DataFrame:
    """The runs of `load_runs` on every task; what was scored once is read from its scores.json.

    Returns: One row a score: the columns of `runs`, "task", "score" (100 x Spearman), "alignment",
    "uniformity"; and where all seven STS tasks are among them, their mean as task "avg"."""
    rows: list[dict[str, Any]] = []
    for run in runs.to_dict("records"):
        scores = judged(run["folder"], tasks, run["folder"] / SCORES)
        rows += [run | {"task": task} | found for task, found in scores.items()]
        if scores.keys() >= set(STS_TASKS):
            average = sum(scores[task]["spearman"] for task in STS_TASKS) / len(STS_TASKS)
            rows.append(run | {"task": "avg", "spearman": average})
    return pd.DataFrame(rows).rename(columns={"spearman": "score"})


def judged(
    encoder: "SentenceEncoder | Path",
    tasks: Sequence[SentencePairs],
    path: Path | None,
    precision: Precision = "float32",
) -> dict[str, dict[str, float]]:
    """`judge_tasks` by the tasks' names; what `path` holds already is not computed again.

    An encoder may be the folder of a run, loaded only where something is left to compute. path: a
    JSON file, made or extended; None keeps nothing. InputError: it is no valid JSON or cannot be
    written."""
    try:
        known = json.loads(path.read_text()) if path is not None and path.is_file() else {}
        missing = [pairs for pairs in tasks if pairs.name not in known]
        if missing:
            from fcse.encoder.sentence_encoder import SentenceEncoder
            from fcse.evaluation import judge_tasks

            if isinstance(encoder, Path):
                encoder = SentenceEncoder.from_pretrained(encoder)
            scores = judge_tasks(encoder, missing, precision)
            known |= {pairs.name: s for pairs, s in zip(missing, scores, strict=True)}
            if path is not None:
                with replacing(path) as partial:
                    partial.write_text(json.dumps(known, indent=1) + "\n")
    except json.JSONDecodeError:
        raise InputError(f"{path} is no valid JSON: delete it to score again") from None
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}") from None
    return {pairs.name: known[pairs.name] for pairs in tasks}


def over_seeds(scores: pd.DataFrame, baseline: str = "InfoNCE") -> pd.DataFrame:
    """Mean, spread and interval of each loss over its seeds, and its gain over that baseline.

    The gain is paired: over the seeds that both have under the same settings.

    Returns: One row per settings, task and loss of `score_runs`: "seeds", "mean", "sd", "low",
    "high" (NaN for a single seed), and "gain": a `Comparison`, None for the baseline itself and
    where fewer than two seeds are common."""
    rows = []
    for (settings, task), group in scores.groupby(["settings", "task"], sort=False):
        by_seed = group.pivot_table(index="seed", columns="name", values="score")
        for name in group["name"].unique():
            x = by_seed[name].dropna()
            sd, low, high, gain = np.nan, np.nan, np.nan, None
            if len(x) > 1:
                summary = summarise_seeds(x)
                sd, low, high = summary.sd, summary.low, summary.high
            if name != baseline and baseline in by_seed:
                pairs = by_seed[[baseline, name]].dropna()
                if len(pairs) > 1:
                    gain = compare_seeds(pairs[baseline], pairs[name])
            rows.append((settings, task, name, len(x), x.mean(), sd, low, high, gain))
    columns = ["settings", "task", "name", "seeds", "mean", "sd", "low", "high", "gain"]
    return pd.DataFrame(rows, columns=columns)


def beside_published(scores: pd.DataFrame | None = None) -> pd.DataFrame:
    """The published averages, and the "avg" rows of `score_runs`, against the noise of 50 seeds.

    Returns: One row a result: "backbone", "name", "source" (published, or a run's folder name),
    "avg", and "z": by how many standard deviations of the 50 SimCSE seeds of that backbone it lies
    above their mean, NaN for a backbone without them."""
    rows = published.results()
    if scores is not None:
        for run in scores[scores["task"] == "avg"].to_dict("records"):
            row = {"backbone": Path(run["encoder"]).name, "name": run["name"]}
            rows.append(row | {"source": run["folder"].name, "avg": run["score"]})
    table = pd.DataFrame(rows)
    seeds = pd.DataFrame(published.SIMCSE_50_SEEDS).T.reindex(table["backbone"])
    table["z"] = (table["avg"] - seeds["mean"].to_numpy()) / seeds["sd"].to_numpy()
    return table
