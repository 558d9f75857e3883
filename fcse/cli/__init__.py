"""The command line: fcse train, evaluate, compare, report, study, repeat, findings and others."""

import functools
import io
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import field, fields, make_dataclass
from typing import Annotated, Any, get_type_hints

import tyro

from fcse import methods
from fcse.cli import commands
from fcse.config import PARAMETERS, TrainConfig, configured
from fcse.errors import InputError
from fcse.objectives import documented, key, parameters
from fcse.recipes import RECIPES, recipe

_DEFAULT_RECIPE = "minilm-wiki"
_COMMANDS = ("evaluate", "compare", "report", "import", "study", "repeat", "findings", "doctor")


def _flags(start: TrainConfig) -> type:
    """A dataclass of all settings by their flat names, at their values in a config.

    The objective is its name; a parameter that it does not have, and the settings of a method that
    is off, are at their defaults."""
    hints = get_type_hints(TrainConfig)
    said = "+".join(map(key, (start.objective, *start.methods)))
    own = parameters(start.objective)
    made: list[tuple[str, Any, Any]] = []
    for f in fields(TrainConfig):
        if f.name == "objective":
            made.append(_flag("objective", str, said, TrainConfig))
            made += [
                _flag(name, get_type_hints(kind)[name], own.get(name, getattr(kind, name)), kind)
                for name, kind in PARAMETERS.items()
            ]
        elif f.name != "methods":
            made.append(_flag(f.name, hints[f.name], getattr(start, f.name), TrainConfig))
    for name in methods.names():
        kind = methods.method(name)
        on = next((method for method in start.methods if type(method) is kind), kind())
        made.append((name, kind, field(default=on)))
    return make_dataclass("Flags", made, frozen=True)


def _flag(name: str, hint: Any, default: Any, kind: type) -> tuple[str, Any, Any]:
    helped = Annotated[hint, tyro.conf.arg(help=documented(kind)[name])]
    return name, helped, field(default=default)


def _given(arguments: Sequence[str], flags: Any) -> dict[str, Any]:
    """The settings that are named among the arguments, by their flat names, with their values."""
    given: dict[str, Any] = {}
    for argument in arguments:
        if not argument.startswith("--"):
            continue
        path = argument[2:].partition("=")[0].replace("-", "_").split(".")
        value: Any = flags
        for i, part in enumerate(path):
            part = part if hasattr(value, part) else part.removeprefix("no_")
            path[i], value = part, getattr(value, part)
        given[".".join(path)] = value
    return given


def _train_command(arguments: Sequence[str]) -> Callable[..., None]:
    """`run_train` with a flag for every setting, at the values of the recipe that is named."""
    named = re.findall(r"(?:^|\s)--recipe[=\s]+(\S+)", " ".join(arguments))
    start = recipe(named[-1] if named else _DEFAULT_RECIPE)
    flags = _flags(start)

    def run(settings: Annotated[flags, tyro.conf.arg(name="")]) -> None:
        commands.run_train(configured(start, _given(arguments, settings)))

    run.__doc__ = f"{commands.run_train.__doc__}\n\nRecipes: {', '.join(RECIPES)}."
    return run


def _one_line(box: str) -> str:
    """The message inside the frame that the parser draws around an error."""
    title, *body = (line.strip("│╭╰╮╯─|+- ") for line in box.splitlines())
    message = " ".join(line for line in body if line)
    return re.split(r" (?:Argument helptext:|For full helptext)", message)[0] or title


def _parse(arguments: Sequence[str]) -> Callable[[], None]:
    """The command and its arguments, not yet run; InputError: what the parser says, in one line."""

    def bound(run: Callable[..., None]) -> Callable[..., Callable[[], None]]:
        return functools.wraps(run)(lambda *args, **kwargs: functools.partial(run, *args, **kwargs))

    runs = {name: getattr(commands, f"run_{name}") for name in _COMMANDS}
    runs = {"train": _train_command(arguments)} | runs
    complaint = io.StringIO()
    try:
        with redirect_stderr(complaint):
            return tyro.extras.subcommand_cli_from_dict(
                {name: bound(run) for name, run in runs.items()},
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

    Ctrl-C ends with 130, SIGTERM with 143 and a closed pipe with 141, as shells expect."""
    before = signal.signal(signal.SIGTERM, _terminate)
    first, launched = True, "WORLD_SIZE" in os.environ
    if launched:  # a process alone joins nobody, and a help text waits for no torch
        from fcse import processes

        first = processes.world().is_main_process
    try:
        with redirect_stdout(sys.stdout if first else io.StringIO()):
            _parse(sys.argv[1:] if arguments is None else arguments)()
        if launched:
            processes.leave()
    except InputError as error:
        print(f"fcse: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # `fcse ... | head`: nobody reads on, which is no error
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(141)
    except (KeyboardInterrupt, _Terminated) as stop:
        how, code = ("terminated", 143) if isinstance(stop, _Terminated) else ("interrupted", 130)
        print(f"fcse: {how}: training goes on when the same command is given", file=sys.stderr)
        sys.exit(code)
    finally:
        signal.signal(signal.SIGTERM, before)
