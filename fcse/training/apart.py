"""A call in a process of its own, which ends with the process that started it."""

import multiprocessing
import os
import pickle
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from multiprocessing import resource_tracker
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import ModuleType
from typing import Any

import cloudpickle
import torch

from fcse.errors import InputError, first_line

_FORKS = sys.platform == "linux"
"""Elsewhere each process imports anew: Windows cannot fork, and a Mac's GPU does not survive it."""
_CONTEXT: Any = multiprocessing.get_context("forkserver" if _FORKS else "spawn")
_LATE = ["datasets", "gensim.corpora", "transformers.models.bert.modeling_bert"]
"""What a run imports on its way."""


def start(
    function: Callable[..., Any],
    *arguments: Any,
    output: Path,
    environment: Mapping[str, str] | None = None,
) -> BaseProcess:
    """Begin a call in a new process, in a session of its own, so that Ctrl-C reaches us alone.

    It is forked from a process that has made the imports, which take as long as a short run, and
    has touched neither a GPU nor a pool of threads, which no fork survives. What was defined in a
    notebook's cell is handed over by value; the result is dropped; an InputError becomes one line
    and exit code 2.

    output: where standard output and error go. environment: variables beside those of this process.
    InputError: what cannot be handed over, such as an objective that holds an open file."""
    try:
        call = cloudpickle.dumps((function, arguments))
    except (TypeError, pickle.PicklingError) as error:
        raise InputError(f"no other process can train this: {first_line(error)}") from None
    if _FORKS:
        _CONTEXT.set_forkserver_preload([*_LATE, function.__module__])
        resource_tracker.ensure_running()  # else it is started below, and lifts the block again
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # for what is started below too
    given = call, output, dict(os.environ), dict(environment or {})
    process = _CONTEXT.Process(target=_run, args=given, daemon=True)
    main = sys.modules["__main__"]
    if hasattr(main, "__file__"):  # else the new process would run the script once more
        sys.modules["__main__"] = ModuleType("__main__")
    try:
        process.start()
    finally:
        sys.modules["__main__"] = main
        if _FORKS:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    return process


def _run(call: bytes, output: Path, environment: dict[str, str], own: dict[str, str]) -> None:
    if hasattr(os, "setsid"):
        os.setsid()
    with output.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.clear()
    os.environ.update(environment | own)
    if threads := own.get("OMP_NUM_THREADS"):  # torch read that when it was imported
        torch.set_num_threads(int(threads))
    threading.Thread(target=_end_with_parent, daemon=True).start()
    function, arguments = pickle.loads(call)
    try:
        function(*arguments)
    except InputError as error:
        print(f"fcse: {error}", file=sys.stderr)
        sys.exit(2)


def _end_with_parent() -> None:
    """Wait for the end of the process that called, however it comes."""
    multiprocessing.parent_process().join()
    os._exit(1)
