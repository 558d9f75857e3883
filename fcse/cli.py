"""The command line: fcse train | evaluate | study | doctor, generated from the same dataclasses."""

import functools
import io
import json
import os
import platform
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from fcse import __version__, data
from fcse.encoder import SentenceEncoder
from fcse.errors import InputError
from fcse.evaluation import Aggregate, aggregate_spearman, pair_similarities, subset_scores
from fcse.pooling import Pooling
from fcse.recipes import RECIPES, recipe
from fcse.study import study
from fcse.training import TrainConfig, resolve_precision, train

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
    pooling: Pooling = "cls",
    senteval: Path | None = None,
    tasks: tuple[str, ...] = data.STS_TASKS,
    aggregate: Aggregate = "all",
    json_: Annotated[Path | None, tyro.conf.arg(name="json")] = None,
) -> None:
    """Score an encoder: 100 x Spearman on STS tasks as SentEval reports it, their mean as avg.

    STSBenchmark and SICKRelatedness are scored on their dev split too.

    Args:
        model: minilm (packaged), a model folder, or a hub name.
        pooling: How tokens become a sentence vector.
        senteval: SentEval data folder; else FCSE_SENTEVAL, else the hub.
        tasks: SentEval names, or Lee for the packaged judgements, which need no folder.
        aggregate: How the parts of a yearly task join: all pairs together, or the (weighted) mean.
        json_: Also write the scores to this file, with those of each part.
    """
    known = (*data.STS_TASKS, "Lee")
    if not tasks or not set(tasks) <= set(known):
        wrong = next((task for task in tasks if task not in known), "")
        raise InputError(f"unknown task {wrong!r}: choose from {', '.join(known)}")
    if json_ is not None and (json_.is_dir() or not json_.absolute().parent.is_dir()):
        raise InputError(f"--json {json_} cannot be written: name a file in a folder that exists")
    judged = {
        task: data.load_lee() if task == "Lee" else data.load_sts(task, folder=senteval)
        for task in dict.fromkeys(tasks)
    }
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
    print(f"{model}, pooling {pooling}, aggregate {aggregate}: 100 x Spearman")
    for name, score in scores.items():
        print(f"{name:22}{score:8.2f}")
    if json_ is not None:
        about = {"model": model, "pooling": pooling, "aggregate": aggregate, "fcse": __version__}
        _write_json(json_, about | scores | {"subsets": subsets})


def _write_json(path: Path, content: dict[str, Any]) -> None:
    try:
        path.write_text(json.dumps(content, indent=1) + "\n")
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}") from None


def run_study(seed: int = 0, figures: Path = Path("figures")) -> None:
    """Train InfoNCE and Focal-InfoNCE on the embedded default, score both, draw the figures.

    Args:
        seed: Of head, data order and dropout.
        figures: Folder for PNG, SVG and CSV.
    """
    table = study(seed, figures)
    wide = table.pivot(index="encoder", columns="task", values="score")
    wide = wide.loc[table["encoder"].unique(), table["task"].unique()].round(2)
    print("\nSpearman x 100 against human judgements (one seed: a difference is no proof)\n")
    print(wide.rename_axis(index=None, columns=None).to_string())
    print(f"\nfigures: {figures}/\nnotebooks: make lab")


def run_doctor() -> None:
    """Say what this machine has: device, precision, packaged assets, hub, STS data."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor()
    healthy = True
    print(
        f"fcse        {__version__}, Python {platform.python_version()}, torch {torch.__version__}"
    )
    print(f"device      {device.type} {name}, {os.cpu_count()} cores")
    print(f"precision   auto means {resolve_precision('auto', device)} here")
    for asset in (data.MINILM, data.WIKI_MINI, data.LEE_DOCUMENTS, data.LEE_JUDGEMENTS):
        try:
            asset.locate()
            print(f"packaged    {asset.what}: ok, SHA-256 {asset.sha256[:12]}")
        except InputError as error:
            healthy = False
            print(f"packaged    {asset.what}: {error}")
    try:
        print(f"STS data    {data.senteval_folder() or 'FCSE_SENTEVAL is not set; else the hub'}")
    except InputError as error:
        healthy = False
        print(f"STS data    {error}")
    print(f"hub         {'reachable' if data.hub_reachable() else 'out of reach (not needed)'}")
    if not healthy:
        raise InputError("something above needs mending")


_COMMANDS: dict[str, Callable[..., None]] = {
    "train": run_train,
    "evaluate": run_evaluate,
    "study": run_study,
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


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point: exit code 0, 2 with one line on what the user can mend, 130 after Ctrl-C."""
    try:
        _parse(sys.argv[1:] if arguments is None else arguments)()
    except InputError as error:
        print(f"fcse: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("fcse: interrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
