"""Milliseconds from a moved control to all views of the ablation panel, against a whole new figure.

python benchmarks/panel_redraw.py
"""

import io
import statistics
import time

import numpy as np

from fcse import analysis
from fcse.data import load_corpus
from fcse.encoder import SentenceEncoder
from fcse.widgets import AblationPanel
from fcse.widgets.ablation import PRESETS

ROUNDS = 20
LIMIT = 100


def main() -> None:
    sentences = load_corpus("wiki-mini")
    batch = sentences[:: len(sentences) // 64][:64]
    encoder = SentenceEncoder.from_pretrained("minilm")
    panel = AblationPanel(analysis.batch_similarities(encoder, batch), batch)
    figure = panel._canvas.figure
    moves = {
        "temperature": np.linspace(0.02, 0.4, ROUNDS),
        "m": np.linspace(-0.4, 0.9, ROUNDS),
        "stop_gradient": [True, False] * (ROUNDS // 2),
        "anchor": range(1, ROUNDS + 1),
    }
    redraw, whole = [], []
    for name, values in moves.items():
        seconds = []
        for value in values:
            getattr(panel, name).value = value
            seconds.append(panel.seconds)
            started = time.perf_counter()
            figure.savefig(io.BytesIO(), format="png")
            whole.append(time.perf_counter() - started)
        report(name, seconds)
        redraw += seconds
    seconds = []
    for key in list(PRESETS) * (ROUNDS // len(PRESETS)):
        panel.set_to(key)
        seconds.append(panel.seconds)
    report("preset", seconds)
    redraw += seconds
    report("all of them", redraw)
    report("whole figure", whole)
    slow = sum(1000 * s >= LIMIT for s in redraw)
    print(f"{slow} of {len(redraw)} redraws took {LIMIT} ms or more")


def report(name: str, seconds: list[float]) -> None:
    print(
        f"{name:14} {1000 * statistics.median(seconds):6.1f} ms (worst {1000 * max(seconds):.1f})"
    )


if __name__ == "__main__":
    main()
