"""Calls in processes of their own: what each is given, and what becomes of it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from fcse.errors import InputError
from fcse.training import apart

LIMIT = 300


def call(function, *arguments, output=None, **given):
    return apart.start(function, *arguments, output=output or Path(os.devnull), **given)


def ended(process):
    process.join(LIMIT)
    return process.exitcode


def test_a_process_has_the_state_of_its_caller_at_that_moment(tmp_path, monkeypatch):
    """Also where what it is forked from is older than the change."""

    def say():
        said = torch.get_num_threads(), os.environ.get("SAID"), os.environ.get("OWN")
        print(*said, Path.cwd(), sys.path[0])

    output = tmp_path / "output"
    for number in ("1", "2"):
        (tmp_path / number).mkdir()
        monkeypatch.chdir(tmp_path / number)
        monkeypatch.setenv("SAID", number)
        monkeypatch.syspath_prepend(f"/{number}")
        own = {"OMP_NUM_THREADS": number, "OWN": number}
        assert ended(call(say, output=output, environment=own)) == 0, output.read_text()
        said = [number, number, number, str(tmp_path / number), f"/{number}"]
        assert output.read_text().split() == said


def test_how_a_process_ended(tmp_path):
    def fail(error):
        raise error

    output = tmp_path / "output"
    for error, code, said in (
        (InputError("no such thing"), 2, "fcse: no such thing"),
        (ValueError("a bug"), 1, "ValueError: a bug"),
    ):
        assert ended(call(fail, error, output=output)) == code
        assert output.read_text().splitlines()[-1] == said
    assert ended(call(os._exit, 7)) == 7


def test_a_kill_takes_one_of_them():
    first, second = call(time.sleep, LIMIT), call(time.sleep, LIMIT)
    first.kill()
    assert ended(first) == -signal.SIGKILL
    assert second.is_alive()
    second.terminate()
    assert ended(second) == -signal.SIGTERM


def test_a_script_is_not_run_again_by_the_processes_it_starts(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(f"""
import os, pathlib
from dataclasses import dataclass
from fcse.training import apart

@dataclass(frozen=True)
class Mine:
    number: int

print("here")
process = apart.start(print, Mine(3), output=pathlib.Path("{tmp_path}/output"))
process.join({LIMIT})
print(process.exitcode)
""")
    run = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["here", "0"]
    assert (tmp_path / "output").read_text() == "Mine(number=3)\n"


def test_ctrl_c_while_the_imports_are_made_says_nothing_of_them():
    code = f"""
import os, pathlib, time
from fcse.training import apart
try:
    apart.start(time.sleep, {LIMIT}, output=pathlib.Path(os.devnull))
    time.sleep({LIMIT})
except KeyboardInterrupt:
    print("interrupted")
"""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", code], start_new_session=True, **pipes)
    begun = time.monotonic()
    while not psutil.Process(process.pid).children():
        assert process.poll() is None
        assert time.monotonic() - begun < LIMIT
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    assert process.communicate(timeout=LIMIT) == ("interrupted\n", "")


@pytest.mark.skipif(sys.platform != "linux", reason="nothing is forked elsewhere")
def test_what_is_imported_before_a_fork_touches_no_gpu_and_no_pool_of_threads():
    """A fork has neither: it would fail there, or wait for ever."""
    code = f"""
import importlib, os, sys
from torch import _C

def touched(frame, event, _):
    if event == "c_call":
        return
    name = frame.f_globals.get("__name__", ""), frame.f_code.co_name
    if name in (("torch.cuda", "_lazy_init"), ("torch.cuda", "is_available")):
        print("touched", *name, frame.f_back.f_globals.get("__name__"))

sys.setprofile(touched)
for name in {(*apart._LATE, "fcse.study.workers", "fcse.training.loop")}:
    importlib.import_module(name)
sys.setprofile(None)
tasks = [open(f"/proc/self/task/{{i}}/comm").read().strip() for i in os.listdir("/proc/self/task")]
print(*tasks)
"""
    own = os.environ | {"OMP_NUM_THREADS": "4", "OPENBLAS_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=own)
    assert run.returncode == 0, run.stderr
    assert "touched" not in run.stdout
    assert set(run.stdout.split()) <= {"python", "python3", "jemalloc_bg_thd"}
