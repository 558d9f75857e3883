"""What the rows of the study say: chosen settings, paired contrasts, surfaces, states on the way.

The tables are those of the grids in figures/study/, one CSV beside each TOML file.
"""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from torch import Tensor
from tqdm.auto import tqdm

from fcse import analysis, losses, plots
from fcse.analysis import VARIANTS, batch_similarities, rank
from fcse.config import TrainConfig
from fcse.data import STS_TASKS, is_file, load_wiki_articles
from fcse.errors import InputError, writing
from fcse.neighbours.options import SETTINGS
from fcse.statistics import compare_seeds, holm
from fcse.training import TrainResult, read_run

STUDY = Path(__file__).parents[1] / "figures/study"
"""Where a checkout of the project has the tables."""
DEV = "STSBenchmark-dev"
"""What settings are chosen by."""
TUNED = " tuned"
"""Ends the name of a contestant whose temperature (and m) were chosen on the dev split."""
PAIRS = (
    *(("info_nce", variant) for variant in VARIANTS if variant != "info_nce"),
    ("info_nce", "info_nce" + TUNED),
    ("info_nce", "focal_info_nce" + TUNED),
    ("info_nce" + TUNED, "focal_info_nce"),
    ("info_nce" + TUNED, "focal_info_nce" + TUNED),
)
"""(baseline, contestant): what the study compares. The last two are the fair opponent's."""
NEIGHBOUR_PAIRS = (
    ("info_nce", "focal_info_nce"),
    *(("info_nce", name) for name in SETTINGS),
    *(("focal_info_nce", f"focal_info_nce+{name}") for name in SETTINGS),
    ("focal_info_nce", "focal_info_nce+sscl+cards+ifnd"),
)
"""(baseline, contestant): each neighbour alone and with the modulation, and several at once."""
RATES = ("learning_rate", "neighbour_rates")
"""Tables that a learning rate is chosen from."""
CONTRASTS = {
    "contrasts": (("comparison", "second_corpus"), PAIRS, ("avg", "Lee"), "gains"),
    "neighbours": (("neighbours",), NEIGHBOUR_PAIRS, ("STSBenchmark", "Lee"), "neighbour_gains"),
}
"""What `draw` calls the contrasts -> their tables, pairs and scores, and the figure's name."""


def read_study(*paths: Path) -> pd.DataFrame:
    """A study's rows with two columns more: "contestant", and "avg" where all STS tasks are there.

    A contestant is a key of `analysis.VARIANTS`, with `TUNED` behind it where temperature or m
    are not those of the paper.

    Args:
        paths: CSV files of grids, one below the other.

    Raises:
        InputError: a file is not there, or is no such table.
    """
    return pd.concat(map(_read_grid, paths), ignore_index=True)


def _read_grid(path: Path) -> pd.DataFrame:
    try:
        table = pd.read_csv(path)
        tuned = (table["temperature"] != TrainConfig.temperature) | (
            table["m"].notna() & (table["m"] != TrainConfig.m)
        )
        table["contestant"] = table["variant"].where(~tuned, table["variant"] + TUNED)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{path} is no table of a study: {error}") from None
    if set(STS_TASKS) <= set(table):
        table["avg"] = table[list(STS_TASKS)].mean(axis=1)
    return table


def chosen(table: pd.DataFrame, settings: Sequence[str], by: str = DEV) -> pd.DataFrame:
    """The setting of each variant whose mean over seeds is highest on the dev split.

    Args:
        table: from `read_study`.
        settings: the columns that were searched, such as learning_rate.
        by: the column of scores.

    Returns:
        One row a variant: "variant", the settings, `by` (the mean) and "seeds".
    """
    means = (
        table.groupby(["variant", *settings], dropna=False)[by]
        .agg(["mean", "count"])
        .rename(columns={"mean": by, "count": "seeds"})
        .reset_index()
    )
    best = means.loc[means.groupby("variant")[by].idxmax()]
    return best.sort_values("variant", key=lambda v: v.map(rank), ignore_index=True)


def contrasts(
    table: pd.DataFrame, pairs: Sequence[tuple[str, str]], scores: Sequence[str] = ("avg", "Lee")
) -> pd.DataFrame:
    """Contestants against each other, paired over seeds, corrected for the number of comparisons.

    Args:
        table: from `read_study`, with one row a contestant, corpus and seed.
        pairs: (baseline, contestant) each.
        scores: columns of scores; the comparisons of one score on one corpus are a family.

    Returns:
        One row a score, corpus and pair: "score", "corpus", "baseline", "contestant", "seeds",
        "mean" (of the contestant), "difference" (contestant - baseline, points of 100 x
        Spearman), "low", "high" (95 % interval of one comparison), "effect" (the difference in
        standard deviations of the paired differences, Cohen's d_z), "p" (paired t test) and
        "p_holm".

    Raises:
        InputError: a contestant without two seeds in common with its baseline.
    """
    rows = []
    for (score, corpus), family in (
        ((score, corpus), rows) for score in scores for corpus, rows in table.groupby("corpus")
    ):
        by_seed = family.pivot_table(index="seed", columns="contestant", values=score)
        found = [
            {"score": score, "corpus": corpus, "baseline": baseline, "contestant": contestant}
            | _paired(by_seed[baseline], by_seed[contestant])
            for baseline, contestant in pairs
            if {baseline, contestant} <= set(by_seed)
        ]
        rows += _corrected(found)
    return pd.DataFrame(rows)


def interactions(table: pd.DataFrame, scores: Sequence[str]) -> pd.DataFrame:
    """Whether neighbours and the modulation add up: what each gains beside it, less what alone.

    Args:
        table: as in `contrasts`, with InfoNCE, Focal-InfoNCE, and neighbours with and without it.
        scores: columns of scores; the neighbours on one score are a family.

    Returns:
        One row a score and neighbour that ran both ways: "score", "neighbour" and the numbers of
        `contrasts` from "seeds" on; 0 is a plain sum of gains, and "mean" the gain beside the
        modulation.

    Raises:
        InputError: as in `contrasts`.
    """
    rows = []
    for score in scores:
        by_seed = table.pivot_table(index="seed", columns="contestant", values=score)
        found = []
        for name in SETTINGS:
            both = f"focal_info_nce+{name}"
            if {name, both} <= set(by_seed):
                alone = by_seed[name] - by_seed["info_nce"]
                beside = by_seed[both] - by_seed["focal_info_nce"]
                found.append({"score": score, "neighbour": name} | _paired(alone, beside))
        rows += _corrected(found)
    return pd.DataFrame(rows)


def _paired(baseline: pd.Series, contestant: pd.Series) -> dict[str, float]:
    """The numbers of one comparison, over the seeds that both have."""
    both = pd.concat([baseline, contestant], axis=1).dropna().to_numpy().T
    result = compare_seeds(*both)
    return {
        "seeds": result.n,
        "mean": both[1].mean(),
        "difference": result.difference,
        "low": result.low,
        "high": result.high,
        "effect": result.difference / np.std(both[1] - both[0], ddof=1),
        "p": result.p,
    }


def _corrected(family: Sequence[dict[str, object]]) -> list[dict[str, object]]:
    """The same rows with Holm's correction for their number."""
    adjusted = holm([row["p"] for row in family])
    return [row | {"p_holm": p} for row, p in zip(family, adjusted, strict=True)]


def alone_and_beside(gains: pd.DataFrame) -> pd.DataFrame:
    """What each neighbour gains, alone over InfoNCE and beside the modulation over Focal-InfoNCE.

    Args:
        gains: `contrasts` of `NEIGHBOUR_PAIRS`, on one corpus.

    Returns:
        One row a contestant without the modulation's key, columns (score, "alone" or "beside") of
        texts as of `written`; "" where it did not run that way.
    """
    table = gains.assign(
        gain=written(gains),
        way=gains["baseline"].map({"info_nce": "alone", "focal_info_nce": "beside"}),
        name=gains["contestant"].str.removeprefix("focal_info_nce+"),
    )
    order = dict.fromkeys(table["name"])
    wide = table.pivot(index="name", columns=["score", "way"], values="gain")
    return wide.loc[list(order)].fillna("")


def written(table: pd.DataFrame) -> pd.Series:
    """Differences of `contrasts` as text, "+0.68 (+0.54 to +0.81) *": a star for p_holm < 0.05."""
    texts = [
        f"{row.difference:+.2f} ({row.low:+.2f} to {row.high:+.2f}){' *' * (row.p_holm < 0.05)}"
        for row in table.itertuples()
    ]
    return pd.Series(texts, table.index)


def means(table: pd.DataFrame, settings: Sequence[str], score: str = DEV) -> pd.DataFrame:
    """Mean of a score over seeds for each variant and setting.

    Returns:
        Columns "variant", the settings (NaN where a variant does not read one), "score",
        "low", "high" (the lowest and the highest seed), "seeds".
    """
    grouped = table.groupby(["variant", *settings], dropna=False)[score]
    found = grouped.agg(score="mean", low="min", high="max", seeds="count").reset_index()
    return found.sort_values(
        ["variant", *settings], key=lambda x: x.map(rank) if x.name == "variant" else x
    ).reset_index(drop=True)


def random_batches(count: int = 8, size: int = 64, seed: int = 0) -> list[tuple[list[str], ...]]:
    """Batches as training draws them from the packaged corpus, with the article of each sentence.

    Returns:
        `count` times (sentences, titles), `size` each.
    """
    known = [(s, title) for title, article in load_wiki_articles().items() for s in article]
    rows = np.random.default_rng(seed).permutation(len(known))[: count * size]
    return [
        tuple(map(list, zip(*(known[i] for i in part), strict=True)))
        for part in rows.reshape(count, size)
    ]


def along_training(run: TrainResult, batches: Sequence[tuple[list[str], ...]]) -> pd.DataFrame:
    """What a run's own loss does to fixed batches in each state whose weights there are.

    Args:
        run: with checkpoints; any more states make the path finer.
        batches: from `random_batches`.

    Returns:
        One row a state, each number a mean over batches: "contestant", "seed", "step", and the
        columns of `state`.
    """
    config = run.config
    names = ("temperature", "m", "modulate", "stop_gradient", "alpha")
    loss = {"objective": config.base} | {name: getattr(config, name) for name in names}
    rows = []
    for step in run.steps:
        encoder = run.encoder_at(step)
        measured = [
            state(
                batch_similarities(encoder, sentences, config.max_length, config.seed),
                titles,
                loss,
            )
            for sentences, titles in batches
        ]
        mean = pd.DataFrame(measured).mean().to_dict()
        rows.append({"contestant": config.key, "seed": config.seed, "step": step} | mean)
    return pd.DataFrame(rows)


def state(sim: Tensor, titles: Sequence[str], loss: Mapping[str, object]) -> dict[str, float]:
    """How a loss acts on a batch, in numbers.

    Args:
        sim: (N, N) float, positives on the diagonal.
        titles: N labels, such as the article of each sentence.
        loss: as in `losses.gradient_weights`.

    Returns:
        effective_temperature: tau over the slope of the logits, which is 1 for InfoNCE and 2 s + m
        for modulated negatives, averaged over the negatives by their softmax weight. hardest: the
        share of the absolute pull on negatives that the hardest tenth gets; hardest_plain: the
        same under InfoNCE at that temperature. below: the share of negatives below the resting
        point -m/2; towards: the share of the absolute pull that draws negatives closer.
        same_article: the share of the hardest tenth that is of its anchor's own article;
        same_article_pull: the share of the absolute pull on negatives that these take.
    """
    negatives = ~np.eye(len(sim), dtype=bool)
    s = sim.numpy()[negatives]
    pull = len(sim) * losses.gradient_weights(sim, **loss).numpy()[negatives]
    plain = (
        len(sim)
        * losses.gradient_weights(sim, **dict(loss) | {"objective": "info_nce"}).numpy()[negatives]
    )
    p = losses.logits(sim, **analysis.logit_arguments(**loss)).softmax(dim=1).numpy()[negatives]
    same = np.equal.outer(np.asarray(titles), np.asarray(titles))[negatives]
    hardest = np.argsort(-s, kind="stable")[: len(s) // 10]
    resting = analysis.resting_point(**loss)
    return {
        "effective_temperature": float(p.sum() / pull.sum()),
        "hardest": float(np.abs(pull[hardest]).sum() / np.abs(pull).sum()),
        "hardest_plain": float(plain[hardest].sum() / plain.sum()),
        "below": float((s < (-np.inf if resting is None else resting)).mean()),
        "towards": float(-pull[pull < 0].sum() / np.abs(pull).sum()),
        "same_article": float(same[hardest].mean()),
        "same_article_pull": float(np.abs(pull[same]).sum() / np.abs(pull).sum()),
    }


def take_over(folder: Path, runs: Path) -> None:
    """Renew the study's tables from what its grids left behind.

    Args:
        folder: with the grids' TOML files; NAME.csv is written beside NAME.toml.
        runs: NAME/results.csv is taken where it is there; where NAME/runs holds weights of states
            along training, `along_training` measures them.

    Raises:
        InputError: no grid of those names is there, or a table cannot be written.
    """
    names = [path.stem for path in sorted(folder.glob("*.toml"))]
    known = [name for name in names if is_file(runs / name / "results.csv")]
    if not known:
        raise InputError(f"{runs} holds none of the grids {', '.join(names)}: run fcse study first")
    for name in known:
        with writing(f"table of {name}"):
            shutil.copyfile(runs / name / "results.csv", folder / f"{name}.csv")
    if "states" in known:
        batches = random_batches()
        folders = sorted(path.parent for path in (runs / "states/runs").glob("*/checkpoints"))
        measured = [along_training(read_run(path), batches) for path in tqdm(folders, unit="run")]
        table = pd.concat(measured).sort_values(["contestant", "seed", "step"], ignore_index=True)
        with writing("table along training"):
            table.to_csv(folder / "along_training.csv", index=False, float_format="%.6g")


def draw(folder: Path) -> dict[str, pd.DataFrame]:
    """Draw the study's figures from its tables, each beside the numbers in it.

    Args:
        folder: holds surface.csv, batch_size.csv, along_training.csv and the tables of `RATES` and
            `CONTRASTS`; what is not there is left out.

    Returns:
        Name -> table: "chosen", "surface", "batch_size", "along_training" and the names of
        `CONTRASTS`.

    Raises:
        InputError: none of them is there, a table that is none of a study, or a figure that cannot
            be written.
    """
    found: dict[str, pd.DataFrame] = {}
    if paths := _tables(folder, RATES):
        found["chosen"] = chosen(read_study(*paths), ["learning_rate"])
    if is_file(folder / "learning_rate.csv"):
        rows = read_study(folder / "learning_rate.csv")
        table = means(rows, ["learning_rate"])
        title = f"{_what(rows)}, {DEV}: mean and span of seeds"
        picture = plots.by_setting(table, "learning_rate", "peak learning rate", title)
        plots.save(picture, table, folder / "by_learning_rate")
    if is_file(folder / "surface.csv"):
        rows = read_study(folder / "surface.csv")
        found["surface"] = table = means(rows, ["temperature", "m"])
        title = f"{_what(rows)}, {DEV}: mean over seeds"
        plots.save(plots.surface(table, title), table, folder / "score_surface")
    if is_file(folder / "batch_size.csv"):
        rows = read_study(folder / "batch_size.csv")
        found["batch_size"] = table = means(rows, ["batch_size"])
        title = f"{_what(rows)}, {DEV}: mean and span of seeds"
        picture = plots.by_setting(table, "batch_size", "batch size [sentences]", title)
        plots.save(picture, table, folder / "by_batch_size")
    for name, (tables, pairs, scores, figure) in CONTRASTS.items():
        if paths := _tables(folder, tables):
            rows = read_study(*paths)
            found[name] = table = contrasts(rows, pairs, scores)
            title = f"{_what(rows)}: paired over seeds, 95 % intervals"
            plots.save(plots.gains(table, title), table, folder / figure)
    if is_file(folder / "along_training.csv"):
        found["along_training"] = table = pd.read_csv(folder / "along_training.csv")
        plots.save(plots.along_training(table), table, folder / "along_training")
    if not found:
        raise InputError(f"{folder} holds no table of a study: run one of its grids first")
    return found


def _tables(folder: Path, names: Sequence[str]) -> list[Path]:
    """Those of the tables that are there."""
    return [path for name in names if is_file(path := folder / f"{name}.csv")]


def _what(rows: pd.DataFrame) -> str:
    """Encoder and amount of training that all rows share, in words."""
    sentences = (rows["steps"] * rows["batch_size"]).max()
    return f"{rows['encoder'].iloc[0]}, {sentences:,} sentences a run"
