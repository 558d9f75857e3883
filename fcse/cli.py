"""The command line: fcse train | evaluate | compare | report | import | study | doctor."""

import functools
import io
import json
import math
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import tyro
from tqdm.auto import tqdm

from fcse import __version__, data, plots, processes
from fcse.checkpoints import import_checkpoint
from fcse.config import TrainConfig
from fcse.doctor import examine
from fcse.encoder import SentenceEncoder
from fcse.errors import InputError, writing
from fcse.evaluation import Aggregate, aggregate_spearman, pair_similarities, subset_scores
from fcse.findings import draw, take_over
from fcse.grid import Grid, check_workers, estimate, plan, read_grid, run_grid
from fcse.pooling import Pooling
from fcse.published import SIMCSE_50_SEEDS
from fcse.recipes import RECIPES, recipe
from fcse.report import beside_published, load_runs, over_seeds, score_runs
from fcse.statistics import check_bootstrap, compare_tasks
from fcse.study import study
from fcse.training import train

_DEFAULT_RECIPE = "minilm-wiki"


def run_train(config: TrainConfig) -> None:
    """Train an encoder; a run that is there already is loaded, not repeated."""
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
    aggregate: Aggregate = "all",
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
        json_: Also write the scores to this file, with those of each part.
    """
    _check_json(json_)
    judged = _load_tasks(tasks, senteval)
    averaged = [task for task in judged if task != "Lee"]
    for task in ("STSBenchmark", "SICKRelatedness"):
        if task in judged:
            judged[f"{task}-dev"] = data.load_sts(task, "dev", senteval)
    encoder = SentenceEncoder.from_pretrained(model, pooling)
    similarities = pair_similarities(encoder, list(judged.values()))
    scores, subsets = {}, {}
    for (name, pairs), similarity in zip(judged.items(), similarities, strict=True):
        scores[name] = aggregate_spearman(similarity, pairs, aggregate)
        subsets[name] = subset_scores(similarity, pairs)
    if averaged:
        scores["avg"] = sum(scores[task] for task in averaged) / len(averaged)
    about = {"model": model, "pooling": encoder.pooling, "aggregate": aggregate}
    print(f"{model}, pooling {encoder.pooling}, aggregate {aggregate}: 100 x Spearman")
    for name, score in scores.items():
        print(f"{name:22}{score:8.2f}")
    if json_ is not None:
        _write_json(json_, about | {"fcse": __version__} | scores | {"subsets": subsets})


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
        json_: Also write the comparison to this file.
    """
    _check_json(json_)
    check_bootstrap(resamples, confidence)
    judged = list(_load_tasks(tasks, senteval).values())
    encoders = [SentenceEncoder.from_pretrained(model, pooling) for model in (a, b)]
    results = compare_tasks(*encoders, judged, resamples, confidence)
    names = [pairs.name for pairs in judged] + ["mean"]
    rows = dict(zip(names, results, strict=True))
    if len(judged) == 1:
        del rows["mean"]
    print(f"{b} minus {a}: 100 x Spearman, paired bootstrap of {resamples} draws over pairs")
    for name, result in rows.items():
        print(f"{name:18}{result}")
    if json_ is not None:
        about = {"a": a, "b": b, "poolings": [e.pooling for e in encoders], "fcse": __version__}
        _write_json(json_, about | {name: asdict(result) for name, result in rows.items()})


def run_report(
    runs: Annotated[Path | None, tyro.conf.Positional] = None,
    sts: bool = False,
    senteval: Path | None = None,
    figures: Path | None = None,
) -> None:
    """Objectives over their seeds with intervals, and runs beside the published numbers.

    Scores are kept in each run's folder, so that a second report takes seconds.

    Args:
        runs: A folder of runs, or one run; by default FCSE_RUNS, else runs/, where there is one.
        sts: Score the seven STS tasks too; their mean is what stands beside the published ones.
        senteval: SentEval data folder; else FCSE_SENTEVAL, else the hub.
        figures: Folder for the two figures, as PNG, SVG and CSV.
    """
    default = Path(os.environ.get("FCSE_RUNS", "runs"))
    folder = runs or (default if default.is_dir() else None)
    scores = None
    if folder is not None:
        found = load_runs(folder)
        tasks = _load_tasks(("Lee", *(data.STS_TASKS if sts else ())), senteval)
        scores = score_runs(found, list(tasks.values()))
        summary = over_seeds(scores)
        _print_seeds(summary)
    points = beside_published(scores)
    print("\nmean of the seven STS tasks, and its distance from 50 seeds of SimCSE in their sd")
    for row in points.itertuples():
        distance = "" if math.isnan(row.z) else f"{row.z:+8.1f} sd"
        print(f"{row.backbone:22}{row.objective:16}{row.avg:7.2f}{distance:12}  {row.source}")
    if any(points["backbone"] == "minilm"):
        print("minilm was tuned on supervised pairs: no comparison with the rows above it")
    if figures is not None:
        plots.save(
            plots.beside_published(points, SIMCSE_50_SEEDS), points, figures / "beside_published"
        )
        if scores is not None:
            for i, (settings, rows) in enumerate(scores.groupby("settings", sort=False), start=1):
                part = summary[summary["settings"] == settings]
                plots.save(plots.over_seeds(rows, part), rows, figures / f"over_seeds_{i}")
        print(f"\nfigures: {figures}/")


def _print_seeds(summary: pd.DataFrame) -> None:
    for settings, table in summary.groupby("settings", sort=False):
        print(f"\n{settings or 'all runs share their settings'}: 100 x Spearman over seeds")
        for row in table.itertuples():
            spread = "one seed: no interval"
            if row.seeds > 1:
                spread = f"sd {row.sd:.2f}, 95 % interval {row.low:.2f} to {row.high:.2f}"
            print(f"{row.task:16}{row.objective:16}{row.mean:7.2f}  n = {row.seeds}, {spread}")
            if row.gain is not None:
                print(f"{'':32}over info_nce, paired: {row.gain}")


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
        pooling: Of the training; cls brings the MLP head along.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError(f"output {output} is there already: name a new folder")
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


def _write_json(path: Path, content: dict[str, Any]) -> None:
    if not processes.world().is_main_process:
        return
    with writing(path):
        path.write_text(json.dumps(content, indent=1) + "\n")


def run_study(
    seed: int = 0,
    figures: Path = Path("figures"),
    config: Path | None = None,
    output: Path | None = None,
    workers: int | None = None,
    keep_models: bool = False,
    dry_run: bool = False,
) -> None:
    """Train InfoNCE and Focal-InfoNCE on the embedded default, score both, draw the figures.

    With --config a grid of runs instead, each trained and scored once: one row a run in
    OUTPUT/results.csv. What is there already is not repeated.

    Args:
        seed: Of head, data order and dropout; a grid names its own.
        figures: Folder for PNG, SVG and CSV; a grid draws none.
        config: TOML file of a grid, see the README.
        output: Folder of the grid; by default named as the file, under FCSE_RUNS, else runs/.
        workers: Runs at a time; by default one a GPU, else one.
        keep_models: Keep the weights of the grid's runs, not only what came out.
        dry_run: Say what the grid would run and how long that takes; write nothing.
    """
    if config is not None:
        if seed or figures != Path("figures"):
            raise InputError("--seed and --figures do not go with --config: name seeds in the file")
        folder = output or Path(os.environ.get("FCSE_RUNS", "runs")) / config.stem
        _run_grid(read_grid(config, folder), workers, keep_models, dry_run)
        return
    if output or workers is not None or keep_models or dry_run:
        raise InputError("--output, --workers, --keep-models and --dry-run need --config")
    table = study(seed, figures)
    wide = table.pivot(index="encoder", columns="task", values="score")
    wide = wide.loc[table["encoder"].unique(), table["task"].unique()].round(2)
    print("\nSpearman x 100 against human judgements (one seed: a difference is no proof)\n")
    print(wide.rename_axis(index=None, columns=None).to_string())
    print(f"\nfigures: {figures}/\nnotebooks: make lab")
    print("an interval for a difference: fcse compare; over several seeds: fcse report")


def _run_grid(grid: Grid, workers: int | None, keep_models: bool, dry_run: bool) -> None:
    at_a_time = check_workers(workers)
    runs = grid.to_run()
    print(f"{len(grid.runs)} runs: {len(grid.runs) - len(runs)} done, {len(runs)} to run")
    if dry_run and runs:
        print(f"\n{plan(runs).to_string(index=False)}\n")
        seconds, source = estimate(grid, runs)
        took = tqdm.format_interval(round(seconds / min(at_a_time, len(runs))))
        print(f"estimated time of training, {at_a_time} at a time: {took} ({source})")
    if not dry_run:
        run_grid(grid, workers, keep_models)
        print(f"results: {grid.folder / 'results.csv'}")
        print(f"objectives over seeds: fcse report {grid.folder / 'runs'}")


def run_findings(
    folder: Annotated[Path, tyro.conf.Positional] = Path("figures/study"),
    runs: Path | None = None,
) -> None:
    """What the study found: settings chosen, contrasts over seeds; and its figures, drawn again.

    Args:
        folder: The study's tables, one CSV beside each TOML file of a grid; figures go there too.
        runs: Where fcse study put those grids, else the tables are taken as they are.
    """
    if runs is not None:
        take_over(folder, runs)
    found = draw(folder)
    for name, said in (
        ("chosen", "learning rate of each objective, best on the dev split"),
        ("contrasts", "over seeds, paired; p_holm is corrected for the number of comparisons"),
        ("neighbours", "neighbours alone and with the modulation, likewise"),
    ):
        if name in found:
            table = found[name].to_string(index=False, float_format="{:.3g}".format)
            print(f"\n{said}\n{table}")
    print(f"\nfigures: {folder}/")


def run_doctor() -> None:
    """Say what this machine has, what is wrong with it, and how to mend that.

    Device, threads, precision, memory, folders, packaged assets, STS data, hub.
    """
    findings = []
    for finding in examine():
        findings.append(finding)
        print(f"{'' if finding.healthy else '! '}{finding.what:12}{finding.said}")
    wrong = [finding.what for finding in findings if not finding.healthy]
    if wrong:
        raise InputError(f"to be mended, see above: {', '.join(dict.fromkeys(wrong))}")


_COMMANDS: dict[str, Callable[..., None]] = {
    "train": run_train,
    "evaluate": run_evaluate,
    "compare": run_compare,
    "report": run_report,
    "import": run_import,
    "study": run_study,
    "findings": run_findings,
    "doctor": run_doctor,
}


def _with_recipe(arguments: Sequence[str]) -> Callable[..., None]:
    """`run_train` whose defaults are those of the recipe named among the arguments."""
    named = re.findall(r"(?:^|\s)--recipe[=\s]+(\S+)", " ".join(arguments))
    default = recipe(named[-1] if named else _DEFAULT_RECIPE)

    def run(config: Annotated[TrainConfig, tyro.conf.arg(name="")] = default) -> None:
        run_train(config)

    run.__doc__ = f"{run_train.__doc__}\n\nRecipes: {', '.join(RECIPES)}."
    return run


def _one_line(box: str) -> str:
    """The message inside the frame that the parser draws around an error."""
    title, *body = (line.strip("│╭╰╮╯─|+- ") for line in box.splitlines())
    message = " ".join(line for line in body if line)
    return re.split(r" (?:Argument helptext:|For full helptext)", message)[0] or title


def _parse(arguments: Sequence[str]) -> Callable[[], None]:
    """The command with its arguments, not yet run.

    Raises:
        InputError: what the parser says, in one line.
    """

    def bound(run: Callable[..., None]) -> Callable[..., Callable[[], None]]:
        return functools.wraps(run)(lambda *args, **kwargs: functools.partial(run, *args, **kwargs))

    commands = _COMMANDS | {"train": _with_recipe(arguments)}
    complaint = io.StringIO()
    try:
        with redirect_stderr(complaint):
            return tyro.extras.subcommand_cli_from_dict(
                {name: bound(run) for name, run in commands.items()},
                prog="fcse",
                description=__doc__,
                args=arguments,
            )
    except SystemExit as stop:
        if stop.code:
            raise InputError(_one_line(complaint.getvalue())) from None
        raise


class _Terminated(BaseException):
    """SIGTERM arrived; like KeyboardInterrupt no error, so that nothing on its way catches it."""


def _terminate(*_: Any) -> None:
    raise _Terminated


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point: exit code 0, or 2 with one line on what the user can mend.

    Ctrl-C ends with 130, SIGTERM with 143 and a closed pipe with 141, as shells expect.
    """
    before = signal.signal(signal.SIGTERM, _terminate)
    first = processes.world().is_main_process
    try:
        with redirect_stdout(sys.stdout if first else io.StringIO()):
            _parse(sys.argv[1:] if arguments is None else arguments)()
        processes.leave()
    except InputError as error:
        print(f"fcse: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # `fcse ... | head`: nobody reads on, which is no error
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(141)
    except (KeyboardInterrupt, _Terminated) as stop:
        terminated = isinstance(stop, _Terminated)
        how = "terminated" if terminated else "interrupted"
        print(f"fcse: {how}: training goes on when the same command is given", file=sys.stderr)
        sys.exit(143 if terminated else 130)
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    main()
