"""What each command does: fcse train | evaluate | compare | report | import | study | ...

Each loads what it needs as it runs: help texts and the parser's errors wait for no torch."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from tqdm.auto import tqdm

from fcse import __version__, data
from fcse.config import TrainConfig
from fcse.encoder.pooling import Pooling
from fcse.encoder.precision import Precision, resolve_precision
from fcse.errors import InputError, writing
from fcse.recipes import recipe

if TYPE_CHECKING:
    import pandas as pd

    from fcse.study.grid import Grid
    from fcse.study.workers import Local


def run_train(config: TrainConfig) -> None:
    """Train an encoder; a run that is there already is loaded, not repeated."""
    from fcse.training import train

    result = train(config)
    first, last = result.evaluations[0], result.evaluations[-1]
    for name in first:
        if name != "step":
            print(f"{name:24}{first[name]:8.2f} ->{last[name]:8.2f}")
    print(f"run: {result.folder}")


def run_evaluate(
    model: Annotated[str, tyro.conf.Positional],
    pooling: Pooling | None = None,
    senteval: Path | None = None,
    tasks: tuple[str, ...] = data.STS_TASKS,
    aggregate: data.Aggregate = "all",
    precision: Precision = "float32",
    json_: Annotated[Path | None, tyro.conf.arg(name="json")] = None,
) -> None:
    """Score an encoder: 100 x Spearman on STS tasks as SentEval reports it, their mean as avg.

    STSBenchmark and SICKRelatedness are scored on their dev split too.

    Args:
        model: minilm (packaged), a run or model folder, or a hub name.
        pooling: How tokens become a sentence vector; by default what the model declares, else cls.
        senteval: SentEval data folder; else FCSE_SENTEVAL, else the hub.
        tasks: SentEval names, or Lee for the packaged judgements, which need no folder.
        aggregate: How the parts of a yearly task join: all pairs together, or the (weighted) mean.
        precision: Of the encoder; bf16 moves a score by a few thousandths.
        json_: Also write the scores to this file, with those of each part."""
    _check_json(json_)
    judged = _load_tasks(tasks, senteval)
    averaged = [task for task in judged if task != "Lee"]
    for task in ("STSBenchmark", "SICKRelatedness"):
        if task in judged:
            judged[f"{task}-dev"] = data.load_sts(task, "dev", senteval)
    from fcse.encoder.sentence_encoder import SentenceEncoder
    from fcse.evaluation import aggregate_spearman, pair_similarities, subset_scores

    encoder = SentenceEncoder.from_pretrained(model, pooling)
    precision = resolve_precision(precision, encoder.device)
    similarities = pair_similarities(encoder, list(judged.values()), precision)
    scores, subsets = {}, {}
    for (name, pairs), similarity in zip(judged.items(), similarities, strict=True):
        scores[name] = aggregate_spearman(similarity, pairs, aggregate)
        subsets[name] = subset_scores(similarity, pairs)
    if averaged:
        scores["avg"] = sum(scores[task] for task in averaged) / len(averaged)
    about = {"pooling": encoder.pooling, "aggregate": aggregate, "precision": precision}
    said = ", ".join(f"{name} {value}" for name, value in about.items())
    print(f"{model}, {said}: 100 x Spearman")
    for name, score in scores.items():
        print(f"{name:22}{score:8.2f}")
    about |= {"fcse": __version__}
    _write_json(json_, {"model": model} | about | scores | {"subsets": subsets})


def run_compare(
    a: Annotated[str, tyro.conf.Positional],
    b: Annotated[str, tyro.conf.Positional],
    pooling: Pooling | None = None,
    senteval: Path | None = None,
    tasks: tuple[str, ...] = ("Lee",),
    resamples: int = 2000,
    confidence: float = 0.95,
    json_: Annotated[Path | None, tyro.conf.arg(name="json")] = None,
) -> None:
    """Is encoder b better than a on these pairs: paired bootstrap of the Spearman difference.

    The interval covers other pairs, not other seeds: for those train several and see fcse report.

    Args:
        a: minilm (packaged), a run or model folder, or a hub name.
        b: Likewise; differences are b - a.
        pooling: Of both; by default what each declares, else cls.
        senteval: SentEval data folder; else FCSE_SENTEVAL, else the hub.
        tasks: SentEval names, or Lee for the packaged judgements.
        resamples: Bootstrap draws, at least 100.
        confidence: Of the interval, between 0 and 1.
        json_: Also write the comparison to this file."""
    from fcse.statistics import check_bootstrap, compare_tasks

    _check_json(json_)
    check_bootstrap(resamples, confidence)
    judged = list(_load_tasks(tasks, senteval).values())
    from fcse.encoder.sentence_encoder import SentenceEncoder

    encoders = [SentenceEncoder.from_pretrained(model, pooling) for model in (a, b)]
    results = compare_tasks(*encoders, judged, resamples, confidence)
    names = [pairs.name for pairs in judged] + ["mean"] * (len(judged) > 1)
    rows = dict(zip(names, results, strict=False))
    print(f"{b} minus {a}: 100 x Spearman, paired bootstrap of {resamples} draws over pairs")
    for name, result in rows.items():
        print(f"{name:18}{result}")
    about = {"a": a, "b": b, "poolings": [e.pooling for e in encoders], "fcse": __version__}
    _write_json(json_, about | {name: asdict(result) for name, result in rows.items()})


def run_report(
    runs: Annotated[Path | None, tyro.conf.Positional] = None,
    sts: bool = False,
    senteval: Path | None = None,
    figures: Path | None = None,
) -> None:
    """Losses over their seeds with intervals, and runs beside the published numbers.

    Scores are kept in each run's folder, so that a second report takes seconds.

    Args:
        runs: A folder of runs, or one run; by default FCSE_RUNS, else runs/, where there is one.
        sts: Score the seven STS tasks too; their mean is what stands beside the published ones.
        senteval: SentEval data folder; else FCSE_SENTEVAL, else the hub.
        figures: Folder for the two figures, as PNG, SVG and CSV."""
    from fcse.study.published import SIMCSE_50_SEEDS
    from fcse.study.report import beside_published, load_runs, over_seeds, score_runs

    folder = runs or (data.runs_folder() if data.runs_folder().is_dir() else None)
    scores = None
    if folder is not None:
        found = load_runs(folder)
        tasks = _load_tasks(("Lee", *(data.STS_TASKS if sts else ())), senteval)
        scores = score_runs(found, list(tasks.values()))
        summary = over_seeds(scores)
        _print_seeds(summary)
    points = beside_published(scores)
    print("\nmean of the seven STS tasks, and its distance from 50 seeds of SimCSE in their sd")
    width = max(16, 2 + points["name"].str.len().max())
    for row in points.itertuples():
        distance = "" if math.isnan(row.z) else f"{row.z:+8.1f} sd"
        print(f"{row.backbone:22}{row.name:{width}}{row.avg:7.2f}{distance:12}  {row.source}")
    if any(points["backbone"] == "minilm"):
        print("minilm was tuned on supervised pairs: no comparison with the rows above it")
    if figures is not None:
        from fcse import plots

        picture = plots.beside_published(points, SIMCSE_50_SEEDS)
        plots.save(picture, points, figures / "beside_published")
        groups = [] if scores is None else scores.groupby("settings", sort=False)
        for i, (settings, rows) in enumerate(groups, start=1):
            part = summary[summary["settings"] == settings]
            plots.save(plots.over_seeds(rows, part), rows, figures / f"over_seeds_{i}")
        print(f"\nfigures: {figures}/")


def _print_seeds(summary: "pd.DataFrame") -> None:
    width = 2 + summary["name"].str.len().max()
    for settings, table in summary.groupby("settings", sort=False):
        print(f"\n{settings or 'all runs share their settings'}: 100 x Spearman over seeds")
        for row in table.itertuples():
            spread = "one seed: no interval"
            if row.seeds > 1:
                spread = f"sd {row.sd:.2f}, 95 % interval {row.low:.2f} to {row.high:.2f}"
            print(f"{row.task:16}{row.name:{width}}{row.mean:7.2f}  n = {row.seeds}, {spread}")
            if row.gain is not None:
                print(f"{'':{16 + width}}over InfoNCE, paired: {row.gain}")


def run_import(
    checkpoint: Annotated[Path, tyro.conf.Positional],
    output: Annotated[Path, tyro.conf.Positional],
    encoder: str | None = None,
    pooling: Pooling = "cls",
) -> None:
    """Turn a checkpoint of the original SimCSE or Focal-InfoNCE trainer into a model folder.

    Args:
        checkpoint: The folder the trainer wrote, or its weight file (safetensors, or a pickle
            that holds tensors only).
        output: The model folder to write.
        encoder: Where architecture and tokenizer come from; by default the checkpoint's folder.
        pooling: Of the training; cls brings the MLP head along."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError(f"output {output} is there already: name a new folder")
    from fcse.encoder.checkpoints import import_checkpoint

    imported = import_checkpoint(checkpoint, encoder, pooling)
    with writing(f"output {output}"):
        imported.save_pretrained(output)
    print(f"model: {output} (pooling {pooling})")


def _load_tasks(tasks: Sequence[str], senteval: Path | None) -> dict[str, data.SentencePairs]:
    known = (*data.STS_TASKS, "Lee")
    if not tasks or not set(tasks) <= set(known):
        wrong = next((task for task in tasks if task not in known), "")
        raise InputError(f"unknown task {wrong!r}: choose from {', '.join(known)}")
    return {
        task: data.load_lee() if task == "Lee" else data.load_sts(task, folder=senteval)
        for task in dict.fromkeys(tasks)
    }


def _check_json(path: Path | None) -> None:
    if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
        raise InputError(f"--json {path} cannot be written: name a file in a folder that exists")


def _write_json(path: Path | None, content: dict[str, Any]) -> None:
    from fcse import processes

    if path is not None and processes.world().is_main_process:
        with writing(path):
            path.write_text(json.dumps(content, indent=1) + "\n")


@dataclass(frozen=True)
class Resources:
    """What a run asks a cluster for, by sbatch's names and in its words."""

    partition: str | None = None
    """Slurm: where jobs queue."""
    gpus: str | None = None
    """Slurm: GPUs of a run, such as 1 or a100:1; a run uses one."""
    cpus_per_task: int | None = None
    """Slurm: cores of a run."""
    mem: str | None = None
    """Slurm: memory of a run, such as 16G."""
    time: str | None = None
    """Slurm: time limit of a job, such as 4:00:00; a run that needs longer takes several jobs."""


def run_study(
    seed: int = 0,
    figures: Path | None = None,
    config: Path | None = None,
    output: Path | None = None,
    workers: int | None = None,
    keep_models: bool = False,
    dry_run: bool = False,
    executor: Literal["local", "slurm"] = "local",
    resources: Annotated[Resources, tyro.conf.arg(name="")] = Resources(),
) -> None:
    """Train InfoNCE and Focal-InfoNCE on the embedded default, score both, draw the figures.

    With --config a grid of runs instead, each trained and scored once: one row a run in
    OUTPUT/results.csv. What is there already is not repeated.

    Args:
        seed: Of head, data order and dropout; a grid names its own.
        figures: Folder for PNG, SVG and CSV; by default study/ beside the runs. A grid draws none.
        config: TOML file of a grid, see the README.
        output: Folder of the grid; by default named as the file, under FCSE_RUNS, else runs/.
        workers: Runs at a time; by default one a GPU, else one; with --executor slurm all.
        keep_models: Keep the weights of the grid's runs, not only what came out.
        dry_run: Say what the grid would run and how long that takes; write nothing.
        executor: Where the grid's runs are made: this machine, or a cluster, a job each.
        resources: What a run asks the cluster for."""
    if config is not None:
        if seed or figures:
            raise InputError("--seed and --figures do not go with --config: name seeds in the file")
        asked = {k.replace("_", "-"): x for k, x in asdict(resources).items() if x is not None}
        if asked and executor == "local":
            raise InputError(f"--{next(iter(asked))} needs --executor slurm")
        from fcse.study.grid import read_grid

        grid = read_grid(config, output or data.runs_folder() / config.stem)
        from fcse.study.slurm import Slurm
        from fcse.study.workers import Local

        where = Slurm(asked, workers) if executor == "slurm" else Local(workers)
        _run_grid(grid, where, keep_models, dry_run)
        return
    if output or workers is not None or keep_models or dry_run:
        raise InputError("--output, --workers, --keep-models and --dry-run need --config")
    if executor != "local" or resources != Resources():
        raise InputError("--executor and what it asks a cluster for need --config")
    from fcse.study.embedded import study

    table, folder = study(replace(recipe("minilm-wiki"), seed=seed), figures)
    wide = table.pivot(index="encoder", columns="task", values="score")
    wide = wide.loc[table["encoder"].unique(), table["task"].unique()].round(2)
    print("\nSpearman x 100 against human judgements (one seed: a difference is no proof)\n")
    print(wide.rename_axis(index=None, columns=None).to_string())
    print(f"\nfigures: {folder}/\nnotebooks: make lab")
    print("an interval for a difference: fcse compare; over several seeds: fcse report")


def _run_grid(grid: "Grid", where: "Local", keep_models: bool, dry_run: bool) -> None:
    from fcse.study.grid import plan
    from fcse.study.workers import estimate, run_grid

    runs = grid.to_run()
    print(f"{len(grid.runs)} runs: {len(grid.runs) - len(runs)} done, {len(runs)} to run")
    if dry_run and runs:
        print(f"\n{plan(runs).to_string(index=False)}\n")
        seconds, source = estimate(grid, runs)
        at_a_time = min(where.workers, len(runs))
        took = tqdm.format_interval(round(seconds / at_a_time))
        print(f"estimated time of training, {at_a_time} at a time: {took} ({source})")
    if not dry_run:
        run_grid(grid, where, keep_models)
        print(f"results: {grid.folder / 'results.csv'}")
        print(f"losses over seeds: fcse report {grid.folder / 'runs'}")


def run_findings(
    folder: Annotated[Path, tyro.conf.Positional] = Path("figures/study"), runs: Path | None = None
) -> None:
    """What the study found: settings chosen, contrasts over seeds; its figures, drawn again.

    Args:
        folder: The study's tables, one CSV beside each TOML file of a grid; figures go there too.
        runs: Where fcse study put those grids, else the tables are taken as they are."""
    from fcse.study.findings import draw, take_over

    if runs is not None:
        take_over(folder, runs)
    found = draw(folder)
    for name, said in (
        ("chosen", "learning rate of each loss, best on the dev split"),
        ("contrasts", "over seeds, paired; p_holm is corrected for the number of comparisons"),
        ("methods", "methods without and with the modulation, likewise"),
    ):
        if name in found:
            table = found[name].to_string(index=False, float_format="{:.3g}".format)
            print(f"\n{said}\n{table}")
    print(f"\nfigures: {folder}/")


def run_repeat(
    table: tyro.conf.Positional[Path], run: tyro.conf.Positional[str], corpus: Path | None = None
) -> None:
    """Train and score one row of a study's table again, and say whether it came out the same.

    Args:
        table: CSV of a study, such as figures/study/choices.csv.
        run: The row, by its column run.
        corpus: The file that it was trained on, if it was one and is not in this folder."""
    from fcse.study.repeat import repeat

    found = repeat(table, run, corpus)
    print(f"then  {found.then}\nnow   {found.now}\n")
    print(found.scores.to_string(index=False, float_format="{:.4f}".format))
    print(f"\n{found.verdict}")
    if not found.same:
        raise SystemExit(1)


def run_doctor() -> None:
    """Say what this machine has, what is wrong with it, and how to mend that.

    Device, threads, precision, memory, folders, packaged assets, STS data, hub."""
    from fcse.cli.doctor import examine

    wrong: dict[str, None] = {}
    for finding in examine():
        print(f"{'' if finding.healthy else '! '}{finding.what:12}{finding.said}")
        if not finding.healthy:
            wrong[finding.what] = None
    if wrong:
        raise InputError(f"to be mended, see above: {', '.join(wrong)}")
