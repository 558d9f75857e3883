"""The embedded study: both objectives trained, scored and drawn; what is done is reused."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd

from fcse import analysis, data, plots
from fcse.config import TrainConfig
from fcse.data import SentencePairs
from fcse.encoder.sentence_encoder import SentenceEncoder
from fcse.evaluation import judged_pairs, score
from fcse.recipes import RECIPES, recipe
from fcse.study.published import SIMCSE_50_SEEDS
from fcse.study.report import beside_published, judged
from fcse.study.tables import SCORES
from fcse.training import TrainResult, read_run, train

SHORT = "minilm-short"
"""The recipe that notebooks train where nothing else is chosen."""


def train_objectives(config: TrainConfig) -> dict[str, TrainResult]:
    """The same config with each objective: name of the loss -> its run, trained or loaded."""
    configs = (replace(config, objective=objective) for objective in analysis.COMPARED)
    return {each.name: train(each) for each in configs}


def pick_runs(source: str | Path = SHORT) -> dict[str, TrainResult]:
    """What a notebook looks at: fresh short runs, a run that is there, or any encoder.

    source: the name of a recipe, which is trained with both objectives, or loaded where that was
    done; a run folder; or the name or folder of an encoder, which stands for a run of no steps.

    Returns: Name of the loss ("chosen encoder" for one without training) -> run. InputError: as in
    `training.train`, `training.read_run`, `SentenceEncoder.from_pretrained`."""
    if source in RECIPES:
        return train_objectives(recipe(str(source)))
    if data.is_file(Path(source) / "run.json"):
        run = read_run(source)
        return {run.config.name: run}
    encoder = SentenceEncoder.from_pretrained(source)
    config = TrainConfig(encoder=str(source), pooling=encoder.pooling)
    scored = {"step": 0, **score(encoder, judged_pairs())}
    run = TrainResult(config, Path(source), encoder, [], [scored], {"kept_step": 0}, {})
    return {"chosen encoder": run}


def with_untrained(runs: Mapping[str, TrainResult]) -> dict[str, SentenceEncoder]:
    """The encoders to put side by side: where training began, under "untrained", and where it led.

    A run of no steps, what `pick_runs` makes of an encoder, stands for itself alone."""
    encoders = {}
    for name, run in runs.items():
        if run.steps != [0]:
            encoders.setdefault("untrained", run.encoder_at(0))
        encoders[name] = run.encoder
    return encoders


def histories(runs: Mapping[str, TrainResult]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """What each run wrote down as it went.

    Returns: The losses, columns "name", "step", "loss"; and the scorings, columns "name", "step",
    "lee" (100 x Spearman) and what else was scored."""
    losses = [
        (name, step, loss)
        for name, run in runs.items()
        for step, loss in enumerate(run.losses, start=1)
    ]
    scorings = [pd.DataFrame(run.evaluations).assign(name=name) for name, run in runs.items()]
    return pd.DataFrame(losses, columns=["name", "step", "loss"]), pd.concat(scorings)


def trajectories(runs: Mapping[str, TrainResult]) -> pd.DataFrame:
    """Every run's scorings on Lee: "name", "step", "alignment", "uniformity", "score"."""
    table = histories(runs)[1].rename(columns={"lee": "score"})
    table = table.rename(columns=lambda c: c.removeprefix("lee_"))
    return table[["name", "step", "alignment", "uniformity", "score"]].reset_index(drop=True)


def scores_of(runs: Mapping[str, TrainResult], tasks: Sequence[SentencePairs]) -> pd.DataFrame:
    """Where training began and where it led, on every task, see `with_untrained`.

    What was scored once is read from the runs' folders, or from beside them.

    Returns: One row a score: columns "encoder" (untrained, or a name of `runs`), "task", "score"
    (100 x Spearman), "alignment", "uniformity". InputError: as in `report.judged`."""
    rows = [
        {"encoder": name, "task": task} | scores
        for name, encoder in with_untrained(runs).items()
        for task, scores in judged(encoder, tasks, _kept_in(runs, name)).items()
    ]
    return pd.DataFrame(rows).rename(columns={"spearman": "score"})


def _kept_in(runs: Mapping[str, TrainResult], name: str) -> Path | None:
    """The file of an encoder's scores; None where that is nobody's folder to write to."""
    if name in runs:
        run = runs[name]
        path = run.folder / SCORES
    else:
        run = next(run for run in runs.values() if run.steps != [0])
        start = f"{run.record['weights']['first'][:8]}-{run.encoder.pooling}"
        path = run.folder.with_name(f"untrained-{start}.json")
    return path if run.steps != [0] and os.access(path.parent, os.W_OK) else None


def study(config: TrainConfig, folder: Path | None = None) -> tuple[pd.DataFrame, Path]:
    """Train a config with InfoNCE and Focal-InfoNCE, score them beside the start, draw.

    What is in the runs folder already is reused, so that a second call takes seconds. Figures go to
    the folder as PNG, SVG and CSV; by default to study/ beside the runs.

    Returns: One row a score: columns "encoder" (untrained, or the name of a loss), "task", "score"
    (100 x Spearman), "alignment", "uniformity"; and the folder of the figures. InputError: as in
    `training.train`."""
    folder = folder or data.runs_folder() / "study"
    plots.make_folder(folder)
    runs = train_objectives(config)
    table = scores_of(runs, judged_tasks())
    untrained = next(iter(runs.values())).encoder_at(0)
    draw(table, runs, untrained, folder)
    return table, folder


def judged_tasks() -> list[SentencePairs]:
    """Lee's documents, and both STS-B splits where a SentEval folder is named."""
    tasks = [data.load_lee()]
    if data.senteval_folder() is not None:
        for split in ("dev", "test"):
            pairs = data.load_sts("STSBenchmark", split)
            tasks.append(replace(pairs, name=f"STS-B {split}"))
    return tasks


def draw(
    table: pd.DataFrame, runs: dict[str, TrainResult], untrained: SentenceEncoder, folder: Path
) -> None:
    """Write the figures of `study`, each with the CSV behind it."""
    losses, evaluations = histories(runs)
    merged = losses.merge(evaluations, on=["name", "step"], how="outer", sort=True)
    path = trajectories(runs).drop(columns="score")
    config = next(iter(runs.values())).config
    batch = data.spread(data.load_corpus(config.corpus), config.batch_size)
    sim = analysis.batch_similarities(untrained, batch, config.max_length, config.seed)
    curves, deciles, points = analysis.curves(), analysis.pull_by_decile(sim), beside_published()
    for name, picture, numbers in (
        ("scores", plots.scores(table), table),
        ("training", plots.training(losses, evaluations), merged),
        ("alignment_uniformity", plots.plane(path), path),
        ("pull_curves", plots.pull_curves(curves), curves),
        ("pull_by_decile", plots.pull_by_decile(deciles), deciles),
        ("published", plots.beside_published(points, SIMCSE_50_SEEDS), points),
    ):
        plots.save(picture, numbers, folder / name)
