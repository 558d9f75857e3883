"""The embedded study: both objectives trained, scored and drawn; what is done is reused."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pandas as pd

from fcse import analysis, plots
from fcse.config import TrainConfig
from fcse.data import SentencePairs, is_file, load_corpus, load_lee, load_sts, senteval_folder
from fcse.encoder import SentenceEncoder
from fcse.published import SIMCSE_50_SEEDS
from fcse.recipes import RECIPES, recipe
from fcse.report import beside_published, judged
from fcse.training import TrainResult, judged_pairs, read_run, score, train

OBJECTIVES = ("info_nce", "focal_info_nce")
SHORT = "minilm-short"
"""The recipe that notebooks train where nothing else is chosen."""


def train_objectives(config: TrainConfig) -> dict[str, TrainResult]:
    """The same config with each objective: objective -> its run, trained or loaded."""
    return {objective: train(replace(config, objective=objective)) for objective in OBJECTIVES}


def pick_runs(source: str | Path = SHORT) -> dict[str, TrainResult]:
    """What a notebook looks at: fresh short runs, a run that is there, or any encoder.

    Args:
        source: the name of a recipe: it is trained with both objectives, or loaded where that was
            done; a run folder; or the name or folder of an encoder, which stands for a run of no
            steps.

    Returns:
        Key of the figures (see `analysis.VARIANTS`; "encoder" for one without training) -> run.

    Raises:
        InputError: as in `training.train`, `training.read_run`, `SentenceEncoder.from_pretrained`.
    """
    if source in RECIPES:
        return train_objectives(recipe(str(source)))
    if is_file(Path(source) / "run.json"):
        run = read_run(source)
        return {run.config.key: run}
    encoder = SentenceEncoder.from_pretrained(source)
    config = TrainConfig(encoder=str(source), pooling=encoder.pooling)
    scored = {"step": 0, **score(encoder, judged_pairs())}
    return {
        "encoder": TrainResult(config, Path(source), encoder, [], [scored], {"kept_step": 0}, {})
    }


def with_untrained(runs: Mapping[str, TrainResult]) -> dict[str, SentenceEncoder]:
    """The encoders to put side by side: where training began, under "untrained", and where it led.

    A run of no steps, what `pick_runs` makes of an encoder, stands for itself alone.
    """
    encoders = {}
    for key, run in runs.items():
        if run.steps != [0]:
            encoders.setdefault("untrained", run.encoder_at(0))
        encoders[key] = run.encoder
    return encoders


def trajectories(runs: Mapping[str, TrainResult]) -> pd.DataFrame:
    """Every scoring of every run on Lee's documents.

    Returns:
        Columns "run" (the key), "step", "alignment", "uniformity", "score" (100 x Spearman).
    """
    table = pd.concat(
        [pd.DataFrame(run.evaluations).assign(run=key) for key, run in runs.items()],
        ignore_index=True,
    )
    table = table.rename(columns={"lee": "score"}).rename(columns=lambda c: c.removeprefix("lee_"))
    return table[["run", "step", "alignment", "uniformity", "score"]]


def study(seed: int = 0, figures: Path = Path("figures")) -> pd.DataFrame:
    """Train InfoNCE and Focal-InfoNCE on the embedded default, score them beside the start, draw.

    What is in the runs folder already is reused, so that a second call takes seconds.

    Args:
        seed: of both runs.
        figures: folder for PNG, SVG and CSV.

    Returns:
        One row a score: columns "encoder" (untrained, info_nce, focal_info_nce), "task", "score"
        (100 x Spearman), "alignment", "uniformity".

    Raises:
        InputError: as in `training.train`.
    """
    config = replace(recipe("minilm-wiki"), seed=seed)
    plots.make_folder(figures)
    runs = train_objectives(config)
    untrained = SentenceEncoder.from_pretrained("minilm")
    start = runs["info_nce"].record["weights"]["first"][:8]
    folder = runs["info_nce"].folder
    tasks = judged_tasks()
    rows = [
        {"encoder": name, "task": pairs.name, **scores}
        for name, encoder, path in (
            ("untrained", untrained, folder.with_name(f"untrained-{start}.json")),
            *((o, run.encoder, run.folder / "scores.json") for o, run in runs.items()),
        )
        for pairs, scores in zip(tasks, judged(encoder, tasks, path), strict=True)
    ]
    table = pd.DataFrame(rows).rename(columns={"spearman": "score"})
    draw(table, runs, untrained, figures)
    return table


def judged_tasks() -> list[SentencePairs]:
    """Lee's documents, and both STS-B splits where a SentEval folder is named."""
    tasks = [load_lee()]
    if senteval_folder() is not None:
        for split in ("dev", "test"):
            pairs = load_sts("STSBenchmark", split)
            tasks.append(replace(pairs, name=f"STS-B {split}"))
    return tasks


def draw(
    table: pd.DataFrame, runs: dict[str, TrainResult], untrained: SentenceEncoder, folder: Path
) -> None:
    """Write the study's figures, each with the CSV behind it.

    Args:
        table: what `study` returns.
        runs: objective -> its run.
        untrained: where both runs started.
        folder: where to write.
    """
    plots.save(plots.scores(table), table, folder / "scores")

    steps = [
        {"run": o, "step": i, "loss": loss}
        for o, run in runs.items()
        for i, loss in enumerate(run.losses, start=1)
    ]
    evaluations = pd.concat(
        [pd.DataFrame(run.evaluations).assign(run=o) for o, run in runs.items()]
    )
    losses = pd.DataFrame(steps)
    merged = losses.merge(evaluations, on=["run", "step"], how="outer", sort=True)
    plots.save(plots.training(losses, evaluations), merged, folder / "training")

    path = trajectories(runs).drop(columns="score")
    plots.save(plots.plane(path), path, folder / "alignment_uniformity")

    config = runs["focal_info_nce"].config
    curves = analysis.curves(config.temperature, config.m)
    plots.save(
        plots.pull_curves(curves, config.temperature, config.m), curves, folder / "pull_curves"
    )

    sentences = load_corpus(config.corpus)
    batch = sentences[:: len(sentences) // config.batch_size][: config.batch_size]
    sim = analysis.batch_similarities(untrained, batch, config.max_length, config.seed)
    deciles = analysis.pull_by_decile(sim, config.temperature, config.m)
    plots.save(plots.pull_by_decile(deciles), deciles, folder / "pull_by_decile")

    points = beside_published()
    plots.save(plots.beside_published(points, SIMCSE_50_SEEDS), points, folder / "published")
