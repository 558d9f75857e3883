"""`fcse ...` in a process of its own, forked from one in which nothing but imports has happened.

A fork of the test process itself would wait for ever for locks that other threads of it held.
"""

import multiprocessing
import os
import resource
import signal
from pathlib import Path

from fcse.cli import main
from fcse.training import train

CLEAN = multiprocessing.get_context("forkserver")
# Commands load what they need as they run: here all of it is loaded once, before the forks.
CLEAN.set_forkserver_preload(
    ["fcse.study.embedded", "fcse.study.workers", "transformers.models.bert.modeling_bert"]
)


def _main(arguments, errors, largest_file):
    # Where `fcse.training.apart` began the forkserver, that is deaf to Ctrl-C.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    for stream, path in ((1, os.devnull), (2, errors)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    if largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    main(arguments)


def flags(config):
    """The command that trains a config, with a flag for each of its settings."""
    command = ["train"]
    for name, value in (config.settings | {"output": config.output}).items():
        *method, setting = name.replace("_", "-").split(".")
        said = ".".join((*method, f"no-{setting}" if value is False else setting))
        if value is not None:
            command.append(f"--{said}" if isinstance(value, bool) else f"--{said}={value}")
    return command


def start(arguments, errors: Path, largest_file=None):
    """Begin the command: standard error goes to a file, and no file may be larger than that."""
    process = CLEAN.Process(target=_main, args=(arguments, str(errors), largest_file))
    process.start()
    return process


def _train_until_killed(config, last):
    def kill(step, encoder):
        if step == last:
            os.kill(os.getpid(), signal.SIGKILL)

    train(config, kill)


def train_until_killed(config, step):
    """Train in a process that is killed -9 after a step."""
    process = CLEAN.Process(target=_train_until_killed, args=(config, step))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
