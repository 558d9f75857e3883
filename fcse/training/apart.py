"""A call in a process of its own, which ends with the process that started it."""

import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from typing import IO, Any

import cloudpickle

from fcse.errors import InputError, first_line


def start(
    function: Callable[..., Any],
    *arguments: Any,
    output: IO[bytes] | int,
    environment: Mapping[str, str] | None = None,
) -> "subprocess.Popen[bytes]":
    """Begin a call in a new process, in a session of its own, so that Ctrl-C reaches us alone.

    What was defined in a notebook's cell is handed over by value; the result is dropped; an
    InputError becomes one line and exit code 2. The process ends when its standard input is closed.

    output: where standard output and error go. environment: variables beside those of this process.
    InputError: what cannot be handed over, such as an objective that holds an open file."""
    try:
        call = pickle.dumps(sys.path) + cloudpickle.dumps((function, arguments))
    except (TypeError, pickle.PicklingError) as error:
        raise InputError(f"no other process can train this: {first_line(error)}") from None
    process = subprocess.Popen(
        [sys.executable, "-m", "fcse.training.apart"],
        stdin=subprocess.PIPE,
        stdout=output,
        stderr=subprocess.STDOUT,
        env=os.environ | dict(environment or {}),
        start_new_session=True,
    )
    try:
        process.stdin.write(call)
        process.stdin.flush()
    except BrokenPipeError:  # it has ended already; its exit code says so
        pass
    return process


def _end_with_parent() -> None:
    """Wait for the end of standard input: a pipe ends however its other side died."""
    while os.read(0, 1):
        pass
    os._exit(1)


def _main() -> None:
    sys.path[:] = pickle.load(sys.stdin.buffer)
    function, arguments = pickle.load(sys.stdin.buffer)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        function(*arguments)
    except InputError as error:
        print(f"fcse: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    _main()
