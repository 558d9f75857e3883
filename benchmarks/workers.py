"""A run of a grid in a process that is forked with its imports, against a fresh interpreter.

python benchmarks/workers.py [STEPS [RUNS]]
"""

import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median

import cloudpickle

from fcse.recipes import recipe
from fcse.study.workers import log_of, run_one
from fcse.training import apart

FRESH = "import cloudpickle, sys; f, arguments = cloudpickle.load(sys.stdin.buffer); f(*arguments)"


def warm(call: tuple) -> None:
    process = apart.start(*call, output=log_of(call[1]))
    process.join()
    assert process.exitcode == 0


def fresh(call: tuple) -> None:
    given = cloudpickle.dumps((call[0], call[1:]))
    with log_of(call[1]).open("wb") as log:
        subprocess.run([sys.executable, "-c", FRESH], input=given, stderr=log, check=True)


def main() -> None:
    given = [int(argument) for argument in sys.argv[1:]]
    steps, runs = given + [2, 4][len(given) :]
    seconds = {warm: [], fresh: []}
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(runs):
            for how, taken in seconds.items():
                output = Path(folder, f"{how.__name__}-{seed}")
                short = replace(recipe("minilm-wiki"), steps=steps, batch_size=32, seed=seed)
                started = time.perf_counter()
                how((run_one, replace(short, output=str(output)), ["Lee"], False))
                taken.append(time.perf_counter() - started)
    for how, taken in seconds.items():
        print(f"{how.__name__:6}" + "".join(f"{s:7.1f} s" for s in taken))
    ratios = [cold / hot for hot, cold in zip(seconds[warm], seconds[fresh], strict=True)]
    print(f"{runs} runs of {steps} steps, the first with the imports of what is forked:")
    print(f"{sum(seconds[fresh]) / sum(seconds[warm]):.2f} times as fast")
    later = ratios[1:]
    print(f"after the first: {median(later):.2f} ({min(later):.2f} to {max(later):.2f})")


if __name__ == "__main__":
    main()
