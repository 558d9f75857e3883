"""What the rows of the study say: chosen settings, paired contrasts, surfaces, states on the way.

The tables are those of the grids in figures/study/, one CSV beside each TOML file."""

import shutil
from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from fcse import plots
from fcse.data import STS_TASKS, is_file, load_wiki_articles
from fcse.errors import InputError, first_line, writing
from fcse.objectives import OBJECTIVES, VARIANTS, FocalInfoNCE, InfoNCE, rank
from fcse.objectives import name as name_of
from fcse.statistics import Comparison, compare_seeds, detectable, holm
from fcse.study.published import SIMCSE_50_SEEDS
from fcse.study.report import beside_published

if TYPE_CHECKING:
    from fcse.training import TrainResult

STUDY = Path(__file__).parents[2] / "figures/study"
"""Where a checkout of the project has the tables."""
DEV = "STSBenchmark-dev"
"""What settings are chosen by."""
RATES = ("learning_rate", "method_rates")
"""Tables that a learning rate is chosen from."""
PLAIN, FOCAL = name_of(InfoNCE()), name_of(FocalInfoNCE())
TUNED = f"{PLAIN} (tuned)"
"""InfoNCE where its temperature is chosen anew at every length of training or size of batch."""
USUAL = 64
"""Sentences of a batch where its size is not what varies."""
SCALED = ((PLAIN, FOCAL), (TUNED, FOCAL), (PLAIN, TUNED))
"""What is compared at every length of training, and as far as it ran at every size of batch."""
FAMILIES = {name_of(each).partition(" (")[0] for each in VARIANTS}
_OF_A_FAMILY = ("modulate", "stop_gradient")
CONTRASTS = {
    "contrasts": (("comparison", "second_corpus"), ("avg", "Lee"), "gains"),
    "methods": (("methods",), ("STSBenchmark", "Lee"), "method_gains"),
}
"""What `draw` calls the contrasts -> their tables and scores, and the figure's name."""


def read_study(*paths: Path) -> pd.DataFrame:
    """Rows of grids' CSV files, with "family" of each contestant, see `family`, and with "avg", the
    mean of the STS tasks, where all seven are there.

    InputError: a file is not there, or is no such table."""
    return pd.concat(map(_read_grid, paths), ignore_index=True)


def _read_grid(path: Path) -> pd.DataFrame:
    try:
        table = pd.read_csv(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is no table of a study: {first_line(error)}") from None
    if "contestant" not in table:
        old = "made by a version before 0.2.0: run the grid again"
        wrong = old if {"variant", "name"} & {*table} else "it has no column contestant"
        raise InputError(f"{path} is no table of a study: {wrong}")
    if set(STS_TASKS) <= set(table):
        table["avg"] = table[list(STS_TASKS)].mean(axis=1)
    table["family"] = table["contestant"].map(family)
    return table


def alone(loss: str) -> str:
    """The name of a loss without its methods: what the methods are added to."""
    return loss.split(" + ")[0]


def pairs(names: Iterable[str]) -> list[tuple[str, str]]:
    """(baseline, loss): what the study compares, of the losses there are.

    Every objective with InfoNCE at the paper's temperature; Focal-InfoNCE, with any parameters but
    those of `VARIANTS`, with an InfoNCE at another one, the fair opponent whose temperature was
    chosen on the dev split; and every loss with methods with the same one without."""
    variants = {*map(name_of, VARIANTS)} - {FOCAL}
    names = sorted(dict.fromkeys(names), key=lambda each: (rank(alone(each)), rank(each), each))
    objectives = [each for each in names if alone(each) == each]
    opponents = [each for each in objectives if each.startswith(f"{PLAIN} (")]
    whole = [each for each in objectives if each.split(" (")[0] == FOCAL and each not in variants]
    found = [(PLAIN, each) for each in objectives if each != PLAIN]
    found += [(opponent, each) for opponent in opponents for each in whole]
    return found + [(alone(each), each) for each in names if alone(each) != each]


def family(contestant: str) -> str:
    """The name of a loss whatever its temperature, m and alpha are: what is tuned stays one loss.

    Others, also a loss of a reader's own, keep their names."""
    label, _, inside = contestant.partition(" (")
    if " + " in contestant or label not in FAMILIES:
        return contestant
    kept = [x for x in inside.removesuffix(")").split(", ") if x.partition("=")[0] in _OF_A_FAMILY]
    return f"{label} ({', '.join(kept)})" if kept else label


def chosen(
    table: pd.DataFrame, settings: Sequence[str], per: Sequence[str] = ("contestant",)
) -> pd.DataFrame:
    """The setting whose mean over seeds on the dev split is highest, for each loss.

    per: columns, the first of names; a setting is chosen for each of their values, such as "family"
    and "steps".

    Returns: One row each: the columns `per`, the settings that were searched, `DEV` (the mean),
    "seeds", and "inside": whether the best value of every setting lies between two others that were
    tried with the others as they are; a setting that was tried at one value only does not count."""
    settings = [setting for setting in settings if setting in table]
    groups = table.groupby([*per, *settings], dropna=False, sort=False)[DEV]
    found = groups.agg(["mean", "count"]).reset_index()
    found = found.rename(columns={"mean": DEV, "count": "seeds"})
    best = found.loc[found.groupby([*per], sort=False)[DEV].idxmax()]
    inside = [
        all(_between(found, row, setting, [*per, *settings]) for setting in settings)
        for row in best.to_dict("records")
    ]
    best = best.assign(inside=inside)[[*per, *settings, DEV, "seeds", "inside"]]
    names = sorted(set(best[per[0]]), key=lambda each: (rank(each), each))
    return best.sort_values(per[0], key=lambda x: x.map(names.index), ignore_index=True)


def _between(found: pd.DataFrame, row: Mapping[str, Any], setting: str, held: list[str]) -> bool:
    """Whether a row's value of a setting has lower and higher ones beside it."""
    same = pd.Series(True, found.index)
    for column in held:
        if column != setting:
            x = found[column]
            same &= x.isna() if pd.isna(row[column]) else x == row[column]
    tried = found.loc[same, setting].dropna()
    return len(tried) < 2 or tried.min() < row[setting] < tried.max()


def with_tuned(table: pd.DataFrame, best: pd.DataFrame, by: str) -> pd.DataFrame:
    """Rows of InfoNCE at the paper's temperature and of others, and those of `TUNED`.

    That is InfoNCE at the temperature that was chosen at each value of `by`. table: from
    `read_study`, one corpus. best: columns `by` and "temperature"."""
    at = table[by].map(best.set_index(by)["temperature"])
    plain = table["contestant"].map(family) == PLAIN
    tuned = table[plain & np.isclose(table["temperature"], at)].assign(contestant=TUNED)
    return pd.concat([table[~plain | (table["contestant"] == PLAIN)], tuned], ignore_index=True)


def contrasts(
    table: pd.DataFrame,
    scores: Sequence[str] = ("avg", "Lee"),
    compared: Sequence[tuple[str, str]] | None = None,
    by: str = "corpus",
) -> pd.DataFrame:
    """Losses against each other, paired over seeds, corrected for the number of comparisons.

    table: from `read_study`, one row a loss, value of `by` and seed. scores: columns; the
    comparisons of one of them at one value of `by` are a family. compared: (baseline, loss) each,
    by name; else `pairs` of the table's. by: what is held: the corpus, or a setting such as steps.

    Returns: One row a score, value of `by` and pair: "score", `by`, "baseline", "contestant",
    "seeds", "mean" (of the contestant), "difference" (to the baseline, points of 100 x Spearman),
    "low", "high" (95 % interval of one comparison), "effect" (the difference in standard deviations
    of the paired differences, Cohen's d_z), "detectable" (the smallest true difference that these
    seeds show with a probability of 80 %, see `statistics.detectable`), "p" (paired t test) and
    "p_holm". InputError: a loss without two seeds in common with its baseline."""
    compared = pairs(table["contestant"]) if compared is None else compared
    rows = []
    for score, (held, family) in product(scores, table.groupby(by)):
        by_seed = family.pivot_table(index="seed", columns="contestant", values=score)
        found = [
            {"score": score, by: held, "baseline": baseline, "contestant": loss}
            | _paired(by_seed[baseline], by_seed[loss])
            for baseline, loss in compared
            if {baseline, loss} <= set(by_seed)
        ]
        adjusted = holm([row["p"] for row in found])
        rows += [row | {"p_holm": p} for row, p in zip(found, adjusted, strict=True)]
    return pd.DataFrame(rows)


def _paired(baseline: pd.Series, other: pd.Series) -> dict[str, float]:
    """The numbers of one comparison, over the seeds that both have."""
    both = pd.concat([baseline, other], axis=1).dropna().to_numpy().T
    sd = np.std(both[1] - both[0], ddof=1)
    if (both[0] == both[1]).all():  # the same runs under two names: a t test has no answer
        result = Comparison(0.0, 0.0, 0.0, 1.0, both.shape[1])
    else:
        result = compare_seeds(*both)
    return {
        "seeds": result.n,
        "mean": both[1].mean(),
        "difference": result.difference,
        "low": result.low,
        "high": result.high,
        "effect": result.difference / sd if sd else 0.0,
        "detectable": detectable(sd, result.n),
        "p": result.p,
    }


def written(table: pd.DataFrame) -> pd.Series:
    """Differences of `contrasts` as text, "+0.68 (+0.54 to +0.81) *": a star for p_holm < 0.05."""
    texts = [
        f"{row.difference:+.2f} ({row.low:+.2f} to {row.high:+.2f}){' *' * (row.p_holm < 0.05)}"
        for row in table.itertuples()
    ]
    return pd.Series(texts, table.index)


def shown(gains: pd.DataFrame, baseline: str, loss: str, sign: int = 1) -> pd.Series:
    """Whether a loss lies above its baseline (sign -1: below), p < 0.05 after Holm's correction.

    gains: `contrasts` of one score. Returns bools, indexed by corpus."""
    found = gains.query("baseline == @baseline and contestant == @loss").set_index("corpus")
    return (sign * found["difference"] > 0) & (found["p_holm"] < 0.05)


def verdicts(hypotheses: Mapping[str, pd.Series]) -> pd.DataFrame:
    """Hypotheses kept or dropped: kept where one holds everywhere it was looked at.

    hypotheses: what is claimed -> bool, indexed by where: a corpus, a step, a setting. Returns: One
    row each: "hypothesis", "verdict" (kept or dropped), "holds_at" (as text)."""
    rows = [
        (said, "kept" if len(x) and x.all() else "dropped", ", ".join(map(str, x.index[x])) or "-")
        for said, x in hypotheses.items()
    ]
    return pd.DataFrame(rows, columns=["hypothesis", "verdict", "holds_at"])


def means(
    table: pd.DataFrame, settings: Sequence[str], score: str = DEV, by: str = "contestant"
) -> pd.DataFrame:
    """Mean of a score over seeds for each loss and setting.

    by: "contestant"; or "objective", where the settings are of the objective itself. Returns:
    Columns `by`, the settings that vary (NaN where a loss does not have one), "score", "low",
    "high" (the lowest and the highest seed), "seeds"."""
    grouped = table.groupby([by, *settings], dropna=False)[score]
    found = grouped.agg(score="mean", low="min", high="max", seeds="count").reset_index()
    names = sorted(set(found[by]), key=lambda each: (rank(each), each))
    order = (names if by == "contestant" else list(OBJECTIVES)).index
    return found.sort_values(
        [by, *settings], key=lambda x: x.map(order) if x.name == by else x, ignore_index=True
    )


def random_batches(count: int = 8, size: int = 64, seed: int = 0) -> list[tuple[list[str], ...]]:
    """Batches as training draws them from the packaged corpus: (sentences, their articles) each."""
    known = [(s, title) for title, article in load_wiki_articles().items() for s in article]
    rows = np.random.default_rng(seed).permutation(len(known))[: count * size]
    return [
        tuple(map(list, zip(*(known[i] for i in part), strict=True)))
        for part in rows.reshape(count, size)
    ]


def along_training(run: "TrainResult", batches: Sequence[tuple[list[str], ...]]) -> pd.DataFrame:
    """What a run's own loss does to `random_batches` in each state whose weights there are.

    Returns: One row a state, each number a mean over batches: "contestant", "seed", "step",
    and the columns of `analysis.effects`. InputError: the run has a method that acts on more than
    the similarities of a batch."""
    from fcse.analysis import batch_similarities, effects
    from fcse.training.batches import seen

    config = run.config
    rows = []
    for step in run.steps:
        encoder = run.encoder_at(step)
        measured = []
        for sentences, titles in batches:
            sim = batch_similarities(encoder, sentences, config.max_length, config.seed)
            measured.append(effects(sim, titles, *seen(config, encoder, sentences)))
        mean = pd.DataFrame(measured).mean().to_dict()
        rows.append({"contestant": config.name, "seed": config.seed, "step": step} | mean)
    return pd.DataFrame(rows)


def take_over(folder: Path, runs: Path) -> None:
    """Renew the study's tables from what its grids and `fcse study` left behind.

    For each NAME.toml in the folder, NAME.csv is renewed from NAME/results.csv under `runs`; states
    along training whose weights are there are measured; study/scores.csv is taken, where STS-B was
    at hand. InputError: nothing of that is there, or a table cannot be written."""
    names = [path.stem for path in sorted(folder.glob("*.toml"))]
    known = [name for name in names if is_file(runs / name / "results.csv")]
    scores = runs / "study/scores.csv"
    if not known and not is_file(scores):
        raise InputError(f"{runs} holds none of the grids {', '.join(names)}: run fcse study first")
    for name in known:
        with writing(f"table of {name}"):
            shutil.copyfile(runs / name / "results.csv", folder / f"{name}.csv")
    if is_file(scores) and "STS-B test" in set(pd.read_csv(scores)["task"]):
        with writing("table of scores"):
            shutil.copyfile(scores, folder / "scores.csv")
    folders = sorted(path.parent for path in (runs / "states/runs").glob("*/checkpoints"))
    if folders and "states" in known:
        from fcse.training import read_run

        batches = random_batches()
        measured = [along_training(read_run(path), batches) for path in tqdm(folders, unit="run")]
        table = pd.concat(measured).sort_values(["contestant", "seed", "step"], ignore_index=True)
        with writing("table along training"):
            table.to_csv(folder / "along_training.csv", index=False, float_format="%.6g")


def draw(folder: Path) -> dict[str, pd.DataFrame]:
    """Draw the figures of the repository from the study's tables, each beside its numbers.

    The folder holds scores.csv, surface.csv, batch_size.csv, along_training.csv and the tables of
    `RATES` and `CONTRASTS`; what is not there is left out. The published scores need none.

    Returns: Name -> table: "chosen", "learning_rate", "batch_size", "surface", "along_training",
    "scores" and the names of `CONTRASTS`. InputError: none of them is there, a table that is none
    of a study, or a figure that cannot be written."""
    found: dict[str, pd.DataFrame] = {}
    if paths := _tables(folder, RATES):
        found["chosen"] = chosen(read_study(*paths), ["learning_rate"])
    for name, xlabel in _BY_SETTING.items():
        if is_file(folder / f"{name}.csv"):
            rows = read_study(folder / f"{name}.csv")
            found[name] = table = means(rows, [name])
            title = f"{_what(rows)}, {DEV}: mean and span of seeds"
            plots.save(plots.by_setting(table, name, xlabel, title), table, folder / f"by_{name}")
    if is_file(folder / "surface.csv"):
        rows = read_study(folder / "surface.csv")
        found["surface"] = table = means(rows, ["temperature", "m"], by="objective")
        title = f"{_what(rows)}, {DEV}: mean over seeds"
        plots.save(plots.surface(table, title), table, folder / "score_surface")
    for name, (tables, scores, figure) in CONTRASTS.items():
        if paths := _tables(folder, tables):
            rows = read_study(*paths)
            found[name] = table = contrasts(rows, scores)
            title = f"{_what(rows)}: paired over seeds, 95 % intervals"
            plots.save(plots.gains(table, title), table, folder / figure)
    found |= _draw_scale(folder)
    if is_file(folder / "along_training.csv"):
        found["along_training"] = table = read_study(folder / "along_training.csv")
        plots.save(plots.along_training(table), table, folder / "along_training")
    if is_file(folder / "scores.csv"):
        found["scores"] = table = pd.read_csv(folder / "scores.csv")
        plots.save(plots.scores(table), table, folder / "scores")
    if not found:
        raise InputError(f"{folder} holds no table of a study: run one of its grids first")
    points = beside_published()
    plots.save(plots.beside_published(points, SIMCSE_50_SEEDS), points, folder / "published")
    return found


def _draw_scale(folder: Path) -> dict[str, pd.DataFrame]:
    """What `draw` has of differences against the length of training and the size of a batch."""
    found: dict[str, pd.DataFrame] = {}
    if lengths := _tables(folder, ("lengths",)):
        rows = read_study(*lengths, *_tables(folder, ("contest",)))
        best = best_temperatures(read_study(folder / "choices.csv"))
        rows = with_tuned(rows, best[best["contestant"] == PLAIN], "steps")
        found["by_length"] = table = contrasts(rows, compared=SCALED, by="steps")
        what = f"{rows['encoder'].iloc[0]}, {rows['batch_size'].iloc[0]} sentences a step"
        title = f"{what}: paired over seeds, 95 % intervals"
        picture = plots.differences(table, "steps", "training length [steps]", title, best)
        plots.save(picture, table, folder / "by_length")
    if is_file(folder / "batches.csv"):
        rows = read_study(folder / "batches.csv", *_tables(folder, ("contest",)))
        found["by_batch"] = table = contrasts(rows, compared=SCALED, by="batch_size")
        title = f"{_what(rows)}: paired over seeds, 95 % intervals"
        picture = plots.differences(table, "batch_size", "batch size [sentences]", title)
        plots.save(picture, table, folder / "by_batch")
    return found


def best_temperatures(choices: pd.DataFrame) -> pd.DataFrame:
    """The temperature that was chosen for InfoNCE at each length of training.

    Returns: Columns as of `chosen`, with "contestant" and "steps"."""
    plain = choices[(choices["family"] == PLAIN) & (choices["batch_size"] == USUAL)]
    best = chosen(plain, ["learning_rate", "temperature"], ("family", "steps"))
    return best.rename(columns={"family": "contestant"}).sort_values("steps", ignore_index=True)


_BY_SETTING = {"learning_rate": "peak learning rate", "batch_size": "batch size [sentences]"}
"""Table, and the setting that varies in it -> what its axis says."""


def _tables(folder: Path, names: Sequence[str]) -> list[Path]:
    """Those of the tables that are there."""
    return [path for name in names if is_file(path := folder / f"{name}.csv")]


def _what(rows: pd.DataFrame) -> str:
    """Encoder and amount of training that all rows share, in words."""
    sentences = (rows["steps"] * rows["batch_size"]).max()
    return f"{rows['encoder'].iloc[0]}, {sentences:,} sentences a run"
